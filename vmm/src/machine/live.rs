// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A snapshot whose memory is written while the guest runs (`memory::saving`).
//!
//! ```text
//! hold ─► state, protect memory ─► release, answer        saver: memory ─► spec.json, state.json ─► Saved
//!                                  guest runs ────────────────────────────────────────────────────────────
//! ```
//! All of it is of the moment in which the machine is held. Disks go on with the guest: whoever wants them to be of that
//! moment, too, pauses the machine, asks for the snapshot, copies the disks (or begins an export) and resumes, which it may
//! do while memory is still written.
//!
//! There is one at a time, and the machine does not move meanwhile, since it would end here. If it ends all the same there
//! is no snapshot; nor is there after an error, which [`Machine::end_live`] is told, and the guest is not.
//!
//! Not here: whose child it may be and the files' form (`snapshot`).

use std::time::Instant;

use atoll_devices::memory::{PAGE_BYTES, WORD_PAGES};
use atoll_devices::virtio::Act;
use atoll_disk::chain;
use atoll_vmm_protocol::api::{Request, SavingInfo, SavingStage, Snapshot, SnapshotTaken};
use atoll_vmm_protocol::services::MemoryBacking;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::owner::{Event, Machine};
use super::snapshot::Files;
use super::{RunError, saved};
use crate::api::{self, Answer, Asked};
use crate::memory::saving::{Order, Saving, SavingError, Sink, mark_words};
use crate::memory::{self, HUGE_PAGE_BYTES, USERFAULTFD, Writes};
use crate::saved::SnapshotForm;
use crate::saved::sinks::{ImageSink, PackedSink};

/// Why there is no snapshot.
pub(super) enum SaveError {
    Cancelled,
    /// One line.
    Failed(String),
}

/// One that is under way, or the last.
pub(super) struct Live {
    saving: Saving,
    to: String,
    name: String,
    held_us: u64,
    started: Instant,
    ended: Option<Ended>,
}

struct Ended {
    stage: SavingStage,
    error: Option<String>,
    elapsed_ms: u64,
}

impl Live {
    fn elapsed_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn info(&self) -> SavingInfo {
        let ended = self.ended.as_ref();
        SavingInfo {
            to: self.to.clone(),
            stage: ended.map_or(SavingStage::Saving, |ended| ended.stage),
            memory_bytes: self.saving.written_bytes(),
            remaining_bytes: self.saving.left_bytes(),
            fault_count: self.saving.fault_count(),
            held_us: self.held_us,
            elapsed_ms: ended.map_or_else(|| self.elapsed_ms(), |ended| ended.elapsed_ms),
            error: ended.and_then(|ended| ended.error.clone()),
        }
    }
}

impl Machine {
    /// What makes writes to memory wait, by the descriptor that comes with the request.
    pub(super) fn writes_of(&self, asked: &mut Asked) -> Result<Writes, Answer> {
        let refused = |why: String| {
            let text = format!("the guest cannot run while its memory is written (--live): {why}");
            api::refusal(409, text)
        };
        if let Some(why) = self.live_obstacle() {
            return Err(refused(why));
        }
        let device = asked.file(USERFAULTFD)?;
        let shared = memory::file_of(&self.parts.memory).is_some();
        Writes::open(&device, shared).map_err(|error| refused(chain(&error)))
    }

    /// Why the machine has to be held: one sentence.
    fn live_obstacle(&self) -> Option<String> {
        let parts = &self.parts;
        let filling = parts.filling.as_ref();
        let is_mapped = parts.memory.iter().any(|region| {
            region.file_offset().is_some() && region.flags() & libc::MAP_PRIVATE != 0
        });
        let boot_files = parts.boot_files.as_ref();
        let text = if filling.is_some_and(|filling| !filling.is_complete()) {
            "it is still being read: wait until info says that filling is complete"
        } else if is_mapped {
            "it is the file of the snapshot that it was restored from (--memory-mode map)"
        } else if boot_files.is_some_and(|files| files.is_shared()) {
            "a part of it is the kernel's file (--share-kernel)"
        } else if self.spec.services.memory_backing == MemoryBacking::Hugepages1G {
            "its pages are of 1 GiB, and the guest would wait for each"
        } else {
            return parts.obstacle(Act::LiveSnapshot);
        };
        Some(text.to_owned())
    }

    /// Holds the machine for as long as it takes to save its state and to protect its memory.
    pub(super) fn snapshot_live(
        &mut self,
        files: Files,
        body: &Snapshot,
        form: SnapshotForm,
        writes: Writes,
    ) -> Result<Answer, RunError> {
        let started = Instant::now();
        // What has been touched already need not be looked at while the machine is held.
        let mut wanted = Vec::new();
        if form.parent.is_none() {
            self.mark_touched(&mut wanted);
        }
        let rate = body.max_bytes_per_second;
        let (begun, held_us) = self.while_held(|machine| {
            machine.settle_mirrors();
            let begun = machine.begin_saving(files, &form, writes, wanted, rate);
            let track = body.track.unwrap_or(false) && begun.is_ok();
            machine.track(track.then_some(&form));
            begun
        })?;
        let to = body.to.clone();
        Ok(match begun {
            Ok(saving) => {
                let live = Live {
                    saving,
                    to,
                    name: self.spec.name.clone(),
                    held_us,
                    started,
                    ended: None,
                };
                let taken = SnapshotTaken {
                    memory_bytes: live.saving.written_bytes(),
                    held_us,
                };
                self.live = Some(live);
                api::json(200, &taken)
            }
            Err(error) => api::refusal(500, format!("snapshot to {to}: {error:#}")),
        })
    }

    /// Words of 64 pages in which there may be something.
    fn mark_touched(&self, wanted: &mut Vec<u64>) {
        let touched = self.parts.touched();
        mark_words(
            &self.parts.memory,
            wanted,
            |address, words| match &touched {
                Some(touched) => touched.mark(address, words),
                None => words.fill(!0),
            },
        );
    }

    fn begin_saving(
        &self,
        files: Files,
        form: &SnapshotForm,
        writes: Writes,
        mut wanted: Vec<u64>,
        bytes_per_second: Option<u64>,
    ) -> anyhow::Result<Saving> {
        let mut state = saved::save(&self.parts, &self.spec)?;
        state.snapshot = Some(form.clone());
        // Emptied also for one that has all: the next child's pages are those since this one.
        let tracked = self.tracked.as_ref();
        let pages = tracked.map(|tracked| tracked.log.take()).transpose()?;
        match (&form.parent, pages) {
            (Some(_), Some(pages)) => wanted = pages.concat(),
            _ => self.mark_touched(&mut wanted),
        }
        let file = files.memory.try_clone()?;
        let ram = self.parts.memory.clone();
        let ram_bytes = ram.iter().map(GuestMemoryRegion::len).sum();
        let sink: Box<dyn Sink> = match form.packed {
            true => Box::new(PackedSink::new(file, ram_bytes, form.parent.is_some())),
            false => Box::new(ImageSink::new(file, ram_bytes)?),
        };
        let unit_words = match self.spec.services.memory_backing {
            MemoryBacking::Hugepages2M => HUGE_PAGE_BYTES / (WORD_PAGES * PAGE_BYTES),
            _ => 1,
        };
        let order = Order {
            writes,
            ram,
            wanted,
            unit_words,
            bytes_per_second,
            sink,
        };
        let (spec, events) = (self.spec.clone(), self.events.clone());
        let saving = Saving::start(order, move |done| {
            let done = match done {
                Ok(bytes) => match files.finish(&spec, &state) {
                    Ok(()) => Ok(bytes),
                    Err(error) => Err(SaveError::Failed(format!("{error:#}"))),
                },
                Err(SavingError::Cancelled) => Err(SaveError::Cancelled),
                Err(error) => Err(SaveError::Failed(chain(&error))),
            };
            // Without an owner there is no machine any more.
            let _ = events.send(Event::Saved(done));
        });
        Ok(saving?)
    }

    /// It is over.
    pub(super) fn end_live(&mut self, done: Result<u64, SaveError>) {
        let Some(live) = &mut self.live else { return };
        let (name, to, elapsed_ms) = (&live.name, &live.to, live.elapsed_ms());
        let (stage, error) = match done {
            Ok(memory_bytes) => {
                let (held_us, fault_count) = (live.held_us, live.saving.fault_count());
                tracing::info!(
                    name,
                    to,
                    memory_bytes,
                    held_us,
                    fault_count,
                    elapsed_ms,
                    "live snapshot"
                );
                (SavingStage::Completed, None)
            }
            Err(SaveError::Cancelled) => (
                SavingStage::Cancelled,
                Some("the snapshot was cancelled".to_owned()),
            ),
            Err(SaveError::Failed(why)) => {
                tracing::warn!(name, to, why, "there is no live snapshot");
                (SavingStage::Failed, Some(why))
            }
        };
        if stage != SavingStage::Completed {
            // What it has taken from the log is in no file.
            self.tracked = None;
        }
        live.ended = Some(Ended {
            stage,
            error,
            elapsed_ms,
        });
    }

    /// How the last one is.
    pub(super) fn saving(&self) -> Result<SavingInfo, Answer> {
        let live = self.live.as_ref();
        live.map(Live::info)
            .ok_or_else(|| api::refusal(404, "the machine has not been asked for a live snapshot"))
    }

    /// Gives it up, if it is under way.
    pub(super) fn cancel_live(&self) -> Result<SavingInfo, Answer> {
        let info = self.saving()?;
        if let Some(live) = &self.live {
            live.saving.cancel();
        }
        Ok(info)
    }

    /// Why this request has to wait, while memory is written.
    pub(super) fn refuse_while_saving(&self, request: Request) -> Option<Answer> {
        let saving = self.live.as_ref().is_some_and(|live| live.ended.is_none());
        let waits = matches!(
            request,
            Request::Snapshot | Request::Migrate | Request::Upgrade
        );
        (saving && waits).then(|| {
            let text = "a live snapshot is being written: wait (saving tells), or cancel-snapshot";
            api::refusal(409, text)
        })
    }
}

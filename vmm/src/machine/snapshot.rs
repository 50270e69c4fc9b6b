// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The request `snapshot`: a held machine's spec, state and RAM into three files of the asker.
//!
//! ```text
//! hold ─► state (JSON) ─► memory (holes for zeroes, or packed) ─► spec.json, state.json ─► release
//! ```
//! The state's file is written last: a directory in which it is empty is no snapshot.
//!
//! **Children.** With `track` what is written to RAM is logged from that snapshot on. The next one may then name it as its
//! parent, and has only the pages that were written since, so the machine is held for a moment. The log costs the guest
//! a fault for each page that it writes first. It ends with a snapshot that does not ask for it, with a move of the
//! machine, and with a child that could not be written, since what it has taken from the log is in no file then.
//!
//! **Live.** With `live` the machine is held for a moment only, see `live`; what is said above is so all the same.
//!
//! Not here: the formats (`crate::saved`), the names of the files (`crate::ctl`), the machine's disks, whose copy is the
//! asker's affair.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use atoll_devices::virtio::Act;
use atoll_vmm_protocol::api::{Snapshot, SnapshotTaken};
use atoll_vmm_protocol::spec::MachineSpec;

use super::owner::Machine;
use super::{RunError, generation, saved};
use crate::api::{self, Answer, Asked};
use crate::kvm::dirty::WriteLog;
use crate::saved::packed::{self, Wanted};
use crate::saved::{MachineState, Parent, SnapshotForm, image};

/// Longest state of a parent that is looked at.
const STATE_BYTES_MAX: u64 = 64 << 20;

/// Files of a snapshot, in the order in which they come with the request.
pub(super) struct Files {
    spec: File,
    state: File,
    pub(super) memory: File,
}

impl Files {
    fn of(asked: &mut Asked) -> Result<Self, Answer> {
        Ok(Self {
            spec: asked.file("spec.json")?,
            state: asked.file("state.json")?,
            memory: asked.file("memory")?,
        })
    }

    /// What makes the directory a snapshot, once its memory is written.
    pub(super) fn finish(&self, spec: &MachineSpec, state: &MachineState) -> anyhow::Result<()> {
        let whole = |file: &File, bytes: &[u8]| -> io::Result<()> {
            file.set_len(0)?;
            file.write_all_at(bytes, 0)
        };
        whole(&self.spec, &serde_json::to_vec_pretty(spec)?)?;
        let written = whole(&self.state, &state.to_json());
        if written.is_err() {
            let _ = self.state.set_len(0);
        }
        Ok(written?)
    }
}

/// The last snapshot, and what was written to RAM since.
pub(super) struct Tracked {
    id: String,
    pub(super) log: WriteLog,
}

impl Machine {
    /// Holds the machine for as long as its RAM takes to be written.
    pub(super) fn snapshot(&mut self, mut asked: Asked) -> Result<Answer, RunError> {
        let planned = Files::of(&mut asked).and_then(|files| {
            let body: Snapshot = api::body(std::mem::take(&mut asked.body))?;
            let parent = body.parent.is_some();
            let parent = parent.then(|| asked.file("the parent's state.json"));
            let form = self.form_of(&body, parent.transpose()?)?;
            let live = body.live.unwrap_or(false);
            if body.max_bytes_per_second.is_some() && !live {
                let text = "max_bytes_per_second is of a live snapshot: the guest would be held for longer";
                return Err(api::refusal(400, text));
            }
            let writes = live.then(|| self.writes_of(&mut asked)).transpose()?;
            Ok((files, body, form, writes))
        });
        let (files, body, form, writes) = match planned {
            Ok(planned) => planned,
            Err(refused) => return Ok(refused),
        };
        if let Some(writes) = writes {
            return self.snapshot_live(files, &body, form, writes);
        }
        let (written, held_us) = self.while_held(|machine| {
            machine.settle_mirrors();
            let written = machine.write_snapshot(&files, &form);
            let track = body.track.unwrap_or(false) && written.is_ok();
            machine.track(track.then_some(&form));
            written
        })?;
        let to = body.to;
        Ok(match written {
            Ok(memory_bytes) => {
                tracing::info!(name = self.spec.name, to, memory_bytes, held_us, "snapshot");
                let taken = SnapshotTaken {
                    memory_bytes,
                    held_us,
                };
                api::json(200, &taken)
            }
            Err(error) => api::refusal(500, format!("snapshot to {to}: {error:#}")),
        })
    }

    /// What the snapshot will be among others, if it can be that. `parent` is the state of the one that it names.
    fn form_of(&self, body: &Snapshot, parent: Option<File>) -> Result<SnapshotForm, Answer> {
        let tracks = body.track == Some(true) || body.parent.is_some();
        if let Some(text) = self.parts.elsewhere() {
            return Err(api::refusal(409, text));
        }
        // What a device outside of this process writes is in no log.
        let acts = [Some(Act::Snapshot), tracks.then_some(Act::Migration)];
        if let Some(text) = acts
            .into_iter()
            .flatten()
            .find_map(|act| self.parts.obstacle(act))
        {
            return Err(api::refusal(409, text));
        }
        let id = generation::random();
        let id = id.map_err(|error| api::refusal(500, format!("take a random number: {error}")))?;
        let parent = body.parent.as_ref().map(|directory| {
            let known = parent.as_ref().and_then(form_in).map(|form| form.id);
            let tracked = self.tracked.as_ref().map(|tracked| tracked.id.clone());
            match known.filter(|id| Some(id) == tracked.as_ref()) {
                Some(id) => Ok(Parent { id, directory: directory.into() }),
                None => Err(api::refusal(
                    409,
                    format!(
                        "{directory} is not the machine's last snapshot, or was taken without --track true: \
                         what was written since is not known"
                    ),
                )),
            }
        });
        let parent = parent.transpose()?;
        Ok(SnapshotForm {
            id: atoll_devices::state::hex::encode(&id),
            packed: body.packed == Some(true) || parent.is_some(),
            parent,
        })
    }

    /// From now on what is written is for a child of this snapshot; or no more.
    pub(super) fn track(&mut self, form: Option<&SnapshotForm>) {
        let Some(SnapshotForm { id, .. }) = form else {
            self.tracked = None;
            return;
        };
        // The log of a parent has been emptied for this one, and goes on.
        let log = match self.tracked.take() {
            Some(tracked) => Ok(tracked.log),
            // All that was written before is in this one.
            None => (self.parts.log_writes()).and_then(|log| log.take().map(|_| log)),
        };
        match log {
            Ok(log) => {
                self.tracked = Some(Tracked {
                    id: id.clone(),
                    log,
                })
            }
            Err(error) => tracing::warn!(%error, "the snapshot will have no children"),
        }
    }

    fn write_snapshot(&self, files: &Files, form: &SnapshotForm) -> anyhow::Result<u64> {
        let mut state = saved::save(&self.parts, &self.spec)?;
        let (ram, touched) = (&self.parts.memory, self.parts.touched());
        let touched = touched.as_deref();
        // Emptied also for one that has all: the next child's pages are those since this one.
        let tracked = self.tracked.as_ref();
        let pages = tracked.map(|tracked| tracked.log.take()).transpose()?;
        let memory_bytes = match (form.packed, &form.parent, &pages) {
            (_, Some(_), Some(pages)) => packed::write(ram, Wanted::Written(pages), &files.memory)?,
            (true, ..) => packed::write(ram, Wanted::All(touched), &files.memory)?,
            (false, ..) => image::write(ram, touched, &files.memory)?,
        };
        state.snapshot = Some(form.clone());
        files.finish(&self.spec, &state)?;
        Ok(memory_bytes)
    }
}

/// What the state in a file says of its snapshot.
fn form_in(file: &File) -> Option<SnapshotForm> {
    let size = file.metadata().ok()?.len();
    let mut bytes = vec![0; usize::try_from(size.min(STATE_BYTES_MAX)).ok()?];
    file.read_exact_at(&mut bytes, 0).ok()?;
    MachineState::from_json(&bytes).ok()?.snapshot
}

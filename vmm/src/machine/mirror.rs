// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Requests that move a disk of a running machine to another place: `atoll_disk` copies it, this begins, switches and
//! ends that.
//!
//! ```text
//! begin-mirror      hold ─► changes are marked ─► release ─► Following: the thread `mirror` copies
//! complete-mirror   hold ─► the rest is copied and durable ─► Switched ─► release
//! cancel-mirror     Following: given up.  Switched, and paused since: both hold the same, so the former place is taken
//!                   back. Who records elsewhere where the disk is does so while the machine is paused.
//! ```
//! Until the switch the disk is where it was, whatever happens to the target, to this process or to the host.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use atoll_disk::{BlockBackend, Geometry, Mirror, MirrorOptions, SettleError, chain};
use atoll_vmm_protocol::api::{
    Acted, BeginMirror, CancelMirror, CompleteMirror, MachineState, MirrorInfo, MirrorStage,
    Mirrors, Request,
};
use atoll_vmm_protocol::spec::DiskSpec;

use super::RunError;
use super::disks;
use super::owner::Machine;
use crate::api::{self, Answer, Asked};
use crate::check;
use crate::migration::MigrationError;
use crate::migration::disks::{Following, Target};
use crate::resources::Replacement;

/// How long a guest stands still for the rest, unless it is said otherwise.
const DOWNTIME_LIMIT_MS: u64 = 1000;

/// A mirror, or how it ended.
pub(super) struct Mirroring {
    id: String,
    /// The disk as it is at the target.
    at_target: DiskSpec,
    held_us: u64,
    stage: Stage,
    /// As it was when it ended.
    last: Option<MirrorInfo>,
}

enum Stage {
    /// The target follows the disk.
    Following { mirror: Mirror, target: Replacement },
    /// The disk is at the target. With what it was before, as long as both hold the same.
    Switched(Option<Box<(Replacement, DiskSpec)>>),
}

impl Mirroring {
    fn told(&self) -> MirrorInfo {
        let Stage::Following { mirror, .. } = &self.stage else {
            let last = self.last.clone();
            return last.expect("noted at the switch");
        };
        let progress = mirror.progress();
        MirrorInfo {
            id: self.id.clone(),
            path: self.at_target.path.clone(),
            stage: match (&progress.failed, progress.ready) {
                (Some(_), _) => MirrorStage::Failed,
                (None, true) => MirrorStage::Ready,
                (None, false) => MirrorStage::Copying,
            },
            size_bytes: progress.size_bytes,
            copied_bytes: progress.copied_bytes,
            left_bytes: progress.left_bytes,
            bytes_per_second: progress.bytes_per_second,
            slowed_to_bytes_per_second: progress.slowed_to,
            held_us: self.held_us,
            error: progress.failed,
        }
    }

    /// Whether it copies.
    fn is_under_way(&self) -> bool {
        match &self.stage {
            Stage::Following { mirror, .. } => mirror.progress().failed.is_none(),
            Stage::Switched(_) => false,
        }
    }
}

impl Machine {
    /// Begins to copy the disk that the request names to the images that came with it.
    pub(super) fn begin_mirror(&mut self, asked: Asked) -> Result<Answer, RunError> {
        let (body, at_target, target) = match self.mirror_request(asked) {
            Ok(request) => request,
            Err(refused) => return Ok(refused),
        };
        let (mirror, held_us) = self.while_held(|machine| {
            let begun = machine.follow(&body.id, target.backend.clone(), body.bytes_per_second);
            begun.map_err(|error| api::refusal(500, format!("mirror {}: {error}", body.id)))
        })?;
        let mirror = match mirror {
            Ok(mirror) => mirror,
            Err(refused) => return Ok(refused),
        };
        let id = body.id;
        tracing::info!(name = self.spec.name, id, to = %at_target.path.display(), "mirror begins");
        self.forget_mirror(&id);
        let mirroring = Mirroring {
            id,
            at_target,
            held_us,
            stage: Stage::Following { mirror, target },
            last: None,
        };
        let told = mirroring.told();
        self.mirrors.push(mirroring);
        Ok(api::json(200, &told))
    }

    /// The request's body, the disk as it will be, and its images, if it can be done at all.
    fn mirror_request(&self, asked: Asked) -> Result<(BeginMirror, DiskSpec, Replacement), Answer> {
        let body: BeginMirror = api::body(asked.body)?;
        let refused = |text: String| api::refusal(409, format!("{}: {text}", body.id));
        let disk = disks::find(&self.parts, &body.id)?;
        let Some(backup) = disk.backup() else {
            return Err(refused(
                "it is a drive, and only a disk is moved".to_owned(),
            ));
        };
        if self.is_mirrored(&body.id) {
            let text = "it is being mirrored already: complete-mirror or cancel-mirror first";
            return Err(refused(text.to_owned()));
        }
        let BeginMirror { to, .. } = &body;
        let place = DiskSpec {
            path: to.path.clone(),
            format: to.format,
            backing: to.backing.clone(),
            cache: to.cache,
            ..DiskSpec::default()
        };
        if *to != place || to.path.as_os_str().is_empty() {
            let text = "a target has a path, a format, backing images and a cache; the rest is the disk's own";
            return Err(api::refusal(400, text));
        }
        let mut spec = self.spec.clone();
        let disk = disks::in_spec(&mut spec, &body.id);
        set_place(disk, &place);
        let at_target = disk.clone();
        check::shape(&spec).map_err(|error| refused(error.to_string()))?;
        let (files, taking) = (asked.files, at_target.clone());
        // Whether io_uring is to be had is found out by trying, which only the starter may.
        let target = atoll_thread::in_starter(move || Replacement::take(files, &taking));
        let target = target.map_err(|error| refused(chain(&error)))?;
        let fits = backup.switchable.check(&*target.backend);
        fits.map_err(|error| refused(format!("the target cannot take its place: {error}")))?;
        Ok((body, at_target, target))
    }

    /// Of a held machine that has this disk.
    fn follow(
        &self,
        id: &str,
        target: Arc<dyn BlockBackend>,
        bytes_per_second: Option<u64>,
    ) -> io::Result<Mirror> {
        let disk = disks::find(&self.parts, id).ok();
        let parts = disk.and_then(|disk| disk.backup().zip(disk.limited()));
        let (backup, limited) = parts.expect("looked at before");
        let (tracked, limited) = (backup.tracked.clone(), limited.clone());
        let options = MirrorOptions {
            bytes_per_second,
            slow_down: Box::new(move |rate| limited.slow_writes(rate)),
        };
        // Opens queues, which may be io_urings.
        atoll_thread::in_starter(move || Mirror::begin(tracked, &*target, options))
    }

    /// The size of a disk whose content can be moved with the machine.
    pub(super) fn movable_disk(&self, id: &str) -> Result<u64, Answer> {
        let disk = disks::find(&self.parts, id)?;
        let refused = |text: &str| Err(api::refusal(409, format!("{id}: {text}")));
        match disk.backup().map(|backup| backup.switchable.geometry()) {
            None => refused("it is a drive, and only a disk is moved"),
            Some(Geometry { read_only, .. }) if read_only => {
                refused("it is read-only: copy its image before, and do not name it")
            }
            Some(geometry) => Ok(geometry.size_bytes),
        }
    }

    /// Begins to copy disks to the target of the machine's move.
    pub(super) fn follow_to(
        &mut self,
        targets: Vec<Target>,
        bytes_per_second: Option<u64>,
    ) -> Result<Result<Vec<Following>, MigrationError>, RunError> {
        let count = u64::try_from(targets.len()).unwrap_or(u64::MAX).max(1);
        let share = bytes_per_second.map(|all| (all / count).max(1));
        for Target { id, backend } in &targets {
            let disk = disks::find(&self.parts, id).ok();
            let backup = disk.and_then(|disk| disk.backup());
            // A guest may have let it go since it was looked at.
            let Some(backup) = backup else {
                return Ok(Err(MigrationError::disk(id, "it is gone".to_owned())));
            };
            if let Err(error) = backup.switchable.check(&**backend) {
                let reason = format!("the target cannot take its place: {error}");
                return Ok(Err(MigrationError::disk(id, reason)));
            }
        }
        let (following, held_us) = self.while_held(|machine| {
            let following = targets.into_iter().map(|Target { id, backend }| {
                let begun = machine.follow(&id, backend, share);
                let mirror = begun.map_err(|error| MigrationError::disk(&id, error.to_string()))?;
                Ok(Following { id, mirror })
            });
            following.collect()
        })?;
        tracing::info!(name = self.spec.name, held_us, "disks are copied");
        Ok(following)
    }

    /// Lets the target take the disk's place.
    pub(super) fn complete_mirror(&mut self, asked: Asked) -> Result<Answer, RunError> {
        let (index, limit) = match self.completion_request(asked) {
            Ok(request) => request,
            Err(refused) => return Ok(refused),
        };
        let (switched, held_us) = self.while_held(|machine| {
            let settled = match &machine.mirrors[index].stage {
                Stage::Following { mirror, .. } => mirror.settle(limit),
                Stage::Switched(_) => unreachable!("looked at before"),
            };
            let switched = settled.map(|()| machine.switch(index));
            if machine.state == MachineState::Running {
                machine.settle_mirrors();
            }
            switched
        })?;
        let mirroring = &mut self.mirrors[index];
        Ok(match switched {
            Ok(grown) => {
                let id = mirroring.id.clone();
                if let Some(last) = &mut mirroring.last {
                    last.held_us = held_us;
                }
                let told = mirroring.told();
                let to = told.path.display();
                tracing::info!(name = self.spec.name, id, %to, held_us, "a disk has been moved");
                if grown && let Ok(disk) = disks::find(&self.parts, &id) {
                    disk.tell_size();
                }
                api::json(200, &told)
            }
            Err(error) => {
                let hint = match error {
                    SettleError::Late(_) => ": it goes on; allow more with downtime_limit_ms",
                    SettleError::Failed(_) => "",
                };
                api::refusal(409, format!("{}: {error}{hint}", mirroring.id))
            }
        })
    }

    fn completion_request(&self, asked: Asked) -> Result<(usize, Duration), Answer> {
        let body: CompleteMirror = api::body(asked.body)?;
        let index = self.mirror_index(&body.id)?;
        let told = self.mirrors[index].told();
        let id = &body.id;
        match told.stage {
            MirrorStage::Ready => {}
            // Nobody writes: however much it is, it is not becoming more.
            MirrorStage::Copying if self.state == MachineState::Paused => {}
            MirrorStage::Copying => {
                let text = format!("{id}: {} bytes are left to copy: wait", told.left_bytes);
                return Err(api::refusal(409, text));
            }
            MirrorStage::Switched => {
                return Err(api::refusal(409, format!("{id} is there already")));
            }
            MirrorStage::Failed => {
                let reason = told.error.unwrap_or_default();
                return Err(api::refusal(
                    409,
                    format!("{id}: the mirror has failed: {reason}"),
                ));
            }
        }
        if self.is_exported(id) {
            let text = format!("{id} is being exported: end-export first");
            return Err(api::refusal(409, text));
        }
        let limit_ms = body.downtime_limit_ms.unwrap_or(DOWNTIME_LIMIT_MS);
        Ok((index, Duration::from_millis(limit_ms)))
    }

    /// Of a held machine whose target has settled. Whether the disk has become larger.
    fn switch(&mut self, index: usize) -> bool {
        let mirroring = &mut self.mirrors[index];
        let told = mirroring.told();
        let Stage::Following { mirror, target } =
            std::mem::replace(&mut mirroring.stage, Stage::Switched(None))
        else {
            unreachable!("looked at before");
        };
        // Its thread reads the former place, and writes to what the guest is about to write to.
        drop(mirror);
        mirroring.last = Some(MirrorInfo {
            stage: MirrorStage::Switched,
            ..told
        });
        let (id, at_target) = (mirroring.id.clone(), mirroring.at_target.clone());
        let disk = disks::find_mut(&mut self.parts, &id).expect("a mirror goes with its disk");
        let size_bytes = disk.size_bytes();
        let former = disk.exchange(target).expect("a drive has no mirror");
        let grown = disk.size_bytes() > size_bytes;
        self.forget_kept(&id);
        let disk = disks::in_spec(&mut self.spec, &id);
        let former = Some(Box::new((former, disk.clone())));
        set_place(disk, &at_target);
        self.mirrors[index].stage = Stage::Switched(former);
        grown
    }

    /// Leaves a disk where it is, or takes it back to where it was while nobody has written since.
    pub(super) fn cancel_mirror(&mut self, asked: Asked) -> Result<Acted, Answer> {
        let CancelMirror { id } = api::body(asked.body)?;
        let index = self.mirror_index(&id)?;
        match &mut self.mirrors[index].stage {
            Stage::Following { .. } => {}
            Stage::Switched(former) => match former.take() {
                None => {
                    let text = format!("{id} has been moved, and the guest has gone on since");
                    return Err(api::refusal(409, text));
                }
                Some(former) => {
                    let (former, former_spec) = *former;
                    let disk = disks::find_mut(&mut self.parts, &id)?;
                    disk.exchange(former);
                    set_place(disks::in_spec(&mut self.spec, &id), &former_spec);
                }
            },
        }
        self.mirrors.remove(index);
        tracing::info!(name = self.spec.name, id, "mirror given up");
        Ok(Acted { state: self.state })
    }

    /// How they are.
    pub(super) fn mirrors_told(&self) -> Mirrors {
        Mirrors {
            mirrors: self.mirrors.iter().map(Mirroring::told).collect(),
        }
    }

    /// The guest is about to go on, or what the machine is now to be kept: what has been switched stays so.
    pub(super) fn settle_mirrors(&mut self) {
        for mirroring in &mut self.mirrors {
            if let Stage::Switched(former) = &mut mirroring.stage {
                *former = None;
            }
        }
    }

    /// Ends the mirror of a disk that goes, or the memory of its last one.
    pub(super) fn forget_mirror(&mut self, id: &str) {
        self.mirrors.retain(|mirroring| mirroring.id != id);
    }

    fn is_mirrored(&self, id: &str) -> bool {
        let mut mirrors = self.mirrors.iter();
        mirrors.any(|mirroring| mirroring.id == id && mirroring.is_under_way())
    }

    fn mirror_index(&self, id: &str) -> Result<usize, Answer> {
        let index = self.mirrors.iter().position(|mirroring| mirroring.id == id);
        index.ok_or_else(|| api::refusal(404, format!("{id} has no mirror")))
    }

    /// Why this request has to wait for a mirror.
    pub(super) fn refuse_while_mirroring(&self, asked: &Asked) -> Option<Answer> {
        let mirroring = match asked.request {
            // Its disks are at two places, and only one of them is told to the other process.
            Request::Migrate | Request::Upgrade => {
                self.mirrors.iter().find(|one| one.is_under_way())?
            }
            Request::ResizeDisk | Request::RemoveDevice => {
                let id = asked.body.get("id")?.as_str()?;
                let mut mirrors = self.mirrors.iter();
                mirrors.find(|one| one.id == id && one.is_under_way())?
            }
            _ => return None,
        };
        let text = format!(
            "{} is being mirrored: complete-mirror or cancel-mirror first",
            mirroring.id
        );
        Some(api::refusal(409, text))
    }
}

/// Says that a disk is where another one is; the rest is its own, and may have changed since that one was looked at.
fn set_place(disk: &mut DiskSpec, other: &DiskSpec) {
    disk.path.clone_from(&other.path);
    disk.format = other.format;
    disk.backing.clone_from(&other.backing);
    disk.cache = other.cache;
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! What the owner does while its machine moves to another process (`crate::migration`): begins it, holds the
//! machine when the thread `migrate` asks for that, and lets it go on if nothing came of it.
//!
//! ```text
//!   Running ── migrate ──► Running, copying ── Hold ──► Running, held ── Done(Ok) ──► Migrated (ends soon)
//!      │                        │                            ├─ Taken ──► Migrated, memory is sent ── Done ──► the same
//!      ▲                        │                            │
//!      └──────── Done(error) ───┴────────────────────────────┤
//!                                            Done(in doubt)  └──► Paused, until somebody who knows says more
//! ```

use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Sender, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use atoll_devices::memory::Ram;
use atoll_devices::virtio::{Act, VirtioPci};
use atoll_disk::{Limited, chain};
use atoll_thread::Kind;
use atoll_vmm_protocol::api::{
    DISK_CONNECTIONS, FAULT_CONNECTIONS, MachineState, Migrate, MigrationInfo, MigrationStage,
    Request, WhenLate,
};

use super::disks::{self, Disk};
use super::owner::{Event, GuestEvent, Machine};
use super::{Outcome, RunError, saved};
use crate::api::{self, Answer, Asked};
use crate::kvm::VirtualMachine;
use crate::kvm::dirty::WriteLog;
use crate::migration::converge::Convergence;
use crate::migration::disks::{Following, Moving, MovingDisk, Target};
use crate::migration::postcopy::{self, PostCopy};
use crate::migration::socket::Socket;
use crate::migration::source::{self, Plan, Progress};
use crate::migration::{Hello, MigrationError};
use crate::saved::MachineState as Saved;

/// How long a machine that has moved still answers, so that whoever asked for it learns how it went.
const AFTERLIFE: Duration = Duration::from_secs(10);
/// How long a target that has failed may take to end, and how often it is looked at.
const DISK_PATIENCE: Duration = Duration::from_secs(10);
/// See [`DISK_PATIENCE`].
const DISK_POLL: Duration = Duration::from_millis(5);
/// What a guest stands still at most, unless it is said otherwise.
const DOWNTIME_LIMIT_MS: u64 = 300;

/// What the thread `migrate` says to the owner.
pub(super) enum MigrationEvent {
    /// Make the vCPUs rest for a while.
    Rest(Duration),
    /// Copy disks to the target from now on.
    Follow(
        Vec<Target>,
        SyncSender<Result<Vec<Following>, MigrationError>>,
    ),
    /// The machine is the target's, which needs its memory still.
    Taken,
    /// Hold the machine and give its state.
    Hold(SyncSender<Result<Saved, MigrationError>>),
    /// It is over.
    Done(Result<(), MigrationError>),
}

/// The way from the thread `migrate` to the owner. Without an owner the machine has ended, and what is said to it is lost.
#[derive(Clone)]
pub(super) struct Voice {
    events: Sender<Event>,
    machine: VirtualMachine,
    memory: Arc<Ram>,
    /// None comes or goes meanwhile.
    functions: Vec<Arc<VirtioPci>>,
    /// Likewise: what the guest writes to.
    written: Vec<Arc<Limited>>,
}

impl Voice {
    pub(super) fn tell(&self, event: MigrationEvent) {
        let _ = self.events.send(Event::Migration(event));
    }
}

impl source::Owner for Voice {
    fn rest(&self, time: Duration) {
        self.tell(MigrationEvent::Rest(time));
    }

    fn follow(&self, targets: Vec<Target>) -> Result<Vec<Following>, MigrationError> {
        let (sender, answer) = sync_channel(1);
        self.tell(MigrationEvent::Follow(targets, sender));
        answer.recv().unwrap_or(Err(MigrationError::Ended))
    }

    fn log(&self) -> Result<WriteLog, MigrationError> {
        let functions = self.functions.clone();
        let log = WriteLog::start(self.machine.clone(), self.memory.clone(), functions);
        log.map_err(|error| MigrationError::Refused(chain(&error)))
    }

    fn flush(&self) {
        for disk in &self.written {
            // Once more, and heard, when the machine is held.
            let _ = disks::flush(disk.clone());
        }
    }

    fn hold(&self) -> Result<Saved, MigrationError> {
        let (sender, answer) = sync_channel(1);
        self.tell(MigrationEvent::Hold(sender));
        answer.recv().unwrap_or(Err(MigrationError::Ended))
    }

    fn taken(&self) {
        self.tell(MigrationEvent::Taken);
    }
}

/// The machine's migration, the last one or the one under way.
pub(super) struct Migration {
    progress: Arc<Progress>,
    under_way: bool,
    held: bool,
    moved: Option<Instant>,
    /// Why the guest runs nowhere.
    lost: Option<String>,
    /// Disks whose content moves along, and the most that is copied of all of them in a second.
    disks: Vec<String>,
    bytes_per_second: Option<u64>,
    /// To a process that has what this one has, open as it is; whoever asked for that is told the end here.
    report: Option<UnixStream>,
}

impl Migration {
    /// When the process ends because the machine has moved.
    pub(super) fn end(&self) -> Option<Instant> {
        // Of one that has all of this one's descriptors, the other process answers already.
        let afterlife = match self.report {
            None => AFTERLIFE,
            Some(_) => Duration::ZERO,
        };
        self.moved.map(|moved| moved + afterlife)
    }

    /// Of a machine that goes on in another process with all that it has open.
    pub(super) fn of_upgrade(progress: Arc<Progress>, report: UnixStream) -> Self {
        Self {
            progress,
            under_way: true,
            held: false,
            moved: None,
            disks: Vec::new(),
            bytes_per_second: None,
            lost: None,
            report: Some(report),
        }
    }

    /// Whether it is one of those.
    pub(super) fn is_upgrade(&self) -> bool {
        self.report.is_some()
    }

    /// Whether the machine is another process's.
    pub(super) fn has_moved(&self) -> bool {
        self.moved.is_some()
    }

    /// Tells whoever asked for an upgrade how it has ended.
    fn tell_end(&self) {
        if let Some(report) = &self.report {
            let told = serde_json::to_vec(&self.progress.info());
            let told = told.expect("the API's types have string keys only");
            // Whoever has gone away is not told.
            let _ = (&*report).write_all(&told);
            let _ = report.shutdown(std::net::Shutdown::Both);
        }
    }

    /// How the process ends then.
    pub(super) fn outcome(&self) -> Outcome {
        match &self.lost {
            Some(reason) => Outcome::Crashed {
                reason: reason.clone(),
            },
            None => Outcome::Migrated,
        }
    }
}

impl Machine {
    /// Whether it may be another process's soon, with what it consists of now.
    pub(super) fn is_moving(&self) -> bool {
        self.migration.as_ref().is_some_and(|it| it.under_way)
    }

    /// Why this request has to wait, while the machine moves.
    pub(super) fn refuse_while_moving(&self, request: Request) -> Option<Answer> {
        let moving = self.is_moving();
        let harmless = matches!(
            request,
            Request::Info
                | Request::Counters
                | Request::Migration
                | Request::SwitchMigration
                | Request::CancelMigration
        );
        (moving && !harmless).then(|| {
            let text = "the machine is moving to another process: wait, or cancel-migration";
            api::refusal(409, text)
        })
    }

    /// Begins a migration over the connections that came with the request.
    pub(super) fn migrate(&mut self, asked: Asked) -> Answer {
        match self.begin_migration(asked) {
            Ok(info) => api::json(200, &info),
            Err(refused) => refused,
        }
    }

    fn begin_migration(&mut self, mut asked: Asked) -> Result<MigrationInfo, Answer> {
        if self.state != MachineState::Running {
            let text = "the machine does not run: resume it first, or take a snapshot";
            return Err(api::refusal(409, text));
        }
        if let Some(text) = self.parts.elsewhere() {
            return Err(api::refusal(409, text));
        }
        if let Some(text) = self.parts.obstacle(Act::Migration) {
            return Err(api::refusal(409, text));
        }
        // Its clients would read to the end of this process, and no further.
        self.refuse_while_exporting()?;
        let control = asked.file("the control connection")?;
        let mut data = Vec::from(asked.files);
        let body: Migrate = api::body(asked.body)?;
        let disks = self.moving_disks(&body.disks, &mut data)?;
        let lines = self.fault_lines(&body, &mut data)?;
        let post_copy = (!lines.is_empty()).then_some(PostCopy {
            fault_connections: lines.len(),
        });
        if data.is_empty() {
            return Err(api::refusal(400, "a migration needs a data connection"));
        }
        let limit_ms = body.downtime_limit_ms.unwrap_or(DOWNTIME_LIMIT_MS);
        let told = disks.iter().map(|moving| moving.disk.clone()).collect();
        let cpu = self.parts.first_cpu();
        let hello = Hello::new(self.spec.clone(), &cpu, data.len(), told, post_copy);
        let plan = Plan {
            control: OwnedFd::from(control).into(),
            data: data.into_iter().map(Socket::from).collect(),
            lines,
            disks,
            convergence: Convergence {
                downtime_limit: Duration::from_millis(limit_ms),
                max_bytes_per_second: body.max_bytes_per_second,
                throttle: body.throttle.unwrap_or(post_copy.is_none()),
                when_late: body.when_late.unwrap_or_default(),
            },
            relayed: body.relayed.unwrap_or(false),
        };
        let failed = |error: &dyn std::error::Error| api::refusal(500, chain(error));
        let progress = Arc::new(Progress::new(&plan).map_err(|error| failed(&error))?);
        // There is one log, and the move takes from it.
        self.tracked = None;
        let owner = self.voice();
        let (touched, shared) = (self.parts.touched(), progress.clone());
        let work = move || {
            let done = source::run(plan, hello, touched, &shared, &owner);
            owner.tell(MigrationEvent::Done(done));
        };
        let thread = atoll_thread::spawn(Kind::Migration, "migrate", work);
        thread.map_err(|error| failed(&error))?;
        tracing::info!(name = self.spec.name, "migration begins");
        let info = progress.info();
        self.migration = Some(Migration {
            progress,
            under_way: true,
            held: false,
            moved: None,
            lost: None,
            disks: body.disks,
            bytes_per_second: body.max_bytes_per_second,
            report: None,
        });
        Ok(info)
    }

    /// The way to this owner for the thread that moves the machine.
    pub(super) fn voice(&self) -> Voice {
        Voice {
            events: self.events.clone(),
            machine: self.parts.machine.clone(),
            memory: self.parts.memory.clone(),
            functions: self.parts.backplane.functions().cloned().collect(),
            written: self.parts.disks.iter().filter_map(Disk::written).collect(),
        }
    }

    /// How far it is.
    pub(super) fn migration_info(&self) -> Answer {
        match &self.migration {
            Some(migration) => api::json(200, &migration.progress.info()),
            None => api::refusal(404, "the machine has not been asked to migrate"),
        }
    }

    /// The last connections but those of disks, if the move may end with post-copy.
    fn fault_lines(
        &self,
        body: &Migrate,
        connections: &mut Vec<OwnedFd>,
    ) -> Result<Vec<UnixStream>, Answer> {
        if body.when_late != Some(WhenLate::PostCopy) {
            return Ok(Vec::new());
        }
        if let Some(obstacle) = postcopy::obstacle(&self.spec) {
            return Err(api::refusal(409, obstacle));
        }
        let first = connections.len().checked_sub(FAULT_CONNECTIONS);
        let first = first.ok_or_else(|| {
            let text = format!("post-copy needs {FAULT_CONNECTIONS} connections more");
            api::refusal(400, text)
        })?;
        let lines = connections.split_off(first).into_iter();
        Ok(lines.map(UnixStream::from).collect())
    }

    /// Has the guest run at the target as soon as that is possible.
    pub(super) fn switch_migration(&self) -> Answer {
        match self.migration.as_ref().filter(|it| it.under_way) {
            None => api::refusal(409, "no migration is under way"),
            Some(migration) if migration.progress.switch() => {
                api::json(200, &migration.progress.info())
            }
            Some(_) => api::refusal(
                409,
                "the move cannot end with post-copy: begin it with --when-late post-copy",
            ),
        }
    }

    /// Ends it, unless the machine is the target's already.
    pub(super) fn cancel_migration(&self) -> Answer {
        match self.migration.as_ref().filter(|it| it.under_way) {
            None => api::refusal(409, "no migration is under way"),
            Some(migration) if migration.progress.cancel() => {
                api::json(200, &migration.progress.info())
            }
            Some(_) => api::refusal(409, "too late: the machine has been handed over"),
        }
    }

    pub(super) fn obey_migration(&mut self, event: MigrationEvent) -> Result<(), RunError> {
        match event {
            MigrationEvent::Rest(time) => {
                // One that was sent before the machine was held, or before its move was over.
                if self
                    .migration
                    .as_ref()
                    .is_some_and(|it| it.under_way && !it.held)
                {
                    self.parts.vcpus.iter().for_each(|vcpu| vcpu.rest(time));
                }
                Ok(())
            }
            MigrationEvent::Follow(targets, sender) => {
                let limit = self.migration.as_ref().and_then(|it| it.bytes_per_second);
                let following = self.follow_to(targets, limit)?;
                let _ = sender.send(following);
                Ok(())
            }
            MigrationEvent::Taken => {
                self.state = MachineState::Migrated;
                Ok(())
            }
            MigrationEvent::Hold(sender) => {
                let state = self.hold_for_migration();
                let _ = sender.send(state);
                Ok(())
            }
            MigrationEvent::Done(done) => {
                let finished = self.finish_migration(done);
                self.end_upgrade();
                if let Some(migration) = &self.migration {
                    migration.tell_end();
                }
                finished
            }
        }
    }

    /// The disks that move along, with the last of the connections.
    fn moving_disks(
        &self,
        ids: &[String],
        connections: &mut Vec<OwnedFd>,
    ) -> Result<Vec<Moving>, Answer> {
        let count = ids.len() * DISK_CONNECTIONS;
        let first = connections.len().checked_sub(count).ok_or_else(|| {
            let text = format!("{} disks need {count} connections", ids.len());
            api::refusal(400, text)
        })?;
        let mut rest = connections
            .split_off(first)
            .into_iter()
            .map(UnixStream::from);
        let moving = ids.iter().enumerate().map(|(index, id)| {
            if ids[..index].contains(id) {
                return Err(api::refusal(400, format!("{id} is named twice")));
            }
            let size_bytes = self.movable_disk(id)?;
            Ok(Moving {
                disk: MovingDisk {
                    id: id.clone(),
                    size_bytes,
                    connections: DISK_CONNECTIONS,
                },
                connections: rest.by_ref().take(DISK_CONNECTIONS).collect(),
            })
        });
        moving.collect()
    }

    fn hold_for_migration(&mut self) -> Result<Saved, MigrationError> {
        let is_upgrade = self.is_upgrading();
        if is_upgrade {
            self.leave_clients();
        }
        self.hold();
        if let Some(migration) = &mut self.migration {
            migration.held = true;
        }
        let moving = self.migration.as_ref().map(|it| it.disks.as_slice());
        let moves = |disk: &Disk| moving.is_some_and(|ids| ids.iter().any(|id| id == disk.id()));
        // Those that the target opens, too: it may be another host, which has none of this one's memory.
        let shared: Vec<_> = self
            .parts
            .disks
            .iter()
            .filter(|disk| !moves(disk))
            .collect();
        // A process of this host has its page cache, too: what is durable does not change.
        let flushed = shared.iter().filter(|_| !is_upgrade);
        let mut flushed = flushed.map(|disk| disk.flush());
        flushed
            .try_for_each(|flushed| flushed)
            .map_err(MigrationError::connection("write the disks back"))?;
        // A lock belongs to the open file, and so to the process that has it, too.
        let released = shared.iter().filter(|_| !is_upgrade);
        for lock in released.filter_map(|disk| disk.lock()) {
            let released = lock.release();
            released.map_err(MigrationError::connection("let the target have the disks"))?;
        }
        saved::save(&self.parts, &self.spec).map_err(|error| MigrationError::Refused(chain(&error)))
    }

    fn finish_migration(&mut self, done: Result<(), MigrationError>) -> Result<(), RunError> {
        let Some(migration) = &mut self.migration else {
            return Ok(());
        };
        migration.under_way = false;
        let held = std::mem::take(&mut migration.held);
        let name = &self.spec.name;
        match done {
            Ok(()) => {
                self.deferred.clear();
                migration.moved = Some(Instant::now());
                self.state = MachineState::Migrated;
                migration
                    .progress
                    .set_stage(MigrationStage::Completed, None);
                let downtime_us = migration.progress.info().downtime_us;
                tracing::info!(name, downtime_us, "the machine has moved");
                return Ok(());
            }
            Err(error) => {
                let text = chain(&error);
                if let MigrationError::Lost { .. } | MigrationError::Unheard(_) = error {
                    self.lose(text);
                    return Ok(());
                }
                tracing::warn!(name, error = text, "migration ended");
                let stage = match error {
                    MigrationError::Cancelled => MigrationStage::Cancelled,
                    MigrationError::Doubt => MigrationStage::InDoubt,
                    _ => MigrationStage::Failed,
                };
                migration.progress.set_stage(stage, Some(text));
                if stage == MigrationStage::InDoubt {
                    self.state = MachineState::Paused;
                    return Ok(());
                }
            }
        }
        self.take_released();
        if !held {
            return Ok(());
        }
        // A target that has failed has them open until its process ends.
        let deadline = Instant::now() + DISK_PATIENCE;
        let mut taken = self.take_disks_back();
        while taken.is_err() && Instant::now() < deadline {
            std::thread::sleep(DISK_POLL);
            taken = self.take_disks_back();
        }
        if let Err(text) = taken {
            // Somebody has them, who may be the target after all: nobody must write beside it.
            tracing::error!(
                name = self.spec.name,
                error = text,
                "the machine stays paused"
            );
            self.state = MachineState::Paused;
            if let Some(migration) = &self.migration {
                migration
                    .progress
                    .set_stage(MigrationStage::InDoubt, Some(text));
            }
            return Ok(());
        }
        self.release()?;
        // What the guest asked for in its last moment before it was held.
        for event in std::mem::take(&mut self.deferred) {
            let _ = self.events.send(event);
        }
        Ok(())
    }

    /// The guest ran at the target without all of its memory: it runs nowhere.
    fn lose(&mut self, text: String) {
        tracing::error!(name = self.spec.name, "{text}");
        self.deferred.clear();
        if let Some(migration) = &mut self.migration {
            let (stage, error) = (MigrationStage::Lost, Some(text.clone()));
            migration.progress.set_stage(stage, error);
            migration.lost = Some(text);
            migration.moved = Some(Instant::now());
        }
    }

    /// Locks the images again that were the target's to take.
    pub(super) fn take_disks_back(&self) -> Result<(), String> {
        for lock in self.parts.disks.iter().filter_map(Disk::lock) {
            match lock.take_back() {
                Ok(true) => {}
                Ok(false) => return Err("a disk is in use by another process".to_owned()),
                Err(error) => return Err(format!("lock a disk: {error}")),
            }
        }
        Ok(())
    }

    /// A guest's wish that came while the machine was held for its move: it would be lost with the state that has
    /// been taken. The move is off, unless it has happened; the wish is kept.
    pub(super) fn defer_while_held(&mut self, event: Event) -> Option<Event> {
        let held = self.migration.as_ref().filter(|it| it.held);
        let Some(migration) = held else {
            return Some(event);
        };
        // What the guest has let go is in the state that has been taken; a writer of its kernel can wait.
        let keeps = matches!(
            event,
            Event::Guest(_, GuestEvent::Released) | Event::KernelWanted
        );
        let is_lost = !keeps;
        if is_lost && migration.progress.cancel() {
            tracing::info!(
                name = self.spec.name,
                "the guest wants something: its move is off"
            );
        }
        self.deferred.push(event);
        None
    }
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The owner of a machine: the thread that builds it, holds and releases its vCPUs, and ends it.
//!
//! ```text
//!              pause                                reset: held, everything as at power-on, then as before
//!   Running ──────────► Paused        Running, Paused ────────────────────────────────► the same
//!      ▲                  │
//!      └──────────────────┘           Running, Paused ── shutdown, power-off, crash ──► Stopped (process ends)
//!             resume
//! ```
//!
//! Nobody else changes the machine: vCPUs, the control API and signals send an [`Event`], and the owner takes
//! them one at a time. Events that a guest caused are numbered by its boot, so that what it asked for twice, or
//! just before a reset, does not reach its next life.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, sync_channel};
use std::time::Instant;

use atoll_devices::platform::MachineControl;
use atoll_thread::Kind;
use atoll_vmm_protocol::api::{Acted, Info, MachineState, Request};
use atoll_vmm_protocol::services::FaultAction;
use atoll_vmm_protocol::spec::MachineSpec;
use nix::sys::signal::{SigSet, Signal};

use super::export::Export;
use super::handover::{Migration, MigrationEvent};
use super::live::{Live, SaveError};
use super::mirror::Mirroring;
use super::parts::Parts;
use super::snapshot::Tracked;
use super::{Outcome, RunError, controls, counters, disks};
use crate::api::{self, Answer, Asked, Gate};
use crate::layout;
use crate::memory::filling::Filling;
use crate::migration::MigrationError;
use crate::vcpu::{Report, Vcpu};

/// What the owner is told.
pub(super) enum Event {
    /// By the control API; the answer goes back to its thread.
    Request(Asked, SyncSender<Answer>),
    /// By a guest, in its boot of that number.
    Guest(u64, GuestEvent),
    /// By the thread that moves the machine.
    Migration(MigrationEvent),
    /// By the thread that saves memory: how that ended.
    Saved(Result<u64, SaveError>),
    /// By SIGTERM or SIGINT.
    Terminate,
    /// By the thread that watches a shared kernel: somebody waits to write to its file.
    KernelWanted,
}

pub(super) enum GuestEvent {
    PowerOff,
    Reset,
    /// The guest has let go of something that it was asked for.
    Released,
    /// The guest did not feed its watchdog.
    WatchdogExpired,
    /// The guest's kernel says that it crashed.
    Panicked,
    Stopped(Report),
}

/// The guest's way to the owner.
#[derive(Clone)]
pub(super) struct GuestVoice {
    boot: Arc<AtomicU64>,
    events: Sender<Event>,
}

impl GuestVoice {
    /// A voice that speaks to the owner who receives from `events`.
    pub(super) fn new(events: Sender<Event>) -> Self {
        Self {
            boot: Arc::default(),
            events,
        }
    }

    pub(super) fn say(&self, event: GuestEvent) {
        let boot = self.boot.load(Ordering::SeqCst);
        // Without an owner there is no machine any more.
        let _ = self.events.send(Event::Guest(boot, event));
    }
}

impl MachineControl for GuestVoice {
    fn power_off(&self) {
        self.say(GuestEvent::PowerOff);
    }

    fn reset(&self) {
        self.say(GuestEvent::Reset);
    }
}

/// The control API's side of a request: passes it on and waits for the answer.
pub(super) fn ask_owner(events: Sender<Event>) -> impl Fn(Asked) -> Answer + Send + 'static {
    move |asked| {
        let (sender, answer) = sync_channel(1);
        let sent = events.send(Event::Request(asked, sender));
        match sent.ok().and_then(|()| answer.recv().ok()) {
            Some(answer) => answer,
            None => api::refusal(503, "the machine has ended"),
        }
    }
}

/// Keeps SIGTERM and SIGINT away from this thread and all that are made later, so that one thread can wait for
/// them.
pub(super) fn block_ending_signals() -> io::Result<SigSet> {
    let mut ending = SigSet::empty();
    ending.add(Signal::SIGTERM);
    ending.add(Signal::SIGINT);
    ending.thread_block()?;
    Ok(ending)
}

/// Starts the thread that waits for the `ending` signals.
pub(super) fn end_on_signals(ending: SigSet, events: Sender<Event>) -> io::Result<()> {
    atoll_thread::spawn(Kind::Signals, "signals", move || {
        while ending.wait().is_ok() {
            if events.send(Event::Terminate).is_err() {
                return;
            }
        }
    })?;
    Ok(())
}

/// A built machine, in its owner's hands.
pub(super) struct Machine {
    /// What it consists of now.
    pub(super) spec: MachineSpec,
    pub(super) parts: Parts,
    /// Number of resets so far; the guest's events carry it.
    boot: Arc<AtomicU64>,
    pub(super) state: MachineState,
    started: Instant,
    /// The way to itself, for threads that it starts.
    pub(super) events: Sender<Event>,
    pub(super) migration: Option<Migration>,
    pub(super) export: Option<Export>,
    pub(super) mirrors: Vec<Mirroring>,
    /// The snapshot that may have a child.
    pub(super) tracked: Option<Tracked>,
    /// The last snapshot that was written while the guest ran, or is. Behind `parts`, whose threads may wait for it.
    pub(super) live: Option<Live>,
    /// Lets in whoever asks something of the machine.
    pub(super) gate: Option<Arc<Gate>>,
    /// What the guest said while it was held for its move.
    pub(super) deferred: Vec<Event>,
}

impl Machine {
    /// A machine whose vCPUs are about to run.
    pub(super) fn new(spec: MachineSpec, parts: Parts, voice: GuestVoice) -> Self {
        Self {
            spec,
            parts,
            boot: voice.boot,
            state: MachineState::Running,
            started: Instant::now(),
            events: voice.events,
            migration: None,
            export: None,
            mirrors: Vec::new(),
            tracked: None,
            live: None,
            gate: None,
            deferred: Vec::new(),
        }
    }

    /// Takes events until the machine ends.
    pub(super) fn drive(&mut self, events: &Receiver<Event>) -> Result<Outcome, RunError> {
        loop {
            let event = match self.migration.as_ref().and_then(Migration::end) {
                None => events.recv().ok(),
                Some(end) => {
                    match events.recv_timeout(end.saturating_duration_since(Instant::now())) {
                        Err(RecvTimeoutError::Timeout) => return Ok(self.moved_outcome()),
                        event => event.ok(),
                    }
                }
            };
            let Some(event) = event.and_then(|event| self.defer_unless_own(event)) else {
                continue;
            };
            match event {
                Event::Request(asked, sender) => {
                    let answer = self.answer(asked)?;
                    // A client that has gone away is not told.
                    let _ = sender.send(answer);
                    if self.state == MachineState::Stopped {
                        return Ok(match self.moved_outcome() {
                            lost @ Outcome::Crashed { .. } => lost,
                            _ => Outcome::ShutDown,
                        });
                    }
                }
                Event::Guest(boot, event) => {
                    let current = self.boot.load(Ordering::SeqCst);
                    if boot == current
                        && let Some(outcome) = self.obey_guest(event)?
                    {
                        return Ok(outcome);
                    }
                }
                Event::Migration(event) => self.obey_migration(event)?,
                Event::Saved(done) => self.end_live(done),
                // Its guest needs what is here; a move that is over ends the process by itself.
                Event::Terminate if self.state == MachineState::Migrated && self.is_moving() => {
                    tracing::warn!("the guest runs elsewhere and its memory is still being sent");
                }
                Event::Terminate => return Ok(Outcome::ShutDown),
                Event::KernelWanted => self.part_from_kernel()?,
            }
        }
    }

    /// An error if somebody has wanted this process to end, which does not have the machine yet: that was not meant for
    /// the guest, which runs elsewhere. What else was said is heard later.
    pub(super) fn refuse_if_ended(&self, events: &Receiver<Event>) -> Result<(), MigrationError> {
        let said: Vec<_> = events.try_iter().collect();
        let ended = said.iter().any(|event| matches!(event, Event::Terminate));
        for event in said {
            let _ = self.events.send(event);
        }
        match ended {
            true => Err(MigrationError::Refused(
                "this process was told to end before it had the machine".to_owned(),
            )),
            false => Ok(()),
        }
    }

    fn moved_outcome(&self) -> Outcome {
        let migration = self.migration.as_ref();
        migration.map_or(Outcome::Migrated, Migration::outcome)
    }

    /// Only what a guest says may have to wait, and what would let it go.
    fn defer_unless_own(&mut self, event: Event) -> Option<Event> {
        match event {
            Event::Guest(..) | Event::KernelWanted => self.defer_while_held(event),
            event => Some(event),
        }
    }

    fn obey_guest(&mut self, event: GuestEvent) -> Result<Option<Outcome>, RunError> {
        match event {
            GuestEvent::PowerOff => Ok(Some(Outcome::PoweredOff)),
            GuestEvent::Reset => {
                self.reset()?;
                Ok(None)
            }
            GuestEvent::Released => {
                self.take_released();
                Ok(None)
            }
            GuestEvent::WatchdogExpired => {
                let action = self.spec.services.watchdog.map(|watchdog| watchdog.action);
                self.act_on_fault("the guest did not feed its watchdog", action)
            }
            GuestEvent::Panicked => {
                let action = self.spec.services.panic.map(|panic| panic.action);
                self.act_on_fault("the guest's kernel panicked", action)
            }
            GuestEvent::Stopped(Report::TripleFault { vcpu, place }) => {
                let reason = format!("the guest crashed: triple fault on vcpu{vcpu} {place}");
                Ok(Some(Outcome::Crashed { reason }))
            }
            GuestEvent::Stopped(Report::Failed { vcpu, reason }) => {
                Err(RunError::Vcpu { vcpu, reason })
            }
        }
    }

    /// What the spec wants to be done about a guest in trouble.
    fn act_on_fault(
        &mut self,
        reason: &str,
        action: Option<FaultAction>,
    ) -> Result<Option<Outcome>, RunError> {
        let action = action.unwrap_or(FaultAction::None);
        tracing::warn!(name = self.spec.name, ?action, "{reason}");
        match action {
            FaultAction::None => {}
            FaultAction::Reset => self.reset()?,
            FaultAction::Shutdown => self.parts.power_button.pulse(),
            FaultAction::Poweroff => {
                let reason = reason.to_owned();
                return Ok(Some(Outcome::Crashed { reason }));
            }
            FaultAction::Pause => self.pause(),
        }
        Ok(None)
    }

    fn answer(&mut self, asked: Asked) -> Result<Answer, RunError> {
        if let Some(refused) = self.refuse_while_moving(asked.request) {
            return Ok(refused);
        }
        if let Some(refused) = self.refuse_while_mirroring(&asked) {
            return Ok(refused);
        }
        if let Some(refused) = self.refuse_while_saving(asked.request) {
            return Ok(refused);
        }
        disks::note_ejected(&mut self.parts, &mut self.spec);
        match asked.request {
            Request::Info => return Ok(api::json(200, &self.info())),
            Request::Counters => {
                let counters = counters::of(&self.parts, self.uptime_ms());
                return Ok(api::json(200, &counters));
            }
            Request::Pause => self.pause(),
            Request::Resume => {
                if let Err(text) = self.take_disks_back() {
                    return Ok(api::refusal(409, text));
                }
                self.resume()?;
            }
            Request::PowerButton if self.state == MachineState::Paused => {
                let text = "the machine is paused and cannot see its power button: resume it first";
                return Ok(api::refusal(409, text));
            }
            Request::PowerButton => self.parts.power_button.pulse(),
            Request::Reset => self.reset()?,
            Request::Shutdown => {
                self.hold();
                self.state = MachineState::Stopped;
            }
            Request::Snapshot => return self.snapshot(asked),
            Request::Saving => return Ok(answer_of(self.saving())),
            Request::CancelSnapshot => return Ok(answer_of(self.cancel_live())),
            Request::Migrate => return Ok(self.migrate(asked)),
            Request::Upgrade => return Ok(self.upgrade(asked)),
            Request::Migration => return Ok(self.migration_info()),
            Request::SwitchMigration => return Ok(self.switch_migration()),
            Request::CancelMigration => return Ok(self.cancel_migration()),
            Request::AddDisk => return Ok(answer_of(self.add_disk(asked))),
            Request::AddNet => return Ok(answer_of(self.add_net(asked))),
            Request::BeginExport => return self.begin_export(asked),
            Request::Export => return Ok(answer_of(self.exported())),
            Request::EndExport => return Ok(answer_of(self.end_export(asked))),
            Request::BeginMirror => return self.begin_mirror(asked),
            Request::Mirrors => return Ok(api::json(200, &self.mirrors_told())),
            Request::CompleteMirror => return self.complete_mirror(asked),
            Request::CancelMirror => return Ok(answer_of(self.cancel_mirror(asked))),
            Request::RemoveDevice => return Ok(answer_of(self.remove_device(asked))),
            // What is left is for one of the devices.
            _ => {
                if let Err(refused) = controls::obey(&mut self.parts, &mut self.spec, asked) {
                    return Ok(refused);
                }
            }
        }
        Ok(api::json(200, &Acted { state: self.state }))
    }

    fn info(&self) -> Info {
        Info {
            name: self.spec.name.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            machine_version: layout::MACHINE_VERSION,
            pid: std::process::id(),
            state: self.state,
            uptime_ms: self.uptime_ms(),
            cpu_count: self.spec.cpu_count,
            cpu: self.spec.cpu.to_string(),
            memory_mib: self.spec.memory_mib,
            reset_count: self.boot.load(Ordering::SeqCst),
            serial_path: self.parts.serial_path.clone(),
            console_path: self.parts.console_path.clone(),
            balloon: controls::balloon(&self.parts, self.spec.memory_mib),
            filling: self.parts.filling.as_ref().map(Filling::info),
            devices: self.device_infos(),
        }
    }

    fn uptime_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Lets a machine go that has just been built.
    pub(super) fn begin(&mut self) -> Result<(), RunError> {
        // What the guest let go where it was before.
        self.take_released();
        self.release()
    }

    /// Tells the network that the guest's cards are here now.
    pub(super) fn announce(&self) {
        self.parts.nets.iter().for_each(|net| net.device.announce());
    }

    /// The guest goes on, and its clock may interrupt it again.
    fn run_vcpus(&self) {
        if let Some(legacy) = &self.parts.legacy {
            legacy.resume();
        }
        self.parts.vcpus.iter().for_each(Vcpu::run);
    }

    /// vCPUs first, since they ring doorbells; then the devices, which finish what they began.
    pub(super) fn hold(&self) {
        let held: Vec<_> = self.parts.vcpus.iter().map(Vcpu::hold).collect();
        for vcpu in held {
            // No answer means that its thread has ended, which is held enough.
            let _ = vcpu.recv();
        }
        for function in self.parts.backplane.functions() {
            function.pause();
        }
        if let Some(watchdog) = &self.parts.watchdog {
            watchdog.pause();
        }
        if let Some(legacy) = &self.parts.legacy {
            legacy.pause();
        }
    }

    /// Does something while nothing of the guest runs, with how long that took, in microseconds. The guest goes on
    /// afterwards if it ran before; the work can tell by the machine's state.
    pub(super) fn while_held<T>(
        &mut self,
        work: impl FnOnce(&mut Self) -> T,
    ) -> Result<(T, u64), RunError> {
        let (started, was_running) = (Instant::now(), self.state == MachineState::Running);
        if was_running {
            self.hold();
        }
        let done = work(self);
        if was_running {
            self.release()?;
        }
        let held_us = u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX);
        Ok((done, held_us))
    }

    pub(super) fn release(&self) -> Result<(), RunError> {
        for function in self.parts.backplane.functions() {
            function.resume().map_err(RunError::Resume)?;
        }
        if let Some(watchdog) = &self.parts.watchdog {
            watchdog.resume();
        }
        self.run_vcpus();
        Ok(())
    }

    fn pause(&mut self) {
        if self.state == MachineState::Running {
            self.hold();
            self.state = MachineState::Paused;
        }
    }

    fn resume(&mut self) -> Result<(), RunError> {
        if self.state == MachineState::Paused {
            self.settle_mirrors();
            self.release()?;
            self.state = MachineState::Running;
        }
        Ok(())
    }

    /// Everything as at power-on, but for the bytes in RAM that the kernel does not overwrite.
    fn reset(&mut self) -> Result<(), RunError> {
        if self.state == MachineState::Running {
            self.hold();
        }
        // Whatever the guest said before now belongs to its past life.
        self.boot.fetch_add(1, Ordering::SeqCst);
        tracing::info!(name = self.spec.name, "machine resets");
        self.complete_removals();
        self.parts.power_on(&self.spec).map_err(RunError::Reset)?;
        if self.state == MachineState::Running {
            self.run_vcpus();
        }
        Ok(())
    }
}

/// An answer of the API, or the refusal.
fn answer_of(done: Result<impl serde::Serialize, Answer>) -> Answer {
    done.map_or_else(|refused| refused, |value| api::json(200, &value))
}

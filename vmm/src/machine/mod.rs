// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! One machine and its owner: the thread that builds it, holds and releases its vCPUs, and ends it.
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

mod assembly;
mod counters;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::time::Instant;

use atoll_devices::platform::MachineControl;
use atoll_vmm_protocol::api::{Acted, Info, MachineState, Request};
use atoll_vmm_protocol::spec::MachineSpec;
use nix::sys::signal::{SigSet, Signal};

use crate::api::{self, Answer, ApiError, ApiServer};
use crate::memory::Backing;
use crate::vcpu::{self, Report};
use crate::{check, layout};

pub use assembly::BuildError;
use assembly::Parts;

/// What a caller decides about a run that is not the machine's own business.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Where to listen for the control API; no such API when absent.
    pub api_socket: Option<PathBuf>,
    /// What holds the guest's memory.
    pub backing: Backing,
    /// What SIGTERM and SIGINT do.
    pub signals: Signals,
}

/// What SIGTERM and SIGINT do while a machine runs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Signals {
    /// What they did before: the process is not the machine's alone.
    #[default]
    Leave,
    /// End the machine as the request `shutdown` does. For the whole rest of the process.
    ShutDown,
}

/// How a machine ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The guest turned itself off.
    PoweredOff,
    /// The control API or a signal ended it.
    ShutDown,
    /// The guest cannot go on.
    Crashed {
        /// One sentence.
        reason: String,
    },
}

/// Why a machine did not run, or not to its end.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The spec describes no machine.
    #[error(transparent)]
    Spec(#[from] check::SpecError),
    /// The host cannot build it.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// The control API's socket.
    #[error(transparent)]
    Api(#[from] ApiError),
    /// KVM gave up on a vCPU.
    #[error("vcpu{vcpu}: {reason}")]
    Vcpu {
        /// Which.
        vcpu: u8,
        /// What it said.
        reason: String,
    },
    /// A reset failed half-way: the machine cannot go on.
    #[error("reset the machine")]
    Reset(#[source] BuildError),
    /// A device did not start again after a pause.
    #[error("resume the machine")]
    Resume(#[source] atoll_devices::virtio::PauseError),
    /// The process could not be prepared.
    #[error("prepare signals")]
    Signals(#[source] io::Error),
}

/// What the owner is told.
enum Event {
    /// By the control API; the answer goes back to its thread.
    Request(Request, SyncSender<Answer>),
    /// By a guest, in its boot of that number.
    Guest(u64, GuestEvent),
    /// By SIGTERM or SIGINT.
    Terminate,
}

enum GuestEvent {
    PowerOff,
    Reset,
    Stopped(Report),
}

/// The guest's way to the owner.
#[derive(Clone)]
struct GuestVoice {
    boot: Arc<AtomicU64>,
    events: Sender<Event>,
}

impl GuestVoice {
    fn say(&self, event: GuestEvent) {
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

/// Builds the machine that `spec` describes and runs it on this thread until its guest ends.
pub fn run_machine(spec: &MachineSpec, options: &Options) -> Result<Outcome, RunError> {
    check::spec(spec)?;
    let (events, received) = channel();
    // Before any thread is started, so that all of them inherit the mask.
    if options.signals == Signals::ShutDown {
        end_on_signals(events.clone()).map_err(RunError::Signals)?;
    }
    vcpu::handle_kicks().map_err(RunError::Signals)?;
    let voice = GuestVoice {
        boot: Arc::default(),
        events: events.clone(),
    };
    let parts = assembly::build(spec, options.backing, &voice)?;
    let mut machine = Machine {
        spec,
        parts,
        boot: voice.boot,
        state: MachineState::Running,
        started: Instant::now(),
    };
    let server = match &options.api_socket {
        Some(path) => Some(ApiServer::start(path, ask_owner(events))?),
        None => None,
    };
    tracing::info!(
        name = spec.name,
        cpus = spec.cpu_count,
        memory_mib = spec.memory_mib,
        "machine starts"
    );
    machine.run_vcpus();
    let outcome = machine.drive(&received);
    machine.hold();
    // A request that came too late is answered by its sender being dropped.
    drop(received);
    drop(server);
    tracing::info!(name = spec.name, ?outcome, "machine ended");
    outcome
}

/// The control API's side of a request: passes it on and waits for the answer.
fn ask_owner(events: Sender<Event>) -> impl Fn(Request) -> Answer + Send + 'static {
    move |request| {
        let (sender, answer) = sync_channel(1);
        let sent = events.send(Event::Request(request, sender));
        match sent.ok().and_then(|()| answer.recv().ok()) {
            Some(answer) => answer,
            None => api::refusal(503, "the machine has ended"),
        }
    }
}

/// Keeps SIGTERM and SIGINT away from all threads but one, which passes them on.
fn end_on_signals(events: Sender<Event>) -> io::Result<()> {
    let mut ending = SigSet::empty();
    ending.add(Signal::SIGTERM);
    ending.add(Signal::SIGINT);
    ending.thread_block()?;
    std::thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || {
            while ending.wait().is_ok() {
                if events.send(Event::Terminate).is_err() {
                    return;
                }
            }
        })?;
    Ok(())
}

/// A built machine, in its owner's hands.
struct Machine<'a> {
    spec: &'a MachineSpec,
    parts: Parts,
    /// Number of resets so far; the guest's events carry it.
    boot: Arc<AtomicU64>,
    state: MachineState,
    started: Instant,
}

impl Machine<'_> {
    /// Takes events until the machine ends.
    fn drive(&mut self, events: &Receiver<Event>) -> Result<Outcome, RunError> {
        loop {
            match events.recv() {
                Ok(Event::Request(request, sender)) => {
                    let answer = self.answer(request)?;
                    // A client that has gone away is not told.
                    let _ = sender.send(answer);
                    if self.state == MachineState::Stopped {
                        return Ok(Outcome::ShutDown);
                    }
                }
                Ok(Event::Guest(boot, event)) => {
                    let current = self.boot.load(Ordering::SeqCst);
                    if boot == current
                        && let Some(outcome) = self.obey_guest(event)?
                    {
                        return Ok(outcome);
                    }
                }
                // The sender is held by `run_machine` and the guest's voice, so the channel does not close.
                Ok(Event::Terminate) | Err(_) => return Ok(Outcome::ShutDown),
            }
        }
    }

    fn obey_guest(&mut self, event: GuestEvent) -> Result<Option<Outcome>, RunError> {
        match event {
            GuestEvent::PowerOff => Ok(Some(Outcome::PoweredOff)),
            GuestEvent::Reset => {
                self.reset()?;
                Ok(None)
            }
            GuestEvent::Stopped(Report::TripleFault { vcpu }) => Ok(Some(Outcome::Crashed {
                reason: format!("the guest crashed: triple fault on vcpu{vcpu}"),
            })),
            GuestEvent::Stopped(Report::Failed { vcpu, reason }) => {
                Err(RunError::Vcpu { vcpu, reason })
            }
        }
    }

    fn answer(&mut self, request: Request) -> Result<Answer, RunError> {
        match request {
            Request::Info => return Ok(api::json(200, &self.info())),
            Request::Counters => {
                let counters = counters::of(&self.parts, self.uptime_ms());
                return Ok(api::json(200, &counters));
            }
            Request::Pause => self.pause(),
            Request::Resume => self.resume()?,
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
            memory_mib: self.spec.memory_mib,
            reset_count: self.boot.load(Ordering::SeqCst),
            serial_path: self.parts.serial_path.clone(),
            console_path: self.parts.console_path.clone(),
        }
    }

    fn uptime_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn run_vcpus(&self) {
        self.parts.vcpus.iter().for_each(vcpu::Vcpu::run);
    }

    /// vCPUs first, since they ring doorbells; then the devices, which finish what they began.
    fn hold(&self) {
        let held: Vec<_> = self.parts.vcpus.iter().map(vcpu::Vcpu::hold).collect();
        for vcpu in held {
            // No answer means that its thread has ended, which is held enough.
            let _ = vcpu.recv();
        }
        for function in &self.parts.functions {
            function.pause();
        }
    }

    fn release(&self) -> Result<(), RunError> {
        for function in &self.parts.functions {
            function.resume().map_err(RunError::Resume)?;
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
        self.parts.power_on(self.spec).map_err(RunError::Reset)?;
        if self.state == MachineState::Running {
            self.run_vcpus();
        }
        Ok(())
    }
}

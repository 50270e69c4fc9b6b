// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! One machine: built from a spec, run by its owner, ended.
//!
//! ```text
//! opened    what the host gives: paths become descriptors, before the sandbox
//! owner     the thread that holds and releases vCPUs, and takes one event at a time
//! assembly  from a spec to a machine that is ready for its first instruction
//! ground    memory and CPUs, which that begins with
//! devices   one row a kind of device; services: those that connect the guest with its host
//! backplane the PCI bus with the functions in it
//! disks     the rows of disks, and what the control API changes about them
//! legacy    what a PC has beside them
//! generation  whether the guest is a copy
//! parts     what a built machine consists of, and how it is put back to power-on
//! controls  changes of one device while it runs
//! hotplug   devices that come and go
//! kernel    the kernel's file, where machines share it
//! export    disks as they are at one moment, for backups
//! saved     its state taken out, and put into another one that was just built
//! snapshot  the same into files, on request; live: while the guest runs
//! handover  its move to another process
//! upgrade   the same on this host, with all that it has open
//! belongings  what that is
//! arrival   such a machine in the process that takes it
//! counters  its numbers for the control API
//! ```

mod arrival;
mod assembly;
mod backplane;
pub mod belongings;
mod controls;
mod counters;
mod devices;
mod disks;
mod export;
mod generation;
mod ground;
mod handover;
mod hotplug;
mod kernel;
mod leftovers;
mod legacy;
mod live;
mod mirror;
mod opened;
mod owner;
mod parts;
mod saved;
mod services;
mod snapshot;
mod upgrade;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};

use atoll_devices::memory::Ram;
use atoll_vmm_protocol::spec::MachineSpec;

use crate::api::{ApiError, ApiServer, Gate};
use crate::board::Board;
use crate::kvm::{Kvm, VirtualMachine};
use crate::memory::{Backing, MemoryError};
use crate::migration::MigrationError;
use crate::migration::local::{self, Coming};
use crate::migration::postcopy::Late;
use crate::migration::target::Handover;
use crate::sandbox::{self, Confinement, SandboxError};
use crate::saved::layers::Layers;
use crate::saved::packed::Packed;
use crate::saved::{Layer, MachineState, image};
use crate::{check, vcpu};

pub use assembly::BuildError;
pub use belongings::Belongings;
#[cfg(feature = "testing")]
pub(crate) use legacy::identity;
use opened::Opened;
use owner::{Event, GuestVoice, Machine, ask_owner, block_ending_signals, end_on_signals};
pub use saved::{Absence, RestoreError};

/// What a caller decides about a run that is not the machine's own business.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Where to listen for the control API; no such API when absent.
    pub api_socket: Option<PathBuf>,
    /// What holds the guest's memory, when it is not what the spec says.
    pub backing: Backing,
    /// What SIGTERM and SIGINT do to the machine.
    pub signals: Signals,
    /// What the process may do once everything is open. For good, and for the whole process.
    pub confinement: Confinement,
}

/// Where a machine begins: at its first instruction, or where a saved one was held.
pub enum Start {
    /// At its first instruction.
    PowerOn,
    /// Where a saved one was held.
    Saved(Box<SavedStart>),
    /// Where it runs in another process of this host, once this one is ready.
    Coming(Box<Coming>),
}

impl Start {
    /// Whether the guest runs before its RAM is all read.
    fn is_lazy(&self) -> bool {
        matches!(self, Self::Saved(saved) if saved.memory.is_lazy())
    }

    /// Where the machine is, and what that process has open. Once.
    fn take_whereabouts(&mut self) -> (Whereabouts, Option<Belongings>) {
        match self {
            Self::PowerOn => (Whereabouts::Here, None),
            Self::Saved(saved) => {
                let handover = saved.handover.take();
                (handover.map_or(Whereabouts::Here, Whereabouts::Held), None)
            }
            Self::Coming(coming) => {
                let handover = coming.handover.take().expect("taken once");
                (Whereabouts::Elsewhere(handover), coming.belongings.take())
            }
        }
    }

    /// The host's KVM, where it is open already.
    fn kvm(&self) -> Option<Arc<Kvm>> {
        match self {
            Self::Saved(saved) => match &saved.memory {
                SavedMemory::Here(base) => Some(base.kvm.clone()),
                SavedMemory::Files(..) => None,
            },
            Self::Coming(coming) => Some(coming.base.kvm.clone()),
            Self::PowerOn => None,
        }
    }

    /// Whether RAM was allocated for the machine, instead of being a file that others have.
    fn memory_is_own(&self) -> bool {
        match self {
            Self::PowerOn => true,
            Self::Saved(saved) => !matches!(saved.memory, SavedMemory::Files(_, image::Mode::Map)),
            Self::Coming(_) => false,
        }
    }
}

/// A saved machine, and how it goes on.
pub struct SavedStart {
    /// Everything but RAM: vCPUs, interrupt controllers, devices, clocks.
    pub state: MachineState,
    /// RAM, to be mapped from its file or here already.
    pub memory: SavedMemory,
    /// What the guest is told about the time between.
    pub absence: Absence,
    /// Another process has the machine until it is handed over.
    pub handover: Option<Handover>,
}

/// Where the machine is while this process builds it.
enum Whereabouts {
    /// Nowhere else.
    Here,
    /// Held in another process, which has sent its state.
    Held(Handover),
    /// Running in another process.
    Elsewhere(Handover),
}

impl Whereabouts {
    /// Of the control API's server: shut while its clients are another process's.
    fn gate(&self) -> Gate {
        match self {
            Self::Elsewhere(_) => Gate::closed(),
            Self::Here | Self::Held(_) => Gate::default(),
        }
    }
}

/// RAM of a saved machine: how this process comes by it.
pub enum SavedMemory {
    /// In files: the first has all of it, each further one what was written since (`crate::saved::open`).
    Files(Vec<Layer>, image::Mode),
    /// Here already, in a virtual machine.
    Here(Base),
}

/// What of a machine can be there before its state is known.
pub struct Base {
    /// Of which the machine was made.
    pub kvm: Arc<Kvm>,
    /// It has RAM and interrupt controllers, and no vCPU.
    pub machine: VirtualMachine,
    /// The machine's RAM.
    pub memory: Arc<Ram>,
    /// What of it comes while the guest runs.
    pub late: Option<Late>,
}

/// RAM of a saved machine, and what there is with it.
struct SavedRam {
    memory: Arc<Ram>,
    /// What it has still to be filled from.
    source: Option<Layers>,
    /// Or what brings it.
    late: Option<Late>,
    /// The virtual machine that has it already.
    machine: Option<VirtualMachine>,
}

impl SavedMemory {
    /// Whether the guest runs before its RAM is all read.
    fn is_lazy(&self) -> bool {
        matches!(self, Self::Files(_, image::Mode::Lazy))
    }

    /// Whether pages are placed where RAM was mapped, while the guest runs.
    fn is_filled(&self) -> bool {
        self.is_lazy() || matches!(self, Self::Here(base) if base.late.is_some())
    }

    fn into_ram(
        self,
        board: &Board,
        memory_mib: u64,
        fresh: impl FnOnce() -> Result<Ram, MemoryError>,
    ) -> Result<SavedRam, BuildError> {
        let found = |ram, source| SavedRam {
            memory: Arc::new(ram),
            source,
            late: None,
            machine: None,
        };
        let (layers, mode) = match self {
            Self::Here(base) => {
                return Ok(SavedRam {
                    memory: base.memory,
                    source: None,
                    late: base.late,
                    machine: Some(base.machine),
                });
            }
            Self::Files(layers, image::Mode::Lazy) => {
                let source = Layers::open(layers, memory_mib << 20).map_err(BuildError::Image)?;
                return Ok(found(fresh()?, Some(source)));
            }
            Self::Files(layers, mode) => (layers, mode),
        };
        let mut layers = layers.into_iter();
        let first = layers.next().expect("a snapshot has at least its own");
        let read = |layer: Layer, ram: &Ram| match layer.packed {
            true => Packed::open(layer.file, memory_mib << 20)?.read(ram),
            false => image::read(ram, &layer.file),
        };
        let ram = match mode {
            image::Mode::Map if first.packed => return Err(BuildError::PackedMapping),
            image::Mode::Map => image::map(board, memory_mib, &first.file),
            image::Mode::Read | image::Mode::Lazy => {
                let ram = fresh()?;
                read(first, &ram).map(|()| ram)
            }
        };
        let ram = ram.map_err(BuildError::Image)?;
        for layer in layers {
            read(layer, &ram).map_err(BuildError::Image)?;
        }
        Ok(found(ram, None))
    }
}

/// What SIGTERM and SIGINT do while a machine runs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Signals {
    /// What they did before: the process is not the machine's alone.
    #[default]
    Leave,
    /// End the machine as the request `shutdown` does; one that another process still has stays there, and this process
    /// ends without it. For the whole rest of the process.
    ShutDown,
}

/// How a machine ended, for the exit code. A failure of the host is an error instead.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The guest turned itself off.
    PoweredOff,
    /// The control API or a signal ended it.
    ShutDown,
    /// It goes on in another process.
    Migrated,
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
    /// The process could not be confined.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
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
    /// The machine stays where it was.
    #[error("take the machine over")]
    Handover(#[from] MigrationError),
    /// The process could not be prepared.
    #[error("prepare signals")]
    Signals(#[source] io::Error),
}

/// Builds the machine that `spec` describes and runs it on this thread until its guest ends. Fails before the guest's
/// first instruction when the machine cannot be as it is described, later when KVM or the host does. The machine is
/// gone then as after any end, but not what was done to the process: its sandbox, masked signals, the control group.
pub fn run_machine(spec: &MachineSpec, options: &Options) -> Result<Outcome, RunError> {
    run_from(spec, options, Start::PowerOn)
}

/// Runs a machine from another beginning than power-on; otherwise as [`run_machine`]. Blocks until the machine ends.
pub fn run_from(
    spec: &MachineSpec,
    options: &Options,
    mut start: Start,
) -> Result<Outcome, RunError> {
    let spec = &check::settle(spec)?;
    check::spec(spec)?;
    // The taps of one that comes have been up all the time, and nobody looks for it elsewhere.
    let was_saved = matches!(start, Start::Saved(_));
    let (place, belongings) = start.take_whereabouts();
    let (events, received) = channel();
    let (opened, api_socket) = Opened::of(spec, options, &start, belongings)?;
    // Before any thread is made, so that all of them inherit the mask.
    let ending = match options.signals {
        Signals::Leave => None,
        Signals::ShutDown => Some(block_ending_signals().map_err(RunError::Signals)?),
    };
    sandbox::enter(&options.confinement, &opened.directories)?;
    if let Some(ending) = ending {
        end_on_signals(ending, events.clone()).map_err(RunError::Signals)?;
    }
    vcpu::handle_kicks().map_err(RunError::Signals)?;
    let voice = GuestVoice::new(events.clone());
    let backing = match options.backing {
        Backing::Anonymous => spec.services.memory_backing.into(),
        wanted => wanted,
    };
    let parts = assembly::build(spec, opened, backing, start, &voice)?;
    let mut machine = Machine::new(spec.clone(), parts, voice);
    machine.watch_kernel().map_err(RunError::Signals)?;
    let server = match api_socket {
        Some(socket) => Some(ApiServer::start(socket, place.gate(), ask_owner(events))?),
        None => None,
    };
    machine.gate = server.as_ref().map(ApiServer::gate);
    tracing::info!(
        name = spec.name,
        cpus = spec.cpu_count,
        memory_mib = spec.memory_mib,
        "machine starts"
    );
    let begun = begin(&mut machine, place, &received);
    let is_own = begun.is_ok();
    let outcome = begun.and_then(|()| {
        if was_saved {
            // Wherever the guest was before, it is here now.
            machine.announce();
        }
        // While the guest's first instructions run; before this thread looks at anything that comes from it.
        leftovers::give_back();
        sandbox::seal_owner();
        machine.drive(&received)
    });
    machine.hold();
    if machine.is_handed_on() {
        machine.leave();
        // The other process listens on this socket.
        std::mem::forget(server);
        drop(received);
        return outcome;
    }
    if is_own && !matches!(outcome, Ok(Outcome::Migrated)) {
        machine.close_records();
    }
    // A request that came too late is answered by its sender being dropped.
    drop(received);
    drop(server);
    tracing::info!(name = spec.name, ?outcome, "machine ended");
    outcome
}

/// Lets the guest go, once it is this process's.
fn begin(
    machine: &mut Machine,
    place: Whereabouts,
    received: &Receiver<Event>,
) -> Result<(), RunError> {
    match place {
        Whereabouts::Here => sandbox::seal_starter(),
        Whereabouts::Held(mut handover) => {
            sandbox::seal_starter();
            machine.refuse_if_ended(received)?;
            handover.take_over()?;
        }
        Whereabouts::Elsewhere(mut handover) => {
            // Now, not while it stands still.
            sandbox::prepare();
            let state = local::welcome(&mut handover)?;
            machine.arrive(state)?;
            sandbox::seal_starter();
            machine.refuse_if_ended(received)?;
            handover.take_over()?;
            machine.begin()?;
            machine.hear_clients();
            return Ok(());
        }
    }
    machine.begin()
}

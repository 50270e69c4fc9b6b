// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! What a machine stands on: memory with or without content, KVM's machine around it, and what each CPU is. Called by
//! `assembly`, which builds the rest.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use atoll_devices::memory::Ram;
use atoll_disk::chain;
use atoll_vmm_protocol::spec::MachineSpec;
use kvm_bindings::kvm_cpuid_entry2;

use super::assembly::BuildError;
use super::opened::Opened;
use super::saved::{self, Absence};
use super::{Base, SavedRam, Start};
use crate::board::Board;
use crate::kvm::cpu::GuestCpu;
use crate::kvm::cpu::features::FeatureSet;
use crate::kvm::{VirtualMachine, cpuid};
use crate::memory::filling::Filling;
use crate::memory::{self, Backing};
use crate::migration::local::{Coming, Frame};
use crate::migration::postcopy::Late;
use crate::saved::{MachineState, VcpuSaved};

/// What a machine stands on.
pub(super) struct Ground {
    pub(super) memory: Arc<Ram>,
    /// What brings its content, if that comes later.
    pub(super) filling: Option<Filling>,
    /// With that memory, and without vCPUs.
    pub(super) machine: VirtualMachine,
    pub(super) cpus: Cpus,
    pub(super) content: Content,
}

impl Ground {
    /// All of it is here.
    fn coming(coming: Coming) -> Self {
        let Base {
            machine, memory, ..
        } = coming.base;
        Self {
            machine,
            memory,
            filling: None,
            cpus: Cpus::coming(&coming.frame),
            content: Content::Coming(coming.frame.slots),
        }
    }
}

/// What a machine consists of beside that, once it is built.
pub(super) enum Content {
    /// What is loaded.
    Fresh,
    /// What a saved one had.
    Saved(Box<MachineState>, Absence),
    /// What comes when all else is here: known are the slots of its functions.
    Coming(BTreeMap<String, usize>),
}

impl Content {
    pub(super) fn places(&self) -> BTreeMap<String, usize> {
        match self {
            Self::Fresh => BTreeMap::new(),
            Self::Saved(state, _) => state.slots.clone(),
            Self::Coming(slots) => slots.clone(),
        }
    }

    pub(super) fn boot_disk(&self) -> Option<String> {
        match self {
            Self::Saved(state, _) => state.boot_disk.clone(),
            Self::Fresh | Self::Coming(_) => None,
        }
    }
}

/// The CPU of every vCPU.
pub(super) struct Cpus {
    /// What each answers to CPUID.
    pub(super) cpuid: Vec<Vec<kvm_cpuid_entry2>>,
    /// Feature MSRs of all.
    pub(super) msrs: Vec<(u32, u64)>,
}

impl Cpus {
    /// Of a machine that is switched on.
    fn of(cpu: GuestCpu, count: u8) -> Self {
        let of = |id| cpuid::for_vcpu(&cpu.cpuid, cpuid::Place { id, count });
        Self {
            cpuid: (0..count).map(of).collect(),
            msrs: cpu.msrs,
        }
    }

    /// What they are in the process that has the machine.
    fn coming(frame: &Frame) -> Self {
        Self {
            cpuid: frame.cpuid(),
            msrs: frame.feature_msrs.clone(),
        }
    }

    /// What they were before.
    fn saved(state: &MachineState) -> Self {
        let first = state.vcpus.first();
        Self {
            cpuid: state.cpuid(),
            msrs: first.map_or_else(Vec::new, VcpuSaved::feature_msrs),
        }
    }

    /// What every one has.
    pub(super) fn features(&self) -> FeatureSet {
        FeatureSet::of_cpuid(self.cpuid.first().map_or(&[], Vec::as_slice))
    }

    /// Width of a guest-physical address.
    pub(super) fn address_bits(&self) -> u8 {
        cpuid::address_bits(self.cpuid.first().map_or(&[], Vec::as_slice))
    }
}

/// Zeroed RAM, or that of a saved machine, which is looked at first.
pub(super) fn lay(
    spec: &MachineSpec,
    opened: &mut Opened,
    backing: Backing,
    start: Start,
) -> Result<Ground, BuildError> {
    if backing != Backing::Anonymous || !start.memory_is_own() {
        opened.touched = None;
        opened.share_no_kernel();
    }
    let board = Board::of(spec.profile);
    let fresh = |cpus: &Cpus| {
        let bits = cpus.address_bits();
        memory::allocate(board, spec.memory_mib, bits, backing)
    };
    let machine = |opened: &Opened, memory: &_| {
        let kvm = &opened.kvm;
        kvm.create_with(board, spec.cpu_count, memory)
    };
    let saved = match start {
        Start::Saved(saved) => *saved,
        Start::Coming(coming) => return Ok(Ground::coming(*coming)),
        Start::PowerOn => {
            let cpu = opened.cpu.take().expect("opened for a start by power");
            let cpus = Cpus::of(cpu, spec.cpu_count);
            let memory = Arc::new(fresh(&cpus)?);
            return Ok(Ground {
                machine: machine(opened, &memory)?,
                memory,
                filling: None,
                cpus,
                content: Content::Fresh,
            });
        }
    };
    saved::check(&saved.state, spec, opened.kvm.cpu()?)?;
    let cpus = Cpus::saved(&saved.state);
    if saved.memory.is_lazy() && backing != Backing::Anonymous {
        return Err(BuildError::LazyBacking);
    }
    if saved.memory.is_filled() {
        // Its pages are placed where RAM was mapped, and nothing else may be there.
        opened.share_no_kernel();
    }
    let memory = saved.memory;
    let SavedRam {
        memory,
        source,
        late,
        machine: made,
    } = memory.into_ram(board, spec.memory_mib, || fresh(&cpus))?;
    let fill = |source| {
        let faults = opened.faults.take().expect("opened for lazy memory");
        Filling::start(faults, memory.clone(), Box::new(source), end_without_memory)
    };
    let take = |late: Late| {
        let parts = late.into_elsewhere().map_err(|source| BuildError::Host {
            what: "keep the connections with the source",
            source,
        });
        let (faults, elsewhere) = parts?;
        Filling::take(faults, memory.clone(), elsewhere).map_err(BuildError::from)
    };
    let filling = match late {
        Some(late) => Some(take(late)?),
        None => source.map(fill).transpose()?,
    };
    Ok(Ground {
        filling,
        machine: made.map_or_else(|| machine(opened, &memory), Ok)?,
        memory,
        cpus,
        content: Content::Saved(Box::new(saved.state), saved.absence),
    })
}

/// Ends the process: whoever waits for a page that cannot be read cannot be woken, and may be any thread.
fn end_without_memory(error: io::Error) {
    let error = chain(&error);
    tracing::error!(
        error,
        "the saved memory cannot be read to its end: the machine ends"
    );
    std::process::exit(1)
}

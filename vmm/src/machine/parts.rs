// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! What a built machine consists of, and how it is put back to its state before the first instruction.

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;

use atoll_devices::console::Console;
use atoll_devices::interrupt::IrqLine;
use atoll_devices::memory::Ram;
use atoll_devices::pci::PciHotplug;
use atoll_devices::platform::{GenerationId, Serial, Watchdog};
use atoll_devices::state::DeviceState;
use atoll_devices::virtio::balloon::Balloon;
use atoll_devices::virtio::net::Net;
use atoll_devices::virtio::scsi::Scsi;
use atoll_devices::virtio::{Act, VirtioPci};
use atoll_firmware::acpi::Platform;
use atoll_vmm_protocol::spec::MachineSpec;
use kvm_bindings::{kvm_cpuid_entry2, kvm_irqchip, kvm_pit_state2};

use super::arrival::Awaited;
use super::assembly::BuildError;
use super::backplane::Backplane;
use super::belongings::Belongings;
use super::disks::Disk;
use super::legacy::Legacy;
use crate::board::Board;
use crate::kvm::cpu::compare::feature_msrs;
use crate::kvm::cpu::features::FeatureSet;
use crate::kvm::cpu::{GuestCpu, runs_guests};
use crate::kvm::dirty::WriteLog;
use crate::kvm::{Kvm, KvmError, VirtualMachine};
use crate::layout;
use crate::loader::BootFiles;
use crate::memory::filling::Filling;
use crate::saved::image::Touched;
use crate::vcpu::state::{Scope, VcpuState};
use crate::vcpu::{Pending, Tsc, Vcpu};

/// A built machine. Fields are dropped in their order: vCPUs end first, guest memory goes last.
pub(super) struct Parts {
    pub(super) vcpus: Vec<Vcpu>,
    /// The PCI bus and its functions.
    pub(super) backplane: Backplane,
    /// What tells the guest of functions that come and go.
    pub(super) hotplug: Arc<PciHotplug>,
    /// Disks, in the spec's order; likewise network cards.
    pub(super) disks: Vec<Disk>,
    pub(super) nets: Vec<Card>,
    /// The host of disks that have no function of their own.
    pub(super) scsi: Option<Arc<Scsi>>,
    /// What the machine boots from, and keeps.
    pub(super) boot_disk: Option<String>,
    pub(super) balloon: Option<Arc<Balloon>>,
    pub(super) watchdog: Option<Arc<Watchdog>>,
    pub(super) generation: Option<Arc<GenerationId>>,
    pub(super) power_button: Arc<dyn IrqLine>,
    pub(super) serial_path: Option<PathBuf>,
    pub(super) console_path: Option<PathBuf>,
    pub(super) serial: Option<Arc<Serial>>,
    /// The consoles' threads, and what is on the other side.
    pub(super) consoles: Vec<Console>,
    /// For the process that has the machine next; see `belongings`.
    pub(super) kept: Option<Belongings>,
    /// Until the machine has come; see `arrival`.
    pub(super) awaited: Option<Awaited>,
    /// See [`super::opened::Opened`].
    pub(super) statm: Option<File>,
    /// Only for RAM that is private and anonymous; see [`Parts::touched`].
    pub(super) touched: Option<Arc<Touched>>,
    pub(super) board: &'static Board,
    pub(super) platform: Platform,
    /// The kernel, unless firmware boots.
    pub(super) boot_files: Option<BootFiles>,
    /// The `pc` board's own devices.
    pub(super) legacy: Option<Legacy>,
    pub(super) pristine: Pristine,
    /// What each vCPU was made with.
    pub(super) cpuid: Vec<Vec<kvm_cpuid_entry2>>,
    /// What is saved beside the bus, with the name under which it is; in the order of restoring.
    pub(super) board_states: Vec<(String, Arc<dyn DeviceState>)>,
    pub(super) machine: VirtualMachine,
    /// What brings RAM that is read while the guest runs: it serves whatever is above.
    pub(super) filling: Option<Filling>,
    pub(super) memory: Arc<Ram>,
}

/// A network card: its function, whose name is the card's id, and its device.
pub(super) struct Card {
    pub(super) function: Arc<VirtioPci>,
    pub(super) device: Arc<Net>,
}

/// State at power-on of what KVM keeps.
pub(super) struct Pristine {
    pub(super) scope: Arc<Scope>,
    vcpus: Vec<Arc<VcpuState>>,
    irqchips: Vec<kvm_irqchip>,
    /// The interval timer, where there is one.
    timer: Option<kvm_pit_state2>,
}

impl Pristine {
    /// Of a machine that has not run.
    pub(super) fn of(
        kvm: &Kvm,
        machine: &VirtualMachine,
        vcpus: &[Vcpu],
        features: &FeatureSet,
        legacy: Option<&Legacy>,
    ) -> Result<Self, KvmError> {
        let scope = Arc::new(Scope {
            msr_indices: kvm.msr_indices()?,
            nested: runs_guests(features),
        });
        let states = Pending::all(vcpus.iter().map(|vcpu| vcpu.save(&scope)))?;
        Ok(Self {
            vcpus: states.into_iter().map(Arc::new).collect(),
            irqchips: machine.irqchips()?,
            scope,
            timer: legacy.map(|_| machine.timer()).transpose()?,
        })
    }
}

impl Pristine {
    /// Speed of the vCPUs' time stamp counters; 0 when KVM does not say.
    pub(super) fn tsc_khz(&self) -> u32 {
        self.vcpus.first().map_or(0, |vcpu| vcpu.tsc_khz)
    }
}

impl Parts {
    /// Tells which pages were never touched and are zeroes, when that is so: a page that is still to be read is not.
    pub(super) fn touched(&self) -> Option<Arc<Touched>> {
        let complete = self.filling.as_ref().is_none_or(Filling::is_complete);
        self.touched.clone().filter(|_| complete)
    }

    /// Why its memory cannot be written down or sent, when some of it is still another process's.
    pub(super) fn elsewhere(&self) -> Option<&'static str> {
        let filling = self.filling.as_ref();
        filling.is_some_and(Filling::is_elsewhere).then_some(
            "the machine's memory is still coming from where it was: wait until info says that filling is complete",
        )
    }

    /// Why this cannot be done with the machine: the first device that stands in the way, and what it says.
    pub(super) fn obstacle(&self, act: Act) -> Option<String> {
        let obstacle = |function: &Arc<VirtioPci>| {
            let why = function.obstacle(act)?;
            Some(format!("{}: {why}", function.name()))
        };
        self.backplane.functions().find_map(obstacle)
    }

    /// Has all writes to RAM logged from now on.
    pub(super) fn log_writes(&self) -> Result<WriteLog, KvmError> {
        let functions = self.backplane.functions().cloned().collect();
        WriteLog::start(self.machine.clone(), self.memory.clone(), functions)
    }

    /// Everything whose state is saved, with its name; in the order of restoring.
    pub(super) fn states(&self) -> Vec<(&str, &dyn DeviceState)> {
        let mut states = self.backplane.states();
        let board = self.board_states.iter();
        states.extend(board.map(|(name, state)| (name.as_str(), state.as_ref())));
        states
    }

    /// The first vCPU's CPU.
    pub(super) fn first_cpu(&self) -> GuestCpu {
        let cpuid = self.cpuid.first().cloned().unwrap_or_default();
        let state = self.pristine.vcpus.first();
        let msrs = state.map_or(&[][..], |state| &state.msrs);
        let msrs: Vec<_> = msrs.iter().map(|msr| (msr.index, msr.data)).collect();
        GuestCpu {
            msrs: feature_msrs(&cpuid, &msrs),
            cpuid,
        }
    }

    /// Names of what can come and go.
    pub(super) fn removable_ids(&self) -> impl Iterator<Item = &str> {
        let cards = self.nets.iter().map(|card| card.function.name());
        self.disks.iter().map(Disk::id).chain(cards)
    }

    /// Whether a device of that name can come and go.
    pub(super) fn removable(&self, id: &str) -> bool {
        self.removable_ids().any(|other| other == id)
    }

    /// Loads the kernel and points the first vCPU at it. Firmware is in place, at the reset vector.
    pub(super) fn load(&mut self, spec: &MachineSpec) -> Result<(), BuildError> {
        let Some(boot_files) = &mut self.boot_files else {
            return Ok(());
        };
        let memory_bytes = spec.memory_mib << 20;
        let entry = boot_files.load(&self.memory, memory_bytes, self.board, &self.platform)?;
        self.note_files();
        if let Some(generation) = &self.generation {
            generation.place(Some(layout::GENERATION_ID.into()));
        }
        self.vcpus[0].enter(entry)?;
        Ok(())
    }

    /// Makes the memory of a held machine its own where it was the kernel's file; returns how much.
    pub(super) fn part_from_kernel(&mut self) -> std::io::Result<usize> {
        let files = self.boot_files.as_mut();
        let bytes = files.map_or(Ok(0), BootFiles::part)?;
        self.note_files();
        Ok(bytes)
    }

    /// Which part of memory is a file now.
    fn note_files(&mut self) {
        if let (Some(touched), Some(files)) = (&self.touched, &self.boot_files) {
            self.touched = touched.with_files(files.mapped()).map(Arc::new);
        }
    }

    /// Puts a held machine back to its state before the first instruction.
    pub(super) fn power_on(&mut self, spec: &MachineSpec) -> Result<(), BuildError> {
        self.backplane.reset();
        if let Some(serial) = &self.serial {
            serial.reset();
        }
        if let Some(legacy) = &self.legacy {
            legacy.reset();
        }
        if let Some(watchdog) = &self.watchdog {
            watchdog.reset();
        }
        if let Some(generation) = &self.generation {
            generation.place(None);
        }
        if let Some(timer) = &self.pristine.timer {
            self.machine.set_timer(timer)?;
        }
        self.machine.set_irqchips(&self.pristine.irqchips)?;
        let vcpus = self.vcpus.iter().zip(&self.pristine.vcpus);
        Pending::all(vcpus.map(|(vcpu, state)| vcpu.restore(state, Tsc::Keep)))?;
        self.load(spec)
    }
}

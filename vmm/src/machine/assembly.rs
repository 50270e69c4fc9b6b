// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! From a spec to a machine that is ready to execute its first instruction.
//!
//! The ground (KVM, memory, interrupts, an empty PCI bus) is laid first, then [`KINDS`] add the devices, in
//! the order of their PCI slots, then vCPUs are started and held, and the kernel is loaded.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use atoll_devices::bus::{Bus, BusDevice, BusError, BusRange};
use atoll_devices::console::Console;
use atoll_devices::memory::{Memory, Ram};
use atoll_devices::pci::{ConfigPorts, Ecam, PciBus, PciBusError, PciWindow, Window};
use atoll_devices::platform::Serial;
use atoll_devices::state::DeviceState;
use atoll_devices::virtio::balloon::Balloon;
use atoll_devices::virtio::net::TapError;
use atoll_devices::virtio::{VirtioDevice, VirtioPci, VirtioPciOptions};
use atoll_disk::OpenError;
use atoll_vmm_protocol::spec::MachineSpec;
use kvm_bindings::kvm_cpuid_entry2;

use super::devices::KINDS;
use super::disks::Disk;
use super::opened::Opened;
use super::owner::{GuestEvent, GuestVoice};
use super::parts::{Card, Parts, Pristine};
use super::saved::{self, Absence, RestoreError};
use super::{SavedStart, Start};
use crate::kvm::doorbells::Doorbells;
use crate::kvm::routes::Routes;
use crate::kvm::{Kvm, KvmError, VirtualMachine, cpuid};
use crate::layout;
use crate::loader::LoadError;
use crate::memory::{self, Backing, MemoryError};
use crate::power::PowerRegisters;
use crate::saved::MachineState;
use crate::vcpu::{Buses, Vcpu, setup};

/// Why this host cannot build the machine.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// KVM is absent or refuses.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// No memory for the guest.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Kernel or initial RAM disk.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// A disk's image.
    #[error(transparent)]
    Disk(#[from] OpenError),
    /// A network card's tap.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// A device's backend: a console's socket, a random number.
    #[error("{device}")]
    Device {
        /// `serial console`.
        device: String,
        /// What it said.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The PCI bus is full.
    #[error(transparent)]
    Pci(#[from] PciBusError),
    /// The address map is wrong, which is our own mistake.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// A saved machine cannot go on here.
    #[error(transparent)]
    Restore(#[from] RestoreError),
    /// The RAM of a saved machine.
    #[error("read the saved memory")]
    Image(#[source] io::Error),
    /// A thread or an eventfd could not be made.
    #[error("{what}")]
    Host {
        /// What was to be made.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

impl BuildError {
    /// For `map_err`: names the device.
    pub(super) fn device<E: Into<Box<dyn std::error::Error + Send + Sync>>>(
        device: impl Into<String>,
    ) -> impl FnOnce(E) -> Self {
        let device = device.into();
        move |error| Self::Device {
            device,
            source: error.into(),
        }
    }
}

/// A machine in the making.
pub(super) struct Assembly<'a> {
    pub(super) spec: &'a MachineSpec,
    pub(super) opened: &'a mut Opened,
    voice: &'a GuestVoice,
    memory: Memory,
    pub(super) routes: Arc<Routes>,
    pci: Arc<PciBus>,
    /// Where the next function's BARs go.
    next_bar: u64,
    ports: Vec<BusRange>,
    functions: Vec<Arc<VirtioPci>>,
    states: Vec<(String, Arc<dyn DeviceState>)>,
    pub(super) disks: Vec<Disk>,
    pub(super) nets: Vec<Card>,
    pub(super) balloon: Option<Arc<Balloon>>,
    pub(super) consoles: Vec<Console>,
    pub(super) serial: Option<Arc<Serial>>,
    pub(super) serial_path: Option<PathBuf>,
    pub(super) console_path: Option<PathBuf>,
}

/// Builds the machine from what is open; nothing of the guest has run.
pub(super) fn build(
    spec: &MachineSpec,
    mut opened: Opened,
    backing: Backing,
    start: Start,
    voice: &GuestVoice,
) -> Result<Parts, BuildError> {
    if backing != Backing::Anonymous || !start.memory_is_fresh() {
        opened.touched = None;
    }
    let (memory, saved) = memory_of(spec, &opened.kvm, backing, start)?;
    let machine = opened.kvm.create(spec.cpu_count)?;
    machine.set_memory(&memory)?;
    let routes = Routes::new(machine.clone())?;
    let window = Window {
        base: layout::WINDOW.into(),
        size: layout::WINDOW_BYTES.into(),
    };
    let mut assembly = Assembly {
        spec,
        opened: &mut opened,
        voice,
        memory: Memory::from(memory.clone()),
        pci: PciBus::new(vec![window], Arc::new(Doorbells(machine.clone()))),
        routes,
        next_bar: layout::WINDOW.into(),
        ports: Vec::new(),
        functions: Vec::new(),
        states: Vec::new(),
        disks: Vec::new(),
        nets: Vec::new(),
        balloon: None,
        consoles: Vec::new(),
        serial: None,
        serial_path: None,
        console_path: None,
    };
    assembly
        .states
        .push(("PCI bus".to_owned(), assembly.pci.clone()));
    for kind in KINDS {
        (kind.add)(&mut assembly)?;
    }
    let power_button = Arc::new(assembly.routes.pin(layout::POWER_GSI)?);
    let buses = assembly.buses(&window)?;
    let cpuid = cpuid_of_all(spec, &assembly.opened.kvm, saved.as_ref())?;
    let vcpus = start_vcpus(&machine, &cpuid, &buses, voice)?;
    let pristine = Pristine::of(&assembly.opened.kvm, &machine, &vcpus)?;
    let mut parts = Parts {
        vcpus,
        functions: assembly.functions,
        disks: assembly.disks,
        nets: assembly.nets,
        balloon: assembly.balloon,
        serial: assembly.serial,
        _consoles: assembly.consoles,
        power_button,
        serial_path: assembly.serial_path,
        console_path: assembly.console_path,
        states: assembly.states,
        pci: assembly.pci,
        statm: opened.statm,
        touched: opened.touched,
        boot_files: opened.boot_files,
        pristine,
        cpuid,
        machine,
        memory,
    };
    match saved {
        Some((state, absence)) => saved::restore(&parts, state, absence)?,
        None => parts.load(spec)?,
    }
    Ok(parts)
}

/// RAM, and what a saved machine consists of beside it.
type Ground = (Arc<Ram>, Option<(MachineState, Absence)>);

/// Zeroed RAM, or that of a saved machine, which is looked at first.
fn memory_of(
    spec: &MachineSpec,
    kvm: &Kvm,
    backing: Backing,
    start: Start,
) -> Result<Ground, BuildError> {
    let supported = kvm.cpuid()?;
    let address_bits = cpuid::address_bits(supported.as_slice());
    let fresh = || memory::allocate(spec.memory_mib, address_bits, backing);
    let Start::Saved(saved) = start else {
        return Ok((Arc::new(fresh()?), None));
    };
    let SavedStart {
        state,
        memory,
        absence,
    } = *saved;
    saved::check(&state, spec, supported.as_slice())?;
    let ram = memory.into_ram(spec.memory_mib, fresh)?;
    Ok((Arc::new(ram), Some((state, absence))))
}

/// What each vCPU answers to CPUID: this host's features, or what it has answered before.
fn cpuid_of_all(
    spec: &MachineSpec,
    kvm: &Kvm,
    saved: Option<&(MachineState, Absence)>,
) -> Result<Vec<Vec<kvm_cpuid_entry2>>, KvmError> {
    if let Some((state, _)) = saved {
        return Ok(state.cpuid());
    }
    let supported = kvm.cpuid()?;
    let of = |id| {
        let place = cpuid::Place {
            id,
            count: spec.cpu_count,
            tsc_deadline: kvm.has_tsc_deadline(),
        };
        cpuid::for_vcpu(supported.as_slice(), place)
    };
    Ok((0..spec.cpu_count).map(of).collect())
}

impl Assembly<'_> {
    /// Puts a virtio device into the next PCI slot, with a vector for each queue and one for configuration.
    pub(super) fn add(
        &mut self,
        name: String,
        device: Arc<dyn VirtioDevice>,
    ) -> Result<Arc<VirtioPci>, BuildError> {
        let queues = u16::try_from(device.queue_sizes().len()).expect("a handful of queues");
        let host = |source| BuildError::Host {
            what: "make eventfds for a device",
            source,
        };
        let options = VirtioPciOptions {
            name: name.clone(),
            memory: self.memory.clone(),
            msix: self.routes.vectors(queues + 1).map_err(host)?,
        };
        let function = Arc::new(VirtioPci::new(device, options).map_err(host)?);
        // Slot 0 is the host bridge.
        let slot = self.functions.len() + 1;
        self.next_bar = self.pci.add(slot, function.clone(), self.next_bar)?;
        self.functions.push(function.clone());
        self.states.push((name, function.clone()));
        Ok(function)
    }

    /// Puts a device on the port bus. Its name is also that of its saved state.
    pub(super) fn port(
        &mut self,
        name: &'static str,
        base: u16,
        size: u16,
        device: Arc<impl BusDevice + DeviceState + 'static>,
    ) {
        self.states.push((name.to_owned(), device.clone()));
        self.ports.push(BusRange {
            base: base.into(),
            size: size.into(),
            name,
            device,
        });
    }

    /// The tables that exits are answered from.
    fn buses(&mut self, window: &Window) -> Result<Buses, BuildError> {
        let control = Arc::new(self.voice.clone());
        self.port(
            "power registers",
            layout::POWER_PORT,
            layout::POWER_PORT_COUNT,
            Arc::new(PowerRegisters::new(control.clone())),
        );
        self.port(
            "PCI configuration ports",
            layout::PCI_CONFIG_PORT,
            layout::PCI_CONFIG_PORT_COUNT,
            Arc::new(ConfigPorts::new(self.pci.clone(), control)),
        );
        let memory = vec![
            BusRange {
                base: layout::ECAM.into(),
                size: Ecam::SIZE,
                name: "PCI configuration space",
                device: Arc::new(Ecam(self.pci.clone())),
            },
            BusRange {
                base: window.base,
                size: window.size,
                name: "PCI window",
                device: Arc::new(PciWindow::new(self.pci.clone(), window.base)),
            },
        ];
        Ok(Buses {
            ports: Bus::new(std::mem::take(&mut self.ports))?,
            memory: Bus::new(memory)?,
        })
    }
}

/// Creates all vCPUs, each in a thread of its own, held.
fn start_vcpus(
    machine: &VirtualMachine,
    cpuid: &[Vec<kvm_cpuid_entry2>],
    buses: &Buses,
    voice: &GuestVoice,
) -> Result<Vec<Vcpu>, BuildError> {
    let start = |(id, cpuid): (u8, &Vec<kvm_cpuid_entry2>)| {
        let fd = machine
            .fd()
            .create_vcpu(id.into())
            .map_err(KvmError::failed("create a vCPU"))?;
        setup::common(&fd, cpuid)?;
        let voice = voice.clone();
        let report = move |report| voice.say(GuestEvent::Stopped(report));
        Vcpu::start(id, fd, buses.clone(), report).map_err(|source| BuildError::Host {
            what: "start a vCPU's thread",
            source,
        })
    };
    (0..).zip(cpuid).map(start).collect()
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! From a spec to a machine that is ready to execute its first instruction.
//!
//! The ground (memory, KVM's machine, CPUs: `ground`) is laid first, then interrupts and an empty PCI bus are put on it, then
//! [`KINDS`] add the devices, in the order of their PCI slots, then vCPUs are started and held, and the kernel is loaded.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use atoll_devices::bus::{Bus, BusDevice, BusError, BusRange};
use atoll_devices::console::Console;
use atoll_devices::interrupt::IrqLine;
use atoll_devices::memory::{Memory, Ram};
use atoll_devices::pci::{ConfigPorts, Ecam, PciBus, PciBusError, PciHotplug, PciWindow, Window};
use atoll_devices::platform::{AcpiPm, GenerationId, MachineControl, Serial, Watchdog, q35};
use atoll_devices::state::DeviceState;
use atoll_devices::virtio::balloon::Balloon;
use atoll_devices::virtio::scsi::Scsi;
use atoll_disk::OpenError;
use atoll_firmware::acpi::{self, AcpiDevice, Platform, Power};
use atoll_vmm_protocol::spec::{BootSpec, MachineSpec};
use kvm_bindings::kvm_cpuid_entry2;

use super::Start;
use super::backplane::Backplane;
use super::devices::KINDS;
use super::disks::Disk;
use super::ground::{self, Content, Cpus, Ground};
use super::legacy::{self, Legacy};
use super::opened::Opened;
use super::owner::{GuestEvent, GuestVoice};
use super::parts::{Card, Parts, Pristine};
use super::saved::{self, RestoreError};
use crate::board::Board;
use crate::check;
use crate::flash::FlashError;
use crate::kvm::cpu::CpuError;
use crate::kvm::cpu::features::Feature;
use crate::kvm::doorbells::Doorbells;
use crate::kvm::routes::Routes;
use crate::kvm::{KvmError, VirtualMachine};
use crate::layout;
use crate::loader::LoadError;
use crate::memory::filling::FillingError;
use crate::memory::{Backing, MemoryError};
use crate::power::PowerRegisters;
use crate::resources::NetError;
use crate::vcpu::{Buses, Vcpu, setup};

/// Why this host cannot build the machine.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// KVM is absent or refuses.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// No such CPU here.
    #[error(transparent)]
    Cpu(#[from] CpuError),
    /// No memory for the guest.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Kernel or initial RAM disk.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// Firmware.
    #[error(transparent)]
    Firmware(#[from] FlashError),
    /// A disk's image.
    #[error(transparent)]
    Disk(#[from] OpenError),
    /// A network card's tap.
    #[error(transparent)]
    Net(#[from] NetError),
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
    /// There is nothing to map.
    #[error("a packed snapshot's memory cannot be mapped: it is read (--memory-mode read or lazy)")]
    PackedMapping,
    /// Others have the memory, and would see what is not there yet as zeroes; or its pages are too large.
    #[error("shared memory and huge pages cannot be read lazily: --memory-mode read")]
    LazyBacking,
    /// The host cannot do it.
    #[error(transparent)]
    Filling(#[from] FillingError),
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
    pub(super) voice: &'a GuestVoice,
    pub(super) board: &'static Board,
    pub(super) memory: Memory,
    pub(super) routes: Arc<Routes>,
    pub(super) backplane: Backplane,
    hotplug_event: u8,
    windows: Vec<Window>,
    /// The `pc` board's power block; the other's is a few registers.
    pm: Option<Arc<AcpiPm>>,
    acpi_devices: Vec<AcpiDevice>,
    event_count: usize,
    /// The guest sees VMX, which its firmware has to switch on.
    pub(super) vmx: bool,
    ports: Vec<BusRange>,
    mapped: Vec<BusRange>,
    states: Vec<(String, Arc<dyn DeviceState>)>,
    pub(super) disks: Vec<Disk>,
    pub(super) nets: Vec<Card>,
    pub(super) scsi: Option<Arc<Scsi>>,
    pub(super) balloon: Option<Arc<Balloon>>,
    pub(super) watchdog: Option<Arc<Watchdog>>,
    pub(super) generation: Option<Arc<GenerationId>>,
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
    let board = Board::of(spec.profile);
    let Ground {
        filling,
        memory,
        machine,
        cpus,
        content,
    } = ground::lay(spec, &mut opened, backing, start)?;
    let places = content.places();
    let mut assembly = Assembly::new(
        spec,
        &mut opened,
        voice,
        &machine,
        memory.clone(),
        &cpus,
        places,
    )?;
    let hotplug = assembly.hotplug()?;
    for kind in KINDS {
        (kind.add)(&mut assembly)?;
    }
    let (power_button, legacy) = assembly.power(&machine)?;
    let buses = assembly.buses()?;
    let platform = assembly.platform();
    let vcpus = start_vcpus(&machine, &cpus, &spec.boot, &buses, voice)?;
    let kvm = &assembly.opened.kvm;
    let pristine = Pristine::of(kvm, &machine, &vcpus, &cpus.features(), legacy.as_ref())?;
    let had = content.boot_disk();
    let mut parts = Parts {
        vcpus,
        backplane: assembly.backplane,
        hotplug,
        disks: assembly.disks,
        nets: assembly.nets,
        scsi: assembly.scsi,
        boot_disk: had.or_else(|| check::boot_disk(spec)),
        balloon: assembly.balloon,
        watchdog: assembly.watchdog,
        generation: assembly.generation,
        serial: assembly.serial,
        consoles: assembly.consoles,
        kept: assembly.opened.kept.take(),
        awaited: assembly.opened.awaited.take(),
        power_button,
        serial_path: assembly.serial_path,
        console_path: assembly.console_path,
        board_states: assembly.states,
        statm: opened.statm,
        touched: opened.touched,
        board,
        platform,
        boot_files: opened.boot_files,
        legacy,
        pristine,
        cpuid: cpus.cpuid,
        machine,
        filling,
        memory,
    };
    match content {
        Content::Fresh => parts.load(spec)?,
        Content::Saved(state, absence) => saved::restore(&parts, *state, absence)?,
        // The guest runs, in this memory.
        Content::Coming(_) => {}
    }
    Ok(parts)
}

impl<'a> Assembly<'a> {
    /// A machine with RAM and interrupts, and an empty PCI bus.
    fn new(
        spec: &'a MachineSpec,
        opened: &'a mut Opened,
        voice: &'a GuestVoice,
        machine: &VirtualMachine,
        memory: Arc<Ram>,
        cpus: &Cpus,
        places: BTreeMap<String, usize>,
    ) -> Result<Self, BuildError> {
        let board = Board::of(spec.profile);
        let windows = board.windows(spec.memory_mib << 20, cpus.address_bits());
        let routes = Routes::new(machine.clone())?;
        let doorbells = Arc::new(Doorbells(machine.clone()));
        let (pci, pm) = root(board, &windows, doorbells, &routes, voice);
        let memory = Memory::from(memory);
        let first = windows[0].base;
        let backplane = Backplane::new(pci, memory.clone(), routes.clone(), first, places);
        Ok(Self {
            spec,
            opened,
            voice,
            board,
            memory,
            windows,
            backplane,
            hotplug_event: 0,
            pm,
            acpi_devices: Vec::new(),
            event_count: 0,
            vmx: cpus.features().has(Feature::known("vmx")),
            routes,
            ports: Vec::new(),
            mapped: Vec::new(),
            states: Vec::new(),
            disks: Vec::new(),
            nets: Vec::new(),
            scsi: None,
            balloon: None,
            watchdog: None,
            generation: None,
            consoles: Vec::new(),
            serial: None,
            serial_path: None,
            console_path: None,
        })
    }
}

impl Assembly<'_> {
    /// The registers by which functions come and go. Before any other device that has an event, so that its event is the
    /// board's first.
    fn hotplug(&mut self) -> Result<Arc<PciHotplug>, BuildError> {
        let (event, line) = self.acpi_event()?;
        let pci = self.backplane.pci().clone();
        let hotplug = Arc::new(PciHotplug::new(pci, line, Box::new(self.voice.clone())));
        self.port(
            "PCI hot-plug",
            layout::PCI_HOTPLUG_PORT,
            PciHotplug::SIZE,
            hotplug.clone(),
        );
        self.hotplug_event = event;
        Ok(hotplug)
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

    /// Has the state of something saved that is on no bus of ours.
    pub(super) fn saved(&mut self, name: &str, state: Arc<dyn DeviceState>) {
        self.states.push((name.to_owned(), state));
    }

    /// Puts a device on the memory bus, outside of the PCI windows: its base and size.
    pub(super) fn memory_mapped(
        &mut self,
        name: &'static str,
        (base, size): (u64, u64),
        device: Arc<impl BusDevice + DeviceState + 'static>,
    ) {
        self.states.push((name.to_owned(), device.clone()));
        self.mapped.push(BusRange {
            base,
            size,
            name,
            device,
        });
    }

    /// Adds a device that only ACPI tells the guest of.
    pub(super) fn acpi_device(&mut self, device: AcpiDevice) {
        self.acpi_devices.push(device);
    }

    /// The next free event of the board, for [`AcpiDevice::event`]: each pulse of its line notifies the device.
    pub(super) fn acpi_event(&mut self) -> Result<(u8, Arc<dyn IrqLine>), BuildError> {
        let number = self.board.events[self.event_count];
        self.event_count += 1;
        Ok(match &self.pm {
            Some(pm) => (number, pm.event(number)),
            None => (number, Arc::new(self.routes.pin(number.into())?)),
        })
    }

    pub(super) fn memory_bytes(&self) -> u64 {
        self.spec.memory_mib << 20
    }

    /// What a guest can ask of the machine.
    pub(super) fn control(&self) -> Arc<dyn MachineControl> {
        Arc::new(self.voice.clone())
    }

    /// The hardware as ACPI tells it, as far as it is there.
    pub(super) fn platform(&self) -> Platform {
        let devices = self.acpi_devices.clone();
        let comes_and_goes = |name: &str| {
            let disks = self.spec.disks.iter().map(|disk| &disk.id);
            let mut ids = disks.chain(self.spec.nets.iter().map(|net| &net.id));
            ids.any(|id| id.as_deref() == Some(name))
        };
        let fixed = |slot: &usize| {
            let name = self.backplane.name_of(*slot);
            name.is_some_and(|name| !comes_and_goes(name))
        };
        let slots = (1..q35::LPC_SLOT).filter(|slot| !fixed(slot));
        let hotplug = acpi::PciHotplug {
            port: layout::PCI_HOTPLUG_PORT,
            event: self.hotplug_event,
            slots: slots.fold(0, |slots, slot| slots | 1 << slot),
        };
        Platform {
            hotplug: Some(hotplug),
            ..self
                .board
                .platform(self.spec.cpu_count, &self.windows, devices)
        }
    }

    /// The power button, and the rest of the board.
    fn power(
        &mut self,
        machine: &VirtualMachine,
    ) -> Result<(Arc<dyn IrqLine>, Option<Legacy>), BuildError> {
        if let Some(pm) = self.pm.clone() {
            self.acpi_devices.push(legacy::clock());
            let legacy = Legacy::add(self, machine, pm.clone())?;
            return Ok((pm.power_button(), Some(legacy)));
        }
        let Power::Reduced { button_gsi, .. } = self.board.power else {
            unreachable!("a board without a power block is hardware-reduced");
        };
        self.port(
            "power registers",
            layout::POWER_PORT,
            layout::POWER_PORT_COUNT,
            Arc::new(PowerRegisters::new(self.control())),
        );
        Ok((Arc::new(self.routes.pin(button_gsi)?), None))
    }

    /// The tables that exits are answered from.
    fn buses(&mut self) -> Result<Buses, BuildError> {
        let control = self.control();
        self.port(
            "PCI configuration ports",
            layout::PCI_CONFIG_PORT,
            layout::PCI_CONFIG_PORT_COUNT,
            Arc::new(ConfigPorts::new(self.backplane.pci().clone(), control)),
        );
        let mut memory = std::mem::take(&mut self.mapped);
        memory.push(BusRange {
            base: self.board.ecam.into(),
            size: Ecam::SIZE,
            name: "PCI configuration space",
            device: Arc::new(Ecam(self.backplane.pci().clone())),
        });
        memory.extend(self.windows.iter().map(|window| BusRange {
            base: window.base,
            size: window.size,
            name: "PCI window",
            device: Arc::new(PciWindow::new(self.backplane.pci().clone(), window.base)),
        }));
        Ok(Buses {
            ports: Bus::new(std::mem::take(&mut self.ports))?,
            memory: Bus::new(memory)?,
        })
    }
}

/// An empty PCI bus with the board's host bridge, and the power block where the board has one.
fn root(
    board: &Board,
    windows: &[Window],
    doorbells: Arc<Doorbells>,
    routes: &Routes,
    voice: &GuestVoice,
) -> (Arc<PciBus>, Option<Arc<AcpiPm>>) {
    let windows = windows.to_vec();
    match board.power {
        Power::Reduced { .. } => (PciBus::new(windows, doorbells), None),
        Power::Pc { sci_gsi, .. } => {
            let pci = PciBus::with_host_bridge(q35::host_bridge(), windows, doorbells);
            let pm = AcpiPm::new(
                Arc::new(voice.clone()),
                Arc::new(routes.level(sci_gsi.into())),
            );
            (pci, Some(pm))
        }
    }
}

/// Creates all vCPUs, each in a thread of its own, held.
fn start_vcpus(
    machine: &VirtualMachine,
    cpus: &Cpus,
    boot: &BootSpec,
    buses: &Buses,
    voice: &GuestVoice,
) -> Result<Vec<Vcpu>, BuildError> {
    let start = |(id, cpuid): (u8, &Vec<kvm_cpuid_entry2>)| {
        let fd = machine
            .fd()
            .create_vcpu(id.into())
            .map_err(KvmError::failed("create a vCPU"))?;
        setup::common(&fd, cpuid, &cpus.msrs)?;
        if let BootSpec::Kernel(_) = boot {
            setup::as_firmware_leaves_it(&fd)?;
        }
        let voice = voice.clone();
        let report = move |report| voice.say(GuestEvent::Stopped(report));
        Vcpu::start(id, fd, buses.clone(), report).map_err(|source| BuildError::Host {
            what: "start a vCPU's thread",
            source,
        })
    };
    (0..).zip(&cpus.cpuid).map(start).collect()
}

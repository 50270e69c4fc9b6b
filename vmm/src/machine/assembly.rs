// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! From a spec to a machine that is ready to execute its first instruction.
//!
//! The ground (KVM, memory, interrupts, an empty PCI bus) is laid first, then [`STEPS`] adds the devices, in
//! the order of their PCI slots, then vCPUs are started and held, and the kernel is loaded. A new kind of device
//! is a new row.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use atoll_devices::bus::{Bus, BusDevice, BusError, BusRange};
use atoll_devices::console::{Console, ConsoleBackend};
use atoll_devices::interrupt::IrqLine;
use atoll_devices::memory::Memory;
use atoll_devices::pci::{ConfigPorts, Ecam, PciBus, PciBusError, PciWindow, Window};
use atoll_devices::platform::Serial;
use atoll_devices::virtio::blk::{Blk, BlkOptions};
use atoll_devices::virtio::console::VirtioConsole;
use atoll_devices::virtio::net::{Net, NetOptions, Tap, TapError};
use atoll_devices::virtio::rng::Rng;
use atoll_devices::virtio::{VirtioDevice, VirtioPci, VirtioPciOptions};
use atoll_disk::{OpenError, OpenOptions, RawBackend};
use atoll_vmm_protocol::spec::{ConsoleSpec, DiskFormat, MachineSpec};
use kvm_bindings::kvm_irqchip;
use vm_memory::GuestMemoryMmap;

use super::{GuestEvent, GuestVoice};
use crate::kvm::doorbells::Doorbells;
use crate::kvm::routes::Routes;
use crate::kvm::{Kvm, KvmError, VirtualMachine, cpuid};
use crate::loader::{BootFiles, LoadError};
use crate::memory::{self, Backing, MemoryError};
use crate::power::PowerRegisters;
use crate::vcpu::state::VcpuState;
use crate::vcpu::{Buses, Vcpu, setup};
use crate::{check, layout};

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
    fn device<E: Into<Box<dyn std::error::Error + Send + Sync>>>(
        device: impl Into<String>,
    ) -> impl FnOnce(E) -> Self {
        let device = device.into();
        move |error| Self::Device {
            device,
            source: error.into(),
        }
    }
}

/// Adds one kind of device to the machine.
type Step = fn(&mut Assembly<'_>) -> Result<(), BuildError>;

/// Every kind of device. The order is that of the PCI slots, which a guest sees: disks and cards first, so that
/// their slots depend on nothing but the spec's own order.
const STEPS: &[Step] = &[disks, nets, console, rng, serial];

/// A machine in the making.
struct Assembly<'a> {
    spec: &'a MachineSpec,
    voice: &'a GuestVoice,
    memory: Memory,
    routes: Arc<Routes>,
    pci: Arc<PciBus>,
    /// Where the next function's BARs go.
    next_bar: u64,
    ports: Vec<BusRange>,
    functions: Vec<Arc<VirtioPci>>,
    disks: Vec<Arc<VirtioPci>>,
    nets: Vec<Arc<VirtioPci>>,
    consoles: Vec<Console>,
    serial: Option<Arc<Serial>>,
    serial_path: Option<PathBuf>,
    console_path: Option<PathBuf>,
}

/// A built machine. Fields are dropped in their order: vCPUs end first, guest memory goes last.
pub(super) struct Parts {
    pub(super) vcpus: Vec<Vcpu>,
    /// Every virtio function, in slot order.
    pub(super) functions: Vec<Arc<VirtioPci>>,
    /// Those among them that are disks, in the spec's order; likewise network cards.
    pub(super) disks: Vec<Arc<VirtioPci>>,
    pub(super) nets: Vec<Arc<VirtioPci>>,
    pub(super) power_button: Arc<dyn IrqLine>,
    pub(super) serial_path: Option<PathBuf>,
    pub(super) console_path: Option<PathBuf>,
    serial: Option<Arc<Serial>>,
    /// The consoles' threads, and what is on the other side.
    _consoles: Vec<Console>,
    pci: Arc<PciBus>,
    boot_files: BootFiles,
    pristine: Pristine,
    machine: VirtualMachine,
    memory: Arc<GuestMemoryMmap>,
}

/// State at power-on of what KVM keeps.
struct Pristine {
    vcpus: Vec<Arc<VcpuState>>,
    irqchips: Vec<kvm_irqchip>,
}

/// Builds the machine: everything is opened, nothing of the guest has run.
pub(super) fn build(
    spec: &MachineSpec,
    backing: Backing,
    voice: &GuestVoice,
) -> Result<Parts, BuildError> {
    let boot_files = BootFiles::open(&spec.boot)?;
    let kvm = Kvm::open()?;
    let supported = kvm.cpuid()?;
    let address_bits = cpuid::address_bits(supported.as_slice());
    let memory = Arc::new(memory::allocate(spec.memory_mib, address_bits, backing)?);
    let machine = kvm.create(spec.cpu_count)?;
    machine.set_memory(&memory)?;
    let routes = Routes::new(machine.clone())?;
    let window = Window {
        base: layout::WINDOW.into(),
        size: layout::WINDOW_BYTES.into(),
    };
    let mut assembly = Assembly {
        spec,
        voice,
        memory: Memory::from(memory.clone()),
        pci: PciBus::new(vec![window], Arc::new(Doorbells(machine.clone()))),
        routes,
        next_bar: layout::WINDOW.into(),
        ports: Vec::new(),
        functions: Vec::new(),
        disks: Vec::new(),
        nets: Vec::new(),
        consoles: Vec::new(),
        serial: None,
        serial_path: None,
        console_path: None,
    };
    for step in STEPS {
        step(&mut assembly)?;
    }
    let power_button = Arc::new(assembly.routes.pin(layout::POWER_GSI)?);
    let buses = assembly.buses(&window)?;
    let vcpus = start_vcpus(&kvm, &machine, spec.cpu_count, &buses, voice)?;
    let pristine = Pristine::of(&kvm, &machine, &vcpus)?;
    let mut parts = Parts {
        vcpus,
        functions: assembly.functions,
        disks: assembly.disks,
        nets: assembly.nets,
        serial: assembly.serial,
        _consoles: assembly.consoles,
        power_button,
        serial_path: assembly.serial_path,
        console_path: assembly.console_path,
        pci: assembly.pci,
        boot_files,
        pristine,
        machine,
        memory,
    };
    parts.load(spec)?;
    Ok(parts)
}

fn disks(assembly: &mut Assembly<'_>) -> Result<(), BuildError> {
    for (index, disk) in assembly.spec.disks.iter().enumerate() {
        let DiskFormat::Raw = disk.format;
        let options = OpenOptions {
            read_only: disk.readonly,
            ..OpenOptions::default()
        };
        let backend = Arc::new(RawBackend::open(&disk.path, options)?);
        let queues = u16::from(assembly.spec.cpu_count).min(check::QUEUE_COUNT_MAX);
        let name = format!("blk{index}");
        let device = Arc::new(Blk::new(BlkOptions {
            name: name.clone(),
            backend,
            serial: disk
                .serial
                .clone()
                .unwrap_or_else(|| format!("disk{index}")),
            queue_count: disk.queue_count.unwrap_or(queues),
        }));
        let function = assembly.add(name, device)?;
        assembly.disks.push(function);
    }
    Ok(())
}

fn nets(assembly: &mut Assembly<'_>) -> Result<(), BuildError> {
    for (index, net) in assembly.spec.nets.iter().enumerate() {
        let mac = match &net.mac {
            Some(text) => check::mac(text).map_err(BuildError::device("network card"))?,
            None => random_mac().map_err(BuildError::device("network card"))?,
        };
        let name = format!("net{index}");
        let device = Arc::new(Net::new(NetOptions {
            name: name.clone(),
            tap: Tap::open(&net.tap)?,
            mac,
            mtu: net.mtu,
        }));
        let function = assembly.add(name, device)?;
        assembly.nets.push(function);
    }
    Ok(())
}

/// A locally administered address of one card: bit 1 of the first octet set, bit 0 clear.
fn random_mac() -> io::Result<[u8; 6]> {
    let mut mac = [0; 6];
    rustix::rand::getrandom(&mut mac, rustix::rand::GetRandomFlags::empty())?;
    mac[0] = (mac[0] | 2) & !1;
    Ok(mac)
}

fn console(assembly: &mut Assembly<'_>) -> Result<(), BuildError> {
    let Some(spec) = &assembly.spec.console else {
        return Ok(());
    };
    let console = open_console("virtio console", spec)?;
    let device =
        VirtioConsole::new(console.port()).map_err(BuildError::device("virtio console"))?;
    assembly.add("console0".to_owned(), Arc::new(device))?;
    assembly.console_path = path_of(spec, &console);
    assembly.consoles.push(console);
    Ok(())
}

fn rng(assembly: &mut Assembly<'_>) -> Result<(), BuildError> {
    if assembly.spec.rng {
        assembly.add("rng0".to_owned(), Arc::new(Rng::new()))?;
    }
    Ok(())
}

fn serial(assembly: &mut Assembly<'_>) -> Result<(), BuildError> {
    let console = open_console("serial console", &assembly.spec.serial)?;
    let irq = Arc::new(assembly.routes.pin(layout::SERIAL_GSI)?);
    let device = Serial::new(console.port(), irq);
    assembly.serial_path = path_of(&assembly.spec.serial, &console);
    assembly.port(
        "serial port",
        layout::SERIAL_PORT,
        layout::SERIAL_PORT_COUNT,
        device.clone(),
    );
    assembly.serial = Some(device);
    assembly.consoles.push(console);
    Ok(())
}

fn open_console(what: &str, spec: &ConsoleSpec) -> Result<Console, BuildError> {
    let backend = match spec {
        ConsoleSpec::Null => ConsoleBackend::Null,
        ConsoleSpec::Stdio => ConsoleBackend::Stdio,
        ConsoleSpec::Pty => ConsoleBackend::Pty,
        ConsoleSpec::Socket(path) => ConsoleBackend::Socket(path.clone()),
    };
    Console::open(&backend).map_err(BuildError::device(what))
}

/// What `info` tells about a console: the path that a user opens.
fn path_of(spec: &ConsoleSpec, console: &Console) -> Option<PathBuf> {
    match spec {
        ConsoleSpec::Socket(path) => Some(path.clone()),
        _ => console.pty_path().map(Path::to_owned),
    }
}

impl Assembly<'_> {
    /// Puts a virtio device into the next PCI slot, with a vector for each queue and one for configuration.
    fn add(
        &mut self,
        name: String,
        device: Arc<dyn VirtioDevice>,
    ) -> Result<Arc<VirtioPci>, BuildError> {
        let vectors = u16::try_from(device.queue_sizes().len()).unwrap_or(u16::MAX - 1) + 1;
        let host = |source| BuildError::Host {
            what: "make eventfds for a device",
            source,
        };
        let options = VirtioPciOptions {
            name,
            memory: self.memory.clone(),
            msix: self.routes.vectors(vectors).map_err(host)?,
        };
        let function = Arc::new(VirtioPci::new(device, options).map_err(host)?);
        // Slot 0 is the host bridge.
        let slot = self.functions.len() + 1;
        self.next_bar = self.pci.add(slot, function.clone(), self.next_bar)?;
        self.functions.push(function.clone());
        Ok(function)
    }

    fn port(&mut self, name: &'static str, base: u16, size: u16, device: Arc<dyn BusDevice>) {
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
    kvm: &Kvm,
    machine: &VirtualMachine,
    count: u8,
    buses: &Buses,
    voice: &GuestVoice,
) -> Result<Vec<Vcpu>, BuildError> {
    let supported = kvm.cpuid()?;
    let tsc_deadline = kvm.has_tsc_deadline();
    let start = |id: u8| {
        let fd = machine
            .fd()
            .create_vcpu(id.into())
            .map_err(KvmError::failed("create a vCPU"))?;
        let place = cpuid::Place {
            id,
            count,
            tsc_deadline,
        };
        setup::common(&fd, &cpuid::for_vcpu(supported.as_slice(), place))?;
        let voice = voice.clone();
        let report = move |report| voice.say(GuestEvent::Stopped(report));
        Vcpu::start(id, fd, buses.clone(), report).map_err(|source| BuildError::Host {
            what: "start a vCPU's thread",
            source,
        })
    };
    (0..count).map(start).collect()
}

impl Pristine {
    fn of(kvm: &Kvm, machine: &VirtualMachine, vcpus: &[Vcpu]) -> Result<Self, KvmError> {
        let msr_indices: Arc<[u32]> = kvm.msr_indices()?.into();
        let save = |vcpu: &Vcpu| vcpu.save(&msr_indices).map(Arc::new);
        Ok(Self {
            vcpus: vcpus.iter().map(save).collect::<Result<_, _>>()?,
            irqchips: machine.irqchips()?,
        })
    }
}

impl Parts {
    /// Loads the kernel and points the first vCPU at it.
    fn load(&mut self, spec: &MachineSpec) -> Result<(), BuildError> {
        let memory_bytes = spec.memory_mib << 20;
        let entry = self
            .boot_files
            .load(&self.memory, memory_bytes, spec.cpu_count)?;
        self.vcpus[0].enter(entry)?;
        Ok(())
    }

    /// Puts a held machine back to its state before the first instruction.
    pub(super) fn power_on(&mut self, spec: &MachineSpec) -> Result<(), BuildError> {
        for function in &self.functions {
            function.reset();
        }
        self.pci.reset();
        if let Some(serial) = &self.serial {
            serial.reset();
        }
        self.machine.set_irqchips(&self.pristine.irqchips)?;
        for (vcpu, state) in self.vcpus.iter().zip(&self.pristine.vcpus) {
            vcpu.restore(state)?;
        }
        self.load(spec)
    }
}

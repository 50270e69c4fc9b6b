// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! ACPI tables of the machine: RSDP, XSDT, FADT, FACS, MADT, MCFG, DSDT (ACPI 6.5).
//!
//! Decision: **hardware-reduced ACPI** (§4.1) for `micro`. Context: a guest needs a power button, soft-off and
//! reset; with full ACPI that is a PM1 event block, a level-triggered SCI, a PM timer, and promises of a PIC, a
//! PIT and an RTC. Hardware-reduced ACPI needs two byte registers and one edge-triggered interrupt (a generic
//! event device), and what is not promised need not be saved, restored and migrated. Linux from 4.x and
//! Windows run so. A firmware made for a PC wants the PM1 registers and the timer: `pc` has them ([`Power`]).
//!
//! The host bridge has no `_PRT`: no device has an interrupt pin, all of them signal by MSI-X.
//!
//! What a device adds to the tables is data ([`AcpiDevice`]): the same entry serves both kinds of board.

mod hotplug;

use acpi_tables::facs::FACS;
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink, aml};

/// `SLP_TYPx` of the `_S5_` (soft-off) package, in bits 2 to 4 of the sleep control register (§4.8.3.7).
pub const SLEEP_TYPE_OFF: u8 = 5;
/// `SLP_EN` of the sleep control register: go to the state of bits 2 to 4 now.
pub const SLEEP_ENABLE: u8 = 1 << 5;
/// What the guest writes to the reset register (§4.8.3.6).
pub const RESET_VALUE: u8 = 1;

const OEM: [u8; 6] = *b"ATOLL ";
const OEM_TABLE: [u8; 8] = *b"ATOLLVMM";
const OEM_REVISION: u32 = 1;
/// `IAPC_BOOT_ARCH` (§5.2.9.3): there is no VGA and no CMOS clock (nor, bits clear, an 8042).
const NO_VGA_NO_RTC: u16 = 1 << 2 | 1 << 5;
/// The same: there are devices on the LPC bus, and no VGA.
const LEGACY_NO_VGA: u16 = 1 << 0 | 1 << 2;
/// Tables begin at multiples of this; a FACS asks for it (§5.2.10).
pub(crate) const ALIGNMENT: usize = 64;

/// Offsets of the PM blocks from their base, as an ICH9 has them (Intel ICH9 datasheet §13.8.3), which firmware
/// for a Q35 board relies on.
pub const PM1_EVENT: u16 = 0x00;
/// PM1 control register, two bytes (ACPI 6.5 §4.8.3.2).
pub const PM1_CONTROL: u16 = 0x04;
/// Power management timer, four bytes (§4.8.3.3).
pub const PM_TIMER: u16 = 0x08;
/// Status and enable registers of general-purpose events, eight bytes each.
pub const GPE0: u16 = 0x20;
/// Bytes of status and enable registers together.
pub const GPE0_BYTES: u8 = 16;
/// `SLP_TYPx` of soft-off in the PM1 control register: OVMF writes it without asking ACPI.
pub const PC_SLEEP_TYPE_OFF: u8 = 0;
/// Ports of the PM blocks, from their base: as many as PMBASE of an ICH9 decodes.
pub const PM_PORT_COUNT: u8 = 0x80;
/// The ICH9's SMI command and status ports. Nothing answers there; software that finds them free would not mind.
const APM_PORT: u16 = 0xb2;
/// Index of the century among the bytes of the CMOS clock.
pub const RTC_CENTURY: u8 = 0x32;
/// Port of the PC's reset register, and what is written there.
pub const PC_RESET_PORT: u16 = 0xcf9;
/// Full reset of an ICH9 (datasheet §13.7.5): reset the processors, and the system.
pub const PC_RESET_VALUE: u8 = 0x06;

/// How the guest turns the machine off, and how events reach it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Power {
    /// Hardware-reduced: byte registers, and one edge-triggered interrupt an event (a generic event device).
    /// Numbers of [`AcpiDevice::event`] are interrupts (GSIs).
    Reduced {
        /// Interrupt of the power button.
        button_gsi: u32,
        /// Sleep control register, a byte; the sleep status register is the port after it.
        sleep_port: u16,
        /// Reset register, a byte.
        reset_port: u16,
    },
    /// A PC's PM1 and GPE0 blocks, a PM timer, a level-triggered SCI. Numbers of [`AcpiDevice::event`] are bits
    /// of GPE0.
    Pc {
        /// First port of the blocks.
        pm_base: u16,
        /// The SCI, active high.
        sci_gsi: u8,
    },
}

/// A device that only ACPI tells the guest of: an entry under `\\_SB` of the DSDT.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AcpiDevice {
    /// Its name in AML: four characters, unique among the machine's devices: `VGEN`.
    pub name: &'static str,
    /// `_HID`: an EISA name (`PNP0B00`, seven characters) or any other string.
    pub hid: &'static str,
    /// AML of the other objects of the device: `_CID`, `_CRS`, methods.
    pub objects: Vec<u8>,
    /// Its event: a number of the board's (see [`Power`]), on which the device is notified with `0x80`.
    pub event: Option<u8>,
}

/// Name of the object that says where the generation id is, and what its package begins with: two elements, the first
/// of them four bytes, which firmware may have to change ([`crate::table_loader`]).
pub(crate) const GENERATION_ADDRESS: [u8; 9] = *b"\x08ADDR\x12\x08\x02\x0c";

/// Tells of the sixteen bytes at `address` (below 4 GiB) that change when the machine becomes another one (Microsoft
/// "Virtual Machine Generation ID"). Where firmware places them, `address` is the offset in the file that it allocates.
#[must_use]
pub fn generation_id(address: u32, event: u8) -> AcpiDevice {
    // Windows wants the first, Linux takes either.
    let compatible = aml::Package::new(vec![&"VM_Gen_Counter", &"VMGENCTR"]);
    let mut objects = serialized(&aml::Name::new("_CID".into(), &compatible));
    objects.extend(serialized(&aml::Name::new(
        "_DDN".into(),
        &"VM_Gen_Counter",
    )));
    objects.extend(GENERATION_ADDRESS);
    objects.extend(address.to_le_bytes());
    objects.push(0);
    AcpiDevice {
        name: "VGEN",
        hid: "ATOL0002",
        objects,
        event: Some(event),
    }
}

/// Slots of bus 0 whose content may change while the guest runs; the registers are `atoll-devices`' `PciHotplug`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PciHotplug {
    /// First port of the registers, whose number is `PciHotplug::SIZE` of `atoll-devices`.
    pub port: u16,
    /// The event that lets the guest read them: a number of the board's (see [`Power`]).
    pub event: u8,
    /// The slots of bus 0 that may change, one bit each, that of slot 0 lowest.
    pub slots: u32,
}

/// The hardware that the tables tell of. Addresses are guest-physical.
#[derive(Debug, Clone)]
pub struct Platform {
    /// Where the tables go; the RSDP is the first of them.
    pub tables_address: u64,
    /// vCPUs; the local APIC ids are 0 to one less.
    pub cpu_count: u8,
    /// Registers of the local APICs, at the same address for each processor.
    pub lapic_address: u32,
    /// Registers of the I/O APIC, which takes the GSIs from 0.
    pub ioapic_address: u32,
    /// PCI configuration space by memory (ECAM), of `bus_count` buses; told in the MCFG.
    pub ecam_address: u32,
    /// Buses in it, from 0; each takes 1 MiB.
    pub bus_count: u8,
    /// First address for BARs below 4 GiB.
    pub window_address: u32,
    /// Length of that window, bytes.
    pub window_size: u32,
    /// First and last address for BARs above 4 GiB.
    pub high_window: Option<(u64, u64)>,
    /// First port of the 16550 serial port COM1.
    pub serial_port: u16,
    /// Interrupt of the serial port, edge-triggered.
    pub serial_gsi: u32,
    /// Power registers, and how the guest hears of events.
    pub power: Power,
    /// Devices that only ACPI tells of, in the DSDT's order.
    pub devices: Vec<AcpiDevice>,
    /// Slots whose functions come and go; without it none does.
    pub hotplug: Option<PciHotplug>,
}

impl Platform {
    /// Port and value with which the guest resets the machine.
    #[must_use]
    pub fn reset_register(&self) -> (u16, u8) {
        match self.power {
            Power::Reduced { reset_port, .. } => (reset_port, RESET_VALUE),
            Power::Pc { .. } => (PC_RESET_PORT, PC_RESET_VALUE),
        }
    }
}

/// A `_CRS` of one range of ports, for [`AcpiDevice::objects`].
#[must_use]
pub fn ports(first: u16, count: u8) -> Vec<u8> {
    resources(vec![&aml::IO::new(first, first, 1, count)])
}

/// A `_CRS` of one range of ports and one edge-triggered, active-high interrupt that is not shared.
#[must_use]
pub fn ports_and_interrupt(first: u16, count: u8, gsi: u32) -> Vec<u8> {
    let interrupt = aml::Interrupt::new(true, true, false, false, gsi);
    resources(vec![&aml::IO::new(first, first, 1, count), &interrupt])
}

fn resources(all: Vec<&dyn Aml>) -> Vec<u8> {
    serialized(&aml::Name::new(
        "_CRS".into(),
        &aml::ResourceTemplate::new(all),
    ))
}

/// All tables as one piece, to be written at `tables_address`.
#[must_use]
pub fn tables(platform: &Platform) -> Vec<u8> {
    // The RSDP comes first and has a fixed size; everything else is known before it is.
    let mut bytes = vec![0; Rsdp::len()];
    let placed = place(&mut bytes, platform, platform.tables_address);
    let rsdp = serialized(&Rsdp::new(OEM, placed.xsdt));
    bytes[..rsdp.len()].copy_from_slice(&rsdp);
    bytes
}

/// Where [`place`] put the tables that point at others.
pub(crate) struct Placed {
    pub(crate) dsdt: u64,
    pub(crate) fadt: u64,
    pub(crate) xsdt: u64,
    /// Entries of the XSDT.
    pub(crate) entry_count: usize,
    pub(crate) has_facs: bool,
}

/// Appends all tables but the RSDP to `bytes`, which will be at `base`.
pub(crate) fn place(bytes: &mut Vec<u8>, platform: &Platform, base: u64) -> Placed {
    let facs = match platform.power {
        Power::Reduced { .. } => None,
        Power::Pc { .. } => Some(append(bytes, base, &serialized(&FACS::new()))),
    };
    let dsdt = append(bytes, base, &dsdt(platform));
    let fadt = append(bytes, base, &fadt(platform, dsdt, facs));
    let entries = [
        fadt,
        append(bytes, base, &madt(platform)),
        append(bytes, base, &mcfg(platform)),
    ];
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    for entry in entries {
        xsdt.add_entry(entry);
    }
    Placed {
        dsdt,
        fadt,
        xsdt: append(bytes, base, &serialized(&xsdt)),
        entry_count: entries.len(),
        has_facs: facs.is_some(),
    }
}

/// The RSDP that points at an XSDT.
pub(crate) fn rsdp(xsdt: u64) -> Vec<u8> {
    serialized(&Rsdp::new(OEM, xsdt))
}

/// Puts a table behind the others and gives its guest-physical address.
fn append(bytes: &mut Vec<u8>, base: u64, table: &[u8]) -> u64 {
    bytes.resize(bytes.len().next_multiple_of(ALIGNMENT), 0);
    let address = base + bytes.len() as u64;
    bytes.extend_from_slice(table);
    address
}

fn serialized(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn byte_port(port: u16) -> GAS {
    register(port, 8)
}

/// A register of `bits` in I/O space.
fn register(port: u16, bits: u8) -> GAS {
    let access = match bits {
        8 => AccessSize::ByteAccess,
        16 => AccessSize::WordAccess,
        _ => AccessSize::DwordAccess,
    };
    GAS::new(AddressSpace::SystemIo, bits, 0, access, port.into())
}

fn fadt(platform: &Platform, dsdt: u64, facs: Option<u64>) -> Vec<u8> {
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Wbinvd);
    let (reset_port, reset_value) = platform.reset_register();
    fadt.reset_reg = byte_port(reset_port);
    fadt.reset_value = reset_value;
    match platform.power {
        Power::Reduced { sleep_port, .. } => {
            // The button is by control method, as a hardware-reduced machine has no fixed one.
            fadt = fadt.flag(Flags::HwReducedAcpi).flag(Flags::PwrButton);
            fadt.iapc_boot_arch = NO_VGA_NO_RTC.into();
            fadt.sleep_control_reg = byte_port(sleep_port);
            fadt.sleep_status_reg = byte_port(sleep_port + 1);
        }
        Power::Pc { pm_base, sci_gsi } => fadt = pm_blocks(fadt, pm_base, sci_gsi),
    }
    if let Some(facs) = facs {
        fadt = fadt.firmware_ctrl_64(facs);
    }
    serialized(&fadt.finalize())
}

/// The fixed registers of a PC. There is no SMI command port: the machine is in ACPI mode from power-on.
fn pm_blocks(fadt: FADTBuilder, base: u16, sci_gsi: u8) -> FADTBuilder {
    let mut fadt = fadt
        .flag(Flags::TmrValExt)
        .flag(Flags::FixRtc)
        .flag(Flags::ProcC1);
    let at = |offset: u16| u32::from(base + offset).into();
    fadt.iapc_boot_arch = LEGACY_NO_VGA.into();
    fadt.sci_int = u16::from(sci_gsi).into();
    fadt.pm1a_evt_blk = at(PM1_EVENT);
    fadt.pm1_evt_len = 4;
    fadt.pm1a_cnt_blk = at(PM1_CONTROL);
    fadt.pm1_cnt_len = 2;
    fadt.pm_tmr_blk = at(PM_TIMER);
    fadt.pm_tmr_len = 4;
    fadt.gpe0_blk = at(GPE0);
    fadt.gpe0_blk_len = GPE0_BYTES;
    fadt.x_pm1a_evt_blk = register(base + PM1_EVENT, 32);
    fadt.x_pm1a_cnt_blk = register(base + PM1_CONTROL, 16);
    fadt.x_pm_tmr_blk = register(base + PM_TIMER, 32);
    fadt.x_gpe0_blk = register(base + GPE0, GPE0_BYTES * 8);
    fadt.century = RTC_CENTURY;
    // No C2 and C3: their latencies are above the limits that ACPI gives (§5.2.9).
    fadt.p_lvl2_lat = 0xfff.into();
    fadt.p_lvl3_lat = 0xfff.into();
    fadt
}

fn madt(platform: &Platform) -> Vec<u8> {
    let lapic = LocalInterruptController::Address(platform.lapic_address);
    let mut madt = MADT::new(OEM, OEM_TABLE, OEM_REVISION, lapic);
    for id in 0..platform.cpu_count {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, platform.ioapic_address, 0));
    let mut bytes = serialized(&madt);
    if let Power::Pc { sci_gsi, .. } = platform.power {
        bytes.extend(source_override(sci_gsi));
        seal(&mut bytes);
    }
    bytes
}

/// An interrupt source override (§5.2.12.5): the ISA interrupt is the GSI of its number, level-triggered, active high.
fn source_override(irq: u8) -> [u8; 10] {
    const LEVEL_HIGH: u8 = 0b1101;
    [2, 10, 0, irq, irq, 0, 0, 0, LEVEL_HIGH, 0]
}

/// Sets length and checksum of a table that was put together by hand.
fn seal(table: &mut [u8]) {
    let length = u32::try_from(table.len()).expect("a table has a few KiB");
    table[4..8].copy_from_slice(&length.to_le_bytes());
    table[9] = 0;
    let sum = table.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
    table[9] = sum.wrapping_neg();
}

fn mcfg(platform: &Platform) -> Vec<u8> {
    let mut mcfg = MCFG::new(OEM, OEM_TABLE, OEM_REVISION);
    let last_bus = platform.bus_count - 1;
    mcfg.add_ecam(platform.ecam_address.into(), 0, 0, last_bus);
    serialized(&mcfg)
}

fn dsdt(platform: &Platform) -> Vec<u8> {
    let sleep_type = match platform.power {
        Power::Reduced { .. } => SLEEP_TYPE_OFF,
        Power::Pc { .. } => PC_SLEEP_TYPE_OFF,
    };
    let off = aml::Package::new(vec![&sleep_type, &sleep_type, &aml::ZERO, &aml::ZERO]);
    let mut dsdt = Sdt::new(*b"DSDT", 36, 6, OEM, OEM_TABLE, OEM_REVISION);
    dsdt.append_slice(&serialized(&aml::Name::new("_S5_".into(), &off)));
    for device in [
        processors(platform),
        host_bridge(platform),
        motherboard(platform),
        serial(platform),
        devices(platform),
    ] {
        dsdt.append_slice(&aml::Scope::raw("\\_SB_".into(), device));
    }
    dsdt.append_slice(&events(platform));
    dsdt.update_checksum();
    dsdt.as_slice().to_vec()
}

/// `_HID` by its EISA name, as most devices have it.
fn hid(name: &str) -> aml::Name {
    aml::Name::new("_HID".into(), &aml::EISAName::new(name))
}

fn processors(platform: &Platform) -> Vec<u8> {
    (0..platform.cpu_count)
        .flat_map(|id| {
            serialized(&aml::Device::new(
                format!("C{id:03X}").as_str().into(),
                vec![
                    &aml::Name::new("_HID".into(), &"ACPI0007"),
                    &aml::Name::new("_UID".into(), &id),
                ],
            ))
        })
        .collect()
}

fn host_bridge(platform: &Platform) -> Vec<u8> {
    let last_bus = u16::from(platform.bus_count) - 1;
    let window_last = platform.window_address + (platform.window_size - 1);
    let buses = aml::AddressSpace::new_bus_number(0_u16, last_bus);
    let config_ports = aml::IO::new(0xcf8, 0xcf8, 1, 8);
    let low = aml::AddressSpace::new_memory(
        aml::AddressSpaceCacheable::NotCacheable,
        true,
        platform.window_address,
        window_last,
        None,
    );
    let high = platform.high_window.map(|(first, last)| {
        let kind = aml::AddressSpaceCacheable::NotCacheable;
        aml::AddressSpace::new_memory(kind, true, first, last, None)
    });
    let mut resources: Vec<&dyn Aml> = vec![&buses, &config_ports, &low];
    if let Some(high) = &high {
        resources.push(high);
    }
    let slots = platform.hotplug.as_ref().map(hotplug::slots);
    let slots = Raw(slots.as_deref().unwrap_or_default());
    serialized(&aml::Device::new(
        "PCI0".into(),
        vec![
            &hid("PNP0A08"),
            &aml::Name::new("_CID".into(), &aml::EISAName::new("PNP0A03")),
            &aml::Name::new("_UID".into(), &aml::ZERO),
            &aml::Name::new("_SEG".into(), &aml::ZERO),
            &aml::Name::new("_BBN".into(), &aml::ZERO),
            &aml::Name::new("_CCA".into(), &aml::ONE),
            &aml::Name::new("_CRS".into(), &aml::ResourceTemplate::new(resources)),
            &slots,
        ],
    ))
}

/// Reserves what belongs to no device: without it, Linux does not trust the MCFG.
fn motherboard(platform: &Platform) -> Vec<u8> {
    let ecam_size = u32::from(platform.bus_count) << 20;
    let ports = match platform.power {
        Power::Reduced {
            sleep_port,
            reset_port,
            ..
        } => [(sleep_port, 2), (reset_port, 1)],
        // The reset register is within the host bridge's ports.
        Power::Pc { pm_base, .. } => [(pm_base, PM_PORT_COUNT), (APM_PORT, 2)],
    };
    let [first, second] = ports.map(|(port, count)| aml::IO::new(port, port, 1, count));
    serialized(&aml::Device::new(
        "MBRD".into(),
        vec![
            &hid("PNP0C02"),
            &aml::Name::new("_UID".into(), &aml::ZERO),
            &aml::Name::new(
                "_CRS".into(),
                &aml::ResourceTemplate::new(vec![
                    &aml::Memory32Fixed::new(true, platform.ecam_address, ecam_size),
                    &first,
                    &second,
                ]),
            ),
        ],
    ))
}

fn serial(platform: &Platform) -> Vec<u8> {
    serialized(&aml::Device::new(
        "COM1".into(),
        vec![
            &hid("PNP0501"),
            &aml::Name::new("_UID".into(), &aml::ZERO),
            &aml::Name::new("_DDN".into(), &"COM1"),
            &aml::Name::new(
                "_CRS".into(),
                &aml::ResourceTemplate::new(vec![
                    &aml::Interrupt::new(true, true, false, false, platform.serial_gsi),
                    &aml::IO::new(platform.serial_port, platform.serial_port, 1, 8),
                ]),
            ),
        ],
    ))
}

/// Devices that only ACPI tells of: the board's own button, and what the machine was given.
fn devices(platform: &Platform) -> Vec<u8> {
    let mut bytes = Vec::new();
    if let Power::Reduced { .. } = platform.power {
        bytes.extend(device(&power_button()));
    }
    bytes.extend(platform.hotplug.iter().flat_map(hotplug::registers));
    bytes.extend(platform.devices.iter().flat_map(device));
    bytes
}

fn power_button() -> AcpiDevice {
    AcpiDevice {
        name: "PWRB",
        hid: "PNP0C0C",
        objects: serialized(&aml::Name::new("_UID".into(), &aml::ZERO)),
        event: None,
    }
}

/// Already serialized AML among objects.
struct Raw<'a>(&'a [u8]);

impl Aml for Raw<'_> {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(self.0);
    }
}

fn device(device: &AcpiDevice) -> Vec<u8> {
    let is_eisa = device.hid.len() == 7 && device.hid.starts_with("PNP");
    let name = if is_eisa {
        hid(device.hid)
    } else {
        aml::Name::new("_HID".into(), &device.hid)
    };
    let objects = Raw(&device.objects);
    serialized(&aml::Device::new(device.name.into(), vec![&name, &objects]))
}

/// What the guest does when an event comes: it notifies the event's device, or looks what has changed on the bus.
fn events(platform: &Platform) -> Vec<u8> {
    let notify = |name: &str| {
        let path = aml::Path::new(&format!("\\_SB_.{name}"));
        serialized(&aml::Notify::new(&path, &0x80_u8))
    };
    let own = platform.devices.iter().filter_map(|device| {
        let number: u32 = device.event?.into();
        Some((number, notify(device.name)))
    });
    let hotplug = platform.hotplug.iter();
    let hotplug = hotplug.map(|hotplug| (hotplug.event.into(), hotplug::scan()));
    let mut sources: Vec<(u32, Vec<u8>)> = hotplug.chain(own).collect();
    match platform.power {
        Power::Reduced { button_gsi, .. } => {
            sources.insert(0, (button_gsi, notify("PWRB")));
            aml::Scope::raw("\\_SB_".into(), event_device(&sources))
        }
        Power::Pc { .. } if sources.is_empty() => Vec::new(),
        Power::Pc { .. } => {
            let methods = sources.iter().flat_map(|(bit, action)| {
                // Edge-triggered: the status bit is cleared before the method runs (§5.6.4.1).
                let method = format!("_E{bit:02X}");
                let action = Raw(action);
                serialized(&aml::Method::new(
                    method.as_str().into(),
                    0,
                    false,
                    vec![&action],
                ))
            });
            aml::Scope::raw("\\_GPE".into(), methods.collect())
        }
    }
}

/// The generic event device (§5.6.9), whose interrupts say what happened: pairs of an interrupt and what is done.
fn event_device(sources: &[(u32, Vec<u8>)]) -> Vec<u8> {
    let interrupts: Vec<aml::Interrupt> = sources
        .iter()
        .map(|(gsi, _)| aml::Interrupt::new(true, true, false, false, *gsi))
        .collect();
    let body: Vec<u8> = sources
        .iter()
        .flat_map(|(gsi, action)| {
            let is_it = aml::Equal::new(&aml::Arg(0), gsi);
            serialized(&aml::If::new(&is_it, vec![&Raw(action)]))
        })
        .collect();
    let resources = interrupts.iter().map(|interrupt| interrupt as &dyn Aml);
    serialized(&aml::Device::new(
        "GED0".into(),
        vec![
            &aml::Name::new("_HID".into(), &"ACPI0013"),
            &aml::Name::new("_UID".into(), &aml::ZERO),
            &aml::Name::new(
                "_CRS".into(),
                &aml::ResourceTemplate::new(resources.collect()),
            ),
            &aml::Method::new("_EVT".into(), 1, true, vec![&Raw(&body)]),
        ],
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: u64 = 0xe_0000;

    pub(super) fn platform(cpu_count: u8) -> Platform {
        Platform {
            tables_address: BASE,
            cpu_count,
            lapic_address: 0xfee0_0000,
            ioapic_address: 0xfec0_0000,
            ecam_address: 0xe000_0000,
            bus_count: 1,
            window_address: 0xc000_0000,
            window_size: 0x2000_0000,
            high_window: None,
            serial_port: 0x3f8,
            serial_gsi: 4,
            power: Power::Reduced {
                button_gsi: 5,
                sleep_port: 0x600,
                reset_port: 0x602,
            },
            devices: vec![AcpiDevice {
                name: "VGEN",
                hid: "ATOL0001",
                objects: Vec::new(),
                event: Some(6),
            }],
            hotplug: None,
        }
    }

    pub(super) fn pc(cpu_count: u8) -> Platform {
        Platform {
            high_window: Some((0x1_0000_0000, 0xff_ffff_ffff)),
            power: Power::Pc {
                pm_base: 0x600,
                sci_gsi: 9,
            },
            ..platform(cpu_count)
        }
    }

    fn number(bytes: &[u8], offset: usize, size: usize) -> u64 {
        let mut word = [0; 8];
        word[..size].copy_from_slice(&bytes[offset..offset + size]);
        u64::from_le_bytes(word)
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    /// The table at a guest-physical address, its length and checksum verified.
    #[track_caller]
    fn table(bytes: &[u8], address: u64, signature: &str) -> Vec<u8> {
        let from = &bytes[usize::try_from(address - BASE).unwrap()..];
        let length = usize::try_from(number(from, 4, 4)).unwrap();
        let table = &from[..length];
        assert_eq!(std::str::from_utf8(&table[..4]).unwrap(), signature);
        assert_eq!(sum(table), 0, "checksum of {signature}");
        table.to_vec()
    }

    /// FADT, MADT, MCFG, DSDT, as a guest finds them from the RSDP.
    fn walk(cpu_count: u8) -> [Vec<u8>; 4] {
        walk_tables(&tables(&platform(cpu_count)))
    }

    fn walk_tables(bytes: &[u8]) -> [Vec<u8>; 4] {
        assert_eq!(&bytes[..8], b"RSD PTR ");
        assert_eq!((sum(&bytes[..20]), sum(&bytes[..36])), (0, 0));
        let xsdt = table(bytes, number(bytes, 24, 8), "XSDT");
        assert_eq!(xsdt.len(), 36 + 3 * 8);
        let entry = |index: usize| number(&xsdt, 36 + 8 * index, 8);
        let fadt = table(bytes, entry(0), "FACP");
        let dsdt = table(bytes, number(&fadt, 140, 8), "DSDT");
        [
            fadt,
            table(bytes, entry(1), "APIC"),
            table(bytes, entry(2), "MCFG"),
            dsdt,
        ]
    }

    #[test]
    fn every_table_is_found_and_sums_to_zero() {
        for cpu_count in [1, 8, 255] {
            walk(cpu_count);
        }
    }

    #[test]
    fn the_registers_are_where_the_platform_says() {
        let [fadt, ..] = walk(1);
        assert_eq!(fadt.len(), 276);
        let flags = number(&fadt, 112, 4);
        assert_eq!(
            flags & (1 << 20 | 1 << 10 | 1 << 4),
            1 << 20 | 1 << 10 | 1 << 4
        );
        // Generic addresses: I/O space, 8 bits, byte access.
        assert_eq!(number(&fadt, 116, 4), 0x0100_0801);
        assert_eq!((number(&fadt, 120, 8), fadt[128]), (0x602, RESET_VALUE));
        assert_eq!(
            (number(&fadt, 248, 8), number(&fadt, 260, 8)),
            (0x600, 0x601)
        );
    }

    /// A PC's fixed registers, in both forms, and its interrupt override; events are methods of `\_GPE`.
    #[test]
    fn a_pc_has_power_management_blocks_and_a_level_triggered_sci() {
        let [fadt, madt, _, dsdt] = walk_tables(&tables(&pc(1)));
        assert_eq!(number(&fadt, 46, 2), 9, "SCI_INT");
        let flags = number(&fadt, 112, 4);
        assert_eq!((flags >> 20 & 1, flags >> 8 & 1, flags >> 4 & 1), (0, 1, 0));
        let blocks = [56, 64, 76, 80].map(|offset| number(&fadt, offset, 4));
        assert_eq!(blocks, [0x600, 0x604, 0x608, 0x620]);
        let extended = [148, 172, 208, 220].map(|offset| number(&fadt, offset + 4, 8));
        assert_eq!(extended, [0x600, 0x604, 0x608, 0x620]);
        assert_eq!((number(&fadt, 120, 8), fadt[128]), (0xcf9, 6));
        assert_ne!(number(&fadt, 132, 8), 0, "the FACS");
        assert_eq!(madt[madt.len() - 10..], [2, 10, 0, 9, 9, 0, 0, 0, 0x0d, 0]);
        assert_eq!(&dsdt[36..48], b"\x08_S5_\x12\x06\x04\0\0\0\0");
        let method = b"_E06\0\x86\\._SB_VGEN\x0a\x80";
        let found = dsdt.windows(method.len()).filter(|bytes| bytes == method);
        assert_eq!(found.count(), 1);
    }

    #[test]
    fn every_vcpu_has_a_local_apic_and_a_device() {
        let [_, madt, _, dsdt] = walk(3);
        assert_eq!(number(&madt, 36, 4), 0xfee0_0000);
        assert_eq!(madt.len(), 44 + 3 * 8 + 12);
        assert_eq!(&madt[44 + 16..44 + 24], &[0, 8, 2, 2, 1, 0, 0, 0]);
        assert_eq!(number(&madt, 44 + 24 + 4, 4), 0xfec0_0000);
        let devices = dsdt.windows(8).filter(|name| name == b"ACPI0007").count();
        assert_eq!(devices, 3);
    }

    #[test]
    fn mcfg_covers_the_buses() {
        let [_, _, mcfg, _] = walk(1);
        assert_eq!(number(&mcfg, 44, 8), 0xe000_0000);
        assert_eq!(&mcfg[52..56], &[0, 0, 0, 0]);
    }

    /// Walks the DSDT's packages as an interpreter would find their ends: every length is within its parent.
    #[test]
    fn the_dsdt_is_scopes_after_the_sleep_package() {
        let [.., dsdt] = walk(2);
        // Name (_S5_, Package (4) {5, 0, 0, 0})
        assert_eq!(&dsdt[36..50], b"\x08_S5_\x12\x08\x04\x0a\x05\x0a\x05\0\0");
        let mut at = 50;
        let mut scopes = 0;
        while at < dsdt.len() {
            assert_eq!(dsdt[at], 0x10, "ScopeOp at {at}");
            let lead = dsdt[at + 1];
            let extra = usize::from(lead >> 6);
            let length = if extra == 0 {
                usize::from(lead & 0x3f)
            } else {
                let high = number(&dsdt, at + 2, extra);
                usize::from(lead & 0x0f) | usize::try_from(high << 4).unwrap()
            };
            at += 1 + length;
            scopes += 1;
        }
        assert_eq!((at, scopes), (dsdt.len(), 6));
    }
}

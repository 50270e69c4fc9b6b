// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! ACPI tables of the machine: RSDP, XSDT, FADT, MADT, MCFG, DSDT (ACPI 6.5).
//!
//! Decision: **hardware-reduced ACPI** (§4.1). Context: a guest needs a power button, soft-off and reset;
//! with full ACPI that is a PM1 event block, a level-triggered SCI, a PM timer, and promises of a PIC, a PIT
//! and an RTC. Hardware-reduced ACPI needs two byte registers and one edge-triggered interrupt (a generic
//! event device), and what is not promised need not be saved, restored and migrated. Linux from 4.x and
//! Windows run so. Revisit when a firmware of the `pc` profile wants PM1 registers.
//!
//! The host bridge has no `_PRT`: no device has an interrupt pin, all of them signal by MSI-X.

use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, aml};

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
/// Tables begin at multiples of this.
const ALIGNMENT: usize = 16;

/// The hardware that the tables tell of. Addresses are guest-physical.
#[derive(Debug, Clone, Copy)]
pub struct Platform {
    /// Where the tables go; the RSDP is the first of them.
    pub tables_address: u64,
    /// vCPUs; the local APIC ids are 0 to one less.
    pub cpu_count: u8,
    /// Registers of the local APICs.
    pub lapic_address: u32,
    /// Registers of the I/O APIC, which takes the GSIs from 0.
    pub ioapic_address: u32,
    /// PCI configuration space by memory (ECAM).
    pub ecam_address: u32,
    /// Buses in it, from 0; each takes 1 MiB.
    pub bus_count: u8,
    /// First address for BARs.
    pub window_address: u32,
    /// Length of that window.
    pub window_size: u32,
    /// First port of the 16550 serial port COM1.
    pub serial_port: u16,
    /// Its interrupt.
    pub serial_gsi: u32,
    /// Interrupt of the power button.
    pub power_gsi: u32,
    /// Sleep control register, a byte; the sleep status register is the port after it.
    pub sleep_port: u16,
    /// Reset register, a byte.
    pub reset_port: u16,
}

/// All tables as one piece, to be written at `tables_address`.
#[must_use]
pub fn tables(platform: &Platform) -> Vec<u8> {
    // The RSDP comes first and has a fixed size; everything else is known before it is.
    let mut bytes = vec![0; Rsdp::len()];
    let dsdt = append(&mut bytes, platform, &dsdt(platform));
    let entries = [
        append(&mut bytes, platform, &fadt(platform, dsdt)),
        append(&mut bytes, platform, &madt(platform)),
        append(&mut bytes, platform, &mcfg(platform)),
    ];
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    for entry in entries {
        xsdt.add_entry(entry);
    }
    let xsdt = append(&mut bytes, platform, &serialized(&xsdt));
    let rsdp = serialized(&Rsdp::new(OEM, xsdt));
    bytes[..rsdp.len()].copy_from_slice(&rsdp);
    bytes
}

/// Puts a table behind the others and gives its guest-physical address.
fn append(bytes: &mut Vec<u8>, platform: &Platform, table: &[u8]) -> u64 {
    bytes.resize(bytes.len().next_multiple_of(ALIGNMENT), 0);
    let address = platform.tables_address + bytes.len() as u64;
    bytes.extend_from_slice(table);
    address
}

fn serialized(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn fadt(platform: &Platform, dsdt: u64) -> Vec<u8> {
    let port = |port: u16| {
        GAS::new(
            AddressSpace::SystemIo,
            8,
            0,
            AccessSize::ByteAccess,
            port.into(),
        )
    };
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::PwrButton) // by control method, as a hardware-reduced machine has no fixed one
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Wbinvd);
    fadt.iapc_boot_arch = NO_VGA_NO_RTC.into();
    fadt.reset_reg = port(platform.reset_port);
    fadt.reset_value = RESET_VALUE;
    fadt.sleep_control_reg = port(platform.sleep_port);
    fadt.sleep_status_reg = port(platform.sleep_port + 1);
    serialized(&fadt.finalize())
}

fn madt(platform: &Platform) -> Vec<u8> {
    let lapic = LocalInterruptController::Address(platform.lapic_address);
    let mut madt = MADT::new(OEM, OEM_TABLE, OEM_REVISION, lapic);
    for id in 0..platform.cpu_count {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, platform.ioapic_address, 0));
    serialized(&madt)
}

fn mcfg(platform: &Platform) -> Vec<u8> {
    let mut mcfg = MCFG::new(OEM, OEM_TABLE, OEM_REVISION);
    let last_bus = platform.bus_count - 1;
    mcfg.add_ecam(platform.ecam_address.into(), 0, 0, last_bus);
    serialized(&mcfg)
}

fn dsdt(platform: &Platform) -> Vec<u8> {
    let off = aml::Package::new(vec![&SLEEP_TYPE_OFF, &aml::ZERO, &aml::ZERO, &aml::ZERO]);
    let mut dsdt = Sdt::new(*b"DSDT", 36, 6, OEM, OEM_TABLE, OEM_REVISION);
    dsdt.append_slice(&serialized(&aml::Name::new("_S5_".into(), &off)));
    for device in [
        processors(platform),
        host_bridge(platform),
        motherboard(platform),
        serial(platform),
        power_button(platform),
    ] {
        dsdt.append_slice(&aml::Scope::raw("\\_SB_".into(), device));
    }
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
    serialized(&aml::Device::new(
        "PCI0".into(),
        vec![
            &hid("PNP0A08"),
            &aml::Name::new("_CID".into(), &aml::EISAName::new("PNP0A03")),
            &aml::Name::new("_UID".into(), &aml::ZERO),
            &aml::Name::new("_SEG".into(), &aml::ZERO),
            &aml::Name::new("_BBN".into(), &aml::ZERO),
            &aml::Name::new("_CCA".into(), &aml::ONE),
            &aml::Name::new(
                "_CRS".into(),
                &aml::ResourceTemplate::new(vec![
                    &aml::AddressSpace::new_bus_number(0_u16, last_bus),
                    &aml::IO::new(0xcf8, 0xcf8, 1, 8),
                    &aml::AddressSpace::new_memory(
                        aml::AddressSpaceCacheable::NotCacheable,
                        true,
                        platform.window_address,
                        window_last,
                        None,
                    ),
                ]),
            ),
        ],
    ))
}

/// Reserves what belongs to no device: without it, Linux does not trust the MCFG.
fn motherboard(platform: &Platform) -> Vec<u8> {
    let ecam_size = u32::from(platform.bus_count) << 20;
    serialized(&aml::Device::new(
        "MBRD".into(),
        vec![
            &hid("PNP0C02"),
            &aml::Name::new("_UID".into(), &aml::ZERO),
            &aml::Name::new(
                "_CRS".into(),
                &aml::ResourceTemplate::new(vec![
                    &aml::Memory32Fixed::new(true, platform.ecam_address, ecam_size),
                    &aml::IO::new(platform.sleep_port, platform.sleep_port, 1, 2),
                    &aml::IO::new(platform.reset_port, platform.reset_port, 1, 1),
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

/// The button, and the generic event device (§5.6.9) whose interrupt says that it was pressed.
fn power_button(platform: &Platform) -> Vec<u8> {
    let button = aml::Path::new("\\_SB_.PWRB");
    let pressed = aml::Notify::new(&button, &0x80_u8);
    let is_button = aml::Equal::new(&aml::Arg(0), &platform.power_gsi);
    let mut bytes = serialized(&aml::Device::new(
        "PWRB".into(),
        vec![&hid("PNP0C0C"), &aml::Name::new("_UID".into(), &aml::ZERO)],
    ));
    bytes.extend(serialized(&aml::Device::new(
        "GED0".into(),
        vec![
            &aml::Name::new("_HID".into(), &"ACPI0013"),
            &aml::Name::new("_UID".into(), &aml::ZERO),
            &aml::Name::new(
                "_CRS".into(),
                &aml::ResourceTemplate::new(vec![&aml::Interrupt::new(
                    true,
                    true,
                    false,
                    false,
                    platform.power_gsi,
                )]),
            ),
            &aml::Method::new(
                "_EVT".into(),
                1,
                true,
                vec![&aml::If::new(&is_button, vec![&pressed])],
            ),
        ],
    )));
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: u64 = 0xe_0000;

    fn platform(cpu_count: u8) -> Platform {
        Platform {
            tables_address: BASE,
            cpu_count,
            lapic_address: 0xfee0_0000,
            ioapic_address: 0xfec0_0000,
            ecam_address: 0xe000_0000,
            bus_count: 1,
            window_address: 0xc000_0000,
            window_size: 0x2000_0000,
            serial_port: 0x3f8,
            serial_gsi: 4,
            power_gsi: 5,
            sleep_port: 0x600,
            reset_port: 0x602,
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
        let bytes = tables(&platform(cpu_count));
        assert_eq!(&bytes[..8], b"RSD PTR ");
        assert_eq!((sum(&bytes[..20]), sum(&bytes[..36])), (0, 0));
        let xsdt = table(&bytes, number(&bytes, 24, 8), "XSDT");
        assert_eq!(xsdt.len(), 36 + 3 * 8);
        let entry = |index: usize| number(&xsdt, 36 + 8 * index, 8);
        let fadt = table(&bytes, entry(0), "FACP");
        let dsdt = table(&bytes, number(&fadt, 140, 8), "DSDT");
        [
            fadt,
            table(&bytes, entry(1), "APIC"),
            table(&bytes, entry(2), "MCFG"),
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
        assert_eq!(&dsdt[36..48], b"\x08_S5_\x12\x07\x04\x0a\x05\0\0");
        let mut at = 49;
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
        assert_eq!((at, scopes), (dsdt.len(), 5));
    }
}

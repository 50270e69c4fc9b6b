// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The ACPI tables as firmware fetches them: two files, and a script that says how to put them into memory (QEMU's
//! "linker/loader", `hw/acpi/bios-linker-loader.c`; OVMF's `AcpiPlatformDxe/QemuFwCfgAcpi.c` follows it).
//!
//! Firmware chooses the addresses, so pointers are offsets into a file at first, and the script lists them, and the
//! checksums that change with them.

use crate::acpi::{self, ALIGNMENT, Placed, Platform};

/// Name of the file with the RSDP.
pub const RSDP_FILE: &str = "etc/acpi/rsdp";
/// Name of the file with all other tables.
pub const TABLES_FILE: &str = "etc/acpi/tables";
/// Name of the script's file.
pub const SCRIPT_FILE: &str = "etc/table-loader";

/// Bytes of one command of the script.
const COMMAND_BYTES: usize = 128;
/// Bytes of a file's name in it, the final zero included.
const NAME_BYTES: usize = 56;
/// Commands.
const ALLOCATE: u32 = 1;
const ADD_POINTER: u32 = 2;
const ADD_CHECKSUM: u32 = 3;
/// Where firmware should allocate: anywhere, or in the segment that is searched for an RSDP.
const ZONE_HIGH: u8 = 1;
const ZONE_FSEG: u8 = 2;

/// Offsets in the FADT (ACPI 6.5 §5.2.9): 64-bit addresses of the FACS and of the DSDT.
const FADT_FACS: u64 = 132;
const FADT_DSDT: u64 = 140;
/// Offset of a table's checksum and of its length.
const CHECKSUM: u64 = 9;
const LENGTH: usize = 4;
/// First entry of the XSDT.
const XSDT_ENTRIES: u64 = 36;
/// RSDP: checksum of the first 20 bytes, address of the XSDT, checksum of all 36.
const RSDP_CHECKSUM: (u32, u32) = (8, 20);
const RSDP_XSDT: u32 = 24;
const RSDP_EXTENDED_CHECKSUM: (u32, u32) = (32, 36);

/// The three files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TableFiles {
    /// Content of [`RSDP_FILE`].
    pub rsdp: Vec<u8>,
    /// Content of [`TABLES_FILE`].
    pub tables: Vec<u8>,
    /// Content of [`SCRIPT_FILE`].
    pub script: Vec<u8>,
}

/// Tables of a platform and the script that places them; the platform's own `tables_address` has no meaning here.
#[must_use]
pub fn table_files(platform: &Platform) -> TableFiles {
    let mut tables = Vec::new();
    let placed = acpi::place(&mut tables, platform, 0);
    let mut rsdp = acpi::rsdp(placed.xsdt);
    let mut script = Vec::new();
    allocate(&mut script, RSDP_FILE, 16, ZONE_FSEG);
    let alignment = u32::try_from(ALIGNMENT).expect("small");
    allocate(&mut script, TABLES_FILE, alignment, ZONE_HIGH);
    for offset in pointers(&placed) {
        pointer(&mut script, TABLES_FILE, at(offset));
    }
    for table in [placed.fadt, placed.xsdt] {
        let start = usize::try_from(table).expect("an offset in a file");
        let length = &tables[start + LENGTH..][..4];
        let length = u32::from_le_bytes([length[0], length[1], length[2], length[3]]);
        let result = at(table + CHECKSUM);
        checksum(&mut script, TABLES_FILE, (result, at(table), length));
        tables[start + usize::try_from(CHECKSUM).expect("small")] = 0;
    }
    pointer(&mut script, RSDP_FILE, RSDP_XSDT);
    for (result, length) in [RSDP_CHECKSUM, RSDP_EXTENDED_CHECKSUM] {
        checksum(&mut script, RSDP_FILE, (result, 0, length));
        rsdp[usize::try_from(result).expect("small")] = 0;
    }
    TableFiles {
        rsdp,
        tables,
        script,
    }
}

/// Offsets of the 64-bit pointers in the tables' file.
fn pointers(placed: &Placed) -> Vec<u64> {
    let mut offsets = vec![placed.fadt + FADT_DSDT];
    if placed.has_facs {
        offsets.push(placed.fadt + FADT_FACS);
    }
    let entries = 0..placed.entry_count as u64;
    offsets.extend(entries.map(|index| placed.xsdt + XSDT_ENTRIES + 8 * index));
    offsets
}

fn at(offset: u64) -> u32 {
    u32::try_from(offset).expect("tables have a few KiB")
}

fn name(text: &str) -> [u8; NAME_BYTES] {
    let mut name = [0; NAME_BYTES];
    name[..text.len()].copy_from_slice(text.as_bytes());
    name
}

fn command(script: &mut Vec<u8>, number: u32, arguments: &[&[u8]]) {
    let start = script.len();
    script.extend(number.to_le_bytes());
    arguments.iter().for_each(|part| script.extend(*part));
    script.resize(start + COMMAND_BYTES, 0);
}

fn allocate(script: &mut Vec<u8>, file: &str, alignment: u32, zone: u8) {
    command(
        script,
        ALLOCATE,
        &[&name(file), &alignment.to_le_bytes(), &[zone]],
    );
}

/// All pointers are of 64 bits, and point into the tables' file.
fn pointer(script: &mut Vec<u8>, file: &str, offset: u32) {
    command(
        script,
        ADD_POINTER,
        &[&name(file), &name(TABLES_FILE), &offset.to_le_bytes(), &[8]],
    );
}

fn checksum(script: &mut Vec<u8>, file: &str, (result, start, length): (u32, u32, u32)) {
    let numbers = [result, start, length].map(u32::to_le_bytes).concat();
    command(script, ADD_CHECKSUM, &[&name(file), &numbers]);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::acpi::{AcpiDevice, Power};

    fn platform() -> Platform {
        Platform {
            tables_address: 0xe_0000,
            cpu_count: 2,
            lapic_address: 0xfee0_0000,
            ioapic_address: 0xfec0_0000,
            ecam_address: 0xb000_0000,
            bus_count: 1,
            window_address: 0xc000_0000,
            window_size: 0x3c00_0000,
            high_window: Some((0x1_0000_0000, 0xff_ffff_ffff)),
            serial_port: 0x3f8,
            serial_gsi: 4,
            power: Power::Pc {
                pm_base: 0x600,
                sci_gsi: 9,
            },
            devices: vec![AcpiDevice {
                name: "VGEN",
                hid: "ATOL0001",
                objects: Vec::new(),
                event: Some(1),
            }],
            hotplug: None,
        }
    }

    fn u32_at(bytes: &[u8], offset: usize) -> u32 {
        u32::from_le_bytes(bytes[offset..offset + 4].try_into().unwrap())
    }

    fn text_at(bytes: &[u8], offset: usize) -> &str {
        let end = bytes[offset..].iter().position(|byte| *byte == 0).unwrap();
        std::str::from_utf8(&bytes[offset..offset + end]).unwrap()
    }

    /// Follows the script as firmware does, with the files at given addresses, and gives all of memory from 0 on.
    fn follow(files: &TableFiles, rsdp_at: usize, tables_at: usize) -> Vec<u8> {
        let mut memory = vec![0; tables_at + files.tables.len()];
        let base = |file: &str| {
            if file == RSDP_FILE {
                rsdp_at
            } else {
                tables_at
            }
        };
        for command in files.script.chunks(COMMAND_BYTES) {
            let file = text_at(command, 4);
            match u32_at(command, 0) {
                ALLOCATE if file == RSDP_FILE => {
                    memory[rsdp_at..rsdp_at + files.rsdp.len()].copy_from_slice(&files.rsdp);
                }
                ALLOCATE => memory[tables_at..].copy_from_slice(&files.tables),
                ADD_POINTER => {
                    assert_eq!((text_at(command, 60), command[120]), (TABLES_FILE, 8));
                    let field = base(file) + u32_at(command, 116) as usize;
                    let offset = u64::from_le_bytes(memory[field..field + 8].try_into().unwrap());
                    assert!(offset < files.tables.len() as u64);
                    let address = offset + tables_at as u64;
                    memory[field..field + 8].copy_from_slice(&address.to_le_bytes());
                }
                ADD_CHECKSUM => {
                    let [result, start, length] =
                        [60, 64, 68].map(|offset| u32_at(command, offset) as usize);
                    let range = base(file) + start..base(file) + start + length;
                    let sum = memory[range]
                        .iter()
                        .fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
                    memory[base(file) + result] = sum.wrapping_neg();
                }
                other => panic!("command {other}"),
            }
        }
        memory
    }

    /// What firmware makes of the files is what the VMM would write itself.
    #[test]
    fn following_the_script_yields_the_tables_at_their_addresses() {
        let files = table_files(&platform());
        assert_eq!(files.script.len() % COMMAND_BYTES, 0);
        let tables_at = 0x2_0000;
        let memory = follow(&files, 0x1_0000, tables_at);
        let mut expected = Vec::new();
        let placed = acpi::place(&mut expected, &platform(), tables_at as u64);
        assert_eq!(memory[tables_at..], expected);
        let rsdp = acpi::rsdp(placed.xsdt);
        assert_eq!(memory[0x1_0000..0x1_0000 + rsdp.len()], rsdp);
    }
}

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
/// Name of the file with the script, which firmware looks for first.
pub const SCRIPT_FILE: &str = "etc/table-loader";

/// File with the generation id, which firmware puts into a page of its own; and the file into which it writes where
/// that page is (QEMU `docs/specs/vmgenid.rst`, whose names OVMF takes from the script).
pub const GENERATION_FILE: &str = "etc/vmgenid_guid";
/// File that firmware writes the page's guest-physical address to: eight bytes, little-endian.
pub const GENERATION_ADDRESS_FILE: &str = "etc/vmgenid_addr";
/// Where the id is in its file: behind what a table's header would be, since OVMF looks for tables where pointers point.
pub const GENERATION_OFFSET: u32 = 40;
/// Bytes of the file: a page, so that nothing else shares it.
pub const GENERATION_FILE_BYTES: usize = 4096;

/// Bytes of one command of the script.
const COMMAND_BYTES: usize = 128;
/// Bytes of a file's name in it, the final zero included.
const NAME_BYTES: usize = 56;
/// Commands.
const ALLOCATE: u32 = 1;
const ADD_POINTER: u32 = 2;
const ADD_CHECKSUM: u32 = 3;
const WRITE_POINTER: u32 = 4;
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

/// The three fw_cfg files by which firmware places ACPI tables itself: tables, RSDP, and the script of allocations,
/// pointers and checksums.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TableFiles {
    /// Content of [`RSDP_FILE`]: its pointer and checksums are what the script sets.
    pub rsdp: Vec<u8>,
    /// Content of [`TABLES_FILE`]: pointers are offsets into the file until the script has run.
    pub tables: Vec<u8>,
    /// Content of [`SCRIPT_FILE`]: commands of 128 bytes, in the order of their execution.
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
        pointer(&mut script, TABLES_FILE, (at(offset), 8), TABLES_FILE);
    }
    let mut changed = vec![placed.fadt, placed.xsdt];
    if let Some(offset) = generation_pointer(&tables) {
        let page = u32::try_from(GENERATION_FILE_BYTES).expect("a page");
        allocate(&mut script, GENERATION_FILE, page, ZONE_HIGH);
        pointer(&mut script, TABLES_FILE, (offset, 4), GENERATION_FILE);
        let files = [name(GENERATION_ADDRESS_FILE), name(GENERATION_FILE)].concat();
        command(&mut script, WRITE_POINTER, &[&files, &[0; 8], &[8]]);
        changed.push(placed.dsdt);
    }
    for table in changed {
        let start = usize::try_from(table).expect("an offset in a file");
        let length = &tables[start + LENGTH..][..4];
        let length = u32::from_le_bytes([length[0], length[1], length[2], length[3]]);
        let result = at(table + CHECKSUM);
        checksum(&mut script, TABLES_FILE, (result, at(table), length));
        tables[start + usize::try_from(CHECKSUM).expect("small")] = 0;
    }
    pointer(&mut script, RSDP_FILE, (RSDP_XSDT, 8), TABLES_FILE);
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

/// A pointer into the file `to`: its offset in `file`, and its bytes.
fn pointer(script: &mut Vec<u8>, file: &str, (offset, bytes): (u32, u8), to: &str) {
    command(
        script,
        ADD_POINTER,
        &[&name(file), &name(to), &offset.to_le_bytes(), &[bytes]],
    );
}

/// Where the tables say where the generation id is, if they do.
fn generation_pointer(tables: &[u8]) -> Option<u32> {
    let object = acpi::GENERATION_ADDRESS;
    let mut places = tables.windows(object.len());
    let place = places.position(|bytes| bytes == object)?;
    Some(at((place + object.len()) as u64))
}

fn checksum(script: &mut Vec<u8>, file: &str, (result, start, length): (u32, u32, u32)) {
    let numbers = [result, start, length].map(u32::to_le_bytes).concat();
    command(script, ADD_CHECKSUM, &[&name(file), &numbers]);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::acpi::Power;

    /// Where the page with the generation id is.
    const GENERATION_AT: usize = 0x8000;

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
            devices: Vec::new(),
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
        let base = |file: &str| match file {
            RSDP_FILE => rsdp_at,
            TABLES_FILE => tables_at,
            GENERATION_FILE => GENERATION_AT,
            other => panic!("file {other}"),
        };
        for command in files.script.chunks(COMMAND_BYTES) {
            let file = text_at(command, 4);
            match u32_at(command, 0) {
                ALLOCATE if file == RSDP_FILE => {
                    memory[rsdp_at..rsdp_at + files.rsdp.len()].copy_from_slice(&files.rsdp);
                }
                ALLOCATE if file == TABLES_FILE => {
                    memory[tables_at..].copy_from_slice(&files.tables);
                }
                ALLOCATE => assert_eq!((file, u32_at(command, 60)), (GENERATION_FILE, 4096)),
                WRITE_POINTER => {
                    let files = (file, text_at(command, 60));
                    assert_eq!(files, (GENERATION_ADDRESS_FILE, GENERATION_FILE));
                    assert_eq!(command[116..125], [0, 0, 0, 0, 0, 0, 0, 0, 8]);
                }
                ADD_POINTER => {
                    let bytes = usize::from(command[120]);
                    let field = base(file) + u32_at(command, 116) as usize;
                    let mut pointer = [0; 8];
                    pointer[..bytes].copy_from_slice(&memory[field..field + bytes]);
                    let offset = u64::from_le_bytes(pointer);
                    assert!(offset < files.tables.len() as u64);
                    let address = offset + base(text_at(command, 60)) as u64;
                    let address = address.to_le_bytes();
                    memory[field..field + bytes].copy_from_slice(&address[..bytes]);
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

    #[track_caller]
    fn check(built: &Platform, placed_by_firmware: &Platform) {
        let files = table_files(built);
        assert_eq!(files.script.len() % COMMAND_BYTES, 0);
        let tables_at = 0x2_0000;
        let memory = follow(&files, 0x1_0000, tables_at);
        let mut expected = Vec::new();
        let placed = acpi::place(&mut expected, placed_by_firmware, tables_at as u64);
        assert_eq!(memory[tables_at..], expected);
        let rsdp = acpi::rsdp(placed.xsdt);
        assert_eq!(memory[0x1_0000..0x1_0000 + rsdp.len()], rsdp);
    }

    /// What firmware makes of the files is what the VMM would write itself.
    #[test]
    fn following_the_script_yields_the_tables_at_their_addresses() {
        check(&platform(), &platform());
        let with = |address: u32| Platform {
            devices: vec![acpi::generation_id(address, 1)],
            ..platform()
        };
        let offset = GENERATION_OFFSET;
        let address = u32::try_from(GENERATION_AT).unwrap() + offset;
        check(&with(offset), &with(address));
    }
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Lists the ACPI tables of a small board, and writes each to a file where a directory is given:
//!
//!     cargo run -p atoll-firmware --example acpi_tables -- /tmp/tables && iasl -d /tmp/tables/DSDT
#![expect(clippy::print_stdout, reason = "an example talks to its reader")]

use std::error::Error;
use std::path::PathBuf;

use atoll_firmware::acpi::{self, Platform, Power};

const BOARD: Platform = Platform {
    tables_address: 0xe_0000,
    cpu_count: 2,
    lapic_address: 0xfee0_0000,
    ioapic_address: 0xfec0_0000,
    ecam_address: 0xe000_0000,
    bus_count: 1,
    window_address: 0xc000_0000,
    window_size: 0x2000_0000,
    serial_port: 0x3f8,
    serial_gsi: 4,
    high_window: None,
    power: Power::Reduced {
        button_gsi: 5,
        sleep_port: 0x600,
        reset_port: 0x602,
    },
    devices: Vec::new(),
    hotplug: None,
};

fn main() -> Result<(), Box<dyn Error>> {
    let directory = std::env::args_os().nth(1).map(PathBuf::from);
    let bytes = acpi::tables(&BOARD);
    // The RSDP's 36 bytes come first; after it tables start at multiples of 16, each with its length at byte 4.
    let mut start = 48;
    while let Some(header) = bytes.get(start..start + 8) {
        let name = std::str::from_utf8(&header[..4])?;
        let length = u32::from_le_bytes(header[4..].try_into()?) as usize;
        println!(
            "{name} at {:#x}, {length} bytes",
            BOARD.tables_address + start as u64
        );
        if let Some(directory) = &directory {
            std::fs::create_dir_all(directory)?;
            std::fs::write(directory.join(name), &bytes[start..start + length])?;
        }
        start = (start + length).next_multiple_of(16);
    }
    Ok(())
}

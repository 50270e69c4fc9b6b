// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The probe guest: a program for an empty x86-64 machine that finds each virtio device of its machine, uses it,
//! measures what leaving the guest costs, and reports on the serial port in words and as one line of JSON.
//!
//! `entry.s` holds all that runs in ring 0; everything in Rust runs in ring 3 with I/O privilege, so that it is
//! fast on a KVM that emulates supervisor code. It is not an operating system: one CPU, no allocation beyond
//! what the drivers need, and any fault ends in one line on the serial port and power-off.
//!
//! Started by `atoll-vmm probe`, by tests and by benchmarks. The command line is documented in `options.rs`,
//! the report in `report.rs`.

#![no_std]
#![no_main]

extern crate alloc;

mod acpi;
mod bench;
mod clock;
mod cpu;
mod devices;
mod entry;
mod hotplug;
mod interrupts;
mod load;
mod measure;
mod memory;
mod net_packet;
mod options;
mod pci;
mod report;
mod ring;
mod serial;
mod shell;
mod transport;

use core::fmt::Write;
use core::panic::PanicInfo;

use acpi::Platform;
use devices::Devices;
use options::{Mode, Options};
use serial::Serial;

/// First Rust code, called by `entry.s` with interrupts off.
#[unsafe(no_mangle)]
#[expect(unsafe_code, reason = "called by name from assembly")]
extern "C" fn ring3_main(start_info: u64) -> ! {
    memory::clear_bss();
    interrupts::install();
    let options = Options::read(start_info);
    let platform = Platform::find(options.rsdp);
    if options.mode == Mode::Exit {
        platform.power_off();
    }
    let clock = clock::Clock::start();
    Serial.start();
    let _ = writeln!(Serial, "atoll probe: command line \"{}\"", options.cmdline);
    if options.mode == Mode::Bench {
        bench::run(&platform, &clock, &options);
        platform.power_off();
    }
    let mut devices = Devices::find(&platform);
    report::make(&mut devices, &platform, &clock, &options);
    if options.mode == Mode::Stay {
        shell::run(&mut devices, &platform, &clock, &options);
    }
    platform.power_off()
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    let _ = writeln!(Serial, "atoll probe: {info}");
    interrupts::crash()
}

/// Where the exception stubs of `entry.s` end.
#[unsafe(no_mangle)]
#[expect(unsafe_code, reason = "called by name from assembly")]
extern "C" fn ring3_fault(vector: u64, error: u64, address: u64, cr2: u64) -> ! {
    let _ = writeln!(
        Serial,
        "atoll probe: exception {vector}, error {error:#x}, at {address:#x}, cr2 {cr2:#x}"
    );
    interrupts::crash()
}

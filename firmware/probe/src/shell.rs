// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Mode `stay`: a small shell on the serial port, pings answered, the power button obeyed. The CPU
//! halts between interrupts.

use alloc::string::String;
use core::fmt::Write;

use crate::acpi::Platform;
use crate::clock::{self, Clock, hypervisor};
use crate::cpu;
use crate::devices::Devices;
use crate::interrupts;
use crate::load;
use crate::options::Options;
use crate::report;
use crate::serial::Serial;

const LINE_BYTES_MAX: usize = 256;
const PROMPT: &str = "probe> ";

/// Until power-off.
pub fn run(devices: &mut Devices, platform: &Platform, clock: &Clock, options: &Options) {
    Serial.listen();
    platform.listen();
    if let Some((first_mib, size_mib)) = options.load {
        load::work(first_mib, size_mib, devices, clock);
    }
    let _ = write!(Serial, "Type help.\n{PROMPT}");
    let mut line = String::new();
    loop {
        devices.serve();
        devices.follow(platform, options.keep);
        if platform.button_pressed() {
            let _ = writeln!(Serial, "\npower button: off");
            return;
        }
        while let Some(byte) = Serial.read() {
            match byte {
                b'\r' | b'\n' => {
                    let _ = writeln!(Serial);
                    if !obey(line.trim(), devices, platform, clock, options) {
                        return;
                    }
                    line.clear();
                    let _ = write!(Serial, "{PROMPT}");
                }
                0x08 | 0x7f if line.pop().is_some() => Serial.write(b"\x08 \x08"),
                b' '..=b'~' if line.len() < LINE_BYTES_MAX => {
                    line.push(char::from(byte));
                    Serial.write(&[byte]);
                }
                _ => {}
            }
        }
        cpu::halt();
    }
}

/// A number as a user types it; 0 when it is none.
fn hexadecimal(text: &str) -> u32 {
    u32::from_str_radix(text.trim_start_matches("0x"), 16).unwrap_or(0)
}

/// Runs one command; false means power off.
fn obey(
    line: &str,
    devices: &mut Devices,
    platform: &Platform,
    clock: &Clock,
    options: &Options,
) -> bool {
    let (command, rest) = line.split_once(' ').unwrap_or((line, ""));
    let _ = match command {
        "" => Ok(()),
        "help" => writeln!(
            Serial,
            "help  id  uptime  report  load [FIRST_MIB SIZE_MIB]  cpuid LEAF [INDEX]  clock [share]  echo TEXT  eject SLOT  crash  off"
        ),
        "id" => {
            let signature = hypervisor().unwrap_or(*b"no one\0\0\0\0\0\0");
            let name = core::str::from_utf8(&signature)
                .unwrap_or("?")
                .trim_end_matches('\0');
            let _ = write!(
                Serial,
                "atoll probe guest under {name}, {} MHz",
                clock.khz / 1000
            );
            for [a, b, c, d] in devices.addresses() {
                let _ = write!(Serial, ", {a}.{b}.{c}.{d}");
            }
            writeln!(Serial)
        }
        "uptime" => {
            let ms = clock.now_ns() / 1_000_000;
            writeln!(Serial, "up {}.{:03} s", ms / 1000, ms % 1000)
        }
        "report" => {
            report::make(devices, platform, clock, options);
            Ok(())
        }
        "load" => {
            load::run(rest, devices, clock);
            Ok(())
        }
        "cpuid" => {
            let mut numbers = rest.split(' ').map(hexadecimal);
            let leaf = numbers.next().unwrap_or(0);
            let [a, b, c, d] = cpu::processor_id(leaf, numbers.next().unwrap_or(0));
            writeln!(Serial, "cpuid: {a:08x} {b:08x} {c:08x} {d:08x}")
        }
        "clock" => {
            if rest == "share" {
                clock::share();
            }
            let clock::Shared { ns, flags, ticks } = clock::shared();
            writeln!(Serial, "clock: {ns} ns, {ticks} ticks, flags {flags}")
        }
        "echo" => writeln!(Serial, "{rest}"),
        "eject" => {
            // Whether or not anybody asked for it.
            if let (Some(hotplug), Ok(slot)) = (platform.hotplug, rest.parse()) {
                hotplug.eject(slot);
            }
            Ok(())
        }
        "off" => return false,
        "crash" => interrupts::crash(),
        _ => writeln!(Serial, "{command}: no such command; help lists them"),
    };
    true
}

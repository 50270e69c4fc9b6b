// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The command line.
//!
//! `report` (default), `stay`, `bench` or `exit` says what to do; then, in any order:
//! - `write`: disks that allow it are written, read back and flushed (their content is lost),
//! - `keep`: devices that are wanted back are not let go,
//! - `echo`: the host sends every line back that we send on the virtio console,
//! - `load=FIRST_MIB,SIZE_MIB`: after the report of `stay`, the shell's `load` on that RAM, until a byte is typed,
//! - `ip=A.B.C.D` `peer=A.B.C.D`: our address and who answers pings; without them DHCP gives both,
//! - after `bench`: works for the devices, done one by one, and `poll`; `bench/` says how they are written.

use crate::memory::firmware_bytes;

/// Longest command line that is read, bytes.
const CMDLINE_BYTES_MAX: usize = 1024;

/// What the probe does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Report and power off.
    Report,
    /// Report, then serve a shell on the serial port until powered off.
    Stay,
    /// Keep the devices busy and tell how long it took, then power off.
    Bench,
    /// Power off at once; `entry.s` has written one byte to the serial port.
    Exit,
}

/// The parsed command line and what else the start information says.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// As it was given.
    pub cmdline: &'static str,
    /// What to do.
    pub mode: Mode,
    /// Disks may be written.
    pub write: bool,
    /// Devices that are wanted back are not let go.
    pub keep: bool,
    /// The host answers on the virtio console.
    pub echo: bool,
    /// A benchmark never sleeps.
    pub poll: bool,
    /// What to do before the shell.
    pub load: Option<(u64, u64)>,
    /// Our address.
    pub ip: Option<[u8; 4]>,
    /// The host's address.
    pub peer: Option<[u8; 4]>,
    /// Address of the ACPI root pointer, 0 when the loader does not say.
    pub rsdp: u64,
}

impl Options {
    /// Reads `hvm_start_info` (Xen public/arch-x86/hvm/start_info.h): command line at 24, RSDP at 32.
    pub fn read(start_info: u64) -> Options {
        let field = |offset: usize| {
            let bytes = &firmware_bytes(start_info, 40)[offset..offset + 8];
            bytes
                .iter()
                .rev()
                .fold(0_u64, |value, byte| value << 8 | u64::from(*byte))
        };
        let cmdline = match field(24) {
            0 => "",
            address => {
                let bytes = firmware_bytes(address, CMDLINE_BYTES_MAX);
                let length = bytes.iter().position(|byte| *byte == 0).unwrap_or(0);
                core::str::from_utf8(&bytes[..length]).unwrap_or("")
            }
        };
        let has = |word: &str| cmdline.split_ascii_whitespace().any(|w| w == word);
        let value = |key: &str| {
            cmdline
                .split_ascii_whitespace()
                .find_map(|w| w.strip_prefix(key))
        };
        Options {
            cmdline,
            mode: match cmdline.split_ascii_whitespace().next() {
                Some("stay") => Mode::Stay,
                Some("bench") => Mode::Bench,
                Some("exit") => Mode::Exit,
                _ => Mode::Report,
            },
            write: has("write"),
            keep: has("keep"),
            echo: has("echo"),
            poll: has("poll"),
            load: value("load=").and_then(region),
            ip: value("ip=").and_then(address),
            peer: value("peer=").and_then(address),
            rsdp: field(32),
        }
    }
}

fn region(text: &str) -> Option<(u64, u64)> {
    let (first, size) = text.split_once(',')?;
    Some((first.parse().ok()?, size.parse().ok()?))
}

fn address(text: &str) -> Option<[u8; 4]> {
    let mut parts = text.split('.');
    let mut bytes = [0; 4];
    for byte in &mut bytes {
        *byte = parts.next()?.parse().ok()?;
    }
    parts.next().is_none().then_some(bytes)
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Work that notices when it is disturbed: for tests that stop, copy and move the machine meanwhile.
//!
//! Each round checks one page of RAM against what an earlier round wrote there and writes it anew, writes a disk
//! request and reads it back, and looks that time does not go backwards. Every [`ROUNDS_TOLD`] rounds a line
//! `load N` tells how far it got; the first thing that is wrong ends it with a line that names it.

use core::fmt::Write;

use crate::clock::Clock;
use crate::devices::Devices;
use crate::memory::Pages;
use crate::serial::Serial;

/// Rounds between two lines of output.
const ROUNDS_TOLD: u64 = 256;

/// `FIRST_MIB SIZE_MIB`: works on that RAM, which nobody else uses, until a byte is typed.
pub fn run(arguments: &str, devices: &mut Devices, clock: &Clock) {
    let mut numbers = arguments
        .split_ascii_whitespace()
        .filter_map(|word| word.parse().ok());
    let (first_mib, size_mib) = (numbers.next().unwrap_or(16), numbers.next().unwrap_or(4));
    work(first_mib, size_mib, devices, clock);
}

/// The same.
pub fn work(first_mib: u64, size_mib: u64, devices: &mut Devices, clock: &Clock) {
    let Some(pages) = Pages::new(first_mib << 20, size_mib << 20) else {
        let _ = writeln!(Serial, "load: no such memory");
        return;
    };
    let mut time = clock.now_ns();
    let mut round = 0;
    while Serial.read().is_none() {
        let wrong = one(round, &pages, devices).err();
        let now = clock.now_ns();
        let wrong = wrong.or((now < time).then_some("time went backwards"));
        if let Some(wrong) = wrong {
            let _ = writeln!(Serial, "load FAILED in round {round}: {wrong}");
            return;
        }
        time = now;
        round += 1;
        if round % ROUNDS_TOLD == 0 {
            let _ = writeln!(Serial, "load {round}");
        }
    }
    let _ = writeln!(Serial, "load ended after {round}");
}

fn one(round: u64, pages: &Pages, devices: &mut Devices) -> Result<(), &'static str> {
    let page = round % pages.count();
    // What the same page got one lap ago; RAM of a new machine is zero, of a reset one it need not be.
    if round >= pages.count() && !pages.has(page, round + 1 - pages.count()) {
        return Err("memory changed");
    }
    pages.fill(page, round + 1);
    devices.load(round)
}

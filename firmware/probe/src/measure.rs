// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! What instructions and exits cost here.

use alloc::vec::Vec;

use crate::clock::{self, Clock, Source};
use crate::cpu;
use crate::report::Report;
use crate::serial;
use crate::transport::Taps;

/// Exits a measurement; the median of as many single samples where each is timed alone.
const ROUNDS: u64 = 64;
/// Loops of two instructions: enough for milliseconds at full speed, and at emulated speed.
const LOOPS_FAST: u64 = 4_000_000;
const LOOPS_SLOW: u64 = 1_000;

/// The middle of some times.
pub fn median(mut samples: Vec<u64>) -> u64 {
    samples.sort_unstable();
    samples.get(samples.len() / 2).copied().unwrap_or(0)
}

/// Simple instructions a second of a loop of two.
fn rate(clock: &Clock, spin: fn(u64)) -> u64 {
    let mut loops = LOOPS_SLOW;
    let mut ns = clock.measure(|| spin(loops));
    if ns < 1_000_000 {
        loops = LOOPS_FAST;
        ns = clock.measure(|| spin(loops));
    }
    (loops * 2).saturating_mul(1_000_000_000) / ns.max(1)
}

/// Section `cpu`: clock, and speed of both privilege levels.
pub fn cpu(report: &mut Report, clock: &Clock) {
    report.begin("cpu");
    let signature = clock::hypervisor();
    let letters = signature
        .as_ref()
        .and_then(|name| core::str::from_utf8(name).ok());
    report.text(
        "hypervisor",
        letters.map_or("none", |name| name.trim_end_matches('\0')),
    );
    report.text(
        "clock",
        if clock.source == Source::KvmClock {
            "kvmclock"
        } else {
            "pit"
        },
    );
    report.number("tsc_khz", clock.khz);
    report.number("ring3_per_s", rate(clock, cpu::spin_ring3));
    report.number("ring0_per_s", rate(clock, cpu::spin_ring0));
    report.end();
}

/// Section `exits`: nanoseconds of one access that the VMM must answer.
pub fn exits(report: &mut Report, clock: &Clock, taps: Option<Taps>) {
    report.begin("exits");
    let each = |work: &dyn Fn()| clock.measure(|| (0..ROUNDS).for_each(|_| work())) / ROUNDS;
    report.number("service_ns", each(&|| cpu::spin_ring0(1)));
    report.number(
        "pio_ns",
        each(&|| {
            cpu::inb(serial::SCRATCH);
        }),
    );
    report.number(
        "pio_ring0_ns",
        clock.measure(|| cpu::read_port_ring0(serial::SCRATCH, ROUNDS)) / ROUNDS,
    );
    if let Some(taps) = taps {
        report.number(
            "mmio_ns",
            each(&|| {
                taps.status.read8(0);
            }),
        );
        // A bell without new work: the device looks and finds nothing.
        report.number("doorbell_ns", each(&|| taps.doorbell.write16(0, 0)));
    }
    report.end();
}

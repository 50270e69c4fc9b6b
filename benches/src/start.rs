// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! MicroVMs: from the start of the VMM's process to the guest's first instructions, one at a time and a hundred at once;
//! and the memory that their processes take beside their guests' RAM.

use std::time::Instant;

use crate::Bench;
use crate::monitor::{
    self, CLOUD_HYPERVISOR, FIRECRACKER, Guest, JAILED_FIRECRACKER, MEMORY_MIB, Monitor, OURS,
    Prepared, Programs, QEMU_MICROVM, Running, UNCONFINED,
};
use crate::table::{Aim, Contestant, Figure, Row, compare};

/// Whom machines without devices are compared with.
pub const PEERS: &[Monitor] = &[
    JAILED_FIRECRACKER,
    FIRECRACKER,
    CLOUD_HYPERVISOR,
    QEMU_MICROVM,
    UNCONFINED,
];
/// Machines of the rows that start many.
const MANY: usize = 100;
/// Turns of those rows: each is some hundred processes.
const MANY_TURNS: usize = 5;
/// What the probe's entry writes when its command line begins with `exit`.
const MARKER: &[u8] = b"!";
/// What it writes in mode `stay` when it has found its devices and waits.
const PROMPT: &[u8] = b"probe> ";

/// What one comparison is made on: its name, its unit, how many turns at most, and one measurement.
struct Measure {
    name: &'static str,
    unit: &'static str,
    turns_max: usize,
    take: fn(&Programs, &Monitor) -> anyhow::Result<f64>,
}

const MEASURES: &[Measure] = &[
    Measure {
        name: "vm_start_to_first_instruction",
        unit: "ms",
        turns_max: usize::MAX,
        take: first_instruction_ms,
    },
    Measure {
        name: "vm_start_to_first_instruction_100_at_once",
        unit: "ms",
        turns_max: MANY_TURNS,
        take: hundred_ms,
    },
    Measure {
        name: "vm_memory_beyond_guest",
        unit: "KiB",
        turns_max: 3,
        take: |programs, monitor| of_all_kib(programs, monitor, 1, beyond_guest_kib),
    },
    Measure {
        name: "vm_memory_beyond_guest_100_at_once",
        unit: "KiB",
        turns_max: 1,
        take: |programs, monitor| of_all_kib(programs, monitor, MANY, beyond_guest_kib),
    },
    Measure {
        name: "vm_memory_with_guests_100_at_once",
        unit: "KiB",
        turns_max: 1,
        take: |programs, monitor| of_all_kib(programs, monitor, MANY, monitor::pss_kib),
    },
];

/// The suite.
pub fn rows(bench: &Bench) -> Vec<Row> {
    let programs = Programs::find(bench);
    let contestant = |monitor: &'static Monitor, measure: &'static Measure| Contestant {
        name: monitor.name,
        turns_max: monitor.turns_max(),
        take: Box::new(|| match &programs {
            Ok(programs) => (measure.take)(programs, monitor),
            Err(error) => Err(anyhow::anyhow!("{error:#}")),
        }),
    };
    let mut rows = Vec::new();
    for measure in MEASURES {
        let figure = Figure {
            name: measure.name.into(),
            unit: measure.unit,
            aim: Aim::AtMost("1.00"),
        };
        let turns = bench.runs.min(measure.turns_max);
        let peers = PEERS.iter().map(|peer| contestant(peer, measure)).collect();
        rows.extend(compare(&figure, turns, contestant(&OURS, measure), peers));
    }
    rows
}

fn guest(cmdline: &str) -> Guest {
    Guest {
        cmdline: cmdline.into(),
        ..Guest::default()
    }
}

/// From before the process is made until the marker came out of its standard output.
fn first_instruction_ms(programs: &Programs, monitor: &Monitor) -> anyhow::Result<f64> {
    let prepared = Prepared::new(programs, monitor, &guest("exit"))?;
    let start = Instant::now();
    let mut running = prepared.start()?;
    running.wait_for(MARKER)?;
    Ok(start.elapsed().as_secs_f64() * 1000.0)
}

/// The same for the last of [`MANY`] that are started one right after the other.
fn hundred_ms(programs: &Programs, monitor: &Monitor) -> anyhow::Result<f64> {
    let prepared = (0..MANY)
        .map(|_| Prepared::new(programs, monitor, &guest("exit")))
        .collect::<anyhow::Result<Vec<_>>>()?;
    let start = Instant::now();
    let mut all = prepared
        .into_iter()
        .map(Prepared::start)
        .collect::<anyhow::Result<Vec<_>>>()?;
    for running in &mut all {
        running.wait_for(MARKER)?;
    }
    Ok(start.elapsed().as_secs_f64() * 1000.0)
}

/// Sum over `count` machines that run at the same time, once their guests wait at their prompts.
fn of_all_kib(
    programs: &Programs,
    monitor: &Monitor,
    count: usize,
    kib: fn(&Running) -> anyhow::Result<f64>,
) -> anyhow::Result<f64> {
    let mut all = (0..count)
        .map(|_| Running::start(programs, monitor, &guest("stay")))
        .collect::<anyhow::Result<Vec<_>>>()?;
    for running in &mut all {
        running.wait_for(PROMPT)?;
    }
    all.iter().map(kib).sum()
}

/// Proportional set size of every mapping but the guest's RAM.
pub fn beyond_guest_kib(running: &Running) -> anyhow::Result<f64> {
    Ok(pss_kib(&monitor::smaps(running)?))
}

/// Sum of `Pss` (proc(5)) over the mappings but the guest's RAM: the writable ones without a gap between them that are
/// as large together, or larger. One, as it is made, and several after advice or a mapping for a part of it.
fn pss_kib(smaps: &str) -> f64 {
    let mut sums_kib = 0;
    let (mut run_kib, mut run_end, mut run_bytes) = (0, "", 0);
    let mut settle = |bytes, kib| {
        if bytes < MEMORY_MIB << 20 {
            sums_kib += kib;
        }
    };
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let (first, second) = (words.next().unwrap_or_default(), words.next());
        if let (Some((start, end)), Some(access)) = (first.split_once('-'), second) {
            if start != run_end || !access.starts_with("rw") {
                settle(run_bytes, run_kib);
                (run_bytes, run_kib) = (0, 0);
            }
            let address = |text| u64::from_str_radix(text, 16).unwrap_or_default();
            run_bytes += address(end).saturating_sub(address(start));
            run_end = if access.starts_with("rw") { end } else { "" };
        } else if let ("Pss:", Some(kib)) = (first, second) {
            run_kib += kib.parse().unwrap_or(0);
        }
    }
    settle(run_bytes, run_kib);
    f64::from(sums_kib)
}

#[cfg(test)]
mod tests {
    use super::pss_kib;

    #[test]
    fn guest_memory_is_left_out() {
        // RAM is 128 MiB in two parts, which end where something read-only begins.
        let smaps = "1000-3000 r--p 0 00:00 0 /bin\nPss: 3 kB\nPss_Dirty: 1 kB\n\
            10000000-17000000 rw-p 0 00:00 0\nPss: 9000 kB\n17000000-18000000 rw-p 0 00:00 0\nPss: 70 kB\n\
            18000000-18001000 r--p 0 00:00 0\nPss: 2 kB\n20000000-20010000 rw-p 0 00:00 0 [heap]\nPss: 4 kB\n";
        assert!((pss_kib(smaps) - 9.0).abs() < f64::EPSILON);
    }
}

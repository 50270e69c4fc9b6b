// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Guests of one kernel at once, started one right after the other: until the last one's first process speaks, and what all
//! of them take of the host's memory, their RAM included. Ours share the kernel's file, which no peer does.

use std::io::Write as _;
use std::time::Instant;

use super::BOOT;
use crate::monitor::{
    CLOUD_HYPERVISOR, FIRECRACKER, Guest, Monitor, OURS, OURS_SHARING, Programs, Running, pss_kib,
};
use crate::table::{Figure, Row};

const PEERS: &[Monitor] = &[CLOUD_HYPERVISOR, FIRECRACKER, OURS];
/// The guests' program says so when it has loaded its drivers and has nothing to do.
const IDLE: &[u8] = b"no bench= on the command line";

/// What is compared, in the order of what [`measure`] returns.
pub(super) fn figures(count: u32) -> [Figure; 2] {
    [("start_to_init", "ms"), ("memory_with_guests", "KiB")]
        .map(|(name, unit)| Figure::cost(&format!("linux_{name}_{count}_at_once"), unit))
}

/// Each VMM once: a turn is eight boots.
pub(super) fn rows(programs: &Programs, count: u32) -> Vec<Row> {
    let ours = twice(programs, &OURS_SHARING, count);
    let row = |peer: &Monitor| {
        let theirs = twice(programs, peer, count);
        let figures = figures(count).into_iter().enumerate();
        let row = |(index, figure): (usize, Figure)| match (&ours, &theirs) {
            (Ok(ours), Ok(theirs)) => {
                Row::pairs(&figure, peer.name, &[(ours[index], theirs[index])])
            }
            (Err(error), _) | (_, Err(error)) => Row::absent(&figure, peer.name, error),
        };
        figures.map(row).collect::<Vec<_>>()
    };
    PEERS.iter().flat_map(row).collect()
}

/// Once more when it fails: emulated hosts lose one guest in about thirty.
fn twice(programs: &Programs, monitor: &Monitor, count: u32) -> anyhow::Result<[f64; 2]> {
    measure(programs, monitor, count).or_else(|error| {
        let name = monitor.name;
        let _ = writeln!(
            std::io::stderr(),
            "{count} of {name} did not come up: {error:#}; once again"
        );
        measure(programs, monitor, count)
    })
}

fn measure(programs: &Programs, monitor: &Monitor, count: u32) -> anyhow::Result<[f64; 2]> {
    let guest = Guest {
        cmdline: "console=ttyS0 quiet panic=-1".into(),
        ..Guest::default()
    };
    let longest = BOOT * count.div_ceil(8);
    let start = Instant::now();
    let mut all = (0..count)
        .map(|_| Running::start(programs, monitor, &guest))
        .collect::<anyhow::Result<Vec<_>>>()?;
    for running in &mut all {
        running.wait_within(b"guest: init", longest)?;
    }
    let time_ms = start.elapsed().as_secs_f64() * 1000.0;
    for running in &mut all {
        running.wait_within(IDLE, longest)?;
    }
    let memory_kib = all.iter().map(pss_kib).sum::<anyhow::Result<f64>>()?;
    Ok([time_ms, memory_kib])
}

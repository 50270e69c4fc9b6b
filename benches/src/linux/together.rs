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
/// As many as an emulated host of 2 GiB holds.
const COUNT: usize = 8;
/// The guests' program says so when it has loaded its drivers and has nothing to do.
const IDLE: &[u8] = b"no bench= on the command line";

/// What is compared, in the order of what [`measure`] returns.
pub(super) fn figures() -> [Figure; 2] {
    [
        Figure::cost("linux_start_to_init_8_at_once", "ms"),
        Figure::cost("linux_memory_with_guests_8_at_once", "KiB"),
    ]
}

/// Each VMM once: a turn is eight boots.
pub(super) fn rows(programs: &Programs) -> Vec<Row> {
    let ours = twice(programs, &OURS_SHARING);
    let row = |peer: &Monitor| {
        let theirs = twice(programs, peer);
        let figures = figures().into_iter().enumerate();
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
fn twice(programs: &Programs, monitor: &Monitor) -> anyhow::Result<[f64; 2]> {
    measure(programs, monitor).or_else(|error| {
        let name = monitor.name;
        let _ = writeln!(
            std::io::stderr(),
            "{COUNT} of {name} did not come up: {error:#}; once again"
        );
        measure(programs, monitor)
    })
}

fn measure(programs: &Programs, monitor: &Monitor) -> anyhow::Result<[f64; 2]> {
    let guest = Guest {
        cmdline: "console=ttyS0 quiet panic=-1".into(),
        ..Guest::default()
    };
    let start = Instant::now();
    let mut all = (0..COUNT)
        .map(|_| Running::start(programs, monitor, &guest))
        .collect::<anyhow::Result<Vec<_>>>()?;
    for running in &mut all {
        running.wait_within(b"guest: init", BOOT)?;
    }
    let time_ms = start.elapsed().as_secs_f64() * 1000.0;
    for running in &mut all {
        running.wait_within(IDLE, BOOT)?;
    }
    let memory_kib = all.iter().map(pss_kib).sum::<anyhow::Result<f64>>()?;
    Ok([time_ms, memory_kib])
}

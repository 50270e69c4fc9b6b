// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! What an exit to the VMM costs: the probe guest reads the scratch register of its serial port (16550, port 0x3ff) many
//! times over. Every VMM has that register, answers it in its own process, and does nothing else for it.

use crate::Bench;
use crate::monitor::{self, Guest, Monitor, OURS, Programs};
use crate::start::PEERS;
use crate::table::{Contestant, Figure, Row, compare};

/// Turns at most: each is a guest of every VMM.
const TURNS_MAX: usize = 10;
/// A few tenths of a second.
const COUNT: u32 = 20_000;

/// The suite.
pub fn rows(bench: &Bench) -> Vec<Row> {
    let figure = Figure::cost("vm_exit_port_read", "us");
    let programs = match Programs::find(bench) {
        Ok(programs) => programs,
        Err(error) => return vec![Row::absent(&figure, "-", &error)],
    };
    let contestant = |monitor: &'static Monitor| Contestant {
        name: monitor.name,
        turns_max: monitor.turns_max(),
        take: Box::new(|| {
            let work = format!("exits:{COUNT}");
            let ns = monitor::work(&programs, monitor, Guest::default(), &work)?;
            Ok(ns / f64::from(COUNT) / 1000.0)
        }),
    };
    let turns = bench.runs.min(TURNS_MAX);
    let peers = PEERS.iter().map(contestant).collect();
    compare(&figure, turns, contestant(&OURS), peers)
}

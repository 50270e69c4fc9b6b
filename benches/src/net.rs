// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Network: the probe guest on a tap, in a network namespace of this suite's own. The host's kernel answers pings and
//! drops frames of a type that it does not know, so that no program of the host's is part of what is measured.

use crate::Bench;
use crate::monitor::{
    self, CLOUD_HYPERVISOR, Card, FIRECRACKER, Guest, Monitor, OURS, Programs, QEMU_Q35,
};
use crate::table::{Aim, Contestant, Figure, Row, compare};
use crate::tap::{self, Tap};

const PEERS: &[Monitor] = &[FIRECRACKER, CLOUD_HYPERVISOR, QEMU_Q35];
/// Turns at most: each is four guests.
const TURNS_MAX: usize = 10;

struct Work {
    name: &'static str,
    unit: &'static str,
    aim: Aim,
    /// As the probe is told; its last number is [`Work::count`].
    text: &'static str,
    count: u32,
}

const WORKS: &[Work] = &[
    Work {
        name: "net_round_trip",
        unit: "us",
        aim: Aim::AtMost("1.00"),
        text: "net:echo:56:1",
        count: 4_000,
    },
    Work {
        name: "net_echo_64_in_flight",
        unit: "packets/s",
        aim: Aim::AtLeast("1.00"),
        text: "net:echo:56:64",
        count: 60_000,
    },
    Work {
        name: "net_echo_1400_bytes_64_in_flight",
        unit: "packets/s",
        aim: Aim::AtLeast("1.00"),
        text: "net:echo:1400:64",
        count: 60_000,
    },
    Work {
        name: "net_send_64_in_flight",
        unit: "packets/s",
        aim: Aim::AtLeast("1.00"),
        text: "net:send:50:64",
        count: 100_000,
    },
];

/// The suite.
pub fn rows(bench: &Bench) -> Vec<Row> {
    tap::in_namespace(|| separate(bench)).unwrap_or_else(|error| absent(&error))
}

fn figure(work: &Work) -> Figure {
    Figure {
        name: work.name.into(),
        unit: work.unit,
        aim: work.aim,
    }
}

fn absent(error: &anyhow::Error) -> Vec<Row> {
    let row = |work| Row::absent(&figure(work), "-", error);
    WORKS.iter().map(row).collect()
}

fn separate(bench: &Bench) -> anyhow::Result<Vec<Row>> {
    let programs = Programs::find(bench)?;
    let contestant = |monitor: &'static Monitor, work: &'static Work| Contestant {
        name: monitor.name,
        turns_max: monitor.turns_max(),
        take: Box::new(|| by_guest(&programs, monitor, work)),
    };
    let turns = bench.runs.min(TURNS_MAX);
    let mut rows = Vec::new();
    for work in WORKS {
        let peers = PEERS.iter().map(|peer| contestant(peer, work)).collect();
        rows.extend(compare(
            &figure(work),
            turns,
            contestant(&OURS, work),
            peers,
        ));
    }
    Ok(rows)
}

fn by_guest(programs: &Programs, monitor: &Monitor, work: &Work) -> anyhow::Result<f64> {
    let tap = Tap::new(0)?;
    let guest = Guest {
        cmdline: format!("ip={} peer={}", tap.guest_address(), tap.host_address()),
        card: Some(Card {
            tap: tap.name(),
            vhost: false,
        }),
        ..Guest::default()
    };
    let text = format!("{}:{}", work.text, work.count);
    let ns = monitor::work(programs, monitor, guest, &text)?;
    let each_ns = ns / f64::from(work.count);
    Ok(match work.unit {
        "us" => each_ns / 1000.0,
        _ => 1e9 / each_ns,
    })
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Network: the probe guest on a tap, in a network namespace of this suite's own. The host's kernel answers pings and
//! drops frames of a type that it does not know, so that no program of the host's is part of what is measured.

use std::fs;
use std::process::Command;

use anyhow::Context as _;
use nix::sched::{CloneFlags, unshare};

use crate::Bench;
use crate::monitor::{
    self, CLOUD_HYPERVISOR, FIRECRACKER, GUEST_MAC, Guest, Monitor, OURS, Programs, QEMU_Q35,
};
use crate::table::{Aim, Contestant, Figure, Row, compare};

const PEERS: &[Monitor] = &[FIRECRACKER, CLOUD_HYPERVISOR, QEMU_Q35];
/// Turns at most: each is four guests.
const TURNS_MAX: usize = 10;
const TAP: &str = "bench0";
/// The tap's address on the wire, as `firmware/probe/src/bench/net.rs` expects it.
const TAP_MAC: &str = "02:00:00:00:00:01";
const ADDRESS: &str = "192.0.2.1";
const GUEST_ADDRESS: &str = "192.0.2.2";

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

/// The suite, in a thread: a network namespace belongs to a thread and its children, and ends with them.
pub fn rows(bench: &Bench) -> Vec<Row> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("net".into());
        let rows = thread.spawn_scoped(scope, || separate(bench));
        match rows.map(std::thread::ScopedJoinHandle::join) {
            Ok(Ok(Ok(rows))) => rows,
            Ok(Ok(Err(error))) => absent(&error),
            Ok(Err(_)) => absent(&anyhow::anyhow!("the suite's thread panicked")),
            Err(error) => absent(&error.into()),
        }
    })
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
    unshare(CloneFlags::CLONE_NEWNET).context("a network namespace")?;
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
    let _tap = Tap::new()?;
    let guest = Guest {
        cmdline: format!("ip={GUEST_ADDRESS} peer={ADDRESS}"),
        tap: Some(TAP),
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

/// A tap that exists as long as this value: VMMs leave different settings behind.
struct Tap;

impl Tap {
    fn new() -> anyhow::Result<Self> {
        ip(&["tuntap", "add", TAP, "mode", "tap", "vnet_hdr"])?;
        let tap = Self;
        // The machine's own traffic would be counted.
        fs::write(format!("/proc/sys/net/ipv6/conf/{TAP}/disable_ipv6"), "1")?;
        ip(&["link", "set", TAP, "address", TAP_MAC, "up"])?;
        ip(&["address", "add", &format!("{ADDRESS}/24"), "dev", TAP])?;
        ip(&[
            "neighbor",
            "add",
            GUEST_ADDRESS,
            "lladdr",
            GUEST_MAC,
            "dev",
            TAP,
        ])?;
        Ok(tap)
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        // It ends with the namespace at the latest.
        let _ = ip(&["link", "delete", TAP]);
    }
}

fn ip(arguments: &[&str]) -> anyhow::Result<()> {
    let output = Command::new("ip").args(arguments).output().context("ip")?;
    let complaint = String::from_utf8_lossy(&output.stderr);
    anyhow::ensure!(
        output.status.success(),
        "ip {}: {complaint}",
        arguments.join(" ")
    );
    Ok(())
}

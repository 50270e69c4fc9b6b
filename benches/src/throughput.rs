// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! How fast a machine's memory goes to another process by TCP over loopback, by number of connections, beside what iperf3
//! moves over as many. The guest is idle, so that all there is to do is to read its memory, send it and put it in place;
//! both sides share this machine's CPUs, as iperf3's do. Without TLS, which iperf3 has not.

use std::net::TcpListener;
use std::path::Path;
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use serde_json::Value;

use crate::Bench;
use crate::migration::{ctl, folder};
use crate::monitor::{Prepared, Programs, Running};
use crate::table::{Aim, Contestant, Figure, Row, compare};

/// Turns: each is some seconds.
const TURNS: usize = 7;
const CONNECTIONS: [u32; 4] = [1, 2, 8, 64];
/// Memory of the machine, and how much of it the guest has written to, from where: within one GiB, as the probe wants it. No
/// page of that is zero, and no two are alike.
const MEMORY_MIB: u64 = 1024;
const FILLED_FROM_MIB: u64 = 64;
const FILLED_MIB: u64 = 900;
/// How long iperf3 sends.
const IPERF_SECONDS: &str = "2";
/// Longest time that the guest takes to fill its memory, and that a process takes to listen.
const PATIENCE: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(5);
const MIB: f64 = (1 << 20) as f64;

/// The suite.
pub fn rows(bench: &Bench) -> Vec<Row> {
    let figure = |connections| Figure {
        name: format!("migration_throughput_{connections}_connections"),
        unit: "MiB/s",
        aim: Aim::AtLeast("0.90"),
    };
    let programs = match Programs::find(bench) {
        Ok(programs) => programs,
        Err(error) => return vec![Row::absent(&figure(1), "-", &error)],
    };
    let turns = bench.runs.min(TURNS);
    let row = |connections: u32| {
        let ours = Contestant {
            name: "ours",
            turns_max: usize::MAX,
            take: Box::new(|| ours_mib_s(&programs, connections)),
        };
        let iperf = Contestant {
            name: "iperf3",
            turns_max: usize::MAX,
            take: Box::new(move || iperf_mib_s(connections)),
        };
        compare(&figure(connections), turns, ours, vec![iperf])
    };
    CONNECTIONS.into_iter().flat_map(row).collect()
}

/// What the source sent, by the time from the request until the machine goes on elsewhere.
fn ours_mib_s(programs: &Programs, connections: u32) -> anyhow::Result<f64> {
    let (from, to) = (folder()?, folder()?);
    let mut command = Command::new(programs.vmm());
    command.args([
        "run",
        "--api-socket",
        "api",
        "--console",
        "stdio",
        "--kernel",
    ]);
    command.arg(programs.kernel()).current_dir(from.path());
    command.args(["--memory", &MEMORY_MIB.to_string()]);
    command.args([
        "--cmdline",
        &format!("stay load={FILLED_FROM_MIB},{FILLED_MIB}"),
    ]);
    let mut source = Prepared::from(command).start_to_type()?;
    let filled = format!("load {}\r\n", FILLED_MIB * 256);
    source.wait_within(filled.as_bytes(), PATIENCE)?;
    source.type_in(b"q")?;
    source.wait_within(b"load ended", PATIENCE)?;
    let mut command = Command::new(programs.vmm());
    command.args(["receive", "--listen", "tcp:127.0.0.1:0", "--insecure"]);
    command.args(["--log-file", "log"]).current_dir(to.path());
    let _target = Running::of(command)?;
    let place = listens_at(&to.path().join("log"))?;
    let connections = connections.to_string();
    let migrate = [
        "migrate",
        "--to",
        &place,
        "--insecure",
        "true",
        "--connections",
        &connections,
    ];
    let said: Value = serde_json::from_slice(&ctl(programs, from.path(), &migrate)?)?;
    let number = |name: &str| said[name].as_f64().with_context(|| format!("no {name}"));
    Ok(number("sent_bytes")? / MIB / (number("elapsed_ms")? / 1000.0))
}

/// What the other side received.
fn iperf_mib_s(connections: u32) -> anyhow::Result<f64> {
    let port = TcpListener::bind("127.0.0.1:0")?
        .local_addr()?
        .port()
        .to_string();
    let mut server = Command::new("iperf3");
    server.args([
        "--server",
        "--one-off",
        "--forceflush",
        "--bind",
        "127.0.0.1",
        "--port",
        &port,
    ]);
    let mut server = Running::of(server)?;
    server.wait_for(b"Server listening")?;
    let mut client = Command::new("iperf3");
    client.args(["--client", "127.0.0.1", "--port", &port, "--json"]);
    client.args([
        "--time",
        IPERF_SECONDS,
        "--parallel",
        &connections.to_string(),
    ]);
    let output = client.output()?;
    let said: Value = serde_json::from_slice(&output.stdout)?;
    anyhow::ensure!(output.status.success(), "iperf3: {}", said["error"]);
    let bits_s = &said["end"]["sum_received"]["bits_per_second"];
    Ok(bits_s.as_f64().context("no sum_received")? / 8.0 / MIB)
}

/// Where a process says in its log that it waits.
fn listens_at(log: &Path) -> anyhow::Result<String> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let text = std::fs::read_to_string(log).unwrap_or_default();
        let place = text
            .split_once("at=\"")
            .and_then(|(_, rest)| rest.split_once('"'));
        if let Some((place, _)) = place {
            return Ok(place.to_owned());
        }
        anyhow::ensure!(Instant::now() < deadline, "it does not listen: {text}");
        sleep(POLL);
    }
}

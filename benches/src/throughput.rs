// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! How fast a machine's memory goes to another process by TCP over loopback, by number of connections, beside what iperf3
//! moves over as many. The guest is idle, so that all there is to do is to read its memory, send it and put it in place;
//! both sides share this machine's CPUs, as iperf3's do. Without TLS, which iperf3 has not; and with it, which shows what that
//! costs.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use serde_json::Value;
use tempfile::TempDir;

use crate::Bench;
use crate::migration::{ctl, folder};
use crate::monitor::{Prepared, Programs, Running};
use crate::table::{Aim, Contestant, Figure, Row, compare};

/// Turns: each is some seconds.
const TURNS: usize = 7;
const CONNECTIONS: [u32; 4] = [1, 2, 8, 64];
/// Of the row with TLS.
const TLS_CONNECTIONS: u32 = 8;
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
    let figure = |name| Figure {
        name: format!("migration_throughput_{name}"),
        unit: "MiB/s",
        aim: Aim::AtLeast("0.90"),
    };
    let programs = match Programs::find(bench) {
        Ok(programs) => programs,
        Err(error) => {
            return vec![Row::absent(
                &figure("1_connections".to_owned()),
                "-",
                &error,
            )];
        }
    };
    let (programs, turns) = (&programs, bench.runs.min(TURNS));
    let ours = |name, connections, protection| Contestant {
        name,
        turns_max: usize::MAX,
        take: Box::new(move || ours_mib_s(programs, connections, protection)),
    };
    let iperf = |connections| Contestant {
        name: "iperf3",
        turns_max: usize::MAX,
        take: Box::new(move || iperf_mib_s(connections)),
    };
    let row = |connections: u32| {
        let figure = figure(format!("{connections}_connections"));
        let ours = ours("ours", connections, Protection::None);
        compare(&figure, turns, ours, vec![iperf(connections)])
    };
    let mut rows: Vec<_> = CONNECTIONS.into_iter().flat_map(row).collect();
    let tls = figure(format!("{TLS_CONNECTIONS}_connections_tls"));
    let bare = ours("ours without TLS", TLS_CONNECTIONS, Protection::None);
    let ours = ours("ours", TLS_CONNECTIONS, Protection::Tls);
    rows.extend(compare(
        &tls,
        turns,
        ours,
        vec![bare, iperf(TLS_CONNECTIONS)],
    ));
    rows
}

/// Who protects the machine on its way.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Protection {
    None,
    Tls,
}

/// What the source sent, by the time from the request until the machine goes on elsewhere.
fn ours_mib_s(
    programs: &Programs,
    connections: u32,
    protection: Protection,
) -> anyhow::Result<f64> {
    let (from, to) = (folder()?, folder()?);
    let authority = match protection {
        Protection::None => None,
        Protection::Tls => Some(Authority::new()?),
    };
    let _source = filled(programs, from.path())?;
    let mut command = Command::new(programs.vmm());
    command.args(["receive", "--listen", "tcp:127.0.0.1:0"]);
    match &authority {
        None => command.arg("--insecure"),
        Some(authority) => command.args(authority.options("target")),
    };
    command.args(["--log-file", "log"]).current_dir(to.path());
    let _target = Running::of(command)?;
    let place = listens_at(&to.path().join("log"))?;
    let connections = connections.to_string();
    let mut migrate = ["migrate", "--to", &place, "--connections", &connections]
        .map(str::to_owned)
        .to_vec();
    migrate.extend(match &authority {
        None => vec!["--insecure".to_owned(), "true".to_owned()],
        Some(authority) => authority.options("source").to_vec(),
    });
    let migrate: Vec<_> = migrate.iter().map(String::as_str).collect();
    let said: Value = serde_json::from_slice(&ctl(programs, from.path(), &migrate)?)?;
    let number = |name: &str| said[name].as_f64().with_context(|| format!("no {name}"));
    Ok(number("sent_bytes")? / MIB / (number("elapsed_ms")? / 1000.0))
}

/// A machine whose guest has filled its memory, and does nothing.
fn filled(programs: &Programs, folder: &Path) -> anyhow::Result<Running> {
    let mut command = Command::new(programs.vmm());
    command.args(["run", "--api-socket", "api", "--console", "stdio"]);
    command.arg("--kernel").arg(programs.kernel());
    command.args(["--memory", &MEMORY_MIB.to_string()]);
    let work = format!("stay load={FILLED_FROM_MIB},{FILLED_MIB}");
    command.args(["--cmdline", &work]).current_dir(folder);
    let mut source = Prepared::from(command).start_to_type()?;
    let filled = format!("load {}\r\n", FILLED_MIB * 256);
    source.wait_within(filled.as_bytes(), PATIENCE)?;
    source.type_in(b"q")?;
    source.wait_within(b"load ended", PATIENCE)?;
    Ok(source)
}

/// Certificates of one authority, and what it has signed for both sides.
struct Authority(TempDir);

impl Authority {
    fn new() -> anyhow::Result<Self> {
        let this = Self(folder()?);
        let mut params = CertificateParams::new(Vec::new())?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
        std::fs::write(this.path("ca"), issuer.pem())?;
        for side in ["source", "target"] {
            let key = KeyPair::generate()?;
            let params = CertificateParams::new(vec!["127.0.0.1".to_owned()])?;
            let certificate = params.signed_by(&key, &issuer)?;
            std::fs::write(this.path(side), certificate.pem())?;
            std::fs::write(this.path(&format!("{side}.key")), key.serialize_pem())?;
        }
        Ok(this)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// The options that `side` needs.
    fn options(&self, side: &str) -> [String; 6] {
        let path = |name: &str| self.path(name).display().to_string();
        let key = path(&format!("{side}.key"));
        let [ca, cert, tls_key] = ["--tls-ca", "--tls-cert", "--tls-key"].map(str::to_owned);
        [ca, path("ca"), cert, path(side), tls_key, key]
    }
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

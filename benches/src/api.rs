// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! GET /cluster/resources with 1,000 guests in the store: 16 clients at once, each on one HTTPS connection that is
//! kept. No peer: the stock server's API needs its whole distribution.
//!
//! Needs root: `atolld` runs in a network namespace of this suite, where its bridge and rules end with it.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use atoll_manager::store::{ConfigStore, RedbStore, Write};
use serde_json::Value;

use crate::Bench;
use crate::table::{Figure, Row, quantile};

const NAMES: [(&str, usize); 2] = [
    ("cluster_resources_1000_p50", 500),
    ("cluster_resources_1000_p99", 990),
];
const NODE: &str = "bench";
const GUESTS: u32 = 1000;
const CLIENTS: usize = 16;
const REQUESTS_PER_CLIENT: usize = 100;
/// Requests before the clock counts: connections, first touches.
const WARMUP: usize = 5;
const START_TIMEOUT: Duration = Duration::from_secs(60);

/// The suite.
pub fn rows(bench: &Bench) -> Vec<Row> {
    // A thread of its own, since it leaves the host's network for good.
    let outcome = std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("api".into());
        thread
            .spawn_scoped(scope, || measure(bench))
            .map(|handle| handle.join())
    });
    let latencies = match outcome {
        Ok(Ok(latencies)) => latencies,
        Ok(Err(_)) => Err(anyhow::anyhow!("the suite panicked")),
        Err(error) => Err(error.into()),
    };
    match latencies {
        Ok(ms) => NAMES
            .iter()
            .map(|(name, permille)| {
                let note = format!("{CLIENTS} clients, {} requests", ms.len());
                Row::alone(name, "ms", quantile(&ms, *permille), note)
            })
            .collect(),
        Err(error) => NAMES
            .iter()
            .map(|(name, _)| Row::absent(&Figure::cost(name, "ms"), "-", &error))
            .collect(),
    }
}

/// A running `atolld`, ended when dropped.
struct Daemon {
    child: Child,
    url: String,
}

impl Daemon {
    fn start(program: &Path, state: &Path) -> anyhow::Result<Daemon> {
        let described = state.join("run/atolld.json");
        let _ = std::fs::remove_file(&described);
        let log = std::fs::File::create(state.join("bench.log"))?;
        let mut child = Command::new(program)
            .arg("--state")
            .arg(state)
            .args(["--listen", "127.0.0.1", "--port", "0", "--node", NODE])
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("start atolld")?;
        let deadline = Instant::now() + START_TIMEOUT;
        loop {
            let port = std::fs::read(&described)
                .ok()
                .and_then(|bytes| serde_json::from_slice::<Value>(&bytes).ok()?["port"].as_u64());
            if let Some(port) = port {
                return Ok(Daemon {
                    child,
                    url: format!("https://127.0.0.1:{port}/api2/json"),
                });
            }
            let ended = child.try_wait()?;
            if ended.is_some() || Instant::now() > deadline {
                let _ = child.kill();
                let _ = child.wait();
                let log = std::fs::read_to_string(state.join("bench.log")).unwrap_or_default();
                anyhow::bail!(
                    "atolld did not start: {}",
                    log.lines().last().unwrap_or("it says nothing")
                );
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Ok(pid) = i32::try_from(self.child.id()) {
            let _ =
                nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::SIGTERM);
        }
        let _ = self.child.wait();
    }
}

/// Latencies of all requests, milliseconds.
fn measure(bench: &Bench) -> anyhow::Result<Vec<f64>> {
    let program = bench.program("atolld")?;
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).context("unshare the network")?;
    let up = Command::new("ip")
        .args(["link", "set", "lo", "up"])
        .status()
        .context("run ip")?;
    anyhow::ensure!(up.success(), "ip link set lo up: {up}");
    let state = tempfile::tempdir().context("temporary directory")?;
    // The first start makes the state; guests are then added to the store as files of the same format.
    drop(Daemon::start(&program, state.path())?);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    runtime.block_on(add_guests(state.path()))?;
    let daemon = Daemon::start(&program, state.path())?;
    runtime.block_on(ask(&daemon.url, state.path()))
}

async fn add_guests(state: &Path) -> anyhow::Result<()> {
    let store = RedbStore::open(&state.join("store.redb"))?;
    let guest = |index: u32| {
        let id = 100 + index;
        if index.is_multiple_of(2) {
            let config = format!(
                "cores: 2\nmemory: 2048\nname: vm{id}\nnet0: virtio=02:00:00:00:{:02x}:{:02x},bridge=vmbr0\n",
                id >> 8,
                id & 0xff
            );
            Write::put(format!("nodes/{NODE}/qemu-server/{id}.conf"), config)
        } else {
            let config = format!(
                "arch: amd64\ncores: 1\nhostname: ct{id}\nmemory: 512\nostype: debian\nunprivileged: 1\n"
            );
            Write::put(format!("nodes/{NODE}/lxc/{id}.conf"), config)
        }
    };
    store.transaction((0..GUESTS).map(guest).collect()).await?;
    Ok(())
}

async fn ask(url: &str, state: &Path) -> anyhow::Result<Vec<f64>> {
    let login: Value = serde_json::from_slice(&std::fs::read(state.join("initial-login.json"))?)?;
    let field = |name: &str| {
        login[name]
            .as_str()
            .map(str::to_owned)
            .with_context(|| format!("no {name} in initial-login.json"))
    };
    let authority = reqwest::Certificate::from_pem(&std::fs::read(field("ca_file")?)?)?;
    let client = || {
        reqwest::Client::builder()
            .add_root_certificate(authority.clone())
            .no_proxy()
            .build()
    };
    let form = format!(
        "username={}&password={}",
        field("username")?.replace('@', "%40"),
        percent(&field("password")?)
    );
    let answer = client()?
        .post(format!("{url}/access/ticket"))
        .header("content-type", "application/x-www-form-urlencoded")
        .body(form)
        .send()
        .await?
        .error_for_status()?;
    let answer: Value = serde_json::from_slice(&answer.bytes().await?)?;
    let ticket = answer["data"]["ticket"].as_str().context("no ticket")?;
    let cookie = format!("PVEAuthCookie={ticket}");
    let mut tasks = Vec::new();
    for _ in 0..CLIENTS {
        tasks.push(tokio::spawn(requests(
            client()?,
            format!("{url}/cluster/resources"),
            cookie.clone(),
        )));
    }
    let mut all = Vec::new();
    for task in tasks {
        all.extend(task.await??);
    }
    Ok(all)
}

async fn requests(
    client: reqwest::Client,
    url: String,
    cookie: String,
) -> anyhow::Result<Vec<f64>> {
    let mut latencies = Vec::new();
    for round in 0..WARMUP + REQUESTS_PER_CLIENT {
        let start = Instant::now();
        let answer = client
            .get(&url)
            .header("cookie", &cookie)
            .send()
            .await?
            .error_for_status()?;
        let body = answer.bytes().await?;
        let elapsed = start.elapsed();
        if round == 0 {
            let listing: Value = serde_json::from_slice(&body)?;
            let count = listing["data"].as_array().map_or(0, Vec::len);
            anyhow::ensure!(count >= GUESTS as usize, "only {count} resources listed");
        }
        if round >= WARMUP {
            latencies.push(elapsed.as_secs_f64() * 1000.0);
        }
    }
    Ok(latencies)
}

/// Every byte that is not a letter or digit as %XX.
fn percent(text: &str) -> String {
    text.bytes()
        .map(|byte| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' => char::from(byte).to_string(),
            _ => format!("%{byte:02X}"),
        })
        .collect()
}

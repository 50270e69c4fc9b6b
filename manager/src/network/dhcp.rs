// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! DHCP and DNS for the guests on the bridge: one dnsmasq, bound to the bridge alone.
//!
//! It runs on while `atolld` is restarted, so that leases are renewed; the next `ensure` adopts it when its
//! arguments are still the wanted ones and replaces it otherwise.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::error::Error;
use crate::exec::Program;
use crate::network::Network;
use crate::process::Process;

/// Time for dnsmasq to end when told to.
const STOP_DEADLINE: Duration = Duration::from_secs(5);
/// How long a server that has started must last to count as running.
const SETTLE: Duration = Duration::from_millis(200);
/// How long a guest keeps an address without asking again.
const LEASE: &str = "12h";

/// Sees to it that the server runs with the right arguments; a server that was bound to an earlier bridge of the
/// same name (`bridge_is_new`) hears nothing any more and is replaced.
pub async fn ensure(network: &Network, bridge_is_new: bool) -> Result<(), Error> {
    let folder = &network.folder;
    tokio::fs::create_dir_all(folder)
        .await
        .map_err(|error| failed(folder.display(), error))?;
    let args = arguments(network);
    if let Some(process) = running(network) {
        if !bridge_is_new && process.arguments().is_some_and(|now| now[1..] == args[..]) {
            return Ok(());
        }
        stop(network).await?;
    }
    let log = folder.join("dnsmasq.log");
    let mut child = Program::new("dnsmasq").args(&args).spawn_detached(&log)?;
    let pid = child.id().unwrap_or_default();
    // What keeps it from starting (a port in use, a missing user) ends it within moments.
    if let Ok(ended) = tokio::time::timeout(SETTLE, child.wait()).await {
        let log = std::fs::read_to_string(&log).unwrap_or_default();
        let said = log.lines().last().unwrap_or("no message").trim();
        let status = ended.map_or_else(|e| e.to_string(), |status| status.to_string());
        return Err(Error::refused(format!(
            "dnsmasq ended at once ({status}): {said}"
        )));
    }
    tokio::fs::write(pid_file(network), format!("{pid}\n"))
        .await
        .map_err(|error| failed(pid_file(network).display(), error))
}

/// Ends the server, if it runs.
pub async fn stop(network: &Network) -> Result<(), Error> {
    let Some(process) = running(network) else {
        return Ok(());
    };
    let deadline = Instant::now() + STOP_DEADLINE;
    process.signal(rustix::process::Signal::TERM);
    if !process.ended_before(deadline).await {
        process.signal(rustix::process::Signal::KILL);
    }
    let _ = tokio::fs::remove_file(pid_file(network)).await;
    Ok(())
}

/// The server that an earlier `ensure` started.
fn running(network: &Network) -> Option<Process> {
    let text = std::fs::read_to_string(pid_file(network)).ok()?;
    let process = Process::open(text.trim().parse().ok()?)?;
    // The number may be another program's by now; ours names this folder.
    let marker = lease_argument(network);
    let ours = process.arguments()?.contains(&marker);
    ours.then_some(process)
}

fn arguments(network: &Network) -> Vec<String> {
    let (first, last) = network.address.dhcp_range();
    let netmask = network.address.netmask();
    vec![
        "--keep-in-foreground".to_owned(),
        "--conf-file=/dev/null".to_owned(),
        "--pid-file=".to_owned(),
        format!("--interface={}", network.bridge),
        "--except-interface=lo".to_owned(),
        "--bind-interfaces".to_owned(),
        "--dhcp-authoritative".to_owned(),
        format!("--dhcp-range={first},{last},{netmask},{LEASE}"),
        lease_argument(network),
        "--no-hosts".to_owned(),
        "--log-facility=-".to_owned(),
    ]
}

fn lease_argument(network: &Network) -> String {
    format!(
        "--dhcp-leasefile={}",
        network.folder.join("dnsmasq.leases").display()
    )
}

fn pid_file(network: &Network) -> PathBuf {
    network.folder.join("dnsmasq.pid")
}

fn failed(path: std::path::Display<'_>, error: std::io::Error) -> Error {
    Error::failed(format!("write {path}"), error)
}

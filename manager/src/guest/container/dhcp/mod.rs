// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! DHCP by the host, for a card with `ip=dhcp,host-managed=1`: containers made from images have no client of their own.
//!
//! ```text
//! udhcpc (busybox), in the container's network namespace, a user of the container's range, CAP_NET_RAW
//!   └─ its script, a sealed memfd ──► run/ct-101/dhcp-net0 (its standard output) ──► Lease::parse
//!                                     address and route: ip(8) in that namespace ◄──┤
//!                                     etc/resolv.conf of the container's root    ◄──┘
//! ```
//!
//! The client cannot change anything but that one file; what is in it comes from the network and is parsed like that.
//! It outlives the daemon. Nothing is noted about it: whoever has the run's file as standard output is the client, from
//! the moment it is spawned. What was applied is in `run/ct-101/dhcp-net0.applied`.
//!
//! Callers: the container's start and end, hot-plugging, and [`keep::Keep`], which applies what comes later and starts
//! again what has died.

pub mod keep;
mod lease;

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, SealFlags};

use crate::error::Error;
use crate::exec::Program;
use crate::guest::cgroup::Group;
use crate::guest::config::GuestConfig;
use crate::guest::container::bundle::{self, Link};
use crate::guest::container::idmap;
use crate::guest::container::root::GuestRoot;
use crate::guest::container::{Container, image, setup};
use crate::guest::site::Seat;
use crate::network::link;
use crate::process::Process;
use lease::Lease;

/// Says what has come to the file of the run. Ash's own printf, no other program.
const SCRIPT: &str = "#!/bin/busybox sh\n\
    printf '%s\\n' \"event $1\" \"ip $ip\" \"mask $mask\" \"router $router\" \"dns $dns\" \"domain $domain\" end \
    >/proc/self/fd/1\n";
/// What the client and its script may do: raw packets, and port 68.
const CAPABILITIES: &str = "-all,+net_raw,+net_bind_service";
/// Largest file that they may write, in bytes.
const FILE_BYTES_MAX: u64 = 64 << 10;
/// Time for killed clients to be gone.
const STOP_DEADLINE: Duration = Duration::from_secs(10);

/// Starts a card's client, in the network namespace of process `pid`. One that is left of before is ended first.
pub async fn start(seat: &Seat, card: &Link, pid: u32) -> Result<(), Error> {
    let path = file(seat, card.index);
    end(&path).await?;
    let failed = |e: std::io::Error| Error::failed(format!("write {}", path.display()), e);
    let user = idmap::base(seat.id)? + idmap::SIZE - 1;
    let output = File::options()
        .create(true)
        .write(true)
        .truncate(true)
        .open(&path)
        .map_err(failed)?;
    // The script replaces its content, and opens it anew for that.
    std::os::unix::fs::fchown(&output, Some(user), Some(user)).map_err(failed)?;
    let script = script().map_err(|e| Error::failed("make the script of the DHCP client", e))?;
    let hostname = bundle::hostname(seat.id, &seat.config()?);
    let child = Program::new("nsenter")
        .arg(format!("--net=/proc/{pid}/ns/net"))
        .args([
            "--",
            "prlimit",
            &format!("--fsize={FILE_BYTES_MAX}"),
            "--core=0",
        ])
        .args(["--", "setpriv", "--no-new-privs", "--clear-groups"])
        .args([format!("--reuid={user}"), format!("--regid={user}")])
        .arg(format!("--inh-caps={CAPABILITIES}"))
        .arg(format!("--ambient-caps={CAPABILITIES}"))
        .arg(format!("--bounding-set={CAPABILITIES}"))
        .args(["--", "busybox", "udhcpc", "-f", "-i", &card.inside.name])
        // Three requests, then a pause, for ever.
        .args(["-t", "3", "-T", "3", "-A", "10"])
        .args([
            "-o", "-O", "subnet", "-O", "router", "-O", "dns", "-O", "domain",
        ])
        .args(["-x", &format!("hostname:{hostname}")])
        .args(["-s", "/proc/self/fd/0"])
        .spawn_detached_on(script, output)?;
    // A group below the container's, which is its own: systemd wants nobody else in that.
    let group = Group::new(format!("{}/dhcp", seat.name()));
    if let Some(pid) = child.id()
        && let Err(error) = group.adopt(pid)
    {
        tracing::warn!(guest = seat.title(), %error, "DHCP client without a control group");
    }
    Ok(())
}

/// Starts the clients of all cards that want one.
pub async fn start_all(seat: &Seat, config: &GuestConfig, pid: u32) -> Result<(), Error> {
    for card in cards(config)? {
        start(seat, &card, pid).await?;
    }
    Ok(())
}

/// Ends a card's client, and forgets its lease.
pub async fn stop(seat: &Seat, index: u16) -> Result<(), Error> {
    let path = file(seat, index);
    end(&path).await?;
    for path in [applied_file(&path), path] {
        match tokio::fs::remove_file(&path).await {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::failed(format!("remove {}", path.display()), e));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Ends every client of a container, whatever its config says.
pub async fn stop_all(seat: &Seat) -> Result<(), Error> {
    for index in files(seat) {
        stop(seat, index).await?;
    }
    Ok(())
}

/// Applies what has come for a container's cards and was not applied yet. True when each card has an address.
pub async fn apply(seat: &Seat, config: &GuestConfig, pid: u32) -> Result<bool, Error> {
    let (mut complete, mut changed) = (true, false);
    for card in cards(config)? {
        let path = file(seat, card.index);
        let former = applied(&path);
        // A file that is being written has no end yet: the next look finds it.
        let Some(lease) = read(&path).and_then(|text| Lease::parse(&text)) else {
            complete &= former != Lease::default();
            continue;
        };
        complete &= lease.address.is_some();
        if lease == former {
            continue;
        }
        let name = &card.inside.name;
        if let Some(former) = former.address
            && lease.address != Some(former)
        {
            link::remove_address(pid, name, &written(former)).await?;
        }
        if let Some(address) = lease.address {
            link::add_address(pid, name, &written(address)).await?;
        }
        match (lease.router, former.router) {
            (Some(router), _) => link::add_default_route(pid, name, &router.to_string()).await?,
            (None, Some(former)) => {
                link::remove_default_route(pid, name, &former.to_string()).await?;
            }
            (None, None) => {}
        }
        let (text, path) = (lease.to_string(), applied_file(&path));
        tokio::fs::write(&path, text)
            .await
            .map_err(|e| Error::failed(format!("write {}", path.display()), e))?;
        tracing::info!(guest = seat.title(), name, ?lease, "DHCP");
        changed = true;
    }
    if changed {
        write_resolver(seat, config).await?;
    }
    Ok(complete)
}

/// Writes the resolver's file of a container that runs: from its config, else from what DHCP has given.
pub async fn write_resolver(seat: &Seat, config: &GuestConfig) -> Result<(), Error> {
    let mut identity = bundle::identity(seat.id, config, None)?;
    let leases: Vec<Lease> = cards(config)?
        .iter()
        .map(|card| applied(&file(seat, card.index)))
        .collect();
    if identity.nameservers.is_empty() {
        let servers = leases.iter().flat_map(|lease| &lease.servers);
        identity.nameservers = servers.map(ToString::to_string).collect();
        // More are not asked: resolv.conf(5), MAXNS.
        identity.nameservers.truncate(3);
    }
    if identity.search_domains.is_empty() {
        identity.search_domains = leases.into_iter().filter_map(|l| l.domain).collect();
    }
    // Seen from the host, where nothing that the container mounts is. An image's upper layer: overlayfs has no other
    // copy of the file, and nothing but its content is changed.
    let mut rootfs = Container::new(seat.clone()).rootfs();
    if config.get(image::KEY).is_some() {
        rootfs.push(image::UPPER);
    }
    let work = tokio::task::spawn_blocking(move || {
        setup::overwrite_resolver(&GuestRoot::open(&rootfs)?, &identity)
    });
    work.await
        .map_err(|e| Error::failed("write the resolver's file", e))?
        .map_err(|e| Error::failed("write the resolver's file", e))
}

fn written((address, prefix): (Ipv4Addr, u8)) -> String {
    format!("{address}/{prefix}")
}

/// Cards whose addresses the host asks for.
fn cards(config: &GuestConfig) -> Result<Vec<Link>, Error> {
    let cards = bundle::cards(config)?.into_iter();
    Ok(cards.filter(|card| card.asks_dhcp).collect())
}

/// Whether a card's client is there.
fn is_running(seat: &Seat, index: u16) -> bool {
    !clients(&file(seat, index)).is_empty()
}

/// The file that a card's client writes.
fn file(seat: &Seat, index: u16) -> PathBuf {
    seat.run_folder().join(format!("dhcp-net{index}"))
}

fn applied_file(file: &Path) -> PathBuf {
    file.with_extension("applied")
}

/// Numbers of the cards that have such a file.
fn files(seat: &Seat) -> Vec<u16> {
    let entries = std::fs::read_dir(seat.run_folder()).into_iter().flatten();
    let names = entries.flatten().map(|entry| entry.file_name());
    names
        .filter_map(|name| name.to_str()?.strip_prefix("dhcp-net")?.parse().ok())
        .collect()
}

fn read(path: &Path) -> Option<String> {
    let mut bytes = Vec::new();
    let file = File::open(path).ok()?;
    file.take(FILE_BYTES_MAX).read_to_end(&mut bytes).ok()?;
    String::from_utf8(bytes).ok()
}

fn applied(file: &Path) -> Lease {
    let text = read(&applied_file(file));
    text.and_then(|text| Lease::parse(&text))
        .unwrap_or_default()
}

fn script() -> std::io::Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let mut script = File::from(rustix::fs::memfd_create("dhcp-script", flags)?);
    script.write_all(SCRIPT.as_bytes())?;
    let seals = SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL;
    rustix::fs::fcntl_add_seals(&script, seals)?;
    // Opened anew, to read: the kernel executes nothing that somebody has open for writing.
    let path = format!("/proc/self/fd/{}", script.as_raw_fd());
    Ok(File::open(path)?.into())
}

/// Kills whoever writes to that file.
async fn end(file: &Path) -> Result<(), Error> {
    let deadline = Instant::now() + STOP_DEADLINE;
    loop {
        // Again, since the client may just have started its script.
        let found = clients(file);
        if found.is_empty() {
            return Ok(());
        }
        for client in found {
            client.signal(rustix::process::Signal::KILL);
            if !client.ended_before(deadline).await {
                return Err(Error::refused(format!(
                    "DHCP client {} does not end",
                    client.pid()
                )));
            }
        }
    }
}

/// Processes whose standard output is that file.
fn clients(file: &Path) -> Vec<Process> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter_map(|pid: u32| {
        let writes = || {
            let output = std::fs::read_link(format!("/proc/{pid}/fd/1"));
            output.is_ok_and(|output| output == file)
        };
        // Looked at again once it is held, when the number cannot become another's.
        writes()
            .then(|| Process::open(pid))
            .flatten()
            .filter(|_| writes())
    })
    .collect()
}

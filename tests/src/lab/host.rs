// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! One host of the lab, resumed from the template.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::agent::{self, Output};
use super::qemu::{Machine, Monitor};
use super::template;

/// Longest time that resuming and configuring may take on a busy machine.
const RESUME_DEADLINE: Duration = Duration::from_secs(90);
/// A command that took longer is told of, so that a test's output shows where its minutes went.
const TOLD: Duration = Duration::from_secs(3);

/// A listening address on this machine.
#[derive(Debug, Clone)]
pub struct Forward {
    /// IPv4 address.
    pub address: String,
    /// TCP port.
    pub port: u16,
}

/// Where a host lives and what it is given.
pub(super) struct Place {
    pub(super) directory: PathBuf,
    pub(super) number: u8,
    pub(super) memory_mib: u32,
    pub(super) payload: Option<PathBuf>,
    pub(super) api: Option<Forward>,
    pub(super) group: u16,
}

/// A running host. Dropping it ends its QEMU, unless it was let go with [`Host::detach`].
pub struct Host {
    number: u8,
    directory: PathBuf,
    agent: SocketAddr,
    api: Forward,
    child: Option<Child>,
    resumed: Instant,
}

impl Host {
    /// 1 for the first host; its name is `node1`, its address between hosts 10.99.0.1.
    pub fn number(&self) -> u8 {
        self.number
    }

    /// Where this machine reaches the host's port 8006.
    pub fn api(&self) -> &Forward {
        &self.api
    }

    /// Port of the command agent, on loopback.
    pub fn agent_port(&self) -> u16 {
        self.agent.port()
    }

    /// Runs a shell script as root and returns its output, whatever its exit code; an error when it does not
    /// end in time. One that takes long is told of on standard error.
    pub fn run(&self, script: &str, timeout: Duration) -> Result<Output> {
        let began = Instant::now();
        let output = self.follow(script, timeout, |_| {});
        if began.elapsed() > TOLD {
            let code = output.as_ref().map(|output| output.code);
            let last = script.lines().next_back().unwrap_or_default();
            super::say(&format!(
                "node{}, at {} s: {:.1} s, {}: {last}",
                self.number,
                began.duration_since(self.resumed).as_secs(),
                began.elapsed().as_secs_f32(),
                code.map_or("no answer".to_owned(), |code| format!("exit code {code}")),
            ));
        }
        output
    }

    /// The same, and shows each line of the output to `line` when it comes.
    pub fn follow(
        &self,
        script: &str,
        timeout: Duration,
        line: impl FnMut(&str),
    ) -> Result<Output> {
        agent::run(self.agent, script, Instant::now() + timeout, line)
            .with_context(|| format!("node{}: {script}", self.number))
    }

    /// Runs a shell script that must succeed; returns its output.
    pub fn check(&self, script: &str, timeout: Duration) -> Result<String> {
        let output = self.run(script, timeout)?;
        ensure!(
            output.code == 0,
            "node{}: exit code {} from\n{script}\n{}",
            self.number,
            output.code,
            output.text
        );
        Ok(output.text)
    }

    /// Leaves QEMU running when this value goes; returns its process id.
    pub fn detach(mut self) -> u32 {
        self.child
            .take()
            .expect("a host has a child until it is detached")
            .id()
    }

    /// Gives a resumed clone its own identity: clock, name, addresses, machine id; mounts the payload.
    pub(super) fn configure(&self) -> Result<()> {
        let deadline = Instant::now() + RESUME_DEADLINE;
        agent::wait(self.agent, deadline)?;
        let n = self.number;
        let now = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)?
            .as_secs();
        let script = format!(
            "set -e
date -s @{now} >/dev/null
hostname node{n}; echo node{n} > /etc/hostname
rm -f /etc/machine-id; systemd-machine-id-setup >/dev/null 2>&1
ip link set eth1 address 52:54:00:99:00:0{n}
ip address replace 10.99.0.{n}/24 dev eth1; ip link set eth1 up
if [ \"$(blkid -o value -s TYPE /dev/vdb)\" = ext4 ]; then mount -o ro /dev/vdb /payload; fi"
        );
        let output = agent::run(self.agent, &script, deadline, |_| {})?;
        ensure!(
            output.code == 0,
            "configure the resumed host:\n{}",
            output.text
        );
        Ok(())
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
            let _ = fs::remove_file(self.directory.join("disk.qcow2"));
        }
    }
}

/// Starts one clone of the template; it runs when this returns, but has no identity yet.
pub(super) fn resume(qemu: &Path, image: &Path, template: &Path, place: &Place) -> Result<Host> {
    let deadline = Instant::now() + RESUME_DEADLINE;
    fs::create_dir_all(&place.directory)?;
    let _ = fs::remove_file(place.directory.join("mon"));
    let disk = place.directory.join("disk.qcow2");
    template::overlay(&template.join("disk.qcow2"), "qcow2", &disk)?;
    let agent_port = template::free_port("127.0.0.1")?;
    let api = match &place.api {
        Some(forward) => forward.clone(),
        None => Forward {
            address: "127.0.0.1".into(),
            port: template::free_port("127.0.0.1")?,
        },
    };
    let blank = template.join("payload.img");
    let child = template::spawn(&Machine {
        qemu,
        image,
        memory_mib: place.memory_mib,
        ram: &template.join("ram"),
        ram_shared: false,
        disk: &disk,
        payload: place.payload.as_deref().unwrap_or(&blank),
        directory: &place.directory,
        forwards: format!(
            ",hostfwd=tcp:127.0.0.1:{agent_port}-:7000,hostfwd=tcp:{}:{}-:8006",
            api.address, api.port
        ),
        group: place.group,
        incoming: true,
    })?;
    let host = Host {
        number: place.number,
        directory: place.directory.clone(),
        agent: SocketAddr::from((Ipv4Addr::LOCALHOST, agent_port)),
        api,
        child: Some(child),
        resumed: Instant::now(),
    };
    let mut monitor = Monitor::open(&place.directory, deadline)?;
    monitor.send("migrate_set_capability x-ignore-shared on")?;
    let state = template.join("state");
    monitor.send(&format!(
        "migrate_incoming \"exec:cat {}\"",
        state.display()
    ))?;
    // `cont` before the state is complete would be lost, and the host paused for ever.
    monitor.wait_migrated(deadline)?;
    monitor.send("cont")?;
    Ok(host)
}

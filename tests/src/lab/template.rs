// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The template: one host, booted once and frozen with KVM loaded; every lab host resumes from it.

use std::fs::{self, File};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::fcntl::{Flock, FlockArg};

use super::qemu::{self, Monitor};
use super::{agent, image};

/// Longest time that booting and freezing may take on a busy machine.
const BOOT_DEADLINE: Duration = Duration::from_secs(300);

/// Makes the host ready to be cloned: everything slow that each clone would otherwise do itself.
const PREPARE: &str = "set -e
modprobe kvm-amd; modprobe tun; modprobe vhost-net; modprobe bridge; modprobe veth; modprobe loop; modprobe overlay
modprobe nf_tables; modprobe nft_chain_nat; modprobe nft_masq; modprobe nft_ct
test -e /dev/kvm
systemctl is-system-running --wait || systemctl --failed
sync; echo 3 > /proc/sys/vm/drop_caches";

/// Directory with `ram`, `state` and `disk.qcow2`; boots and freezes a host where it is missing.
pub(super) fn ensure(qemu: &Path, image: &Path, memory_mib: u32) -> Result<PathBuf> {
    // Frozen by one QEMU, resumed by the same, with as much memory and as many vCPUs.
    let name = qemu.file_name().context("QEMU's directory")?;
    let size = format!("{}x{memory_mib}", qemu::VCPU_COUNT);
    let template = image.join(format!("template-{}-{size}", name.display()));
    let lock = File::create(image.join("template.lock"))?;
    let _lock = Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, error)| error)?;
    if template.join("state").exists() {
        return Ok(template);
    }
    super::say("booting the template host (about half a minute, once)");
    let work = image.join("template.part");
    let _ = fs::remove_dir_all(&work);
    fs::create_dir(&work)?;
    build(qemu, image, &work, memory_mib).context("build the lab's template")?;
    // The state goes in last and under its final name: a template without it is not one.
    fs::rename(&work, &template)?;
    Ok(template)
}

/// Creates a qcow2 overlay on a backing file.
pub(super) fn overlay(backing: &Path, format: &str, file: &Path) -> Result<()> {
    let status = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-F", format, "-b"])
        .args([backing, file])
        .stdin(Stdio::null())
        .status()
        .context("run qemu-img (Debian package qemu-utils)")?;
    ensure!(status.success(), "qemu-img create failed: {status}");
    Ok(())
}

/// Starts QEMU with its output in `qemu.log`; the child ends when the returned guard is dropped.
pub(super) fn spawn(machine: &qemu::Machine) -> Result<Child> {
    let log = File::create(machine.directory.join("qemu.log"))?;
    qemu::command(machine)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .context("start the lab's QEMU")
}

/// A free TCP port on an address, as far as anyone can know.
pub(super) fn free_port(address: &str) -> Result<u16> {
    Ok(std::net::TcpListener::bind((address, 0))?
        .local_addr()?
        .port())
}

fn build(qemu: &Path, image: &Path, work: &Path, memory_mib: u32) -> Result<()> {
    let deadline = Instant::now() + BOOT_DEADLINE;
    overlay(&image.join("root.ext4"), "raw", &work.join("disk.qcow2"))?;
    let payload = work.join("payload.img");
    File::create(&payload)?.set_len(image::PAYLOAD_BYTES)?;
    let port = free_port("127.0.0.1")?;
    let mut child = spawn(&qemu::Machine {
        qemu,
        image,
        memory_mib,
        ram: &work.join("ram"),
        ram_shared: true,
        disk: &work.join("disk.qcow2"),
        payload: &payload,
        directory: work,
        forwards: format!(",hostfwd=tcp:127.0.0.1:{port}-:7000"),
        group: 9901,
        incoming: false,
    })?;
    let result = freeze(work, port, deadline);
    if result.is_err() {
        let _ = child.kill();
    }
    child.wait()?;
    result
}

fn freeze(work: &Path, port: u16, deadline: Instant) -> Result<()> {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let mut monitor = Monitor::open(work, deadline)?;
    agent::wait(address, deadline)?;
    let prepared = agent::run(address, PREPARE, deadline, |_| {})?;
    ensure!(
        prepared.code == 0,
        "the template host is not ready:\n{}",
        prepared.text
    );
    monitor.send("stop")?;
    // The RAM stays in its file; only device state is written.
    monitor.send("migrate_set_capability x-ignore-shared on")?;
    let state = work.join("state");
    monitor.send(&format!("migrate \"exec:cat > {}\"", state.display()))?;
    monitor.wait_migrated(deadline)?;
    monitor.send("quit").map(drop).or(Ok(()))
}

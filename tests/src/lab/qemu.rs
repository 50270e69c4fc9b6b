// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The QEMU that emulates a lab host: its command line and its monitor.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// RAM of a host of the tests; too little for a guest in a 1 GiB page. QEMU's board puts it below 4 GiB as long as it is
/// less than 2816 MiB.
pub const MEMORY_MIB: u32 = 2800;
/// vCPUs of a host. Part of the template, as RAM is.
pub(super) const VCPU_COUNT: u32 = 2;

/// What differs between QEMUs of the lab.
pub(super) struct Machine<'a> {
    pub(super) qemu: &'a Path,
    pub(super) image: &'a Path,
    pub(super) memory_mib: u32,
    /// File that holds the RAM, and whether writes go to it (template) or stay private (host).
    pub(super) ram: &'a Path,
    pub(super) ram_shared: bool,
    pub(super) disk: &'a Path,
    pub(super) payload: &'a Path,
    pub(super) directory: &'a Path,
    /// `hostfwd=…` options of the user network.
    pub(super) forwards: String,
    /// Multicast port on loopback that joins the hosts of one lab.
    pub(super) group: u16,
    /// Wait for a saved state instead of booting.
    pub(super) incoming: bool,
}

/// What every machine of the lab has. The kernel's `net.ifnames=0` keeps udev from renaming the cards that the
/// host's scripts name.
const FIXED: &[&str] = &[
    "-accel tcg,thread=multi,tb-size=512",
    "-machine q35,memory-backend=ram",
    "-cpu max,+svm,+npt",
    "-nodefaults -display none -no-reboot",
    "-device virtio-blk-pci,drive=root,disable-legacy=on",
    "-device virtio-blk-pci,drive=payload,disable-legacy=on",
    "-device virtio-net-pci,netdev=user,disable-legacy=on,romfile=",
    "-device virtio-net-pci,netdev=hosts,disable-legacy=on,romfile=",
    "-device virtio-rng-pci,disable-legacy=on",
];
const CMDLINE: &str = "console=ttyS0 net.ifnames=0 reboot=k panic=-1 quiet mitigations=off";

/// The command line. The devices and their order are part of the template's state: they never vary.
pub(super) fn command(machine: &Machine) -> Command {
    // A comma separates options within a value, two stand for one.
    let path = |path: &Path| path.display().to_string().replace(',', ",,");
    let share = if machine.ram_shared { "on" } else { "off" };
    let Machine {
        image,
        directory,
        forwards,
        group,
        memory_mib,
        ..
    } = machine;
    let (ram, disk, payload) = (path(machine.ram), path(machine.disk), path(machine.payload));
    let usr = machine.qemu.join("usr");
    let variable = [
        ("-L", path(&usr.join("share/qemu"))),
        ("-L", path(&usr.join("share/seabios"))),
        ("-smp", VCPU_COUNT.to_string()),
        ("-m", memory_mib.to_string()),
        (
            "-object",
            format!("memory-backend-file,id=ram,size={memory_mib}M,mem-path={ram},share={share}"),
        ),
        ("-kernel", path(&image.join("vmlinux"))),
        ("-initrd", path(&image.join("initrd.img"))),
        ("-append", CMDLINE.to_owned()),
        (
            "-serial",
            format!("file:{}", path(&directory.join("serial.log"))),
        ),
        (
            "-monitor",
            format!("unix:{},server,nowait", path(&directory.join("mon"))),
        ),
        (
            "-drive",
            format!("if=none,id=root,format=qcow2,file={disk},discard=unmap"),
        ),
        (
            "-drive",
            format!("if=none,id=payload,format=raw,file={payload},file.locking=off,readonly=on"),
        ),
        ("-netdev", format!("user,id=user{forwards}")),
        (
            "-netdev",
            format!("socket,id=hosts,mcast=230.9.9.1:{group},localaddr=127.0.0.1"),
        ),
    ];
    let mut command = Command::new(usr.join("bin/qemu-system-x86_64"));
    for (name, value) in variable {
        command.arg(name).arg(value);
    }
    command.args(FIXED.iter().flat_map(|words| words.split(' ')));
    if machine.incoming {
        command.args(["-incoming", "defer"]);
    }
    command
}

/// A connection to QEMU's human monitor.
pub(super) struct Monitor {
    stream: UnixStream,
}

impl Monitor {
    /// Connects, waiting for the socket to appear.
    pub(super) fn open(directory: &Path, deadline: Instant) -> Result<Self> {
        let socket: PathBuf = directory.join("mon");
        loop {
            if let Ok(stream) = UnixStream::connect(&socket) {
                stream.set_read_timeout(Some(Duration::from_secs(60)))?;
                let mut monitor = Self { stream };
                monitor.answer()?;
                return Ok(monitor);
            }
            if Instant::now() >= deadline {
                bail!(
                    "QEMU did not open {}; see qemu.log beside it",
                    socket.display()
                );
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Sends one command and reads its answer.
    pub(super) fn send(&mut self, command: &str) -> Result<String> {
        self.stream.write_all(command.as_bytes())?;
        self.stream.write_all(b"\n")?;
        self.answer()
            .with_context(|| format!("QEMU monitor: {command}"))
    }

    /// Polls `info migrate` until it is over.
    pub(super) fn wait_migrated(&mut self, deadline: Instant) -> Result<()> {
        loop {
            let status = self.send("info migrate")?;
            if status.contains("completed") {
                return Ok(());
            }
            if status.contains("failed") || Instant::now() >= deadline {
                bail!("the machine's state was not transferred: {status}");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn answer(&mut self) -> Result<String> {
        let mut text = Vec::new();
        let mut buffer = [0; 4096];
        while !text.ends_with(b"(qemu) ") {
            let count = self.stream.read(&mut buffer)?;
            if count == 0 {
                break;
            }
            text.extend_from_slice(&buffer[..count]);
        }
        Ok(String::from_utf8_lossy(&text).into_owned())
    }
}

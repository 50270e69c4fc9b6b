// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The lab: full Debian hosts with a hardware-like KVM, emulated by QEMU (TCG emulates AMD SVM with nested paging).
//!
//! ```text
//! QEMU      qemu-image.sh: version 10, with one defect mended     once a recipe, cached
//! image     host-image.sh: kernel, initrd, root.ext4              once a recipe, cached
//!           next-kernel.sh: another kernel for the same root
//! template  one host booted and frozen: RAM file + device state   once a QEMU and an image, cached
//! host      resumed copy-on-write from the template               1.5 to 4 s each
//! ```
//!
//! The hosts' second disk is the payload: an ext4 image of a directory of ours, mounted at /payload. Commands go
//! through a small agent on a forwarded port. Callers: the tests in `tests/lab` and the program `atoll-lab`.

mod agent;
mod host;
mod image;
mod qemu;
mod scratch;
mod template;

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::tree;

pub use agent::Output;
pub use host::{Forward, Host};
pub use image::{guest_image, host_image, next_image, qemu_image, uefi_image, virtiofsd};
pub use qemu::MEMORY_MIB;
pub use scratch::Scratch;

/// Which kernel the hosts of a lab run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HostKernel {
    /// That of their suite of Debian.
    Suite,
    /// That of its backports.
    Backports,
}

/// What a lab should be.
pub struct Settings<'a> {
    /// Hosts, 1 to 9.
    pub host_count: u8,
    /// RAM of each. Other sizes than [`MEMORY_MIB`] have a template of their own, which takes half a minute once.
    pub memory_mib: u32,
    /// Their kernel.
    pub kernel: HostKernel,
    /// Files that every host sees read-only at /payload.
    pub payload: Option<&'a Path>,
    /// Where disks, sockets and logs go.
    pub directory: PathBuf,
    /// Listening address and port on this machine for each host's port 8006; any free port when `None`.
    pub api: Option<(String, u16)>,
}

/// Resumes hosts from the template, building image and template first where they are missing.
///
/// Blocks for seconds (template cached) to minutes (nothing cached); progress goes to standard error.
pub fn start(settings: &Settings) -> Result<Vec<Host>> {
    let qemu = qemu_image()?;
    let image = match settings.kernel {
        HostKernel::Suite => host_image()?,
        HostKernel::Backports => next_image()?,
    };
    let template = template::ensure(&qemu, &image, settings.memory_mib)?;
    std::fs::create_dir_all(&settings.directory)?;
    let payload = match settings.payload {
        Some(directory) => {
            let file = settings.directory.join("payload.img");
            image::pack(directory, &file).context("pack the payload")?;
            Some(file)
        }
        None => None,
    };
    // One group a lab: hosts of different labs on one machine must not hear each other.
    let group = 10_000 + u16::try_from(std::process::id() % 50_000).expect("below 50,000");
    let places = (1..=settings.host_count).map(|number| host::Place {
        directory: settings.directory.join(format!("node{number}")),
        number,
        memory_mib: settings.memory_mib,
        payload: payload.clone(),
        api: settings.api.as_ref().map(|(address, port)| Forward {
            address: address.clone(),
            port: port + u16::from(number - 1),
        }),
        group,
    });
    let resume = |place: &host::Place| host::resume(&qemu, &image, &template, place);
    let mut starting = Vec::new();
    for place in places {
        let resumed = resume(&place).or_else(|error| {
            say_anew(&place, &error);
            resume(&place)
        });
        starting.push((place, resumed?));
    }
    let mut hosts = Vec::new();
    for (place, mut host) in starting {
        if let Err(error) = host.configure() {
            say_anew(&place, &error);
            // Its directory is the next one's.
            drop(host);
            host = resume(&place)?;
            let configured = host.configure();
            configured.with_context(|| format!("host {}", place.number))?;
        }
        hosts.push(host);
    }
    Ok(hosts)
}

/// An emulated host that does not come up is made once more, never silently.
fn say_anew(place: &host::Place, error: &anyhow::Error) {
    let serial = std::fs::read(place.directory.join("serial.log")).unwrap_or_default();
    let end = &serial[serial.len().saturating_sub(2000)..];
    say(&format!(
        "host {} did not come up and is made anew: {error:#}; the end of its console:\n{}",
        place.number,
        String::from_utf8_lossy(end)
    ));
}

/// Runs a shell script on a host that another process started, by its agent's port on loopback.
pub fn run_at(agent_port: u16, script: &str, timeout: Duration) -> Result<Output> {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, agent_port));
    agent::run(address, script, Instant::now() + timeout, |_| {})
}

/// Fills an empty directory with what a host needs to run Atoll: `bin/` (the programs under test), `guest/` (the
/// stock Debian guest), `run/` and `lab/` (scripts).
pub fn fill_payload(directory: &Path) -> Result<()> {
    let bin = directory.join("bin");
    std::fs::create_dir(&bin)?;
    for name in ["atolld", "atoll", "atoll-vmm", "atoll-relay", "atoll-ct"] {
        std::fs::copy(tree::binary(name), bin.join(name))?;
    }
    link_files(&guest_image()?, &directory.join("guest"))?;
    link_files(&tree::root().join("run"), &directory.join("run"))?;
    link_files(&tree::root().join("tests/lab"), &directory.join("lab"))
}

/// Adds `uefi/` to it: what boots by UEFI.
pub fn add_uefi(payload: &Path) -> Result<()> {
    link_files(&uefi_image()?, &payload.join("uefi"))
}

/// Hard-links (or copies, across file systems) a directory's files, without its subdirectories, into a new one.
fn link_files(from: &Path, to: &Path) -> Result<()> {
    std::fs::create_dir(to)?;
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_file() && std::fs::hard_link(entry.path(), &target).is_err() {
            std::fs::copy(entry.path(), &target)?;
        }
    }
    Ok(())
}

/// Tells the person or log behind standard error what takes so long.
#[expect(
    clippy::print_stderr,
    reason = "progress of minutes-long work; both callers run on a terminal or in CI"
)]
fn say(text: &str) {
    eprintln!("lab: {text}");
}

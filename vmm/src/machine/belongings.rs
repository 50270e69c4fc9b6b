// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! What of the host a machine has, by name, as descriptors that another process can go on with (`upgrade`).
//!
//! | name | descriptors |
//! |---|---|
//! | `memory` | the memfd that all of RAM is in |
//! | `standard streams` | 0, 1 and 2 |
//! | `control API` | its listening socket |
//! | `disk ID` | its images, then its record of changes; locked, and the lock belongs to the open file |
//! | `card ID` | its tap, once a pair of queues |
//! | `virtio console`, `port NAME`, `serial console` | streams, terminal, or listening socket |
//! | `kernel`, `firmware` | what a reset loads again; code, variables and log |
//!
//! Copies of them are kept from the start on where memory could go along, too: later nothing can be opened. A copy goes
//! with its device, since it holds the lock of a disk.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use atoll_vmm_protocol::services::MemoryBacking;
use atoll_vmm_protocol::spec::{BootSpec, ConsoleSpec, DiskFormat, MachineSpec};

use crate::check;

/// Name of the guest's memory.
pub const MEMORY: &str = "memory";
/// Name of the process's first three descriptors.
pub const STREAMS: &str = "standard streams";
/// Name of the control API's socket.
pub const API: &str = "control API";

/// Descriptors by name; see the module.
#[derive(Debug, Default)]
pub struct Belongings(BTreeMap<String, Vec<OwnedFd>>);

impl Belongings {
    /// Puts something in. What had the name before is closed.
    pub fn insert(&mut self, name: impl Into<String>, files: Vec<OwnedFd>) {
        self.0.insert(name.into(), files);
    }

    /// Keeps copies of what is open. When the process may have no more descriptors there are none: then it cannot go
    /// along, which is said when it is asked to.
    pub(super) fn keep<F: AsFd>(&mut self, name: &str, files: impl IntoIterator<Item = F>) {
        let copies = files
            .into_iter()
            .map(|file| file.as_fd().try_clone_to_owned());
        match copies.collect::<io::Result<_>>() {
            Ok(copies) => self.insert(name, copies),
            Err(_) => self.forget(name),
        }
    }

    /// Takes something out.
    pub fn take(&mut self, name: &str) -> Option<Vec<OwnedFd>> {
        self.0.remove(name)
    }

    /// Takes out what is one file.
    pub fn take_one(&mut self, name: &str) -> Option<File> {
        let mut files = self.take(name)?;
        let file = files.pop().filter(|_| files.is_empty())?;
        Some(file.into())
    }

    /// Closes the copies of something.
    pub(super) fn forget(&mut self, name: &str) {
        self.0.remove(name);
    }

    /// Each with its descriptors.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &[OwnedFd])> {
        self.0
            .iter()
            .map(|(name, files)| (name.as_str(), files.as_slice()))
    }

    /// The first of these names that is missing.
    pub(super) fn missing(&self, names: &[String]) -> Option<String> {
        let mut names = names.iter();
        names.find(|name| !self.0.contains_key(*name)).cloned()
    }

    /// Another handle of everything.
    pub(super) fn try_clone(&self) -> io::Result<Self> {
        let each = self.0.iter().map(|(name, files)| {
            let files = files.iter().map(OwnedFd::try_clone);
            Ok((name.clone(), files.collect::<io::Result<_>>()?))
        });
        each.collect::<io::Result<_>>().map(Self)
    }
}

/// Name of a disk's images.
pub(super) fn disk(id: &str) -> String {
    format!("disk {id}")
}

/// Name of a card's tap.
pub(super) fn card(id: &str) -> String {
    format!("card {id}")
}

/// Name of a port's socket.
pub(super) fn port(name: &str) -> String {
    format!("port {name}")
}

/// Whether the machine's memory is a file, which can go along.
pub(super) fn has_shared_memory(spec: &MachineSpec) -> bool {
    spec.services.memory_backing != MemoryBacking::Anonymous
}

/// Why the machine's process must stay this one, as far as the spec tells: one sentence with the remedy, if there is one.
pub(super) fn obstacle(spec: &MachineSpec) -> Option<String> {
    if !has_shared_memory(spec) {
        let text = "its memory is private to this process: start the machine with --memory SIZE,shared, or with huge pages";
        return Some(text.to_owned());
    }
    let services = &spec.services;
    if services.vsock.is_some() {
        return Some(
            "its socket device reaches the host by paths, which cannot go along".to_owned(),
        );
    }
    let served = |what: &str| {
        Some(format!(
            "{what} is served by another process, which knows only this one"
        ))
    };
    if let Some(one) = services.filesystems.first() {
        return served(&format!("file system {}", one.tag));
    }
    if !services.vhost_user.is_empty() {
        return served("a vhost-user device");
    }
    if let Some(net) = spec.nets.iter().find(|net| net.vhost_user.is_some()) {
        return served(&card(check::id_of(&net.id)));
    }
    let nbd = spec
        .disks
        .iter()
        .find(|disk| disk.format == DiskFormat::Nbd);
    nbd.and_then(|one| served(&disk(check::id_of(&one.id))))
}

/// Names of all that must go along with the machine, beside what every process has.
pub(super) fn expected(spec: &MachineSpec) -> Vec<String> {
    let disks = spec
        .disks
        .iter()
        .filter(|disk| !disk.path.as_os_str().is_empty());
    let mut names: Vec<String> = disks.map(|one| disk(check::id_of(&one.id))).collect();
    names.extend(spec.nets.iter().map(|net| card(check::id_of(&net.id))));
    names.extend(spec.services.ports.iter().map(|one| port(&one.name)));
    let consoles = [
        ("virtio console", spec.console.as_ref()),
        ("serial console", Some(&spec.serial)),
    ];
    let ends = |console: &ConsoleSpec| *console != ConsoleSpec::Null;
    let consoles = consoles
        .into_iter()
        .filter(|(_, console)| console.is_some_and(ends));
    names.extend(consoles.map(|(name, _)| name.to_owned()));
    names.push(match spec.boot {
        BootSpec::Kernel(_) => "kernel".to_owned(),
        BootSpec::Firmware(_) => "firmware".to_owned(),
    });
    names.push(API.to_owned());
    names
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Everything of the host that a machine needs, open: what is done before the process enters its sandbox.
//!
//! ```text
//! check ─► Opened::of(spec) ─► sandbox ─► assembly::build(spec, opened) ─► vCPUs run
//!          paths become          no path    makes memory, threads, devices
//!          descriptors           any more
//! ```
//!
//! **The rule.** Nothing here makes a thread, since a sandbox is entered by one thread and inherited by those that
//! it makes. Nothing after it opens a path: what a machine needs later (a disk that is plugged in, a snapshot's
//! files) is opened by whoever asks for it, and comes with the request as descriptors (`api`).

use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use atoll_devices::console::ConsoleEnd;
use atoll_devices::virtio::vhost_user::BackendOptions;
use atoll_devices::virtio::vsock::VhostVsockFile;
use atoll_vmm_protocol::services::VhostUserSocket;
use atoll_vmm_protocol::spec::{BootSpec, MachineSpec};

use super::arrival::Awaited;
use super::assembly::BuildError;
use super::belongings::{self, Belongings};
use super::devices::KINDS;
use super::{Options, RunError, Start};
use crate::api::ApiSocket;
use crate::board::Board;
use crate::flash::FirmwareFiles;
use crate::kvm::Kvm;
use crate::kvm::cpu::{self, GuestCpu};
use crate::loader::BootFiles;
use crate::memory::UserFault;
use crate::memory::filling::FillingError;
use crate::resources::{CardEnd, Medium};
use crate::saved::image::Touched;

/// What the host gives to one machine. Each row of [`KINDS`] fills its fields, and later takes them out in the
/// same order.
pub(super) struct Opened {
    pub(super) kvm: Arc<Kvm>,
    /// The guest's CPU; absent when a saved machine brings its own.
    pub(super) cpu: Option<GuestCpu>,
    /// The kernel that is loaded directly, or firmware.
    pub(super) boot_files: Option<BootFiles>,
    pub(super) firmware: Option<FirmwareFiles>,
    /// Its second number is the process's resident pages (proc(5)); absent where there is no /proc.
    pub(super) statm: Option<File>,
    /// What must be reached by path while the machine runs, because the guest says when (sockets that it connects
    /// to). Absolute.
    pub(super) directories: Vec<PathBuf>,
    pub(super) touched: Option<Arc<Touched>>,
    /// For memory that is read while the guest runs.
    pub(super) faults: Option<UserFault>,
    /// In the spec's order; `None` for a drive without a disc.
    pub(super) disks: VecDeque<Option<Medium>>,
    /// In the spec's order.
    pub(super) nets: VecDeque<CardEnd>,
    pub(super) console: Option<ConsoleEnd>,
    /// In the spec's order.
    pub(super) ports: VecDeque<ConsoleEnd>,
    pub(super) vsock: Option<VsockEnd>,
    /// Connected with the processes that serve them, in the spec's order; file systems come first.
    pub(super) filesystems: VecDeque<BackendOptions>,
    pub(super) vhost_user: VecDeque<BackendOptions>,
    pub(super) serial: Option<ConsoleEnd>,
    /// What came from the process that had the machine before: nothing else is opened then.
    inherited: Option<Belongings>,
    /// What of that is taken when that process has held the guest; absent where there is none.
    pub(super) awaited: Option<Awaited>,
    /// For the process that has it next; absent where that cannot be.
    pub(super) kept: Option<Belongings>,
}

/// A socket device's end.
pub(super) enum VsockEnd {
    Socket(UnixListener),
    Kernel(VhostVsockFile),
}

impl Opened {
    /// What is called `name`: opened, or from the process that had it before. The spec may be that process's, too, so that
    /// no path in it is opened then.
    pub(super) fn obtain<E: Into<BuildError>>(
        &mut self,
        name: &str,
        open: impl FnOnce() -> Result<Vec<OwnedFd>, E>,
    ) -> Result<VecDeque<OwnedFd>, BuildError> {
        let files = match &mut self.inherited {
            Some(inherited) => {
                let files = inherited.take(name);
                files.ok_or_else(|| BuildError::device(name)("it has not come along"))?
            }
            None => open().map_err(Into::into)?,
        };
        if let Some(kept) = &mut self.kept {
            kept.keep(name, &files);
        }
        Ok(files.into())
    }

    /// Whether another process had the machine before, whose descriptors these are.
    pub(super) fn is_inherited(&self) -> bool {
        self.inherited.is_some()
    }

    /// For what is taken later, of a machine that another process has.
    pub(super) fn awaited(&mut self, note: impl FnOnce(&mut Awaited)) {
        if let Some(awaited) = &mut self.awaited {
            note(awaited);
        }
    }

    /// Has a directory stay reachable.
    pub(super) fn keep(&mut self, directory: &Path) {
        if !self.directories.iter().any(|kept| kept == directory) {
            self.directories.push(directory.to_owned());
        }
    }

    /// Has another process's socket stay reachable, when the next one at its place is wanted as well.
    pub(super) fn keep_for(&mut self, socket: &VhostUserSocket) {
        if socket.reconnect {
            self.keep(socket.path.parent().unwrap_or(Path::new("/")));
        }
    }

    /// The machine's resets copy its kernel: RAM is no memory that something may be mapped over.
    pub(super) fn share_no_kernel(&mut self) {
        if let Some(files) = &mut self.boot_files {
            files.copy();
        }
    }

    /// Opens what the spec names, and binds the control API's socket.
    pub(super) fn of(
        spec: &MachineSpec,
        options: &Options,
        start: &Start,
        mut inherited: Option<Belongings>,
    ) -> Result<(Self, Option<ApiSocket>), RunError> {
        let kvm = match start.kvm() {
            Some(open) => open,
            None => Arc::new(Kvm::open().map_err(BuildError::from)?),
        };
        let cpu = match start {
            Start::PowerOn => Some(guest_cpu(spec, &kvm)?),
            Start::Saved(_) | Start::Coming(_) => None,
        };
        let api = inherited
            .as_mut()
            .and_then(|them| them.take_one(belongings::API));
        let awaited = inherited.is_some().then(|| Awaited::new(kvm.clone()));
        let faults = start.is_lazy().then(UserFault::open).transpose();
        let mut opened = Self {
            faults: faults.map_err(|error| BuildError::from(FillingError::from(error)))?,
            boot_files: None,
            firmware: None,
            kvm,
            cpu,
            statm: File::open("/proc/self/statm").ok(),
            touched: Touched::open().map(Arc::new),
            directories: Vec::new(),
            disks: VecDeque::new(),
            nets: VecDeque::new(),
            console: None,
            ports: VecDeque::new(),
            vsock: None,
            filesystems: VecDeque::new(),
            vhost_user: VecDeque::new(),
            serial: None,
            inherited,
            awaited,
            kept: belongings::has_shared_memory(spec).then(Belongings::default),
        };
        opened.open_boot(spec, start)?;
        for kind in KINDS {
            (kind.open)(spec, &mut opened)?;
        }
        let socket = options.api_socket.as_deref().map(|path| match api {
            Some(listener) => ApiSocket::of(OwnedFd::from(listener).into(), path),
            None => ApiSocket::open(path),
        });
        let socket = socket.transpose()?;
        if let (Some(kept), Some(socket)) = (&mut opened.kept, &socket) {
            kept.keep(belongings::API, [socket]);
        }
        Ok((opened, socket))
    }

    /// What the machine boots from.
    fn open_boot(&mut self, spec: &MachineSpec, start: &Start) -> Result<(), BuildError> {
        match &spec.boot {
            BootSpec::Kernel(kernel) => {
                let files = self.obtain("kernel", || BootFiles::files(kernel))?;
                let mut files = BootFiles::take(files, kernel)?;
                if kernel.shared && !self.is_inherited() {
                    share(&mut files, start)?;
                }
                self.boot_files = Some(files);
            }
            BootSpec::Firmware(firmware) => {
                let files = self.obtain("firmware", || FirmwareFiles::files(firmware))?;
                self.firmware = Some(FirmwareFiles::take(files, firmware)?);
            }
        }
        Ok(())
    }
}

/// Has a kernel shared. A machine that brings its memory does so from its next reset on, or else without.
fn share(files: &mut BootFiles, start: &Start) -> Result<(), BuildError> {
    match (files.share(), start) {
        (Err(error), Start::Saved(_) | Start::Coming(_)) => {
            let error = atoll_disk::chain(&error);
            tracing::warn!(error, "this host shares no kernel with the machine");
            Ok(())
        }
        (shared, _) => Ok(shared?),
    }
}

/// The CPU that the spec asks for, if this host can give it.
fn guest_cpu(spec: &MachineSpec, kvm: &Kvm) -> Result<GuestCpu, BuildError> {
    let ram_end = Board::of(spec.profile).ram_end(spec.memory_mib << 20);
    Ok(cpu::resolve(&spec.cpu, kvm.cpu()?, ram_end)?)
}

/// For a row that takes out what it has put in.
pub(super) const WAS_OPENED: &str = "the row's `open` has put one in for each device of the spec";

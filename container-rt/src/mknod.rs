// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Device nodes that an unprivileged container makes itself: the kernel lets nobody do so in a user namespace, but some
//! devices harm nobody, and tools such as debootstrap and docker want them. The container's seccomp filter asks about
//! mknod(2) of devices (SCMP_ACT_NOTIFY); its monitor is the agent that answers:
//!
//! ```text
//! process: mknod ─► kernel waits ─► monitor: path and numbers ─► harmless? ─no──► the kernel goes on, and refuses
//!                                                                   └─yes─► a child in the process's mount namespace,
//!                                          root, folder, umask and ids makes the node: its error is the call's answer
//! ```
//!
//! The child has the process's file system ids and no capability but CAP_MKNOD, so that it reaches nothing that the
//! process could not write to. Whether the node can be opened is a matter of the device list and of the mount (`nodev`).

use std::ffi::{CString, OsStr};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use caps::{CapSet, Capability};
use libseccomp::{ScmpNotifReq, ScmpNotifResp, ScmpNotifRespFlags, ScmpSyscall, notify_id_valid};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::stat::{Mode, SFlag, makedev, mknod, umask};
use nix::unistd::{Gid, Uid, chroot, fchdir, setfsgid, setfsuid, setgroups};
use oci_spec::runtime::{LinuxNamespaceType, Spec};

use crate::bundle::wrong;
use crate::error::{Context, Error, Result};
use crate::mounts::within_limit;
use crate::process::ProcessFd;
use crate::{console, terminal};

/// That the monitor is the agent of the filter's listener, which has a `listenerPath` that does not exist yet.
pub const ANNOTATION: &str = "dev.atoll.mknod";

/// Character devices without any state of the host: null, zero, full, random, urandom, tty, ptmx. Numbers of
/// Documentation/admin-guide/devices.txt.
const HARMLESS: [(u64, u64); 7] = [(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 2)];

/// Longest path with its end: PATH_MAX of limits.h.
const PATH_BYTES_MAX: usize = 4096;

/// Longest work on one call: a file system of the container's own (FUSE) may never answer.
const CALL_LIMIT: Duration = Duration::from_secs(5);

/// Longest wait for the listener after its connection.
const HANDOVER_LIMIT: Duration = Duration::from_secs(5);

/// Filters at a time: the init's, and one for each process that was executed in the container and its children.
const FILTERS_MAX: usize = 256;

/// Whether config.json asks for it.
pub(crate) fn is_wanted(spec: &Spec) -> bool {
    let annotations = spec.annotations().as_ref();
    annotations.is_some_and(|a| a.get(ANNOTATION).is_some_and(|text| text == "1"))
}

/// The agent of one container.
#[derive(Debug)]
pub(crate) struct Agent {
    listener: UnixListener,
    path: PathBuf,
    filters: Vec<OwnedFd>,
}

impl Agent {
    /// Listens where the container's filter will look for its agent. `None` when it has none of ours.
    pub(crate) fn listen(spec: &Spec) -> Result<Option<Self>> {
        if !is_wanted(spec) {
            return Ok(None);
        }
        let field = format!("annotations[{ANNOTATION}]");
        let linux = spec.linux().as_ref();
        let namespaces = linux.and_then(|linux| linux.namespaces().as_ref());
        let is_user = |n: &oci_spec::runtime::LinuxNamespace| n.typ() == LinuxNamespaceType::User;
        if !namespaces.is_some_and(|all| all.iter().any(is_user)) {
            return Err(wrong(&field, "a privileged container needs no help"));
        }
        let filter = linux.and_then(|linux| linux.seccomp().as_ref());
        let path = filter.and_then(|filter| filter.listener_path().clone());
        let path = path.ok_or_else(|| wrong(&field, "linux.seccomp.listenerPath is missing"))?;
        // Left by a monitor that was killed.
        std::fs::remove_file(&path).ok();
        let listener = console::in_directory(&path, |path| UnixListener::bind(path))?;
        listener.set_nonblocking(true).at("listen at", &path)?;
        Ok(Some(Self {
            listener,
            path,
            filters: Vec::new(),
        }))
    }

    /// What to wait for.
    pub(crate) fn poll_fds(&self) -> Vec<PollFd<'_>> {
        let fds = self.filters.iter().map(AsFd::as_fd);
        std::iter::once(self.listener.as_fd())
            .chain(fds)
            .map(|fd| PollFd::new(fd, PollFlags::POLLIN))
            .collect()
    }

    /// Answers what waits for an answer.
    pub(crate) fn serve(&mut self) {
        while let Ok((stream, _)) = self.listener.accept() {
            let timeout = stream.set_read_timeout(Some(HANDOVER_LIMIT));
            if let (Ok(()), Ok(filter)) = (timeout, terminal::receive_fd(&stream))
                && self.filters.len() < FILTERS_MAX
            {
                self.filters.push(filter);
            }
        }
        self.filters.retain(|filter| {
            let mut polled = [PollFd::new(filter.as_fd(), PollFlags::POLLIN)];
            if poll(&mut polled, PollTimeout::ZERO).is_err() {
                return true;
            }
            let seen = polled[0].revents().unwrap_or(PollFlags::empty());
            if seen.contains(PollFlags::POLLIN) {
                answer(filter);
            }
            // Nobody is left who has this filter.
            !seen.intersects(PollFlags::POLLHUP | PollFlags::POLLERR | PollFlags::POLLNVAL)
        });
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // Nobody can come any more.
        std::fs::remove_file(&self.path).ok();
    }
}

/// Takes one call and answers it. The process may be gone at any moment, which is no error.
fn answer(filter: &OwnedFd) {
    let Ok(request) = ScmpNotifReq::receive(filter.as_raw_fd()) else {
        return;
    };
    let none = ScmpNotifRespFlags::empty();
    let response = match decide(filter, &request) {
        Ok(Decision::Made) => ScmpNotifResp::new_val(request.id, 0, none),
        Ok(Decision::Kernel) => ScmpNotifResp::new_continue(request.id, none),
        Err(error) => {
            let number = error.raw_os_error().unwrap_or(libc::EIO);
            ScmpNotifResp::new_error(request.id, -number, none)
        }
    };
    response.respond(filter.as_raw_fd()).ok();
}

/// What becomes of a call.
enum Decision {
    /// The node is there.
    Made,
    /// The kernel decides as it does without us: by the process's own rights.
    Kernel,
}

/// The arguments of mknod(2) or mknodat(2), still in the process's terms.
struct Call {
    folder: Option<i32>,
    path: u64,
    mode: u32,
    device: u64,
}

impl Call {
    fn parse(request: &ScmpNotifReq) -> Option<Self> {
        let data = &request.data;
        let is =
            |name| ScmpSyscall::from_name_by_arch(name, data.arch).is_ok_and(|n| n == data.syscall);
        let (folder, rest) = if is("mknod") {
            (None, [data.args[0], data.args[1], data.args[2]])
        } else if is("mknodat") {
            // An int in a register of 64 bits.
            let folder = u32::try_from(data.args[0] & u64::from(u32::MAX)).ok()?;
            (
                Some(folder.cast_signed()),
                [data.args[1], data.args[2], data.args[3]],
            )
        } else {
            return None;
        };
        Some(Self {
            folder: folder.filter(|folder| *folder != libc::AT_FDCWD),
            path: rest[0],
            mode: u32::try_from(rest[1] & 0xffff).ok()?,
            device: rest[2] & u64::from(u32::MAX),
        })
    }

    /// Major and minor number, if the kernel would make a harmless node. The call has them in the kernel's form of 32
    /// bits: linux/kdev_t.h, new_decode_dev.
    fn harmless(&self) -> Option<(u64, u64)> {
        let (major, minor) = (
            (self.device & 0xf_ff00) >> 8,
            (self.device & 0xff) | ((self.device >> 12) & 0xf_ff00),
        );
        let is_character = self.mode & libc::S_IFMT == libc::S_IFCHR;
        (is_character && HARMLESS.contains(&(major, minor))).then_some((major, minor))
    }
}

fn decide(filter: &OwnedFd, request: &ScmpNotifReq) -> io::Result<Decision> {
    let Some(call) = Call::parse(request) else {
        return Ok(Decision::Kernel);
    };
    let Some(device) = call.harmless() else {
        return Ok(Decision::Kernel);
    };
    let process = Process::open(request.pid, call.folder)?;
    let path = process.path(call.path)?;
    // Until here the number may have become another process's; what is open now belongs to the caller.
    notify_id_valid(filter.as_raw_fd(), request.id)
        .map_err(|_| io::Error::from_raw_os_error(libc::ESRCH))?;
    if !process.may_make {
        return Ok(Decision::Kernel);
    }
    within_limit(&process.fd, CALL_LIMIT, || {
        process.make(&path, call.mode, device)
    })?;
    Ok(Decision::Made)
}

/// The process that called.
struct Process {
    fd: ProcessFd,
    memory: File,
    root: File,
    folder: File,
    uid: Uid,
    gid: Gid,
    groups: Vec<Gid>,
    mask: Mode,
    /// It has CAP_MKNOD in its user namespace.
    may_make: bool,
}

impl Process {
    fn open(pid: u32, folder: Option<i32>) -> io::Result<Self> {
        let at = |name: &str| PathBuf::from(format!("/proc/{pid}/{name}"));
        let place = |path: &Path| {
            let flags = libc::O_PATH | libc::O_DIRECTORY;
            File::options().read(true).custom_flags(flags).open(path)
        };
        let folder = match folder {
            None => at("cwd"),
            Some(number) => at(&format!("fd/{number}")),
        };
        let status = std::fs::read_to_string(at("status"))?;
        // proc(5): "Name:\tvalues", of ids the real, effective, saved and file system one.
        let values = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.map(|line| line.split_ascii_whitespace().collect::<Vec<_>>())
        };
        let missing = || io::Error::other("the process tells too little of itself");
        let id = |name: &str| values(name)?.get(3)?.parse().ok();
        let number = |name: &str, radix: u32| {
            let values = values(name)?;
            u64::from_str_radix(values.first()?, radix).ok()
        };
        let groups = values("Groups:").unwrap_or_default();
        let groups = groups.iter().filter_map(|group| group.parse().ok());
        let mask = number("Umask:", 8).and_then(|mask| u32::try_from(mask).ok());
        let effective = number("CapEff:", 16).ok_or_else(missing)?;
        Ok(Self {
            fd: ProcessFd::of_child(pid.cast_signed()).map_err(io::Error::other)?,
            memory: File::open(at("mem"))?,
            root: place(&at("root"))?,
            folder: place(&folder).map_err(|_| io::Error::from_raw_os_error(libc::EBADF))?,
            uid: Uid::from_raw(id("Uid:").ok_or_else(missing)?),
            gid: Gid::from_raw(id("Gid:").ok_or_else(missing)?),
            groups: groups.map(Gid::from_raw).collect(),
            mask: Mode::from_bits_truncate(mask.ok_or_else(missing)?),
            may_make: effective & Capability::CAP_MKNOD.bitmask() != 0,
        })
    }

    /// The path at an address of its memory.
    fn path(&self, address: u64) -> io::Result<PathBuf> {
        let fault = || io::Error::from_raw_os_error(libc::EFAULT);
        let mut bytes = vec![0; PATH_BYTES_MAX];
        let mut count = 0;
        // What lies behind the path may not be mapped: read to the end of each page.
        while count < bytes.len() {
            let place = address.checked_add(count as u64).ok_or_else(fault)?;
            let in_page = 4096 - usize::try_from(place % 4096).map_err(|_| fault())?;
            let end = bytes.len().min(count + in_page);
            let read = self.memory.read_at(&mut bytes[count..end], place);
            let read = read.map_err(|_| fault())?;
            if let Some(length) = bytes[count..count + read]
                .iter()
                .position(|byte| *byte == 0)
            {
                bytes.truncate(count + length);
                return match CString::new(bytes).map(CString::into_bytes) {
                    Ok(bytes) if !bytes.is_empty() => Ok(PathBuf::from(OsStr::from_bytes(&bytes))),
                    _ => Err(io::Error::from_raw_os_error(libc::ENOENT)),
                };
            }
            if read == 0 {
                return Err(fault());
            }
            count += read;
        }
        Err(io::Error::from_raw_os_error(libc::ENAMETOOLONG))
    }

    /// In a child that is in the process's mount namespace: becomes like the process, and makes the node.
    fn make(&self, path: &Path, mode: u32, (major, minor): (u64, u64)) -> io::Result<()> {
        fchdir(&self.root)?;
        chroot(".")?;
        fchdir(&self.folder)?;
        umask(self.mask);
        setgroups(&self.groups)?;
        setfsgid(self.gid);
        setfsuid(self.uid);
        // A file system id that is not root's takes the capabilities on files away; this one comes back.
        let only = std::iter::once(Capability::CAP_MKNOD).collect();
        caps::set(None, CapSet::Effective, &only).map_err(io::Error::other)?;
        let mode = Mode::from_bits_truncate(mode & 0o7777);
        Ok(mknod(path, SFlag::S_IFCHR, mode, makedev(major, minor))?)
    }
}

/// Refuses what asks where nobody answers: a container without a monitor.
pub fn needs_monitor(spec: &Spec) -> Result<()> {
    match is_wanted(spec) {
        true => Err(Error::Argument(format!(
            "annotations[{ANNOTATION}]: the monitor makes the nodes: create the container with --monitor"
        ))),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_harmless_devices() {
        let call = |mode, device| Call {
            folder: None,
            path: 0,
            mode,
            device,
        };
        let character = libc::S_IFCHR | 0o666;
        assert_eq!(call(character, 0x103).harmless(), Some((1, 3)));
        assert_eq!(call(character, 0x502).harmless(), Some((5, 2)));
        for (mode, device) in [
            (character, 0x10b),
            (character, 0x101),
            (character, 0),
            (libc::S_IFBLK | 0o666, 0x103),
            (libc::S_IFREG | 0o666, 0x103),
            // Minor 0x103 and major 0x1001: the upper bits count.
            (character, 0x0010_0103),
            (character, 0x0010_0000 | 0x103),
        ] {
            assert_eq!(call(mode, device).harmless(), None, "{mode:o} {device:x}");
        }
    }
}

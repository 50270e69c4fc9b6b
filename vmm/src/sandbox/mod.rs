// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! What a guest that has taken over this process can still reach: nothing but the descriptors that the machine was
//! given.
//!
//! ```text
//! Opened::of ─► enter: jail, landlock ─► arm: handler, starter ─► threads, each with its filter ─► guest runs
//! ```
//!
//! | layer | for whom | what it takes away |
//! |---|---|---|
//! | `jail` | started by root | the file system (an empty read-only root), the network, IPC and host name (own namespaces), the user (a uid of its own), capabilities, core dumps |
//! | `landlock` | everybody, where the kernel has it | every path, TCP, abstract sockets, signals to others |
//! | `seccomp` | everybody | system calls, by kind of thread (`filters`) |
//!
//! No PID namespace: only a child could enter it, and then two processes would be the machine; signals to others are
//! denied by landlock, seccomp and the uid. The control group is the caller's, who limits it (`--cgroup`, `atolld`).
//! There is no limit on the size of files (RLIMIT_FSIZE): those that the process can grow are the guest's disks, and
//! may be resized while it runs.

mod filters;
mod jail;
mod names;
mod program;
mod seccomp;

pub(crate) use seccomp::keep_one_heap;

use std::io;
use std::os::fd::RawFd;
use std::path::PathBuf;

use atoll_thread::Kind;

/// Exit code of a process that made a denied system call.
pub const DENIED_EXIT_CODE: i32 = 4;
/// Without `--uid`, root's machines run as this number plus their process's: no two at a time are the same user.
/// Above every range that distributions and container managers assign, below the two numbers that are reserved.
pub const UID_BASE: u32 = 4_290_000_000;

/// How the process that runs a machine is confined. The default is not at all: the process is not the machine's alone.
#[derive(Debug, Clone, Default)]
pub struct Confinement {
    /// Jail and landlock, and the user to become there; `None` leaves both out.
    pub sandbox: Option<Identity>,
    /// What happens with a system call that a thread's filter denies.
    pub seccomp: Seccomp,
    /// Descriptor of the log, for the line that names a denied call; standard error when absent.
    pub log: Option<RawFd>,
}

/// The user that a machine runs as, if root starts it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// User number, real, effective and saved.
    pub uid: u32,
    /// Group number, the only group that is left.
    pub gid: u32,
}

impl Identity {
    /// That of this process.
    #[must_use]
    pub fn current() -> Self {
        Self {
            uid: rustix::process::geteuid().as_raw(),
            gid: rustix::process::getegid().as_raw(),
        }
    }

    /// What was asked for, or a number of its own for this process.
    #[must_use]
    pub fn new(uid: Option<u32>, gid: Option<u32>) -> Self {
        let own = UID_BASE.saturating_add(std::process::id());
        let uid = uid.unwrap_or(own);
        Self {
            uid,
            gid: gid.unwrap_or(uid),
        }
    }
}

/// What happens when a thread makes a system call that its filter denies.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Seccomp {
    /// There are no filters.
    #[default]
    Off,
    /// It is carried out; the kernel's log (audit) names process and number. For finding out what a filter lacks.
    Log,
    /// One line in the log names it, and the process ends with [`DENIED_EXIT_CODE`].
    On,
}

/// Why the process could not be confined. Every one of these is before the guest's first instruction.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// A step of the jail.
    #[error("sandbox: {what} (--sandbox off starts without one)")]
    Jail {
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// A directory that stays reachable.
    #[error("sandbox: keep {path} reachable")]
    Directory {
        /// Which.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// Landlock is there and refuses.
    #[error("sandbox: landlock (--sandbox off starts without it)")]
    Landlock(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The handler that names denied calls.
    #[error("prepare for denied system calls")]
    Handler(#[source] io::Error),
    /// The thread that makes all others.
    #[error("start the thread that makes threads")]
    Starter(#[source] io::Error),
}

/// Puts the process behind jail and landlock, for good, and makes every later thread get its filter. Called when
/// everything is open and no thread but the caller exists. `directories` stay reachable at their own paths.
pub fn enter(confinement: &Confinement, directories: &[PathBuf]) -> Result<(), SandboxError> {
    // Looked up once: by a call that no filter allows, before Linux 6.4 in a file that the jail does not have.
    let _ = rustix::param::page_size();
    if let Some(identity) = confinement.sandbox {
        jail::enter(identity, directories)?;
    }
    let log = confinement.log.unwrap_or(libc::STDERR_FILENO);
    seccomp::arm(confinement.seccomp, log)
}

/// Compiles the filters that [`seal_starter`], [`seal_owner`] and later threads need, for whoever has no time then.
pub(crate) fn prepare() {
    if seccomp::is_armed() {
        seccomp::prepare();
    }
}

/// The machine is built and all threads of its start exist: the starter gets its filter, before any later job.
pub(crate) fn seal_starter() {
    if seccomp::is_armed() {
        atoll_thread::seal_starter();
    }
}

/// The last filter: that of the calling thread, which owns the machine.
pub(crate) fn seal_owner() {
    if seccomp::is_armed() {
        seccomp::enter(Kind::Owner);
    }
}

/// The same in a process that has no machine: the calling thread does the work of `kind`, and makes threads of it.
pub fn seal(kind: Kind) {
    if seccomp::is_armed() {
        seal_starter();
        seccomp::enter(kind);
    }
}

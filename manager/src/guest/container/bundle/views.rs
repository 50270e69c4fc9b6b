// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! What a container sees of memory, CPUs and load in `/proc`: its own, by Debian's `lxcfs`, a FUSE daemon whose files
//! are bound over the kernel's. Without it they tell the host's. It counts CPUs by the cpuset; those of a quota, which the
//! keys `cores` and `cpulimit` set, with its option `--enable-cfs`, and load with `--enable-loadavg`: a drop-in of its
//! unit gives it both.
//!
//! The daemon is the host's: its package's unit starts it, and reloads it on updates, which keeps what is bound. What is
//! bound of one that was restarted or died is dead; `container::lxcfs` mends that while containers run. A container that
//! starts while it does not answer gets none.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};

/// Files of lxcfs below its folder and, with a slash before, in the container.
const FILES: &[&str] = &[
    "proc/cpuinfo",
    "proc/diskstats",
    "proc/loadavg",
    "proc/meminfo",
    "proc/stat",
    "proc/swaps",
    "proc/uptime",
    "sys/devices/system/cpu/online",
];

/// Longest wait for an answer of lxcfs: a daemon that hangs holds up no start.
const ANSWER_MAX: Duration = Duration::from_secs(2);

/// The files that lxcfs, mounted at `folder`, has. One that does not answer has none.
pub(super) async fn find(folder: &Path) -> Vec<PathBuf> {
    let folder = folder.to_owned();
    let found = tokio::task::spawn_blocking(move || look(&folder));
    match tokio::time::timeout(ANSWER_MAX, found).await {
        Ok(found) => found.unwrap_or_default(),
        Err(_) => Vec::new(),
    }
}

fn look(folder: &Path) -> Vec<PathBuf> {
    // Reading, since a dead one's files can still be looked up for a moment.
    if std::fs::read(folder.join("proc/meminfo")).is_err() {
        return Vec::new();
    }
    let paths = FILES.iter().map(|name| folder.join(name));
    paths.filter(|path| path.exists()).collect()
}

/// The mounts that show them. A container with containers inside keeps a whole proc and sysfs aside, as liblxc does:
/// the kernel lets it mount others only as long as it sees one that nothing lies over (`mount_too_revealing` in Linux
/// `fs/namespace.c`).
pub(super) fn mounts(views: &[PathBuf], has_nesting: bool) -> Vec<Value> {
    if views.is_empty() {
        return Vec::new();
    }
    let mut mounts = Vec::new();
    if has_nesting {
        for kind in ["proc", "sysfs"] {
            mounts.push(json!({
                "destination": format!("/dev/.lxc/{}", kind.trim_end_matches("fs")), "type": kind, "source": kind,
                "options": ["nosuid", "noexec", "nodev"],
            }));
        }
    }
    for name in FILES {
        if let Some(source) = views.iter().find(|view| view.ends_with(name)) {
            mounts.push(json!({
                "destination": format!("/{name}"), "type": "bind", "source": source,
                "options": ["bind", "nosuid", "noexec", "nodev"],
            }));
        }
    }
    mounts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_daemon_that_hangs_is_none() {
        let folder = tempfile::tempdir().unwrap();
        let proc = folder.path().join("proc");
        std::fs::create_dir(&proc).unwrap();
        std::fs::write(proc.join("meminfo"), "MemTotal: 1 kB\n").unwrap();
        assert_eq!(find(folder.path()).await, [proc.join("meminfo")]);
        // Opening a FIFO waits until somebody writes to it.
        let file = proc.join("meminfo");
        std::fs::remove_file(&file).unwrap();
        let mode = rustix::fs::Mode::RUSR;
        rustix::fs::mknodat(rustix::fs::CWD, &file, rustix::fs::FileType::Fifo, mode, 0).unwrap();
        assert!(find(folder.path()).await.is_empty());
        // The thread that waits goes before the runtime does.
        drop(std::fs::File::options().write(true).open(&file).unwrap());
    }
}

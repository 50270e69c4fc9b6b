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

/// The files that lxcfs, mounted at `folder`, has. One that does not answer has none.
pub(super) fn find(folder: &Path) -> Vec<PathBuf> {
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

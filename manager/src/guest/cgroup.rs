// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Control groups of guests, `/atoll/vm-100` and `/atoll/ct-101`, on a pure v2 host and on v1 (also the hybrid
//! kind, whose v2 half has no controllers).
//!
//! A machine's group is made here; a container's by `atoll-ct`. Usage is read from both in the same way.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Where control groups are mounted.
const ROOT: &str = "/sys/fs/cgroup";
/// Parent of every guest's group.
const PARENT: &str = "atoll";
/// v1 hierarchies that a machine is put into; one that is not mounted is left out.
const V1_HIERARCHIES: [&str; 5] = ["cpu", "cpuacct", "memory", "blkio", "pids"];
/// v2 controllers that are switched on for guests.
const V2_CONTROLLERS: &str = "+cpu +memory +io +pids";

/// How often, and after which pauses, a busy group is tried again: a killed process leaves it a moment later.
const REMOVE_ATTEMPTS: u32 = 40;
const REMOVE_PAUSE: Duration = Duration::from_millis(25);

/// What the processes of a group have used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// CPU time since the group was made, in nanoseconds.
    pub cpu_ns: u64,
    /// Memory without the page cache that the kernel would give back first, in bytes.
    pub memory_bytes: u64,
    /// Bytes read from block devices.
    pub read_bytes: u64,
    /// Bytes written to block devices.
    pub written_bytes: u64,
}

/// A guest's group.
#[derive(Debug, Clone)]
pub struct Group {
    name: String,
}

impl Group {
    /// The group of that name below our parent, whether it exists or not.
    pub fn new(name: impl Into<String>) -> Self {
        Self { name: name.into() }
    }

    /// Its path from the root of a hierarchy, `/atoll/vm-100`.
    pub fn path(&self) -> String {
        format!("/{PARENT}/{}", self.name)
    }

    /// Makes the group and puts a process into it. On a host that has none of the hierarchies this does nothing:
    /// a guest without accounting is better than no guest.
    pub fn adopt(&self, pid: u32) -> io::Result<()> {
        for folder in self.folders() {
            std::fs::create_dir_all(&folder)?;
            std::fs::write(folder.join("cgroup.procs"), pid.to_string())?;
        }
        Ok(())
    }

    /// Whether a process is in this group, by /proc.
    pub fn contains(&self, pid: u32) -> bool {
        let path = self.path();
        let below = format!("{path}/");
        let text = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
        text.lines().any(|line| {
            let group = line.splitn(3, ':').nth(2).unwrap_or_default();
            group == path || group.starts_with(&below)
        })
    }

    /// Removes the group and what a guest made below it, as soon as its last process is gone. What cannot be
    /// removed for a second is left for the next time.
    pub async fn remove(&self) {
        for _ in 0..REMOVE_ATTEMPTS {
            if self.try_remove() {
                return;
            }
            tokio::time::sleep(REMOVE_PAUSE).await;
        }
        tracing::warn!(group = self.path(), "control group is busy");
    }

    fn try_remove(&self) -> bool {
        let mut folders = self.folders();
        folders.extend(
            mounted(&["freezer", "devices", "cpuset", "systemd", "unified"])
                .map(|root| root.join(PARENT).join(&self.name)),
        );
        folders.iter().for_each(|folder| remove_tree(folder));
        folders.iter().all(|folder| !folder.exists())
    }

    /// What its processes have used; zeros when there is no such group.
    pub fn usage(&self) -> Usage {
        if is_v2() {
            usage_v2(&Path::new(ROOT).join(PARENT).join(&self.name))
        } else {
            usage_v1(|hierarchy| {
                Path::new(ROOT)
                    .join(hierarchy)
                    .join(PARENT)
                    .join(&self.name)
            })
        }
    }

    fn folders(&self) -> Vec<PathBuf> {
        if is_v2() {
            let parent = Path::new(ROOT).join(PARENT);
            // A controller that this kernel lacks must not keep the others off: one write each.
            if std::fs::create_dir_all(&parent).is_ok() {
                for controller in V2_CONTROLLERS.split(' ') {
                    for folder in [Path::new(ROOT), &parent] {
                        let _ = std::fs::write(folder.join("cgroup.subtree_control"), controller);
                    }
                }
            }
            return vec![parent.join(&self.name)];
        }
        mounted(&V1_HIERARCHIES)
            .map(|root| root.join(PARENT).join(&self.name))
            .collect()
    }
}

fn is_v2() -> bool {
    Path::new(ROOT).join("cgroup.controllers").exists()
}

fn mounted<'a>(hierarchies: &'a [&'a str]) -> impl Iterator<Item = PathBuf> + 'a {
    hierarchies
        .iter()
        .map(|hierarchy| Path::new(ROOT).join(hierarchy))
        .filter(|path| path.join("cgroup.procs").exists())
}

/// Removes a group after its children.
fn remove_tree(folder: &Path) {
    if let Ok(entries) = std::fs::read_dir(folder) {
        for entry in entries.flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                remove_tree(&entry.path());
            }
        }
    }
    let _ = std::fs::remove_dir(folder);
}

fn usage_v2(folder: &Path) -> Usage {
    let memory = number(&folder.join("memory.current"));
    let inactive = keyed(&folder.join("memory.stat"), "inactive_file");
    let io = std::fs::read_to_string(folder.join("io.stat")).unwrap_or_default();
    let sum = |key: &str| {
        io.split_whitespace()
            .filter_map(|word| {
                word.strip_prefix(key)?
                    .strip_prefix('=')?
                    .parse::<u64>()
                    .ok()
            })
            .sum()
    };
    Usage {
        cpu_ns: keyed(&folder.join("cpu.stat"), "usage_usec").saturating_mul(1000),
        memory_bytes: memory.saturating_sub(inactive),
        read_bytes: sum("rbytes"),
        written_bytes: sum("wbytes"),
    }
}

fn usage_v1(folder: impl Fn(&str) -> PathBuf) -> Usage {
    let memory = folder("memory");
    let used = number(&memory.join("memory.usage_in_bytes"));
    let inactive = keyed(&memory.join("memory.stat"), "total_inactive_file");
    let path = folder("blkio").join("blkio.throttle.io_service_bytes_recursive");
    let io = std::fs::read_to_string(path).unwrap_or_default();
    let sum = |operation: &str| {
        io.lines()
            .filter_map(|line| {
                let mut words = line.split_whitespace().skip(1);
                (words.next()? == operation).then(|| words.next()?.parse::<u64>().ok())?
            })
            .sum()
    };
    Usage {
        cpu_ns: number(&folder("cpuacct").join("cpuacct.usage")),
        memory_bytes: used.saturating_sub(inactive),
        read_bytes: sum("Read"),
        written_bytes: sum("Write"),
    }
}

fn number(path: &Path) -> u64 {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.trim().parse().unwrap_or(0)
}

/// The value of a key in a file of `key value` lines.
fn keyed(path: &Path, key: &str) -> u64 {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.lines()
        .find_map(|line| {
            line.strip_prefix(key)?
                .strip_prefix(' ')?
                .trim()
                .parse()
                .ok()
        })
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(folder: &Path, files: &[(&str, &str)]) {
        for (name, text) in files {
            let path = folder.join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
    }

    const EXPECTED: Usage = Usage {
        cpu_ns: 5_000_000,
        memory_bytes: 900,
        read_bytes: 30,
        written_bytes: 12,
    };

    #[test]
    fn usage_of_v2() {
        let folder = tempfile::tempdir().unwrap();
        write(
            folder.path(),
            &[
                ("cpu.stat", "usage_usec 5000\nuser_usec 1\n"),
                ("memory.current", "1000\n"),
                ("memory.stat", "anon 5\ninactive_file 100\n"),
                (
                    "io.stat",
                    "8:0 rbytes=10 wbytes=12 rios=1\n7:0 rbytes=20 wbytes=0\n",
                ),
            ],
        );
        assert_eq!(usage_v2(folder.path()), EXPECTED);
    }

    #[test]
    fn usage_of_v1() {
        let folder = tempfile::tempdir().unwrap();
        write(
            folder.path(),
            &[
                ("cpuacct/cpuacct.usage", "5000000\n"),
                ("memory/memory.usage_in_bytes", "1000\n"),
                (
                    "memory/memory.stat",
                    "inactive_file 7\ntotal_inactive_file 100\n",
                ),
                (
                    "blkio/blkio.throttle.io_service_bytes_recursive",
                    "8:0 Read 10\n8:0 Write 12\n8:0 Total 22\n7:0 Read 20\nTotal 42\n",
                ),
            ],
        );
        assert_eq!(
            usage_v1(|hierarchy| folder.path().join(hierarchy)),
            EXPECTED
        );
    }

    #[tokio::test]
    async fn absent_groups_have_used_nothing() {
        let group = Group::new(format!("none-{}", std::process::id()));
        assert_eq!(group.usage(), Usage::default());
        group.remove().await;
        assert!(!group.contains(std::process::id()));
    }

    #[tokio::test]
    async fn a_process_is_put_into_its_group() {
        let group = Group::new(format!("test-{}", std::process::id()));
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        if let Err(error) = group.adopt(child.id()) {
            println!("ATOLL-SKIP: cannot make control groups here: {error}");
        } else if !group.folders().is_empty() {
            assert!(group.contains(child.id()));
            assert!(group.usage().memory_bytes < 1 << 30);
        }
        child.kill().unwrap();
        child.wait().unwrap();
        group.remove().await;
        assert!(group.folders().iter().all(|folder| !folder.exists()));
    }
}

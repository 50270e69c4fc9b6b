// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A container without a cgroup: its user may make none, or its caller wants none. It stays in its caller's, as runc and
//! crun leave it: it can have no limits, and what takes a cgroup is refused. Its processes end with the first of their
//! pid namespace; where that is not its own, they are found by the first one's mount namespace. What leaves that, or is
//! left when the first has ended by itself, gets away, as under crun.
//!
//! libcgroups has no such mode. For rootless callers it passes over refusals, but only of v2: so the container's cgroup
//! is said to be the one that we are in, and a v1 host's hierarchies are covered by a v2 one, in a mount namespace of
//! our own.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use oci_spec::runtime::{LinuxNamespaceType, Spec};
use serde_json::Value;

use super::{Kind, MOUNT_ROOT, Prepared, REMOVE_LIMIT, is_unified_host, own_path};
use crate::bundle::{has_own, wrong};
use crate::error::{Context, Error, Result};
use crate::process::ProcessFd;
use crate::sys::Pid;

const NO_TEXT: Option<&str> = None;

/// Goes without a cgroup, or refuses what cannot be had without; `why` there is none.
pub fn prepare(spec: &mut Spec, why: &str) -> Result<Prepared> {
    let Some(mut linux) = spec.linux().clone() else {
        return Err(wrong("linux", "is missing"));
    };
    let limits = serde_json::to_value(linux.resources()).unwrap_or_default();
    if let Some(name) = limit(&limits) {
        let reason = format!("there is no cgroup to limit it by: {why}");
        return Err(wrong(&format!("linux.resources.{name}"), reason));
    }
    if !has_own_pids(spec) && !has_own(spec, LinuxNamespaceType::Mount) {
        let what =
            "a pid or mount namespace of its own must hold the container's processes together";
        return Err(wrong("linux.namespaces", format!("{what}: {why}")));
    }
    // The device list with the rest: it, too, is a cgroup's.
    linux.set_resources(None);
    spec.set_linux(Some(linux));
    if !is_unified_host()? {
        cover()?;
        show_cover(spec);
    }
    let text =
        fs::read_to_string("/proc/self/cgroup").context(|| "read /proc/self/cgroup".to_owned())?;
    Ok(Prepared {
        path: PathBuf::from(own_path(&text, &Kind::Unified).unwrap_or("/")),
        directories: Vec::new(),
        unified: true,
        joined: Vec::new(),
        _scope: None,
    })
}

/// Whether all processes end with the container's first.
pub(crate) fn has_own_pids(spec: &Spec) -> bool {
    has_own(spec, LinuxNamespaceType::Pid)
}

/// The mount namespace of a container's processes, held, so that its number does not become another one's.
pub(crate) struct Together {
    /// As state.json keeps it.
    pub(crate) number: u64,
    _held: File,
}

impl Together {
    /// That of a process.
    pub(crate) fn of(init: Pid) -> Result<Self> {
        let path = PathBuf::from(format!("/proc/{init}/ns/mnt"));
        let held = File::open(&path).at("open", &path)?;
        let number = held.metadata().at("look at", &path)?.ino();
        Ok(Self {
            number,
            _held: held,
        })
    }

    /// The processes in it. They may come and go meanwhile.
    fn processes(&self) -> io::Result<Vec<ProcessFd>> {
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc")? {
            let name = entry?.file_name();
            let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else {
                continue;
            };
            // Once it is open, the number cannot become another process's.
            let process = ProcessFd::of_child(pid);
            let namespace = fs::metadata(format!("/proc/{pid}/ns/mnt"));
            if let (Ok(process), Ok(namespace)) = (process, namespace)
                && namespace.ino() == self.number
            {
                found.push(process);
            }
        }
        Ok(found)
    }

    /// Sends a signal to all. Answers whether there was any.
    pub(crate) fn signal(&self, signal: i32) -> Result<bool> {
        let all = self.processes();
        let all = all.context(|| "look for processes in /proc".to_owned())?;
        for process in &all {
            // It may have ended meanwhile.
            process.signal(signal).ok();
        }
        Ok(!all.is_empty())
    }

    /// Ends all.
    pub(crate) fn end(&self) -> Result<()> {
        let deadline = Instant::now() + REMOVE_LIMIT;
        while self.signal(libc::SIGKILL)? {
            if Instant::now() > deadline {
                let reason = "processes without a cgroup have not ended after SIGKILL";
                return Err(Error::Argument(reason.to_owned()));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }
}

/// The first setting that limits something, by its name; devices do not count.
fn limit(resources: &Value) -> Option<&str> {
    let settings = resources.as_object()?;
    let limits = settings
        .iter()
        .find(|(name, value)| *name != "devices" && is_set(value));
    limits.map(|(name, _)| name.as_str())
}

/// Engines write 0, -1 and empty lists for "no limit".
fn is_set(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => false,
        Value::Number(number) => !matches!(number.as_i64(), Some(0 | -1)),
        Value::Array(list) => !list.is_empty(),
        Value::Object(object) => object.values().any(is_set),
        Value::Bool(true) => true,
        Value::String(text) => !text.is_empty(),
    }
}

/// Covers a v1 host's hierarchies for this process and its children. The namespace of cgroups is what a user
/// namespace's root may mount.
fn cover() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWCGROUP)
        .map_err(std::io::Error::from)
        .context(|| "leave the caller's mount and cgroup namespaces".to_owned())?;
    let root = Path::new(MOUNT_ROOT);
    // The caller's namespace gets none of it.
    mount(NO_TEXT, root, NO_TEXT, MsFlags::MS_PRIVATE, NO_TEXT)
        .map_err(std::io::Error::from)
        .at("make private", root)?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC | MsFlags::MS_NODEV;
    mount(Some("cgroup2"), root, Some("cgroup2"), flags, NO_TEXT)
        .map_err(std::io::Error::from)
        .at("mount cgroup v2 over", root)
}

/// A container without a cgroup namespace sees the cover. libcontainer would look for where v2 was mounted first.
fn show_cover(spec: &mut Spec) {
    let linux = spec.linux().as_ref();
    let namespaces = linux.and_then(|linux| linux.namespaces().as_deref());
    if namespaces.is_some_and(|list| list.iter().any(|n| n.typ() == LinuxNamespaceType::Cgroup)) {
        return;
    }
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    for mount in &mut mounts {
        if mount.typ().as_deref() == Some("cgroup") {
            let mut options = mount.options().clone().unwrap_or_default();
            options.push("bind".to_owned());
            mount.set_typ(Some("bind".to_owned()));
            mount.set_source(Some(MOUNT_ROOT.into()));
            mount.set_options(Some(options));
        }
    }
    spec.set_mounts(Some(mounts));
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn limits_are_told_from_their_absence() {
        let none = json!({
            "devices": [{ "allow": false, "access": "rwm" }],
            "memory": { "limit": null, "disableOOMKiller": false, "swap": 0 },
            "pids": { "limit": -1 }, "hugepageLimits": [], "cpu": { "cpus": "" }, "unified": {},
        });
        assert_eq!(limit(&none), None);
        assert_eq!(limit(&Value::Null), None);
        for (name, value) in [
            ("pids", json!({ "limit": 7 })),
            ("memory", json!({ "swap": -1, "limit": 4096 })),
            ("cpu", json!({ "cpus": "0" })),
            ("unified", json!({ "memory.high": "1" })),
        ] {
            assert_eq!(limit(&json!({ (name): value })), Some(name));
        }
    }
}

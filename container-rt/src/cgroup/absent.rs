// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A rootless container whose user may make no cgroup. It stays in its caller's, as runc and crun leave it: it can have
//! no limits, and what finds its processes by the cgroup is refused. They all end with the first one, so it must have
//! a process id namespace of its own.
//!
//! libcgroups has no such mode. For rootless callers it passes over refusals, but only of v2: so the container's cgroup
//! is said to be the one that we are in, and a v1 host's hierarchies are covered by a v2 one, in a mount namespace of
//! our own.

use std::fs;
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use oci_spec::runtime::{LinuxNamespaceType, Spec};
use serde_json::Value;

use super::{Kind, MOUNT_ROOT, Prepared, is_unified_host, own_path};
use crate::bundle::wrong;
use crate::error::{Context, Error, Result};

const NO_TEXT: Option<&str> = None;

/// Goes without a cgroup, or refuses what cannot be had without; `refusal` is why there is none.
pub fn prepare(spec: &mut Spec, refusal: &Error) -> Result<Prepared> {
    let reason = |what: &str| format!("{what}: {}", crate::error::one_line(refusal));
    let Some(mut linux) = spec.linux().clone() else {
        return Err(wrong("linux", "is missing"));
    };
    let limits = serde_json::to_value(linux.resources()).unwrap_or_default();
    if let Some(name) = limit(&limits) {
        let what = "this user may make no cgroup to limit it by";
        return Err(wrong(&format!("linux.resources.{name}"), reason(what)));
    }
    let namespaces = linux.namespaces().as_deref().unwrap_or_default();
    let own = |n: &oci_spec::runtime::LinuxNamespace| {
        n.typ() == LinuxNamespaceType::Pid && n.path().is_none()
    };
    if !namespaces.iter().any(own) {
        let what = "a pid namespace of its own must end the container's processes, as this user may make no cgroup";
        return Err(wrong("linux.namespaces", reason(what)));
    }
    // The device list with the rest: nobody here can make a node.
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

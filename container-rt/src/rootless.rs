// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Rootless containers: the runtime is root of a user namespace that belongs to an ordinary user, as rootless podman
//! and `unshare --user --map-root-user --mount` call it. There is no privilege here that the user has not got: no
//! device node is made but bound, no BPF program is loaded, and where the user may make no cgroup the container has
//! none (`cgroup::absent`).
//!
//! A user outside of such a namespace gets one, in which he is root and nobody else is anybody: to map his own id takes
//! no privilege. Further ids are newuidmap's work, which engines have done before they call us. The container's own user
//! namespace is below it, and `exec` finds it as that one's parent:
//!
//! ```text
//!  the user ── his namespace: root is he ── the container's: linux.uidMappings
//!              create, run, exec            init
//! ```

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::sched::{CloneFlags, setns, unshare};
use oci_spec::runtime::{LinuxIdMapping, LinuxIdMappingBuilder, LinuxNamespaceType, Spec};

use crate::bundle::{has_own, wrong};
use crate::error::{Context, Error, Result};
use crate::lifecycle::Container;
use crate::sys;

/// The host's own user namespace: Linux, `PROC_USER_INIT_INO`.
const HOST: &str = "user:[4026531837]";

/// Refuses a caller who is root of nothing: [`become_root`] comes first.
pub(crate) fn require_root() -> Result<()> {
    if nix::unistd::geteuid().is_root() {
        return Ok(());
    }
    Err(Error::Argument(
        "run as root, or as root of a user namespace".to_owned(),
    ))
}

/// Makes an ordinary user root of a new user namespace, which has no other id: user_namespaces(7), "Defining user and
/// group ID mappings".
pub fn become_root() -> Result<()> {
    let (user, group) = (nix::unistd::geteuid(), nix::unistd::getegid());
    unshare(CloneFlags::CLONE_NEWUSER)
        .map_err(io::Error::from)
        .context(|| format!("make a user namespace for user {user}"))?;
    for (file, text) in [
        ("setgroups", "deny".to_owned()),
        ("uid_map", format!("0 {user} 1")),
        ("gid_map", format!("0 {group} 1")),
    ] {
        let path = Path::new("/proc/self").join(file);
        fs::write(&path, text).at("write", &path)?;
    }
    Ok(())
}

/// Makes an ordinary user root of the namespace from which he created a container. For one that has ended there is
/// nothing to do: it takes no process.
pub fn join_creator(container: &Container) -> Result<()> {
    let init = container.saved.init.filter(|init| init.is_alive());
    let Some(init) = init else {
        return Ok(());
    };
    let path = PathBuf::from(format!("/proc/{}/ns/user", init.pid));
    let mut namespace = OwnedFd::from(fs::File::open(&path).at("open", &path)?);
    if has_own(&container.spec()?, LinuxNamespaceType::User) {
        namespace = sys::parent_namespace(namespace.as_fd()).at("find the parent of", &path)?;
    }
    setns(namespace, CloneFlags::CLONE_NEWUSER)
        .map_err(io::Error::from)
        .at("join the creator's side of", &path)
}

/// In a namespace with the one id of its user a configuration may name that id as the host has it: who wrote it knew
/// nothing of the namespace. Other ids cannot be had.
pub(crate) fn settle_ids(spec: &mut Spec) -> Result<()> {
    let Some(mut linux) = spec.linux().clone() else {
        return Ok(());
    };
    if let Some(own) = single_id("uid_map") {
        let mut all = linux.uid_mappings_mut().iter_mut().flatten();
        all.try_for_each(|mapping| settle_id(mapping, own, "linux.uidMappings"))?;
    }
    if let Some(own) = single_id("gid_map") {
        let mut all = linux.gid_mappings_mut().iter_mut().flatten();
        all.try_for_each(|mapping| settle_id(mapping, own, "linux.gidMappings"))?;
    }
    spec.set_linux(Some(linux));
    Ok(())
}

fn settle_id(mapping: &mut LinuxIdMapping, own: u32, field: &str) -> Result<()> {
    if mapping.size() != 1 || ![0, own].contains(&mapping.host_id()) {
        let (first, size) = (mapping.host_id(), mapping.size());
        let reason = format!(
            "{size} ids from {first} on: this user has {own} alone; more take a namespace that newuidmap(1) has filled, \
             as rootless podman calls us in"
        );
        return Err(wrong(field, reason));
    }
    let builder = LinuxIdMappingBuilder::default();
    let builder = builder.container_id(mapping.container_id()).size(1_u32);
    *mapping = builder
        .host_id(0_u32)
        .build()
        .expect("a mapping needs no other field");
    Ok(())
}

/// What the host has for root of this namespace, when it has no other id.
fn single_id(file: &str) -> Option<u32> {
    let text = fs::read_to_string(Path::new("/proc/self").join(file)).ok()?;
    let fields: Vec<u32> = text
        .split_whitespace()
        .filter_map(|field| field.parse().ok())
        .collect();
    match fields[..] {
        [0, own, 1] => Some(own),
        _ => None,
    }
}

/// Whether we are in a user namespace that is not the host's.
pub(crate) fn in_user_namespace() -> bool {
    // A kernel without user namespaces has no such file.
    fs::read_link("/proc/self/ns/user").is_ok_and(|name| name.as_os_str() != HOST)
}

/// Whether the host has refused, as it refuses an ordinary user.
pub(crate) fn is_refusal(error: &Error) -> bool {
    matches!(error, Error::Io { source, .. } if is_denied(source))
}

fn is_denied(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EACCES | libc::EPERM | libc::EROFS)
    )
}

/// The result of what an ordinary user is not allowed, and his container does without.
pub(crate) fn forgive(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if is_denied(&error) && in_user_namespace() => Ok(()),
        other => other,
    }
}

/// The directory of an ordinary user's session. Who is root by name, too, has the places of root: he is that of a
/// system container, as runc tells it.
pub(crate) fn runtime_directory() -> Option<PathBuf> {
    let of_root = std::env::var_os("USER").is_some_and(|name| name == "root");
    let directory = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    let rootless = !nix::unistd::geteuid().is_root() || (in_user_namespace() && !of_root);
    directory.filter(|d| d.is_absolute() && rootless)
}

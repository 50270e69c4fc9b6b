// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Mounts that come and go while a container runs, as crun's `mounts add` and `mounts remove`. libcontainer has neither.
//!
//! The source is opened and mapped in the host's mount namespace, as a detached mount; a child enters the container's
//! and attaches it. There every path is the container's, who may have planted links: a destination is resolved
//! below the container's root and never through a magic link, and what is missing of it is made as the
//! container's root.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use nix::mount::{MntFlags, umount2};
use nix::unistd::{Gid, Uid, setfsgid, setfsuid};
use oci_spec::runtime::Mount;
use serde::Deserialize;

use crate::bundle::{self, wrong};
use crate::cgroup::Owner;
use crate::error::{Context, Result};
use crate::idmap;
use crate::lifecycle::Container;
use crate::process::{ProcessFd, wait_child};
use crate::state::Status;
use crate::sys::{self, Fork, MountChange};
use crate::tree::Tree;

/// Options of mount(8) that are attributes of one mount: what each sets, and what it clears before.
const ATTRIBUTES: &[(&str, u64, u64)] = &[
    ("ro", libc::MOUNT_ATTR_RDONLY, 0),
    ("rw", 0, libc::MOUNT_ATTR_RDONLY),
    ("nosuid", libc::MOUNT_ATTR_NOSUID, 0),
    ("suid", 0, libc::MOUNT_ATTR_NOSUID),
    ("nodev", libc::MOUNT_ATTR_NODEV, 0),
    ("dev", 0, libc::MOUNT_ATTR_NODEV),
    ("noexec", libc::MOUNT_ATTR_NOEXEC, 0),
    ("exec", 0, libc::MOUNT_ATTR_NOEXEC),
    ("noatime", libc::MOUNT_ATTR_NOATIME, libc::MOUNT_ATTR__ATIME),
    (
        "strictatime",
        libc::MOUNT_ATTR_STRICTATIME,
        libc::MOUNT_ATTR__ATIME,
    ),
    (
        "relatime",
        libc::MOUNT_ATTR_RELATIME,
        libc::MOUNT_ATTR__ATIME,
    ),
];

/// A mount to remove; whatever else a list says of it is not looked at.
#[derive(Debug, Deserialize)]
pub struct Place {
    /// Where it is in the container.
    pub destination: std::path::PathBuf,
}

/// Adds bind mounts to a running container, in their order. Those before one that fails stay.
pub fn add(container: &Container, mounts: &[Mount]) -> Result<()> {
    let init = running(container)?;
    let spec = container.spec()?;
    let owner = bundle::owner(&spec);
    for mount in mounts {
        let field = || format!("mounts[{}]", mount.destination().display());
        let change = attributes(mount)?;
        let source = mount.source().clone();
        let source = source.filter(|source| source.is_absolute());
        let source = source.ok_or_else(|| wrong(&field(), "needs an absolute source"))?;
        let is_folder = source.metadata().at("read", &source)?.is_dir();
        let tree = idmap::detached(mount, &source, &spec)?;
        sys::change_tree(tree.as_fd(), change)
            .context(|| format!("set the options of {}", source.display()))?;
        let attach = || {
            let target = open_target(mount.destination(), is_folder, owner)?;
            sys::move_mount_onto(tree.as_fd(), target.as_fd())
        };
        within(&init, attach).context(|| format!("mount at {}", mount.destination().display()))?;
    }
    Ok(())
}

/// Removes mounts from a running container, the last first. One that is in use stays, with an error.
pub fn remove(container: &Container, places: &[Place]) -> Result<()> {
    let init = running(container)?;
    for place in places.iter().rev() {
        let path = &place.destination;
        if !path.is_absolute() {
            return Err(wrong(
                "mounts",
                format!("{} is not absolute", path.display()),
            ));
        }
        let detach = || Ok(umount2(path, MntFlags::UMOUNT_NOFOLLOW)?);
        within(&init, detach).context(|| format!("unmount {}", path.display()))?;
    }
    Ok(())
}

pub(crate) fn running(container: &Container) -> Result<ProcessFd> {
    let alive = [Status::Created, Status::Running, Status::Paused];
    container.require(
        &alive,
        "only a container with processes has mounts to change",
    )?;
    let init = container
        .saved
        .init
        .and_then(crate::process::ProcessId::open);
    init.ok_or_else(|| crate::error::Error::Argument("the init has just ended".to_owned()))
}

/// What the options of a bind mount change of it. `rro` and its like reach the mounts below, too.
fn attributes(mount: &Mount) -> Result<MountChange> {
    let options = mount.options().as_deref().unwrap_or_default();
    let field = || format!("mounts[{}]", mount.destination().display());
    if !options
        .iter()
        .any(|option| option == "bind" || option == "rbind")
    {
        return Err(wrong(
            &field(),
            "only bind mounts can be added to a running container",
        ));
    }
    let mut change = MountChange::attributes(0, 0);
    for option in options {
        if matches!(option.as_str(), "bind" | "rbind" | "idmap" | "ridmap") {
            continue;
        }
        let find = |name: &str| ATTRIBUTES.iter().find(|(known, _, _)| *known == name);
        let recursive = option.strip_prefix('r').and_then(find);
        let (_, set, cleared) = find(option)
            .or(recursive)
            .ok_or_else(|| wrong(&field(), format!("option {option} cannot be set here")))?;
        change = change | MountChange::attributes(*set, *cleared);
        if find(option).is_none() {
            change = change | MountChange::BELOW;
        }
    }
    Ok(change)
}

/// What is made from here on belongs to the container's root. For files alone: entering and mounting go by
/// capabilities, which stay.
pub(crate) fn act_as(owner: Option<Owner>) {
    if let Some(owner) = owner {
        setfsgid(Gid::from_raw(owner.gid));
        setfsuid(Uid::from_raw(owner.uid));
    }
}

/// Opens the mount point, in the container's mount namespace. What is missing is made, the last part as a folder or as
/// an empty file.
pub(crate) fn open_target(
    path: &Path,
    is_folder: bool,
    owner: Option<Owner>,
) -> io::Result<OwnedFd> {
    act_as(owner);
    Ok(Tree::below(Path::new("/"))?.make(path, is_folder)?)
}

/// Does something in the container's mount namespace. It cannot be left again, so a child enters it; its exit code
/// is the error's number.
pub(crate) fn within(init: &ProcessFd, action: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
    let child = enter(init, action)?;
    outcome(&child)
}

/// The same for an action that may never end: it is killed after a time.
pub(crate) fn within_limit(
    process: &ProcessFd,
    limit: Duration,
    action: impl FnOnce() -> io::Result<()>,
) -> io::Result<()> {
    let child = enter(process, action)?;
    if !child.wait_end(limit) {
        child.signal(libc::SIGKILL)?;
        outcome(&child).ok();
        return Err(io::Error::from_raw_os_error(libc::ETIMEDOUT));
    }
    outcome(&child)
}

/// Begins an action in the mount namespace of a process, in a child.
fn enter(init: &ProcessFd, action: impl FnOnce() -> io::Result<()>) -> io::Result<ProcessFd> {
    let child = match sys::fork()? {
        Fork::Parent(pid) => pid,
        Fork::Child => {
            let result = sys::setns(init.as_fd(), libc::CLONE_NEWNS).and_then(|()| action());
            let number = result.err().map(|e| e.raw_os_error().unwrap_or(libc::EIO));
            sys::exit_now(number.unwrap_or(0));
        }
    };
    ProcessFd::of_child(child).map_err(io::Error::other)
}

/// The error number that the child ended with.
fn outcome(child: &ProcessFd) -> io::Result<()> {
    match wait_child(child).map_err(io::Error::other)?.code {
        0 => Ok(()),
        number => Err(io::Error::from_raw_os_error(number)),
    }
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! `process.cwd` that is not there is made, as runc and crun do; libcontainer refuses it. Best effort, since
//! libcontainer's own error names the directory: a read-only root file system stays as it is, and nothing is made
//! below a mount, which does not exist yet.

use std::os::fd::AsFd;
use std::path::{Component, Path, PathBuf};

use nix::sys::stat::{Mode, mkdirat};
use nix::unistd::{Gid, Uid, setfsgid, setfsuid};
use oci_spec::runtime::Spec;

use crate::bundle;
use crate::tree::Tree;

/// Makes the container's working directory in its root file system.
pub(crate) fn make(spec: &Spec, rootfs: &Path) {
    let Some(cwd) = spec.process().as_ref().map(|process| process.cwd()) else {
        return;
    };
    let names: Vec<_> = cwd
        .components()
        .filter(|c| matches!(c, Component::Normal(_)))
        .collect();
    let path: PathBuf = names.iter().collect();
    let plain = !cwd.components().any(|c| c == Component::ParentDir);
    let covers = |destination: &Path| {
        let relative = destination.strip_prefix("/").unwrap_or(destination);
        path.starts_with(relative) && relative.parent().is_some()
    };
    let mounted = spec.mounts().iter().flatten();
    if !plain || rootfs.join(&path).is_dir() || mounted.into_iter().any(|m| covers(m.destination()))
    {
        return;
    }
    let owner = bundle::owner(spec);
    if let Some(owner) = owner {
        // The container's root, for whom an idmapped root file system has a mapping.
        setfsgid(Gid::from_raw(owner.gid));
        setfsuid(Uid::from_raw(owner.uid));
    }
    make_in(rootfs, &path).ok();
    if owner.is_some() {
        setfsuid(Uid::from_raw(0));
        setfsgid(Gid::from_raw(0));
    }
}

/// Makes the directories one by one. Links lead nowhere outside the root.
fn make_in(rootfs: &Path, path: &Path) -> nix::Result<()> {
    let tree = Tree::below(rootfs)?;
    let mut parent = tree.directory(Path::new("."))?;
    let mut reached = PathBuf::new();
    for name in path.components() {
        reached.push(name);
        parent = match tree.directory(&reached) {
            Err(nix::errno::Errno::ENOENT) => {
                let name = Path::new(name.as_os_str());
                mkdirat(parent.as_fd(), name, Mode::from_bits_truncate(0o755))?;
                tree.directory(&reached)?
            }
            other => other?,
        };
    }
    Ok(())
}

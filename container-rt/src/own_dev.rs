// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A container whose `/dev` is a bind mount, mostly the host's: it is used as it is. libcontainer would make its
//! links and nodes there, fail at the first that exists, and before that change the directory of the host.
//!
//! So it works on a scratch file system that lies over the bound directory, and a step of `furnish` takes the scratch
//! away again: that is after libcontainer's work and before it changes the root and opens the terminal. Called by
//! `create` (the cover) and `furnish`.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use oci_spec::runtime::{Mount, MountBuilder, Spec};

use crate::error::{Context, Result};

const NO_TEXT: Option<&str> = None;

/// Whether this mount is a bind mount onto `/dev` itself.
fn binds_dev(mount: &Mount) -> bool {
    let option = |o: &String| o == "bind" || o == "rbind";
    let bind =
        mount.typ().as_deref() == Some("bind") || mount.options().iter().flatten().any(option);
    bind && mount
        .destination()
        .components()
        .eq(Path::new("/dev").components())
}

/// Whether the container's `/dev` is somebody else's directory.
pub(crate) fn is_bound(spec: &Spec) -> bool {
    spec.mounts().iter().flatten().any(binds_dev)
}

/// Covers a bound `/dev` for as long as libcontainer furnishes it.
pub(crate) fn cover(spec: &mut Spec) {
    if !is_bound(spec) {
        return;
    }
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    let scratch = MountBuilder::default()
        .destination("/dev")
        .typ("tmpfs")
        .source("tmpfs")
        .options(["nosuid", "noexec", "mode=755", "size=64k"].map(str::to_owned));
    mounts.push(scratch.build().expect("every field is given"));
    spec.set_mounts(Some(mounts));
}

/// The step of `furnish`: takes the uppermost mount off `rootfs`/dev.
pub(crate) fn uncover(rootfs: &Path) -> Result<()> {
    let dev = rootfs.join("dev");
    // A link would have led libcontainer to another place below the root; never follow it to one of the host's.
    umount2(&dev, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)
        .map_err(std::io::Error::from)
        .at("uncover", &dev)?;
    use_own_terminals(&dev)
}

/// Makes `ptmx` that of the container's `pts`: libcontainer opens terminals at no other, and a node of the host's
/// is not on it. Bound, since a link would change the host. Only if everyone may use it: the host's own is closed.
fn use_own_terminals(dev: &Path) -> Result<()> {
    let (own, used) = (dev.join("pts/ptmx"), dev.join("ptmx"));
    let open = fs::symlink_metadata(&own).is_ok_and(|m| m.mode() & 0o666 == 0o666);
    if !open || fs::symlink_metadata(&used).map_or(true, |m| m.is_symlink()) {
        return Ok(());
    }
    mount(Some(&own), &used, NO_TEXT, MsFlags::MS_BIND, NO_TEXT)
        .map_err(std::io::Error::from)
        .at("bind the container's ptmx to", &used)
}

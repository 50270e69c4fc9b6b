// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A container whose `/dev` is a bind mount, mostly the host's: it is used as it is. libcontainer would make its
//! links and nodes there, fail at the first that exists, and before that change the directory of the host.
//!
//! So it works on a scratch file system that lies over the bound directory, and a createRuntime hook of our own
//! takes the scratch away again: that is after libcontainer's work and before it changes the root and opens the
//! terminal. Called by `create` (the cover) and by `atoll-ct uncover-dev`, which is that hook.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns};
use oci_spec::runtime::{Hook, HookBuilder, Mount, MountBuilder, Spec, State};

use crate::error::{Context, Error, Result};

/// Name of the hidden command of `atoll-ct`.
pub const COMMAND: &str = "uncover-dev";

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
pub(crate) fn cover(spec: &mut Spec, rootfs: &Path) -> Result<()> {
    if !is_bound(spec) {
        return Ok(());
    }
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    let scratch = MountBuilder::default()
        .destination("/dev")
        .typ("tmpfs")
        .source("tmpfs")
        .options(["nosuid", "noexec", "mode=755", "size=64k"].map(str::to_owned));
    mounts.push(scratch.build().expect("every field is given"));
    spec.set_mounts(Some(mounts));
    let mut hooks = spec.hooks().clone().unwrap_or_default();
    let mut list = hooks.create_runtime().clone().unwrap_or_default();
    list.insert(0, hook(rootfs)?);
    hooks.set_create_runtime(Some(list));
    spec.set_hooks(Some(hooks));
    Ok(())
}

fn hook(rootfs: &Path) -> Result<Hook> {
    let text = rootfs
        .to_str()
        .ok_or_else(|| Error::Argument(format!("{}: the path is not UTF-8", rootfs.display())))?;
    let hook = HookBuilder::default()
        .path("/proc/self/exe")
        .args(["atoll-ct", COMMAND, text].map(str::to_owned))
        .env(Vec::new());
    Ok(hook.build().expect("every field is given"))
}

/// The hook: takes the uppermost mount off `rootfs`/dev in the mount namespace of the container whose state is on
/// standard input.
pub fn uncover(rootfs: &Path) -> Result<()> {
    let mut text = Vec::new();
    std::io::stdin()
        .read_to_end(&mut text)
        .context(|| "read the container's state".to_owned())?;
    let state: State = serde_json::from_slice(&text).map_err(|source| Error::Json {
        what: "standard input".to_owned(),
        source,
    })?;
    let pid = state
        .pid()
        .ok_or_else(|| Error::Argument(format!("{COMMAND}: the state names no process")))?;
    let namespace = PathBuf::from(format!("/proc/{pid}/ns/mnt"));
    let file = File::open(&namespace).at("open", &namespace)?;
    setns(file, CloneFlags::CLONE_NEWNS)
        .map_err(std::io::Error::from)
        .at("enter", &namespace)?;
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

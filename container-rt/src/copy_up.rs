// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A tmpfs with the option `tmpcopyup`: it begins with what the image has at its place. Not in the runtime-spec, but runc
//! and crun know it, and podman gives it to every `--tmpfs`, and to `/run`, `/tmp` and `/var/tmp` of `--read-only`.
//!
//! Each such tmpfs is made and filled here and handed to libcontainer as a directory to bind, with the other options. What
//! an earlier mount would show at the place is not looked at.

use std::fs::{self, Permissions};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sys::stat::fstat;
use oci_spec::runtime::{Mount, Spec};

use crate::bundle::{self, wrong};
use crate::cgroup::Owner;
use crate::error::{Context, Error, Result};
use crate::idmap::Transient;
use crate::tree::Tree;

const OPTION: &str = "tmpcopyup";

/// Makes them, filled from `rootfs`, which shows the owners that the container's files have on the host.
pub(crate) fn prepare(spec: &mut Spec, rootfs: &Path, transient: &mut Transient) -> Result<()> {
    let owner = bundle::owner(spec);
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    for (number, mount) in mounts.iter_mut().enumerate() {
        let asks = mount
            .options()
            .iter()
            .flatten()
            .any(|option| option == OPTION);
        if asks && mount.typ().as_deref() == Some("tmpfs") {
            let place = transient.directory(owner)?.join(format!("tmpfs{number}"));
            replace(mount, &place, rootfs, owner, transient)?;
        }
    }
    spec.set_mounts(Some(mounts));
    Ok(())
}

fn replace(
    mounted: &mut Mount,
    place: &Path,
    rootfs: &Path,
    owner: Option<Owner>,
    transient: &mut Transient,
) -> Result<()> {
    let options = mounted.options().clone().unwrap_or_default();
    // Those with a value are the file system's, the others the mount's.
    let (of_tmpfs, mut of_mount): (Vec<String>, Vec<String>) = options
        .into_iter()
        .filter(|option| option != OPTION)
        .partition(|option| option.contains('='));
    fs::create_dir(place).at("create", place)?;
    let data = of_tmpfs.join(",");
    mount(
        Some("tmpfs"),
        place,
        Some("tmpfs"),
        MsFlags::empty(),
        Some(data.as_str()),
    )
    .map_err(std::io::Error::from)
    .at("mount a tmpfs for", mounted.destination())?;
    transient.keep(place);
    let mut mode = None;
    if let Some(source) = find(rootfs, mounted.destination())? {
        copy(&source, place, mounted.destination())?;
        let stat = fstat(&source).map_err(std::io::Error::from);
        mode = Some(stat.at("look at", mounted.destination())?.st_mode & 0o7777);
    } else if let Some(owner) = owner {
        chown(place, Some(owner.uid), Some(owner.gid)).at("chown", place)?;
    }
    if let Some(text) = of_tmpfs
        .iter()
        .find_map(|option| option.strip_prefix("mode="))
    {
        let wrong = |_| wrong("mounts", format!("mode={text} is not octal"));
        mode = Some(u32::from_str_radix(text, 8).map_err(wrong)?);
    }
    if let Some(mode) = mode {
        fs::set_permissions(place, Permissions::from_mode(mode)).at("chmod", place)?;
    }
    of_mount.insert(0, "bind".to_owned());
    mounted.set_typ(Some("bind".to_owned()));
    mounted.set_source(Some(place.to_owned()));
    mounted.set_options(Some(of_mount));
    Ok(())
}

/// The image's directory at a place, whose links stay inside; `None` when there is none.
fn find(rootfs: &Path, destination: &Path) -> Result<Option<OwnedFd>> {
    let tree = Tree::below(rootfs)
        .map_err(std::io::Error::from)
        .at("open", rootfs)?;
    match tree.directory(destination) {
        Ok(directory) => Ok(Some(directory)),
        Err(Errno::ENOENT | Errno::ENOTDIR) => Ok(None),
        Err(errno) => Err(std::io::Error::from(errno)).at("open in the image", destination),
    }
}

/// Copies a directory's content, and its owner. cp(1) with -a follows no link.
fn copy(source: &OwnedFd, target: &Path, destination: &Path) -> Result<()> {
    let source = PathBuf::from(format!(
        "/proc/{}/fd/{}/.",
        std::process::id(),
        source.as_raw_fd()
    ));
    let what = || format!("copy {} of the image into its tmpfs", destination.display());
    let output = Command::new("cp")
        .args(["-a", "--"])
        .arg(source)
        .arg(target)
        .stdin(Stdio::null())
        .output()
        .context(what)?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let why = said.lines().next().unwrap_or("cp failed");
    Err(Error::Argument(format!("{}: {why}", what())))
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A root file system in layers, by annotations of config.json: read-only lower directories that containers share, and
//! a writable upper of the container's own. `root.path` is not looked into; it only has to be there.
//!
//! ```text
//! [`LOWER`] = TOP:…:BOTTOM   each idmapped, if the root file system is to be ─┐
//! [`UPPER`] = DIR            DIR/upper, DIR/work, idmapped likewise ──────────┴─► one overlay, a transient mount
//! ```
//!
//! overlayfs itself cannot be idmapped; its layers can (Linux 5.19, `Documentation/filesystems/overlayfs.rst`), and it
//! shows what they show. So one copy of a layer on disk, with ids 0..65535, serves every container in its own range.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};
use nix::unistd::{Gid, Uid, setfsgid, setfsuid};
use oci_spec::runtime::Spec;

use crate::bundle::{self, wrong};
use crate::cgroup::Owner;
use crate::error::{Context, Result};
use crate::idmap::{self, Source, Transient};
use crate::process::{ProcessFd, wait_child};
use crate::sys::{self, Fork};

/// Lower directories, the topmost first, with colons between them.
pub const LOWER: &str = "dev.atoll.rootfs.lower";
/// Directory of `upper` and `work`.
pub const UPPER: &str = "dev.atoll.rootfs.upper";

/// Most lower directories: what fits into the page that mount(2) takes, with our short names.
const LAYERS_MAX: usize = 100;

/// What the annotations ask for; `None` without them.
fn wanted(spec: &Spec) -> Result<Option<(Vec<PathBuf>, PathBuf)>> {
    let annotations = spec.annotations().as_ref();
    let get = |name: &str| annotations.and_then(|all| all.get(name)).cloned();
    let (lower, upper) = match (get(LOWER), get(UPPER)) {
        (None, None) => return Ok(None),
        (Some(lower), Some(upper)) => (lower, upper),
        _ => return Err(wrong(LOWER, format!("belongs together with {UPPER}"))),
    };
    let lower: Vec<PathBuf> = lower.split(':').map(PathBuf::from).collect();
    let upper = PathBuf::from(upper);
    if !(1..=LAYERS_MAX).contains(&lower.len()) {
        return Err(wrong(
            LOWER,
            format!("1 to {LAYERS_MAX} directories are supported"),
        ));
    }
    if let Some(path) = lower
        .iter()
        .chain([&upper])
        .find(|path| !path.is_absolute())
    {
        return Err(wrong(LOWER, format!("{} is not absolute", path.display())));
    }
    Ok(Some((lower, upper)))
}

/// Mounts the root file system that the annotations describe; `None` when there are none. With `namespace` every layer
/// is mapped by it.
pub(crate) fn prepare(
    spec: &Spec,
    namespace: Option<&OwnedFd>,
    transient: &mut Transient,
) -> Result<Option<PathBuf>> {
    let Some((lower, upper)) = wanted(spec)? else {
        return Ok(None);
    };
    let directory = transient.directory(bundle::owner(spec))?;
    let mut place = |path: &Path, name: String| -> Result<PathBuf> {
        let target = directory.join(name);
        let source = Source {
            path,
            recursive: false,
        };
        idmap::attach(&source, namespace, &target, transient)?;
        Ok(target)
    };
    let mut layers = Vec::new();
    for (number, path) in lower.iter().enumerate() {
        layers.push(place(path, format!("l{number}"))?);
    }
    let upper = place(&upper, "u".to_owned())?;
    let target = directory.join("rootfs");
    fs::create_dir(&target).at("create", &target)?;
    let names: Vec<String> = layers
        .iter()
        .map(|path| path.display().to_string())
        .collect();
    let (lower, upper) = (names.join(":"), upper.display());
    let options = format!("lowerdir={lower},upperdir={upper}/upper,workdir={upper}/work");
    let owner = bundle::owner(spec).filter(|_| namespace.is_some());
    mount_as(owner, &target, &options).at("mount the layers at", &target)?;
    transient.keep(&target);
    Ok(Some(target))
}

/// Mounts an overlay. overlayfs makes its work files as whoever mounts it, for good; in mapped layers that has to be
/// somebody whom they know: the container's root, with the capabilities of the host's. A child becomes that.
fn mount_as(owner: Option<Owner>, target: &Path, options: &str) -> io::Result<()> {
    let mount = || {
        let kind = Some("overlay");
        Ok(mount(kind, target, kind, MsFlags::empty(), Some(options))?)
    };
    let Some(owner) = owner else { return mount() };
    let child = match sys::fork()? {
        Fork::Parent(pid) => pid,
        Fork::Child => {
            let result = sys::keep_capabilities_for_good().and_then(|()| {
                setfsgid(Gid::from_raw(owner.gid));
                setfsuid(Uid::from_raw(owner.uid));
                mount()
            });
            let number = result.err().map(|e| e.raw_os_error().unwrap_or(libc::EIO));
            sys::exit_now(number.unwrap_or(0));
        }
    };
    let ended = ProcessFd::of_child(child).and_then(|child| wait_child(&child));
    match ended.map_err(io::Error::other)?.code {
        0 => Ok(()),
        number => Err(io::Error::from_raw_os_error(number)),
    }
}

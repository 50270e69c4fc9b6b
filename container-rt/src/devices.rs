// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Device nodes of config.json that libcontainer cannot make: in a user namespace, where it would bind the host's
//! node of the same path, if there is one, with the host's owner; and outside `/dev`. They are made in a transient
//! file system of the host and become bind mounts of the container. Called by `create`.
//!
//! A rootless runtime can make none either: there the host's node is bound, if it is the same device.

use std::fs;
use std::os::unix::fs::{MetadataExt, chown};
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use oci_spec::runtime::{LinuxDevice, LinuxDeviceType, LinuxIdMapping, MountBuilder, Spec};

use crate::bundle::{self, wrong};
use crate::cgroup::Owner;
use crate::error::{Context, Result};
use crate::idmap::Transient;
use crate::own_dev;
use crate::rootless;

/// Where config.json lists them.
const FIELD: &str = "linux.devices";

/// Takes the devices out of `spec` that libcontainer must not see, and puts mounts in for them.
pub(crate) fn prepare(spec: &mut Spec, transient: &mut Transient) -> Result<()> {
    let Some(mut linux) = spec.linux().clone() else {
        return Ok(());
    };
    let owner = bundle::owner(spec);
    let bound = own_dev::is_bound(spec);
    let rootless = rootless::in_user_namespace();
    let in_dev = |device: &LinuxDevice| device.path().starts_with("/dev");
    let mut devices = linux.devices().clone().unwrap_or_default();
    // In a directory of somebody else's nothing is made.
    devices.retain(|device| !(bound && in_dev(device)));
    let (ours, theirs): (Vec<_>, Vec<_>) = devices
        .into_iter()
        .partition(|device| owner.is_some() || rootless || !in_dev(device));
    linux.set_devices(Some(theirs));
    if !ours.is_empty() {
        let directory = match rootless {
            true => None,
            false => Some(file_system(owner, transient)?),
        };
        let mut mounts = spec.mounts().clone().unwrap_or_default();
        for (number, device) in ours.iter().enumerate() {
            let node = match &directory {
                Some(directory) => {
                    let node = directory.join(number.to_string());
                    make_owned(device, &node, spec)?;
                    node
                }
                None => of_host(device)?,
            };
            let mount = MountBuilder::default()
                .destination(device.path())
                .typ("bind")
                .source(node)
                .options(vec!["bind".to_owned()]);
            mounts.push(mount.build().expect("every field is given"));
        }
        spec.set_mounts(Some(mounts));
    }
    spec.set_linux(Some(linux));
    Ok(())
}

/// A file system of the host for nodes, which goes with the transient mounts.
pub(crate) fn file_system(owner: Option<Owner>, transient: &mut Transient) -> Result<PathBuf> {
    let directory = transient.directory(owner)?.join("devices");
    fs::create_dir(&directory).at("create", &directory)?;
    mount(
        Some("tmpfs"),
        &directory,
        Some("tmpfs"),
        MsFlags::empty(),
        Some("mode=755,size=64k"),
    )
    .map_err(std::io::Error::from)
    .at("mount a tmpfs at", &directory)?;
    transient.keep(&directory);
    Ok(directory)
}

/// Makes a node of the host that belongs to whom the container's config.json says.
pub(crate) fn make_owned(device: &LinuxDevice, node: &Path, spec: &Spec) -> Result<()> {
    let linux = spec
        .linux()
        .as_ref()
        .filter(|_| bundle::owner(spec).is_some());
    let uids = linux.and_then(|linux| linux.uid_mappings().as_deref());
    let gids = linux.and_then(|linux| linux.gid_mappings().as_deref());
    let uid = on_host(device.uid().unwrap_or(0), uids)?;
    let gid = on_host(device.gid().unwrap_or(0), gids)?;
    make(device, node)?;
    chown(node, Some(uid), Some(gid)).at("chown", node)
}

/// The host's node at the path of a device, which must be that device. Its owner and mode stay the host's.
fn of_host(device: &LinuxDevice) -> Result<PathBuf> {
    let path = device.path();
    let found = fs::metadata(path).at("look for the host's own", path)?;
    let (kind, rdev) = number_of(device)?;
    if found.mode() & SFlag::S_IFMT.bits() != kind.bits()
        || (kind != SFlag::S_IFIFO && found.rdev() != rdev)
    {
        let path = path.display();
        let reason =
            format!("a rootless container gets the host's devices, and its {path} is another one");
        return Err(wrong(FIELD, reason));
    }
    Ok(path.clone())
}

/// What mknod(2) calls a device.
fn number_of(device: &LinuxDevice) -> Result<(SFlag, u64)> {
    let kind = match device.typ() {
        LinuxDeviceType::B => SFlag::S_IFBLK,
        LinuxDeviceType::C | LinuxDeviceType::U => SFlag::S_IFCHR,
        LinuxDeviceType::P => SFlag::S_IFIFO,
        LinuxDeviceType::A => return Err(wrong(FIELD, "type a is for rules, not for nodes")),
    };
    let number = |number: i64| {
        u64::try_from(number).map_err(|_| wrong(FIELD, format!("device number {number}")))
    };
    Ok((
        kind,
        makedev(number(device.major())?, number(device.minor())?),
    ))
}

fn make(device: &LinuxDevice, node: &Path) -> Result<()> {
    let (kind, rdev) = number_of(device)?;
    let mode = device.file_mode().unwrap_or(0o666) & 0o777;
    mknod(node, kind, Mode::empty(), rdev)
        .map_err(std::io::Error::from)
        .at("make the device", device.path())?;
    // Not by mknod, which subtracts the umask.
    fs::set_permissions(node, std::os::unix::fs::PermissionsExt::from_mode(mode)).at("chmod", node)
}

/// The host's id for the container's; without mappings they are the same.
pub(crate) fn on_host(id: u32, mappings: Option<&[LinuxIdMapping]>) -> Result<u32> {
    let Some(mappings) = mappings else {
        return Ok(id);
    };
    let inside = |m: &LinuxIdMapping| {
        let distance = id.checked_sub(m.container_id())?;
        (distance < m.size()).then(|| m.host_id().checked_add(distance))?
    };
    let missing = || {
        wrong(
            FIELD,
            format!("owner {id} has no mapping in the user namespace"),
        )
    };
    mappings.iter().find_map(inside).ok_or_else(missing)
}

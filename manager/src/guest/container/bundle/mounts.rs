// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! What is mounted in a container: its volumes, directories and devices of the host, and the kernel's file systems.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::owners::{self, Maps};
use super::{Facts, is_unprivileged, views};
use crate::error::Error;
use crate::guest::config::GuestConfig;
use crate::guest::container::{image, quota};
use crate::schema::Properties;

/// One mount point of a container, its root included.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// Key of the config, which is also the name of the folder where a volume is mounted on the host.
    pub key: String,
    /// What is mounted.
    pub source: Source,
    /// Where it is in the container.
    pub destination: String,
    /// The container may not write.
    pub readonly: bool,
    /// Options of mount(8) for what is mounted on the host: `noatime`, `discard`, …
    pub options: Vec<String>,
    /// It keeps account of what its users store, and their limits.
    pub quota: bool,
    /// Its own map of ids, the key's value.
    pub idmap: Option<String>,
}

/// What a mount point shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// A volume of a storage.
    Volume(String),
    /// A block device of the host, with a file system.
    Device(PathBuf),
    /// A directory of the host, with the host's owners.
    Folder(PathBuf),
}

impl Source {
    /// By the first item of a mount point's value, as PVE tells them apart.
    fn new(text: &str) -> Self {
        match text {
            text if text.starts_with("/dev/") => Self::Device(text.into()),
            text if text.starts_with('/') => Self::Folder(text.into()),
            text => Self::Volume(text.to_owned()),
        }
    }
}

/// Every mount point of a container: its root first, then the others by number.
pub fn volumes(config: &GuestConfig) -> Result<Vec<Mount>, Error> {
    let points = config.family("mp[n]").into_iter().map(|(key, _)| key);
    let keys = std::iter::once("rootfs").chain(points);
    let mounts = keys.map(|key| {
        let value = config.properties(key)?.unwrap_or_default();
        let mut mount = Mount::new(key, &value);
        if key == "rootfs" && makes_nodes(config)? {
            // Before the user's own, of which the last counts. Which devices open is the device list's matter.
            mount.options.insert(0, "dev".to_owned());
        }
        Ok(mount)
    });
    mounts.collect()
}

/// Whether the container's monitor makes device nodes for it. A privileged container makes them itself: PVE's rule.
pub fn makes_nodes(config: &GuestConfig) -> Result<bool, Error> {
    let features = config.properties("features")?.unwrap_or_default();
    Ok(features.is_set("mknod") && is_unprivileged(config))
}

impl Mount {
    /// The mount point that a key's value describes.
    pub fn new(key: &str, value: &Properties) -> Self {
        let listed = value.get("mountoptions").unwrap_or_default().split(';');
        let mut options: Vec<String> = listed
            .filter(|option| !option.is_empty())
            .map(str::to_owned)
            .collect();
        match value.get("acl") {
            Some("1") => options.push("acl".to_owned()),
            Some(_) => options.push("noacl".to_owned()),
            None => {}
        }
        let readonly = value.is_set("ro");
        let quota = value.is_set("quota") && !readonly;
        if quota {
            options.push(quota::OPTIONS.to_owned());
        }
        Self {
            key: key.to_owned(),
            source: Source::new(value.get("volume").unwrap_or_default()),
            destination: value.get("mp").unwrap_or("/").to_owned(),
            readonly,
            options,
            quota,
            idmap: value.get("idmap").map(str::to_owned),
        }
    }

    /// What the runtime binds: the folder below `folder` where the volume is mounted, or the host's own. Volumes hold
    /// the container's own ids and are mapped; what is the host's shows the host's, unless it has a map of its own.
    /// `maps` are an unprivileged container's.
    pub fn entry(&self, folder: &Path, maps: Option<&Maps>) -> Result<Value, Error> {
        let access = if self.readonly { "rro" } else { "rw" };
        let mut options = vec!["rbind", access];
        let (source, holds_own) = match &self.source {
            Source::Folder(path) => (path.clone(), false),
            Source::Volume(_) | Source::Device(_) => (folder.join(&self.key), true),
        };
        let own = match (&self.idmap, maps) {
            (Some(text), Some(maps)) if text != owners::PASSTHROUGH => {
                let wrong = |reason| Error::refused(format!("{}: idmap: {reason}", self.key));
                Some(maps.with(&owners::entries(text).map_err(wrong)?, holds_own))
            }
            _ => None,
        };
        if maps.is_some() && (holds_own || self.idmap.is_some()) {
            options.push("idmap");
        }
        let mut entry = json!({
            "destination": self.destination,
            "type": "bind",
            "source": source.to_string_lossy(),
            "options": options,
        });
        if let Some(own) = own {
            (entry["uidMappings"], entry["gidMappings"]) = (own.uids(), own.gids());
        }
        Ok(entry)
    }
}

/// Every mount of the bundle.
pub(super) fn all(
    config: &GuestConfig,
    folder: &Path,
    facts: &Facts,
    maps: Option<&Maps>,
) -> Result<Value, Error> {
    let features = config.properties("features")?.unwrap_or_default();
    let sys = match features.is_set("force_rw_sys") {
        true => "nosuid,noexec,nodev,rw",
        false => "nosuid,noexec,nodev,ro",
    };
    let mut mounts: Vec<Value> = KERNEL
        .iter()
        .map(|(at, kind, options)| kernel(at, kind, options))
        .collect();
    mounts.push(kernel("/sys", "sysfs", sys));
    mounts.push(kernel(
        "/sys/fs/cgroup",
        "cgroup",
        "nosuid,noexec,nodev,relatime,rw",
    ));
    mounts.extend(views::mounts(&facts.views, features.is_set("nesting")));
    // An image has files of its own there.
    if config.get(image::KEY).is_none() {
        mounts.push(kernel("/run", "tmpfs", "nosuid,nodev,mode=755"));
    }
    for mount in volumes(config)?.iter().skip(1) {
        mounts.push(mount.entry(folder, maps)?);
    }
    Ok(Value::Array(mounts))
}

/// File systems that are the same for all: where, which, options.
const KERNEL: &[(&str, &str, &str)] = &[
    ("/proc", "proc", "nosuid,noexec,nodev"),
    ("/dev", "tmpfs", "nosuid,strictatime,mode=755,size=65536k"),
    (
        "/dev/pts",
        "devpts",
        "nosuid,noexec,newinstance,ptmxmode=0666,mode=0620,gid=5",
    ),
    ("/dev/shm", "tmpfs", "nosuid,nodev,mode=1777"),
    ("/dev/mqueue", "mqueue", "nosuid,noexec,nodev"),
];

fn kernel(destination: &str, kind: &str, options: &str) -> Value {
    let options: Vec<&str> = options.split(',').collect();
    json!({ "destination": destination, "type": kind, "source": kind, "options": options })
}

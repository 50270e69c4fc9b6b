// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Devices of the host that a container may use: `dev0` and so on, and `features: fuse=1`.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::views;
use crate::error::Error;
use crate::guest::config::GuestConfig;
use crate::guest::container::{image, lxc};
use crate::oci::Images;
use crate::schema::Properties;

/// Device of FUSE. Linux `Documentation/admin-guide/devices.txt`: 10 is misc, 229 is fuse.
const FUSE: HostDevice = HostDevice {
    kind: 'c',
    major: 10,
    minor: 229,
};
/// Mode of a device in the container when its key names none: PVE's default.
const MODE: u32 = 0o660;

/// A device node of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostDevice {
    /// `c` or `b`, as in config.json.
    pub kind: char,
    /// Its driver.
    pub major: u32,
    /// Which of the driver's devices.
    pub minor: u32,
}

impl HostDevice {
    /// Members of config.json's two lists.
    fn node_and_rule(
        self,
        path: &str,
        mode: u32,
        (uid, gid): (u32, u32),
        access: &str,
    ) -> (Value, Value) {
        let Self { kind, major, minor } = self;
        let kind = kind.to_string();
        (
            json!({
                "path": path, "type": kind, "major": major, "minor": minor, "fileMode": mode, "uid": uid, "gid": gid,
            }),
            json!({ "allow": true, "type": kind, "major": major, "minor": minor, "access": access }),
        )
    }
}

/// What this host has of what a config names; looked up before the bundle is made, which is a pure function.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Facts {
    /// Device nodes by path.
    pub devices: BTreeMap<PathBuf, HostDevice>,
    /// Paths that exist.
    pub present: BTreeSet<PathBuf>,
    /// Layers of its image, the topmost first.
    pub layers: Vec<PathBuf>,
    /// Files of lxcfs, which show the container its own limits.
    pub views: Vec<PathBuf>,
    /// Devices of its file systems with quotas.
    pub quotas: BTreeMap<PathBuf, HostDevice>,
}

impl Facts {
    /// Looks at every path of the host that a config names, and for lxcfs in its folder, for which it waits 2 s
    /// at most.
    pub async fn gather(
        config: &GuestConfig,
        images: &Images,
        lxcfs: &Path,
    ) -> Result<Self, Error> {
        let mut facts = Self {
            views: views::find(lxcfs).await,
            ..Self::default()
        };
        if let Some(digest) = image::digest(config)? {
            facts.layers = images.layers(&images.get(&digest)?);
        }
        for (key, _) in config.family("dev[n]") {
            let value = config.properties(key)?.unwrap_or_default();
            facts.look(Path::new(value.get("path").unwrap_or_default()));
        }
        for path in lxc::named_paths(&config.current.raw) {
            facts.look(&path);
        }
        Ok(facts)
    }

    fn look(&mut self, path: &Path) {
        let Ok(metadata) = std::fs::metadata(path) else {
            return;
        };
        self.present.insert(path.to_owned());
        let kind = metadata.file_type();
        let kind = match (kind.is_char_device(), kind.is_block_device()) {
            (true, _) => 'c',
            (_, true) => 'b',
            _ => return,
        };
        let number = metadata.rdev();
        let device = HostDevice {
            kind,
            major: rustix::fs::major(number),
            minor: rustix::fs::minor(number),
        };
        self.devices.insert(path.to_owned(), device);
    }
}

/// The nodes that the runtime makes, and the rules that let the container use them; the first rule denies all others.
/// The runtime adds the devices that every container has (null, zero, random, tty, ptmx).
pub(super) fn all(config: &GuestConfig, facts: &Facts) -> Result<(Vec<Value>, Vec<Value>), Error> {
    let mut nodes = Vec::new();
    let mut rules = vec![json!({ "allow": false, "access": "rwm" })];
    let features = config.properties("features")?.unwrap_or_default();
    if features.is_set("fuse") {
        let (node, rule) = FUSE.node_and_rule("/dev/fuse", 0o666, (0, 0), "rwm");
        nodes.push(node);
        rules.push(rule);
    }
    for (key, _) in config.family("dev[n]") {
        let value = config.properties(key)?.unwrap_or_default();
        let (node, rule) = node_and_rule(key, &value, facts)?;
        nodes.push(node);
        rules.push(rule);
    }
    for (path, device) in &facts.quotas {
        // quotactl(2) wants its name. Who opens it has the file system below the kernel's feet: `m` does not let him.
        let (node, rule) = device.node_and_rule(&path.to_string_lossy(), MODE, (0, 0), "m");
        nodes.push(node);
        rules.push(rule);
    }
    Ok((nodes, rules))
}

/// The device of one key for a container that runs, as the runtime's command takes it: the node with its `access`.
pub fn device(key: &str, value: &Properties) -> Result<Value, Error> {
    let mut facts = Facts::default();
    facts.look(Path::new(value.get("path").unwrap_or_default()));
    let (mut node, rule) = node_and_rule(key, value, &facts)?;
    node["access"] = rule["access"].clone();
    Ok(node)
}

fn node_and_rule(key: &str, value: &Properties, facts: &Facts) -> Result<(Value, Value), Error> {
    let path = value.get("path").unwrap_or_default();
    let device = facts.devices.get(Path::new(path)).copied();
    let device =
        device.ok_or_else(|| Error::refused(format!("{key}: {path} is no device of this host")))?;
    let mode = value
        .get("mode")
        .map_or(Ok(MODE), |text| u32::from_str_radix(text, 8));
    let mode = mode.map_err(|_| Error::refused(format!("{key}: mode is not octal")))?;
    let owner = |name: &str| value.number(name).unwrap_or(0);
    let access = match value.is_set("deny-write") {
        true => "rm",
        false => "rwm",
    };
    Ok(device.node_and_rule(path, mode, (owner("uid"), owner("gid")), access))
}

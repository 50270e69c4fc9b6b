// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Devices that come and go while a container runs; neither the runtime-spec nor libcontainer has that.
//!
//! ```text
//! add:    node in a file system of the host ─► allowed in the cgroup ─► bound to its path in the container
//! remove: path in the container ─► gone from the cgroup's list
//! ```
//!
//! The container's config.json, as it is kept in its directory, lists what it has now: the next change starts from
//! there, since on v2 the whole list is one program.

use std::fs;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use oci_spec::runtime::{LinuxDevice, LinuxDeviceCgroup};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::bundle::{self, wrong};
use crate::error::{Context, Error, Result};
use crate::idmap::Transient;
use crate::lifecycle::Container;
use crate::mounts::{open_target, running, within};
use crate::state::{to_json, write_atomically};
use crate::{cgroup, devices, sys};

/// A device to add.
#[derive(Debug, Deserialize)]
pub struct Wanted {
    /// The node, as in `linux.devices`.
    #[serde(flatten)]
    pub device: LinuxDevice,
    /// What the container may do with it, as in `linux.resources.devices`.
    #[serde(default = "everything")]
    pub access: String,
}

fn everything() -> String {
    "rwm".to_owned()
}

/// A device to remove; whatever else a list says of it is not looked at.
#[derive(Debug, Deserialize)]
pub struct Place {
    /// Its path in the container.
    pub path: PathBuf,
}

/// Adds devices to a running container, in their order. Those before one that fails stay.
pub fn add(container: &Container, wanted: &[Wanted]) -> Result<()> {
    let init = running(container)?;
    let owner = bundle::owner(&container.spec()?);
    for Wanted { device, access } in wanted {
        let path = device.path();
        let mut list = List::read(container)?;
        if list.position(path).is_some() {
            return Err(Error::Argument(format!(
                "{}: the container has it already",
                path.display()
            )));
        }
        let mut transient = Transient::default();
        let tree = {
            let spec = container.spec()?;
            let folder = devices::file_system(owner, &mut transient)?;
            let node = folder.join("node");
            devices::make_owned(device, &node, &spec)?;
            sys::open_tree(&node, false).at("open the mount of", &node)?
        };
        let rule = list.push(device, access)?;
        list.enforce(container, &rule)?;
        let attach = || {
            let target = open_target(path, false, owner)?;
            sys::move_mount_onto(
                std::os::fd::AsFd::as_fd(&tree),
                std::os::fd::AsFd::as_fd(&target),
            )
        };
        if let Err(source) = within(&init, attach) {
            let former = List::read(container)?;
            former.enforce(container, &denied(&rule))?;
            return Err(source).context(|| format!("put {} into the container", path.display()));
        }
        list.write(container)?;
    }
    Ok(())
}

/// Removes devices from a running container, those of its start too. Programs that have one open keep it.
pub fn remove(container: &Container, places: &[Place]) -> Result<()> {
    let init = running(container)?;
    let owner = bundle::owner(&container.spec()?);
    for Place { path } in places {
        let mut list = List::read(container)?;
        let missing = || Error::Argument(format!("the container has no {}", path.display()));
        let index = list.position(path).ok_or_else(missing)?;
        within(&init, || take_away(path, owner))
            .context(|| format!("take {} out of the container", path.display()))?;
        let rule = list.remove(index)?;
        if !list.allows(&rule) {
            list.enforce(container, &denied(&rule))?;
        }
        list.write(container)?;
    }
    Ok(())
}

/// In the container's mount namespace: what is bound to the path, and the name. Links are not followed.
fn take_away(path: &Path, owner: Option<cgroup::Owner>) -> std::io::Result<()> {
    match umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
        // A node of its own, or it has been taken away from inside.
        Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
        Err(error) => return Err(error.into()),
    }
    crate::mounts::act_as(owner);
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// The two lists of config.json, in the form in which they came.
struct List {
    config: Value,
}

impl List {
    fn read(container: &Container) -> Result<Self> {
        let path = container.directory.config();
        let text = fs::read(&path).at("read", &path)?;
        let config = serde_json::from_slice(&text).map_err(|source| Error::Json {
            what: path.display().to_string(),
            source,
        })?;
        Ok(Self { config })
    }

    fn write(&self, container: &Container) -> Result<()> {
        write_atomically(&container.directory.config(), &to_json(&self.config)?)
    }

    fn devices(&self) -> &[Value] {
        let list = self.config["linux"]["devices"].as_array();
        list.map(Vec::as_slice).unwrap_or_default()
    }

    fn position(&self, path: &Path) -> Option<usize> {
        let mut devices = self.devices().iter();
        devices.position(|device| device["path"].as_str().map(Path::new) == Some(path))
    }

    fn push(&mut self, device: &LinuxDevice, access: &str) -> Result<Value> {
        let node: Value = serde_json::from_slice(&to_json(device)?).expect("it was just written");
        let rule = rule_of(&node, access);
        for (list, entry) in [("devices", node), ("rules", rule.clone())] {
            let place = match list {
                "devices" => &mut self.config["linux"]["devices"],
                _ => &mut self.config["linux"]["resources"]["devices"],
            };
            if place.is_null() {
                *place = json!([]);
            }
            let not_a_list = || wrong("linux", "its list of devices is no list");
            place.as_array_mut().ok_or_else(not_a_list)?.push(entry);
        }
        Ok(rule)
    }

    /// Takes a device and one rule for it out. Answers the rule.
    fn remove(&mut self, index: usize) -> Result<Value> {
        let node = self.config["linux"]["devices"]
            .as_array_mut()
            .expect("a position was found in it")
            .remove(index);
        let all = rule_of(&node, "rwm");
        let rules = self.config["linux"]["resources"]["devices"].as_array_mut();
        let not_named = || wrong("linux.resources.devices", "the device is not named in it");
        let rules = rules.ok_or_else(not_named)?;
        let place = rules.iter().rposition(|rule| same_device(rule, &all));
        Ok(rules.remove(place.ok_or_else(not_named)?))
    }

    /// Whether a rule that is left allows the same device.
    fn allows(&self, rule: &Value) -> bool {
        let rules = self.config["linux"]["resources"]["devices"].as_array();
        rules.is_some_and(|rules| rules.iter().any(|other| same_device(other, rule)))
    }

    /// Makes the cgroup do what the list says; `change` is what is new in it.
    fn enforce(&self, container: &Container, change: &Value) -> Result<()> {
        let parse = |value: &Value| {
            serde_json::from_value::<LinuxDeviceCgroup>(value.clone()).map_err(|source| {
                Error::Json {
                    what: "linux.resources.devices".to_owned(),
                    source,
                }
            })
        };
        if cgroup::is_unified_host()? {
            let rules = self.config["linux"]["resources"]["devices"].as_array();
            let rules: Vec<_> = rules
                .into_iter()
                .flatten()
                .map(parse)
                .collect::<Result<_>>()?;
            let directory = container.saved.cgroups.first();
            return directory.map_or(Ok(()), |d| cgroup::devices::enforce(d, &rules));
        }
        cgroup::devices::change(&container.saved.cgroups, &parse(change)?)
    }
}

fn rule_of(node: &Value, access: &str) -> Value {
    json!({
        "allow": true, "type": node["type"], "major": node["major"], "minor": node["minor"], "access": access,
    })
}

fn same_device(one: &Value, other: &Value) -> bool {
    one["allow"] == json!(true)
        && ["type", "major", "minor"]
            .iter()
            .all(|member| one[member] == other[member])
}

fn denied(rule: &Value) -> Value {
    let mut rule = rule.clone();
    rule["allow"] = json!(false);
    rule["access"] = json!("rwm");
    rule
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Changing the limits of a container that exists: `update`. The arithmetic between the runtime-spec's numbers
//! and the files of v1 and v2 is libcgroups'.

use std::fs;
use std::path::{Path, PathBuf};

use libcgroups::common::{CgroupConfig, CgroupManager, ControllerOpt, create_cgroup_manager};
use libcontainer::container::Container;
use oci_spec::runtime::LinuxResources;

use crate::error::{Context, Error, Result};
use crate::sys::Pid;

/// Writes the given limits into the cgroup at `path` (absolute, relative to every hierarchy). Limits that
/// `resources` does not name stay as they are, the device list included.
pub fn apply(id: &str, path: &Path, resources: &LinuxResources) -> Result<()> {
    let failed = |reason: String| Error::Argument(format!("update the limits of {id}: {reason}"));
    let manager = create_cgroup_manager(place(id, path)).map_err(|e| failed(e.to_string()))?;
    let options = ControllerOpt {
        resources,
        disable_oom_killer: false,
        oom_score_adj: None,
        freezer_state: None,
    };
    manager.apply(&options).map_err(|e| failed(e.to_string()))
}

/// Moves a process into the cgroup at `path`, which is made where it is missing.
pub(super) fn join(id: &str, path: &Path, pid: Pid) -> Result<()> {
    let failed = |reason: String| Error::Argument(format!("join the cgroup of {id}: {reason}"));
    let manager = create_cgroup_manager(place(id, path)).map_err(|e| failed(e.to_string()))?;
    // libcgroups names processes by a type of an older nix than ours.
    let process = Container::default().set_pid(pid).pid();
    let process = process.expect("it was just set");
    manager.add_task(process).map_err(|e| failed(e.to_string()))
}

fn place(id: &str, path: &Path) -> CgroupConfig {
    CgroupConfig {
        cgroup_path: PathBuf::from(path),
        systemd_cgroup: false,
        container_name: id.to_owned(),
    }
}

/// Writes the limits that libcgroups does not know: the weights of single block devices under the BFQ scheduler, and that
/// who is short of memory waits instead of being killed, which v1 alone has (`Documentation/admin-guide/cgroup-v1/
/// memory.rst`, "OOM Control").
pub fn apply_unknown(directories: &[PathBuf], resources: &LinuxResources) -> Result<()> {
    let memory = resources.memory().as_ref();
    if memory.is_some_and(|memory| memory.disable_oom_killer() == Some(true)) {
        let files = directories.iter().map(|d| d.join("memory.oom_control"));
        for file in files.filter(|file| file.exists()) {
            fs::write(&file, "1").at("write", &file)?;
        }
    }
    let weights = resources.block_io().as_ref();
    let weights = weights.and_then(|io| io.weight_device().as_deref());
    for device in weights.unwrap_or_default() {
        let Some(weight) = device.weight() else {
            continue;
        };
        let line = format!("{}:{} {weight}", device.major(), device.minor());
        for name in ["blkio.bfq.weight_device", "io.bfq.weight"] {
            let files = directories.iter().map(|directory| directory.join(name));
            for file in files.filter(|file| file.exists()) {
                fs::write(&file, &line).at("write", &file)?;
            }
        }
    }
    Ok(())
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Intel RDT, or what AMD calls QoS: a share of the processor's caches and of the memory's bandwidth, by the groups of the
//! kernel's resctrl file system (`linux.intelRdt`). libcontainer knows the files, and leaves calling it to us.

use std::fs;
use std::path::PathBuf;

use libcontainer::container::{Container, ContainerStatus, State};
use libcontainer::process::intel_rdt::{
    cleanup_intel_rdt, find_resctrl_mount_point, setup_intel_rdt,
};
use oci_spec::runtime::{LinuxIntelRdt, Spec};
use serde::{Deserialize, Serialize};

use crate::bundle::wrong;
use crate::error::{Context, Error, Result, one_line};
use crate::sys;

const FIELD: &str = "linux.intelRdt";

/// A container's groups, as state.json keeps them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Groups {
    /// Where its processes are.
    directory: PathBuf,
    /// Whether that goes with the container. The runtime-spec: one that `closID` names stays.
    is_own: bool,
    /// What counts for this container alone.
    monitoring: Option<PathBuf>,
}

fn asked(spec: &Spec) -> Option<&LinuxIntelRdt> {
    spec.linux().as_ref()?.intel_rdt().as_ref()
}

/// Whether this kernel, on this processor, has it. proc(5), /proc/filesystems: "nodev\tresctrl".
pub fn is_there() -> bool {
    let known = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    known.lines().any(|line| line.ends_with("\tresctrl"))
}

/// Refuses what this host has not got.
pub(crate) fn check(spec: &Spec) -> Result<()> {
    if asked(spec).is_none() || find_resctrl_mount_point().is_ok() {
        return Ok(());
    }
    let reason = match is_there() {
        true => "resctrl is not mounted: mount -t resctrl resctrl /sys/fs/resctrl",
        false => "this host has no Intel RDT: its kernel has no resctrl file system",
    };
    Err(wrong(FIELD, reason))
}

/// Puts a container's init into its groups, before it runs anything.
pub(crate) fn assign(spec: &Spec, id: &str, init: sys::Pid) -> Result<Option<Groups>> {
    let Some(wanted) = asked(spec) else {
        return Ok(None);
    };
    let failed = |error: &dyn std::error::Error| wrong(FIELD, one_line(error));
    let mount = find_resctrl_mount_point().map_err(|e| failed(&e))?;
    let directory = mount.join(wanted.clos_id().as_deref().unwrap_or(id));
    let is_new = !directory.exists();
    // In libcontainer's type.
    let state = State::new(id, ContainerStatus::Creating, Some(init), PathBuf::new());
    let root = PathBuf::new();
    let pid = Container { state, root }.pid();
    let pid = pid.expect("it was given above");
    let made = setup_intel_rdt(Some(id), &pid, wanted).inspect_err(|_| {
        if is_new {
            fs::remove_dir(&directory).ok();
        }
    });
    let (own, monitoring) = made.map_err(|e| failed(&e))?;
    Ok(Some(Groups {
        directory,
        is_own: own.is_some(),
        monitoring,
    }))
}

impl Groups {
    /// Moves this process into them, as `exec` does.
    pub(crate) fn join(&self) -> Result<()> {
        let all = std::iter::once(&self.directory).chain(&self.monitoring);
        for tasks in all.map(|directory| directory.join("tasks")) {
            // Number 0 is the writer: kernel, `Documentation/filesystems/resctrl.rst`.
            fs::write(&tasks, "0").at("write", &tasks)?;
        }
        Ok(())
    }

    /// Removes what goes with the container. Processes that are left fall back to the group above.
    pub(crate) fn remove(&self) -> Result<()> {
        let own = self.is_own.then_some(self.directory.as_path());
        cleanup_intel_rdt(own, self.monitoring.as_deref(), None, "")
            .map_err(|e| Error::Argument(one_line(&e)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_the_containers_own_goes_with_it() {
        for is_own in [true, false] {
            let place = tempfile::tempdir().unwrap();
            let directory = place.path().join("group");
            let monitoring = directory.join("mon_groups/c");
            fs::create_dir_all(&monitoring).unwrap();
            let groups = Groups {
                directory: directory.clone(),
                is_own,
                monitoring: Some(monitoring.clone()),
            };
            groups.join().unwrap();
            for directory in [&monitoring, &directory] {
                let tasks = directory.join("tasks");
                assert_eq!(fs::read_to_string(&tasks).unwrap(), "0");
                // The kernel's files do not keep a directory.
                fs::remove_file(tasks).unwrap();
            }
            fs::rename(
                directory.join("mon_groups"),
                place.path().join("mon_groups"),
            )
            .unwrap();
            let groups = Groups {
                monitoring: Some(place.path().join("mon_groups/c")),
                ..groups
            };
            groups.remove().unwrap();
            assert!(!place.path().join("mon_groups/c").exists());
            assert_eq!(directory.exists(), !is_own);
            // Twice is no error: somebody may have been faster.
            groups.remove().unwrap();
        }
    }
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Operations on a container that exists: state, start, kill, pause, resume, update, delete. Each reads
//! `state.json`, finds out the status, and does one thing. Creation is `create`, processes inside are `exec`.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use libcontainer::notify_socket::NotifySocket;
use oci_spec::runtime::LinuxResources;
use serde::Serialize;

use crate::cgroup::absent::Together;
use crate::error::{Context, Error, Result};
use crate::state::{Directory, Saved, Status};
use crate::{bundle, cgroup, hooks, idmap, rdt, starting, sys};

/// How long a killed init may take to end: its memory is given back meanwhile.
const KILL_LIMIT: Duration = Duration::from_secs(10);

/// How long a killed init may take before it is looked for in a freezer.
const THAW_AFTER: Duration = Duration::from_millis(100);

/// How long the monitor may take to write the exit record after the init's end.
const MONITOR_LIMIT: Duration = Duration::from_secs(2);

/// How long `start` waits for somebody's `create`.
const CREATE_LIMIT: Duration = Duration::from_secs(10);

/// A container as it is now.
#[derive(Debug)]
pub struct Container {
    /// Its directory below the runtime's root.
    pub directory: Directory,
    /// What is remembered of it.
    pub saved: Saved,
    /// Its status when it was loaded.
    pub status: Status,
}

/// The state of the runtime-spec, "State", with runc's additions and the exit code.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct OciState<'a> {
    oci_version: &'a str,
    id: &'a str,
    /// 0 when there is no process.
    pid: sys::Pid,
    status: Status,
    bundle: &'a Path,
    rootfs: &'a Path,
    created: &'a str,
    annotations: &'a std::collections::BTreeMap<String, String>,
    owner: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    exit_code: Option<i32>,
}

impl Container {
    /// Loads a container by id.
    pub fn load(root: &Path, id: &str) -> Result<Self> {
        let directory = Directory::of(root, id)?;
        let saved = directory.load(id)?;
        let status = directory.status(&saved);
        Ok(Self {
            directory,
            saved,
            status,
        })
    }

    /// Its state for a reader outside.
    pub fn oci_state(&self) -> OciState<'_> {
        let stopped = self.status == Status::Stopped;
        OciState {
            oci_version: &self.saved.oci_version,
            id: &self.saved.id,
            pid: self
                .saved
                .init
                .filter(|_| !stopped)
                .map_or(0, |init| init.pid),
            status: self.status,
            bundle: &self.saved.bundle,
            rootfs: &self.saved.rootfs,
            created: &self.saved.created,
            annotations: &self.saved.annotations,
            owner: "root",
            exit_code: self
                .directory
                .exit()
                .filter(|_| stopped)
                .map(|exit| exit.exit_code),
        }
    }

    /// Refuses unless the status is one of those `allowed`.
    pub fn require(&self, allowed: &[Status], needed: &'static str) -> Result<()> {
        if allowed.contains(&self.status) {
            return Ok(());
        }
        Err(Error::Status {
            id: self.saved.id.clone(),
            status: self.status,
            needed,
        })
    }

    /// The configuration that the container was created from.
    pub fn spec(&self) -> Result<oci_spec::runtime::Spec> {
        let path = self.directory.config();
        bundle::parse(&fs::read(&path).at("read", &path)?, &path)
    }

    /// Its directories in every hierarchy of cgroups, or an error when it has none.
    pub fn cgroups(&self) -> Result<&[PathBuf]> {
        cgroup::required(&self.saved.id, &self.saved.cgroups)
    }

    /// Lets the created program run.
    pub fn start(&self) -> Result<()> {
        self.require(
            &[Status::Created],
            "only a created container can be started",
        )?;
        if cgroup::is_frozen(&self.saved.cgroups) {
            return Err(Error::Argument(format!(
                "container {} is frozen: resume it first",
                self.saved.id
            )));
        }
        let report = starting::connect(&self.directory.report_socket());
        let socket = self.directory.start_socket();
        NotifySocket::new(socket.clone())
            .notify_container_start()
            .map_err(|e| Error::Argument(format!("start: {}", crate::error::one_line(&e))))?;
        fs::remove_file(&socket).at("remove", &socket)?;
        report.map_or(Ok(()), starting::wait)?;
        fs::remove_file(self.directory.report_socket()).ok();
        if self.saved.has_hooks
            && let Err(error) = hooks::after_start(&self.spec()?, &self.saved)
        {
            self.kill(libc::SIGKILL)?;
            return Err(error);
        }
        Ok(())
    }

    /// Sends a signal to the init.
    pub fn kill(&self, signal: i32) -> Result<()> {
        let running = [Status::Created, Status::Running, Status::Paused];
        self.require(&running, "container not running")?;
        let init = self.saved.init.and_then(crate::process::ProcessId::open);
        let Some(init) = init else {
            return Err(Error::Status {
                id: self.saved.id.clone(),
                status: Status::Stopped,
                needed: "container not running",
            });
        };
        if signal == libc::SIGKILL
            && let Some(together) = self.together()
        {
            // As the end of a pid namespace would.
            return together.signal(signal).map(drop);
        }
        init.signal(signal)
            .context(|| format!("signal the init of {}", self.saved.id))?;
        if signal == libc::SIGKILL && cgroup::is_frozen(&self.saved.cgroups) {
            // A frozen v1 process does not even die.
            cgroup::thaw(&self.saved.cgroups)?;
        }
        Ok(())
    }

    /// What holds the processes of a running container together that has neither a cgroup nor a pid namespace. An init
    /// that has gone elsewhere, to the host's perhaps, holds nothing.
    fn together(&self) -> Option<Together> {
        let number = self.saved.mount_namespace?;
        let init = self.saved.init?;
        let _held = init.open()?;
        let together = Together::of(init.pid).ok()?;
        (together.number == number).then_some(together)
    }

    /// Sends a signal to every process in the container, whatever its state. A frozen one that is killed is thawed:
    /// in a v1 freezer it would not die.
    pub fn kill_all(&self, signal: i32) -> Result<()> {
        if let Some(together) = self.together() {
            return together.signal(signal).map(drop);
        }
        if self.saved.cgroups.is_empty() && signal == libc::SIGKILL {
            // All end with the first of their pid namespace, which may have ended.
            let init = self.saved.init.and_then(crate::process::ProcessId::open);
            init.map(|init| init.signal(signal).ok());
            return Ok(());
        }
        cgroup::signal_all(self.cgroups()?, signal)?;
        if signal == libc::SIGKILL {
            cgroup::thaw_for_kill(&self.saved.cgroups);
        }
        Ok(())
    }

    /// Freezes every process.
    pub fn pause(&self) -> Result<()> {
        self.require(
            &[Status::Running, Status::Created],
            "only a running container can be paused",
        )?;
        cgroup::freeze(self.cgroups()?)
    }

    /// Undoes [`Self::pause`].
    pub fn resume(&self) -> Result<()> {
        self.require(&[Status::Paused], "only a paused container can be resumed")?;
        cgroup::thaw(&self.saved.cgroups)
    }

    /// Changes limits.
    pub fn update(&self, resources: &LinuxResources) -> Result<()> {
        let there = [Status::Created, Status::Running, Status::Paused];
        self.require(
            &there,
            "only a container with processes has limits to change",
        )?;
        let directories = self.cgroups()?;
        cgroup::limits::apply(&self.saved.id, &self.saved.cgroup_path, resources)?;
        cgroup::limits::apply_unknown(directories, resources)?;
        let unit = self.saved.unit.as_deref();
        unit.map_or(Ok(()), |unit| {
            cgroup::scope::tell_limits(unit, &self.saved.cgroup_path)
        })
    }

    /// Removes a container that has ended or was never started, and everything of it on the host. Answers the
    /// warnings of its poststop hooks.
    pub fn delete(&self, force: Force) -> Result<Vec<String>> {
        if force == Force::No {
            let idle = [Status::Stopped, Status::Created];
            self.require(&idle, "stop it first, or delete with --force")?;
        }
        let init_pid = self.saved.init.map_or(0, |init| init.pid);
        let together = self.together();
        if let Some(init) = self.saved.init.and_then(crate::process::ProcessId::open) {
            // It may have ended meanwhile.
            init.signal(libc::SIGKILL).ok();
            if !init.wait_end(THAW_AFTER) {
                // Perhaps it is frozen, by us or by itself; in a v1 freezer it cannot even die.
                cgroup::thaw_for_kill(&self.saved.cgroups);
                cgroup::fetch(&self.saved.cgroups, init_pid);
            }
            if !init.wait_end(KILL_LIMIT) {
                return Err(Error::Argument(format!(
                    "the init of {} has not ended {} s after SIGKILL",
                    self.saved.id,
                    KILL_LIMIT.as_secs()
                )));
            }
        }
        cgroup::dissolve(&self.saved.cgroups, self.saved.unit.as_deref())?;
        together.map_or(Ok(()), |together| together.end())?;
        self.saved
            .rdt
            .as_ref()
            .map_or(Ok(()), rdt::Groups::remove)?;
        for mount in self.saved.mounts.iter().rev() {
            idmap::detach(mount);
        }
        if let Some(monitor) = self.saved.monitor.and_then(crate::process::ProcessId::open) {
            monitor.wait_end(MONITOR_LIMIT);
        }
        let spec = if self.saved.has_hooks {
            self.spec().ok()
        } else {
            None
        };
        self.directory.remove()?;
        Ok(spec
            .map(|spec| hooks::after_delete(&spec, &self.saved))
            .unwrap_or_default())
    }
}

/// Whether `delete` may kill.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Force {
    /// Refuse what runs.
    No,
    /// Kill what runs; a container that does not exist is no error.
    Yes,
}

/// Loads a container to be started. One that somebody is just creating is waited for.
pub fn load_created(root: &Path, id: &str) -> Result<Container> {
    let deadline = Instant::now() + CREATE_LIMIT;
    loop {
        let container = Container::load(root, id)?;
        if container.status != Status::Creating || Instant::now() > deadline {
            return Ok(container);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The ids below a root that a regular expression finds.
pub fn matching(root: &Path, expression: &str) -> Result<Vec<String>> {
    let expression = regex_lite::Regex::new(expression)
        .map_err(|e| Error::Argument(format!("--regex {expression}: {e}")))?;
    let ids = list(root)?.into_iter().map(|c| c.saved.id);
    Ok(ids.filter(|id| expression.is_match(id)).collect())
}

/// Deletes by id, also what a killed creator has left.
pub fn delete(root: &Path, id: &str, force: Force) -> Result<Vec<String>> {
    match Container::load(root, id) {
        Ok(container) => container.delete(force),
        Err(Error::NotFound { .. }) if force == Force::Yes => {
            Directory::of(root, id)?.remove().map(|()| Vec::new())
        }
        Err(error) => Err(error),
    }
}

/// Every container below a root, by id. Those that another process is just removing are left out.
pub fn list(root: &Path) -> Result<Vec<Container>> {
    let entries = match fs::read_dir(root) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.at("read", root)?,
    };
    let mut ids: Vec<PathBuf> = Vec::new();
    for entry in entries {
        ids.push(entry.at("read", root)?.file_name().into());
    }
    ids.sort();
    let load = |id: &PathBuf| Container::load(root, id.to_str()?).ok();
    Ok(ids.iter().filter_map(load).collect())
}

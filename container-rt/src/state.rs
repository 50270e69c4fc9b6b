// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! What is remembered of a container between two invocations: `<root>/<id>/state.json`, replaced by rename and
//! never edited in place. The status is not stored but found out, so that it cannot go stale:
//!
//! ```text
//!  creating --create--> created --start--> running <--pause/resume--> paused
//!   (no init yet)     (start.sock exists)     |                          |
//!                          +------------------+-------- init ends -------+--> stopped
//! ```
//!
//! libcontainer's own state file is not used: it is written in place, and stores the status.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::cgroup;
use crate::error::{Context, Error, Result};
use crate::process::ProcessId;
use crate::{rdt, rootless};

/// The saved form of a container. Fields are only ever added, as options.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Saved {
    /// The container's id.
    pub id: String,
    /// Version of the runtime-spec that config.json names.
    pub oci_version: String,
    /// Absolute path of the bundle.
    pub bundle: PathBuf,
    /// Absolute path of the root file system in the bundle.
    pub rootfs: PathBuf,
    /// RFC 3339, UTC.
    pub created: String,
    /// From config.json.
    pub annotations: BTreeMap<String, String>,
    /// The container's first process, once there is one.
    pub init: Option<ProcessId>,
    /// The monitor that holds the console and waits, when there is one.
    pub monitor: Option<ProcessId>,
    /// The container's cgroup, relative to every hierarchy.
    pub cgroup_path: PathBuf,
    /// The container's directories in every cgroup hierarchy.
    pub cgroups: Vec<PathBuf>,
    /// The systemd scope that they belong to, where systemd made them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unit: Option<String>,
    /// The init's mount namespace, where nothing else holds the processes together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mount_namespace: Option<u64>,
    /// Its groups of Intel RDT.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rdt: Option<rdt::Groups>,
    /// Mounts that exist only while the container is created.
    pub mounts: Vec<PathBuf>,
    /// Whether config.json has hooks to run at start or delete.
    pub has_hooks: bool,
}

/// Where containers are kept unless the caller says otherwise.
pub fn default_root() -> PathBuf {
    match rootless::runtime_directory() {
        Some(own) => own.join("atoll-ct"),
        None => "/run/atoll-ct".into(),
    }
}

/// Status of the runtime-spec, "Runtime and Lifecycle", plus `paused` as all runtimes have it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Being created; there is no process yet.
    Creating,
    /// Everything is set up, and the program waits for `start`.
    Created,
    /// The program runs.
    Running,
    /// All processes are frozen.
    Paused,
    /// The first process has ended.
    Stopped,
}

impl fmt::Display for Status {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Creating => "creating",
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
        })
    }
}

/// One of the terminals that a monitor serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Line {
    /// `/dev/console`, or the output of a program without a terminal.
    Console,
    /// `/dev/tty1` and so on.
    Tty(u8),
}

/// How a monitored container ended: `exit.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ExitRecord {
    /// The program's exit code, or 128 plus the signal.
    pub exit_code: i32,
    /// The signal that ended it.
    pub signal: Option<i32>,
    /// RFC 3339, UTC.
    pub time: String,
}

/// The container's directory `<root>/<id>` and the files in it.
#[derive(Debug, Clone)]
pub struct Directory {
    /// `<root>/<id>`.
    pub path: PathBuf,
}

impl Directory {
    /// Names the directory of `id`; it need not exist.
    pub fn of(root: &Path, id: &str) -> Result<Self> {
        let well_formed = id
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"_+-.".contains(&b));
        if id.is_empty() || id.len() > 1024 || id == "." || id == ".." || !well_formed {
            return Err(Error::Id { id: id.to_owned() });
        }
        Ok(Self {
            path: root.join(id),
        })
    }

    /// Takes the id: exactly one of several racing creators gets it.
    pub fn reserve(root: &Path, id: &str) -> Result<Self> {
        let directory = Self::of(root, id)?;
        let mut builder = fs::DirBuilder::new();
        std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
        builder.recursive(true).create(root).at("create", root)?;
        match builder.recursive(false).create(&directory.path) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                Err(Error::Exists { id: id.to_owned() })
            }
            other => other.at("create", &directory.path).map(|()| directory),
        }
    }

    /// The socket that `start` talks to; it exists exactly while the container is created but not started.
    pub fn start_socket(&self) -> PathBuf {
        self.path.join("start.sock")
    }

    /// The socket by which `start` hears from the init, until the program runs.
    pub fn report_socket(&self) -> PathBuf {
        self.path.join("report.sock")
    }

    /// The copy of config.json that the container was created from.
    pub fn config(&self) -> PathBuf {
        self.path.join("config.json")
    }

    /// The monitor's socket of a terminal: raw bytes both ways.
    pub fn terminal_socket(&self, line: Line) -> PathBuf {
        match line {
            Line::Console => self.path.join("console.sock"),
            Line::Tty(number) => self.path.join(format!("tty{number}.sock")),
        }
    }

    /// The monitor's socket for changes of a terminal's size.
    pub fn control_socket(&self, line: Line) -> PathBuf {
        match line {
            Line::Console => self.path.join("control.sock"),
            Line::Tty(number) => self.path.join(format!("tty{number}-control.sock")),
        }
    }

    /// The monitor's bounded log of the console.
    pub fn console_log(&self) -> PathBuf {
        self.path.join("console.log")
    }

    /// The monitor's record of the container's end.
    pub fn exit_record(&self) -> PathBuf {
        self.path.join("exit.json")
    }

    /// Replaces state.json.
    pub fn save(&self, saved: &Saved) -> Result<()> {
        write_atomically(&self.path.join("state.json"), &to_json(saved)?)
    }

    /// Reads state.json. A directory without one belongs to a creator that has just begun, or died.
    pub fn load(&self, id: &str) -> Result<Saved> {
        let path = self.path.join("state.json");
        match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(|source| Error::Json {
                what: path.display().to_string(),
                source,
            }),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                Err(Error::NotFound { id: id.to_owned() })
            }
            Err(e) => Err(e).at("read", &path),
        }
    }

    /// Finds out the status of a container.
    pub fn status(&self, saved: &Saved) -> Status {
        match saved.init {
            None => Status::Creating,
            Some(init) if !init.is_alive() => Status::Stopped,
            Some(_) if self.start_socket().exists() => Status::Created,
            Some(_) if cgroup::is_frozen(&saved.cgroups) => Status::Paused,
            Some(_) => Status::Running,
        }
    }

    /// How the container ended, when a monitor has seen it.
    pub fn exit(&self) -> Option<ExitRecord> {
        serde_json::from_slice(&fs::read(self.exit_record()).ok()?).ok()
    }

    /// Removes the directory. A monitor may be writing its last file into it, so this tries more than once.
    pub fn remove(&self) -> Result<()> {
        let mut result = Ok(());
        for _ in 0..5 {
            result = fs::remove_dir_all(&self.path);
            match &result {
                Err(e) if e.kind() == io::ErrorKind::DirectoryNotEmpty => {}
                Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
                _ => break,
            }
        }
        result.at("remove", &self.path)
    }
}

/// Serializes a value of ours.
pub(crate) fn to_json<T: Serialize>(value: &T) -> Result<Vec<u8>> {
    serde_json::to_vec(value).map_err(|source| Error::Json {
        what: "a state to save".to_owned(),
        source,
    })
}

/// Writes a file so that a reader sees the old or the new content, never a part.
pub fn write_atomically(path: &Path, content: &[u8]) -> Result<()> {
    let temporary = path.with_extension("tmp");
    let write = || {
        let mut file = fs::File::create(&temporary)?;
        file.write_all(content)?;
        fs::rename(&temporary, path)
    };
    write().at("write", path)
}

/// Now, as RFC 3339 in UTC.
pub(crate) fn now() -> String {
    chrono::Utc::now().to_rfc3339_opts(chrono::SecondsFormat::Nanos, true)
}

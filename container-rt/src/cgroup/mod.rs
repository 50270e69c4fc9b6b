// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The container's cgroups, beside what libcontainer does with them. libcontainer (through libcgroups) creates
//! the directories of the controllers it knows and writes the limits; it does not
//!
//! - join the named hierarchies (`name=systemd`) or the controller-less v2 mount of a hybrid host, without which
//!   systemd as init would run in the host's root cgroup;
//! - notice that a path is in use already, which would let two containers fight over one cgroup;
//! - give an unprivileged init the directories it must write to;
//! - remove directories that the container made below its own ([`remove`]);
//! - filter devices on v2 without a C library ([`devices`]);
//! - read the statistics of v2 where a controller is missing ([`statistics`]);
//! - leave a container without a cgroup to a user who may make none ([`absent`]);
//! - wait for systemd, where it makes the cgroup, or end its unit ([`scope`]).
//!
//! A container is known here by its list of directories, one per hierarchy, which `state.json` keeps.

pub mod absent;
mod bus;
pub mod devices;
pub mod limits;
pub mod scope;
pub mod statistics;

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use oci_spec::runtime::LinuxResources;

use crate::error::{Context, Error, Result};
use crate::rootless;
use crate::sys::{self, Fork, Pid};

/// Where all hierarchies are mounted, by every distribution's convention.
const MOUNT_ROOT: &str = "/sys/fs/cgroup";

/// How long [`remove`] waits for killed processes to end and directories to come free.
const REMOVE_LIMIT: Duration = Duration::from_secs(10);

/// How long [`freeze`] waits for the last process to stop.
const FREEZE_LIMIT: Duration = Duration::from_secs(10);

/// The v1 controllers that libcgroups joins by itself.
const LIBCGROUPS_CONTROLLERS: [&str; 12] = [
    "cpu",
    "cpuacct",
    "cpuset",
    "devices",
    "hugetlb",
    "memory",
    "pids",
    "perf_event",
    "blkio",
    "net_prio",
    "net_cls",
    "freezer",
];

/// One mounted hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hierarchy {
    /// Its mount point.
    pub mount: PathBuf,
    /// What it controls.
    pub kind: Kind,
}

/// What a hierarchy controls.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// cgroup v1 with these controllers.
    Controllers(Vec<String>),
    /// cgroup v1 without controllers, named.
    Named(String),
    /// cgroup v2: everything on a unified host, nothing but the tree on a hybrid one.
    Unified,
}

impl Hierarchy {
    /// Whether libcgroups creates and joins this one. On a unified host it does.
    fn is_libcgroups(&self, unified_host: bool) -> bool {
        match &self.kind {
            Kind::Controllers(names) => names
                .iter()
                .any(|name| LIBCGROUPS_CONTROLLERS.contains(&name.as_str())),
            Kind::Named(_) => false,
            Kind::Unified => unified_host,
        }
    }

    /// Whether an unprivileged container may own its part: only trees that limit nothing, or v2, where the
    /// kernel keeps limits on the parent's side (Documentation/admin-guide/cgroup-v2.rst, "Delegation").
    fn is_delegable(&self) -> bool {
        !matches!(self.kind, Kind::Controllers(_))
    }
}

/// The hierarchies of this host, from the text of /proc/self/mountinfo.
fn parse_hierarchies(mountinfo: &str) -> Vec<Hierarchy> {
    let mut found: Vec<Hierarchy> = Vec::new();
    for line in mountinfo.lines() {
        // proc(5): "id parent major:minor root mount-point options fields... - type source super-options".
        let Some((before, after)) = line.split_once(" - ") else {
            continue;
        };
        let (Some(mount), mut after) = (before.split(' ').nth(4), after.split(' ')) else {
            continue;
        };
        let (file_system, options) = (after.next(), after.nth(1).unwrap_or_default());
        if Path::new(mount).strip_prefix(MOUNT_ROOT).is_err() {
            continue;
        }
        let kind = match file_system {
            Some("cgroup2") => Kind::Unified,
            Some("cgroup") => match options.split(',').find_map(|o| o.strip_prefix("name=")) {
                Some(name) => Kind::Named(name.to_owned()),
                None => Kind::Controllers(
                    options
                        .split(',')
                        .filter(|o| {
                            !matches!(*o, "rw" | "ro" | "xattr" | "noprefix" | "clone_children")
                        })
                        .filter(|o| !o.contains('='))
                        .map(str::to_owned)
                        .collect(),
                ),
            },
            _ => continue,
        };
        let mount = PathBuf::from(mount);
        // A later mount at the same place hides the earlier one.
        found.retain(|hierarchy| hierarchy.mount != mount);
        found.push(Hierarchy { mount, kind });
    }
    found
}

/// The hierarchies that are mounted on this host.
pub fn hierarchies() -> Result<Vec<Hierarchy>> {
    let path = Path::new("/proc/self/mountinfo");
    let text = fs::read_to_string(path).at("read", path)?;
    let found = parse_hierarchies(&text);
    if found.is_empty() {
        return Err(Error::Argument(format!(
            "no cgroup hierarchy is mounted below {MOUNT_ROOT}: mount cgroup2 there"
        )));
    }
    Ok(found)
}

/// Whether the host has cgroup v2 only.
pub fn is_unified_host() -> Result<bool> {
    let found = hierarchies()?;
    Ok(found.iter().any(|h| h.mount == Path::new(MOUNT_ROOT)))
}

/// The cgroup of a container that is about to be created.
#[derive(Debug)]
pub struct Prepared {
    /// Its path, the same in every hierarchy.
    pub path: PathBuf,
    /// The container's directory in every hierarchy.
    pub directories: Vec<PathBuf>,
    /// Whether the host has v2 only.
    pub unified: bool,
    /// Directories that libcgroups leaves to us, with where this process was before it joined them.
    joined: Vec<(PathBuf, PathBuf)>,
    /// Held until there is an init.
    _scope: Option<scope::Scope>,
}

/// Who owns the delegated part of the container's cgroup: host ids of the container's root.
#[derive(Debug, Clone, Copy)]
pub struct Owner {
    /// User id on the host.
    pub uid: u32,
    /// Group id on the host.
    pub gid: u32,
}

/// Checks that `path` (absolute, below every hierarchy's root) is free, and creates what libcgroups does not.
pub fn prepare(path: &Path, owner: Option<Owner>) -> Result<Prepared> {
    let relative = path.strip_prefix("/").map_err(|_| Error::Config {
        field: "linux.cgroupsPath".to_owned(),
        reason: format!("{} is not absolute", path.display()),
    })?;
    let hierarchies = hierarchies()?;
    let unified = hierarchies.iter().any(|h| h.mount == Path::new(MOUNT_ROOT));
    let mut prepared = Prepared {
        path: path.to_owned(),
        directories: Vec::with_capacity(hierarchies.len()),
        unified,
        joined: Vec::new(),
        _scope: None,
    };
    let own =
        fs::read_to_string("/proc/self/cgroup").context(|| "read /proc/self/cgroup".to_owned())?;
    let rootless = rootless::in_user_namespace();
    for hierarchy in &hierarchies {
        let directory = hierarchy.mount.join(relative);
        check_free(&directory, path)?;
        let ours = !hierarchy.is_libcgroups(unified);
        let delegated = owner.filter(|_| hierarchy.is_delegable());
        if unified {
            // The device filter is attached before libcgroups gets there, and libcgroups passes controllers on
            // only where it creates the directory itself.
            create_with_controllers(&hierarchy.mount, relative)?;
        } else if (ours || delegated.is_some() || rootless)
            && let Err(error) = fs::create_dir_all(&directory)
        {
            prepared.give_up();
            return Err(error).at("create", &directory);
        }
        if let Some(owner) = delegated {
            delegate(&directory, owner)?;
        }
        if ours {
            let before = own_path(&own, &hierarchy.kind).unwrap_or("/");
            let before = hierarchy.mount.join(before.trim_start_matches('/'));
            prepared.joined.push((directory.clone(), before));
        }
        prepared.directories.push(directory);
    }
    if rootless && unified {
        try_to_enter(&prepared.directories).inspect_err(|_| prepared.give_up())?;
    }
    Ok(prepared)
}

/// The same for whoever may perhaps make none at `path`: then below his own, which may be delegated to him.
pub fn prepare_somewhere(path: &Path, owner: Option<Owner>) -> Result<Prepared> {
    let refused = match prepare(path, owner) {
        Err(error) if rootless::in_user_namespace() && rootless::is_refusal(&error) => error,
        other => return other,
    };
    if !is_unified_host()? {
        return Err(refused);
    }
    let text =
        fs::read_to_string("/proc/self/cgroup").context(|| "read /proc/self/cgroup".to_owned())?;
    let own = Path::new(own_path(&text, &Kind::Unified).unwrap_or("/"));
    let below = own.join(path.strip_prefix("/").unwrap_or(path));
    match prepare(&below, owner) {
        Err(error) if rootless::is_refusal(&error) => Err(refused),
        other => other,
    }
}

/// Whether this process may move into a cgroup: making one takes less, and libcgroups passes over the refusal. A child
/// tries, since there may be no way back. Kernel, `Documentation/admin-guide/cgroup-v2.rst`, "Delegation Containment".
fn try_to_enter(directories: &[PathBuf]) -> Result<()> {
    let child = match sys::fork().context(|| "fork".to_owned())? {
        Fork::Parent(pid) => crate::process::ProcessFd::of_child(pid)?,
        Fork::Child => {
            let mut files = directories.iter().map(|d| d.join("cgroup.procs"));
            let number = files
                .try_for_each(|file| fs::write(file, "0"))
                .err()
                .map(|e| e.raw_os_error().unwrap_or(libc::EIO));
            sys::exit_now(number.unwrap_or(0));
        }
    };
    match crate::process::wait_child(&child)?.code {
        0 => Ok(()),
        number => Err(io::Error::from_raw_os_error(number))
            .context(|| "move a process into a new cgroup".to_owned()),
    }
}

/// Creates a v2 directory that has every controller of the host: each level above it passes them on.
fn create_with_controllers(mount: &Path, relative: &Path) -> Result<()> {
    let path = mount.join("cgroup.controllers");
    let available = fs::read_to_string(&path).at("read", &path)?;
    let mut directory = mount.to_owned();
    for component in relative.components() {
        for controller in available.split_whitespace() {
            // One write each, and errors wait: one that cannot be passed on here must not keep the others off,
            // and is missed only by a container that sets a limit of it, which then fails by name.
            let _ = fs::write(
                directory.join("cgroup.subtree_control"),
                format!("+{controller}"),
            );
        }
        directory.push(component);
        match fs::create_dir(&directory) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(error).at("create", &directory);
            }
            _ => {}
        }
    }
    Ok(())
}

impl Prepared {
    /// Takes back what was made so far; processes there are none.
    fn give_up(&self) {
        for directory in &self.directories {
            fs::remove_dir(directory).ok();
        }
    }

    /// The cgroup of a scope that was just started.
    pub fn of_scope(scope: scope::Scope, owner: Option<Owner>) -> Result<Self> {
        let mount = Path::new(MOUNT_ROOT);
        let relative = scope.path.strip_prefix("/").unwrap_or(&scope.path);
        // systemd passes on those that it knows.
        create_with_controllers(mount, relative)?;
        let directory = mount.join(relative);
        if let Some(owner) = owner {
            delegate(&directory, owner)?;
        }
        Ok(Self {
            path: scope.path.clone(),
            directories: vec![directory],
            unified: true,
            joined: Vec::new(),
            _scope: Some(scope),
        })
    }

    /// Moves this process into the hierarchies that libcgroups does not know, for its children to inherit.
    pub fn enter(&self) -> Result<()> {
        for (directory, _) in &self.joined {
            add_process(directory, 0)?;
        }
        Ok(())
    }

    /// The container's directories, each with the name that its hierarchy is mounted under.
    pub(crate) fn by_mount(&self) -> Result<Vec<(PathBuf, PathBuf)>> {
        let hierarchies = hierarchies()?;
        let named = |directory: &PathBuf| {
            let hierarchy = hierarchies
                .iter()
                .find(|h| directory.starts_with(&h.mount))?;
            Some((hierarchy.mount.file_name()?.into(), directory.clone()))
        };
        Ok(self.directories.iter().filter_map(named).collect())
    }

    /// Moves a process into all of it, and sets the limits: what libcontainer does for an init.
    pub fn take(&self, id: &str, pid: Pid, resources: &LinuxResources) -> Result<()> {
        limits::join(id, &self.path, pid)?;
        for (directory, _) in &self.joined {
            add_process(directory, pid)?;
        }
        limits::apply(id, &self.path, resources)
    }

    /// Moves this process back to where it was before [`Self::enter`].
    pub fn leave(&self) -> Result<()> {
        for (_, before) in &self.joined {
            add_process(before, 0)?;
        }
        Ok(())
    }
}

/// Path of a process in a hierarchy, from the text of /proc/PID/cgroup. cgroups(7).
fn own_path<'a>(text: &'a str, kind: &Kind) -> Option<&'a str> {
    text.lines().find_map(|line| {
        let mut fields = line.splitn(3, ':');
        let (_, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
        let matches = match kind {
            Kind::Unified => controllers.is_empty(),
            Kind::Named(name) => controllers.strip_prefix("name=") == Some(name),
            Kind::Controllers(names) => {
                names.iter().any(|n| controllers.split(',').any(|c| c == n))
            }
        };
        matches.then_some(path)
    })
}

/// Where a process is in every hierarchy, by controller or by `name=NAME`; by nothing on v2. cgroups(7).
pub(crate) fn paths_of(pid: Pid) -> Result<Vec<(String, String)>> {
    let path = PathBuf::from(format!("/proc/{pid}/cgroup"));
    let text = fs::read_to_string(&path).at("read", &path)?;
    let mut found = Vec::new();
    for line in text.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        if let (Some(controllers), Some(path)) = (fields.next(), fields.next()) {
            let each = controllers.split(',');
            found.extend(each.map(|one| (one.to_owned(), path.to_owned())));
        }
    }
    Ok(found)
}

/// A cgroup that has processes belongs to somebody else; a frozen one would stop the container before it begins.
fn check_free(directory: &Path, path: &Path) -> Result<()> {
    if !directory.exists() {
        return Ok(());
    }
    let in_use = |reason: String| Error::Config {
        field: "linux.cgroupsPath".to_owned(),
        reason: format!("{}: {reason}", path.display()),
    };
    let processes = processes(directory).at("read", directory)?;
    if !processes.is_empty() {
        let count = processes.len();
        return Err(in_use(format!(
            "the cgroup exists and has {count} processes: end them, or choose another path"
        )));
    }
    if is_frozen(&[directory.to_owned()]) {
        return Err(in_use(
            "container's cgroup unexpectedly frozen: thaw or remove it".to_owned(),
        ));
    }
    Ok(())
}

/// Lets the container's root manage its own subtree, as "Delegation" of the v2 documentation lists the files.
fn delegate(directory: &Path, owner: Owner) -> Result<()> {
    chown(directory, Some(owner.uid), Some(owner.gid)).at("chown", directory)?;
    for file in [
        "cgroup.procs",
        "cgroup.subtree_control",
        "cgroup.threads",
        "tasks",
    ] {
        let file = directory.join(file);
        match chown(&file, Some(owner.uid), Some(owner.gid)) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            other => other.at("chown", &file)?,
        }
    }
    Ok(())
}

/// Moves a process (0: this one) into a cgroup.
fn add_process(directory: &Path, pid: Pid) -> Result<()> {
    let file = directory.join("cgroup.procs");
    fs::write(&file, pid.to_string()).at("write", &file)
}

/// Moves this process into a container's cgroups, as `exec` does. A v2 cgroup whose container distributes
/// controllers takes no processes itself; then its init's own cgroup does.
pub fn join(directories: &[PathBuf], init: Pid) -> Result<()> {
    for directory in directories {
        let file = directory.join("cgroup.procs");
        match fs::write(&file, "0") {
            Err(e) if e.kind() == io::ErrorKind::ResourceBusy => {
                add_process(&init_cgroup(init)?, 0)?
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                let (own, file) = (std::process::id(), file.display());
                return Err(Error::Argument(format!(
                    "exec: adding pid {own}: open {file}: no such file or directory"
                )));
            }
            other => other.at("write", &file)?,
        }
    }
    Ok(())
}

/// Those of a container's directories that belong to v1 controllers named `a,b`; all when none is named.
pub fn of_controllers(directories: &[PathBuf], controllers: &str) -> Result<Vec<PathBuf>> {
    if controllers.is_empty() {
        return Ok(directories.to_vec());
    }
    let hierarchies = hierarchies()?;
    let mut found = Vec::new();
    for name in controllers.split(',') {
        let has = |h: &&Hierarchy| match &h.kind {
            Kind::Controllers(names) => names.iter().any(|n| n == name),
            Kind::Named(own) => name.strip_prefix("name=") == Some(own),
            Kind::Unified => name.is_empty(),
        };
        let unknown = || Error::Argument(format!("--cgroup: unknown controller {name}"));
        let mount = &hierarchies.iter().find(has).ok_or_else(unknown)?.mount;
        found.extend(directories.iter().filter(|d| d.starts_with(mount)).cloned());
    }
    Ok(found)
}

/// The v2 cgroup that a container's init is in now.
fn init_cgroup(init: Pid) -> Result<PathBuf> {
    let path = PathBuf::from(format!("/proc/{init}/cgroup"));
    let text = fs::read_to_string(&path).at("read", &path)?;
    let own = own_path(&text, &Kind::Unified).unwrap_or("/");
    Ok(Path::new(MOUNT_ROOT).join(own.trim_start_matches('/')))
}

/// Every process in a directory and below. Processes may come and go meanwhile.
fn processes(directory: &Path) -> io::Result<BTreeSet<Pid>> {
    let mut found = BTreeSet::new();
    let mut pending = vec![directory.to_owned()];
    while let Some(directory) = pending.pop() {
        match fs::read_to_string(directory.join("cgroup.procs")) {
            Ok(text) => found.extend(text.lines().filter_map(|line| line.parse::<Pid>().ok())),
            Err(e) if is_gone(&e) => continue,
            Err(e) => return Err(e),
        }
        pending.extend(children(&directory)?);
    }
    Ok(found)
}

fn children(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(directory) {
        Err(e) if is_gone(&e) => return Ok(Vec::new()),
        other => other?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            found.push(entry.path());
        }
    }
    Ok(found)
}

/// ENODEV is what an open file of a removed cgroup answers; EOPNOTSUPP a threaded one's cgroup.procs.
fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ENODEV)
}

/// Every process of a container, by host process id.
pub fn all_processes(directories: &[PathBuf]) -> Result<BTreeSet<Pid>> {
    let mut found = BTreeSet::new();
    for directory in directories {
        found.append(&mut processes(directory).at("read", directory)?);
    }
    Ok(found)
}

/// The container's directories, for what cannot be done without: a rootless container may have none.
pub fn required<'a>(id: &str, directories: &'a [PathBuf]) -> Result<&'a [PathBuf]> {
    if directories.is_empty() {
        return Err(Error::Argument(format!(
            "container {id} has no cgroup: its user may make none, or wanted none"
        )));
    }
    Ok(directories)
}

/// Sends a signal to every process of a container.
pub fn signal_all(directories: &[PathBuf], signal: i32) -> Result<()> {
    for pid in all_processes(directories)? {
        match sys::kill(pid, signal) {
            Err(e) if e.raw_os_error() == Some(libc::ESRCH) => {}
            other => other.context(|| format!("signal process {pid}"))?,
        }
    }
    Ok(())
}

/// Kills every process of a container, removes its cgroups and those that it made below them.
pub fn remove(directories: &[PathBuf]) -> Result<()> {
    let deadline = Instant::now() + REMOVE_LIMIT;
    let mut pause = Duration::from_micros(200);
    let mut killed = false;
    loop {
        let mut left = None;
        for directory in directories {
            if let Err(error) = remove_tree(directory) {
                left.get_or_insert((directory, error));
            }
        }
        let Some((directory, error)) = left else {
            return Ok(());
        };
        if Instant::now() > deadline {
            return Err(error).at("remove cgroup", directory);
        }
        if !killed {
            // A v1 freezer keeps even SIGKILL waiting.
            thaw_for_kill(directories);
            killed = true;
        }
        for directory in directories {
            // cgroup.kill reaches the whole subtree at once, also what forks meanwhile. Linux 5.14.
            if fs::write(directory.join("cgroup.kill"), "1").is_ok() {
                break;
            }
        }
        signal_all(directories, libc::SIGKILL)?;
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}

/// [`remove`], and the end of the scope that the cgroups belong to, where there is one.
pub fn dissolve(directories: &[PathBuf], unit: Option<&str>) -> Result<()> {
    remove(directories)?;
    unit.map_or(Ok(()), scope::stop)
}

/// Removes a directory after those below it.
fn remove_tree(directory: &Path) -> io::Result<()> {
    match fs::remove_dir(directory) {
        Err(e) if is_gone(&e) => return Ok(()),
        Err(e) if e.kind() == io::ErrorKind::ResourceBusy => {}
        other => return other,
    }
    for child in children(directory)? {
        remove_tree(&child)?;
    }
    match fs::remove_dir(directory) {
        Err(e) if is_gone(&e) => Ok(()),
        other => other,
    }
}

/// The file that freezes a container and the two words it takes, for whichever version is there.
struct Freezer {
    file: PathBuf,
    version2: bool,
}

fn freezer(directories: &[PathBuf]) -> Option<Freezer> {
    let v1 = directories
        .iter()
        .map(|d| d.join("freezer.state"))
        .find(|f| f.exists());
    let v1 = v1.map(|file| Freezer {
        file,
        version2: false,
    });
    v1.or_else(|| {
        let file = directories
            .iter()
            .map(|d| d.join("cgroup.freeze"))
            .find(|f| f.exists())?;
        Some(Freezer {
            file,
            version2: true,
        })
    })
}

/// The container's directory in the hierarchy that freezes.
pub(crate) fn freezer_directory(directories: &[PathBuf]) -> Option<PathBuf> {
    let file = freezer(directories)?.file;
    file.parent().map(Path::to_owned)
}

/// Whether a container is frozen, or about to be.
pub fn is_frozen(directories: &[PathBuf]) -> bool {
    directories.iter().any(|directory| {
        let v1 = fs::read_to_string(directory.join("freezer.state"));
        let v2 = fs::read_to_string(directory.join("cgroup.freeze"));
        v1.is_ok_and(|state| state.trim() != "THAWED") || v2.is_ok_and(|state| state.trim() == "1")
    })
}

/// Freezes all processes of a container, and returns when they are.
pub fn freeze(directories: &[PathBuf]) -> Result<()> {
    let freezer = freezer(directories).ok_or_else(|| {
        Error::Argument(
            "the container has no freezer: mount the v1 freezer or cgroup v2".to_owned(),
        )
    })?;
    let deadline = Instant::now() + FREEZE_LIMIT;
    loop {
        // v1 may have to be told again: a fork at the wrong moment leaves it FREEZING.
        let word = if freezer.version2 { "1" } else { "FROZEN" };
        fs::write(&freezer.file, word).at("write", &freezer.file)?;
        let frozen = if freezer.version2 {
            let events = freezer.file.with_file_name("cgroup.events");
            fs::read_to_string(&events)
                .at("read", &events)?
                .contains("frozen 1")
        } else {
            fs::read_to_string(&freezer.file)
                .at("read", &freezer.file)?
                .trim()
                == "FROZEN"
        };
        if frozen {
            return Ok(());
        }
        if Instant::now() > deadline {
            thaw(directories)?;
            return Err(Error::Argument(format!(
                "a process did not freeze within {} s; the container goes on",
                FREEZE_LIMIT.as_secs()
            )));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Lets a frozen container go on.
pub fn thaw(directories: &[PathBuf]) -> Result<()> {
    let Some(freezer) = freezer(directories) else {
        return Ok(());
    };
    let word = if freezer.version2 { "0" } else { "THAWED" };
    fs::write(&freezer.file, word).at("write", &freezer.file)
}

/// Thaws the container and every freezer that it made itself.
pub fn thaw_for_kill(directories: &[PathBuf]) {
    let mut pending = directories.to_vec();
    while let Some(directory) = pending.pop() {
        let file = directory.join("freezer.state");
        if file.exists() {
            // Best effort: removal reports what remains.
            fs::write(&file, "THAWED").ok();
            pending.extend(children(&directory).unwrap_or_default());
        }
    }
}

/// Brings a process back from somebody else's v1 freezer, in which it cannot even die: one moved to a thawed
/// freezer runs again.
pub fn fetch(directories: &[PathBuf], pid: Pid) {
    for directory in directories {
        if directory.join("freezer.state").exists() {
            // Best effort: the caller waits for the process's end, and says when there is none.
            add_process(directory, pid).ok();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hybrid_host() {
        let text = "\
30 24 0:26 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
31 30 0:27 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct
32 30 0:28 / /sys/fs/cgroup/systemd rw,relatime shared:9 - cgroup cgroup rw,xattr,name=systemd
33 30 0:29 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw,nsdelegate
34 24 0:29 / /mnt/elsewhere rw,relatime - cgroup2 cgroup2 rw
";
        let found = parse_hierarchies(text);
        let kinds: Vec<&Kind> = found.iter().map(|h| &h.kind).collect();
        assert_eq!(
            kinds,
            [
                &Kind::Controllers(vec!["cpu".to_owned(), "cpuacct".to_owned()]),
                &Kind::Named("systemd".to_owned()),
                &Kind::Unified
            ]
        );
        let ours: Vec<bool> = found.iter().map(|h| !h.is_libcgroups(false)).collect();
        assert_eq!(ours, [false, true, true]);
    }

    #[test]
    fn own_paths() {
        let text = "5:cpu,cpuacct:/a\n1:name=systemd:/b:c\n0::/d\n";
        assert_eq!(
            own_path(text, &Kind::Controllers(vec!["cpuacct".to_owned()])),
            Some("/a")
        );
        assert_eq!(
            own_path(text, &Kind::Named("systemd".to_owned())),
            Some("/b:c")
        );
        assert_eq!(own_path(text, &Kind::Unified), Some("/d"));
        assert_eq!(own_path(text, &Kind::Named("elogind".to_owned())), None);
    }
}

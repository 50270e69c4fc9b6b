// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A further process in a running container. libcontainer's own way here joins neither the container's user
//! namespace nor its seccomp filter, and returns a bare process id; so this is ours, with its pieces for
//! capabilities, AppArmor and the terminal.
//!
//! ```text
//!  atoll-ct                        child
//!  setns(pid) by the init's pidfd
//!  fork ------------------------>  cgroups -> setns(the rest) -> session, terminal -> limits, user,
//!  waits on a pipe                 capabilities, seccomp -> execve (closes the pipe)
//!  waits for the child, or not     or writes why not
//! ```

use std::fs;
use std::io::{Read, Write};
use std::os::fd::{AsFd, IntoRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

use libcontainer::syscall::syscall::create_syscall;
use libcontainer::{apparmor, capabilities, tty};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{Gid, Uid, chdir, setfsgid, setfsuid, setgroups, setresgid, setresuid, setsid};
use oci_spec::runtime::{Capabilities, LinuxNamespaceType, LinuxSeccomp, Process, Spec, User};

use crate::error::{Context, Error, Result, one_line};
use crate::lifecycle::Container;
use crate::process::{ExitStatus, ProcessFd};
use crate::state::{Status, write_atomically};
use crate::sys::{self, Fork};
use crate::terminal::{self, Signals};
use crate::{bundle, cgroup, filter, inherit, notify, program, rdt, rootless};

/// What to execute and how, as `atoll-ct exec` takes it.
#[derive(Debug, Default)]
pub struct Request {
    /// A whole `process` object in a file; the other settings are laid over it.
    pub process: Option<PathBuf>,
    /// Program and arguments.
    pub arguments: Vec<String>,
    /// `NAME=value`, in addition to the container's.
    pub environment: Vec<String>,
    /// Working directory.
    pub cwd: Option<PathBuf>,
    /// `uid[:gid]`.
    pub user: Option<String>,
    /// Supplementary groups.
    pub additional_gids: Vec<u32>,
    /// Capabilities in addition to the container's.
    pub capabilities: Vec<String>,
    /// Allocate a terminal.
    pub terminal: bool,
    /// Forbid gaining privileges.
    pub no_new_privileges: bool,
    /// AppArmor profile.
    pub apparmor: Option<String>,
    /// Do not wait.
    pub detach: bool,
    /// How long it may run; then it is killed with its process group, and that is an error.
    pub time_max: Option<Duration>,
    /// Allow it in a frozen container: it will wait there.
    pub ignore_paused: bool,
    /// Socket to which the terminal's controlling side is sent.
    pub console_socket: Option<PathBuf>,
    /// File that gets the process id.
    pub pid_file: Option<PathBuf>,
    /// Descriptors above standard error that the program inherits.
    pub preserve_fds: u32,
    /// Cgroups below the container's, which must exist: `path`, or for some v1 controllers `name,name:path`.
    pub cgroups: Vec<String>,
}

/// Executes a process in a container. Answers how it ended, or nothing when detached.
pub fn exec(container: &Container, request: &Request) -> Result<Option<ExitStatus>> {
    let allowed: &[Status] = if request.ignore_paused {
        &[Status::Created, Status::Running, Status::Paused]
    } else {
        &[Status::Created, Status::Running]
    };
    if container.status == Status::Paused && !request.ignore_paused {
        return Err(Error::Status {
            id: container.saved.id.clone(),
            status: Status::Paused,
            needed: "cannot exec in a paused container (--ignore-paused lets it wait there)",
        });
    }
    container.require(allowed, "only a container with processes takes another")?;
    let begun = Instant::now();
    let spec = container.spec()?;
    let process = process(&spec, request)?;
    let wants_terminal = process.terminal().unwrap_or(false);
    let signals = if request.detach {
        None
    } else {
        Some(Signals::block()?)
    };
    let (ours, theirs) = terminal_sockets(request, wants_terminal)?;
    let filter = spec.linux().as_ref().and_then(|l| l.seccomp().as_ref());
    let asks = filter.filter(|filter| filter::asks(filter));
    let (offered, offer) = asks.map(|_| notify::pair()).transpose()?.unzip();
    let (mut errors, report) = std::io::pipe().context(|| "create a pipe".to_owned())?;
    let init = init_of(container)?;
    let flags = namespaces(&spec) | restored_clock(container);
    if flags & libc::CLONE_NEWPID != 0 {
        // For our children only; we stay where we are.
        sys::setns(init.as_fd(), libc::CLONE_NEWPID)
            .context(|| "join the pid namespace".to_owned())?;
    }
    let child = match sys::fork().context(|| "fork".to_owned())? {
        Fork::Parent(pid) => pid,
        Fork::Child => {
            drop((errors, ours, offered));
            let entry = Entry {
                container,
                request,
                process: &process,
                seccomp: filter,
                offer: offer.as_ref(),
                init: &init,
                flags: flags & !libc::CLONE_NEWPID,
            };
            fail_in_child(&entry, theirs, report);
        }
    };
    drop((theirs, report, offer));
    let child_fd = ProcessFd::of_child(child)?;
    if let (Some(filter), Some(offered)) = (asks, offered) {
        let running = (Status::Running, container.saved.init.map(|init| init.pid));
        notify::pass_on(offered, filter, &container.saved, running)?;
    }
    let pty = ours.map(|socket| terminal::receive_fd(&socket));
    wait_for_program(&mut errors, &child_fd)?;
    if let Some(file) = &request.pid_file {
        write_atomically(file, child.to_string().as_bytes())?;
    }
    let Some(signals) = signals else {
        return Ok(None);
    };
    let deadline = request.time_max.map(|time| begun + time);
    let ended = terminal::foreground_until(&child_fd, pty.transpose()?, signals, deadline)?;
    match (ended, request.time_max) {
        (None, Some(time)) => Err(cut_off(child, &child_fd, time)),
        (ended, _) => Ok(ended),
    }
}

/// Ends a process that has run for too long, and what it has started in its group. It is the leader of a session, and
/// we have not reaped it, so that the group's number is still its own.
fn cut_off(pid: sys::Pid, child: &ProcessFd, time: Duration) -> Error {
    // Those that have ended meanwhile need no signal.
    sys::kill(-pid, libc::SIGKILL).ok();
    child.signal(libc::SIGKILL).ok();
    match crate::process::wait_child(child) {
        Ok(_) => Error::Argument(format!("not ended within {} s, killed", time.as_secs_f64())),
        Err(error) => error,
    }
}

/// The init, held open: it cannot become another process meanwhile.
fn init_of(container: &Container) -> Result<ProcessFd> {
    let init = container
        .saved
        .init
        .and_then(crate::process::ProcessId::open);
    init.ok_or_else(|| Error::Status {
        id: container.saved.id.clone(),
        status: Status::Stopped,
        needed: "only a container with processes takes another",
    })
}

/// Runs the child's side; it either becomes the program or reports why not and ends.
fn fail_in_child(
    entry: &Entry<'_>,
    terminal: Option<OwnedFd>,
    mut report: std::io::PipeWriter,
) -> ! {
    let Err(error) = enter(entry, terminal);
    let code = match &error {
        Error::Executable { exit_code, .. } => *exit_code,
        _ => 1,
    };
    // Nobody is left to tell when this fails.
    report
        .write_all(&[code])
        .and_then(|()| report.write_all(one_line(&error).as_bytes()))
        .ok();
    sys::exit_now(code.into())
}

/// Waits until the child has become its program, or reports its error.
fn wait_for_program(errors: &mut impl Read, child: &ProcessFd) -> Result<()> {
    let mut report = Vec::new();
    errors
        .read_to_end(&mut report)
        .context(|| "read from the new process".to_owned())?;
    let Some((&exit_code, message)) = report.split_first() else {
        return Ok(());
    };
    crate::process::wait_child(child)?;
    let message = String::from_utf8_lossy(message).into_owned();
    Err(match exit_code {
        126 | 127 => Error::Executable { message, exit_code },
        _ => Error::Argument(message),
    })
}

/// The two ends between which the new terminal travels: ours when we serve it, and the child's.
fn terminal_sockets(
    request: &Request,
    wanted: bool,
) -> Result<(Option<UnixStream>, Option<OwnedFd>)> {
    match &request.console_socket {
        Some(_) if !wanted => Err(Error::Argument(
            "--console-socket needs a terminal: add --tty, or set terminal in the process"
                .to_owned(),
        )),
        Some(path) => {
            let stream = terminal::connect(path).at("connect to the console socket", path)?;
            Ok((None, Some(stream.into())))
        }
        None if wanted && request.detach => Err(Error::Argument(
            "a detached process with a terminal needs --console-socket".to_owned(),
        )),
        None if wanted => {
            let pair = UnixStream::pair();
            let (ours, theirs) = pair.context(|| "create a socket pair".to_owned())?;
            Ok((Some(ours), Some(theirs.into())))
        }
        None => Ok((None, None)),
    }
}

/// A restored container has a time namespace, unasked: its clocks go on from where they were.
fn restored_clock(container: &Container) -> i32 {
    let init = container.saved.init.map_or(0, |init| init.pid);
    let theirs = fs::read_link(format!("/proc/{init}/ns/time"));
    let ours = fs::read_link("/proc/self/ns/time");
    match (theirs, ours) {
        (Ok(theirs), Ok(ours)) if theirs != ours => libc::CLONE_NEWTIME,
        _ => 0,
    }
}

/// The namespaces of the container that differ from ours by configuration, as CLONE_NEW* flags.
fn namespaces(spec: &Spec) -> i32 {
    let list = spec
        .linux()
        .as_ref()
        .and_then(|l| l.namespaces().as_deref())
        .unwrap_or_default();
    list.iter().fold(0, |flags, namespace| {
        flags
            | match namespace.typ() {
                LinuxNamespaceType::Mount => libc::CLONE_NEWNS,
                LinuxNamespaceType::Cgroup => libc::CLONE_NEWCGROUP,
                LinuxNamespaceType::Uts => libc::CLONE_NEWUTS,
                LinuxNamespaceType::Ipc => libc::CLONE_NEWIPC,
                LinuxNamespaceType::User => libc::CLONE_NEWUSER,
                LinuxNamespaceType::Pid => libc::CLONE_NEWPID,
                LinuxNamespaceType::Network => libc::CLONE_NEWNET,
                LinuxNamespaceType::Time => libc::CLONE_NEWTIME,
            }
    })
}

/// The process to execute: the container's own as the base, or the given one, with the request laid over it.
fn process(spec: &Spec, request: &Request) -> Result<Process> {
    let base = spec.process().clone().unwrap_or_default();
    let mut process = match &request.process {
        Some(path) => {
            let text = fs::read(path).at("read", path)?;
            bundle::parse_lenient(&text, &[]).map_err(|source| Error::Json {
                what: path.display().to_string(),
                source,
            })?
        }
        None => {
            let mut process = base;
            process.set_terminal(Some(request.terminal));
            process
        }
    };
    if !request.arguments.is_empty() {
        process.set_args(Some(request.arguments.clone()));
    }
    if process.args().as_deref().unwrap_or_default().is_empty() {
        return Err(Error::Argument("name the program to execute".to_owned()));
    }
    if let Some(cwd) = &request.cwd {
        process.set_cwd(cwd.clone());
    }
    if !process.cwd().is_absolute() {
        return Err(Error::Argument(format!(
            "--cwd {}: not absolute",
            process.cwd().display()
        )));
    }
    if request.terminal {
        process.set_terminal(Some(true));
    }
    if request.no_new_privileges {
        process.set_no_new_privileges(Some(true));
    }
    if let Some(profile) = &request.apparmor {
        process.set_apparmor_profile(Some(profile.clone()));
    }
    crate::apparmor::settle(&mut process)?;
    let mut environment = process.env().clone().unwrap_or_default();
    for variable in &request.environment {
        let name = variable
            .split_once('=')
            .map_or(variable.as_str(), |(name, _)| name);
        environment.retain(|known| known.split_once('=').is_none_or(|(known, _)| known != name));
        environment.push(variable.clone());
    }
    process.set_env(Some(environment));
    set_user(&mut process, request)?;
    bundle::close_capabilities(&mut process);
    add_capabilities(&mut process, &request.capabilities);
    Ok(process)
}

fn set_user(process: &mut Process, request: &Request) -> Result<()> {
    if let Some(text) = &request.user {
        let bad = || Error::Argument(format!("--user {text}: give uid or uid:gid, as numbers"));
        let (uid, gid) = text.split_once(':').unwrap_or((text, "0"));
        let mut user = User::default();
        user.set_uid(uid.parse().map_err(|_| bad())?);
        user.set_gid(gid.parse().map_err(|_| bad())?);
        process.set_user(user);
    }
    if !request.additional_gids.is_empty() {
        let mut user = process.user().clone();
        user.set_additional_gids(Some(request.additional_gids.clone()));
        process.set_user(user);
    }
    Ok(())
}

/// Adds capabilities to what the process may use; not to what its children inherit (CVE-2022-29162).
fn add_capabilities(process: &mut Process, names: &[String]) {
    if names.is_empty() {
        return;
    }
    let mut added = Capabilities::new();
    for name in names {
        let upper = name.to_ascii_uppercase();
        let upper = upper.strip_prefix("CAP_").unwrap_or(&upper);
        match serde_json::from_value(serde_json::Value::from(format!("CAP_{upper}"))) {
            Ok(capability) => {
                added.insert(capability);
            }
            Err(_) => bundle::warn(&format!("--cap {name}: unknown capability, left out")),
        }
    }
    let mut sets = process.capabilities().clone().unwrap_or_default();
    let with = |set: &Option<Capabilities>| {
        Some(
            set.iter()
                .flatten()
                .copied()
                .chain(added.iter().copied())
                .collect(),
        )
    };
    let (bounding, effective) = (with(sets.bounding()), with(sets.effective()));
    let permitted = with(sets.permitted());
    sets.set_bounding(bounding);
    sets.set_effective(effective);
    sets.set_permitted(permitted);
    process.set_capabilities(Some(sets));
}

/// What the child needs to enter the container.
struct Entry<'a> {
    container: &'a Container,
    request: &'a Request,
    process: &'a Process,
    seccomp: Option<&'a LinuxSeccomp>,
    /// Where the listener of a filter that asks is offered.
    offer: Option<&'a UnixStream>,
    init: &'a ProcessFd,
    flags: i32,
}

/// Enters the container and becomes the program. The order is that of libcontainer's init.
fn enter(entry: &Entry<'_>, terminal: Option<OwnedFd>) -> Result<std::convert::Infallible> {
    let process = entry.process;
    // Until the program runs nobody in the container may look into this process. CVE-2016-9962.
    sys::set_dumpable(false).context(|| "become undumpable".to_owned())?;
    join_cgroups(entry)?;
    sys::setns(entry.init.as_fd(), entry.flags).context(|| "join the namespaces".to_owned())?;
    setsid().context(|| "start a session".to_owned())?;
    let system = create_syscall();
    if let Some(socket) = terminal {
        // A terminal belongs to whoever opens it, and in a user namespace nothing can be done with what is the host's
        // root's. For files alone: until `become_user` everything else stays.
        setfsgid(Gid::from_raw(0));
        setfsuid(Uid::from_raw(0));
        // libcontainer checks that the container's /dev/ptmx is a real one, and closes the socket.
        tty::setup_console(system.as_ref(), socket.into_raw_fd(), false)
            .map_err(|e| Error::Argument(format!("terminal: {}", one_line(&e))))?;
        let uid = Uid::from_raw(process.user().uid());
        nix::unistd::fchown(std::io::stdin(), Some(uid), None)
            .context(|| "give the terminal to its user".to_owned())?;
        if let Some(size) = process.console_size() {
            let (columns, rows) = (clamp(size.width()), clamp(size.height()));
            sys::set_window_size(std::io::stdin().as_fd(), columns, rows).ok();
        }
    }
    for limit in process.rlimits().as_deref().unwrap_or_default() {
        system
            .set_rlimit(limit)
            .map_err(|e| Error::Argument(format!("rlimit {:?}: {}", limit.typ(), one_line(&e))))?;
    }
    if let Some(score) = process.oom_score_adj() {
        rootless::forgive(fs::write("/proc/self/oom_score_adj", score.to_string()))
            .context(|| format!("set the OOM score to {score}"))?;
    }
    if let Some(profile) = process
        .apparmor_profile()
        .as_ref()
        .filter(|p| !p.is_empty())
    {
        apparmor::apply_profile(profile).map_err(|e| {
            Error::Argument(format!("AppArmor profile {profile}: {}", one_line(&e)))
        })?;
    }
    become_user(process)?;
    // Before the filter, which need not allow it.
    sys::close_on_exec_from(3 + entry.request.preserve_fds)
        .context(|| "close descriptors".to_owned())?;
    restrict(entry, system.as_ref())?;
    let mut environment = process.env().clone().unwrap_or_default();
    program::add_home(&mut environment, process.user().uid());
    let arguments = process.args().clone().unwrap_or_default();
    let path = program::find(&arguments[0], &environment)?;
    program::become_program(&path, &arguments, &environment)
}

fn clamp(size: u64) -> u16 {
    u16::try_from(size).unwrap_or(u16::MAX)
}

/// Joins the container's cgroups, and its groups of Intel RDT.
fn join_cgroups(entry: &Entry<'_>) -> Result<()> {
    let saved = &entry.container.saved;
    let init = saved.init.map_or(0, |init| init.pid);
    let mut directories = saved.cgroups.clone();
    for below in &entry.request.cgroups {
        cgroup::required(&saved.id, &saved.cgroups)?;
        let (controllers, path) = below.split_once(':').unwrap_or(("", below));
        let path = Path::new(path.trim_start_matches('/'));
        if path
            .components()
            .any(|c| !matches!(c, Component::Normal(_) | Component::CurDir))
        {
            let path = path.display();
            return Err(Error::Argument(format!(
                "--cgroup: {path} is not a sub cgroup path"
            )));
        }
        let chosen = cgroup::of_controllers(&saved.cgroups, controllers)?;
        for (directory, whole) in directories.iter_mut().zip(&saved.cgroups) {
            if chosen.contains(whole) {
                *directory = whole.join(path);
            }
        }
    }
    cgroup::join(&directories, init)?;
    saved.rdt.as_ref().map_or(Ok(()), rdt::Groups::join)
}

type System<'a> = &'a dyn libcontainer::syscall::Syscall;

/// User, groups, umask and working directory.
fn become_user(process: &Process) -> Result<()> {
    let user = process.user();
    if let Some(mask) = user.umask() {
        umask(Mode::from_bits_truncate(mask));
    }
    // As root of the container first, again as its user when that was not enough.
    let early = chdir(process.cwd());
    let groups: Vec<Gid> = user
        .additional_gids()
        .iter()
        .flatten()
        .map(|gid| Gid::from_raw(*gid))
        .collect();
    match setgroups(&groups) {
        // A user namespace may forbid it altogether; then there are none to drop.
        Err(nix::errno::Errno::EPERM) if groups.is_empty() => {}
        other => other.context(|| "set the supplementary groups".to_owned())?,
    }
    let (uid, gid) = (Uid::from_raw(user.uid()), Gid::from_raw(user.gid()));
    sys::keep_capabilities().context(|| "keep capabilities".to_owned())?;
    setresgid(gid, gid, gid).context(|| format!("become group {gid}"))?;
    setresuid(uid, uid, uid).context(|| format!("become user {uid}"))?;
    if early.is_err() {
        chdir(process.cwd()).at("change the directory to", process.cwd())?;
    }
    // A descriptor that our caller has left open is a way out: /proc/self/fd/N. CVE-2024-21626; getcwd(3): ENOENT.
    match std::env::current_dir() {
        Ok(cwd) if cwd.is_absolute() => Ok(()),
        _ => Err(Error::Argument(format!(
            "working directory {}: not in the container's root",
            process.cwd().display()
        ))),
    }
}

/// Capabilities and seccomp.
fn restrict(entry: &Entry<'_>, system: System<'_>) -> Result<()> {
    let process = entry.process;
    let no_new_privileges = process.no_new_privileges().unwrap_or(false);
    if no_new_privileges {
        sys::set_no_new_privileges().context(|| "set no_new_privs".to_owned())?;
    }
    let filter = || -> Result<()> {
        let Some(filter) = entry.seccomp else {
            return Ok(());
        };
        filter::load(filter, entry.offer)
    };
    let failed =
        |e: &dyn std::error::Error| Error::Argument(format!("capabilities: {}", one_line(e)));
    // A user other than root has none in effect.
    capabilities::reset_effective(system).map_err(|e| failed(&e))?;
    if !no_new_privileges {
        // Without the bit, loading a filter takes CAP_SYS_ADMIN, which is about to go.
        filter()?;
    }
    // Kept to the end: this process becomes the program.
    std::mem::forget(inherit::raise(process)?);
    if let Some(sets) = process.capabilities() {
        capabilities::drop_privileges(sets, system).map_err(|e| failed(&e))?;
    }
    if no_new_privileges {
        filter()?;
    }
    Ok(())
}

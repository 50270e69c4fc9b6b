// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Creating a container: everything up to a process that waits for `start`.
//!
//! ```text
//!  check bundle -> take the id -> cgroups (a systemd scope) -> idmapped mounts -> libcontainer: clone, namespaces, mounts, pivot,
//!  capabilities, seccomp; init waits on start.sock -> device filter (v2), state.json -> transient mounts go
//! ```
//!
//! A container that is restored from a checkpoint is made in the same way, with CRIU (`restore`) in libcontainer's place.
//!
//! libcontainer is called at its inner seam, [`container_main_process`], with the configuration in memory. Its
//! builder would read config.json by itself (we change it), keep state of its own, and leave this process
//! undumpable. It forks without exec and goes on running Rust code in the children: **never call this from a
//! process that has threads.**

use std::cell::RefCell;
use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use libcgroups::common::CgroupConfig;
use libcontainer::container::{Container, ContainerStatus, State};
use libcontainer::notify_socket::NotifyListener;
use libcontainer::process::args::{ContainerArgs, ContainerType};
use libcontainer::process::container_main_process::container_main_process;
use libcontainer::syscall::syscall::SyscallType;
use libcontainer::user_ns::UserNamespaceConfig;
use oci_spec::runtime::{
    LinuxDeviceCgroup, LinuxNamespace, LinuxNamespaceType, LinuxResources, Spec,
};

use crate::bundle::{self, Bundle, wrong};
use crate::cgroup::{self, Prepared, scope};
use crate::error::{Context, Error, Result};
use crate::log::Causes;
use crate::process::ProcessId;
use crate::state::{Directory, Saved, Status, now, write_atomically};
use crate::{
    copy_up, devices, filter, furnish, hooks, idmap, inherit, notify, own_dev, program, rdt,
    restore, rootless, starting, sys, terminal, workdir,
};

/// What to create, as `atoll-ct create` and `run` take it.
#[derive(Debug, Clone, Default)]
pub struct Request {
    /// The new container's id.
    pub id: String,
    /// Directory of config.json.
    pub bundle: PathBuf,
    /// Read instead of config.json; relative to the bundle.
    pub config: Option<PathBuf>,
    /// Socket to which the terminal's controlling side is sent.
    pub console_socket: Option<PathBuf>,
    /// File that gets the init's process id.
    pub pid_file: Option<PathBuf>,
    /// Descriptors above standard error that the program inherits.
    pub preserve_fds: u32,
    /// Change the root by moving mounts instead of pivot_root, for a root file system on a ramdisk.
    pub no_pivot: bool,
    /// Share the caller's session keyring.
    pub no_new_keyring: bool,
    /// Who makes the cgroup.
    pub cgroup_by: CgroupBy,
    /// Processes come from a checkpoint, and run at once; else there is one that waits for `start`.
    pub restore: Option<restore::Request>,
}

/// Who makes a container's cgroup.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum CgroupBy {
    /// We do, at `linux.cgroupsPath`.
    #[default]
    Us,
    /// systemd does, and `linux.cgroupsPath` is `slice:prefix:name`.
    Systemd,
    /// The container stays in ours.
    Nobody,
}

/// Where the container's terminal or output goes when a caller in this process takes it.
#[derive(Debug, Default)]
pub struct Console {
    /// A connected socket to which the terminal's controlling side is sent.
    pub terminal: Option<OwnedFd>,
    /// Standard input, output and error of a program without a terminal.
    pub stdio: Option<[OwnedFd; 3]>,
}

/// Creates a container below `root` from a bundle that was loaded for the same request. On failure nothing of
/// it remains.
pub fn create(root: &Path, request: &Request, bundle: Bundle, console: &Console) -> Result<Saved> {
    rootless::require_root()?;
    let directory = Directory::reserve(root, &request.id)?;
    let result = create_in(&directory, bundle, request, console);
    if result.is_err() {
        // The first error is the one to tell.
        directory.remove().ok();
    }
    result
}

fn create_in(
    directory: &Directory,
    mut bundle: Bundle,
    request: &Request,
    console: &Console,
) -> Result<Saved> {
    let terminal = terminal_socket(&bundle.spec, request, console)?;
    refuse_unified(&bundle.spec)?;
    let linux = bundle.spec.linux().as_ref();
    let asked = linux.and_then(|linux| linux.cgroups_path().clone());
    let asked = asked.unwrap_or_default();
    let owner = bundle::owner(&bundle.spec);
    let (cgroup, unit) = if request.cgroup_by == CgroupBy::Systemd {
        let place = scope::Place::parse(&asked)?;
        let scope = scope::start(&place, &request.id)?;
        (Prepared::of_scope(scope, owner)?, Some(place.unit))
    } else {
        let path = bundle::cgroup_path(&asked)?;
        (own_cgroup(&mut bundle.spec, &path, owner, request)?, None)
    };
    let mut saved = Saved {
        id: request.id.clone(),
        oci_version: bundle.spec.version().clone(),
        bundle: bundle.path,
        rootfs: bundle.rootfs,
        created: now(),
        annotations: bundle
            .spec
            .annotations()
            .clone()
            .unwrap_or_default()
            .into_iter()
            .collect(),
        init: None,
        monitor: None,
        cgroup_path: cgroup.path.clone(),
        cgroups: cgroup.directories.clone(),
        unit,
        mount_namespace: None,
        rdt: None,
        mounts: Vec::new(),
        has_hooks: hooks::any_after_create(&bundle.spec),
    };
    write_atomically(&directory.config(), &bundle.text)?;
    let mut plan = Plan {
        directory,
        request,
        rootfs: PathBuf::new(),
        terminal,
        console,
    };
    let result = build(&mut plan, bundle.spec, &cgroup, &mut saved);
    if result.is_err() {
        // The first error is the one to tell.
        cgroup.leave().ok();
        cgroup::dissolve(&saved.cgroups, saved.unit.as_deref()).ok();
        saved.rdt.as_ref().map(|groups| groups.remove().ok());
    }
    result.map(|()| saved)
}

/// The container's cgroup, or none where this user may make none, or wants none.
fn own_cgroup(
    spec: &mut Spec,
    path: &Path,
    owner: Option<cgroup::Owner>,
    request: &Request,
) -> Result<Prepared> {
    if request.cgroup_by == CgroupBy::Nobody {
        if request.restore.is_some() {
            let reason = "--cgroup-manager disabled: a restored container needs a cgroup";
            return Err(Error::Argument(reason.to_owned()));
        }
        return cgroup::absent::prepare(spec, "--cgroup-manager disabled");
    }
    match cgroup::prepare_somewhere(path, owner) {
        Err(error)
            if rootless::in_user_namespace()
                && rootless::is_refusal(&error)
                && request.restore.is_none() =>
        {
            let reason = crate::error::one_line(&error);
            cgroup::absent::prepare(spec, &format!("this user may make no cgroup: {reason}"))
        }
        other => other,
    }
}

/// Everything from the mounts on; what fails is taken back by the caller.
fn build(plan: &mut Plan<'_>, mut spec: Spec, cgroup: &Prepared, saved: &mut Saved) -> Result<()> {
    let (rootfs, mut mounts) = idmap::prepare(&mut spec, &saved.rootfs)?;
    devices::prepare(&mut spec, &mut mounts)?;
    if let Some(request) = &plan.request.restore {
        plan.rootfs = restore::prepare(request, &spec, &rootfs, &mut mounts)?;
    } else {
        copy_up::prepare(&mut spec, &rootfs, &mut mounts)?;
        own_dev::cover(&mut spec);
        furnish::place_hooks(&mut spec, &rootfs)?;
        furnish::prepare(&mut spec, &rootfs, plan.request.no_pivot)?;
        workdir::make(&spec, &rootfs);
        plan.rootfs = rootfs;
    }
    saved.mounts = mounts.paths().to_vec();
    // From here on a creator that is killed leaves what `delete --force` can find.
    plan.directory.save(saved)?;
    let result = match &plan.request.restore {
        Some(request) => restore_processes(plan, request, &spec, cgroup, saved),
        None => several_ranges(&mut spec)
            .and_then(|_namespace| enter_and_launch(plan, &spec, cgroup, saved)),
    };
    drop(mounts);
    let pid = result.inspect_err(|_| {
        hooks::after_delete(&spec, saved);
    })?;
    saved.mounts.clear();
    finish(plan, &spec, saved, pid).inspect_err(|_| {
        sys::kill(pid, libc::SIGKILL).ok();
    })
}

/// Settings of v2 files mean nothing on v1; libcgroups passes over them.
fn refuse_unified(spec: &Spec) -> Result<()> {
    let resources = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.resources().as_ref());
    let given = resources.and_then(|resources| resources.unified().as_ref());
    if given.is_some_and(|files| !files.is_empty()) && !cgroup::is_unified_host()? {
        let reason = "is for cgroup v2, and this host has v1: use the other settings";
        return Err(wrong("linux.resources.unified", reason));
    }
    Ok(())
}

/// What [`launch`] needs besides the configuration.
struct Plan<'a> {
    directory: &'a Directory,
    request: &'a Request,
    rootfs: PathBuf,
    terminal: Option<OwnedFd>,
    console: &'a Console,
}

/// Connects to whoever takes the terminal, or refuses a terminal that nobody takes.
fn terminal_socket(spec: &Spec, request: &Request, console: &Console) -> Result<Option<OwnedFd>> {
    let wanted = bundle::has_terminal(spec);
    match (&request.console_socket, &console.terminal) {
        (None, None) if wanted => Err(Error::Argument(
            "process.terminal is true and nobody takes the terminal: give --console-socket or --monitor"
                .to_owned(),
        )),
        (Some(_), _) if !wanted => Err(Error::Argument(
            "--console-socket is given but process.terminal is false: set it to true".to_owned(),
        )),
        (Some(path), _) => {
            let stream = terminal::connect(path).at("connect to the console socket", path)?;
            Ok(Some(stream.into()))
        }
        (None, Some(socket)) if wanted => {
            let socket = socket.try_clone().context(|| "duplicate a socket".to_owned())?;
            Ok(Some(socket))
        }
        (None, _) => Ok(None),
    }
}

/// Launches the init from within the cgroups that libcgroups does not join, and comes back out of them.
fn enter_and_launch(
    plan: &Plan<'_>,
    spec: &Spec,
    cgroup: &Prepared,
    saved: &Saved,
) -> Result<sys::Pid> {
    if !plan.request.no_new_keyring {
        let name = std::ffi::CString::new(format!("_ses.{}", plan.request.id))
            .expect("a checked id has no NUL byte");
        match sys::join_session_keyring(&name) {
            // A kernel or a seccomp filter without keyrings has nothing to separate.
            Err(e) if matches!(e.raw_os_error(), Some(libc::ENOSYS | libc::EPERM)) => {}
            other => other.context(|| "join a new session keyring".to_owned())?,
        }
    }
    filter_devices(spec, cgroup)?;
    cgroup.enter()?;
    // The children inherit it, so that nobody in the container can trace them before they have entered it.
    sys::set_dumpable(false).context(|| "become undumpable".to_owned())?;
    let result = launch(plan, spec, saved);
    sys::set_dumpable(true).context(|| "become dumpable".to_owned())?;
    cgroup.leave()?;
    result
}

/// Has CRIU restore the container from its images, in a cgroup that filters devices already.
fn restore_processes(
    plan: &Plan<'_>,
    request: &restore::Request,
    spec: &Spec,
    cgroup: &Prepared,
    saved: &Saved,
) -> Result<sys::Pid> {
    filter_devices(spec, cgroup)?;
    restore::restore(&restore::Scene {
        request,
        spec,
        saved,
        cgroup,
        root: &plan.rootfs,
        terminal: plan.terminal.as_ref(),
        stdio: plan.console.stdio.as_ref(),
    })
}

/// On v2 the device list is a filter of ours; on v1 libcgroups writes it. In a user namespace the kernel takes no such
/// program, and lets nobody make a node: a container gets to no device that its user cannot open.
fn filter_devices(spec: &Spec, cgroup: &Prepared) -> Result<()> {
    match cgroup.directories.first() {
        Some(directory) if cgroup.unified && !rootless::in_user_namespace() => {
            cgroup::devices::enforce(directory, device_list(spec))
        }
        _ => Ok(()),
    }
}

fn device_list(spec: &Spec) -> &[LinuxDeviceCgroup] {
    let resources = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.resources().as_ref());
    resources
        .and_then(|resources| resources.devices().as_deref())
        .unwrap_or_default()
}

/// Has libcontainer build the container. Answers the process id of its init.
fn launch(plan: &Plan<'_>, spec: &Spec, saved: &Saved) -> Result<sys::Pid> {
    let described = |error: &dyn std::error::Error| Error::Init(crate::error::one_line(error));
    let causes = Causes::collect()?;
    let listener =
        NotifyListener::new(&plan.directory.start_socket()).map_err(|e| described(&e))?;
    let mut state = State::new(
        &saved.id,
        ContainerStatus::Creating,
        None,
        saved.bundle.clone(),
    );
    state.oci_version.clone_from(&saved.oci_version);
    state.annotations = spec.annotations().clone();
    let (mut executor, spec) = program(plan, spec, saved)?;
    let helper = match &mut executor.filter {
        Some(filter) if filter::asks(&filter.profile) => {
            let (helper, offer) = notify::Helper::start(&filter.profile, saved)?;
            filter.offer = Some(Rc::new(offer));
            Some(helper)
        }
        _ => None,
    };
    let _inheritable = spec.process().as_ref().map(inherit::raise).transpose()?;
    let raw = |index: usize| {
        plan.console
            .stdio
            .as_ref()
            .map(|stdio| stdio[index].as_raw_fd())
    };
    let arguments = ContainerArgs {
        container_type: ContainerType::InitContainer,
        syscall: SyscallType::default(),
        user_ns_config: UserNamespaceConfig::new(&spec).map_err(|e| described(&e))?,
        spec: Rc::new(spec),
        rootfs: plan.rootfs.clone(),
        console_socket: plan.terminal.as_ref().map(AsRawFd::as_raw_fd),
        notify_listener: listener,
        preserve_fds: plan.request.preserve_fds.try_into().unwrap_or(i32::MAX),
        container: Some(Container {
            state,
            root: plan.directory.path.clone(),
        }),
        cgroup_config: CgroupConfig {
            cgroup_path: saved.cgroup_path.clone(),
            systemd_cgroup: false,
            container_name: saved.id.clone(),
        },
        detached: true,
        executor: Box::new(executor),
        no_pivot: plan.request.no_pivot,
        stdin: raw(0),
        stdout: raw(1),
        stderr: raw(2),
        as_sibling: false,
        pid_file: None,
    };
    let made = container_main_process(&arguments);
    drop(arguments);
    let handed_over = helper.map_or(Ok(()), notify::Helper::end);
    made.map(|pid| pid.as_raw())
        .map_err(|error| match (handed_over, causes.first()) {
            (Err(cause), _) => cause,
            (Ok(()), Some(cause)) => Error::Init(cause),
            (Ok(()), None) => described(&error),
        })
}

/// The last step of the init, and the configuration without what that step does.
fn program(plan: &Plan<'_>, spec: &Spec, saved: &Saved) -> Result<(program::Init, Spec)> {
    let mut spec = spec.clone();
    let mut hooks = Vec::new();
    if let Some(mut all) = spec.hooks().clone() {
        hooks = all.start_container().clone().unwrap_or_default();
        all.set_start_container(None);
        spec.set_hooks(Some(all));
    }
    if saved.unit.is_some() {
        without_pids_limit(&mut spec);
    }
    // startContainer hooks run in the container, where its init is the first process, mostly.
    let init = program::Init {
        filter: filter::take(&mut spec),
        report: Rc::new(starting::listen(&plan.directory.report_socket())?),
        state: hooks::state(saved, Status::Created, Some(1)),
        hooks,
        path: RefCell::default(),
        environment: RefCell::default(),
    };
    Ok((init, spec))
}

/// Leaves the limit of processes for [`finish`]: a scope has one more while the container is made.
fn without_pids_limit(spec: &mut Spec) {
    let linux = spec.linux_mut().as_mut();
    if let Some(resources) = linux.and_then(|linux| linux.resources_mut().as_mut()) {
        resources.set_pids(None);
    }
}

/// Makes the user namespace of a container with several ranges of ids, and has libcontainer join it: by itself it
/// writes one range, and leaves more to the setuid helpers of rootless containers.
fn several_ranges(spec: &mut Spec) -> Result<Option<OwnedFd>> {
    let Some(mut linux) = spec.linux().clone() else {
        return Ok(None);
    };
    let several = |list: &Option<Vec<_>>| list.as_ref().is_some_and(|list| list.len() > 1);
    // From a user namespace it would forbid setgroups(2) as well.
    let single = !several(linux.uid_mappings()) && !several(linux.gid_mappings());
    if single && !rootless::in_user_namespace() {
        return Ok(None);
    }
    let mut namespaces = linux.namespaces().clone().unwrap_or_default();
    let user = |n: &&mut LinuxNamespace| n.typ() == LinuxNamespaceType::User && n.path().is_none();
    let Some(user) = namespaces.iter_mut().find(user) else {
        return Ok(None);
    };
    let made = idmap::container_mappings(spec)?;
    user.set_path(Some(format!("/proc/self/fd/{}", made.as_raw_fd()).into()));
    linux.set_namespaces(Some(namespaces));
    spec.set_linux(Some(linux));
    Ok(Some(made))
}

/// The terminal belongs to the container's user, or programs such as `screen` do not take it. Its group stays that of
/// terminals.
fn own_terminal(spec: &Spec, init: sys::Pid) -> Result<()> {
    let user = spec.process().as_ref().map(|process| process.user().uid());
    let Some(uid) = user.filter(|uid| *uid != 0 && bundle::has_terminal(spec)) else {
        return Ok(());
    };
    let linux = spec.linux().as_ref();
    let maps = bundle::owner(spec).and(linux.and_then(|l| l.uid_mappings().as_deref()));
    let terminal = PathBuf::from(format!("/proc/{init}/fd/0"));
    let uid = devices::on_host(uid, maps)?;
    std::os::unix::fs::chown(&terminal, Some(uid), None).at("chown", &terminal)
}

/// What is left to do once there is an init.
fn finish(plan: &Plan<'_>, spec: &Spec, saved: &mut Saved, init: sys::Pid) -> Result<()> {
    saved.init = Some(ProcessId::of(init)?);
    if saved.cgroups.is_empty() && !cgroup::absent::has_own_pids(spec) {
        saved.mount_namespace = Some(cgroup::absent::Together::of(init)?.number);
    }
    saved.rdt = rdt::assign(spec, &saved.id, init)?;
    if let Some(resources) = spec.linux().as_ref().and_then(|l| l.resources().as_ref()) {
        cgroup::limits::apply_unknown(&saved.cgroups, resources)?;
        if let (Some(unit), pids) = (&saved.unit, *resources.pids()) {
            let mut left = LinuxResources::default();
            left.set_pids(pids);
            cgroup::limits::apply(&saved.id, &saved.cgroup_path, &left)?;
            scope::tell_limits(unit, &saved.cgroup_path)?;
        }
    }
    if plan.request.restore.is_none() {
        settle(spec, init)?;
    }
    plan.directory.save(saved)?;
    if let Some(file) = &plan.request.pid_file {
        write_atomically(file, init.to_string().as_bytes())?;
    }
    Ok(())
}

/// What libcontainer leaves out of a container that is there. A checkpoint has it all.
fn settle(spec: &Spec, init: sys::Pid) -> Result<()> {
    let process = spec.process().as_ref();
    if let Some(score) = process.and_then(oci_spec::runtime::Process::oom_score_adj) {
        let file = PathBuf::from(format!("/proc/{init}/oom_score_adj"));
        rootless::forgive(fs::write(&file, score.to_string())).at("write", &file)?;
    }
    own_terminal(spec, init)?;
    furnish::seal(spec, init)
}

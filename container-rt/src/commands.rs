// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! What each command does: arguments to the library's requests, answers to standard output.

use std::fs;
use std::io::{Read, Write};
use std::path::Path;
use std::process::Command as Program;

use atoll_container_rt::create::{self, CgroupBy, Request};
use atoll_container_rt::error::{Error, Result};
use atoll_container_rt::lifecycle::{self, Container, Force};
use atoll_container_rt::process::parse_signal;
use atoll_container_rt::run::{self, After};
use atoll_container_rt::state::{Line, Status};
use atoll_container_rt::{
    bundle, cgroup, checkpoint, console, criu, device_plug, events, exec, furnish, mknod, monitor,
    mounts, own_file, restore, rootless, state, terminal,
};
use oci_spec::runtime::LinuxResources;
use serde_json::json;

use crate::cli::{
    CgroupManager, CgroupsMode, Checkpoint, Command, Create, Delete, Devices, Events, Exec, Format,
    Global, Images, Kill, List, Mounts, Ps, Restore, Run, Spec, Update,
};
use crate::features;

/// The byte of Ctrl-], which ends `console`.
const DETACH_KEY: u8 = 0x1d;

/// Runs a command. Answers the exit code.
pub(crate) fn dispatch(command: Command, global: &Global) -> Result<u8> {
    let root = root(global)?;
    let root = root.as_path();
    if enters(&command) {
        if !nix::unistd::geteuid().is_root() {
            become_root(root, &command)?;
        }
        if nix::unistd::geteuid().is_root() {
            own_file::run_read_only()?;
        }
    }
    match command {
        Command::Create(arguments) => create(root, global, arguments)?,
        Command::Run(arguments) => return run(root, global, arguments),
        Command::Start { id } => lifecycle::load_created(root, &id)?.start()?,
        Command::State { id } => print(&pretty(&Container::load(root, &id)?.oci_state())?)?,
        Command::Kill(arguments) => kill(root, &arguments)?,
        Command::Delete(arguments) => delete(root, &arguments)?,
        Command::Exec(arguments) => return exec(root, *arguments),
        Command::List(arguments) => list(root, &arguments)?,
        Command::Ps(arguments) => ps(root, &arguments)?,
        Command::Pause { id } => Container::load(root, &id)?.pause()?,
        Command::Resume { id } => Container::load(root, &id)?.resume()?,
        Command::Update(arguments) => update(root, &arguments)?,
        Command::Mounts(change) => mounts(root, &change)?,
        Command::Devices(change) => devices(root, &change)?,
        Command::Events(arguments) => events(root, &arguments)?,
        Command::Checkpoint(arguments) => checkpoint(root, global, *arguments)?,
        Command::Restore(arguments) => return restore(root, global, *arguments),
        Command::Features => print(&pretty(&features::features())?)?,
        Command::Spec(arguments) => spec(&arguments)?,
        Command::Console { id, tty } => attach(root, &id, line(tty))?,
        Command::Resize {
            id,
            columns,
            rows,
            tty,
        } => {
            let container = Container::load(root, &id)?;
            console::resize(&container.directory, line(tty), columns, rows)?;
        }
        Command::Furnish { rootfs, steps } => furnish::furnish(&rootfs, &steps)?,
        Command::InDirectory {
            directory,
            program,
            arguments,
        } => return Err(furnish::in_directory(&directory, &program, &arguments)),
    }
    Ok(0)
}

/// Whether a process of ours is in a container, as a process of it, before another program takes its place.
fn enters(command: &Command) -> bool {
    matches!(
        command,
        Command::Create(_) | Command::Run(_) | Command::Exec(_)
    )
}

/// Makes an ordinary user root of a namespace of his own. What is executed next stays so.
fn become_root(root: &Path, command: &Command) -> Result<()> {
    match command {
        Command::Exec(arguments) => rootless::join_creator(&Container::load(root, &arguments.id)?),
        _ => rootless::become_root(),
    }
}

fn root(global: &Global) -> Result<std::path::PathBuf> {
    let root = global.root.clone().unwrap_or_else(state::default_root);
    std::path::absolute(&root).map_err(|source| Error::Io {
        what: format!("--root {}", root.display()),
        source,
    })
}

/// Writes a line to standard output.
fn print(text: &str) -> Result<()> {
    writeln!(std::io::stdout(), "{text}").map_err(|source| Error::Io {
        what: "write to standard output".to_owned(),
        source,
    })
}

fn pretty(value: &impl serde::Serialize) -> Result<String> {
    serde_json::to_string_pretty(value).map_err(|source| Error::Json {
        what: "the answer".to_owned(),
        source,
    })
}

/// What the options before the command say about a new container.
fn request_of(global: &Global) -> Request {
    let cgroup_by = match global.cgroup_manager {
        _ if global.systemd_cgroup => CgroupBy::Systemd,
        CgroupManager::Cgroupfs => CgroupBy::Us,
        CgroupManager::Systemd => CgroupBy::Systemd,
        CgroupManager::Disabled => CgroupBy::Nobody,
    };
    Request {
        cgroup_by,
        ..Request::default()
    }
}

fn request(global: &Global, arguments: Create) -> Result<Request> {
    Ok(Request {
        id: arguments.id,
        bundle: arguments.bundle,
        config: arguments.config,
        console_socket: arguments.console_socket,
        pid_file: arguments.pid_file,
        preserve_fds: arguments.preserve_fds,
        no_pivot: arguments.no_pivot,
        no_new_keyring: arguments.no_new_keyring,
        ..request_of(global)
    })
}

fn create(root: &Path, global: &Global, arguments: Create) -> Result<()> {
    let monitored = arguments.monitor;
    let request = request(global, arguments)?;
    if monitored {
        return monitor::create(root, &request);
    }
    let bundle = bundle::load(&request)?;
    mknod::needs_monitor(&bundle.spec)?;
    create::create(root, &request, bundle, &create::Console::default()).map(drop)
}

fn run(root: &Path, global: &Global, arguments: Run) -> Result<u8> {
    let monitored = arguments.create.monitor;
    let request = request(global, arguments.create)?;
    if monitored {
        monitor::create(root, &request)?;
        run::start_or_delete(root, &request)?;
        return Ok(0);
    }
    if arguments.detach {
        run::detached(root, &request)?;
        return Ok(0);
    }
    let after = if arguments.keep {
        After::Keep
    } else {
        After::Delete
    };
    run::foreground(root, &request, after).map(exit_code)
}

/// A program's status as ours. An exit code has eight bits.
fn exit_code(status: atoll_container_rt::process::ExitStatus) -> u8 {
    u8::try_from(status.code).unwrap_or(u8::MAX)
}

/// The containers that a command is about.
fn ids(root: &Path, id: &str, regex: bool) -> Result<Vec<String>> {
    if regex {
        return lifecycle::matching(root, id);
    }
    Ok(vec![id.to_owned()])
}

fn kill(root: &Path, arguments: &Kill) -> Result<()> {
    let signal = parse_signal(&arguments.signal)?;
    for id in ids(root, &arguments.id, arguments.regex)? {
        let container = Container::load(root, &id)?;
        if arguments.all {
            container.kill_all(signal)?;
        } else {
            container.kill(signal)?;
        }
    }
    Ok(())
}

/// The options of checkpoint and restore alike.
fn images(global: &Global, arguments: Images) -> Result<criu::Options> {
    if arguments.lazy_pages {
        return Err(no_page_server("--lazy-pages"));
    }
    Ok(criu::Options {
        program: global.criu.clone(),
        images: arguments.image_path,
        work: arguments.work_path,
        tcp_established: arguments.tcp_established,
        external_unix_sockets: arguments.ext_unix_sk,
        shell_job: arguments.shell_job,
        file_locks: arguments.file_locks,
        auto_dedup: arguments.auto_dedup,
        cgroups: match arguments.manage_cgroups_mode {
            CgroupsMode::Soft => criu::Cgroups::Soft,
            CgroupsMode::Full => criu::Cgroups::Full,
            CgroupsMode::Strict => criu::Cgroups::Strict,
            CgroupsMode::Ignore => criu::Cgroups::Ignore,
        },
    })
}

fn no_page_server(option: &str) -> Error {
    Error::Argument(format!(
        "{option} is not supported: pages come from files only, so copy --image-path to the other host"
    ))
}

fn checkpoint(root: &Path, global: &Global, arguments: Checkpoint) -> Result<()> {
    for (given, option) in [
        (arguments.page_server.is_some(), "--page-server"),
        (arguments.status_fd.is_some(), "--status-fd"),
    ] {
        if given {
            return Err(no_page_server(option));
        }
    }
    let request = checkpoint::Request {
        options: images(global, arguments.images)?,
        parent: arguments.parent_path,
        leave_running: arguments.leave_running,
        pre_dump: arguments.pre_dump,
        link_remap: arguments.link_remap,
        tcp_skip_in_flight: arguments.tcp_skip_in_flight,
    };
    let container = Container::load(root, &arguments.id)?;
    warn(&checkpoint::checkpoint(&container, &request)?);
    Ok(())
}

fn restore(root: &Path, global: &Global, arguments: Restore) -> Result<u8> {
    let request = Request {
        id: arguments.id,
        bundle: arguments.bundle,
        console_socket: arguments.console_socket,
        pid_file: arguments.pid_file,
        restore: Some(restore::Request {
            options: images(global, arguments.images)?,
            lsm_profile: arguments.lsm_profile,
        }),
        ..request_of(global)
    };
    if arguments.monitor {
        monitor::create(root, &request)?;
    } else if arguments.detach {
        run::detached(root, &request)?;
    } else {
        return run::foreground(root, &request, After::Delete).map(exit_code);
    }
    Ok(0)
}

fn events(root: &Path, arguments: &Events) -> Result<()> {
    let container = Container::load(root, &arguments.id)?;
    let line = |event: &events::Event<'_>| {
        let text = serde_json::to_string(event).map_err(|source| Error::Json {
            what: "the event".to_owned(),
            source,
        })?;
        print(&text)
    };
    if arguments.stats {
        return line(&events::statistics(&container)?);
    }
    events::follow(&container, arguments.interval, line)
}

fn delete(root: &Path, arguments: &Delete) -> Result<()> {
    let force = if arguments.force {
        Force::Yes
    } else {
        Force::No
    };
    for id in ids(root, &arguments.id, arguments.regex)? {
        warn(&lifecycle::delete(root, &id, force)?);
    }
    Ok(())
}

/// Tells what did not keep the command from being done.
fn warn(warnings: &[String]) {
    for warning in warnings {
        writeln!(std::io::stderr(), "atoll-ct: warning: {warning}").ok();
    }
}

fn exec(root: &Path, arguments: Exec) -> Result<u8> {
    let container = Container::load(root, &arguments.id)?;
    if arguments
        .process_label
        .is_some_and(|label| !label.is_empty())
    {
        return Err(Error::Argument(
            "--process-label: SELinux is not supported: leave it out".to_owned(),
        ));
    }
    let request = exec::Request {
        process: arguments.process,
        arguments: arguments.arguments,
        environment: arguments.env,
        cwd: arguments.cwd,
        user: arguments.user,
        additional_gids: arguments.additional_gids,
        capabilities: arguments.cap,
        terminal: arguments.tty,
        no_new_privileges: arguments.no_new_privs,
        apparmor: arguments.apparmor,
        detach: arguments.detach,
        time_max: arguments.time_max,
        ignore_paused: arguments.ignore_paused,
        console_socket: arguments.console_socket,
        pid_file: arguments.pid_file,
        preserve_fds: arguments.preserve_fds,
        cgroups: arguments.cgroup,
    };
    Ok(exec::exec(&container, &request)?.map_or(0, exit_code))
}

fn list(root: &Path, arguments: &List) -> Result<()> {
    let containers = lifecycle::list(root)?;
    if arguments.quiet {
        return containers.iter().try_for_each(|c| print(&c.saved.id));
    }
    if arguments.format == Format::Json {
        let states: Vec<_> = containers.iter().map(Container::oci_state).collect();
        let text = serde_json::to_string(&states).map_err(|source| Error::Json {
            what: "the answer".to_owned(),
            source,
        })?;
        return print(&text);
    }
    let row = |c: &Container| {
        let saved = &c.saved;
        let pid = saved.init.filter(|_| c.status != Status::Stopped);
        [
            saved.id.clone(),
            pid.map_or(0, |init| init.pid).to_string(),
            c.status.to_string(),
            saved.bundle.display().to_string(),
            saved.created.clone(),
            "root".to_owned(),
        ]
    };
    let head = ["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"].map(str::to_owned);
    let rows: Vec<_> = std::iter::once(head)
        .chain(containers.iter().map(row))
        .collect();
    let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..rows[0].len()).map(width).collect();
    for row in &rows {
        let cells = row
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:width$}"));
        print(cells.collect::<Vec<_>>().join("   ").trim_end())?;
    }
    Ok(())
}

fn ps(root: &Path, arguments: &Ps) -> Result<()> {
    let container = Container::load(root, &arguments.id)?;
    let processes = cgroup::all_processes(container.cgroups()?)?;
    if arguments.format == Format::Json {
        return print(&json!(processes).to_string());
    }
    let options: &[String] = if arguments.options.is_empty() {
        &["-ef".to_owned()]
    } else {
        &arguments.options
    };
    let output = Program::new("ps")
        .args(options)
        .output()
        .map_err(|source| Error::Io {
            what: "run ps (Debian package procps; --format json needs none)".to_owned(),
            source,
        })?;
    if !output.status.success() {
        let message = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        return Err(Error::Argument(format!("ps: {message}")));
    }
    let text = String::from_utf8_lossy(&output.stdout);
    let mut lines = text.lines();
    let head = lines.next().unwrap_or_default();
    let column = head
        .split_whitespace()
        .position(|name| name == "PID")
        .ok_or_else(|| {
            Error::Argument("the options of ps give no PID column: add one".to_owned())
        })?;
    print(head)?;
    for line in lines {
        let pid = line
            .split_whitespace()
            .nth(column)
            .and_then(|field| field.parse().ok());
        if pid.is_some_and(|pid: i32| processes.contains(&pid)) {
            print(line)?;
        }
    }
    Ok(())
}

fn update(root: &Path, arguments: &Update) -> Result<()> {
    let container = Container::load(root, &arguments.id)?;
    let resources = match &arguments.resources {
        Some(path) => read_json::<LinuxResources>(path)?,
        None => resources_of(arguments)?,
    };
    container.update(&resources)
}

fn mounts(root: &Path, change: &Mounts) -> Result<()> {
    match change {
        Mounts::Add { id, file } => {
            mounts::add(&Container::load(root, id)?, &read_json::<Vec<_>>(file)?)
        }
        Mounts::Remove { id, file } => {
            mounts::remove(&Container::load(root, id)?, &read_json::<Vec<_>>(file)?)
        }
    }
}

fn devices(root: &Path, change: &Devices) -> Result<()> {
    match change {
        Devices::Add { id, file } => {
            device_plug::add(&Container::load(root, id)?, &read_json::<Vec<_>>(file)?)
        }
        Devices::Remove { id, file } => {
            device_plug::remove(&Container::load(root, id)?, &read_json::<Vec<_>>(file)?)
        }
    }
}

/// Reads a document of the runtime-spec; `-` is standard input.
fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T> {
    let mut text = Vec::new();
    let read = if path == Path::new("-") {
        std::io::stdin().read_to_end(&mut text).map(drop)
    } else {
        fs::read(path).map(|bytes| text = bytes)
    };
    let what = path.display().to_string();
    read.map_err(|source| Error::Io {
        what: format!("read {what}"),
        source,
    })?;
    serde_json::from_slice(&text).map_err(|source| Error::Json { what, source })
}

/// The options of `update` as the runtime-spec's object; what is not given is not in it.
fn resources_of(arguments: &Update) -> Result<LinuxResources> {
    let mut value = json!({
        "memory": {
            "limit": arguments.memory,
            "reservation": arguments.memory_reservation,
            "swap": arguments.memory_swap,
        },
        "cpu": {
            "shares": arguments.cpu_shares,
            "quota": arguments.cpu_quota,
            "period": arguments.cpu_period,
            "realtimeRuntime": arguments.cpu_rt_runtime,
            "realtimePeriod": arguments.cpu_rt_period,
            "burst": arguments.cpu_burst,
            "idle": arguments.cpu_idle,
            "cpus": arguments.cpuset_cpus,
            "mems": arguments.cpuset_mems,
        },
        "pids": { "limit": arguments.pids_limit },
        "blockIO": { "weight": arguments.blkio_weight },
    });
    if let Some(groups) = value.as_object_mut() {
        groups.retain(|_, group| {
            group.as_object_mut().is_none_or(|group| {
                group.retain(|_, limit| !limit.is_null());
                !group.is_empty()
            })
        });
        if groups.is_empty() {
            return Err(Error::Argument(
                "name at least one limit to change".to_owned(),
            ));
        }
    }
    serde_json::from_value(value).map_err(|source| Error::Json {
        what: "the limits".to_owned(),
        source,
    })
}

fn spec(arguments: &Spec) -> Result<()> {
    let path = arguments.bundle.join(&arguments.file);
    let failed = |source| Error::Io {
        what: format!("create {}", path.display()),
        source,
    };
    let mut file = fs::File::create_new(&path).map_err(failed)?;
    let text = pretty(&features::default_config(arguments.rootless))?;
    file.write_all(text.as_bytes()).map_err(failed)
}

fn line(tty: Option<u8>) -> Line {
    tty.map_or(Line::Console, Line::Tty)
}

fn attach(root: &Path, id: &str, line: Line) -> Result<()> {
    let container = Container::load(root, id)?;
    let path = container.directory.terminal_socket(line);
    let stream = terminal::connect(&path).map_err(|source| Error::Io {
        what: format!("{id} has no console to attach to (is it running, created with --monitor?)"),
        source,
    })?;
    terminal::attach(stream, Some(DETACH_KEY))
}

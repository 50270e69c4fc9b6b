// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The command line as a table: every command and option of `atoll-ct`. A superset of runc's and crun's, each
//! option before or after the container's id. What an option does is in `commands`.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};

/// Runs containers from OCI bundles, as root or as an ordinary user (rootless).
#[derive(Debug, Parser)]
#[command(
    name = "atoll-ct",
    version,
    disable_help_subcommand = true,
    max_term_width = 100
)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Options of every command.
#[derive(Debug, Args)]
pub(crate) struct Global {
    /// Where containers' states are kept [default: /run/atoll-ct; rootless: $XDG_RUNTIME_DIR/atoll-ct]
    #[arg(long, global = true, value_name = "DIR")]
    pub(crate) root: Option<PathBuf>,
    /// Append errors to this file, too
    #[arg(long, global = true, value_name = "FILE")]
    pub(crate) log: Option<PathBuf>,
    /// Format of the log file
    #[arg(long, global = true, value_enum, default_value = "text")]
    pub(crate) log_format: LogFormat,
    /// Who makes cgroups: with systemd, linux.cgroupsPath is SLICE:PREFIX:NAME, and systemctl shows the container as
    /// PREFIX-NAME.scope
    #[arg(long, global = true, value_enum, default_value = "cgroupfs")]
    pub(crate) cgroup_manager: CgroupManager,
    /// The same as --cgroup-manager systemd
    #[arg(long, global = true)]
    pub(crate) systemd_cgroup: bool,
    /// The program for checkpoint and restore
    #[arg(long, global = true, default_value = "criu", value_name = "PROGRAM")]
    pub(crate) criu: String,
    /// Accepted for runc's callers; there is nothing more to log
    #[arg(long, global = true, hide = true)]
    debug: bool,
    /// Accepted for callers of runc and crun; errors are logged always
    #[arg(long, global = true, hide = true)]
    log_level: Option<String>,
    /// Accepted for runc's callers, before the command, since `spec` has an option of that name; it is found out
    /// here
    #[arg(long, hide = true)]
    rootless: Option<String>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum LogFormat {
    Text,
    Json,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum CgroupManager {
    Cgroupfs,
    Systemd,
    /// Nobody: containers stay in their caller's, without limits
    Disabled,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    Table,
    Json,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Create a container: everything but the program's start
    Create(Create),
    /// Run a created container's program
    Start { id: String },
    /// Print a container's state as JSON
    State { id: String },
    /// Send a signal to a container's init
    Kill(Kill),
    /// Remove a container that has ended
    Delete(Delete),
    /// Run another process in a container
    Exec(Box<Exec>),
    /// Create, start, wait and delete
    Run(Run),
    /// List containers
    List(List),
    /// List a container's processes
    Ps(Ps),
    /// Freeze all processes
    Pause { id: String },
    /// Let frozen processes go on
    Resume { id: String },
    /// Change limits
    Update(Box<Update>),
    /// Add bind mounts to a running container, or remove mounts from it
    #[command(subcommand)]
    Mounts(Mounts),
    /// Add devices to a running container, or remove devices from it
    #[command(subcommand)]
    Devices(Devices),
    /// Print statistics at intervals, and out-of-memory kills
    Events(Events),
    /// Save a running container's processes as files, by CRIU, and delete the container
    Checkpoint(Box<Checkpoint>),
    /// Make a container of such files, whose processes go on
    Restore(Box<Restore>),
    /// Print what this runtime can do, as JSON
    Features,
    /// Write a config.json to start from
    Spec(Spec),
    /// Attach to the console of a container that has a monitor; detach by Ctrl-]
    Console {
        id: String,
        /// Attach to /dev/ttyN instead
        #[arg(long, value_name = "N")]
        tty: Option<u8>,
    },
    /// Set the size of a monitored container's terminal
    Resize {
        id: String,
        columns: u16,
        rows: u16,
        /// Of /dev/ttyN instead of the console
        #[arg(long, value_name = "N")]
        tty: Option<u8>,
    },
    /// The hook of library module `furnish`
    #[command(name = atoll_container_rt::furnish::COMMAND, hide = true)]
    Furnish { rootfs: PathBuf, steps: Vec<String> },
    /// Likewise
    #[command(name = atoll_container_rt::furnish::IN_DIRECTORY, hide = true)]
    InDirectory {
        directory: PathBuf,
        program: PathBuf,
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Create {
    /// The new container's name
    pub(crate) id: String,
    /// Directory with config.json
    #[arg(long, short, default_value = ".", value_name = "DIR")]
    pub(crate) bundle: PathBuf,
    /// Read this instead of config.json
    #[arg(long, short = 'f', value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Write the init's process id here
    #[arg(long, value_name = "FILE")]
    pub(crate) pid_file: Option<PathBuf>,
    /// Send the terminal to this Unix socket
    #[arg(long, value_name = "SOCKET")]
    pub(crate) console_socket: Option<PathBuf>,
    /// Pass this many more file descriptors
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub(crate) preserve_fds: u32,
    /// Do not use pivot_root
    #[arg(long)]
    pub(crate) no_pivot: bool,
    /// Do not start a new session keyring
    #[arg(long)]
    pub(crate) no_new_keyring: bool,
    /// Stay behind as a monitor: hold the console, record the exit
    #[arg(long)]
    pub(crate) monitor: bool,
    /// Accepted for runc's callers
    #[arg(long, hide = true)]
    no_subreaper: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Run {
    #[command(flatten)]
    pub(crate) create: Create,
    /// Do not wait
    #[arg(long, short)]
    pub(crate) detach: bool,
    /// Leave the container when it has ended
    #[arg(long)]
    pub(crate) keep: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Kill {
    pub(crate) id: String,
    /// Number or name, as in 9, KILL, SIGRTMIN+3
    #[arg(default_value = "TERM")]
    pub(crate) signal: String,
    /// Every process, not only the init
    #[arg(long, short)]
    pub(crate) all: bool,
    /// ID is a regular expression
    #[arg(long, short)]
    pub(crate) regex: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Delete {
    pub(crate) id: String,
    /// Kill it first; no error when it does not exist
    #[arg(long, short)]
    pub(crate) force: bool,
    /// ID is a regular expression
    #[arg(long, short)]
    pub(crate) regex: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Events {
    pub(crate) id: String,
    /// Time between two statistics, as in 5s, 100ms, 1m
    #[arg(long, default_value = "5s", value_parser = duration)]
    pub(crate) interval: Duration,
    /// Print the statistics once
    #[arg(long)]
    pub(crate) stats: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Mounts {
    /// Bind the mounts that FILE lists as config.json does; - is standard input
    Add { id: String, file: PathBuf },
    /// Unmount the destinations of the mounts that FILE lists
    Remove { id: String, file: PathBuf },
}

#[derive(Debug, Subcommand)]
pub(crate) enum Devices {
    /// Add the devices that FILE lists as linux.devices does, each with its `access`; - is standard input
    Add { id: String, file: PathBuf },
    /// Remove the devices at the paths that FILE lists
    Remove { id: String, file: PathBuf },
}

/// Options of checkpoint and restore alike; a restore needs those that the checkpoint had.
#[derive(Debug, Args)]
pub(crate) struct Images {
    /// Directory of the files
    #[arg(long, default_value = "checkpoint", value_name = "DIR")]
    pub(crate) image_path: PathBuf,
    /// Directory of CRIU's log, if not the same
    #[arg(long, value_name = "DIR")]
    pub(crate) work_path: Option<PathBuf>,
    /// Keep TCP connections
    #[arg(long)]
    pub(crate) tcp_established: bool,
    /// Keep Unix sockets whose other end is outside
    #[arg(long)]
    pub(crate) ext_unix_sk: bool,
    /// Keep a terminal and session of the caller's
    #[arg(long)]
    pub(crate) shell_job: bool,
    /// Keep file locks
    #[arg(long)]
    pub(crate) file_locks: bool,
    /// What CRIU does about cgroups
    #[arg(long, value_enum, default_value = "soft", value_name = "MODE")]
    pub(crate) manage_cgroups_mode: CgroupsMode,
    /// Accepted for runc's callers: interfaces of a network namespace are never restored
    #[arg(long, value_parser = ["network"], hide = true)]
    empty_ns: Vec<String>,
    /// Drop pages from earlier files once they are in later ones
    #[arg(long)]
    pub(crate) auto_dedup: bool,
    /// Refused
    #[arg(long, hide = true)]
    pub(crate) lazy_pages: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum CgroupsMode {
    Soft,
    Full,
    Strict,
    Ignore,
}

#[derive(Debug, Args)]
pub(crate) struct Checkpoint {
    pub(crate) id: String,
    #[command(flatten)]
    pub(crate) images: Images,
    /// Files of an earlier --pre-dump, relative to --image-path
    #[arg(long, value_name = "DIR")]
    pub(crate) parent_path: Option<PathBuf>,
    /// Let the container go on
    #[arg(long)]
    pub(crate) leave_running: bool,
    /// Save memory only, and let the container go on
    #[arg(long)]
    pub(crate) pre_dump: bool,
    /// Give deleted files that are open a name again
    #[arg(long)]
    pub(crate) link_remap: bool,
    /// Leave out TCP connections that are about to be made
    #[arg(long)]
    pub(crate) tcp_skip_in_flight: bool,
    /// Refused
    #[arg(long, hide = true)]
    pub(crate) page_server: Option<String>,
    /// Refused
    #[arg(long, hide = true)]
    pub(crate) status_fd: Option<i32>,
}

#[derive(Debug, Args)]
pub(crate) struct Restore {
    /// The new container's name
    pub(crate) id: String,
    /// Directory with config.json
    #[arg(long, short, default_value = ".", value_name = "DIR")]
    pub(crate) bundle: PathBuf,
    #[command(flatten)]
    pub(crate) images: Images,
    /// Do not wait
    #[arg(long, short)]
    pub(crate) detach: bool,
    /// Stay behind as a monitor: hold the console, record the exit
    #[arg(long)]
    pub(crate) monitor: bool,
    /// Write the init's process id here
    #[arg(long, value_name = "FILE")]
    pub(crate) pid_file: Option<PathBuf>,
    /// Send the terminal to this Unix socket
    #[arg(long, value_name = "SOCKET")]
    pub(crate) console_socket: Option<PathBuf>,
    /// Another AppArmor profile than before, as in apparmor:NAME
    #[arg(long, value_name = "PROFILE")]
    pub(crate) lsm_profile: Option<String>,
    /// Accepted for runc's callers
    #[arg(long, hide = true)]
    no_subreaper: bool,
    /// Accepted for runc's callers: CRIU decides
    #[arg(long, hide = true)]
    no_pivot: bool,
}

/// Reads a time as Go's programs take it.
fn duration(text: &str) -> Result<Duration, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let number: f64 = digits.parse().map_err(|_| format!("{text:?} is no time"))?;
    let seconds = match &text[digits.len()..] {
        "ms" => number / 1e3,
        "s" => number,
        "m" => number * 60.0,
        "h" => number * 3600.0,
        unit => return Err(format!("unit {unit:?}: use ms, s, m or h")),
    };
    match Duration::try_from_secs_f64(seconds) {
        Ok(time) if !time.is_zero() => Ok(time),
        _ => Err(format!("{text:?} is no time above zero")),
    }
}

/// Reads an amount of memory: bytes, or with a unit in powers of 1024; -1 is no limit.
fn bytes(text: &str) -> Result<i64, String> {
    let wrong =
        || format!("{text:?} is no amount of memory: use bytes, or a number with k, m, g, t");
    let lower = text.to_ascii_lowercase();
    let digits = lower.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let number: i64 = digits.parse().map_err(|_| wrong())?;
    let shift = match lower[digits.len()..]
        .trim_end_matches('b')
        .trim_end_matches('i')
    {
        "" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        _ => return Err(wrong()),
    };
    number.checked_mul(1 << shift).ok_or_else(wrong)
}

#[derive(Debug, Args)]
pub(crate) struct Exec {
    pub(crate) id: String,
    /// Program and arguments
    #[arg(trailing_var_arg = true, value_name = "COMMAND")]
    pub(crate) arguments: Vec<String>,
    /// A whole process object of the runtime-spec
    #[arg(long, short, value_name = "FILE")]
    pub(crate) process: Option<PathBuf>,
    /// Allocate a terminal
    #[arg(long, short, overrides_with = "tty", num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false", action = clap::ArgAction::Set)]
    pub(crate) tty: bool,
    /// NAME=value
    #[arg(long, short)]
    pub(crate) env: Vec<String>,
    /// uid[:gid]
    #[arg(long, short)]
    pub(crate) user: Option<String>,
    /// Supplementary group
    #[arg(long, short = 'g')]
    pub(crate) additional_gids: Vec<u32>,
    /// Working directory
    #[arg(long)]
    pub(crate) cwd: Option<PathBuf>,
    /// Do not wait
    #[arg(long, short)]
    pub(crate) detach: bool,
    /// Kill it and its process group when it runs longer, as in 30s
    #[arg(long, value_name = "TIME", value_parser = duration, conflicts_with = "detach")]
    pub(crate) time_max: Option<Duration>,
    /// Additional capability
    #[arg(long, short)]
    pub(crate) cap: Vec<String>,
    /// Forbid gaining privileges
    #[arg(long)]
    pub(crate) no_new_privs: bool,
    /// AppArmor profile
    #[arg(long)]
    pub(crate) apparmor: Option<String>,
    /// SELinux label; refused
    #[arg(long, hide = true)]
    pub(crate) process_label: Option<String>,
    /// Even when the container is frozen
    #[arg(long)]
    pub(crate) ignore_paused: bool,
    /// Write the process id here
    #[arg(long, value_name = "FILE")]
    pub(crate) pid_file: Option<PathBuf>,
    /// Send the terminal to this Unix socket
    #[arg(long, value_name = "SOCKET")]
    pub(crate) console_socket: Option<PathBuf>,
    /// Pass this many more file descriptors
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub(crate) preserve_fds: u32,
    /// Existing cgroup below the container's; on v1 for some controllers as in memory,cpu:PATH
    #[arg(long, value_name = "PATH")]
    pub(crate) cgroup: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct List {
    /// Ids only
    #[arg(long, short)]
    pub(crate) quiet: bool,
    #[arg(long, short, value_enum, default_value = "table")]
    pub(crate) format: Format,
}

#[derive(Debug, Args)]
pub(crate) struct Ps {
    pub(crate) id: String,
    #[arg(long, short, value_enum, default_value = "table")]
    pub(crate) format: Format,
    /// Options of ps(1)
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) options: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Spec {
    /// Directory to write to
    #[arg(long, short, default_value = ".", value_name = "DIR")]
    pub(crate) bundle: PathBuf,
    /// Name of the file
    #[arg(long, short, default_value = "config.json")]
    pub(crate) file: PathBuf,
    /// For a user without privileges: with a user namespace that has this user as its root
    #[arg(long)]
    pub(crate) rootless: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Update {
    pub(crate) id: String,
    /// A resources object of the runtime-spec; - is standard input
    #[arg(long, short, value_name = "FILE")]
    pub(crate) resources: Option<PathBuf>,
    /// Bytes, or with a unit as in 64M; -1 is no limit
    #[arg(long, allow_hyphen_values = true, value_parser = bytes)]
    pub(crate) memory: Option<i64>,
    /// Likewise
    #[arg(long, allow_hyphen_values = true, value_parser = bytes)]
    pub(crate) memory_reservation: Option<i64>,
    /// Memory and swap together
    #[arg(long, allow_hyphen_values = true, value_parser = bytes)]
    pub(crate) memory_swap: Option<i64>,
    /// Accepted for callers of runc and crun: kernels from 5.4 on have no such limit
    #[arg(long, hide = true)]
    kernel_memory: Option<String>,
    /// Likewise
    #[arg(long, hide = true)]
    kernel_memory_tcp: Option<String>,
    /// Relative weight, 2 to 262144
    #[arg(long, alias = "cpu-share")]
    pub(crate) cpu_shares: Option<u64>,
    /// Microseconds in a period; -1 is no limit
    #[arg(long, allow_hyphen_values = true)]
    pub(crate) cpu_quota: Option<i64>,
    /// Microseconds
    #[arg(long)]
    pub(crate) cpu_period: Option<u64>,
    /// Realtime microseconds in a realtime period
    #[arg(long)]
    pub(crate) cpu_rt_runtime: Option<i64>,
    /// Microseconds
    #[arg(long)]
    pub(crate) cpu_rt_period: Option<u64>,
    /// Microseconds that may be saved up for a burst
    #[arg(long)]
    pub(crate) cpu_burst: Option<u64>,
    /// 1: run only when nothing else wants the processor
    #[arg(long)]
    pub(crate) cpu_idle: Option<i64>,
    /// Processors, as in 0-2,7
    #[arg(long)]
    pub(crate) cpuset_cpus: Option<String>,
    /// Memory nodes
    #[arg(long)]
    pub(crate) cpuset_mems: Option<String>,
    /// Processes; -1 is no limit
    #[arg(long, allow_hyphen_values = true)]
    pub(crate) pids_limit: Option<i64>,
    /// Relative weight, 10 to 1000
    #[arg(long)]
    pub(crate) blkio_weight: Option<u16>,
}

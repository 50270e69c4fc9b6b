// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The command line as a table: every command and option of `atoll-ct`. A superset of runc's and crun's, each
//! option before or after the container's id. What an option does is in `commands`.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

/// Runs containers from OCI bundles.
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
    /// Where containers' states are kept
    #[arg(
        long,
        global = true,
        default_value = "/run/atoll-ct",
        value_name = "DIR"
    )]
    pub(crate) root: PathBuf,
    /// Append errors to this file, too
    #[arg(long, global = true, value_name = "FILE")]
    pub(crate) log: Option<PathBuf>,
    /// Format of the log file
    #[arg(long, global = true, value_enum, default_value = "text")]
    pub(crate) log_format: LogFormat,
    /// Who makes cgroups
    #[arg(long, global = true, value_enum, default_value = "cgroupfs")]
    pub(crate) cgroup_manager: CgroupManager,
    /// The same as --cgroup-manager systemd
    #[arg(long, global = true)]
    pub(crate) systemd_cgroup: bool,
    /// Accepted for runc's callers; there is nothing more to log
    #[arg(long, global = true, hide = true)]
    debug: bool,
    /// Accepted for callers of runc and crun; errors are logged always
    #[arg(long, global = true, hide = true)]
    log_level: Option<String>,
    /// Accepted for runc's callers; only `false` and `auto` mean anything here
    #[arg(long, global = true, hide = true)]
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
    /// libcgroups cannot leave cgroups alone, so this is refused
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
    /// Print what this runtime can do, as JSON
    Features,
    /// Write a config.json to start from
    Spec(Spec),
    /// Attach to the console of a container that has a monitor; detach by Ctrl-]
    Console { id: String },
    /// Set the size of a monitored container's terminal
    Resize { id: String, columns: u16, rows: u16 },
    /// The hook of library module `own_dev`
    #[command(name = atoll_container_rt::own_dev::COMMAND, hide = true)]
    UncoverDev { rootfs: PathBuf },
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
}

#[derive(Debug, Args)]
pub(crate) struct Delete {
    pub(crate) id: String,
    /// Kill it first; no error when it does not exist
    #[arg(long, short)]
    pub(crate) force: bool,
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
    /// Additional capability
    #[arg(long, short)]
    pub(crate) cap: Vec<String>,
    /// Forbid gaining privileges
    #[arg(long)]
    pub(crate) no_new_privs: bool,
    /// AppArmor profile
    #[arg(long)]
    pub(crate) apparmor: Option<String>,
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
    /// Existing cgroup below the container's
    #[arg(long, value_name = "PATH")]
    pub(crate) cgroup: Option<PathBuf>,
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
}

#[derive(Debug, Args)]
pub(crate) struct Update {
    pub(crate) id: String,
    /// A resources object of the runtime-spec; - is standard input
    #[arg(long, short, value_name = "FILE")]
    pub(crate) resources: Option<PathBuf>,
    /// Bytes
    #[arg(long)]
    pub(crate) memory: Option<i64>,
    /// Bytes
    #[arg(long)]
    pub(crate) memory_reservation: Option<i64>,
    /// Bytes of memory and swap together; -1 is no limit
    #[arg(long, allow_hyphen_values = true)]
    pub(crate) memory_swap: Option<i64>,
    /// Relative weight, 2 to 262144
    #[arg(long, alias = "cpu-share")]
    pub(crate) cpu_shares: Option<u64>,
    /// Microseconds in a period; -1 is no limit
    #[arg(long, allow_hyphen_values = true)]
    pub(crate) cpu_quota: Option<i64>,
    /// Microseconds
    #[arg(long)]
    pub(crate) cpu_period: Option<u64>,
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

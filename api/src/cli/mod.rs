// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The command `atoll`: every route by its path, and short forms for what an administrator does daily.
//!
//! A client of the API like any other; the only thing it shares with the daemon is the route table, from which
//! `atoll usage` is printed. Nothing here runs inside `atolld`.

pub mod client;
pub mod console;
mod guest;
pub mod login;
pub mod output;
mod path;
mod task;
mod usage;
mod volumes;

use std::io::{Read as _, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{CommandFactory as _, Parser, Subcommand};
use serde_json::Value;

use crate::route::Method;
use client::{Client, ClientError};
use login::{Connection, Login, Saved, Secret};
use output::Output;

/// Exit codes, as the manual page lists them.
const EXIT_REFUSED: u8 = 1;
const EXIT_USAGE: u8 = 2;
const EXIT_UNREACHABLE: u8 = 3;
const EXIT_TASK_FAILED: u8 = 4;

/// Manage Atoll: virtual machines, containers, storage and tasks.
///
/// Exit codes: 0 done, 1 the server refused, 2 wrong usage, 3 the server cannot be reached, 4 a task failed.
#[derive(Debug, Parser)]
#[command(name = "atoll", version, max_term_width = 100)]
pub struct Cli {
    #[command(flatten)]
    connection: Connection,
    /// How answers are shown.
    #[arg(long, global = true, value_enum, default_value_t)]
    output: Output,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Read a path of the API.
    Get(path::Args),
    /// Create something at a path of the API, or begin it (POST).
    Create(path::Args),
    /// Change what is at a path of the API (PUT).
    Set(path::Args),
    /// Remove what is at a path of the API.
    Delete(path::Args),
    /// List what is below a path of the API, and which methods it has.
    Usage {
        /// Path, such as /nodes/{node}/qemu.
        #[arg(default_value = "/")]
        path: String,
    },
    /// Virtual machines.
    #[command(subcommand)]
    Vm(guest::Command),
    /// Containers.
    #[command(subcommand)]
    Ct(guest::Command),
    /// Nodes.
    #[command(subcommand)]
    Node(guest::NodeCommand),
    /// Tasks.
    #[command(subcommand)]
    Task(task::Command),
    /// Sign in and keep the ticket, which is good for two hours.
    Login {
        /// URL of the API, such as https://localhost:8006.
        url: Option<String>,
        /// User, such as root@pam. The password is read from standard input.
        #[arg(long)]
        username: Option<String>,
    },
    /// Forget the ticket that `login` kept.
    Logout,
    /// Print a completion script.
    Completion {
        /// The shell it is for.
        shell: clap_complete::Shell,
    },
    /// Write manual pages.
    Man {
        /// Directory to write them to.
        directory: PathBuf,
    },
}

/// Why a command did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// The request failed.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The command makes no sense.
    #[error("{0}")]
    Usage(String),
    /// The task ended, but not well.
    #[error("{0}")]
    TaskFailed(String),
    /// Reading or writing on this side failed.
    #[error("{0}")]
    Local(String),
}

impl CliError {
    fn exit_code(&self) -> u8 {
        match self {
            Self::Client(ClientError::Refused { .. }) | Self::Local(_) => EXIT_REFUSED,
            Self::Usage(_) => EXIT_USAGE,
            Self::Client(_) => EXIT_UNREACHABLE,
            Self::TaskFailed(_) => EXIT_TASK_FAILED,
        }
    }
}

/// The whole program.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => error.exit(),
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let result = match runtime {
        Ok(runtime) => runtime.block_on(run(cli)),
        Err(error) => Err(CliError::Local(format!("start: {error}"))),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let line = error.to_string().replace('\n', " ");
            drop(writeln!(std::io::stderr(), "atoll: {line}"));
            ExitCode::from(error.exit_code())
        }
    }
}

async fn run(cli: Cli) -> Result<(), CliError> {
    let Cli {
        connection,
        output,
        command,
    } = cli;
    let open = || async { Client::open(login::find(&connection)?).await };
    match command {
        Command::Get(args) => {
            path::parse(args, output)?
                .run(&open().await?, Method::Get)
                .await
        }
        Command::Create(args) => {
            path::parse(args, output)?
                .run(&open().await?, Method::Post)
                .await
        }
        Command::Set(args) => {
            path::parse(args, output)?
                .run(&open().await?, Method::Put)
                .await
        }
        Command::Delete(args) => {
            path::parse(args, output)?
                .run(&open().await?, Method::Delete)
                .await
        }
        Command::Usage { path } => print(&usage::of(&path)?),
        Command::Vm(command) => guest::run(&open().await?, guest::Kind::Vm, command, output).await,
        Command::Ct(command) => {
            guest::run(&open().await?, guest::Kind::Container, command, output).await
        }
        Command::Node(command) => guest::run_node(&open().await?, command, output).await,
        Command::Task(command) => task::run(&open().await?, command, output).await,
        Command::Login { url, username } => sign_in(connection, url, username).await,
        Command::Logout => match login::forget() {
            true => Ok(()),
            false => Err(CliError::Local("not signed in".to_owned())),
        },
        Command::Completion { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "atoll", &mut script);
            print(&String::from_utf8_lossy(&script))
        }
        Command::Man { directory } => std::fs::create_dir_all(&directory)
            .and_then(|()| clap_mangen::generate_to(Cli::command(), &directory))
            .map_err(|error| CliError::Local(format!("{}: {error}", directory.display()))),
    }
}

async fn sign_in(
    connection: Connection,
    url: Option<String>,
    username: Option<String>,
) -> Result<(), CliError> {
    let url = url.or(connection.url);
    let url = url.ok_or_else(|| CliError::Usage("give the URL to sign in at".to_owned()))?;
    let usage = "give --ca-file FILE; the server's is STATE/pki/ca.pem";
    let ca_file = connection
        .ca_file
        .ok_or_else(|| CliError::Usage(usage.to_owned()))?;
    let ca_file = std::fs::canonicalize(&ca_file)
        .map_err(|error| CliError::Local(format!("{}: {error}", ca_file.display())))?;
    let username = username.unwrap_or_else(|| "root@pam".to_owned());
    let password = password(&username)?;
    let login = Login {
        url: url.clone(),
        ca_file: Some(ca_file.clone()),
        secret: Secret::Password { username, password },
    };
    let client = Client::open(login).await?;
    let (ticket, csrf) = client.ticket().unwrap_or_default();
    let saved = Saved {
        url,
        ca_file,
        ticket: ticket.to_owned(),
        csrf: csrf.to_owned(),
    };
    let file = login::save(&saved)?;
    print(&format!("signed in; the ticket is in {}\n", file.display()))
}

/// Reads a password: unseen from a terminal, or the first line of anything else.
fn password(username: &str) -> Result<String, CliError> {
    let local = |error: std::io::Error| CliError::Local(format!("read the password: {error}"));
    let input = std::io::stdin();
    let mut text = String::new();
    match rustix::termios::tcgetattr(&input) {
        Err(_) => drop(
            input
                .lock()
                .take(4096)
                .read_to_string(&mut text)
                .map_err(local)?,
        ),
        Ok(before) => {
            drop(write!(std::io::stderr(), "Password of {username}: "));
            let mut silent = before.clone();
            silent.local_modes.remove(rustix::termios::LocalModes::ECHO);
            let set = |modes| {
                rustix::termios::tcsetattr(&input, rustix::termios::OptionalActions::Now, modes)
            };
            set(&silent).map_err(|error| local(error.into()))?;
            let read = input.read_line(&mut text);
            set(&before).map_err(|error| local(error.into()))?;
            drop(writeln!(std::io::stderr()));
            read.map_err(local)?;
        }
    }
    Ok(text.lines().next().unwrap_or_default().to_owned())
}

/// Writes to standard output; a reader that has gone away (`| head`) ends the command quietly.
fn print(text: &str) -> Result<(), CliError> {
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(CliError::Local(
            format!("write to standard output: {error}"),
        )),
        _ => Ok(()),
    }
}

/// Prints an answer.
fn show(value: &Value, output: Output) -> Result<(), CliError> {
    print(&output::render(value, output))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }
}

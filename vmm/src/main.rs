// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The command `atoll-vmm`: arguments in, an exit code and at most one line of error out.

#![expect(clippy::print_stderr, reason = "a command complains on standard error")]

use std::fs::File;
use std::io::BufReader;
use std::os::fd::{AsFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::ExitCode;

use anyhow::Context;
use atoll_vmm::cli::{
    Cli, Command, CtlArguments, CtlRequest, HostArguments, ReceiveArguments, RunArguments,
};
use atoll_vmm::machine::{
    self, Absence, Options, Outcome, SavedMemory, SavedStart, Signals, Start,
};
use atoll_vmm::migration::local;
use atoll_vmm::migration::target::{self, Door};
use atoll_vmm::relay::Relay;
use atoll_vmm::sandbox::{Confinement, Identity};
use atoll_vmm::terminal::{RawTerminal, one_line, print};
use atoll_vmm::{check, cpu_models, ctl, log, probe, saved, serve, socket};
use atoll_vmm_protocol::client::Client;
use atoll_vmm_protocol::spec::{ConsoleSpec, MachineSpec};
use clap::Parser;

/// The host could not do it.
const FAILED: u8 = 1;
/// The arguments or the spec are wrong.
const USAGE: u8 = 2;
/// The guest crashed.
const CRASHED: u8 = 3;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    let done = match cli.command {
        Command::Run(arguments) => run(&arguments),
        Command::Receive(arguments) => receive(&arguments),
        Command::Ctl(arguments) => control(&arguments),
        Command::CpuModels(arguments) => cpu_models::run(&arguments),
        Command::ServeDisk(arguments) => serve::run(&arguments),
        Command::Probe(arguments) => probe::run(&arguments).map_err(Into::into),
    };
    done.unwrap_or_else(|error| {
        eprintln!("atoll-vmm: {}", one_line(&format!("{error:#}")));
        let wrong = error.is::<check::SpecError>() || error.is::<serde_json::Error>();
        ExitCode::from(if wrong { USAGE } else { FAILED })
    })
}

/// Help goes to standard output as it is; an error is its first sentences, on one line.
fn usage(error: &clap::Error) -> ExitCode {
    if !error.use_stderr() {
        // Whoever asked for help and cannot read it is not helped by an error.
        let _ = print(&error.render().ansi().to_string());
        return ExitCode::SUCCESS;
    }
    let rendered = error.render().to_string();
    let said: Vec<&str> = rendered
        .lines()
        .map(str::trim)
        .take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more"))
        .filter(|line| !line.is_empty())
        .collect();
    let said = said.join(" ");
    let text = said.strip_prefix("error: ").unwrap_or(&said);
    eprintln!("atoll-vmm: {text} (see --help)");
    ExitCode::from(USAGE)
}

fn run(arguments: &RunArguments) -> anyhow::Result<ExitCode> {
    let host = &arguments.host;
    host.confinement.check(Identity::current())?;
    let log = log_to(host.log_file.as_deref())?;
    let spec = match (&arguments.spec, &arguments.restore) {
        (Some(path), _) => read_spec(path)?,
        (None, Some(snapshot)) => read_spec(&snapshot.join(saved::SPEC_FILE))?,
        (None, None) => {
            let mut spec = arguments.to_spec();
            if let Some(directory) = &arguments.cpu_models {
                cpu_models::bring(&mut spec.cpu, &cpu_models::read(directory)?);
            }
            spec
        }
    };
    let start = match &arguments.restore {
        None => Start::PowerOn,
        Some(snapshot) => {
            let (state, layers) = saved::open(snapshot)?;
            Start::Saved(Box::new(SavedStart {
                state,
                memory: SavedMemory::Files(layers, arguments.memory_mode),
                absence: Absence::Unseen,
                handover: None,
            }))
        }
    };
    check::spec(&spec)?;
    settle(host)?;
    run_on(host, log, &spec, start)
}

/// Waits for a machine of another process, then runs it as `run` does.
fn receive(arguments: &ReceiveArguments) -> anyhow::Result<ExitCode> {
    arguments.host.confinement.check(Identity::current())?;
    let log = log_to(arguments.host.log_file.as_deref())?;
    if arguments.upgrade {
        return take_over(&arguments.host, log);
    }
    let own_spec = arguments.spec.as_deref().map(read_spec).transpose()?;
    let door = open_door(arguments)?;
    settle(&arguments.host)?;
    let arrived = target::accept(&door, own_spec);
    drop(door);
    if let Some(socket) = &arguments.socket {
        // One machine, one socket: nobody else is to connect.
        let _ = std::fs::remove_file(socket);
    }
    let target::Arrived {
        spec,
        state,
        base,
        handover,
    } = arrived?;
    let mut source = handover.try_clone().context("keep the connection")?;
    let start = Start::Saved(Box::new(SavedStart {
        state,
        memory: SavedMemory::Here(base),
        absence: Absence::Passed,
        handover: Some(handover),
    }));
    let outcome = run_on(&arguments.host, log, &spec, start);
    if let Err(error) = &outcome {
        // Read by a source that still waits; one that has handed the machine over is gone.
        source.fail(&format!("{error:#}"));
    }
    outcome
}

/// Goes on with the machine of the process at the other end of standard input.
fn take_over(host: &HostArguments, log: Option<RawFd>) -> anyhow::Result<ExitCode> {
    settle(host)?;
    let control = std::io::stdin().as_fd().try_clone_to_owned();
    let control = UnixStream::from(control.context("take the connection")?);
    let local::Expected {
        spec,
        streams: [input, output, error],
        mut source,
        coming,
    } = local::expect(control)?;
    rustix::stdio::dup2_stdin(input).context("take standard input")?;
    rustix::stdio::dup2_stdout(output).context("take standard output")?;
    rustix::stdio::dup2_stderr(error).context("take standard error")?;
    let outcome = run_on(host, log, &spec, Start::Coming(Box::new(coming)));
    if let Err(error) = &outcome {
        // Read by a process that still waits; one that has handed the machine over is gone.
        source.fail(&format!("{error:#}"));
    }
    outcome
}

/// Listens for a source.
fn open_door(arguments: &ReceiveArguments) -> anyhow::Result<Door> {
    if let Some(listen) = &arguments.listen {
        let (relay, place) = Relay::start(&arguments.for_relay(listen))?;
        tracing::info!(at = place, "waits for a machine");
        return Ok(Door::Network(relay));
    }
    let path = arguments.socket.as_deref().unwrap_or(Path::new(""));
    let listener = socket::listen(path);
    let listener = listener.with_context(|| format!("socket {}", path.display()))?;
    Ok(Door::Here(listener))
}

/// Goes where the caller wants the process counted and limited, and says which one it is.
fn settle(host: &HostArguments) -> anyhow::Result<()> {
    let pid = std::process::id();
    for group in &host.cgroup {
        std::fs::write(group.join("cgroup.procs"), pid.to_string()).with_context(|| {
            format!(
                "enter control group {} (made with mkdir below a mounted hierarchy?)",
                group.display()
            )
        })?;
    }
    match &host.pid_file {
        Some(path) => std::fs::write(path, format!("{pid}\n"))
            .with_context(|| format!("pid file {}", path.display())),
        None => Ok(()),
    }
}

fn run_on(
    host: &HostArguments,
    log: Option<RawFd>,
    spec: &MachineSpec,
    start: Start,
) -> anyhow::Result<ExitCode> {
    let options = Options {
        api_socket: host.api_socket.clone(),
        signals: Signals::ShutDown,
        confinement: Confinement {
            log,
            ..host.confinement.to_confinement()
        },
        ..Options::default()
    };
    let on_stdio = spec.serial == ConsoleSpec::Stdio || spec.console == Some(ConsoleSpec::Stdio);
    let terminal = match on_stdio {
        true => RawTerminal::enter().context("switch the terminal to raw mode")?,
        false => None,
    };
    let outcome = machine::run_from(spec, &options, start);
    drop(terminal);
    Ok(match outcome? {
        Outcome::PoweredOff | Outcome::ShutDown | Outcome::Migrated => ExitCode::SUCCESS,
        Outcome::Crashed { reason } => {
            eprintln!("atoll-vmm: {reason}");
            ExitCode::from(CRASHED)
        }
    })
}

fn read_spec(path: &Path) -> anyhow::Result<MachineSpec> {
    let context = || format!("spec {}", path.display());
    let file = File::open(path).with_context(context)?;
    serde_json::from_reader(BufReader::new(file)).with_context(context)
}

/// See [`log::to`].
fn log_to(path: Option<&Path>) -> anyhow::Result<Option<RawFd>> {
    let name = || path.map_or_else(String::new, |path| format!("log file {}", path.display()));
    log::to(path).with_context(name)
}

fn control(arguments: &CtlArguments) -> anyhow::Result<ExitCode> {
    // Not required by the parser, which would not take it behind the request as well.
    let Some(socket) = &arguments.api_socket else {
        eprintln!("atoll-vmm: --api-socket <PATH> is missing (see ctl --help)");
        return Ok(ExitCode::from(USAGE));
    };
    let client = Client::new(socket);
    let CtlRequest { route, body } = &arguments.request;
    let answer = ctl::send(&client, route.request, body)?;
    let text = serde_json::to_string_pretty(&answer)?;
    print(&format!("{text}\n")).context("print the answer")?;
    Ok(ExitCode::SUCCESS)
}

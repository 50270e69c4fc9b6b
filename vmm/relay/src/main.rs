// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The command `atoll-relay`, which `atoll-vmm` starts. It answers on its standard input, a socket
//! (`atoll_vmm::relay`); a person who starts it is told so.

#![expect(clippy::print_stderr, reason = "a command complains on standard error")]

use std::path::PathBuf;
use std::process::ExitCode;

use atoll_disk::chain;
use atoll_relay::{Address, Protection, Relay, RelayError, serve, silence_limit};
use atoll_vmm::cli::{ConfinementArguments, NetworkArguments};
use atoll_vmm::log;
use atoll_vmm::relay::Caller;
use atoll_vmm::sandbox::Confinement;
use clap::{Args, Parser};

/// Carries a machine's migration through a network. Started by `atoll-vmm receive` and `atoll-vmm ctl migrate`.
#[derive(Debug, Parser)]
#[command(name = "atoll-relay", version, about)]
enum Command {
    /// The target's side, of `atoll-vmm receive`
    Serve(Box<ServeArguments>),
    /// The source's side, of `atoll-vmm ctl migrate`
    Connect(ConnectArguments),
}

#[derive(Debug, Args)]
struct ServeArguments {
    /// Where to listen: tcp:HOST:PORT
    #[arg(long, value_name = "ADDRESS")]
    listen: String,
    #[command(flatten)]
    network: NetworkArguments,
    /// Append the log to this file instead of standard error
    #[arg(long, value_name = "FILE")]
    log_file: Option<PathBuf>,
    #[command(flatten)]
    confinement: ConfinementArguments,
}

#[derive(Debug, Args)]
struct ConnectArguments {
    /// Where the target listens: tcp:HOST:PORT
    #[arg(long, value_name = "ADDRESS")]
    to: String,
    /// Connections for pages
    #[arg(long, value_name = "N")]
    pages: usize,
    /// Connections beside those and that for messages
    #[arg(long, value_name = "N")]
    others: usize,
    /// Whom the target's certificate is for, if not the host of its address
    #[arg(long, value_name = "NAME")]
    tls_name: Option<String>,
    /// Carry on when the caller has ended: a guest may need it
    #[arg(long)]
    to_the_end: bool,
    #[command(flatten)]
    network: NetworkArguments,
}

fn main() -> ExitCode {
    let command = Command::parse();
    let mut caller = match Caller::of_this_program() {
        Ok(caller) => caller,
        Err(error) => {
            eprintln!("atoll-relay: standard input is no socket (atoll-vmm starts this): {error}");
            return ExitCode::FAILURE;
        }
    };
    let done = match command {
        Command::Serve(arguments) => serve_on(&mut caller, &arguments),
        Command::Connect(arguments) => connect_for(&mut caller, &arguments),
    };
    let Err(error) = done else {
        return ExitCode::SUCCESS;
    };
    // Said once, by the process that was asked. If that is gone, nobody wants to know.
    let _ = caller.refuse(&chain(&error));
    ExitCode::FAILURE
}

fn serve_on(caller: &mut Caller, arguments: &ServeArguments) -> Result<(), RelayError> {
    let path = arguments.log_file.as_deref();
    let log = log::to(path).map_err(|source| RelayError::Host {
        what: "open the log",
        source,
    })?;
    let address = Address::parse(&arguments.listen)?;
    let protection = Protection::of(&arguments.network, &address)?;
    let silence = silence_limit(arguments.network.silence_limit_ms)?;
    let confinement = Confinement {
        log,
        ..arguments.confinement.to_confinement()
    };
    serve(caller, &address, &protection, silence, &confinement)
}

fn connect_for(caller: &mut Caller, arguments: &ConnectArguments) -> Result<(), RelayError> {
    let address = Address::parse(&arguments.to)?;
    let protection = Protection::of(&arguments.network, &address)?;
    let silence = silence_limit(arguments.network.silence_limit_ms)?;
    let name = arguments.tls_name.as_deref();
    let counts = [arguments.pages, arguments.others];
    let (relay, ends) = Relay::open(address, &protection, name, silence, counts)?;
    relay.answer(caller, ends, arguments.to_the_end)
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! `atoll-ct`: the command line of the container runtime. Parses, calls the library, prints; an error is one
//! line on standard error and, for engines, one in their log file. Exit codes: 0 done; 1 an error, of `exec`
//! 255; 126 and 127 (`run`) the program cannot be executed or is not there; 2 the command line is wrong; `run` and `exec`
//! in the foreground answer their program's own, or 128 plus the signal that ended it.

mod cli;
mod commands;
mod features;

use std::io::Write;
use std::process::ExitCode;

use atoll_container_rt::error::{Error, one_line};
use atoll_container_rt::log;
use clap::Parser;

fn main() -> ExitCode {
    let cli = cli::Cli::parse();
    let is_exec = matches!(cli.command, cli::Command::Exec(_));
    match commands::dispatch(cli.command, &cli.global) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            let line = one_line(&error);
            // Standard error may be closed; then the log file is all there is.
            writeln!(std::io::stderr(), "atoll-ct: {line}").ok();
            if let Some(file) = &cli.global.log {
                let format = match cli.global.log_format {
                    cli::LogFormat::Json => log::Format::Json,
                    cli::LogFormat::Text => log::Format::Text,
                };
                if let Err(error) = log::append_error(file, format, &line) {
                    writeln!(std::io::stderr(), "atoll-ct: {}", one_line(&error)).ok();
                }
            }
            match error {
                _ if is_exec => ExitCode::from(u8::MAX),
                Error::Executable { exit_code, .. } => ExitCode::from(exit_code),
                _ => ExitCode::FAILURE,
            }
        }
    }
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The daemon's `main`; see `atoll_api::daemon`. With `pam-check` it is the PAM helper instead.

use std::io::IsTerminal as _;
use std::process::ExitCode;

use atoll_api::{auth::pam, daemon};
use clap::Parser as _;
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let filter = EnvFilter::try_from_env("ATOLL_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    if std::env::args().nth(1).as_deref() == Some(pam::SUBCOMMAND) {
        log.without_time()
            .with_target(false)
            .with_ansi(false)
            .init();
        return pam::helper();
    }
    log.with_ansi(std::io::stderr().is_terminal()).init();
    let options = daemon::Options::parse();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build();
    let result = match runtime {
        Ok(runtime) => runtime.block_on(daemon::run(options)),
        Err(error) => Err(error.into()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

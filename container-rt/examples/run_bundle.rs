// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Runs a container through the library: `cargo run --example run_bundle -- BUNDLE`, as root, where BUNDLE has a
//! config.json (see `atoll-ct spec`) and a root file system.
//!
//! **It forks, and goes on running Rust code in the children until they execute the container's program.** So do
//! as this does: call it from a process with one thread. A server forks a helper first, or executes `atoll-ct`.

use std::process::ExitCode;

use atoll_container_rt::create::Request;
use atoll_container_rt::error::one_line;
use atoll_container_rt::run::{After, foreground};

#[expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "an example talks to its user"
)]
fn main() -> ExitCode {
    let Some(bundle) = std::env::args_os().nth(1) else {
        eprintln!("usage: run_bundle BUNDLE");
        return ExitCode::from(2);
    };
    let states = std::env::temp_dir().join(format!("run_bundle-{}", std::process::id()));
    let request = Request {
        id: format!("example-{}", std::process::id()),
        bundle: bundle.into(),
        ..Request::default()
    };
    let result = foreground(&states, &request, After::Delete);
    std::fs::remove_dir(&states).ok();
    match result {
        Ok(status) => {
            println!("the program ended with code {}", status.code);
            ExitCode::from(u8::try_from(status.code).unwrap_or(u8::MAX))
        }
        Err(error) => {
            eprintln!("{}", one_line(&error));
            ExitCode::FAILURE
        }
    }
}

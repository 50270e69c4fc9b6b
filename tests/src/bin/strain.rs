// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! `atoll-strain`: what a guest does while it moves between hosts, and the other end of its connection. Every part
//! checks itself, and ends the program with the reason when something is not as it has to be.
//!
//! ```text
//! guest  atoll-strain work   arithmetic ┐
//!                            memory     │ counters ──► report (JSON, twice a second), until there is a file `stop`
//!                            clocks     │
//!                            disks      ┘  (by fio)
//!                            stream ══ TCP ══ atoll-strain peer   on a machine that stays
//! ```
//! The parts are modest: several emulated machines share two cores, and memory has to be copied faster than it is
//! written.

#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "what it says is read by the test that started it"
)]

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::Ordering;
use std::thread::{Builder, sleep};
use std::time::Duration;

use anyhow::Context;
use atoll_tests::strain::{PARTS, Shared, peer};
use clap::{Parser, Subcommand};

/// How often the report is written.
const REPORT_PERIOD: Duration = Duration::from_millis(500);

#[derive(Parser)]
#[command(name = "atoll-strain")]
struct Arguments {
    #[command(subcommand)]
    role: Role,
}

#[derive(Subcommand)]
enum Role {
    /// Send back what one guest sends, and tell how much it was
    Peer {
        /// Address and port
        listen: SocketAddr,
    },
    /// Work until there is a file `stop`
    Work {
        /// Where the peer listens
        peer: SocketAddr,
        /// Directory with the files `report` and `stop`
        directory: PathBuf,
        /// Files on the disks under test, which are made, or the disks themselves
        files: Vec<PathBuf>,
    },
}

fn main() -> ExitCode {
    let done = match Arguments::parse().role {
        Role::Peer { listen } => peer(listen).map(|count| println!("{count} messages")),
        Role::Work {
            peer,
            directory,
            files,
        } => work(Shared::new(peer, files), &directory),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("atoll-strain: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn work(shared: Shared, directory: &std::path::Path) -> anyhow::Result<()> {
    let shared: &'static Shared = Box::leak(Box::new(shared));
    let (report, new, stop) = (
        directory.join("report"),
        directory.join("report.new"),
        directory.join("stop"),
    );
    let mut threads = Vec::new();
    for part in PARTS {
        let body = move || (part.body)(shared).context(part.name);
        let thread = Builder::new().name(part.name.to_owned()).spawn(body)?;
        threads.push(thread);
    }
    loop {
        sleep(REPORT_PERIOD);
        std::fs::write(&new, shared.report() + "\n")?;
        std::fs::rename(&new, &report)?;
        shared.stop.store(stop.exists(), Ordering::Relaxed);
        let mut index = 0;
        while index < threads.len() {
            match threads[index].is_finished() {
                // The first that ends with an error ends all.
                true => threads
                    .swap_remove(index)
                    .join()
                    .expect("a part does not panic")?,
                false => index += 1,
            }
        }
        if threads.is_empty() {
            std::fs::write(&report, shared.report() + "\n")?;
            return Ok(());
        }
    }
}

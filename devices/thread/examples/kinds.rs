// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Makes threads by kind, as a program that embeds the devices and has filters of its own would.
//!
//!     cargo run -p atoll-thread --example kinds
#![expect(clippy::print_stdout, reason = "an example talks to its reader")]

use std::io;

use atoll_thread::{Kind, confine, in_starter, seal_starter, spawn};

/// Stands where the VMM installs the system-call filter of a kind.
fn enter(kind: Kind) {
    let name = std::thread::current().name().map(str::to_owned);
    println!("{:?} enters as {kind:?}", name.unwrap_or_default());
}

fn main() -> io::Result<()> {
    confine(enter)?;
    let disk = spawn(Kind::Disk, "blk0-q0", || 2 + 2)?;
    seal_starter();
    // From here on the starter has its filter, too; what a thread may not open itself is opened there.
    let opened_by = in_starter(|| std::thread::current().name().map(str::to_owned));
    println!("opened by {:?}", opened_by.unwrap_or_default());
    let sum = disk
        .join()
        .map_err(|_| io::Error::other("blk0-q0 panicked"))?;
    println!("blk0-q0 says {sum}");
    Ok(())
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The parts of the program `atoll-strain` (`src/bin/strain.rs`), which a guest runs while it moves.

mod clocks;
mod disks;
mod memory;
mod stream;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

pub use stream::peer;

/// A piece of work that goes on until it is told to stop.
pub struct Part {
    /// Its name in the report.
    pub name: &'static str,
    /// Counts what it does; an error is a check that has failed.
    pub body: fn(&Shared) -> Result<()>,
}

/// What a guest does.
pub const PARTS: [Part; 6] = [
    Part {
        name: "arithmetic",
        body: arithmetic,
    },
    Part {
        name: "memory",
        body: memory::write,
    },
    Part {
        name: "disks",
        body: disks::verify,
    },
    Part {
        name: "stream",
        body: stream::send,
    },
    Part {
        name: "clocks0",
        body: |shared| clocks::read(shared, 0),
    },
    Part {
        name: "clocks1",
        body: |shared| clocks::read(shared, 1),
    },
];

/// What the parts have in common.
pub struct Shared {
    /// Ends them.
    pub stop: AtomicBool,
    peer: SocketAddr,
    files: Vec<PathBuf>,
    counts: [AtomicU64; PARTS.len()],
    verified_bytes: AtomicU64,
    latest: clocks::Latest,
}

/// What the report says.
#[derive(Debug, Serialize, Deserialize)]
pub struct Report {
    /// What each part has done so far, by its name.
    pub counts: BTreeMap<String, u64>,
    /// What was read back from disks and compared.
    pub verified_bytes: u64,
    /// The longest time between two looks at a clock, in milliseconds.
    pub longest_gap_ms: u64,
}

impl Shared {
    /// For a connection to `peer`, and disks: each a file on one, or its device.
    #[must_use]
    pub fn new(peer: SocketAddr, files: Vec<PathBuf>) -> Self {
        Self {
            stop: AtomicBool::new(false),
            peer,
            files,
            counts: Default::default(),
            verified_bytes: AtomicU64::new(0),
            latest: clocks::Latest::default(),
        }
    }

    /// A [`Report`] as JSON.
    #[must_use]
    pub fn report(&self) -> String {
        let counts = PARTS.iter().zip(&self.counts);
        let report = Report {
            counts: counts
                .map(|(part, count)| (part.name.to_owned(), count.load(Ordering::Relaxed)))
                .collect(),
            verified_bytes: self.verified_bytes.load(Ordering::Relaxed),
            longest_gap_ms: self.latest.longest_gap_ms(),
        };
        serde_json::to_string(&report).expect("names and numbers")
    }

    fn count(&self, name: &str) {
        self.counter(name).fetch_add(1, Ordering::Relaxed);
    }

    fn count_to(&self, name: &str, count: u64) {
        self.counter(name).store(count, Ordering::Relaxed);
    }

    fn counter(&self, name: &str) -> &AtomicU64 {
        let index = PARTS.iter().position(|part| part.name == name);
        &self.counts[index.expect("a part counts under its own name")]
    }

    fn is_over(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}

/// Numbers that look random; each follows from the one before (xorshift64*, Vigna 2014).
pub struct Numbers(u64);

impl Numbers {
    /// Those of a seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// The next one.
    pub fn draw(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// The next one, of those below `end`, which is not 0.
    pub fn below(&mut self, end: u64) -> u64 {
        self.draw() % end
    }
}

/// A long computation, always the same, with integers and floating point: a register that is lost changes its result.
fn arithmetic(shared: &Shared) -> Result<()> {
    let compute = || {
        let mut numbers = Numbers::new(1);
        let (mut x, mut y, mut sum) = (0.3_f64, 0.7_f64, 0_u64);
        for _ in 0..100_000 {
            (x, y) = (3.99 * x * (1. - x), 3.98 * y * (1. - y));
            sum = sum.rotate_left(7) ^ numbers.draw() ^ x.to_bits() ^ y.to_bits();
        }
        sum
    };
    let expected = compute();
    while !shared.is_over() {
        let found = compute();
        ensure!(found == expected, "{found:#x}, expected {expected:#x}");
        shared.count("arithmetic");
        // One of two cores has to be enough for everything else.
        sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// Waits for a while between two steps of a part.
fn rest(shared: &Shared, milliseconds: u64) -> bool {
    sleep(Duration::from_millis(milliseconds));
    !shared.is_over()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// On this machine, which does not move, and on a disk of it that knows direct access.
    #[test]
    fn every_part_works_and_stops() {
        let folder = tempfile::tempdir_in("/var/tmp").unwrap();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let files = ["one", "other"].map(|name| folder.path().join(name));
        let shared = Shared::new(listener.local_addr().unwrap(), files.to_vec());
        std::thread::scope(|scope| {
            let peer = scope.spawn(|| stream::echo(&listener));
            let parts = PARTS.map(|part| {
                let shared = &shared;
                scope.spawn(move || (part.body)(shared))
            });
            let all_count = || {
                let report: Report = serde_json::from_str(&shared.report()).unwrap();
                report.counts.values().all(|count| *count > 0)
            };
            while !all_count() && !parts.iter().any(|part| part.is_finished()) {
                sleep(Duration::from_millis(1));
            }
            shared.stop.store(true, Ordering::Relaxed);
            for part in parts {
                part.join().unwrap().unwrap();
            }
            let echoed = peer.join().unwrap().unwrap();
            let report: Report = serde_json::from_str(&shared.report()).unwrap();
            assert_eq!(echoed, report.counts["stream"]);
            assert!(report.verified_bytes > 0);
        });
    }
}

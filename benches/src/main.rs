// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Side-by-side benchmarks: release binaries of Atoll and their peers do the same work in turns, in one run.
//! Writes `target/bench/summary.tsv` and prints it. Not a test: nothing here fails because something is slow; a
//! row that cannot run here says why. `README.md` has the method and published numbers.
//!
//! Called by `make bench`.

mod api;
mod container;
mod disk;
mod exits;
mod host;
mod linux;
mod migration;
mod monitor;
mod net;
mod restore;
mod start;
mod still;
mod table;
mod tap;
mod throughput;

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::Parser;

use table::Row;

/// Runs the benchmarks and writes the table.
#[derive(Debug, Parser)]
struct Arguments {
    /// Only these suites: start, exits, restore, disk, net, migration, throughput, still, linux, container, api
    suites: Vec<String>,
    /// Pairs of runs a row of starts and of containers
    #[arg(long, default_value_t = 30)]
    runs: usize,
    /// Where atoll-vmm, atoll-ct and atolld are; default: beside this program
    #[arg(long, value_name = "DIR")]
    bin_dir: Option<PathBuf>,
    /// Where peers are that the system does not have: firecracker (with jailer and firecracker-filters.bpf), cloud-hypervisor
    #[arg(long, value_name = "DIR", env = "PEERS")]
    peers: Option<PathBuf>,
    /// The table
    #[arg(long, value_name = "FILE", default_value = "target/bench/summary.tsv")]
    output: PathBuf,
    /// Linux guests that live at once, with a lab host that has the memory for them
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=100))]
    guests: u32,
    /// Internal: runs suites in what was made for them (containers: a mount namespace; Linux: a lab host), prints rows
    #[arg(long, hide = true)]
    prepared: bool,
    /// Internal: the Linux guests' kernel and initramfs
    #[arg(long, hide = true, value_name = "DIR")]
    guest: Option<PathBuf>,
}

/// What every suite is given.
#[derive(Debug)]
struct Bench {
    runs: usize,
    guests: u32,
    bin_dir: PathBuf,
    peers: Option<PathBuf>,
    /// On a disk, unlike the folder for temporary files perhaps.
    folder: PathBuf,
    prepared: bool,
    guest: Option<PathBuf>,
}

impl Bench {
    /// One of our programs, or a sentence why not.
    fn program(&self, name: &str) -> anyhow::Result<PathBuf> {
        let path = self.bin_dir.join(name);
        anyhow::ensure!(path.is_file(), "{} is not built", path.display());
        Ok(path)
    }

    /// The program in Linux guests, which is always beside this one.
    fn guest_program(&self) -> anyhow::Result<PathBuf> {
        let path = std::env::current_exe()?.with_file_name("atoll-bench-guest");
        anyhow::ensure!(path.is_file(), "{} is not built", path.display());
        Ok(path)
    }
}

type Suite = (&'static str, fn(&Bench) -> Vec<Row>);

const SUITES: &[Suite] = &[
    ("start", start::rows),
    ("exits", exits::rows),
    ("restore", restore::rows),
    ("disk", disk::rows),
    ("net", net::rows),
    ("migration", migration::rows),
    ("throughput", throughput::rows),
    ("still", still::rows),
    ("linux", linux::rows),
    ("container", container::rows),
    ("api", api::rows),
];

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    for name in &arguments.suites {
        anyhow::ensure!(
            SUITES.iter().any(|(known, _)| known == name),
            "{name}: no such suite"
        );
    }
    let beside = std::env::current_exe().context("this program's path")?;
    let beside = beside.parent().unwrap_or(Path::new("."));
    let output_folder = arguments.output.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(output_folder)
        .with_context(|| format!("create {}", output_folder.display()))?;
    let bench = Bench {
        runs: arguments.runs.max(1),
        guests: arguments.guests,
        // Some programs are run in folders of their own.
        bin_dir: std::path::absolute(arguments.bin_dir.as_deref().unwrap_or(beside))?,
        peers: arguments.peers.map(std::path::absolute).transpose()?,
        folder: output_folder.to_owned(),
        prepared: arguments.prepared,
        guest: arguments.guest,
    };
    let wanted =
        |name: &str| arguments.suites.is_empty() || arguments.suites.iter().any(|s| s == name);
    let rows: Vec<Row> = SUITES
        .iter()
        .filter(|(name, _)| wanted(name))
        .flat_map(|(_, suite)| suite(&bench))
        .collect();
    if arguments.prepared {
        return table::send(&rows);
    }
    table::write(&arguments.output, &rows)
}

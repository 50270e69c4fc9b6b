// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The suite in the lab, for a machine whose KVM runs no Linux: this program runs itself on one emulated host, with our
//! VMM, the peers and the image as the host's payload, and takes its rows over.

use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use atoll_tests::lab::{self, HostKernel, Scratch, Settings};

use super::image::{Image, copy_qemu};
use crate::Bench;
use crate::table::Row;

/// Longest time of the whole suite there.
const DEADLINE: Duration = Duration::from_secs(3600);
/// What a guest takes at most with its VMM's process, and what a host has besides.
const GUEST_MIB: u32 = 160;
const HOST_MIB: u32 = 1500;

/// The rows, measured on an emulated host.
pub fn rows(bench: &Bench) -> anyhow::Result<Vec<Row>> {
    let stock = lab::guest_image()?;
    let around = Scratch::new_in(stock.parent().unwrap_or(&stock))?;
    let payload = around.path().join("payload");
    fill(bench, &stock, &payload).context("the host's payload")?;
    let work = Scratch::new_in(&std::env::temp_dir())?;
    let hosts = lab::start(&Settings {
        host_count: 1,
        memory_mib: memory_mib(bench.guests),
        kernel: HostKernel::Suite,
        payload: Some(&payload),
        directory: work.path().to_owned(),
        api: None,
    })?;
    let script = format!(
        "PATH=/payload/peers:$PATH exec /payload/bin/atoll-benches linux --prepared --runs {} --guests {} \
         --bin-dir /payload/bin --peers /payload/peers --guest /payload/guest --output /var/tmp/bench/summary.tsv",
        bench.runs, bench.guests
    );
    let said = hosts[0].follow(&script, DEADLINE, |line| {
        // For who waits; the rows themselves come at the end.
        if Row::parse(line).is_none() {
            let _ = writeln!(std::io::stderr(), "lab: {line}");
        }
    })?;
    anyhow::ensure!(said.code == 0, "on the emulated host: {}", said.text);
    Ok(said.text.lines().filter_map(Row::parse).collect())
}

/// RAM of a host for so many guests at once: that of the tests' hosts, which have a template, where it is enough.
fn memory_mib(guests: u32) -> u32 {
    lab::MEMORY_MIB.max(HOST_MIB + guests * GUEST_MIB)
}

fn fill(bench: &Bench, stock: &Path, payload: &Path) -> anyhow::Result<()> {
    for folder in ["", "bin", "peers", "guest"] {
        fs::create_dir(payload.join(folder))?;
    }
    let bin = payload.join("bin");
    fs::copy(bench.program("atoll-vmm")?, bin.join("atoll-vmm"))?;
    fs::copy(std::env::current_exe()?, bin.join("atoll-benches"))?;
    Image::make(&payload.join("guest"), stock, &bench.guest_program()?)?;
    let peers = payload.join("peers");
    for name in ["cloud-hypervisor", "firecracker"] {
        // What is missing is told by its rows.
        if let Some(path) = bench.peers.as_ref().map(|folder| folder.join(name))
            && path.exists()
        {
            fs::copy(path, peers.join(name))?;
        }
    }
    copy_qemu(&peers)
}

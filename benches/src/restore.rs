// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Restored machines: from the start of the VMM's process until the guest goes on, by how much of its memory has
//! something in it, and by how that comes back.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::Context as _;
use tempfile::TempDir;

use crate::Bench;
use crate::monitor::Prepared;
use crate::table::{Contestant, Figure, Row, compare};

/// Memory of the guest, and what of it has something in it, beside the probe's own.
const MEMORY: &str = "2048";
const FILLED_MIB: &[u64] = &[0, 256, 1024];
/// Where that begins, above all that the probe uses.
const FIRST_MIB: u64 = 512;
/// Turns at most: each reads up to a gigabyte.
const TURNS_MAX: usize = 7;
/// What the guest does meanwhile: it writes its own 4 MiB, and a line every 256 pages.
const WORK: &[u8] = b"load 16 4\r";
const LINE: &[u8] = b"load ";

/// The suite.
pub fn rows(bench: &Bench) -> Vec<Row> {
    FILLED_MIB.iter().flat_map(|mib| row(bench, *mib)).collect()
}

fn row(bench: &Bench, filled_mib: u64) -> Vec<Row> {
    let figure = Figure::cost(
        &format!("vm_restore_{filled_mib}_mib_until_it_goes_on"),
        "ms",
    );
    let saved = Saved::make(bench, filled_mib);
    let by = |mode: &'static str, name: &'static str| Contestant {
        name,
        turns_max: usize::MAX,
        take: match &saved {
            Ok(saved) => Box::new(move || saved.restore_ms(mode)),
            Err(error) => Box::new(move || Err(anyhow::anyhow!("{error:#}"))),
        },
    };
    let peers = vec![
        by("read", "ours, read before it runs"),
        by("map", "ours, mapped copy-on-write"),
    ];
    let turns = bench.runs.min(TURNS_MAX);
    compare(
        &figure,
        turns,
        by("lazy", "ours, read while it runs"),
        peers,
    )
}

/// A snapshot of the probe at work.
struct Saved {
    vmm: PathBuf,
    folder: TempDir,
}

impl Saved {
    fn make(bench: &Bench, filled_mib: u64) -> anyhow::Result<Self> {
        let vmm = bench.program("atoll-vmm")?;
        let folder = tempfile::tempdir_in(&bench.folder).context("temporary directory")?;
        let here = folder.path();
        let kernel = here.join("probe.elf");
        run(Command::new(&vmm).args(["probe", "--extract"]).arg(&kernel))?;
        let socket = here.join("api");
        let mut command = Command::new(&vmm);
        command.arg("run").arg("--kernel").arg(&kernel);
        command.args([
            "--cmdline",
            "stay",
            "--memory",
            MEMORY,
            "--console",
            "stdio",
        ]);
        command.arg("--api-socket").arg(&socket);
        let mut guest = Prepared::from(command).start_to_type()?;
        guest.wait_for(b"probe> ")?;
        guest.type_in(WORK)?;
        guest.wait_for(b"\r\nload ")?;
        let mut asked = Command::new(&vmm);
        asked.arg("ctl").arg("--api-socket").arg(&socket);
        run(asked.args(["snapshot", "--to"]).arg(here.join("saved")))?;
        fill(&here.join("saved/memory"), filled_mib)?;
        Ok(Self { vmm, folder })
    }

    /// From before the process is made until the guest has written something.
    fn restore_ms(&self, mode: &str) -> anyhow::Result<f64> {
        let start = Instant::now();
        let mut command = Command::new(&self.vmm);
        command
            .arg("run")
            .arg("--restore")
            .arg(self.folder.path().join("saved"));
        command.args(["--memory-mode", mode]);
        Prepared::from(command).start()?.wait_for(LINE)?;
        Ok(start.elapsed().as_secs_f64() * 1000.0)
    }
}

/// Puts something into an image of RAM, in the host's cache afterwards.
fn fill(memory: &Path, mib: u64) -> anyhow::Result<()> {
    let memory = File::options().write(true).open(memory)?;
    let content = vec![0x5a; 1 << 20];
    for at in FIRST_MIB..FIRST_MIB + mib {
        memory.write_all_at(&content, at << 20)?;
    }
    memory.sync_all().context("write the snapshot")
}

fn run(command: &mut Command) -> anyhow::Result<()> {
    let output = command.output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    anyhow::ensure!(output.status.success(), "{command:?}: {said}");
    Ok(())
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! From the start of the VMM's process to the guest's first instructions: `atoll-vmm` against QEMU's `microvm`, the
//! same guest (the probe in mode `exit`, whose entry writes one byte to the serial port), the same KVM.

use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::Context as _;

use crate::Bench;
use crate::table::Row;

const NAME: &str = "vm_start_to_first_instruction";
const PEER: &str = "qemu-microvm";
const MEMORY_MIB: &str = "64";
/// What the probe's entry writes when its command line begins with `exit`.
const MARKER: u8 = b'!';

/// The suite.
pub fn rows(bench: &Bench) -> Vec<Row> {
    vec![row(bench).unwrap_or_else(|error| Row::absent(NAME, "ms", PEER, &error))]
}

fn row(bench: &Bench) -> anyhow::Result<Row> {
    let vmm = bench.program("atoll-vmm")?;
    let directory = tempfile::tempdir().context("temporary directory")?;
    let probe = directory.path().join("probe.elf");
    let status = Command::new(&vmm)
        .args(["probe", "--extract"])
        .arg(&probe)
        .status()?;
    anyhow::ensure!(status.success(), "atoll-vmm probe --extract: {status}");
    let mut pairs = Vec::new();
    for turn in 0..=bench.runs {
        let socket = directory.path().join(format!("api-{turn}"));
        let us = to_marker(&mut ours(&vmm, &probe, &socket))?;
        pairs.push((us, to_marker(&mut microvm(&probe))?));
    }
    // The first pair read the programs from disk.
    Ok(Row::pairs(NAME, "ms", PEER, &pairs[1..]))
}

fn ours(vmm: &Path, probe: &Path, socket: &Path) -> Command {
    let mut command = Command::new(vmm);
    command.arg("run").arg("--kernel").arg(probe);
    command.args([
        "--cmdline",
        "exit",
        "--cpus",
        "1",
        "--memory",
        MEMORY_MIB,
        "--console",
        "stdio",
    ]);
    command.arg("--api-socket").arg(socket);
    command
}

fn microvm(probe: &Path) -> Command {
    let mut command = Command::new("qemu-system-x86_64");
    // arch-capabilities=off: QEMU 7.2 asserts on this MSR under kvm_pvm; elsewhere it makes no difference to a start.
    command.args([
        "-M",
        "microvm",
        "-accel",
        "kvm",
        "-cpu",
        "host,arch-capabilities=off",
    ]);
    command.args([
        "-m",
        MEMORY_MIB,
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
    ]);
    command
        .args([
            "-no-reboot",
            "-serial",
            "stdio",
            "-append",
            "exit",
            "-kernel",
        ])
        .arg(probe);
    command
}

/// Milliseconds from before the process is made until the marker came out of its standard output.
fn to_marker(command: &mut Command) -> anyhow::Result<f64> {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let start = Instant::now();
    let mut child = command
        .spawn()
        .with_context(|| format!("{}", command.get_program().display()))?;
    let mut first = [0];
    let read = child
        .stdout
        .as_mut()
        .context("its output")?
        .read_exact(&mut first);
    let elapsed = start.elapsed();
    // It powers off or crashes by itself; not waiting for that keeps the turns short.
    let _ = child.kill();
    let output = child.wait_with_output()?;
    let complaint = String::from_utf8_lossy(&output.stderr);
    read.with_context(|| format!("{}: {}", command.get_program().display(), complaint.trim()))?;
    anyhow::ensure!(
        first == [MARKER],
        "{} wrote {first:?}",
        command.get_program().display()
    );
    Ok(elapsed.as_secs_f64() * 1000.0)
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! MicroVMs: from the start of the VMM's process to the guest's first instructions, one at a time and a hundred at once;
//! and the memory that the process takes beside its guest's RAM. `atoll-vmm` as it runs by default (sandbox and
//! system-call filters on) against its peers: the same guest (the probe), the same KVM.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use anyhow::Context as _;
use tempfile::TempDir;

use crate::Bench;
use crate::table::Row;

const MEMORY_MIB: u64 = 64;
/// Machines of the row that starts many.
const MANY: usize = 100;
/// Pairs of that row: each is two hundred processes.
const MANY_PAIRS: usize = 5;
/// What the probe's entry writes when its command line begins with `exit`.
const MARKER: &[u8] = b"!";
/// What it writes in mode `stay` when it has found its devices and waits.
const PROMPT: &[u8] = b"probe> ";

/// A VMM: its name in the table, and its command that runs the probe with a command line, serial port on standard
/// output.
struct Monitor {
    name: &'static str,
    command: fn(&Scene, &str) -> anyhow::Result<Command>,
}

const OURS: Monitor = Monitor {
    name: "atoll-vmm",
    command: ours,
};

const PEERS: &[Monitor] = &[
    Monitor {
        name: "qemu-microvm",
        command: microvm,
    },
    Monitor {
        name: "firecracker",
        command: firecracker,
    },
];

/// What one comparison is made on: its name, its unit, how many pairs at most, and one measurement.
struct Measure {
    name: &'static str,
    unit: &'static str,
    pairs_max: usize,
    take: fn(&Scene, &Monitor) -> anyhow::Result<f64>,
}

const MEASURES: &[Measure] = &[
    Measure {
        name: "vm_start_to_first_instruction",
        unit: "ms",
        pairs_max: usize::MAX,
        take: first_instruction_ms,
    },
    Measure {
        name: "vm_start_to_first_instruction_100_at_once",
        unit: "ms",
        pairs_max: MANY_PAIRS,
        take: hundred_ms,
    },
    Measure {
        name: "vm_memory_beyond_guest",
        unit: "KiB",
        pairs_max: 3,
        take: beyond_guest_kib,
    },
];

/// Where the programs are, and a folder for what they need.
struct Scene {
    folder: TempDir,
    vmm: PathBuf,
    probe: PathBuf,
    peers: Option<PathBuf>,
}

/// The suite.
pub fn rows(bench: &Bench) -> Vec<Row> {
    let scene = match scene(bench) {
        Ok(scene) => scene,
        Err(error) => {
            let absent = |measure: &Measure| Row::absent(measure.name, measure.unit, "-", &error);
            return MEASURES.iter().map(absent).collect();
        }
    };
    let mut rows = Vec::new();
    for measure in MEASURES {
        for peer in PEERS {
            let row = pairs(&scene, measure, peer, bench.runs.min(measure.pairs_max));
            let absent = |error| Row::absent(measure.name, measure.unit, peer.name, &error);
            rows.push(row.unwrap_or_else(absent));
        }
    }
    rows
}

fn scene(bench: &Bench) -> anyhow::Result<Scene> {
    let vmm = bench.program("atoll-vmm")?;
    let folder = tempfile::tempdir().context("temporary directory")?;
    let probe = folder.path().join("probe.elf");
    let status = Command::new(&vmm)
        .args(["probe", "--extract"])
        .arg(&probe)
        .status()?;
    anyhow::ensure!(status.success(), "atoll-vmm probe --extract: {status}");
    Ok(Scene {
        folder,
        vmm,
        probe,
        peers: bench.peers.clone(),
    })
}

fn pairs(scene: &Scene, measure: &Measure, peer: &Monitor, count: usize) -> anyhow::Result<Row> {
    let mut pairs = Vec::new();
    for _ in 0..=count {
        let ours = (measure.take)(scene, &OURS)?;
        pairs.push((ours, (measure.take)(scene, peer)?));
    }
    // The first pair read the programs from disk.
    let (name, unit) = (measure.name, measure.unit);
    Ok(Row::pairs(name, unit, peer.name, &pairs[1..]))
}

fn ours(scene: &Scene, cmdline: &str) -> anyhow::Result<Command> {
    let mut command = Command::new(&scene.vmm);
    command.arg("run").arg("--kernel").arg(&scene.probe);
    command.args(["--cmdline", cmdline, "--cpus", "1", "--console", "stdio"]);
    command.args(["--memory", &MEMORY_MIB.to_string()]);
    Ok(command)
}

fn microvm(scene: &Scene, cmdline: &str) -> anyhow::Result<Command> {
    let mut command = Command::new("qemu-system-x86_64");
    command.args(["-M", "microvm", "-accel", "kvm", "-nodefaults"]);
    // arch-capabilities=off: QEMU 7.2 asserts on this MSR under kvm_pvm; elsewhere it makes no difference to a start.
    command.args(["-cpu", "host,arch-capabilities=off", "-no-user-config"]);
    command.args(["-m", &MEMORY_MIB.to_string(), "-display", "none"]);
    command.args(["-no-reboot", "-serial", "stdio", "-append", cmdline]);
    command.arg("-kernel").arg(&scene.probe);
    Ok(command)
}

/// Without its jailer, which would be in its favour.
fn firecracker(scene: &Scene, cmdline: &str) -> anyhow::Result<Command> {
    let peers = scene.peers.as_ref();
    let program = peers.map(|folder| folder.join("firecracker"));
    let program = program
        .filter(|path| path.is_file())
        .context("no `firecracker` in the folder that --peers (PEERS=) names")?;
    let config = scene.folder.path().join("firecracker.json");
    let text = serde_json::json!({
        "boot-source": {"kernel_image_path": scene.probe, "boot_args": cmdline},
        "machine-config": {"vcpu_count": 1, "mem_size_mib": MEMORY_MIB},
        "drives": [],
    });
    std::fs::write(&config, text.to_string())?;
    let mut command = Command::new(program);
    command.args(["--no-api", "--config-file"]).arg(config);
    Ok(command)
}

/// A running VMM, ended when dropped.
struct Running(Child);

impl Running {
    fn start(scene: &Scene, monitor: &Monitor, cmdline: &str) -> anyhow::Result<Self> {
        let mut command = (monitor.command)(scene, cmdline)?;
        command.stdin(Stdio::null());
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        Ok(Self(command.spawn().context(monitor.name)?))
    }

    /// Reads the serial port until `text` has come.
    fn wait_for(&mut self, text: &[u8]) -> anyhow::Result<()> {
        let output = self.0.stdout.as_mut().context("its output")?;
        let mut heard = Vec::new();
        while !heard.ends_with(text) {
            let mut byte = [0];
            if output.read(&mut byte)? == 0 {
                let mut complaint = String::new();
                if let Some(stderr) = &mut self.0.stderr {
                    stderr.read_to_string(&mut complaint)?;
                }
                let last = complaint.lines().last().unwrap_or_default();
                anyhow::bail!(
                    "it ended without {:?}: {last}",
                    String::from_utf8_lossy(text)
                );
            }
            heard.push(byte[0]);
        }
        Ok(())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail when it has powered off by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// From before the process is made until the marker came out of its standard output.
fn first_instruction_ms(scene: &Scene, monitor: &Monitor) -> anyhow::Result<f64> {
    let start = Instant::now();
    let mut running = Running::start(scene, monitor, "exit")?;
    running.wait_for(MARKER)?;
    Ok(start.elapsed().as_secs_f64() * 1000.0)
}

/// The same for the last of [`MANY`] that are started one right after the other.
fn hundred_ms(scene: &Scene, monitor: &Monitor) -> anyhow::Result<f64> {
    let start = Instant::now();
    let mut all = (0..MANY)
        .map(|_| Running::start(scene, monitor, "exit"))
        .collect::<anyhow::Result<Vec<_>>>()?;
    for running in &mut all {
        running.wait_for(MARKER)?;
    }
    Ok(start.elapsed().as_secs_f64() * 1000.0)
}

/// Proportional set size of every mapping but the guest's RAM, once the guest waits at its prompt.
fn beyond_guest_kib(scene: &Scene, monitor: &Monitor) -> anyhow::Result<f64> {
    let mut running = Running::start(scene, monitor, "stay")?;
    running.wait_for(PROMPT)?;
    let path = Path::new("/proc").join(running.0.id().to_string());
    let text = std::fs::read_to_string(path.join("smaps")).context("its memory map")?;
    Ok(pss_kib(&text))
}

/// Sum of `Pss` (proc(5)) over the mappings that are not as large as the guest's RAM, or larger.
fn pss_kib(smaps: &str) -> f64 {
    let number = |line: &str| -> Option<u64> { line.split_whitespace().nth(1)?.parse().ok() };
    let mut size_kib = 0;
    let mut sum_kib = 0;
    for line in smaps.lines() {
        if line.starts_with("Size:") {
            size_kib = number(line).unwrap_or_default();
        } else if line.starts_with("Pss:") && size_kib < MEMORY_MIB << 10 {
            sum_kib += number(line).unwrap_or_default();
        }
    }
    f64::from(u32::try_from(sum_kib).unwrap_or(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::pss_kib;

    #[test]
    fn guest_memory_is_left_out() {
        let smaps = "Size:  65536 kB\nRss: 9 kB\nPss: 9000 kB\nSize: 4 kB\nPss: 3 kB\nSize: 8 kB\nPss: 2 kB\n";
        assert!((pss_kib(smaps) - 5.0).abs() < f64::EPSILON);
    }
}

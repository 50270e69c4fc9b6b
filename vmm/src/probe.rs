// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! `atoll-vmm probe`: can this host run guests, and how fast? Starts the probe guest (`firmware/probe`) in a
//! process of its own with every kind of device, reads its report, and judges. Not a benchmark: one run, one answer.
//!
//! Called by `main`, by `make run` (which reads the JSON) and by tests, which also take the guest itself from
//! [`PROBE_ELF`].

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context;
use atoll_vmm_protocol::spec::{BootSpec, ConsoleSpec, DiskFormat, DiskSpec, MachineSpec, NetSpec};
use serde::Serialize;
use serde_json::Value;

/// The probe guest: a static ELF with a PVH note.
pub const PROBE_ELF: &[u8] = include_bytes!(env!("ATOLL_PROBE_ELF"));

/// First characters of the report's line.
const REPORT_START: &str = "{\"atoll_probe\":";

/// Supervisor instructions a second from which on a stock Linux kernel boots in bearable time. Its boot takes
/// some 10⁹ of them; hardware and emulated hardware run more than 10⁸ a second, a KVM that interprets them 10⁶.
const LINUX_RING0_PER_S_MIN: u64 = 20_000_000;

/// A run takes 0.1 s; a loaded machine with an interpreting KVM has taken 2 s.
const TIMEOUT: Duration = Duration::from_secs(30);

const DISK_BYTES: u64 = 1 << 20;
const MEMORY_MIB: u64 = 32;
/// Addresses of the two ends of the wire, which exists only in a network namespace of this process.
const HOST_ADDRESS: &str = "169.254.77.1";
const GUEST_ADDRESS: &str = "169.254.77.2";
const TAP: &str = "probe0";

/// Arguments of the sub-command.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Print the answer as one JSON object: kvm, linux, reason, and the numbers
    #[arg(long)]
    pub json: bool,
    /// Write the probe guest's ELF file to PATH, and do nothing else
    #[arg(long, value_name = "PATH")]
    pub extract: Option<PathBuf>,
}

/// The answer. Exit code 0 when `kvm`, else 1.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Verdict {
    /// Guests run here: /dev/kvm works and the probe guest ran.
    pub kvm: bool,
    /// Stock Linux kernels run here in bearable time.
    pub linux: bool,
    /// Why, in one sentence without a full stop.
    pub reason: String,
    /// Checks of devices that failed, and what could not be tried.
    pub failures: Vec<String>,
    /// Milliseconds from the start of the VMM's process to the end of the guest's report.
    pub report_ms: Option<u64>,
    /// The guest's report: `sections` is a list of objects, see `firmware/probe/src/report.rs`.
    pub report: Option<Value>,
}

/// Runs the sub-command.
pub fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let mut out = io::stdout().lock();
    if let Some(path) = &arguments.extract {
        fs::write(path, PROBE_ELF).with_context(|| format!("write {}", path.display()))?;
        return Ok(ExitCode::SUCCESS);
    }
    let verdict = verdict();
    if arguments.json {
        writeln!(out, "{}", serde_json::to_string(&verdict)?)?;
    } else {
        write!(out, "{}", words(&verdict))?;
    }
    Ok(if verdict.kvm {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn no(reason: String) -> Verdict {
    Verdict {
        kvm: false,
        linux: false,
        reason,
        failures: vec![],
        report_ms: None,
        report: None,
    }
}

fn verdict() -> Verdict {
    if let Err(error) = fs::File::options().read(true).write(true).open("/dev/kvm") {
        return no(format!(
            "/dev/kvm: {error}; no virtual machine can run here, containers can"
        ));
    }
    // A thread, since a network namespace belongs to a thread and ends with the last one that is in it.
    let outcome = thread::Builder::new()
        .name("probe".into())
        .spawn(run_guest)
        .map(thread::JoinHandle::join);
    match outcome {
        Ok(Ok(Ok((report, notes, elapsed)))) => judge(report, notes, elapsed),
        Ok(Ok(Err(error))) => no(format!(
            "/dev/kvm is there, but the probe guest did not run: {error:#}"
        )),
        Ok(Err(_)) => no("the probe's thread panicked".into()),
        Err(error) => no(format!("no thread for the probe: {error}")),
    }
}

/// A value of a section of the report.
pub fn report_number(report: &Value, section: &str, name: &str) -> Option<u64> {
    let sections = report["sections"].as_array()?;
    sections.iter().find(|s| s["section"] == section)?[name].as_u64()
}

fn judge(report: Value, notes: Vec<String>, elapsed: Duration) -> Verdict {
    let ring0 = report_number(&report, "cpu", "ring0_per_s").unwrap_or(0);
    let linux = ring0 >= LINUX_RING0_PER_S_MIN;
    let reason = if linux {
        format!(
            "stock Linux kernels run: supervisor code at {} million instructions/s",
            ring0 / 1_000_000
        )
    } else {
        format!(
            "stock Linux kernels would take hours to boot: this host's KVM emulates supervisor code at {:.1} million \
             instructions/s; use `make lab` for them",
            f64::from(u32::try_from(ring0).unwrap_or(u32::MAX)) / 1e6
        )
    };
    let failed = report["failures"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .map(str::to_owned);
    Verdict {
        kvm: true,
        linux,
        reason,
        failures: failed.chain(notes).collect(),
        report_ms: u64::try_from(elapsed.as_millis()).ok(),
        report: Some(report),
    }
}

fn words(verdict: &Verdict) -> String {
    let yes = |value: bool| if value { "yes" } else { "no" };
    let mut lines = vec![
        format!("guests run on this host: {}", yes(verdict.kvm)),
        format!("stock Linux kernels:     {}", yes(verdict.linux)),
        format!("reason:                  {}", verdict.reason),
    ];
    if let Some(ms) = verdict.report_ms {
        lines.push(format!("start to report:         {ms} ms"));
    }
    for section in verdict
        .report
        .iter()
        .flat_map(|report| report["sections"].as_array())
        .flatten()
    {
        let values = section
            .as_object()
            .into_iter()
            .flatten()
            .filter(|(name, _)| *name != "section");
        let values: Vec<String> = values
            .map(|(name, value)| {
                format!(
                    "{name}={}",
                    value.as_str().map_or(value.to_string(), str::to_owned)
                )
            })
            .collect();
        lines.push(format!(
            "{:<24} {}",
            format!("{}:", section["section"].as_str().unwrap_or("?")),
            values.join(" ")
        ));
    }
    lines.extend(
        verdict
            .failures
            .iter()
            .map(|failure| format!("FAILED                   {failure}")),
    );
    lines.join("\n") + "\n"
}

/// Starts the VMM with every kind of device, and gives the report, what could not be tried, and how long it took.
fn run_guest() -> anyhow::Result<(Value, Vec<String>, Duration)> {
    let directory = tempfile::Builder::new()
        .prefix("atoll-probe")
        .tempdir()
        .context("temporary directory")?;
    let mut notes = Vec::new();
    let tap = match tap() {
        Ok(()) => Some(TAP.to_owned()),
        Err(error) => {
            notes.push(format!("net: not tried, no tap: {error:#}"));
            None
        }
    };
    let spec = spec(directory.path(), tap)?;
    let spec_path = directory.path().join("spec.json");
    fs::write(&spec_path, serde_json::to_vec(&spec)?).context("write the spec")?;
    let start = Instant::now();
    let mut child = Command::new(std::env::current_exe().context("this program's path")?)
        .args(["run", "--spec"])
        .arg(&spec_path)
        .arg("--api-socket")
        .arg(directory.path().join("api"))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("start the VMM")?;
    let report = report_of(&mut child, directory.path().join("console"));
    let elapsed = start.elapsed();
    if report.is_err() {
        // Its end may be what the error is about; a second kill changes nothing.
        let _ = child.kill();
    }
    let status = child.wait().context("wait for the VMM")?;
    let mut complaint = String::new();
    if let Some(stderr) = &mut child.stderr {
        stderr.read_to_string(&mut complaint)?;
    }
    let report = report.with_context(|| format!("{status}: {}", complaint.trim()))?;
    if !status.success() {
        notes.push(format!(
            "power-off: the VMM ended with {status}: {}",
            complaint.trim()
        ));
    }
    Ok((report, notes, elapsed))
}

/// Reads the guest's serial port for the report, and echoes what it sends on the virtio console.
fn report_of(child: &mut Child, console: PathBuf) -> anyhow::Result<Value> {
    let stdout = child.stdout.take().context("the VMM's output")?;
    let (sender, receiver) = mpsc::channel();
    thread::Builder::new()
        .name("probe-serial".into())
        .spawn(move || {
            for line in BufReader::new(stdout).split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).trim().to_owned();
                if line.starts_with(REPORT_START) && sender.send(line).is_err() {
                    break;
                }
            }
        })?;
    // Neither thread outlives the VMM: its end closes the pipe and the socket.
    thread::Builder::new()
        .name("probe-console".into())
        .spawn(move || echo_lines(&console))?;
    let line = receiver
        .recv_timeout(TIMEOUT)
        .map_err(|error| match error {
            mpsc::RecvTimeoutError::Timeout => {
                anyhow::anyhow!("no report within {} s", TIMEOUT.as_secs())
            }
            mpsc::RecvTimeoutError::Disconnected => anyhow::anyhow!("it ended without a report"),
        })?;
    serde_json::from_str(&line).with_context(|| format!("the report is not JSON: {line}"))
}

/// Sends back every line of the console's socket, from when it exists until it is closed.
fn echo_lines(path: &Path) {
    let deadline = Instant::now() + TIMEOUT;
    let stream = loop {
        match UnixStream::connect(path) {
            Ok(stream) => break stream,
            Err(_) if Instant::now() < deadline => thread::sleep(Duration::from_millis(2)),
            Err(_) => return,
        }
    };
    let Ok(mut writer) = stream.try_clone() else {
        return;
    };
    for mut line in BufReader::new(stream).split(b'\n').map_while(Result::ok) {
        line.push(b'\n');
        if writer.write_all(&line).is_err() {
            return;
        }
    }
}

/// The machine: one of each device, a scratch disk, the report on standard output.
fn spec(directory: &Path, tap: Option<String>) -> anyhow::Result<MachineSpec> {
    let kernel = directory.join("probe.elf");
    fs::write(&kernel, PROBE_ELF).context("write the probe guest")?;
    let disk = directory.join("disk.raw");
    fs::File::create(&disk)
        .and_then(|file| file.set_len(DISK_BYTES))
        .context("create the scratch disk")?;
    let nets = tap.into_iter().map(|tap| NetSpec {
        tap,
        mac: None,
        mtu: None,
    });
    Ok(MachineSpec {
        name: "probe".into(),
        cpu_count: 1,
        memory_mib: MEMORY_MIB,
        boot: BootSpec {
            kernel,
            initrd: None,
            cmdline: format!("report write echo ip={GUEST_ADDRESS} peer={HOST_ADDRESS}"),
        },
        disks: vec![DiskSpec {
            path: disk,
            format: DiskFormat::Raw,
            readonly: false,
            serial: None,
            queue_count: None,
        }],
        nets: nets.collect(),
        serial: ConsoleSpec::Stdio,
        console: Some(ConsoleSpec::Socket(directory.join("console"))),
        rng: true,
    })
}

/// Makes a tap with an address, in a new network namespace of this thread: nothing of the host changes, and
/// nothing is left when the thread and its VMM have ended.
fn tap() -> anyhow::Result<()> {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).context("unshare the network")?;
    let address = format!("{HOST_ADDRESS}/30");
    for arguments in [
        &["tuntap", "add", "dev", TAP, "mode", "tap", "vnet_hdr"][..],
        &["address", "add", &address, "dev", TAP],
        &["link", "set", TAP, "up"],
    ] {
        let output = Command::new("ip")
            .args(arguments)
            .output()
            .context("run ip")?;
        anyhow::ensure!(
            output.status.success(),
            "ip {}: {}",
            arguments.join(" "),
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(ring0: u64) -> Value {
        serde_json::json!({
            "atoll_probe": 1,
            "sections": [{"section": "cpu", "ring0_per_s": ring0}],
            "failures": ["net: no answer"],
        })
    }

    #[test]
    fn slow_supervisor_code_means_no_linux_and_names_the_lab() {
        let verdict = judge(report(500_000), vec![], Duration::from_millis(30));
        assert!(verdict.kvm && !verdict.linux);
        assert!(verdict.reason.contains("0.5 million") && verdict.reason.contains("make lab"));
        assert_eq!(verdict.failures, ["net: no answer"]);
    }

    #[test]
    fn fast_supervisor_code_means_linux() {
        assert!(judge(report(1_000_000_000), vec![], Duration::ZERO).linux);
    }

    #[test]
    fn the_embedded_guest_is_an_elf_file() {
        assert_eq!(&PROBE_ELF[..4], b"\x7fELF");
    }
}

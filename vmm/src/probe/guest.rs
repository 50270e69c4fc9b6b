// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! One run of the probe guest in a VMM process of its own, with every kind of device. Not here: what the report
//! means (`probe.rs`, which calls this).

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use atoll_disk::chain;
use atoll_vmm_protocol::spec::{BootSpec, ConsoleSpec, DiskSpec, KernelSpec, MachineSpec, NetSpec};
use serde_json::Value;

use super::{PROBE_ELF, section};

/// First characters of the report's line.
const REPORT_START: &str = "{\"atoll_probe\":";

/// A run takes 0.1 s; a loaded machine with an interpreting KVM has taken 2 s.
const TIMEOUT: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(2);

const DISK_BYTES: u64 = 1 << 20;
const MEMORY_MIB: u64 = 32;
/// Addresses of the two ends of the wire, which exists only in a network namespace of this process.
const HOST_ADDRESS: &str = "169.254.77.1";
const GUEST_ADDRESS: &str = "169.254.77.2";
const TAP: &str = "probe0";

/// What came of one run of the probe guest.
#[derive(Debug)]
pub struct Run {
    /// The guest's report, one object of JSON (`firmware/probe`, `report.rs`).
    pub report: Value,
    /// What could not be tried, and what went wrong beside the report.
    pub notes: Vec<String>,
    /// From the start of the VMM's process to the report.
    pub elapsed: Duration,
}

/// Why there is no report: the host, KVM, or the guest.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// The host refused something that has nothing to do with KVM.
    #[error("{what}")]
    Host {
        /// What was tried.
        what: String,
        /// Why not.
        source: io::Error,
    },
    /// The VMM ran and the guest did not report.
    #[error("{what}; the VMM ended with {status}: {complaint}")]
    NoReport {
        /// How that was noticed.
        what: String,
        /// The VMM's end.
        status: ExitStatus,
        /// The VMM's standard error.
        complaint: String,
    },
    /// A program of the host that makes the tap failed.
    #[error("ip {arguments}: {complaint}")]
    Tap {
        /// Its arguments.
        arguments: String,
        /// Its standard error.
        complaint: String,
    },
}

/// For `map_err`: names what the host refused.
pub fn host(what: impl Into<String>) -> impl FnOnce(io::Error) -> ProbeError {
    let what = what.into();
    move |source| ProbeError::Host { what, source }
}

/// Starts the VMM and waits for the report and the guest's power-off. Leaves the thread's network namespace for
/// good: call it in a thread of its own.
pub fn run() -> Result<Run, ProbeError> {
    let directory = tempfile::Builder::new()
        .prefix("atoll-probe")
        .tempdir()
        .map_err(host("temporary directory"))?;
    let mut notes = Vec::new();
    let tap = tap()
        .map_err(|error| notes.push(format!("net: not tried, no tap: {}", chain(&error))))
        .ok();
    let spec = spec(directory.path(), tap)?;
    let start = Instant::now();
    let (mut child, output) = start_vmm(directory.path(), &spec)?;
    let report = report(output, directory.path().join("console"));
    let elapsed = start.elapsed();
    let (status, complaint) = end(&mut child, report.is_ok())?;
    let report = report.map_err(|what| ProbeError::NoReport {
        what,
        status,
        complaint: complaint.clone(),
    })?;
    let expected = ["blk", "console", "rng"].into_iter();
    for kind in expected.chain(spec.nets.first().map(|_| "net")) {
        if section(&report, kind).is_none() {
            notes.push(format!("{kind}: the guest found no such device"));
        }
    }
    if !status.success() {
        notes.push(format!(
            "power-off: the VMM ended with {status}: {complaint}"
        ));
    }
    Ok(Run {
        report,
        notes,
        elapsed,
    })
}

fn start_vmm(directory: &Path, spec: &MachineSpec) -> Result<(Child, ChildStdout), ProbeError> {
    let path = directory.join("spec.json");
    fs::write(&path, serde_json::json!(spec).to_string()).map_err(host("write the spec"))?;
    let program = std::env::current_exe().map_err(host("this program's path"))?;
    let mut child = Command::new(program)
        .args(["run", "--spec"])
        .arg(&path)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(host("start the VMM"))?;
    let output = child.stdout.take().expect("it was made a pipe above");
    Ok((child, output))
}

/// Waits for the VMM's end, which a guest that reported causes itself; gives its standard error, too.
fn end(child: &mut Child, reported: bool) -> Result<(ExitStatus, String), ProbeError> {
    let deadline = Instant::now() + if reported { TIMEOUT } else { Duration::ZERO };
    let status = loop {
        if let Some(status) = child.try_wait().map_err(host("wait for the VMM"))? {
            break status;
        }
        if Instant::now() > deadline {
            child.kill().map_err(host("end the VMM"))?;
        }
        thread::sleep(POLL);
    };
    let mut complaint = String::new();
    if let Some(stderr) = &mut child.stderr {
        let read = stderr.read_to_string(&mut complaint);
        read.map_err(host("read the VMM's complaint"))?;
    }
    Ok((status, complaint.trim().to_owned()))
}

/// Reads the guest's serial port for the report, and echoes what it sends on the virtio console. Neither thread
/// outlives the VMM: its end closes the pipe and the socket.
fn report(output: ChildStdout, console: PathBuf) -> Result<Value, String> {
    let (sender, receiver) = mpsc::channel();
    let find = move || {
        let lines = BufReader::new(output).split(b'\n').map_while(Result::ok);
        for line in lines {
            let line = String::from_utf8_lossy(&line).trim().to_owned();
            if line.starts_with(REPORT_START) && sender.send(line).is_err() {
                break;
            }
        }
    };
    let spawn = |name: &str| thread::Builder::new().name(name.into());
    let no_thread = |error| format!("no thread: {error}");
    spawn("probe-serial").spawn(find).map_err(no_thread)?;
    let echo = move || echo_lines(&console);
    spawn("probe-console").spawn(echo).map_err(no_thread)?;
    let line = receiver
        .recv_timeout(TIMEOUT)
        .map_err(|error| match error {
            mpsc::RecvTimeoutError::Timeout => format!("no report within {} s", TIMEOUT.as_secs()),
            mpsc::RecvTimeoutError::Disconnected => "it ended without a report".into(),
        })?;
    serde_json::from_str(&line).map_err(|error| format!("the report is not JSON: {error}: {line}"))
}

/// Sends back every line of the console's socket, from when it exists until it is closed.
fn echo_lines(path: &Path) {
    let deadline = Instant::now() + TIMEOUT;
    let stream = loop {
        match UnixStream::connect(path) {
            Ok(stream) => break stream,
            Err(_) if Instant::now() < deadline => thread::sleep(POLL),
            Err(_) => return,
        }
    };
    let Ok(mut writer) = stream.try_clone() else {
        return;
    };
    let lines = BufReader::new(stream).split(b'\n').map_while(Result::ok);
    for mut line in lines {
        line.push(b'\n');
        if writer.write_all(&line).is_err() {
            return;
        }
    }
}

/// The machine: one of each device, a scratch disk, the report on standard output.
fn spec(directory: &Path, tap: Option<NetSpec>) -> Result<MachineSpec, ProbeError> {
    let kernel = directory.join("probe.elf");
    fs::write(&kernel, PROBE_ELF).map_err(host("write the probe guest"))?;
    let disk = directory.join("disk.raw");
    fs::File::create(&disk)
        .and_then(|file| file.set_len(DISK_BYTES))
        .map_err(host("create the scratch disk"))?;
    Ok(MachineSpec {
        name: "probe".into(),
        memory_mib: MEMORY_MIB,
        disks: vec![DiskSpec::raw(disk)],
        nets: tap.into_iter().collect(),
        serial: ConsoleSpec::Stdio,
        console: Some(ConsoleSpec::Socket(directory.join("console"))),
        ..MachineSpec::new(BootSpec::Kernel(KernelSpec {
            image: kernel,
            initrd: None,
            cmdline: format!("report write echo ip={GUEST_ADDRESS} peer={HOST_ADDRESS}"),
            shared: false,
        }))
    })
}

/// Makes a tap with an address, in a new network namespace of this thread: nothing of the host changes, and
/// nothing is left when the thread and its VMM have ended.
fn tap() -> Result<NetSpec, ProbeError> {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET)
        .map_err(io::Error::from)
        .map_err(host("unshare the network"))?;
    let address = format!("{HOST_ADDRESS}/30");
    for arguments in [
        &["tuntap", "add", "dev", TAP, "mode", "tap", "vnet_hdr"][..],
        &["address", "add", &address, "dev", TAP],
        &["link", "set", TAP, "up"],
    ] {
        let ip = Command::new("ip").args(arguments).output();
        let output = ip.map_err(host("run ip"))?;
        if !output.status.success() {
            return Err(ProbeError::Tap {
                arguments: arguments.join(" "),
                complaint: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
            });
        }
    }
    Ok(NetSpec::tap(TAP))
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The VMM on the machine's own /dev/kvm, through its command line and control API, with the probe guest: every
//! device, pause and resume, reset, power button, shutdown, a crash. Not Linux: that is for the lab.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "helpers of tests fail by panicking, and say what they skip"
)]

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use atoll_vmm::probe::PROBE_ELF;
use atoll_vmm_protocol::api::{MachineState, Request};
use atoll_vmm_protocol::client::Client;
use atoll_vmm_protocol::spec::{
    BootSpec, CacheMode, ConsoleSpec, DiskFormat, DiskSpec, KernelSpec, MachineSpec, NetSpec,
};
use serde_json::Value;
use tempfile::TempDir;

/// Until something that takes a moment must have happened, on a machine that is busy with other tests.
const TIMEOUT: Duration = Duration::from_secs(60);
const PROMPT: &str = "probe> ";
const VMM: &str = env!("CARGO_BIN_EXE_atoll-vmm");

/// Whether KVM is there; says so when not.
fn kvm() -> bool {
    match File::options().read(true).write(true).open("/dev/kvm") {
        Ok(_) => true,
        Err(error) => {
            println!("ATOLL-SKIP: /dev/kvm: {error}");
            false
        }
    }
}

/// Asks until `found`, and fails the test after [`TIMEOUT`].
#[track_caller]
fn eventually<T>(what: &str, mut found: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + TIMEOUT;
    loop {
        if let Some(value) = found() {
            return value;
        }
        assert!(Instant::now() < deadline, "{what} did not happen");
        std::thread::yield_now();
    }
}

fn spec(directory: &Path, cmdline: &str) -> MachineSpec {
    let kernel = directory.join("probe.elf");
    fs::write(&kernel, PROBE_ELF).unwrap();
    MachineSpec {
        name: "test".into(),
        memory_mib: 32,
        serial: ConsoleSpec::Socket(directory.join("serial")),
        ..MachineSpec::new(BootSpec::Kernel(KernelSpec {
            image: kernel,
            initrd: None,
            cmdline: cmdline.into(),
            shared: false,
        }))
    }
}

fn disk(directory: &Path, name: &str, content: &[u8]) -> DiskSpec {
    let path = directory.join(name);
    fs::write(&path, content).unwrap();
    DiskSpec::raw(path)
}

/// A running machine, and what its serial port said so far.
struct Machine {
    child: Child,
    client: Client,
    serial: UnixStream,
    said: Arc<(Mutex<String>, Condvar)>,
}

impl Machine {
    fn start(directory: &Path, spec: &MachineSpec) -> Machine {
        Machine::start_by(directory, spec, Command::new(VMM))
    }

    /// `command` is the VMM's program, or a wrapper that ends in it.
    fn start_by(directory: &Path, spec: &MachineSpec, mut command: Command) -> Machine {
        let path = directory.join("spec.json");
        fs::write(&path, serde_json::to_vec(spec).unwrap()).unwrap();
        let api = directory.join("api");
        let mut child = command
            .args(["run", "--spec"])
            .arg(path)
            .arg("--api-socket")
            .arg(&api)
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let ConsoleSpec::Socket(serial) = &spec.serial else {
            panic!("these tests talk to a socket")
        };
        let serial = eventually("the serial socket", || {
            assert_eq!(child.try_wait().unwrap(), None, "{}", complaint(&mut child));
            UnixStream::connect(serial).ok()
        });
        let said = Arc::new((Mutex::new(String::new()), Condvar::new()));
        let (heard, mut from) = (Arc::clone(&said), serial.try_clone().unwrap());
        let listen = move || {
            let mut bytes = [0; 4096];
            while let Ok(count @ 1..) = from.read(&mut bytes) {
                let text = String::from_utf8_lossy(&bytes[..count]).into_owned();
                heard.0.lock().unwrap().push_str(&text);
                heard.1.notify_all();
            }
        };
        std::thread::Builder::new().spawn(listen).unwrap();
        Machine {
            child,
            client: Client::new(api),
            serial,
            said,
        }
    }

    /// Waits until the serial port has said `text` `count` times.
    #[track_caller]
    fn hear(&self, text: &str, count: usize) -> String {
        let said = self.said.0.lock().unwrap();
        let missing = |said: &mut String| said.matches(text).count() < count;
        let (said, timeout) = self
            .said
            .1
            .wait_timeout_while(said, TIMEOUT, missing)
            .unwrap();
        assert!(!timeout.timed_out(), "{text:?} x {count} not in:\n{said}");
        said.clone()
    }

    fn type_line(&mut self, line: &str) {
        self.serial
            .write_all(format!("{line}\r").as_bytes())
            .unwrap();
    }

    fn state(&self) -> MachineState {
        self.client.info().unwrap().state
    }

    /// Waits for the VMM's end and gives its exit code.
    #[track_caller]
    fn exit_code(&mut self) -> Option<i32> {
        eventually("the VMM's end", || self.child.try_wait().unwrap()).code()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn complaint(child: &mut Child) -> String {
    let mut text = String::new();
    if let Some(stderr) = &mut child.stderr {
        stderr.read_to_string(&mut text).unwrap();
    }
    text
}

/// The report in what a serial port said, which must be the only one.
#[track_caller]
fn report(said: &str) -> Value {
    let mut lines = said
        .lines()
        .filter(|line| line.starts_with("{\"atoll_probe\""));
    let line = lines
        .next()
        .unwrap_or_else(|| panic!("no report in:\n{said}"));
    assert_eq!(lines.next(), None);
    serde_json::from_str(line).unwrap()
}

fn sections<'a>(report: &'a Value, name: &str) -> Vec<&'a Value> {
    let all = report["sections"].as_array().unwrap();
    all.iter()
        .filter(|section| section["section"] == name)
        .collect()
}

/// FNV-1a over the part of a disk that the probe checks, as the probe prints it.
fn checksum(image: &[u8]) -> String {
    let checked = &image[..image.len().min(64 << 10)];
    let sum = checked.iter().fold(0xcbf2_9ce4_8422_2325_u64, |sum, byte| {
        (sum ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)
    });
    format!("{sum:016x}")
}

#[test]
fn probe_says_what_this_host_can_do() {
    if !kvm() {
        return;
    }
    let output = Command::new(VMM)
        .args(["probe", "--json"])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let verdict: Value = serde_json::from_str(&said).unwrap();
    assert_eq!(
        (output.status.code(), &verdict["kvm"]),
        (Some(0), &Value::Bool(true)),
        "{said}"
    );
    let failures = verdict["failures"].as_array().unwrap();
    let without_net = failures
        .iter()
        .filter(|failure| !failure.as_str().unwrap().starts_with("net: not tried"));
    assert_eq!(without_net.count(), 0, "{said}");
    let report = &verdict["report"];
    let cpu = sections(report, "cpu")[0];
    let slow = cpu["ring0_per_s"].as_u64().unwrap() < 20_000_000;
    assert_eq!(verdict["linux"], !slow);
    assert!(cpu["ring3_per_s"].as_u64().unwrap() > 10_000_000, "{said}");
    for kind in ["blk", "console", "rng"] {
        assert_eq!(sections(report, kind).len(), 1, "{said}");
    }
    for cost in ["pio_ns", "mmio_ns", "doorbell_ns"] {
        assert!(
            sections(report, "exits")[0][cost].as_u64().unwrap() > 0,
            "{said}"
        );
    }
    if failures.is_empty() {
        assert_eq!(sections(report, "net")[0]["pings"], 16, "{said}");
    }
}

#[test]
fn probe_extracts_its_guest() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("probe.elf");
    let status = Command::new(VMM)
        .args(["probe", "--extract"])
        .arg(&path)
        .status()
        .unwrap();
    assert!(status.success());
    assert_eq!(fs::read(path).unwrap(), PROBE_ELF);
}

#[test]
fn disks_keep_what_is_written_and_refuse_when_readonly() {
    if !kvm() {
        return;
    }
    let directory = TempDir::new().unwrap();
    let path = directory.path();
    let content: Vec<u8> = (0..300_u32 << 10)
        .map(|index| (index % 251) as u8)
        .collect();
    let mut spec = spec(path, "report write");
    spec.disks = vec![
        disk(path, "written", &vec![0; 1 << 20]),
        DiskSpec {
            readonly: true,
            ..disk(path, "kept", &content)
        },
        // Smaller than one check, with several queues of which the guest uses one.
        DiskSpec {
            queue_count: Some(4),
            ..disk(path, "small", &[7; 8192])
        },
    ];
    let mut machine = Machine::start(path, &spec);
    assert_eq!(machine.exit_code(), Some(0));
    let report = report(&machine.hear("works", 1));
    assert_eq!(report["ok"], true, "{report}");
    let disks = sections(&report, "blk");
    let images = ["written", "kept", "small"].map(|name| fs::read(path.join(name)).unwrap());
    for (section, image) in disks.iter().zip(&images) {
        assert_eq!(
            section["checksum"].as_str().unwrap(),
            checksum(image),
            "{report}"
        );
        assert_eq!(
            section["sectors"].as_u64().unwrap() * 512,
            image.len() as u64
        );
    }
    assert_eq!(
        [0, 1, 2].map(|index| disks[index]["readonly"].as_bool().unwrap()),
        [false, true, false]
    );
    assert!(
        images[0][..64 << 10].iter().any(|byte| *byte != 0),
        "nothing was written"
    );
    assert_eq!(images[1], content);
}

/// What the benchmarks run on every VMM: exits, several queues, several requests in flight on each, one at a time, a
/// device that is reset in between.
#[test]
fn works_of_mode_bench_end() {
    if !kvm() {
        return;
    }
    const WORKS: [&str; 5] = [
        "exits:400",
        "blk:randwrite:4096:8:2:400",
        "blk:randread:4096:8:4:400",
        "blk:randread:4096:1:1:100",
        "blk:read:65536:4:1:100",
    ];
    for how in ["", "poll "] {
        let directory = TempDir::new().unwrap();
        let path = directory.path();
        let mut spec = spec(path, &format!("bench {how}{}", WORKS.join(" ")));
        spec.memory_mib = 64;
        spec.disks = vec![DiskSpec {
            queue_count: Some(4),
            ..disk(path, "image", &vec![0x5a; 4 << 20])
        }];
        let mut machine = Machine::start(path, &spec);
        assert_eq!(machine.exit_code(), Some(0));
        let said = machine.hear("bench done", 1);
        for work in WORKS {
            assert!(said.contains(&format!("bench {work} ns=")), "{said}");
        }
        let image = fs::read(path.join("image")).unwrap();
        assert!(image.contains(&0), "nothing was written");
    }
}

/// The first `size` bytes of a qcow2 disk that nobody has open.
fn qcow2_content(path: &Path, size: usize) -> Vec<u8> {
    let source = atoll_disk::Source {
        path: path.to_owned(),
        format: atoll_disk::Format::Qcow2,
        backing: Vec::new(),
    };
    let disk = atoll_disk::open(&source, atoll_disk::OpenOptions::default()).unwrap();
    let mut content = vec![0; size];
    atoll_disk::conformance::read(&*disk, 0, &mut content).unwrap();
    content
}

#[test]
fn a_qcow2_disk_is_written_limited_and_grown_while_its_guest_runs() {
    if !kvm() {
        return;
    }
    let directory = TempDir::new().unwrap();
    let path = directory.path();
    let image = path.join("disk.qcow2");
    let options = atoll_disk::qcow2::Qcow2Options::default();
    atoll_disk::qcow2::create(&image, 1 << 20, &options).unwrap();
    let mut spec = spec(path, "stay write");
    let mut disk = DiskSpec {
        path: image.clone(),
        format: DiskFormat::Qcow2,
        discard: true,
        detect_zeroes: true,
        ..DiskSpec::default()
    };
    disk.limits.operations_per_second = Some(2000);
    spec.disks = vec![
        disk,
        DiskSpec {
            cache: CacheMode::None,
            ..self::disk(path, "raw", &[3; 65536])
        },
    ];
    let mut machine = Machine::start(path, &spec);
    let report = report(&machine.hear(PROMPT, 1));
    assert_eq!(report["ok"], true, "{report}");
    let ask = |request, body: Value| machine.client.ask_with::<Value>(request, &body);
    let grow = |id: &str, size: u64| {
        let body = serde_json::json!({"id": id, "size_bytes": size});
        ask(Request::ResizeDisk, body).map_err(|error| error.to_string())
    };
    grow("disk0", 4 << 20).unwrap();
    grow("disk1", 1 << 20).unwrap();
    assert!(
        grow("disk0", 1 << 20)
            .unwrap_err()
            .contains("can only grow")
    );
    assert!(
        grow("disk2", 1 << 20)
            .unwrap_err()
            .contains("no disk disk2")
    );
    let limits = serde_json::json!({"id": "disk0", "read_bytes_per_second": 1 << 20});
    ask(Request::SetDiskLimits, limits).unwrap();
    let wrong = serde_json::json!({"id": "disk0", "read_bytes": 1});
    let refused = ask(Request::SetDiskLimits, wrong).unwrap_err();
    assert!(refused.to_string().contains("unknown field"), "{refused}");
    let nothing = serde_json::json!({"id": "disk0", "read_bytes_per_second": 0});
    let refused = ask(Request::SetDiskLimits, nothing).unwrap_err();
    let why = "disk0: read_bytes_per_second is 0, and nothing would move";
    assert!(refused.to_string().contains(why), "{refused}");
    assert_eq!(fs::metadata(path.join("raw")).unwrap().len(), 1 << 20);
    machine.client.act(Request::Shutdown).unwrap();
    assert_eq!(machine.exit_code(), Some(0));
    let section = sections(&report, "blk")[0];
    let content = qcow2_content(&image, 4 << 20);
    assert_eq!(section["checksum"].as_str().unwrap(), checksum(&content));
}

#[test]
fn pause_holds_the_guest_and_resume_lets_it_go_on() {
    if !kvm() {
        return;
    }
    let directory = TempDir::new().unwrap();
    let mut spec = spec(directory.path(), "stay");
    spec.disks = vec![disk(directory.path(), "disk", &[1; 65536])];
    let mut machine = Machine::start(directory.path(), &spec);
    machine.hear(PROMPT, 1);
    assert_eq!(
        machine.client.act(Request::Pause).unwrap().state,
        MachineState::Paused
    );
    let before = machine.client.counters().unwrap().vcpus;
    machine.type_line("echo after-the-pause");
    for _ in 0..50 {
        assert_eq!(machine.state(), MachineState::Paused);
    }
    let exits = |rows: &[atoll_vmm_protocol::api::VcpuCounters]| {
        rows.iter()
            .map(|row| (row.port_exits, row.mmio_exits))
            .collect::<Vec<_>>()
    };
    assert_eq!(
        exits(&machine.client.counters().unwrap().vcpus),
        exits(&before)
    );
    assert_eq!(
        machine.client.act(Request::Resume).unwrap().state,
        MachineState::Running
    );
    // Echoed as it is typed, and then by the command.
    machine.hear("after-the-pause", 2);
}

#[test]
fn pausing_again_and_again_loses_no_request() {
    if !kvm() {
        return;
    }
    let directory = TempDir::new().unwrap();
    let mut spec = spec(directory.path(), "stay write");
    spec.disks = vec![disk(directory.path(), "disk", &vec![0; 1 << 20])];
    let mut machine = Machine::start(directory.path(), &spec);
    machine.hear(PROMPT, 1);
    machine.type_line("report");
    for _ in 0..100 {
        machine.client.act(Request::Pause).unwrap();
        machine.client.act(Request::Resume).unwrap();
    }
    let said = machine.hear(PROMPT, 2);
    assert_eq!(said.matches("\"ok\":true").count(), 2, "{said}");
}

#[test]
fn the_power_button_is_the_guests_to_obey() {
    if !kvm() {
        return;
    }
    let directory = TempDir::new().unwrap();
    let mut machine = Machine::start(directory.path(), &spec(directory.path(), "stay"));
    machine.hear(PROMPT, 1);
    machine.client.act(Request::PowerButton).unwrap();
    assert_eq!(machine.exit_code(), Some(0));
    machine.hear("power button: off", 1);
}

#[test]
fn shutdown_asks_nobody() {
    if !kvm() {
        return;
    }
    let directory = TempDir::new().unwrap();
    let mut machine = Machine::start(directory.path(), &spec(directory.path(), "stay"));
    machine.hear(PROMPT, 1);
    machine.client.act(Request::Shutdown).unwrap();
    assert_eq!(machine.exit_code(), Some(0));
}

#[test]
fn reset_starts_from_the_first_instruction() {
    if !kvm() {
        return;
    }
    let directory = TempDir::new().unwrap();
    let mut spec = spec(directory.path(), "stay write");
    spec.disks = vec![disk(directory.path(), "disk", &vec![0; 1 << 20])];
    let mut machine = Machine::start(directory.path(), &spec);
    for times in 1..=3 {
        machine.hear(PROMPT, times);
        assert_eq!(machine.client.info().unwrap().reset_count, times as u64 - 1);
        machine.client.act(Request::Reset).unwrap();
    }
    let said = machine.hear(PROMPT, 4);
    assert_eq!(said.matches("\"ok\":true").count(), 4, "{said}");
    machine.type_line("off");
    assert_eq!(machine.exit_code(), Some(0));
}

#[test]
fn a_crash_has_its_own_exit_code() {
    if !kvm() {
        return;
    }
    let directory = TempDir::new().unwrap();
    let mut machine = Machine::start(directory.path(), &spec(directory.path(), "stay"));
    machine.hear(PROMPT, 1);
    machine.type_line("crash");
    assert_eq!(machine.exit_code(), Some(3));
}

#[test]
fn the_virtio_console_echoes() {
    if !kvm() {
        return;
    }
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("hvc");
    let mut spec = spec(directory.path(), "stay");
    spec.console = Some(ConsoleSpec::Socket(path.clone()));
    let machine = Machine::start(directory.path(), &spec);
    machine.hear(PROMPT, 1);
    let mut console = UnixStream::connect(path).unwrap();
    console.set_read_timeout(Some(TIMEOUT)).unwrap();
    console.write_all(b"one two three").unwrap();
    let mut got = Vec::new();
    while !got.ends_with(b"one two three") {
        let mut bytes = [0; 256];
        let count = console.read(&mut bytes).unwrap();
        assert!(count > 0, "{:?}", String::from_utf8_lossy(&got));
        got.extend(&bytes[..count]);
    }
    // A client that came late has the backlog first.
    assert!(got.starts_with(b"atoll probe console check\n"));
}

/// Sends an ICMP echo from the network namespace of a process, and waits for the reply.
fn ping([a, b, c, d]: [u8; 4]) -> nix::Result<()> {
    use nix::sys::socket::{
        AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, connect, recv, send,
        setsockopt, socket, sockopt,
    };
    let (family, kind) = (AddressFamily::Inet, SockType::Raw);
    let raw = socket(family, kind, SockFlag::SOCK_CLOEXEC, SockProtocol::Icmp)?;
    setsockopt(
        &raw,
        sockopt::ReceiveTimeout,
        &nix::sys::time::TimeVal::new(60, 0),
    )?;
    connect(raw.as_raw_fd(), &SockaddrIn::new(a, b, c, d, 0))?;
    // Echo request, checksum, identifier 0x4154, sequence 1.
    send(
        raw.as_raw_fd(),
        &[8, 0, 0xb6, 0xaa, 0x41, 0x54, 0, 1],
        MsgFlags::empty(),
    )?;
    loop {
        let mut packet = [0; 128];
        let count = recv(raw.as_raw_fd(), &mut packet, MsgFlags::empty())?;
        // Behind the IP header of 20 bytes: echo reply with our identifier.
        if count >= 28 && packet[20] == 0 && packet[24..28] == [0x41, 0x54, 0, 1] {
            return Ok(());
        }
    }
}

#[test]
fn a_neighbour_answers_pings() {
    if !kvm() {
        return;
    }
    let directory = TempDir::new().unwrap();
    let mut spec = spec(directory.path(), "stay ip=169.254.7.2 peer=169.254.7.1");
    spec.nets = vec![NetSpec {
        mac: Some("52:54:00:07:00:02".into()),
        ..NetSpec::tap("tap0")
    }];
    let setup = "ip tuntap add dev tap0 mode tap vnet_hdr && ip address add 169.254.7.1/24 dev tap0 && ip link set tap0 up";
    // Of this thread and what it starts; nothing is left of it at the end.
    let apart = nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET);
    let tried = apart
        .map_err(std::io::Error::from)
        .and_then(|()| Command::new("sh").args(["-c", setup]).output());
    if !tried.as_ref().is_ok_and(|output| output.status.success()) {
        println!("ATOLL-SKIP: no tap in a network namespace of its own: {tried:?}");
        return;
    }
    let machine = Machine::start(directory.path(), &spec);
    let said = machine.hear(PROMPT, 1);
    let report = report(&said);
    let net = sections(&report, "net")[0];
    assert_eq!(
        (&net["pings"], &net["mac"]),
        (&16.into(), &"52:54:00:07:00:02".into()),
        "{report}"
    );
    assert_eq!(ping([169, 254, 7, 2]), Ok(()));
    // Sixteen pings of the guest's and its ARP request, and one ping to it, whose answer is on the wire before it
    // is counted.
    let deadline = Instant::now() + TIMEOUT;
    loop {
        let counters = &machine.client.counters().unwrap().nets[0];
        if counters.sent_packets >= 18 && counters.received_packets >= 18 {
            break;
        }
        assert!(Instant::now() < deadline, "{counters:?}");
    }
}

#[test]
fn more_vcpus_than_the_guest_starts_do_no_harm() {
    if !kvm() {
        return;
    }
    let directory = TempDir::new().unwrap();
    let spec = MachineSpec {
        cpu_count: 8,
        memory_mib: 128,
        ..spec(directory.path(), "report")
    };
    let mut machine = Machine::start(directory.path(), &spec);
    assert_eq!(machine.exit_code(), Some(0));
    assert_eq!(report(&machine.hear("works", 1))["ok"], true);
}

#[test]
fn an_absent_kvm_is_one_clear_line() {
    // Only root can hide a device from a process, in a mount namespace of its own.
    let directory = TempDir::new().unwrap();
    let script = "mount -t tmpfs none /dev && exec \"$@\"";
    let run = |arguments: &[&str]| {
        let mut command = Command::new("unshare");
        command
            .args(["--mount", "sh", "-c", script, "sh", VMM])
            .args(arguments);
        command.current_dir(directory.path()).output().unwrap()
    };
    let output = run(&["probe", "--json"]);
    if String::from_utf8_lossy(&output.stderr).contains("unshare") {
        println!("ATOLL-SKIP: no mount namespace of its own");
        return;
    }
    assert_eq!(output.status.code(), Some(1));
    let verdict: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        (&verdict["kvm"], &verdict["linux"]),
        (&false.into(), &false.into())
    );
    assert!(
        verdict["reason"]
            .as_str()
            .unwrap()
            .starts_with("/dev/kvm: "),
        "{verdict}"
    );
    let kernel: PathBuf = directory.path().join("probe.elf");
    fs::write(&kernel, PROBE_ELF).unwrap();
    let output = run(&["run", "--kernel", "probe.elf"]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(
        said.contains("/dev/kvm") && said.trim().lines().count() == 1,
        "{said}"
    );
}

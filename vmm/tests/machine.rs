// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Whole machines on the host's own KVM, with the probe guest inside: boot, every request of the control API,
//! the ways to end. Each test is a process of `atoll-vmm run` and talks to it as a user does.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "helpers of tests fail by panicking, and say what they skip"
)]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use atoll_vmm::probe::PROBE_ELF;
use atoll_vmm::testing::pvh_elf;
use atoll_vmm_protocol::api::{MachineState, Request};
use atoll_vmm_protocol::client::{Client, ClientError};
use tempfile::TempDir;

const BINARY: &str = env!("CARGO_BIN_EXE_atoll-vmm");
/// A probe guest takes 0.1 s to its report; a busy test machine has taken seconds.
const PATIENCE: Duration = Duration::from_secs(60);

/// A machine in a process of its own, killed when dropped.
struct Guest {
    folder: TempDir,
    process: Child,
}

impl Guest {
    /// Starts the probe guest, or `None` where there is no KVM.
    fn start(cmdline: &str, more: &[&str]) -> Option<Self> {
        Self::start_kernel(PROBE_ELF, cmdline, more)
    }

    fn start_kernel(kernel: &[u8], cmdline: &str, more: &[&str]) -> Option<Self> {
        if let Err(error) = atoll_vmm::kvm::Kvm::open() {
            println!("ATOLL-SKIP: {error}");
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        std::fs::write(path("kernel"), kernel).unwrap();
        let disk = std::fs::File::create(path("disk")).unwrap();
        disk.set_len(1 << 20).unwrap();
        let process = Command::new(BINARY)
            .current_dir(folder.path())
            .args([
                "run",
                "--kernel",
                "kernel",
                "--memory",
                "32",
                "--cmdline",
                cmdline,
            ])
            .args(["--console", "socket=serial", "--api-socket", "api"])
            .args(more)
            .stdin(Stdio::null())
            .stderr(std::fs::File::create(path("stderr")).unwrap())
            .spawn()
            .unwrap();
        Some(Self { folder, process })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn client(&self) -> Client {
        Client::new(self.path("api"))
    }

    /// Connects to the serial port, which exists a moment after the process.
    fn serial(&self) -> Serial {
        let path = self.path("serial");
        let stream = eventually("the serial port", || UnixStream::connect(&path).ok());
        stream
            .set_read_timeout(Some(Duration::from_millis(100)))
            .unwrap();
        Serial {
            stream,
            text: String::new(),
        }
    }

    fn ended(mut self) -> (ExitStatus, String) {
        let status = eventually("the end", || self.process.try_wait().unwrap());
        let said = std::fs::read_to_string(self.path("stderr")).unwrap();
        (status, said)
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // Both fail when the process has ended, as in most tests.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[track_caller]
fn eventually<T>(what: &str, mut attempt: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = attempt() {
            return value;
        }
        assert!(Instant::now() < deadline, "waited too long for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The guest's serial port, from the host's side.
struct Serial {
    stream: UnixStream,
    text: String,
}

impl Serial {
    /// Reads until `expected` has come, and forgets all up to it.
    #[track_caller]
    fn wait_for(&mut self, expected: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(at) = self.text.find(expected) {
                let rest = self.text.split_off(at + expected.len());
                return std::mem::replace(&mut self.text, rest);
            }
            let so_far = &self.text;
            assert!(Instant::now() < deadline, "no {expected:?} in {so_far:?}");
            self.read();
        }
    }

    fn read(&mut self) {
        let mut chunk = [0; 4096];
        if let Ok(count) = self.stream.read(&mut chunk) {
            self.text
                .push_str(&String::from_utf8_lossy(&chunk[..count]));
        }
    }

    fn type_line(&mut self, line: &str) {
        self.stream.write_all(line.as_bytes()).unwrap();
        self.stream.write_all(b"\r").unwrap();
    }
}

#[test]
fn a_guest_boots_and_turns_itself_off() {
    let Some(guest) = Guest::start("report", &[]) else {
        return;
    };
    guest.serial().wait_for("everything works");
    let client = guest.client();
    assert_eq!(guest.ended().0.code(), Some(0));
    assert!(matches!(client.info(), Err(ClientError::Absent { .. })));
}

#[test]
fn sockets_go_with_a_machine_that_can_reach_them() {
    let Some(mut guest) = Guest::start("report", &["--sandbox", "off"]) else {
        return;
    };
    guest.serial().wait_for("everything works");
    let status = eventually("the end", || guest.process.try_wait().unwrap());
    assert_eq!(status.code(), Some(0));
    assert!(guest.folder.path().exists());
    assert!(!guest.path("serial").exists() && !guest.path("api").exists());
}

#[test]
fn a_paused_guest_does_nothing_until_it_is_resumed() {
    let Some(guest) = Guest::start("stay", &["--cpus", "2"]) else {
        return;
    };
    let mut serial = guest.serial();
    serial.wait_for("probe> ");
    let client = guest.client();
    let info = client.info().unwrap();
    assert_eq!((info.state, info.cpu_count), (MachineState::Running, 2));
    assert_eq!(info.pid, guest.process.id());

    let acted = client.act(Request::Pause).unwrap();
    assert_eq!(acted.state, MachineState::Paused);
    client.act(Request::Pause).unwrap();
    // Exits and not CPU time: the thread of a vCPU that has said that it holds may still be on its way to sleep.
    let exits = || {
        let vcpus = client.counters().unwrap().vcpus.into_iter();
        let exits = vcpus.map(|vcpu| [vcpu.port_exits, vcpu.mmio_exits, vcpu.other_exits]);
        exits.collect::<Vec<_>>()
    };
    let before = exits();
    serial.type_line("echo typed while paused");
    assert_eq!(exits(), before);
    let refused = client.act(Request::PowerButton).unwrap_err();
    assert!(matches!(refused, ClientError::Refused { status: 409, .. }));

    let acted = client.act(Request::Resume).unwrap();
    assert_eq!(acted.state, MachineState::Running);
    serial.wait_for("typed while paused\r\n");
    assert!(exits()[0][0] > before[0][0]);
}

#[test]
fn pausing_again_and_again_loses_no_byte_of_the_serial_port() {
    let Some(guest) = Guest::start("stay", &[]) else {
        return;
    };
    let mut serial = guest.serial();
    serial.wait_for("probe> ");
    let client = guest.client();
    let line: String = ('a'..='z').cycle().take(200).collect();
    for _ in 0..20 {
        serial.type_line(&format!("echo {line}"));
        client.act(Request::Pause).unwrap();
        client.act(Request::Resume).unwrap();
        // Once echoed by the line editor, once by the command.
        serial.wait_for(&line);
        serial.wait_for(&line);
    }
}

#[test]
fn a_reset_machine_boots_again() {
    let Some(guest) = Guest::start("stay", &["--cpus", "2"]) else {
        return;
    };
    let mut serial = guest.serial();
    let client = guest.client();
    for boot in 0..3 {
        serial.wait_for("atoll probe: command line");
        serial.wait_for("\"ok\":true");
        serial.wait_for("probe> ");
        assert_eq!(client.info().unwrap().reset_count, boot);
        serial.type_line("uptime");
        serial.wait_for("up ");
        serial.wait_for("probe> ");
        client.act(Request::Reset).unwrap();
    }
    // Paused while it is reset, it stays paused at its first instruction.
    serial.wait_for("probe> ");
    client.act(Request::Pause).unwrap();
    let acted = client.act(Request::Reset).unwrap();
    assert_eq!(acted.state, MachineState::Paused);
    client.act(Request::Resume).unwrap();
    serial.wait_for("\"ok\":true");
}

#[test]
fn the_power_button_is_the_guests_affair() {
    let Some(guest) = Guest::start("stay", &[]) else {
        return;
    };
    let mut serial = guest.serial();
    serial.wait_for("probe> ");
    let acted = guest.client().act(Request::PowerButton).unwrap();
    assert_eq!(acted.state, MachineState::Running);
    serial.wait_for("power button: off");
    assert_eq!(guest.ended().0.code(), Some(0));
}

#[test]
fn shutdown_ends_the_process_from_any_state() {
    for pause in [false, true] {
        let Some(guest) = Guest::start("stay", &["--cpus", "4"]) else {
            return;
        };
        guest.serial().wait_for("probe> ");
        let client = guest.client();
        if pause {
            client.act(Request::Pause).unwrap();
        }
        let acted = client.act(Request::Shutdown).unwrap();
        assert_eq!(acted.state, MachineState::Stopped);
        assert_eq!(guest.ended().0.code(), Some(0));
        assert!(matches!(client.info(), Err(ClientError::Absent { .. })));
    }
}

#[test]
fn a_signal_ends_the_machine_in_order() {
    let Some(guest) = Guest::start("stay", &[]) else {
        return;
    };
    guest.serial().wait_for("probe> ");
    let pid = guest.process.id().to_string();
    let killed = Command::new("kill").args(["-TERM", &pid]).status().unwrap();
    assert!(killed.success());
    let (status, said) = guest.ended();
    assert_eq!(status.code(), Some(0));
    assert!(said.contains("ShutDown"), "{said}");
}

#[test]
fn a_killed_machine_leaves_no_obstacle() {
    let Some(mut guest) = Guest::start("stay", &[]) else {
        return;
    };
    guest.serial().wait_for("probe> ");
    guest.process.kill().unwrap();
    guest.process.wait().unwrap();
    assert!(guest.path("api").exists());
    // The same folder, the same sockets.
    guest.process = Command::new(BINARY)
        .current_dir(guest.folder.path())
        .args([
            "run",
            "--kernel",
            "kernel",
            "--memory",
            "32",
            "--cmdline",
            "stay",
        ])
        .args(["--console", "socket=serial", "--api-socket", "api"])
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let client = guest.client();
    eventually("the second machine", || client.info().ok());
}

#[test]
fn a_second_machine_does_not_take_a_running_ones_socket() {
    let Some(guest) = Guest::start("stay", &[]) else {
        return;
    };
    guest.serial().wait_for("probe> ");
    let second = Command::new(BINARY)
        .current_dir(guest.folder.path())
        .args(["run", "--kernel", "kernel", "--memory", "32"])
        .args(["--console", "null", "--api-socket", "api"])
        .output()
        .unwrap();
    let said = String::from_utf8(second.stderr).unwrap();
    assert!(
        said.contains("API socket api is in use by a running machine"),
        "{said}"
    );
    assert_eq!(second.status.code(), Some(1));
    guest.client().info().unwrap();
}

/// The model that every host can give: leaf and index, and what the guest reads there whatever the host.
#[test]
fn a_guest_sees_the_cpu_that_was_asked_for() {
    let asked = "x86-64,-kvm-pv-ipi";
    let Some(guest) = Guest::start("stay", &["--cpu", asked, "--cpus", "2"]) else {
        return;
    };
    let mut serial = guest.serial();
    let mut read = |leaf: &str| {
        serial.wait_for("probe> ");
        serial.type_line(&format!("cpuid {leaf}"));
        serial.wait_for("cpuid: ");
        serial.wait_for("\r\n").trim().to_owned()
    };
    for (leaf, expected) in [
        ("b 1", "00000001 00000002 00000201 00000000"),
        ("40000001", "010072eb 00000000 00000000 00000000"),
        ("80000002", "6c6f7441 6976206c 61757472 5043206c"),
        ("80000007", "00000000 00000000 00000000 00000000"),
    ] {
        assert_eq!(read(leaf), expected, "leaf {leaf}");
    }
    let seen = read("1");
    assert!(seen.starts_with("00060fb1 00020800 "), "{seen}");
    if seen.ends_with(" 81200000 178bfbfd") {
        assert_eq!(read("7"), "00000000 00000000 00000000 00000000");
    } else {
        println!("ATOLL-SKIP: this KVM shows a guest the host's features: leaf 1 is {seen}");
    }
    assert_eq!(guest.client().info().unwrap().cpu, asked);
    // And so after a reset.
    guest.client().act(Request::Reset).unwrap();
    serial.wait_for("atoll probe: command line");
    serial.wait_for("probe> ");
    serial.type_line("cpuid 40000001");
    serial.wait_for("cpuid: 010072eb ");
}

/// What this host lacks, or what is no CPU, is one line before anything is opened.
#[test]
fn a_cpu_that_cannot_be_is_refused() {
    let Some(guest) = Guest::start("stay", &[]) else {
        return;
    };
    for (cpu, code, expected) in [
        (
            "host,+ia64",
            1,
            "CPU host,+ia64: this host's CPU and KVM lack ia64: without +ia64 it fits",
        ),
        (
            "x86-64-v2,+avx2",
            2,
            "CPU feature avx2 needs xsave, avx: add +xsave,+avx",
        ),
        (
            "pentium",
            2,
            "there is no CPU model \"pentium\"; there are host, x86-64, ",
        ),
        ("host,hidden", 2, "a hidden KVM needs the board pc"),
    ] {
        let output = Command::new(BINARY)
            .current_dir(guest.folder.path())
            .args([
                "run",
                "--kernel",
                "kernel",
                "--net",
                "tap=not-made-here",
                "--cpu",
                cpu,
            ])
            .output()
            .unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(
            said.starts_with(&format!("atoll-vmm: {expected}")),
            "{said}"
        );
        assert_eq!(output.status.code(), Some(code), "{said}");
    }
}

#[test]
fn more_memory_than_the_host_has_is_refused() {
    let Some(guest) = Guest::start("exit", &["--name", "first"]) else {
        return;
    };
    let output = Command::new(BINARY)
        .current_dir(guest.folder.path())
        .args([
            "run",
            "--kernel",
            "kernel",
            "--memory",
            "900T",
            "--console",
            "null",
        ])
        .output()
        .unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(
        said.starts_with("atoll-vmm: 943718400 MiB of memory asked for"),
        "{said}"
    );
    assert_eq!((output.status.code(), said.lines().count()), (Some(1), 1));
}

/// Both machines are in a network namespace of their own, where the first one makes the tap.
#[test]
fn a_tap_that_another_machine_has_is_busy() {
    let Some(guest) = Guest::start("stay", &[]) else {
        return;
    };
    let run = format!(
        "{BINARY} run --kernel kernel --memory 32 --cmdline stay --console null --net tap=t0"
    );
    let script = format!(
        "{run} --api-socket first 2>first.log & first=$!
         for i in $(seq 600); do {BINARY} ctl --api-socket first info >first.info 2>&1 && break; sleep 0.05; done
         {run}; echo code $?; kill $first"
    );
    let output = Command::new("unshare")
        .args(["--net", "bash", "-c", &script])
        .current_dir(guest.folder.path())
        .output()
        .unwrap();
    let first = std::fs::read_to_string(guest.path("first.log")).unwrap_or_default();
    if first.contains("/dev/net/tun") || !guest.path("first.log").exists() {
        println!("ATOLL-SKIP: no tap in a network namespace: {first}");
        return;
    }
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(
        String::from_utf8(output.stdout).unwrap(),
        "code 1\n",
        "{said}"
    );
    assert!(said.contains("tap t0"), "{said}");
    assert!(said.contains("in use by another process"), "{said}");
    // Whether the host has it is nobody's concern who has not asked for it.
    assert!(!first.contains("vhost-net"), "{first}");
}

#[test]
fn what_is_no_kernel_is_named() {
    for (bytes, expected) in [
        (&b"#!/bin/sh\n"[..], "neither a bzImage"),
        (&b"\x7fELF"[..], "damaged"),
        (&[0; 4096][..], "neither a bzImage"),
    ] {
        let Some(guest) = Guest::start_kernel(bytes, "", &[]) else {
            return;
        };
        let (status, said) = guest.ended();
        assert!(said.contains(expected), "{said}");
        assert_eq!(status.code(), Some(1));
    }
}

#[test]
fn a_triple_fault_is_a_crash_with_a_code_of_its_own() {
    // ud2, without a gate for its exception.
    let Some(guest) = Guest::start_kernel(&pvh_elf(&[0x0f, 0x0b]), "", &[]) else {
        return;
    };
    let (status, said) = guest.ended();
    assert!(
        said.contains("the guest crashed: triple fault on vcpu0"),
        "{said}"
    );
    assert_eq!(status.code(), Some(3));
}

#[test]
fn a_kernel_larger_than_memory_is_refused() {
    let code = vec![0xf4; 40 << 20];
    let Some(guest) = Guest::start_kernel(&pvh_elf(&code), "", &[]) else {
        return;
    };
    let (status, said) = guest.ended();
    assert!(
        said.contains("which do not fit into the guest's memory"),
        "{said}"
    );
    assert_eq!(status.code(), Some(1));
}

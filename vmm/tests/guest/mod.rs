// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A machine of a test in a process of its own, in a folder of its own, with the probe guest inside. Files in the
//! folder have the same names in every machine, so that one machine's spec fits another's folder.

#![allow(
    dead_code,
    reason = "each test binary that includes this uses its own part of it"
)]

pub mod firmware;
pub mod huge_pages;
pub mod images;

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use atoll_vmm::probe::PROBE_ELF;
use atoll_vmm_protocol::api::{MachineState, MigrationInfo};
use atoll_vmm_protocol::client::Client;
use atoll_vmm_protocol::spec::MachineSpec;
use tempfile::TempDir;

pub const BINARY: &str = env!("CARGO_BIN_EXE_atoll-vmm");
/// A probe guest takes 0.1 s to its report; a busy test machine has taken seconds.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// Where a machine lives: `kernel`, a disk of 1 MiB, and its sockets `serial` and `api`.
#[derive(Clone)]
pub struct Place(Arc<TempDir>);

impl Place {
    pub fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("kernel"), PROBE_ELF).unwrap();
        let disk = File::create(folder.path().join("disk")).unwrap();
        disk.set_len(1 << 20).unwrap();
        Self(Arc::new(folder))
    }

    /// The same with another machine's disk as it is now.
    pub fn like(other: &Guest) -> Self {
        let place = Self::new();
        std::fs::copy(other.path("disk"), place.path("disk")).unwrap();
        place
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Runs `qemu-img` here, which must succeed.
    #[track_caller]
    pub fn qemu_img(&self, arguments: &[&str]) {
        let mut command = Command::new("qemu-img");
        let output = command.current_dir(self.path("")).args(arguments).output();
        let output = output.unwrap_or_else(|error| panic!("qemu-img: {error}"));
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "qemu-img {arguments:?}: {error}");
    }

    /// Runs `atoll-vmm` here with its sockets.
    pub fn start(self, arguments: &[&str]) -> Guest {
        let process = self
            .command(arguments)
            .args(["--api-socket", "api"])
            .stderr(File::create(self.path("stderr")).unwrap())
            .spawn()
            .unwrap();
        Guest {
            place: self,
            process,
        }
    }

    /// `atoll-vmm` here.
    pub fn command(&self, arguments: &[&str]) -> Command {
        self.command_of(Path::new(BINARY), arguments)
    }

    /// Another program here.
    pub fn command_of(&self, program: &Path, arguments: &[&str]) -> Command {
        let mut command = Command::new(program);
        command
            .current_dir(self.0.path())
            .args(arguments)
            .stdin(Stdio::null());
        command
    }
}

/// A machine, killed when dropped.
pub struct Guest {
    pub place: Place,
    pub process: Child,
}

/// Whether tests that need KVM can run; says so when not.
pub fn kvm() -> bool {
    match atoll_vmm::kvm::Kvm::open() {
        Ok(_) => true,
        Err(error) => {
            println!("ATOLL-SKIP: {error}");
            false
        }
    }
}

/// Arguments that start the probe guest with its shell and its disk.
pub fn shell<'a>(memory: &'a str, cpus: &'a str) -> Vec<&'a str> {
    shell_with_disk(memory, cpus, "path=disk,format=raw")
}

/// The same with another disk, by its keys.
pub fn shell_with_disk<'a>(memory: &'a str, cpus: &'a str, disk: &'a str) -> Vec<&'a str> {
    let mut arguments = vec!["run", "--kernel", "kernel", "--cmdline", "stay write"];
    arguments.extend(["--memory", memory, "--cpus", cpus]);
    arguments.extend(["--disk", disk, "--console", "socket=serial"]);
    arguments
}

impl Guest {
    pub fn path(&self, name: &str) -> PathBuf {
        self.place.path(name)
    }

    pub fn client(&self) -> Client {
        Client::new(self.path("api"))
    }

    /// Connects to the serial port, which exists a moment after the process.
    pub fn serial(&mut self) -> Serial {
        let path = self.path("serial");
        let stream = eventually("the serial port", || {
            let connected = UnixStream::connect(&path).ok();
            if connected.is_none()
                && let Some(status) = self.process.try_wait().unwrap()
            {
                panic!("{status}: {}", self.said());
            }
            connected
        });
        Serial::of(stream)
    }

    /// The same of a machine that another process has.
    pub fn serial_of_another_process(&self) -> Serial {
        let path = self.path("serial");
        let stream = eventually("the serial port", || UnixStream::connect(&path).ok());
        Serial::of(stream)
    }
}

impl Serial {
    fn of(stream: UnixStream) -> Self {
        stream
            .set_read_timeout(Some(Duration::from_millis(100)))
            .unwrap();
        Self {
            stream,
            text: String::new(),
        }
    }
}

impl Guest {
    /// Ends it by a kill, if it has not ended; the folder as it is then.
    pub fn place_again(self) -> Place {
        self.place.clone()
    }

    /// What it wrote to standard error.
    pub fn said(&self) -> String {
        std::fs::read_to_string(self.path("stderr")).unwrap()
    }

    /// The names of its process's threads.
    pub fn threads(&self) -> Vec<String> {
        let tasks = format!("/proc/{}/task", self.process.id());
        let tasks = std::fs::read_dir(tasks).unwrap().flatten();
        let names = tasks.map(|task| std::fs::read_to_string(task.path().join("comm")));
        // One that has ended meanwhile has none.
        names
            .flatten()
            .map(|name| name.trim_end().to_owned())
            .collect()
    }

    /// `atoll-vmm ctl` for this machine; what it printed, or what it said when it failed.
    pub fn ctl(&self, arguments: &[&str]) -> Result<serde_json::Value, String> {
        let output = self
            .place
            .command(&["ctl", "--api-socket", "api"])
            .args(arguments)
            .output()
            .unwrap();
        if output.status.success() {
            Ok(serde_json::from_slice(&output.stdout).unwrap())
        } else {
            Err(String::from_utf8(output.stderr).unwrap())
        }
    }

    /// Takes a snapshot into a directory of the folder; the spec in it.
    pub fn saved_spec(&self, directory: &str) -> MachineSpec {
        self.ctl(&["snapshot", "--to", directory]).unwrap();
        let spec = std::fs::read(self.path(directory).join("spec.json")).unwrap();
        serde_json::from_slice(&spec).unwrap()
    }

    /// Ends the machine's process; its folder goes on.
    pub fn killed(mut self) -> Place {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
        std::mem::replace(&mut self.place, Place::new())
    }

    pub fn ended(&mut self) -> (ExitStatus, String) {
        let status = eventually("the end", || self.process.try_wait().unwrap());
        (status, self.said())
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
pub fn eventually<T>(what: &str, mut attempt: impl FnMut() -> Option<T>) -> T {
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
pub struct Serial {
    stream: UnixStream,
    text: String,
}

impl Serial {
    /// Reads until `expected` has come, and forgets all up to it.
    #[track_caller]
    pub fn wait_for(&mut self, expected: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(at) = self.text.find(expected) {
                let rest = self.text.split_off(at + expected.len());
                return std::mem::replace(&mut self.text, rest);
            }
            let so_far = &self.text;
            assert!(Instant::now() < deadline, "no {expected:?} in {so_far:?}");
            let mut chunk = [0; 4096];
            if let Ok(count) = self.stream.read(&mut chunk) {
                self.text
                    .push_str(&String::from_utf8_lossy(&chunk[..count]));
            }
        }
    }

    pub fn type_line(&mut self, line: &str) {
        self.stream.write_all(line.as_bytes()).unwrap();
        self.stream.write_all(b"\r").unwrap();
    }

    /// What the probe's `clock` says: KVM's clock in nanoseconds, the time stamp counter, and the clock's flags.
    pub fn clock(&mut self, arguments: &str) -> [u64; 3] {
        self.type_line(&format!("clock {arguments}"));
        self.wait_for("clock: ");
        let told = self.wait_for("\r\n");
        let digits = |one: &char| one.is_ascii_digit() || *one == ' ';
        let numbers: String = told.chars().filter(digits).collect();
        let numbers: Vec<u64> = numbers
            .split_whitespace()
            .map(|number| number.parse().unwrap())
            .collect();
        self.wait_for("probe> ");
        numbers.try_into().expect("three numbers")
    }

    /// Starts the probe's `load`.
    pub fn start_load(&mut self, arguments: &str) {
        self.wait_for("probe> ");
        self.type_line(&format!("load {arguments}"));
        self.wait_for("\r\n");
    }

    /// Waits until the probe's `load` tells of more rounds than `after`; returns how many.
    #[track_caller]
    pub fn load_beyond(&mut self, after: u64) -> u64 {
        loop {
            self.wait_for("load ");
            let told = self.wait_for("\r\n");
            match told.trim().parse::<u64>() {
                Ok(rounds) if rounds > after => return rounds,
                Ok(_) => {}
                // The command line, read again by who comes later.
                Err(_) if told.trim().is_empty() => {}
                Err(_) => panic!("load {told}"),
            }
        }
    }

    /// Ends the probe's `load`, which must not have failed; returns its rounds.
    #[track_caller]
    pub fn end_load(&mut self) -> u64 {
        self.type_line("");
        let before = self.wait_for("load ended after ");
        assert!(!before.contains("FAILED"), "{before}");
        self.wait_for("\r\n").trim().parse().unwrap()
    }
}

/// A probe guest whose clock is KVM's, and what that said while nothing had happened to the guest.
pub struct Clocked {
    pub guest: Guest,
    pub serial: Serial,
    /// A moment before the clock was read.
    pub since: Instant,
    pub ns: u64,
    pub ticks: u64,
}

impl Clocked {
    pub fn start() -> Self {
        let mut guest = Place::new().start(&shell("32", "1"));
        let mut serial = guest.serial();
        serial.wait_for("probe> ");
        serial.clock("share");
        let since = Instant::now();
        let [ns, ticks, flags] = serial.clock("");
        assert_eq!(flags & 2, 0, "it has not stood still");
        Self {
            guest,
            serial,
            since,
            ns,
            ticks,
        }
    }
}

/// A process that waits for `source`'s machine, in a folder with the same disk.
pub fn target_for(source: &Guest) -> Guest {
    let place = Place::new();
    std::fs::remove_file(place.path("disk")).unwrap();
    std::fs::hard_link(source.path("disk"), place.path("disk")).unwrap();
    let target = place.start(&["receive", "--socket", "in"]);
    eventually("the target's socket", || {
        target.path("in").exists().then_some(())
    });
    target
}

/// The same files under another directory's name.
pub fn link_directory(from: &Path, to: &Path) {
    std::fs::create_dir(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        std::fs::hard_link(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

/// A number that the environment gives.
pub fn number(variable: &str, otherwise: u64) -> u64 {
    let asked = std::env::var(variable).ok();
    asked.map_or(otherwise, |text| text.parse().unwrap())
}

/// xorshift64*: enough to choose a moment.
pub struct Random(u64);

impl Random {
    /// Of a seed, which may be any number.
    pub fn of(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) % end
    }
}

/// What happens to a move at a random moment.
#[derive(Debug, Clone, Copy)]
pub enum Disturbance {
    KillSource,
    KillTarget,
    Cancel,
}

impl Disturbance {
    pub fn any(random: &mut Random) -> Self {
        let all = [Self::KillSource, Self::KillTarget, Self::Cancel];
        all[usize::try_from(random.below(3)).unwrap()]
    }
}

/// Whether the machine's process is there and says that its guest runs.
pub fn runs(guest: &Guest) -> bool {
    let info = guest.client().with_timeout(Duration::from_secs(5)).info();
    info.is_ok_and(|info| info.state == MachineState::Running)
}

/// Waits until the guest works on; false when its process ends instead.
pub fn works(guest: &mut Guest) -> bool {
    let deadline = Instant::now() + PATIENCE;
    while !runs(guest) {
        if guest.process.try_wait().unwrap().is_some() {
            return false;
        }
        assert!(
            Instant::now() < deadline,
            "neither runs nor ends: {}",
            guest.said()
        );
        std::thread::sleep(Duration::from_millis(5));
    }
    let mut serial = guest.serial();
    let done = serial.load_beyond(0);
    serial.load_beyond(done);
    true
}

/// Waits for a `ctl migrate` that has to succeed, and for the end of the machine that it moved away. What it tells.
#[track_caller]
pub fn moved(asker: Child, source: &mut Guest, target: &Guest) -> MigrationInfo {
    let output = asker.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    let all = format!("{said} {} {}", source.said(), target.said());
    assert!(output.status.success(), "{all}");
    assert_eq!(source.ended().0.code(), Some(0));
    serde_json::from_slice(&output.stdout).unwrap()
}

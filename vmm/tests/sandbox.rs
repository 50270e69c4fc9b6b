// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! What the system shows of a running machine's confinement: the process as `/proc` sees it from outside.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "helpers of tests fail by panicking, and say what they skip"
)]

mod guest;

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};

use atoll_devices::virtio::net::Tap;
use atoll_vmm::probe::PROBE_ELF;
use atoll_vmm::sandbox::UID_BASE;
use atoll_vmm_protocol::api::MachineState;
use atoll_vmm_protocol::client::Client;
use guest::{Place, eventually, link_directory, shell};
use serde_json::{Value, json};
use tempfile::TempDir;

const BINARY: &str = env!("CARGO_BIN_EXE_atoll-vmm");

/// Whether there is KVM, and this is root's process; says so when not.
fn possible() -> bool {
    let is_root = rustix::process::geteuid().is_root();
    if !is_root {
        println!("ATOLL-SKIP: only root's machines leave the file system and the user");
    }
    is_root && guest::kvm()
}

/// A machine with a disk, its serial port on a pipe, past its report: every queue has been started.
struct Guest {
    folder: TempDir,
    process: Child,
    _output: BufReader<ChildStdout>,
}

impl Guest {
    /// `None` where there is no KVM, or this is not root's process.
    fn start(more: &[&str]) -> Option<Self> {
        if !possible() {
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        fs::write(path("kernel"), PROBE_ELF).unwrap();
        fs::File::create(path("disk"))
            .unwrap()
            .set_len(1 << 20)
            .unwrap();
        let mut process = Command::new(BINARY)
            .current_dir(folder.path())
            .args(["run", "--kernel", "kernel", "--memory", "32", "--cpus", "2"])
            .args(["--cmdline", "stay", "--disk", "path=disk,format=raw"])
            .args(["--api-socket", "api"])
            .args(more)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(fs::File::create(path("stderr")).unwrap())
            .spawn()
            .unwrap();
        let mut output = BufReader::new(process.stdout.take().unwrap());
        let mut line = String::new();
        while !line.contains("everything works") {
            line.clear();
            let size = output.read_line(&mut line).unwrap();
            assert!(size > 0, "{}", fs::read_to_string(path("stderr")).unwrap());
        }
        Some(Self {
            folder,
            process,
            _output: output,
        })
    }

    fn proc(&self, name: &str) -> PathBuf {
        Path::new("/proc")
            .join(self.process.id().to_string())
            .join(name)
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // Both fail when the process has ended.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The value of a line of `/proc/PID/status`, its white space made single.
fn status(path: &Path, key: &str) -> String {
    let text = fs::read_to_string(path).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(key));
    let words: Vec<&str> = line.unwrap()[1..].split_whitespace().collect();
    words.join(" ")
}

#[test]
fn a_machine_of_roots_is_nobody_and_sees_nothing() {
    let Some(guest) = Guest::start(&[]) else {
        return;
    };
    let own = (UID_BASE + guest.process.id()).to_string();
    let four_times = [own.as_str(); 4].join(" ");
    let of_process = guest.proc("status");
    assert_eq!(status(&of_process, "Uid"), four_times);
    assert_eq!(status(&of_process, "Gid"), four_times);
    assert_eq!(status(&of_process, "Groups"), "");
    for kind in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
        assert_eq!(status(&of_process, kind), "0000000000000000", "{kind}");
    }
    assert_eq!(status(&of_process, "NoNewPrivs"), "1");
    for kind in ["mnt", "net", "ipc", "uts"] {
        let theirs = fs::read_link(guest.proc("ns").join(kind)).unwrap();
        let ours = fs::read_link(Path::new("/proc/self/ns").join(kind)).unwrap();
        assert_ne!(theirs, ours, "{kind}");
    }
    let root: Vec<_> = fs::read_dir(guest.proc("root")).unwrap().collect();
    assert!(root.is_empty(), "{root:?}");
    let mounts = fs::read_to_string(guest.proc("mountinfo")).unwrap();
    assert_eq!(mounts.lines().count(), 1, "{mounts}");
    assert!(mounts.contains(" / / ro,"), "{mounts}");
    let limits = fs::read_to_string(guest.proc("limits")).unwrap();
    let core = limits.lines().find(|line| line.starts_with("Max core"));
    assert!(core.unwrap().contains(" 0  "), "{limits}");
}

/// A control group that goes with the test.
struct Group(PathBuf);

impl Group {
    /// `None` where no hierarchy that can limit processes is mounted and writable.
    fn make(test: &str) -> Option<Self> {
        let name = format!("atoll-test-{}-{test}", std::process::id());
        let roots = ["/sys/fs/cgroup", "/sys/fs/cgroup/pids"];
        let root = roots
            .iter()
            .map(Path::new)
            .find(|root| root.join("cgroup.procs").exists());
        let group = root
            .map(|root| root.join(name))
            .filter(|group| fs::create_dir(group).is_ok());
        if group.is_none() {
            println!(
                "ATOLL-SKIP: no control group can be made below {}",
                roots.join(" or ")
            );
        }
        group.map(Self)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Fails while a process is in it; what is killed leaves it a moment later.
        for _ in 0..100 {
            if fs::remove_dir(&self.0).is_ok() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
    }
}

#[test]
fn a_machine_is_counted_in_its_control_group() {
    let Some(group) = Group::make("counted") else {
        return;
    };
    let Some(guest) = Guest::start(&["--cgroup", group.0.to_str().unwrap()]) else {
        return;
    };
    let members = fs::read_to_string(group.0.join("cgroup.procs")).unwrap();
    assert_eq!(members.trim(), guest.process.id().to_string());
}

/// A limit of the group's is one for the machine, whose threads are more than these.
#[test]
fn a_machine_is_held_to_the_limits_of_its_control_group() {
    let Some(group) = Group::make("held") else {
        return;
    };
    if let Err(error) = fs::write(group.0.join("pids.max"), "3") {
        println!("ATOLL-SKIP: no limit of processes: {error}");
        return;
    }
    if !possible() {
        return;
    }
    let arguments = [
        shell("32", "2"),
        vec!["--cgroup", group.0.to_str().unwrap()],
    ]
    .concat();
    let (status, said) = Place::new().start(&arguments).ended();
    assert_eq!(status.code(), Some(1), "{said}");
    assert!(said.contains("Resource temporarily unavailable"), "{said}");
    let refused = fs::read_to_string(group.0.join("pids.events")).unwrap();
    assert_ne!(refused.trim(), "max 0");
}

/// Makes the state of a machine that of one whose guest has drivers also for what the probe has none for: a balloon, a
/// SCSI host and a socket device. Their rings are empty, in RAM that nobody uses.
fn with_more_drivers(state: &mut Value) {
    // Virtio's number of the device, and what its driver accepted beside version 1.
    const DRIVERS: [(u64, u64); 3] = [(5, 0x26), (8, 0), (19, 0)];
    let mut rings = 24_u64 << 20;
    for device in state["devices"].as_array_mut().unwrap() {
        let transport = &mut device["device"]["state"];
        let number = transport["device_id"].as_u64();
        let Some((_, features)) = DRIVERS.iter().find(|(of, _)| Some(*of) == number) else {
            continue;
        };
        assert_eq!(transport["status"], 0, "the probe has no driver for it");
        transport["status"] = 15.into();
        transport["driver_features"] = (1 << 32 | features).into();
        for queue in transport["queues"].as_array_mut().unwrap() {
            queue["enabled"] = true.into();
            for part in ["descriptors", "driver", "device"] {
                queue[part] = rings.into();
                rings += 0x4000;
            }
            queue["position"] = json!({"next_available": 0, "next_used": 0});
        }
    }
}

/// Threads of every machine whose guest has drivers for all of its devices, with the number of their filters: what the
/// sealed starter has made has its filter, too.
const THREADS: [(&str, &str); 20] = [
    ("api", "1"),
    ("atoll-vmm", "1"),
    ("console", "1"),
    ("signals", "1"),
    ("starter", "1"),
    ("vcpu0", "1"),
    ("vcpu1", "1"),
    ("watchdog", "1"),
    ("balloon", "2"),
    ("console-rx", "2"),
    ("console-tx", "2"),
    ("disk0-q0", "2"),
    ("rng", "2"),
    ("scsi-q0", "2"),
    ("scsi-q1", "2"),
    ("scsi-q2", "2"),
    ("scsi-q3", "2"),
    ("vsock-event", "2"),
    ("vsock-rx", "2"),
    ("vsock-tx", "2"),
];

/// Names of the process's threads, sorted, with the number of their filters; each has to have one.
fn threads(process: u32) -> Vec<(String, String)> {
    let mut seen = Vec::new();
    for task in fs::read_dir(format!("/proc/{process}/task")).unwrap() {
        let path = task.unwrap().path().join("status");
        let name = status(&path, "Name");
        // A thread of the kernel's, where KVM or io_uring runs one in the process.
        if name.starts_with("kvm-") || name.starts_with("iou-") {
            continue;
        }
        assert_eq!(status(&path, "Seccomp"), "2", "{name}");
        assert_eq!(status(&path, "NoNewPrivs"), "1", "{name}");
        let filters = status(&path, "Seccomp_filters");
        if name.starts_with("vcpu") {
            assert_eq!(filters, "1", "{name}: every exit pays for each");
        }
        seen.push((name, filters));
    }
    seen.sort();
    seen
}

/// Of machines with a device of every kind that has threads here, all of which serve a driver.
#[test]
fn every_thread_has_its_filter_and_vcpus_only_one() {
    if !possible() {
        return;
    }
    for profile in ["micro", "pc"] {
        // Of the original and of its copy, which is in another folder.
        let sockets = tempfile::tempdir().unwrap();
        let socket = sockets.path().join("vsock");
        let vsock = format!("cid=3,socket={}", socket.display());
        let tap = format!("asb{profile}{}", std::process::id());
        let net = format!("tap={tap},vhost=off");
        let mut arguments = shell("32", "2");
        arguments.extend([
            "--profile",
            profile,
            "--balloon",
            "--watchdog",
            "action=none",
        ]);
        arguments.extend(["--virtio-console", "null", "--vsock", &vsock]);
        arguments.extend(["--disk", "bus=cdrom"]);
        let card = Tap::open_queues(&tap, 1);
        match &card {
            Ok(_) => arguments.extend(["--net", &net]),
            Err(error) => println!("ATOLL-SKIP: no network card: {error}"),
        }
        let has_card = card.is_ok();
        drop(card);
        let mut original = Place::new().start(&arguments);
        original.serial().wait_for("probe> ");
        original.ctl(&["snapshot", "--to", "saved"]).unwrap();
        let place = Place::like(&original);
        link_directory(&original.path("saved"), &place.path("saved"));
        drop(original);
        fs::remove_file(socket).unwrap();
        let state_file = place.path("saved/state.json");
        let mut state = serde_json::from_slice(&fs::read(&state_file).unwrap()).unwrap();
        with_more_drivers(&mut state);
        fs::write(&state_file, state.to_string()).unwrap();
        let copy = place.start(&["run", "--restore", "saved"]);
        eventually("the copy", || {
            let info = copy.client().info().ok()?;
            (info.state == MachineState::Running).then_some(())
        });

        let seen = threads(copy.process.id());
        let optional = [
            (("net0-pair0", "2"), has_card),
            (("rtc", "1"), profile == "pc"),
        ];
        let optional = optional.iter().filter(|(_, is_there)| *is_there);
        for (name, filters) in THREADS.iter().chain(optional.map(|(thread, _)| thread)) {
            let is_seen = seen.iter().any(|one| one.0 == *name && one.1 == *filters);
            assert!(is_seen, "no {name} with {filters} in {seen:?}");
        }
    }
}

#[test]
fn the_user_can_be_chosen_and_the_sandbox_left_out() {
    let Some(guest) = Guest::start(&["--uid", "3000000100", "--gid", "3000000200"]) else {
        return;
    };
    let status_file = guest.proc("status");
    assert!(status(&status_file, "Uid").starts_with("3000000100 "));
    assert!(status(&status_file, "Gid").starts_with("3000000200 "));
    // The socket was made before; whoever may connect to it still may.
    Client::new(guest.folder.path().join("api")).info().unwrap();
    drop(guest);

    let guest = Guest::start(&["--sandbox", "off", "--seccomp", "off"]).unwrap();
    let status_file = guest.proc("status");
    assert_eq!(status(&status_file, "Uid"), "0 0 0 0");
    assert_eq!(status(&status_file, "Seccomp"), "0");
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A world for tests with real guests: network, mount and process namespaces of its own, so that nothing of a test
//! is left when it ends, however it ends; a node in a temporary folder; a template made from the host's busybox.

#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "test helpers, of which each test binary uses a part"
)]

pub mod ground;
pub mod image;

use std::future::Future;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// Set in the helper process.
const INSIDE: &str = "ATOLL_TEST_ISOLATED";
/// Longest wait for anything; emulated hosts are slow.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Runs a test in a helper process with namespaces of its own: the test binary again, with this one test.
/// `name` is the test's full name. Skips where such namespaces cannot be made.
pub fn isolated<F: Future<Output = ()>>(name: &str, test: impl FnOnce() -> F) {
    if std::env::var_os(INSIDE).is_some() {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .enable_all()
            .build();
        return runtime.unwrap().block_on(test());
    }
    let unshare = |arguments: &[&str]| {
        let mut command = Command::new("unshare");
        command.args([
            "--net",
            "--mount",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
        ]);
        command.args(arguments);
        command
    };
    let possible = unshare(&["true"]).output();
    if !possible.is_ok_and(|output| output.status.success()) {
        println!("ATOLL-SKIP: no namespaces here (root is needed)");
        return;
    }
    let exe = std::env::current_exe().unwrap();
    let number = std::process::id() % 30_000 + 30_000;
    let output = unshare(&[exe.to_str().unwrap(), "--exact", name, "--nocapture"])
        .env(INSIDE, number.to_string())
        .output()
        .unwrap();
    let (stdout, stderr) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    println!("{stdout}");
    remove_groups(number);
    assert!(output.status.success(), "{stderr}");
    assert!(stdout.contains("1 passed"), "no test is called {name}");
}

/// Folder of our binaries: the one above the test binary's.
pub fn bin_dir() -> PathBuf {
    let exe = std::env::current_exe().unwrap();
    exe.parent().and_then(Path::parent).unwrap().to_owned()
}

/// Whether a binary of ours is there; says so when it is not.
pub fn has_binary(name: &str) -> bool {
    let there = bin_dir().join(name).exists();
    if !there {
        println!("ATOLL-SKIP: {name} is not built (cargo build)");
    }
    there
}

/// Number for the guest of a test, which no other test on this machine has now: control groups are named by it, and
/// they have no namespace that would take them along.
pub fn guest_number() -> u32 {
    std::env::var(INSIDE).unwrap().parse().unwrap()
}

/// Two more numbers, for tests with several guests.
pub fn more_numbers() -> [u32; 2] {
    further(guest_number())
}

/// Below all first numbers, so that each has a range of user ids.
fn further(number: u32) -> [u32; 2] {
    [number / 2, number / 4]
}

/// Removes the control groups that a failed test has left.
fn remove_groups(number: u32) {
    for number in further(number).into_iter().chain([number]) {
        let find = ["/sys/fs/cgroup", "-depth", "-type", "d", "-path"];
        let pattern = format!("*/atoll/?[tm]-{number}*");
        let _ = Command::new("find")
            .args(find)
            .args([&pattern, "-exec", "rmdir", "{}", ";"])
            .output();
    }
}

/// Command lines of all processes in a control group of that name.
pub fn processes_of(group: &str) -> Vec<String> {
    let folders = std::fs::read_dir("/proc").unwrap().flatten();
    let read = |folder: std::fs::DirEntry| {
        let groups = std::fs::read_to_string(folder.path().join("cgroup")).ok()?;
        let inside = groups
            .lines()
            .any(|line| line.ends_with(&format!("/{group}")));
        let command = std::fs::read(folder.path().join("cmdline")).ok()?;
        inside.then(|| String::from_utf8_lossy(&command).replace('\0', " "))
    };
    folders.filter_map(read).collect()
}

/// Runs a host program and returns its output.
#[track_caller]
pub fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Asks until the answer is yes.
#[track_caller]
pub fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "{what}: not within {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// A folder with what new firmware variables are copied from. Nothing boots by them.
pub fn make_firmware(folder: &Path) -> PathBuf {
    let firmware = folder.join("firmware");
    std::fs::create_dir_all(&firmware).unwrap();
    for name in ["OVMF_VARS_4M.fd", "OVMF_VARS_4M.ms.fd"] {
        std::fs::write(firmware.join(name), name.repeat(64)).unwrap();
    }
    firmware
}

/// A template of a few megabytes: busybox as init, shells on the console and /dev/tty1, DHCP. False when the host lacks busybox.
pub fn make_template(path: &Path) -> bool {
    let Some(busybox) = ["/bin/busybox", "/usr/bin/busybox"]
        .iter()
        .find(|p| Path::new(p).exists())
    else {
        println!("ATOLL-SKIP: no busybox here (apt-get install busybox-static)");
        return false;
    };
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    plant_busybox(root, Path::new(busybox));
    let script =
        "#!/bin/sh\n[ \"$1\" = bound ] && ip address replace $ip/$mask dev $interface\nexit 0\n";
    let files = [
        (
            "etc/inittab",
            "::sysinit:/sbin/ifup -a\n::respawn:/bin/sh\ntty1::respawn:/bin/sh\n::ctrlaltdel:/sbin/reboot\n",
            0o644,
        ),
        ("etc/passwd", "root:x:0:0:root:/root:/bin/sh\n", 0o644),
        ("etc/shadow", "root:*:19000:0:99999:7:::\n", 0o600),
        ("usr/share/udhcpc/default.script", script, 0o755),
    ];
    for (name, text, mode) in files {
        use std::os::unix::fs::PermissionsExt;
        let path = root.join(name);
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
    }
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    run(
        "tar",
        &[
            "--create",
            "--gzip",
            "--file",
            path.to_str().unwrap(),
            "--directory",
            root.to_str().unwrap(),
            ".",
        ],
    );
    true
}

/// Folders, busybox itself and its names.
fn plant_busybox(root: &Path, busybox: &Path) {
    for name in [
        "bin",
        "sbin",
        "etc/network",
        "proc",
        "sys",
        "dev",
        "run",
        "tmp",
        "root",
        "usr/share/udhcpc",
        "var/run",
    ] {
        std::fs::create_dir_all(root.join(name)).unwrap();
    }
    std::fs::copy(busybox, root.join("bin/busybox")).unwrap();
    for applet in [
        "sh",
        "id",
        "ip",
        "ifconfig",
        "ping",
        "cat",
        "udhcpc",
        "ls",
        "sleep",
        "true",
        "hostname",
        "run-parts",
        "stat",
        "touch",
        "grep",
        "tr",
        "rm",
        "stty",
    ] {
        std::os::unix::fs::symlink("busybox", root.join("bin").join(applet)).unwrap();
    }
    for applet in ["init", "ifup", "ifdown", "poweroff", "reboot"] {
        std::os::unix::fs::symlink("../bin/busybox", root.join("sbin").join(applet)).unwrap();
    }
}

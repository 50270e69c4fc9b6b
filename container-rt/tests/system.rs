// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! systemd as the init of an unprivileged container: a Debian root file system boots, takes commands, shuts down
//! by systemd's signal, and leaves nothing on the host.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "tests fail by panicking and skip by a line"
)]

mod scene;

use std::path::{Path, PathBuf};
use std::process::Command;

use scene::{Scene, can_run, wait_for};
use serde_json::{Value, json};

/// The stock Debian guest's root file system, made once from Debian's packages and cached (`run/guest-image.sh`).
/// Debian 12 has the last systemd that still boots on cgroup v1.
fn archive() -> Option<PathBuf> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../run/guest-image.sh");
    let output = Command::new(script).output().unwrap();
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        println!(
            "ATOLL-SKIP: run/guest-image.sh: {}",
            text.lines().last().unwrap_or_default()
        );
        return None;
    }
    let directory = String::from_utf8(output.stdout).unwrap();
    Some(Path::new(directory.trim()).join("template.tar.zst"))
}

/// What a system container needs beyond a program's: more capabilities, a writable cgroup, /run, the variable.
fn make_system(config: &mut Value) {
    let capabilities = json!([
        "CAP_AUDIT_WRITE",
        "CAP_CHOWN",
        "CAP_DAC_OVERRIDE",
        "CAP_DAC_READ_SEARCH",
        "CAP_FOWNER",
        "CAP_FSETID",
        "CAP_KILL",
        "CAP_NET_ADMIN",
        "CAP_NET_BIND_SERVICE",
        "CAP_NET_RAW",
        "CAP_SETFCAP",
        "CAP_SETGID",
        "CAP_SETPCAP",
        "CAP_SETUID",
        "CAP_SYS_ADMIN",
        "CAP_SYS_BOOT",
        "CAP_SYS_CHROOT",
        "CAP_SYS_NICE",
        "CAP_SYS_PTRACE",
        "CAP_SYS_TTY_CONFIG"
    ]);
    let process = &mut config["process"];
    process["capabilities"] =
        json!({ "bounding": capabilities, "effective": capabilities, "permitted": capabilities });
    process["terminal"] = json!(true);
    process["noNewPrivileges"] = json!(false);
    process["rlimits"] = json!([]);
    process["env"]
        .as_array_mut()
        .unwrap()
        .push(json!("container=lxc"));
    let mounts = config["mounts"].as_array_mut().unwrap();
    for mount in mounts.iter_mut().filter(|m| m["type"] == "cgroup") {
        mount["options"] = json!(["nosuid", "noexec", "nodev", "rw"]);
    }
    mounts.push(json!({
        "destination": "/run", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "nodev", "mode=755"],
    }));
    config["linux"]["readonlyPaths"] =
        json!(["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sysrq-trigger"]);
}

/// An unprivileged scene with the archive as its root file system.
fn debian(archive: &Path) -> Scene {
    let mut scene = Scene::new(&["/sbin/init"]).unprivileged();
    std::fs::remove_dir_all(scene.path("rootfs")).unwrap();
    std::fs::create_dir(scene.path("rootfs")).unwrap();
    let mut tar = Command::new("tar");
    tar.args(["--numeric-owner", "-xf"])
        .arg(archive)
        .arg("-C")
        .arg(scene.path("rootfs"));
    assert!(tar.status().unwrap().success());
    make_system(&mut scene.config);
    scene
}

#[test]
fn unprivileged_debian_boots_and_leaves_nothing() {
    if !can_run() {
        return;
    }
    let Some(archive) = archive() else {
        return;
    };
    let scene = debian(&archive);
    scene.start(&["--monitor"]);
    let directory = scene.path("run").join(&scene.id);

    let mut answer = String::new();
    wait_for("systemd's end of booting", || {
        answer = scene.exec("systemctl is-system-running").stdout;
        matches!(answer.trim(), "running" | "degraded")
    });
    let failed = scene.exec("systemctl --failed --plain --no-legend").stdout;
    println!("systemd is {answer:?}; failed units: {failed:?}");
    let owner = scene.exec("stat -c %u:%g /usr/bin/bash /etc/shadow").ok();
    assert_eq!(owner, "0:0\n0:42\n");
    let unit = scene
        .exec("systemctl show -p ControlGroup dbus.service")
        .ok();
    assert_eq!(unit, "ControlGroup=/system.slice/dbus.service\n");
    let log = std::fs::read_to_string(directory.join("console.log"));
    assert!(log.unwrap().contains("Reached target"));
    assert!(
        scene
            .cgroups()
            .iter()
            .any(|d| d.join("system.slice").exists()),
        "it makes its own cgroups"
    );

    scene.ct(&["kill", "ID", "SIGRTMIN+3"]).ok();
    wait_for("the exit record", || directory.join("exit.json").exists());
    let record: Value =
        serde_json::from_slice(&std::fs::read(directory.join("exit.json")).unwrap()).unwrap();
    // reboot(2): halting a pid namespace ends its init by SIGINT.
    assert_eq!(record["signal"], json!(2), "{record}");
    scene.ct(&["delete", "ID"]).ok();
    assert!(scene.cgroups().is_empty(), "{:?}", scene.cgroups());
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(
        !mounts.contains(scene.directory.path().to_str().unwrap()),
        "no mount is left"
    );
}

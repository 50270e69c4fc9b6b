// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Ways out of containers that other runtimes once left open, each tried: links in an image, descriptors and programs of
//! the host that come along, cgroups' release agents, processes of others. What succeeds here is an escape.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "tests fail by panicking and skip by a line"
)]

mod scene;

use std::os::unix::fs::symlink;
use std::process::{Command, Output, Stdio};

use scene::{Scene, can_run, wait_for};
use serde_json::json;

fn text(output: &Output) -> String {
    let out = String::from_utf8_lossy(&output.stdout);
    format!("{out}{}", String::from_utf8_lossy(&output.stderr))
}

fn all_capabilities(scene: &mut Scene) {
    let all = [
        "CHOWN",
        "DAC_OVERRIDE",
        "DAC_READ_SEARCH",
        "FOWNER",
        "KILL",
        "MKNOD",
        "NET_ADMIN",
        "SETUID",
        "SETGID",
        "SYS_ADMIN",
        "SYS_CHROOT",
        "SYS_PTRACE",
    ];
    let all: Vec<String> = all.iter().map(|name| format!("CAP_{name}")).collect();
    scene.config["process"]["capabilities"] =
        json!({ "bounding": all, "effective": all, "permitted": all });
}

/// CVE-2024-21626: a directory of the host that somebody has open.
#[test]
fn no_descriptor_of_the_host_comes_along() {
    if !can_run() {
        return;
    }
    let mut scene = Scene::new(&["ls", "/proc/self/fd"]);
    symlink("busybox", scene.path("rootfs/bin/ls")).unwrap();
    let holding = |scene: &Scene, arguments: &[&str]| {
        let inner = scene.command(arguments);
        let mut command = Command::new("sh");
        command.args(["-c", "exec 7</ 8</etc; exec \"$@\"", "sh"]);
        command.arg(inner.get_program()).args(inner.get_args());
        command.current_dir(scene.directory.path());
        command.stdin(Stdio::null()).output().unwrap()
    };
    // The fourth is the one that ls reads.
    assert_eq!(text(&holding(&scene, &["run", "ID"])), "0\n1\n2\n3\n");
    for number in 3..20 {
        scene.config["process"]["cwd"] = json!(format!("/proc/self/fd/{number}"));
        let ended = holding(&scene, &["run", "ID"]);
        assert_eq!(ended.status.code(), Some(1), "{number}: {}", text(&ended));
    }
    scene.config["process"]["cwd"] = json!("/");
    scene.config["process"]["args"] = json!(["sleep", "1000"]);
    scene.start(&[]);
    let listed = holding(&scene, &["exec", "ID", "ls", "/proc/self/fd"]);
    assert_eq!(text(&listed), "0\n1\n2\n3\n");
    for number in 3..20 {
        let cwd = format!("/proc/self/fd/{number}");
        let ended = holding(&scene, &["exec", "--cwd", &cwd, "ID", "ls"]);
        assert_eq!(ended.status.code(), Some(255), "{number}: {}", text(&ended));
    }
    let ended = holding(&scene, &["exec", "--cwd", "/proc/self/fd/7", "ID", "ls"]);
    assert!(
        text(&ended).contains("/proc/self/fd/7: not in the container's root"),
        "{}",
        text(&ended)
    );
    // Where the runtime itself was started.
    let own = ["exec", "--cwd", "/proc/self/cwd", "ID", "sh", "-c", "pwd"];
    assert_eq!(scene.ct(&own).ok(), "/\n");
}

/// CVE-2019-5736: whoever sees a runtime on its way into the container holds the runtime's own file, and writes to it
/// when it has gone.
#[test]
fn the_runtimes_own_program_cannot_be_written_to() {
    if !can_run() {
        return;
    }
    let mut scene = Scene::new(&["sleep", "1000"]);
    all_capabilities(&mut scene);
    // A copy, so that nothing is lost when the attack succeeds.
    let victim = scene.path("victim");
    std::fs::copy(env!("CARGO_BIN_EXE_atoll-ct"), &victim).unwrap();
    let before = std::fs::metadata(&victim).unwrap();
    let run = |arguments: &[&str]| {
        let inner = scene.command(arguments);
        let mut command = Command::new(&victim);
        command
            .args(inner.get_args())
            .current_dir(scene.directory.path());
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        assert!(command.status().unwrap().success(), "{arguments:?}");
    };
    run(&["create", "ID"]);
    // The init is still the runtime.
    let attack = "exec 3</proc/1/exe && echo >/tmp/held; while [ ! -e /tmp/go ]; do sleep 0.1; done; \
        (echo overwritten >/proc/self/fd/3) 2>/tmp/why; echo \"ended $?\" >/tmp/verdict";
    run(&["exec", "--detach", "ID", "sh", "-c", attack]);
    let inside = |name: &str| scene.path("rootfs/tmp").join(name);
    wait_for("the runtime to be held", || inside("held").exists());
    run(&["start", "ID"]);
    let init = scene.state()["pid"].to_string();
    wait_for("the program", || {
        let program = std::fs::read_link(format!("/proc/{init}/exe"));
        program.is_ok_and(|program| program.ends_with("busybox"))
    });
    std::fs::write(inside("go"), "").unwrap();
    wait_for("the verdict", || {
        std::fs::read_to_string(inside("verdict")).is_ok_and(|text| text.ends_with('\n'))
    });
    let why = std::fs::read_to_string(inside("why")).unwrap();
    assert!(why.contains("Read-only file system"), "{why}");
    let after = std::fs::metadata(&victim).unwrap();
    assert_eq!(before.len(), after.len(), "it has been overwritten");
    assert_eq!(before.modified().unwrap(), after.modified().unwrap());
}

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

use scene::{Scene, can_run};
use serde_json::json;

fn text(output: &Output) -> String {
    let out = String::from_utf8_lossy(&output.stdout);
    format!("{out}{}", String::from_utf8_lossy(&output.stderr))
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

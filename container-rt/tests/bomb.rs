// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Containers that take all they can get: processes, memory, files, room in the log. Each has what its limits say, the
//! runtime still answers, and nothing is left when it is deleted.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "tests fail by panicking and skip by a line"
)]

mod scene;

use std::path::Path;

use scene::{Scene, can_run, wait_for};
use serde_json::json;

/// Whether the host has that v1 controller; v2 alone has both.
fn has(controller: &str) -> bool {
    let group = Path::new("/sys/fs/cgroup");
    let here = group.join(controller).exists() || group.join("cgroup.controllers").exists();
    if !here {
        println!("ATOLL-SKIP: this host has no {controller} controller");
    }
    here
}

fn number(scene: &Scene, file: &str) -> u64 {
    let groups = scene.cgroups();
    let mut texts = groups
        .iter()
        .filter_map(|d| std::fs::read_to_string(d.join(file)).ok());
    texts.next().unwrap().trim().parse().unwrap()
}

#[test]
fn processes_end_at_their_limit() {
    if !can_run() || !has("pids") {
        return;
    }
    // The shell ends at the first that it cannot make, and its parent goes on with another one.
    let script =
        "while :; do (while :; do sleep 1000 & done) 2>/dev/null; echo again >/tmp/again; done";
    let mut scene = Scene::new(&["sh", "-c", script]);
    scene.config["linux"]["resources"]["pids"] = json!({ "limit": 40 });
    scene.start(&[]);
    wait_for("the limit", || scene.path("rootfs/tmp/again").exists());
    assert!(number(&scene, "pids.current") <= 40);
    assert_eq!(scene.state()["status"], "running");
    scene.ct(&["delete", "--force", "ID"]).ok();
    assert!(scene.cgroups().is_empty(), "{:?}", scene.cgroups());
}

#[test]
fn memory_ends_at_its_limit() {
    if !can_run() || !has("memory") {
        return;
    }
    let script = "busybox dd if=/dev/zero of=/dev/null bs=128M count=1 2>/dev/null; echo $?; \
        busybox dd if=/dev/zero of=/dev/null bs=1M count=1 2>/dev/null; echo $?";
    let mut scene = Scene::new(&["sh", "-c", script]);
    scene.config["linux"]["resources"]["memory"] = json!({ "limit": 32 << 20, "swap": 32 << 20 });
    assert_eq!(
        scene.ct(&["run", "ID"]).ok(),
        "137\n0\n",
        "who asks for it is killed, the others are not"
    );
    assert!(scene.cgroups().is_empty());
}

#[test]
fn files_end_with_their_file_system() {
    if !can_run() {
        return;
    }
    let script = "i=0; while (echo >/tmp/$i) 2>/dev/null; do i=$((i+1)); done; echo $i; busybox rm /tmp/*; \
        busybox dd if=/dev/zero of=/tmp/big bs=64k 2>/dev/null; busybox stat -c %s /tmp/big";
    let mut scene = Scene::new(&["sh", "-c", script]);
    scene.config["mounts"].as_array_mut().unwrap().push(json!({
        "destination": "/tmp", "type": "tmpfs", "source": "t", "options": ["size=1m", "nr_inodes=50"],
    }));
    // One of the 50 is the directory itself.
    assert_eq!(scene.ct(&["run", "ID"]).ok(), format!("49\n{}\n", 1 << 20));
}

/// Far more than a log holds, as fast as it can.
#[test]
fn a_flooded_log_is_cut_back() {
    if !can_run() {
        return;
    }
    let script = "busybox yes 0123456789abcdef | busybox head -c 20000000; echo; echo the end; exec sleep 1000";
    let scene = Scene::new(&["sh", "-c", script]);
    scene.start(&["--monitor"]);
    let log = scene.path("run").join(&scene.id).join("console.log");
    wait_for("the end", || {
        let bytes = std::fs::read(&log).unwrap();
        assert!(bytes.len() <= 256 << 10, "{} bytes", bytes.len());
        bytes.ends_with(b"\nthe end\n")
    });
    assert_eq!(scene.exec("echo answers").ok(), "answers\n");
    scene.ct(&["delete", "--force", "ID"]).ok();
    assert!(!log.exists());
}

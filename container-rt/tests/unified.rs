// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Pure cgroup v2, on whatever host: the test program runs itself again in a mount namespace of its own where v2
//! is mounted alone. A hybrid host has few controllers left for it, so limits are for hosts that boot with v2.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "tests fail by panicking and skip by a line"
)]

mod scene;

use scene::unified::on_unified;
use scene::{Scene, wait_for};
use serde_json::{Value, json};

#[test]
fn device_filter_is_enforced() {
    if !on_unified("device_filter_is_enforced") {
        return;
    }
    let script = "echo x > /dev/null && echo null; busybox mknod /tmp/kmsg c 1 11; cat /tmp/kmsg; \
        busybox mknod /tmp/loop b 7 0; cat /tmp/loop; exit 0";
    let mut scene = Scene::new(&["sh", "-c", script]);
    let all = json!([
        "CAP_MKNOD",
        "CAP_SYS_ADMIN",
        "CAP_DAC_OVERRIDE",
        "CAP_SYSLOG"
    ]);
    scene.config["process"]["capabilities"] =
        json!({ "bounding": all, "effective": all, "permitted": all });
    let ended = scene.ct(&["run", "ID"]);
    assert_eq!(ended.stdout, "null\n", "{}", ended.stderr);
    assert_eq!(
        ended.stderr.matches("Operation not permitted").count(),
        2,
        "{}",
        ended.stderr
    );
    scene.config["linux"]["resources"]["devices"]
        .as_array_mut()
        .unwrap()
        .push(json!({
            "allow": true, "type": "b", "major": 7, "minor": 0, "access": "r",
        }));
    let ended = scene.ct(&["run", "ID"]);
    assert_eq!(
        ended.stderr.matches("Operation not permitted").count(),
        1,
        "{}",
        ended.stderr
    );
}

#[test]
fn the_filter_follows_devices_that_come_and_go() {
    if on_unified("the_filter_follows_devices_that_come_and_go") {
        scene::devices::come_and_go();
    }
}

#[test]
fn lifecycle_freezer_and_nested_removal() {
    if !on_unified("lifecycle_freezer_and_nested_removal") {
        return;
    }
    let script =
        "mkdir -p /sys/fs/cgroup/a/b; echo $$ > /sys/fs/cgroup/a/b/cgroup.procs; exec sleep 1000";
    let mut scene = Scene::new(&["sh", "-c", script]).unprivileged();
    for mount in scene.config["mounts"].as_array_mut().unwrap() {
        if mount["type"] == "cgroup" {
            mount["options"] = json!(["nosuid", "noexec", "nodev", "rw"]);
        }
    }
    scene.start(&[]);
    let nested = || scene.cgroups().iter().any(|d| d.join("a/b").exists());
    wait_for("the unprivileged container's own cgroup", nested);
    assert!(
        scene
            .ct(&["exec", "ID", "cat", "/proc/self/cgroup"])
            .ok()
            .contains("0::/")
    );
    scene.ct(&["pause", "ID"]).ok();
    assert_eq!(scene.state()["status"], "paused");
    scene.ct(&["delete", "--force", "ID"]).ok();
    assert!(scene.cgroups().is_empty(), "{:?}", scene.cgroups());
}

/// A hybrid host has no cpu, memory and pids for v2: what they would count is missing, and the rest is there.
#[test]
fn statistics_without_controllers() {
    if !on_unified("statistics_without_controllers") {
        return;
    }
    let script = "busybox seq 20000 >/tmp/numbers; echo >/tmp/done; exec sleep 1000";
    let scene = Scene::new(&["sh", "-c", script]);
    scene.start(&[]);
    wait_for("some work", || scene.path("rootfs/tmp/done").exists());
    let group = scene.cgroups().remove(0);
    let used = || {
        let text = std::fs::read_to_string(group.join("cpu.stat")).unwrap();
        let usage = text
            .lines()
            .find_map(|line| line.strip_prefix("usage_usec "));
        usage.unwrap().parse::<u64>().unwrap() * 1000
    };
    let before = used();
    let stats: Value = serde_json::from_str(&scene.ct(&["events", "--stats", "ID"]).ok()).unwrap();
    let (cpu, after) = (&stats["data"]["cpu"], used());
    let total = cpu["usage"]["total"].as_u64().unwrap();
    assert!(
        (before..=after).contains(&total) && total > 0,
        "nanoseconds: {before} <= {total} <= {after}"
    );
    assert_eq!(cpu["throttling"]["throttledTime"], 0);
    assert_eq!(stats["data"]["pids"]["current"], 1);
    for (member, resource) in [("cpu", "cpu"), ("memory", "memory"), ("blkio", "io")] {
        let told = stats["data"][member]["psi"]["some"]["total"].is_u64();
        let file = group.join(format!("{resource}.pressure"));
        assert_eq!(told, file.exists(), "{resource}: {stats}");
    }
    let controllers = std::fs::read_to_string(group.join("cgroup.controllers")).unwrap();
    let counted = stats["data"]["memory"]["usage"]["usage"] != 0;
    assert_eq!(
        counted,
        controllers.split_whitespace().any(|c| c == "memory"),
        "{stats}"
    );
}

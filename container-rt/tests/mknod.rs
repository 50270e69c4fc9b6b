// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Device nodes that an unprivileged container makes itself, by the monitor's help, and those that it does not get.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "tests fail by panicking and skip by a line"
)]

mod scene;

use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};

use scene::{Scene, can_run};
use serde_json::json;

/// An unprivileged container whose filter asks about device nodes.
fn scene() -> Scene {
    let mut scene = Scene::new(&["sleep", "1000"]).unprivileged();
    let rule = |name: &str, index: u32| {
        json!({ "names": [name], "action": "SCMP_ACT_NOTIFY", "args": [
            { "index": index, "value": 0o170_000, "valueTwo": 0o020_000, "op": "SCMP_CMP_MASKED_EQ" },
        ]})
    };
    scene.config["linux"]["seccomp"] = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"],
        "listenerPath": scene.path("mknod.sock"),
        "syscalls": [rule("mknod", 1), rule("mknodat", 2)],
    });
    scene.config["annotations"]["dev.atoll.mknod"] = json!("1");
    let capabilities = json!([
        "CAP_MKNOD",
        "CAP_CHOWN",
        "CAP_SETUID",
        "CAP_SETGID",
        "CAP_SYS_CHROOT"
    ]);
    scene.config["process"]["capabilities"] =
        json!({ "bounding": capabilities, "effective": capabilities, "permitted": capabilities });
    scene
}

#[test]
fn harmless_nodes_are_made_and_work() {
    if !can_run() {
        return;
    }
    let scene = scene();
    // The folder is the container's: its root may write there.
    for name in ["tmp", "rootfs/tmp"] {
        std::fs::create_dir_all(scene.path(name)).unwrap();
    }
    scene.start(&["--monitor"]);
    let sh = |script: &str| {
        let ended = scene.ct(&["exec", "ID", "sh", "-c", script]);
        (ended.code, ended.stdout + &ended.stderr)
    };
    let script = "umask 027; cd /tmp && busybox mknod null c 1 3 && echo x > null && cat null && busybox mknod -m 600 /tmp/zero c 1 5 \
        && busybox head -c 3 zero | busybox wc -c";
    assert_eq!(sh(script), (Some(0), "3\n".to_owned()));
    let null = std::fs::metadata(scene.path("rootfs/tmp/null")).unwrap();
    assert!(null.file_type().is_char_device());
    assert_eq!(
        (null.rdev(), null.uid(), null.mode() & 0o7777),
        (0x103, 0, 0o640)
    );
    // What it could not do itself stays refused: other devices, places that are not its own, what is there already.
    for (script, error) in [
        ("busybox mknod /tmp/kmsg c 1 11", "Operation not permitted"),
        ("busybox mknod /tmp/loop b 7 0", "Operation not permitted"),
        ("busybox mknod /tmp/null c 1 3", "File exists"),
        ("busybox mknod /none/null c 1 3", "No such file"),
        ("busybox mknod /proc/null c 1 3", "mknod: "),
    ] {
        let (code, text) = sh(script);
        assert!(code == Some(1) && text.contains(error), "{script}: {text}");
    }
    assert_eq!(
        sh("busybox mknod /tmp/fifo p && test -p /tmp/fifo").0,
        Some(0)
    );
    // A root of the process's own is its root here, too, also for links that lead up.
    let script = "mkdir -p /tmp/r/bin /tmp/r/dev && cat /bin/busybox > /tmp/r/bin/busybox && busybox chmod 755 /tmp/r/bin/busybox \
        && busybox ln -s ../../../up /tmp/r/link && busybox chroot /tmp/r /bin/busybox mknod /dev/full c 1 7 \
        && busybox chroot /tmp/r /bin/busybox mknod ../../../../random c 1 8; busybox stat -c %t:%T /tmp/r/dev/full /tmp/r/random";
    assert_eq!(sh(script).1, "1:7\n1:8\n");
    // Nobody but who has the capability, and only where the ids may write.
    let script = "busybox chmod 1777 /tmp; busybox setuidgid 7:7 busybox mknod /tmp/theirs c 1 3";
    assert!(sh(script).1.contains("mknod: ") || sh(script).0 != Some(0));
    assert!(!scene.path("rootfs/tmp/theirs").exists());
    scene.ct(&["kill", "ID", "KILL"]).ok();
    scene.wait_status("stopped");
    scene.ct(&["delete", "ID"]).ok();
    assert!(!scene.path("mknod.sock").exists());
}

#[test]
fn without_a_monitor_or_a_user_namespace_it_is_refused() {
    if !can_run() {
        return;
    }
    let mut scene = scene();
    let error = scene.ct(&["create", "ID"]).stderr;
    assert!(
        error.contains("create the container with --monitor"),
        "{error}"
    );
    let namespaces = scene.config["linux"]["namespaces"].as_array_mut().unwrap();
    namespaces.retain(|namespace| namespace["type"] != "user");
    for map in ["uidMappings", "gidMappings"] {
        scene.config["linux"][map].take();
    }
    let error = scene.ct(&["create", "--monitor", "ID"]).stderr;
    assert!(error.contains("needs no help"), "{error}");
}

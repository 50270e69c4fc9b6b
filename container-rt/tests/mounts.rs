// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Mounts that come and go while a container runs.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "tests fail by panicking and skip by a line"
)]

mod scene;

use std::os::unix::fs::{MetadataExt, chown, symlink};

use scene::{Ended, Scene, can_run};
use serde_json::{Value, json};

fn change(scene: &Scene, verb: &str, list: &Value) -> Ended {
    let file = scene.path("mounts.json");
    std::fs::write(&file, list.to_string()).unwrap();
    scene.ct(&["mounts", verb, "ID", file.to_str().unwrap()])
}

fn bind(scene: &Scene, destination: &str, options: &[&str]) -> Value {
    let source = scene.path("data");
    json!([{ "destination": destination, "type": "bind", "source": source, "options": options }])
}

/// A running container, and a folder of the host with a file in it.
fn running(scene: Scene) -> Scene {
    std::fs::create_dir_all(scene.path("data/own")).unwrap();
    std::fs::write(scene.path("data/file"), "data\n").unwrap();
    chown(scene.path("data"), Some(7), Some(7)).unwrap();
    scene.start(&[]);
    scene
}

#[test]
fn a_folder_comes_and_goes() {
    if !can_run() {
        return;
    }
    for scene in [
        Scene::new(&["sleep", "100"]),
        Scene::new(&["sleep", "100"]).unprivileged(),
    ] {
        let scene = running(scene);
        change(
            &scene,
            "add",
            &bind(&scene, "/srv/deep/data", &["rbind", "rro", "nodev"]),
        )
        .ok();
        assert_eq!(scene.exec("cat /srv/deep/data/file").ok(), "data\n");
        let refused = scene.exec("mkdir /srv/deep/data/new");
        assert_ne!(refused.code, Some(0), "read-only");
        let line = scene.exec("grep /srv/deep/data /proc/self/mountinfo").ok();
        assert!(line.contains(" ro,nodev"), "{line}");
        change(
            &scene,
            "remove",
            &json!([{ "destination": "/srv/deep/data" }]),
        )
        .ok();
        assert_ne!(scene.exec("cat /srv/deep/data/file").code, Some(0));
        let again = change(
            &scene,
            "remove",
            &json!([{ "destination": "/srv/deep/data" }]),
        );
        assert_ne!(again.code, Some(0), "there is none any more");
    }
}

#[test]
fn a_tmpfs_begins_with_what_the_image_has() {
    if !can_run() {
        return;
    }
    let script = "cat /srv/sub/file; echo more >>/srv/sub/file; busybox readlink /srv/link; \
        busybox stat -c '%a %u %g' /srv /srv/sub/file /none; grep -c '^tmpfs /srv tmpfs .*nosuid.*size=1024k' /proc/mounts; \
        echo x >/dev/null || echo no";
    for user_namespace in [false, true] {
        let mut scene = Scene::new(&["sh", "-c", script]);
        if user_namespace {
            scene = scene.unprivileged();
        }
        let outside = scene.path("outside");
        std::fs::create_dir(&outside).unwrap();
        std::fs::write(outside.join("secret"), "the host's\n").unwrap();
        let folder = scene.path("rootfs/srv");
        std::fs::create_dir_all(folder.join("sub")).unwrap();
        std::fs::write(folder.join("sub/file"), "kept\n").unwrap();
        symlink(&outside, folder.join("link")).unwrap();
        std::os::unix::fs::chown(folder.join("sub/file"), Some(7), Some(8)).unwrap();
        symlink(&outside, scene.path("rootfs/up")).unwrap();
        let mode = |mode| std::os::unix::fs::PermissionsExt::from_mode(mode);
        std::fs::set_permissions(&folder, mode(0o750)).unwrap();
        for (place, more) in [("/srv", "size=1m"), ("/none", "mode=1711")] {
            let mount = json!({ "destination": place, "type": "tmpfs", "source": "tmpfs",
                "options": ["rw", "rprivate", "nosuid", "nodev", "tmpcopyup", more] });
            scene.config["mounts"].as_array_mut().unwrap().push(mount);
        }
        let expected = format!(
            "kept\n{}\n750 0 0\n644 7 8\n1711 0 0\n1\n",
            outside.display()
        );
        assert_eq!(scene.ct(&["run", "ID"]).ok(), expected);
        let file = std::fs::read_to_string(folder.join("sub/file")).unwrap();
        assert_eq!(file, "kept\n", "the image is as it was");

        // A link of the image leads to what is in the image.
        scene.config["process"]["args"] = json!(["cat", "/up/secret"]);
        let mounts = scene.config["mounts"].as_array_mut().unwrap();
        mounts.last_mut().unwrap()["destination"] = json!("/up");
        let ended = scene.ct(&["run", "ID"]);
        assert!(
            ended.code != Some(0) && ended.stdout.is_empty(),
            "{}",
            ended.stdout
        );
        let left = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(
            !left.contains(scene.directory.path().to_str().unwrap()),
            "{left}"
        );
    }
}

#[test]
fn a_mapped_folder_has_the_containers_owners() {
    if !can_run() {
        return;
    }
    let scene = running(Scene::new(&["sleep", "100"]).unprivileged());
    change(
        &scene,
        "add",
        &bind(&scene, "/mnt", &["rbind", "rw", "idmap"]),
    )
    .ok();
    change(&scene, "add", &bind(&scene, "/raw", &["rbind"])).ok();
    assert_eq!(scene.exec("busybox stat -c %u /mnt").ok(), "7\n");
    assert_eq!(
        scene.exec("busybox stat -c %u /raw").ok(),
        "65534\n",
        "an owner of the host"
    );
    scene.exec("mkdir /mnt/own/new").ok();
    let made = std::fs::metadata(scene.path("data/own/new")).unwrap();
    assert_eq!(
        (made.uid(), made.gid()),
        (0, 0),
        "on disk the container's own ids"
    );
}

#[test]
fn what_is_in_use_stays() {
    if !can_run() {
        return;
    }
    let scene = running(Scene::new(&["sh", "-c", "cd /mnt; sleep 100"]));
    // The program has gone to a folder of its own; one that works in the mount holds it.
    change(&scene, "add", &bind(&scene, "/mnt", &["bind"])).ok();
    let held = ["exec", "--detach", "--cwd", "/mnt", "ID", "sleep", "100"];
    assert_eq!(scene.quiet(&held), Some(0));
    let busy = change(&scene, "remove", &json!([{ "destination": "/mnt" }]));
    assert_ne!(busy.code, Some(0));
    assert!(busy.stderr.contains("busy"), "{}", busy.stderr);
    assert_eq!(scene.exec("cat /mnt/file").ok(), "data\n");
}

#[test]
fn links_in_the_container_lead_nowhere_else() {
    if !can_run() {
        return;
    }
    let scene = Scene::new(&["sleep", "100"]).unprivileged();
    let outside = scene.path("outside");
    std::fs::create_dir(&outside).unwrap();
    let rootfs = scene.path("rootfs");
    symlink("../../../../../../outside", rootfs.join("up")).unwrap();
    symlink(&outside, rootfs.join("absolute")).unwrap();
    symlink("/proc/1/root", rootfs.join("magic")).unwrap();
    let scene = running(scene);
    for destination in ["/up/a", "/absolute/a", "/magic/a"] {
        let _ = change(&scene, "add", &bind(&scene, destination, &["rbind"]));
    }
    let left = std::fs::read_dir(&outside).unwrap().count();
    assert_eq!(left, 0, "nothing was made outside of the root");
    let host = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!host.contains("/outside"), "and nothing mounted");
    // /proc/1/root of the container is its own root, and is not followed all the same.
    assert_ne!(scene.exec("cat /a/file").code, Some(0));
}

#[test]
fn other_mounts_are_refused() {
    if !can_run() {
        return;
    }
    let scene = running(Scene::new(&["sleep", "100"]));
    for (mount, named) in [
        (
            json!({ "destination": "/x", "type": "tmpfs", "source": "tmpfs" }),
            "only bind mounts",
        ),
        (
            json!({ "destination": "/x", "source": "data", "options": ["bind"] }),
            "absolute source",
        ),
        (
            json!({ "destination": "/x", "source": "/tmp", "options": ["bind", "size=1"] }),
            "option size=1",
        ),
        (
            json!({ "destination": "/x", "source": "/none/such", "options": ["bind"] }),
            "/none/such",
        ),
    ] {
        let refused = change(&scene, "add", &json!([mount]));
        assert_ne!(refused.code, Some(0));
        assert!(refused.stderr.contains(named), "{}", refused.stderr);
    }
    scene.ct(&["kill", "ID", "KILL"]).ok();
    scene.wait_status("stopped");
    let ended = change(&scene, "add", &bind(&scene, "/x", &["bind"]));
    assert!(ended.stderr.contains("is stopped"), "{}", ended.stderr);
}

#[test]
fn devices_come_and_go() {
    if can_run() {
        scene::devices::come_and_go();
    }
}

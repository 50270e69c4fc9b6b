// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Root file systems in layers that containers share.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "tests fail by panicking and skip by a line"
)]

mod scene;

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use scene::{Scene, can_run};
use serde_json::json;

/// A file system that can be an upper layer and be idmapped, which the machine's own may not: an image of ext4, mounted
/// for as long as the value lives.
struct Disk<'a>(&'a Path);

impl<'a> Disk<'a> {
    fn new(folder: &'a Path) -> Option<Self> {
        std::fs::create_dir_all(folder).unwrap();
        let image = folder.with_extension("img");
        let file = std::fs::File::create(&image).unwrap();
        file.set_len(32 << 20).unwrap();
        let run = |program: &str, arguments: &[&str]| {
            let output = Command::new(program).args(arguments).output();
            output.is_ok_and(|output| output.status.success())
        };
        let (image, target) = (image.to_str().unwrap(), folder.to_str().unwrap());
        let mounted =
            run("mkfs.ext4", &["-q", "-F", image]) && run("mount", &["-o", "loop", image, target]);
        if !mounted {
            println!("ATOLL-SKIP: no loop devices here");
            return None;
        }
        Some(Self(folder))
    }
}

impl Drop for Disk<'_> {
    fn drop(&mut self) {
        Command::new("umount").arg("-l").arg(self.0).status().ok();
    }
}

fn write(path: &Path, text: &str) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, text).unwrap();
}

/// Moves the scene's root file system into the lowest of three layers.
fn layered(scene: &mut Scene, disk: &Path, upper: &str) {
    let bottom = disk.join("bottom");
    if !bottom.exists() {
        let copied = Command::new("cp")
            .arg("-a")
            .arg(scene.path("rootfs"))
            .arg(&bottom)
            .status();
        assert!(copied.unwrap().success());
        write(&bottom.join("etc/kept"), "bottom\n");
        write(&bottom.join("etc/changed"), "bottom\n");
        write(&bottom.join("etc/gone"), "bottom\n");
        let top = disk.join("top");
        write(&top.join("etc/changed"), "top\n");
        // overlayfs.rst: a whiteout is a character device 0:0.
        let gone = top.join("etc/gone");
        let made = Command::new("mknod")
            .arg(gone)
            .args(["c", "0", "0"])
            .status();
        assert!(made.unwrap().success());
    }
    for name in ["upper", "work"] {
        std::fs::create_dir_all(disk.join(upper).join(name)).unwrap();
    }
    let name = |name: &str| disk.join(name).display().to_string();
    let annotations = &mut scene.config["annotations"];
    if annotations.is_null() {
        *annotations = json!({});
    }
    annotations["dev.atoll.rootfs.lower"] = json!(format!("{}:{}", name("top"), name("bottom")));
    annotations["dev.atoll.rootfs.upper"] = json!(name(upper));
}

#[test]
fn containers_share_their_layers() {
    if !can_run() {
        return;
    }
    let ground = tempfile::tempdir().unwrap();
    let folder = ground.path().join("disk");
    let Some(disk) = Disk::new(&folder) else {
        return;
    };
    let new = || Scene::new(&["sleep", "100"]);
    let mut scenes = [new(), new().unprivileged(), new().unprivileged()];
    let map = json!([{ "containerID": 0, "hostID": 1_300_000, "size": 65536 }]);
    scenes[2].config["linux"]["uidMappings"] = map.clone();
    scenes[2].config["linux"]["gidMappings"] = map;
    for (number, scene) in scenes.iter_mut().enumerate() {
        layered(scene, disk.0, &format!("upper{number}"));
        scene.start(&[]);
    }
    for (number, scene) in scenes.iter().enumerate() {
        let seen = scene.exec("cat /etc/kept /etc/changed").ok();
        assert_eq!(seen, "bottom\ntop\n");
        assert_ne!(scene.exec("cat /etc/gone").code, Some(0), "whited out");
        assert_eq!(scene.exec("busybox stat -c %u:%g /etc/kept").ok(), "0:0\n");
        let script = format!("echo {number} > /etc/kept; mkdir /etc/new");
        scene.ct(&["exec", "ID", "sh", "-c", &script]).ok();
    }
    for (number, scene) in scenes.iter().enumerate() {
        assert_eq!(scene.exec("cat /etc/kept").ok(), format!("{number}\n"));
        let upper = disk.0.join(format!("upper{number}/upper/etc"));
        let made = std::fs::metadata(upper.join("new")).unwrap();
        assert_eq!(
            (made.uid(), made.gid()),
            (0, 0),
            "on disk the container's own ids"
        );
        scene.ct(&["delete", "--force", "ID"]).ok();
    }
    let kept = std::fs::read_to_string(disk.0.join("bottom/etc/kept")).unwrap();
    assert_eq!(kept, "bottom\n", "the shared layer is as it was");
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains("upper0"), "no mount is left");
}

#[test]
fn wrong_layers_are_refused() {
    if !can_run() {
        return;
    }
    for (lower, upper, named) in [
        ("/none/such", Some("/tmp"), "/none/such"),
        ("relative", Some("/tmp"), "not absolute"),
        ("/tmp", None, "belongs together"),
    ] {
        let mut scene = Scene::new(&["true"]);
        let mut annotations = json!({ "dev.atoll.rootfs.lower": lower });
        if let Some(upper) = upper {
            annotations["dev.atoll.rootfs.upper"] = json!(upper);
        }
        scene.config["annotations"] = annotations;
        let refused = scene.ct(&["run", "ID"]);
        assert_ne!(refused.code, Some(0));
        assert!(refused.stderr.contains(named), "{}", refused.stderr);
    }
}

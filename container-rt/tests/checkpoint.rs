// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Checkpoint and restore, with a real CRIU: what a program holds goes on, what is outside is found again, and what
//! cannot be done says why.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "tests fail by panicking and skip by a line"
)]

mod scene;

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use scene::{Scene, can_run, criu, wait_for};
use serde_json::json;

/// Counts in its memory, and says how far it is in a file and on its standard output.
const COUNT: &str = "i=0; while :; do i=$((i+1)); echo $i > /tmp/now; mv /tmp/now /tmp/count; echo $i; sleep 0.1; done";

/// A scene whose files of a checkpoint are in `images`.
struct Frozen {
    scene: Scene,
    criu: String,
}

impl Frozen {
    fn new(criu: &Path, scene: Scene) -> Self {
        let criu = criu.to_str().unwrap().to_owned();
        Self { scene, criu }
    }

    fn arguments<'a>(&'a self, command: &'a str, options: &[&'a str]) -> Vec<&'a str> {
        let mut words = vec!["--criu", &self.criu, command, "--image-path", "images"];
        words.extend(options);
        words.push("ID");
        words
    }

    #[track_caller]
    fn checkpoint(&self, options: &[&str]) {
        let ended = self.scene.ct(&self.arguments("checkpoint", options));
        assert_eq!(ended.code, Some(0), "{}{}", ended.stderr, self.log("dump"));
    }

    #[track_caller]
    fn restore(&self, options: &[&str]) {
        let mut words = vec!["--detach"];
        words.extend(options);
        let code = self.scene.quiet(&self.arguments("restore", &words));
        assert_eq!(code, Some(0), "{}", self.log("restore"));
    }

    /// What the log says about errors.
    fn log(&self, name: &str) -> String {
        let path = self.scene.path("images").join(format!("{name}.log"));
        let text = std::fs::read_to_string(path).unwrap_or_default();
        let errors = text.lines().filter(|line| line.contains("Error"));
        errors.collect::<Vec<_>>().join("\n")
    }

    /// How far the program is.
    fn count(&self) -> u64 {
        let text = std::fs::read_to_string(self.scene.path("rootfs/tmp/count"));
        text.ok().and_then(|t| t.trim().parse().ok()).unwrap_or(0)
    }

    #[track_caller]
    fn wait_beyond(&self, count: u64) {
        wait_for("the program counts", || self.count() > count);
    }
}

/// `run --detach` without anybody's pipe.
#[track_caller]
fn run_detached(scene: &Scene) {
    let mut command = scene.command(&["run", "--detach", "ID"]);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    assert!(command.status().unwrap().success());
}

#[test]
fn a_program_goes_on_where_it_was() {
    let Some(criu) = criu() else { return };
    let frozen = Frozen::new(&criu, Scene::new(&["sh", "-c", COUNT]));
    let scene = &frozen.scene;
    run_detached(scene);
    frozen.wait_beyond(3);

    frozen.checkpoint(&["--leave-running"]);
    assert_eq!(scene.state()["status"], "running");
    frozen.wait_beyond(frozen.count());

    // Twice: a restored container is a container.
    for _ in 0..2 {
        frozen.checkpoint(&[]);
        let gone = scene.ct(&["state", "ID"]);
        assert!(gone.stderr.contains("does not exist"), "{}", gone.stderr);
        assert!(scene.cgroups().is_empty(), "{:?}", scene.cgroups());
        let count = frozen.count();
        assert!(count >= 3);
        frozen.restore(&["--pid-file", "pid"]);
        let state = scene.state();
        assert_eq!(state["status"], "running");
        let pid = std::fs::read_to_string(scene.path("pid")).unwrap();
        assert_eq!(state["pid"].to_string(), pid);
        // It does not begin again at 1.
        frozen.wait_beyond(count);
        let seen = scene.exec("cat /proc/1/cmdline").ok();
        assert!(seen.contains("while"), "{seen}");
        // What came by exec goes on, too.
        let left = "sleep 1000 </dev/null >/dev/null 2>&1 &";
        scene.ct(&["exec", "ID", "sh", "-c", left]).ok();
    }
    let processes = scene.ct(&["ps", "ID"]).ok();
    assert!(processes.contains("sleep 1000"), "{processes}");
    scene.ct(&["kill", "ID", "KILL"]).ok();
    scene.wait_status("stopped");
    scene.ct(&["delete", "ID"]).ok();
    assert!(scene.cgroups().is_empty(), "{:?}", scene.cgroups());
}

#[test]
fn limits_and_what_is_outside_come_from_config_json() {
    let Some(criu) = criu() else { return };
    let mut scene = Scene::new(&["sh", "-c", COUNT]);
    std::fs::create_dir(scene.path("data")).unwrap();
    std::fs::write(scene.path("data/file"), "first").unwrap();
    std::fs::write(scene.path("single"), "single").unwrap();
    std::os::unix::fs::symlink("/real", scene.path("rootfs/link")).unwrap();
    std::fs::create_dir(scene.path("rootfs/real")).unwrap();
    let mounts = scene.config["mounts"].as_array_mut().unwrap();
    mounts.extend([
        json!({ "destination": "/link/data", "source": "data", "options": ["bind", "ro"] }),
        json!({ "destination": "/link/data/in", "source": "data", "options": ["bind"] }),
        json!({ "destination": "/etc/single", "type": "bind", "source": "single", "options": ["rbind"] }),
    ]);
    std::fs::create_dir(scene.path("data/in")).unwrap();
    // Without its namespace cgroups are bound, on v1.
    let namespaces = scene.config["linux"]["namespaces"].as_array_mut().unwrap();
    namespaces.retain(|namespace| namespace["type"] != "cgroup");
    scene.config["linux"]["resources"]["pids"] = json!({ "limit": 50 });
    let log = scene.path("hook.log");
    let script = format!("echo $(grep -o '\"pid\":[0-9]*') >> {}", log.display());
    scene.config["hooks"] = json!({
        "createRuntime": [{ "path": "/bin/sh", "args": ["sh", "-c", script] }],
    });
    let mut frozen = Frozen::new(&criu, scene);
    run_detached(&frozen.scene);
    frozen.wait_beyond(0);
    frozen.scene.ct(&["pause", "ID"]).ok();
    frozen.checkpoint(&["--manage-cgroups-mode", "ignore"]);

    // Another copy of the image, another place in the host, other limits.
    for made in ["rootfs/real/data", "data/in"] {
        std::fs::remove_dir(frozen.scene.path(made)).unwrap();
    }
    std::fs::remove_file(frozen.scene.path("rootfs/etc/single")).unwrap();
    std::fs::rename(frozen.scene.path("data"), frozen.scene.path("moved")).unwrap();
    std::fs::write(frozen.scene.path("moved/file"), "second").unwrap();
    for mount in frozen.scene.config["mounts"].as_array_mut().unwrap() {
        if mount["source"] == "data" {
            mount["source"] = json!("moved");
        }
    }
    frozen.scene.config["linux"]["resources"]["pids"] = json!({ "limit": 60 });
    frozen.restore(&["--manage-cgroups-mode", "ignore"]);
    let scene = &frozen.scene;
    assert_eq!(scene.exec("cat /real/data/file").ok(), "second");
    assert_eq!(scene.exec("cat /link/data/in/file").ok(), "second");
    assert_eq!(scene.exec("cat /etc/single").ok(), "single");
    assert!(
        scene
            .exec("mkdir /real/data/new")
            .stderr
            .contains("Read-only")
    );
    let limit = |d: PathBuf| std::fs::read_to_string(d.join("pids.max")).ok();
    let limits: Vec<_> = scene.cgroups().into_iter().filter_map(limit).collect();
    assert_eq!(limits, ["60\n"]);
    let hooks = std::fs::read_to_string(log).unwrap();
    assert_eq!(
        hooks.lines().count(),
        2,
        "at creation and at restore: {hooks}"
    );
    let ours = format!("\"pid\":{}", scene.state()["pid"]);
    assert_eq!(hooks.lines().last(), Some(ours.as_str()));
}

#[test]
fn an_unprivileged_container_keeps_its_ids() {
    let Some(criu) = criu() else { return };
    let frozen = Frozen::new(&criu, Scene::new(&["sh", "-c", COUNT]).unprivileged());
    let scene = &frozen.scene;
    run_detached(scene);
    frozen.wait_beyond(0);
    for _ in 0..2 {
        frozen.checkpoint(&[]);
        frozen.restore(&[]);
        let map = scene.exec("cat /proc/1/uid_map").ok();
        let map: Vec<_> = map.split_whitespace().collect();
        assert_eq!(map, ["0", "1200000", "65536"]);
        assert_eq!(scene.exec("id -u").ok(), "0\n");
        frozen.wait_beyond(frozen.count());
    }
    // What it writes still belongs to root in its image.
    assert_eq!(
        std::fs::metadata(scene.path("rootfs/tmp/count"))
            .unwrap()
            .uid(),
        0
    );
    let images = std::fs::metadata(scene.path("images")).unwrap();
    assert_eq!(images.mode() & 0o007, 0, "memory is nobody else's business");
}

#[test]
fn a_monitor_serves_the_restored_console() {
    let Some(criu) = criu() else { return };
    for terminal in [true, false] {
        let mut scene = Scene::new(&["sh", "-c", COUNT]);
        scene.config["process"]["terminal"] = json!(terminal);
        let frozen = Frozen::new(&criu, scene);
        let scene = &frozen.scene;
        scene.start(&["--monitor"]);
        frozen.wait_beyond(2);
        frozen.checkpoint(&[]);
        let count = frozen.count();
        let words = frozen.arguments("restore", &["--monitor"]);
        assert_eq!(scene.quiet(&words), Some(0), "{}", frozen.log("restore"));
        let log = scene.path("run").join(&scene.id).join("console.log");
        let seen = || std::fs::read_to_string(&log).unwrap_or_default();
        wait_for("output", || seen().lines().count() > 2);
        let first: u64 = seen().lines().next().unwrap().trim().parse().unwrap();
        assert!(first > 2 && first <= count + 2, "{first} after {count}");
        scene.ct(&["kill", "ID", "KILL"]).ok();
        wait_for("exit record", || scene.state()["exitCode"] == 137);
        scene.ct(&["delete", "ID"]).ok();
    }
}

#[test]
fn a_restore_in_the_foreground_answers_the_exit_code() {
    let Some(criu) = criu() else { return };
    let script =
        "echo began > /tmp/count; until test -e /tmp/go; do sleep 0.1; done; echo ended; exit 7";
    let mut scene = Scene::new(&["sh", "-c", script]);
    scene.config["process"]["args"][2] = json!(script.replace("test -e", "grep -q . "));
    let frozen = Frozen::new(&criu, scene);
    let scene = &frozen.scene;
    let mut command = scene.command(&["run", "ID"]);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    let running = command.spawn().unwrap();
    wait_for("the program's start", || {
        scene.path("rootfs/tmp/count").exists()
    });
    frozen.checkpoint(&[]);
    let ended = running.wait_with_output().unwrap();
    assert_eq!((ended.status.code(), ended.stdout), (Some(137), Vec::new()));
    std::fs::write(scene.path("rootfs/tmp/go"), "x").unwrap();
    let ended = scene.ct(&frozen.arguments("restore", &[]));
    assert_eq!(
        (ended.code, ended.stdout.as_str()),
        (Some(7), "ended\n"),
        "{}",
        ended.stderr
    );
    assert_eq!(scene.ct(&["list", "-q"]).ok(), "");
}

#[test]
fn what_cannot_be_done_says_why_and_leaves_the_container() {
    let Some(criu) = criu() else { return };
    let scene = Scene::new(&["sh", "-c", COUNT]);
    // A file outside of the container, which a restore would not find.
    let output = std::fs::File::create(scene.path("outside")).unwrap();
    let mut command = scene.command(&["run", "--detach", "ID"]);
    command
        .stdin(Stdio::null())
        .stdout(output)
        .stderr(Stdio::null());
    assert!(command.status().unwrap().success());
    let frozen = Frozen::new(&criu, scene);
    frozen.wait_beyond(0);
    let refused = |options: &[&str], wanted: &[&str]| {
        let ended = frozen.scene.ct(&frozen.arguments("checkpoint", options));
        assert_eq!(ended.code, Some(1), "{options:?}");
        for wanted in wanted {
            assert!(ended.stderr.contains(wanted), "{wanted}: {}", ended.stderr);
        }
        assert_eq!(ended.stderr.lines().count(), 1, "{}", ended.stderr);
        assert_eq!(frozen.scene.state()["status"], "running");
    };
    refused(
        &[],
        &["criu: Error", "path=", "/outside", "see images/dump.log"],
    );
    refused(&["--work-path", "work"], &["/outside", "see work/dump.log"]);
    refused(
        &["--parent-path", "/x"],
        &["--parent-path /x: must be relative"],
    );
    refused(
        &["--parent-path", "../x"],
        &["--parent-path ../x: there is no"],
    );
    refused(&["--lazy-pages"], &["--lazy-pages is not supported"]);
    refused(
        &["--page-server", "[::1]:1"],
        &["--page-server is not supported"],
    );
    let count = frozen.count();
    frozen.wait_beyond(count);
}

#[test]
fn what_is_missing_is_named() {
    if !can_run() {
        return;
    }
    let scene = Scene::new(&["sleep", "1000"]);
    run_detached(&scene);
    let ended = scene.ct(&["--criu", "/nonexistent/criu", "checkpoint", "ID"]);
    assert!(
        ended.stderr.contains("Debian package criu"),
        "{}",
        ended.stderr
    );
    // One that ends before it has a log.
    let ended = scene.ct(&["--criu", "/bin/false", "checkpoint", "ID"]);
    assert!(
        ended.stderr.contains("criu: it ended with exit code 1"),
        "{}",
        ended.stderr
    );
    scene.ct(&["delete", "--force", "ID"]).ok();

    let ended = scene.ct(&["restore", "--image-path", "none", "ID"]);
    assert!(
        ended.stderr.contains("--image-path none: there is no"),
        "{}",
        ended.stderr
    );
    assert_eq!(scene.ct(&["list", "-q"]).ok(), "");
    assert!(scene.cgroups().is_empty(), "{:?}", scene.cgroups());
    let ended = scene.ct(&["checkpoint", "ID"]);
    assert!(ended.stderr.contains("does not exist"), "{}", ended.stderr);
}

#[test]
fn what_a_monitor_holds_is_not_saved() {
    if !can_run() {
        return;
    }
    let mut scene = Scene::new(&["sleep", "1000"]);
    scene.config["annotations"] = json!({ "dev.atoll.terminals": "1" });
    scene.start(&["--monitor"]);
    let ended = scene.ct(&["checkpoint", "ID"]);
    assert!(
        ended.stderr.contains("dev.atoll.terminals"),
        "{}",
        ended.stderr
    );
    assert_eq!(scene.state()["status"], "running");
    scene.ct(&["delete", "--force", "ID"]).ok();
    assert_eq!(scene.quiet(&["create", "ID"]), Some(0));
    let ended = scene.ct(&["checkpoint", "ID"]);
    assert!(
        ended.stderr.contains("only a running container"),
        "{}",
        ended.stderr
    );
}

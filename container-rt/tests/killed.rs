// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The runtime is killed while a hook runs, of each kind: afterwards the container is found as what it is, deleting it
//! leaves nothing on the host, and its id is free.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "tests fail by panicking and skip by a line"
)]

mod scene;

use std::path::PathBuf;
use std::process::{Child, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use scene::{Scene, can_run, wait_for};
use serde_json::json;

/// Every kind of hook, the command that runs it, and what the container is when that command has been killed in it;
/// nothing, where the container is gone by then.
const HOOKS: &[(&str, &str, Option<&str>)] = &[
    ("prestart", "create", Some("creating")),
    ("createRuntime", "create", Some("creating")),
    ("createContainer", "create", Some("creating")),
    ("startContainer", "start", Some("running")),
    ("poststart", "start", Some("running")),
    ("poststop", "delete", None),
];

/// A hook that says that it runs and goes on when it is told to. The runtime's hooks and the container's see the
/// folder of these two files under different names.
struct Hook {
    folder: PathBuf,
}

impl Hook {
    fn of(scene: &mut Scene, kind: &str) -> Self {
        let folder = scene.path("rootfs/tmp");
        let seen = match kind {
            "startContainer" => "/tmp",
            _ => folder.to_str().unwrap(),
        };
        let script = format!("echo >{seen}/here; while [ ! -e {seen}/go ]; do sleep 0.05; done");
        scene.config["hooks"] = json!({ kind: [
            { "path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/bin:/usr/bin"] }
        ]});
        Self { folder }
    }

    fn wait(&self) {
        wait_for("the hook", || self.folder.join("here").exists());
    }

    fn go_on(&self) {
        std::fs::write(self.folder.join("go"), "").unwrap();
    }
}

/// The process that does the work of a command: the monitor creates in its place.
fn worker(command: &Child, is_monitor: bool) -> Pid {
    let pid = command.id();
    if !is_monitor {
        return Pid::from_raw(pid.cast_signed());
    }
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    Pid::from_raw(children.trim().parse().unwrap())
}

/// Processes that see a mount of the scene, or whose command names it: what a container or a runtime has left behind.
fn left(scene: &Scene) -> Vec<String> {
    let name = scene
        .directory
        .path()
        .file_name()
        .unwrap()
        .to_str()
        .unwrap();
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap() {
        let process = entry.unwrap().path();
        for file in ["mountinfo", "cmdline"] {
            // It is no process, or has just ended.
            let text = std::fs::read(process.join(file)).unwrap_or_default();
            if String::from_utf8_lossy(&text).contains(name) {
                found.push(process.join(file).display().to_string());
            }
        }
    }
    found
}

fn check(kind: &str, verb: &str, status: Option<&str>, options: &[&str]) {
    let what = format!("{kind} {options:?}");
    let mut scene = Scene::new(&["sleep", "1000"]);
    let hook = Hook::of(&mut scene, kind);
    let words = |verb| match verb {
        "create" => [&["create"], options, &["ID"]].concat(),
        "delete" => vec!["delete", "--force", "ID"],
        verb => vec![verb, "ID"],
    };
    let before = ["create", "start", "delete"];
    for before in before.into_iter().take_while(|before| *before != verb) {
        assert_eq!(scene.quiet(&words(before)), Some(0), "{what}: {before}");
    }
    let mut command = scene.command(&words(verb));
    let command = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let mut command = command.spawn().unwrap();
    hook.wait();
    let is_monitor = verb == "create" && !options.is_empty();
    kill(worker(&command, is_monitor), Signal::SIGKILL).unwrap();
    let mut ended = None;
    wait_for(&format!("{what}: the command's end"), || {
        ended = command.try_wait().unwrap();
        ended.is_some()
    });
    assert_eq!(ended.unwrap().code(), is_monitor.then_some(1), "{what}");

    match status {
        Some(status) => assert_eq!(scene.state()["status"], status, "{what}"),
        None => assert!(scene.ct(&["state", "ID"]).stderr.contains("does not exist")),
    }
    if status == Some("running") {
        // What was to start goes on without who started it.
        hook.go_on();
        wait_for("the program", || {
            scene.exec("cat /proc/1/cmdline").stdout == "sleep\x001000\0"
        });
        assert_eq!(scene.state()["status"], "running", "{what}");
    }
    scene.ct(&["delete", "--force", "ID"]).ok();
    // One of the host's hooks ends by itself; nobody but its author knows how to end it.
    hook.go_on();
    wait_for(&format!("{what}: nothing is left"), || {
        left(&scene).is_empty()
    });
    assert!(scene.cgroups().is_empty(), "{what}: {:?}", scene.cgroups());
    assert!(!scene.path("run").join(&scene.id).exists(), "{what}");

    scene.config["process"]["args"] = json!(["echo", "again"]);
    assert_eq!(scene.ct(&["run", "ID"]).ok(), "again\n", "{what}");
}

#[test]
fn a_runtime_killed_in_a_hook_leaves_nothing() {
    if !can_run() {
        return;
    }
    for (kind, verb, status) in HOOKS {
        check(kind, verb, *status, &[]);
    }
}

#[test]
fn a_monitor_killed_in_a_hook_leaves_nothing() {
    if !can_run() {
        return;
    }
    for (kind, verb, status) in HOOKS {
        check(kind, verb, *status, &["--monitor"]);
    }
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Commands beside the lifecycle: update, events, console; and what `start` is told by the init.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "tests fail by panicking and skip by a line"
)]

mod scene;

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use scene::{Scene, can_run, wait_for};
use serde_json::{Value, json};

#[test]
fn start_tells_what_kept_the_program_from_running() {
    if !can_run() {
        return;
    }
    let mut scene = Scene::new(&["sleep", "1000"]);
    let hook = json!([{ "path": "/bin/sh", "args": ["sh", "-c", "exit 7"] }]);
    scene.config["hooks"] = json!({ "startContainer": hook });
    assert_eq!(scene.quiet(&["create", "ID"]), Some(0));
    let failed = scene.ct(&["start", "ID"]);
    assert_eq!(failed.code, Some(1));
    let expected = "error running hook /bin/sh: exit status 7";
    assert!(failed.stderr.contains(expected), "{}", failed.stderr);
    scene.wait_status("stopped");
}

#[test]
fn limits_by_flags_with_units_and_by_document() {
    if !can_run() {
        return;
    }
    let scene = Scene::new(&["sleep", "1000"]);
    scene.start(&[]);
    let read = |names: [&str; 2]| {
        let files = scene.cgroups();
        let files = files.iter().flat_map(|d| names.map(|name| d.join(name)));
        let mut texts = files.filter_map(|file| std::fs::read_to_string(file).ok());
        texts.next().map(|text| text.trim().to_owned())
    };
    let memory = ["memory.limit_in_bytes", "memory.max"];
    if read(memory).is_none() {
        println!("ATOLL-SKIP: this host has no memory controller");
        return;
    }
    scene.ct(&["update", "ID", "--memory", "48M"]).ok();
    assert_eq!(read(memory).unwrap(), (48 << 20).to_string());
    scene.ct(&["update", "--memory", "-1", "ID"]).ok();
    assert_ne!(read(memory).unwrap(), (48 << 20).to_string());
    let document = json!({ "memory": { "limit": 40 << 20 }, "pids": { "limit": 55 } });
    std::fs::write(scene.path("limits.json"), document.to_string()).unwrap();
    scene.ct(&["update", "-r", "limits.json", "ID"]).ok();
    assert_eq!(read(memory).unwrap(), (40 << 20).to_string());
    let stats: Value = serde_json::from_str(&scene.ct(&["events", "--stats", "ID"]).ok()).unwrap();
    assert_eq!(
        (&stats["type"], &stats["id"]),
        (&json!("stats"), &json!(scene.id))
    );
    assert_eq!(stats["data"]["memory"]["usage"]["limit"], 40 << 20);
}

#[test]
fn events_end_with_the_container() {
    if !can_run() {
        return;
    }
    let scene = Scene::new(&["sleep", "1000"]);
    scene.start(&[]);
    let mut follow = scene.command(&["events", "--interval", "50ms", "ID"]);
    let mut follow = follow.stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(follow.stdout.take().unwrap()).lines();
    let first = lines.next().unwrap().unwrap();
    assert!(first.starts_with("{\"type\":\"stats\",\"id\":"), "{first}");
    scene.ct(&["delete", "--force", "ID"]).ok();
    assert!(lines.all(|line| line.is_ok()));
    follow.wait().unwrap();
}

#[test]
fn the_console_command_attaches_a_terminal() {
    if !can_run() {
        return;
    }
    let mut scene = Scene::new(&["sh"]);
    scene.config["process"]["terminal"] = json!(true);
    scene.start(&["--monitor"]);
    let console = scene.command(&["console", "ID"]);
    let words = std::iter::once(console.get_program()).chain(console.get_args());
    let line: Vec<String> = words
        .map(|word| format!("'{}'", word.to_string_lossy()))
        .collect();
    // script(1) is the user's terminal.
    let mut script = Command::new("script");
    script.args(["-qec", &line.join(" "), "/dev/null"]);
    script.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut user = script.spawn().unwrap();
    let mut keys = user.stdin.take().unwrap();
    let log = scene.path("run").join(&scene.id).join("console.log");
    keys.write_all(b"echo mark$((6*7))\n").unwrap();
    wait_for("the answer", || {
        std::fs::read_to_string(&log).is_ok_and(|text| text.contains("mark42"))
    });
    // Ctrl-] detaches; the container goes on.
    keys.write_all(&[0x1d]).unwrap();
    let output = user.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains("mark42"), "{text}");
    assert_eq!(scene.state()["status"], "running");
}

/// Types a line on one of the monitor's sockets until the answer is there.
fn ask(socket: &Path, line: &str, answer: &str) -> String {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_nonblocking(true).unwrap();
    let mut said = String::new();
    let mut typed = None;
    wait_for(answer, || {
        // Whoever opens a terminal may throw away what was typed before.
        if typed.is_none_or(|at: Instant| at.elapsed() > Duration::from_secs(2)) {
            stream.write_all(line.as_bytes()).unwrap();
            typed = Some(Instant::now());
        }
        let mut bytes = [0; 4096];
        if let Ok(count) = stream.read(&mut bytes) {
            said.push_str(&String::from_utf8_lossy(&bytes[..count]));
        }
        said.contains(answer)
    });
    said
}

#[test]
fn further_terminals_are_separate_and_belong_to_the_containers_root() {
    if !can_run() {
        return;
    }
    let script =
        "for n in 1 2; do busybox setsid -c sh -i </dev/tty$n >/dev/tty$n 2>&1 & done; wait";
    let mut scene = Scene::new(&["sh", "-c", script]).unprivileged();
    scene.config["process"]["terminal"] = json!(true);
    scene.config["process"]["consoleSize"] = json!({ "width": 80, "height": 24 });
    scene.config["annotations"]["dev.atoll.terminals"] = json!("2");
    scene.start(&["--monitor"]);
    let directory = scene.path("run").join(&scene.id);
    let [first, second] = [1, 2].map(|n| directory.join(format!("tty{n}.sock")));
    ask(&first, "echo on-$((20+1)); busybox tty\n", "/dev/tty1");
    ask(
        &first,
        "busybox stat -c %u:%g:%a /dev/tty1 /dev/pts/1\n",
        "0:5:620",
    );
    let said = ask(&second, "echo on-$((20+2))\n", "on-22");
    assert!(!said.contains("on-21"), "{said}");
    scene.ct(&["resize", "ID", "91", "17", "--tty", "2"]).ok();
    ask(&second, "stty size\n", "17 91");
    ask(&first, "stty size\n", "24 80");
    let log = std::fs::read_to_string(directory.join("console.log")).unwrap();
    assert!(!log.contains("on-2"), "{log}");
    scene.ct(&["kill", "ID", "KILL"]).ok();
    wait_for("the exit record", || directory.join("exit.json").exists());
    wait_for("the sockets to go", || !first.exists() && !second.exists());

    scene.ct(&["delete", "ID"]).ok();
    scene.config["annotations"]["dev.atoll.terminals"] = json!("7");
    let refused = scene.ct(&["create", "--monitor", "ID"]);
    assert!(
        refused.stderr.contains("no number from 0 to 6"),
        "{}",
        refused.stderr
    );
}

#[test]
fn a_terminal_in_a_user_namespace_belongs_to_its_user() {
    if !can_run() {
        return;
    }
    let scene = Scene::new(&["sleep", "1000"]).unprivileged();
    scene.start(&[]);
    for user in ["0:0", "7:8"] {
        let words = ["exec", "--tty", "--user", user, "ID", "busybox", "stat"];
        let said = scene.ct(&[&words[..], &["-Lc", "%u:%g", "/proc/self/fd/0"]].concat());
        let owner = user.split(':').next().unwrap();
        assert_eq!(said.ok(), format!("{owner}:5\r\n"));
    }
}

#[test]
fn what_runs_for_too_long_is_killed_with_what_it_has_started() {
    if !can_run() {
        return;
    }
    let scene = Scene::new(&["sleep", "1000"]).unprivileged();
    scene.start(&[]);
    let within = |time: &str, script: &str| {
        let words = ["exec", "--time-max", time, "ID", "sh", "-c", script];
        scene.ct(&words)
    };
    let late = within("300ms", "sleep 2000 & trap '' TERM HUP; sleep 3000; true");
    assert_eq!(late.code, Some(255));
    assert!(
        late.stderr.contains("not ended within 0.3 s, killed"),
        "{}",
        late.stderr
    );
    wait_for("no process but the first", || {
        let left = scene.ct(&["ps", "--format", "json", "ID"]).ok();
        serde_json::from_str::<Vec<Value>>(&left).unwrap().len() == 1
    });
    let in_time = within("1m", "echo done; exit 3");
    assert_eq!((in_time.code, in_time.stdout.as_str()), (Some(3), "done\n"));
}

#[test]
fn a_host_without_systemd_says_so_whatever_its_cgroups() {
    if !can_run() {
        return;
    }
    if Path::new("/run/systemd/system").is_dir() {
        println!("ATOLL-SKIP: systemd runs here");
        return;
    }
    let mut scene = Scene::new(&["true"]);
    scene.config["linux"]["cgroupsPath"] = json!("system.slice:test:a");
    let refused = scene.ct(&["--systemd-cgroup", "create", "ID"]);
    let expected = "systemd does not run here; leave out --systemd-cgroup";
    assert!(refused.stderr.contains(expected), "{}", refused.stderr);
    assert_eq!(refused.code, Some(1));
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! containerd with `atoll-ct` as the runtime of its shim, driven by `ctr`. Each test has a containerd of its own
//! ([`daemon`]), and sees that a container that was removed leaves nothing.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "tests fail by panicking and skip by a line"
)]

mod daemon;
#[path = "../scene/mod.rs"]
mod scene;

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use daemon::{Cgroups, Containerd, IMAGE, cgroups, printed, processes};
use scene::{criu, wait_for};
use serde_json::json;

/// A program that says which signal has come, and ends with code 7 at the second.
const SIGNALS: &str =
    "trap 'echo usr1' USR1; trap 'echo term; exit 7' TERM; echo ready; while :; do sleep 0.1; done";

#[test]
fn exit_codes_and_output() {
    let Some(containerd) = Containerd::new(Cgroups::Host) else {
        return;
    };
    let run = |words: &[&str]| {
        let ours = containerd.run_arguments(&["--rm"]);
        containerd.run(&[&ours[..], words].concat())
    };
    assert_eq!(
        run(&[IMAGE, "a", "sh", "-c", "echo hi; id -u"]),
        (Some(0), "hi\n0\n".into())
    );
    assert_eq!(run(&[IMAGE, "a", "sh", "-c", "exit 42"]).0, Some(42));
    assert_eq!(
        run(&[
            "--env",
            "A=b",
            "--cwd",
            "/tmp",
            IMAGE,
            "a",
            "sh",
            "-c",
            "echo $A $PWD"
        ])
        .1,
        "b /tmp\n"
    );
    let (code, text) = run(&["--read-only", IMAGE, "a", "sh", "-c", "echo x > /x"]);
    assert!(
        code == Some(1) && text.contains("Read-only file system"),
        "{text}"
    );
    let (code, text) = run(&[IMAGE, "a", "nosuch"]);
    assert!(code == Some(1) && text.contains("nosuch"), "{text}");
    // The shim has deleted what could not be created: the name is free again.
    containerd.nothing_is_left();
    let map = "0:100000:65536";
    let mapped = [
        "--uidmap",
        map,
        "--gidmap",
        map,
        IMAGE,
        "a",
        "sh",
        "-c",
        "cat /proc/self/uid_map; echo x > /x && echo written",
    ];
    let (code, text) = run(&mapped);
    let words: Vec<&str> = text.split_whitespace().collect();
    assert_eq!(
        (code, &words[..]),
        (Some(0), &["0", "100000", "65536", "written"][..]),
        "{text}"
    );
    containerd.nothing_is_left();
}

#[test]
fn a_container_in_the_background() {
    in_the_background(Cgroups::Host);
}

#[test]
fn a_container_in_the_background_on_v2() {
    in_the_background(Cgroups::Unified);
}

fn in_the_background(version: Cgroups) {
    let Some(containerd) = Containerd::new(version) else {
        return;
    };
    let events = std::fs::File::create(containerd.path("events")).unwrap();
    let mut listener = containerd.ctr(&["events"]).stdout(events).spawn().unwrap();
    let events = || std::fs::read_to_string(containerd.path("events")).unwrap();
    // Nobody says when the listener listens.
    wait_for("an event", || {
        containerd.ok(&["namespace", "label", &containerd.scene.id, "a=b"]);
        events().contains("/namespaces/update")
    });
    containerd.background(&[], "b", SIGNALS);
    wait_for("the log", || containerd.output("b") == "ready\n");
    assert_eq!(containerd.status("b").as_deref(), Some("RUNNING"));

    executes(&containerd);
    pauses(&containerd);

    containerd.ok(&[
        "task",
        "exec",
        "--detach",
        "--exec-id",
        "s",
        "b",
        "sleep",
        "1000",
    ]);
    let listed = containerd.ok(&["task", "ps", "b"]);
    assert!(
        listed.lines().count() >= 3 && listed.contains("ExecID:s"),
        "{listed}"
    );
    containerd.ok(&["task", "kill", "--exec-id", "s", "--signal", "KILL", "b"]);
    wait_for("the end of what was executed", || {
        events().matches("/tasks/exit").count() == 4
    });

    containerd.ok(&["task", "kill", "--signal", "USR1", "b"]);
    wait_for("a signal", || containerd.output("b") == "ready\nusr1\n");
    containerd.ok(&["task", "kill", "b"]);
    containerd.wait_status("b", "STOPPED");
    assert_eq!(containerd.output("b"), "ready\nusr1\nterm\n");
    let ended = containerd.remove("b");
    assert!(ended.contains("exit code 7"), "{ended}");
    containerd.nothing_is_left();

    wait_for("the last event", || events().contains("/containers/delete"));
    listener.kill().unwrap();
    listener.wait().unwrap();
    let text = events();
    for topic in [
        "create",
        "start",
        "exec-added",
        "exec-started",
        "paused",
        "resumed",
        "exit",
        "delete",
    ] {
        assert!(
            text.contains(&format!("/tasks/{topic} ")),
            "{topic} in {text}"
        );
    }
    assert!(text.contains(r#""exit_status":7"#), "{text}");
}

fn executes(containerd: &Containerd) {
    let exec =
        |words: &[&str]| containerd.run(&[&["task", "exec", "--exec-id", "e"], words].concat());
    assert_eq!(
        exec(&["b", "sh", "-c", "echo in; exit 3"]),
        (Some(3), "in\n".into())
    );
    assert_eq!(
        exec(&[
            "--cwd",
            "/tmp",
            "--user",
            "7",
            "b",
            "sh",
            "-c",
            "id -u; echo $PWD"
        ])
        .1,
        "7\n/tmp\n"
    );
    let (code, text) = exec(&["b", "nosuch"]);
    assert!(code == Some(1) && text.contains("nosuch"), "{text}");
    let groups = exec(&["b", "cat", "/proc/self/cgroup"]).1;
    assert!(groups.lines().any(|line| line.ends_with("/b")), "{groups}");
    assert!(!containerd.cgroups("b").is_empty());
}

fn pauses(containerd: &Containerd) {
    containerd.ok(&["task", "pause", "b"]);
    assert_eq!(containerd.status("b").as_deref(), Some("PAUSED"));
    let frozen = || {
        let v1 = containerd.limit("b", "freezer.state").as_deref() == Some("FROZEN");
        let events = containerd.limit("b", "cgroup.events").unwrap_or_default();
        v1 || events.contains("frozen 1")
    };
    wait_for("the freezer", frozen);
    containerd.ok(&["task", "resume", "b"]);
    assert_eq!(containerd.status("b").as_deref(), Some("RUNNING"));
    wait_for("its end", || !frozen());
}

#[test]
fn limits_and_metrics() {
    let Some(containerd) = Containerd::new(Cgroups::Host) else {
        return;
    };
    // `ctr` has no option for the number of processes: a specification has.
    let mut config = containerd.scene.config.clone();
    config["root"]["path"] = json!(containerd.path("rootfs"));
    config["linux"]["cgroupsPath"] = json!(format!("/{}/own", containerd.scene.id));
    config["linux"]["resources"]["pids"] = json!({ "limit": 77 });
    config["process"]["args"] = json!(["sleep", "1000"]);
    std::fs::write(containerd.path("own.json"), config.to_string()).unwrap();
    let path = containerd.path("own.json");
    let own = [
        "--detach",
        "--null-io",
        "--config",
        path.to_str().unwrap(),
        "own",
    ];
    containerd.ok(&containerd.run_arguments(&own));
    assert_eq!(containerd.limit("own", "pids.max").as_deref(), Some("77"));

    containerd.background(
        &["--memory-limit", "67108864", "--cpus", "0.5"],
        "b",
        "exec sleep 1000",
    );
    let memory = containerd
        .limit("b", "memory.max")
        .or(containerd.limit("b", "memory.limit_in_bytes"));
    assert_eq!(memory.as_deref(), Some("67108864"));
    let quota = containerd
        .limit("b", "cpu.max")
        .or(containerd.limit("b", "cpu.cfs_quota_us"));
    assert!(
        matches!(quota.as_deref(), Some("50000" | "50000 100000")),
        "{quota:?}"
    );

    let metrics = containerd.ok(&["task", "metrics", "b"]);
    let value = |names: [&str; 2]| -> u64 {
        let words = metrics
            .lines()
            .map(|line| line.split_whitespace().collect::<Vec<_>>());
        let mut values =
            words.filter(|words| words.first().is_some_and(|name| names.contains(name)));
        values.next().unwrap_or_default()[1].parse().unwrap()
    };
    assert!(
        (1..67_108_864).contains(&value(["memory.usage_in_bytes", "memory.usage"])),
        "{metrics}"
    );
    assert_eq!(value(["pids.current", "pids.current"]), 1, "{metrics}");

    // The kernel ends what wants more; containerd is told of it.
    let hungry = ["--rm", "--memory-limit", "16777216", IMAGE, "h", "sh", "-c"];
    let script = "x=xxxxxxxxxxxxxxxx; while :; do x=$x$x; done";
    let (code, text) =
        containerd.run(&containerd.run_arguments(&[&hungry[..], &[script]].concat()));
    assert_eq!(code, Some(137), "{text}");
    containerd.remove("own");
    containerd.remove("b");
    containerd.nothing_is_left();
}

#[test]
fn standard_input_and_attach() {
    let Some(containerd) = Containerd::new(Cgroups::Host) else {
        return;
    };
    // Its end does not come through: ctr tells of it before there is a task.
    let script = "read -r line; echo \"got $line\"";
    let words = ["--rm", IMAGE, "a", "sh", "-c", script];
    let mut run = containerd.ctr(&containerd.run_arguments(&words));
    let mut run = run
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    run.stdin.take().unwrap().write_all(b"through\n").unwrap();
    assert_eq!(
        printed(&run.wait_with_output().unwrap()),
        (Some(0), "got through\n".into())
    );

    // Without a log, the container's output waits for whoever attaches.
    let script = "trap 'echo second; exit 5' TERM; while :; do echo first; sleep 0.1; done";
    let words = ["--detach", IMAGE, "a", "sh", "-c", script];
    let mut run = containerd.ctr(&containerd.run_arguments(&words));
    run.stdin(Stdio::null()).stdout(Stdio::null());
    assert!(run.status().unwrap().success());
    let mut attach = containerd.ctr(&["task", "attach", "a"]);
    let mut attach = attach
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(attach.stdout.take().unwrap()).lines();
    assert_eq!(lines.next().unwrap().unwrap(), "first");
    containerd.ok(&["task", "kill", "a"]);
    assert!(lines.any(|line| line.unwrap() == "second"));
    assert_eq!(attach.wait().unwrap().code(), Some(5));
    // Who attaches to a program deletes its task when it ends.
    assert_eq!(containerd.status("a"), None);
    containerd.ok(&["container", "rm", "a"]);
    containerd.nothing_is_left();
}

#[test]
fn terminals() {
    let Some(containerd) = Containerd::new(Cgroups::Host) else {
        return;
    };
    let terminal = "test -t 0 && test -t 1 && echo \"terminal $((20 + 1))\"; exit 6";
    let on_terminal = |arguments: &[&str]| {
        // script(1) gives ctr itself a terminal.
        let command = containerd.ctr(arguments);
        let words = std::iter::once(command.get_program()).chain(command.get_args());
        let quoted = words.map(|word| format!("'{}'", word.to_str().unwrap()));
        let line = quoted.collect::<Vec<_>>().join(" ");
        printed(
            &Command::new("script")
                .args(["-qec", &line, "/dev/null"])
                .output()
                .unwrap(),
        )
    };
    let words = ["--rm", "--tty", IMAGE, "t", "sh", "-c", terminal];
    let (code, text) = on_terminal(&containerd.run_arguments(&words));
    assert!(
        code == Some(6) && text.contains("terminal 21"),
        "{code:?} {text}"
    );
    containerd.background(&[], "b", "exec sleep 1000");
    let (code, text) = on_terminal(&[
        "task",
        "exec",
        "--tty",
        "--exec-id",
        "t",
        "b",
        "sh",
        "-c",
        terminal,
    ]);
    assert!(
        code == Some(6) && text.contains("terminal 21"),
        "{code:?} {text}"
    );
    containerd.remove("b");
    containerd.nothing_is_left();
}

#[test]
fn containers_outlive_a_killed_containerd() {
    outlive(Cgroups::Host);
}

#[test]
fn containers_outlive_a_killed_containerd_on_v2() {
    outlive(Cgroups::Unified);
}

fn outlive(version: Cgroups) {
    let Some(mut containerd) = Containerd::new(version) else {
        return;
    };
    containerd.background(&[], "stays", SIGNALS);
    containerd.background(
        &[],
        "ends",
        "while [ ! -e /end ]; do sleep 0.1; done; echo ended; exit 9",
    );
    let shims = containerd.shims();
    assert_eq!(shims.len(), 2);
    let end = containerd.ok(&[
        "task",
        "exec",
        "--exec-id",
        "p",
        "ends",
        "readlink",
        "/proc/self",
    ]);
    assert!(end.trim().parse::<u32>().is_ok(), "{end}");
    let pid = containerd.ok(&["task", "list"]);
    let pid = pid.lines().find(|line| line.starts_with("ends")).unwrap();
    let pid = pid.split_whitespace().nth(1).unwrap().to_owned();
    containerd.kill();
    // Without containerd, one goes on and the other ends.
    let file = format!("/proc/{pid}/root/end");
    assert!(
        containerd
            .inside(&["touch", &file])
            .status()
            .unwrap()
            .success()
    );
    wait_for("the end of one", || containerd.output("ends") == "ended\n");
    assert_eq!(containerd.shims(), shims);
    containerd.start();
    containerd.wait_status("ends", "STOPPED");
    let ended = containerd.remove("ends");
    assert!(ended.contains("exit code 9"), "{ended}");
    assert_eq!(containerd.status("stays").as_deref(), Some("RUNNING"));
    let exec = ["task", "exec", "--exec-id", "e", "stays", "echo", "again"];
    assert_eq!(containerd.ok(&exec), "again\n");
    containerd.ok(&["task", "kill", "--signal", "USR1", "stays"]);
    wait_for("a signal", || containerd.output("stays") == "ready\nusr1\n");
    containerd.remove("stays");
    containerd.nothing_is_left();
}

/// containerd then calls the runtime's `delete --force` by itself.
#[test]
fn a_killed_shim_takes_its_container_along() {
    let Some(containerd) = Containerd::new(Cgroups::Host) else {
        return;
    };
    containerd.background(&[], "b", "sleep 1000 & exec sleep 1000");
    let [shim] = containerd.shims()[..] else {
        panic!("one container, one shim");
    };
    assert!(
        Command::new("kill")
            .args(["-KILL", &shim.to_string()])
            .status()
            .unwrap()
            .success()
    );
    wait_for("the end of its cgroups", || {
        containerd.cgroups("b").is_empty()
    });
    wait_for("the end of its task", || containerd.status("b").is_none());
    containerd.ok(&["container", "rm", "b"]);
    containerd.nothing_is_left();
}

#[test]
fn a_checkpoint_is_made_and_the_container_goes_on() {
    let Some(criu) = criu() else { return };
    let programs = criu.parent().map(Path::to_owned);
    let Some(containerd) = Containerd::with_programs(Cgroups::Host, programs) else {
        return;
    };
    containerd.background(&[], "b", "exec sleep 1000");
    let images = containerd.path("images");
    let at = images.to_str().unwrap();
    containerd.ok(&["task", "checkpoint", "--image-path", at, "b"]);
    // What CRIU writes last of all.
    assert!(images.join("inventory.img").exists());
    // It was not held, nor ended.
    let exec = ["task", "exec", "--exec-id", "e", "b", "echo", "alive"];
    assert_eq!(containerd.ok(&exec), "alive\n");
    containerd.remove("b");
    containerd.nothing_is_left();
}

/// Set in the run that is killed.
const KILLED: &str = "ATOLL_TEST_KILLED";

/// The test program runs itself, and kills that with a container in it.
#[test]
fn a_killed_test_leaves_nothing() {
    if std::env::var_os(KILLED).is_some() {
        if let Some(containerd) = Containerd::new(Cgroups::Host) {
            containerd.background(&[], "b", "sleep 1000 & exec sleep 1000");
            println!(
                "\nMADE {} {}",
                containerd.scene.id,
                containerd.scene.directory.path().display()
            );
            std::io::stdin().read_line(&mut String::new()).unwrap();
        }
        return;
    }
    let mut test = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "a_killed_test_leaves_nothing", "--nocapture"])
        .env(KILLED, "1")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(test.stdout.take().unwrap())
        .lines()
        .map_while(Result::ok);
    let made = lines.find(|line| line.starts_with("MADE ") || line.contains("ATOLL-SKIP"));
    let Some(("MADE", names)) = made.as_deref().and_then(|line| line.split_once(' ')) else {
        assert!(test.wait().unwrap().success());
        println!("{}", made.unwrap_or_default());
        return;
    };
    let (id, directory) = names.split_once(' ').unwrap();
    assert!(!cgroups(id).is_empty() && processes(directory).len() > 2);
    test.kill().unwrap();
    test.wait().unwrap();
    wait_for("the end of what was started", || {
        processes(directory).is_empty()
    });
    assert_eq!(cgroups(id), [] as [PathBuf; 0]);
    std::fs::remove_dir_all(Path::new(directory)).unwrap();
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The lifecycle and configuration of the OCI runtime-spec, through the command line, with real containers.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "tests fail by panicking and skip by a line"
)]

mod scene;

use std::process::Command;

use scene::{Scene, can_run, wait_for};
use serde_json::json;

#[test]
fn states_follow_the_runtime_spec() {
    if !can_run() {
        return;
    }
    let scene = Scene::new(&["sleep", "1000"]);
    assert_eq!(scene.quiet(&["create", "ID", "--pid-file", "pid"]), Some(0));
    let state = scene.state();
    assert_eq!(state["status"], "created");
    assert_eq!(state["id"], scene.id.as_str());
    assert_eq!(
        state["pid"].to_string(),
        std::fs::read_to_string(scene.path("pid")).unwrap()
    );
    assert_eq!(state["bundle"], scene.directory.path().to_str().unwrap());
    let again = scene.ct(&["create", "ID"]);
    assert_eq!(again.code, Some(1));
    assert!(again.stderr.contains("exists already"), "{}", again.stderr);

    scene.ct(&["start", "ID"]).ok();
    assert_eq!(scene.state()["status"], "running");
    assert!(
        scene
            .ct(&["start", "ID"])
            .stderr
            .contains("only a created container")
    );
    assert!(scene.ct(&["delete", "ID"]).stderr.contains("is running"));
    assert_eq!(
        scene.state()["status"],
        "running",
        "a refused delete has no effect"
    );

    scene.ct(&["pause", "ID"]).ok();
    assert_eq!(scene.state()["status"], "paused");
    assert!(
        scene
            .ct(&["exec", "ID", "true"])
            .stderr
            .contains("is paused")
    );
    scene.ct(&["resume", "ID"]).ok();

    scene.ct(&["kill", "ID", "SIGKILL"]).ok();
    scene.wait_status("stopped");
    assert_eq!(scene.state()["pid"], 0);
    assert!(
        scene
            .ct(&["kill", "ID", "TERM"])
            .stderr
            .contains("container not running")
    );
    scene.ct(&["delete", "ID"]).ok();
    assert!(scene.ct(&["state", "ID"]).stderr.contains("does not exist"));
    assert!(
        scene
            .ct(&["delete", "ID"])
            .stderr
            .contains("does not exist")
    );
    scene.ct(&["delete", "--force", "ID"]).ok();
    assert!(scene.cgroups().is_empty(), "{:?}", scene.cgroups());
}

#[test]
fn run_answers_the_exit_code_and_leaves_nothing() {
    if !can_run() {
        return;
    }
    let mut scene = Scene::new(&["true"]);
    // A program that ends at once must not be missed.
    for _ in 0..5 {
        assert_eq!(scene.ct(&["run", "ID"]).code, Some(0));
    }
    scene.config["process"]["args"] = json!(["sh", "-c", "echo out; echo err >&2; exit 42"]);
    let ended = scene.ct(&["run", "ID"]);
    assert_eq!(
        (ended.code, ended.stdout.as_str()),
        (Some(42), "out\n"),
        "{}",
        ended.stderr
    );
    assert_eq!(ended.stderr, "err\n");
    scene.config["process"]["args"] = json!(["sh", "-c", "kill -9 $$"]);
    // The init of a pid namespace is immune to its own signals; it ends by itself.
    assert_eq!(scene.ct(&["run", "ID"]).code, Some(0));
    assert_eq!(scene.ct(&["list", "-q"]).ok(), "");
    assert!(scene.cgroups().is_empty());
}

#[test]
fn the_program_sees_what_config_json_says() {
    if !can_run() {
        return;
    }
    let script = "id -u; id -g; cat /proc/sys/kernel/hostname; pwd; echo $FOO $HOME; \
        ulimit -n; umask; cat /proc/self/oom_score_adj; cat /data/file; \
        grep CapEff /proc/self/status; grep NoNewPrivs /proc/self/status; ls /proc/self/fd | wc -l";
    let mut scene = Scene::new(&["sh", "-c", script]);
    std::fs::create_dir(scene.path("data")).unwrap();
    std::fs::write(scene.path("data/file"), "mounted\n").unwrap();
    let source = scene.path("data");
    let mounts = scene.config["mounts"].as_array_mut().unwrap();
    mounts.push(json!({ "destination": "/data", "source": source, "type": "bind", "options": ["rbind", "ro"] }));
    scene.config["hostname"] = json!("scene");
    let process = &mut scene.config["process"];
    process["user"] = json!({ "uid": 1000, "gid": 2000, "umask": 0o77 });
    process["cwd"] = json!("/tmp");
    process["env"] = json!(["PATH=/bin", "FOO=bar"]);
    process["rlimits"] = json!([{ "type": "RLIMIT_NOFILE", "soft": 99, "hard": 100 }]);
    process["oomScoreAdj"] = json!(100);
    process["args"][2] = json!(
        script
            .replace("ls ", "busybox ls ")
            .replace("| wc", "| busybox wc")
    );
    process["capabilities"] = json!({ "bounding": [], "effective": [], "permitted": [] });
    let out = scene.ct(&["run", "ID"]).ok();
    let lines: Vec<&str> = out.lines().map(str::trim).collect();
    let expected = [
        "1000",
        "2000",
        "scene",
        "/tmp",
        "bar /",
        "99",
        "0077",
        "100",
        "mounted",
        "CapEff:\t0000000000000000",
        "NoNewPrivs:\t1",
        "4",
    ];
    assert_eq!(lines, expected);
}

#[test]
fn kill_reaches_init_or_all() {
    if !can_run() {
        return;
    }
    let script = "trap 'exit 3' USR1; sleep 1000 & while :; do sleep 0.05; done";
    let scene = Scene::new(&["sh", "-c", script]);
    scene.start(&[]);
    wait_for("the background process", || {
        serde_json::from_str::<Vec<i32>>(&scene.ct(&["ps", "-f", "json", "ID"]).ok())
            .unwrap()
            .len()
            >= 2
    });
    assert!(
        scene
            .ct(&["kill", "ID", "NOSUCH"])
            .stderr
            .contains("unknown signal")
    );
    scene.ct(&["kill", "ID", "USR1"]).ok();
    scene.wait_status("stopped");
    scene.ct(&["delete", "ID"]).ok();

    scene.start(&[]);
    scene.ct(&["kill", "--all", "ID", "KILL"]).ok();
    scene.wait_status("stopped");
    scene.ct(&["delete", "ID"]).ok();

    // Frozen, too: in a v1 freezer nothing dies.
    scene.start(&[]);
    scene.ct(&["pause", "ID"]).ok();
    scene.ct(&["kill", "--all", "ID", "TERM"]).ok();
    assert_eq!(scene.state()["status"], "paused");
    scene.ct(&["kill", "--all", "ID", "KILL"]).ok();
    scene.wait_status("stopped");
}

#[test]
fn nested_cgroups_go_with_the_container() {
    if !can_run() {
        return;
    }
    let script = "for h in /sys/fs/cgroup/*/; do mkdir -p $h/a/b 2>/dev/null; done; \
        mkdir -p /sys/fs/cgroup/a/b 2>/dev/null; exec sleep 1000";
    let mut scene = Scene::new(&["sh", "-c", script]);
    let mounts = scene.config["mounts"].as_array_mut().unwrap();
    for mount in mounts.iter_mut().filter(|m| m["type"] == "cgroup") {
        mount["options"] = json!(["nosuid", "noexec", "nodev", "rw"]);
    }
    scene.start(&[]);
    let nested = || scene.cgroups().iter().any(|d| d.join("a/b").exists());
    wait_for("a nested cgroup", nested);
    scene.ct(&["delete", "--force", "ID"]).ok();
    assert!(scene.cgroups().is_empty(), "{:?}", scene.cgroups());
}

#[test]
fn a_cgroup_in_use_is_refused() {
    if !can_run() {
        return;
    }
    let scene = Scene::new(&["sleep", "1000"]);
    scene.start(&[]);
    let second = scene.ct(&["create", "second"]);
    assert!(
        second.stderr.contains("linux.cgroupsPath"),
        "{}",
        second.stderr
    );
    assert!(second.stderr.contains("processes"), "{}", second.stderr);
    assert_eq!(scene.state()["status"], "running");
    assert!(
        !scene.path("run/second").exists(),
        "nothing remains of the refused one"
    );
}

#[test]
fn hooks_run_in_order_with_the_state() {
    if !can_run() {
        return;
    }
    let mut scene = Scene::new(&["true"]);
    let log = scene.path("log");
    let hook = |name: &str| {
        let script = format!("(echo {name}; cat; echo) >> {}", log.display());
        json!([{ "path": "/bin/sh", "args": ["sh", "-c", script] }])
    };
    scene.config["hooks"] = json!({
        "prestart": hook("prestart"), "createRuntime": hook("createRuntime"),
        "poststart": hook("poststart"), "poststop": hook("poststop"),
    });
    scene.ct(&["run", "ID"]).ok();
    let text = std::fs::read_to_string(&log).unwrap();
    let (names, states): (Vec<&str>, Vec<&str>) = text.lines().partition(|l| !l.starts_with('{'));
    assert_eq!(
        names,
        ["prestart", "createRuntime", "poststart", "poststop"]
    );
    for state in states {
        let state: serde_json::Value = serde_json::from_str(state).unwrap();
        assert_eq!(state["id"], scene.id.as_str());
        assert_eq!(state["bundle"], scene.directory.path().to_str().unwrap());
    }
    scene.config["hooks"] = json!({ "createRuntime": [{ "path": "/bin/false" }] });
    let failed = scene.ct(&["run", "ID"]);
    assert_eq!(failed.code, Some(1));
    assert!(failed.stderr.contains("hook"), "{}", failed.stderr);
    assert!(
        scene.cgroups().is_empty(),
        "nothing remains of a failed creation"
    );
}

/// Where config.json is changed, to what, and what the error must name.
fn wrong_configurations() -> Vec<(&'static str, serde_json::Value, &'static str)> {
    vec![
        ("/ociVersion", json!("2.0.0"), "ociVersion"),
        ("/process/args", json!([]), "process.args"),
        ("/process/cwd", json!("tmp"), "process.cwd"),
        (
            "/process/args",
            json!(["nosuch"]),
            "executable file `nosuch` not found in $PATH",
        ),
        ("/root/path", json!("nowhere"), "find root.path"),
        ("/root", json!(null), "root"),
        ("/linux/cgroupsPath", json!("/"), "linux.cgroupsPath"),
        (
            "/linux/cgroupsPath",
            json!("/a/../../b"),
            "linux.cgroupsPath",
        ),
        (
            "/process/terminal",
            json!(true),
            "nobody takes the terminal",
        ),
        ("/process", json!("text"), "parse"),
        ("/linux/namespaces/0/type", json!("nosuch"), "parse"),
        ("/mounts/0/destination", json!("proc"), "not absolute"),
        (
            "/linux/mountLabel",
            json!("system_u:object_r:x:s0"),
            "linux.mountLabel: SELinux",
        ),
    ]
}

#[test]
fn intel_rdt_is_refused_where_there_is_none() {
    if !can_run() {
        return;
    }
    let known = std::fs::read_to_string("/proc/filesystems").unwrap();
    if known.contains("resctrl") {
        println!("ATOLL-SKIP: this host has resctrl");
        return;
    }
    let mut scene = Scene::new(&["true"]);
    scene.config["linux"]["intelRdt"] = json!({ "closID": "c", "l3CacheSchema": "L3:0=f" });
    for words in [["create", "ID"], ["run", "ID"]] {
        let refused = scene.ct(&words);
        let reason = "linux.intelRdt: this host has no Intel RDT";
        assert!(
            refused.code == Some(1) && refused.stderr.contains(reason),
            "{}",
            refused.stderr
        );
        assert_eq!(scene.ct(&["list", "-q"]).ok(), "");
    }
    let features = scene.ct(&["features"]).ok();
    let features: serde_json::Value = serde_json::from_str(&features).unwrap();
    assert_eq!(features["linux"]["intelRdt"]["enabled"], false);
}

#[test]
fn wrong_configurations_are_one_line_errors() {
    if !can_run() {
        return;
    }
    for (pointer, value, expected) in wrong_configurations() {
        let mut scene = Scene::new(&["true"]);
        let (object, name) = pointer.rsplit_once('/').unwrap();
        scene.config.pointer_mut(object).unwrap()[name] = value;
        let log = scene.path("log.json");
        let options = [
            "--log",
            log.to_str().unwrap(),
            "--log-format",
            "json",
            "create",
            "ID",
        ];
        let ended = scene.ct(&options);
        assert_ne!(ended.code, Some(0), "{pointer}");
        assert!(
            ended.stderr.contains(expected),
            "{pointer}: {}",
            ended.stderr
        );
        assert_eq!(ended.stderr.lines().count(), 1, "{}", ended.stderr);
        let line = std::fs::read_to_string(&log).unwrap();
        let line: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!(line["level"], "error");
        assert_eq!(
            ended.stderr.trim_end(),
            format!("atoll-ct: {}", line["msg"].as_str().unwrap())
        );
        assert!(
            !scene.path("run").join(&scene.id).exists(),
            "{pointer}: nothing remains"
        );
        assert!(
            scene.cgroups().is_empty(),
            "{pointer}: {:?}",
            scene.cgroups()
        );
    }
    let scene = Scene::new(&["true"]);
    for id in ["", ".", "..", "a/b", "a b"] {
        assert!(
            scene
                .ct(&["create", id])
                .stderr
                .contains("invalid container id"),
            "{id:?}"
        );
    }
}

#[test]
fn the_same_container_under_crun_and_runc() {
    if !can_run() {
        return;
    }
    let script = "cat /proc/self/status | grep -E '^(Cap|NoNew|Uid|Gid|Groups)'; \
        busybox awk '{ print $5, $6 }' /proc/self/mountinfo | busybox sort; busybox ls -l /dev | busybox awk '{ print $1, $10, $11, $12 }'; \
        echo $HOME $PATH; for n in pid net ipc uts mnt; do busybox readlink /proc/1/ns/$n | busybox cut -d: -f1; done";
    let mut scene = Scene::new(&["sh", "-c", script]);
    // Each runtime has its own way to show v1 hierarchies.
    scene.config["mounts"]
        .as_array_mut()
        .unwrap()
        .retain(|m| m["type"] != "cgroup");
    let ours = scene.ct(&["run", "ID"]).ok();
    let mut compared = 0;
    for peer in ["runc", "crun"] {
        let state = scene.path("peer");
        let mut command = Command::new(peer);
        command
            .arg("--root")
            .arg(&state)
            .args(["run", &scene.id])
            .current_dir(scene.directory.path());
        match command.output() {
            Ok(output) if output.status.success() => {
                let theirs = String::from_utf8_lossy(&output.stdout).into_owned();
                assert_eq!(comparable(&ours), comparable(&theirs), "{peer}");
                compared += 1;
            }
            Ok(output) => println!(
                "{peer} does not run here: {}",
                String::from_utf8_lossy(&output.stderr)
            ),
            Err(error) => println!("{peer}: {error}"),
        }
    }
    if compared == 0 {
        println!("ATOLL-SKIP: neither runc nor crun runs on this host");
    }
}

/// Lines that must agree: where masked paths come from differs between runtimes.
fn comparable(text: &str) -> Vec<&str> {
    let ours_only = |line: &&str| {
        !["/proc/", "/sys/firmware"]
            .iter()
            .any(|start| line.starts_with(start))
    };
    text.lines().filter(ours_only).collect()
}

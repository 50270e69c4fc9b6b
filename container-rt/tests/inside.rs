// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! What happens in a container that runs: exec, user namespaces, idmapped mounts, terminals, the monitor.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "tests fail by panicking and skip by a line"
)]

mod scene;

use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use scene::{LIMIT, Scene, can_run, wait_for};
use serde_json::{Value, json};

#[test]
fn exec_answers_the_exit_code_and_joins_everything() {
    if !can_run() {
        return;
    }
    let scene = Scene::new(&["sleep", "1000"]).unprivileged();
    scene.start(&[]);
    assert_eq!(
        scene.ct(&["exec", "ID", "sh", "-c", "exit 9"]).code,
        Some(9)
    );
    let killed = scene.ct(&["exec", "ID", "sh", "-c", "kill -TERM $$"]);
    assert_eq!(killed.code, Some(143));
    // As runc: a failure of exec itself is 255, and the text says what it was.
    for (program, text) in [
        ("nosuch", "not found in $PATH"),
        ("/tmp", "Permission denied"),
    ] {
        let ended = scene.ct(&["exec", "ID", program]);
        assert_eq!(ended.code, Some(255));
        assert!(ended.stderr.contains(text), "{}", ended.stderr);
    }
    let init = scene.state()["pid"].to_string();
    let script =
        "for n in user pid net ipc uts mnt cgroup; do busybox readlink /proc/self/ns/$n; done";
    let theirs = scene.ct(&["exec", "ID", "sh", "-c", script]).ok();
    let host = |n: &&str| std::fs::read_link(format!("/proc/{init}/ns/{n}")).unwrap();
    let namespaces = ["user", "pid", "net", "ipc", "uts", "mnt", "cgroup"];
    let inits: Vec<String> = namespaces
        .iter()
        .map(|n| host(n).display().to_string())
        .collect();
    assert_eq!(theirs.lines().collect::<Vec<_>>(), inits);
    let map = scene.ct(&["exec", "ID", "cat", "/proc/self/uid_map"]).ok();
    assert_eq!(
        map.split_whitespace().collect::<Vec<_>>(),
        ["0", "1200000", "65536"]
    );
    let output = scene.ct(&[
        "exec",
        "--user",
        "5:6",
        "-e",
        "A=b",
        "--cwd",
        "/tmp",
        "ID",
        "sh",
        "-c",
        "id -u; id -g; echo $A; pwd",
    ]);
    assert_eq!(output.ok(), "5\n6\nb\n/tmp\n");
    let caps = scene.ct(&[
        "exec",
        "--cap",
        "CAP_SYS_PTRACE",
        "ID",
        "grep",
        "CapEff",
        "/proc/self/status",
    ]);
    let plain = scene
        .ct(&["exec", "ID", "grep", "CapEff", "/proc/self/status"])
        .ok();
    let value =
        |line: &str| u64::from_str_radix(line.split_whitespace().nth(1).unwrap(), 16).unwrap();
    assert_eq!(value(&caps.ok()), value(&plain) | 1 << 19);
    let paths = scene.ct(&["exec", "ID", "cat", "/proc/self/cgroup"]).ok();
    assert!(
        paths.lines().all(|l| l.ends_with(":/")),
        "in the container's cgroups: {paths}"
    );
}

/// What Rust ignores for us, and what we block while we wait, is not the container's.
#[test]
fn signals_are_as_usual() {
    if !can_run() {
        return;
    }
    let check = |said: &str| {
        let sets: Vec<u64> = said
            .split_whitespace()
            .skip(1)
            .step_by(2)
            .map(|set| u64::from_str_radix(set, 16).unwrap())
            .collect();
        assert_eq!(sets[0], 0, "none is blocked: {said}");
        // Others may be ignored by whoever runs this test.
        assert_eq!(sets[1] >> (libc::SIGPIPE - 1) & 1, 0, "{said}");
    };
    let script = ["grep", "-E", "^Sig(Blk|Ign)", "/proc/self/status"];
    let mut scene = Scene::new(&script);
    check(&scene.ct(&["run", "ID"]).ok());
    scene.config["process"]["args"] = json!(["sleep", "1000"]);
    scene.start(&[]);
    check(&scene.ct(&[&["exec", "ID"], &script[..]].concat()).ok());
}

#[test]
fn id_maps_of_several_ranges_need_no_helper() {
    if !can_run() {
        return;
    }
    let mut scene = Scene::new(&["cat", "/proc/self/uid_map", "/proc/self/gid_map"]).unprivileged();
    let map = json!([
        { "containerID": 0, "hostID": 1_200_000, "size": 1000 },
        { "containerID": 1000, "hostID": 1000, "size": 1 },
        { "containerID": 1001, "hostID": 1_201_001, "size": 64535 },
    ]);
    scene.config["linux"]["uidMappings"] = map.clone();
    scene.config["linux"]["gidMappings"] = map;
    let out = scene.ct(&["run", "ID"]).ok();
    let numbers: Vec<&str> = out.split_whitespace().collect();
    let expected = [
        "0", "1200000", "1000", "1000", "1000", "1", "1001", "1201001", "64535",
    ];
    assert_eq!(numbers, [expected, expected].concat());
}

/// A `/dev` that is bound, here a directory with what a host's has: used as it is, and not written to.
#[test]
fn a_bound_dev_is_used_as_it_is() {
    if !can_run() {
        return;
    }
    for user_namespace in [false, true] {
        let script = "set -e; cd /dev; busybox ls -x; cat fd; cat shm/new 2>/dev/null || echo none; \
             busybox stat -c %F/%t:%T null ptmx; echo x > null";
        let mut scene = Scene::new(&["sh", "-c", script]);
        if user_namespace {
            scene = scene.unprivileged();
        }
        let dev = scene.path("host-dev");
        for sub in ["pts", "shm"] {
            std::fs::create_dir_all(dev.join(sub)).unwrap();
        }
        std::fs::write(dev.join("fd"), "the host's\n").unwrap();
        std::fs::write(dev.join("null"), "").unwrap();
        std::fs::write(dev.join("ptmx"), "").unwrap();
        let mounts = scene.config["mounts"].as_array_mut().unwrap();
        let at = mounts.iter().position(|m| m["destination"] == "/dev");
        let bind = |from: &str, to: &str| {
            json!({ "destination": to, "type": "bind", "source": from,
                    "options": ["rbind", "rw"] })
        };
        mounts[at.unwrap()] = bind(dev.to_str().unwrap(), "/dev");
        mounts.retain(|m| m["destination"] != "/dev/mqueue");
        mounts.push(bind("/dev/null", "/dev/null"));
        let out = scene.ct(&["run", "ID"]).ok();
        let lines: Vec<&str> = out.lines().collect();
        let listed: Vec<&str> = lines[0].split_whitespace().collect();
        assert_eq!(listed, ["fd", "null", "ptmx", "pts", "shm"], "{out}");
        let node = "character special file";
        let nodes = [format!("{node}/1:3"), format!("{node}/5:2")];
        assert_eq!(lines[1..3], ["the host's", "none"], "{out}");
        assert_eq!(lines[3..], nodes, "{out}");
        let mut left: Vec<_> = std::fs::read_dir(&dev)
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        left.sort();
        assert_eq!(left, ["fd", "null", "ptmx", "pts", "shm"]);
    }
}

/// Nodes as config.json has them, in and outside `/dev`, also where the host has no such node to be bound.
#[test]
fn devices_have_their_numbers_modes_and_owners() {
    if !can_run() {
        return;
    }
    for user_namespace in [false, true] {
        let paths = "/dev/own /sub/own";
        let script = format!("busybox stat -c %F/%t:%T/%a/%u:%g {paths}; echo x > /dev/own");
        let mut scene = Scene::new(&["sh", "-c", &script]);
        if user_namespace {
            scene = scene.unprivileged();
        }
        scene.config["linux"]["devices"] = json!([
            { "path": "/dev/own", "type": "c", "major": 1, "minor": 3,
              "fileMode": 0o662, "uid": 10, "gid": 11 },
            { "path": "/sub/own", "type": "b", "major": 7, "minor": 200 },
        ]);
        let expected = "character special file/1:3/662/10:11\nblock special file/7:c8/666/0:0\n";
        assert_eq!(scene.ct(&["run", "ID"]).ok(), expected, "{user_namespace}");
    }
    let mut scene = Scene::new(&["true"]).unprivileged();
    scene.config["linux"]["devices"] =
        json!([{ "path": "/dev/own", "type": "c", "major": 1, "minor": 3, "uid": 70_000 }]);
    let ended = scene.ct(&["run", "ID"]);
    assert_eq!(ended.code, Some(1));
    assert!(
        ended.stderr.contains("owner 70000 has no mapping"),
        "{}",
        ended.stderr
    );
}

#[test]
fn absent_capabilities_are_none() {
    if !can_run() {
        return;
    }
    let mut scene = Scene::new(&["grep", "Cap", "/proc/self/status"]);
    scene.config["process"]["capabilities"].take();
    let out = scene.ct(&["run", "ID"]).ok();
    assert!(
        out.lines().all(|line| line.ends_with("\t0000000000000000")),
        "{out}"
    );
}

#[test]
fn exec_has_the_seccomp_filter() {
    if !can_run() {
        return;
    }
    let mut scene = Scene::new(&["sleep", "1000"]);
    scene.config["linux"]["seccomp"] = json!({
        "defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": [{ "names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO" }],
    });
    scene.start(&[]);
    let refused = scene.ct(&["exec", "ID", "mkdir", "/tmp/x"]);
    assert!(
        refused.stderr.contains("not permitted"),
        "{}",
        refused.stderr
    );
}

#[test]
fn process_file_and_detached_exec() {
    if !can_run() {
        return;
    }
    let scene = Scene::new(&["sleep", "1000"]);
    scene.start(&[]);
    let process = json!({
        "args": ["sh", "-c", "echo $X > /tmp/out; exec sleep 1000"], "cwd": "/",
        "env": ["PATH=/bin", "X=from-file"], "user": { "uid": 0, "gid": 0 },
    });
    std::fs::write(scene.path("process.json"), process.to_string()).unwrap();
    let code = scene.quiet(&[
        "exec",
        "-d",
        "--process",
        "process.json",
        "--pid-file",
        "exec.pid",
        "ID",
    ]);
    assert_eq!(code, Some(0));
    let out = scene.path("rootfs/tmp/out");
    wait_for("the file", || {
        std::fs::read_to_string(&out).is_ok_and(|text| text == "from-file\n")
    });
    let pid: i32 = std::fs::read_to_string(scene.path("exec.pid"))
        .unwrap()
        .parse()
        .unwrap();
    let listed = scene.ct(&["ps", "-f", "json", "ID"]).ok();
    assert!(
        serde_json::from_str::<Vec<i32>>(&listed)
            .unwrap()
            .contains(&pid),
        "{listed}"
    );
}

#[test]
fn root_file_system_and_binds_are_mapped_without_chown() {
    if !can_run() {
        return;
    }
    let script =
        "id -u; busybox stat -c %u:%g /bin/busybox /data; echo x > /data/new; echo y > /tmp/new";
    let mut scene = Scene::new(&["sh", "-c", script]).unprivileged();
    std::fs::create_dir(scene.path("data")).unwrap();
    let source = scene.path("data");
    let mounts = scene.config["mounts"].as_array_mut().unwrap();
    let options = ["rbind", "rw", "idmap"];
    mounts.push(
        json!({ "destination": "/data", "source": source, "type": "bind", "options": options }),
    );
    assert_eq!(scene.ct(&["run", "ID"]).ok(), "0\n0:0\n0:0\n");
    for file in ["rootfs/bin/busybox", "rootfs/tmp/new", "data/new"] {
        let metadata = std::fs::metadata(scene.path(file)).unwrap();
        assert_eq!((metadata.uid(), metadata.gid()), (0, 0), "{file} on disk");
    }
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let here = scene.directory.path().to_str().unwrap();
    assert!(!mounts.contains(here), "no mount is left");
}

#[test]
fn devices_are_closed() {
    if !can_run() {
        return;
    }
    let script = "echo x > /dev/null && busybox mknod /tmp/kmsg c 1 11 && cat /tmp/kmsg";
    let mut scene = Scene::new(&["sh", "-c", script]);
    let all = json!(["CAP_MKNOD", "CAP_SYS_ADMIN", "CAP_DAC_OVERRIDE"]);
    scene.config["process"]["capabilities"] =
        json!({ "bounding": all, "effective": all, "permitted": all });
    // Also when config.json has no list at all.
    scene.config["linux"]["resources"] = json!({});
    let ended = scene.ct(&["run", "ID"]);
    assert!(
        ended.stderr.contains("Operation not permitted"),
        "{}{}",
        ended.stdout,
        ended.stderr
    );
}

#[test]
fn console_socket_gets_the_terminal() {
    if !can_run() {
        return;
    }
    let mut scene = Scene::new(&["sh", "-c", "test -t 0 && echo terminal"]);
    scene.config["process"]["terminal"] = json!(true);
    let listener = std::os::unix::net::UnixListener::bind(scene.path("console")).unwrap();
    assert_eq!(
        scene.quiet(&["create", "--console-socket", "console", "ID"]),
        Some(0)
    );
    let (socket, _) = listener.accept().unwrap();
    let pty = atoll_container_rt::terminal::receive_fd(&socket).unwrap();
    scene.ct(&["start", "ID"]).ok();
    let mut pty = std::fs::File::from(pty);
    let mut bytes = [0; 64];
    let count = pty.read(&mut bytes).unwrap();
    assert_eq!(&bytes[..count], b"terminal\r\n");
}

fn read_until(stream: &mut UnixStream, wanted: &str) -> String {
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    let mut text = String::new();
    let mut bytes = [0; 1024];
    while !text.contains(wanted) {
        let count = stream.read(&mut bytes).unwrap();
        assert_ne!(count, 0, "the console closed after {text:?}");
        text.push_str(&String::from_utf8_lossy(&bytes[..count]));
    }
    text
}

#[test]
fn monitor_serves_the_console_and_records_the_exit() {
    if !can_run() {
        return;
    }
    let mut scene = Scene::new(&["sh"]);
    scene.config["process"]["terminal"] = json!(true);
    scene.config["process"]["consoleSize"] = json!({ "width": 91, "height": 33 });
    scene.start(&["--monitor"]);
    let directory = scene.path("run").join(&scene.id);
    let mut first = UnixStream::connect(directory.join("console.sock")).unwrap();
    first.write_all(b"stty size; echo mark$((40+2))\n").unwrap();
    let text = read_until(&mut first, "mark42");
    assert!(text.contains("33 91"), "{text}");
    let mut second = UnixStream::connect(directory.join("console.sock")).unwrap();
    read_until(&mut second, "mark42");
    scene.ct(&["resize", "ID", "100", "40"]).ok();
    wait_for("the new size", || {
        second.write_all(b"stty size\n").unwrap();
        second
            .set_read_timeout(Some(Duration::from_millis(200)))
            .unwrap();
        let mut bytes = [0; 4096];
        let count = second.read(&mut bytes).unwrap_or(0);
        String::from_utf8_lossy(&bytes[..count]).contains("40 100")
    });
    second.write_all(b"exit 5\n").unwrap();
    scene.wait_status("stopped");
    wait_for("the exit record", || directory.join("exit.json").exists());
    assert_eq!(scene.state()["exitCode"], 5);
    let record: Value =
        serde_json::from_slice(&std::fs::read(directory.join("exit.json")).unwrap()).unwrap();
    assert_eq!(
        (&record["exitCode"], &record["signal"]),
        (&json!(5), &Value::Null)
    );
    let log = std::fs::read_to_string(directory.join("console.log")).unwrap();
    assert!(log.contains("mark42"));
    scene.ct(&["delete", "ID"]).ok();
    assert!(!directory.exists());
}

#[test]
fn monitor_keeps_output_without_a_terminal_and_tells_the_signal() {
    if !can_run() {
        return;
    }
    let scene = Scene::new(&["sh", "-c", "echo hello; exec sleep 1000"]);
    scene.start(&["--monitor"]);
    let directory = scene.path("run").join(&scene.id);
    let log = directory.join("console.log");
    wait_for("the log", || {
        std::fs::read_to_string(&log).is_ok_and(|text| text == "hello\n")
    });
    scene.ct(&["kill", "ID", "KILL"]).ok();
    wait_for("the exit record", || directory.join("exit.json").exists());
    let record: Value =
        serde_json::from_slice(&std::fs::read(directory.join("exit.json")).unwrap()).unwrap();
    assert_eq!(
        (&record["exitCode"], &record["signal"]),
        (&json!(137), &json!(9))
    );
    let wrong = {
        let mut wrong = Scene::new(&["nosuch"]);
        wrong.config["process"]["terminal"] = json!(true);
        wrong.ct(&["create", "--monitor", "ID"])
    };
    assert_eq!(wrong.code, Some(1));
    assert!(
        wrong.stderr.contains("not found in $PATH"),
        "{}",
        wrong.stderr
    );
}

#[test]
fn limits_change_while_it_runs() {
    if !can_run() {
        return;
    }
    let scene = Scene::new(&["sleep", "1000"]);
    scene.start(&[]);
    let ended = scene.ct(&["update", "--pids-limit", "123", "ID"]);
    if ended.stderr.contains("No such file") || ended.stderr.contains("NotFound") {
        println!("ATOLL-SKIP: this host has no pids controller");
        return;
    }
    ended.ok();
    let limits: Vec<String> = scene
        .cgroups()
        .iter()
        .filter_map(|d| std::fs::read_to_string(d.join("pids.max")).ok())
        .map(|text| text.trim().to_owned())
        .collect();
    assert!(limits.contains(&"123".to_owned()), "{limits:?}");
    assert!(
        scene
            .ct(&["update", "ID"])
            .stderr
            .contains("at least one limit")
    );
}

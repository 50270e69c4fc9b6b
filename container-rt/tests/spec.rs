// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The headings of the runtime-spec's configuration, a row each: a change of config.json, a script for the container,
//! and what it must print. Every row runs under `atoll-ct`, crun and runc; the peers' answers are printed beside ours,
//! so that what the host cannot do is told from what we cannot.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "tests fail by panicking and skip by a line"
)]

mod scene;

use std::process::{Command, Stdio};

use scene::{Scene, can_run};
use serde_json::{Value, json};

struct Row {
    /// Heading of the runtime-spec.
    heading: &'static str,
    /// Merged into config.json; lists are appended to.
    change: Value,
    script: &'static str,
    expected: &'static str,
}

fn row(heading: &'static str, change: Value, script: &'static str, expected: &'static str) -> Row {
    Row {
        heading,
        change,
        script,
        expected,
    }
}

fn range() -> Value {
    json!([{ "containerID": 0, "hostID": 1_200_000, "size": 65536 }])
}

fn process_rows() -> Vec<Row> {
    let all = json!(["CAP_SYS_CHROOT"]);
    vec![
        row("hostname", json!({ "hostname": "row" }), "hostname", "row"),
        row(
            "root.readonly",
            json!({ "root": { "readonly": true } }),
            "touch /x 2>/dev/null || echo no",
            "no",
        ),
        row(
            "process.cwd",
            json!({ "process": { "cwd": "/made/here" } }),
            "pwd",
            "/made/here",
        ),
        row(
            "process.env",
            json!({ "process": { "env": ["ROW=a b"] } }),
            "echo $ROW",
            "a b",
        ),
        row(
            "process.user",
            json!({ "process": { "user": { "uid": 7, "gid": 8, "additionalGids": [9, 10], "umask": 0o27 } } }),
            "id -u; id -G; umask",
            "7\n8 9 10\n0027",
        ),
        row(
            "process.rlimits",
            json!({ "process": { "rlimits": [{ "type": "RLIMIT_CORE", "soft": 10, "hard": 20 }] } }),
            "grep core /proc/self/limits | tr -s ' '",
            "Max core file size 10 20 bytes ",
        ),
        row(
            "process.capabilities",
            json!({ "process": { "capabilities": { "bounding": all, "effective": all, "permitted": all,
                "inheritable": all, "ambient": all } } }),
            "grep ^Cap /proc/self/status | cut -f2 | uniq -c | tr -s ' '",
            " 5 0000000000040000",
        ),
        row(
            "process.noNewPrivileges",
            json!({ "process": { "noNewPrivileges": true } }),
            "grep NoNew /proc/self/status | cut -f2",
            "1",
        ),
        row(
            "process.oomScoreAdj",
            json!({ "process": { "oomScoreAdj": 321 } }),
            "cat /proc/self/oom_score_adj",
            "321",
        ),
        row(
            "process.scheduler",
            json!({ "process": { "scheduler": { "policy": "SCHED_BATCH", "nice": 3 } } }),
            "set -- $(cat /proc/self/stat); echo ${41} ${19}",
            "3 3",
        ),
        row(
            "process.ioPriority",
            json!({ "process": { "ioPriority": { "class": "IOPRIO_CLASS_BE", "priority": 6 } } }),
            "ionice",
            "best-effort: prio 6",
        ),
    ]
}

fn mount_rows() -> Vec<Row> {
    vec![
        row(
            "mounts: options",
            json!({ "mounts": [{ "destination": "/m", "type": "tmpfs", "source": "t",
                "options": ["noexec", "nosuid", "nodev", "mode=700", "size=1m"] }] }),
            "grep ' /m ' /proc/mounts | cut -d' ' -f4 | grep -o 'nosuid,nodev,noexec'; stat -c %a /m",
            "nosuid,nodev,noexec\n700",
        ),
        row(
            "mounts: read-only bind",
            json!({ "mounts": [{ "destination": "/m", "type": "bind", "source": "rootfs/etc",
                "options": ["rbind", "ro"] }] }),
            "touch /m/x 2>/dev/null || echo no",
            "no",
        ),
        row(
            "mounts: propagation",
            json!({ "mounts": [{ "destination": "/m", "type": "bind", "source": "rootfs/etc",
                "options": ["rbind", "runbindable"] }] }),
            "grep ' /m ' /proc/self/mountinfo | grep -o unbindable",
            "unbindable",
        ),
        row(
            "linux.maskedPaths",
            json!({ "linux": { "maskedPaths": ["/proc/version", "/bin/none", "/proc/tty"] } }),
            "cat /proc/version | wc -c; ls /proc/tty | wc -l",
            "0\n0",
        ),
        row(
            "linux.readonlyPaths",
            json!({ "linux": { "readonlyPaths": ["/tmp"] } }),
            "touch /tmp/x 2>/dev/null || echo no",
            "no",
        ),
        row(
            "linux.devices",
            json!({ "linux": { "devices": [
                { "path": "/dev/row", "type": "c", "major": 1, "minor": 5, "fileMode": 0o620, "uid": 3, "gid": 5 },
                { "path": "/dev/pipe", "type": "p", "fileMode": 0o600 }] } }),
            "stat -c '%F %t:%T %a %u %g' /dev/row; stat -c %F /dev/pipe",
            "character special file 1:5 620 3 5\nfifo",
        ),
        row(
            "linux: default devices",
            json!({}),
            "for d in null zero full random urandom tty ptmx; do test -c /dev/$d || echo $d; done; \
             readlink /dev/fd; readlink /dev/stdin",
            "/proc/self/fd\n/proc/self/fd/0",
        ),
    ]
}

/// Whether the host has cgroup v2 alone.
fn is_v2() -> bool {
    std::path::Path::new("/sys/fs/cgroup/cgroup.controllers").exists()
}

fn linux_rows() -> Vec<Row> {
    vec![
        row(
            "linux.namespaces: user",
            json!({ "linux": { "namespaces": [{ "type": "user" }], "uidMappings": range(), "gidMappings": range() } }),
            "cat /proc/self/uid_map | tr -s ' '",
            " 0 1200000 65536",
        ),
        row(
            "linux.namespaces: cgroup",
            json!({ "annotations": {} }),
            "grep -vc ':/$' /proc/self/cgroup",
            "0",
        ),
        row(
            "linux.timeOffsets",
            json!({ "linux": { "namespaces": [{ "type": "time" }], "timeOffsets": { "boottime": { "secs": 700_000_000 } } } }),
            "test $(cut -d. -f1 /proc/uptime) -gt 700000000 && echo later",
            "later",
        ),
        row(
            "linux.sysctl",
            json!({ "linux": { "sysctl": { "net.ipv4.ip_forward": "1", "kernel.shm_rmid_forced": "1" } } }),
            "cat /proc/sys/net/ipv4/ip_forward /proc/sys/kernel/shm_rmid_forced",
            "1\n1",
        ),
        row(
            "linux.seccomp",
            json!({ "linux": { "seccomp": { "defaultAction": "SCMP_ACT_ALLOW",
                "syscalls": [{ "names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 100 }] } } }),
            "mkdir /tmp/x 2>&1 | grep -o 'Network is down'",
            "Network is down",
        ),
        row(
            "linux.personality",
            json!({ "linux": { "personality": { "domain": "LINUX32" } } }),
            "uname -m",
            "i686",
        ),
        row(
            "linux.rootfsPropagation",
            json!({ "linux": { "rootfsPropagation": "shared" } }),
            "grep ' / / \\| /[^ ]* / ' /proc/self/mountinfo | grep -c shared:",
            "1",
        ),
        row(
            "domainname",
            json!({ "domainname": "row.example" }),
            "cat /proc/sys/kernel/domainname",
            "row.example",
        ),
        row(
            "hooks: startContainer",
            json!({ "hooks": { "startContainer": [{ "path": "/bin/sh", "args": ["sh", "-c", "echo 1 > /tmp/hook"] }] } }),
            "cat /tmp/hook",
            "1",
        ),
        row(
            "hooks: createContainer",
            json!({ "hooks": { "createContainer": [{ "path": "/bin/sh", "args": ["sh", "-c", "echo 2 > tmp/hook"] }] } }),
            "cat /tmp/hook",
            "2",
        ),
    ]
}

fn resource_rows() -> Vec<Row> {
    vec![
        row(
            "linux.resources: pids",
            json!({ "linux": { "resources": { "pids": { "limit": 77 } } } }),
            "cat /sys/fs/cgroup/pids.max /sys/fs/cgroup/pids/pids.max 2>/dev/null",
            "77",
        ),
        row(
            "linux.resources: memory",
            json!({ "linux": { "resources": { "memory": { "limit": 33_554_432, "disableOOMKiller": true } } } }),
            "cd /sys/fs/cgroup; cat memory/memory.limit_in_bytes memory.max 2>/dev/null; \
             test -e memory.max || grep oom_kill_disable memory/memory.oom_control",
            if is_v2() {
                "33554432"
            } else {
                "33554432\noom_kill_disable 1"
            },
        ),
        row(
            "linux.resources: cpu",
            json!({ "linux": { "resources": { "cpu": { "quota": 20_000, "period": 50_000 } } } }),
            "cd /sys/fs/cgroup; cat cpu.max 2>/dev/null || cat cpu/cpu.cfs_quota_us cpu/cpu.cfs_period_us",
            if is_v2() {
                "20000 50000"
            } else {
                "20000\n50000"
            },
        ),
        row(
            "linux.resources: devices",
            json!({ "linux": { "resources": { "devices": [
                { "allow": true, "type": "c", "major": 1, "minor": 3, "access": "r" }] } } }),
            "cat /dev/null && echo read",
            "read",
        ),
    ]
}

/// Objects are merged, lists appended to.
fn merge(into: &mut Value, change: &Value) {
    match (into, change) {
        (Value::Object(into), Value::Object(change)) => {
            for (name, value) in change {
                merge(into.entry(name).or_insert(Value::Null), value);
            }
        }
        (Value::Array(into), Value::Array(change))
            if into.first().is_none_or(|first| first.is_object())
                || change[0].as_str().is_some_and(|s| s.contains('=')) =>
        {
            into.extend(change.iter().cloned());
        }
        (into, change) => *into = change.clone(),
    }
}

/// What a peer answers, or its error.
fn peer(scene: &Scene, program: &str) -> String {
    let script = "umount /sys/fs/cgroup/unified 2>/dev/null; exec \"$@\"";
    let mut command = Command::new("unshare");
    command.current_dir(scene.directory.path());
    // crun 1.8 takes no host that has cgroup v1 and v2 both.
    command.args([
        "-m",
        "sh",
        "-c",
        if program == "crun" {
            script
        } else {
            "exec \"$@\""
        },
        "sh",
    ]);
    command
        .args([program, "--root"])
        .arg(scene.path(program))
        .args(["run", &scene.id]);
    // runc gives the container's user what it has as its input; the host's /dev/null must not be that.
    match command.stdin(Stdio::piped()).output() {
        Ok(output) if output.status.success() => String::from_utf8_lossy(&output.stdout)
            .trim_end()
            .to_owned(),
        Ok(output) => format!(
            "error: {}",
            String::from_utf8_lossy(&output.stderr)
                .lines()
                .next()
                .unwrap_or_default()
        ),
        Err(error) => format!("error: {error}"),
    }
}

fn check(rows: Vec<Row>) {
    if !can_run() {
        return;
    }
    let mut failures = Vec::new();
    for row in rows {
        let mut scene = Scene::new(&["sh", "-c", row.script]);
        for applet in [
            "hostname", "cut", "tr", "uniq", "stat", "readlink", "wc", "ls", "touch", "uname",
            "ionice", "test",
        ] {
            let link = scene.path("rootfs/bin").join(applet);
            if !link.exists() {
                std::os::unix::fs::symlink("busybox", link).unwrap();
            }
        }
        scene.config["process"]["noNewPrivileges"] = json!(false);
        let plain = scene.config.clone();
        merge(&mut scene.config, &row.change);
        if row.change == json!({}) {
            scene.config = plain;
        }
        let ended = scene.ct(&["run", "ID"]);
        let ours = ended.stdout.trim_end().to_owned();
        let expected = row.expected.trim_end();
        let word = |answer: &str| if answer == expected { "ok" } else { "fail" };
        let peers = ["crun", "runc"].map(|program| peer(&scene, program));
        println!(
            "{:32} atoll-ct {:4} crun {:4} runc {}",
            row.heading,
            word(&ours),
            word(&peers[0]),
            word(&peers[1])
        );
        if ours != expected {
            failures.push(format!(
                "{}: {ours:?} {:?}, expected {expected:?}; crun {:?}, runc {:?}",
                row.heading, ended.stderr, peers[0], peers[1]
            ));
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn process() {
    check(process_rows());
}

#[test]
fn mounts_and_devices() {
    check(mount_rows());
}

#[test]
fn linux_and_hooks() {
    check(linux_rows().into_iter().chain(resource_rows()).collect());
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Golden tests of raw lines: each key by what it changes, and that no key is silently passed over.

use super::*;
use crate::guest::config::GuestConfig;
use crate::guest::container::bundle::{HostDevice, bundle};
use crate::id::GuestKind;

fn made(lines: &str) -> Result<Bundle, Error> {
    let text = format!("unprivileged: 1\nmemory: 256\nswap: 0\n{lines}\n");
    let config = GuestConfig::parse(GuestKind::Container, &text);
    assert!(config.current.unread.is_empty(), "{config:?}");
    let mut facts = Facts::default();
    facts.present.insert("/dev/net/tun".into());
    let tun = HostDevice {
        kind: 'c',
        major: 10,
        minor: 200,
    };
    facts.devices.insert("/dev/net/tun".into(), tun);
    bundle(
        "101".parse().unwrap(),
        &config,
        Path::new("/run/ct-101"),
        &facts,
    )
}

/// What lines make of one member of config.json.
#[track_caller]
fn check(lines: &str, pointer: &str, expected: Value) {
    let bundle = made(lines).unwrap();
    let found = bundle.config.pointer(pointer).cloned().unwrap_or_default();
    assert_eq!(found, expected, "{lines}");
}

/// The last entry of a list of config.json.
#[track_caller]
fn check_last(lines: &str, pointer: &str, expected: Value) {
    let bundle = made(lines).unwrap();
    let list = bundle.config.pointer(pointer).and_then(Value::as_array);
    assert_eq!(
        list.and_then(|list| list.last()),
        Some(&expected),
        "{lines}"
    );
}

#[track_caller]
fn check_refused(line: &str, text: &str) {
    let error = made(line).unwrap_err().to_string();
    let key = line.split(':').next().unwrap();
    assert!(error.starts_with(key) && error.contains(text), "{error}");
}

#[test]
fn id_maps_replace_the_range() {
    let lines = "lxc.idmap: u 0 100000 1000\nlxc.idmap: g 0 100000 1000\n\
                 lxc.idmap: b 1000 1000 1\nlxc.idmap: u 1001 101001 64535\nlxc.id_map: g 1001 101001 64535";
    let map = json!([
        { "containerID": 0, "hostID": 100_000, "size": 1000 },
        { "containerID": 1000, "hostID": 1000, "size": 1 },
        { "containerID": 1001, "hostID": 101_001, "size": 64_535 },
    ]);
    check(lines, "/linux/uidMappings", map.clone());
    check(lines, "/linux/gidMappings", map);
    for wrong in ["u 0 1", "x 0 1 1", "u 0 1 0", "u 0 4294967295 2", "u a b c"] {
        check_refused(&format!("lxc.idmap: {wrong}"), wrong);
    }
    check_refused("lxc.idmap: u 0 100000 65536", "users and groups");
}

#[test]
fn mounts() {
    check_last(
        "lxc.mount.entry: /dev/net/tun dev/net/tun none bind,create=file,optional 0 0",
        "/mounts",
        json!({ "destination": "/dev/net/tun", "type": "bind", "source": "/dev/net/tun", "options": ["bind"] }),
    );
    check_last(
        "lxc.mount.entry: /mnt/a\\040b /usr/lib/x86_64-linux-gnu/lxc/rootfs/mnt none rbind,ro,idmap=container",
        "/mounts",
        json!({ "destination": "/mnt", "type": "bind", "source": "/mnt/a b", "options": ["rbind", "ro", "idmap"] }),
    );
    check_last(
        "lxc.mount.entry: tmpfs tmp tmpfs nosuid,size=64m",
        "/mounts",
        json!({ "destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "size=64m"] }),
    );
    let absent = made("lxc.mount.entry: /dev/dri dev/dri none bind,optional,create=dir").unwrap();
    assert_eq!(absent.notes, ["lxc.mount.entry: /dev/dri is not there"]);
    for (wrong, text) in [
        ("/x ../../etc none bind", ".."),
        ("x y none bind", "not absolute"),
        ("/x y none bind,relative", "relative"),
        ("/x", "expected"),
    ] {
        check_refused(&format!("lxc.mount.entry: {wrong}"), text);
    }
    check(
        "lxc.mount.auto: proc:rw sys:rw cgroup:rw",
        "/linux/maskedPaths",
        json!([]),
    );
    check_refused("lxc.mount.auto: shmounts:/x", "shmounts");
}

#[test]
fn devices_and_limits() {
    check_last(
        "lxc.cgroup2.devices.allow: c 226:* rw",
        "/linux/resources/devices",
        json!({ "allow": true, "type": "c", "major": 226, "access": "rw" }),
    );
    check_last(
        "lxc.cgroup.devices.deny: a",
        "/linux/resources/devices",
        json!({ "allow": false, "type": "a", "access": "rwm" }),
    );
    check(
        "lxc.cgroup2.memory.max: 1G\nlxc.cgroup2.memory.swap.max: 512M",
        "/linux/resources/memory",
        json!({ "limit": 1 << 30, "swap": (1 << 30) + (512 << 20) }),
    );
    check(
        "lxc.cgroup2.memory.max: max",
        "/linux/resources/memory/limit",
        json!(-1),
    );
    check(
        "lxc.cgroup2.pids.max: 100",
        "/linux/resources/pids/limit",
        json!(100),
    );
    check(
        "lxc.cgroup2.cpuset.cpus: 0-1",
        "/linux/resources/cpu/cpus",
        json!("0-1"),
    );
    check(
        "lxc.cgroup2.io.max: 8:0 rbps=1048576",
        "/linux/resources/unified",
        json!({ "io.max": "8:0 rbps=1048576" }),
    );
    let old = made("lxc.cgroup.memory.limit_in_bytes: 1G").unwrap();
    assert!(
        old.notes[0].contains("lxc.cgroup.memory.limit_in_bytes"),
        "{:?}",
        old.notes
    );
    check_refused("lxc.cgroup2.devices.allow: x 1:2 rwm", "a, b or c");
    check_refused("lxc.cgroup2.devices.allow: c 1 rwm", "MAJOR:MINOR");
    check_refused("lxc.cgroup2.devices.allow: c 1:2 rwx", "access");
    check_refused("lxc.cgroup2.cgroup.procs: 1", "CONTROLLER.FILE");
    check_refused("lxc.cgroup2.memory.max: lots", "amount");
}

#[test]
fn capabilities() {
    let count = |lines: &str| {
        let bundle = made(lines).unwrap();
        let sets = &bundle.config["process"]["capabilities"];
        assert_eq!(sets["bounding"], sets["effective"]);
        sets["bounding"].as_array().unwrap().len()
    };
    let usual = count("");
    assert_eq!(
        count("lxc.cap.drop: sys_admin CAP_NET_RAW mac_admin"),
        usual - 2
    );
    assert_eq!(count("lxc.cap.drop:"), 41, "nothing is dropped");
    assert_eq!(count("lxc.cap.drop:\nlxc.cap.drop: sys_module"), 40);
    assert_eq!(
        count("lxc.cap.keep: chown kill\nlxc.cap.keep: sys_module"),
        3
    );
    assert_eq!(count("lxc.cap.keep: none"), 0);
    check_refused("lxc.cap.drop: fly", "fly");
}

#[test]
fn the_program() {
    check(
        "lxc.init.cmd: /bin/sh -c 'sleep 1'",
        "/process/args",
        json!(["/bin/sh", "-c", "sleep 1"]),
    );
    check("lxc.init.uid: 5", "/process/user/uid", json!(5));
    check("lxc.init.cwd: /srv", "/process/cwd", json!("/srv"));
    check_last("lxc.environment: A=b c", "/process/env", json!("A=b c"));
    check_refused("lxc.environment: HOME", "NAME=VALUE");
    check(
        "lxc.prlimit.nofile: 1024:unlimited\nlxc.prlimit.core: 0",
        "/process/rlimits",
        json!([
            { "type": "RLIMIT_NOFILE", "soft": 1024, "hard": u64::MAX },
            { "type": "RLIMIT_CORE", "soft": 0, "hard": 0 },
        ]),
    );
    check(
        "lxc.no_new_privs: 1",
        "/process/noNewPrivileges",
        json!(true),
    );
    check(
        "lxc.proc.oom_score_adj: 10",
        "/process/oomScoreAdj",
        json!(10),
    );
    check("lxc.uts.name: other", "/hostname", json!("other"));
    check(
        "lxc.sysctl.net.ipv4.ip_forward: 1\nlxc.sysctl.kernel.msgmax: 65536",
        "/linux/sysctl",
        json!({ "net.ipv4.ip_forward": "1", "kernel.msgmax": "65536" }),
    );
    assert_eq!(
        made("lxc.signal.halt: SIGTERM")
            .unwrap()
            .halt_signal
            .as_deref(),
        Some("SIGTERM")
    );
    check("lxc.arch: amd64", "/linux/personality", Value::Null);
    check_refused("lxc.arch: arm64", "amd64");
}

#[test]
fn profiles() {
    check(
        "lxc.apparmor.profile: unconfined",
        "/process/apparmorProfile",
        Value::Null,
    );
    check(
        "lxc.apparmor.profile: mine",
        "/process/apparmorProfile",
        json!("mine"),
    );
    assert_eq!(
        made("lxc.apparmor.profile: generated").unwrap().notes.len(),
        1
    );
    check("lxc.seccomp.profile:", "/linux/seccomp", Value::Null);
    check_refused("lxc.seccomp.profile: /x", "not read");
}

#[test]
fn hooks() {
    let lines = "lxc.hook.pre-start: /usr/local/bin/prepare 'a b'";
    check(
        lines,
        "/hooks/createRuntime/0/args",
        json!(["/usr/local/bin/prepare", "a b", "101", "lxc", "pre-start"]),
    );
    check(
        "lxc.hook.post-stop: /x",
        "/hooks/poststop/0/path",
        json!("/x"),
    );
    check(
        "lxc.hook.start: /x",
        "/hooks/startContainer/0/path",
        json!("/x"),
    );
    check_refused("lxc.hook.mount: /x", "lxc.hook.pre-start");
    check_refused("lxc.hook.pre-start: x", "path");
}

#[test]
fn nothing_is_passed_over() {
    check_refused("lxc.bogus.key: 1", "no such setting");
    check_refused("lxc.init: 1", "no such setting");
    for (line, text) in [
        ("lxc.net.0.type: phys", "net0"),
        ("lxc.include: /etc/x", "write the lines"),
        ("lxc.rootfs.path: /x", "rootfs"),
        ("lxc.namespace.share.net: 1", "namespaces"),
        ("lxc.selinux.context: x", "SELinux"),
        ("lxc.autodev: 0", "/dev"),
        ("lxc.mount.fstab: /etc/fstab", "lxc.mount.entry"),
    ] {
        check_refused(line, text);
    }
    for line in [
        "lxc.log.level: 1",
        "lxc.start.auto: 1",
        "lxc.tty.max: 4",
        "lxc.console.path: none",
    ] {
        assert_eq!(made(line).unwrap().notes.len(), 1, "{line}");
    }
}

#[test]
fn every_row_can_be_reached() {
    for (index, (name, _)) in keys::KEYS.iter().enumerate() {
        let key = name.replace('*', "x");
        let (effect, _) = find(&key).unwrap();
        assert!(
            std::ptr::eq(effect, &keys::KEYS[index].1),
            "{name} is hidden by an earlier row"
        );
    }
}

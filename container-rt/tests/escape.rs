// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Ways out of containers that other runtimes once left open, each tried: links in an image, descriptors and programs of
//! the host that come along, cgroups' release agents, processes of others. What succeeds here is an escape.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "tests fail by panicking and skip by a line"
)]

mod scene;

use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use scene::{Scene, can_run, wait_for};
use serde_json::{Value, json};

fn text(output: &Output) -> String {
    let out = String::from_utf8_lossy(&output.stdout);
    format!("{out}{}", String::from_utf8_lossy(&output.stderr))
}

fn all_capabilities(scene: &mut Scene) {
    let all = [
        "CHOWN",
        "DAC_OVERRIDE",
        "DAC_READ_SEARCH",
        "FOWNER",
        "KILL",
        "MKNOD",
        "NET_ADMIN",
        "SETUID",
        "SETGID",
        "SYS_ADMIN",
        "SYS_CHROOT",
        "SYS_PTRACE",
    ];
    let all: Vec<String> = all.iter().map(|name| format!("CAP_{name}")).collect();
    scene.config["process"]["capabilities"] =
        json!({ "bounding": all, "effective": all, "permitted": all });
}

fn mount(scene: &mut Scene, mount: Value) {
    let mounts = scene.config["mounts"].as_array_mut().unwrap();
    mounts.retain(|other| other["destination"] != mount["destination"]);
    mounts.push(mount);
}

fn bind(scene: &Scene, what: &str, to: &str) -> Value {
    json!({ "destination": to, "type": "bind", "source": scene.path(what), "options": ["rbind"] })
}

/// What is done at a path below `/m`.
const BY_LINKS: [fn(&mut Scene); 6] = [
    |s| {
        mount(
            s,
            json!({ "destination": "/m/new", "type": "tmpfs", "source": "t" }),
        )
    },
    |s| mount(s, bind(s, "rootfs/etc", "/m/new")),
    |s| mount(s, bind(s, "config.json", "/m/secret")),
    |s| {
        s.config["linux"]["devices"] =
            json!([{ "path": "/m/new", "type": "c", "major": 1, "minor": 3 }]);
    },
    |s| s.config["process"]["cwd"] = json!("/m/new/folder"),
    |s| {
        s.config["linux"]["maskedPaths"] = json!(["/m/secret"]);
        s.config["linux"]["readonlyPaths"] = json!(["/m"]);
    },
];

/// An image's links, on the way to whatever is mounted or made in it: CVE-2019-19921, CVE-2021-30465, CVE-2023-27561.
#[test]
fn links_of_an_image_lead_nowhere_else() {
    if !can_run() {
        return;
    }
    let outside = tempfile::tempdir().unwrap();
    std::fs::write(outside.path().join("secret"), "the host's\n").unwrap();
    let above = format!("../../../../../../..{}", outside.path().display());
    for (target, user_namespace) in [
        (above.as_str(), false),
        (outside.path().to_str().unwrap(), true),
    ] {
        for (number, change) in BY_LINKS.iter().enumerate() {
            let mut scene = Scene::new(&["cat", "/m/secret"]);
            if user_namespace {
                scene = scene.unprivileged();
            }
            symlink(target, scene.path("rootfs/m")).unwrap();
            change(&mut scene);
            // It may be refused, or happen inside.
            let ended = scene.ct(&["run", "ID"]);
            assert!(!ended.stdout.contains("the host's"), "{number} {target}");
            let left: Vec<_> = std::fs::read_dir(outside.path()).unwrap().collect();
            assert_eq!(left.len(), 1, "{number} {target}: {left:?}");
            let secret = std::fs::read_to_string(outside.path().join("secret"));
            assert_eq!(secret.unwrap(), "the host's\n", "{number} {target}");
        }
    }
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(outside.path().to_str().unwrap()));
}

/// What is masked stays so when the image brings links of its own: CVE-2019-16884, CVE-2025-31133.
#[test]
fn an_image_does_not_unmask() {
    if !can_run() {
        return;
    }
    let mut scene = Scene::new(&["sh", "-c", "cat /proc/version /elsewhere/version; exit 0"]);
    scene.config["linux"]["maskedPaths"] = json!(["/proc/version"]);
    assert_eq!(scene.ct(&["run", "ID"]).ok(), "", "masked");
    // /proc is a link.
    std::fs::remove_dir(scene.path("rootfs/proc")).unwrap();
    std::fs::create_dir(scene.path("rootfs/elsewhere")).unwrap();
    symlink("elsewhere", scene.path("rootfs/proc")).unwrap();
    let ended = scene.ct(&["run", "ID"]);
    assert_eq!(ended.code, Some(1), "{}", ended.stdout);
    assert!(
        ended.stderr.contains("ordinary directory"),
        "{}",
        ended.stderr
    );

    // What lies over masked files is a link to a file that is not the container's to write.
    let script = "echo written >/proc/version; cat /proc/sys/kernel/hostname; exit 0";
    let mut scene = Scene::new(&["sh", "-c", script]);
    let mounts = scene.config["mounts"].as_array_mut().unwrap();
    mounts.retain(|m| !m["destination"].as_str().unwrap().starts_with("/dev"));
    symlink("/proc/sys/kernel/hostname", scene.path("rootfs/dev/null")).unwrap();
    scene.config["linux"]["maskedPaths"] = json!(["/proc/version"]);
    let ended = scene.ct(&["run", "ID"]);
    assert!(!ended.stdout.contains("written"), "{}", ended.stdout);
}

/// CVE-2024-21626: a directory of the host that somebody has open.
#[test]
fn no_descriptor_of_the_host_comes_along() {
    if !can_run() {
        return;
    }
    let mut scene = Scene::new(&["ls", "/proc/self/fd"]);
    symlink("busybox", scene.path("rootfs/bin/ls")).unwrap();
    let holding = |scene: &Scene, arguments: &[&str]| {
        let inner = scene.command(arguments);
        let mut command = Command::new("sh");
        command.args(["-c", "exec 7</ 8</etc; exec \"$@\"", "sh"]);
        command.arg(inner.get_program()).args(inner.get_args());
        command.current_dir(scene.directory.path());
        command.stdin(Stdio::null()).output().unwrap()
    };
    // The fourth is the one that ls reads.
    assert_eq!(text(&holding(&scene, &["run", "ID"])), "0\n1\n2\n3\n");
    for number in 3..20 {
        scene.config["process"]["cwd"] = json!(format!("/proc/self/fd/{number}"));
        let ended = holding(&scene, &["run", "ID"]);
        assert_eq!(ended.status.code(), Some(1), "{number}: {}", text(&ended));
    }
    scene.config["process"]["cwd"] = json!("/");
    scene.config["process"]["args"] = json!(["sleep", "1000"]);
    scene.start(&[]);
    let listed = holding(&scene, &["exec", "ID", "ls", "/proc/self/fd"]);
    assert_eq!(text(&listed), "0\n1\n2\n3\n");
    for number in 3..20 {
        let cwd = format!("/proc/self/fd/{number}");
        let ended = holding(&scene, &["exec", "--cwd", &cwd, "ID", "ls"]);
        assert_eq!(ended.status.code(), Some(255), "{number}: {}", text(&ended));
    }
    let ended = holding(&scene, &["exec", "--cwd", "/proc/self/fd/7", "ID", "ls"]);
    assert!(
        text(&ended).contains("/proc/self/fd/7: not in the container's root"),
        "{}",
        text(&ended)
    );
    // Where the runtime itself was started.
    let own = ["exec", "--cwd", "/proc/self/cwd", "ID", "sh", "-c", "pwd"];
    assert_eq!(scene.ct(&own).ok(), "/\n");
}

/// CVE-2019-5736: whoever sees a runtime on its way into the container holds the runtime's own file, and writes to it
/// when it has gone.
#[test]
fn the_runtimes_own_program_cannot_be_written_to() {
    if !can_run() {
        return;
    }
    let mut scene = Scene::new(&["sleep", "1000"]);
    all_capabilities(&mut scene);
    // A copy, so that nothing is lost when the attack succeeds.
    let victim = scene.path("victim");
    std::fs::copy(env!("CARGO_BIN_EXE_atoll-ct"), &victim).unwrap();
    let before = std::fs::metadata(&victim).unwrap();
    let run = |arguments: &[&str]| {
        let inner = scene.command(arguments);
        let mut command = Command::new(&victim);
        command
            .args(inner.get_args())
            .current_dir(scene.directory.path());
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        assert!(command.status().unwrap().success(), "{arguments:?}");
    };
    run(&["create", "ID"]);
    // The init is still the runtime.
    let attack = "exec 3</proc/1/exe && echo >/tmp/held; while [ ! -e /tmp/go ]; do sleep 0.1; done; \
        (echo overwritten >/proc/self/fd/3) 2>/tmp/why; echo \"ended $?\" >/tmp/verdict";
    run(&["exec", "--detach", "ID", "sh", "-c", attack]);
    let inside = |name: &str| scene.path("rootfs/tmp").join(name);
    wait_for("the runtime to be held", || inside("held").exists());
    run(&["start", "ID"]);
    let init = scene.state()["pid"].to_string();
    wait_for("the program", || {
        let program = std::fs::read_link(format!("/proc/{init}/exe"));
        program.is_ok_and(|program| program.ends_with("busybox"))
    });
    std::fs::write(inside("go"), "").unwrap();
    wait_for("the verdict", || {
        std::fs::read_to_string(inside("verdict")).is_ok_and(|text| text.ends_with('\n'))
    });
    let why = std::fs::read_to_string(inside("why")).unwrap();
    assert!(why.contains("Read-only file system"), "{why}");
    let after = std::fs::metadata(&victim).unwrap();
    assert_eq!(before.len(), after.len(), "it has been overwritten");
    assert_eq!(before.modified().unwrap(), after.modified().unwrap());
}

/// CVE-2022-0492: a program that the host would execute when a cgroup becomes empty.
#[test]
fn no_release_agent_is_set() {
    if !can_run() {
        return;
    }
    let script = "for f in /sys/fs/cgroup/release_agent /sys/fs/cgroup/*/release_agent; do \
          [ -e $f ] && (echo /tmp/agent >$f) 2>/dev/null && echo $f; done; \
        for c in memory pids cpu rdma misc; do busybox mkdir -p /tmp/$c; \
          busybox mount -t cgroup -o $c none /tmp/$c 2>/dev/null && \
          (echo /tmp/agent >/tmp/$c/release_agent) 2>/dev/null && echo $c; done; exit 0";
    let mut scene = Scene::new(&["sh", "-c", script]).unprivileged();
    all_capabilities(&mut scene);
    scene.config["process"]["noNewPrivileges"] = json!(false);
    let group = json!({ "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
        "options": ["nosuid", "noexec", "nodev", "rw"] });
    mount(&mut scene, group);
    assert_eq!(scene.ct(&["run", "ID"]).ok(), "");
}

/// The root of one container is nobody to another's processes, even where it sees them.
#[test]
fn other_ranges_of_ids_are_others() {
    if !can_run() {
        return;
    }
    let victim =
        Scene::new(&["sh", "-c", "SECRET=word; export SECRET; exec sleep 1000"]).unprivileged();
    victim.start(&[]);
    let pid = victim.state()["pid"].to_string();
    let environment = format!("/proc/{pid}/environ");
    wait_for("the program", || {
        std::fs::read(&environment)
            .is_ok_and(|text| String::from_utf8_lossy(&text).contains("SECRET"))
    });
    let script = format!(
        "cat /proc/{pid}/environ; ls /proc/{pid}/root/; ls /proc/{pid}/fd/; kill -9 {pid}; busybox nsenter -t {pid} -m true"
    );
    let mut scene = Scene::new(&["sh", "-c", &script]).unprivileged();
    symlink("busybox", scene.path("rootfs/bin/ls")).unwrap();
    all_capabilities(&mut scene);
    let map = json!([{ "containerID": 0, "hostID": 1_300_000, "size": 65536 }]);
    scene.config["linux"]["uidMappings"] = map.clone();
    scene.config["linux"]["gidMappings"] = map;
    // With the host's processes in sight.
    let namespaces = scene.config["linux"]["namespaces"].as_array_mut().unwrap();
    namespaces.retain(|namespace| namespace["type"] != "pid");
    mount(
        &mut scene,
        json!({ "destination": "/proc", "type": "bind", "source": "/proc", "options": ["rbind"] }),
    );
    scene.config["linux"]["maskedPaths"] = json!([]);
    scene.config["linux"]["readonlyPaths"] = json!([]);
    let ended = scene.ct(&["run", "ID"]);
    assert_eq!(ended.stdout, "");
    let refusals = ended.stderr.matches("ermission denied").count()
        + ended.stderr.matches("not permitted").count();
    assert_eq!(refusals, 5, "{}", ended.stderr);
    assert_eq!(victim.state()["status"], "running");
    assert!(Path::new(&environment).exists());
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Containers of an ordinary user, who is root of a user namespace only: that is how rootless podman calls a runtime.
//! The user is a number that the host does not know; a process of his holds the namespaces, and each command enters
//! them. Without one he gets his own.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "tests fail by panicking and skip by a line"
)]

mod scene;

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use scene::unified::on_unified;
use scene::{Ended, Scene, can_run, processes_in, wait_for};
use serde_json::json;

/// Nobody on any host: above what adduser gives, below ranges of containers.
const USER: u32 = 65_533;

/// The user's further ids, where a test gives him some.
const FURTHER: u32 = 1_300_000;

/// What executes a program as the user.
fn as_user() -> Command {
    let mut command = Command::new("setpriv");
    let (user, group) = (format!("--reuid={USER}"), format!("--regid={USER}"));
    command.args([&user, &group, "--clear-groups"]);
    command
}

/// How many ids the user's namespace has.
#[derive(Clone, Copy)]
enum Ids {
    One,
    Many,
}

struct Rootless {
    scene: Scene,
    holder: Child,
    program: PathBuf,
}

impl Rootless {
    fn new(arguments: &[&str], ids: Ids) -> Option<Self> {
        if !can_run() {
            return None;
        }
        let mut scene = Scene::new(arguments);
        // A bind is what there is without a network of one's own.
        for mount in scene.config["mounts"].as_array_mut().unwrap() {
            if mount["destination"] == "/sys" {
                let options = ["rbind", "nosuid", "noexec", "nodev", "ro"];
                *mount = json!({ "destination": "/sys", "type": "none", "source": "/sys", "options": options });
            } else if let Some(options) = mount["options"].as_array_mut() {
                options.retain(|option| option != "gid=5");
            }
        }
        let namespaces = scene.config["linux"]["namespaces"].as_array_mut().unwrap();
        namespaces.retain(|namespace| namespace["type"] != "network");
        chown(scene.directory.path());
        // After that, for the file stays whose it is: reachable for the user, where the build's may not be.
        let program = scene.path("program");
        let built = env!("CARGO_BIN_EXE_atoll-ct");
        if std::fs::hard_link(built, &program).is_err() {
            std::fs::copy(built, &program).unwrap();
        }
        let holder = as_user()
            .args(["unshare", "--user", "--mount", "sleep", "1000000"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let process = Path::new("/proc").join(holder.id().to_string());
        let name = || std::fs::read_to_string(process.join("comm")).unwrap();
        wait_for("the user's namespace", || name() == "sleep\n");
        let map = match ids {
            Ids::One => format!("0 {USER} 1\n"),
            Ids::Many => format!("0 {USER} 1\n1 {FURTHER} 65536\n"),
        };
        if matches!(ids, Ids::One) {
            std::fs::write(process.join("setgroups"), "deny").unwrap();
        }
        std::fs::write(process.join("uid_map"), &map).unwrap();
        std::fs::write(process.join("gid_map"), &map).unwrap();
        let rootless = Self {
            scene,
            holder,
            program,
        };
        Some(rootless)
    }

    /// What executes a program as root of the user's namespace, in the bundle.
    fn inside(&self) -> Command {
        let mut command = as_user();
        let target = format!("--target={}", self.holder.id());
        command
            .args(["nsenter", &target, "--user", "--mount"])
            .args(["--preserve-credentials", "--"])
            .args(["sh", "-c", "cd \"$0\" && exec \"$@\""])
            .arg(self.scene.directory.path())
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("HOME", self.scene.directory.path())
            .env("XDG_RUNTIME_DIR", self.scene.directory.path());
        command
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let config = serde_json::to_vec(&self.scene.config).unwrap();
        std::fs::write(self.scene.path("config.json"), config).unwrap();
        let mut command = self.inside();
        command.arg(&self.program).arg("--root");
        command.arg(self.scene.path("run"));
        let id = |a: &&str| {
            if *a == "ID" {
                self.scene.id.clone()
            } else {
                (*a).to_owned()
            }
        };
        command.args(arguments.iter().map(id));
        command
    }

    /// Its output goes to files: a container that should not have been made must not hold a pipe.
    fn ct(&self, arguments: &[&str]) -> Ended {
        let file = |name: &str| std::fs::File::create(self.scene.path(name)).unwrap();
        let text = |name: &str| std::fs::read_to_string(self.scene.path(name)).unwrap();
        let mut command = self.command(arguments);
        command.stdin(Stdio::null());
        command.stdout(file("stdout")).stderr(file("stderr"));
        Ended {
            code: command.status().unwrap().code(),
            stdout: text("stdout"),
            stderr: text("stderr"),
        }
    }

    /// Without the namespace, and with the configuration that is there.
    fn outside(&self, arguments: &[&str]) -> Ended {
        let file = |name: &str| std::fs::File::create(self.scene.path(name)).unwrap();
        let text = |name: &str| std::fs::read_to_string(self.scene.path(name)).unwrap();
        let mut command = as_user();
        command
            .current_dir(self.scene.directory.path())
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("XDG_RUNTIME_DIR", self.scene.directory.path())
            .arg(&self.program)
            .args(["--root", "run"])
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(file("stdout"))
            .stderr(file("stderr"));
        Ended {
            code: command.status().unwrap().code(),
            stdout: text("stdout"),
            stderr: text("stderr"),
        }
    }

    #[track_caller]
    fn start(&self) {
        self.ct(&["create", "ID"]).ok();
        self.ct(&["start", "ID"]).ok();
    }

    fn exec(&self, script: &str) -> Ended {
        self.ct(&["exec", "ID", "sh", "-c", script])
    }

    fn status(&self) -> String {
        let state: serde_json::Value =
            serde_json::from_str(&self.ct(&["state", "ID"]).ok()).unwrap();
        state["status"].as_str().unwrap().to_owned()
    }

    /// The container's processes that are there.
    fn init(&self) -> u64 {
        let state: serde_json::Value =
            serde_json::from_str(&self.ct(&["state", "ID"]).ok()).unwrap();
        state["pid"].as_u64().unwrap()
    }
}

impl Drop for Rootless {
    fn drop(&mut self) {
        let ids = self.ct(&["list", "-q"]).stdout;
        for id in ids.lines() {
            self.ct(&["delete", "--force", id]);
        }
        self.holder.kill().unwrap();
        self.holder.wait().unwrap();
    }
}

fn chown(directory: &Path) {
    let owner = format!("{USER}:{USER}");
    let mut command = Command::new("chown");
    command.args(["-hR", &owner]).arg(directory);
    assert!(command.status().unwrap().success());
}

#[track_caller]
fn refused(ended: &Ended, why: &str) {
    let one_line = ended.stderr.trim_end().lines().count() == 1;
    assert!(
        ended.code != Some(0) && one_line && ended.stderr.contains(why),
        "{:?} {}",
        ended.code,
        ended.stderr
    );
}

#[test]
fn a_container_lives_and_dies() {
    let script = "sleep 1000 & echo $! >/child; exec sleep 1000";
    let Some(mut own) = Rootless::new(&["sh", "-c", script], Ids::One) else {
        return;
    };
    // As engines ask for it; an ordinary user may raise it only.
    own.scene.config["process"]["oomScoreAdj"] = json!(-500);
    own.start();
    assert_eq!(own.status(), "running");
    assert!(own.scene.cgroups().is_empty());
    let said = own
        .exec("id -u; cat /proc/self/uid_map; echo lost >/dev/null; cat /sys/kernel/notes | true");
    let said = said.ok();
    let words: Vec<_> = said.split_whitespace().collect();
    assert_eq!(words, ["0", "0", &USER.to_string(), "1"]);
    assert_eq!(own.exec("exit 7").code, Some(7));
    assert_eq!(own.exec("exec nothing-such").code, Some(127));
    // On the host it is the user's.
    let init = own.init();
    let status = std::fs::read_to_string(format!("/proc/{init}/status")).unwrap();
    assert!(
        status.contains(&format!("Uid:\t{USER}\t{USER}")),
        "{status}"
    );
    own.ct(&["kill", "ID", "TERM"]).ok();
    refused(&own.ct(&["delete", "ID"]), "is running");
    own.ct(&["kill", "ID", "KILL"]).ok();
    wait_for("the end", || own.status() == "stopped");
    own.ct(&["delete", "ID"]).ok();
    assert_eq!(own.ct(&["list", "-q"]).ok(), "");
}

#[test]
fn all_processes_end_with_the_container() {
    let script = "for i in 1 2 3; do sleep 1000 & done; wait";
    for words in [
        &["delete", "--force", "ID"][..],
        &["kill", "--all", "ID", "KILL"],
    ] {
        let Some(own) = Rootless::new(&["sh", "-c", script], Ids::One) else {
            return;
        };
        own.start();
        let namespace = std::fs::read_link(format!("/proc/{}/ns/pid", own.init())).unwrap();
        let left = || processes_in("pid", &namespace);
        wait_for("its processes", || left() == 4);
        refused(&own.ct(&["kill", "--all", "ID", "TERM"]), "has no cgroup");
        own.ct(words).ok();
        wait_for("their end", || left() == 0);
    }
}

/// The same where neither a cgroup nor a pid namespace holds them together, and nobody else's end.
#[test]
fn all_processes_end_in_the_hosts_pid_namespace() {
    let script = "for i in 1 2 3; do sleep 1000 & done; wait";
    for words in [
        &["delete", "--force", "ID"][..],
        &["kill", "--all", "ID", "KILL"],
        &["kill", "ID", "KILL"],
    ] {
        let Some(mut own) = Rootless::new(&["sh", "-c", script], Ids::One) else {
            return;
        };
        let namespaces = own.scene.config["linux"]["namespaces"].as_array_mut();
        let namespaces = namespaces.unwrap();
        namespaces.retain(|namespace| namespace["type"] != "pid");
        for mount in own.scene.config["mounts"].as_array_mut().unwrap() {
            if mount["destination"] == "/proc" {
                *mount = json!({ "destination": "/proc", "type": "bind", "source": "/proc", "options": ["rbind"] });
            }
        }
        own.start();
        let init = own.init();
        let namespace = std::fs::read_link(format!("/proc/{init}/ns/mnt")).unwrap();
        let left = || processes_in("mnt", &namespace);
        wait_for("its processes", || left() == 4);
        own.ct(words).ok();
        wait_for("their end", || left() == 0);
        assert!(own.holder.try_wait().unwrap().is_none());
    }
}

#[test]
fn what_takes_a_cgroup_is_refused() {
    let Some(mut own) = Rootless::new(&["sleep", "1000"], Ids::One) else {
        return;
    };
    let before = own.scene.config.clone();
    own.scene.config["linux"]["resources"]["pids"] = json!({ "limit": 9 });
    refused(&own.ct(&["create", "ID"]), "linux.resources.pids");
    own.scene.config = before.clone();
    let namespaces = own.scene.config["linux"]["namespaces"].as_array_mut();
    namespaces
        .unwrap()
        .retain(|namespace| namespace["type"] != "pid" && namespace["type"] != "mount");
    for paths in ["maskedPaths", "readonlyPaths"] {
        own.scene.config["linux"][paths].take();
    }
    refused(
        &own.ct(&["create", "ID"]),
        "a pid or mount namespace of its own",
    );
    own.scene.config = before;
    // No limits.
    own.scene.config["linux"]["resources"]["pids"] = json!({ "limit": -1 });
    own.start();
    for words in [
        &["ps", "ID"][..],
        &["events", "--stats", "ID"],
        &["pause", "ID"],
        &["update", "--pids-limit", "9", "ID"],
        &["checkpoint", "ID"],
    ] {
        refused(&own.ct(words), "has no cgroup");
    }
    assert_eq!(own.status(), "running");
}

#[test]
fn devices_are_those_of_the_host() {
    let Some(mut own) = Rootless::new(&["sleep", "1000"], Ids::One) else {
        return;
    };
    let device = |path: &str, minor: u32| json!({ "path": path, "type": "c", "major": 1, "minor": minor, "fileMode": 0o666 });
    own.scene.config["linux"]["devices"] = json!([device("/dev/zero", 3)]);
    refused(&own.ct(&["create", "ID"]), "/dev/zero is another one");
    own.scene.config["linux"]["devices"] = json!([device("/dev/none", 5)]);
    refused(&own.ct(&["create", "ID"]), "/dev/none");
    own.scene.config["linux"]["devices"] = json!([device("/dev/kmsg", 11)]);
    own.start();
    assert_eq!(own.exec("busybox stat -c %t:%T /dev/kmsg").ok(), "1:b\n");
    // The user may not read it outside either.
    let direct = as_user().args(["cat", "/dev/kmsg"]).output().unwrap();
    assert!(!direct.status.success());
    assert!(own.exec("exec 3</dev/kmsg").code != Some(0));
}

/// A container inside has further ids, a namespace of its own and another user.
#[test]
fn ids_within_ids() {
    let Some(mut own) = Rootless::new(&["sleep", "1000"], Ids::Many) else {
        return;
    };
    let map = json!([{ "containerID": 0, "hostID": 0, "size": 1 }, { "containerID": 1, "hostID": 100, "size": 1000 }]);
    let single = json!([{ "containerID": 0, "hostID": 1, "size": 1000 }]);
    for (map, outside) in [(map, FURTHER + 99 + 6), (single, FURTHER + 7)] {
        own.scene.config["linux"]["uidMappings"] = map.clone();
        own.scene.config["linux"]["gidMappings"] = map;
        let namespaces = own.scene.config["linux"]["namespaces"]
            .as_array_mut()
            .unwrap();
        namespaces.retain(|namespace| namespace["type"] != "user");
        namespaces.insert(0, json!({ "type": "user" }));
        own.scene.config["process"]["user"] = json!({ "uid": 7, "gid": 7, "additionalGids": [8] });
        own.start();
        assert_eq!(own.exec("id -u; id -G; echo >/dev/null").ok(), "7\n7 8\n");
        let status = std::fs::read_to_string(format!("/proc/{}/status", own.init())).unwrap();
        assert!(status.contains(&format!("Uid:\t{outside}\t")), "{status}");
        own.ct(&["delete", "--force", "ID"]).ok();
    }
}

/// With every capability there is, the container's root is the user and no more.
#[test]
fn nobody_gets_more_than_the_user() {
    let Some(mut own) = Rootless::new(&["sleep", "1000"], Ids::Many) else {
        return;
    };
    let all = json!([
        "CAP_MKNOD",
        "CAP_SYS_ADMIN",
        "CAP_DAC_OVERRIDE",
        "CAP_DAC_READ_SEARCH",
        "CAP_SYS_RAWIO",
        "CAP_SYS_MODULE",
        "CAP_SYS_PTRACE",
        "CAP_SYS_TIME",
        "CAP_SYS_RESOURCE",
        "CAP_CHOWN",
        "CAP_FOWNER",
        "CAP_KILL",
        "CAP_SETUID",
    ]);
    own.scene.config["process"]["capabilities"] =
        json!({ "bounding": all, "effective": all, "permitted": all });
    own.scene.config["process"]["noNewPrivileges"] = json!(false);
    // The host's root's files, bound in.
    let given = tempfile::tempdir().unwrap();
    std::fs::set_permissions(given.path(), PermissionsExt::from_mode(0o755)).unwrap();
    let secret = given.path().join("secret");
    std::fs::write(&secret, "secret").unwrap();
    std::fs::set_permissions(&secret, PermissionsExt::from_mode(0o600)).unwrap();
    let mounts = own.scene.config["mounts"].as_array_mut().unwrap();
    mounts.push(json!({ "destination": "/given", "type": "bind", "source": given.path(), "options": ["rbind"] }));
    own.start();
    for script in [
        "cat /given/secret",
        "busybox chown 0 /given/secret",
        "busybox chmod 666 /given/secret",
        "echo more >/given/more",
        "busybox mknod /tmp/null c 1 3",
        "busybox mount -t ext4 /dev/vda /tmp",
        "busybox mount -t devtmpfs none /tmp",
        "echo 1 >/proc/sys/kernel/panic",
        "busybox kill -0 1000000",
        "busybox hostname -F /given/secret",
        "busybox chroot /proc/1/root/../.. cat /given/secret",
        "echo more >>/proc/self/exe",
    ] {
        let ended = own.exec(script);
        assert!(ended.code != Some(0), "{script}: {}", ended.stdout);
    }
    assert_eq!(std::fs::read_to_string(&secret).unwrap(), "secret");
    let built = std::fs::metadata(&own.program).unwrap();
    assert_eq!(built.permissions().mode() & 0o022, 0);
}

/// Where a part of the v2 tree is the user's, containers have their cgroups below their caller's.
#[test]
fn a_delegated_cgroup_is_used() {
    if !on_unified("a_delegated_cgroup_is_used") {
        return;
    }
    let Some(own) = Rootless::new(&["sleep", "1000"], Ids::One) else {
        return;
    };
    let delegated = Path::new("/sys/fs/cgroup/atoll-test-user").join(&own.scene.id);
    std::fs::create_dir_all(&delegated).unwrap();
    chown(&delegated);
    let script = "echo $$ >\"$0/cgroup.procs\" && exec \"$@\"";
    let ct = |arguments: &[&str]| {
        let inner = own.command(arguments);
        let mut command = Command::new("sh");
        command.args(["-c", script]).arg(&delegated);
        command.arg(inner.get_program()).args(inner.get_args());
        let file = |name: &str| std::fs::File::create(own.scene.path(name)).unwrap();
        command.stdout(file("stdout")).stderr(file("stderr"));
        let code = command.stdin(Stdio::null()).status().unwrap().code();
        let text = |name: &str| std::fs::read_to_string(own.scene.path(name)).unwrap();
        (code, text("stdout"), text("stderr"))
    };
    let ok = |arguments: &[&str]| {
        let (code, said, error) = ct(arguments);
        assert_eq!(code, Some(0), "{arguments:?}: {error}");
        said
    };
    ok(&["create", "ID"]);
    ok(&["start", "ID"]);
    let directory = delegated.join("atoll-test").join(&own.scene.id);
    let processes = || std::fs::read_to_string(directory.join("cgroup.procs")).unwrap();
    assert_eq!(processes().trim(), own.init().to_string());
    assert_eq!(
        ok(&["ps", "--format", "json", "ID"]).trim(),
        format!("[{}]", own.init())
    );
    ok(&["pause", "ID"]);
    assert_eq!(own.status(), "paused");
    ok(&["resume", "ID"]);
    assert!(ok(&["events", "--stats", "ID"]).contains("\"stats\""));
    ok(&["exec", "--detach", "ID", "sleep", "1000"]);
    assert_eq!(processes().lines().count(), 2);
    ok(&["delete", "--force", "ID"]);
    assert!(!directory.exists());
    // Without a right to the caller's own there is none.
    let owner = std::os::unix::fs::chown(delegated.join("cgroup.procs"), Some(0), Some(0));
    owner.unwrap();
    ok(&["create", "ID"]);
    assert!(!directory.exists());
    let (_, _, error) = ct(&["ps", "ID"]);
    assert!(error.contains("has no cgroup"), "{error}");
    ok(&["delete", "--force", "ID"]);
    for directory in [&delegated.join("atoll-test"), &delegated] {
        std::fs::remove_dir(directory).unwrap();
    }
}

/// Podman of the same user, who has no further ids: its own storage, no network.
#[test]
fn podman_of_an_ordinary_user() {
    let Some(own) = Rootless::new(&["true"], Ids::One) else {
        return;
    };
    let conf = "[containers]\ndefault_ulimits=[\"nofile=1024:1024\",\"nproc=4096:4096\"]\nnetns=\"none\"\n\
        [engine]\ncgroup_manager=\"cgroupfs\"\nevents_logger=\"file\"\nlock_type=\"file\"\n\
        runtime_supports_nocgroup=[\"program\"]\n";
    std::fs::write(own.scene.path("containers.conf"), conf).unwrap();
    let (rootfs, archive) = (own.scene.path("rootfs"), own.scene.path("image.tar"));
    let mut tar = Command::new("tar");
    tar.args(["--owner=0", "--group=0", "-C"])
        .arg(&rootfs)
        .arg("-cf")
        .arg(&archive)
        .arg(".");
    assert!(tar.status().unwrap().success());
    let place = |name: &str| format!("--{name}={}", own.scene.path(name).display());
    let podman = |arguments: &[&str]| {
        let mut command = as_user();
        let file = |name: &str| std::fs::File::create(own.scene.path(name)).unwrap();
        let text = |name: &str| std::fs::read_to_string(own.scene.path(name)).unwrap();
        command
            .current_dir(own.scene.directory.path())
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("HOME", own.scene.directory.path())
            .env("USER", "atoll-test")
            .env("XDG_RUNTIME_DIR", own.scene.directory.path())
            .env("CONTAINERS_CONF", own.scene.path("containers.conf"))
            .args(["podman", "--log-level=error", "--storage-driver=vfs"])
            .args(["root", "runroot", "tmpdir"].map(place))
            .arg("--runtime")
            .arg(&own.program)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(file("stdout"))
            .stderr(file("stderr"));
        let code = command.status().unwrap().code();
        (code, text("stdout"), text("stderr"))
    };
    let (code, _, said) = podman(&["version"]);
    if code != Some(0) {
        println!(
            "ATOLL-SKIP: rootless podman does not work here: {}",
            said.trim()
        );
        return;
    }
    // Ends the process that holds podman's own namespace, also after a failure.
    let _end = End(&|| drop(podman(&["system", "migrate"])));
    let ok = |arguments: &[&str]| {
        let (code, said, error) = podman(arguments);
        assert_eq!(code, Some(0), "{arguments:?}: {error}");
        said
    };
    ok(&["import", archive.to_str().unwrap(), "scene:1"]);
    let run = ["run", "--rm", "scene:1", "sh", "-c", "id -u; exit 42"];
    let (code, said, error) = podman(&run);
    assert_eq!((code, said.as_str()), (Some(42), "0\n"), "{error}");
    for option in ["--uidmap=0:0:1", "--pid=host", "--cgroups=disabled"] {
        assert_eq!(ok(&["run", "--rm", option, "scene:1", "id", "-u"]), "0\n");
    }
    let script = "echo out; exec sleep 1000";
    ok(&["run", "--detach", "--name=c", "scene:1", "sh", "-c", script]);
    wait_for("the log", || ok(&["logs", "c"]) == "out\n");
    assert_eq!(podman(&["exec", "c", "sh", "-c", "exit 3"]).0, Some(3));
    ok(&["kill", "c"]);
    assert_eq!(ok(&["wait", "c"]).trim(), "137");
    ok(&["rm", "c"]);
}

/// Does what is to be done at the end.
struct End<'a>(&'a dyn Fn());

impl Drop for End<'_> {
    fn drop(&mut self) {
        (self.0)();
    }
}

/// Nobody has made a namespace: `spec --rootless`, and every command as the user.
#[test]
fn an_ordinary_user_needs_no_namespace() {
    let Some(own) = Rootless::new(&["sleep", "1000"], Ids::One) else {
        return;
    };
    let ct = |arguments: &[&str]| own.outside(arguments);
    let directory = own.scene.directory.path();
    let path = directory.join("config.json");
    std::fs::remove_file(&path).ok();
    ct(&["spec", "--rootless"]).ok();
    let mut config: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    config["process"]["terminal"] = json!(false);
    config["root"]["readonly"] = json!(false);
    let mut write = |arguments: &[&str]| {
        config["process"]["args"] = json!(arguments);
        std::fs::write(&path, config.to_string()).unwrap();
    };
    write(&[
        "sh",
        "-c",
        "id -u; cat /proc/self/uid_map; echo more >/made; exit 5",
    ]);
    let ended = ct(&["run", "c"]);
    let words: Vec<_> = ended.stdout.split_whitespace().collect();
    assert_eq!(words, ["0", "0", "0", "1"], "{}", ended.stderr);
    assert_eq!(ended.code, Some(5));
    let made = std::fs::metadata(directory.join("rootfs/made")).unwrap();
    assert_eq!(std::os::unix::fs::MetadataExt::uid(&made), USER);

    let script = "sleep 1000 & exec sleep 1000";
    write(&["sh", "-c", script]);
    let state =
        || -> serde_json::Value { serde_json::from_str(&ct(&["state", "c"]).ok()).unwrap() };
    ct(&["create", "c"]).ok();
    assert_eq!(state()["status"], "created");
    // Also before it is started.
    assert_eq!(ct(&["exec", "c", "id", "-u"]).ok(), "0\n");
    ct(&["start", "c"]).ok();
    let init = state()["pid"].to_string();
    let status = std::fs::read_to_string(format!("/proc/{init}/status")).unwrap();
    assert!(status.contains(&format!("Uid:\t{USER}\t")), "{status}");
    let ended = ct(&[
        "exec",
        "c",
        "sh",
        "-c",
        "cat /made; echo $$ >/dev/null; exit 7",
    ]);
    assert_eq!(
        (ended.code, ended.stdout.as_str()),
        (Some(7), "more\n"),
        "{}",
        ended.stderr
    );
    refused(
        &ct(&["exec", "none", "true"]),
        "container none does not exist",
    );
    ct(&["kill", "c", "KILL"]).ok();
    wait_for("the end", || state()["status"] == "stopped");
    refused(&ct(&["exec", "c", "true"]), "is stopped");
    ct(&["delete", "c"]).ok();
    assert_eq!(ct(&["list", "-q"]).ok(), "");
}

#[test]
fn an_ordinary_user_has_no_other_ids() {
    let Some(mut own) = Rootless::new(&["true"], Ids::One) else {
        return;
    };
    let namespaces = own.scene.config["linux"]["namespaces"].as_array_mut();
    namespaces.unwrap().push(json!({ "type": "user" }));
    let id = |id: u32, size: u32| json!([{ "containerID": 0, "hostID": id, "size": size }]);
    for (uids, gids, why) in [
        (
            id(FURTHER, 65536),
            id(USER, 1),
            "linux.uidMappings: 65536 ids from 1300000 on",
        ),
        (
            id(USER, 1),
            id(USER, 2),
            "linux.gidMappings: 2 ids from 65533 on",
        ),
    ] {
        own.scene.config["linux"]["uidMappings"] = uids;
        own.scene.config["linux"]["gidMappings"] = gids;
        // Writes the configuration.
        own.ct(&["list"]).ok();
        refused(&own.outside(&["create", "c"]), why);
        assert_eq!(own.outside(&["list", "-q"]).ok(), "");
    }
}

/// A user's namespace without a mount namespace of its own: the runtime makes one.
#[test]
fn a_user_namespace_alone_is_enough() {
    let Some(own) = Rootless::new(&["sh", "-c", "echo from inside; exit 5"], Ids::One) else {
        return;
    };
    drop(own.command(&[]));
    let output = as_user()
        .current_dir(own.scene.directory.path())
        .args(["unshare", "--user", "--map-root-user"])
        .arg(&own.program)
        .args(["--root", "run", "run", "alone"])
        .output()
        .unwrap();
    let ended = Ended::of(&output);
    assert_eq!(
        (ended.code, ended.stdout.as_str()),
        (Some(5), "from inside\n"),
        "{}",
        ended.stderr
    );
}

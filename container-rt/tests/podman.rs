// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! podman with `atoll-ct` as its runtime: the widest user of the command line there is. Its own storage and locks in a
//! temporary directory (else all podmans of root share one table of locks), an image imported from busybox, no network
//! but the loopback to a registry.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "tests fail by panicking and skip by a line"
)]

#[path = "../../tests/src/registry.rs"]
mod registry;
mod scene;

use std::path::{Path, PathBuf};
use std::process::Command;

use registry::Registry;
use scene::{Scene, can_run, criu, processes_in, wait_for};

struct Podman {
    scene: Scene,
}

impl Podman {
    /// Nothing when podman does not work here at all: with another runtime's help or without.
    fn new() -> Option<Self> {
        if !can_run() {
            return None;
        }
        let podman = Self {
            scene: Scene::new(&["true"]),
        };
        let conf = "[containers]\ndefault_ulimits=[\"nofile=1024:1024\",\"nproc=4096:4096\"]\n\
            netns=\"none\"\n[engine]\ncgroup_manager=\"cgroupfs\"\nevents_logger=\"file\"\nlock_type=\"file\"\n\
            runtime_supports_nocgroup=[\"atoll-ct\"]\n";
        std::fs::write(podman.scene.path("containers.conf"), conf).unwrap();
        let archive = podman.scene.path("image.tar");
        let tar = Command::new("tar")
            .args([
                "-C",
                podman.scene.path("rootfs").to_str()?,
                "-cf",
                archive.to_str()?,
                ".",
            ])
            .status();
        assert!(tar.unwrap().success());
        if let Err(error) = podman.command(&["version"]).output() {
            println!("ATOLL-SKIP: podman cannot be executed: {error} (Debian package podman)");
            return None;
        }
        let (code, text) = podman.run(&["import", archive.to_str()?, "scene:1"]);
        assert_eq!(code, Some(0), "{text}");
        Some(podman)
    }

    fn storage(&self) -> PathBuf {
        self.scene.path("podman")
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("podman");
        command
            .env("CONTAINERS_CONF", self.scene.path("containers.conf"))
            .env("XDG_RUNTIME_DIR", self.scene.directory.path())
            .arg("--root")
            .arg(self.storage())
            .arg("--runroot")
            .arg(self.scene.path("runroot"))
            .arg("--tmpdir")
            .arg(self.scene.path("tmpdir"))
            .args(["--storage-driver", "vfs", "--runtime"])
            .arg(Path::new(env!("CARGO_BIN_EXE_atoll-ct")))
            .args(arguments);
        command
    }

    /// Exit code and everything printed.
    fn run(&self, arguments: &[&str]) -> (Option<i32>, String) {
        let output = self.command(arguments).output().unwrap();
        let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
        text.push_str(&String::from_utf8_lossy(&output.stderr));
        (output.status.code(), text)
    }

    #[track_caller]
    fn ok(&self, arguments: &[&str]) -> String {
        let (code, text) = self.run(arguments);
        assert_eq!(code, Some(0), "podman {arguments:?}: {text}");
        text
    }
}

impl Drop for Podman {
    fn drop(&mut self) {
        self.run(&["rm", "--all", "--force", "--time", "0"]);
    }
}

/// No cgroup is made, and the container's processes end with it nevertheless.
#[test]
fn without_cgroups() {
    let Some(podman) = Podman::new() else {
        return;
    };
    let read = |path: &str| std::fs::read_to_string(path).unwrap();
    let mut words = vec!["run", "--detach", "--name=c", "--cgroups=disabled"];
    words.extend(["scene:1", "sh", "-c", "sleep 1000 & exec sleep 1000"]);
    podman.ok(&words);
    let init = podman.ok(&["inspect", "--format", "{{.State.Pid}}", "c"]);
    let init = init.trim();
    assert_eq!(
        read(&format!("/proc/{init}/cgroup")),
        read("/proc/self/cgroup")
    );
    assert_eq!(podman.run(&["exec", "c", "sh", "-c", "exit 3"]).0, Some(3));
    let namespace = std::fs::read_link(format!("/proc/{init}/ns/mnt")).unwrap();
    podman.ok(&["rm", "--force", "--time", "0", "c"]);
    wait_for("the end of all", || processes_in("mnt", &namespace) == 0);
}

#[test]
fn exit_codes_and_output() {
    let Some(podman) = Podman::new() else {
        return;
    };
    assert_eq!(
        podman.ok(&["run", "--rm", "scene:1", "sh", "-c", "echo hi; id -u"]),
        "hi\n0\n"
    );
    assert_eq!(
        podman
            .run(&["run", "--rm", "scene:1", "sh", "-c", "exit 42"])
            .0,
        Some(42)
    );
    let (code, text) = podman.run(&["run", "--rm", "scene:1", "nosuch"]);
    assert_eq!(code, Some(127), "{text}");
    let (code, text) = podman.run(&["run", "--rm", "scene:1", "/tmp"]);
    assert_eq!(code, Some(126), "{text}");
    let map = [
        "run",
        "--rm",
        "--uidmap",
        "0:100000:65536",
        "scene:1",
        "cat",
        "/proc/self/uid_map",
    ];
    assert_eq!(podman.ok(&map).split_whitespace().nth(1), Some("100000"));
    let user = [
        "run",
        "--rm",
        "--user",
        "7:8",
        "scene:1",
        "sh",
        "-c",
        "id -u; id -g",
    ];
    assert_eq!(podman.ok(&user), "7\n8\n");
    // Everything is read-only but file systems in memory, which begin with what the image has.
    let read_only = ["run", "--rm", "--read-only", "--tmpfs=/etc", "scene:1"];
    let script = "ls /etc; touch /etc/new /tmp/new /run/new && echo made; touch /new 2>/dev/null || echo refused";
    let said = podman.ok(&[&read_only[..], &["busybox", "sh", "-c", script]].concat());
    assert!(said.ends_with("made\nrefused\n"), "{said}");
}

#[test]
fn a_container_in_the_background() {
    let Some(podman) = Podman::new() else {
        return;
    };
    podman.ok(&[
        "run",
        "-d",
        "--name",
        "c",
        "scene:1",
        "sh",
        "-c",
        "echo out; exec sleep 1000",
    ]);
    wait_for("the log", || podman.ok(&["logs", "c"]) == "out\n");
    assert_eq!(podman.run(&["exec", "c", "sh", "-c", "exit 3"]).0, Some(3));
    assert_eq!(podman.run(&["exec", "c", "nosuch"]).0, Some(127));
    podman.ok(&["pause", "c"]);
    assert!(podman.ok(&["ps", "--all"]).contains("Paused"));
    podman.ok(&["unpause", "c"]);
    assert!(podman.ok(&["top", "c"]).contains("sleep 1000"));
    assert!(podman.ok(&["stats", "--no-stream", "c"]).contains('%'));
    podman.ok(&["kill", "c"]);
    assert_eq!(podman.ok(&["wait", "c"]).trim(), "137");
    podman.ok(&["rm", "c"]);
}

#[test]
fn terminals() {
    let Some(podman) = Podman::new() else {
        return;
    };
    let script = "test -t 0 && test -t 1 && echo terminal";
    podman.ok(&[
        "run",
        "-d",
        "--name",
        "t",
        "-t",
        "scene:1",
        "sh",
        "-c",
        &format!("{script}; exec sleep 1000"),
    ]);
    wait_for("the log", || podman.ok(&["logs", "t"]).contains("terminal"));
    // script(1) gives podman itself a terminal.
    let exec = podman.command(&["exec", "-it", "t", "sh", "-c", script]);
    let line: Vec<String> = std::iter::once(exec.get_program())
        .chain(exec.get_args())
        .map(|word| format!("'{}'", word.to_string_lossy()))
        .collect();
    let output = Command::new("script")
        .args(["-qec", &line.join(" "), "/dev/null"])
        .env("CONTAINERS_CONF", podman.scene.path("containers.conf"))
        .env("XDG_RUNTIME_DIR", podman.scene.directory.path())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("terminal"), "{output:?}");
}

/// Each RUN is a container of its own, whose changes the next one sees.
#[test]
fn an_image_is_built() {
    let Some(podman) = Podman::new() else {
        return;
    };
    let file = "FROM scene:1\nENV WORD=built\nCOPY given /given\n\
        RUN cat /given > /made && echo $WORD >> /made\nRUN id -u >> /made\n\
        USER 7\nWORKDIR /tmp\nCMD [\"sh\", \"-c\", \"cat /made; id -u; echo $PWD\"]\n";
    let context = podman.scene.path("context");
    std::fs::create_dir(&context).unwrap();
    std::fs::write(context.join("Containerfile"), file).unwrap();
    std::fs::write(context.join("given"), "given\n").unwrap();
    let context = context.to_str().unwrap();
    // Without an image a step: their copies take longer than the steps.
    let options = ["--layers=false", "--network=none", "--ulimit=nofile=1024"];
    let build = |tag| {
        let named = ["build", "--isolation=oci", "--tag", tag];
        [&named[..], &options[..], &[context]].concat()
    };
    podman.ok(&build("built:1"));
    assert_eq!(
        podman.ok(&["run", "--rm", "built:1"]),
        "given\nbuilt\n0\n7\n/tmp\n"
    );
    std::fs::write(
        podman.scene.path("context/Containerfile"),
        "FROM scene:1\nRUN echo to be seen; exit 9\n",
    )
    .unwrap();
    let (code, text) = podman.run(&build("built:2"));
    assert!(
        code != Some(0) && text.contains("to be seen") && text.contains("exit status 9"),
        "{code:?} {text}"
    );
}

#[test]
fn restarts_and_health() {
    let Some(podman) = Podman::new() else {
        return;
    };
    let field = |id: &str, template: &str| {
        let text = podman.ok(&["inspect", "--format", template, id]);
        text.trim().to_owned()
    };
    let run = ["run", "-d", "--restart=on-failure:2", "--name=r", "scene:1"];
    podman.ok(&[&run[..], &["sh", "-c", "echo again; exit 3"]].concat());
    wait_for("the last restart", || {
        podman.ok(&["logs", "r"]) == "again\nagain\nagain\n"
            && field("r", "{{.State.Running}} {{.State.ExitCode}}") == "false 3"
    });
    assert_eq!(field("r", "{{.RestartCount}}"), "2");

    // Without systemd nobody runs the checks by a timer: they are run here.
    let health = [
        "--health-cmd=cat /well",
        "--health-interval=disable",
        "--health-retries=1",
    ];
    let run = ["run", "-d", "--name=h"];
    podman.ok(&[&run[..], &health[..], &["scene:1", "sleep", "1000"]].concat());
    assert_eq!(podman.run(&["healthcheck", "run", "h"]).0, Some(1));
    assert_eq!(field("h", "{{.State.Health.Status}}"), "unhealthy");
    podman.ok(&["exec", "h", "sh", "-c", "echo > /well"]);
    assert_eq!(podman.run(&["healthcheck", "run", "h"]).0, Some(0));
    assert_eq!(field("h", "{{.State.Health.Status}}"), "healthy");
}

/// Nothing of the image is left here: its parts come from the registry.
#[test]
fn an_image_of_a_registry_runs() {
    let Some(podman) = Podman::new() else {
        return;
    };
    let Some(registry) = Registry::start(Command::new("setpriv")) else {
        return;
    };
    let image = format!("{}/team/scene:1", registry.address());
    podman.ok(&["push", "--tls-verify=false", "scene:1", &image]);
    podman.ok(&["rmi", "scene:1"]);
    assert_eq!(podman.ok(&["images", "--quiet"]), "");

    let run = ["run", "--rm", "--pull=missing", "--tls-verify=false"];
    let with = |image: &str, script: &str| {
        let command = [&run[..], &[image, "sh", "-c", script]].concat();
        let output = podman.command(&command).output().unwrap();
        let [text, log] = [output.stdout, output.stderr].map(|b| String::from_utf8(b).unwrap());
        (output.status.code(), text, log)
    };
    let (code, text, log) = with(&image, "echo pulled; id -u; exit 42");
    assert_eq!((code, text.as_str()), (Some(42), "pulled\n0\n"), "{log}");
    assert!(log.contains(&format!("Trying to pull {image}")), "{log}");
    assert!(podman.ok(&["images"]).contains("/team/scene"));

    let none = format!("{}/team/none:1", registry.address());
    let (code, text, log) = with(&none, "echo pulled");
    assert_eq!((code, text.as_str()), (Some(125), ""), "{log}");
    assert!(log.contains("manifest unknown"), "{log}");
}

#[test]
fn a_checkpoint_is_restored() {
    let Some(criu) = criu() else { return };
    let Some(podman) = Podman::new() else { return };
    // podman asks CRIU for its version by itself.
    let path = std::env::var("PATH").unwrap();
    let path = format!("{}:{path}", criu.parent().unwrap().display());
    let ok = |arguments: &[&str]| {
        let output = podman.command(arguments).env("PATH", &path).output();
        let output = output.unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments:?}: {errors}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let count = "i=0; while :; do i=$((i+1)); echo $i; sleep 0.1; done";
    let last = || ok(&["logs", "counter"]).lines().last().map(str::to_owned);
    let number = || {
        last()
            .and_then(|line| line.parse::<u64>().ok())
            .unwrap_or(0)
    };
    ok(&[
        "run", "--detach", "--name", "counter", "scene:1", "sh", "-c", count,
    ]);
    wait_for("a number", || number() > 3);
    ok(&["container", "checkpoint", "counter"]);
    let status = ok(&["ps", "--all", "--format", "{{.Status}}"]);
    assert!(status.starts_with("Exited"), "{status}");
    let before = number();
    ok(&["container", "restore", "counter"]);
    wait_for("the next number", || number() > before);
    let lines = ok(&["logs", "counter"]);
    let ones = lines.lines().filter(|line| *line == "1").count();
    assert_eq!(ones, 1, "it did not begin again: {lines}");
    ok(&["rm", "--force", "--time", "0", "counter"]);
}

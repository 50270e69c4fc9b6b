// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A containerd of a test's own, and `ctr` to speak with it.
//!
//! ```text
//! test ──stdin──► keeper: first process of a PID namespace, with mounts and a /run of its own
//!                   ├─ containerd        (the test may kill it and start it again)
//!                   └─ shims, containers (outlive it)
//! ```
//!
//! When the keeper's input ends, because the test has ended or was killed, it kills all of them and removes their
//! cgroups; their mounts and sockets go with the namespace.

use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Output, Stdio};

use crate::scene::{Scene, can_run, wait_for};

/// The image that each containerd has: busybox, a shell as its command.
pub const IMAGE: &str = "docker.io/library/scene:1";

/// `$1` is the containerd namespace, which names the cgroups; `$2` the version of cgroups.
const KEEPER: &str = r#"
mount -t tmpfs tmpfs /run || exit 77
if [ "$2" = unified ]; then
    umount -R /sys/fs/cgroup && mount -t cgroup2 cgroup2 /sys/fs/cgroup || exit 77
fi
echo ready
read -r end
kill -KILL -1
tries=300
while [ $tries -gt 0 ] && find /sys/fs/cgroup -type d -name "$1" | grep -q .; do
    find /sys/fs/cgroup -depth -type d -path "*/$1*" -exec rmdir {} + 2>/dev/null
    tries=$((tries - 1))
    sleep 0.1
done
"#;

/// Which version of cgroups containerd and the containers see.
#[derive(Clone, Copy, PartialEq)]
pub enum Cgroups {
    /// The host's.
    Host,
    /// v2 alone, with the controllers that v1 has left for it.
    Unified,
}

pub struct Containerd {
    pub scene: Scene,
    keeper: Child,
    /// Given up to end the keeper.
    input: Option<ChildStdin>,
    /// nsenter, waiting for containerd.
    daemon: Option<Child>,
    version: Cgroups,
    /// Where programs are looked for before all other directories.
    programs: Option<PathBuf>,
}

impl Containerd {
    /// Nothing when containerd or these cgroups cannot be had here; the reason is printed.
    pub fn new(cgroups: Cgroups) -> Option<Self> {
        Self::with_programs(cgroups, None)
    }

    /// The same with a directory of programs of its own.
    pub fn with_programs(cgroups: Cgroups, programs: Option<PathBuf>) -> Option<Self> {
        if !can_run() {
            return None;
        }
        if let Err(error) = Command::new("containerd").arg("--version").output() {
            println!(
                "ATOLL-SKIP: containerd cannot be executed: {error} (Debian package containerd)"
            );
            return None;
        }
        let scene = Scene::new(&["sleep", "1000"]);
        let version = if cgroups == Cgroups::Unified {
            "unified"
        } else {
            "host"
        };
        let mut keeper = Command::new("unshare")
            .args([
                "--mount",
                "--pid",
                "--fork",
                "--mount-proc",
                "sh",
                "-c",
                KEEPER,
            ])
            .args([scene.directory.path().to_str()?, &scene.id, version])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let output = keeper.stdout.take().unwrap();
        BufReader::new(output).read_line(&mut line).unwrap();
        let mut containerd = Self {
            scene,
            input: keeper.stdin.take(),
            keeper,
            daemon: None,
            version: cgroups,
            programs,
        };
        if line != "ready\n" {
            assert_eq!(containerd.keeper.wait().unwrap().code(), Some(77));
            println!("ATOLL-SKIP: cgroups ({version}) cannot be mounted here");
            return None;
        }
        containerd.configure();
        containerd.start();
        let archive = containerd.archive();
        let image = archive.to_str()?;
        containerd.ok(&["image", "import", "--snapshotter", "native", image]);
        Some(containerd)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.scene.path(name)
    }

    fn text_path(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    fn configure(&self) {
        let socket = self.text_path("c.sock");
        let config = format!(
            "version = 2\nroot = {:?}\nstate = {:?}\n\
            disabled_plugins = [\"io.containerd.grpc.v1.cri\", \"io.containerd.internal.v1.opt\", \
            \"io.containerd.snapshotter.v1.aufs\", \"io.containerd.snapshotter.v1.btrfs\", \
            \"io.containerd.snapshotter.v1.devmapper\", \"io.containerd.snapshotter.v1.zfs\"]\n\
            [grpc]\naddress = {socket:?}\n[ttrpc]\naddress = \"{socket}.ttrpc\"\n",
            self.path("root"),
            self.path("state"),
        );
        std::fs::write(self.path("config.toml"), config).unwrap();
    }

    /// Starts containerd, and waits until it answers.
    pub fn start(&mut self) {
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.path("containerd.log"))
            .unwrap();
        let script = "echo $$ > \"$0/pid\"; exec containerd --config \"$0/config.toml\"";
        let mut command = self.inside(&["sh", "-c", script]);
        command
            .arg(self.scene.directory.path())
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log);
        if let Some(programs) = &self.programs {
            let others = std::env::var("PATH").unwrap();
            command.env("PATH", format!("{}:{others}", programs.display()));
        }
        self.daemon = Some(command.spawn().unwrap());
        wait_for("containerd", || self.run(&["version"]).0 == Some(0));
    }

    /// Ends containerd as a crash would.
    pub fn kill(&mut self) {
        let pid = std::fs::read_to_string(self.path("pid")).unwrap();
        let killed = self.inside(&["kill", "-KILL", pid.trim()]).status();
        assert!(killed.unwrap().success());
        self.daemon.take().unwrap().wait().unwrap();
    }

    /// An archive in Docker's form, with one layer.
    fn archive(&self) -> PathBuf {
        let tree = self.path("image");
        std::fs::create_dir(&tree).unwrap();
        let tar = |from: &Path, to: &Path| {
            let command = Command::new("tar")
                .arg("-C")
                .arg(from)
                .arg("-cf")
                .arg(to)
                .arg(".")
                .status();
            assert!(command.unwrap().success());
        };
        for applet in ["ls", "kill", "wc", "readlink"] {
            symlink("busybox", self.path("rootfs/bin").join(applet)).unwrap();
        }
        let layer = tree.join("layer.tar");
        tar(&self.path("rootfs"), &layer);
        let sum = Command::new("sha256sum")
            .arg(&layer)
            .output()
            .unwrap()
            .stdout;
        let sum = String::from_utf8(sum).unwrap();
        let config = serde_json::json!({
            "architecture": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" },
            "os": "linux",
            "config": { "Env": ["PATH=/bin"], "Cmd": ["sh"] },
            "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{}", sum.split_once(' ').unwrap().0)] },
        });
        std::fs::write(tree.join("config.json"), config.to_string()).unwrap();
        let manifest = serde_json::json!([
            { "Config": "config.json", "RepoTags": [IMAGE], "Layers": ["layer.tar"] },
        ]);
        std::fs::write(tree.join("manifest.json"), manifest.to_string()).unwrap();
        let archive = self.path("image.tar");
        let names = ["manifest.json", "config.json", "layer.tar"];
        let made = Command::new("tar")
            .arg("-C")
            .arg(&tree)
            .arg("-cf")
            .arg(&archive)
            .args(names)
            .status();
        assert!(made.unwrap().success());
        archive
    }

    /// A command beside containerd, in its namespaces.
    pub fn inside(&self, words: &[&str]) -> Command {
        let of_keeper = format!("/proc/{}/ns", self.keeper.id());
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--mount={of_keeper}/mnt"))
            .arg(format!("--pid={of_keeper}/pid_for_children"))
            .arg("--")
            .args(words);
        command
    }

    /// `ctr` in the test's namespace of containerd.
    pub fn ctr(&self, arguments: &[&str]) -> Command {
        let socket = self.text_path("c.sock");
        let words = ["ctr", "--address", &socket, "--namespace", &self.scene.id];
        self.inside(&[&words[..], arguments].concat())
    }

    /// Exit code and everything printed.
    pub fn run(&self, arguments: &[&str]) -> (Option<i32>, String) {
        printed(&self.ctr(arguments).output().unwrap())
    }

    #[track_caller]
    pub fn ok(&self, arguments: &[&str]) -> String {
        let (code, text) = self.run(arguments);
        assert_eq!(code, Some(0), "ctr {arguments:?}: {text}{}", self.log());
        text
    }

    /// `ctr run` with `atoll-ct`; the options come before the image, if there is one.
    pub fn run_arguments<'a>(&self, words: &[&'a str]) -> Vec<&'a str> {
        let ours = [
            "run",
            "--snapshotter",
            "native",
            "--runc-binary",
            env!("CARGO_BIN_EXE_atoll-ct"),
        ];
        [&ours[..], words].concat()
    }

    /// Runs a container in the background, with its output in the file `ID.log`.
    #[track_caller]
    pub fn background(&self, options: &[&str], id: &str, script: &str) {
        let log = format!("file://{}", self.text_path(&format!("{id}.log")));
        // v1 has left no `cpu` for v2, and `ctr` sets its shares unless told not to.
        let shares: &[&str] = match self.version {
            Cgroups::Host => &[],
            Cgroups::Unified => &["--cpu-shares", "0"],
        };
        let first: &[&str] = &["--detach", "--log-uri", &log];
        let last: &[&str] = &[IMAGE, id, "sh", "-c", script];
        let words = [first, shares, options, last].concat();
        self.ok(&self.run_arguments(&words));
    }

    /// What a container in the background has printed.
    pub fn output(&self, id: &str) -> String {
        std::fs::read_to_string(self.path(&format!("{id}.log"))).unwrap_or_default()
    }

    /// The status of a container's task, if it has one.
    pub fn status(&self, id: &str) -> Option<String> {
        let text = self.ok(&["task", "list"]);
        let mut lines = text.lines().map(|line| line.split_whitespace());
        lines.find_map(|mut words| {
            (words.next()? == id)
                .then(|| words.nth(1))
                .flatten()
                .map(str::to_owned)
        })
    }

    #[track_caller]
    pub fn wait_status(&self, id: &str, wanted: &str) {
        wait_for(wanted, || self.status(id).as_deref() == Some(wanted));
    }

    /// Removes a container whose program has ended or is killed here. Returns what its task ended with.
    #[track_caller]
    pub fn remove(&self, id: &str) -> String {
        if self.status(id).as_deref() != Some("STOPPED") {
            self.ok(&["task", "kill", "--all", "--signal", "KILL", id]);
        }
        self.wait_status(id, "STOPPED");
        let ended = self.ok(&["task", "rm", id]);
        self.ok(&["container", "rm", id]);
        ended
    }

    /// The cgroups of a container, or of all when `id` is empty, as the host sees them.
    pub fn cgroups(&self, id: &str) -> Vec<PathBuf> {
        cgroups(&self.scene.id)
            .into_iter()
            .map(|d| d.join(id))
            .filter(|d| d.exists())
            .collect()
    }

    /// A file of a container's cgroup, in whichever hierarchy has it.
    pub fn limit(&self, id: &str, file: &str) -> Option<String> {
        let mut all = self.cgroups(id).into_iter();
        all.find_map(|d| std::fs::read_to_string(d.join(file)).ok())
            .map(|text| text.trim().to_owned())
    }

    /// Shims that run, by the host's numbers.
    pub fn shims(&self) -> Vec<u32> {
        let shims = processes(&self.text_path("c.sock")).into_iter();
        shims
            .filter(|(_, line)| line.starts_with("/usr/bin/containerd-shim"))
            .map(|(pid, _)| pid)
            .collect()
    }

    /// Fails when a container that was removed has left something.
    #[track_caller]
    pub fn nothing_is_left(&self) {
        wait_for("the shims' end", || self.shims().is_empty());
        let left: Vec<PathBuf> = cgroups(&self.scene.id)
            .into_iter()
            .flat_map(|d| std::fs::read_dir(d).unwrap())
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.is_dir())
            .collect();
        assert!(left.is_empty(), "{left:?}");
        assert_eq!(self.ok(&["container", "list", "--quiet"]), "");
        let snapshots = self.ok(&["snapshot", "--snapshotter", "native", "list"]);
        assert!(!snapshots.contains("Active"), "{snapshots}");
        let script = "cat /proc/self/mounts | grep \"$0/\"; ls \"/run/containerd/runc/$1\"; \
            ls \"$0/state/io.containerd.runtime.v2.task/$1\"; ls /run/atoll-ct";
        let mut look = self.inside(&["sh", "-c", script]);
        let found = look
            .arg(self.scene.directory.path())
            .arg(&self.scene.id)
            .output()
            .unwrap();
        assert_eq!(String::from_utf8_lossy(&found.stdout), "");
    }

    fn log(&self) -> String {
        let text = std::fs::read_to_string(self.path("containerd.log")).unwrap_or_default();
        let lines: Vec<&str> = text.lines().rev().take(10).collect();
        lines
            .into_iter()
            .rev()
            .map(|line| format!("\ncontainerd: {line}"))
            .collect()
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        drop(self.input.take());
        let ended = self.keeper.wait();
        if let Some(mut daemon) = self.daemon.take() {
            daemon.wait().ok();
        }
        if !std::thread::panicking() {
            assert!(ended.unwrap().success(), "the keeper has failed");
            assert_eq!(cgroups(&self.scene.id), [] as [PathBuf; 0]);
        }
    }
}

/// Exit code and everything printed.
pub fn printed(output: &Output) -> (Option<i32>, String) {
    let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.push_str(&String::from_utf8_lossy(&output.stderr));
    (output.status.code(), text)
}

/// The cgroups of this name at the top of the host's hierarchies.
pub fn cgroups(name: &str) -> Vec<PathBuf> {
    let top = PathBuf::from("/sys/fs/cgroup");
    let hierarchies = std::fs::read_dir(&top)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    hierarchies
        .chain([top])
        .map(|d| d.join(name))
        .filter(|d| d.exists())
        .collect()
}

/// Processes with this text in their command line: number and line. One that has ended has no line.
pub fn processes(text: &str) -> Vec<(u32, String)> {
    let entries = std::fs::read_dir("/proc").unwrap();
    let pids = entries.filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok());
    let lines = pids.filter_map(|pid: u32| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        Some((pid, String::from_utf8_lossy(&line).replace('\0', " ")))
    });
    lines.filter(|(_, line)| line.contains(text)).collect()
}

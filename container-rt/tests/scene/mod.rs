// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A scene for a test: a temporary directory with a bundle (busybox as its root file system), a runtime root of
//! its own, and `atoll-ct` to run on them. Dropping it deletes what containers are left, also after a failure.
#![allow(dead_code, reason = "each test program uses its part")]

pub mod devices;
pub mod unified;

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// How long anything may take before the test fails; the machine may be busy.
pub const LIMIT: Duration = Duration::from_secs(60);

static NEXT: AtomicU32 = AtomicU32::new(0);

pub struct Scene {
    pub directory: tempfile::TempDir,
    pub config: Value,
    /// Unique among all running tests: cgroups are the host's.
    pub id: String,
}

/// How a command ended.
pub struct Ended {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Ended {
    pub fn of(output: &Output) -> Self {
        Self {
            code: output.status.code(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    #[track_caller]
    pub fn ok(self) -> String {
        assert_eq!(self.code, Some(0), "{}{}", self.stdout, self.stderr);
        self.stdout
    }
}

/// Whether containers can be made here at all. The reason is printed when not.
pub fn can_run() -> bool {
    let skip = if !nix::unistd::geteuid().is_root() {
        "containers need root"
    } else if !Path::new("/bin/busybox").exists() {
        "/bin/busybox is missing (Debian package busybox-static)"
    } else {
        return true;
    };
    println!("ATOLL-SKIP: {skip}");
    false
}

/// CRIU, when it can work here. The reason is printed when not.
pub fn criu() -> Option<PathBuf> {
    if !can_run() {
        return None;
    }
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/criu.sh");
    let made = Command::new(script).output().unwrap();
    if !made.status.success() {
        let reason = String::from_utf8_lossy(&made.stderr).into_owned();
        println!("ATOLL-SKIP: CRIU cannot be fetched: {}", reason.trim());
        return None;
    }
    let directory = String::from_utf8(made.stdout).unwrap();
    let program = Path::new(directory.trim()).join("criu");
    let check = Command::new(&program).arg("check").output().unwrap();
    if !check.status.success() {
        let said = String::from_utf8_lossy(&check.stderr).into_owned();
        let reason = said.lines().find(|line| line.contains("Error"));
        println!("ATOLL-SKIP: criu check: {}", reason.unwrap_or(&said));
        return None;
    }
    Some(program)
}

impl Scene {
    /// A container that executes `arguments`, with every namespace but the user's.
    pub fn new(arguments: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let rootfs = directory.path().join("rootfs");
        for sub in ["bin", "proc", "sys", "dev", "tmp", "etc"] {
            std::fs::create_dir_all(rootfs.join(sub)).unwrap();
        }
        std::fs::copy("/bin/busybox", rootfs.join("bin/busybox")).unwrap();
        for applet in [
            "sh", "cat", "id", "sleep", "true", "echo", "stty", "mkdir", "grep",
        ] {
            symlink("busybox", rootfs.join("bin").join(applet)).unwrap();
        }
        let made = atoll_ct(directory.path(), &["spec"]);
        made.ok();
        let text = std::fs::read(directory.path().join("config.json")).unwrap();
        let mut config: Value = serde_json::from_slice(&text).unwrap();
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let id = format!("test-{}-{number}", std::process::id());
        config["process"]["terminal"] = json!(false);
        config["process"]["args"] = json!(arguments);
        config["linux"]["cgroupsPath"] = json!(format!("/atoll-test/{id}"));
        config["root"]["readonly"] = json!(false);
        // On v1 the default has none, as runc's.
        let namespaces = config["linux"]["namespaces"].as_array_mut().unwrap();
        if !namespaces.contains(&json!({ "type": "cgroup" })) {
            namespaces.push(json!({ "type": "cgroup" }));
        }
        Self {
            directory,
            config,
            id,
        }
    }

    /// Gives the container a user namespace with its own range of ids, and its root file system that mapping.
    pub fn unprivileged(mut self) -> Self {
        let map = json!([{ "containerID": 0, "hostID": 1_200_000, "size": 65536 }]);
        self.config["linux"]["uidMappings"] = map.clone();
        self.config["linux"]["gidMappings"] = map;
        let namespaces = self.config["linux"]["namespaces"].as_array_mut().unwrap();
        namespaces.insert(0, json!({ "type": "user" }));
        self.config["annotations"] = json!({ "dev.atoll.rootfs.idmap": "container" });
        self
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Writes config.json and runs `atoll-ct` in the bundle. `ID` in the arguments is the container's.
    pub fn ct(&self, arguments: &[&str]) -> Ended {
        let output = self.command(arguments).output().unwrap();
        Ended::of(&output)
    }

    /// The same with the standard output and error of nobody: what stays behind must not hold a pipe.
    pub fn quiet(&self, arguments: &[&str]) -> Option<i32> {
        let mut command = self.command(arguments);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::inherit());
        command.status().unwrap().code()
    }

    pub fn command(&self, arguments: &[&str]) -> Command {
        let config = serde_json::to_vec(&self.config).unwrap();
        std::fs::write(self.path("config.json"), config).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_atoll-ct"));
        command
            .current_dir(self.directory.path())
            .arg("--root")
            .arg(self.path("run"));
        command.args(
            arguments
                .iter()
                .map(|a| if *a == "ID" { &self.id } else { *a }),
        );
        command
    }

    /// Executes words in the container.
    pub fn exec(&self, words: &str) -> Ended {
        let mut arguments = vec!["exec", "ID"];
        arguments.extend(words.split(' '));
        self.ct(&arguments)
    }

    /// Creates and starts; the program's output goes nowhere.
    #[track_caller]
    pub fn start(&self, options: &[&str]) {
        let mut arguments = vec!["create"];
        arguments.extend(options);
        arguments.push("ID");
        assert_eq!(self.quiet(&arguments), Some(0), "create");
        assert_eq!(self.quiet(&["start", "ID"]), Some(0), "start");
    }

    pub fn state(&self) -> Value {
        serde_json::from_str(&self.ct(&["state", "ID"]).ok()).unwrap()
    }

    /// Waits until the status is `wanted`.
    #[track_caller]
    pub fn wait_status(&self, wanted: &str) {
        wait_for(wanted, || self.state()["status"] == wanted);
    }

    /// The container's directories in all cgroup hierarchies of the host that exist now.
    pub fn cgroups(&self) -> Vec<PathBuf> {
        let hierarchies = std::fs::read_dir("/sys/fs/cgroup").unwrap();
        let own = |h: PathBuf| h.join("atoll-test").join(&self.id);
        let mut found: Vec<PathBuf> = hierarchies
            .map(|entry| own(entry.unwrap().path()))
            .filter(|d| d.exists())
            .collect();
        found.extend(Some(own("/sys/fs/cgroup".into())).filter(|d| d.exists()));
        found
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        let ids = self.ct(&["list", "-q"]).stdout;
        for id in ids.lines() {
            self.ct(&["delete", "--force", id]);
        }
    }
}

/// Runs `atoll-ct` in a directory.
pub fn atoll_ct(directory: &Path, arguments: &[&str]) -> Ended {
    let mut command = Command::new(env!("CARGO_BIN_EXE_atoll-ct"));
    Ended::of(
        &command
            .current_dir(directory)
            .args(arguments)
            .output()
            .unwrap(),
    )
}

/// How many processes of the host are in a namespace: `kind` as in /proc/PID/ns, `namespace` as that link reads.
pub fn processes_in(kind: &str, namespace: &Path) -> usize {
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    let link = |process: std::fs::DirEntry| process.path().join("ns").join(kind);
    let own = processes.filter_map(|process| std::fs::read_link(link(process)).ok());
    own.filter(|own| own == namespace).count()
}

/// Polls until `done`.
#[track_caller]
pub fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !done() {
        assert!(Instant::now() < deadline, "waited {LIMIT:?} for: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

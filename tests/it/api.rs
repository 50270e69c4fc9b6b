// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The API end to end: `atolld` with real guests in namespaces of its own, walked through by the unmodified
//! `proxmoxer` client (tests/clients/walk.py).
//!
//! Everything that the daemon starts, mounts and makes on the network ends with its namespaces, also when the test
//! fails half way.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// What the client needs from the Python package index.
const PACKAGES: &[&str] = &[
    "proxmoxer==2.3.0",
    "requests==2.34.2",
    "websocket-client==1.9.2",
];

/// How long the daemon may take to serve.
const START_MAX: Duration = Duration::from_secs(60);

/// First program of the test's container: a shell on the console.
const INIT: &str =
    "#!/bin/busybox sh\n/bin/busybox --install -s /bin\nexport PATH=/bin\nexec /bin/sh\n";

/// A daemon in its own network, mount and process namespaces.
struct Atolld {
    namespaces: Child,
    state: tempfile::TempDir,
}

impl Atolld {
    fn start() -> Self {
        let state = tempfile::tempdir().unwrap();
        let log = std::fs::File::create(state.path().join("log")).unwrap();
        let namespaces = Command::new("unshare")
            .args([
                "--net",
                "--mount",
                "--pid",
                "--fork",
                "--kill-child",
                "--mount-proc",
            ])
            .args(["sh", "-c", "ip link set lo up && exec \"$0\" \"$@\""])
            .arg(binaries().join("atolld"))
            .args(["--port", "0", "--node", "walk", "--state"])
            .arg(state.path())
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let mut atolld = Self { namespaces, state };
        let deadline = Instant::now() + START_MAX;
        while !atolld.state.path().join("run/atolld.json").exists() {
            let ended = atolld.namespaces.try_wait().unwrap();
            assert!(
                ended.is_none(),
                "atolld ended ({ended:?}): {}",
                atolld.log()
            );
            assert!(
                Instant::now() < deadline,
                "atolld does not serve: {}",
                atolld.log()
            );
            std::thread::sleep(Duration::from_millis(50));
        }
        atolld
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.state.path().join("log")).unwrap_or_default()
    }

    /// A program in the daemon's network.
    fn command(&self, program: &Path) -> Command {
        let mut command = Command::new("nsenter");
        let net = format!("--net=/proc/{}/ns/net", self.namespaces.id());
        command.arg(net).arg(program);
        command
    }
}

impl Drop for Atolld {
    fn drop(&mut self) {
        // Its first process is killed with it, and with that one every process of the namespace.
        drop(self.namespaces.kill());
        drop(self.namespaces.wait());
    }
}

/// Where the binaries of this build are: the folder above that of the running test.
fn binaries() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let directory = test.parent().and_then(Path::parent).unwrap().to_owned();
    for name in ["atolld", "atoll", "atoll-ct", "atoll-vmm"] {
        let file = directory.join(name);
        assert!(
            file.exists(),
            "{} is missing: cargo build --workspace --bins",
            file.display()
        );
    }
    directory
}

/// A Python with the client's packages, made once a target directory; why not, when that fails.
fn python() -> Result<PathBuf, String> {
    let directory = binaries().join("clients");
    let python = directory.join("bin/python3");
    let run = |command: &mut Command| {
        let output = command.output().map_err(|error| error.to_string())?;
        match output.status.success() {
            true => Ok(()),
            false => Err(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
        }
    };
    if run(Command::new(&python).args(["-c", "import proxmoxer, requests, websocket"])).is_err() {
        run(Command::new("python3").args(["-m", "venv"]).arg(&directory))?;
        run(Command::new(&python)
            .args(["-m", "pip", "install", "--quiet"])
            .args(PACKAGES))?;
    }
    Ok(python)
}

/// A container template of one program, busybox.
fn template(file: &Path) -> Result<(), String> {
    let root = tempfile::tempdir().map_err(|error| error.to_string())?;
    let path = |name: &str| root.path().join(name);
    for name in [
        "bin", "sbin", "etc", "proc", "sys", "dev", "run", "tmp", "root",
    ] {
        std::fs::create_dir_all(path(name)).unwrap();
    }
    std::fs::copy("/bin/busybox", path("bin/busybox"))
        .map_err(|error| format!("/bin/busybox: {error}"))?;
    std::fs::write(path("sbin/init"), INIT).unwrap();
    std::fs::set_permissions(path("sbin/init"), std::fs::Permissions::from_mode(0o755)).unwrap();
    std::fs::write(path("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\n").unwrap();
    std::fs::create_dir_all(file.parent().unwrap()).unwrap();
    let tar = Command::new("tar")
        .arg("-C")
        .arg(root.path())
        .arg("-czf")
        .arg(file)
        .arg(".")
        .status();
    assert!(tar.unwrap().success());
    Ok(())
}

#[test]
fn proxmoxer_walks_through_the_api() {
    let unshare = Command::new("unshare")
        .args(["--net", "--mount", "--pid", "--fork", "true"])
        .output();
    if !unshare.is_ok_and(|output| output.status.success()) {
        println!("ATOLL-SKIP: no right to make namespaces");
        return;
    }
    let python = match python() {
        Ok(python) => python,
        Err(reason) => {
            return println!("ATOLL-SKIP: no proxmoxer from the package index: {reason}");
        }
    };
    let atolld = Atolld::start();
    if let Err(reason) = template(
        &atolld
            .state
            .path()
            .join("storage/template/cache/small.tar.gz"),
    ) {
        return println!("ATOLL-SKIP: no template: {reason}");
    }
    let walk = Path::new(env!("CARGO_MANIFEST_DIR")).join("clients/walk.py");
    let output = atolld
        .command(&python)
        .arg(walk)
        .arg(atolld.state.path())
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}\n{}\natolld said:\n{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
        atolld.log()
    );
}

#[test]
fn the_command_uses_the_api_and_fails_in_one_line() {
    let unshare = Command::new("unshare")
        .args(["--net", "--mount", "--pid", "--fork", "true"])
        .output();
    if !unshare.is_ok_and(|output| output.status.success()) {
        println!("ATOLL-SKIP: no right to make namespaces");
        return;
    }
    let atolld = Atolld::start();
    let atoll = |args: &[&str]| {
        let mut command = atolld.command(&binaries().join("atoll"));
        let command = command
            .args(args)
            .env("STATE", atolld.state.path())
            .env("HOME", atolld.state.path());
        let output = command.output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (
            output.status.code(),
            text(&output.stdout),
            text(&output.stderr),
        )
    };
    let (code, out, _) = atoll(&["get", "/version", "--output", "json"]);
    assert_eq!(code, Some(0));
    assert!(serde_json::from_str::<serde_json::Value>(&out).unwrap()["release"].is_string());
    let (code, out, _) = atoll(&["vm", "create", "100", "--memory", "64", "--name", "x"]);
    assert!(
        code == Some(0) && out.ends_with("TASK OK\n"),
        "{code:?} {out}"
    );
    let (code, out, _) = atoll(&["vm", "list"]);
    assert!(code == Some(0) && out.contains("stopped"), "{out}");
    for (args, expected) in [
        (&["get", "/nope"][..], 1),
        (&["vm", "start", "999"], 1),
        (&["get", "/version", "stray"], 2),
        (&["get", "/version", "--nonsense", "1"], 1),
        (
            &[
                "--url",
                "https://localhost:1",
                "--token",
                "a@pve!b=c",
                "get",
                "/version",
            ],
            3,
        ),
        (&["vm", "start", "100"], 4),
    ] {
        let (code, _, error) = atoll(args);
        let message = error.trim_end();
        let one_line = !message.is_empty() && !message.contains('\n');
        assert!(
            code == Some(expected) && one_line,
            "{args:?}: {code:?} {error}"
        );
    }
    let (code, out, _) = atoll(&["completion", "bash"]);
    assert!(code == Some(0) && out.contains("_atoll"));
}

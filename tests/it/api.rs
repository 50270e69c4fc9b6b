// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The API end to end, as the unmodified `proxmoxer` client and our own command use it: `atolld` with real guests,
//! in namespaces that end with the test. What the client does is in `tests/clients`.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use atoll_tests::{daemon, skip, tree};

/// What the client needs from the Python package index.
const PACKAGES: &[&str] = &[
    "proxmoxer==2.3.0",
    "requests==2.34.2",
    "websocket-client==1.9.2",
];

/// First program of the test's container: a shell on the console.
const INIT: &str =
    "#!/bin/busybox sh\n/bin/busybox --install -s /bin\nexport PATH=/bin\nexec /bin/sh\n";

/// A Python with the client's packages, made once a target directory; why not, when that fails.
fn python() -> Result<PathBuf, String> {
    let directory = tree::bin_dir().join("clients");
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

/// Runs one of `tests/clients` against a node of its own that `prepare` has put files on, or says why it cannot.
fn run_client(
    script: &str,
    prepare: impl FnOnce(&Path) -> Result<(), String>,
) -> Result<(), String> {
    daemon::isolation()?;
    let python =
        python().map_err(|reason| format!("no proxmoxer from the package index: {reason}"))?;
    let node = daemon::Daemon::launch().unwrap();
    prepare(&node.state().join("storage"))?;
    let output = node
        .command(&python)
        .arg("-B") // no compiled files in the checkout
        .arg(tree::root().join("tests/clients").join(script))
        .arg(node.state())
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}\n{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    Ok(())
}

#[test]
fn proxmoxer_walks_through_the_api() {
    let prepared = |storage: &Path| template(&storage.join("template/cache/small.tar.gz"));
    if let Err(reason) = run_client("walk.py", prepared) {
        skip!("{reason}");
    }
}

#[test]
fn the_daemon_answers_beside_a_container_that_takes_all() {
    let prepared = |storage: &Path| template(&storage.join("template/cache/small.tar.gz"));
    if let Err(reason) = run_client("bombs.py", prepared) {
        skip!("{reason}");
    }
}

#[test]
fn proxmoxer_runs_a_machine() {
    let vmm = |arguments: &[&str]| {
        let mut command = Command::new(tree::binary("atoll-vmm"));
        command.arg("probe").args(arguments).output().unwrap()
    };
    let probed = vmm(&[]);
    if !probed.status.success() {
        skip!("{}", String::from_utf8_lossy(&probed.stdout).trim());
    }
    let prepared = |storage: &Path| {
        let snippets = storage.join("snippets");
        std::fs::create_dir_all(&snippets).unwrap();
        let extracted = vmm(&["--extract", snippets.join("probe").to_str().unwrap()]);
        assert!(extracted.status.success());
        Ok(())
    };
    if let Err(reason) = run_client("machine.py", prepared) {
        skip!("{reason}");
    }
}

/// Runs the command `atoll` beside a node: its exit code, standard output and standard error.
fn atoll(node: &daemon::Daemon, args: &[&str]) -> (Option<i32>, String, String) {
    let mut command = node.command(tree::binary("atoll"));
    let command = command
        .args(args)
        .env("STATE", node.state())
        .env("HOME", node.state());
    let output = command.output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (
        output.status.code(),
        text(&output.stdout),
        text(&output.stderr),
    )
}

#[test]
fn the_command_uses_the_api_and_fails_in_one_line() {
    if let Err(reason) = daemon::isolation() {
        skip!("{reason}");
    }
    let node = daemon::Daemon::launch().unwrap();
    let atoll = |args: &[&str]| atoll(&node, args);
    let (code, out, _) = atoll(&["get", "/version", "--output", "json"]);
    assert_eq!(code, Some(0));
    assert!(serde_json::from_str::<serde_json::Value>(&out).unwrap()["release"].is_string());
    let vm = ["vm", "create", "100", "--memory", "64", "--name", "x"];
    // One that is made, with a warning, and does not start.
    let (code, out, _) = atoll(&[&vm[..], &["--bios", "seabios"]].concat());
    assert!(
        code == Some(0) && out.ends_with("TASK WARNINGS: 1\n"),
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

#[test]
fn the_command_keeps_copies_and_moves_a_guests_volumes() {
    if let Err(reason) = daemon::isolation() {
        skip!("{reason}");
    }
    let node = daemon::Daemon::launch().unwrap();
    let atoll = |line: &str| {
        let words: Vec<_> = line.split(' ').collect();
        let (code, out, error) = atoll(&node, &words);
        assert_eq!(code, Some(0), "atoll {line}: {out} {error}");
        out
    };
    let other = node.state().join("other");
    let other = other.to_str().unwrap();
    atoll(&format!(
        "create /storage --storage other --type dir --content images --path {other}"
    ));
    atoll("vm create 100 --memory 64 --scsi0 local:1,format=qcow2");

    let snapshots = || atoll("vm snapshot list 100 --output json");
    atoll("vm snapshot create 100 before --description first");
    let listed = snapshots();
    assert!(
        listed.contains("before") && listed.contains("first"),
        "{listed}"
    );
    atoll("vm config 100 --memory 96");
    atoll("vm snapshot rollback 100 before");
    assert!(atoll("vm config 100").contains("64"));
    atoll("vm snapshot delete 100 before");
    assert!(!snapshots().contains("before"));

    atoll("vm resize 100 scsi0 +1G");
    let moved = atoll("vm move-disk 100 scsi0 other --delete 1 --bwlimit 500000");
    assert!(moved.contains("at most 500000 KiB/s"), "{moved}");
    let config = atoll("vm config 100");
    assert!(
        config.contains("other:") && config.contains("size=2G"),
        "{config}"
    );

    atoll("vm template 100");
    atoll("vm clone 100 101 --name linked");
    let copied = atoll("vm clone 100 102 --full 1 --bwlimit 600000");
    assert!(copied.contains("at most 600000 KiB/s"), "{copied}");
    let listed = atoll("vm list");
    assert!(
        listed.contains("linked") && listed.contains("102"),
        "{listed}"
    );
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! What `atoll-vmm` says when it cannot: one line on standard error that names the thing, and an exit code.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use std::os::unix::net::UnixListener;
use std::process::{Command, Output};

const BINARY: &str = env!("CARGO_BIN_EXE_atoll-vmm");

fn run(arguments: &str) -> Output {
    let arguments = arguments.split_whitespace();
    Command::new(BINARY).args(arguments).output().unwrap()
}

/// Runs with `arguments` (split at spaces), and compares code and line. `…` in `expected` stands for anything.
#[track_caller]
fn check(arguments: &str, code: i32, expected: &str) {
    let output = run(arguments);
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(code), "{arguments}: {said}");
    assert_eq!(said.lines().count(), 1, "{arguments}: one line: {said}");
    let mut rest = said.trim_end();
    for (index, part) in expected.split('…').enumerate() {
        let at = rest.find(part);
        let found = at.is_some_and(|at| index > 0 || at == 0);
        assert!(found, "{arguments}\n  said {said}  expected {expected}");
        rest = &rest[at.unwrap() + part.len()..];
    }
}

/// A file that is there, for arguments that must not be the ones that are wrong.
const KERNEL: &str = "run --kernel /etc/hostname";

#[test]
fn arguments_that_cannot_be() {
    check("", 2, "atoll-vmm: …");
    check("run", 2, "atoll-vmm: …--kernel <FILE>…(see --help)");
    check("fly", 2, "atoll-vmm: unrecognized subcommand 'fly'…");
    for (wrong, expected) in [
        ("--cpus 0", "invalid value '0' for '--cpus <N>'"),
        ("--cpus 256", "invalid value '256' for '--cpus <N>'"),
        ("--memory 0", "a machine needs at least 1 MiB"),
        ("--memory 1K", "unit \"K\" is not one of M, G, T"),
        ("--memory 99999999999999999T", "that is too much"),
        ("--disk path=/etc/hostname", "format= is missing"),
        ("--disk format=raw", "path= is missing"),
        (
            "--disk path=/etc/hostname,format=vmdk",
            "raw, qcow2 and nbd",
        ),
        (
            "--disk path=/etc/hostname,format=raw,fast",
            "\"fast\" is not one of ",
        ),
        (
            "--net mac=52:54:00:12:34:56",
            "tap= or vhost-user= is missing",
        ),
        (
            "--net tap=t0,mac=52:54:00:12:34",
            "expected six hexadecimal octets",
        ),
        ("--net tap=t0,mac=ff:ff:ff:ff:ff:ff", "is a group address"),
        (
            "--console /dev/tty",
            "expected stdio, pty, socket=PATH or null",
        ),
        ("--spec /tmp/x", "cannot be used with"),
        // By which setresuid(2) means "as it is".
        ("--uid 4294967295", "4294967295 is not in 0..4294967295"),
    ] {
        check(
            &format!("{KERNEL} {wrong}"),
            2,
            &format!("atoll-vmm: …{expected}…"),
        );
    }
}

#[test]
fn files_that_are_not_there_or_not_files() {
    for (wrong, expected) in [
        ("--initrd /nonexistent", "initrd /nonexistent: No such file"),
        ("--initrd /tmp", "initrd /tmp: is a directory"),
        (
            "--disk path=/nonexistent,format=raw",
            "disk /nonexistent: No such file",
        ),
        ("--disk path=/tmp,format=raw", "disk /tmp: is a directory"),
        (
            "--disk path=/dev/null,format=raw",
            "disk /dev/null: neither a file nor",
        ),
        (
            "--net tap=a-name-that-is-too-long",
            "tap \"a-name-that-is-too-long\": an interface's name",
        ),
    ] {
        check(
            &format!("{KERNEL} {wrong}"),
            2,
            &format!("atoll-vmm: {expected}…"),
        );
    }
    check(
        "run --kernel /nonexistent",
        2,
        "atoll-vmm: kernel /nonexistent: No such file…",
    );
    check(
        "run --kernel /tmp",
        2,
        "atoll-vmm: kernel /tmp: is a directory",
    );
    check(
        "run --spec /nonexistent",
        1,
        "atoll-vmm: spec /nonexistent: No such file…",
    );
}

/// Whoever runs this; what only root can have is the unit test's of `check`.
#[test]
fn a_user_that_cannot_be_had() {
    for command in [
        KERNEL,
        "receive --socket /nonexistent/s",
        "serve-disk --socket /nonexistent/s --disk path=/etc/hostname,format=raw",
    ] {
        check(
            &format!("{command} --sandbox off --uid 3000000100"),
            2,
            "atoll-vmm: --uid 3000000100: that is the sandbox's work: leave out --sandbox off",
        );
    }
}

/// Abilities of disks that do not go together: told before any file is opened.
#[test]
fn disks_that_cannot_be() {
    for (keys, expected) in [
        ("cache=fast", "cache=fast: there are none, writeback, "),
        ("target=3", "a target number is for bus scsi or cdrom"),
        (
            "bus=scsi,queues=2",
            "queues are the SCSI host's, one a vCPU",
        ),
        ("queues=0", "0 queues: 1 to "),
        (
            "bus=scsi,target=255",
            "SCSI target 255: each number from 0 to 254 at most once",
        ),
        (
            "serial=twenty-one-characters",
            "at most 20 printable ASCII characters",
        ),
        (
            "readonly,changes=/c",
            "changes are recorded of disks that the guest can write to",
        ),
        ("backing=/base", "backing=/base: expected FORMAT:FILE"),
        ("backing=nbd:/base", "the images behind it are files"),
        (
            "bytes-per-second=fast",
            "bytes-per-second=fast: expected a number",
        ),
        (
            "bytes-per-second=0",
            "bytes_per_second is 0, and nothing would move: leave it out for no limit",
        ),
        (
            "operations-burst=9,read-operations-per-second=9",
            "operations_burst without operations_per_second: a burst is of a rate",
        ),
        ("bus=cdrom,bytes-per-second=1", "only disks have limits"),
    ] {
        let disk = format!("{KERNEL} --disk path=/etc/hostname,format=raw,{keys}");
        check(&disk, 2, &format!("atoll-vmm: …{expected}…"));
    }
    for keys in ["cache=none", "changes=/c", "backing=raw:/base"] {
        let disk = format!("{KERNEL} --disk path=/s,format=nbd,{keys}");
        let expected = "atoll-vmm: …/s: backing images, recorded changes and the cache of an NBD disk are its server's";
        check(&disk, 2, expected);
    }
    let twice = "--disk path=/etc/hostname,format=raw";
    check(
        &format!("{KERNEL} {twice} {twice},readonly"),
        2,
        "atoll-vmm: …disk /etc/hostname: it is there twice: only what is read-only can be behind two disks",
    );
}

#[test]
fn devices_of_other_processes_that_cannot_be() {
    for (keys, expected) in [
        ("type=blk", "socket= is missing"),
        ("socket=/s", "type= is missing"),
        (
            "socket=/s,type=disk",
            "type=disk: there are net, blk, rng, scsi, fs, and virtio's device numbers",
        ),
        (
            "socket=/s,type=net",
            "a network card is told by --net vhost-user=",
        ),
        ("socket=/s,type=blk,queues=0", "0 queues: 1 to "),
        (
            "socket=/s,type=blk,config=257",
            "257 bytes of configuration: at most 256",
        ),
        (
            "socket=s,type=blk,reconnect",
            "must be an absolute path to be connected to again",
        ),
    ] {
        let device = format!("{KERNEL} --memory 64M,shared --vhost-user {keys}");
        check(&device, 2, &format!("atoll-vmm: …{expected}…"));
    }
}

#[test]
fn specs_that_are_not_specs() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("spec.json");
    for (text, expected) in [
        ("{", "EOF while parsing"),
        ("{\"name\":\"x\"}", "missing field `cpu_count`"),
        (
            "{\"name\":\"x\",\"cpu_count\":1,\"memory_mib\":0,\"boot\":{\"kernel\":{\"image\":\"/etc/hostname\"}}}",
            "0 MiB of memory",
        ),
        (
            "{\"name\":\"x\",\"cpu_count\":1,\"memory_mib\":1,\"boot\":{\"kernel\":{\"image\":\"/k\"}},\"wings\":2}",
            "unknown field `wings`",
        ),
        // Found by the fuzz target `spec`: the parser repeats what it read.
        (
            "{\"a\\n\\u001b[2Jb\": 1}",
            "unknown field `a\\n\\u{1b}[2Jb`",
        ),
    ] {
        std::fs::write(&path, text).unwrap();
        let arguments = format!("run --spec {}", path.display());
        check(&arguments, 2, &format!("atoll-vmm: …{expected}…"));
    }
}

#[test]
fn a_control_socket_that_nobody_listens_on() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("api");
    check(
        &format!("ctl --api-socket {} info", path.display()),
        1,
        "atoll-vmm: no virtual machine listens on …/api: No such file…",
    );
    drop(UnixListener::bind(&path).unwrap());
    check(
        &format!("ctl --api-socket {} info", path.display()),
        1,
        "atoll-vmm: no virtual machine listens on …/api: Connection refused…",
    );
    check(
        &format!("ctl --api-socket {} fly", path.display()),
        2,
        "atoll-vmm: unrecognized subcommand 'fly'…",
    );
    check("ctl info", 2, "atoll-vmm: --api-socket <PATH> is missing…");
    check(
        "ctl --api-socket /s set-link --id net0 --up maybe",
        2,
        "atoll-vmm: invalid value 'maybe' for '--up <true|false>'…",
    );
}

#[test]
fn help_teaches_and_goes_to_standard_output() {
    for (arguments, expected) in [
        ("--help", "Exit codes:"),
        ("run --help", "Examples:"),
        ("cpu-models --help", "Choose the greatest model"),
        ("cpu-models --json", "\"x86-64-v4\""),
        ("ctl --help", "power-button"),
        ("ctl set-link --help", "Whether the plug is in"),
    ] {
        let output = run(arguments);
        assert_eq!(output.status.code(), Some(0));
        let said = String::from_utf8(output.stdout).unwrap();
        assert!(said.contains(expected), "{arguments}: {said}");
    }
}

/// As `| head` is, once it has seen enough.
#[test]
fn a_reader_that_is_gone_is_no_error() {
    for arguments in ["--help", "cpu-models --json", "probe --json"] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let arguments = arguments.split(' ');
        let mut command = Command::new(BINARY);
        let output = command.args(arguments).stdout(writer).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        let is_whole = !said.contains("panicked") && !said.contains("roken pipe");
        assert!(is_whole && output.status.code().is_some(), "{said}");
    }
}

/// Takes /dev away in a mount namespace of its own.
#[test]
fn a_host_without_kvm() {
    let script = format!("mount -t tmpfs none /dev && exec {BINARY} {KERNEL} --console null");
    let output = Command::new("unshare")
        .args(["--mount", "sh", "-c", &script])
        .output()
        .unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    if said.starts_with("unshare:") || said.starts_with("mount:") {
        println!("ATOLL-SKIP: no mount namespace to hide /dev/kvm in: {said}");
        return;
    }
    assert_eq!(
        said,
        "atoll-vmm: /dev/kvm does not exist: enable virtualization in the firmware and load the module \
         kvm_intel or kvm_amd\n"
    );
    assert_eq!(output.status.code(), Some(1));
}

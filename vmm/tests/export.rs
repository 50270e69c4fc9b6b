// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Backups of a running machine's disk, by other people's NBD clients, under the sandbox and its filters: full, then
//! incremental, over a restart and over a kill.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "helpers of tests fail by panicking, and say what they skip"
)]

mod guest;

use std::os::unix::net::UnixListener;
use std::process::Command;
use std::time::{Duration, Instant};

use guest::{Guest, Place, Serial, eventually, kvm, shell};
use serde_json::Value;

const DISK: &str = "path=disk,format=raw,changes=changes";
/// More than the guest writes between two checkpoints: it goes through the disk from its start.
const DISK_BYTES: usize = 64 << 20;

/// The probe guest with its shell, and a disk whose changes are recorded.
fn start(place: Place) -> Guest {
    let mut arguments = shell("32M", "1");
    let disk = arguments
        .iter()
        .position(|argument| argument.starts_with("path="));
    arguments[disk.unwrap()] = DISK;
    let mut guest = place.start(&arguments);
    guest.serial();
    guest
}

/// Output of a tool that must succeed.
fn tool(guest: &Guest, program: &str, arguments: &[&str]) -> String {
    let mut command = Command::new(program);
    let output = command.current_dir(guest.path("")).args(arguments).output();
    let output = output.unwrap_or_else(|error| panic!("{program}: {error}"));
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {error}");
    String::from_utf8(output.stdout).unwrap()
}

/// Asks for an export of the disk.
const BEGIN: [&str; 7] = [
    "begin-export",
    "--socket",
    "nbd",
    "--disks",
    "disk0",
    "--fleece",
    ".",
];

fn begin(guest: &Guest) -> Value {
    guest.ctl(&BEGIN).unwrap()
}

/// The whole moment, and the ranges that changed.
fn read(guest: &Guest) -> (Vec<u8>, Vec<(usize, usize)>) {
    let uri = format!("nbd+unix:///disk0?socket={}", guest.path("nbd").display());
    tool(guest, "nbdcopy", &[&uri, "copy"]);
    let map = tool(guest, "nbdinfo", &["--map=qemu:dirty-bitmap:changes", &uri]);
    let lines = map
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>());
    let dirty = lines.filter(|line| line[2] == "1");
    let range = |line: Vec<&str>| (line[0].parse().unwrap(), line[1].parse().unwrap());
    (
        std::fs::read(guest.path("copy")).unwrap(),
        dirty.map(range).collect(),
    )
}

/// A backup brought up to date by what an export says that has changed.
fn update(backup: &mut [u8], (content, changed): &(Vec<u8>, Vec<(usize, usize)>)) {
    for &(offset, length) in changed {
        backup[offset..offset + length].copy_from_slice(&content[offset..offset + length]);
    }
}

fn checkpoint(number: u8) -> String {
    format!("00000000-0000-4000-8000-0000000000{number:02}")
}

/// Lets the guest write for a while.
fn write_on(serial: &mut Serial) {
    let rounds = serial.load_beyond(0);
    serial.load_beyond(rounds + 1);
}

/// A guest that writes through its disk, from the start, and the disk's content when it began.
fn writing() -> (Guest, Serial) {
    let place = Place::new();
    let content: Vec<u8> = (0..=250)
        .flat_map(|byte| [byte; 512])
        .cycle()
        .take(DISK_BYTES)
        .collect();
    std::fs::write(place.path("disk"), &content).unwrap();
    let mut guest = start(place);
    let mut serial = guest.serial();
    serial.start_load("");
    write_on(&mut serial);
    (guest, serial)
}

/// Waits until the disk is not as it was: what the guest says of its writes may be from before.
fn has_written(guest: &Guest, before: &[u8]) {
    eventually("a write", || (disk_of(guest) != before).then_some(()));
}

fn disk_of(guest: &Guest) -> Vec<u8> {
    std::fs::read(guest.path("disk")).unwrap()
}

#[test]
fn a_running_disk_is_read_as_it_was_when_the_export_began() {
    if !kvm() {
        return;
    }
    let (guest, _serial) = writing();
    guest.ctl(&["pause"]).unwrap();
    let moment = disk_of(&guest);
    let told = begin(&guest);
    assert_eq!(told["disks"][0]["since"], Value::Null);
    guest.ctl(&["resume"]).unwrap();
    has_written(&guest, &moment);
    let (content, changed) = read(&guest);
    assert!(
        content == moment,
        "the export is not the moment at which it began"
    );
    assert_eq!(changed, [(0, DISK_BYTES)]);
    let told = guest.ctl(&["export"]).unwrap();
    assert!(
        told["disks"][0]["saved_bytes"].as_u64().unwrap() > 0,
        "{told}"
    );
    let refused = |arguments: &[&str]| guest.ctl(arguments).unwrap_err();
    let again = [
        "begin-export",
        "--socket",
        "x",
        "--disks",
        "disk0",
        "--fleece",
        ".",
    ];
    assert!(refused(&again).contains("an export is under way on"));
    assert!(refused(&["remove-device", "--id", "disk0", "--force", "true"]).contains("disk0"));
    assert!(refused(&["end-export", "--checkpoint", "today"]).contains("is a UUID"));
    guest.ctl(&["end-export"]).unwrap();
    assert!(!guest.path("nbd").exists());
    assert!(refused(&["end-export"]).contains("no export is under way"));
    assert!(
        refused(&[
            "begin-export",
            "--socket",
            "x",
            "--disks",
            "disk7",
            "--fleece",
            "."
        ])
        .contains("no disk disk7")
    );
    assert!(!guest.path("x").exists());
}

#[test]
fn an_export_keeps_to_its_rate_and_ends_at_once() {
    if !kvm() {
        return;
    }
    let place = Place::new();
    let content: Vec<u8> = (0..=250).cycle().take(8 << 20).collect();
    std::fs::write(place.path("disk"), &content).unwrap();
    let guest = start(place);
    let begin_at = |rate: &str| {
        let rate = ["--max-bytes-per-second", rate];
        guest.ctl(&[&BEGIN[..], &rate].concat())
    };
    let refused = begin_at("0").unwrap_err();
    let why = "max_bytes_per_second is 0, and nothing would be read: leave it out for no limit";
    assert!(refused.contains(why), "{refused}");
    begin_at("4194304").unwrap();
    let began = Instant::now();
    assert!(read(&guest).0 == content);
    let took = began.elapsed();
    assert!(took >= Duration::from_millis(1500), "{took:?}");
    guest.ctl(&["end-export"]).unwrap();

    // A whole copy would take months.
    begin_at("1").unwrap();
    let uri = format!("nbd+unix:///disk0?socket={}", guest.path("nbd").display());
    let copy = guest.path("copy-2").display().to_string();
    let mut copying = Command::new("nbdcopy").args([&uri, &copy]).spawn().unwrap();
    eventually("a client", || {
        let told = guest.ctl(&["export"]).unwrap();
        (told["connection_count"] != 0).then_some(())
    });
    guest.ctl(&["end-export"]).unwrap();
    assert!(!copying.wait().unwrap().success());
    begin(&guest);
}

#[test]
fn changes_bring_a_backup_up_to_date_over_runs_and_a_kill() {
    if !kvm() {
        return;
    }
    let (guest, mut serial) = writing();
    begin(&guest);
    let (mut backup, _) = read(&guest);
    guest
        .ctl(&["end-export", "--checkpoint", &checkpoint(1)])
        .unwrap();
    write_on(&mut serial);

    // Given up once, so that the next one has it all again.
    guest.ctl(&["pause"]).unwrap();
    let checkpoint_2 = checkpoint(2);
    for end in [
        &["end-export"][..],
        &["end-export", "--checkpoint", &checkpoint_2],
    ] {
        let told = begin(&guest);
        assert_eq!(told["disks"][0]["since"], checkpoint(1));
        let changes = read(&guest);
        let changed: usize = changes.1.iter().map(|(_, length)| length).sum();
        assert!(
            0 < changed && changed < DISK_BYTES,
            "{changed} bytes changed"
        );
        let mut updated = backup.clone();
        update(&mut updated, &changes);
        assert!(updated == disk_of(&guest));
        guest.ctl(end).unwrap();
        if end.len() > 1 {
            backup = updated;
        }
    }

    // Over a proper end, with what was written after the checkpoint.
    guest.ctl(&["resume"]).unwrap();
    has_written(&guest, &backup);
    let mut guest = guest;
    guest.ctl(&["shutdown"]).unwrap();
    guest.ended();
    let guest = start(guest.place_again());
    guest.ctl(&["pause"]).unwrap();
    assert_eq!(begin(&guest)["disks"][0]["since"], checkpoint(2));
    update(&mut backup, &read(&guest));
    assert!(backup == disk_of(&guest));
    guest
        .ctl(&["end-export", "--checkpoint", &checkpoint(3)])
        .unwrap();

    // A kill: nothing is known any more, and nothing is called unchanged.
    let guest = start(guest.place_again());
    assert_eq!(begin(&guest)["disks"][0]["since"], Value::Null);
}

#[test]
fn a_machine_moves_or_is_exported() {
    if !kvm() {
        return;
    }
    let guest = start(Place::new());
    // Takes connections, and never says a word.
    let silent = UnixListener::bind(guest.path("in")).unwrap();
    begin(&guest);
    let said = guest.ctl(&["migrate", "--to", "in"]).unwrap_err();
    assert!(said.contains("/nbd: end-export first"), "{said}");
    guest.ctl(&["end-export"]).unwrap();

    let mut asker = guest.place.command(&["ctl", "--api-socket", "api"]);
    let mut asker = asker.args(["migrate", "--to", "in"]).spawn().unwrap();
    eventually("the move", || guest.ctl(&["migration"]).ok());
    let said = guest.ctl(&BEGIN).unwrap_err();
    assert!(
        said.contains("moving to another process: wait, or cancel-migration"),
        "{said}"
    );
    guest.ctl(&["cancel-migration"]).unwrap();
    assert!(!asker.wait().unwrap().success());
    drop(silent);
    begin(&guest);
}

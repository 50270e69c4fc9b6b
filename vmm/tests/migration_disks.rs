// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Machines that move with the content of their disks, while the probe guest writes to them; and what is left when that
//! ends in the middle. In the end every block of the disk is compared with what the guest wrote there last. Seeds
//! are printed; another one comes from ATOLL_SEED, more of them from ATOLL_MIGRATION_SEEDS.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "helpers of tests fail by panicking, and say what they skip"
)]

mod guest;

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

use atoll_disk::qcow2::{Qcow2Options, create};
use atoll_vmm_protocol::api::{MigrationInfo, Request};
use guest::{
    Disturbance, Guest, Place, Random, Serial, eventually, kvm, moved, number, runs,
    shell_with_disk, works,
};

const DISK_BYTES: u64 = 32 << 20;
/// What the probe's `load` writes at once.
const BLOCK_BYTES: usize = 4096;

/// A disk whose first half has content from before, and whose second half is a hole. The guest's `load` begins at its
/// beginning, and does not come to the end of the first half in these tests.
fn place() -> Place {
    let place = Place::new();
    let content: Vec<u8> = (1..=251_u8)
        .flat_map(|byte| [byte; 512])
        .cycle()
        .take(usize::try_from(DISK_BYTES / 2).unwrap())
        .collect();
    std::fs::write(place.path("disk"), content).unwrap();
    File::options()
        .write(true)
        .open(place.path("disk"))
        .unwrap()
        .set_len(DISK_BYTES)
        .unwrap();
    place
}

/// A guest that writes to its disk, and what it had before: all of it but the first blocks, which the guest's report
/// writes, and its load anew.
fn writing(place: Place, disk: &str) -> (Guest, Serial, Vec<u8>) {
    let before = match disk.contains("qcow2") {
        true => std::fs::read(place.path("raw")),
        false => std::fs::read(place.path("disk")),
    };
    let mut guest = place.start(&shell_with_disk("32M", "1", disk));
    let mut serial = guest.serial();
    serial.start_load("");
    serial.load_beyond(0);
    (guest, serial, before.unwrap())
}

/// The content of an image that nobody has.
fn content(guest: &Guest, image: &str, format: &str) -> Vec<u8> {
    if format == "raw" {
        return std::fs::read(guest.path(image)).unwrap();
    }
    guest
        .place
        .qemu_img(&["convert", "-f", format, "-O", "raw", image, "copy"]);
    std::fs::read(guest.path("copy")).unwrap()
}

/// A process that waits for a machine, with an empty image `disk` of its own.
fn target(format: &str, size_bytes: u64, arguments: &[&str]) -> Guest {
    let place = Place::new();
    match format {
        "qcow2" => {
            std::fs::remove_file(place.path("disk")).unwrap();
            let options = Qcow2Options::default();
            create(&place.path("disk"), size_bytes, &options).unwrap();
        }
        _ => {
            let disk = File::create(place.path("disk")).unwrap();
            disk.set_len(size_bytes).unwrap();
        }
    }
    wait_at(place, arguments)
}

fn wait_at(place: Place, arguments: &[&str]) -> Guest {
    let target = place.start(&[&["receive", "--socket", "in"], arguments].concat());
    eventually("the target's socket", || {
        target.path("in").exists().then_some(())
    });
    target
}

/// `ctl migrate` with the disk, not waited for.
fn begin(source: &Guest, target: &Guest, more: &[&str]) -> Child {
    source
        .place
        .command(&[
            "ctl",
            "--api-socket",
            "api",
            "migrate",
            "--disks",
            "disk0",
            "--to",
        ])
        .arg(target.path("in"))
        .args(more)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Ends the guest's work and the guest, and compares each block of its disk with what it wrote there.
#[track_caller]
fn end_and_compare(mut guest: Guest, mut serial: Serial, format: &str, before: &[u8], note: &str) {
    let rounds = usize::try_from(serial.end_load()).unwrap();
    guest.ctl(&["shutdown"]).unwrap();
    let (status, said) = guest.ended();
    assert!(status.success(), "{note}: {said}");
    let after = content(&guest, "disk", format);
    assert_eq!(after.len(), before.len());
    let count = after.len() / BLOCK_BYTES;
    for (index, block) in after.chunks(BLOCK_BYTES).enumerate() {
        // The last round that wrote this block, if one did.
        let last = rounds
            .checked_sub(index + 1)
            .map(|rest| rest / count * count + index);
        let expected = match last {
            Some(round) => written(u64::try_from(round).unwrap()),
            None => before[index * BLOCK_BYTES..][..BLOCK_BYTES].to_vec(),
        };
        assert!(
            block == expected,
            "{note}: block {index} of {rounds} rounds"
        );
    }
}

/// What the probe's `load` writes in a round (`firmware/probe/src/devices/blk.rs`).
fn written(round: u64) -> Vec<u8> {
    let mut state = round.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let byte = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[4]
    };
    (0..BLOCK_BYTES).map(byte).collect()
}

/// The machine's spec with another path and format of its disk, as `own` in a target's folder.
fn spec_of(source: &Guest, place: &Place, format: &str) {
    let saved = source.path("saved");
    source.ctl(&["snapshot", "--to", "saved"]).unwrap();
    let spec = std::fs::read(saved.join("spec.json")).unwrap();
    std::fs::remove_dir_all(saved).unwrap();
    let mut spec: serde_json::Value = serde_json::from_slice(&spec).unwrap();
    spec["disks"][0]["path"] = "own-disk".into();
    spec["disks"][0]["format"] = format.into();
    std::fs::write(place.path("own"), spec.to_string()).unwrap();
}

#[test]
fn a_machine_moves_with_its_disk() {
    if !kvm() {
        return;
    }
    let (mut source, serial, before) = writing(place(), "path=disk,format=raw,changes=changes");
    drop(serial);
    let mut target = target("raw", DISK_BYTES, &[]);
    let info = moved(begin(&source, &target, &[]), &mut source, &target);
    println!("stood still for {} us: {:?}", info.downtime_us, info.disks);
    assert_eq!(info.disks.len(), 1);
    assert!(info.disks[0].copied_bytes >= DISK_BYTES);
    assert_eq!(info.disks[0].left_bytes, 0);
    let space = std::fs::metadata(target.path("disk")).unwrap().blocks() * 512;
    assert!(
        target
            .said()
            .contains("the next backup reads the whole disk"),
        "{}",
        target.said()
    );
    let done = target.serial().load_beyond(0);
    // Holes stay: half of the disk was never written but by the guest, a block a round.
    let most = DISK_BYTES / 2 + done * BLOCK_BYTES as u64 + (1 << 20);
    assert!(space <= most, "{space} bytes after {done} rounds");

    // On to another format, under another name.
    source = target;
    let place = Place::new();
    spec_of(&source, &place, "qcow2");
    create(
        &place.path("own-disk"),
        DISK_BYTES,
        &Qcow2Options::default(),
    )
    .unwrap();
    target = wait_at(place, &["--spec", "own"]);
    moved(
        begin(&source, &target, &["--connections", "3"]),
        &mut source,
        &target,
    );
    let mut serial = target.serial();
    serial.load_beyond(done);
    std::fs::remove_file(target.path("disk")).unwrap();
    std::fs::rename(target.path("own-disk"), target.path("disk")).unwrap();
    let place = target.place.clone();
    end_and_compare(target, serial, "qcow2", &before, "moved twice");
    place.qemu_img(&["check", "-q", "-f", "qcow2", "disk"]);
}

#[test]
fn a_qcow2_image_moves_to_another_one() {
    if !kvm() {
        return;
    }
    let place = place();
    std::fs::rename(place.path("disk"), place.path("raw")).unwrap();
    place.qemu_img(&["convert", "-f", "raw", "-O", "qcow2", "raw", "disk"]);
    let (mut source, _serial, before) = writing(place, "path=disk,format=qcow2");
    let mut target = target("qcow2", DISK_BYTES, &[]);
    moved(begin(&source, &target, &[]), &mut source, &target);
    // Both are whole and closed, or in use by one machine only.
    source
        .place
        .qemu_img(&["check", "-q", "-f", "qcow2", "disk"]);
    let serial = target.serial();
    let place = target.place.clone();
    end_and_compare(target, serial, "qcow2", &before, "qcow2");
    place.qemu_img(&["check", "-q", "-f", "qcow2", "disk"]);
}

/// One move with a disk that is disturbed at a random moment.
fn disturbed(seed: u64) {
    let mut random = Random::of(seed);
    let disturbance = Disturbance::any(&mut random);
    let moment = Duration::from_micros(random.below(1_500_000));
    let limit = (32 + random.below(64)) << 20;
    let note = format!("seed {seed}: {disturbance:?} after {moment:?}, {limit} bytes/s");
    println!("{note}");
    let (mut source, serial, before) = writing(place(), "path=disk,format=raw");
    drop(serial);
    let mut target = target("raw", DISK_BYTES, &[]);
    let limit = limit.to_string();
    let mut asker = begin(&source, &target, &["--max-bytes-per-second", &limit]);
    sleep(moment);
    let survivor = match disturbance {
        Disturbance::KillSource => {
            source.process.kill().unwrap();
            source.process.wait().unwrap();
            asker.wait().unwrap();
            let took_over = works(&mut target);
            let failed = || target.said().contains("atoll-vmm: ");
            assert!(took_over || failed(), "{note}: {}", target.said());
            took_over.then_some(target)
        }
        Disturbance::KillTarget => {
            target.process.kill().unwrap();
            target.process.wait().unwrap();
            let moved = asker.wait().unwrap().success();
            assert_eq!(works(&mut source), !moved, "{note}: {}", source.said());
            (!moved).then_some(source)
        }
        Disturbance::Cancel => {
            // Refused when it is too late, or too early.
            let _ = source.ctl(&["cancel-migration"]);
            let moved = asker.wait().unwrap().success();
            assert_eq!(works(&mut target), moved, "{note}: {}", target.said());
            assert_eq!(works(&mut source), !moved, "{note}: {}", source.said());
            Some(if moved { target } else { source })
        }
    };
    if let Some(mut survivor) = survivor {
        let serial = survivor.serial();
        end_and_compare(survivor, serial, "raw", &before, &note);
    }
}

#[test]
fn exactly_one_runs_and_has_the_disk_whatever_happens() {
    if !kvm() {
        return;
    }
    let first = number("ATOLL_SEED", u64::from(std::process::id()));
    for seed in first..first + number("ATOLL_MIGRATION_SEEDS", 4) {
        disturbed(seed);
    }
}

#[test]
fn a_disk_that_cannot_move_stays_with_the_reason() {
    if !kvm() {
        return;
    }
    let (source, mut serial, before) = writing(place(), "path=disk,format=raw");
    let mut done = serial.load_beyond(0);
    let mut refused = |mut target: Guest, expected: &str| {
        let output = begin(&source, &target, &[]).wait_with_output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(said.contains("the machine stays: "), "{said}");
        assert!(said.contains(expected), "{said}");
        assert_eq!(target.ended().0.code(), Some(1));
        done = serial.load_beyond(done);
        assert!(runs(&source));
    };
    let whole = format!(
        "disk0: disk has {} bytes, and has to have the disk's {DISK_BYTES}",
        DISK_BYTES - 512
    );
    refused(target("raw", DISK_BYTES - 512, &[]), &whole);
    refused(
        target("raw", DISK_BYTES + 512, &[]),
        "and has to have the disk's",
    );
    refused(
        target("qcow2", DISK_BYTES / 2, &[]),
        "and has to have the disk's",
    );
    let missing = Place::new();
    std::fs::remove_file(missing.path("disk")).unwrap();
    refused(wait_at(missing, &[]), "disk disk: No such file");
    let other = Place::new();
    spec_of(&source, &other, "qcow2");
    std::fs::write(other.path("own-disk"), [0; 4096]).unwrap();
    refused(wait_at(other, &["--spec", "own"]), "disk0: disk own-disk: ");
    // The very image that the guest writes to.
    let same = Place::new();
    std::fs::remove_file(same.path("disk")).unwrap();
    std::fs::hard_link(source.path("disk"), same.path("disk")).unwrap();
    refused(wait_at(same, &[]), "disk0: disk disk is in use");
    // What is wrong with the request itself.
    for (disks, expected) in [
        ("disk7", "no disk disk7; there are: disk0"),
        ("disk0,disk0", "disk0 is named twice"),
    ] {
        let waits = target("raw", DISK_BYTES, &[]);
        let to = waits.path("in").display().to_string();
        let said = source.ctl(&["migrate", "--to", &to, "--disks", disks]);
        assert!(said.unwrap_err().contains(expected));
    }
    end_and_compare(source, serial, "raw", &before, "refused");
}

/// A file system of the target that is full, and somebody who does not want to wait: the guest goes on, nothing of the
/// copying is left, and the next move is like the first.
#[test]
fn a_move_that_ends_early_leaves_the_machine_as_it_was() {
    if !kvm() {
        return;
    }
    let (mut source, mut serial, before) = writing(place(), "path=disk,format=raw");
    let mut done = serial.load_beyond(0);
    let slow = ["--max-bytes-per-second", "4000000"];
    let waits = target("raw", DISK_BYTES, &[]);
    let asker = begin(&source, &waits, &slow);
    let info = eventually("progress of the disk", || {
        let info: MigrationInfo = source.client().ask(Request::Migration).ok()?;
        info.disks
            .first()
            .is_some_and(|disk| disk.copied_bytes > 0)
            .then_some(info)
    });
    assert_eq!((info.rounds, info.disks[0].size_bytes), (0, DISK_BYTES));
    assert!(info.disks[0].left_bytes > 0, "{info:?}");
    let resize = ["resize-disk", "--id", "disk0", "--size-bytes", "80000000"];
    assert!(source.ctl(&resize).unwrap_err().contains("is moving"));
    source.ctl(&["cancel-migration"]).unwrap();
    let said = String::from_utf8(asker.wait_with_output().unwrap().stderr).unwrap();
    assert!(said.contains("the machine stays: cancelled"), "{said}");
    done = serial.load_beyond(done);

    let full = Place::new();
    let small = full.path("small");
    std::fs::create_dir(&small).unwrap();
    let mut mount = Command::new("mount");
    let mount = mount
        .args(["-t", "tmpfs", "-o", "size=8M", "tmpfs"])
        .arg(&small);
    if mount.status().is_ok_and(|status| status.success()) {
        spec_of(&source, &full, "raw");
        std::os::unix::fs::symlink("small/own-disk", full.path("own-disk")).unwrap();
        File::create(small.join("own-disk"))
            .unwrap()
            .set_len(DISK_BYTES)
            .unwrap();
        let target = wait_at(full.clone(), &["--spec", "own"]);
        let output = begin(&source, &target, &[]).wait_with_output().unwrap();
        drop(target);
        assert!(
            Command::new("umount")
                .arg(&small)
                .status()
                .unwrap()
                .success()
        );
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(
            said.contains("the machine stays: disk0: write to the target: "),
            "{said}"
        );
        done = serial.load_beyond(done);
    } else {
        println!("ATOLL-SKIP: cannot mount a tmpfs here");
    }

    let mut target = target("raw", DISK_BYTES, &[]);
    moved(begin(&source, &target, &[]), &mut source, &target);
    serial = target.serial();
    serial.load_beyond(done);
    end_and_compare(target, serial, "raw", &before, "moved at last");
}

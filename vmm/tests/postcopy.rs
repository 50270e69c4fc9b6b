// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Machines that run at the target before all of their memory is there, on the host's own KVM; and what is left when a
//! process is killed meanwhile. Seeds are printed; another one comes from ATOLL_SEED, more of them from
//! ATOLL_MIGRATION_SEEDS.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "helpers of tests fail by panicking, and say what they skip"
)]

mod guest;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::process::{Child, Stdio};
use std::thread::sleep;
use std::time::Duration;

use atoll_vmm::memory::UserFault;
use atoll_vmm_protocol::api::{MachineState, MigrationInfo, MigrationStage, Request};
use guest::{
    Disturbance, Guest, Place, Random, eventually, kvm, moved, number, runs, shell, target_for,
    works,
};

/// Memory in which the probe guest has nothing, where the tests put something.
const FOREIGN_MIB: u64 = 1024;
const FOREIGN_PAGES: u64 = 4096;
const PAGE_BYTES: u64 = 4096;

/// Whether tests can run; says so when not.
fn possible() -> bool {
    let faults = UserFault::open();
    if let Err(error) = &faults {
        println!("ATOLL-SKIP: {error}");
    }
    kvm() && faults.is_ok()
}

/// `ctl migrate` that may end with post-copy, not waited for.
fn begin(source: &Guest, target: &Guest, more: &[&str]) -> Child {
    let arguments = ["ctl", "--api-socket", "api", "migrate", "--to"];
    let mut command = source.place.command(&arguments);
    command.arg(target.path("in"));
    command.args(["--when-late", "post-copy"]).args(more);
    let command = command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().unwrap()
}

fn migration(source: &Guest) -> Option<MigrationInfo> {
    source.client().ask(Request::Migration).ok()
}

/// Says `switch-migration` as soon as the move has begun.
fn switch(source: &Guest) {
    eventually("the move's begin", || {
        migration(source)?;
        Some(source.ctl(&["switch-migration"]).unwrap())
    });
}

fn wait_for_post_copy(source: &Guest) -> MigrationInfo {
    eventually("post-copy", || {
        let info = migration(source)?;
        assert_ne!(info.stage, MigrationStage::Completed, "it was too fast");
        Some(info).filter(|info| info.stage == MigrationStage::PostCopy)
    })
}

/// What a foreign page has, for its number from the first of them; nothing in every seventh.
fn foreign(page: u64) -> Vec<u8> {
    let word = match page % 7 {
        3 => 0,
        _ => page.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15),
    };
    word.to_le_bytes().repeat(512)
}

/// A guest at work that has foreign pages in its memory.
fn guest_with_foreign_pages() -> Guest {
    let guest = {
        let mut guest = Place::new().start(&shell("1200", "2"));
        let mut serial = guest.serial();
        serial.start_load("");
        serial.load_beyond(0);
        guest.client().act(Request::Pause).unwrap();
        guest.ctl(&["snapshot", "--to", "saved"]).unwrap();
        guest
    };
    let memory = File::options().write(true).open(guest.path("saved/memory"));
    let memory = memory.unwrap();
    for page in 0..FOREIGN_PAGES {
        let at = (FOREIGN_MIB << 20) + page * PAGE_BYTES;
        memory.write_all_at(&foreign(page), at).unwrap();
    }
    let place = guest.killed();
    place.start(&["run", "--restore", "saved", "--memory-mode", "read"])
}

#[track_caller]
fn check_foreign(guest: &Guest) {
    guest.ctl(&["snapshot", "--to", "moved"]).unwrap();
    let memory = File::open(guest.path("moved/memory")).unwrap();
    let mut seen = vec![0; 4096];
    for page in 0..FOREIGN_PAGES + 64 {
        let at = (FOREIGN_MIB << 20) + page * PAGE_BYTES;
        memory.read_exact_at(&mut seen, at).unwrap();
        let expected = match page < FOREIGN_PAGES {
            true => foreign(page),
            false => vec![0; 4096],
        };
        assert!(seen == expected, "page {page}");
    }
}

#[test]
fn a_guest_works_while_its_memory_comes() {
    if !possible() {
        return;
    }
    let mut guest = guest_with_foreign_pages();
    let mut serial = guest.serial();
    let mut done = serial.load_beyond(0);
    for connections in ["1", "3"] {
        let mut target = target_for(&guest);
        let slow = ["--max-bytes-per-second", "4000000"];
        let more = [&["--connections", connections][..], &slow].concat();
        let asker = begin(&guest, &target, &more);
        switch(&guest);
        let left = wait_for_post_copy(&guest).remaining_bytes;
        // It works there, and does not run here.
        serial = target.serial();
        done = serial.load_beyond(done);
        assert_eq!(target.client().info().unwrap().state, MachineState::Running);
        let here = guest.client().info().unwrap().state;
        assert_eq!(here, MachineState::Migrated);
        for refused in [
            &["snapshot", "--to", "early"][..],
            &["migrate", "--to", "in"],
        ] {
            let listener = std::os::unix::net::UnixListener::bind(target.path("in"));
            let said = target.ctl(refused).unwrap_err();
            assert!(said.contains("still coming from where it was"), "{said}");
            drop(listener);
            std::fs::remove_file(target.path("in")).unwrap();
        }
        let late = guest.ctl(&["cancel-migration"]).unwrap_err();
        assert!(late.contains("too late"), "{late}");
        let info = moved(asker, &mut guest, &target);
        let filling = eventually("all memory", || {
            let filling = target.client().info().unwrap().filling.unwrap();
            Some(filling).filter(|filling| filling.complete)
        });
        println!("{left} bytes were left, {info:?}, {filling:?}");
        assert!(filling.fault_count > 0);
        check_foreign(&target);
        guest = target;
    }
    assert!(serial.end_load() >= done);
    serial.wait_for("probe> ");
    serial.type_line("report");
    serial.wait_for("everything works");
}

/// Nobody says when: it writes more than is sent.
#[test]
fn a_guest_that_writes_faster_than_is_sent_moves() {
    if !possible() {
        return;
    }
    let mut source = Place::new().start(&shell("16", "1"));
    let mut serial = source.serial();
    serial.start_load("12 1");
    let done = serial.load_beyond(0);
    let mut target = target_for(&source);
    let slow = ["--max-bytes-per-second", "1000000"];
    let limited = [&slow[..], &["--downtime-limit-ms", "100"]].concat();
    let asker = begin(&source, &target, &limited);
    let info = moved(asker, &mut source, &target);
    println!("{info:?}");
    assert_eq!(info.throttle_percent, 0);
    assert!(target.client().info().unwrap().filling.unwrap().complete);
    let mut serial = target.serial();
    let done = serial.load_beyond(done);
    serial.load_beyond(done);
    serial.end_load();
}

/// A guest that ends before all of its memory is there needs no more of it.
#[test]
fn a_guest_may_end_meanwhile() {
    if !possible() {
        return;
    }
    let mut source = guest_with_foreign_pages();
    source.serial();
    let mut target = target_for(&source);
    let asker = begin(&source, &target, &["--max-bytes-per-second", "500000"]);
    switch(&source);
    wait_for_post_copy(&source);
    target.ctl(&["shutdown"]).unwrap();
    assert_eq!(target.ended().0.code(), Some(0));
    moved(asker, &mut source, &target);
}

#[test]
fn what_cannot_move_like_this_is_told_before() {
    if !possible() {
        return;
    }
    let mut source = Place::new().start(&shell("32M,shared", "1"));
    source.serial().wait_for("probe> ");
    let target = target_for(&source);
    let output = begin(&source, &target, &[]).wait_with_output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    let reason = "post-copy needs memory that is neither shared nor huge pages";
    assert!(said.contains(reason), "{said}");
    assert!(runs(&source));

    let mut source = Place::new().start(&shell("32", "1"));
    source.serial().wait_for("probe> ");
    source.ctl(&["snapshot", "--to", "snapshot"]).unwrap();
    let spec = std::fs::read(source.path("snapshot/spec.json")).unwrap();
    let mut spec: serde_json::Value = serde_json::from_slice(&spec).unwrap();
    spec["services"]["memory_backing"] = "shared".into();
    let place = Place::new();
    std::fs::write(place.path("own"), spec.to_string()).unwrap();
    let mut target = place.start(&["receive", "--socket", "in", "--spec", "own"]);
    let socket = target.path("in");
    eventually("the target's socket", || socket.exists().then_some(()));
    let output = begin(&source, &target, &[]).wait_with_output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    let expected = format!("the machine stays: the other side: {reason}");
    assert!(said.contains(&expected), "{said}");
    assert_eq!(target.ended().0.code(), Some(1));

    let none = source.ctl(&["switch-migration"]).unwrap_err();
    assert!(none.contains("no migration is under way"), "{none}");
    let target = target_for(&source);
    let mut plain = source.place.command(&["ctl", "--api-socket", "api"]);
    plain.args(["migrate", "--max-bytes-per-second", "1000000", "--to"]);
    let mut plain = plain.arg(target.path("in")).spawn().unwrap();
    let said = eventually("the move's begin", || {
        let said = source.ctl(&["switch-migration"]).unwrap_err();
        Some(said).filter(|said| !said.contains("no migration is under way"))
    });
    assert!(
        said.contains("begin it with --when-late post-copy"),
        "{said}"
    );
    source.ctl(&["cancel-migration"]).unwrap();
    assert!(!plain.wait().unwrap().success());
    assert!(works_on(&mut source));
}

fn works_on(guest: &mut Guest) -> bool {
    let mut serial = guest.serial();
    serial.type_line("report");
    serial.wait_for("everything works");
    true
}

/// One move that is disturbed at a random moment, most of them after the switch.
fn disturbed(seed: u64) {
    let mut random = Random::of(seed);
    let disturbance = Disturbance::any(&mut random);
    let moment = Duration::from_micros(random.below(500_000));
    println!("seed {seed}: {disturbance:?} after {moment:?}");
    let mut source = Place::new().start(&shell("64", "1"));
    let mut serial = source.serial();
    serial.start_load("");
    serial.load_beyond(0);
    drop(serial);
    let mut target = target_for(&source);
    let slow = ["--connections", "2", "--max-bytes-per-second", "4000000"];
    let mut asker = begin(&source, &target, &slow);
    eventually("the move's begin", || migration(&source));
    // Fails when the move is over already.
    let _ = source
        .client()
        .ask::<MigrationInfo>(Request::SwitchMigration);
    sleep(moment);
    match disturbance {
        Disturbance::KillSource => {
            source.process.kill().unwrap();
            source.process.wait().unwrap();
            asker.wait().unwrap();
            let runs_there = works(&mut target);
            let said = target.said();
            let told = said.contains("the guest is lost: ")
                || said.contains("before the machine was handed over")
                || said.contains("atoll-vmm: ");
            assert!(runs_there || told, "seed {seed}: {said}");
        }
        Disturbance::KillTarget => {
            target.process.kill().unwrap();
            target.process.wait().unwrap();
            let output = asker.wait_with_output().unwrap();
            let said = String::from_utf8(output.stderr).unwrap();
            let stays = said.contains("the machine stays: ");
            let lost = said.contains("the guest is lost: ");
            let one = [output.status.success(), stays, lost];
            let one = one.into_iter().filter(|it| *it).count();
            assert_eq!(one, 1, "seed {seed}: {said}");
            assert_eq!(works(&mut source), stays, "seed {seed}: {}", source.said());
            if lost {
                let (status, said) = source.ended();
                assert!(!status.success(), "seed {seed}");
                assert!(said.contains("the guest is lost: "), "seed {seed}: {said}");
            }
        }
        Disturbance::Cancel => {
            let _ = source.ctl(&["cancel-migration"]);
            let moved = asker.wait().unwrap().success();
            assert_eq!(works(&mut target), moved, "seed {seed}: {}", target.said());
            assert_eq!(works(&mut source), !moved, "seed {seed}: {}", source.said());
        }
    }
}

#[test]
fn never_both_run_whatever_happens() {
    if !possible() {
        return;
    }
    let first = number("ATOLL_SEED", u64::from(std::process::id()));
    for seed in first..first + number("ATOLL_MIGRATION_SEEDS", 6) {
        disturbed(seed);
    }
}

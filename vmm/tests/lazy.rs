// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Machines whose memory is read while their guest runs, on the host's own KVM, sandboxed and filtered as any.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "helpers of tests fail by panicking, and say what they skip"
)]

mod guest;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Stdio;

use atoll_vmm::memory::UserFault;
use atoll_vmm_protocol::api::{FillingInfo, Request};
use guest::{Guest, Place, eventually, kvm, moved, shell};

/// Memory in which the probe guest has nothing, where the tests put something for the machine to read.
const FOREIGN_MIB: u64 = 1024;
const FOREIGN_BYTES: u64 = 64 << 20;
const PAGE_BYTES: u64 = 4096;

/// Whether tests can run; says so when not.
fn possible() -> bool {
    let lazy = UserFault::open();
    if let Err(error) = &lazy {
        println!("ATOLL-SKIP: {error}");
    }
    kvm() && lazy.is_ok()
}

/// What a foreign page has, for its number from the first of them.
fn foreign(page: u64) -> Vec<u8> {
    let word = page.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    word.to_le_bytes().repeat(512)
}

/// A guest of two memory slots that works above 4 GiB, and a snapshot `saved` of it with foreign pages.
fn saved_guest() -> Guest {
    let mut guest = Place::new().start(&shell("3200", "2"));
    let mut serial = guest.serial();
    serial.start_load("4100 8");
    serial.load_beyond(2048);
    guest.client().act(Request::Pause).unwrap();
    guest.ctl(&["snapshot", "--to", "saved"]).unwrap();
    let memory = File::options().write(true).open(guest.path("saved/memory"));
    let memory = memory.unwrap();
    for page in 0..FOREIGN_BYTES / PAGE_BYTES {
        let at = (FOREIGN_MIB << 20) + page * PAGE_BYTES;
        memory.write_all_at(&foreign(page), at).unwrap();
    }
    guest
}

/// A machine from the snapshot, in a folder of its own.
fn lazily(original: &Guest) -> Guest {
    let place = Place::like(original);
    guest::link_directory(&original.path("saved"), &place.path("saved"));
    place.start(&["run", "--restore", "saved", "--memory-mode", "lazy"])
}

fn filling(guest: &Guest) -> FillingInfo {
    let info = guest.client().info().unwrap();
    info.filling.expect("the machine was restored lazily")
}

/// Until all is there. The guest is held and let go meanwhile, also while it waits for a page.
fn wait_for_memory(guest: &Guest) -> FillingInfo {
    eventually("all memory", || {
        guest.client().act(Request::Pause).unwrap();
        guest.client().act(Request::Resume).unwrap();
        Some(filling(guest)).filter(|filling| filling.complete)
    })
}

/// The foreign pages are in a snapshot's file as they were, and nothing else is where there was nothing.
#[track_caller]
fn check_foreign(memory: &Path) {
    let memory = File::open(memory).unwrap();
    let mut seen = vec![0; 4096];
    for page in 0..FOREIGN_BYTES / PAGE_BYTES {
        let at = (FOREIGN_MIB << 20) + page * PAGE_BYTES;
        memory.read_exact_at(&mut seen, at).unwrap();
        assert!(seen == foreign(page), "page {page}");
    }
    let behind = (FOREIGN_MIB << 20) + FOREIGN_BYTES;
    for page in 0..1024 {
        let at = behind + page * PAGE_BYTES;
        memory.read_exact_at(&mut seen, at).unwrap();
        assert!(seen.iter().all(|byte| *byte == 0), "page {page} behind");
    }
}

/// Several machines of one snapshot: one is looked at as soon as it is there, one is killed, one goes on without its
/// files.
#[test]
fn a_guest_works_while_its_memory_is_read() {
    if !possible() {
        return;
    }
    let original = saved_guest();
    let mut copies = [(); 3].map(|()| lazily(&original));
    let [early, killed, whole] = &mut copies;
    let mut serials = [early.serial(), whole.serial()];
    println!("begins with {:?}", filling(early));
    early.ctl(&["snapshot", "--to", "early"]).unwrap();
    killed.serial();
    killed.process.kill().unwrap();
    check_foreign(&early.path("early/memory"));
    let filled = wait_for_memory(whole);
    println!("{filled:?}");
    assert!(filled.filled_bytes >= FOREIGN_BYTES && filled.filled_bytes < 2 * FOREIGN_BYTES);
    std::fs::remove_dir_all(whole.path("saved")).unwrap();
    whole.ctl(&["snapshot", "--to", "late"]).unwrap();
    check_foreign(&whole.path("late/memory"));
    for serial in &mut serials {
        // A lap: every page that it works on has been compared.
        serial.load_beyond(2048 + 2048);
        serial.end_load();
        serial.wait_for("probe> ");
        serial.type_line("report");
        serial.wait_for("everything works");
    }
    whole.client().act(Request::Reset).unwrap();
    serials[1].wait_for("atoll probe: command line");
}

/// A machine that moves before its memory is read takes all of it along.
#[test]
fn a_machine_can_move_at_once() {
    if !possible() {
        return;
    }
    let original = saved_guest();
    let mut source = lazily(&original);
    source.serial();
    let place = Place::new();
    std::fs::remove_file(place.path("disk")).unwrap();
    std::fs::hard_link(source.path("disk"), place.path("disk")).unwrap();
    let mut target = place.start(&["receive", "--socket", "in"]);
    eventually("the target's socket", || {
        target.path("in").exists().then_some(())
    });
    println!("moves with {:?}", filling(&source));
    let asker = source.place.command(&["ctl", "--api-socket", "api"]);
    let asker = { asker }
        .args(["migrate", "--to"])
        .arg(target.path("in"))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    moved(asker.unwrap(), &mut source, &target);
    target.ctl(&["snapshot", "--to", "moved"]).unwrap();
    check_foreign(&target.path("moved/memory"));
    let mut serial = target.serial();
    serial.load_beyond(2048 + 2048);
    serial.end_load();
}

#[test]
fn what_cannot_be_read_ends_the_machine_with_the_reason() {
    if !possible() {
        return;
    }
    let mut guest = Place::new().start(&shell("32", "1"));
    guest.serial().wait_for("probe> ");
    let packed = ["snapshot", "--to", "saved", "--packed", "true"];
    guest.ctl(&packed).unwrap();
    guest.ctl(&["shutdown"]).unwrap();
    guest.ended();
    let restore = || {
        let lazily = ["run", "--restore", "saved", "--memory-mode", "lazy"];
        let output = guest.place.command(&lazily).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{said}");
        said
    };
    // Its first block, behind the header.
    let memory = File::options().write(true).open(guest.path("saved/memory"));
    let memory = memory.unwrap();
    memory.write_all_at(&[0; 4], 32).unwrap();
    let said = restore();
    let errors: Vec<&str> = said
        .lines()
        .filter(|line| line.contains("ERROR") || line.starts_with("atoll-vmm:"))
        .collect();
    let reason = "the saved memory cannot be read to its end: the machine ends";
    assert!(errors.len() == 1 && errors[0].contains(reason), "{said}");
    assert!(errors[0].contains("packed memory: Block"), "{said}");
    // What can be told before is told before.
    memory.set_len(40).unwrap();
    let said = restore();
    assert!(
        said.contains("read the saved memory: packed memory: its index is not whole"),
        "{said}"
    );
    let spec = std::fs::read_to_string(guest.path("saved/spec.json")).unwrap();
    let mut spec: serde_json::Value = serde_json::from_str(&spec).unwrap();
    spec["services"]["memory_backing"] = "shared".into();
    std::fs::write(guest.path("saved/spec.json"), spec.to_string()).unwrap();
    let said = restore();
    assert!(
        said.contains("shared memory and huge pages cannot be read lazily: --memory-mode read"),
        "{said}"
    );
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Snapshots whose memory is written while the guest runs, on the host's own KVM, sandboxed and filtered as any. The probe
//! guest writes all the time, by its vCPUs and by its disk, and would notice a page that is not of the moment.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "helpers of tests fail by panicking, and say what they skip"
)]

mod guest;

use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Child, Stdio};

use atoll_vmm::board::MICRO;
use atoll_vmm::memory::{Backing, USERFAULTFD, allocate, open_device};
use atoll_vmm::saved::packed::Packed;
use atoll_vmm::saved::{self, image};
use atoll_vmm_protocol::api::{Request, SavingInfo, SavingStage, Snapshot, SnapshotTaken};
use guest::huge_pages::HugePages;
use guest::{Guest, Place, eventually, firmware, kvm, shell};
use vm_memory::{Bytes, GuestAddress};

const MEMORY_MIB: u64 = 32;
/// Rounds after which the guest's work has written each of its pages, and compared it with the last time.
const LAP: u64 = 1024;
/// Nothing is written in order.
const SNAIL: &str = "1";

/// Whether tests can run; says so when not.
fn possible() -> bool {
    let device = open_device();
    if let Err(error) = &device {
        println!("ATOLL-SKIP: {USERFAULTFD}: {error}");
    }
    kvm() && device.is_ok()
}

/// Begins a live snapshot to `to`, in a process that waits for it, and returns when its moment has come.
fn begin(guest: &Guest, to: &str, options: &[&str]) -> Child {
    let mut asker = guest.place.command(&["ctl", "--api-socket", "api"]);
    asker.args(["snapshot", "--live", "true", "--to", to]);
    asker.args(options);
    asker.stdout(Stdio::piped()).stderr(Stdio::piped());
    let asker = asker.spawn().unwrap();
    eventually("the snapshot's moment", || {
        let info: SavingInfo = guest.client().ask(Request::Saving).ok()?;
        (info.to == to).then_some(())
    });
    asker
}

fn saving(guest: &Guest) -> SavingInfo {
    guest.client().ask(Request::Saving).unwrap()
}

/// What the process of [`begin`] said in the end, or why there is no snapshot.
fn finish(asker: Child) -> Result<SnapshotTaken, String> {
    let output = asker.wait_with_output().unwrap();
    match output.status.success() {
        true => Ok(serde_json::from_slice(&output.stdout).unwrap()),
        false => Err(String::from_utf8(output.stderr).unwrap()),
    }
}

/// All of RAM, as a restore would have it.
fn ram_of(snapshot: &Path) -> Vec<u8> {
    let (_, layers) = saved::open(snapshot).unwrap();
    let ram = allocate(&MICRO, MEMORY_MIB, 40, Backing::Anonymous).unwrap();
    for layer in layers {
        match layer.packed {
            true => Packed::open(layer.file, MEMORY_MIB << 20)
                .unwrap()
                .read(&ram),
            false => image::read(&ram, &layer.file),
        }
        .unwrap();
    }
    let mut bytes = vec![0; usize::try_from(MEMORY_MIB << 20).unwrap()];
    ram.read_slice(&mut bytes, GuestAddress(0)).unwrap();
    bytes
}

#[track_caller]
fn works_whole(serial: &mut guest::Serial) {
    serial.end_load();
    serial.wait_for("probe> ");
    serial.type_line("report");
    serial.wait_for("everything works");
}

/// Of a paused machine there are two snapshots of one moment: one that was written while nothing ran, and one while the
/// guest wrote all that it works on, again and again.
#[test]
fn memory_is_that_of_the_moment() {
    if !possible() {
        return;
    }
    for (memory, packed) in [("32", "false"), ("32", "true"), ("32M,shared", "false")] {
        is_of_the_moment(memory, packed);
    }
}

/// Such pages wait as a whole, and are allowed as a whole.
#[test]
fn memory_in_huge_pages_is_that_of_the_moment() {
    if !possible() {
        return;
    }
    let Some(_pages) = HugePages::lend(32) else {
        return;
    };
    for packed in ["false", "true"] {
        is_of_the_moment("32M,hugepages=2M", packed);
    }
}

#[track_caller]
fn is_of_the_moment(memory: &str, packed: &str) {
    let mut guest = Place::new().start(&shell(memory, "2"));
    let mut serial = guest.serial();
    serial.start_load("");
    let mut done = serial.load_beyond(LAP);
    // A busy host may let the guest go on only when all is written: then once more, and slower.
    let faults = [4 << 20, 1 << 20, 1 << 18].into_iter().find(|rate: &u64| {
        for old in ["held", "live"] {
            let _ = std::fs::remove_dir_all(guest.path(old));
        }
        guest.client().act(Request::Pause).unwrap();
        guest.ctl(&["snapshot", "--to", "held"]).unwrap();
        let rate = rate.to_string();
        let asker = begin(
            &guest,
            "live",
            &["--packed", packed, "--max-bytes-per-second", &rate],
        );
        guest.client().act(Request::Resume).unwrap();
        done = serial.load_beyond(done + LAP);
        let taken = finish(asker).unwrap();
        let info = saving(&guest);
        println!("{memory}, packed {packed}: {taken:?} {info:?}");
        assert_eq!(info.stage, SavingStage::Completed);
        assert_eq!(info.remaining_bytes, 0);
        info.fault_count > 0
    });
    assert!(faults.is_some(), "the guest never waited to write");
    let (held, live) = (ram_of(&guest.path("held")), ram_of(&guest.path("live")));
    let pages = held.chunks(4096).zip(live.chunks(4096));
    let differ: Vec<_> = (0..)
        .zip(pages)
        .filter_map(|(page, (one, other))| (one != other).then_some(page))
        .collect();
    assert_eq!(differ, [0_u64; 0], "pages of {memory}, packed {packed}");
    serial.load_beyond(done);
    works_whole(&mut serial);
}

/// A live snapshot `to` with the disk of its moment, `to.disk`: the machine is paused while that is copied.
fn with_disk(guest: &Guest, to: &str, options: &[&str]) -> SnapshotTaken {
    guest.client().act(Request::Pause).unwrap();
    let rate = ["--max-bytes-per-second", "8000000"];
    let asker = begin(guest, to, &[options, &rate].concat());
    std::fs::copy(guest.path("disk"), guest.path(&format!("{to}.disk"))).unwrap();
    guest.client().act(Request::Resume).unwrap();
    finish(asker).unwrap()
}

/// A folder with the snapshot `name` of this machine, those that it needs, and its disk.
fn place_of(guest: &Guest, name: &str, needed: &[&str]) -> Place {
    let place = Place::new();
    for name in needed {
        guest::link_directory(&guest.path(name), &place.path(name));
    }
    std::fs::copy(guest.path(&format!("{name}.disk")), place.path("disk")).unwrap();
    place
}

/// Snapshots of a machine at work, one the other's child, and of their clones.
#[test]
fn clones_of_live_snapshots_work() {
    if !possible() {
        return;
    }
    let mut guest = Place::new().start(&shell("32", "2"));
    let mut serial = guest.serial();
    serial.start_load("");
    let mut done = serial.load_beyond(LAP);
    let whole = with_disk(&guest, "0", &["--track", "true"]);
    done = serial.load_beyond(done + LAP / 2);
    let child = with_disk(&guest, "1", &["--parent", "0", "--track", "true"]);
    done = serial.load_beyond(done);
    println!("{whole:?}, then {child:?}");
    assert!(whole.memory_bytes > 4 << 20 && child.memory_bytes > 0);
    // What is held knows what is live as its parent.
    guest.client().act(Request::Pause).unwrap();
    let held = ["snapshot", "--to", "2", "--parent", "1"];
    guest.ctl(&held).unwrap();
    std::fs::copy(guest.path("disk"), guest.path("2.disk")).unwrap();
    guest.client().act(Request::Resume).unwrap();

    for (name, mode) in [("0", "map"), ("1", "read"), ("2", "lazy")] {
        let place = place_of(&guest, name, &["0", "1", "2"]);
        let mut clone = place.start(&["run", "--restore", name, "--memory-mode", mode]);
        let mut serial = clone.serial();
        let done = serial.load_beyond(0);
        if mode == "map" {
            let refused = clone.ctl(&["snapshot", "--to", "again", "--live", "true"]);
            let refused = refused.unwrap_err();
            assert!(refused.contains("--memory-mode map"), "{refused}");
            assert!(!clone.path("again").exists());
        } else {
            // Memory that is still being read is watched already.
            if let Err(said) = clone.ctl(&["snapshot", "--to", "early", "--live", "true"]) {
                assert!(
                    said.contains("it is still being read: wait until"),
                    "{said}"
                );
            }
            eventually("all memory", || {
                let info = clone.client().info().unwrap();
                info.filling.is_none_or(|it| it.complete).then_some(())
            });
            with_disk(&clone, "again", &[]);
            let place = place_of(&clone, "again", &["again"]);
            let mut again = place.start(&["run", "--restore", "again"]);
            let mut serial = again.serial();
            let done = serial.load_beyond(0);
            serial.load_beyond(done + LAP);
            works_whole(&mut serial);
        }
        serial.load_beyond(done + LAP);
        works_whole(&mut serial);
    }
    serial.load_beyond(done);
    works_whole(&mut serial);
}

/// Firmware's variables are a file of the machine's, like a disk: who copies them in that moment has what its memory knows.
#[test]
fn firmware_goes_on_from_a_live_snapshot() {
    if !possible() {
        return;
    }
    let place = Place::new();
    firmware::put(&place);
    let mut guest = place.start(&firmware::run("32"));
    let mut serial = guest.serial();
    serial.wait_for(firmware::ROUNDS);
    guest.client().act(Request::Pause).unwrap();
    let asker = begin(&guest, "live", &["--max-bytes-per-second", "4000"]);
    let copy = Place::new();
    for name in ["code", "vars"] {
        std::fs::copy(guest.path(name), copy.path(name)).unwrap();
    }
    guest.client().act(Request::Resume).unwrap();
    serial.wait_for(firmware::ROUNDS);
    finish(asker).unwrap();
    serial.wait_for(firmware::ROUNDS);
    guest::link_directory(&guest.path("live"), &copy.path("live"));
    let mut copy = copy.start(&["run", "--restore", "live"]);
    let mut serial = copy.serial();
    serial.wait_for(firmware::ROUNDS);
}

/// While nothing is written in order the guest works, the machine is reset, and other things have to wait; then somebody
/// gives the snapshot up, and it leaves nothing.
#[test]
fn a_live_snapshot_can_be_given_up() {
    if !possible() {
        return;
    }
    let mut guest = Place::new().start(&shell("32", "2"));
    let mut serial = guest.serial();
    let refused = guest.ctl(&["saving"]).unwrap_err();
    assert!(refused.contains("has not been asked"), "{refused}");
    let refused = guest.ctl(&["snapshot", "--to", "a", "--max-bytes-per-second", "9"]);
    let refused = refused.unwrap_err();
    assert!(refused.contains("of a live snapshot"), "{refused}");
    // Memory that has something in it, and that nobody writes to again.
    serial.start_load("24 4");
    serial.load_beyond(LAP);
    serial.end_load();
    serial.start_load("");
    let done = serial.load_beyond(LAP);
    let snail = ["--track", "true", "--max-bytes-per-second", SNAIL];
    let asker = begin(&guest, "live", &snail);
    let done = serial.load_beyond(done + LAP);
    let info = saving(&guest);
    println!("{info:?}");
    assert_eq!(info.stage, SavingStage::Saving);
    assert!(info.fault_count > 0 && info.memory_bytes >= 4 << 20);
    for refused in [
        guest.ctl(&["snapshot", "--to", "other"]),
        guest.ctl(&["snapshot", "--to", "other", "--live", "true"]),
    ] {
        let refused = refused.unwrap_err();
        assert!(
            refused.contains("wait (saving tells), or cancel-snapshot"),
            "{refused}"
        );
    }
    guest.client().act(Request::Pause).unwrap();
    guest.client().act(Request::Resume).unwrap();
    serial.load_beyond(done);
    guest.client().act(Request::Reset).unwrap();
    serial.wait_for("atoll probe: command line");
    assert_eq!(saving(&guest).stage, SavingStage::Saving);
    guest.ctl(&["cancel-snapshot"]).unwrap();
    let said = finish(asker).unwrap_err();
    assert!(
        said.contains("snapshot live: the snapshot was cancelled"),
        "{said}"
    );
    assert_eq!(saving(&guest).stage, SavingStage::Cancelled);
    assert!(!guest.path("live").exists());
    // Nothing is known of what was written since a snapshot that there is not.
    serial.start_load("");
    serial.load_beyond(0);
    let asker = begin(&guest, "whole", &[]);
    finish(asker).unwrap();

    // And a machine that ends takes its snapshot along.
    let asker = begin(&guest, "last", &["--max-bytes-per-second", SNAIL]);
    guest.ctl(&["shutdown"]).unwrap();
    guest.ended();
    let said = finish(asker).unwrap_err();
    assert!(
        said.contains("the machine ended before its memory was written"),
        "{said}"
    );
    assert!(!guest.path("last").exists() && guest.path("whole").exists());
}

/// A file that is full makes no snapshot, and the guest does not notice.
#[test]
fn a_full_disk_does_not_stop_the_guest() {
    if !possible() {
        return;
    }
    let mut guest = Place::new().start(&shell("32", "1"));
    let mut serial = guest.serial();
    serial.start_load("");
    let mut done = serial.load_beyond(LAP);
    let write = |path: &Path| File::options().read(true).write(true).open(path).unwrap();
    let empty = || tempfile::tempfile().unwrap();
    let files = [
        empty(),
        empty(),
        write(Path::new("/dev/full")),
        write(Path::new(USERFAULTFD)),
    ];
    for round in ["first", "second"] {
        let body = Snapshot {
            to: round.to_owned(),
            packed: Some(true),
            live: Some(true),
            track: Some(true),
            ..Snapshot::default()
        };
        let descriptors: Vec<_> = files.iter().map(File::as_fd).collect();
        let taken: SnapshotTaken = guest
            .client()
            .ask_with_files(Request::Snapshot, &body, &descriptors)
            .unwrap();
        println!("{taken:?}");
        let info = eventually("the end", || {
            Some(saving(&guest)).filter(|info| info.stage != SavingStage::Saving)
        });
        assert_eq!(info.stage, SavingStage::Failed);
        let error = info.error.unwrap();
        assert!(
            error.starts_with("write memory: No space left on device"),
            "{error}"
        );
        assert_eq!(files[1].metadata().unwrap().len(), 0, "the state");
        done = serial.load_beyond(done + LAP);
    }
    // What is no userfaultfd is said to be none, before the guest is held.
    let body = Snapshot {
        to: "third".to_owned(),
        live: Some(true),
        ..Snapshot::default()
    };
    let descriptors = [0, 1, 2, 2].map(|number: usize| files[number].as_fd());
    let refused = guest
        .client()
        .ask_with_files::<SnapshotTaken>(Request::Snapshot, &body, &descriptors)
        .unwrap_err();
    assert!(
        refused.to_string().contains("make a userfaultfd"),
        "{refused}"
    );
    guest
        .ctl(&["snapshot", "--to", "live", "--live", "true"])
        .unwrap();
    serial.load_beyond(done);
    works_whole(&mut serial);
}

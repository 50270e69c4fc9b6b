// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Disks and cards that come and go on the host's own KVM. The probe guest follows the registers without AML, on both
//! boards, halted until their event wakes it; stock Linux does it with AML in the lab.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "helpers of tests fail by panicking, and say what they skip"
)]

mod guest;

use std::fs::File;
use std::path::Path;

use atoll_disk::qcow2::{Qcow2Options, create};
use atoll_vmm_protocol::api::{DeviceInfo, Request};
use guest::{Guest, Place, Serial, eventually, kvm, shell};
use serde_json::json;

const BOARDS: [&str; 2] = ["micro", "pc"];

/// The probe's shell, with two vCPUs so that devices have threads and vectors of their own.
fn start(place: Place, board: &str, words: &str) -> (Guest, Serial) {
    let cmdline = format!("stay write {words}");
    let mut arguments = shell("32", "2");
    arguments[4] = &cmdline;
    arguments.extend(["--profile", board]);
    let mut guest = place.start(&arguments);
    let mut serial = guest.serial();
    serial.wait_for("probe> ");
    (guest, serial)
}

fn image(guest: &Guest, name: &str) {
    let file = File::create(guest.path(name)).unwrap();
    file.set_len(1 << 20).unwrap();
}

fn add(guest: &Guest, keys: &str) -> Result<serde_json::Value, String> {
    guest.ctl(&["add-disk", "--disk", keys])
}

fn remove(guest: &Guest, id: &str, more: &[&str]) -> Result<serde_json::Value, String> {
    let mut arguments = vec!["remove-device", "--id", id];
    arguments.extend(more);
    guest.ctl(&arguments)
}

fn device(guest: &Guest, id: &str) -> Option<DeviceInfo> {
    let devices = guest.client().info().unwrap().devices;
    devices.into_iter().find(|device| device.id == id)
}

/// The machine works: each disk was written, read and flushed.
fn check_disks(serial: &mut Serial, count: usize) {
    serial.type_line("report");
    let said = serial.wait_for("everything works");
    assert_eq!(said.matches("blk:").count(), count, "{said}");
}

/// Whether the machine's process has that file open.
fn has_open(guest: &Guest, path: &Path) -> bool {
    let files = format!("/proc/{}/fd", guest.process.id());
    let path = path.canonicalize().unwrap();
    std::fs::read_dir(files)
        .unwrap()
        .filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok())
        .any(|target| target == path)
}

#[test]
fn a_disk_comes_and_goes_again_and_again_on_one_slot() {
    if !kvm() {
        return;
    }
    for board in BOARDS {
        let (guest, mut serial) = start(Place::new(), board, "");
        image(&guest, "more");
        let slot = |said: &serde_json::Value| said["slot"].as_u64().unwrap();
        let first = add(&guest, "path=more,format=raw").unwrap();
        for round in 0..3 {
            if round > 0 {
                assert_eq!(add(&guest, "path=more,format=raw").unwrap(), first);
            }
            assert_eq!(first["id"], "disk1");
            serial.wait_for(&format!("slot {}: now blk", slot(&first)));
            check_disks(&mut serial, 2);
            let told = device(&guest, "disk1").unwrap();
            assert!(told.removable && !told.leaving && u64::from(told.slot) == slot(&first));
            let counters = guest.client().counters().unwrap();
            let ids: Vec<_> = counters.disks.iter().map(|disk| &*disk.id).collect();
            assert_eq!(ids, ["disk0", "disk1"]);
            assert!(counters.disks[1].written_bytes > 0);
            assert!(has_open(&guest, &guest.path("more")));

            let gone = remove(&guest, "disk1", &[]).unwrap();
            assert_eq!(gone, json!({"stage": "gone"}));
            serial.wait_for(&format!("slot {}: let go, there: false", slot(&first)));
            assert_eq!(device(&guest, "disk1"), None);
            eventually("the image to be closed", || {
                (!has_open(&guest, &guest.path("more"))).then_some(())
            });
            check_disks(&mut serial, 1);
        }
    }
}

#[test]
fn a_qcow2_image_comes_and_goes_in_the_sandbox() {
    if !kvm() {
        return;
    }
    let (guest, mut serial) = start(Place::new(), "micro", "");
    create(&guest.path("more"), 1 << 20, &Qcow2Options::default()).unwrap();
    add(&guest, "path=more,format=qcow2").unwrap();
    serial.wait_for(": now blk");
    check_disks(&mut serial, 2);
    let gone = remove(&guest, "disk1", &[]).unwrap();
    assert_eq!(gone, json!({"stage": "gone"}));
    check_disks(&mut serial, 1);
    // Who writes to it next after a kill says what it found.
    add(&guest, "path=more,format=qcow2").unwrap();
    serial.wait_for(": now blk");
    check_disks(&mut serial, 2);
    let (guest, mut serial) = start(guest.killed(), "micro", "");
    assert!(!guest.said().contains("qcow2"));
    add(&guest, "path=more,format=qcow2").unwrap();
    serial.wait_for(": now blk");
    let said = guest.said();
    let line = said.lines().find(|line| line.contains("were made anew"));
    assert!(line.unwrap().contains("nobody closed it"), "{said}");
    check_disks(&mut serial, 2);
}

#[test]
fn what_cannot_be_is_refused_and_changes_nothing() {
    if !kvm() {
        return;
    }
    let (guest, mut serial) = start(Place::new(), "micro", "");
    image(&guest, "more");
    image(&guest, "other");
    add(&guest, "path=more,format=raw,id=data").unwrap();
    serial.wait_for(": now blk");
    let before = guest.client().info().unwrap().devices;
    let refused = |keys: &str, expected: &str| {
        let said = add(&guest, keys).unwrap_err();
        assert!(said.contains(expected), "{said}");
        assert_eq!(said.trim().lines().count(), 1, "{said}");
    };
    refused(
        "path=other,format=raw,id=data",
        "device data: there are two of that name",
    );
    refused(
        "path=other,format=raw,id=rng0",
        "device rng0: the machine's own device",
    );
    refused("path=other,format=raw,id=Data", "lower-case letters");
    refused("path=more,format=raw", "is in use");
    refused("path=disk,format=raw", "is in use");
    refused("path=/,format=raw", "is a directory");
    refused("path=none,format=raw", "No such file");
    refused("path=other,format=qcow2", "disk ");
    refused("path=other,format=raw,queues=99", "99 queues: 1 to 16");
    let unknown = remove(&guest, "disk7", &[]).unwrap_err();
    assert!(
        unknown.contains("no disk or network card disk7; there are: disk0 data"),
        "{unknown}"
    );
    let fixed = remove(&guest, "rng0", &[]).unwrap_err();
    assert!(fixed.contains("no disk or network card rng0"), "{fixed}");
    let boots = remove(&guest, "disk0", &["--force", "true"]).unwrap_err();
    assert!(
        boots.contains("disk0 stays: the machine boots from it"),
        "{boots}"
    );
    // Without its file.
    let body = json!({"disk": {"path": "/x", "format": "raw"}});
    let said = guest
        .client()
        .ask_with::<serde_json::Value>(Request::AddDisk, &body);
    assert!(
        said.unwrap_err()
            .to_string()
            .contains("0 open files came for 1 images")
    );
    assert_eq!(guest.client().info().unwrap().devices, before);
    check_disks(&mut serial, 2);
}

#[test]
fn the_bus_fills_up_and_is_emptied() {
    if !kvm() {
        return;
    }
    let (guest, mut serial) = start(Place::new(), "micro", "");
    let mut slots = Vec::new();
    let full = loop {
        let name = format!("more{}", slots.len());
        image(&guest, &name);
        match add(&guest, &format!("path={name},format=raw")) {
            Ok(added) => slots.push(added["slot"].as_u64().unwrap()),
            Err(said) => break said,
        }
        serial.wait_for(": now blk");
    };
    assert_eq!(slots.len(), 23, "beside the first disk");
    assert!(full.contains("a machine has 24 slots for them"), "{full}");
    // Lowest first, around the entropy source.
    assert_eq!(slots[..3], [3, 4, 5]);
    for number in (1..=23).rev() {
        remove(&guest, &format!("disk{number}"), &[]).unwrap();
    }
    check_disks(&mut serial, 1);
}

#[test]
fn a_guest_that_keeps_a_device_has_it_until_it_is_forced_or_reset() {
    if !kvm() {
        return;
    }
    for board in BOARDS {
        let (guest, mut serial) = start(Place::new(), board, "keep");
        image(&guest, "more");
        add(&guest, "path=more,format=raw").unwrap();
        serial.wait_for(": now blk");
        for _ in 0..2 {
            let said = remove(&guest, "disk1", &["--timeout-ms", "100"]).unwrap_err();
            assert!(said.contains("the guest has not let disk1 go"), "{said}");
            serial.wait_for(": wanted back, and kept");
            assert!(device(&guest, "disk1").unwrap().leaving);
            check_disks(&mut serial, 2);
        }
        let forced = remove(&guest, "disk1", &["--force", "true"]).unwrap();
        assert_eq!(forced["stage"], "gone");
        serial.wait_for(": now empty");
        check_disks(&mut serial, 1);
        eventually("the image to be closed", || {
            (!has_open(&guest, &guest.path("more"))).then_some(())
        });

        image(&guest, "stays");
        add(&guest, "path=more,format=raw").unwrap();
        serial.wait_for(": now blk");
        add(&guest, "path=stays,format=raw").unwrap();
        serial.wait_for(": now blk");
        remove(&guest, "disk1", &["--timeout-ms", "0"]).unwrap_err();
        guest.client().act(Request::Reset).unwrap();
        assert_eq!(device(&guest, "disk1"), None);
        assert!(!device(&guest, "disk2").unwrap().leaving);
        serial.wait_for("everything works");
        serial.wait_for("probe> ");
        check_disks(&mut serial, 2);
        // What nobody asked for stays.
        for slot in 0..32 {
            serial.type_line(&format!("eject {slot}"));
            serial.wait_for("probe> ");
        }
        check_disks(&mut serial, 2);
        assert!(!has_open(&guest, &guest.path("more")));
    }
}

#[test]
fn a_paused_guest_finds_what_has_changed_when_it_goes_on() {
    if !kvm() {
        return;
    }
    let (guest, mut serial) = start(Place::new(), "pc", "");
    image(&guest, "more");
    guest.client().act(Request::Pause).unwrap();
    add(&guest, "path=more,format=raw").unwrap();
    guest.client().act(Request::Resume).unwrap();
    serial.wait_for(": now blk");
    guest.client().act(Request::Pause).unwrap();
    remove(&guest, "disk1", &["--timeout-ms", "0"]).unwrap_err();
    assert!(device(&guest, "disk1").unwrap().leaving);
    guest.client().act(Request::Resume).unwrap();
    serial.wait_for(": let go, there: false");
    eventually("the disk to be gone", || {
        device(&guest, "disk1").is_none().then_some(())
    });
    check_disks(&mut serial, 1);
}

#[test]
fn a_snapshot_has_what_was_plugged_in_on_its_slots() {
    if !kvm() {
        return;
    }
    for board in BOARDS {
        let (guest, mut serial) = start(Place::new(), board, "keep");
        for name in ["a", "b", "c"] {
            image(&guest, name);
            add(&guest, &format!("path={name},format=raw,id={name}")).unwrap();
            serial.wait_for(": now blk");
        }
        // A hole, in which no later order would put anything; and one disk that is asked for.
        remove(&guest, "a", &["--force", "true"]).unwrap();
        serial.wait_for(": now empty");
        remove(&guest, "c", &["--timeout-ms", "0"]).unwrap_err();
        serial.wait_for("wanted back, and kept");
        guest.client().act(Request::Pause).unwrap();
        let devices = guest.client().info().unwrap().devices;
        guest.ctl(&["snapshot", "--to", "saved"]).unwrap();
        let place = guest.killed();
        let mut copy = place.start(&["run", "--restore", "saved"]);
        let mut serial = copy.serial();
        // Where the control API will be, the killed process's socket is until then.
        let info = eventually("the control API", || copy.client().info().ok());
        assert_eq!(info.devices, devices);
        check_disks(&mut serial, 3);
        let boots = remove(&copy, "disk0", &[]).unwrap_err();
        assert!(boots.contains("boots from it"), "{boots}");
        let free = add(&copy, "path=a,format=raw,id=a").unwrap();
        assert_eq!(free["slot"], 3, "the hole");
        serial.wait_for("slot 3: now blk");
        check_disks(&mut serial, 4);
        // What was asked for before is gone after a reset; the rest is found again.
        copy.client().act(Request::Reset).unwrap();
        serial.wait_for("everything works");
        serial.wait_for("probe> ");
        check_disks(&mut serial, 3);
        assert_eq!(device(&copy, "c"), None);
    }
}

#[test]
fn a_machine_moves_with_what_was_plugged_in() {
    if !kvm() {
        return;
    }
    let (mut guest, mut serial) = start(Place::new(), "micro", "");
    image(&guest, "more");
    image(&guest, "unit");
    add(&guest, "path=more,format=raw").unwrap();
    serial.wait_for(": now blk");
    let unit = add(&guest, "path=unit,format=raw,bus=scsi").unwrap();
    assert_eq!(
        (unit["id"].as_str(), unit["target"].as_u64()),
        (Some("disk2"), Some(0))
    );
    image(&guest, "disc");
    add(&guest, "bus=cdrom,id=dvd").unwrap();
    let insert = ["insert-disk", "--id", "dvd", "--path", "disc"];
    guest.ctl(&insert).unwrap();
    let devices = guest.client().info().unwrap().devices;
    let place = Place::new();
    std::fs::remove_file(place.path("disk")).unwrap();
    std::fs::hard_link(guest.path("disk"), place.path("disk")).unwrap();
    let mut target = place.start(&["receive", "--socket", "in"]);
    eventually("the target's socket", || {
        target.path("in").exists().then_some(())
    });
    let to = target.path("in");
    let moved = guest.ctl(&["migrate", "--to", to.to_str().unwrap()]);
    moved.unwrap_or_else(|said| panic!("{said} {} {}", guest.said(), target.said()));
    assert_eq!(guest.ended().0.code(), Some(0));
    let mut serial = target.serial();
    check_disks(&mut serial, 2);
    assert_eq!(target.client().info().unwrap().devices, devices);
    remove(&target, "disk1", &[]).unwrap();
    serial.wait_for(": let go, there: false");
    check_disks(&mut serial, 1);
    let paths = [guest.path("more"), guest.path("unit")];
    eventually("the image to be closed", || {
        (!has_open(&target, &paths[0])).then_some(())
    });
    assert!(has_open(&target, &paths[1]));
    assert!(has_open(&target, &guest.path("disc")));
}

#[test]
fn units_of_the_scsi_host_come_and_go_and_their_host_stays() {
    if !kvm() {
        return;
    }
    let (guest, mut serial) = start(Place::new(), "micro", "");
    image(&guest, "unit");
    let added = add(&guest, "path=unit,format=raw,bus=scsi,target=5,id=scsi5").unwrap();
    assert_eq!(
        (added["target"].as_u64(), added["slot"].as_u64()),
        (Some(5), Some(3))
    );
    // The host itself is new, and the probe has no driver for it.
    serial.wait_for("slot 3: now empty");
    let refused = add(&guest, "bus=cdrom,target=5").unwrap_err();
    assert!(refused.contains("SCSI target 5"), "{refused}");
    add(&guest, "bus=cdrom,id=dvd").unwrap();
    guest
        .ctl(&[
            "insert-disk",
            "--id",
            "dvd",
            "--path",
            &guest.path("kernel").display().to_string(),
        ])
        .unwrap_err();
    for id in ["scsi5", "dvd"] {
        assert_eq!(remove(&guest, id, &[]).unwrap()["stage"], "gone");
        assert_eq!(device(&guest, id), None);
    }
    assert!(!has_open(&guest, &guest.path("unit")));
    assert!(!device(&guest, "scsi").unwrap().removable);
    // Without units the host is in no spec; the copy has it all the same.
    guest.client().act(Request::Pause).unwrap();
    let devices = guest.client().info().unwrap().devices;
    guest.ctl(&["snapshot", "--to", "saved"]).unwrap();
    let place = guest.killed();
    let mut copy = place.start(&["run", "--restore", "saved"]);
    check_disks(&mut copy.serial(), 1);
    assert_eq!(copy.client().info().unwrap().devices, devices);
}

#[test]
fn a_card_comes_with_its_taps_and_goes_with_them() {
    if !kvm() {
        return;
    }
    for (number, board) in BOARDS.iter().enumerate() {
        let (guest, mut serial) = start(Place::new(), board, "");
        let tap = format!("ahp{number}x{}", std::process::id());
        for queues in [1, 2] {
            let keys = format!("tap={tap},queues={queues},mac=52:54:00:00:00:07");
            let added = match guest.ctl(&["add-net", "--net", &keys]) {
                Ok(added) => added,
                Err(said) if said.contains("/dev/net/tun") || said.contains("permitted") => {
                    println!("ATOLL-SKIP: no tap: {said}");
                    return;
                }
                Err(said) => panic!("{said} {}", guest.said()),
            };
            assert_eq!(added["id"], "net0");
            serial.wait_for(": now net");
            guest
                .ctl(&["set-link", "--id", "net0", "--up", "false"])
                .unwrap();
            let interface = Path::new("/sys/class/net").join(&tap);
            assert!(interface.exists());
            let counters = guest.client().counters().unwrap();
            assert_eq!(counters.nets[0].id, "net0");
            remove(&guest, "net0", &[]).unwrap();
            serial.wait_for(": let go, there: false");
            // Made for the machine, it goes with the last descriptor.
            eventually("the tap to go", || (!interface.exists()).then_some(()));
            let unknown = guest.ctl(&["set-link", "--id", "net0", "--up", "true"]);
            assert!(unknown.unwrap_err().contains("no network card net0"));
        }
        let body = json!({"net": {"tap": "t"}});
        let said = guest
            .client()
            .ask_with::<serde_json::Value>(Request::AddNet, &body);
        let said = said.unwrap_err().to_string();
        assert!(said.contains("0 open files came for 1 pairs"), "{said}");
    }
}

#[test]
fn interrupt_numbers_and_threads_come_back() {
    if !kvm() {
        return;
    }
    let (guest, mut serial) = start(Place::new(), "micro", "keep");
    image(&guest, "more");
    let threads = || {
        let tasks = format!("/proc/{}/task", guest.process.id());
        std::fs::read_dir(tasks).unwrap().count()
    };
    let files = || {
        let files = format!("/proc/{}/fd", guest.process.id());
        std::fs::read_dir(files).unwrap().count()
    };
    let mut before = None;
    // The probe has 31 vectors, which it does not give back.
    for _ in 0..10 {
        add(&guest, "path=more,format=raw").unwrap();
        serial.wait_for(": now blk");
        remove(&guest, "disk1", &["--force", "true"]).unwrap();
        serial.wait_for(": now empty");
        let now = (threads(), files());
        let first = *before.get_or_insert(now);
        eventually("threads and files as before", || {
            ((threads(), files()) == first).then_some(())
        });
    }
}

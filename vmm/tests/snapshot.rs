// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Snapshots of whole machines on the host's own KVM, while the probe guest works on its memory and its disk and
//! would notice a lost write, a repeated interrupt, or a clock that goes back.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "helpers of tests fail by panicking, and say what they skip"
)]

mod guest;

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use atoll_vmm::saved::image;
use atoll_vmm_protocol::api::Request;
use atoll_vmm_protocol::spec::{DiskLimits, NetLimits, VhostNet};
use guest::images::{pages, restored_pages};
use guest::{Clocked, Guest, Place, eventually, kvm, shell};

/// Rounds of snapshot and restore; `make soak` asks for more.
fn rounds() -> usize {
    let asked = std::env::var("ATOLL_SNAPSHOT_ROUNDS").ok();
    asked.map_or(5, |text| text.parse().unwrap())
}

/// Snapshots a paused machine and starts a copy of it, with its disk, in a folder of its own.
fn copy_of(original: &Guest, mode: &str) -> Guest {
    original.ctl(&["snapshot", "--to", "copy"]).unwrap();
    let place = Place::like(original);
    guest::link_directory(&original.path("copy"), &place.path("snapshot"));
    std::fs::remove_dir_all(original.path("copy")).unwrap();
    place.start(&["run", "--restore", "snapshot", "--memory-mode", mode])
}

#[test]
fn a_guest_at_work_goes_on_in_one_copy_after_another() {
    if !kvm() {
        return;
    }
    let mut guest = Place::new().start(&shell("32", "2"));
    let mut serial = guest.serial();
    serial.start_load("");
    let mut done = serial.load_beyond(0);
    for round in 0..rounds() {
        guest.client().act(Request::Pause).unwrap();
        let mode = ["read", "map", "lazy"][round % 3];
        let mut copy = copy_of(&guest, mode);
        drop(guest);
        serial = copy.serial();
        done = serial.load_beyond(done);
        guest = copy;
    }
    assert!(serial.end_load() >= done);
    serial.wait_for("probe> ");
    serial.type_line("report");
    serial.wait_for("everything works");
}

#[test]
fn memory_is_the_same_page_by_page() {
    if !kvm() {
        return;
    }
    // Two memory slots: the guest works above 4 GiB.
    let mut guest = Place::new().start(&shell("3200", "1"));
    let mut serial = guest.serial();
    serial.start_load("4100 8");
    serial.load_beyond(2048);
    guest.client().act(Request::Pause).unwrap();
    guest.ctl(&["snapshot", "--to", "first"]).unwrap();
    guest.ctl(&["snapshot", "--to", "second"]).unwrap();
    let first = pages(&guest.path("first/memory"));
    // The kernel's own pages, and those above 3 GiB, which are behind the first slot's.
    assert!(first.keys().any(|page| *page < 4096) && first.keys().any(|page| *page > 3 << 18));
    assert!(first == pages(&guest.path("second/memory")));
    let mut copy = copy_of(&guest, "read");
    let mut copied = copy.serial();
    copied.load_beyond(2048);
    copied.end_load();
    copied.wait_for("probe> ");
    // The original is where it was, and its RAM untouched by the copy.
    guest.ctl(&["snapshot", "--to", "third"]).unwrap();
    assert!(first == pages(&guest.path("third/memory")));
    guest.client().act(Request::Resume).unwrap();
    serial.end_load();
}

/// A guest that writes its memory and its disk; snapshots that have only what it wrote since the last one.
#[test]
fn children_of_a_snapshot_have_what_was_written_since() {
    if !kvm() {
        return;
    }
    // With the last, RAM is two memory slots, and the guest works in the second one.
    for (packed, mode, memory_mib, region) in [
        ("false", "map", 32, ""),
        ("true", "read", 32, ""),
        ("true", "lazy", 32, ""),
        ("false", "read", 3200, "4100 8"),
    ] {
        let memory = format!("{memory_mib}");
        let mut guest = Place::new().start(&shell(&memory, "2"));
        let mut serial = guest.serial();
        serial.start_load(region);
        let mut done = serial.load_beyond(0);
        let first = [
            "snapshot", "--to", "0", "--packed", packed, "--track", "true",
        ];
        guest.ctl(&first).unwrap();
        for (parent, child) in [("0", "1"), ("1", "2"), ("2", "3")] {
            done = serial.load_beyond(done);
            let child = [
                "snapshot", "--to", child, "--parent", parent, "--track", "true",
            ];
            let taken = guest.ctl(&child).unwrap();
            println!("{taken}");
        }
        done = serial.load_beyond(done);
        guest.client().act(Request::Pause).unwrap();
        guest
            .ctl(&["snapshot", "--to", "4", "--parent", "3"])
            .unwrap();
        guest.ctl(&["snapshot", "--to", "whole"]).unwrap();
        guest
            .ctl(&["snapshot", "--to", "packed", "--packed", "true"])
            .unwrap();
        let whole = pages(&guest.path("whole/memory"));
        let zero = |page: &Vec<u8>| image::is_zero(page);
        let whole: BTreeMap<_, _> = whole.into_iter().filter(|(_, page)| !zero(page)).collect();
        assert!(whole == restored_pages(&guest.path("4"), memory_mib));
        assert!(whole == restored_pages(&guest.path("packed"), memory_mib));

        let place = Place::like(&guest);
        for name in ["0", "1", "2", "3", "4"] {
            guest::link_directory(&guest.path(name), &place.path(name));
        }
        drop(guest);
        let mut copy = place.start(&["run", "--restore", "4", "--memory-mode", mode]);
        serial = copy.serial();
        done = serial.load_beyond(done);
        assert!(serial.end_load() >= done);
        serial.wait_for("probe> ");
        serial.type_line("report");
        serial.wait_for("everything works");
    }
}

#[test]
fn a_child_needs_the_last_snapshot_and_its_log() {
    if !kvm() {
        return;
    }
    let mut guest = Place::new().start(&shell("32", "1"));
    guest.serial().wait_for("probe> ");
    let child = |to, parent| guest.ctl(&["snapshot", "--to", to, "--parent", parent]);
    let tracked = |to| {
        guest
            .ctl(&["snapshot", "--to", to, "--track", "true"])
            .unwrap()
    };
    let not_last = "is not the machine's last snapshot, or was taken without --track true";
    guest.ctl(&["snapshot", "--to", "plain"]).unwrap();
    let refused = child("a", "plain").unwrap_err();
    assert!(refused.contains(not_last), "{refused}");
    assert!(!guest.path("a").exists());
    tracked("first");
    tracked("second");
    let refused = child("a", "first").unwrap_err();
    assert!(refused.contains(not_last), "{refused}");
    let refused = child("a", "nowhere").unwrap_err();
    assert!(
        refused.contains("parent nowhere/state.json: No such file"),
        "{refused}"
    );
    child("a", "second").unwrap();
    // It did not ask for a log that goes on.
    let refused = child("b", "a").unwrap_err();
    assert!(refused.contains(not_last), "{refused}");

    let place = guest.place.clone();
    let restore = |arguments: &[&str]| {
        let output = place
            .command(&[&["run", "--restore"], arguments].concat())
            .output();
        String::from_utf8(output.unwrap().stderr).unwrap()
    };
    std::fs::rename(guest.path("second"), guest.path("elsewhere")).unwrap();
    let said = restore(&["a"]);
    assert!(
        said.contains("a/../second/state.json: No such file"),
        "{said}"
    );
    std::fs::rename(guest.path("first"), guest.path("second")).unwrap();
    let said = restore(&["a"]);
    assert!(
        said.contains("its parent is another snapshot than a/../second"),
        "{said}"
    );
    guest
        .ctl(&["snapshot", "--to", "packed", "--packed", "true"])
        .unwrap();
    guest.ctl(&["shutdown"]).unwrap();
    guest.ended();
    let said = restore(&["packed", "--memory-mode", "map"]);
    assert!(said.contains("cannot be mapped"), "{said}");
}

#[test]
fn two_copies_of_one_snapshot_live_apart() {
    if !kvm() {
        return;
    }
    let mut guest = Place::new().start(&shell("32", "1"));
    let mut serial = guest.serial();
    serial.wait_for("probe> ");
    let taken = guest.ctl(&["snapshot", "--to", "snapshot"]).unwrap();
    assert!(taken["memory_bytes"].as_u64().unwrap() < 8 << 20, "{taken}");
    serial.type_line("echo the original goes on");
    serial.wait_for("goes on\r\n");
    for mode in ["map", "map", "read", "lazy", "lazy"] {
        let place = Place::like(&guest);
        guest::link_directory(&guest.path("snapshot"), &place.path("snapshot"));
        let mut copy = place.start(&["run", "--restore", "snapshot", "--memory-mode", mode]);
        let mut serial = copy.serial();
        serial.type_line("report");
        serial.wait_for("everything works");
        // And a reset boots it from its kernel.
        copy.client().act(Request::Reset).unwrap();
        serial.wait_for("atoll probe: command line");
        serial.wait_for("probe> ");
    }
    let again = guest.ctl(&["snapshot", "--to", "snapshot"]).unwrap_err();
    assert!(again.contains("snapshot snapshot: File exists"), "{again}");
}

/// The bytes that the guest reads as its generation id, in a snapshot of it.
fn generation(guest: &Guest, snapshot: &str) -> [u8; 16] {
    guest.ctl(&["snapshot", "--to", snapshot]).unwrap();
    let memory = File::open(guest.path(snapshot).join("memory")).unwrap();
    let mut value = [0; 16];
    memory.read_exact_at(&mut value, 0xd_f000).unwrap();
    value
}

#[test]
fn a_copy_learns_that_it_is_one() {
    if !kvm() {
        return;
    }
    let mut arguments = shell("32", "1");
    arguments.extend(["--generation-id", "00112233-4455-6677-8899-aabbccddeeff"]);
    let mut guest = Place::new().start(&arguments);
    let mut serial = guest.serial();
    serial.wait_for("probe> ");
    let first = generation(&guest, "snapshot");
    assert_eq!(
        first[..9],
        [0x33, 0x22, 0x11, 0, 0x55, 0x44, 0x77, 0x66, 0x88]
    );
    // A reset machine is the same one, and so is one that was held.
    guest.client().act(Request::Reset).unwrap();
    serial.wait_for("atoll probe: command line");
    serial.wait_for("probe> ");
    assert_eq!(generation(&guest, "later"), first);
    let spec = std::fs::read_to_string(guest.path("snapshot/spec.json")).unwrap();
    let spec = spec.replace("00112233-", "99112233-");
    let mut seen = vec![first];
    for more in [&[][..], &[], &["--spec", "other.json"]] {
        let place = Place::like(&guest);
        guest::link_directory(&guest.path("snapshot"), &place.path("snapshot"));
        std::fs::write(place.path("other.json"), &spec).unwrap();
        let restore = [&["run", "--restore", "snapshot"], more].concat();
        let mut copy = place.start(&restore);
        let mut serial = copy.serial();
        serial.type_line("report");
        serial.wait_for("everything works");
        let value = generation(&copy, "copy");
        assert!(!seen.contains(&value), "{value:x?} of {seen:x?}");
        seen.push(value);
    }
    assert_eq!(
        seen[3][..4],
        [0x33, 0x22, 0x11, 0x99],
        "that of its own spec"
    );
}

/// A guest that was held is told so, and does not take it for a lockup.
#[test]
fn a_guest_that_was_paused_is_told() {
    if !kvm() {
        return;
    }
    let Clocked {
        guest, mut serial, ..
    } = Clocked::start();
    guest.client().act(Request::Pause).unwrap();
    guest.client().act(Request::Resume).unwrap();
    let [.., flags] = serial.clock("");
    assert_eq!(flags & 2, 2);
}

/// A restored guest's clocks go on where they stopped: they count no more than the time that it existed. And it is told
/// that it stood still, once.
#[test]
fn clocks_of_a_restored_guest_go_on_where_they_stopped() {
    if !kvm() {
        return;
    }
    let before = Clocked::start();
    let guest = before.guest;
    guest.client().act(Request::Pause).unwrap();
    guest.ctl(&["snapshot", "--to", "copy"]).unwrap();
    // Its clock stops with the snapshot.
    let absent = Instant::now();
    let place = Place::like(&guest);
    guest::link_directory(&guest.path("copy"), &place.path("snapshot"));
    drop(guest);
    let absent = absent.elapsed();
    let mut copy = place.start(&["run", "--restore", "snapshot"]);
    let mut serial = copy.serial();
    serial.type_line("");
    serial.wait_for("probe> ");
    let [ns, ticks, flags] = serial.clock("");
    assert_eq!(flags & 2, 2, "it is told of its absence");
    let most = before.since.elapsed() - absent;
    let passed = Duration::from_nanos(ns - before.ns);
    println!("absent for {absent:?}, its clock counted {passed:?} of {most:?}");
    assert!(ns > before.ns && ticks > before.ticks);
    assert!(passed < most + Duration::from_millis(1));
}

/// A drive has the disc that was put into it last, or none, after a reset and when its machine is restored.
#[test]
fn a_drive_has_what_was_put_into_it_last() {
    if !kvm() {
        return;
    }
    let place = Place::new();
    let disc = File::create(place.path("disc")).unwrap();
    disc.set_len(64 << 10).unwrap();
    let mut arguments = shell("32", "1");
    arguments.extend(["--disk", "bus=cdrom,id=dvd,cache=none"]);
    let mut guest = place.start(&arguments);
    guest.serial().wait_for("probe> ");
    // What is restored has a disc of that size in its drive, or it would be refused.
    let restored = |guest: Guest, directory: &str, path: PathBuf| {
        assert_eq!(guest.saved_spec(directory).disks[1].path, path);
        let copy = guest.killed().start(&["run", "--restore", directory]);
        // Where the control API will be, the killed process's socket is until then.
        eventually("the control API", || copy.client().info().ok());
        let again = copy.saved_spec(&format!("{directory}-again"));
        assert_eq!(again.disks[1].path, path);
        copy
    };
    let disc = guest.path("disc");
    guest
        .ctl(&["insert-disk", "--id", "dvd", "--path", "disc"])
        .unwrap();
    guest.ctl(&["reset"]).unwrap();
    let guest = restored(guest, "full", disc);
    guest.ctl(&["eject-disk", "--id", "dvd"]).unwrap();
    guest.ctl(&["reset"]).unwrap();
    restored(guest, "empty", PathBuf::new());
}

/// Restored, a guest is held to the rates that were asked for while it ran, not to those that it was started with.
#[test]
fn rates_are_those_that_were_asked_for_last() {
    if !kvm() {
        return;
    }
    let mut guest = Place::new().start(&shell("32", "1"));
    guest.serial().wait_for("probe> ");
    let card = format!("tap=asn{},rate=30000000", std::process::id());
    let has_card = match guest.ctl(&["add-net", "--net", &card]) {
        Ok(_) => true,
        Err(said) if said.contains("/dev/net/tun") || said.contains("permitted") => {
            println!("ATOLL-SKIP: no tap: {said}");
            false
        }
        Err(said) => panic!("{said} {}", guest.said()),
    };
    let limit = |request, id, rate| guest.ctl(&[request, "--id", id, rate, "20000000"]).unwrap();
    limit("set-disk-limits", "disk0", "--write-bytes-per-second");
    if has_card {
        limit("set-net-limits", "net0", "--send-bytes-per-second");
    }
    let check = |guest: &Guest, directory: &str| {
        let spec = guest.saved_spec(directory);
        let disk = DiskLimits {
            write_bytes_per_second: Some(20_000_000),
            ..DiskLimits::default()
        };
        let card = NetLimits {
            send_bytes_per_second: 20_000_000,
            ..NetLimits::default()
        };
        assert_eq!(spec.disks[0].limits, disk);
        let cards: Vec<_> = spec.nets.iter().map(|net| net.limits).collect();
        assert_eq!(cards, if has_card { vec![card] } else { vec![] });
    };
    check(&guest, "first");
    let place = guest.killed();
    let copy = place.start(&["run", "--restore", "first"]);
    // Where the control API will be, the killed process's socket is until then.
    eventually("the control API", || copy.client().info().ok());
    check(&copy, "second");
    if has_card {
        // It takes a rate again when it has none, also where the kernel could move its packets then.
        copy.ctl(&["set-net-limits", "--id", "net0"]).unwrap();
        let card = copy.saved_spec("third").nets.remove(0);
        assert_eq!(card.limits, NetLimits::default());
        assert_eq!(card.vhost, VhostNet::Off);
        let copy = copy.killed().start(&["run", "--restore", "third"]);
        eventually("the control API", || copy.client().info().ok());
        let limit = ["set-net-limits", "--id", "net0"];
        let rate = ["--send-bytes-per-second", "20000000"];
        copy.ctl(&[&limit[..], &rate].concat()).unwrap();
    }
}

#[test]
fn what_does_not_fit_is_refused_with_the_reason() {
    if !kvm() {
        return;
    }
    let mut guest = Place::new().start(&shell("32", "1"));
    guest.serial().wait_for("probe> ");
    guest.ctl(&["snapshot", "--to", "snapshot"]).unwrap();
    drop(guest.process.kill());
    guest.process.wait().unwrap();
    let state: serde_json::Value =
        serde_json::from_slice(&std::fs::read(guest.path("snapshot/state.json")).unwrap()).unwrap();
    let spec: serde_json::Value =
        serde_json::from_slice(&std::fs::read(guest.path("snapshot/spec.json")).unwrap()).unwrap();
    type Change = fn(&mut serde_json::Value, &mut serde_json::Value);
    let changes: &[(Change, &str)] = &[
        (
            |state, _| state["version"] = 9.into(),
            "machine state: version 9, written by atoll-vmm",
        ),
        (
            |state, _| state["machine_version"] = 9.into(),
            "the state is of machine version 9, this atoll-vmm builds version",
        ),
        (
            |_, spec| spec["cpu_count"] = 2.into(),
            "the state has 1 vCPUs, the spec 2",
        ),
        (
            |_, spec| spec["memory_mib"] = 64.into(),
            "the state has 32 MiB of memory, the spec 64",
        ),
        (
            |_, spec| spec["disks"] = serde_json::json!([]),
            "the state has the devices",
        ),
        (
            |state, _| {
                let leaves = state["vcpus"][0]["cpuid"].as_array_mut().unwrap();
                let leaf = leaves.iter_mut().find(|leaf| leaf[0] == 7 && leaf[1] == 0);
                leaf.unwrap()[4] = u32::MAX.into();
            },
            "this host's CPU is not the guest's: it lacks ",
        ),
        (
            |state, _| state["devices"][1]["device"]["version"] = 9.into(),
            "virtio-pci: state version 9, this program knows versions up to",
        ),
        (
            |state, _| state["vcpus"][0]["regs"] = "00".into(),
            "machine state: damaged",
        ),
    ];
    for (change, expected) in changes {
        let (mut state, mut spec) = (state.clone(), spec.clone());
        change(&mut state, &mut spec);
        std::fs::write(guest.path("snapshot/state.json"), state.to_string()).unwrap();
        std::fs::write(guest.path("other.json"), spec.to_string()).unwrap();
        let restore = ["run", "--restore", "snapshot", "--spec", "other.json"];
        let output = guest.place.command(&restore).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(said.contains(expected), "{said}");
        assert_eq!(output.status.code(), Some(1), "{said}");
    }
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Machines that share the pages of one kernel's file (`--share-kernel`), on the host's own KVM: what their memory is,
//! read from outside the process, and what a snapshot, a move, a reset and a writer of the file make of it. The kernel is
//! the probe guest with a part behind it that nobody but the loader ever touches.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "helpers of tests fail by panicking, and say what they skip"
)]

mod guest;

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Stdio;

use atoll_vmm::board::MICRO;
use atoll_vmm::memory::{Backing, allocate};
use atoll_vmm::probe::PROBE_ELF;
use atoll_vmm::saved::packed::Packed;
use atoll_vmm::saved::{self, image};
use atoll_vmm_protocol::api::Request;
use guest::{Guest, Place, eventually, kvm, moved, shell};
use vm_memory::{Bytes, GuestAddress};

const MEMORY_MIB: u64 = 32;
/// Where the part is loaded, its whole pages, and bytes behind them that are no page.
const PART: u64 = 24 << 20;
const PAGES: u64 = 64;
const TAIL: u64 = 100;

/// What is in the part: no page like another, but one of zeroes.
fn part() -> Vec<u8> {
    let byte = |at: u64| match at / 4096 {
        5 => 0,
        page => (at % 251 + page).to_le_bytes()[0],
    };
    (0..PAGES * 4096 + TAIL).map(byte).collect()
}

/// The probe with the part: a table of program headers at the end, with one more than it had.
fn kernel() -> Vec<u8> {
    let number = |at: usize, size: usize| {
        let mut bytes = [0; 8];
        bytes[..size].copy_from_slice(&PROBE_ELF[at..at + size]);
        u64::from_le_bytes(bytes)
    };
    let (table, count) = (number(32, 8), number(56, 2));
    let [from, to] = [table, table + count * 56].map(|at| usize::try_from(at).unwrap());
    let mut file = PROBE_ELF.to_vec();
    file.resize(file.len().next_multiple_of(4096), 0);
    let (offset, part) = (file.len() as u64, part());
    file.extend(&part);
    let table = file.len() as u64;
    file.extend(&PROBE_ELF[from..to]);
    file.extend([1_u32, 4].into_iter().flat_map(u32::to_le_bytes));
    let size = part.len() as u64;
    for word in [offset, PART, PART, size, size, 4096] {
        file.extend(word.to_le_bytes());
    }
    file[32..40].copy_from_slice(&table.to_le_bytes());
    file[56..58].copy_from_slice(&(count + 1).to_le_bytes()[..2]);
    file
}

/// Starts one that shares; `like` is the place whose kernel is the same file.
fn start(like: Option<&Guest>) -> Guest {
    let place = Place::new();
    match like {
        None => std::fs::write(place.path("kernel"), kernel()).unwrap(),
        Some(other) => {
            std::fs::remove_file(place.path("kernel")).unwrap();
            std::fs::hard_link(other.path("kernel"), place.path("kernel")).unwrap();
        }
    }
    let memory = MEMORY_MIB.to_string();
    let mut arguments = shell(&memory, "1");
    arguments.push("--share-kernel");
    let mut guest = place.start(&arguments);
    guest.serial().wait_for("probe> ");
    guest
}

/// Where the part is in the machine's process, if it is the file.
fn mapped_at(guest: &Guest) -> Option<u64> {
    let inode = std::fs::metadata(guest.path("kernel"))
        .unwrap()
        .ino()
        .to_string();
    let maps = std::fs::read_to_string(format!("/proc/{}/maps", guest.process.id())).unwrap();
    let mapping = maps.lines().rfind(|line| {
        let is_it = line.split_whitespace().nth(4) == Some(inode.as_str());
        is_it && line.split_whitespace().nth(1) == Some("rw-p")
    })?;
    let (start, _) = mapping.split_once('-')?;
    u64::from_str_radix(start, 16).ok()
}

/// The process's memory, and where guest RAM begins in it.
fn process(guest: &Guest, at: u64) -> (File, u64) {
    let path = format!("/proc/{}/mem", guest.process.id());
    let memory = File::options().read(true).write(true).open(path).unwrap();
    (memory, at - PART)
}

type Pages = BTreeMap<u64, Vec<u8>>;

/// Pages that are not zero.
fn pages(mut read: impl FnMut(&mut [u8], u64)) -> Pages {
    let mut pages = Pages::new();
    for page in 0..MEMORY_MIB << 8 {
        let mut bytes = vec![0; 4096];
        read(&mut bytes, page * 4096);
        if !image::is_zero(&bytes) {
            pages.insert(page, bytes);
        }
    }
    pages
}

fn ram_of(guest: &Guest, at: u64) -> Pages {
    let (memory, base) = process(guest, at);
    pages(|bytes, offset| memory.read_exact_at(bytes, base + offset).unwrap())
}

fn restored(snapshot: &Path) -> Pages {
    let (_, layers) = saved::open(snapshot).unwrap();
    let ram = allocate(&MICRO, MEMORY_MIB, 40, Backing::Anonymous).unwrap();
    for layer in layers {
        let read = match layer.packed {
            true => Packed::open(layer.file, MEMORY_MIB << 20).and_then(|file| file.read(&ram)),
            false => image::read(&ram, &layer.file),
        };
        read.unwrap();
    }
    pages(|bytes, at| ram.read_slice(bytes, GuestAddress(at)).unwrap())
}

#[track_caller]
fn has_part(pages: &Pages) {
    for (page, expected) in (PART / 4096..).zip(part().chunks(4096)) {
        match pages.get(&page) {
            Some(found) => assert!(found[..expected.len()] == *expected, "{page}"),
            None => assert!(image::is_zero(expected), "{page} is not there"),
        }
    }
}

/// Whether this machine can share at all.
fn shares() -> bool {
    let arguments = [
        "run",
        "--kernel",
        "kernel",
        "--cmdline",
        "exit",
        "--memory",
        "32",
    ];
    let place = Place::new();
    let mut command = place.command(&arguments);
    let output = command
        .args(["--console", "null", "--share-kernel"])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    let unable = said.contains("does not tell before it is written to");
    if unable {
        println!("ATOLL-SKIP: {said}");
    }
    !unable
}

#[test]
fn a_shared_kernel_is_in_every_copy_of_the_memory() {
    if !kvm() || !shares() {
        return;
    }
    let mut guest = start(None);
    guest.client().act(Request::Pause).unwrap();
    let at = mapped_at(&guest).unwrap();
    // Before anybody else has touched the pages: those of the part are in no page table.
    guest.ctl(&["snapshot", "--to", "whole"]).unwrap();
    let whole = restored(&guest.path("whole"));
    has_part(&whole);
    assert!(whole == ram_of(&guest, at));
    let packed = [
        "snapshot", "--to", "packed", "--packed", "true", "--track", "true",
    ];
    guest.ctl(&packed).unwrap();
    assert!(whole == restored(&guest.path("packed")));

    // A reset puts back what was changed, and says so to who logs what is written.
    let (memory, base) = process(&guest, at);
    memory
        .write_all_at(&[0xaa; 9000], base + PART + 8000)
        .unwrap();
    let child = [
        "snapshot", "--to", "changed", "--parent", "packed", "--track", "true",
    ];
    guest.ctl(&child).unwrap();
    guest
        .ctl(&["snapshot", "--to", "changed-whole", "--track", "true"])
        .unwrap();
    assert!(restored(&guest.path("changed-whole"))[&(PART / 4096 + 3)][0] == 0xaa);
    guest.client().act(Request::Reset).unwrap();
    guest
        .ctl(&["snapshot", "--to", "reset", "--parent", "changed-whole"])
        .unwrap();
    let reset = restored(&guest.path("reset"));
    has_part(&reset);
    assert!(reset == ram_of(&guest, mapped_at(&guest).unwrap()));
    guest.client().act(Request::Resume).unwrap();
    let mut serial = guest.serial();
    serial.type_line("report");
    serial.wait_for("everything works");
}

#[test]
fn a_guest_with_a_shared_kernel_moves_and_shares_again_when_it_resets() {
    if !kvm() || !shares() {
        return;
    }
    let mut source = start(None);
    let place = Place::new();
    std::fs::remove_file(place.path("disk")).unwrap();
    std::fs::hard_link(source.path("disk"), place.path("disk")).unwrap();
    std::fs::copy(source.path("kernel"), place.path("kernel")).unwrap();
    let mut target = place.start(&["receive", "--socket", "in"]);
    eventually("the target's socket", || {
        target.path("in").exists().then_some(())
    });
    let mut migrate = source
        .place
        .command(&["ctl", "--api-socket", "api", "migrate", "--to"]);
    migrate
        .arg(target.path("in"))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    moved(migrate.spawn().unwrap(), &mut source, &target);
    assert_eq!(mapped_at(&target), None);
    target.client().act(Request::Pause).unwrap();
    target.ctl(&["snapshot", "--to", "moved"]).unwrap();
    has_part(&restored(&target.path("moved")));
    target.client().act(Request::Reset).unwrap();
    let at = mapped_at(&target).unwrap();
    has_part(&ram_of(&target, at));
    target.client().act(Request::Resume).unwrap();
    let mut serial = target.serial();
    serial.wait_for("probe> ");
    serial.type_line("report");
    serial.wait_for("everything works");
}

#[test]
fn who_writes_to_a_shared_kernel_waits_until_every_guest_has_its_own() {
    if !kvm() || !shares() {
        return;
    }
    let first = start(None);
    let second = start(Some(&first));
    let path = first.path("kernel");
    // Another file in its place is another file: a reset still finds the old one.
    let guests = [&first, &second];
    let before = guests.map(|guest| {
        guest.client().act(Request::Pause).unwrap();
        let at = mapped_at(guest).unwrap();
        (at, ram_of(guest, at))
    });
    let smaps = std::fs::read_to_string(format!("/proc/{}/smaps", first.process.id())).unwrap();
    let shared = smaps
        .lines()
        .skip_while(|line| !line.starts_with(&format!("{:x}-", before[0].0)));
    let clean = shared
        .skip(1)
        .find(|line| line.starts_with("Shared_Clean:"))
        .unwrap();
    assert!(!clean.ends_with(" 0 kB"), "{clean}");
    let write = move || {
        let mut file = File::options().write(true).open(&path).unwrap();
        std::io::Write::write_all(&mut file, &[0xaa; 300_000]).unwrap();
        file.set_len(0).unwrap();
        file
    };
    let writer = std::thread::Builder::new().name("writer".into());
    let file = writer.spawn(write).unwrap().join().unwrap();
    for (guest, (at, ram)) in guests.into_iter().zip(&before) {
        assert_eq!(mapped_at(guest), None);
        assert!(ram_of(guest, *at) == *ram);
        guest.ctl(&["snapshot", "--to", "parted"]).unwrap();
        assert!(restored(&guest.path("parted")) == *ram);
        assert!(
            guest.said().contains("it is shared no more"),
            "{}",
            guest.said()
        );
        guest.client().act(Request::Resume).unwrap();
    }
    for mut guest in [first, second] {
        let mut serial = guest.serial();
        serial.type_line("report");
        serial.wait_for("everything works");
    }
    drop(file);
}

#[test]
fn a_kernel_that_was_replaced_is_the_guests_until_it_ends() {
    if !kvm() || !shares() {
        return;
    }
    let mut guest = start(None);
    std::fs::write(guest.path("next"), [0xaa; 500_000]).unwrap();
    let old = mapped_at(&guest).unwrap();
    std::fs::rename(guest.path("next"), guest.path("kernel")).unwrap();
    guest.client().act(Request::Reset).unwrap();
    guest.serial().wait_for("probe> ");
    has_part(&ram_of(&guest, old));
    assert!(!guest.said().contains("shared no more"), "{}", guest.said());
}

#[test]
fn what_cannot_be_shared_is_refused_with_the_reason() {
    if !kvm() || !shares() {
        return;
    }
    let place = Place::new();
    let refused = |arguments: &[&str]| {
        let output = place.command(arguments).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        (output.status.code(), said)
    };
    let mut shared = shell("32,shared", "1");
    shared.push("--share-kernel");
    let (code, said) = refused(&shared);
    assert!(
        code == Some(2) && said.contains("leave out --share-kernel"),
        "{said}"
    );
    let mut own = shell("32", "1");
    own.push("--share-kernel");
    let writer = File::options()
        .write(true)
        .open(place.path("kernel"))
        .unwrap();
    let (code, said) = refused(&own);
    assert!(
        code == Some(1) && said.contains("open for writing"),
        "{said}"
    );
    drop(writer);
    let mut bzimage = vec![0; 0x400];
    bzimage[0x202..0x206].copy_from_slice(b"HdrS");
    std::fs::write(place.path("kernel"), bzimage).unwrap();
    let (code, said) = refused(&own);
    assert!(code == Some(1) && said.contains("uncompressed"), "{said}");
}

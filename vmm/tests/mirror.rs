// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A disk that is moved to another image while its guest writes, under the sandbox and its filters: what the guest has
//! written is there, whatever becomes of the target, of the process, or of whoever asked for it.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "helpers of tests fail by panicking, and say what they skip"
)]

mod guest;

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command};

use guest::{Guest, Place, Serial, eventually, kvm, shell_with_disk};
use serde_json::Value;

const DISK_BYTES: u64 = 64 << 20;

/// A guest that writes through its disk, from the start, whose content was something before; `disk` are its keys.
fn writing(place: Place, disk: &str) -> (Guest, Serial) {
    let mut guest = place.start(&shell_with_disk("32M", "1", disk));
    let mut serial = guest.serial();
    serial.start_load("");
    write_on(&mut serial);
    (guest, serial)
}

fn place() -> Place {
    let place = Place::new();
    let content: Vec<u8> = (0..=250)
        .flat_map(|byte| [byte; 512])
        .cycle()
        .take(usize::try_from(DISK_BYTES).unwrap())
        .collect();
    std::fs::write(place.path("disk"), content).unwrap();
    place
}

/// Lets the guest write for a while.
fn write_on(serial: &mut Serial) {
    let rounds = serial.load_beyond(0);
    serial.load_beyond(rounds + 1);
}

fn target(guest: &Guest, name: &str, size_bytes: u64) {
    let file = File::create(guest.path(name)).unwrap();
    file.set_len(size_bytes).unwrap();
}

fn begin(guest: &Guest, to: &str) -> Result<Value, String> {
    guest.ctl(&["begin-mirror", "--id", "disk0", "--to", to])
}

fn mirror_of(guest: &Guest) -> Value {
    let mut told = guest.ctl(&["mirrors"]).unwrap();
    told["mirrors"][0].take()
}

/// Until the mirror's stage is this one.
#[track_caller]
fn reach(guest: &Guest, stage: &str) -> Value {
    eventually(stage, || {
        let told = mirror_of(guest);
        (told["stage"] == stage).then_some(told)
    })
}

fn content(guest: &Guest, name: &str) -> Vec<u8> {
    std::fs::read(guest.path(name)).unwrap()
}

fn complete(guest: &Guest) -> Result<Value, String> {
    // A busy machine may take long, and the guest's content is what is tested here.
    guest.ctl(&[
        "complete-mirror",
        "--id",
        "disk0",
        "--downtime-limit-ms",
        "60000",
    ])
}

/// Moves the disk to `to` while the guest writes; afterwards only the new image changes.
fn move_on(guest: &Guest, serial: &mut Serial, from: &str, to: &str) {
    begin(guest, to).unwrap();
    write_on(serial);
    reach(guest, "ready");
    let told = complete(guest).unwrap();
    assert_eq!(told["stage"], "switched", "{told}");
    assert!(told["held_us"].as_u64().unwrap() > 0);
    let former = content(guest, from);
    write_on(serial);
    assert!(content(guest, from) == former, "the former image is left");
}

#[test]
fn a_disk_moves_while_its_guest_writes() {
    if !kvm() {
        return;
    }
    let place = place();
    let (mut guest, mut serial) = writing(place, "path=disk,format=raw,changes=changes");
    guest
        .place
        .qemu_img(&["create", "-q", "-f", "qcow2", "disk.qcow2", "64M"]);
    move_on(
        &guest,
        &mut serial,
        "disk",
        "path=disk.qcow2,format=qcow2,cache=none",
    );
    // A larger one: the guest is told.
    target(&guest, "disk.raw", DISK_BYTES + (1 << 20));
    move_on(
        &guest,
        &mut serial,
        "disk.qcow2",
        "path=disk.raw,format=raw",
    );
    guest.place.qemu_img(&["check", "-q", "disk.qcow2"]);
    serial.end_load();

    // The same by a paused machine, whose two images are compared, there and back again.
    guest.ctl(&["pause"]).unwrap();
    target(&guest, "last", DISK_BYTES + (1 << 20));
    let limit = |rate| {
        guest
            .ctl(&["set-disk-limits", "--id", "disk0", rate, "90000"])
            .unwrap()
    };
    begin(&guest, "path=last,format=raw").unwrap();
    complete(&guest).unwrap();
    assert!(content(&guest, "last") == content(&guest, "disk.raw"));
    limit("--read-operations-per-second");
    guest.ctl(&["cancel-mirror", "--id", "disk0"]).unwrap();
    let disk = &guest.saved_spec("stayed").disks[0];
    assert!(disk.path.ends_with("disk.raw"), "{disk:?}");
    assert_eq!(disk.limits.read_operations_per_second, Some(90_000));
    assert_eq!(
        guest.ctl(&["mirrors"]).unwrap()["mirrors"],
        Value::Array(Vec::new())
    );
    let text = begin(&guest, "path=disk.raw,format=raw").unwrap_err();
    assert!(text.contains("is in use"), "{text}");
    begin(&guest, "path=last,format=raw").unwrap();
    limit("--write-operations-per-second");
    complete(&guest).unwrap();
    // The spec of a snapshot has the new place, and rates that were changed meanwhile; the record of changes goes with the
    // disk.
    let disk = &guest.saved_spec("moved").disks[0];
    assert!(disk.path.ends_with("last"), "{disk:?}");
    assert_eq!(disk.limits.write_operations_per_second, Some(90_000));
    let text = guest.ctl(&["cancel-mirror", "--id", "disk0"]).unwrap_err();
    assert!(text.contains("has been moved"), "{text}");
    guest.ctl(&["shutdown"]).unwrap();
    let (status, said) = guest.ended();
    assert!(status.success(), "{said}");
}

/// Ended when dropped.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Waits until somebody listens there.
fn listening(guest: &Guest, socket: &str) {
    let path = guest.path(socket);
    eventually(socket, || UnixStream::connect(&path).ok());
}

#[test]
fn a_disk_moves_to_a_server_of_disks_and_back() {
    if !kvm() {
        return;
    }
    let (mut guest, mut serial) = writing(place(), "path=disk,format=raw");
    guest
        .place
        .qemu_img(&["create", "-q", "-f", "qcow2", "remote", "64M"]);
    let mut server = Command::new("qemu-nbd");
    server
        .current_dir(guest.path(""))
        .args(["-f", "qcow2", "--persistent"]);
    server
        .args(["--shared=8", "remote", "-k"])
        .arg(guest.path("nbd"));
    let server = Server(server.spawn().unwrap());
    listening(&guest, "nbd");
    let text = begin(&guest, "path=nbd,format=nbd,cache=none").unwrap_err();
    assert!(text.contains("its server's"), "{text}");
    move_on(&guest, &mut serial, "disk", "path=nbd,format=nbd");
    target(&guest, "back", DISK_BYTES);
    begin(&guest, "path=back,format=raw").unwrap();
    write_on(&mut serial);
    reach(&guest, "ready");
    guest.ctl(&["pause"]).unwrap();
    complete(&guest).unwrap();
    drop(server);
    // As bytes: the machine has the one, and shares its lock with nobody.
    guest
        .place
        .qemu_img(&["convert", "-f", "qcow2", "-O", "raw", "remote", "copy"]);
    assert!(content(&guest, "copy") == content(&guest, "back"));
    guest.ctl(&["resume"]).unwrap();
    write_on(&mut serial);
    serial.end_load();
    guest.ctl(&["shutdown"]).unwrap();
    let (status, said) = guest.ended();
    assert!(status.success(), "{said}");
}

/// Serves `image` on the socket `nbd`, and waits until it can be connected to.
fn serve(place: &Place, image: &str, more: &[&str]) -> Server {
    let mut server = place.command(&["serve-disk", "--socket", "nbd", "--disk", image]);
    let server = Server(server.args(more).spawn().unwrap());
    let path = place.path("nbd");
    eventually("nbd", || UnixStream::connect(&path).ok());
    server
}

/// Ends a server as a service manager does.
fn end(mut server: Server) {
    let pid = nix::unistd::Pid::from_raw(i32::try_from(server.0.id()).unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    let status = server.0.wait().unwrap();
    assert!(status.success(), "{status}");
}

#[test]
fn a_machine_has_a_disk_that_our_own_server_has() {
    if !kvm() {
        return;
    }
    for format in ["raw", "qcow2"] {
        let place = place();
        let image = format!("path=image,format={format}");
        let (disk, path) = (place.path("disk"), place.path("image"));
        let mut convert = Command::new("qemu-img");
        convert.args(["convert", "-f", "raw", "-O", format]);
        assert!(convert.arg(disk).arg(path).status().unwrap().success());
        let server = serve(&place, &image, &[]);
        let before = std::fs::read(place.path("image")).unwrap();
        let (mut guest, mut serial) = writing(place, "path=nbd,format=nbd");
        serial.end_load();
        assert!(content(&guest, "image") != before);
        guest.ctl(&["shutdown"]).unwrap();
        let (status, said) = guest.ended();
        assert!(status.success(), "{said}");
        // It is locked meanwhile, and closed by the end.
        let mut locked = Command::new("qemu-img");
        let locked = locked.args(["compare", "-f", format, "-F", format]);
        let locked = locked.args([guest.path("image"), guest.path("image")]);
        let said = String::from_utf8(locked.output().unwrap().stderr).unwrap();
        assert!(said.contains("lock"), "{said}");
        end(server);
        if format == "qcow2" {
            guest
                .place
                .qemu_img(&["check", "-q", "-f", "qcow2", "image"]);
        }
        // What its socket left behind is in nobody's way, and goes where it can.
        let unconfined = ["--sandbox", "off", "--seccomp", "off"];
        end(serve(&guest.place, &image, &unconfined));
        assert!(!guest.path("nbd").exists());
    }
}

#[test]
fn a_server_of_disks_has_its_disk_and_nothing_else() {
    let place = place();
    let server = serve(&place, "path=disk,format=raw", &[]);
    // Two clients, each with threads of its own.
    let clients = [(); 2].map(|()| UnixStream::connect(place.path("nbd")).unwrap());
    let proc = format!("/proc/{}", server.0.id());
    // One that has gone meanwhile had something to do at the start: they are listed again.
    let filtered = |thread: &std::path::PathBuf| {
        let status = std::fs::read_to_string(thread.join("status"));
        status.is_ok_and(|status| {
            status.contains("Seccomp:\t2\n") && status.contains("NoNewPrivs:\t1\n")
        })
    };
    eventually("a thread a client, each with its filter", || {
        let tasks = std::fs::read_dir(format!("{proc}/task")).unwrap();
        let threads: Vec<_> = tasks.map(|task| task.unwrap().path()).collect();
        (threads.len() >= 5 && threads.iter().all(filtered)).then_some(())
    });
    if rustix::process::geteuid().is_root() {
        assert_eq!(
            std::fs::read_dir(format!("{proc}/root")).unwrap().count(),
            0
        );
        let status = std::fs::read_to_string(format!("{proc}/status")).unwrap();
        assert!(!status.contains("Uid:\t0\t"), "{status}");
        assert!(status.contains("CapEff:\t0000000000000000\n"), "{status}");
        let network = |of: &str| std::fs::read_link(format!("/proc/{of}/ns/net")).unwrap();
        assert_ne!(network(&server.0.id().to_string()), network("self"));
    }
    drop(clients);
    end(server);
}

#[test]
fn what_cannot_be_mirrored_or_switched_is_refused() {
    if !kvm() {
        return;
    }
    let (guest, mut serial) = writing(place(), "path=disk,format=raw");
    target(&guest, "small", DISK_BYTES - 512);
    target(&guest, "to", DISK_BYTES);
    for (to, expected) in [
        ("path=small,format=raw", "has 67108352 bytes"),
        ("path=disk,format=raw", "is in use"),
        ("path=to,format=raw,serial=x", "the disk's own"),
        ("path=to,format=qcow2", "qcow2"),
        ("path=missing,format=raw", "missing"),
    ] {
        let text = begin(&guest, to).unwrap_err();
        assert!(text.contains(expected), "{to}: {text}");
    }
    let refused = |arguments: &[&str], expected: &str| {
        let text = guest.ctl(arguments).unwrap_err();
        assert!(text.contains(expected), "{arguments:?}: {text}");
    };
    refused(&["complete-mirror", "--id", "disk0"], "has no mirror");
    refused(&["cancel-mirror", "--id", "disk0"], "has no mirror");
    let slow = [
        "begin-mirror",
        "--id",
        "disk0",
        "--to",
        "path=to,format=raw",
    ];
    let slow = [&slow[..], &["--bytes-per-second", "1000000"]].concat();
    let told = guest.ctl(&slow).unwrap();
    assert_eq!(told["stage"], "copying");
    refused(&slow, "is being mirrored already");
    refused(
        &["complete-mirror", "--id", "disk0"],
        "bytes are left to copy",
    );
    refused(&["remove-device", "--id", "disk0"], "is being mirrored");
    let resize = ["resize-disk", "--id", "disk0", "--size-bytes", "80000000"];
    refused(&resize, "is being mirrored");
    // Given up: the target is free, and the disk where it was.
    guest.ctl(&["cancel-mirror", "--id", "disk0"]).unwrap();
    guest
        .place
        .qemu_img(&["compare", "-q", "-f", "raw", "-F", "raw", "to", "to"]);
    let before = content(&guest, "to");
    write_on(&mut serial);
    assert!(content(&guest, "to") == before);
    serial.end_load();
}

#[test]
fn a_mirror_that_fails_leaves_the_guest_alone() {
    if !kvm() {
        return;
    }
    let (guest, mut serial) = writing(place(), "path=disk,format=raw");
    // A file system of its own that is too small for what the sparse file promises.
    let small = guest.path("small");
    std::fs::create_dir(&small).unwrap();
    let mut mount = Command::new("mount");
    mount
        .args(["-t", "tmpfs", "-o", "size=8M", "tmpfs"])
        .arg(&small);
    if !mount.status().is_ok_and(|status| status.success()) {
        println!("ATOLL-SKIP: cannot mount a tmpfs here");
        return;
    }
    target(&guest, "small/to", DISK_BYTES);
    begin(&guest, "path=small/to,format=raw").unwrap();
    let told = reach(&guest, "failed");
    let error = told["error"].as_str().unwrap();
    assert!(error.starts_with("write to the target: "), "{error}");
    let text = complete(&guest).unwrap_err();
    assert!(text.contains("the mirror has failed"), "{text}");
    write_on(&mut serial);
    // Another one takes its place.
    target(&guest, "to", DISK_BYTES);
    begin(&guest, "path=to,format=raw").unwrap();
    let unmounted = Command::new("umount").arg(&small).status().unwrap();
    assert!(unmounted.success(), "the former target is closed");
    reach(&guest, "ready");
    complete(&guest).unwrap();
    write_on(&mut serial);
    serial.end_load();
}

#[test]
fn a_kill_during_a_mirror_leaves_the_disk_complete() {
    if !kvm() {
        return;
    }
    let (guest, mut serial) = writing(place(), "path=disk,format=raw");
    target(&guest, "to", DISK_BYTES);
    begin(&guest, "path=to,format=raw").unwrap();
    write_on(&mut serial);
    let place = guest.killed();
    // The same disk again, whose every sector the guest checks that it writes.
    let (guest, mut serial) = writing(place, "path=disk,format=raw");
    begin(&guest, "path=to,format=raw").unwrap();
    reach(&guest, "ready");
    complete(&guest).unwrap();
    write_on(&mut serial);
    // And after the switch the target is the disk.
    let place = guest.killed();
    let (_guest, mut serial) = writing(place, "path=to,format=raw");
    write_on(&mut serial);
    serial.end_load();
}

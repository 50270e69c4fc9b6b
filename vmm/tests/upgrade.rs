// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Machines that go on in a new process of the same host, with their memory and all that is open (`ctl upgrade`), while
//! the probe guest works; and what is left when a process is killed in the middle of it, or the new program is none.
//! Seeds are printed; another one comes from ATOLL_SEED, more of them from ATOLL_MIGRATION_SEEDS (`make soak`).

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "helpers of tests fail by panicking, and say what they skip"
)]

mod guest;

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

use atoll_vmm_protocol::api::{MigrationInfo, MigrationStage};
use guest::huge_pages::HugePages;
use guest::{
    BINARY, Guest, Place, Random, Serial, eventually, firmware, kvm, number, runs, shell,
    shell_with_disk, works,
};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::unistd::Pid;

/// A machine whose process was started by a test, and which ends with the test whatever process has it then.
struct Upgraded(Guest);

impl Drop for Upgraded {
    fn drop(&mut self) {
        let Ok(info) = self.0.client().info() else {
            return;
        };
        // Refused when there is none any more.
        let _ = self.0.ctl(&["shutdown"]);
        let program = format!("/proc/{}/exe", info.pid);
        for _ in 0..1000 {
            if std::fs::read_link(&program).is_err() {
                return;
            }
            sleep(Duration::from_millis(10));
        }
    }
}

fn pid(guest: &Guest) -> u32 {
    guest.client().info().unwrap().pid
}

/// `ctl upgrade`, which has to succeed; the old process ends.
#[track_caller]
fn upgrade(guest: &Guest) -> MigrationInfo {
    let before = pid(guest);
    let told = guest.ctl(&["upgrade", "--to", BINARY, "--pid-file", "pid"]);
    let told = told.unwrap_or_else(|said| panic!("{said} {}", guest.said()));
    let info: MigrationInfo = serde_json::from_value(told).unwrap();
    assert_eq!(info.stage, MigrationStage::Completed);
    println!("stood still for {} us", info.downtime_us);
    let after = pid(guest);
    assert_ne!(before, after);
    let written = std::fs::read_to_string(guest.path("pid")).unwrap();
    assert_eq!(written, format!("{after}\n"));
    info
}

/// A machine with that memory whose guest is at work, its console, and how far it is.
fn at_work(memory: &str) -> (Upgraded, Serial, u64) {
    let mut guest = Upgraded(Place::new().start(&shell(memory, "2")));
    let mut serial = guest.0.serial();
    serial.start_load("");
    let done = serial.load_beyond(0);
    (guest, serial, done)
}

#[test]
fn a_guest_at_work_goes_on_in_a_new_process_and_in_the_next() {
    if !kvm() {
        return;
    }
    let (mut guest, mut serial, mut done) = at_work("64M,shared");
    for _ in 0..2 {
        upgrade(&guest.0);
        serial = guest.0.serial();
        done = serial.load_beyond(done);
    }
    assert_eq!(guest.0.ended().0.code(), Some(0), "the first process ended");
    assert!(serial.end_load() >= done);
    serial.wait_for("probe> ");
    serial.type_line("report");
    serial.wait_for("everything works");
    // Its disk is locked still, and its kernel is there for a reset.
    guest.0.ctl(&["reset"]).unwrap();
    let mut serial = guest.0.serial();
    serial.wait_for("everything works");
    let mut second = guest.0.place.command(&["run", "--kernel", "kernel"]);
    let second = second
        .args(["--disk", "path=disk,format=raw"])
        .output()
        .unwrap();
    let said = String::from_utf8(second.stderr).unwrap();
    assert!(said.contains("in use"), "{said}");
}

/// Huge pages are taken when a machine starts; the same ones go on.
#[test]
fn a_guest_in_huge_pages_stays_in_them() {
    if !kvm() {
        return;
    }
    let Some(_pages) = HugePages::lend(32) else {
        return;
    };
    let (mut guest, mut serial, mut done) = at_work("32M,hugepages=2M");
    for _ in 0..2 {
        upgrade(&guest.0);
        serial = guest.0.serial();
        done = serial.load_beyond(done);
        let maps = std::fs::read_to_string(format!("/proc/{}/smaps", pid(&guest.0))).unwrap();
        let memory = maps.split_once("/memfd:guest-memory").unwrap().1;
        let page = memory
            .lines()
            .find(|line| line.starts_with("KernelPageSize"));
        assert!(page.unwrap().ends_with(" 2048 kB"), "{memory}");
    }
    serial.end_load();
    serial.wait_for("probe> ");
    serial.type_line("report");
    serial.wait_for("everything works");
}

/// The new process has looked at firmware's variables when the old one still writes them: it has to look again.
#[test]
fn firmware_goes_on_with_what_it_has_written() {
    if !kvm() {
        return;
    }
    let place = Place::new();
    firmware::put(&place);
    let mut guest = Upgraded(place.start(&firmware::run("32M,shared")));
    let mut serial = guest.0.serial();
    for _ in 0..2 {
        serial.wait_for(firmware::ROUNDS);
        upgrade(&guest.0);
        serial = guest.0.serial();
    }
    serial.wait_for(firmware::ROUNDS);
    // They are locked still, and the code is there for a reset.
    guest.0.ctl(&["reset"]).unwrap();
    serial.wait_for(firmware::ROUNDS);
    let second = guest
        .0
        .place
        .command(&firmware::run("32M"))
        .output()
        .unwrap();
    let said = String::from_utf8(second.stderr).unwrap();
    assert!(said.contains("another machine uses this file"), "{said}");
}

/// The console is the process's own input and output, which both processes have.
#[test]
fn a_console_on_standard_streams_goes_on() {
    if !kvm() {
        return;
    }
    let place = Place::new();
    let arguments = shell("32M,shared", "1").into_iter().map(|argument| {
        if argument == "socket=serial" {
            "stdio"
        } else {
            argument
        }
    });
    let arguments: Vec<_> = arguments.collect();
    let mut command = place.command(&arguments);
    let mut process = command
        .args(["--api-socket", "api"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(std::fs::File::create(place.path("stderr")).unwrap())
        .spawn()
        .unwrap();
    let (mut keys, mut screen) = (
        process.stdin.take().unwrap(),
        process.stdout.take().unwrap(),
    );
    let guest = Upgraded(Guest { place, process });
    let mut wait_for = |expected: &str| {
        let mut text = String::new();
        let mut chunk = [0; 4096];
        while !text.contains(expected) {
            let count = screen.read(&mut chunk).unwrap();
            assert!(count > 0, "no {expected:?} in {text:?}");
            text.push_str(&String::from_utf8_lossy(&chunk[..count]));
        }
    };
    wait_for("probe> ");
    upgrade(&guest.0);
    keys.write_all(b"report\r").unwrap();
    wait_for("everything works");
    upgrade(&guest.0);
    keys.write_all(b"report\r").unwrap();
    wait_for("everything works");
}

/// A card with more queues than its driver uses, a terminal, a channel, and what was plugged in: all of it is where it was,
/// works, and goes when it is asked to.
#[test]
fn what_a_machine_has_of_its_host_goes_along() {
    if !kvm() {
        return;
    }
    for (number, board) in ["micro", "pc"].into_iter().enumerate() {
        let place = Place::new();
        for name in ["more", "other", "disc"] {
            let image = File::create(place.path(name)).unwrap();
            image.set_len(1 << 20).unwrap();
        }
        let mut arguments = shell("64M,shared", "2");
        arguments.extend(["--profile", board, "--virtio-console", "pty"]);
        arguments.extend(["--port", "name=a.port,socket=port"]);
        let mut guest = Upgraded(place.start(&arguments));
        let mut serial = guest.0.serial();
        serial.wait_for("probe> ");
        let tap = format!("aup{number}x{}", std::process::id());
        let interface = Path::new("/sys/class/net").join(&tap);
        let has_card = plug(&guest.0, &mut serial, &tap);
        let limit = ["set-disk-limits", "--id", "disk0"];
        let rate = ["--bytes-per-second", "900000000"];
        guest.0.ctl(&[&limit[..], &rate].concat()).unwrap();
        let before = guest.0.ctl(&["info"]).unwrap();
        let disc = guest.0.path("disc");
        for has_disc in [true, false] {
            if !has_disc {
                guest.0.ctl(&["eject-disk", "--id", "dvd"]).unwrap();
            }
            upgrade(&guest.0);
            assert_eq!(has_open(&guest.0, &disc), has_disc);
            let now = guest.0.ctl(&["info"]).unwrap();
            for what in ["devices", "console_path"] {
                assert_eq!(now[what], before[what]);
            }
            assert_eq!(interface.exists(), has_card);
            UnixStream::connect(guest.0.path("port")).unwrap();
            File::open(now["console_path"].as_str().unwrap()).unwrap();
            serial = guest.0.serial();
            serial.type_line("report");
            let said = serial.wait_for("\"failures\":[");
            assert_eq!(said.matches("blk:").count(), 2, "{said}");
            // The card works: its driver has sent, and nobody has answered.
            let failures = serial.wait_for("]");
            let expected = match has_card {
                true => "\"net: no DHCP server answers\"]",
                false => "]",
            };
            assert_eq!(failures, expected);
            serial.wait_for("probe> ");
        }
        // So do rates that were asked for.
        let spec = guest.0.saved_spec("saved");
        assert_eq!(spec.disks[0].limits.bytes_per_second, Some(900_000_000));
        if has_card {
            let remove = ["remove-device", "--id", "net0"];
            guest.0.ctl(&remove).unwrap();
            // It is nobody's any more.
            eventually("the tap to go", || (!interface.exists()).then_some(()));
        }
    }
}

/// Whether the process that has the machine has that file open.
fn has_open(guest: &Guest, path: &Path) -> bool {
    let files = std::fs::read_dir(format!("/proc/{}/fd", pid(guest))).unwrap();
    let mut files = files.filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok());
    let path = path.canonicalize().unwrap();
    files.any(|file| file == path)
}

/// Plugs in two disks, a drive with a disc, and a card if there are taps here; whether that is so.
fn plug(guest: &Guest, serial: &mut Serial, tap: &str) -> bool {
    let disk = |keys| guest.ctl(&["add-disk", "--disk", keys]).unwrap();
    disk("path=more,format=raw");
    serial.wait_for(": now blk");
    disk("path=other,format=raw,bus=scsi");
    disk("bus=cdrom,id=dvd");
    let insert = ["insert-disk", "--id", "dvd", "--path", "disc"];
    guest.ctl(&insert).unwrap();
    let keys = format!("tap={tap},queues=2,mac=52:54:00:00:00:08");
    match guest.ctl(&["add-net", "--net", &keys]) {
        Ok(_) => {
            serial.wait_for(": now net");
            true
        }
        Err(said) if said.contains("/dev/net/tun") || said.contains("permitted") => {
            println!("ATOLL-SKIP: no tap: {said}");
            false
        }
        Err(said) => panic!("{said} {}", guest.said()),
    }
}

/// A program of the test's own.
fn script(place: &Place, name: &str, text: &str) -> PathBuf {
    let path = place.path(name);
    // Under its name only when nobody has it open for writing any more.
    let early = place.path("early");
    std::fs::write(&early, format!("#!/bin/sh\n{text}\n")).unwrap();
    std::fs::set_permissions(&early, std::fs::Permissions::from_mode(0o700)).unwrap();
    std::fs::rename(early, &path).unwrap();
    path
}

#[test]
fn what_cannot_go_on_stays_with_the_reason() {
    if !kvm() {
        return;
    }
    let mut guest = Place::new().start(&shell("64M,shared", "1"));
    let mut serial = guest.serial();
    serial.start_load("");
    let mut done = serial.load_beyond(0);
    let place = guest.place.clone();
    std::fs::write(place.path("text"), "text").unwrap();
    script(&place, "silent", "exit 0");
    script(
        &place,
        "older",
        "echo \"atoll-vmm: unexpected argument '--upgrade' found (see --help)\" >&2; exit 2",
    );
    script(&place, "dies", "head -c 1000 > /dev/null; kill -9 $$");
    script(&place, "waits", "exec sleep 1000");
    for (program, expected) in [
        ("nothing", "No such file or directory"),
        ("text", "Permission denied"),
        ("silent", "exit status: 0"),
        ("older", "unexpected argument '--upgrade'"),
        ("dies", "signal: 9"),
    ] {
        let said = guest.ctl(&["upgrade", "--to", program]).unwrap_err();
        assert!(said.contains(program) && said.contains(expected), "{said}");
        done = serial.load_beyond(done);
        assert!(runs(&guest));
    }
    // Called off.
    let mut asker = place.command(&["ctl", "--api-socket", "api", "upgrade", "--to", "waits"]);
    let asker = asker.stderr(Stdio::piped()).spawn().unwrap();
    eventually("the upgrade", || {
        guest.ctl(&["cancel-migration"]).ok().map(|_| ())
    });
    let said = String::from_utf8(asker.wait_with_output().unwrap().stderr).unwrap();
    assert!(said.contains("the machine stays: cancelled"), "{said}");
    serial.load_beyond(done);

    let private = Place::new().start(&shell("64", "1"));
    eventually("the machine", || runs(&private).then_some(()));
    let said = private.ctl(&["upgrade", "--to", BINARY]).unwrap_err();
    assert!(said.contains("--memory SIZE,shared"), "{said}");
    private.ctl(&["pause"]).unwrap();
    let said = private.ctl(&["upgrade", "--to", BINARY]).unwrap_err();
    assert!(said.contains("resume it first"), "{said}");
}

/// `ctl upgrade`, not waited for, to a program that says its process's number in the file `new`.
fn begin(guest: &Guest) -> Child {
    let text = format!("echo $$ > early-pid; mv early-pid new; exec {BINARY} \"$@\"");
    script(&guest.place, "program", &text);
    let arguments = ["ctl", "--api-socket", "api", "upgrade", "--to", "program"];
    let mut command = guest.place.command(&arguments);
    command.stderr(Stdio::piped()).stdout(Stdio::null());
    command.spawn().unwrap()
}

/// The process that [`begin`] starts.
fn new_process(guest: &Guest) -> Pid {
    let number: i32 = eventually("the new process", || {
        let text = std::fs::read_to_string(guest.path("new")).ok()?;
        text.trim().parse().ok()
    });
    Pid::from_raw(number)
}

/// One upgrade in which a process is killed at a random moment.
fn disturbed(seed: u64) {
    let mut random = Random::of(seed);
    let kills_new = random.below(2) == 0;
    let moment = Duration::from_micros(random.below(300_000));
    println!("seed {seed}: kills the new process: {kills_new}, after {moment:?}");
    let mut guest = Upgraded(Place::new().start(&shell("64M,shared", "1")));
    let mut serial = guest.0.serial();
    serial.start_load("");
    serial.load_beyond(0);
    let asker = begin(&guest.0);
    let new = new_process(&guest.0);
    sleep(moment);
    match kills_new {
        // It may have failed by itself, never before this.
        true => kill(new, Signal::SIGKILL).unwrap_or_default(),
        false => guest.0.process.kill().unwrap(),
    }
    let output = asker.wait_with_output().unwrap();
    let moved = output.status.success();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    println!("seed {seed}: moved: {moved} {said}");
    if kills_new {
        // It was the new one's and died with it, or it is the old one's again.
        if !moved {
            assert!(works(&mut guest.0), "seed {seed}: {said}");
        }
        return;
    }
    guest.0.process.wait().unwrap();
    if moved {
        let mut serial = guest.0.serial_of_another_process();
        let done = serial.load_beyond(0);
        serial.load_beyond(done);
    } else {
        assert!(!runs(&guest.0), "seed {seed}: {said}");
    }
}

/// Whoever ends the new process before it has the machine means that process, not the guest.
#[test]
fn a_new_process_that_is_told_to_end_leaves_the_machine_where_it_is() {
    if !kvm() {
        return;
    }
    // The thread that hears of it may come too late on a busy machine: once, not always.
    assert!((0..5).any(|_| stays_when_the_new_process_is_told_to_end()));
}

/// Whether the machine has stayed; everything else is asserted.
fn stays_when_the_new_process_is_told_to_end() -> bool {
    let mut guest = Upgraded(Place::new().start(&shell("64M,shared", "1")));
    let text = format!("kill -TERM $$; exec {BINARY} \"$@\"");
    script(&guest.0.place, "ended", &text);
    let mut serial = guest.0.serial();
    serial.start_load("");
    let done = serial.load_beyond(0);
    // What this thread starts has it blocked, so that it waits until the new process looks at signals.
    let mut ending = SigSet::empty();
    ending.add(Signal::SIGTERM);
    ending.thread_block().unwrap();
    let told = guest.0.ctl(&["upgrade", "--to", "ended"]);
    ending.thread_unblock().unwrap();
    let Err(said) = told else {
        return false;
    };
    assert!(said.contains("the machine stays"), "{said}");
    assert!(said.contains("told to end"), "{said}");
    let done = serial.load_beyond(done);
    upgrade(&guest.0);
    guest.0.serial().load_beyond(done);
    true
}

/// The new process finds out when the guest is held already. What it does at its end it could do to the sockets that the old
/// one has, too, and to their files.
#[test]
fn a_new_process_that_fails_late_leaves_everything_to_the_old_one() {
    if !kvm() {
        return;
    }
    let place = Place::new();
    place.qemu_img(&["create", "-q", "-f", "qcow2", "image", "1M"]);
    let disk = "path=image,format=qcow2";
    let guest = place.start(&shell_with_disk("64M,shared", "1", disk));
    let mut guest = Upgraded(guest);
    let mut serial = guest.0.serial();
    serial.start_load("");
    let mut done = serial.load_beyond(0);
    let image = File::options()
        .write(true)
        .open(guest.0.path("image"))
        .unwrap();
    // Nobody but who opens the image reads this again.
    image.write_all_at(b"none", 0).unwrap();
    for sandbox in ["on", "off"] {
        let arguments = ["upgrade", "--to", BINARY, "--sandbox", sandbox];
        let said = guest.0.ctl(&arguments).unwrap_err();
        assert!(said.contains("the machine stays"), "{said}");
        assert!(said.contains("not a qcow2 image"), "{said}");
        assert!(runs(&guest.0));
        // What was connected is, and so is who comes now.
        done = serial.load_beyond(done);
        serial = guest.0.serial();
        done = serial.load_beyond(done);
    }
    image.write_all_at(b"QFI\xfb", 0).unwrap();
    upgrade(&guest.0);
    serial = guest.0.serial();
    serial.load_beyond(done);
    serial.end_load();
    guest.0.ctl(&["shutdown"]).unwrap();
    guest.0.ended();
    eventually("the image's end", || {
        let check = guest
            .0
            .place
            .command_of(Path::new("qemu-img"), &["check", "image"]);
        check_succeeds(check).then_some(())
    });
}

fn check_succeeds(mut check: Command) -> bool {
    let output = check.output().unwrap();
    output.status.success()
}

#[test]
fn exactly_one_runs_whatever_is_killed() {
    if !kvm() {
        return;
    }
    let first = number("ATOLL_SEED", u64::from(std::process::id()));
    for seed in first..first + number("ATOLL_MIGRATION_SEEDS", 6) {
        disturbed(seed);
    }
}

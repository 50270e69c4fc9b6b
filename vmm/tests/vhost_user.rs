// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Machines in their sandboxes whose disk or card is another process's: QEMU's storage daemon and DPDK's testpmd, killed
//! and started again, and left behind when the machine moves.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "helpers of tests fail by panicking, and say what they skip"
)]

mod guest;

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use atoll_devices::testing::start_testpmd;
use atoll_vmm::saved::image;
use guest::images::{pages, restored_pages};
use guest::{Guest, Place, Serial, eventually, moved, number};

struct Daemon(Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Waits for a socket, and lets any user connect to it: a machine's own has to, when it looks for another process.
fn open_to_all(socket: &Path) {
    eventually("the daemon's socket", || {
        fs::set_permissions(socket, Permissions::from_mode(0o666)).ok()
    });
}

/// Serves the folder's file `remote` on the socket `disk.sock`, to any user, also when somebody else has it.
fn start_disk(folder: &Path) -> Option<Daemon> {
    let socket = folder.join("disk.sock");
    let _ = fs::remove_file(&socket);
    let mut command = Command::new("qemu-storage-daemon");
    command
        .current_dir(folder)
        .args([
            "--blockdev",
            "driver=file,node-name=f,filename=remote,locking=off",
        ])
        .args([
            "--export",
            "type=vhost-user-blk,id=e,node-name=f,writable=on,addr.type=unix,addr.path=disk.sock",
        ]);
    match command.stderr(Stdio::null()).spawn() {
        Ok(child) => {
            let daemon = Daemon(child);
            open_to_all(&socket);
            Some(daemon)
        }
        Err(error) => {
            println!("ATOLL-SKIP: qemu-storage-daemon: {error}");
            None
        }
    }
}

/// A place whose folder any user may enter, as the machine's own has to, to connect again.
fn place() -> Option<Place> {
    if !guest::kvm() {
        return None;
    }
    let place = Place::new();
    let folder = place.path("");
    fs::set_permissions(&folder, Permissions::from_mode(0o755)).unwrap();
    fs::write(place.path("remote"), vec![7; 1 << 20]).unwrap();
    Some(place)
}

fn start(place: Place, key: &str) -> Guest {
    let socket = place.path("disk.sock");
    start_with(
        place,
        &format!("socket={},type=blk,{key}", socket.display()),
    )
}

fn start_with(place: Place, disk: &str) -> Guest {
    let mut arguments = vec!["run", "--kernel", "kernel", "--cmdline", "stay write"];
    arguments.extend(["--memory", "64M,shared", "--console", "socket=serial"]);
    arguments.extend(["--vhost-user", disk]);
    place.start(&arguments)
}

#[test]
fn a_guest_uses_another_processs_disk_and_its_successors() {
    let Some(place) = place() else { return };
    let Some(daemon) = start_disk(&place.path("")) else {
        return;
    };
    let remote = place.path("remote");
    let mut guest = start(place, "reconnect");
    let mut serial = guest.serial();
    serial.wait_for("everything works");
    let written = fs::read(&remote).unwrap();
    assert!(written.iter().any(|byte| *byte != 7), "nothing was written");

    guest.ctl(&["snapshot", "--to", "saved"]).unwrap();

    drop(daemon);
    eventually("the line that tells", || {
        guest.said().contains("the backend is gone").then_some(())
    });
    guest.ctl(&["pause"]).unwrap();
    guest.ctl(&["resume"]).unwrap();
    let _daemon = start_disk(&guest.path("")).unwrap();
    eventually("the line that tells of another one", || {
        guest.said().contains("a backend is there").then_some(())
    });
    guest.ctl(&["reset"]).unwrap();
    serial.wait_for("everything works");
    assert!(guest.ctl(&["shutdown"]).is_ok());
    let (status, said) = guest.ended();
    assert!(status.success(), "{said}");
}

/// A guest whose disk's process is found where the guest is.
fn start_at_work(place: Place) -> (Guest, Serial) {
    let mut guest = start_with(place, "socket=disk.sock,type=blk");
    let mut serial = guest.serial();
    serial.start_load("");
    (guest, serial)
}

/// A process that waits for the machine beside another one that serves its disk.
fn target_for(source: &Guest) -> (Guest, Daemon) {
    let place = place().unwrap();
    fs::remove_file(place.path("remote")).unwrap();
    fs::hard_link(source.path("remote"), place.path("remote")).unwrap();
    let daemon = start_disk(&place.path("")).unwrap();
    (start_target(place, &[]), daemon)
}

fn start_target(place: Place, arguments: &[&str]) -> Guest {
    let target = place.start(&[&["receive", "--socket", "in"], arguments].concat());
    let socket = target.path("in");
    eventually("the target's socket", || socket.exists().then_some(()));
    target
}

/// Begins to move `source`'s machine.
fn begin(source: &Guest, target: &Guest, arguments: &[&str]) -> Child {
    let mut command = source.place.command(&["ctl", "--api-socket", "api"]);
    let command = command.arg("migrate").arg("--to").arg(target.path("in"));
    let command = command.args(arguments).stdout(Stdio::piped());
    command.stderr(Stdio::piped()).spawn().unwrap()
}

/// By which a move does not come to an end.
const TINY_RATE: [&str; 2] = ["--max-bytes-per-second", "8"];

/// Waits until memory is sent, and so the log is on.
fn wait_for_senders(source: &Guest) {
    eventually("a sender", || {
        let tasks = format!("/proc/{}/task", source.process.id());
        let names = fs::read_dir(tasks).unwrap().flatten();
        let mut names = names.map(|task| fs::read_to_string(task.path().join("comm")));
        names
            .any(|name| name.is_ok_and(|name| name == "migrate-0\n"))
            .then_some(())
    });
}

#[test]
fn a_guest_at_work_moves_to_where_another_process_serves_its_disk() {
    let Some(place) = place() else { return };
    let Some(mut daemon) = start_disk(&place.path("")) else {
        return;
    };
    let (mut guest, mut serial) = start_at_work(place);
    let mut done = serial.load_beyond(0);
    for _ in 0..number("ATOLL_MIGRATION_ROUNDS", 3) {
        let (mut target, other) = target_for(&guest);
        let info = moved(begin(&guest, &target, &[]), &mut guest, &target);
        println!("{info:?}");
        serial = target.serial();
        done = serial.load_beyond(done + 1024);
        (guest, daemon) = (target, other);
    }
    assert!(serial.end_load() >= done);
    serial.wait_for("probe> ");
    serial.type_line("report");
    serial.wait_for("everything works");
    drop(daemon);
}

#[test]
fn a_move_that_ends_early_leaves_guest_and_disk_at_work() {
    let Some(place) = place() else { return };
    let Some(daemon) = start_disk(&place.path("")) else {
        return;
    };
    let (mut guest, mut serial) = start_at_work(place);
    let mut done = serial.load_beyond(0);

    let (target, other) = target_for(&guest);
    let asker = begin(&guest, &target, &TINY_RATE);
    wait_for_senders(&guest);
    done = serial.load_beyond(done);
    guest.ctl(&["cancel-migration"]).unwrap();
    assert!(!asker.wait_with_output().unwrap().status.success());
    done = serial.load_beyond(done + 512);
    drop((target, other));

    // Fast enough to notice that nobody is there any more.
    let (target, other) = target_for(&guest);
    let asker = begin(&guest, &target, &["--max-bytes-per-second", "1000000"]);
    wait_for_senders(&guest);
    drop(target);
    assert!(!asker.wait_with_output().unwrap().status.success());
    done = serial.load_beyond(done + 512);
    drop(other);

    // Nobody is there who would serve the disk.
    let (target, other) = target_for(&guest);
    drop(other);
    let output = begin(&guest, &target, &[]).wait_with_output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("the other side: user-blk0"), "{said}");
    assert_eq!(said.trim().lines().count(), 1, "{said}");
    done = serial.load_beyond(done + 512);

    let (mut target, _other) = target_for(&guest);
    moved(begin(&guest, &target, &[]), &mut guest, &target);
    drop(daemon);
    serial = target.serial();
    serial.load_beyond(done);
    serial.end_load();
}

#[test]
fn a_guest_moves_on_when_its_disks_process_is_killed_meanwhile() {
    let Some(place) = place() else { return };
    let Some(daemon) = start_disk(&place.path("")) else {
        return;
    };
    let (mut guest, mut serial) = start_at_work(place);
    serial.load_beyond(0);
    let (target, other) = target_for(&guest);
    let asker = begin(&guest, &target, &TINY_RATE);
    wait_for_senders(&guest);
    drop(daemon);
    eventually("the line that tells", || {
        guest.said().contains("the backend is gone").then_some(())
    });
    guest.ctl(&["cancel-migration"]).unwrap();
    assert!(!asker.wait_with_output().unwrap().status.success());
    drop((target, other));

    let (mut target, _other) = target_for(&guest);
    moved(begin(&guest, &target, &[]), &mut guest, &target);
    // Its disk waits for a reset here as there.
    target.ctl(&["reset"]).unwrap();
    target.serial().wait_for("everything works");
}

/// What the log says was written is all that was written, page by page.
#[test]
fn children_of_a_snapshot_have_what_another_process_wrote() {
    let Some(place) = place() else { return };
    let Some(_daemon) = start_disk(&place.path("")) else {
        return;
    };
    let (guest, mut serial) = start_at_work(place);
    let mut done = serial.load_beyond(0);
    let track = ["--track", "true"];
    let snapshot = |arguments: &[&[&str]]| {
        let arguments = [&["snapshot", "--to"], arguments.concat().as_slice()].concat();
        guest.ctl(&arguments).unwrap();
    };
    snapshot(&[&["0"], &track]);
    done = serial.load_beyond(done);
    snapshot(&[&["1", "--parent", "0"], &track]);
    serial.load_beyond(done);
    guest.ctl(&["pause"]).unwrap();
    snapshot(&[&["2", "--parent", "1"]]);
    snapshot(&[&["whole"]]);
    let mut whole = pages(&guest.path("whole/memory"));
    whole.retain(|_, page| !image::is_zero(page));
    let restored = restored_pages(&guest.path("2"), 64);
    let numbers = whole.keys().chain(restored.keys());
    let differ: Vec<_> = numbers
        .filter(|page| whole.get(page) != restored.get(page))
        .collect();
    assert_eq!(differ, [&0; 0]);
}

/// Two ports of a process, `a` and `b`: what comes in at one goes out at the other.
fn start_switch(folder: &Path) -> Option<Daemon> {
    match start_testpmd(folder, &["a", "b"], 1) {
        Ok(child) => {
            let daemon = Daemon(child);
            for socket in ["a", "b"] {
                open_to_all(&folder.join(socket));
            }
            Some(daemon)
        }
        Err(error) => {
            println!("ATOLL-SKIP: dpdk-testpmd: {error}");
            None
        }
    }
}

/// A guest at one of the switch's ports: its address ends in `own`, and it asks the one whose address ends in `peer`.
fn start_at(switch: &Place, port: &str, own: u8, peer: u8, keys: &str) -> (Guest, Serial) {
    let cmdline = format!("stay ip=10.0.0.{own} peer=10.0.0.{peer}");
    let socket = switch.path(port);
    let card = format!(
        "vhost-user={},mac=52:54:00:00:00:{own:02}{keys}",
        socket.display()
    );
    let mut arguments = vec!["run", "--kernel", "kernel", "--cmdline", &cmdline];
    arguments.extend(["--memory", "32M,shared", "--console", "socket=serial"]);
    arguments.extend(["--net", &card]);
    let mut guest = Place::new().start(&arguments);
    let serial = guest.serial();
    (guest, serial)
}

/// Has the guest ask its peer again, and get all its answers.
#[track_caller]
fn pings(serial: &mut Serial) {
    serial.wait_for("probe> ");
    serial.type_line("report");
    let said = serial.wait_for("everything works");
    assert!(said.contains("pings=16"), "{said}");
}

#[test]
fn two_guests_talk_through_testpmd_and_its_successor() {
    let Some(place) = place() else { return };
    let Some(switch) = start_switch(&place.path("")) else {
        return;
    };
    let (first, mut first_serial) = start_at(&place, "a", 1, 2, ",mtu=1400,reconnect");
    let (second, mut second_serial) = start_at(&place, "b", 2, 1, ",reconnect");
    // The first that ran may have had no peer yet.
    second_serial.wait_for("Type help.");
    pings(&mut first_serial);
    pings(&mut second_serial);
    let log = fs::read_to_string(place.path("testpmd")).unwrap();
    // Its word for MQ, LOG_SHMFD, RARP, REPLY_ACK and MTU: each message has an answer.
    let agreed = "negotiated Vhost-user protocol features: 0x1f";
    assert_eq!(log.matches(agreed).count(), 2, "{log}");

    for act in [["pause"], ["resume"], ["reset"]] {
        first.ctl(&act).unwrap();
    }
    first_serial.wait_for("everything works");
    pings(&mut second_serial);

    drop(switch);
    for guest in [&first, &second] {
        eventually("the line that tells", || {
            guest.said().contains("the backend is gone").then_some(())
        });
    }
    let _switch = start_switch(&place.path("")).unwrap();
    for guest in [&first, &second] {
        eventually("the line that tells of another one", || {
            guest.said().contains("a backend is there").then_some(())
        });
    }
    pings(&mut first_serial);
    pings(&mut second_serial);
    for mut guest in [first, second] {
        assert!(guest.ctl(&["shutdown"]).is_ok());
        let (status, said) = guest.ended();
        assert!(status.success(), "{said}");
    }
}

/// Moves the guest to the other switch's port.
fn move_to(switch: &Place, port: &str, guest: &mut Guest) -> Guest {
    let mut spec = guest.saved_spec("spec");
    let card = spec.nets[0].vhost_user.as_mut().unwrap();
    card.path = switch.path(port);
    let place = Place::new();
    fs::write(place.path("own"), serde_json::to_vec(&spec).unwrap()).unwrap();
    let target = start_target(place, &["--spec", "own"]);
    moved(begin(guest, &target, &[]), guest, &target);
    target
}

#[test]
fn two_guests_move_to_another_testpmd_and_talk_on() {
    let (Some(here), Some(there)) = (place(), place()) else {
        return;
    };
    let Some(switch) = start_switch(&here.path("")) else {
        return;
    };
    let (mut first, mut first_serial) = start_at(&here, "a", 1, 2, ",reconnect");
    let (mut second, mut second_serial) = start_at(&here, "b", 2, 1, "");
    second_serial.wait_for("Type help.");
    pings(&mut first_serial);
    pings(&mut second_serial);

    // A move that is called off while packets come and go.
    let target = start_target(Place::new(), &[]);
    let asker = begin(&first, &target, &TINY_RATE);
    wait_for_senders(&first);
    pings(&mut second_serial);
    first.ctl(&["cancel-migration"]).unwrap();
    assert!(!asker.wait_with_output().unwrap().status.success());
    pings(&mut first_serial);

    let _other = start_switch(&there.path("")).unwrap();
    first = move_to(&there, "a", &mut first);
    second = move_to(&there, "b", &mut second);
    drop(switch);
    let (mut first_serial, mut second_serial) = (first.serial(), second.serial());
    for serial in [&mut first_serial, &mut second_serial] {
        serial.type_line("");
        pings(serial);
    }
    for guest in [&mut first, &mut second] {
        assert!(guest.ctl(&["shutdown"]).is_ok());
        let (status, said) = guest.ended();
        assert!(status.success(), "{said}");
    }
}

#[test]
fn a_guest_goes_on_without_its_cards_process() {
    let Some(place) = place() else { return };
    let Some(switch) = start_switch(&place.path("")) else {
        return;
    };
    let (mut guest, mut serial) = start_at(&place, "a", 1, 2, "");
    serial.wait_for("the peer does not answer ARP");
    serial.wait_for("probe> ");
    drop(switch);
    eventually("the line that tells", || {
        let said = guest.said();
        let gone = said
            .lines()
            .find(|line| line.contains("the backend is gone"))?;
        assert!(
            gone.contains("net0") && gone.contains("reconnects=false"),
            "{gone}"
        );
        Some(())
    });
    // What it would send now would stay in its ring.
    serial.type_line("id");
    serial.wait_for("10.0.0.1");
    guest.ctl(&["pause"]).unwrap();
    guest.ctl(&["resume"]).unwrap();
    assert!(guest.ctl(&["shutdown"]).is_ok());
    let (status, said) = guest.ended();
    assert!(status.success(), "{said}");
}

#[test]
fn what_is_wrong_is_told_before_the_start() {
    let Some(place) = place() else { return };
    let socket = place.path("disk.sock");
    let socket = socket.display();
    for (memory, disk, expected) in [
        (
            "64M",
            format!("socket={socket},type=blk"),
            "a vhost-user device needs memory that its process can map: say --memory SIZE,shared",
        ),
        (
            "64M,shared",
            format!("socket={socket},type=net"),
            "a network card is told by --net vhost-user=",
        ),
        (
            "64M,shared",
            "socket=disk.sock,type=blk,reconnect".to_owned(),
            "must be an absolute path",
        ),
        (
            "64M,shared",
            format!("socket={socket},type=blk"),
            "No such file or directory",
        ),
    ] {
        let arguments = [
            "run",
            "--kernel",
            "kernel",
            "--memory",
            memory,
            "--vhost-user",
            &disk,
        ];
        let output = place.command(&arguments).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success());
        assert!(said.contains(expected), "{said}");
        assert_eq!(said.trim().lines().count(), 1, "{said}");
    }
}

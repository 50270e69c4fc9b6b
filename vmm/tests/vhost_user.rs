// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Machines in their sandboxes whose disk or card is another process's: QEMU's storage daemon and DPDK's testpmd, killed
//! and started again.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "helpers of tests fail by panicking, and say what they skip"
)]

mod guest;

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use atoll_devices::testing::start_testpmd;
use guest::{Guest, Place, Serial, eventually};

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

/// Serves the folder's file `remote` on the socket `disk.sock`, to any user.
fn start_disk(folder: &Path) -> Option<Daemon> {
    let socket = folder.join("disk.sock");
    let _ = fs::remove_file(&socket);
    let mut command = Command::new("qemu-storage-daemon");
    command
        .current_dir(folder)
        .args(["--blockdev", "driver=file,node-name=f,filename=remote"])
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
    let disk = format!("socket={},type=blk,{key}", socket.display());
    let mut arguments = vec!["run", "--kernel", "kernel", "--cmdline", "stay write"];
    arguments.extend(["--memory", "64M,shared", "--console", "socket=serial"]);
    arguments.extend(["--vhost-user", &disk]);
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

    let _target = UnixListener::bind(guest.path("target")).unwrap();
    let refused = guest.ctl(&["migrate", "--to", "target"]).unwrap_err();
    let why = "user-blk0: what its vhost-user backend writes into memory is not logged";
    assert!(refused.contains(why), "{refused}");
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
    // Its word for MQ, RARP, REPLY_ACK and MTU: each message has an answer.
    let agreed = "negotiated Vhost-user protocol features: 0x1d";
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

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Machines that move between two processes on the host's own KVM, on one disk, while the probe guest works; and
//! what is left when a process is killed or the move is called off in the middle of it. Seeds are printed; another
//! one comes from ATOLL_SEED, more of them from ATOLL_MIGRATION_SEEDS (`make soak`).

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "helpers of tests fail by panicking, and say what they skip"
)]

mod guest;

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use atoll_disk::qcow2::{Qcow2Options, create};
use atoll_vmm_protocol::api::{Migrate, MigrationInfo, Request};
use guest::{
    Clocked, Disturbance, Guest, Place, Random, eventually, kvm, moved, number, runs, shell,
    target_for, works,
};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::unistd::Pid;

/// `ctl migrate`, not waited for.
fn begin(source: &Guest, target: &Guest, connections: &str) -> Child {
    let to = target.path("in");
    source
        .place
        .command(&["ctl", "--api-socket", "api", "migrate", "--to"])
        .arg(to)
        .args(["--connections", connections])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// A qcow2 image's tables are in the source's memory, too: the target must find all of them in the file, and the source
/// must write none of them afterwards.
#[test]
fn a_qcow2_image_moves_with_its_guest() {
    if !kvm() {
        return;
    }
    let place = Place::new();
    std::fs::remove_file(place.path("disk")).unwrap();
    create(&place.path("disk"), 1 << 20, &Qcow2Options::default()).unwrap();
    let arguments = shell("32", "1").into_iter().map(|argument| match argument {
        "path=disk,format=raw" => "path=disk,format=qcow2",
        other => other,
    });
    let mut guest = place.start(&arguments.collect::<Vec<_>>());
    let mut serial = guest.serial();
    serial.start_load("");
    let mut done = serial.load_beyond(0);
    for _ in 0..3 {
        let mut target = target_for(&guest);
        let moved = begin(&guest, &target, "1").wait_with_output().unwrap();
        assert!(moved.status.success(), "{} {}", guest.said(), target.said());
        serial = target.serial();
        done = serial.load_beyond(done);
        guest = target;
    }
    serial.end_load();
    guest.ctl(&["shutdown"]).unwrap();
    assert_eq!(guest.ended().0.code(), Some(0));
    let checked = Command::new("qemu-img")
        .args(["check", "-f", "qcow2"])
        .arg(guest.path("disk"))
        .output();
    match checked {
        Ok(checked) => assert!(checked.status.success(), "{checked:?}"),
        Err(error) => println!("ATOLL-SKIP: qemu-img: {error}"),
    }
}

/// A UUID that is the same in either order of bytes.
const GENERATION: &str = "11111111-2222-3333-4444-555555555555";

#[test]
fn a_guest_at_work_moves_there_and_back() {
    if !kvm() {
        return;
    }
    moves_there_and_back("64", "16 4", number("ATOLL_MIGRATION_ROUNDS", 4));
}

/// RAM of two memory slots; the guest works in the second one.
#[test]
fn a_guest_at_work_above_4_gib_moves_there_and_back() {
    if !kvm() {
        return;
    }
    moves_there_and_back("3200", "4100 4", 2);
}

/// Moves a guest with so much memory, which works in that region, so many times. It works until it has looked at every
/// page of the region again.
fn moves_there_and_back(memory: &str, region: &str, rounds: u64) {
    const PAGES: u64 = 4 << 8;
    let mut arguments = shell(memory, "2");
    arguments.extend(["--generation-id", GENERATION]);
    let mut guest = Place::new().start(&arguments);
    let mut serial = guest.serial();
    serial.start_load(region);
    let mut done = serial.load_beyond(PAGES);
    for round in 0..rounds {
        let mut target = target_for(&guest);
        let connections = ["1", "3"][usize::from(round % 2 == 1)];
        let asker = begin(&guest, &target, connections);
        let info = moved(asker, &mut guest, &target);
        println!(
            "{} ms, stood still for {} us, {} bytes",
            info.elapsed_ms, info.downtime_us, info.sent_bytes
        );
        assert_eq!(guest.ended().0.code(), Some(0));
        serial = target.serial();
        done = serial.load_beyond(done + PAGES);
        guest = target;
    }
    assert!(serial.end_load() >= done);
    serial.wait_for("probe> ");
    serial.type_line("report");
    serial.wait_for("everything works");
    // It is still the same machine.
    guest.ctl(&["snapshot", "--to", "snapshot"]).unwrap();
    let memory = File::open(guest.path("snapshot/memory")).unwrap();
    let mut generation = [0; 16];
    memory.read_exact_at(&mut generation, 0xd_f000).unwrap();
    assert_eq!(generation[..7], [0x11, 0x11, 0x11, 0x11, 0x22, 0x22, 0x33]);
}

/// Memory that other processes map, or that is huge pages, is so where the guest goes.
#[test]
fn memory_is_of_the_same_kind_after_a_move() {
    if !kvm() {
        return;
    }
    let is_file = |guest: &Guest| {
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", guest.process.id()));
        maps.unwrap().contains("/memfd:guest-memory")
    };
    for (memory, shared) in [("32", false), ("32M,shared", true)] {
        let mut guest = Place::new().start(&shell(memory, "1"));
        guest.serial().wait_for("probe> ");
        assert_eq!(is_file(&guest), shared);
        let target = target_for(&guest);
        moved(begin(&guest, &target, "1"), &mut guest, &target);
        assert_eq!(is_file(&target), shared);
    }
}

/// A moved guest's clocks go on as if it had not moved, and it is told that it stood still.
#[test]
fn clocks_of_a_moved_guest_count_the_time_of_its_move() {
    if !kvm() {
        return;
    }
    let before = Clocked::start();
    let inner = Instant::now();
    let mut guest = before.guest;
    let mut target = target_for(&guest);
    let moved = begin(&guest, &target, "1").wait_with_output().unwrap();
    assert!(moved.status.success(), "{}", target.said());
    let mut serial = target.serial();
    serial.type_line("");
    serial.wait_for("probe> ");
    let least = inner.elapsed();
    let [ns, ticks, flags] = serial.clock("");
    let most = before.since.elapsed();
    let passed = Duration::from_nanos(ns - before.ns);
    let khz = (ticks - before.ticks) / u64::try_from(passed.as_millis()).unwrap();
    println!("{passed:?} of {least:?} to {most:?}, {khz} ticks a ms");
    assert_eq!(flags & 2, 2, "it is told that it stood still");
    // Two clocks of one host, one of which is corrected by the network's time.
    let slack = Duration::from_millis(20);
    assert!(passed + slack > least && passed < most + slack);
    guest.ended();
}

/// One migration that is disturbed at a random moment.
fn disturbed(seed: u64) {
    let mut random = Random::of(seed);
    let disturbance = Disturbance::any(&mut random);
    let moment = Duration::from_micros(random.below(400_000));
    println!("seed {seed}: {disturbance:?} after {moment:?}");
    let mut source = Place::new().start(&shell("64", "1"));
    let mut serial = source.serial();
    serial.start_load("");
    serial.load_beyond(0);
    let mut target = target_for(&source);
    let mut asker = begin(&source, &target, "2");
    sleep(moment);
    match disturbance {
        Disturbance::KillSource => {
            source.process.kill().unwrap();
            source.process.wait().unwrap();
            asker.wait().unwrap();
            // Without the source the target has the machine or ends.
            let took_over = works(&mut target);
            let failed = || target.said().contains("atoll-vmm: ");
            assert!(took_over || failed(), "seed {seed}: {}", target.said());
        }
        Disturbance::KillTarget => {
            target.process.kill().unwrap();
            target.process.wait().unwrap();
            let moved = asker.wait().unwrap().success();
            // It was the target's and died with it, or it is the source's again.
            assert_eq!(works(&mut source), !moved, "seed {seed}: {}", source.said());
        }
        Disturbance::Cancel => {
            // Refused when it is too late, or too early.
            let _ = source.ctl(&["cancel-migration"]);
            let moved = asker.wait().unwrap().success();
            assert_eq!(works(&mut target), moved, "seed {seed}: {}", target.said());
            assert_eq!(works(&mut source), !moved, "seed {seed}: {}", source.said());
        }
    }
}

#[test]
fn exactly_one_runs_whatever_happens() {
    if !kvm() {
        return;
    }
    let first = number("ATOLL_SEED", u64::from(std::process::id()));
    for seed in first..first + number("ATOLL_MIGRATION_SEEDS", 6) {
        disturbed(seed);
    }
}

/// A sender may have to wait for hours until its next bytes may go.
#[test]
fn a_move_at_a_tiny_rate_is_called_off_at_once() {
    if !kvm() {
        return;
    }
    let mut source = Place::new().start(&shell("64", "1"));
    let mut serial = source.serial();
    serial.start_load("");
    serial.load_beyond(0);
    let mut target = target_for(&source);
    let to = target.path("in").display().to_string();
    let mut asker = source.place.command(&["ctl", "--api-socket", "api"]);
    let asker = asker.args(["migrate", "--max-bytes-per-second", "8", "--to", &to]);
    let mut asker = asker.stderr(Stdio::piped()).spawn().unwrap();
    eventually("a sender", || {
        let threads = source.threads();
        threads.contains(&"migrate-0".to_owned()).then_some(())
    });
    source.ctl(&["cancel-migration"]).unwrap();
    eventually("the end of the move", || asker.try_wait().unwrap());
    let said = String::from_utf8(asker.wait_with_output().unwrap().stderr).unwrap();
    assert!(said.contains("the machine stays: cancelled"), "{said}");
    assert!(works(&mut source) && !works(&mut target));
}

/// Whoever ends the process to which a machine comes means that process, not the guest.
#[test]
fn a_target_that_is_told_to_end_leaves_the_machine_where_it_is() {
    if !kvm() {
        return;
    }
    // The thread that hears of it may come too late on a busy machine: once, not always.
    assert!((0..5).any(|_| stays_when_the_target_is_told_to_end()));
}

/// Whether the machine has stayed; everything else is asserted.
fn stays_when_the_target_is_told_to_end() -> bool {
    let mut source = Place::new().start(&shell("32", "1"));
    let mut serial = source.serial();
    serial.start_load("");
    let done = serial.load_beyond(0);
    // What this thread starts has it blocked, so that it waits until the target looks at signals.
    let mut ending = SigSet::empty();
    ending.add(Signal::SIGTERM);
    ending.thread_block().unwrap();
    let mut target = target_for(&source);
    ending.thread_unblock().unwrap();
    let pid = Pid::from_raw(target.process.id().cast_signed());
    kill(pid, Signal::SIGTERM).unwrap();
    let output = begin(&source, &target, "1").wait_with_output().unwrap();
    if output.status.success() {
        return false;
    }
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("told to end"), "{said}");
    assert!(!target.ended().0.success());
    serial.load_beyond(done);
    assert!(runs(&source));
    true
}

#[test]
fn what_cannot_move_stays_with_the_reason() {
    if !kvm() {
        return;
    }
    let mut source = Place::new().start(&shell("64", "1"));
    let mut serial = source.serial();
    serial.start_load("");
    let mut done = serial.load_beyond(0);
    source.ctl(&["snapshot", "--to", "snapshot"]).unwrap();
    let spec = std::fs::read(source.path("snapshot/spec.json")).unwrap();
    let mut refused = |change: &dyn Fn(&Place), arguments: &[&str], expected: &str| {
        let place = Place::new();
        change(&place);
        let mut target = place.start(&[&["receive", "--socket", "in"], arguments].concat());
        let socket = target.path("in");
        eventually("the target's socket", || socket.exists().then_some(()));
        let output = begin(&source, &target, "1").wait_with_output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(
            said.contains("the machine stays: the other side: "),
            "{said}"
        );
        assert!(said.contains(expected), "{said}");
        assert_eq!(target.ended().0.code(), Some(1));
        done = serial.load_beyond(done);
        assert!(runs(&source));
    };
    refused(
        &|place| std::fs::remove_file(place.path("disk")).unwrap(),
        &[],
        "disk disk: No such file or directory",
    );
    let other = |change: &dyn Fn(&mut serde_json::Value)| {
        let mut spec: serde_json::Value = serde_json::from_slice(&spec).unwrap();
        change(&mut spec);
        move |place: &Place| std::fs::write(place.path("own"), spec.to_string()).unwrap()
    };
    refused(
        &other(&|spec| spec["cpu_count"] = 2.into()),
        &["--spec", "own"],
        "the machine has 1 vCPUs, this side's spec 2",
    );
    refused(
        &other(&|spec| spec["memory_mib"] = 65.into()),
        &["--spec", "own"],
        "the machine has 64 MiB of memory, this side's spec 65",
    );
    refused(
        &other(&|spec| spec["disks"] = serde_json::json!([])),
        &["--spec", "own"],
        "this side's spec has other devices than the machine: it lacks disk disk0, and has more none",
    );
    refused(
        &other(&|spec| spec["disks"][0]["bus"] = "scsi".into()),
        &["--spec", "own"],
        "it lacks disk disk0, and has more SCSI disk disk0",
    );
    refused(
        &|place| {
            let disk = std::fs::File::create(place.path("disk")).unwrap();
            disk.set_len(2 << 20).unwrap();
        },
        &[],
        "the disk's size in bytes was 1048576 and is now 2097152",
    );
}

/// What a source says first is changed on its way: the target refuses before anything of the guest is sent, and says
/// why, as the source does.
#[test]
fn a_machine_of_another_version_or_cpu_is_refused_first() {
    if !kvm() {
        return;
    }
    let mut source = Place::new().start(&shell("64", "1"));
    let mut serial = source.serial();
    serial.start_load("");
    let mut done = serial.load_beyond(0);
    let mut refused = |change: &dyn Fn(&mut serde_json::Value), expected: &str| {
        let mut target = target_for(&source);
        let between = source.path("between");
        let listener = UnixListener::bind(&between).unwrap();
        let mut asker = source
            .place
            .command(&["ctl", "--api-socket", "api", "migrate"]);
        let asker = asker
            .arg("--to")
            .arg(&between)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let (mut near, _) = listener.accept().unwrap();
        let (_data, _) = listener.accept().unwrap();
        let mut size = [0; 4];
        near.read_exact(&mut size).unwrap();
        let mut hello = vec![0; usize::try_from(u32::from_le_bytes(size)).unwrap()];
        near.read_exact(&mut hello).unwrap();
        let mut hello: serde_json::Value = serde_json::from_slice(&hello).unwrap();
        change(&mut hello["hello"]);
        let hello = hello.to_string();
        let mut far = UnixStream::connect(target.path("in")).unwrap();
        let size = u32::try_from(hello.len()).unwrap();
        far.write_all(&size.to_le_bytes()).unwrap();
        far.write_all(hello.as_bytes()).unwrap();
        std::io::copy(&mut far, &mut near).unwrap();
        drop(near);
        let output = asker.wait_with_output().unwrap();
        let said = [String::from_utf8(output.stderr).unwrap(), target.ended().1];
        for said in said {
            let last = said.trim_end().lines().last().unwrap();
            assert!(last.contains(expected), "{said}");
        }
        std::fs::remove_file(between).unwrap();
        done = serial.load_beyond(done);
        assert!(runs(&source));
    };
    refused(
        &|hello| hello["machine_version"] = 99.into(),
        "the machine is of version 99",
    );
    refused(
        &|hello| hello["version"] = 99.into(),
        "migration protocol 99 of atoll-vmm",
    );
    refused(
        &|hello| {
            // Function 1: every feature that there is.
            for leaf in hello["cpuid"].as_array_mut().unwrap() {
                if leaf[0] == 1 {
                    leaf[5] = u32::MAX.into();
                }
            }
        },
        "this host's CPU is not the guest's: ",
    );
    refused(
        &|hello| hello["data_connections"] = 65.into(),
        "65 data connections",
    );
}

/// Arguments that hold a move to a sixth of what the guest writes.
fn slowly(serial: &mut guest::Serial) -> Vec<String> {
    let (began, first) = (Instant::now(), serial.load_beyond(0));
    let last = loop {
        let last = serial.load_beyond(first);
        if last > first + 100 || began.elapsed() > Duration::from_secs(5) {
            break last;
        }
    };
    let elapsed_ms = u64::try_from(began.elapsed().as_millis()).unwrap();
    let pages = (last - first) * 1000 / elapsed_ms.max(1);
    let limit = pages * 4096 / 6;
    println!("the guest writes {pages} pages/s, {limit} bytes/s are sent");
    ["--max-bytes-per-second", &limit.to_string()]
        .map(str::to_owned)
        .to_vec()
}

#[test]
fn a_guest_that_writes_faster_than_is_sent_is_slowed_down_or_stays() {
    if !kvm() {
        return;
    }
    let mut source = Place::new().start(&shell("16", "1"));
    let mut serial = source.serial();
    serial.start_load("12 1");
    let mut limited = slowly(&mut serial);
    limited.extend(["--downtime-limit-ms", "200"].map(str::to_owned));
    let ask = |source: &Guest, target: &Guest, more: &[&str]| {
        let arguments = ["ctl", "--api-socket", "api", "migrate", "--to"];
        let mut command = source.place.command(&arguments);
        command.arg(target.path("in")).args(&limited).args(more);
        command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    };
    // Not slowed down, it stays.
    let target = target_for(&source);
    let stays = ask(&source, &target, &["--throttle", "false"])
        .wait_with_output()
        .unwrap();
    let said = String::from_utf8(stays.stderr).unwrap();
    assert!(
        said.contains("the machine stays: the guest writes "),
        "{said}"
    );
    assert!(
        said.contains("allow more than 200 ms of downtime"),
        "{said}"
    );
    let mut done = serial.load_beyond(0);

    // The same goes on for as long as nobody ends it.
    let target = target_for(&source);
    let goes_on = ask(
        &source,
        &target,
        &["--throttle", "false", "--when-late", "go-on"],
    );
    eventually("more rounds than it would be given", || {
        let info: MigrationInfo = source.client().ask(Request::Migration).unwrap();
        (info.rounds > 6).then_some(())
    });
    source.ctl(&["cancel-migration"]).unwrap();
    let said = String::from_utf8(goes_on.wait_with_output().unwrap().stderr).unwrap();
    assert!(said.contains("the machine stays: cancelled"), "{said}");
    done = serial.load_beyond(done);

    // Slowed down, it moves; then it is as fast as before.
    let mut target = target_for(&source);
    let asker = ask(&source, &target, &[]);
    let info = moved(asker, &mut source, &target);
    println!(
        "{} rounds, {} %, {} us",
        info.rounds, info.throttle_percent, info.downtime_us
    );
    assert!(info.throttle_percent > 0);
    target.serial().load_beyond(done);
}

#[test]
fn who_cannot_move_is_told_why() {
    if !kvm() {
        return;
    }
    let mut source = Place::new().start(&shell("64", "1"));
    source.serial().wait_for("probe> ");
    let nobody = source.ctl(&["migrate", "--to", "nobody"]).unwrap_err();
    assert!(nobody.contains("connect to nobody"), "{nobody}");
    source.client().act(Request::Pause).unwrap();
    let target = target_for(&source);
    let to = target.path("in").display().to_string();
    let paused = source.ctl(&["migrate", "--to", &to]).unwrap_err();
    assert!(paused.contains("the machine does not run"), "{paused}");
    let body = Migrate {
        to,
        ..Migrate::default()
    };
    source.client().act(Request::Resume).unwrap();
    let client = source.client();
    let none = client.ask_with::<MigrationInfo>(Request::Migrate, &body);
    assert!(
        none.unwrap_err()
            .to_string()
            .contains("the control connection")
    );
}

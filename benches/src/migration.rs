// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Guests that move between two processes of one host, guests that are saved and restored, and a guest whose disk is
//! backed up. What counts is what a guest's user sees: the probe's `load` writes a line every 256 rounds, and a guest that
//! stands still writes none.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{ChildStdout, Command, Stdio};
use std::thread::{Builder, scope, sleep};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::Bench;
use crate::monitor::{
    Access, CLOUD_HYPERVISOR, Disk, FIRECRACKER, Guest, Monitor, OURS, Programs, QEMU_Q35, Running,
};
use crate::table::{Aim, Contestant, Figure, Row, compare};

/// Turns: each is two processes, and some seconds.
const TURNS: usize = 7;
/// Rounds of `load` between two of its lines.
const ROUNDS_TOLD: u64 = 256;
/// Longest time that a process takes for its sockets, or for a move.
const PATIENCE: Duration = Duration::from_secs(20);
/// How often one looks for them.
const POLL: Duration = Duration::from_millis(1);
/// Lines of `load` of which a backup's turn is made.
const LINES: u32 = 40;
const IMAGE_BYTES: usize = 256 << 20;
/// Rows of backups, and what `begin-export` is told beside disk and places.
const BACKUPS: [(&str, &[&str]); 2] = [
    ("disk_write_4k_during_backup", &[]),
    (
        "disk_write_4k_during_backup_of_64_mib_a_second",
        &["--max-bytes-per-second", "67108864"],
    ),
];

/// How a VMM moves a guest: what its source is started with beside the guest, what waits for it, and the move.
struct Mover {
    monitor: &'static Monitor,
    source: &'static [&'static str],
    target: fn(&Programs, &Guest) -> anyhow::Result<Command>,
    /// What there is in the target's folder once it waits.
    waits: &'static str,
    carry: fn(&Programs, &Path, &Path) -> anyhow::Result<()>,
}

static MOVERS: [Mover; 3] = [
    Mover {
        monitor: &OURS,
        source: &["--api-socket", "api"],
        target: |programs, _| {
            let mut command = Command::new(programs.vmm());
            command.args(["receive", "--socket", "in", "--api-socket", "api"]);
            Ok(command)
        },
        waits: "in",
        carry: |programs, source, target| {
            let to = target.join("in").display().to_string();
            ctl(programs, source, &["migrate", "--to", &to]).map(drop)
        },
    },
    Mover {
        monitor: &CLOUD_HYPERVISOR,
        source: &["--api-socket", "path=api"],
        target: |programs, _| {
            let mut command = Command::new(programs.peer("cloud-hypervisor")?);
            command.args(["--api-socket", "path=api"]);
            Ok(command)
        },
        waits: "api",
        carry: |_, source, target| {
            let place = format!("unix:{}", target.join("in").display());
            let receive = json!({"receiver_url": place});
            let send = json!({"destination_url": place, "local": false});
            scope(|threads| {
                let receiver = Builder::new().spawn_scoped(threads, || {
                    put(
                        &target.join("api"),
                        "/api/v1/vm.receive-migration",
                        &receive,
                    )
                })?;
                wait_for(&target.join("in"))?;
                put(&source.join("api"), "/api/v1/vm.send-migration", &send)?;
                receiver.join().expect("it does not panic")
            })
        },
    },
    Mover {
        monitor: &QEMU_Q35,
        source: &["-qmp", "unix:qmp,server=on,wait=off"],
        target: |programs, guest| {
            let mut command = QEMU_Q35.command(programs, guest)?;
            command.args(["-incoming", "unix:in"]);
            Ok(command)
        },
        waits: "in",
        carry: |_, source, target| {
            let mut stream = UnixStream::connect(source.join("qmp"))?;
            let mut answers = BufReader::new(stream.try_clone()?);
            let uri = format!("unix:{}", target.join("in").display());
            // By default it sends 128 MiB a second at most; the others have no limit.
            let no_limit = json!({"max-bandwidth": 1_u64 << 40});
            for (command, arguments) in [
                ("qmp_capabilities", json!({})),
                ("migrate-set-parameters", no_limit),
                ("migrate", json!({"uri": uri})),
            ] {
                let text = json!({"execute": command, "arguments": arguments});
                writeln!(stream, "{text}")?;
                // What is written behind an answer that nobody reads is lost with the connection.
                let mut line = String::new();
                while !line.starts_with("{\"return\"") {
                    line.clear();
                    anyhow::ensure!(answers.read_line(&mut line)? > 0, "no answer to {command}");
                    anyhow::ensure!(!line.starts_with("{\"error\""), "{command}: {line}");
                }
            }
            Ok(())
        },
    },
];

/// The suite.
pub fn rows(bench: &Bench) -> Vec<Row> {
    let programs = match Programs::find(bench) {
        Ok(programs) => programs,
        Err(error) => {
            let figure = Figure::cost("migration", "ms");
            return vec![Row::absent(&figure, "-", &error)];
        }
    };
    let turns = bench.runs.min(TURNS);
    let mut rows = Vec::new();
    for (name, size_mib) in [("idle", 1), ("dirtying_64_mib", 64)] {
        let contestant = |mover: &'static Mover| Contestant {
            name: mover.monitor.name,
            turns_max: usize::MAX,
            take: Box::new({
                let programs = &programs;
                move || downtime_ms(programs, mover, size_mib)
            }),
        };
        let [ours, peers @ ..] = &MOVERS;
        let figure = Figure::cost(&format!("migration_downtime_{name}"), "ms");
        let peers = peers.iter().map(contestant).collect();
        rows.extend(compare(&figure, turns, contestant(ours), peers));
    }
    for (name, save) in [("snapshot_save", true), ("snapshot_restore", false)] {
        let contestant = |monitor: &'static Monitor, take: Snapshot| Contestant {
            name: monitor.name,
            turns_max: usize::MAX,
            take: Box::new({
                let programs = &programs;
                move || Ok(take(programs)?[usize::from(!save)])
            }),
        };
        let figure = Figure::cost(name, "ms");
        let peers = vec![contestant(&FIRECRACKER, firecracker_snapshot_ms)];
        let ours = contestant(&OURS, our_snapshot_ms);
        rows.extend(compare(&figure, turns, ours, peers));
    }
    for (name, options) in BACKUPS {
        rows.extend(backup(&programs, turns, name, options));
    }
    rows
}

/// A guest's writes while its disk is backed up, against the same without.
fn backup(
    programs: &Programs,
    turns: usize,
    name: &str,
    options: &'static [&'static str],
) -> Vec<Row> {
    let contestant = |name, backup| Contestant {
        name,
        turns_max: usize::MAX,
        take: Box::new(move || write_us(programs, backup)),
    };
    let figure = Figure {
        name: name.into(),
        unit: "us",
        aim: Aim::AtMost("1.25"),
    };
    let peers = vec![contestant("ours without a backup", None)];
    compare(&figure, turns, contestant("ours", Some(options)), peers)
}

/// A guest that works on so much of its memory.
fn at_work(size_mib: u64) -> Guest {
    Guest {
        cmdline: format!("stay load=16,{size_mib}"),
        ..Guest::default()
    }
}

/// A folder in memory.
pub fn folder() -> anyhow::Result<TempDir> {
    tempfile::tempdir_in("/dev/shm").context("a folder in memory")
}

/// From the last byte that the guest wrote at the source to the first at the target.
fn downtime_ms(programs: &Programs, mover: &Mover, size_mib: u64) -> anyhow::Result<f64> {
    let (from, to) = (folder()?, folder()?);
    let guest = at_work(size_mib);
    let mut command = mover.monitor.command(programs, &guest)?;
    command.args(mover.source).current_dir(from.path());
    let mut source = Running::of(command)?;
    // Twice over all of it.
    let rounds = size_mib * 2 * ROUNDS_TOLD;
    source.wait_for(format!("load {rounds}\r\n").as_bytes())?;
    let mut command = (mover.target)(programs, &guest)?;
    command.current_dir(to.path());
    let mut target = Running::of(command)?;
    wait_for(&to.path().join(mover.waits))?;
    let (before, after) = (source.take_output()?, target.take_output()?);
    let (last, first) = scope(|threads| -> anyhow::Result<_> {
        let last = Builder::new().spawn_scoped(threads, || last_byte(before))?;
        let first = Builder::new().spawn_scoped(threads, || first_byte(after))?;
        let carried = (mover.carry)(programs, from.path(), to.path());
        let deadline = Instant::now() + PATIENCE;
        while carried.is_ok() && !first.is_finished() && Instant::now() < deadline {
            sleep(POLL);
        }
        // Ends the threads, too.
        drop(source);
        drop(target);
        let last = last.join().expect("it does not panic");
        let first = first.join().expect("it does not panic");
        carried?;
        Ok((last, first))
    })?;
    let first = first.context("the guest said nothing after its move")?;
    Ok(first.saturating_duration_since(last).as_secs_f64() * 1000.0)
}

/// When the last byte came, of a guest that has just written some.
fn last_byte(mut output: ChildStdout) -> Instant {
    let mut last = Instant::now();
    while let Ok(1..) = output.read(&mut [0; 4096]) {
        last = Instant::now();
    }
    last
}

/// When the first one came; reads on, so that nobody waits.
fn first_byte(mut output: ChildStdout) -> Option<Instant> {
    let Ok(1..) = output.read(&mut [0; 1]) else {
        return None;
    };
    Some(Instant::now())
}

/// Milliseconds of a save, from the request to its answer, and of a restore, from before the process to the guest's first
/// byte. Files are in memory.
type Snapshot = fn(&Programs) -> anyhow::Result<[f64; 2]>;

fn our_snapshot_ms(programs: &Programs) -> anyhow::Result<[f64; 2]> {
    let folder = folder()?;
    let mut command = OURS.command(programs, &at_work(64))?;
    command
        .args(["--api-socket", "api"])
        .current_dir(folder.path());
    let mut running = Running::of(command)?;
    running.wait_for(b"load 16384\r\n")?;
    let began = Instant::now();
    ctl(programs, folder.path(), &["snapshot", "--to", "saved"])?;
    let saved = began.elapsed();
    drop(running);
    let mut command = Command::new(programs.vmm());
    command.args(["run", "--restore", "saved", "--memory-mode", "map"]);
    command.current_dir(folder.path());
    Ok([saved, first_byte_after(command, || Ok(()))?].map(milliseconds))
}

fn firecracker_snapshot_ms(programs: &Programs) -> anyhow::Result<[f64; 2]> {
    let folder = folder()?;
    let program = programs.peer("firecracker")?;
    let mut command = Command::new(&program);
    command.args(["--api-sock", "api", "--config-file"]);
    command.arg(programs.firecracker_config(&at_work(64))?);
    command.current_dir(folder.path());
    let mut running = Running::of(command)?;
    running.wait_for(b"load 16384\r\n")?;
    let api = folder.path().join("api");
    let began = Instant::now();
    let paused = json!({"state": "Paused"});
    request(&api, "PATCH", "/vm", &paused)?;
    let files =
        json!({"snapshot_type": "Full", "snapshot_path": "state", "mem_file_path": "memory"});
    put(&api, "/snapshot/create", &files)?;
    let saved = began.elapsed();
    drop(running);
    let mut command = Command::new(&program);
    command
        .args(["--api-sock", "api-2"])
        .current_dir(folder.path());
    let api = folder.path().join("api-2");
    let memory = json!({"backend_type": "File", "backend_path": "memory"});
    let load = json!({"snapshot_path": "state", "mem_backend": memory, "resume_vm": true});
    let restored = first_byte_after(command, || {
        wait_for(&api)?;
        put(&api, "/snapshot/load", &load)
    })?;
    Ok([saved, restored].map(milliseconds))
}

fn first_byte_after(
    command: Command,
    ask: impl FnOnce() -> anyhow::Result<()>,
) -> anyhow::Result<Duration> {
    let began = Instant::now();
    let mut running = Running::of(command)?;
    ask()?;
    running.wait_for(b"l")?;
    Ok(began.elapsed())
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

/// A round of `load`, which writes 4 KiB to the disk and reads them back; each block is written for the first time. During
/// a backup, with these options of `begin-export`, or without.
fn write_us(programs: &Programs, backup: Option<&[&str]>) -> anyhow::Result<f64> {
    let folder = folder()?;
    let image = folder.path().join("image");
    std::fs::write(&image, vec![7; IMAGE_BYTES])?;
    let guest = Guest {
        disk: Some(Disk {
            path: image,
            format: "raw",
            access: Access::Cached,
            queues: 1,
        }),
        ..at_work(1)
    };
    let mut command = OURS.command(programs, &guest)?;
    command
        .args(["--api-socket", "api"])
        .current_dir(folder.path());
    let mut running = Running::of(command)?;
    running.wait_for(b"load 256\r\n")?;
    let mut reader = None;
    if let Some(options) = backup {
        let begin = [
            "begin-export",
            "--socket",
            "nbd",
            "--disks",
            "disk0",
            "--fleece",
            ".",
        ];
        ctl(programs, folder.path(), &[&begin, options].concat())?;
        let mut command = Command::new("sh");
        command.args([
            "-c",
            "while qemu-img convert -f raw -O raw nbd:unix:nbd copy; do :; done",
        ]);
        command.current_dir(folder.path()).stderr(Stdio::null());
        reader = Some(Running::of(command)?);
        wait_for(&folder.path().join("copy"))?;
    }
    running.wait_for(b"\r\n")?;
    let began = Instant::now();
    for _ in 0..LINES {
        running.wait_for(b"\r\n")?;
    }
    let rounds = f64::from(LINES) * ROUNDS_TOLD as f64;
    let us = began.elapsed().as_secs_f64() * 1e6 / rounds;
    drop(running);
    drop(reader);
    Ok(us)
}

/// `atoll-vmm ctl` for the machine in that folder; what it answers.
pub fn ctl(programs: &Programs, folder: &Path, arguments: &[&str]) -> anyhow::Result<Vec<u8>> {
    let mut command = Command::new(programs.vmm());
    command.args(["ctl", "--api-socket", "api"]).args(arguments);
    let output = command.current_dir(folder).output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    anyhow::ensure!(output.status.success(), "{said}");
    Ok(output.stdout)
}

fn wait_for(path: &Path) -> anyhow::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !path.exists() {
        anyhow::ensure!(Instant::now() < deadline, "no {}", path.display());
        sleep(POLL);
    }
    Ok(())
}

fn put(socket: &Path, path: &str, body: &Value) -> anyhow::Result<()> {
    request(socket, "PUT", path, body)
}

/// One request to a peer's control socket.
fn request(socket: &Path, method: &str, path: &str, body: &Value) -> anyhow::Result<()> {
    let mut stream = UnixStream::connect(socket).context("its control socket")?;
    let (body, host) = (body.to_string(), "Host: localhost\r\nAccept: */*");
    let length = body.len();
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\n{host}\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
    )?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut answer = [0; 1024];
    let count = stream.read(&mut answer)?;
    let answer = String::from_utf8_lossy(&answer[..count]);
    anyhow::ensure!(answer.starts_with("HTTP/1.1 2"), "{path}: {answer}");
    Ok(())
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Create, start and delete of a container that runs a program of three instructions: `atoll-ct` against crun and
//! runc, wall time and CPU time of everything that the runtime starts. Then of containers that stay (`living`).
//!
//! Needs root. crun refuses a hybrid cgroup hierarchy, so where there is one the suite runs itself again in a mount
//! namespace without the unified part. This process is the subreaper, as a container engine's monitor is.

mod bundle;
mod living;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use anyhow::Context as _;
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeVal;
use nix::sys::wait::waitpid;
use nix::unistd::Pid;

use crate::Bench;
use crate::table::{Figure, Row};

const PEERS: &[&str] = &["crun", "runc"];
const LIFE: &str = "container_create_start_delete";
const UNIFIED: &str = "/sys/fs/cgroup/unified";

/// The suite.
pub fn rows(bench: &Bench) -> Vec<Row> {
    if !bench.prepared && Path::new(UNIFIED).join("cgroup.controllers").exists() {
        return again(bench).unwrap_or_else(|error| absent(&error));
    }
    if let Err(error) = nix::sys::prctl::set_child_subreaper(true) {
        return absent(&anyhow::Error::new(error).context("become a subreaper"));
    }
    let mut rows = Vec::new();
    for peer in PEERS {
        match lives(bench, peer) {
            Ok(found) => rows.extend(found),
            Err(error) => rows.push(Row::absent(&Figure::cost(LIFE, "ms"), peer, &error)),
        }
    }
    rows.extend(living::rows(bench));
    rows
}

fn absent(error: &anyhow::Error) -> Vec<Row> {
    let row = |peer: &&str| Row::absent(&Figure::cost(LIFE, "ms"), peer, error);
    PEERS.iter().map(row).collect()
}

fn again(bench: &Bench) -> anyhow::Result<Vec<Row>> {
    let script = format!("umount {UNIFIED} && exec \"$@\"");
    let output = Command::new("unshare")
        .args(["--mount", "sh", "-c", &script, "sh"])
        .arg(std::env::current_exe()?)
        .args([
            "container",
            "--prepared",
            "--runs",
            &bench.runs.to_string(),
            "--bin-dir",
        ])
        .arg(&bench.bin_dir)
        .stderr(Stdio::piped())
        .output()
        .context("unshare")?;
    let complaint = String::from_utf8_lossy(&output.stderr);
    anyhow::ensure!(
        output.status.success(),
        "without the unified hierarchy: {}",
        complaint.trim()
    );
    Ok(String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(Row::parse)
        .collect())
}

fn lives(bench: &Bench, peer: &str) -> anyhow::Result<[Row; 2]> {
    let ours = bench.program("atoll-ct")?;
    let directory = tempfile::tempdir().context("temporary directory")?;
    let bundle = bundle::write(directory.path(), bundle::TRUE)?;
    let [ours, theirs] =
        [&ours, Path::new(peer)].map(|program| Runtime::new(program, directory.path()));
    let sides: [Side<'_>; 2] = [&mut |turn| life(&ours, &bundle, turn), &mut |turn| {
        life(&theirs, &bundle, turn)
    }];
    in_turns(LIFE, peer, bench.runs, sides)
}

/// One measurement of ours, or of a peer's.
type Side<'a> = &'a mut dyn FnMut(usize) -> anyhow::Result<Cost>;

/// Both measure in turns: a row of the time that passed, and one of CPU time.
fn in_turns(
    name: &str,
    peer: &str,
    turns: usize,
    [ours, theirs]: [Side<'_>; 2],
) -> anyhow::Result<[Row; 2]> {
    let (mut wall, mut cpu) = (Vec::new(), Vec::new());
    for turn in 0..=turns {
        let (us, them) = (ours(turn)?, theirs(turn)?);
        wall.push((us.wall_ms, them.wall_ms));
        cpu.push((us.cpu_ms, them.cpu_ms));
    }
    // The first turn read the programs from disk.
    let rows = [(name.to_owned(), &wall), (format!("{name}_cpu"), &cpu)];
    Ok(rows.map(|(name, pairs)| Row::pairs(&Figure::cost(&name, "ms"), peer, &pairs[1..])))
}

struct Cost {
    wall_ms: f64,
    cpu_ms: f64,
}

/// When something began.
struct Begin {
    time: Instant,
    cpu_ms: f64,
}

impl Begin {
    fn now() -> anyhow::Result<Self> {
        Ok(Self {
            time: Instant::now(),
            cpu_ms: cpu_of_children()?,
        })
    }

    /// What it has cost since then; of those children that were waited for.
    fn cost(&self) -> anyhow::Result<Cost> {
        Ok(Cost {
            wall_ms: self.time.elapsed().as_secs_f64() * 1000.0,
            cpu_ms: cpu_of_children()? - self.cpu_ms,
        })
    }
}

/// A runtime with a folder of its own for states.
struct Runtime {
    name: String,
    program: PathBuf,
    directory: PathBuf,
}

impl Runtime {
    fn new(program: &Path, directory: &Path) -> Self {
        let name = program.file_name().unwrap_or_default();
        Self {
            name: name.to_string_lossy().into_owned(),
            program: program.to_owned(),
            directory: directory.to_owned(),
        }
    }

    fn root(&self) -> PathBuf {
        self.directory.join(&self.name)
    }

    /// What the last command complained about.
    fn log(&self) -> PathBuf {
        self.directory.join(format!("{}.log", self.name))
    }

    /// An id that no other container has.
    fn id(&self, number: usize) -> String {
        format!("atoll-bench-{}-{}-{number}", std::process::id(), self.name)
    }

    fn pid_file(&self, id: &str) -> PathBuf {
        self.directory.join(format!("{id}.pid"))
    }

    /// Process id of a container's init, from its file.
    fn pid(&self, id: &str) -> anyhow::Result<Pid> {
        let text = fs::read_to_string(self.pid_file(id));
        let text = text.with_context(|| format!("{}: pid file", self.name))?;
        Ok(Pid::from_raw(text.trim().parse()?))
    }

    /// Starts a command of the runtime.
    fn spawn(&self, arguments: &[&str]) -> anyhow::Result<Child> {
        // Not pipes: the container inherits them, and reading one to its end would wait for the container.
        Command::new(&self.program)
            .arg("--root")
            .arg(self.root())
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(self.log())?)
            .spawn()
            .with_context(|| self.name.clone())
    }

    /// Runs a command of the runtime to its end.
    fn call(&self, arguments: &[&str]) -> anyhow::Result<()> {
        let status = self.spawn(arguments)?.wait()?;
        let log = self.log();
        let complaint = fs::read_to_string(&log).unwrap_or_default();
        let (name, command) = (&self.name, arguments[0]);
        anyhow::ensure!(status.success(), "{name} {command}: {}", complaint.trim());
        Ok(())
    }

    fn create(&self, bundle: &Path, id: &str) -> anyhow::Result<()> {
        let (bundle, pid_file) = (text(bundle), text(&self.pid_file(id)));
        self.call(&["create", "--bundle", &bundle, "--pid-file", &pid_file, id])
    }
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// One container from create to delete, its program's end waited for in between.
fn life(runtime: &Runtime, bundle: &Path, turn: usize) -> anyhow::Result<Cost> {
    let id = runtime.id(turn);
    let begin = Begin::now()?;
    runtime.create(bundle, &id)?;
    let started = runtime.call(&["start", &id]);
    let ended = started.and_then(|()| Ok(waitpid(runtime.pid(&id)?, None)?));
    let deleted = runtime.call(&["delete", &id]);
    let cost = begin.cost()?;
    if ended.is_err() || deleted.is_err() {
        // Leave nothing behind, whatever went wrong first.
        let _ = runtime.call(&["delete", "--force", &id]);
    }
    ended?;
    deleted?;
    Ok(cost)
}

/// Milliseconds of CPU of all children that were waited for, theirs included.
fn cpu_of_children() -> anyhow::Result<f64> {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN)?;
    let ms = |time: TimeVal| time.tv_sec() as f64 * 1000.0 + time.tv_usec() as f64 / 1000.0;
    Ok(ms(usage.user_time()) + ms(usage.system_time()))
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Containers that stay: a program more in one of them, a hundred that come up, and the memory of what watches them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use super::{Begin, PEERS, Runtime, Side, bundle, in_turns, text};
use crate::Bench;
use crate::table::{Contestant, Figure, Row, compare};

/// Containers that are there at the same time.
const MANY: usize = 100;
/// Turns of a hundred.
const TURNS: usize = 5;
/// Time for a monitor that has left its caller to write its container's process id.
const PATIENCE: Duration = Duration::from_secs(20);

const EXEC: &str = "container_exec";
const AT_ONCE: &str = "container_create_start_100_at_once";
const MEMORY: &str = "container_memory_of_monitor";

/// Rows of containers whose program waits for ever.
pub fn rows(bench: &Bench) -> Vec<Row> {
    let mut rows = Vec::new();
    for peer in PEERS {
        let found = prepare(bench, peer).and_then(|place| {
            let mut found = place.execs(bench.runs, peer)?;
            found.extend(place.hundreds(peer)?);
            Ok(found)
        });
        let absent = |error| {
            let row = |name| Row::absent(&Figure::cost(name, "ms"), peer, &error);
            [EXEC, AT_ONCE].map(row).into()
        };
        rows.extend(found.unwrap_or_else(absent));
    }
    let figure = Figure::cost(MEMORY, "KiB");
    match prepare(bench, PEERS[0]) {
        Ok(place) => rows.extend(place.memory(&figure)),
        Err(error) => rows.push(Row::absent(&figure, "conmon with crun", &error)),
    }
    rows
}

/// A bundle, ours and a peer.
struct Place {
    folder: tempfile::TempDir,
    bundle: PathBuf,
    ours: Runtime,
    peer: Runtime,
}

fn prepare(bench: &Bench, peer: &str) -> anyhow::Result<Place> {
    let folder = tempfile::tempdir().context("temporary directory")?;
    let runtime = |program: &Path| Runtime::new(program, folder.path());
    Ok(Place {
        bundle: bundle::write(folder.path(), bundle::PAUSE)?,
        ours: runtime(&bench.program("atoll-ct")?),
        peer: runtime(Path::new(peer)),
        folder,
    })
}

impl Place {
    /// `exec` of the smallest program, to its end, in one container a runtime.
    fn execs(&self, turns: usize, peer: &str) -> anyhow::Result<Vec<Row>> {
        let [ours, theirs] = [&self.ours, &self.peer].map(|runtime| Many::new(runtime, 1));
        for many in [&ours, &theirs] {
            many.runtime.create(&self.bundle, &many.ids[0])?;
            many.runtime.call(&["start", &many.ids[0]])?;
        }
        let exec = |many: &Many<'_>| {
            let begin = Begin::now()?;
            many.runtime.call(&["exec", &many.ids[0], bundle::TRUE])?;
            begin.cost()
        };
        let sides: [Side<'_>; 2] = [&mut |_| exec(&ours), &mut |_| exec(&theirs)];
        in_turns(EXEC, peer, turns, sides).map(Vec::from)
    }

    /// A hundred containers come up: all are created, one process each and none waited for, then all are started.
    fn hundreds(&self, peer: &str) -> anyhow::Result<Vec<Row>> {
        let come_up = |runtime: &Runtime| {
            let many = Many::new(runtime, MANY);
            let begin = Begin::now()?;
            let bundle = text(&self.bundle);
            many.all(|id| {
                let pid_file = text(&runtime.pid_file(id));
                runtime.spawn(&["create", "--bundle", &bundle, "--pid-file", &pid_file, id])
            })?;
            many.all(|id| runtime.spawn(&["start", id]))?;
            begin.cost()
        };
        let sides: [Side<'_>; 2] = [&mut |_| come_up(&self.ours), &mut |_| come_up(&self.peer)];
        in_turns(AT_ONCE, peer, TURNS, sides).map(Vec::from)
    }

    /// Proportional set size of a container's monitor, while a hundred have one: ours, and podman's with crun.
    fn memory(&self, figure: &Figure) -> Vec<Row> {
        let of = |runtime: &Runtime, create: &dyn Fn(&str) -> anyhow::Result<()>| {
            let many = Many::new(runtime, MANY);
            let mut sum = 0.0;
            for id in &many.ids {
                create(id)?;
                runtime.call(&["start", id])?;
            }
            for id in &many.ids {
                sum += pss_kib(parent(runtime.pid(id)?)?)?;
            }
            Ok(sum / MANY as f64)
        };
        let ours = Contestant {
            name: "ours",
            turns_max: usize::MAX,
            take: Box::new(|| {
                of(&self.ours, &|id| {
                    let (bundle, pid_file) = (text(&self.bundle), text(&self.ours.pid_file(id)));
                    let more = ["--bundle", &bundle, "--pid-file", &pid_file, id];
                    self.ours
                        .call(&[&["create", "--monitor"], &more[..]].concat())
                })
            }),
        };
        let conmon = Contestant {
            name: "conmon with crun",
            turns_max: usize::MAX,
            take: Box::new(|| of(&self.peer, &|id| self.conmon(id))),
        };
        compare(figure, 2, ours, vec![conmon])
    }

    /// Creates a container of the peer's with podman's monitor, which leaves its caller before it has.
    fn conmon(&self, id: &str) -> anyhow::Result<()> {
        let (folder, pid_file) = (self.folder.path(), self.peer.pid_file(id));
        let program = which(&self.peer.program)?;
        let (sockets, bundle) = (folder.join("sockets"), folder.join(format!("{id}.bundle")));
        fs::create_dir_all(&sockets)?;
        // It makes pipes in the bundle.
        fs::create_dir_all(&bundle)?;
        let config = "config.json";
        fs::copy(self.bundle.join(config), bundle.join(config))?;
        let log = format!("k8s-file:{}", folder.join(format!("{id}.log")).display());
        let status = Command::new("conmon")
            .args(["--cid", id, "--cuuid", id, "--log-path", &log])
            .arg("--runtime")
            .arg(program)
            .arg("--runtime-arg")
            .arg(format!("--root={}", self.peer.root().display()))
            .arg("--bundle")
            .arg(&bundle)
            .arg("--container-pidfile")
            .arg(&pid_file)
            .arg("--exit-dir")
            .arg(folder)
            .arg("--socket-dir-path")
            .arg(&sockets)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .context("conmon")?;
        anyhow::ensure!(status.success(), "conmon: {status}");
        let began = Instant::now();
        while fs::read_to_string(&pid_file).unwrap_or_default().is_empty() {
            anyhow::ensure!(began.elapsed() < PATIENCE, "conmon creates no container");
            sleep(Duration::from_millis(2));
        }
        Ok(())
    }
}

/// Containers of one runtime, removed by force in the end.
struct Many<'a> {
    runtime: &'a Runtime,
    ids: Vec<String>,
}

impl<'a> Many<'a> {
    fn new(runtime: &'a Runtime, count: usize) -> Self {
        let ids = (0..count).map(|number| runtime.id(number)).collect();
        Self { runtime, ids }
    }

    /// Starts a command for each, then waits for all.
    fn all(&self, spawn: impl Fn(&str) -> anyhow::Result<Child>) -> anyhow::Result<()> {
        let children: anyhow::Result<Vec<_>> = self.ids.iter().map(|id| spawn(id)).collect();
        for mut child in children? {
            let status = child.wait()?;
            anyhow::ensure!(status.success(), "{}: {status}", self.runtime.name);
        }
        Ok(())
    }
}

impl Drop for Many<'_> {
    fn drop(&mut self) {
        for id in &self.ids {
            let pid = self.runtime.pid(id);
            // What was not created is no news.
            let _ = self.runtime.call(&["delete", "--force", id]);
            let _ = fs::remove_file(self.runtime.pid_file(id));
            // A child of this process, but for those that have a monitor.
            let _ = pid.map(|pid| waitpid(pid, None));
        }
        // Monitors that have ended.
        while matches!(waitpid(None::<Pid>, Some(WaitPidFlag::WNOHANG)), Ok(status) if status != WaitStatus::StillAlive)
        {
        }
    }
}

/// A program on the path: conmon wants it absolute.
fn which(program: &Path) -> anyhow::Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut places = std::env::split_paths(&path).map(|folder| folder.join(program));
    let found = places.find(|place| place.is_file());
    found.with_context(|| format!("there is no {}", program.display()))
}

/// The parent of a container's init: its monitor.
fn parent(pid: Pid) -> anyhow::Result<Pid> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("PPid:"));
    let monitor = Pid::from_raw(line.context("no parent")?.trim().parse()?);
    anyhow::ensure!(monitor != nix::unistd::getpid(), "there is no monitor");
    Ok(monitor)
}

fn pss_kib(pid: Pid) -> anyhow::Result<f64> {
    let sizes = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let line = sizes.lines().find_map(|line| line.strip_prefix("Pss:"));
    let size = line.context("no Pss")?.trim().trim_end_matches(" kB");
    Ok(size.parse()?)
}

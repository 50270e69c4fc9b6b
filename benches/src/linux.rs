// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Linux guests: a stock Debian kernel whose only process does what the host asks for (`traffic`): streams, round trips and
//! small packets through a tap, by the VMM and by vhost-net, and requests on a disk. And its start, up to that process.
//!
//! Every guest is booted once, and all live side by side and idle while one of them is measured, so that turns are
//! seconds and not boots. Where KVM runs no Linux the suite goes to the lab (`lab`).

mod counts;
mod image;
mod lab;
mod together;

use std::cell::Cell;
use std::fs;
use std::io::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use atoll_benches::requests::Requests;
use atoll_benches::traffic::{self, Measured, Work as Done};

use self::counts::Counts;
use self::image::Image;
use crate::Bench;
use crate::monitor::{
    Access, CLOUD_HYPERVISOR, Card, Disk, FIRECRACKER, Guest, Monitor, OURS, Programs, QEMU_Q35,
    Running,
};
use crate::start::beyond_guest_kib;
use crate::table::{Aim, Contestant, Figure, Row, compare};
use crate::tap::{self, Tap};

const PEERS: &[Monitor] = &[CLOUD_HYPERVISOR, FIRECRACKER, QEMU_Q35];
/// Turns at most.
const TURNS_MAX: usize = 7;
const START_TURNS_MAX: usize = 3;
/// Of one measurement.
const TIME: Duration = Duration::from_millis(400);
/// Longest time of a boot.
const BOOT: Duration = Duration::from_secs(120);
const IMAGE_BYTES: usize = 64 << 20;

struct Work {
    name: &'static str,
    unit: &'static str,
    aim: Aim,
    what: Done,
}

const fn disk(name: &'static str, write: bool, random: bool, bytes: u32, depth: u32) -> Work {
    Work {
        name,
        unit: if random { "1/s" } else { "MiB/s" },
        aim: Aim::AtLeast("1.00"),
        what: Done::Disk(Requests {
            write,
            random,
            bytes,
            depth,
        }),
    }
}

const DISK_WORKS: &[Work] = &[
    disk("disk_random_read_4k_depth_1", false, true, 4096, 1),
    disk("disk_random_read_4k_depth_32", false, true, 4096, 32),
    disk("disk_random_write_4k_depth_32", true, true, 4096, 32),
    disk("disk_sequential_read", false, false, 256 << 10, 8),
    disk("disk_sequential_write", true, false, 256 << 10, 8),
];

const fn net(name: &'static str, unit: &'static str, aim: Aim, what: Done) -> Work {
    Work {
        name,
        unit,
        aim,
        what,
    }
}

const RATE: Aim = Aim::AtLeast("1.00");
const COST: Aim = Aim::AtMost("1.00");
const NET_WORKS: &[Work] = &[
    net("tcp_to_host", "MiB/s", RATE, Done::TcpToHost),
    net("tcp_to_guest", "MiB/s", RATE, Done::TcpToGuest),
    net("tcp_round_trip_p50", "us", COST, Done::TcpRoundTrip),
    net("udp_round_trip_p50", "us", COST, Done::UdpRoundTrip),
    net("udp_to_host", "packets/s", RATE, Done::UdpToHost),
    net("udp_to_guest", "packets/s", RATE, Done::UdpToGuest),
];

impl Work {
    fn figure(&self, prefix: &str) -> Figure {
        Figure {
            name: format!("linux_{prefix}{}", self.name),
            unit: self.unit,
            aim: self.aim,
        }
    }

    /// How much of the work's unit one of what is measured is.
    fn scale(&self) -> f64 {
        let bytes = match self.what {
            Done::Disk(what) => f64::from(what.bytes),
            _ => 1.0,
        };
        match self.unit {
            "MiB/s" => bytes / f64::from(1 << 20),
            _ => 1.0,
        }
    }

    /// One measurement of a guest, in the work's unit.
    fn measure(&self, guest: &Live) -> anyhow::Result<f64> {
        let address = SocketAddr::new(guest.tap.guest_address().into(), traffic::PORT);
        let measured = guest.counts.during(
            guest.running.id(),
            || traffic::measure(address, self.what, TIME),
            |Measured { count, .. }| count * self.scale(),
        )?;
        Ok(match self.unit {
            "us" => measured.value * 1e6,
            _ => measured.value * self.scale(),
        })
    }
}

const PREFIXES: [&str; 3] = ["", "net_", "vhost_net_"];

/// The suite, here or in the lab.
pub fn rows(bench: &Bench) -> Vec<Row> {
    let rows = || match &bench.guest {
        Some(folder) => here(bench, &Image::at(folder)),
        None if runs_linux(bench)? => {
            let folder = tempfile::tempdir()?;
            let stock = atoll_tests::lab::guest_image()?;
            let image = Image::make(folder.path(), &stock, &bench.guest_program()?)?;
            here(bench, &image)
        }
        None => lab::rows(bench),
    };
    rows().unwrap_or_else(|error| {
        let mut figures = vec![start_figure(), memory_figure()];
        figures.extend(together::figures(bench.guests));
        figures.extend(DISK_WORKS.iter().map(|work| work.figure(PREFIXES[0])));
        for prefix in &PREFIXES[1..] {
            figures.extend(NET_WORKS.iter().map(|work| work.figure(prefix)));
        }
        let absent = |figure| Row::absent(&figure, "-", &error);
        figures.into_iter().map(absent).collect()
    })
}

fn start_figure() -> Figure {
    Figure::cost("linux_start_to_init", "ms")
}

fn memory_figure() -> Figure {
    Figure::cost("linux_memory_beyond_guest", "KiB")
}

/// What `atoll-vmm probe` says about this host.
fn runs_linux(bench: &Bench) -> anyhow::Result<bool> {
    let mut probe = Command::new(bench.program("atoll-vmm")?);
    let output = probe.args(["probe", "--json"]).output()?;
    let said: serde_json::Value = serde_json::from_slice(&output.stdout).context("probe")?;
    Ok(said["linux"] == true)
}

fn here(bench: &Bench, image: &Image) -> anyhow::Result<Vec<Row>> {
    let programs = Programs::with_linux(bench, image.kernel.clone(), image.initrd.clone())?;
    let folder = tempfile::tempdir_in("/dev/shm").context("a folder for images")?;
    let (programs, folder) = (&programs, folder.path());
    tap::in_namespace(|| {
        let mut rows = starts(bench, programs, folder)?;
        rows.extend(together::rows(programs, bench.guests));
        let mut number = 0;
        let mut live = |monitor: &'static Monitor, vhost| {
            number += 1;
            let guest = Live::boot(programs, folder, monitor, number, vhost);
            (monitor.name, guest)
        };
        let ours = live(&OURS, false);
        let peers: Vec<_> = PEERS.iter().map(|peer| live(peer, false)).collect();
        let beside: Vec<_> = peers.iter().collect();
        for (works, prefix) in [(DISK_WORKS, PREFIXES[0]), (NET_WORKS, PREFIXES[1])] {
            rows.extend(
                works
                    .iter()
                    .flat_map(|work| work.rows(bench, prefix, &ours, &beside)),
            );
        }
        rows.extend(memory(&ours, &peers));
        // Cloud Hypervisor moves all packets itself.
        let (ours, qemu) = (live(&OURS, true), live(&QEMU_Q35, true));
        let without = peers
            .iter()
            .filter(|(name, _)| *name == CLOUD_HYPERVISOR.name);
        let beside: Vec<_> = without.chain([&qemu]).collect();
        let vhost = NET_WORKS.iter();
        rows.extend(vhost.flat_map(|work| work.rows(bench, PREFIXES[2], &ours, &beside)));
        Ok(rows)
    })
}

type Named = (&'static str, anyhow::Result<Live>);

impl Work {
    fn rows(&self, bench: &Bench, prefix: &str, ours: &Named, peers: &[&Named]) -> Vec<Row> {
        let contestants = peers.iter().map(|peer| self.contestant(peer)).collect();
        let turns = bench.runs.min(TURNS_MAX);
        let figure = self.figure(prefix);
        let mut rows = compare(&figure, turns, self.contestant(ours), contestants);
        let take = |(_, guest): &Named| guest.as_ref().ok()?.counts.take();
        let our_counts = take(ours);
        for (row, peer) in rows.iter_mut().zip(peers) {
            if let (Some(ours), Some(theirs)) = (our_counts, take(peer)) {
                row.add_note(&format!(
                    "exits for each {:.2} and {:.2}, interrupts {:.2} and {:.2}",
                    ours[0], theirs[0], ours[1], theirs[1]
                ));
            }
        }
        rows
    }

    fn contestant<'a>(&'a self, (name, guest): &'a Named) -> Contestant<'a> {
        Contestant {
            name,
            turns_max: usize::MAX,
            take: Box::new(move || match guest {
                Ok(guest) => self.measure(guest),
                Err(error) => Err(anyhow::anyhow!("{error:#}")),
            }),
        }
    }
}

/// From before the VMM's process is made until the guest's first process speaks. A row's note has what tells the VMM's
/// part from the guest's: the guest's own clock by then, and what KVM counted.
fn starts(bench: &Bench, programs: &Programs, folder: &Path) -> anyhow::Result<Vec<Row>> {
    let image = disk_image(folder, 0)?;
    let starts = |monitor| Starts {
        programs,
        image: &image,
        monitor,
        clock_ms: Cell::default(),
        counts: Counts::default(),
    };
    let (ours, peers) = (starts(&OURS), PEERS.iter().map(starts).collect::<Vec<_>>());
    let contestants = peers.iter().map(Starts::contestant).collect();
    let turns = bench.runs.min(START_TURNS_MAX);
    let mut rows = compare(&start_figure(), turns, ours.contestant(), contestants);
    let our_part = ours.seen();
    for (row, peer) in rows.iter_mut().zip(&peers) {
        row.add_note(&format!("ours: {our_part}; peer: {}", peer.seen()));
    }
    Ok(rows)
}

/// Starts of one VMM.
struct Starts<'a> {
    programs: &'a Programs,
    image: &'a Path,
    monitor: &'static Monitor,
    /// Of the last guest, when it spoke.
    clock_ms: Cell<f64>,
    counts: Counts,
}

impl Starts<'_> {
    fn contestant(&self) -> Contestant<'_> {
        Contestant {
            name: self.monitor.name,
            turns_max: self.monitor.turns_max().min(START_TURNS_MAX),
            take: Box::new(|| self.take()),
        }
    }

    fn take(&self) -> anyhow::Result<f64> {
        let tap = Tap::new(0)?;
        let guest = guest(&tap, self.image, false);
        let start = Instant::now();
        let mut running = Running::start(self.programs, self.monitor, &guest)?;
        running.wait_within(b"guest: init after ", BOOT)?;
        let time_ms = start.elapsed().as_secs_f64() * 1000.0;
        self.counts.add_whole(running.id());
        let said = running.wait_within(b" s", BOOT)?;
        let clock: f64 = said.trim_end_matches(" s").parse().context("its clock")?;
        self.clock_ms.set(clock * 1000.0);
        Ok(time_ms)
    }

    /// What was seen beside the time.
    fn seen(&self) -> String {
        let clock_ms = self.clock_ms.get();
        let counts = self.counts.take().map(|[exits, interrupts]| {
            format!(", {exits:.0} exits, {interrupts:.0} interrupts a start")
        });
        format!(
            "last guest's clock {clock_ms:.0} ms{}",
            counts.unwrap_or_default()
        )
    }
}

/// Once all that the guests do has been done.
fn memory(ours: &Named, peers: &[Named]) -> Vec<Row> {
    let kib = |(_, guest): &Named| match guest {
        Ok(guest) => beyond_guest_kib(&guest.running),
        Err(error) => Err(anyhow::anyhow!("{error:#}")),
    };
    let row = |peer: &Named| match (kib(ours), kib(peer)) {
        (Ok(ours), Ok(theirs)) => Row::pairs(&memory_figure(), peer.0, &[(ours, theirs)]),
        (Err(error), _) | (_, Err(error)) => Row::absent(&memory_figure(), peer.0, &error),
    };
    peers.iter().map(row).collect()
}

/// A guest that waits for work. Its tap goes after its VMM.
struct Live {
    running: Running,
    tap: Tap,
    counts: Counts,
}

impl Live {
    /// Boots it. One that does not come up is told and booted once again: emulated hosts lose one guest in about thirty.
    fn boot(
        programs: &Programs,
        folder: &Path,
        monitor: &Monitor,
        number: u8,
        vhost: bool,
    ) -> anyhow::Result<Self> {
        let image = disk_image(folder, number)?;
        let try_it = || {
            let tap = Tap::new(number)?;
            let mut running = Running::start(programs, monitor, &guest(&tap, &image, vhost))?;
            running.wait_within(b"guest: ready", BOOT)?;
            Ok(Self {
                running,
                tap,
                counts: Counts::default(),
            })
        };
        let name = monitor.name;
        try_it().or_else(|error: anyhow::Error| {
            let _ = writeln!(
                std::io::stderr(),
                "{name} did not come up: {error:#}; once again"
            );
            try_it()
        })
    }
}

fn guest(tap: &Tap, image: &Path, vhost: bool) -> Guest {
    Guest {
        cmdline: format!("console=ttyS0 quiet panic=-1 bench={}", tap.guest_address()),
        disk: Some(Disk {
            path: image.to_owned(),
            format: "raw",
            access: Access::Cached,
            queues: 1,
        }),
        card: Some(Card {
            tap: tap.name(),
            vhost,
        }),
    }
}

/// Without holes.
fn disk_image(folder: &Path, number: u8) -> anyhow::Result<PathBuf> {
    let path = folder.join(format!("{number}.raw"));
    fs::write(&path, vec![1; IMAGE_BYTES]).context("write an image")?;
    Ok(path)
}

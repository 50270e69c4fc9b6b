// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Disks: random 4 KiB requests, 32 of them in flight on each of one or four queues, and sequential ones of 256 KiB,
//! 8 in flight; and one of 4 KiB at a time, from the doorbell to its completion. The guest is the probe, which drives
//! the same virtio-pci disk on every VMM; sequential rows are also compared with this process doing the same without a
//! guest (`requests`).

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context as _;

use crate::Bench;
use crate::monitor::{
    self, Access, CLOUD_HYPERVISOR, Disk, FIRECRACKER, Guest, Monitor, OURS, Programs, QEMU_Q35,
};
use crate::table::{Aim, Contestant, Figure, Row, compare};
use atoll_benches::requests::{Requests, Span, transfer};

const MICROVMS: &[Monitor] = &[FIRECRACKER, CLOUD_HYPERVISOR];
/// With one whose start takes longer than all else together.
const ALL: &[Monitor] = &[FIRECRACKER, CLOUD_HYPERVISOR, QEMU_Q35];
/// Turns at most: each is up to five guests.
const TURNS_MAX: usize = 5;
const IMAGE_BYTES: usize = 256 << 20;

/// A place for images, and how they are opened there.
struct Medium {
    name: &'static str,
    format: &'static str,
    /// On a disk past the page cache, which would be measured otherwise.
    access: Access,
    folder: fn(&Bench) -> &Path,
    peers: &'static [Monitor],
    works: &'static [&'static [Work]],
    /// Moves the number of requests, so that each measurement takes about half a second.
    slowness: u64,
}

const MEDIA: &[Medium] = &[
    Medium {
        name: "raw_tmpfs",
        format: "raw",
        access: Access::Cached,
        folder: |_| Path::new("/dev/shm"),
        peers: ALL,
        works: &[MANY, SINGLE],
        slowness: 1,
    },
    Medium {
        name: "default_tmpfs",
        format: "raw",
        access: Access::Default,
        folder: |_| Path::new("/dev/shm"),
        peers: ALL,
        works: &[SINGLE],
        slowness: 1,
    },
    Medium {
        name: "raw_disk",
        format: "raw",
        access: Access::Direct,
        folder: |bench| &bench.folder,
        peers: MICROVMS,
        works: &[MANY],
        slowness: 4,
    },
    Medium {
        name: "qcow2_tmpfs",
        format: "qcow2",
        access: Access::Cached,
        folder: |_| Path::new("/dev/shm"),
        peers: MICROVMS,
        works: &[MANY],
        slowness: 1,
    },
    Medium {
        name: "qcow2_disk",
        format: "qcow2",
        access: Access::Direct,
        folder: |bench| &bench.folder,
        peers: MICROVMS,
        works: &[MANY],
        slowness: 4,
    },
];

/// What is done on each medium.
#[derive(Debug, Clone, Copy)]
struct Work {
    name: &'static str,
    /// As the probe calls it.
    operation: &'static str,
    /// Of one request.
    bytes: u32,
    /// Requests in flight on each queue.
    depth: u32,
    queues: u16,
    /// Requests in all.
    count: u64,
    unit: &'static str,
    aim: Aim,
}

impl Work {
    /// The same for the host itself.
    fn requests(&self) -> Requests {
        Requests {
            write: self.operation.ends_with("write"),
            random: !self.is_sequential(),
            bytes: self.bytes,
            depth: self.depth,
        }
    }

    fn is_sequential(&self) -> bool {
        !self.operation.starts_with("rand")
    }

    /// What `count` requests in that time are in the work's unit.
    fn value(&self, count: u64, ns: f64) -> f64 {
        let per_s = count as f64 * 1e9 / ns;
        match self.unit {
            "us" => 1e6 / per_s,
            "MiB/s" => per_s * f64::from(self.bytes) / f64::from(1 << 20),
            _ => per_s,
        }
    }
}

const fn random(name: &'static str, operation: &'static str, queues: u16) -> Work {
    Work {
        name,
        operation,
        bytes: 4096,
        depth: 32,
        queues,
        count: 60_000,
        unit: "1/s",
        aim: Aim::AtLeast("1.00"),
    }
}

const fn sequential(name: &'static str, operation: &'static str) -> Work {
    Work {
        name,
        operation,
        bytes: 256 << 10,
        depth: 8,
        queues: 1,
        count: 6_000,
        unit: "MiB/s",
        aim: Aim::AtLeast("0.95"),
    }
}

/// One at a time on one queue.
const fn single(name: &'static str, operation: &'static str) -> Work {
    Work {
        depth: 1,
        count: 10_000,
        unit: "us",
        aim: Aim::AtMost("1.00"),
        ..random(name, operation, 1)
    }
}

const MANY: &[Work] = &[
    random("random_read_4k_1_queue", "randread", 1),
    random("random_write_4k_1_queue", "randwrite", 1),
    random("random_read_4k_4_queues", "randread", 4),
    random("random_write_4k_4_queues", "randwrite", 4),
    sequential("sequential_read", "read"),
    sequential("sequential_write", "write"),
];

const SINGLE: &[Work] = &[
    single("doorbell_to_completion_read_4k", "randread"),
    single("doorbell_to_completion_write_4k", "randwrite"),
];

/// The suite.
pub fn rows(bench: &Bench) -> Vec<Row> {
    let mut rows = Vec::new();
    for medium in MEDIA {
        match rows_of(bench, medium) {
            Ok(found) => rows.extend(found),
            Err(error) => {
                let absent = |work: &Work| Row::absent(&figure(medium, work), "-", &error);
                rows.extend(medium.works.iter().copied().flatten().map(absent));
            }
        }
    }
    rows
}

fn figure(medium: &Medium, work: &Work) -> Figure {
    Figure {
        name: format!("disk_{}_{}", medium.name, work.name),
        unit: work.unit,
        aim: work.aim,
    }
}

fn rows_of(bench: &Bench, medium: &Medium) -> anyhow::Result<Vec<Row>> {
    let programs = Programs::find(bench)?;
    let folder = tempfile::tempdir_in((medium.folder)(bench)).context("a folder for images")?;
    let raw = raw_image(folder.path())?;
    let mut rows = Vec::new();
    for work in medium.works.iter().copied().flatten() {
        // Anew for each row: a VMM that had to be given up leaves its image marked as in use.
        let image = match medium.format {
            "raw" => raw.clone(),
            format => converted(&raw, format)?,
        };
        let work = Work {
            count: work.count / medium.slowness,
            ..*work
        };
        let disk = Disk {
            path: image.clone(),
            format: medium.format,
            access: medium.access,
            queues: work.queues,
        };
        let contestant = |monitor: &'static Monitor| Contestant {
            name: monitor.name,
            turns_max: monitor.turns_max(),
            take: Box::new({
                let (programs, disk) = (&programs, disk.clone());
                move || by_guest(programs, monitor, &work, disk.clone())
            }),
        };
        let mut peers: Vec<_> = medium.peers.iter().map(contestant).collect();
        if work.is_sequential() {
            let raw = raw.clone();
            peers.push(Contestant {
                name: "host",
                turns_max: TURNS_MAX,
                take: Box::new(move || {
                    let span = Span::Count(work.count);
                    let direct = medium.access == Access::Direct;
                    let done = transfer(&raw, direct, work.requests(), span)?;
                    Ok(work.value(done.count, done.time.as_secs_f64() * 1e9))
                }),
            });
        }
        let turns = bench.runs.min(TURNS_MAX);
        rows.extend(compare(
            &figure(medium, &work),
            turns,
            contestant(&OURS),
            peers,
        ));
    }
    Ok(rows)
}

fn by_guest(
    programs: &Programs,
    monitor: &Monitor,
    work: &Work,
    disk: Disk,
) -> anyhow::Result<f64> {
    let Work {
        operation,
        bytes,
        depth,
        queues,
        count,
        ..
    } = work;
    let guest = Guest {
        disk: Some(disk),
        ..Guest::default()
    };
    let text = format!("blk:{operation}:{bytes}:{depth}:{queues}:{count}");
    let ns = monitor::work(programs, monitor, guest, &text)?;
    Ok(work.value(*count, ns))
}

/// An image without holes or zeroes.
fn raw_image(folder: &Path) -> anyhow::Result<PathBuf> {
    let path = folder.join("image.raw");
    let mut file = fs::File::create(&path).context("create an image")?;
    let part: Vec<u8> = (0..1 << 20)
        .map(|index: u32| index.to_le_bytes()[1] | 1)
        .collect();
    for _ in 0..IMAGE_BYTES / part.len() {
        file.write_all(&part).context("write an image")?;
    }
    file.sync_all().context("write an image")?;
    Ok(path)
}

fn converted(raw: &Path, format: &str) -> anyhow::Result<PathBuf> {
    let path = raw.with_extension(format);
    let status = Command::new("qemu-img")
        .args(["convert", "-f", "raw", "-O", format])
        .args([raw, &path])
        .status()
        .context("qemu-img")?;
    anyhow::ensure!(status.success(), "qemu-img convert: {status}");
    Ok(path)
}

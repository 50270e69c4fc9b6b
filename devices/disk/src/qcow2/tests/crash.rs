// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Kills and crashes, at every moment: what reached an image's file during random requests is cut off after each write,
//! and what is left must have everything that was flushed, and nothing that was never there.
//!
//! A kill leaves a prefix of the writes. A crash of the host may lose any of those that no sync followed, too.

use std::path::Path;

use super::journal::{Event, Journal, record};
use super::random::Random;
use super::{check_but_leaks, check_image, done, qemu_img, source};
use crate::backend::{BlockBackend, Operation, Space};
use crate::conformance::{act, read, write};
use crate::open::{Cache, Format, OpenOptions, open};
use crate::qcow2::{Qcow2Options, create};

const SECTOR: usize = 512;
const REQUESTS: usize = 60;
/// Every how manieth event is cut at, and which of those cuts is looked at by qemu-img. More seeds see other ones:
/// `ATOLL_CRASH_SEEDS` says how many (1).
const STRIDE: usize = 7;
const QEMU_STRIDE: usize = STRIDE * 8;
const DISK_BYTES: u64 = 1 << 20;
/// What a disk grows to in the middle, in the cases that grow: the first-level table of small clusters moves.
const GROWN_BYTES: u64 = 3 << 20;
/// What is behind an image that has something behind it.
const BEHIND: u8 = 0xbe;

/// What a sector may hold.
type Values = Vec<u8>;

/// A request of the test, and how much had reached the file when it began and ended.
struct Step {
    begin: usize,
    end: usize,
    what: What,
}

#[derive(Clone, Copy)]
enum What {
    Write { at: usize, count: usize, byte: u8 },
    Discard { at: usize, count: usize },
    Flush,
}

impl What {
    /// What is in the sectors after it.
    fn carry_out(self, sectors: &mut [Values]) {
        match self {
            Self::Write { at, count, byte } => sectors[at..at + count].fill(vec![byte]),
            Self::Discard { .. } => self.may(sectors),
            Self::Flush => {}
        }
    }

    /// What may be in the sectors if it was under way.
    fn may(self, sectors: &mut [Values]) {
        let (at, count, byte) = match self {
            Self::Write { at, count, byte } => (at, count, byte),
            Self::Discard { at, count } => (at, count, 0),
            Self::Flush => return,
        };
        for values in &mut sectors[at..at + count] {
            values.push(byte);
        }
    }
}

/// Random requests, each recorded.
fn workload(
    disk: &dyn BlockBackend,
    journal: &Journal,
    random: &mut Random,
    grows: bool,
) -> Vec<Step> {
    let mut steps = Vec::new();
    let mut sectors = DISK_BYTES / SECTOR as u64;
    for round in 0..REQUESTS {
        if grows && round == REQUESTS / 2 {
            disk.resize(GROWN_BYTES).unwrap();
            sectors = GROWN_BYTES / SECTOR as u64;
        }
        let length_max = [3, 200][usize::from(random.below(3) == 0)];
        let count = 1 + random.below(length_max);
        let at = random.below(sectors - count);
        let (offset, length_bytes) = (at * SECTOR as u64, count * SECTOR as u64);
        let (at, count) = (
            usize::try_from(at).unwrap(),
            usize::try_from(count).unwrap(),
        );
        let begin = journal.len();
        let zeroes = disk.abilities().write_zeroes;
        let what = match random.below(8) {
            0 => {
                act(disk, offset, Operation::Discard { length_bytes }).unwrap();
                What::Discard { at, count }
            }
            1 | 2 if zeroes => {
                let space = [Space::Free, Space::Keep][usize::from(random.below(3) == 0)];
                let zero = Operation::WriteZeroes {
                    length_bytes,
                    space,
                };
                act(disk, offset, zero).unwrap();
                What::Write { at, count, byte: 0 }
            }
            3 => {
                act(disk, 0, Operation::Flush).unwrap();
                What::Flush
            }
            _ => {
                let byte = 1 + u8::try_from(random.below(0xb0)).unwrap();
                write(disk, offset, &vec![byte; count * SECTOR]).unwrap();
                What::Write { at, count, byte }
            }
        };
        let end = journal.len();
        steps.push(Step { begin, end, what });
    }
    steps
}

/// What the sectors may hold after the first `cut` events.
fn allowed(first: &[Values], steps: &[Step], cut: usize) -> Vec<Values> {
    let mut sectors = first.to_vec();
    let flushed = |step: &Step| matches!(step.what, What::Flush) && step.end <= cut;
    let safe = steps.iter().rposition(flushed).unwrap_or(0);
    for step in &steps[..safe] {
        step.what.carry_out(&mut sectors);
    }
    for step in steps[safe..].iter().filter(|step| step.begin <= cut) {
        step.what.may(&mut sectors);
    }
    sectors
}

fn apply(file: &mut Vec<u8>, event: &Event) {
    let mut range = |offset: u64, length: usize| {
        let start = usize::try_from(offset).unwrap();
        file.resize(file.len().max(start + length), 0);
        start..start + length
    };
    match event {
        Event::Write { offset, bytes } => {
            let range = range(*offset, bytes.len());
            file[range].copy_from_slice(bytes);
        }
        Event::Zeroes { offset, length } => {
            let range = range(*offset, usize::try_from(*length).unwrap());
            file[range].fill(0);
        }
        Event::Sync => {}
    }
}

fn contents(disk: &dyn BlockBackend) -> Vec<u8> {
    let mut all = vec![0; usize::try_from(disk.geometry().size_bytes).unwrap()];
    read(disk, 0, &mut all).unwrap();
    all
}

/// Opens what a crash left, and goes on with it.
fn check_left(path: &Path, case: &Case, sectors: &[Values], seed: u64, by_qemu: bool) {
    let marked = std::fs::read(path).unwrap()[79] & 1 != 0;
    if by_qemu && !marked && case.has_mark {
        check_image(path);
    }
    let options = OpenOptions {
        cache: Cache::Unsafe,
        discard: true,
        ..OpenOptions::default()
    };
    if by_qemu {
        open(&case.source(path), options).unwrap();
        check_but_leaks(path, !case.has_mark);
    }
    let disk = open(&case.source(path), options).unwrap();
    let mut found = contents(&*disk);
    for (number, (sector, values)) in found.chunks(SECTOR).zip(sectors).enumerate() {
        let same = sector.iter().all(|byte| *byte == sector[0]);
        assert!(
            same && values.contains(&sector[0]),
            "sector {number} is {:?}, not {values:?}",
            &sector[..8]
        );
    }
    // What is taken now must not be what is in use.
    let mut random = Random(seed);
    for _ in 0..20 {
        let at = usize::try_from(random.below(found.len() as u64 / 4096 - 1)).unwrap() * 4096;
        found[at..at + 4096].fill(0xdd);
        write(&*disk, at as u64, &[0xdd; 4096]).unwrap();
    }
    assert!(contents(&*disk) == found, "after more writes");
    drop(disk);
    if by_qemu {
        check_but_leaks(path, !case.has_mark);
    }
    let disk = open(&case.source(path), options).unwrap();
    assert!(contents(&*disk) == found, "after it was closed");
}

/// An image, and how it is tried.
struct Case {
    path: std::path::PathBuf,
    behind: Option<(std::path::PathBuf, Format)>,
    /// What its sectors hold at first.
    first: u8,
    has_mark: bool,
    grows: bool,
}

impl Case {
    /// This image at `path`.
    fn source(&self, path: &Path) -> crate::Source {
        let behind = self.behind.as_ref();
        let behind = behind.map(|(path, format)| (&**path, *format));
        source(path, behind.as_slice())
    }
}

fn check_case(case: &Case, seed: u64) {
    println!("seed {seed}, {}", case.path.display());
    let mut file = std::fs::read(&case.path).unwrap();
    let mut random = Random(seed);
    let options = OpenOptions {
        discard: true,
        ..OpenOptions::default()
    };
    let (journal, disk) = record(|| open(&case.source(&case.path), options).unwrap());
    // Closed after each request, or in use all the time.
    let queue = (seed % 2 == 1).then(|| disk.open_queue(1).unwrap());
    let steps = workload(&*disk, &journal, &mut random, case.grows);
    drop(queue);
    drop(disk);
    let events = journal.take();
    let sectors = usize::try_from(GROWN_BYTES).unwrap() / SECTOR;
    let mut first = vec![vec![case.first]; sectors];
    first[usize::try_from(DISK_BYTES).unwrap() / SECTOR..].fill(vec![0]);
    // What is in the file for sure, and what may be.
    let (mut synced, mut unsynced) = (file.clone(), 0);
    let left = case.path.with_extension("left");
    for cut in 0..=events.len() {
        let last = cut == events.len();
        let turn = cut + usize::try_from(seed).unwrap();
        if turn.is_multiple_of(STRIDE) || last {
            let allowed = allowed(&first, &steps, cut);
            let by_qemu = turn.is_multiple_of(QEMU_STRIDE) || last;
            println!("event {cut} of {}", events.len());
            std::fs::write(&left, &file).unwrap();
            check_left(&left, case, &allowed, seed, by_qemu);
            if cut - unsynced > 1 {
                let mut torn = synced.clone();
                let kept = |_: &&Event| random.below(2) == 0;
                events[unsynced..cut]
                    .iter()
                    .filter(kept)
                    .for_each(|event| apply(&mut torn, event));
                println!("and some after event {unsynced} lost");
                std::fs::write(&left, &torn).unwrap();
                check_left(&left, case, &allowed, seed, by_qemu);
            }
        }
        if let Some(event) = events.get(cut) {
            apply(&mut file, event);
            if matches!(event, Event::Sync) {
                (synced, unsynced) = (file.clone(), cut + 1);
            }
        }
    }
}

fn case(directory: &tempfile::TempDir, name: &str) -> Case {
    Case {
        path: directory.path().join(name),
        behind: None,
        first: 0,
        has_mark: true,
        grows: false,
    }
}

/// Checks each row with a seed of its own.
fn each<T: Copy>(rows: &[T], check: impl Fn(u64, T)) {
    let rounds = std::env::var("ATOLL_CRASH_SEEDS").map_or(1, |count| count.parse().unwrap());
    let turns = rows.iter().cycle().take(rows.len() * rounds);
    (0..).zip(turns).for_each(|(seed, row)| check(seed, *row));
}

#[test]
fn a_kill_or_a_crash_at_any_moment_loses_nothing_that_was_flushed() {
    each(&[512, 4096, 65536, 512], |seed, cluster_bytes| {
        let directory = tempfile::tempdir().unwrap();
        let case = Case {
            grows: true,
            ..case(&directory, "disk")
        };
        let options = Qcow2Options {
            cluster_bytes,
            ..Qcow2Options::default()
        };
        create(&case.path, DISK_BYTES, &options).unwrap();
        check_case(&case, seed);
    });
}

#[test]
fn a_crash_over_a_backing_file_keeps_what_is_copied_from_it() {
    each(&[65536, 4096], |seed, cluster_bytes| {
        let directory = tempfile::tempdir().unwrap();
        let base = directory.path().join("base");
        std::fs::write(&base, vec![BEHIND; usize::try_from(DISK_BYTES).unwrap()]).unwrap();
        let case = Case {
            first: BEHIND,
            behind: Some((base, Format::Raw)),
            grows: true,
            ..case(&directory, "disk")
        };
        let options = Qcow2Options {
            cluster_bytes,
            backing: Some(("base".to_owned(), Format::Raw)),
        };
        create(&case.path, DISK_BYTES, &options).unwrap();
        check_case(&case, seed);
    });
}

/// Compressed clusters of both kinds, and version 2, whose header has no place for a mark.
#[test]
fn a_crash_of_foreign_images() {
    let kinds = [
        "compat=1.1,compression_type=zlib",
        "compat=1.1,compression_type=zstd",
        "compat=1.1,compression_type=zlib,cluster_size=4k",
        "compat=0.10",
        "compat=0.10,cluster_size=4k",
    ];
    each(&kinds, |seed, options| {
        let directory = tempfile::tempdir().unwrap();
        let case = Case {
            first: BEHIND,
            has_mark: options.starts_with("compat=1.1"),
            ..case(&directory, "disk")
        };
        let raw = directory.path().join("raw");
        std::fs::write(&raw, vec![BEHIND; usize::try_from(DISK_BYTES).unwrap()]).unwrap();
        let text = |path: &Path| path.to_str().unwrap().to_owned();
        let (from, to) = (text(&raw), text(&case.path));
        if !done(qemu_img(&[
            "convert", "-c", "-O", "qcow2", "-o", options, &from, &to,
        ])) {
            return;
        }
        println!("{options}");
        check_case(&case, seed);
    });
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Against a model: a disk whose blocks hold version numbers, copies of it, and a file that forgets what was not
//! made durable.

use std::cell::RefCell;
use std::io;
use std::rc::Rc;
use std::sync::Arc;

use super::file::{ChangeFile, ImageStamp, Medium};
use super::{BlockSet, ChangeMap, CheckpointId, Found, Recorder, Tracked};
use crate::backend::{BlockBackend, BlockQueue, Geometry, Operation, Request};
use crate::dice::{Dice, seed};
use crate::{MemoryBackend, Segments, conformance};

const SECTOR: u64 = 512;
/// Smaller than the disk's last block is wide: the end cuts a block.
const SIZE_BYTES: u64 = SECTOR * 1001;
const BLOCK_BYTES: u32 = 2048;

/// What a host's crash leaves of a file: everything synced, and any sectors of what was written since.
#[derive(Default)]
struct Platter {
    durable: Vec<u8>,
    written: Vec<(u64, Vec<u8>)>,
    /// Operations until everything fails.
    left: Option<u64>,
}

#[derive(Clone, Default)]
struct Lossy(Rc<RefCell<Platter>>);

impl Platter {
    fn step(&mut self) -> io::Result<()> {
        match &mut self.left {
            Some(0) => return Err(io::ErrorKind::Other.into()),
            Some(left) => *left -= 1,
            None => {}
        }
        Ok(())
    }

    fn apply(&mut self, offset: u64, data: &[u8]) {
        let offset = usize::try_from(offset).unwrap();
        let end = offset + data.len();
        if self.durable.len() < end {
            self.durable.resize(end, 0);
        }
        self.durable[offset..end].copy_from_slice(data);
    }

    fn crash(&mut self, dice: &mut Dice) {
        for (offset, data) in std::mem::take(&mut self.written) {
            for (sector, part) in (0..).zip(data.chunks(512)) {
                if dice.roll(2) == 0 {
                    self.apply(offset + sector * SECTOR, part);
                }
            }
        }
        self.left = None;
    }
}

impl Medium for Lossy {
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let platter = self.0.borrow();
        assert!(
            platter.written.is_empty(),
            "read before what was written is durable"
        );
        let start = usize::try_from(offset).unwrap();
        let bytes = platter.durable.get(start..start + buffer.len());
        buffer.copy_from_slice(bytes.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn write_all_at(&mut self, data: &[u8], offset: u64) -> io::Result<()> {
        let mut platter = self.0.borrow_mut();
        platter.written.push((offset, data.to_vec()));
        platter.step()
    }

    fn sync(&mut self) -> io::Result<()> {
        let mut platter = self.0.borrow_mut();
        platter.step()?;
        for (offset, data) in std::mem::take(&mut platter.written) {
            platter.apply(offset, &data);
        }
        Ok(())
    }
}

/// A disk in RAM, whose every sector tells which write was its last.
struct Disk {
    tracked: Tracked,
    queue: Box<dyn BlockQueue>,
    /// What the sectors hold, as the model has it.
    sectors: Vec<u64>,
    version: u64,
    token: u64,
}

impl Disk {
    fn new(memory: &MemoryBackend, sectors: Vec<u64>) -> Self {
        let tracked = Tracked::new(Arc::new(memory.clone()));
        let queue = tracked.open_queue(64).unwrap();
        Self {
            tracked,
            queue,
            version: sectors.iter().copied().max().unwrap_or(0),
            sectors,
            token: 0,
        }
    }

    /// Submits a request somewhere that changes up to 16 KiB; it happens with the next `finish`.
    fn change(&mut self, dice: &mut Dice) {
        let first = dice.roll(SIZE_BYTES / SECTOR);
        let count = (1 + dice.roll(32)).min(SIZE_BYTES / SECTOR - first);
        let length_bytes = count * SECTOR;
        let operation = match dice.roll(4) {
            0 => Operation::Discard { length_bytes },
            _ => Operation::WriteZeroes {
                length_bytes,
                space: crate::Space::Keep,
            },
        };
        self.token += 1;
        let request = Request {
            token: self.token,
            operation,
            offset_bytes: first * SECTOR,
            segments: Segments::new(),
        };
        self.queue.submit(request).unwrap();
        self.version += 1;
        let first = usize::try_from(first).unwrap();
        self.sectors[first..first + usize::try_from(count).unwrap()].fill(self.version);
    }

    fn finish(&mut self) {
        self.queue.kick().unwrap();
        while self.queue.in_flight() > 0 {
            self.queue.complete(&mut Vec::new()).unwrap();
        }
    }
}

/// Every sector that differs from the copy must be in the set.
fn check(seed: u64, sectors: &[u64], copy: &[u64], blocks: &BlockSet) {
    for (index, (now, then)) in (0..).zip(sectors.iter().zip(copy)) {
        assert!(
            now == then || blocks.contains(index * SECTOR),
            "seed {seed}: sector {index} changed from {then} to {now} and is called unchanged"
        );
    }
}

/// A copy that was taken and may still fail.
struct Copying {
    name: CheckpointId,
    content: Vec<u64>,
}

/// Everything that outlives a run of the machine.
struct World {
    memory: MemoryBackend,
    sectors: Vec<u64>,
    file: Lossy,
    stamp: ImageStamp,
    copies: Vec<(CheckpointId, Vec<u64>)>,
    names: u8,
}

/// One run of a machine: `operations` of them, then a proper end or one of three crashes.
fn run(world: &mut World, dice: &mut Dice, seed: u64, operations: u64) -> Found {
    let mut disk = Disk::new(&world.memory, std::mem::take(&mut world.sectors));
    let file = ChangeFile::new(world.file.clone());
    let (mut recorder, found) =
        Recorder::open(file, &disk.tracked, world.stamp, BLOCK_BYTES).unwrap();
    let mut copying: Option<Copying> = None;
    for _ in 0..operations {
        match dice.roll(1000) {
            0..=989 => {
                disk.change(dice);
                if dice.roll(8) == 0 || disk.queue.in_flight() == 64 {
                    disk.finish();
                }
            }
            990..=993 if copying.is_none() => {
                disk.finish();
                let changes = recorder.begin().unwrap();
                let copies = world.copies.iter();
                let copy = changes.since.map(|since| {
                    let mut found = copies.rev().filter(|(name, _)| *name == since);
                    found
                        .next()
                        .expect("names a copy that was complete")
                        .1
                        .clone()
                });
                match copy {
                    Some(copy) => check(seed, &disk.sectors, &copy, &changes.blocks),
                    None => assert_eq!(changes.blocks.total_bytes(), SIZE_BYTES),
                }
                world.names = world.names % 250 + 1;
                copying = Some(Copying {
                    name: CheckpointId([world.names; 16]),
                    content: disk.sectors.clone(),
                });
            }
            994..=996 => match copying.take() {
                Some(copy) => {
                    recorder.commit(copy.name).unwrap();
                    world.copies = vec![(copy.name, copy.content)];
                }
                None => assert!(recorder.commit(CheckpointId([1; 16])).is_err()),
            },
            _ => match copying.take() {
                Some(_) => recorder.abort().unwrap(),
                None => assert!(recorder.abort().is_err()),
            },
        }
    }
    disk.finish();
    world.sectors = std::mem::take(&mut disk.sectors);
    drop(disk);
    world.stamp = stamp(dice);
    match dice.roll(8) {
        // The process is killed.
        0 => drop(recorder),
        // The host crashes, before or at some step of a proper end.
        1..=3 => {
            world.file.0.borrow_mut().left = Some(dice.roll(5));
            let _ = recorder.close(world.stamp);
        }
        // Somebody else writes to the image after a proper end.
        4 => {
            recorder.close(world.stamp).unwrap();
            world.sectors.fill(u64::from(u32::MAX) + dice.roll(1 << 20));
            world.stamp = stamp(dice);
        }
        _ => recorder.close(world.stamp).unwrap(),
    }
    world.file.0.borrow_mut().crash(dice);
    found
}

fn stamp(dice: &mut Dice) -> ImageStamp {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join(dice.roll(1 << 30).to_string());
    std::fs::write(&path, "").unwrap();
    ImageStamp::of(&std::fs::metadata(&path).unwrap())
}

#[test]
fn no_changed_block_is_called_unchanged_over_runs_and_crashes() {
    let seed = seed();
    let mut dice = Dice(seed);
    let geometry = Geometry {
        size_bytes: SIZE_BYTES,
        read_only: false,
    };
    let mut world = World {
        memory: MemoryBackend::new(geometry),
        sectors: vec![0; usize::try_from(SIZE_BYTES / SECTOR).unwrap()],
        file: Lossy::default(),
        stamp: ImageStamp::default(),
        copies: Vec::new(),
        names: 0,
    };
    let (mut kept, mut lost) = (0, 0);
    for _ in 0..400 {
        match run(&mut world, &mut dice, seed, 5000) {
            Found::Since(_) => kept += 1,
            Found::Nothing { .. } => lost += 1,
        }
    }
    // Both happen, or nothing was tested.
    assert!(kept > 50 && lost > 50, "kept {kept}, lost {lost}");
}

#[test]
fn a_running_disk_is_copied_by_taking_its_map_again_and_again() {
    let seed = seed();
    let mut dice = Dice(seed);
    let geometry = Geometry {
        size_bytes: SIZE_BYTES,
        read_only: false,
    };
    let memory = MemoryBackend::new(geometry);
    let mut disk = Disk::new(
        &memory,
        vec![0; usize::try_from(SIZE_BYTES / SECTOR).unwrap()],
    );
    let map = disk.tracked.watch(BLOCK_BYTES);
    // What the disk really holds now: a request takes effect when it is finished.
    let mut happened = disk.sectors.clone();
    let mut copy = happened.clone();
    let mut take = |map: &ChangeMap, happened: &[u64]| {
        for range in map.take().ranges() {
            let range = range.start / SECTOR..range.end.div_ceil(SECTOR);
            let range = usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap();
            copy[range.clone()].copy_from_slice(&happened[range]);
        }
    };
    for _ in 0..20_000 {
        disk.change(&mut dice);
        // The worst moment: marked, and not yet written.
        if dice.roll(3) == 0 {
            take(&map, &happened);
        }
        if disk.queue.in_flight() == 64 || dice.roll(3) == 0 {
            disk.finish();
            happened.clone_from(&disk.sectors);
        }
    }
    disk.finish();
    take(&map, &disk.sectors);
    assert!(
        copy == disk.sectors,
        "seed {seed}: the copy is not the disk"
    );
    disk.tracked.unwatch(&map);
    disk.change(&mut dice);
    disk.finish();
    assert!(
        map.take().is_empty(),
        "nobody marks a map that nobody watches"
    );
}

#[test]
fn tracking_is_a_disk_like_any_other() {
    conformance::check(|geometry| {
        let tracked = Tracked::new(Arc::new(MemoryBackend::new(geometry)));
        tracked.watch(4096);
        Box::new(tracked)
    });
}

#[test]
fn what_a_disk_grows_by_is_changed() {
    let geometry = Geometry {
        size_bytes: SIZE_BYTES,
        read_only: false,
    };
    let tracked = Tracked::new(Arc::new(MemoryBackend::new(geometry)));
    let map = tracked.watch(4096);
    tracked.resize(SIZE_BYTES + (1 << 20)).unwrap();
    let taken = map.take();
    assert_eq!(taken.size_bytes(), SIZE_BYTES + (1 << 20));
    // From the block that was cut off by the old end.
    let mut ranges = taken.ranges();
    let first = SIZE_BYTES / 4096 * 4096;
    assert_eq!(ranges.next(), Some(first..SIZE_BYTES + (1 << 20)));
    assert_eq!(ranges.next(), None);
}

#[test]
fn a_file_survives_the_process_on_a_real_file_system() {
    let directory = tempfile::tempdir().unwrap();
    let (image, record) = (
        directory.path().join("disk"),
        directory.path().join("changes"),
    );
    std::fs::write(&image, vec![0; 1 << 20]).unwrap();
    let source = crate::Source {
        path: image.clone(),
        format: crate::Format::Raw,
        backing: Vec::new(),
    };
    let stamp = || ImageStamp::of(&std::fs::metadata(&image).unwrap());
    let open = || {
        let disk = Tracked::new(crate::open(&source, crate::OpenOptions::default()).unwrap());
        let file = std::fs::File::options();
        let file = { file }
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&record);
        let file = ChangeFile::new(file.unwrap());
        let (recorder, found) = Recorder::open(file, &disk, stamp(), 65536).unwrap();
        (disk, recorder, found)
    };
    let (disk, mut recorder, found) = open();
    assert_eq!(
        found,
        Found::Nothing {
            reason: "it is new"
        }
    );
    let checkpoint = CheckpointId([7; 16]);
    assert_eq!(recorder.begin().unwrap().since, None);
    recorder.commit(checkpoint).unwrap();
    conformance::write(&disk, 70_000 / 512 * 512, &[1; 512]).unwrap();
    drop(disk);
    recorder.close(stamp()).unwrap();

    let (disk, mut recorder, found) = open();
    assert_eq!(found, Found::Since(checkpoint));
    let changes = recorder.begin().unwrap();
    assert_eq!(changes.since, Some(checkpoint));
    let mut ranges = changes.blocks.ranges();
    assert_eq!((ranges.next(), ranges.next()), (Some(65536..131_072), None));
    drop((disk, recorder));
    // Not closed: as after a kill.
    let (disk, recorder, found) = open();
    let reason = "the machine did not end properly";
    assert_eq!(found, Found::Nothing { reason });
    drop(disk);
    recorder.close(stamp()).unwrap();
    std::fs::write(&image, vec![1; 1 << 20]).unwrap();
    let reason = "the image was changed while no machine used it";
    assert_eq!(open().2, Found::Nothing { reason });
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Against a model: a guest whose every sector tells which write was its last, and disks that fail at any step.

use std::collections::HashMap;
use std::io;
use std::ops::ControlFlow;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::copier::Copier;
use super::{Follower, Mirror, MirrorOptions, SettleError};
use crate::alignment::AlignedBuffer;
use crate::backend::{BlockBackend, BlockQueue, Geometry, Operation, Request, Space};
use crate::changes::{BlockSet, ChangeMap, Tracked};
use crate::conformance::{read, write};
use crate::dice::{Dice, seed};
use crate::{Faulty, Format, Limited, Limits, MemoryBackend, OpenOptions, Source, Switchable};

const SECTOR: u64 = 512;
/// The end cuts a block, and a chunk.
const SIZE_BYTES: u64 = (2 << 20) + 7 * SECTOR;
const BLOCK_BYTES: u32 = 4096;
/// So that a pass has many.
const CHUNK_BYTES: u64 = 16 << 10;
const PATIENCE: Duration = Duration::from_secs(60);

fn memory() -> MemoryBackend {
    MemoryBackend::new(Geometry {
        size_bytes: SIZE_BYTES,
        read_only: false,
    })
}

fn content(disk: &dyn BlockBackend) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(disk.geometry().size_bytes).unwrap()];
    read(disk, 0, &mut bytes).unwrap();
    bytes
}

/// What the mirror may still do before something fails, and whether its target has been written since it was flushed.
#[derive(Default)]
struct Plan {
    left: AtomicI64,
    unflushed: AtomicBool,
}

impl Plan {
    fn step(&self) -> Option<io::ErrorKind> {
        let left = self.left.fetch_sub(1, Ordering::Relaxed);
        (left <= 0).then_some(io::ErrorKind::Other)
    }

    /// A disk that the guest never reads: its reads are the mirror's.
    fn source(self: &Arc<Self>, disk: &MemoryBackend) -> Arc<dyn BlockBackend> {
        let plan = self.clone();
        let fault = move |operation, _| match operation {
            Operation::Read => plan.step(),
            _ => None,
        };
        Arc::new(Faulty::new(disk.clone(), Arc::new(fault)))
    }

    fn target(self: &Arc<Self>, disk: &MemoryBackend) -> Arc<dyn BlockBackend> {
        let plan = self.clone();
        let fault = move |operation, _| {
            let writes = operation != Operation::Flush;
            plan.unflushed.store(writes, Ordering::Relaxed);
            plan.step()
        };
        Arc::new(Faulty::new(disk.clone(), Arc::new(fault)))
    }
}

/// Writes somewhere, with requests that wait, are under way, and are told to be done, at any time.
struct Guest {
    queue: Option<Box<dyn BlockQueue>>,
    disk: Arc<Tracked>,
    buffers: HashMap<u64, AlignedBuffer>,
    /// What the disk holds once all is done.
    model: Vec<u8>,
    token: u64,
}

impl Guest {
    fn new(disk: Arc<Tracked>, model: Vec<u8>) -> Self {
        Self {
            queue: None,
            disk,
            buffers: HashMap::new(),
            model,
            token: 0,
        }
    }

    fn queue(&mut self) -> &mut dyn BlockQueue {
        let disk = &self.disk;
        let queue = self
            .queue
            .get_or_insert_with(|| disk.open_queue(32).unwrap());
        &mut **queue
    }

    fn act(&mut self, dice: &mut Dice) {
        match dice.roll(8) {
            0..=4 if self.queue().in_flight() < 32 => self.submit(dice),
            5 => self.queue().kick().unwrap(),
            _ => {
                let mut done = Vec::new();
                self.queue().complete(&mut done).unwrap();
                for completion in done {
                    completion.result.unwrap();
                    self.buffers.remove(&completion.token);
                }
            }
        }
    }

    fn submit(&mut self, dice: &mut Dice) {
        let sectors = SIZE_BYTES / SECTOR;
        let first = dice.roll(sectors);
        let count = (1 + dice.roll(40)).min(sectors - first);
        let length_bytes = count * SECTOR;
        let length = usize::try_from(length_bytes).unwrap();
        let offset_bytes = first * SECTOR;
        self.token += 1;
        let mut buffer = AlignedBuffer::new(length, 512);
        let operation = match dice.roll(4) {
            0 => Operation::Discard { length_bytes },
            1 => Operation::WriteZeroes {
                length_bytes,
                space: Space::Keep,
            },
            _ => {
                for (index, sector) in (first..).zip(buffer.bytes().chunks_mut(512)) {
                    sector[..8].copy_from_slice(&self.token.to_le_bytes());
                    sector[8..16].copy_from_slice(&index.to_le_bytes());
                }
                Operation::Write
            }
        };
        let start = usize::try_from(offset_bytes).unwrap();
        self.model[start..start + length].copy_from_slice(buffer.bytes());
        let request = Request {
            token: self.token,
            operation,
            offset_bytes,
            segments: match operation {
                Operation::Write => buffer.segments(),
                _ => crate::Segments::new(),
            },
        };
        self.queue().submit(request).unwrap();
        self.buffers.insert(self.token, buffer);
    }

    /// As a machine that is held: what was submitted is done, and the queue is gone. Sometimes nobody looks how it went.
    fn hold(&mut self, dice: &mut Dice) {
        self.queue().kick().unwrap();
        if dice.roll(3) > 0 {
            self.queue().complete(&mut Vec::new()).unwrap();
        }
        self.queue = None;
        self.buffers.clear();
    }
}

/// One mirror from its beginning to its end. Whether it came to a switch.
fn mirror(world: &mut World, dice: &mut Dice, seed: u64) -> bool {
    let plan = Arc::new(Plan::default());
    let steps = match dice.roll(3) {
        0 => i64::MAX,
        _ => i64::try_from(dice.roll(400)).unwrap(),
    };
    plan.left.store(steps, Ordering::Relaxed);
    let switchable = Arc::new(Switchable::new(plan.source(&world.source)));
    let tracked = Arc::new(Tracked::new(switchable.clone()));
    let mut guest = Guest::new(tracked.clone(), std::mem::take(&mut world.model));
    let target = plan.target(&world.target);
    switchable.check(&*target).unwrap();

    let map = tracked.watch(BLOCK_BYTES);
    map.put_back(&BlockSet::all(SIZE_BYTES, BLOCK_BYTES));
    let mut follower = Follower {
        copier: Copier::open(&*switchable, &*target, CHUNK_BYTES).unwrap(),
        map: map.clone(),
        unflushed_bytes: Some(0),
        unflushed_bytes_max: 64 << 10,
    };
    for _ in 0..dice.roll(6) {
        for _ in 0..dice.roll(200) {
            guest.act(dice);
        }
        let set = map.take();
        let passed = follower.pass(&set, |_| {
            // While other chunks are under way.
            for _ in 0..dice.roll(4) {
                guest.act(dice);
            }
            match dice.roll(2000) {
                0 => ControlFlow::Break(()),
                _ => ControlFlow::Continue(()),
            }
        });
        if passed.is_err() {
            drop(follower);
            return given_up(world, guest, dice, seed);
        }
    }
    guest.hold(dice);
    if !settle(&mut follower, &map) {
        return given_up(world, guest, dice, seed);
    }
    assert!(
        !plan.unflushed.load(Ordering::Relaxed),
        "seed {seed}: the target was not flushed at the end"
    );
    // The memory itself: the plan has failures left, perhaps.
    assert!(
        content(&world.target) == guest.model,
        "seed {seed}: the target is not what the guest wrote"
    );
    assert!(
        content(&world.source) == guest.model,
        "seed {seed}: the source"
    );
    drop(follower);
    switchable.switch_to(Arc::new(world.target.clone()));
    for _ in 0..200 {
        guest.act(dice);
    }
    guest.hold(dice);
    assert!(
        content(&world.target) == guest.model,
        "seed {seed}: after the switch"
    );
    world.model = guest.model;
    std::mem::swap(&mut world.source, &mut world.target);
    true
}

fn settle(follower: &mut Follower, map: &ChangeMap) -> bool {
    loop {
        let set = map.take();
        let go_on = |_| ControlFlow::Continue(());
        if follower.pass(&set, go_on).is_err() {
            return false;
        }
        if set.is_empty() {
            return true;
        }
    }
}

/// A mirror that failed: the guest has not noticed.
fn given_up(world: &mut World, mut guest: Guest, dice: &mut Dice, seed: u64) -> bool {
    for _ in 0..200 {
        guest.act(dice);
    }
    guest.hold(dice);
    assert!(
        content(&world.source) == guest.model,
        "seed {seed}: the source is not what the guest wrote"
    );
    world.model = guest.model;
    false
}

/// What outlives a mirror. A target has what an earlier one has left there.
struct World {
    source: MemoryBackend,
    target: MemoryBackend,
    model: Vec<u8>,
}

#[test]
fn a_target_is_the_disk_at_the_switch_and_a_failure_is_nobody_elses() {
    let seed = seed();
    let mut dice = Dice(seed);
    let source = memory();
    let mut world = World {
        model: content(&source),
        source,
        target: memory(),
    };
    let (mut switched, mut failed) = (0, 0);
    for _ in 0..200 {
        match mirror(&mut world, &mut dice, seed) {
            true => switched += 1,
            false => failed += 1,
        }
    }
    // Both happen, or nothing was tested.
    assert!(
        switched > 30 && failed > 30,
        "{switched} switched, {failed} failed"
    );
}

/// However much there is to copy, a flush never has much to do.
#[test]
fn a_long_pass_is_made_durable_in_portions() {
    let (unflushed, most) = (Arc::new(AtomicI64::new(0)), Arc::new(AtomicI64::new(0)));
    let (now, seen) = (unflushed.clone(), most.clone());
    let count = move |operation, _| {
        match operation {
            Operation::Flush => now.store(0, Ordering::Relaxed),
            _ => drop(seen.fetch_max(now.fetch_add(1, Ordering::Relaxed) + 1, Ordering::Relaxed)),
        }
        None
    };
    let (source, target) = (memory(), memory());
    write(&source, 0, &[1; 4096]).unwrap();
    let counted = Faulty::new(target.clone(), Arc::new(count));
    let tracked = Tracked::new(Arc::new(source.clone()));
    let mut follower = Follower {
        copier: Copier::open(&source, &counted, CHUNK_BYTES).unwrap(),
        map: tracked.watch(BLOCK_BYTES),
        unflushed_bytes: Some(0),
        unflushed_bytes_max: 4 * CHUNK_BYTES,
    };
    let go_on = |_| ControlFlow::Continue(());
    let all = BlockSet::all(SIZE_BYTES, BLOCK_BYTES);
    follower.pass(&all, go_on).unwrap();
    assert_eq!(most.load(Ordering::Relaxed), 4);
    assert!(content(&target) == content(&source));
    let none = BlockSet::new(SIZE_BYTES, BLOCK_BYTES);
    follower.pass(&none, go_on).unwrap();
    assert_eq!(unflushed.load(Ordering::Relaxed), 0);
}

fn free() -> MirrorOptions {
    MirrorOptions {
        bytes_per_second: None,
        slow_down: Box::new(|_| {}),
    }
}

#[test]
fn several_queues_write_while_a_thread_copies() {
    for round in 0..10 {
        let memory = memory();
        let switchable = Arc::new(Switchable::new(Arc::new(memory.clone())));
        let tracked = Arc::new(Tracked::new(switchable.clone()));
        write(&*tracked, 1 << 20, &[77; 4096]).unwrap();
        let target = self::memory();
        write(&target, 0, &[99; 1 << 20]).unwrap();
        let mirror = Mirror::begin(tracked.clone(), &target, free()).unwrap();
        std::thread::scope(|scope| {
            for number in 0..3_u8 {
                let tracked = &tracked;
                scope.spawn(move || {
                    for step in 0..300 {
                        let sector = (step * 7919 + u64::from(number)) % (SIZE_BYTES / SECTOR);
                        write(&**tracked, sector * SECTOR, &[number + round; 512]).unwrap();
                    }
                });
            }
        });
        mirror.settle(PATIENCE).unwrap();
        assert!(content(&memory) == content(&target));
        let told = mirror.progress();
        assert_eq!((told.left_bytes, told.failed), (0, None));
        assert!(told.copied_bytes >= SIZE_BYTES);
        drop(mirror);
        assert!(content(&memory) == content(&target));
    }
}

#[test]
fn a_limit_holds_until_the_end_and_no_longer() {
    let tracked = Arc::new(Tracked::new(Arc::new(memory())));
    write(&*tracked, 0, &[1; 512]).unwrap();
    let target = memory();
    let options = MirrorOptions {
        bytes_per_second: Some(1),
        ..free()
    };
    let mirror = Mirror::begin(tracked, &target, options).unwrap();
    mirror.settle(PATIENCE).unwrap();
    assert_eq!(content(&target)[0], 1);
    // And an end does not wait for it.
    let tracked = Arc::new(Tracked::new(Arc::new(memory())));
    let options = MirrorOptions {
        bytes_per_second: Some(1),
        ..free()
    };
    drop(Mirror::begin(tracked, &target, options).unwrap());
}

#[test]
fn a_target_that_fails_or_hangs_keeps_nobody() {
    let tracked = Arc::new(Tracked::new(Arc::new(memory())));
    let fails =
        |operation, _| (operation != Operation::Flush).then_some(io::ErrorKind::StorageFull);
    let target = Faulty::new(memory(), Arc::new(fails));
    let told = Arc::new(Mutex::new(Vec::new()));
    let telling = told.clone();
    let options = MirrorOptions {
        bytes_per_second: None,
        slow_down: Box::new(move |rate| telling.lock().unwrap().push(rate)),
    };
    let mirror = Mirror::begin(tracked.clone(), &target, options).unwrap();
    let error = mirror.settle(PATIENCE).unwrap_err().to_string();
    assert!(
        error.starts_with("the mirror has failed: write to the target: "),
        "{error}"
    );
    assert!(mirror.progress().failed.is_some());
    write(&*tracked, 0, &[1; 512]).unwrap();
    drop(mirror);
    assert_eq!(*told.lock().unwrap(), [None], "not slowed down for ever");

    let gate = Arc::new(Mutex::new(()));
    let closed = gate.lock().unwrap();
    let waiting = gate.clone();
    let hangs = move |_, _| {
        drop(waiting.lock().unwrap());
        None
    };
    let target = Faulty::new(memory(), Arc::new(hangs));
    let mirror = Mirror::begin(tracked.clone(), &target, free()).unwrap();
    let late = mirror.settle(Duration::from_millis(20)).unwrap_err();
    assert!(matches!(late, SettleError::Late(_)), "{late}");
    write(&*tracked, 0, &[2; 512]).unwrap();
    drop(closed);
    mirror.settle(PATIENCE).unwrap();
}

/// A queue that is held back would never be done by itself: its limit is what is looked at.
#[test]
fn a_guest_can_be_slowed_down_beside_its_limits() {
    let disk = Limited::new(Arc::new(memory()), Limits::default());
    let data = [1; 4096];
    disk.slow_writes(Some(1));
    // A burst of one byte admits one request, and its debt is more than an hour.
    write(&disk, 0, &data).unwrap();
    let mut buffer = AlignedBuffer::new(512, 512);
    let mut queue = disk.open_queue(4).unwrap();
    for (token, operation) in [(1, Operation::Read), (2, Operation::Write)] {
        let request = Request {
            token,
            operation,
            offset_bytes: 0,
            segments: buffer.segments(),
        };
        queue.submit(request).unwrap();
        queue.kick().unwrap();
    }
    let mut done = Vec::new();
    queue.complete(&mut done).unwrap();
    let tokens = |done: &[crate::Completion]| done.iter().map(|one| one.token).collect::<Vec<_>>();
    assert_eq!(tokens(&done), [1], "a read goes through");
    // Other limits do not end it, its own end does.
    disk.set(Limits::default());
    queue.kick().unwrap();
    queue.complete(&mut done).unwrap();
    assert_eq!(tokens(&done), [1]);
    disk.slow_writes(None);
    queue.kick().unwrap();
    queue.complete(&mut done).unwrap();
    assert_eq!(tokens(&done), [1, 2]);
    drop(queue);
    buffer.bytes().fill(0);
}

fn qemu_img(arguments: &[&str], directory: &Path) {
    let mut command = Command::new("qemu-img");
    let output = command.current_dir(directory).args(arguments).output();
    let output = output.unwrap_or_else(|error| panic!("qemu-img: {error}"));
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "qemu-img {arguments:?}: {error}");
}

#[test]
fn images_become_what_the_disk_is_and_holes_stay() {
    const BYTES: u64 = 64 << 20;
    let directory = tempfile::tempdir().unwrap();
    let file = std::fs::File::create(directory.path().join("source")).unwrap();
    file.set_len(BYTES).unwrap();
    let file = std::fs::File::create(directory.path().join("raw")).unwrap();
    file.set_len(BYTES).unwrap();
    qemu_img(
        &["create", "-q", "-f", "qcow2", "qcow2", "64M"],
        directory.path(),
    );
    let open = |name: &str, format| {
        let source = Source {
            path: directory.path().join(name),
            format,
            backing: Vec::new(),
        };
        crate::open(&source, OpenOptions::default()).unwrap()
    };
    for (name, format) in [("raw", Format::Raw), ("qcow2", Format::Qcow2)] {
        let disk = Arc::new(Tracked::new(open("source", Format::Raw)));
        for place in [0, 5 << 20, BYTES - 4096] {
            write(&*disk, place, &[5; 4096]).unwrap();
        }
        let target = open(name, format);
        let mirror = Mirror::begin(disk.clone(), &*target, free()).unwrap();
        write(&*disk, 9 << 20, &[6; 512]).unwrap();
        mirror.settle(PATIENCE).unwrap();
        drop((mirror, target, disk));
        qemu_img(
            &[
                "compare",
                "-q",
                "-f",
                "raw",
                "-F",
                format.name(),
                "source",
                name,
            ],
            directory.path(),
        );
        let metadata = std::fs::metadata(directory.path().join(name)).unwrap();
        let used = std::os::unix::fs::MetadataExt::blocks(&metadata) * 512;
        assert!(used < 8 << 20, "{name} takes {used} bytes");
    }
    qemu_img(&["check", "-q", "qcow2"], directory.path());
}

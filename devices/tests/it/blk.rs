// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Block device: requests on several queues, errors of the backend, pause and reset with requests in flight.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use atoll_devices::testing::{Driver, Segment};
use atoll_devices::virtio::blk::{Blk, BlkOptions};
use atoll_disk::{
    BlockBackend, Cache, Faulty, Format, Geometry, Limited, Limits, MemoryBackend, OpenOptions,
    Operation, Source,
};

pub(crate) const DISK_BYTES: u64 = 1 << 20;
const HEADER: u64 = 0x10_0000;
const STATUS: u64 = 0x10_1000;
const DATA: u64 = 0x20_0000;

pub(crate) fn memory_disk() -> MemoryBackend {
    MemoryBackend::new(Geometry {
        size_bytes: DISK_BYTES,
        read_only: false,
    })
}

pub(crate) fn disk(backend: impl BlockBackend + 'static, queue_count: u16) -> Arc<Blk> {
    Arc::new(Blk::new(BlkOptions {
        name: "blk0".to_owned(),
        backend: Arc::new(backend),
        serial: "a-serial-that-is-longer-than-20".to_owned(),
        queue_count,
    }))
}

pub(crate) fn device(backend: impl BlockBackend + 'static, queue_count: u16) -> Driver {
    Driver::new(disk(backend, queue_count))
}

/// Runs one request with `size` bytes of data at [`DATA`]; returns status and used length.
pub(crate) fn run(
    driver: &mut Driver,
    queue: usize,
    kind: u32,
    sector: u64,
    size: u32,
) -> (u8, u32) {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    driver.put(HEADER, &header);
    driver.put(STATUS, &[0xee]);
    let data = Segment {
        address: DATA - u64::from(size) / 2, // Across the border of the two regions.
        size,
        writable: kind != 1,
    };
    let mut chain = vec![Segment::readable(HEADER, 16)];
    chain.extend((size > 0).then_some(data));
    chain.push(Segment::writable(STATUS, 1));
    let head = driver.add(queue, &chain);
    driver.kick(queue);
    let (used, written) = driver.wait_used(queue);
    assert_eq!(used, head);
    (driver.get(STATUS, 1)[0], written)
}

fn write_then_read(driver: &mut Driver, queue: usize) {
    let data: Vec<u8> = (0..=255).cycle().take(8192).collect();
    driver.put(DATA - 4096, &data);
    assert_eq!(run(driver, queue, 1, 3, 8192), (0, 1));
    assert_eq!(run(driver, queue, 4, 0, 0), (0, 1));
    driver.put(DATA - 4096, &[0; 8192]);
    assert_eq!(run(driver, queue, 0, 3, 8192), (0, 8193));
    assert_eq!(driver.get(DATA - 4096, 8192), data);
}

#[test]
fn writes_flushes_and_reads_on_each_queue() {
    let mut driver = device(memory_disk(), 3);
    driver.start(u64::MAX);
    for queue in 0..3 {
        write_then_read(&mut driver, queue);
    }
    let (counters, _) = driver.device.counters();
    assert!(
        counters.contains(&("written_bytes", 3 * 8192)),
        "{counters:?}"
    );
}

#[test]
fn a_raw_file_with_io_uring() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk");
    std::fs::File::create(&path)
        .unwrap()
        .set_len(DISK_BYTES)
        .unwrap();
    let source = Source {
        path,
        format: Format::Raw,
        backing: Vec::new(),
    };
    let backend = atoll_disk::open(&source, OpenOptions::default()).unwrap();
    let mut driver = device(backend, 2);
    driver.start(u64::MAX);
    for _ in 0..300 {
        write_then_read(&mut driver, 0);
    }
    write_then_read(&mut driver, 1);
}

#[test]
fn configuration_and_identity() {
    let mut driver = device(memory_disk(), 3);
    assert_eq!(
        u64::from_le_bytes(driver.device_config(0)),
        DISK_BYTES / 512
    );
    assert_eq!(u32::from_le_bytes(driver.device_config(12)), 254);
    assert_eq!(u16::from_le_bytes(driver.device_config(34)), 3);
    assert_eq!(driver.device_config::<8>(0xffc), [0; 8]);
    driver.start(u64::MAX);
    assert_eq!(run(&mut driver, 0, 8, 0, 20), (0, 21));
    assert_eq!(driver.get(DATA - 10, 20), b"a-serial-that-is-lon");
}

#[test]
fn what_cannot_be_done_is_answered() {
    let mut driver = device(memory_disk(), 1);
    driver.start(u64::MAX);
    let last = DISK_BYTES / 512;
    assert_eq!(run(&mut driver, 0, 0, last, 512), (1, 1));
    assert_eq!(run(&mut driver, 0, 1, u64::MAX, 512), (1, 1));
    assert_eq!(run(&mut driver, 0, 0, u64::MAX / 512 + 1, 512), (1, 1));
    assert_eq!(run(&mut driver, 0, 0, 0, 511), (1, 1));
    assert_eq!(run(&mut driver, 0, 99, 0, 512), (2, 1));
    assert_eq!(driver.status(), 15);
    write_then_read(&mut driver, 0);
}

#[test]
fn read_only_and_failing_disks() {
    let geometry = Geometry {
        size_bytes: DISK_BYTES,
        read_only: true,
    };
    let mut driver = device(MemoryBackend::new(geometry), 1);
    assert_ne!(driver.offered() & 1 << 5, 0);
    driver.start(!(1 << 5));
    assert_eq!(
        run(&mut driver, 0, 1, 0, 512),
        (1, 1),
        "also when the driver ignores it"
    );
    assert_eq!(run(&mut driver, 0, 0, 0, 512), (0, 513));

    let fault = |operation, _| (operation == Operation::Flush).then_some(io::ErrorKind::Other);
    let mut driver = device(Faulty::new(memory_disk(), Arc::new(fault)), 1);
    driver.start(u64::MAX);
    assert_eq!(run(&mut driver, 0, 4, 0, 0), (1, 1));
    assert_eq!(run(&mut driver, 0, 1, 0, 512), (0, 1));
    driver.reset();
    // A driver that knows no flush has its writes made durable one by one, so the fault is seen.
    driver.start(!(1 << 9));
    assert_eq!(run(&mut driver, 0, 1, 0, 512), (1, 1));
}

/// The interrupt is asked for by the event index, one for a batch.
#[test]
fn event_index_suppresses_interrupts() {
    let mut driver = device(memory_disk(), 1);
    driver.start(u64::MAX);
    // The driver wants to hear of the 8th completion only.
    let ring = driver.rings[0];
    driver.put(
        ring.available + 4 + 2 * u64::from(ring.size),
        &7u16.to_le_bytes(),
    );
    driver.put(HEADER, &[0; 16]);
    for round in 0..8 {
        assert_eq!(driver.interrupts.take(1), 0, "round {round}");
        let chain = [
            Segment::readable(HEADER, 16),
            Segment::writable(DATA, 512),
            Segment::writable(STATUS, 1),
        ];
        driver.add(0, &chain);
        driver.kick(0);
        driver.wait_used(0);
    }
    assert!(driver.interrupts.wait(1, Duration::from_secs(20)));
}

#[test]
fn pause_keeps_the_rings_and_reset_forgets_them() {
    let mut driver = device(memory_disk(), 2);
    driver.start(u64::MAX);
    for round in 0..20 {
        write_then_read(&mut driver, round % 2);
        driver.device.pause();
        driver.device.resume().unwrap();
    }
    // What is offered while it is paused is served after it.
    driver.device.pause();
    driver.put(HEADER, &[0; 16]);
    let chain = [
        Segment::readable(HEADER, 16),
        Segment::writable(DATA, 512),
        Segment::writable(STATUS, 1),
    ];
    driver.add(0, &chain);
    driver.kick(0);
    assert_eq!(driver.used(0), None);
    driver.device.resume().unwrap();
    driver.wait_used(0);
    for _ in 0..20 {
        driver.reset();
        assert_eq!(driver.status(), 0);
        driver.start(u64::MAX);
        write_then_read(&mut driver, 1);
        // Left in flight by the next reset.
        driver.add(0, &chain);
        driver.kick(0);
    }
}

/// Runs a discard (11) or write-zeroes (13) request; returns its status.
pub(crate) fn run_range(driver: &mut Driver, kind: u32, range: (u64, u32, u32)) -> u8 {
    let mut header = [0; 32];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[16..24].copy_from_slice(&range.0.to_le_bytes());
    header[24..28].copy_from_slice(&range.1.to_le_bytes());
    header[28..].copy_from_slice(&range.2.to_le_bytes());
    driver.put(HEADER, &header);
    driver.put(STATUS, &[0xee]);
    let chain = [
        Segment::readable(HEADER, 16),
        Segment::readable(HEADER + 16, 16),
        Segment::writable(STATUS, 1),
    ];
    driver.add(0, &chain);
    driver.kick(0);
    driver.wait_used(0);
    driver.get(STATUS, 1)[0]
}

#[test]
fn discards_and_zeroes() {
    let mut driver = device(memory_disk(), 1);
    assert_eq!(driver.offered() & 0x6000, 0x6000);
    assert_eq!(u32::from_le_bytes(driver.device_config(20)), 512);
    assert_eq!(u32::from_le_bytes(driver.device_config(36)), 131_072);
    assert_eq!(driver.device_config::<1>(56), [1]);
    driver.start(u64::MAX);
    for (kind, flags) in [(13, 0), (13, 1), (11, 0)] {
        write_then_read(&mut driver, 0);
        assert_eq!(run_range(&mut driver, kind, (5, 2, flags)), 0);
        assert_eq!(run(&mut driver, 0, 0, 3, 8192), (0, 8193));
        let data = driver.get(DATA - 4096, 8192);
        assert_eq!(data[1024..2048], [0; 1024]);
        assert!(data[1023] == 255 && data[2049] == 1, "there and only there");
    }
    let last = DISK_BYTES / 512;
    for (kind, range, status) in [
        (11, (0, 1, 1), 2),
        (13, (0, 1, 2), 2),
        (13, (last, 1, 0), 1),
        (13, (u64::MAX, 1, 0), 1),
        (11, (0, u32::MAX, 0), 1),
    ] {
        let answer = run_range(&mut driver, kind, range);
        assert_eq!(answer, status, "{kind} {range:?}");
    }
    // A payload of another size.
    assert_eq!(run(&mut driver, 0, 13, 0, 0), (1, 1));
    driver.reset();
    driver.start(!0x6000);
    assert_eq!(run_range(&mut driver, 13, (0, 1, 0)), 2, "not negotiated");
}

#[test]
fn a_disk_that_grew_tells_its_driver() {
    let backend = Arc::new(memory_disk());
    let device = Arc::new(Blk::new(BlkOptions {
        name: "blk0".to_owned(),
        backend: backend.clone(),
        serial: String::new(),
        queue_count: 1,
    }));
    let mut driver = Driver::new(device.clone());
    driver.start(u64::MAX);
    let last = DISK_BYTES / 512;
    assert_eq!(run(&mut driver, 0, 0, last, 512), (1, 1));
    backend.resize(2 * DISK_BYTES).unwrap();
    device.resized();
    assert!(driver.interrupts.wait(0, Duration::from_secs(20)));
    assert_eq!(u64::from_le_bytes(driver.device_config(0)), 2 * last);
    assert_eq!(run(&mut driver, 0, 0, last, 512), (0, 513));
}

/// A disk whose requests take a moment each: who does not wait for them does not see them done.
pub(crate) fn slow(inner: impl BlockBackend) -> impl BlockBackend {
    let wait = |_, _| {
        std::thread::sleep(Duration::from_millis(1));
        None
    };
    Faulty::new(inner, Arc::new(wait))
}

/// How many chains the device has taken from `queue`.
pub(crate) fn taken(driver: &Driver, queue: usize) -> u64 {
    let (_, queues) = driver.device.counters();
    let chains = queues[queue].iter().find(|(name, _)| *name == "chains");
    chains.unwrap().1
}

/// A limit of one operation a second does not keep a pause waiting. All that was taken is done when the pause returns:
/// RAM is copied then.
#[test]
fn limited_disks_pause_at_once() {
    let mut limits = Limits::default();
    limits.total.operations.per_second = Some(1);
    let limited = Arc::new(Limited::new(Arc::new(slow(memory_disk())), limits));
    let mut driver = device(limited.clone(), 1);
    driver.start(u64::MAX);
    driver.put(HEADER, &[0; 16]);
    let chain = [
        Segment::readable(HEADER, 16),
        Segment::writable(DATA, 512),
        Segment::writable(STATUS, 1),
    ];
    for _ in 0..20 {
        driver.add(0, &chain);
    }
    let before = std::time::Instant::now();
    driver.kick(0);
    driver.wait_used(0);
    driver.wait_until("20 chains taken", |driver| taken(driver, 0) == 20);
    driver.device.pause();
    for done in 1..20 {
        assert!(driver.used(0).is_some(), "{done} are done");
    }
    assert!(before.elapsed() < Duration::from_secs(10));
    driver.device.resume().unwrap();
    limited.set(Limits::default());
    write_then_read(&mut driver, 0);
}

/// Reads that the kernel has, past its page cache, where the file system of temporary files knows such reads.
#[test]
fn what_the_kernel_has_is_done_when_a_pause_returns() {
    const READS: u64 = 32;
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), vec![0x5a; 1 << 20]).unwrap();
    let source = Source {
        path: file.path().to_owned(),
        format: Format::Raw,
        backing: Vec::new(),
    };
    let options = OpenOptions {
        cache: Cache::None,
        ..OpenOptions::default()
    };
    let backend = match atoll_disk::open(&source, options) {
        Ok(backend) => backend,
        Err(error) => return println!("ATOLL-SKIP: direct reads: {error}"),
    };
    let mut driver = device(backend, 1);
    driver.start(u64::MAX);
    driver.put(HEADER, &[0; 16]);
    for round in 0..50 {
        for read in 0..READS {
            let chain = [
                Segment::readable(HEADER, 16),
                Segment::writable(DATA + read * 4096, 4096),
                Segment::writable(STATUS, 1),
            ];
            driver.add(0, &chain);
        }
        driver.kick(0);
        let all = (round + 1) * READS;
        driver.wait_until("every chain taken", |driver| taken(driver, 0) == all);
        driver.device.pause();
        let done = std::iter::from_fn(|| driver.used(0)).count();
        assert_eq!(done as u64, READS);
        driver.device.resume().unwrap();
    }
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! What a driver is told of its disk's write cache, on either bus, and what it can rely on then.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use atoll_devices::state::DeviceState;
use atoll_devices::testing::Driver;
use atoll_disk::{BlockBackend, Cache, Faulty, Format, OpenOptions, Operation, Source};

use crate::{blk, scsi, state};

/// VIRTIO 1.2 §5.2.3.
const F_FLUSH: u64 = 1 << 9;
const F_CONFIG_WCE: u64 = 1 << 11;

/// A disk in a file that the host writes through or not, and the number of flushes that it is asked for.
fn counted(cache: Cache) -> (Arc<AtomicUsize>, Faulty<Arc<dyn BlockBackend>>) {
    // It has no name any more when it is returned.
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk");
    let file = std::fs::File::create(&path).unwrap();
    file.set_len(blk::DISK_BYTES).unwrap();
    let source = Source {
        path,
        format: Format::Raw,
        backing: Vec::new(),
    };
    let options = OpenOptions {
        cache,
        ..OpenOptions::default()
    };
    let flushes = Arc::new(AtomicUsize::new(0));
    let count = flushes.clone();
    let fault = move |operation, _| {
        let one = usize::from(operation == Operation::Flush);
        count.fetch_add(one, Ordering::SeqCst);
        None
    };
    let disk = atoll_disk::open(&source, options).unwrap();
    (flushes, Faulty::new(disk, Arc::new(fault)))
}

/// What a driver reads of the cache is what the host does; when it wants none, or does not know of any, its writes are
/// durable when they complete.
#[test]
fn the_write_cache_is_the_hosts_until_the_driver_says_otherwise() {
    for (cache, told) in [(Cache::Writeback, 1), (Cache::Writethrough, 0)] {
        let (flushes, backend) = counted(cache);
        let mut driver = blk::device(backend, 1);
        let flushed = |driver: &mut Driver, kind| {
            flushes.store(0, Ordering::SeqCst);
            let status = match kind {
                13 => blk::run_range(driver, kind, (0, 8, 0)),
                _ => blk::run(driver, 0, kind, 0, 512).0,
            };
            assert_eq!(status, 0);
            flushes.load(Ordering::SeqCst)
        };
        let cached = told == 1;
        for without in [F_CONFIG_WCE, F_FLUSH | F_CONFIG_WCE, 0] {
            driver.start(!without);
            assert_eq!(driver.device_config::<1>(32), [told]);
            let lazy = match without {
                F_CONFIG_WCE => true,
                0 => cached,
                _ => false,
            };
            // The host's own way makes only data durable.
            assert_eq!(flushed(&mut driver, 1), usize::from(!lazy && cached));
            assert_eq!(flushed(&mut driver, 13), usize::from(!lazy));
            assert_eq!(flushed(&mut driver, 0), 0);
            driver.reset();
        }
        driver.start(u64::MAX);
        // Across the field and what is beside it, which stays.
        for (writeback, bytes) in [(0, [9, 9, 0, 9]), (1, [9, 9, 7, 9])] {
            driver.set_device_config(30, &bytes);
            assert_eq!(driver.device_config::<4>(30), [0, 0, writeback, 0]);
            let expected = usize::from(writeback == 0 && cached);
            assert_eq!(flushed(&mut driver, 1), expected);
        }
        driver.set_device_config(32, &[1 - told]);
        driver.reset();
        assert_eq!(driver.device_config::<1>(32), [told]);
    }
}

/// A driver that has been told that there is no cache has none in a copy whose host has one.
#[test]
fn what_was_told_of_the_write_cache_is_remembered() {
    let (_, through) = counted(Cache::Writethrough);
    let mut driver = blk::device(through, 1);
    driver.start(u64::MAX);
    let (flushes, cached) = counted(Cache::Writeback);
    let mut copy = state::copy(&mut driver, Driver::bare(blk::disk(cached, 1)));
    assert_eq!(copy.device_config::<1>(32), [0]);
    assert_eq!(blk::run(&mut copy, 0, 1, 0, 512).0, 0);
    assert_eq!(flushes.load(Ordering::SeqCst), 1);
    // In a state of before there is nothing, and the disk is as it was built.
    let mut saved = driver.device.save();
    let state = saved.state["device"]["state"].as_object_mut().unwrap();
    state.remove("writeback").unwrap();
    let (_, cached) = counted(Cache::Writeback);
    let copy = blk::device(cached, 1);
    copy.device.restore(&saved).unwrap();
    assert_eq!(copy.device_config::<1>(32), [1]);
}

/// The caching mode page says what the host does, and goes on saying it in a copy whose host does something else: there
/// each write is made durable.
#[test]
fn the_caching_page_tells_the_truth() {
    let unit = |cache| {
        let (flushes, backend) = counted(cache);
        let (host, mut driver) = scsi::device(&[(0, scsi::disk(Arc::new(backend)))]);
        driver.start(u64::MAX);
        (flushes, host, driver)
    };
    let has_cache = |driver: &mut Driver| {
        let mode = scsi::run(driver, 0, &[0x1a, 0, 8, 0, 255, 0], &[], 255).good();
        assert_eq!((mode[4], mode[5]), (8, 18), "the page and its length");
        mode[6] & 4 != 0
    };
    let zeroes = [0x93, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0];
    let mut forced = scsi::WRITE_10;
    forced[1] = 8;
    // Flushes after a write, one that is forced to be durable, and a write of zeroes.
    let flushed = |flushes: &AtomicUsize, driver: &mut Driver| {
        let data = scsi::pattern(16 * 512);
        let commands: [(&[u8], &[u8]); 3] = [
            (&scsi::WRITE_10, &data),
            (&forced, &data),
            (&zeroes, &[0; 512]),
        ];
        commands.map(|(cdb, out)| {
            flushes.store(0, Ordering::SeqCst);
            scsi::run(driver, 0, cdb, out, 0).good();
            flushes.load(Ordering::SeqCst)
        })
    };
    let (flushes, cached, mut driver) = unit(Cache::Writeback);
    assert!(has_cache(&mut driver));
    assert_eq!(flushed(&flushes, &mut driver), [0, 1, 0]);
    let (flushes, through, mut driver) = unit(Cache::Writethrough);
    assert!(!has_cache(&mut driver));
    assert_eq!(flushed(&flushes, &mut driver), [0, 0, 1]);

    let (flushes, copy, mut driver) = unit(Cache::Writeback);
    copy.restore(&through.save()).unwrap();
    assert!(!has_cache(&mut driver));
    assert_eq!(flushed(&flushes, &mut driver), [1, 1, 1]);
    // What was saved before drivers were told has told them of a cache.
    let mut old = cached.save();
    let state = old.state["targets"]["0"].as_object_mut().unwrap();
    state.remove("writes_through").unwrap();
    let (_, copy, mut driver) = unit(Cache::Writethrough);
    copy.restore(&old).unwrap();
    assert!(has_cache(&mut driver));
}

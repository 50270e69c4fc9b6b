// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The balloon: pages that go, a target that is told, statistics that come.

use std::sync::Arc;

use atoll_devices::state::DeviceState;
use atoll_devices::testing::{Driver, RAM_BYTES, Segment};
use atoll_devices::virtio::balloon::{Balloon, BalloonOptions};

use crate::pitfalls::while_it_changes;

const DATA: u64 = 0x10_0000;
const FREE: u64 = 0x18_0000;

pub fn device() -> (Driver, Arc<Balloon>) {
    let balloon = Arc::new(Balloon::new(BalloonOptions {
        deflate_on_oom: true,
        reporting: true,
    }));
    (Driver::new(balloon.clone()), balloon)
}

fn discarded(driver: &Driver) -> (u64, u64) {
    let (counters, _) = driver.device.counters();
    (counters[0].1, counters[1].1)
}

fn zeroes(driver: &Driver, address: u64, size: usize) -> bool {
    driver.get(address, size).iter().all(|byte| *byte == 0)
}

#[test]
fn inflated_pages_are_gone_and_only_those() {
    let (mut driver, balloon) = device();
    driver.start(u64::MAX);
    balloon.set_target(3 << 12);
    assert_eq!(driver.interrupts.take(0), 1);
    assert_eq!(driver.device_config::<4>(0), [3, 0, 0, 0]);
    driver.put(FREE, &[7; 0x4000]);
    // Upwards, downwards, and what is not RAM.
    let first = u32::try_from(FREE >> 12).unwrap();
    let numbers = [
        first + 1,
        first,
        first + 3,
        0xffff_ffff,
        u32::try_from(RAM_BYTES >> 12).unwrap(),
    ];
    let bytes: Vec<u8> = numbers
        .iter()
        .flat_map(|number| number.to_le_bytes())
        .collect();
    driver.put(DATA, &bytes);
    driver.add(0, &[Segment::readable(DATA, 20)]);
    driver.kick(0);
    driver.wait_used(0);
    assert!(zeroes(&driver, FREE, 0x2000) && zeroes(&driver, FREE + 0x3000, 0x1000));
    assert_eq!(driver.get(FREE + 0x2000, 1), [7]);
    assert_eq!(discarded(&driver), (0x3000, 2));
    driver.write(0x2004, &3u32.to_le_bytes());
    driver.write(0x2000, &9u32.to_le_bytes());
    assert_eq!((balloon.actual(), balloon.target()), (3 << 12, 3 << 12));
    // Deflated pages are the guest's again, by being touched.
    driver.add(1, &[Segment::readable(DATA, 20)]);
    driver.kick(1);
    driver.wait_used(1);
    driver.put(FREE, &[8; 16]);
    assert_eq!(driver.get(FREE, 16), [8; 16]);
    let saved = balloon.save();
    driver.reset();
    assert_eq!(balloon.actual(), 0);
    balloon.restore(&saved).unwrap();
    assert_eq!(balloon.save(), saved);
}

/// Another vCPU changes the first of two page numbers, from the neighbor of the second to a page far away and back: those
/// go that were named together, and neither of them otherwise.
#[test]
fn a_page_number_that_changes_while_it_is_read() {
    let (mut driver, _balloon) = device();
    driver.start(u64::MAX);
    let near = u32::try_from(FREE >> 12).unwrap();
    // They differ in one byte.
    let far = near ^ 0x40;
    driver.put(DATA, &[near, near + 1].map(u32::to_le_bytes).concat());
    let numbers = [near, far].map(|number| [number.to_le_bytes()[0]]);
    let pages = [near, near + 1, far, far + 1].map(|number| u64::from(number) << 12);
    while_it_changes(&driver.memory.clone(), DATA, numbers, || {
        for page in pages {
            driver.put(page, &[7]);
        }
        driver.add(0, &[Segment::readable(DATA, 8)]);
        driver.kick(0);
        driver.wait_used(0);
        let gone = pages.map(|page| zeroes(&driver, page, 1));
        match gone {
            [true, true, false, false] => true,
            [false, true, true, false] => false,
            _ => panic!("{gone:?}"),
        }
    });
    assert_eq!(driver.status(), 15);
}

#[test]
fn reported_pages_are_gone_until_they_are_used() {
    let (mut driver, _balloon) = device();
    driver.start(u64::MAX);
    driver.put(FREE, &[7; 0x8000]);
    let chain = [
        Segment::writable(FREE, 0x2000),
        Segment::writable(FREE + 0x6000, 0x1000),
    ];
    driver.add(3, &chain);
    driver.kick(3);
    driver.wait_used(3);
    assert!(zeroes(&driver, FREE, 0x2000) && zeroes(&driver, FREE + 0x6000, 0x1000));
    assert_eq!(driver.get(FREE + 0x2000, 0x4000), [7; 0x4000]);
    // A driver that takes no statistics has its reporting queue one place before.
    driver.reset();
    assert!(driver.negotiate(1 << 32 | 1 << 5));
    driver.rings.clear();
    for queue in 0..3 {
        driver.enable_queue(queue, 64);
    }
    driver.set_status(15);
    driver.put(FREE, &[7; 0x2000]);
    driver.add(2, &chain[..1]);
    driver.kick(2);
    driver.wait_used(2);
    assert!(zeroes(&driver, FREE, 0x2000));
}

#[test]
fn statistics_come_with_the_first_buffer() {
    let (mut driver, balloon) = device();
    driver.start(u64::MAX);
    assert_eq!(balloon.statistics(), None);
    let mut entry = 4u16.to_le_bytes().to_vec();
    entry.extend(12345u64.to_le_bytes());
    driver.put(DATA, &entry);
    driver.add(2, &[Segment::readable(DATA, 10)]);
    driver.kick(2);
    driver.wait_until("statistics", |_| balloon.statistics().is_some());
    assert_eq!(balloon.statistics().unwrap().free, Some(12345));
    // The buffer is held; a pause gives it back, a resume reads it again.
    assert!(driver.used(2).is_none());
    driver.device.pause();
    driver.put(DATA + 2, &99u64.to_le_bytes());
    driver.device.resume().unwrap();
    driver.wait_until("new statistics", |_| {
        balloon.statistics().unwrap().free == Some(99)
    });
}

#[test]
fn too_many_page_numbers() {
    let (mut driver, _balloon) = device();
    driver.start(u64::MAX);
    driver.add(0, &[Segment::readable(0, 16385)]);
    driver.kick(0);
    driver.wait_broken();
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Drivers that mean harm: every broken ring or chain ends in NEEDS_RESET, for every kind of device, and a reset
//! makes the device whole again.

use std::sync::Arc;
use std::time::Duration;

use atoll_devices::console::{Console, ConsoleBackend};
use atoll_devices::testing::{Driver, RAM_BYTES, Segment};
use atoll_devices::virtio::console::VirtioConsole;
use atoll_devices::virtio::rng::Rng;

use crate::blk::{device, memory_disk};

const DATA: u64 = 0x10_0000;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// What it does to a queue: (name, act).
type Attack = (&'static str, fn(&mut Driver, usize));

const ATTACKS: &[Attack] = &[
    ("a chain that is a loop", |driver, queue| {
        raw(driver, queue, &[(DATA, 16, NEXT, 1), (DATA, 16, NEXT, 0)]);
    }),
    ("a descriptor that is its own next", |driver, queue| {
        raw(driver, queue, &[(DATA, 16, NEXT | WRITE, 0)]);
    }),
    ("a next outside the table", |driver, queue| {
        raw(driver, queue, &[(DATA, 16, NEXT, 0x7fff)]);
    }),
    ("a buffer outside RAM", |driver, queue| {
        raw(driver, queue, &[(RAM_BYTES, 16, WRITE, 0)]);
    }),
    ("a buffer over the end of RAM", |driver, queue| {
        raw(driver, queue, &[(RAM_BYTES - 8, 16, WRITE, 0)]);
    }),
    ("an address that wraps", |driver, queue| {
        raw(driver, queue, &[(u64::MAX - 7, 16, 0, 0)]);
    }),
    ("4 GiB in one descriptor", |driver, queue| {
        raw(driver, queue, &[(0, u32::MAX, WRITE, 0)]);
    }),
    ("readable after writable", |driver, queue| {
        raw(
            driver,
            queue,
            &[(DATA, 16, NEXT | WRITE, 1), (DATA, 16, 0, 0)],
        );
    }),
    ("an indirect table in an indirect table", |driver, queue| {
        driver.put_descriptor(DATA, 0, (DATA, 16, INDIRECT, 0));
        raw(driver, queue, &[(DATA, 16, INDIRECT, 0)]);
    }),
    ("an indirect table of 17 bytes", |driver, queue| {
        raw(driver, queue, &[(DATA, 17, INDIRECT, 0)]);
    }),
    ("an indirect table of no bytes", |driver, queue| {
        raw(driver, queue, &[(DATA, 0, INDIRECT, 0)]);
    }),
    ("an indirect table outside RAM", |driver, queue| {
        raw(driver, queue, &[(RAM_BYTES, 32, INDIRECT, 0)]);
    }),
    ("an indirect loop of 65535", |driver, queue| {
        driver.put_descriptor(DATA, 0, (DATA, 16, NEXT, 0));
        raw(driver, queue, &[(DATA, 16 * 0xffff, INDIRECT, 0)]);
    }),
    ("a head outside the table", |driver, queue| {
        driver.offer(queue, 0x4000);
    }),
    ("an available index that runs ahead", |driver, queue| {
        let ring = driver.rings[queue];
        driver.put(ring.available + 2, &0x9000_u16.to_le_bytes());
    }),
    ("an empty buffer", |driver, queue| {
        raw(driver, queue, &[(DATA, 0, 0, 0)]);
    }),
];

fn raw(driver: &mut Driver, queue: usize, descriptors: &[(u64, u32, u16, u16)]) {
    for (index, fields) in (0..).zip(descriptors) {
        driver.put_descriptor(driver.rings[queue].descriptors, index, *fields);
    }
    driver.offer(queue, 0);
}

/// Runs every attack on `queue`; `works` shows that the device is whole.
fn withstands(driver: &mut Driver, queue: usize, works: impl Fn(&mut Driver)) {
    for (name, attack) in ATTACKS {
        println!("{name}");
        driver.start(u64::MAX);
        attack(driver, queue);
        driver.kick(queue);
        driver.wait_broken();
        assert!(driver.interrupts.wait(0, Duration::from_secs(20)), "told");
        driver.kick(queue);
        driver.reset();
        assert_eq!(driver.status(), 0);
        driver.start(u64::MAX);
        works(driver);
        driver.reset();
    }
}

#[test]
fn rng_withstands() {
    let mut driver = Driver::new(Arc::new(Rng::new()));
    withstands(&mut driver, 0, |driver| {
        driver.add(0, &[Segment::writable(DATA, 32)]);
        driver.kick(0);
        assert_eq!(driver.wait_used(0).1, 32);
    });
}

#[test]
fn blk_withstands() {
    let mut driver = device(memory_disk(), 2);
    withstands(&mut driver, 1, |driver| {
        driver.put(DATA, &[0; 16]);
        let chain = [
            Segment::readable(DATA, 16),
            Segment::writable(DATA + 4096, 512),
            Segment::writable(DATA + 8192, 1),
        ];
        driver.add(1, &chain);
        driver.kick(1);
        assert_eq!(driver.wait_used(1).1, 513);
    });
}

#[test]
fn console_withstands() {
    let console = Console::open(&ConsoleBackend::Pty).unwrap();
    let mut driver = Driver::new(Arc::new(VirtioConsole::new(console.port()).unwrap()));
    withstands_output(&mut driver);
}

/// For a console an empty buffer is an empty line, no mistake; everything else is.
fn withstands_output(driver: &mut Driver) {
    for (name, attack) in &ATTACKS[..ATTACKS.len() - 1] {
        println!("{name}");
        driver.start(u64::MAX);
        attack(driver, 1);
        driver.kick(1);
        // Buffers that only the device may write are ignored by an output queue.
        driver.wait_until("an end", |driver| {
            driver.status() & 0x40 != 0 || driver.used(1).is_some()
        });
        driver.reset();
        driver.start(u64::MAX);
        driver.add(1, &[Segment::readable(DATA, 32)]);
        driver.kick(1);
        driver.wait_used(1);
        driver.reset();
    }
}

#[test]
fn blk_requests_without_header_or_status() {
    let chains: [&[Segment]; 5] = [
        &[Segment::readable(DATA, 16)],
        &[Segment::readable(DATA, 15), Segment::writable(DATA, 1)],
        &[Segment::writable(DATA, 512)],
        &[Segment::readable(DATA, 600)],
        &[Segment::readable(DATA, 0), Segment::writable(DATA, 0)],
    ];
    for chain in chains {
        let mut driver = device(memory_disk(), 1);
        driver.start(u64::MAX);
        driver.add(0, chain);
        driver.kick(0);
        driver.wait_broken();
    }
}

/// The same head again while it is in flight: each offer is served in a slot of its own.
#[test]
fn the_same_head_many_times() {
    let mut driver = device(memory_disk(), 1);
    for _ in 0..10 {
        driver.start(u64::MAX);
        driver.put(DATA, &[0; 16]);
        let chain = [
            Segment::readable(DATA, 16),
            Segment::writable(DATA + 4096, 4096),
            Segment::writable(DATA + 8192, 1),
        ];
        let head = driver.add(0, &chain);
        for _ in 1..driver.rings[0].size {
            driver.offer(0, head);
        }
        driver.kick(0);
        for _ in 0..driver.rings[0].size {
            assert_eq!(driver.wait_used(0), (head, 4097));
        }
        driver.reset();
    }
}

/// Rings that lie over each other, and buffers that lie over the rings.
#[test]
fn overlapping_rings_do_not_hang() {
    let mut driver = device(memory_disk(), 1);
    for shift in [0, 2, 4, 16, 64] {
        assert!(driver.negotiate(1 << 32 | 1 << 28));
        driver.rings.clear();
        driver.enable_queue(0, 16);
        driver.reset();
        assert!(driver.negotiate(1 << 32 | 1 << 28));
        let mut ring = driver.rings[0];
        ring.available = ring.descriptors + shift;
        ring.used = ring.descriptors + 2 * (shift & !3);
        driver.describe_queue(0, ring);
        driver.write(0x1c, &1u16.to_le_bytes());
        driver.set_status(15);
        driver.put(ring.descriptors, &[0x11; 512]);
        driver.kick(0);
        driver.put(ring.descriptors, &[0; 512]);
        driver.kick(0);
        driver.reset();
        assert_eq!(driver.status(), 0);
    }
}

/// A batch that ends with a malformed chain: the good request before it must not be waited for for ever.
/// Found by the fuzz target `blk_device`.
#[test]
fn a_good_request_then_a_malformed_chain() {
    let mut driver = device(memory_disk(), 1);
    for _ in 0..20 {
        driver.start(u64::MAX);
        driver.put(DATA, &[0; 16]);
        let good = [
            Segment::readable(DATA, 16),
            Segment::writable(DATA + 4096, 512),
            Segment::writable(DATA + 8192, 1),
        ];
        driver.add(0, &good);
        driver.add(0, &[Segment::readable(DATA, 3)]);
        driver.kick(0);
        driver.wait_broken();
        driver.reset();
    }
}

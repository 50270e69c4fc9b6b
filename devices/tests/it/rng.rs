// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Entropy source.

use std::sync::Arc;

use atoll_devices::testing::{Driver, Segment};
use atoll_devices::virtio::rng::Rng;

const DATA: u64 = 0x10_0000;

#[test]
fn fills_buffers_and_interrupts_once_for_a_batch() {
    let mut driver = Driver::new(Arc::new(Rng::new()));
    driver.start(u64::MAX);
    for i in 0..4 {
        driver.add(0, &[Segment::writable(DATA + i * 64, 64)]);
    }
    driver.kick(0);
    for _ in 0..4 {
        assert_eq!(driver.wait_used(0).1, 64);
    }
    assert_ne!(driver.get(DATA, 256), vec![0; 256]);
    assert!(
        driver
            .interrupts
            .wait(1, std::time::Duration::from_secs(20))
    );
    let (_, queues) = driver.device.counters();
    assert!(queues[0].contains(&("chains", 4)), "{queues:?}");
}

#[test]
fn a_huge_claim_is_bounded() {
    let mut driver = Driver::new(Arc::new(Rng::new()));
    driver.start(u64::MAX);
    driver.add(0, &[Segment::writable(DATA, 1 << 20)]);
    driver.kick(0);
    assert_eq!(driver.wait_used(0).1, 4096);
}

/// More chains than a 16-bit index counts, with interrupts asked for by the event index all the way.
#[test]
fn ring_indices_wrap() {
    let mut driver = Driver::new(Arc::new(Rng::new()));
    driver.start(u64::MAX);
    let ring = driver.rings[0];
    let used_event = ring.available + 4 + 2 * u64::from(ring.size);
    for batch in 1..=1100_u32 {
        let last = u16::try_from((batch * 64 - 1) & 0xffff).unwrap();
        driver.put(used_event, &last.to_le_bytes());
        for _ in 0..64 {
            driver.add(0, &[Segment::writable(DATA, 8)]);
        }
        driver.kick(0);
        for _ in 0..64 {
            assert_eq!(driver.wait_used(0).1, 8);
        }
        let told = driver
            .interrupts
            .wait(1, std::time::Duration::from_secs(20));
        assert!(told, "batch {batch}");
    }
}

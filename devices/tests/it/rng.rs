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

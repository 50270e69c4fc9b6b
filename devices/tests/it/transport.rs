// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! PCI and the virtio transport's registers: what a correct driver finds, and what a wrong one cannot break.

use std::sync::Arc;

use atoll_devices::interrupt::MsiMessage;
use atoll_devices::testing::{Driver, Ring, Segment};
use atoll_devices::virtio::rng::Rng;

const VERSION_1: u64 = 1 << 32;
const DATA: u64 = 0x10_0000;

fn driver() -> Driver {
    Driver::new(Arc::new(Rng::new()))
}

fn works(driver: &mut Driver) {
    driver.start(u64::MAX);
    driver.add(0, &[Segment::writable(DATA, 32)]);
    driver.kick(0);
    assert_eq!(driver.wait_used(0).1, 32);
}

#[test]
fn capabilities_lead_to_the_registers() {
    let driver = driver();
    assert_eq!(driver.config_read::<4>(0), [0xf4, 0x1a, 0x44, 0x10]);
    assert_eq!(driver.config_read::<1>(8), [1]);
    let mut found = Vec::new();
    let [mut at] = driver.config_read::<1>(0x34);
    while at != 0 {
        let [id, next, length, kind, bar] = driver.config_read::<5>(at.into());
        if id == 9 {
            let word = |offset: u64| u32::from_le_bytes(driver.config_read(u64::from(at) + offset));
            found.push((kind, length, bar, word(8), word(12)));
        }
        at = next;
    }
    let expected = [
        (1, 16, 0, 0, 0x3c),
        (2, 20, 0, 0x3000, 4),
        (3, 16, 0, 0x1000, 1),
        (4, 16, 0, 0x2000, 0x1000),
        (5, 20, 0, 0, 0),
    ];
    assert_eq!(found, expected);
}

#[test]
fn features_are_checked() {
    let driver = driver();
    let offered = driver.offered();
    assert_eq!(
        offered & (VERSION_1 | 1 << 28 | 1 << 29),
        VERSION_1 | 1 << 28 | 1 << 29
    );
    assert!(!driver.negotiate(offered & !VERSION_1), "legacy drivers");
    driver.reset();
    assert!(!driver.negotiate(VERSION_1 | 1 << 50), "not offered");
    driver.reset();
    assert!(driver.negotiate(VERSION_1));
    // Settled: what is written now does not count.
    driver.write(8, &0u32.to_le_bytes());
    driver.write(12, &u32::MAX.to_le_bytes());
    assert_eq!(u32::from_le_bytes(driver.read(12)), 0);
}

#[test]
fn wrong_steps_of_the_status_machine_break_the_device() {
    let orders: [&[u8]; 6] = [&[4], &[15], &[1, 3, 7], &[1, 9], &[1, 3, 1], &[2]];
    for order in orders {
        let mut driver = driver();
        order.iter().for_each(|status| driver.set_status(*status));
        assert_ne!(driver.status() & 0x40, 0, "{order:?}");
        driver.reset();
        works(&mut driver);
    }
}

#[test]
fn queue_registers_only_between_features_and_driver_ok() {
    let mut driver = driver();
    let enabled = |driver: &Driver| u16::from_le_bytes(driver.read(0x1c));
    driver.write(0x1c, &1u16.to_le_bytes());
    assert_eq!(enabled(&driver), 0);
    works(&mut driver);
    let before: [u8; 8] = driver.read(0x20);
    driver.write(0x20, &0u64.to_le_bytes());
    driver.write(0x1c, &0u16.to_le_bytes());
    assert_eq!((driver.read(0x20), enabled(&driver)), (before, 1));
    // A queue that does not exist.
    driver.write(0x16, &7u16.to_le_bytes());
    assert_eq!(driver.read::<2>(0x18), [0, 0]);
    driver.write(0x18, &8u16.to_le_bytes());
    assert_eq!(driver.status(), 15);
    // Nor has it a vector, and no queue of a number that no device has.
    for queue in [7, 0x8000, u16::MAX] {
        driver.write(0x16, &queue.to_le_bytes());
        driver.write(0x1a, &0u16.to_le_bytes());
        assert_eq!(driver.read::<8>(0x18), [0; 8], "{queue}");
    }
    assert_eq!(driver.status(), 15);
}

#[test]
fn impossible_rings_break_the_device() {
    let bad = |change: fn(&mut Ring)| {
        let mut driver = driver();
        works(&mut driver);
        let mut ring = driver.rings[0];
        change(&mut ring);
        driver.reset();
        assert!(driver.negotiate(VERSION_1));
        driver.describe_queue(0, ring);
        driver.write(0x1c, &1u16.to_le_bytes());
        driver.set_status(15);
        assert_ne!(driver.status() & 0x40, 0, "{ring:?}");
        driver.reset();
        works(&mut driver);
    };
    bad(|ring| ring.size = 0);
    bad(|ring| ring.size = 3);
    bad(|ring| ring.size = 128);
    bad(|ring| ring.descriptors += 8);
    bad(|ring| ring.available += 1);
    bad(|ring| ring.used += 2);
    bad(|ring| ring.descriptors = 0x40_0000 - 16);
    bad(|ring| ring.available = 0x4000_0000);
    bad(|ring| ring.used = u64::MAX - 3);
}

#[test]
fn vectors_out_of_range_read_back_as_none() {
    let driver = driver();
    assert!(driver.negotiate(VERSION_1));
    for register in [0x10, 0x1a] {
        for vector in [2u16, 100, 0xffff] {
            driver.write(register, &vector.to_le_bytes());
            assert_eq!(driver.read::<2>(register), [0xff, 0xff]);
        }
        driver.write(register, &1u16.to_le_bytes());
        assert_eq!(driver.read::<2>(register), [1, 0]);
    }
    let message = MsiMessage {
        address: 0xfee0_0000,
        data: 0x31,
    };
    assert_eq!(driver.interrupts.route(1), Some(message));
}

#[test]
fn accesses_of_every_size_everywhere() {
    let driver = driver();
    for offset in (0..0x2_0010).step_by(3).chain(0..0x80) {
        driver.read::<1>(offset);
        driver.read::<2>(offset);
        driver.read::<4>(offset);
        driver.read::<8>(offset);
        // Not the status register, and no doorbell storm.
        if !(0xd..=0x14).contains(&offset) {
            driver.write(offset, &[0xff]);
            driver.write(offset, &[0xff; 2]);
            driver.write(offset, &[0xff; 4]);
            driver.write(offset, &[0xff; 8]);
        }
    }
    for offset in 0..0x1000 {
        driver.config_read::<1>(offset);
        driver.config_read::<4>(offset);
        driver.config_write(offset, &[0xff]);
        driver.config_write(offset, &[0xff; 2]);
        driver.config_write(offset, &[0xff; 4]);
    }
}

#[test]
fn the_configuration_window_reaches_the_bar() {
    let driver = driver();
    let mut window = 0;
    let [mut at] = driver.config_read::<1>(0x34);
    while at != 0 {
        let [id, next, _, kind] = driver.config_read::<4>(at.into());
        if (id, kind) == (9, 5) {
            window = u64::from(at);
        }
        at = next;
    }
    driver.config_write(window + 8, &0x14u32.to_le_bytes());
    driver.config_write(window + 12, &1u32.to_le_bytes());
    driver.config_write(window + 16, &1u32.to_le_bytes());
    assert_eq!(driver.status(), 1);
    driver.set_status(3);
    assert_eq!(driver.config_read::<4>(window + 16), [3, 0, 0, 0]);
    // A length or a place that makes no sense.
    driver.config_write(window + 12, &3u32.to_le_bytes());
    driver.config_write(window + 16, &0u32.to_le_bytes());
    driver.config_write(window + 12, &4u32.to_le_bytes());
    driver.config_write(window + 8, &u32::MAX.to_le_bytes());
    driver.config_write(window + 16, &0u32.to_le_bytes());
    assert_eq!(driver.status(), 3);
}

#[test]
fn a_bar_that_the_guest_moves_goes_on_working() {
    let mut driver = driver();
    let at = |base: u64| vec![base + 0x3000];
    assert_eq!(driver.doorbells.connected(), at(0xc000_0000));
    // Sizing, with decoding on.
    driver.config_write(0x10, &[0xff; 4]);
    assert_eq!(driver.config_read::<4>(0x10), 0xfffe_0004_u32.to_le_bytes());
    driver.config_write(0x10, &0xc000_0004_u32.to_le_bytes());
    assert_eq!(driver.doorbells.connected(), at(0xc000_0000));
    // Moved, and back.
    driver.config_write(0x10, &0xc004_0000_u32.to_le_bytes());
    assert_eq!(driver.doorbells.connected(), at(0xc004_0000));
    assert_eq!(
        driver.read::<4>(0x12),
        [0xff; 4],
        "nobody is there any more"
    );
    assert_eq!(driver.read::<2>(0x4_0012), [1, 0]);
    driver.config_write(0x10, &0xc000_0000_u32.to_le_bytes());
    works(&mut driver);
    // Out of the window it stays where it was.
    driver.config_write(0x10, &0x1000_0000_u32.to_le_bytes());
    assert_eq!(driver.doorbells.connected(), at(0xc000_0000));
}

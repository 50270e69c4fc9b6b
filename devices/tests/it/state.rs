// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Saved state: a device in the middle of its work goes on in a copy of its machine, and what is not its state is
//! refused with the reason.

use std::sync::Arc;

use atoll_devices::state::{DeviceState, Saved};
use atoll_devices::testing::{Driver, Segment};
use atoll_devices::virtio::rng::Rng;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use crate::blk;

const DATA: u64 = 0x10_0000;

/// A machine as `driver`'s, built anew, with its memory and the state of its bus and its device.
pub(crate) fn copy(driver: &mut Driver, mut fresh: Driver) -> Driver {
    driver.device.pause();
    let through_text = |saved: Saved| -> Saved {
        serde_json::from_str(&serde_json::to_string(&saved).unwrap()).unwrap()
    };
    let (bus, device) = (
        through_text(driver.bus.save()),
        through_text(driver.device.save()),
    );
    let memory = driver.get(
        0,
        usize::try_from(atoll_devices::testing::RAM_BYTES).unwrap(),
    );
    let ram = fresh.memory.memory();
    ram.write_slice(&memory, GuestAddress(0)).unwrap();
    fresh.bus.restore(&bus).unwrap();
    fresh.device.restore(&device).unwrap();
    fresh.rings = driver.rings.clone();
    fresh.device.resume().unwrap();
    fresh
}

#[test]
fn a_device_goes_on_in_a_copy() {
    let mut driver = Driver::new(Arc::new(Rng::new()));
    driver.start(u64::MAX);
    // Moved by the guest, and its memory turned off: the mapping stays where it was last on.
    driver.config_write(0x10, &0xc080_0000_u32.to_le_bytes());
    for _ in 0..3 {
        driver.add(0, &[Segment::writable(DATA, 32)]);
        driver.kick_at(0xc080_0000, 0);
        assert_eq!(driver.wait_used(0).1, 32);
    }
    driver.device.pause();
    driver.add(0, &[Segment::writable(DATA, 16)]);
    driver.kick_at(0xc080_0000, 0);
    let mut copy = copy(&mut driver, Driver::bare(Arc::new(Rng::new())));
    // What was offered while the device was paused is served by the copy, without another kick.
    assert_eq!(copy.wait_used(0).1, 16);
    assert!(copy.interrupts.wait(1, std::time::Duration::from_secs(20)));
    assert_eq!(copy.interrupts.route(1), driver.interrupts.route(1));
    assert_eq!(copy.config_read::<4>(0x10), [4, 0, 0x80, 0xc0]);
    copy.add(0, &[Segment::writable(DATA, 8)]);
    copy.kick_at(0xc080_0000, 0);
    assert_eq!(copy.wait_used(0).1, 8);
    // And so does the original.
    driver.device.resume().unwrap();
    assert_eq!(driver.wait_used(0).1, 16);
}

/// An interrupt that was on its way when the machine was saved is in no state: the copy gets it once more, also when
/// nothing is left to be done. And the driver is asked to ring for the next chain, whatever it was asked before.
#[test]
fn a_queue_that_has_nothing_to_do_is_told_once_more_in_a_copy_and_rings() {
    let mut driver = Driver::new(Arc::new(Rng::new()));
    driver.start(u64::MAX);
    for _ in 0..3 {
        driver.add(0, &[Segment::writable(DATA, 32)]);
        driver.kick(0);
        driver.wait_used(0);
    }
    driver.device.pause();
    let ring = driver.rings[0];
    let event = ring.used + 4 + 8 * u64::from(ring.size);
    // As if the queue had been stopped before it asked for anything.
    driver.put(event, &0x7777_u16.to_le_bytes());
    let mut copy = copy(&mut driver, Driver::bare(Arc::new(Rng::new())));
    assert_eq!(copy.interrupts.take(1), 1);
    copy.wait_until("a doorbell asked for", |copy| copy.get(event, 2) == [3, 0]);
    assert_eq!(copy.used(0), None);
    copy.device.pause();
    copy.device.resume().unwrap();
    assert_eq!(copy.interrupts.take(1), 0, "only in a copy");
}

/// The same for a change of the configuration: told just before the save, or never.
#[test]
fn a_change_of_the_configuration_is_told_once_more_in_a_copy() {
    for changes in [false, true] {
        let disk = || blk::disk(blk::memory_disk(), 1);
        let device = disk();
        let mut driver = Driver::new(device.clone());
        driver.start(u64::MAX);
        if changes {
            device.resized();
        }
        assert_eq!(driver.interrupts.take(0), u64::from(changes));
        let copy = copy(&mut driver, Driver::bare(disk()));
        assert_eq!(copy.interrupts.take(0), u64::from(changes));
        assert_eq!(copy.read::<1>(0x15), driver.read::<1>(0x15), "generation");
        copy.device.pause();
        copy.device.resume().unwrap();
        assert_eq!(copy.interrupts.take(0), 0, "only in a copy");
        driver.device.resume().unwrap();
        assert_eq!(driver.interrupts.take(0), 0, "not in the original");
    }
}

#[test]
fn a_broken_device_stays_broken() {
    let mut driver = Driver::new(Arc::new(Rng::new()));
    driver.start(u64::MAX);
    driver.add(0, &[Segment::readable(DATA, 8)]);
    driver.kick(0);
    driver.wait_broken();
    let copy = copy(&mut driver, Driver::bare(Arc::new(Rng::new())));
    assert_eq!(copy.status(), 0x4f);
}

#[test]
fn the_state_of_another_device_is_refused_with_the_reason() {
    let rng = Driver::new(Arc::new(Rng::new()));
    let disk = blk::device(blk::memory_disk(), 1);
    let wider = blk::device(blk::memory_disk(), 2);
    let chain = |error: &dyn std::error::Error| {
        let cause = error.source().map(|cause| format!(": {cause}"));
        format!("{error}{}", cause.unwrap_or_default())
    };
    let refused =
        |driver: &Driver, saved: &Saved| chain(&driver.device.restore(saved).unwrap_err());
    assert_eq!(
        refused(&disk, &rng.device.save()),
        "virtio-pci: the virtio device number was 4 and is now 2"
    );
    assert_eq!(
        refused(&disk, &wider.device.save()),
        "virtio-pci: the number of queues was 2 and is now 1"
    );
    let mut state = disk.device.save();
    state.state["device"]["state"]["size_bytes"] = 512.into();
    assert_eq!(
        refused(&disk, &state),
        "virtio device 2: virtio-blk: the disk's size in bytes was 512 and is now 1048576"
    );
    state = disk.device.save();
    state.version += 1;
    assert!(refused(&disk, &state).contains("this program knows versions up to 1"));
    let error = rng.bus.restore(&disk.bus.save()).unwrap_err();
    assert_eq!(error.to_string(), "pci-bus: slot 1 is another function now");
}

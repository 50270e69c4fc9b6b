// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The arithmetic of a virtqueue at its bounds, exhaustively where that is possible: 16-bit indices that wrap, 64-bit
//! addresses with 32-bit sizes, the event index. Expected values come from wider integers, not from the same code.

use std::sync::Arc;

use atoll_devices::memory::{Memory, Ram};
use atoll_devices::pci::Msix;
use atoll_devices::testing::CountingSink;
use atoll_devices::virtio::{Chain, DeviceInterrupts, DeviceQueue, QueueState};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

const DESCRIPTORS: u64 = 0;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
/// RAM is two regions that touch, and one that does not.
const REGIONS: [(u64, u64); 3] = [(0, 0x4000), (0x4000, 0x1000), (0x8000, 0x1000)];

struct Rig {
    memory: Memory,
}

impl Rig {
    fn new() -> Self {
        let ranges = REGIONS.map(|(start, size)| {
            let size = usize::try_from(size).unwrap();
            (GuestAddress(start), size)
        });
        Self {
            memory: Memory::new(Ram::from_ranges(&ranges).unwrap()),
        }
    }

    fn queue(&self, size: u16, next: u16, event_idx: bool) -> DeviceQueue {
        let msix = Arc::new(Msix::new(Arc::new(CountingSink::new(1))));
        let interrupt = DeviceInterrupts::new("bounds", msix).queue();
        let state = QueueState {
            max_size: 256,
            next_avail: next,
            next_used: next,
            event_idx_enabled: event_idx,
            size,
            ready: true,
            desc_table: DESCRIPTORS,
            avail_ring: AVAILABLE,
            used_ring: USED,
        };
        DeviceQueue::new(state, self.memory.clone(), interrupt, Arc::default()).unwrap()
    }

    fn put(&self, address: u64, bytes: &[u8]) {
        let memory = self.memory.memory();
        memory.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    fn describe(&self, address: u64, size: u32) {
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend(size.to_le_bytes());
        bytes.extend([0; 4]);
        self.put(DESCRIPTORS, &bytes);
    }
}

/// An available index may be ahead of the device by at most the queue's size, whatever wraps.
#[test]
fn every_distance_of_the_available_index() {
    let rig = Rig::new();
    rig.describe(0x4000, 16);
    let mut chain = Chain::new();
    for (size, next) in [(2, 0xffff), (256, 0x8000), (256, 0xff80)] {
        let mut queue = rig.queue(size, next, false);
        for index in 0..=u16::MAX {
            rig.put(AVAILABLE + 2, &index.to_le_bytes());
            let ahead = (u32::from(index) + 0x1_0000 - u32::from(next)) % 0x1_0000;
            let popped = queue.pop(&mut chain);
            match ahead {
                0 => assert!(!popped.unwrap(), "{size} {next} {index}"),
                1..=0xffff if ahead <= u32::from(size) => {
                    assert!(popped.unwrap(), "{size} {next} {index}");
                    queue.undo_pop(1);
                }
                _ => assert!(popped.is_err(), "{size} {next} {index}"),
            }
        }
    }
}

/// A buffer is taken exactly when all of its bytes are RAM.
#[test]
fn every_range_around_the_edges_of_ram() {
    let rig = Rig::new();
    rig.put(AVAILABLE + 2, &1_u16.to_le_bytes());
    let mut chain = Chain::new();
    let mut queue = rig.queue(16, 0, false);
    let edges = REGIONS
        .iter()
        .flat_map(|(start, size)| [*start, start + size])
        .chain([u64::from(u32::MAX), 1 << 32, u64::MAX]);
    let near =
        |edge: u64| (0..=9).flat_map(move |by| [edge.saturating_sub(by), edge.saturating_add(by)]);
    let sizes = (0..=18)
        .chain([0xfff, 0x1000, 0x1001, 0x4fff, 0x5000, 0x5001])
        .chain(u32::MAX - 9..=u32::MAX);
    for address in edges.flat_map(near) {
        for size in sizes.clone() {
            rig.describe(address, size);
            let end = u128::from(address) + u128::from(size);
            // The first two regions are one range.
            let inside = [(0_u128, 0x5000), (0x8000, 0x9000)]
                .iter()
                .any(|(first, last)| u128::from(address) >= *first && end <= *last);
            let expected = if size == 0 { end < 1 << 64 } else { inside };
            let popped = queue.pop(&mut chain);
            assert_eq!(popped.is_ok(), expected, "{size:#x} at {address:#x}");
            if popped.is_ok() {
                assert_eq!(chain.readable().size(), u64::from(size));
                let mut mapped = 0;
                chain
                    .readable()
                    .each_host_range(|_, size| mapped += size as u64);
                assert_eq!(mapped, u64::from(size));
            }
            // Whether or not it was good, it is the same entry again.
            queue = rig.queue(16, 0, false);
        }
    }
}

/// With the event index, an interrupt comes exactly when the driver's index is among those that a batch passed.
#[test]
fn every_event_index_around_a_batch() {
    let rig = Rig::new();
    rig.put(AVAILABLE, &[0; 2]);
    let size = 8_u16;
    for old in [0, 1, 7, 0x7fff, 0x8000, 0xfff8, 0xfffe, 0xffff] {
        for batch in 1..=size {
            for event in (0..=u16::MAX).filter(|event| {
                let distance = event.wrapping_sub(old);
                distance < 2 * size || distance > u16::MAX - 2 * size || distance % 4099 == 0
            }) {
                let mut queue = rig.queue(size, old, true);
                rig.put(AVAILABLE + 4 + 2 * u64::from(size), &event.to_le_bytes());
                for _ in 0..batch {
                    queue.push(0, 0).unwrap();
                }
                queue.signal().unwrap();
                let passed = (0..batch).any(|step| old.wrapping_add(step) == event);
                let came = queue.counters().interrupts.value() > 0;
                assert_eq!(came, passed, "from {old:#x} by {batch}, event {event:#x}");
            }
        }
    }
}

/// The used ring's slot and index wrap apart from each other.
#[test]
fn the_used_index_wraps_in_the_middle_of_a_batch() {
    let rig = Rig::new();
    for start in [0xfff0_u16, 0xfff8, 0xffff, 0] {
        let mut queue = rig.queue(8, start, false);
        for step in 0..8_u16 {
            queue.push(step, u32::from(step) + 1).unwrap();
        }
        queue.signal().unwrap();
        let memory = rig.memory.memory();
        let index: u16 = memory.read_obj(GuestAddress(USED + 2)).unwrap();
        assert_eq!(index, start.wrapping_add(8));
        for step in 0..8_u16 {
            let slot = u64::from(start.wrapping_add(step) % 8);
            let element: u64 = memory.read_obj(GuestAddress(USED + 4 + 8 * slot)).unwrap();
            assert_eq!(element, u64::from(step) | (u64::from(step) + 1) << 32);
        }
        assert!(queue.push(8, 0).is_err(), "no such descriptor");
    }
}

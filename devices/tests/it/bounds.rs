// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The arithmetic of virtqueues and of the transport at its bounds, exhaustively where that is possible: 16-bit indices
//! that wrap, 64-bit addresses with 32-bit sizes, rings and indirect tables at the ends of RAM, the event index, BARs at
//! the ends of their window. Expected values come from wider integers, not from the same code.
//!
//! (Not by a model checker: Kani installs a nightly toolchain of its own, which this project's builds do without.)
//!
//! ```text
//! sum or index                                  where                     test
//! available index - next                        virtio-queue, pop         every_distance_of_the_available_index
//! next - count                                  undo_pop                  the same
//! descriptor address + size                     Chain::fill               every_range_around_the_edges_of_ram
//! head < size, next < size                      virtio-queue, pop         every_head_and_every_link
//! size of a chain, 32 bits                      virtio-queue              a_chain_of_4_gib_less_one_byte
//! table address + 16 * index, table size / 16   virtio-queue              indirect_tables_around_the_edges_of_ram
//! ring address + its bytes                      DeviceQueue::new          rings_around_the_edges_of_ram
//! used ring + 4 + 8 * (index % size)            push                      the same; the_used_index_wraps_in_…
//! available ring + 4 + 2 * size                 signal                    the same; every_event_index_around_a_batch
//! new - event - 1 < new - old                   signal                    every_event_index_around_a_batch
//! skip + count, pieces of segments              GuestBuffers              every_part_of_scattered_buffers
//! BAR + its size, window base + offset          PciBus                    every_place_of_a_bar
//! offset + width in the configuration window    VirtioPci::window         every_access_by_the_configuration_window
//! vector * 16, offset * 8 in MSI-X              pci/msix.rs               strange_accesses_do_nothing (there)
//! sector * 512 + bytes                          blk/request.rs            blk.rs, what_cannot_be_done_is_answered
//! ```

use std::sync::Arc;

use atoll_devices::memory::{Memory, Ram};
use atoll_devices::pci::Msix;
use atoll_devices::testing::{CountingSink, Driver};
use atoll_devices::virtio::rng::Rng;
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
        self.put(DESCRIPTORS, &descriptor(address, size, 0, 0));
    }
}

const NEXT: u16 = 1;
const INDIRECT: u16 = 4;

fn descriptor(address: u64, size: u32, flags: u16, next: u16) -> Vec<u8> {
    let mut bytes = address.to_le_bytes().to_vec();
    bytes.extend(size.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes.extend(next.to_le_bytes());
    bytes
}

/// Whether all of a range is RAM; the first two regions are one range.
fn in_ram(address: u64, size: u64) -> bool {
    let (start, end) = (u128::from(address), u128::from(address) + u128::from(size));
    let ranges = [(0, 0x5000), (0x8000, 0x9000)];
    ranges
        .iter()
        .any(|(first, last)| start >= *first && end <= *last)
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
            let expected = size == 0 || in_ram(address, size.into());
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

/// Heads and links of every value: those within the table lead to a chain, all others end it.
#[test]
fn every_head_and_every_link() {
    let rig = Rig::new();
    let mut chain = Chain::new();
    let size = 16;
    for index in 0..size {
        let at = DESCRIPTORS + 16 * u64::from(index);
        rig.put(at, &descriptor(0x4000, 16, 0, 0));
    }
    rig.put(AVAILABLE + 2, &1_u16.to_le_bytes());
    for value in 0..=u16::MAX {
        rig.put(AVAILABLE + 4, &value.to_le_bytes());
        let popped = rig.queue(size, 0, false).pop(&mut chain);
        assert_eq!(popped.is_ok(), value < size, "head {value}");
        assert!(value >= size || chain.head() == value);
    }
    rig.put(AVAILABLE + 4, &0_u16.to_le_bytes());
    for value in 0..=u16::MAX {
        rig.put(DESCRIPTORS, &descriptor(0x4000, 16, NEXT, value));
        let popped = rig.queue(size, 0, false).pop(&mut chain);
        // The first is its own next: a loop.
        assert_eq!(popped.is_ok(), (1..size).contains(&value), "link {value}");
    }
    for head in 0..=u16::MAX {
        let pushed = rig.queue(size, 0, false).push(head, u32::MAX);
        assert_eq!(pushed.is_ok(), head < size, "{head}");
    }
}

/// A chain has less than 4 GiB (VIRTIO 1.2 §2.7.5.2), so that what is written fits the used ring's 32 bits.
#[test]
fn a_chain_of_4_gib_less_one_byte() {
    const HALF: u64 = 1 << 31;
    // Never touched, hence no memory of the host's.
    let ranges = [(GuestAddress(0), 5 << 30)];
    let rig = Rig {
        memory: Memory::new(Ram::from_ranges(&ranges).unwrap()),
    };
    rig.put(AVAILABLE + 2, &1_u16.to_le_bytes());
    let mut chain = Chain::new();
    for (sizes, whole) in [
        ([HALF, HALF - 1], true),
        ([HALF, HALF], false),
        ([(1 << 32) - 1, 0], true),
        ([(1 << 32) - 1, 1], false),
        ([1, (1 << 32) - 1], false),
    ] {
        let [first, second] = sizes.map(|size| u32::try_from(size).unwrap());
        rig.put(DESCRIPTORS, &descriptor(0x1_0000, first, NEXT, 1));
        rig.put(DESCRIPTORS + 16, &descriptor(0x1_0000, second, 0, 0));
        let popped = rig.queue(16, 0, false).pop(&mut chain);
        assert_eq!(popped.is_ok(), whole, "{sizes:?}");
        if whole {
            assert_eq!(chain.readable().size(), sizes.iter().sum::<u64>());
        }
    }
}

/// A table that an indirect descriptor names is read where it is RAM, and is whole sixteenths.
#[test]
fn indirect_tables_around_the_edges_of_ram() {
    let rig = Rig::new();
    rig.put(AVAILABLE + 2, &1_u16.to_le_bytes());
    let mut chain = Chain::new();
    let mut pops = |address: u64, size: u32| {
        rig.put(DESCRIPTORS, &descriptor(address, size, INDIRECT, 0));
        let popped = rig.queue(16, 0, false).pop(&mut chain);
        popped.map(|_| chain.readable().size())
    };
    // Tables of one: where all of their bytes are RAM.
    for edge in [0_u64, 0x4000, 0x5000, 0x8000, 0x9000, 1 << 32, u64::MAX] {
        for by in 0..=32_u64 {
            for address in [edge.saturating_sub(by), edge.saturating_add(by)] {
                let there = in_ram(address, 16);
                if there && address < 0x3000 {
                    continue; // The queue's own table.
                }
                if there {
                    rig.put(address, &descriptor(0x3000, 5, 0, 0));
                }
                assert_eq!(pops(address, 16).is_ok(), there, "{address:#x}");
            }
        }
    }
    // Every size, of a table whose first entry ends the chain: what is behind it does not matter.
    rig.put(0x8000, &descriptor(0x3000, 5, 0, 0));
    let largest = 16 * u32::from(u16::MAX);
    let sizes = (0..=64).chain(largest - 40..=largest + 40);
    for size in sizes.chain(u32::MAX - 40..=u32::MAX) {
        let good = size > 0 && size % 16 == 0 && size <= largest;
        assert_eq!(pops(0x8000, size).is_ok(), good, "{size:#x}");
    }
    // Entries that lead on to the end of the table, which is that of RAM or beyond it.
    for index in 0..256_u16 {
        let flags = if index == 255 { 0 } else { NEXT };
        let at = 0x8000 + 16 * u64::from(index);
        rig.put(at, &descriptor(0x3000, 5, flags, index + 1));
    }
    assert_eq!(pops(0x8000, 16 * 256).unwrap(), 5 * 256);
    assert!(pops(0x8000, 16 * 255).is_err(), "leads out of the table");
    rig.put(0x8ff0, &descriptor(0x3000, 5, NEXT, 256));
    assert!(pops(0x8000, 16 * 257).is_err(), "leads out of RAM");
}

/// Rings are taken exactly when they are aligned and all of their bytes are RAM; then their last entries work.
#[test]
fn rings_around_the_edges_of_ram() {
    let rig = Rig::new();
    let edges = [0_u64, 0x4000, 0x5000, 0x8000, 0x9000, 1 << 32, u64::MAX];
    for size in [1_u16, 2, 16, 256] {
        // Bytes and alignment of each, VIRTIO 1.2 §2.7.
        let entries = u64::from(size);
        let rings = [
            (16 * entries, 16),
            (6 + 2 * entries, 2),
            (6 + 8 * entries, 4),
        ];
        for (which, (bytes, alignment)) in rings.into_iter().enumerate() {
            let ends = edges.iter().map(|edge| edge.saturating_sub(bytes));
            for place in edges.into_iter().chain(ends) {
                for by in 0..=17_u64 {
                    for address in [place.saturating_sub(by), place.saturating_add(by)] {
                        check_ring(&rig, size, which, address, (bytes, alignment));
                    }
                }
            }
        }
    }
}

fn check_ring(rig: &Rig, size: u16, which: usize, address: u64, (bytes, alignment): (u64, u64)) {
    let mut places = [DESCRIPTORS, AVAILABLE, USED];
    places[which] = address;
    let msix = Arc::new(Msix::new(Arc::new(CountingSink::new(1))));
    let state = QueueState {
        max_size: 256,
        next_avail: size - 1,
        next_used: size - 1,
        event_idx_enabled: true,
        size,
        ready: true,
        desc_table: places[0],
        avail_ring: places[1],
        used_ring: places[2],
    };
    let interrupt = DeviceInterrupts::new("bounds", msix).queue();
    let queue = DeviceQueue::new(state, rig.memory.clone(), interrupt, Arc::default());
    let expected = address.is_multiple_of(alignment) && in_ram(address, bytes);
    assert_eq!(
        queue.is_ok(),
        expected,
        "ring {which} of {size} at {address:#x}"
    );
    // A ring at 0 is one that is not set up, to the crate that reads it; and those that lie over each other are
    // another test's.
    let Ok(mut queue) = queue else { return };
    if address < 0x3000 {
        return;
    }
    let last = u64::from(size) - 1;
    rig.put(places[0] + 16 * last, &descriptor(0x3000, 7, 0, 0));
    rig.put(places[1] + 2, &size.to_le_bytes());
    rig.put(places[1] + 4 + 2 * last, &(size - 1).to_le_bytes());
    let mut chain = Chain::new();
    assert!(queue.pop(&mut chain).unwrap());
    assert_eq!((chain.head(), chain.readable().size()), (size - 1, 7));
    queue.push(size - 1, 7).unwrap();
    queue.signal().unwrap();
    assert!(!queue.enable_doorbell().unwrap());
    let memory = rig.memory.memory();
    let element = GuestAddress(places[2] + 4 + 8 * last);
    assert_eq!(memory.read_obj::<u64>(element).unwrap(), 7 << 32 | last);
}

/// Every part of buffers in pieces, against the same bytes in one.
#[test]
fn every_part_of_scattered_buffers() {
    let rig = Rig::new();
    let bytes: Vec<u8> = (0..40).collect();
    rig.put(0x3ff0, &bytes);
    // One piece over the border of two regions, one of a byte, one of nothing, and one out of order.
    let pieces = [(0x3ffc_u64, 9_u32), (0x3ff0, 1), (0x3ff8, 0), (0x3ff1, 4)];
    let mut whole: Vec<u8> = Vec::new();
    for (index, (address, size)) in pieces.into_iter().enumerate() {
        let next = u16::try_from(index + 1).unwrap();
        let flags = if index + 1 < pieces.len() { NEXT } else { 0 };
        let at = DESCRIPTORS + 16 * u64::try_from(index).unwrap();
        rig.put(at, &descriptor(address, size, flags, next));
        let start = usize::try_from(address - 0x3ff0).unwrap();
        whole.extend(&bytes[start..start + usize::try_from(size).unwrap()]);
    }
    rig.put(AVAILABLE + 2, &1_u16.to_le_bytes());
    let mut chain = Chain::new();
    assert!(rig.queue(16, 0, false).pop(&mut chain).unwrap());
    let all = chain.readable();
    assert_eq!(all.size(), 14);
    for skip in (0..=16).chain(u64::MAX - 16..=u64::MAX) {
        let left = all.skip(skip);
        assert_eq!(left.is_some(), skip <= 14, "{skip}");
        let Some(left) = left else { continue };
        for take in (0..=16).chain(u64::MAX - 16..=u64::MAX) {
            let part = left.take(take);
            assert_eq!(part.is_some(), take <= 14 - skip, "{skip} {take}");
            let Some(part) = part else { continue };
            let expected =
                &whole[usize::try_from(skip).unwrap()..][..usize::try_from(take).unwrap()];
            let mut read = vec![0xff; 20];
            assert_eq!(part.read(&mut read), expected.len());
            assert_eq!(&read[..expected.len()], expected);
            let mut mapped = 0;
            part.each_host_range(|_, size| mapped += size);
            assert_eq!((mapped, part.size()), (expected.len(), take));
            assert!(part.skip(take.wrapping_add(1)).is_none() && part.skip(u64::MAX).is_none());
        }
    }
}

/// A BAR goes where the guest puts it exactly when all of it is in the window; else it stays where it was.
#[test]
fn every_place_of_a_bar() {
    const BAR_BYTES: u64 = 0x2_0000;
    const DOORBELLS: u64 = 0x3000;
    let (base, end) = (0xc000_0000_u64, 0xc100_0000_u64);
    let driver = Driver::new(Arc::new(Rng::new()));
    let around = |place: u64| {
        (0..=2).flat_map(move |by| {
            let by = by * BAR_BYTES;
            [place.saturating_sub(by), place.saturating_add(by)]
        })
    };
    let places = [0, base, end, 1 << 32, base + (1 << 32), 1 << 63, u64::MAX];
    for place in places.into_iter().flat_map(around) {
        // Registers first, as a driver sets them: decoding is off.
        driver.config_write(4, &0_u16.to_le_bytes());
        driver.config_write(0x10, &base.to_le_bytes()[..4]);
        driver.config_write(0x14, &[0; 4]);
        driver.config_write(4, &2_u16.to_le_bytes());
        assert_eq!(driver.doorbells.connected(), [base + DOORBELLS]);
        driver.config_write(4, &0_u16.to_le_bytes());
        driver.config_write(0x10, &place.to_le_bytes()[..4]);
        driver.config_write(0x14, &place.to_le_bytes()[4..]);
        driver.config_write(4, &2_u16.to_le_bytes());
        let wanted = place & !(BAR_BYTES - 1);
        let fits = u128::from(wanted) >= u128::from(base)
            && u128::from(wanted) + u128::from(BAR_BYTES) <= u128::from(end);
        let now = if fits { wanted } else { base };
        assert_eq!(
            driver.doorbells.connected(),
            [now + DOORBELLS],
            "{place:#x}"
        );
    }
}

/// Whatever offset and width a driver names in configuration space: an access within the BAR, or none.
#[test]
fn every_access_by_the_configuration_window() {
    let driver = Driver::new(Arc::new(Rng::new()));
    let [mut at] = driver.config_read::<1>(0x34);
    while driver.config_read::<4>(at.into())[3] != 5 {
        [at] = driver.config_read::<1>(u64::from(at) + 1);
    }
    let window = u64::from(at);
    // The register that says how many queues there are, two bytes at 0x12; and the end of the BAR.
    let offsets = (0..0x40).chain(0x1_fff0..=0x2_0010);
    for offset in offsets.chain(u32::MAX - 8..=u32::MAX) {
        for width in (0..=9).chain([u32::MAX]) {
            driver.config_write(window + 8, &offset.to_le_bytes());
            driver.config_write(window + 12, &width.to_le_bytes());
            let read = driver.config_read::<4>(window + 16);
            let there = offset < 0x2_0000 && matches!(width, 1 | 2 | 4);
            if there && offset == 0x12 && width == 2 {
                assert_eq!(read, [1, 0, 0, 0]);
            }
            if there && offset >= 0x3c {
                assert_eq!(read, [0; 4], "{offset:#x}");
            }
        }
    }
    assert_eq!(driver.status(), 0);
}

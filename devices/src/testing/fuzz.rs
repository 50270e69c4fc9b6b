// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Fuzz targets: any bytes are what a guest, an image or a snapshot brings, and none may panic. Ordinary tests replay
//! a corpus and seeded random inputs through them; `make fuzz` runs them under libFuzzer (`vmm/fuzz`).

mod any;
mod disk;
mod hotplug;
mod pci;
mod platform;
mod qcow2;
mod saved;
mod scsi;
mod vhost_user;

pub use any::{device, device_corpus};
pub use disk::{changes, changes_corpus, nbd, nbd_corpus};
pub use hotplug::{hotplug, hotplug_corpus};
pub use pci::{pci, pci_corpus};
pub use platform::{platform, platform_corpus};
pub use qcow2::{qcow2, qcow2_corpus};
pub use saved::{saved, saved_corpus};
pub use scsi::{scsi_corpus, scsi_device};
pub use vhost_user::{vhost_user, vhost_user_corpus};

use std::sync::Arc;

use atoll_disk::{Geometry, MemoryBackend};
use vm_memory::{Bytes, GuestAddress};

use super::CountingSink;
use super::replay::{Replay, Target};
use crate::memory::{Memory, Ram};
use crate::pci::Msix;
use crate::virtio::blk::request::{Action, Request};
use crate::virtio::blk::{Blk, BlkOptions};
use crate::virtio::worker::QueueHandler as _;
use crate::virtio::{Chain, DeviceInterrupts, DeviceQueue, QueueState};

/// Every target of this crate.
pub const TARGETS: &[Target] = &[
    Target {
        name: "queue",
        run: queue,
        corpus,
        replay: QUEUE,
    },
    Target {
        name: "blk_request",
        run: blk_request,
        corpus,
        replay: QUEUE,
    },
    Target {
        name: "blk_device",
        run: blk_device,
        corpus,
        replay: QUEUE,
    },
    Target {
        name: "scsi_device",
        run: scsi_device,
        corpus: scsi_corpus,
        replay: QUEUE,
    },
    Target {
        name: "device",
        run: device,
        corpus: device_corpus,
        replay: QUEUE,
    },
    Target {
        name: "pci",
        run: pci,
        corpus: pci_corpus,
        replay: Replay {
            rounds: 200,
            random_bytes_max: 1200,
            mutated_bytes: 1200,
        },
    },
    Target {
        name: "platform",
        run: platform,
        corpus: platform_corpus,
        replay: Replay {
            rounds: 300,
            random_bytes_max: 600,
            mutated_bytes: 200,
        },
    },
    Target {
        name: "saved",
        run: saved,
        corpus: saved_corpus,
        replay: Replay {
            rounds: 600,
            random_bytes_max: 60,
            mutated_bytes: 4000,
        },
    },
    Target {
        name: "qcow2",
        run: qcow2,
        corpus: qcow2_corpus,
        // Header and tables.
        replay: Replay {
            rounds: 300,
            random_bytes_max: 200,
            mutated_bytes: 4096,
        },
    },
    Target {
        name: "nbd",
        run: nbd,
        corpus: nbd_corpus,
        replay: Replay {
            rounds: 400,
            random_bytes_max: 300,
            mutated_bytes: 200,
        },
    },
    Target {
        name: "changes",
        run: changes,
        corpus: changes_corpus,
        // The header; its bits begin a page behind it.
        replay: Replay {
            rounds: 1000,
            random_bytes_max: 200,
            mutated_bytes: 80,
        },
    },
    Target {
        name: "hotplug",
        run: hotplug,
        corpus: hotplug_corpus,
        replay: Replay {
            rounds: 200,
            random_bytes_max: 1200,
            mutated_bytes: 1200,
        },
    },
    Target {
        name: "vhost_user",
        run: vhost_user,
        corpus: vhost_user_corpus,
        replay: Replay {
            rounds: 200,
            random_bytes_max: 300,
            mutated_bytes: 120,
        },
    },
];

const QUEUE: Replay = Replay {
    rounds: 300,
    random_bytes_max: 700,
    // Rings, descriptors and a request's header; then sectors.
    mutated_bytes: 92,
};

/// Guest RAM of a fuzzed machine.
const RAM_BYTES: usize = 0x2_0000;
const DESCRIPTORS: u64 = 0;
const AVAILABLE: u64 = 0x4000;
const USED: u64 = 0x8000;
/// Disk behind the fuzzed queue.
const DISK_BYTES: u64 = 0x1_0000;
/// Chains that one input may offer.
const CHAINS_MAX: usize = 600;

/// Byte 0: log2 of the queue's size (bits 0 to 3), event index (bit 7). Bytes 1 and 2: available index. Then the
/// available ring's entries, then descriptors (also indirect ones: the table goes on into RAM), then data.
fn machine(input: &[u8]) -> Option<(Memory, DeviceQueue)> {
    let (&first, rest) = input.split_first()?;
    let (index, rest) = rest.split_at_checked(2)?;
    let size = 1u16 << (first & 15).min(8);
    let entries = (2 * usize::from(size)).min(rest.len());
    let (entries, descriptors) = rest.split_at(entries);
    let ranges = [(GuestAddress(0), RAM_BYTES)];
    let ram = Ram::from_ranges(&ranges).unwrap();
    let descriptors = &descriptors[..descriptors.len().min(RAM_BYTES / 2)];
    let low = descriptors.len().min(0x4000);
    ram.write_slice(&descriptors[..low], GuestAddress(DESCRIPTORS))
        .unwrap();
    ram.write_slice(&descriptors[low..], GuestAddress(0x1_0000))
        .unwrap();
    ram.write_slice(index, GuestAddress(AVAILABLE + 2)).unwrap();
    ram.write_slice(entries, GuestAddress(AVAILABLE + 4))
        .unwrap();
    let memory = Memory::new(ram);
    let msix = Arc::new(Msix::new(Arc::new(CountingSink::new(1))));
    let interrupt = DeviceInterrupts::new("fuzz", msix).queue();
    let state = QueueState {
        max_size: 256,
        next_avail: 0,
        next_used: 0,
        event_idx_enabled: first & 0x80 != 0,
        size,
        ready: true,
        desc_table: DESCRIPTORS,
        avail_ring: AVAILABLE,
        used_ring: USED,
    };
    let queue = DeviceQueue::new(state, memory.clone(), interrupt, Arc::default()).unwrap();
    Some((memory, queue))
}

/// Walks every chain; each segment must lie in RAM, and the order must be readable before writable.
pub fn queue(input: &[u8]) {
    let Some((_, mut queue)) = machine(input) else {
        return;
    };
    let mut chain = Chain::new();
    for _ in 0..CHAINS_MAX {
        match queue.pop(&mut chain) {
            Ok(true) => {}
            Ok(false) | Err(_) => break,
        }
        for buffers in [chain.readable(), chain.writable()] {
            let mut size = 0;
            for segment in buffers.segments() {
                assert!(segment.size > 0);
                let end = segment.address.checked_add(segment.size.into()).unwrap();
                assert!(end <= RAM_BYTES as u64, "{segment:?}");
                size += u64::from(segment.size);
            }
            assert_eq!(size, buffers.size());
            let mut hosted = 0;
            buffers.each_host_range(|_, size| hosted += size as u64);
            assert_eq!(hosted, size);
        }
        queue.push(chain.head(), 0).unwrap();
        queue.signal().unwrap();
    }
    let _ = queue.enable_doorbell();
}

/// Parses every chain as a block request; what is accepted must fit what was offered.
pub fn blk_request(input: &[u8]) {
    let Some((_, mut queue)) = machine(input) else {
        return;
    };
    let mut chain = Chain::new();
    for _ in 0..CHAINS_MAX {
        if !matches!(queue.pop(&mut chain), Ok(true)) {
            break;
        }
        let Ok(request) = Request::parse(&chain) else {
            continue;
        };
        assert!(request.status < RAM_BYTES as u64);
        match request.action {
            Action::Read { offset, data } => {
                assert!(data.size() < chain.writable().size());
                assert!(offset.is_multiple_of(512) && data.size().is_multiple_of(512));
            }
            Action::Write { offset, data } => {
                assert_eq!(data.size() + 16, chain.readable().size());
                assert!(offset.is_multiple_of(512) && data.size().is_multiple_of(512));
            }
            Action::Range { offset, .. } => assert!(offset.is_multiple_of(512)),
            Action::Identify { .. } | Action::Flush | Action::Refuse(_) => {}
        }
    }
}

/// Runs the whole block device on the input, without a thread.
pub fn blk_device(input: &[u8]) {
    let Some((_, mut queue)) = machine(input) else {
        return;
    };
    let geometry = Geometry {
        size_bytes: DISK_BYTES,
        read_only: input[0] & 0x40 != 0,
    };
    let device = Blk::new(BlkOptions {
        name: "fuzz".to_owned(),
        backend: Arc::new(MemoryBackend::new(geometry)),
        serial: "fuzz".to_owned(),
        queue_count: 1,
    });
    let mut handler = device
        .handler(&queue, u64::from(input[0] & 0x20) << 4 | 0x6000)
        .unwrap();
    for _ in 0..4 {
        if handler.process(&mut queue).is_err() {
            break;
        }
    }
    let _ = handler.drain(&mut queue);
}

/// Inputs that reach far: well-formed requests, and one mistake each.
pub fn corpus() -> Vec<Vec<u8>> {
    let descriptor = |address: u64, size: u32, flags: u16, next: u16| {
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend(size.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        bytes
    };
    let input = |heads: &[u16; 4], index: u16, table: [Vec<u8>; 4], header: [u32; 4]| {
        let mut bytes = vec![0x82];
        bytes.extend(index.to_le_bytes());
        heads
            .iter()
            .for_each(|head| bytes.extend(head.to_le_bytes()));
        table.iter().for_each(|row| bytes.extend(row));
        header
            .iter()
            .for_each(|word| bytes.extend(word.to_le_bytes()));
        bytes.resize(bytes.len() + 600, 0x5a);
        bytes
    };
    // Entries 0..4 of the table fill 64 bytes, so the header is at 64 and data behind it.
    let good = [
        descriptor(64, 16, 1, 1),
        descriptor(0x1_0000, 512, 3, 2),
        descriptor(0x1_8000, 1, 2, 0),
        descriptor(0, 64, 4, 0),
    ];
    let mut all = vec![Vec::new(), vec![0xff; 3], vec![0; 700]];
    for kind in [0, 1, 4, 8, 11, 13, u32::MAX] {
        all.push(input(&[0; 4], 1, good.clone(), [kind, 0, 1, 0]));
    }
    all.push(input(&[0, 0, 0, 0], 4, good.clone(), [0; 4]));
    all.push(input(&[0, 3, 9, 0], 3, good.clone(), [0; 4]));
    all.push(input(&[0; 4], 5, good.clone(), [0; 4]));
    all.push(input(&[0; 4], 1, good.clone(), [0, 0, u32::MAX, u32::MAX]));
    let mutations: [(usize, Vec<u8>); 7] = [
        (1, descriptor(0x1_0000, 512, 3, 0)),
        (1, descriptor(0x1_0000, 512, 3, 700)),
        (1, descriptor(u64::MAX - 4, 512, 3, 2)),
        (1, descriptor(0x1_fff0, 0x20, 3, 2)),
        (1, descriptor(0x1_0000, 0, 3, 2)),
        (2, descriptor(64, 16, 0, 0)),
        (0, descriptor(0, 48, 4, 0)),
    ];
    for (at, row) in mutations {
        let mut table = good.clone();
        table[at] = row;
        all.push(input(&[0; 4], 1, table, [0; 4]));
    }
    all
}

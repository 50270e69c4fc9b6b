// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Bodies of the fuzz targets in `devices/fuzz`: any bytes are a guest's memory, none may panic. Ordinary tests
//! replay a corpus and seeded random inputs through them on the stable toolchain.

mod hotplug;
mod pci;
mod scsi;
mod vhost_user;

pub use hotplug::{hotplug, hotplug_corpus};
pub use pci::{pci, pci_corpus};
pub use scsi::{scsi_corpus, scsi_device};
pub use vhost_user::{vhost_user, vhost_user_corpus};

use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use atoll_disk::{Geometry, MemoryBackend};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::CountingSink;
use crate::console::{Console, ConsoleBackend};
use crate::memory::{Memory, Ram};
use crate::pci::Msix;
use crate::virtio::balloon::{Balloon, BalloonOptions};
use crate::virtio::blk::request::{Action, Request};
use crate::virtio::blk::{Blk, BlkOptions};
use crate::virtio::console::{PortOptions, VirtioConsole};
use crate::virtio::rng::Rng;
use crate::virtio::vsock::Vsock;
use crate::virtio::worker::QueueHandler as _;
use crate::virtio::{Chain, DeviceInterrupts, DeviceQueue, QueueStart, QueueState, VirtioDevice};

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

/// Serves the input with a queue of any kind of device, as its transport does, and stops it. Byte 0 chooses the device,
/// the rest is as for the others.
pub fn device(input: &[u8]) {
    let Some((&which, rest)) = input.split_first() else {
        return;
    };
    let Some((_, queue)) = machine(rest) else {
        return;
    };
    let device = any_device(which & 7);
    let count = device.queue_sizes().len();
    let index = usize::from(which >> 3) % count;
    let start = QueueStart {
        index: u16::try_from(index).expect("a handful of queues"),
        queue,
        features: device.features(),
        doorbell: EventFd::new(EFD_NONBLOCK).unwrap(),
        counters: Arc::default(),
    };
    // A queue that a device does not have without a feature is refused.
    if let Ok(started) = device.start_queue(start) {
        started.stop();
    }
    device.reset();
}

fn any_device(which: u8) -> Arc<dyn VirtioDevice> {
    let port = || Console::open(&ConsoleBackend::Null).unwrap().port();
    match which {
        0 | 1 => Arc::new(Rng::new()),
        2 | 3 => Arc::new(Balloon::new(BalloonOptions {
            deflate_on_oom: true,
            reporting: true,
        })),
        4 => Arc::new(VirtioConsole::new(port()).unwrap()),
        5 => Arc::new(sockets()),
        _ => {
            let ports = [None, Some("agent")].map(|name| PortOptions {
                port: port(),
                name: name.map(str::to_owned),
            });
            Arc::new(VirtioConsole::with_ports(ports.into()).unwrap())
        }
    }
}

/// A socket device whose host's programs are nowhere.
fn sockets() -> Vsock {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let name = format!("atoll-fuzz-{}-{count}", std::process::id());
    // Abstract: it leaves no file behind.
    let address = SocketAddr::from_abstract_name(name).unwrap();
    let listener = UnixListener::bind_addr(&address).unwrap();
    Vsock::new(3, "/nonexistent/socket".into(), listener).unwrap()
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

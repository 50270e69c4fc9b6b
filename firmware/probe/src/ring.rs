// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The driver's side of a split virtqueue, VIRTIO 1.2 §2.7, for benchmarks: chains are described once and offered
//! again and again, many are in flight, and both sides suppress notifications as an operating system's drivers do.
//! The devices' own checks use the queues of crate `virtio-drivers`.

use core::sync::atomic::{Ordering, fence};

use virtio_drivers::transport::Transport;

use crate::memory::Mmio;
use crate::transport::MsixTransport;

const DESCRIPTOR_BYTES: u64 = 16;
const USED_ELEMENT_BYTES: u64 = 8;
/// Offset of the index in both rings, and of their first entries.
const INDEX: u64 = 2;
const ENTRIES: u64 = 4;
/// Flag of the available ring: no interrupts. Of the used ring: no bells.
const FLAG_SILENT: u16 = 1;

/// One buffer of a chain.
#[derive(Clone, Copy, Debug)]
pub struct Buffer {
    /// Where.
    pub at: Mmio,
    /// How long.
    pub bytes: u32,
    /// The device writes it.
    pub writable: bool,
}

/// RAM for rings and buffers, behind everything else that the probe uses; a machine of at least 64 MiB has it.
pub struct Arena(u64);

impl Arena {
    /// All of it.
    pub fn new() -> Arena {
        Arena(16 << 20)
    }

    /// The next `bytes` of it, on pages of their own. Not zeroed.
    pub fn take(&mut self, bytes: u64) -> Mmio {
        let start = self.0;
        self.0 += bytes.next_multiple_of(4096);
        Mmio(start)
    }
}

/// A queue.
pub struct Ring {
    queue: u16,
    size: u16,
    event_index: bool,
    descriptors: Mmio,
    available: Mmio,
    used: Mmio,
    doorbell: Mmio,
    /// Chains offered so far, those of them that the device can see, and chains that came back.
    offered: u16,
    shown: u16,
    taken: u16,
    /// How often the device was rung.
    pub bells: u64,
}

impl Ring {
    /// Sets up queue number `queue` with `size` entries, a power of two.
    pub fn new(
        transport: &mut MsixTransport,
        arena: &mut Arena,
        (queue, size): (u16, u16),
        event_index: bool,
    ) -> Result<Ring, &'static str> {
        if transport.max_queue_size(queue) < u32::from(size) {
            return Err("the device has fewer or smaller queues");
        }
        let entries = u64::from(size);
        let mut part = |bytes: u64| {
            let start = arena.take(bytes);
            (0..bytes)
                .step_by(4)
                .for_each(|offset| start.write32(offset, 0));
            start
        };
        let mut ring = Ring {
            queue,
            size,
            event_index,
            descriptors: part(DESCRIPTOR_BYTES * entries),
            available: part(ENTRIES + 2 * entries + 4),
            used: part(ENTRIES + USED_ELEMENT_BYTES * entries + 4),
            doorbell: transport.doorbell(queue),
            offered: 0,
            shown: 0,
            taken: 0,
            bells: 0,
        };
        let (descriptors, driver, device) = (ring.descriptors.0, ring.available.0, ring.used.0);
        transport.queue_set(queue, u32::from(size), descriptors, driver, device);
        ring.doorbell = transport.doorbell(queue);
        Ok(ring)
    }

    /// Makes the descriptors from `head` on one chain of `buffers`.
    pub fn describe(&self, head: u16, buffers: &[Buffer]) {
        for (index, buffer) in (head..).zip(buffers) {
            let at = Mmio(self.descriptors.0 + u64::from(index) * DESCRIPTOR_BYTES);
            let more = usize::from(index - head) + 1 < buffers.len();
            at.write64(0, buffer.at.0);
            at.write32(8, buffer.bytes);
            at.write16(12, u16::from(more) | u16::from(buffer.writable) << 1);
            at.write16(14, if more { index + 1 } else { 0 });
        }
    }

    /// Offers the chain to the device, with the next [`Ring::show`].
    pub fn offer(&mut self, head: u16) {
        let entry = ENTRIES + 2 * u64::from(self.offered % self.size);
        self.available.write16(entry, head);
        self.offered = self.offered.wrapping_add(1);
    }

    /// Shows the device what was offered, and rings if it wants that.
    pub fn show(&mut self) {
        let (old, new) = (self.shown, self.offered);
        if old == new {
            return;
        }
        self.available.write16(INDEX, new);
        self.shown = new;
        // The device writes its wish, then looks at the index.
        fence(Ordering::SeqCst);
        let wanted = if self.event_index {
            let event = self
                .used
                .read16(ENTRIES + USED_ELEMENT_BYTES * u64::from(self.size));
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            self.used.read16(0) & FLAG_SILENT == 0
        };
        if wanted {
            self.bells += 1;
            self.doorbell.write16(0, self.queue);
        }
    }

    /// The next chain that came back: its head, and bytes written to it.
    pub fn take(&mut self) -> Option<(u16, u32)> {
        if self.used.read16(INDEX) == self.taken {
            return None;
        }
        let entry = ENTRIES + USED_ELEMENT_BYTES * u64::from(self.taken % self.size);
        self.taken = self.taken.wrapping_add(1);
        Some((self.used.read32(entry) as u16, self.used.read32(entry + 4)))
    }

    /// Asks for an interrupt when the next chain comes back; false when one has come back already.
    pub fn listen(&self) -> bool {
        self.wish(self.taken, 0)
    }

    /// Asks for no interrupts.
    pub fn ignore(&self) -> bool {
        self.wish(self.taken.wrapping_sub(1), FLAG_SILENT)
    }

    fn wish(&self, event: u16, flags: u16) -> bool {
        if self.event_index {
            self.available
                .write16(ENTRIES + 2 * u64::from(self.size), event);
        } else {
            self.available.write16(0, flags);
        }
        fence(Ordering::SeqCst);
        self.used.read16(INDEX) == self.taken
    }
}

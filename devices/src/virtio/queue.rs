// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The device's side of one virtqueue: checked chains out, used buffers in, notification suppression both ways.
//!
//! The available ring (index, fences, doorbell suppression) and the walk of descriptors are crate `virtio-queue`'s.
//! The used ring is ours, since a batch must become visible at once: a network driver that finds the first buffer
//! of a packet expects the others there. And this module adds what a device must not forget: every chain is walked once, into a list of segments that is known to end, to lie in
//! guest RAM and to have its writable part last. Nothing is read from the descriptor tables again.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Queue, QueueOwnedT, QueueState, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryBackend, GuestMemoryLoadGuard};

use super::QueueInterrupt;
use crate::counters::QueueCounters;
use crate::memory::{Memory, Ram};

/// Segments one chain may have; more than any queue size we offer, and bounds what one indirect table costs.
const SEGMENTS_MAX: usize = 1024;
/// Layout of the rings, VIRTIO 1.2 §2.7.6 and §2.7.8: index, entries, and the size of a used element.
const USED_INDEX: u64 = 2;
const USED_RING: u64 = 4;
const USED_ELEMENT_BYTES: u64 = 8;
const AVAIL_RING: u64 = 4;

/// A mistake of the driver that makes the rings unusable; the device needs a reset.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// Ring addresses or sizes that cannot be, or an available index that runs ahead.
    #[error("virtqueue")]
    Ring(#[from] virtio_queue::Error),
    /// The chain does not end, leaves the table, nests indirect tables, or is empty.
    #[error("descriptor chain {head} is malformed")]
    Chain {
        /// Its head.
        head: u16,
    },
    /// A descriptor points out of guest RAM, or wraps.
    #[error("descriptor chain {head}: {size} bytes at {address:#x} are not in guest memory")]
    Range {
        /// Its head.
        head: u16,
        /// Start of the buffer.
        address: u64,
        /// Its size.
        size: u32,
    },
    /// A readable descriptor after a writable one.
    #[error("descriptor chain {head}: readable part after writable part")]
    Order {
        /// Its head.
        head: u16,
    },
    /// The chain is not of the form that this kind of device needs.
    #[error("descriptor chain {head}: {what}")]
    Form {
        /// Its head.
        head: u16,
        /// What is missing.
        what: &'static str,
    },
    /// The host failed, and the device cannot go on.
    #[error("{what}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        source: std::io::Error,
    },
}

/// A piece of guest RAM, checked to exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Guest-physical address of the first byte; `size` bytes from there on are RAM, of one region or of several that
    /// adjoin.
    pub address: u64,
    /// Bytes, at least 1: empty descriptors yield no segment.
    pub size: u32,
}

/// One descriptor chain, parsed. Reused from chain to chain so that the hot path does not allocate.
pub struct Chain {
    head: u16,
    readable: Vec<Segment>,
    writable: Vec<Segment>,
    ram: Option<Arc<Ram>>,
}

impl Default for Chain {
    fn default() -> Self {
        Self::new()
    }
}

impl Chain {
    /// An empty one, to be filled by [`DeviceQueue::pop`].
    pub fn new() -> Self {
        Self {
            head: 0,
            readable: Vec::with_capacity(16),
            writable: Vec::with_capacity(16),
            ram: None,
        }
    }

    /// Index of the first descriptor: what goes into the used ring.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// What the device reads: the chain's first part (VIRTIO 1.2 §2.7.4.2), all of it in RAM. Panics before the first
    /// [`DeviceQueue::pop`].
    pub fn readable(&self) -> GuestBuffers<'_> {
        self.buffers(&self.readable)
    }

    /// What the device writes: the chain's second part, all of it in RAM. Panics before the first [`DeviceQueue::pop`].
    pub fn writable(&self) -> GuestBuffers<'_> {
        self.buffers(&self.writable)
    }

    /// An error that says that this chain has not the form that the device needs; it breaks the device.
    pub fn malformed(&self, what: &'static str) -> QueueError {
        QueueError::Form {
            head: self.head,
            what,
        }
    }

    fn buffers<'a>(&'a self, segments: &'a [Segment]) -> GuestBuffers<'a> {
        let ram = self.ram.as_ref().expect("set by pop before any use");
        GuestBuffers {
            ram,
            segments,
            skip: 0,
            size: segments.iter().map(|segment| u64::from(segment.size)).sum(),
        }
    }

    fn fill(
        &mut self,
        ram: &GuestMemoryLoadGuard<Ram>,
        descriptors: virtio_queue::DescriptorChain<&Ram>,
    ) -> Result<(), QueueError> {
        let head = descriptors.head_index();
        self.head = head;
        self.readable.clear();
        self.writable.clear();
        let mut ended = false;
        let mut count = 0;
        // The iterator of virtio-queue ends silently at a bad link, and bounds loops by the table's size: a last
        // descriptor that still names a next one tells us so.
        for descriptor in descriptors {
            count += 1;
            ended = !descriptor.has_next();
            if count > SEGMENTS_MAX {
                return Err(QueueError::Chain { head });
            }
            let (address, size) = (descriptor.addr().0, descriptor.len());
            let bytes = usize::try_from(size).expect("64-bit host");
            if address.checked_add(u64::from(size)).is_none()
                || size != 0
                    && !GuestMemoryBackend::check_range(&**ram, GuestAddress(address), bytes)
            {
                return Err(QueueError::Range {
                    head,
                    address,
                    size,
                });
            }
            let segment = Segment { address, size };
            match (descriptor.is_write_only(), self.writable.is_empty()) {
                _ if size == 0 => {}
                (true, _) => self.writable.push(segment),
                (false, true) => self.readable.push(segment),
                (false, false) => return Err(QueueError::Order { head }),
            }
        }
        if !ended {
            return Err(QueueError::Chain { head });
        }
        // Guest RAM changes when memory is plugged in. Otherwise the count of its holders, which every queue's thread
        // would write for each chain, is left alone.
        let known = self
            .ram
            .as_ref()
            .is_some_and(|known| std::ptr::eq(&**known, &**ram));
        if !known {
            self.ram = Some(ram.clone().into_inner());
        }
        Ok(())
    }
}

/// Some bytes of guest RAM, in pieces. Copying out of it or into it is how data crosses the boundary; reading the
/// same bytes twice is the caller's mistake.
#[derive(Clone, Copy)]
pub struct GuestBuffers<'a> {
    ram: &'a Arc<Ram>,
    segments: &'a [Segment],
    /// Bytes to leave out at the front.
    skip: u64,
    /// Bytes in the segments, `skip` included.
    size: u64,
}

impl<'a> GuestBuffers<'a> {
    /// Bytes in all segments, without those that were skipped or not taken.
    pub fn size(&self) -> u64 {
        self.size - self.skip
    }

    /// Without the first `count` bytes; `None` if there are fewer.
    pub fn skip(self, count: u64) -> Option<Self> {
        let skip = self.skip.checked_add(count)?;
        (skip <= self.size).then_some(Self { skip, ..self })
    }

    /// Only the first `count` bytes; `None` if there are fewer.
    pub fn take(self, count: u64) -> Option<Self> {
        let size = self.skip.checked_add(count)?;
        (size <= self.size).then_some(Self { size, ..self })
    }

    /// The RAM that all segments were checked against; it stays mapped for as long as the chain has it.
    pub fn ram(&self) -> &'a Arc<Ram> {
        self.ram
    }

    /// Whole pieces of what is left after skipping and taking.
    pub fn segments(&self) -> impl Iterator<Item = Segment> + use<'a> {
        let (mut skip, mut left) = (self.skip, self.size());
        self.segments.iter().filter_map(move |segment| {
            let size = u64::from(segment.size);
            let skipped = skip.min(size);
            skip -= skipped;
            let size = (size - skipped).min(left);
            left -= size;
            (size > 0).then(|| Segment {
                address: segment.address + skipped,
                size: u32::try_from(size).expect("part of a 32-bit size"),
            })
        })
    }

    /// Copies to `data` as much as both have; returns the count.
    pub fn read(&self, mut data: &mut [u8]) -> usize {
        let mut total = 0;
        for segment in self.segments() {
            let count = data.len().min(usize::try_from(segment.size).unwrap_or(0));
            let (part, rest) = std::mem::take(&mut data).split_at_mut(count);
            if count == 0
                || self
                    .ram
                    .read_slice(part, GuestAddress(segment.address))
                    .is_err()
            {
                break;
            }
            total += count;
            data = rest;
        }
        total
    }

    /// Copies from `data` as much as both have; returns the count.
    pub fn write(&self, mut data: &[u8]) -> usize {
        let mut total = 0;
        for segment in self.segments() {
            let count = data.len().min(usize::try_from(segment.size).unwrap_or(0));
            let (part, rest) = data.split_at(count);
            if count == 0
                || self
                    .ram
                    .write_slice(part, GuestAddress(segment.address))
                    .is_err()
            {
                break;
            }
            total += count;
            data = rest;
        }
        total
    }

    /// Calls `each` with the host's pointer to every piece, and its length. The pointers are good while
    /// [`GuestBuffers::ram`] is held. Who lets the kernel write through them tells [`mark`](crate::memory::mark) afterwards.
    pub fn each_host_range(&self, mut each: impl FnMut(*mut u8, usize)) {
        for segment in self.segments() {
            let size = usize::try_from(segment.size).expect("64-bit host");
            let start = GuestAddress(segment.address);
            // A segment may span two adjacent regions.
            for slice in GuestMemoryBackend::get_slices(&**self.ram, start, size).flatten() {
                each(slice.ptr_guard_mut().as_ptr(), slice.len());
            }
        }
    }
}

/// One virtqueue in service. Owned by its thread.
pub struct DeviceQueue {
    queue: Queue,
    /// Where the next used element goes; ahead of the queue's own index by what was pushed and not yet shown.
    next_used: u16,
    memory: Memory,
    interrupt: QueueInterrupt,
    counters: Arc<QueueCounters>,
}

impl DeviceQueue {
    /// Checks the rings that the driver (or a snapshot) described.
    pub fn new(
        state: QueueState,
        memory: Memory,
        interrupt: QueueInterrupt,
        counters: Arc<QueueCounters>,
    ) -> Result<Self, QueueError> {
        let queue = Queue::try_from(state)?;
        if !queue.is_valid(&*memory.memory()) {
            return Err(virtio_queue::Error::QueueNotReady.into());
        }
        Ok(Self {
            next_used: queue.next_used(),
            queue,
            memory,
            interrupt,
            counters,
        })
    }

    /// Entries of each ring: a power of two that the driver chose, at most the device's own (VIRTIO 1.2 §2.7).
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Takes the next chain into `chain`. `false` when the driver has offered no more.
    pub fn pop(&mut self, chain: &mut Chain) -> Result<bool, QueueError> {
        let ram = self.memory.memory();
        let Some(descriptors) = self.queue.iter(&*ram)?.next() else {
            return Ok(false);
        };
        self.counters.chains.add(1);
        chain.fill(&ram, descriptors)?;
        Ok(true)
    }

    /// Whether the driver has offered a chain that was not taken.
    pub fn has_chains(&self) -> Result<bool, QueueError> {
        let offered = self
            .queue
            .avail_idx(&*self.memory.memory(), Ordering::Acquire)?;
        Ok(offered.0 != self.queue.next_avail())
    }

    /// Gives the last `count` chains back, to be popped again.
    pub fn undo_pop(&mut self, count: u16) {
        let next = self.queue.next_avail().wrapping_sub(count);
        self.queue.set_next_avail(next);
    }

    /// Puts a chain into the used ring, `written` bytes of its writable part filled. The driver sees it after the
    /// next [`DeviceQueue::signal`], together with everything pushed before: one batch, one index.
    pub fn push(&mut self, head: u16, written: u32) -> Result<(), QueueError> {
        if head >= self.queue.size() {
            return Err(virtio_queue::Error::InvalidDescriptorIndex.into());
        }
        let slot = u64::from(self.next_used % self.queue.size());
        let address = GuestAddress(self.queue.used_ring() + USED_RING + slot * USED_ELEMENT_BYTES);
        let element = u64::from(head) | u64::from(written) << 32;
        self.memory
            .memory()
            .write_obj(element.to_le(), address)
            .map_err(virtio_queue::Error::GuestMemory)?;
        self.next_used = self.next_used.wrapping_add(1);
        Ok(())
    }

    /// Shows the driver what was pushed and interrupts it, if it wants that.
    pub fn signal(&mut self) -> Result<(), QueueError> {
        let old = self.queue.next_used();
        if self.next_used == old {
            return Ok(());
        }
        let ram = self.memory.memory();
        ram.store(
            self.next_used.to_le(),
            GuestAddress(self.queue.used_ring() + USED_INDEX),
            Ordering::Release,
        )
        .map_err(virtio_queue::Error::GuestMemory)?;
        self.queue.set_next_used(self.next_used);
        // The index must be visible before the driver's wish is read: it writes its wish, then looks at the index.
        fence(Ordering::SeqCst);
        if self.interrupt_wanted(&ram, old)? {
            self.counters.interrupts.add(1);
            self.interrupt.signal();
        }
        Ok(())
    }

    /// VIRTIO 1.2 §2.7.7: by event index when the driver took that feature, else by the ring's flag. `old` is the
    /// index at the last question.
    fn interrupt_wanted(&self, ram: &Ram, old: u16) -> Result<bool, QueueError> {
        let load = |offset: u64| {
            let address = GuestAddress(self.queue.avail_ring() + offset);
            ram.load::<u16>(address, Ordering::Relaxed)
                .map(u16::from_le)
                .map_err(virtio_queue::Error::GuestMemory)
        };
        if !self.queue.event_idx_enabled() {
            let flags = load(0)?;
            return Ok(u32::from(flags) & VRING_AVAIL_F_NO_INTERRUPT == 0);
        }
        let used_event = load(AVAIL_RING + 2 * u64::from(self.queue.size()))?;
        let (new, event) = (self.next_used, used_event);
        Ok(new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old))
    }

    /// Asks the driver not to ring while the queue is being emptied.
    pub fn disable_doorbell(&mut self) -> Result<(), QueueError> {
        Ok(self.queue.disable_notification(&*self.memory.memory())?)
    }

    /// Asks the driver to ring again. `true` when chains came in meanwhile: then look again before sleeping.
    pub fn enable_doorbell(&mut self) -> Result<bool, QueueError> {
        Ok(self.queue.enable_notification(&*self.memory.memory())?)
    }

    /// One rate-limited log line about this queue's device.
    pub fn note(&self, what: &dyn std::fmt::Display) {
        self.interrupt.device().note(what);
    }

    /// Guest RAM, for whoever serves the queue beside this process's threads.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// How the driver is told of used buffers; for those who serve a queue without [`DeviceQueue::signal`].
    pub fn interrupt(&self) -> &QueueInterrupt {
        &self.interrupt
    }

    /// What this queue counts; the same numbers that the control API shows for it.
    pub fn counters(&self) -> &QueueCounters {
        &self.counters
    }

    /// Where the rings stand now, chains that were popped and not pushed counted as gone. For a pause, after everything popped
    /// was pushed or given back.
    pub fn state(&self) -> QueueState {
        self.queue.state()
    }
}

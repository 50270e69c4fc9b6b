// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A pair of rings that the kernel serves (vhost): what its network cards and its sockets have in common. Linux,
//! `drivers/vhost/vhost.c`.
//!
//! Doorbell and interrupt are the same eventfds that a thread of ours would use. Who the rings are connected with is
//! each device's own affair.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::Ordering;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use vhost::vhost_kern::VhostKernBackend;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_queue::QueueState;
use vm_memory::{
    Address, Bytes, GuestAddress, GuestAddressSpace, GuestMemoryBackend, GuestMemoryRegion,
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::QueueStart;
use crate::memory::Memory;

/// The kernel's end of two queues.
pub(super) struct KernelRings {
    file: File,
    /// Guest RAM; known, and the kernel told whose it is, from the first start on.
    memory: OnceLock<Memory>,
    /// Which of the two rings the kernel serves now; held while that changes. Leaf lock over an ioctl that ends
    /// when the kernel's thread has finished its packet.
    running: Mutex<[bool; 2]>,
}

impl AsRawFd for KernelRings {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

impl VhostKernBackend for KernelRings {
    type AS = Memory;

    fn mem(&self) -> &Memory {
        self.memory.get().expect("set before the first ring is")
    }
}

impl KernelRings {
    /// Of a vhost device file of which nothing has been asked.
    pub(super) fn new(file: File) -> Self {
        Self {
            file,
            memory: OnceLock::new(),
            running: Mutex::default(),
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, [bool; 2]> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Features that the kernel's device has.
    pub(super) fn known_features(&self) -> io::Result<u64> {
        self.get_features().map_err(io::Error::other)
    }

    /// Tells the kernel all about ring `ring` of two, `start`'s, but nobody to be connected with. `running` is locked.
    pub(super) fn prepare(
        &self,
        ring: usize,
        start: &QueueStart,
        running: [bool; 2],
    ) -> io::Result<QueueState> {
        let state = start.queue.state();
        let signal = match start.queue.interrupt().event()? {
            Some(event) => event,
            // The driver polls: nobody listens.
            None => EventFd::new(EFD_NONBLOCK)?,
        };
        let place = VringConfigData {
            queue_max_size: state.max_size,
            queue_size: state.size,
            flags: 0,
            desc_table_addr: state.desc_table,
            used_ring_addr: state.used_ring,
            avail_ring_addr: state.avail_ring,
            log_addr: None,
        };
        let tell = || {
            if self.memory.set(start.queue.memory().clone()).is_ok() {
                self.set_owner()?;
            }
            if running == [false; 2] {
                let known = self.get_features()?;
                self.set_features(start.features & known)?;
                self.set_mem_table(&regions(self.mem()))?;
            }
            self.set_vring_num(ring, state.size)?;
            self.set_vring_base(ring, state.next_avail)?;
            self.set_vring_addr(ring, &place)?;
            self.set_vring_call(ring, &signal)?;
            self.set_vring_kick(ring, &start.doorbell)
        };
        tell().map_err(io::Error::other)?;
        Ok(state)
    }

    /// Where ring `ring` stands, which was at `state` and is no longer served.
    pub(super) fn position(&self, ring: usize, state: QueueState) -> QueueState {
        let next_avail = match self.get_vring_base(ring) {
            Ok(base) => u16::try_from(base & 0xffff).expect("masked"),
            Err(error) => {
                tracing::error!(ring, %error, "vhost: where the ring stands");
                state.next_avail
            }
        };
        let index = GuestAddress(state.used_ring).unchecked_add(2);
        let used: Result<u16, _> = self.mem().memory().load(index, Ordering::Acquire);
        QueueState {
            next_avail,
            next_used: used.map_or(state.next_used, u16::from_le),
            ..state
        }
    }
}

/// Guest RAM as the kernel wants it: where it is for the guest and for this process.
fn regions(memory: &Memory) -> Vec<VhostUserMemoryRegionInfo> {
    let region = |region: &_| {
        let region: &vm_memory::GuestRegionMmap<_> = region;
        VhostUserMemoryRegionInfo {
            guest_phys_addr: region.start_addr().raw_value(),
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
            mmap_offset: 0,
            mmap_handle: -1,
        }
    };
    memory.memory().iter().map(region).collect()
}

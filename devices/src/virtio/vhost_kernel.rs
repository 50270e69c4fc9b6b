// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A pair of rings that the kernel serves (vhost): what its network cards and its sockets have in common. Linux,
//! `drivers/vhost/vhost.c`.
//!
//! Doorbell and interrupt are the same eventfds that a thread of ours would use. Who the rings are connected with is
//! each device's own affair.
//!
//! **The log.** What the kernel writes past this process is in no log of ours. While somebody wants to know, it notes
//! each page (`VHOST_F_LOG_ALL`) in a bitmap over the guest's addresses, which is in this process's memory; what is in
//! there goes into guest memory's own log whenever that is asked for, and when a ring ends. Noted are what a packet is
//! put into, and the used ring, whose address has to be told once more for that (`VHOST_VRING_F_LOG`).

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use vhost::vhost_kern::VhostKernBackend;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_queue::QueueState;
use vm_memory::{
    Address, Bytes, GuestAddress, GuestAddressSpace, GuestMemoryBackend, GuestMemoryRegion,
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::QueueStart;
use crate::memory::{self, Memory, Ram};

/// `VHOST_F_LOG_ALL` of `linux/vhost.h`: the kernel notes which pages it writes. A feature between it and us, not one
/// of the guest's.
const LOG_ALL: u64 = 1 << 26;
/// `VHOST_VRING_F_LOG`: writes to this used ring are noted, too.
const RING_LOG: u32 = 1;

/// The kernel's end of two queues.
pub(super) struct KernelRings {
    file: File,
    /// Guest RAM; known, and the kernel told whose it is, from the first start on.
    memory: OnceLock<Memory>,
    /// What the kernel does now; held while that changes. Leaf lock over an ioctl that ends when the kernel's thread has
    /// finished its packet.
    rings: Mutex<Rings>,
}

/// What the kernel does with two rings.
#[derive(Default)]
pub(super) struct Rings {
    /// Where those are that it serves now.
    places: [Option<VringConfigData>; 2],
    /// What is common to both, and the guest's.
    features: u64,
    /// Somebody wants to know which pages it writes.
    is_logged: bool,
    /// Where it notes them: there as soon as it has been wanted and the kernel knows guest memory. Its words stay where
    /// they are until the file is closed, since the kernel keeps their address.
    log: Option<KernelLog>,
}

impl Rings {
    /// The kernel serves it.
    pub(super) fn runs(&self, ring: usize) -> bool {
        self.places[ring].is_some()
    }

    /// It serves both.
    pub(super) fn both_run(&self) -> bool {
        self.runs(0) && self.runs(1)
    }

    /// It no longer does.
    pub(super) fn end(&mut self, ring: usize) {
        self.places[ring] = None;
    }

    fn features(&self) -> u64 {
        match self.is_logged {
            true => self.features | LOG_ALL,
            false => self.features,
        }
    }

    /// As the kernel is told of it, in the mode that is wanted.
    fn place(&self, ring: &VringConfigData) -> VringConfigData {
        let logged = self.is_logged.then_some(ring.used_ring_addr);
        VringConfigData {
            flags: logged.map_or(0, |_| RING_LOG),
            log_addr: logged,
            ..*ring
        }
    }
}

/// Pages that the kernel has written, for [`memory::drain`].
struct KernelLog(Vec<AtomicU64>);

impl KernelLog {
    fn of(ram: &Ram) -> Self {
        let words = (0..memory::word_count(ram)).map(|_| AtomicU64::new(0));
        Self(words.collect())
    }

    fn address(&self) -> u64 {
        self.0.as_ptr() as u64
    }
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
            rings: Mutex::default(),
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Rings> {
        self.rings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Features that the kernel's device has.
    pub(super) fn known_features(&self) -> io::Result<u64> {
        self.get_features().map_err(io::Error::other)
    }

    /// Whether the kernel can tell which pages it writes.
    pub(super) fn can_log(&self) -> bool {
        let known = self.known_features();
        known.is_ok_and(|features| features & LOG_ALL != 0)
    }

    /// Whether the kernel notes from now on which pages it writes, for [`KernelRings::note_writes`].
    pub(super) fn log_writes(&self, on: bool) -> io::Result<()> {
        let mut rings = self.lock();
        rings.is_logged = on;
        if self.memory.get().is_none() {
            return Ok(());
        }
        self.tell_mode(&mut rings).map_err(io::Error::other)
    }

    /// Tells the kernel whether its writes are logged, in general and for the rings that it serves.
    fn tell_mode(&self, rings: &mut Rings) -> Result<(), vhost::Error> {
        if rings.is_logged && rings.log.is_none() {
            let log = KernelLog::of(&self.mem().memory());
            self.set_log_base(log.address(), None)?;
            rings.log = Some(log);
        }
        self.set_features(rings.features())?;
        for (index, ring) in rings.places.iter().enumerate() {
            if let Some(ring) = ring {
                self.set_vring_addr(index, &rings.place(ring))?;
            }
        }
        Ok(())
    }

    /// Puts what the kernel has written since the last call into the log of guest memory.
    pub(super) fn note_writes(&self) {
        self.note(&self.lock());
    }

    fn note(&self, rings: &Rings) {
        if let Some(log) = &rings.log {
            memory::drain(log.0.iter(), &self.mem().memory());
        }
    }

    /// Tells the kernel all about ring `ring` of two, `start`'s, but nobody to be connected with.
    pub(super) fn prepare(
        &self,
        ring: usize,
        start: &QueueStart,
        rings: &mut Rings,
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
        let mut tell = || {
            if self.memory.set(start.queue.memory().clone()).is_ok() {
                self.set_owner()?;
            }
            if !rings.runs(0) && !rings.runs(1) {
                let known = self.get_features()? & !LOG_ALL;
                rings.features = start.features & known;
                self.set_mem_table(&regions(self.mem()))?;
                self.tell_mode(rings)?;
            }
            self.set_vring_num(ring, state.size)?;
            self.set_vring_base(ring, state.next_avail)?;
            self.set_vring_addr(ring, &rings.place(&place))?;
            self.set_vring_call(ring, &signal)?;
            self.set_vring_kick(ring, &start.doorbell)
        };
        tell().map_err(io::Error::other)?;
        rings.places[ring] = Some(place);
        Ok(state)
    }

    /// Where ring `ring` stands, which was at `state` and is no longer served.
    pub(super) fn position(&self, ring: usize, state: QueueState, rings: &Rings) -> QueueState {
        self.note(rings);
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

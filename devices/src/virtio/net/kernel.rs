// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! vhost-net: the kernel moves the packets between the driver's rings and the tap, without this process.
//!
//! One descriptor of `/dev/vhost-net` a pair of queues, opened while the machine is built. Doorbell and interrupt
//! are the same eventfds that a thread of ours would use. What the kernel cannot do stays with the threads: rate
//! limits, receive filters (it delivers everything), and telling which pages it wrote (for a migration).
//! Linux, `drivers/vhost/net.c`.

#![expect(
    unsafe_code,
    reason = "one ioctl that crate vhost has for its own open files only"
)]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use vhost::vhost_kern::VhostKernBackend;
use vhost::vhost_kern::vhost_binding::{VHOST_NET_SET_BACKEND, vhost_vring_file};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_queue::QueueState;
use vm_memory::{
    Address, Bytes, GuestAddress, GuestAddressSpace, GuestMemoryBackend, GuestMemoryRegion,
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::ioctl::ioctl_with_ref;

use super::{Shared, Tap};
use crate::counters::CounterList;
use crate::memory::Memory;
use crate::virtio::{QueueStart, StartError, StartedQueue};

/// What of the host a card in the kernel needs, open.
pub struct VhostNetFiles {
    pairs: Vec<File>,
    statistics: TapStatistics,
}

impl VhostNetFiles {
    /// For `pair_count` pairs of queues on the tap `interface`.
    pub fn open(interface: &str, pair_count: u16) -> io::Result<Self> {
        let open = |_| {
            let mut options = OpenOptions::new();
            options.read(true).write(true).open("/dev/vhost-net")
        };
        Ok(Self {
            pairs: (0..pair_count).map(open).collect::<io::Result<_>>()?,
            statistics: TapStatistics::open(interface),
        })
    }

    /// Takes what somebody else opened: `/dev/vhost-net` once a pair, and the interface's statistics, in the order of
    /// [`STATISTICS`], or none.
    pub fn from_files(pairs: Vec<File>, statistics: Vec<File>) -> Self {
        Self {
            pairs,
            statistics: TapStatistics::of(statistics.into_iter().map(Some)),
        }
    }

    /// The files, for a process that opens them for another one's [`VhostNetFiles::from_files`].
    pub fn into_files(self) -> Vec<File> {
        let statistics = self.statistics.files.into_iter().map(|(_, file)| file);
        let statistics: Option<Vec<File>> = statistics.collect();
        let statistics = statistics.unwrap_or_default();
        self.pairs.into_iter().chain(statistics).collect()
    }

    pub(super) fn into_parts(self) -> (Vec<Arc<KernelPair>>, TapStatistics) {
        let pair = |file| {
            Arc::new(KernelPair {
                file,
                memory: OnceLock::new(),
                running: Mutex::default(),
            })
        };
        (self.pairs.into_iter().map(pair).collect(), self.statistics)
    }
}

/// The kernel's end of one pair of queues.
pub(super) struct KernelPair {
    file: File,
    /// Guest RAM; known, and the kernel told whose it is, from the first start on.
    memory: OnceLock<Memory>,
    /// Which of the two rings the kernel serves now; held while that changes. Leaf lock over an ioctl that ends
    /// when the kernel's thread has finished its packet.
    running: Mutex<[bool; 2]>,
}

impl AsRawFd for KernelPair {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

impl VhostKernBackend for KernelPair {
    type AS = Memory;

    fn mem(&self) -> &Memory {
        self.memory.get().expect("set before the first ring is")
    }
}

impl KernelPair {
    fn lock(&self) -> MutexGuard<'_, [bool; 2]> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Serves ring `ring` (0: receive, 1: transmit) of `start` on `tap` from now on.
    pub(super) fn start(
        self: &Arc<Self>,
        ring: usize,
        start: &QueueStart,
        tap: &Arc<Tap>,
        shared: &Arc<Shared>,
    ) -> Result<Box<dyn StartedQueue>, StartError> {
        let state = start.queue.state();
        let failed = |error: vhost::Error| StartError {
            index: start.index,
            source: io::Error::other(error),
        };
        let mut running = self.lock();
        if self.memory.set(start.queue.memory().clone()).is_ok() {
            self.set_owner().map_err(failed)?;
        }
        if *running == [false; 2] {
            let known = self.get_features().map_err(failed)?;
            self.set_features(start.features & known).map_err(failed)?;
            self.set_mem_table(&regions(self.mem())).map_err(failed)?;
        }
        let signal = start.queue.interrupt().event();
        let signal = signal.and_then(|event| match event {
            Some(event) => Ok(event),
            // The driver polls: nobody listens.
            None => EventFd::new(EFD_NONBLOCK),
        });
        let signal = signal.map_err(|source| StartError {
            index: start.index,
            source,
        })?;
        let place = VringConfigData {
            queue_max_size: state.max_size,
            queue_size: state.size,
            flags: 0,
            desc_table_addr: state.desc_table,
            used_ring_addr: state.used_ring,
            avail_ring_addr: state.avail_ring,
            log_addr: None,
        };
        self.set_vring_num(ring, state.size).map_err(failed)?;
        self.set_vring_base(ring, state.next_avail)
            .map_err(failed)?;
        self.set_vring_addr(ring, &place).map_err(failed)?;
        self.set_vring_call(ring, &signal).map_err(failed)?;
        self.set_vring_kick(ring, &start.doorbell).map_err(failed)?;
        let backend = shared.link_up().then(|| tap.file());
        self.set_backend(ring, backend)
            .map_err(|source| StartError {
                index: start.index,
                source,
            })?;
        running[ring] = true;
        drop(running);
        Ok(Box::new(Running {
            pair: self.clone(),
            ring,
            state,
        }))
    }

    /// The tap that a ring's packets go to or come from; none: the kernel leaves the ring alone.
    fn set_backend(&self, ring: usize, tap: Option<&File>) -> io::Result<()> {
        let request = vhost_vring_file {
            index: u32::try_from(ring).expect("0 or 1"),
            fd: tap.map_or(-1, AsRawFd::as_raw_fd),
        };
        // SAFETY: an open descriptor; the kernel reads a struct of this type from the reference.
        let result = unsafe { ioctl_with_ref(self, VHOST_NET_SET_BACKEND(), &request) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// Connects what runs with the tap, or cuts it off.
    pub(super) fn set_link(&self, tap: &Tap, up: bool) {
        let running = self.lock();
        for ring in (0..2).filter(|ring| running[*ring]) {
            if let Err(error) = self.set_backend(ring, up.then(|| tap.file())) {
                tracing::error!(ring, %error, "vhost-net: set the link");
            }
        }
    }
}

/// A ring that the kernel serves.
struct Running {
    pair: Arc<KernelPair>,
    ring: usize,
    state: QueueState,
}

impl StartedQueue for Running {
    fn stop(self: Box<Self>) -> QueueState {
        let mut running = self.pair.lock();
        // After this the kernel has finished its packet and touches nothing any more.
        if let Err(error) = self.pair.set_backend(self.ring, None) {
            tracing::error!(ring = self.ring, %error, "vhost-net: stop");
        }
        running[self.ring] = false;
        let next_avail = match self.pair.get_vring_base(self.ring) {
            Ok(base) => u16::try_from(base & 0xffff).expect("masked"),
            Err(error) => {
                tracing::error!(ring = self.ring, %error, "vhost-net: where the ring stands");
                self.state.next_avail
            }
        };
        let index = GuestAddress(self.state.used_ring).unchecked_add(2);
        let used: Result<u16, _> = self.pair.mem().memory().load(index, Ordering::Acquire);
        QueueState {
            next_avail,
            next_used: used.map_or(self.state.next_used, u16::from_le),
            ..self.state
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

/// The interface's own numbers, for a card whose packets we do not see. Kept open, since they are read when the
/// process no longer reaches /sys.
pub(super) struct TapStatistics {
    files: Vec<(&'static str, Option<File>)>,
    failed: AtomicBool,
}

/// Files of `/sys/class/net/…/statistics` that tell a card's numbers, and the counters that they are. What the host
/// sent is what the guest received.
pub const STATISTICS: [(&str, &str); 5] = [
    ("received", "tx_packets"),
    ("received_bytes", "tx_bytes"),
    ("sent", "rx_packets"),
    ("sent_bytes", "rx_bytes"),
    ("dropped", "tx_dropped"),
];

impl TapStatistics {
    /// Of the interface `name` in this network namespace.
    pub(super) fn open(name: &str) -> Self {
        let path = |file| format!("/sys/class/net/{name}/statistics/{file}");
        Self::of(STATISTICS.map(|(_, file)| File::open(path(file)).ok()))
    }

    fn of(files: impl IntoIterator<Item = Option<File>>) -> Self {
        let files = files.into_iter().chain(std::iter::repeat_with(|| None));
        let names = STATISTICS.map(|(counter, _)| counter);
        Self {
            files: names.into_iter().zip(files).collect(),
            failed: AtomicBool::new(false),
        }
    }

    /// The numbers now; zero where they cannot be read.
    pub(super) fn list(&self) -> CounterList {
        let value = |(name, file): &(&'static str, Option<File>)| {
            let Some(file) = file else {
                return (*name, 0);
            };
            let mut text = [0; 24];
            let read = file.read_at(&mut text, 0);
            if let Err(error) = &read
                && !self.failed.swap(true, Ordering::Relaxed)
            {
                tracing::warn!(%error, "vhost-net: read the tap's statistics");
            }
            let digits = text.get(..read.unwrap_or(0)).unwrap_or_default();
            let digits = str::from_utf8(digits).unwrap_or_default().trim();
            (*name, digits.parse().unwrap_or(0))
        };
        self.files.iter().map(value).collect()
    }
}

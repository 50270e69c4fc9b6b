// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! vhost-net: the kernel moves the packets between the driver's rings and the tap, without this process.
//!
//! One descriptor of `/dev/vhost-net` a pair of queues, opened while the machine is built. What the kernel cannot do
//! stays with the threads: rate limits and receive filters (it delivers everything). Linux, `drivers/vhost/net.c`.

#![expect(
    unsafe_code,
    reason = "one ioctl that crate vhost has for its own open files only"
)]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vhost::vhost_kern::vhost_binding::{VHOST_NET_SET_BACKEND, vhost_vring_file};
use virtio_queue::QueueState;
use vmm_sys_util::ioctl::ioctl_with_ref;

use super::{Shared, Tap};
use crate::counters::CounterList;
use crate::virtio::vhost_kernel::KernelRings;
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
        let pair = |file| Arc::new(KernelPair(KernelRings::new(file)));
        (self.pairs.into_iter().map(pair).collect(), self.statistics)
    }
}

/// The kernel's end of one pair of queues.
pub(super) struct KernelPair(KernelRings);

impl KernelPair {
    /// Serves ring `ring` (0: receive, 1: transmit) of `start` on `tap` from now on.
    pub(super) fn start(
        self: &Arc<Self>,
        ring: usize,
        start: &QueueStart,
        tap: &Arc<Tap>,
        shared: &Arc<Shared>,
    ) -> Result<Box<dyn StartedQueue>, StartError> {
        let mut rings = self.0.lock();
        let state = self.0.prepare(ring, start, &mut rings).and_then(|state| {
            let backend = shared.link_up().then(|| tap.file());
            self.set_backend(ring, backend)?;
            Ok(state)
        });
        let state = state.map_err(|source| {
            rings.end(ring);
            StartError {
                index: start.index,
                source,
            }
        })?;
        drop(rings);
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
        let result = unsafe { ioctl_with_ref(&self.0, VHOST_NET_SET_BACKEND(), &request) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// The kernel's end of the pair's rings, for the log of what it writes.
    pub(super) fn rings(&self) -> &KernelRings {
        &self.0
    }

    /// Connects what runs with the tap, or cuts it off.
    pub(super) fn set_link(&self, tap: &Tap, up: bool) {
        let rings = self.0.lock();
        for ring in (0..2).filter(|ring| rings.runs(*ring)) {
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
        let mut rings = self.pair.0.lock();
        // After this the kernel has finished its packet and touches nothing any more.
        if let Err(error) = self.pair.set_backend(self.ring, None) {
            tracing::error!(ring = self.ring, %error, "vhost-net: stop");
        }
        rings.end(self.ring);
        self.pair.0.position(self.ring, self.state, &rings)
    }
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

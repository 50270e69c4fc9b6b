// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Memory balloon, VIRTIO 1.2 §5.5: the guest gives pages back to the host, when it is asked to or, by free-page
//! reporting, whenever it has no use for them; and it tells how its memory is used.
//!
//! The queues that a driver accepted follow each other without gaps, as all drivers and devices have it (the
//! clause gives them fixed numbers): inflate, deflate, statistics, reporting.

mod discard;
mod statistics;

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use atoll_thread::Kind;
use serde::{Deserialize, Serialize};

use self::statistics::StatisticsQueue;
use super::worker::{self, Progress, QueueHandler};
use super::{
    Chain, DeviceInterrupts, DeviceQueue, QueueError, QueueStart, StartError, StartedQueue,
    VirtioDevice, device_id,
};
use crate::counters::{Counter, CounterList};
use crate::state::{DeviceState, Saved, SavedState, StateError};

pub use self::discard::discard;
pub use self::statistics::Statistics;

/// Unit of the balloon, whatever the guest's page size, §5.5.6.
const PAGE_BYTES: u64 = 4096;
/// Entries of every queue.
const QUEUE_SIZE: u16 = 128;
/// Page numbers one chain may bring; Linux sends 256 at most.
const PAGES_MAX: usize = 4096;
/// Feature bits, §5.5.3.
const F_STATISTICS: u64 = 1 << 1;
const F_DEFLATE_ON_OOM: u64 = 1 << 2;
const F_REPORTING: u64 = 1 << 5;

/// Optional features that a balloon offers to its driver, VIRTIO 1.2 §5.5.3; fixed, since the driver has seen them.
#[derive(Debug, Clone, Copy)]
pub struct BalloonOptions {
    /// The guest may take pages back when it runs out of memory, without asking.
    pub deflate_on_oom: bool,
    /// The guest tells of pages that it does not use, and the host takes them until they are touched again.
    pub reporting: bool,
}

#[derive(Default)]
struct Shared {
    /// Pages that the host wants, and that the guest says it has given.
    target_pages: AtomicU32,
    actual_pages: AtomicU32,
    discarded_bytes: Counter,
    discard_errors: Counter,
    statistics: Mutex<Option<Statistics>>,
    /// Features that the driver accepted; 0 before.
    features: AtomicU64,
}

/// The memory balloon, VIRTIO 1.2 §5.5: the host says a target, the guest gives pages until it is reached. Its queues'
/// threads discard pages; nothing waits for the guest.
pub struct Balloon {
    options: BalloonOptions,
    shared: Arc<Shared>,
    /// Leaf lock: how to tell the driver of a new target, once there is a driver.
    interrupts: Mutex<Option<DeviceInterrupts>>,
}

impl Balloon {
    /// A balloon that has nothing and wants nothing: its target is 0 until [`Balloon::set_target`].
    pub fn new(options: BalloonOptions) -> Self {
        Self {
            options,
            shared: Arc::default(),
            interrupts: Mutex::default(),
        }
    }

    /// Asks the guest for so much of its memory; it gives what it can, when it can.
    pub fn set_target(&self, bytes: u64) {
        let pages = u32::try_from(bytes / PAGE_BYTES).unwrap_or(u32::MAX);
        if self.shared.target_pages.swap(pages, Ordering::AcqRel) != pages {
            let interrupts = self.lock_interrupts().clone();
            if let Some(interrupts) = interrupts {
                interrupts.config_changed();
            }
        }
    }

    /// What the host wants the guest to have given, in bytes; the guest may be on its way there, or refuse.
    pub fn target(&self) -> u64 {
        u64::from(self.shared.target_pages.load(Ordering::Acquire)) * PAGE_BYTES
    }

    /// What the guest says it has given, in bytes.
    pub fn actual(&self) -> u64 {
        u64::from(self.shared.actual_pages.load(Ordering::Acquire)) * PAGE_BYTES
    }

    /// What the guest last told of its memory.
    pub fn statistics(&self) -> Option<Statistics> {
        self.shared.lock_statistics().clone()
    }

    fn lock_interrupts(&self) -> MutexGuard<'_, Option<DeviceInterrupts>> {
        self.interrupts
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Shared {
    fn lock_statistics(&self) -> MutexGuard<'_, Option<Statistics>> {
        self.statistics
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a queue is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Use {
    Inflate,
    Deflate,
    Statistics,
    Reporting,
}

/// The queues of a driver that accepted `features`, in their order.
fn uses(features: u64) -> impl Iterator<Item = Use> {
    [
        (true, Use::Inflate),
        (true, Use::Deflate),
        (features & F_STATISTICS != 0, Use::Statistics),
        (features & F_REPORTING != 0, Use::Reporting),
    ]
    .into_iter()
    .filter_map(|(there, queue)| there.then_some(queue))
}

impl VirtioDevice for Balloon {
    fn device_id(&self) -> u16 {
        device_id::BALLOON
    }

    fn features(&self) -> u64 {
        let optional = |on: bool, feature: u64| if on { feature } else { 0 };
        F_STATISTICS
            | optional(self.options.deflate_on_oom, F_DEFLATE_ON_OOM)
            | optional(self.options.reporting, F_REPORTING)
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; uses(self.features()).count()]
    }

    fn config_read(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; 8];
        let target = self.shared.target_pages.load(Ordering::Acquire);
        let actual = self.shared.actual_pages.load(Ordering::Acquire);
        config[..4].copy_from_slice(&target.to_le_bytes());
        config[4..].copy_from_slice(&actual.to_le_bytes());
        super::read_config(&config, offset, data);
    }

    /// The driver may write `actual` only, as a whole.
    fn config_write(&self, offset: u64, data: &[u8]) {
        if let (4, &[a, b, c, d]) = (offset, data) {
            let pages = u32::from_le_bytes([a, b, c, d]);
            self.shared.actual_pages.store(pages, Ordering::Release);
        }
    }

    fn connect(&self, interrupts: DeviceInterrupts) {
        *self.lock_interrupts() = Some(interrupts);
    }

    fn start_queue(&self, start: QueueStart) -> Result<Box<dyn StartedQueue>, StartError> {
        self.shared
            .features
            .store(start.features, Ordering::Release);
        let shared = self.shared.clone();
        let chain = Chain::new();
        let mut uses = uses(start.features);
        let handler: Box<dyn QueueHandler> = match uses.nth(start.index.into()) {
            Some(Use::Statistics) => Box::new(StatisticsQueue::new(shared)),
            Some(queue) => Box::new(Pages {
                queue,
                shared,
                chain,
            }),
            None => {
                let source = std::io::ErrorKind::NotFound.into();
                let index = start.index;
                return Err(StartError { index, source });
            }
        };
        worker::spawn(Kind::Queue, "balloon", start, handler)
    }

    fn reset(&self) {
        *self.lock_interrupts() = None;
        self.shared.actual_pages.store(0, Ordering::Release);
        self.shared.features.store(0, Ordering::Release);
        *self.shared.lock_statistics() = None;
    }

    fn counters(&self) -> CounterList {
        vec![
            ("discarded_bytes", self.shared.discarded_bytes.value()),
            ("discard_errors", self.shared.discard_errors.value()),
        ]
    }
}

/// What the guest has seen or said.
#[derive(Serialize, Deserialize)]
struct BalloonState {
    target_pages: u32,
    actual_pages: u32,
}

impl SavedState for BalloonState {
    const KIND: &'static str = "virtio-balloon";
    const VERSION: u32 = 1;
}

impl DeviceState for Balloon {
    fn save(&self) -> Saved {
        Saved::of(&BalloonState {
            target_pages: self.shared.target_pages.load(Ordering::Acquire),
            actual_pages: self.shared.actual_pages.load(Ordering::Acquire),
        })
    }

    fn restore(&self, saved: &Saved) -> Result<(), StateError> {
        let state: BalloonState = saved.open()?;
        let shared = &self.shared;
        shared
            .target_pages
            .store(state.target_pages, Ordering::Release);
        shared
            .actual_pages
            .store(state.actual_pages, Ordering::Release);
        Ok(())
    }
}

/// Serves inflate, deflate and reporting queues.
struct Pages {
    queue: Use,
    shared: Arc<Shared>,
    chain: Chain,
}

impl QueueHandler for Pages {
    fn process(&mut self, queue: &mut DeviceQueue) -> Result<Progress, QueueError> {
        queue.disable_doorbell()?;
        for _ in 0..queue.size() {
            if !queue.pop(&mut self.chain)? {
                break;
            }
            match self.queue {
                Use::Inflate => self.inflate()?,
                Use::Reporting => self.report(),
                // A page that is taken back appears when it is touched.
                Use::Deflate | Use::Statistics => {}
            }
            queue.push(self.chain.head(), 0)?;
        }
        queue.signal()?;
        let more = queue.enable_doorbell()?;
        Ok(Progress::again_if(more))
    }
}

impl Pages {
    /// The chain is an array of page numbers, which are not the guest's to use until it deflates.
    fn inflate(&self) -> Result<(), QueueError> {
        let numbers = self.chain.readable();
        let size = usize::try_from(numbers.size()).unwrap_or(usize::MAX);
        if size > PAGES_MAX * 4 {
            return Err(self.chain.malformed("too many page numbers"));
        }
        let mut bytes = vec![0; size];
        let size = numbers.read(&mut bytes);
        let (numbers, _) = bytes[..size].as_chunks::<4>();
        // Neighbours go together: one call instead of hundreds.
        let mut run: Option<(u64, u64)> = None;
        for number in numbers.iter().map(|number| u32::from_le_bytes(*number)) {
            let address = u64::from(number) * PAGE_BYTES;
            run = match run {
                Some((start, size)) if start + size == address => Some((start, size + PAGE_BYTES)),
                Some((start, size)) if start == address + PAGE_BYTES => {
                    Some((address, size + PAGE_BYTES))
                }
                other => {
                    self.discard(other);
                    Some((address, PAGE_BYTES))
                }
            };
        }
        self.discard(run);
        Ok(())
    }

    /// The chain's buffers are themselves the memory that the guest does not use, until they are given back.
    fn report(&self) {
        for segment in self.chain.writable().segments() {
            self.discard(Some((segment.address, segment.size.into())));
        }
    }

    fn discard(&self, range: Option<(u64, u64)>) {
        let Some((address, size)) = range else { return };
        let ram = self.chain.writable().ram();
        match discard::discard(ram, address, size) {
            Ok(bytes) => self.shared.discarded_bytes.add(bytes),
            Err(_) => self.shared.discard_errors.add(1),
        }
    }
}

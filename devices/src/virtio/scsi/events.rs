// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The event queue, VIRTIO 1.2 §5.6.6.3: units that came, went or changed, told in buffers that the driver offers.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::request::Address;
use crate::virtio::worker::{Progress, QueueHandler};
use crate::virtio::{Chain, DeviceQueue, QueueError};

/// Bytes of `struct virtio_scsi_event`: event, unit, reason.
pub(super) const EVENT_BYTES: usize = 16;
/// Events that wait for a buffer; of more, the driver is told that it missed some and looks at everything.
const WAITING_MAX: usize = 64;
const TRANSPORT_RESET: u32 = 1;
const PARAMETERS_CHANGED: u32 = 3;
const MISSED: u32 = 1 << 31;
const REASON_RESCAN: u32 = 1;
const REASON_REMOVED: u32 = 2;
/// "Capacity data has changed", code and qualifier in one word.
const REASON_CAPACITY: u32 = 0x2a | 9 << 8;

/// One event.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Event {
    kind: u32,
    target: u8,
    reason: u32,
}

impl Event {
    pub(super) fn added(target: u8) -> Self {
        Self {
            kind: TRANSPORT_RESET,
            target,
            reason: REASON_RESCAN,
        }
    }

    pub(super) fn removed(target: u8) -> Self {
        Self {
            kind: TRANSPORT_RESET,
            target,
            reason: REASON_REMOVED,
        }
    }

    pub(super) fn capacity_changed(target: u8) -> Self {
        Self {
            kind: PARAMETERS_CHANGED,
            target,
            reason: REASON_CAPACITY,
        }
    }

    fn bytes(self, missed: bool) -> [u8; EVENT_BYTES] {
        let kind = self.kind | if missed { MISSED } else { 0 };
        let mut bytes = [0; EVENT_BYTES];
        bytes[..4].copy_from_slice(&kind.to_le_bytes());
        bytes[4..12].copy_from_slice(&Address::bytes(self.target));
        bytes[12..].copy_from_slice(&self.reason.to_le_bytes());
        bytes
    }
}

#[derive(Default)]
struct Waiting {
    events: VecDeque<Event>,
    missed: bool,
}

struct Shared {
    // Leaf lock, held to push or to take.
    waiting: Mutex<Waiting>,
    wake: EventFd,
}

/// What has happened and was not told yet.
pub(super) struct Events(Arc<Shared>);

impl Events {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self(Arc::new(Shared {
            waiting: Mutex::default(),
            wake: EventFd::new(EFD_NONBLOCK)?,
        })))
    }

    /// To be told to the driver as soon as it offers a buffer.
    pub(super) fn report(&self, event: Event) {
        let mut waiting = self.0.lock();
        if waiting.events.len() < WAITING_MAX {
            waiting.events.push_back(event);
        } else {
            waiting.missed = true;
        }
        drop(waiting);
        // Fails only when its counter is full: then the thread is awake anyway.
        let _ = self.0.wake.write(1);
    }

    /// The driver was reset: it looks at everything anyway.
    pub(super) fn forget(&self) {
        *self.0.lock() = Waiting::default();
    }

    pub(super) fn save(&self) -> (Vec<Event>, bool) {
        let waiting = self.0.lock();
        (waiting.events.iter().copied().collect(), waiting.missed)
    }

    pub(super) fn restore(&self, events: Vec<Event>, missed: bool) {
        let events = events.into();
        *self.0.lock() = Waiting { events, missed };
    }

    /// What serves the event queue.
    pub(super) fn reporter(&self) -> Reporter {
        Reporter {
            shared: self.0.clone(),
            chain: Chain::new(),
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Fills the driver's buffers.
pub(super) struct Reporter {
    shared: Arc<Shared>,
    chain: Chain,
}

impl QueueHandler for Reporter {
    fn sources(&self) -> Vec<(RawFd, EventSet)> {
        vec![(self.shared.wake.as_raw_fd(), EventSet::IN)]
    }

    /// The doorbell stays on: buffers are offered rarely.
    fn process(&mut self, queue: &mut DeviceQueue) -> Result<Progress, QueueError> {
        loop {
            let mut waiting = self.shared.lock();
            let Some(event) = waiting.events.front().copied() else {
                break;
            };
            if !queue.pop(&mut self.chain)? {
                break;
            }
            waiting.events.pop_front();
            let bytes = event.bytes(std::mem::take(&mut waiting.missed));
            drop(waiting);
            if self.chain.writable().write(&bytes) < EVENT_BYTES {
                return Err(self.chain.malformed("no room for a SCSI event"));
            }
            let written = u32::try_from(EVENT_BYTES).expect("16");
            queue.push(self.chain.head(), written)?;
        }
        queue.signal()?;
        Ok(Progress::Sleep)
    }
}

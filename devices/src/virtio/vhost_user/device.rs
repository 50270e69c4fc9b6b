// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A device of which the other process does everything: a disk, a file system (VIRTIO 1.2 §5.11), or whatever else
//! has a number. Ours is what the guest is shown of it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_blk::VIRTIO_BLK_F_MQ;
use virtio_queue::QueueState;

use super::{Backend, BackendOptions, DeviceKind, Event, VhostUserError, device_id};
use crate::counters::CounterList;
use crate::state::{DeviceState, Saved, SavedState, StateError, same};
use crate::virtio::{
    Act, DeviceInterrupts, QueueStart, StartError, StartedQueue, VirtioDevice, read_config,
};

/// Entries of each queue.
const QUEUE_SIZE: u16 = 256;
/// Bytes of a file system's tag in its configuration, padded with zeroes, VIRTIO 1.2 §5.11.4.
pub const TAG_BYTES_MAX: usize = 36;
/// Where a disk tells its number of queues, §5.2.4.
const BLK_QUEUE_COUNT: usize = 34;

/// A virtio device whose queues another process serves: this one has its registers, and tells of rings and memory.
pub struct VhostUser {
    kind: DeviceKind,
    queue_count: u16,
    /// Configuration that is ours and not the backend's.
    config: Vec<u8>,
    backend: Arc<Backend>,
    driver: Arc<Driver>,
}

/// How to tell the driver of changes, once there is one. Leaf lock.
#[derive(Default)]
struct Driver(Mutex<Option<DeviceInterrupts>>);

impl Driver {
    fn lock(&self) -> MutexGuard<'_, Option<DeviceInterrupts>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn hear(&self, event: Event) {
        let driver = self.lock().clone();
        match (event, driver) {
            (Event::Gone, Some(driver)) => driver.needs_reset(&GONE),
            (Event::Configured, Some(driver)) => driver.config_changed(),
            // The driver has been told to reset the device, and does it or not.
            (Event::Back, _) | (_, None) => {}
        }
    }
}

const GONE: &str = "the process that serves it is gone";

/// How many queues and how much configuration, where it is not as the kind has it.
#[derive(Debug, Clone, Copy, Default)]
pub struct Layout {
    /// Virtqueues, all of which the backend serves; it is refused when it has fewer.
    pub queue_count: Option<u16>,
    /// Bytes of configuration space that the backend keeps.
    pub config_bytes: Option<u16>,
}

impl VhostUser {
    /// A device of that kind, any but a network card.
    pub fn new(
        kind: DeviceKind,
        layout: Layout,
        options: BackendOptions,
    ) -> Result<Self, VhostUserError> {
        Self::with_config(kind, layout, options, Vec::new())
    }

    /// A directory of the host; the guest mounts it as `tag`, of 1 to 36 bytes.
    pub fn file_system(tag: &str, options: BackendOptions) -> Result<Self, VhostUserError> {
        // The tag, padded with zeroes, and the number of request queues.
        let mut config = vec![0; TAG_BYTES_MAX + 4];
        let size = tag.len().min(TAG_BYTES_MAX);
        config[..size].copy_from_slice(&tag.as_bytes()[..size]);
        config[TAG_BYTES_MAX] = 1;
        let kind = DeviceKind::of(device_id::FS);
        Self::with_config(kind, Layout::default(), options, config)
    }

    fn with_config(
        kind: DeviceKind,
        layout: Layout,
        options: BackendOptions,
        config: Vec<u8>,
    ) -> Result<Self, VhostUserError> {
        let queue_count = layout.queue_count.unwrap_or(kind.queue_count);
        let terms = kind.terms(queue_count, layout.config_bytes);
        let backend = Backend::new(options, terms)?;
        let driver = Arc::new(Driver::default());
        let listener = driver.clone();
        backend.listen(Box::new(move |event| listener.hear(event)));
        Ok(Self {
            kind,
            queue_count,
            config,
            backend,
            driver,
        })
    }
}

impl VirtioDevice for VhostUser {
    fn device_id(&self) -> u16 {
        self.kind.id
    }

    fn features(&self) -> u64 {
        let features = self.backend.features();
        match (self.kind.id, self.queue_count) {
            (device_id::BLOCK, 1) => features & !(1 << VIRTIO_BLK_F_MQ),
            _ => features,
        }
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; self.queue_count.into()]
    }

    fn config_read(&self, offset: u64, data: &mut [u8]) {
        if !self.config.is_empty() {
            return read_config(&self.config, offset, data);
        }
        if self.kind.id != device_id::BLOCK {
            return self.backend.config_read(offset, data);
        }
        // The backend may have more queues than this disk.
        let mut config = [0; 60];
        self.backend.config_read(0, &mut config);
        config[BLK_QUEUE_COUNT..][..2].copy_from_slice(&self.queue_count.to_le_bytes());
        read_config(&config, offset, data);
    }

    fn config_write(&self, offset: u64, data: &[u8]) {
        if self.config.is_empty() {
            self.backend.config_write(offset, data);
        }
    }

    fn connect(&self, interrupts: DeviceInterrupts) {
        *self.driver.lock() = Some(interrupts);
    }

    fn start_queue(&self, start: QueueStart) -> Result<Box<dyn StartedQueue>, StartError> {
        let driver = start.queue.interrupt().device().clone();
        if driver.is_broken() {
            // Its rings stand nobody knows where, until the driver makes new ones.
            return Ok(Box::new(Idle(start.queue.state())));
        }
        let started = self.backend.start(start.index.into(), &start, true)?;
        Ok(started.unwrap_or_else(|| {
            driver.needs_reset(&GONE);
            Box::new(Idle(start.queue.state()))
        }))
    }

    fn reset(&self) {
        *self.driver.lock() = None;
    }

    fn obstacle(&self, act: Act) -> Option<String> {
        match act {
            Act::Snapshot | Act::Migration if !self.kind.keeps_nothing => {
                let text = "its vhost-user backend knows what is in no saved state, as of open files: start the machine without it";
                Some(text.to_owned())
            }
            // The machine has it from start to end.
            _ => super::obstacle(&self.backend, act, "start the machine without it"),
        }
    }

    fn log_writes(&self, on: bool) -> std::io::Result<()> {
        self.backend.log_writes(on)
    }

    fn note_writes(&self) {
        self.backend.note_writes();
    }

    fn counters(&self) -> CounterList {
        vec![("backend_alive", self.backend.is_alive().into())]
    }
}

/// A queue that nobody serves.
struct Idle(QueueState);

impl StartedQueue for Idle {
    fn stop(self: Box<Self>) -> QueueState {
        self.0
    }
}

/// What the driver was shown.
#[derive(Serialize, Deserialize)]
struct VhostUserState {
    device: u16,
    queue_count: u16,
    features: u64,
}

impl SavedState for VhostUserState {
    const KIND: &'static str = "vhost-user";
    const VERSION: u32 = 1;
}

impl DeviceState for VhostUser {
    fn save(&self) -> Saved {
        Saved::of(&VhostUserState {
            device: self.kind.id,
            queue_count: self.queue_count,
            features: self.features(),
        })
    }

    fn restore(&self, saved: &Saved) -> Result<(), StateError> {
        let state: VhostUserState = saved.open()?;
        same::<VhostUserState, _>("the virtio device number", state.device, self.kind.id)?;
        let (was, now) = (state.queue_count, self.queue_count);
        same::<VhostUserState, _>("the number of queues", was, now)?;
        match self.obstacle(Act::Snapshot) {
            None => Ok(()),
            Some(what) => Err(StateError::Differs {
                kind: VhostUserState::KIND,
                what,
            }),
        }
    }
}

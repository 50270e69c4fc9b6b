// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The control queues of a console with several ports, VIRTIO 1.2 §5.3.6.2: the driver learns which ports there
//! are, what they are called, and that their host's end is open.
//!
//! ```text
//!  driver                               device
//!    DEVICE_READY ────────────────────►
//!                 ◄──────────────────── DEVICE_ADD of each port
//!    PORT_READY of a port ────────────►
//!                 ◄──────────────────── CONSOLE_PORT if it is one, PORT_NAME if it has one, PORT_OPEN
//! ```
//! The host's end counts as open for ever: what the guest writes while nobody listens is lost, as on a wire.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use crate::virtio::worker::{Progress, QueueHandler};
use crate::virtio::{Chain, DeviceQueue, QueueError};

/// Events, §5.3.6.2.
const DEVICE_READY: u16 = 0;
const DEVICE_ADD: u16 = 1;
const PORT_READY: u16 = 3;
const CONSOLE_PORT: u16 = 4;
const PORT_OPEN: u16 = 6;
const PORT_NAME: u16 = 7;
/// `struct virtio_console_control`: port, event, value.
const MESSAGE_BYTES: usize = 8;
/// Answers that wait for the driver's buffers. A well-behaved one has asked for a handful; what a driver asks for
/// beyond that without ever taking the answers is dropped.
const WAITING_MAX: usize = 256;

/// What the device tells of one port.
pub(super) struct Description {
    /// The guest's udev makes `/dev/virtio-ports/NAME` of it.
    pub(super) name: Option<String>,
    /// Whether it is a terminal (hvc) or a plain channel.
    pub(super) is_console: bool,
}

/// What the two control queues share.
pub(super) struct Control {
    ports: Vec<Description>,
    /// Messages for the driver. Leaf lock, for one push or pop.
    waiting: Mutex<VecDeque<Vec<u8>>>,
    wake: EventFd,
}

impl Control {
    pub(super) fn new(ports: Vec<Description>, wake: EventFd) -> Self {
        Self {
            ports,
            waiting: Mutex::default(),
            wake,
        }
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Vec<u8>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn waiting(&self) -> Vec<Vec<u8>> {
        self.lock().iter().cloned().collect()
    }

    pub(super) fn set_waiting(&self, messages: Vec<Vec<u8>>) {
        *self.lock() = messages.into_iter().take(WAITING_MAX).collect();
    }

    /// Answers one message of the driver. `false`: it makes no sense.
    fn obey(&self, message: &[u8]) -> bool {
        let Some(&[a, b, c, d, e, f, g, h]) = message.first_chunk::<MESSAGE_BYTES>() else {
            return false;
        };
        let id = u32::from_le_bytes([a, b, c, d]);
        let (event, value) = (u16::from_le_bytes([e, f]), u16::from_le_bytes([g, h]));
        let port = usize::try_from(id).ok().and_then(|id| self.ports.get(id));
        match (event, value, port) {
            (DEVICE_READY, 1, _) => {
                let count = u32::try_from(self.ports.len()).expect("a handful of ports");
                (0..count).for_each(|port| self.say(port, DEVICE_ADD, 1, b""));
            }
            (PORT_READY, 1, Some(port)) => {
                if port.is_console {
                    self.say(id, CONSOLE_PORT, 1, b"");
                }
                if let Some(name) = &port.name {
                    self.say(id, PORT_NAME, 1, name.as_bytes());
                }
                self.say(id, PORT_OPEN, 1, b"");
            }
            // It has no driver for the device or the port, or opened or closed its end: nothing changes here.
            (DEVICE_READY | PORT_READY | PORT_OPEN, _, _) => {}
            _ => return false,
        }
        true
    }

    fn say(&self, port: u32, event: u16, value: u16, extra: &[u8]) {
        let mut message = port.to_le_bytes().to_vec();
        message.extend(event.to_le_bytes());
        message.extend(value.to_le_bytes());
        message.extend(extra);
        let mut waiting = self.lock();
        if waiting.len() < WAITING_MAX {
            waiting.push_back(message);
        }
        drop(waiting);
        // Fails only when its counter is full: then the thread is awake anyway.
        let _ = self.wake.write(1);
    }
}

/// Driver to device.
pub(super) struct FromDriver {
    pub(super) chain: Chain,
    pub(super) control: Arc<Control>,
}

impl QueueHandler for FromDriver {
    fn process(&mut self, queue: &mut DeviceQueue) -> Result<Progress, QueueError> {
        queue.disable_doorbell()?;
        for _ in 0..queue.size() {
            if !queue.pop(&mut self.chain)? {
                break;
            }
            let mut message = [0; MESSAGE_BYTES];
            let size = self.chain.readable().read(&mut message);
            if !self.control.obey(&message[..size]) {
                queue.note(&format_args!("control message {:x?}", &message[..size]));
            }
            queue.push(self.chain.head(), 0)?;
        }
        queue.signal()?;
        let more = queue.enable_doorbell()?;
        Ok(Progress::again_if(more))
    }
}

/// Device to driver.
pub(super) struct ToDriver {
    pub(super) chain: Chain,
    pub(super) control: Arc<Control>,
}

impl QueueHandler for ToDriver {
    fn sources(&self) -> Vec<(RawFd, EventSet)> {
        vec![(self.control.wake.as_raw_fd(), EventSet::IN)]
    }

    /// The doorbell stays on: it is rare.
    fn process(&mut self, queue: &mut DeviceQueue) -> Result<Progress, QueueError> {
        while !self.control.lock().is_empty() && queue.pop(&mut self.chain)? {
            let Some(message) = self.control.lock().pop_front() else {
                queue.undo_pop(1);
                break;
            };
            if self.chain.writable().size() < message.len() as u64 {
                return Err(self.chain.malformed("too small for a control message"));
            }
            let size = self.chain.writable().write(&message);
            let size = u32::try_from(size).expect("a message is a name at most");
            queue.push(self.chain.head(), size)?;
        }
        queue.signal()?;
        let more = queue.enable_doorbell()? && !self.control.lock().is_empty();
        Ok(Progress::again_if(more))
    }
}

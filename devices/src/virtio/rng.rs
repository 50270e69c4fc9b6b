// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Entropy source, VIRTIO 1.2 §5.4: fills the driver's buffers from the host's getrandom(2).

use std::sync::Arc;

use atoll_thread::Kind;
use rustix::rand::{GetRandomFlags, getrandom};
use serde::{Deserialize, Serialize};

use super::worker::{self, Progress, QueueHandler};
use super::{
    Chain, DeviceQueue, QueueError, QueueStart, StartError, StartedQueue, VirtioDevice, device_id,
};
use crate::counters::{Counter, CounterList};
use crate::state::{DeviceState, Saved, SavedState, StateError};

/// Entries of the one queue.
const QUEUE_SIZE: u16 = 64;
/// Bytes that one chain gets at most, whatever it claims: bounds the work a chain can cause.
const CHAIN_BYTES_MAX: usize = 4096;

/// The entropy source, VIRTIO 1.2 §5.4: fills what the driver offers from getrandom(2), at most 4 KiB a chain.
#[derive(Debug, Default)]
pub struct Rng {
    bytes: Arc<Counter>,
}

impl Rng {
    /// An entropy source with its one queue; it needs nothing of the host but getrandom(2).
    pub fn new() -> Self {
        Self::default()
    }
}

impl VirtioDevice for Rng {
    fn device_id(&self) -> u16 {
        device_id::RNG
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    fn config_read(&self, _offset: u64, _data: &mut [u8]) {}

    fn start_queue(&self, start: QueueStart) -> Result<Box<dyn StartedQueue>, StartError> {
        let handler = Handler {
            chain: Chain::new(),
            buffer: vec![0; CHAIN_BYTES_MAX],
            bytes: self.bytes.clone(),
        };
        worker::spawn(Kind::Queue, "rng", start, Box::new(handler))
    }

    fn counters(&self) -> CounterList {
        vec![("bytes", self.bytes.value())]
    }
}

/// Nothing beside the transport.
#[derive(Serialize, Deserialize)]
struct RngState {}

impl SavedState for RngState {
    const KIND: &'static str = "virtio-rng";
    const VERSION: u32 = 1;
}

impl DeviceState for Rng {
    fn save(&self) -> Saved {
        Saved::of(&RngState {})
    }

    fn restore(&self, saved: &Saved) -> Result<(), StateError> {
        saved.open::<RngState>().map(drop)
    }
}

struct Handler {
    chain: Chain,
    buffer: Vec<u8>,
    bytes: Arc<Counter>,
}

impl QueueHandler for Handler {
    fn process(&mut self, queue: &mut DeviceQueue) -> Result<Progress, QueueError> {
        queue.disable_doorbell()?;
        for _ in 0..queue.size() {
            if !queue.pop(&mut self.chain)? {
                break;
            }
            let wanted = self.chain.writable().size();
            let wanted =
                usize::try_from(wanted).map_or(CHAIN_BYTES_MAX, |n| n.min(CHAIN_BYTES_MAX));
            if wanted == 0 {
                return Err(self.chain.malformed("nothing to write to"));
            }
            let bytes = &mut self.buffer[..wanted];
            let count = getrandom(bytes, GetRandomFlags::empty()).map_err(|error| {
                let source = error.into();
                QueueError::Host {
                    what: "getrandom",
                    source,
                }
            })?;
            let written = self.chain.writable().write(&self.buffer[..count]);
            self.bytes.add(written as u64);
            let written = u32::try_from(written).expect("at most 4096");
            queue.push(self.chain.head(), written)?;
        }
        queue.signal()?;
        let more = queue.enable_doorbell()?;
        Ok(Progress::again_if(more))
    }
}

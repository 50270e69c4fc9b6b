// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Console, VIRTIO 1.2 §5.3, with one port: queue 0 brings what was typed, queue 1 takes output.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use atoll_thread::Kind;
use serde::{Deserialize, Serialize};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::worker::{self, Progress, QueueHandler};
use super::{
    Chain, DeviceQueue, QueueError, QueueStart, StartError, StartedQueue, VirtioDevice, device_id,
};
use crate::console::ConsolePort;
use crate::counters::{Counter, CounterList};
use crate::state::{DeviceState, Saved, SavedState, StateError};

/// Entries of both queues.
const QUEUE_SIZE: u16 = 64;
/// Bytes that are copied at once.
const CHUNK_BYTES: usize = 4096;
/// Output that one chain may bring; more is a mistake of the driver, not a long line.
const OUTPUT_BYTES_MAX: u64 = 1 << 20;
/// Queue from the host to the guest.
const RECEIVE: u16 = 0;

#[derive(Default)]
struct Counters {
    read: Counter,
    written: Counter,
}

/// The console device.
pub struct VirtioConsole {
    port: Arc<ConsolePort>,
    typed: Arc<EventFd>,
    counters: Arc<Counters>,
}

impl VirtioConsole {
    /// Connects the guest with `port`, which no other device may use.
    pub fn new(port: Arc<ConsolePort>) -> io::Result<Self> {
        let typed = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        let event = typed.clone();
        port.on_input(Box::new(move || {
            // Fails only when its counter is full: then the thread is awake anyway.
            let _ = event.write(1);
        }));
        Ok(Self {
            port,
            typed,
            counters: Arc::default(),
        })
    }
}

impl VirtioDevice for VirtioConsole {
    fn device_id(&self) -> u16 {
        device_id::CONSOLE
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 2]
    }

    fn config_read(&self, _offset: u64, _data: &mut [u8]) {}

    fn start_queue(&self, start: QueueStart) -> Result<Box<dyn StartedQueue>, StartError> {
        let chain = Chain::new();
        let port = self.port.clone();
        let counters = self.counters.clone();
        if start.index == RECEIVE {
            let handler = Receive {
                chain,
                port,
                counters,
                typed: self.typed.clone(),
            };
            worker::spawn(Kind::Queue, "console-rx", start, Box::new(handler))
        } else {
            let handler = Transmit {
                chain,
                port,
                counters,
            };
            worker::spawn(Kind::Queue, "console-tx", start, Box::new(handler))
        }
    }

    fn counters(&self) -> CounterList {
        vec![
            ("bytes_read", self.counters.read.value()),
            ("bytes_written", self.counters.written.value()),
        ]
    }
}

/// Nothing beside the transport: what was typed and not read stays on the host.
#[derive(Serialize, Deserialize)]
struct ConsoleState {}

impl SavedState for ConsoleState {
    const KIND: &'static str = "virtio-console";
    const VERSION: u32 = 1;
}

impl DeviceState for VirtioConsole {
    fn save(&self) -> Saved {
        Saved::of(&ConsoleState {})
    }

    fn restore(&self, saved: &Saved) -> Result<(), StateError> {
        saved.open::<ConsoleState>().map(drop)
    }
}

/// Host to guest.
struct Receive {
    chain: Chain,
    port: Arc<ConsolePort>,
    typed: Arc<EventFd>,
    counters: Arc<Counters>,
}

impl QueueHandler for Receive {
    fn sources(&self) -> Vec<(RawFd, EventSet)> {
        vec![(self.typed.as_raw_fd(), EventSet::IN)]
    }

    /// Fills buffers while there are both input and buffers. The doorbell stays on: it is rare.
    fn process(&mut self, queue: &mut DeviceQueue) -> Result<Progress, QueueError> {
        let mut data = [0; CHUNK_BYTES];
        while self.port.input_size() > 0 && queue.pop(&mut self.chain)? {
            let buffers = self.chain.writable();
            let room = usize::try_from(buffers.size()).map_or(CHUNK_BYTES, |n| n.min(CHUNK_BYTES));
            if room == 0 {
                return Err(self.chain.malformed("nothing to write to"));
            }
            let count = self.port.read(&mut data[..room]);
            buffers.write(&data[..count]);
            self.counters.read.add(count as u64);
            queue.push(self.chain.head(), u32::try_from(count).expect("4096"))?;
        }
        queue.signal()?;
        let more = queue.enable_doorbell()? && self.port.input_size() > 0;
        Ok(if more {
            Progress::Again
        } else {
            Progress::Sleep
        })
    }
}

/// Guest to host.
struct Transmit {
    chain: Chain,
    port: Arc<ConsolePort>,
    counters: Arc<Counters>,
}

impl QueueHandler for Transmit {
    fn process(&mut self, queue: &mut DeviceQueue) -> Result<Progress, QueueError> {
        queue.disable_doorbell()?;
        for _ in 0..queue.size() {
            if !queue.pop(&mut self.chain)? {
                break;
            }
            let mut rest = self.chain.readable();
            if rest.size() > OUTPUT_BYTES_MAX {
                return Err(self.chain.malformed("more than 1 MiB of output"));
            }
            self.counters.written.add(rest.size());
            let mut data = [0; CHUNK_BYTES];
            while rest.size() > 0 {
                let count = rest.read(&mut data);
                self.port.write(&data[..count]);
                match rest.skip(count as u64) {
                    Some(left) if count > 0 => rest = left,
                    _ => return Err(self.chain.malformed("unreadable output")),
                }
            }
            queue.push(self.chain.head(), 0)?;
        }
        queue.signal()?;
        let more = queue.enable_doorbell()?;
        Ok(if more {
            Progress::Again
        } else {
            Progress::Sleep
        })
    }
}

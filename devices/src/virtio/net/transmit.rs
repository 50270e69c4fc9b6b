// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! One queue from the guest to the tap: each chain is a packet, written from guest pages as it is.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use vmm_sys_util::epoll::EventSet;

use super::{HEADER_BYTES, PACKET_BYTES_MAX, SIGNAL_PACKETS, Shared, Tap};
use crate::virtio::worker::{Progress, QueueHandler};
use crate::virtio::{Chain, DeviceQueue, QueueError};

/// Smallest packet worth sending: an Ethernet header.
const FRAME_BYTES_MIN: u64 = 14;

/// Guest to host.
pub(super) struct Transmit {
    tap: Arc<Tap>,
    shared: Arc<Shared>,
    /// A copy of the tap's descriptor, which wakes us when a full tap takes more. The receiving queue of the same thread
    /// sleeps on the other one.
    room: File,
    chain: Chain,
    /// For the rare packet in too many pieces.
    packet: Vec<u8>,
}

impl Transmit {
    pub(super) fn new(tap: Arc<Tap>, shared: Arc<Shared>) -> io::Result<Self> {
        Ok(Self {
            room: tap.file().try_clone()?,
            tap,
            shared,
            chain: Chain::new(),
            packet: vec![0; PACKET_BYTES_MAX],
        })
    }
}

impl QueueHandler for Transmit {
    fn sources(&self) -> Vec<(RawFd, EventSet)> {
        vec![(self.room.as_raw_fd(), EventSet::OUT)]
    }

    fn process(&mut self, queue: &mut DeviceQueue) -> Result<Progress, QueueError> {
        queue.disable_doorbell()?;
        let mut idle = true;
        for count in 0..queue.size() {
            if count.is_multiple_of(SIGNAL_PACKETS) {
                queue.signal()?;
            }
            if let Some(wait) = self.shared.send_limit.wait() {
                queue.signal()?;
                return Ok(Progress::After(wait));
            }
            if !queue.pop(&mut self.chain)? {
                break;
            }
            idle = false;
            let data = self.chain.readable();
            let size = data.size();
            if size < HEADER_BYTES as u64 + FRAME_BYTES_MIN || size > PACKET_BYTES_MAX as u64 {
                return Err(self.chain.malformed("a packet of impossible size"));
            }
            let counters = &self.shared.counters;
            if !self.shared.link_up() {
                counters.dropped.add(1);
                queue.push(self.chain.head(), 0)?;
                continue;
            }
            match self.tap.write(data, &mut self.packet) {
                Ok(()) => {
                    self.shared.send_limit.take(size);
                    counters.sent.add(1);
                    counters.sent_bytes.add(size);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    queue.undo_pop(1);
                    queue.signal()?;
                    // Room that came between the write and now was no edge: the kernel did not know yet that we wait.
                    return Ok(Progress::again_if(self.tap.takes_more()));
                }
                // A header that the kernel refuses, an interface that is down: as on a wire, nobody answers.
                Err(_) => counters.dropped.add(1),
            }
            queue.push(self.chain.head(), 0)?;
        }
        queue.signal()?;
        // First the answers to what was sent. What the guest has added meanwhile needs no doorbell, which would be an exit.
        if !idle {
            return Ok(Progress::Again);
        }
        let more = queue.enable_doorbell()?;
        Ok(Progress::again_if(more))
    }
}

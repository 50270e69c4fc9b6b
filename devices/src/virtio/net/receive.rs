// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! One queue from the tap to the guest: through one buffer, since only a read tells how many of the driver's
//! buffers a packet takes.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use vmm_sys_util::epoll::EventSet;

use super::{HEADER_BYTES, PACKET_BYTES_MAX, Shared, Tap};
use crate::virtio::worker::{Progress, QueueHandler};
use crate::virtio::{Chain, DeviceQueue, QueueError};

/// Where the header counts the buffers of a packet, §5.1.6.
const NUM_BUFFERS: usize = 10;

/// Host to guest.
pub(super) struct Receive {
    tap: Arc<Tap>,
    shared: Arc<Shared>,
    merge: bool,
    packet: Vec<u8>,
    /// Bytes of a packet that was read and has no buffers yet; 0 when there is none.
    waiting: usize,
    /// The buffers of one packet, reused; the first `held` are the driver's, taken and not yet given back. They
    /// stay with us when they are too few, so that the next doorbell we ask for is that of the next buffer.
    chains: Vec<Chain>,
    held: u16,
}

impl Receive {
    /// `merge`: a packet may take several buffers (VIRTIO_NET_F_MRG_RXBUF).
    pub(super) fn new(tap: Arc<Tap>, shared: Arc<Shared>, merge: bool) -> Self {
        Self {
            tap,
            shared,
            merge,
            packet: vec![0; PACKET_BYTES_MAX],
            waiting: 0,
            chains: Vec::new(),
            held: 0,
        }
    }

    /// Takes the next packet from the tap. `false` when there is none now; one that the driver does not want is
    /// counted and forgotten at once.
    fn read(&mut self) -> Result<bool, QueueError> {
        match self.tap.read(&mut self.packet) {
            Ok(size) => {
                let frame = self.packet.get(HEADER_BYTES..size).unwrap_or_default();
                if self.shared.link_up() && self.shared.filter.load().accepts(frame) {
                    self.waiting = size;
                } else {
                    self.shared.counters.dropped.add(1);
                }
                Ok(true)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(error) if tap_is_down(&error) => Ok(false),
            Err(source) => {
                let what = "read the tap";
                Err(QueueError::Host { what, source })
            }
        }
    }

    /// Puts the waiting packet into the driver's buffers. `false` when there are not enough yet.
    fn deliver(&mut self, queue: &mut DeviceQueue) -> Result<bool, QueueError> {
        let most = if self.merge { queue.size() } else { 1 };
        let wanted = self.waiting as u64;
        let held = self.chains[..self.held.into()].iter();
        let mut room: u64 = held.map(|chain| chain.writable().size()).sum();
        while room < wanted && self.held < most {
            let next = usize::from(self.held);
            if self.chains.len() == next {
                self.chains.push(Chain::new());
            }
            if !queue.pop(&mut self.chains[next])? {
                return Ok(false);
            }
            self.held += 1;
            let size = self.chains[next].writable().size();
            if size == 0 {
                // Enough of these would be held for ever, and every packet lost without a word.
                return Err(self.chains[next].malformed("a receive buffer without room"));
            }
            room += size;
        }
        if room < wanted {
            // Too small for it whatever else comes: the driver's fault, the packet's loss.
            self.shared.counters.dropped.add(1);
            self.waiting = 0;
            return Ok(true);
        }
        self.fill(queue)
    }

    /// The buffers that are held are large enough: fills as many as it takes.
    fn fill(&mut self, queue: &mut DeviceQueue) -> Result<bool, QueueError> {
        // A packet that came before may have left more than this one needs.
        let mut room = 0;
        let needed = self.chains[..self.held.into()].iter().take_while(|chain| {
            let short = room < self.waiting as u64;
            room += chain.writable().size();
            short
        });
        let count = u16::try_from(needed.count()).expect("at most the queue's size");
        self.packet[NUM_BUFFERS..HEADER_BYTES].copy_from_slice(&count.to_le_bytes());
        let mut rest = &self.packet[..self.waiting];
        for chain in &self.chains[..count.into()] {
            let written = chain.writable().write(rest);
            rest = &rest[written..];
            let written = u32::try_from(written).expect("a packet is below 128 KiB");
            queue.push(chain.head(), written)?;
        }
        self.chains[..self.held.into()].rotate_left(count.into());
        self.held -= count;
        self.shared.counters.received.add(1);
        self.shared.counters.received_bytes.add(self.waiting as u64);
        self.shared.receive_limit.take(self.waiting as u64);
        self.waiting = 0;
        Ok(true)
    }
}

impl QueueHandler for Receive {
    fn sources(&self) -> Vec<(RawFd, EventSet)> {
        vec![(self.tap.as_raw_fd(), EventSet::IN)]
    }

    fn process(&mut self, queue: &mut DeviceQueue) -> Result<Progress, QueueError> {
        queue.disable_doorbell()?;
        for _ in 0..queue.size() {
            if let Some(wait) = self.shared.receive_limit.wait() {
                queue.signal()?;
                return Ok(Progress::After(wait));
            }
            if self.waiting == 0 && !self.read()? {
                // Nothing to deliver: buffers that come in need no doorbell until the next packet.
                queue.signal()?;
                return Ok(Progress::Sleep);
            }
            if self.waiting > 0 && !self.deliver(queue)? {
                queue.signal()?;
                let more = queue.enable_doorbell()?;
                return Ok(Progress::again_if(more));
            }
        }
        queue.signal()?;
        Ok(Progress::Again)
    }

    fn drain(&mut self, queue: &mut DeviceQueue) -> Result<(), QueueError> {
        queue.undo_pop(std::mem::take(&mut self.held));
        Ok(())
    }
}

/// Reads fail while the interface is down; the tap becomes readable again when it is up.
fn tap_is_down(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EIO | libc::EBADFD | libc::EINTR)
    )
}

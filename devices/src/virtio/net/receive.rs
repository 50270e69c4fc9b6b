// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! One queue from the tap to the guest: packets are read straight into the driver's buffers.
//!
//! ```text
//!   packet from the tap   ├ head ┤├ body …                          ┤├ rest ┤
//!   is read to             `head`   buffers of the driver that we hold  `spill`
//! ```
//! The head passes through us: it says whether the driver wants the packet, and how many buffers it has come to take.
//! Only a read tells how large a packet is, so that the rest of one which is larger than those before it is copied.
//! While the driver has no buffers, packets stay in the tap.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use virtio_bindings::virtio_net::{VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_MRG_RXBUF};
use vmm_sys_util::epoll::EventSet;

use super::tap::Room;
use super::{HEADER_BYTES, PACKET_BYTES_MAX, SIGNAL_PACKETS, Shared, Tap};
use crate::memory::mark;
use crate::virtio::worker::{Progress, QueueHandler};
use crate::virtio::{Chain, DeviceQueue, QueueError};

/// Where the header has its flags, §5.1.6.
const FLAGS: usize = 0;
/// Where the header counts the buffers of a packet, §5.1.6.
const NUM_BUFFERS: usize = 10;
/// The device's header and Ethernet's.
const HEAD_BYTES: usize = HEADER_BYTES + 14;
/// What is wanted of room for the next packet falls by this part with each packet that needs less.
const ROOM_DECAY: u64 = 16;

/// Host to guest.
pub(super) struct Receive {
    tap: Arc<Tap>,
    shared: Arc<Shared>,
    /// Whether a packet may take several buffers (VIRTIO_NET_F_MRG_RXBUF).
    merge: bool,
    /// Whether the header may say anything of checksums (VIRTIO_NET_F_GUEST_CSUM, §5.1.6.4.1): a tap says what it has
    /// verified to whoever reads it.
    flags: bool,
    head: [u8; HEAD_BYTES],
    spill: Vec<u8>,
    /// Bytes that the next packet may be expected to have.
    expected: u64,
    /// A packet that was read and has not enough buffers yet.
    waiting: Option<Waiting>,
    /// The driver's buffers; the first `held` are taken and not yet given back. They stay with us when they are too
    /// few, so that the next doorbell we ask for is that of the next buffer.
    chains: Vec<Chain>,
    held: u16,
}

#[derive(Clone, Copy)]
struct Waiting {
    /// Bytes, with the header.
    size: u64,
    /// What comes before this offset is in `head` and in the buffers that are held, the rest in `spill`.
    spilled_from: u64,
}

/// Whether a packet fits into the buffers that are held.
enum Fit {
    Fits,
    /// When the driver offers more.
    NotYet,
    Never,
}

/// What came from the tap.
enum Read {
    Packet(Waiting),
    /// One that nobody gets.
    Lost,
    Nothing,
}

impl Receive {
    /// `features` are what the driver accepted.
    pub(super) fn new(tap: Arc<Tap>, shared: Arc<Shared>, features: u64) -> Self {
        let accepted = |feature: u32| features & 1 << feature != 0;
        Self {
            tap,
            shared,
            merge: accepted(VIRTIO_NET_F_MRG_RXBUF),
            flags: accepted(VIRTIO_NET_F_GUEST_CSUM),
            head: [0; HEAD_BYTES],
            spill: vec![0; PACKET_BYTES_MAX],
            expected: 0,
            waiting: None,
            chains: Vec::new(),
            held: 0,
        }
    }

    fn held(&self) -> &[Chain] {
        &self.chains[..self.held.into()]
    }

    /// Takes buffers until a packet of `size` bytes fits, or there are no more, or one packet may have no more.
    fn hold(&mut self, queue: &mut DeviceQueue, size: u64) -> Result<Fit, QueueError> {
        let most = if self.merge { queue.size() } else { 1 };
        let sizes = self.held().iter().map(|chain| chain.writable().size());
        let mut room: u64 = sizes.sum();
        while self.held == 0 || room < size {
            if self.held == most {
                return Ok(Fit::Never);
            }
            let next = usize::from(self.held);
            if self.chains.len() == next {
                self.chains.push(Chain::new());
            }
            if !queue.pop(&mut self.chains[next])? {
                return Ok(Fit::NotYet);
            }
            self.held += 1;
            let size = self.chains[next].writable().size();
            if size == 0 {
                // Enough of these would be held for ever, and every packet lost without a word.
                return Err(self.chains[next].malformed("a receive buffer without room"));
            }
            room += size;
        }
        Ok(Fit::Fits)
    }

    /// Takes the next packet from the tap, into the buffers that are held. One that the driver does not want is counted
    /// and forgotten at once.
    fn read(&mut self) -> Result<Read, QueueError> {
        let wanted = self.shared.link_up();
        let mut room = Room::new(&mut self.head);
        if wanted {
            let mut skip = HEAD_BYTES as u64;
            for chain in &self.chains[..self.held.into()] {
                let part = chain.writable();
                let skipped = skip.min(part.size());
                skip -= skipped;
                room.add(part.skip(skipped).expect("at most its size"));
            }
        }
        let spilled_from = room.bytes();
        let size = match self.tap.read(room, &mut self.spill) {
            Ok(size) => size,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Read::Nothing),
            // Nothing comes while the interface is gone or down; the tap becomes readable when it is up.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EIO | libc::EBADFD)) => {
                return Ok(Read::Nothing);
            }
            // A packet of a kind for which its header has no word: the tap has forgotten it.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                self.shared.counters.dropped.add(1);
                return Ok(Read::Lost);
            }
            Err(source) => {
                let what = "read the tap";
                return Err(QueueError::Host { what, source });
            }
        };
        let frame = self.head.get(HEADER_BYTES..size.min(HEAD_BYTES));
        if !wanted || !self.shared.filter.load().accepts(frame.unwrap_or_default()) {
            self.shared.counters.dropped.add(1);
            return Ok(Read::Lost);
        }
        let size = size as u64;
        self.expected = size.max(self.expected - self.expected / ROOM_DECAY);
        Ok(Read::Packet(Waiting { size, spilled_from }))
    }

    /// The buffers that are held are large enough for the packet: gives as many as it takes to the driver.
    fn deliver(&mut self, queue: &mut DeviceQueue, packet: Waiting) -> Result<(), QueueError> {
        // A packet that came before may have left more than this one needs.
        let mut room = 0;
        let needed = self.held().iter().take_while(|chain| {
            let short = room < packet.size;
            room += chain.writable().size();
            short
        });
        let count = u16::try_from(needed.count()).expect("at most the queue's size");
        self.head[NUM_BUFFERS..HEADER_BYTES].copy_from_slice(&count.to_le_bytes());
        if !self.flags {
            self.head[FLAGS] = 0;
        }
        let mut start = 0;
        for chain in &self.chains[..count.into()] {
            let end = packet.size.min(start + chain.writable().size());
            self.complete(chain, start..end, packet);
            let written = u32::try_from(end - start).expect("a packet is below 128 KiB");
            queue.push(chain.head(), written)?;
            start = end;
        }
        self.chains[..self.held.into()].rotate_left(count.into());
        self.held -= count;
        self.shared.counters.received.add(1);
        self.shared.counters.received_bytes.add(packet.size);
        self.shared.receive_limit.take(packet.size);
        Ok(())
    }

    /// `chain` has the bytes `part` of the packet: those that the kernel has put there, which are logged, and those that
    /// are here and are copied.
    fn complete(&self, chain: &Chain, part: std::ops::Range<u64>, packet: Waiting) {
        let within = |from: u64, to: u64| part.start.max(from)..part.end.min(to);
        let buffers = |range: &std::ops::Range<u64>| {
            let after = chain.writable().skip(range.start - part.start);
            let taken = after.and_then(|after| after.take(range.end - range.start));
            taken.expect("a part of the chain")
        };
        let bytes = |value: u64| usize::try_from(value).expect("64-bit host");
        let head = within(0, HEAD_BYTES as u64);
        if !head.is_empty() {
            let head_bytes = &self.head[bytes(head.start)..bytes(head.end)];
            buffers(&head).write(head_bytes);
        }
        let body = within(HEAD_BYTES as u64, packet.spilled_from);
        if !body.is_empty() {
            let body = buffers(&body);
            for segment in body.segments() {
                mark(body.ram(), segment.address, segment.size.into());
            }
        }
        let rest = within(packet.spilled_from, packet.size);
        if !rest.is_empty() {
            let (from, to) = (rest.start, rest.end);
            let spilled = bytes(from - packet.spilled_from)..bytes(to - packet.spilled_from);
            buffers(&rest).write(&self.spill[spilled]);
        }
    }

    /// One packet, as far as it gets. `None`: there may be more.
    fn step(&mut self, queue: &mut DeviceQueue) -> Result<Option<Progress>, QueueError> {
        if let Some(wait) = self.shared.receive_limit.wait() {
            return Ok(Some(Progress::After(wait)));
        }
        let packet = match self.waiting {
            Some(packet) => packet,
            None => {
                // With the plug out, packets are lost whether there are buffers or not.
                self.hold(queue, self.expected)?;
                if self.held == 0 && self.shared.link_up() {
                    return Ok(Some(Progress::again_if(queue.enable_doorbell()?)));
                }
                match self.read()? {
                    Read::Packet(packet) => packet,
                    Read::Lost => return Ok(None),
                    // Buffers that come in need no doorbell until the next packet.
                    Read::Nothing => return Ok(Some(Progress::Sleep)),
                }
            }
        };
        self.waiting = None;
        match self.hold(queue, packet.size)? {
            Fit::Fits => self.deliver(queue, packet)?,
            Fit::NotYet => {
                self.waiting = Some(packet);
                return Ok(Some(Progress::again_if(queue.enable_doorbell()?)));
            }
            // Too small for it whatever else comes: the driver's fault, the packet's loss.
            Fit::Never => self.shared.counters.dropped.add(1),
        }
        Ok(None)
    }
}

impl QueueHandler for Receive {
    fn sources(&self) -> Vec<(RawFd, EventSet)> {
        vec![(self.tap.as_raw_fd(), EventSet::IN)]
    }

    fn process(&mut self, queue: &mut DeviceQueue) -> Result<Progress, QueueError> {
        queue.disable_doorbell()?;
        for count in 0..queue.size() {
            if count.is_multiple_of(SIGNAL_PACKETS) {
                queue.signal()?;
            }
            if let Some(progress) = self.step(queue)? {
                queue.signal()?;
                return Ok(progress);
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

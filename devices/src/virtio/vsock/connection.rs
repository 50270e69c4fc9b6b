// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! One connection: a Unix stream on the host, two ports for the guest, and who owes whom how much room.
//!
//! Credit, VIRTIO 1.2 §5.10.6.3: each side tells how large its buffer is and how much it has taken out of it, and
//! the other never sends more than fits. All counts wrap at 32 bits.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use super::packet::{Header, Operation, Ports, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};

/// What the guest may send before the host's program has read it.
const BUFFER_BYTES: u32 = 256 << 10;

/// Where a connection is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    /// The host's program asked; the guest has not answered.
    Asked,
    /// Bytes may flow.
    Open,
}

/// One connection.
pub(super) struct Connection {
    pub(super) stream: UnixStream,
    pub(super) stage: Stage,
    /// The stream may have something to read, or take something: edges of the poll that were not used up.
    pub(super) readable: bool,
    pub(super) writable: bool,
    /// What the guest sent and the host's program has not taken.
    outgoing: VecDeque<u8>,
    /// Bytes that went out of `outgoing`, and what of that count the guest was last told.
    forwarded: u32,
    told: u32,
    /// Bytes sent to the guest; its buffer, and what it has taken out.
    sent: u32,
    guest_buffer_bytes: u32,
    guest_forwarded: u32,
    /// Directions that are over: the guest sends no more, the guest receives no more, the host sends no more.
    guest_sends: bool,
    guest_receives: bool,
    host_sends: bool,
}

/// The other side broke the rules, or is gone: the connection ends with a reset.
#[derive(Debug)]
pub(super) struct Broken;

impl Connection {
    pub(super) fn new(stream: UnixStream, stage: Stage) -> Self {
        Self {
            stream,
            stage,
            readable: true,
            writable: true,
            outgoing: VecDeque::new(),
            forwarded: 0,
            told: 0,
            sent: 0,
            guest_buffer_bytes: 0,
            guest_forwarded: 0,
            guest_sends: true,
            guest_receives: true,
            host_sends: true,
        }
    }

    /// The guest's credit is in every packet of its.
    pub(super) fn note_credit(&mut self, header: &Header) {
        self.guest_buffer_bytes = header.buffer_bytes;
        self.guest_forwarded = header.forwarded;
    }

    /// Bytes that the guest has room for.
    pub(super) fn credit(&self) -> u32 {
        let underway = self.sent.wrapping_sub(self.guest_forwarded);
        self.guest_buffer_bytes.saturating_sub(underway)
    }

    /// Whether the stream may be read for the guest now.
    pub(super) fn may_read(&self) -> bool {
        self.stage == Stage::Open
            && self.readable
            && self.host_sends
            && self.guest_receives
            && self.credit() > 0
    }

    /// Reads for the guest. `None`: nothing now, or never again (`host_sends` tells).
    pub(super) fn read(&mut self, data: &mut [u8]) -> Result<Option<usize>, Broken> {
        match self.stream.read(data) {
            Ok(0) => {
                self.host_sends = false;
                Ok(None)
            }
            Ok(count) => {
                self.sent = self
                    .sent
                    .wrapping_add(u32::try_from(count).expect("a buffer of 64 KiB"));
                Ok(Some(count))
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.readable = false;
                Ok(None)
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(None),
            Err(_) => Err(Broken),
        }
    }

    /// Whether the host's program will send no more.
    pub(super) fn host_is_done(&self) -> bool {
        !self.host_sends
    }

    /// The guest sent these bytes.
    pub(super) fn take(&mut self, data: &[u8]) -> Result<(), Broken> {
        let room = (BUFFER_BYTES as usize).saturating_sub(self.outgoing.len());
        if !self.guest_sends || self.stage != Stage::Open || data.len() > room {
            return Err(Broken);
        }
        self.outgoing.extend(data);
        self.flush()
    }

    /// Passes on what the host's program takes.
    pub(super) fn flush(&mut self) -> Result<(), Broken> {
        while self.writable && !self.outgoing.is_empty() {
            let (front, _) = self.outgoing.as_slices();
            match self.stream.write(front) {
                Ok(count) => {
                    self.outgoing.drain(..count);
                    let count = u32::try_from(count).expect("at most the buffer");
                    self.forwarded = self.forwarded.wrapping_add(count);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.writable = false,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return Err(Broken),
            }
        }
        if !self.guest_sends && self.outgoing.is_empty() {
            let _ = self.stream.shutdown(Shutdown::Write);
        }
        Ok(())
    }

    /// The guest closes a direction, or both.
    pub(super) fn shut_down(&mut self, flags: u32) {
        if flags & SHUTDOWN_SEND != 0 {
            self.guest_sends = false;
            let _ = self.flush();
        }
        if flags & SHUTDOWN_RECEIVE != 0 {
            self.guest_receives = false;
        }
    }

    /// Nothing will flow any more: the guest is told by a reset, and both forget it.
    pub(super) fn is_over(&self) -> bool {
        let guest_is_done = !self.guest_sends && self.outgoing.is_empty();
        guest_is_done && (!self.guest_receives || !self.host_sends)
    }

    /// Whether the guest may believe that there is little room while there is much.
    pub(super) fn owes_credit(&self) -> bool {
        self.stage == Stage::Open && self.forwarded.wrapping_sub(self.told) >= BUFFER_BYTES / 4
    }

    /// A packet for the guest, which tells our credit with it.
    pub(super) fn header(&mut self, ports: Ports, operation: Operation) -> Header {
        self.told = self.forwarded;
        Header {
            ports,
            size: 0,
            operation: Some(operation),
            flags: if operation == Operation::Shutdown {
                SHUTDOWN_SEND
            } else {
                0
            },
            buffer_bytes: BUFFER_BYTES,
            forwarded: self.forwarded,
        }
    }
}

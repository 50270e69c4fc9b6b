// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The header of every vsock packet, VIRTIO 1.2 §5.10.6. Bytes to a checked type and back, nothing else.
//!
//! Own code beside crate `virtio-vsock`, whose packets are views of descriptors: here a chain is parsed once, by
//! the queue, and never looked at again.

/// Bytes of `struct virtio_vsock_hdr`.
pub(super) const HEADER_BYTES: usize = 44;
/// The host's address.
pub(super) const HOST_CID: u64 = 2;
/// `VIRTIO_VSOCK_TYPE_STREAM`, the only kind that we have.
const STREAM: u16 = 1;

/// Bits of a shutdown: the sender will not receive, not send any more.
pub(super) const SHUTDOWN_RECEIVE: u32 = 1;
pub(super) const SHUTDOWN_SEND: u32 = 2;

/// What a packet is for, §5.10.6.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub(super) enum Operation {
    Request = 1,
    Response = 2,
    Reset = 3,
    Shutdown = 4,
    Data = 5,
    CreditUpdate = 6,
    CreditRequest = 7,
}

/// The two ports of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Ports {
    pub(super) host: u32,
    pub(super) guest: u32,
}

/// A header, seen from the host's side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) ports: Ports,
    /// Bytes that follow.
    pub(super) size: u32,
    /// `None`: not a stream, or no operation that we know; the sender is told by a reset.
    pub(super) operation: Option<Operation>,
    pub(super) flags: u32,
    /// The sender's buffer for the connection, and what of all that came it has taken out.
    pub(super) buffer_bytes: u32,
    pub(super) forwarded: u32,
}

impl Header {
    /// From the guest `cid` to the host. `None`: somebody else's address.
    pub(super) fn parse(bytes: &[u8; HEADER_BYTES], cid: u64) -> Option<Self> {
        let word = |at: usize| {
            let bytes = [bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]];
            u32::from_le_bytes(bytes)
        };
        let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let long = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
        if (long(0), long(8)) != (cid, HOST_CID) {
            return None;
        }
        let operation = match (half(28), half(30)) {
            (STREAM, 1) => Some(Operation::Request),
            (STREAM, 2) => Some(Operation::Response),
            (STREAM, 3) => Some(Operation::Reset),
            (STREAM, 4) => Some(Operation::Shutdown),
            (STREAM, 5) => Some(Operation::Data),
            (STREAM, 6) => Some(Operation::CreditUpdate),
            (STREAM, 7) => Some(Operation::CreditRequest),
            _ => None,
        };
        Some(Self {
            ports: Ports {
                guest: word(16),
                host: word(20),
            },
            size: word(24),
            operation,
            flags: word(32),
            buffer_bytes: word(36),
            forwarded: word(40),
        })
    }

    /// From the host to the guest `cid`.
    pub(super) fn bytes(&self, cid: u64) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0, &HOST_CID.to_le_bytes());
        put(8, &cid.to_le_bytes());
        put(16, &self.ports.host.to_le_bytes());
        put(20, &self.ports.guest.to_le_bytes());
        put(24, &self.size.to_le_bytes());
        put(28, &STREAM.to_le_bytes());
        let operation = self.operation.map_or(0, |operation| operation as u16);
        put(30, &operation.to_le_bytes());
        put(32, &self.flags.to_le_bytes());
        put(36, &self.buffer_bytes.to_le_bytes());
        put(40, &self.forwarded.to_le_bytes());
        bytes
    }
}

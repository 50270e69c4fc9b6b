// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A chain as a block request, VIRTIO 1.2 §5.2.6. Reads the 16 bytes of the header once; touches no data.

use atoll_disk::{Operation, SECTOR_BYTES, Space};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};

use crate::virtio::{Chain, GuestBuffers, QueueError};

/// Bytes of `struct virtio_blk_req` before the data: type, reserved, sector.
const HEADER_BYTES: usize = 16;
/// Bytes of `struct virtio_blk_discard_write_zeroes`: sector, number of sectors, flags. One a request.
const RANGE_BYTES: usize = 16;
/// Its only flag: the device may free the space of what it zeroes.
const FLAG_UNMAP: u32 = 1;

/// What the driver reads in a request's status byte, VIRTIO 1.2 §5.2.6.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// Done.
    Ok = 0,
    /// Failed.
    IoError = 1,
    /// No such request.
    Unsupported = 2,
}

/// What the driver wants, in bytes and checked against the form of a request, not against the disk's size (the backend's).
#[derive(Clone, Copy)]
pub enum Action<'a> {
    /// Disk to `data`.
    Read {
        /// First byte on the disk.
        offset: u64,
        /// Whole sectors, at least one.
        data: GuestBuffers<'a>,
    },
    /// `data` to disk.
    Write {
        /// First byte on the disk.
        offset: u64,
        /// Whole sectors, at least one.
        data: GuestBuffers<'a>,
    },
    /// Make completed writes durable.
    Flush,
    /// Discard or zero a range; the operation has its length.
    Range {
        /// First byte on the disk.
        offset: u64,
        /// [`Operation::Discard`] or [`Operation::WriteZeroes`].
        operation: Operation,
    },
    /// Tell the serial number.
    Identify {
        /// Where to.
        data: GuestBuffers<'a>,
    },
    /// Nothing that can be done; the answer.
    Refuse(Status),
}

/// A request parsed once from its chain; nothing of its header is read again.
#[derive(Clone, Copy)]
pub struct Request<'a> {
    /// Guest-physical address of the status byte: the last byte of the chain's writable part.
    pub status: u64,
    /// What the driver wants done, checked; or the answer that it gets instead.
    pub action: Action<'a>,
}

impl<'a> Request<'a> {
    /// Parses `chain`. An error means that there is not even a place for an answer.
    pub fn parse(chain: &'a Chain) -> Result<Self, QueueError> {
        let (readable, writable) = (chain.readable(), chain.writable());
        let mut header = [0; HEADER_BYTES];
        if readable.read(&mut header) != HEADER_BYTES {
            return Err(chain.malformed("no request header"));
        }
        let data_bytes = writable.size().checked_sub(1);
        let data = data_bytes.and_then(|count| writable.take(count));
        let status = data_bytes.and_then(|count| writable.skip(count)?.segments().next());
        let (Some(data), Some(status)) = (data, status) else {
            return Err(chain.malformed("no status byte"));
        };
        let payload = readable
            .skip(HEADER_BYTES as u64)
            .expect("the header was read from it");
        let kind = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
        let (_, sector) = header.split_at(8);
        let sector = u64::from_le_bytes(sector.try_into().expect("8 of 16 bytes"));
        Ok(Self {
            status: status.address,
            action: action(kind, sector, data, payload),
        })
    }
}

fn action<'a>(
    kind: u32,
    sector: u64,
    data: GuestBuffers<'a>,
    payload: GuestBuffers<'a>,
) -> Action<'a> {
    let offset = sector.checked_mul(SECTOR_BYTES);
    let whole = |data: GuestBuffers<'_>| {
        let sectors = data.size() > 0 && data.size().is_multiple_of(SECTOR_BYTES);
        offset.filter(|_| sectors)
    };
    match kind {
        VIRTIO_BLK_T_IN => whole(data).map_or(Action::Refuse(Status::IoError), |offset| {
            Action::Read { offset, data }
        }),
        VIRTIO_BLK_T_OUT => whole(payload).map_or(Action::Refuse(Status::IoError), |offset| {
            let data = payload;
            Action::Write { offset, data }
        }),
        VIRTIO_BLK_T_FLUSH => Action::Flush,
        VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => range(kind, payload),
        VIRTIO_BLK_T_GET_ID => Action::Identify { data },
        _ => Action::Refuse(Status::Unsupported),
    }
}

/// §5.2.6.2: the range is in the payload, the header's sector means nothing.
fn range<'a>(kind: u32, payload: GuestBuffers<'_>) -> Action<'a> {
    let mut bytes = [0; RANGE_BYTES];
    if payload.size() != RANGE_BYTES as u64 || payload.read(&mut bytes) != RANGE_BYTES {
        return Action::Refuse(Status::IoError);
    }
    let (sector, rest) = bytes.split_at(8);
    let (count, flags) = rest.split_at(4);
    let sector = u64::from_le_bytes(sector.try_into().expect("8 bytes"));
    let count = u32::from_le_bytes(count.try_into().expect("4 bytes"));
    let flags = u32::from_le_bytes(flags.try_into().expect("4 bytes"));
    let Some(offset) = sector.checked_mul(SECTOR_BYTES) else {
        return Action::Refuse(Status::IoError);
    };
    let length_bytes = u64::from(count) * SECTOR_BYTES;
    let operation = match (kind, flags) {
        (VIRTIO_BLK_T_DISCARD, 0) => Operation::Discard { length_bytes },
        (VIRTIO_BLK_T_WRITE_ZEROES, 0 | FLAG_UNMAP) => Operation::WriteZeroes {
            length_bytes,
            space: match flags {
                0 => Space::Keep,
                _ => Space::Free,
            },
        },
        _ => return Action::Refuse(Status::Unsupported),
    };
    Action::Range { offset, operation }
}

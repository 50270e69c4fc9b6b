// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A chain as a block request, VIRTIO 1.2 §5.2.6. Reads the 16 bytes of the header once; touches no data.

use atoll_disk::SECTOR_BYTES;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};

use crate::virtio::{Chain, GuestBuffers, QueueError};

/// Bytes of `struct virtio_blk_req` before the data: type, reserved, sector.
const HEADER_BYTES: usize = 16;

/// Value of the status byte, §5.2.6.
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

/// What the driver wants.
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
    /// Tell the serial number.
    Identify {
        /// Where to.
        data: GuestBuffers<'a>,
    },
    /// Nothing that can be done; the answer.
    Refuse(Status),
}

/// A parsed request.
#[derive(Clone, Copy)]
pub struct Request<'a> {
    /// Guest-physical address of the status byte.
    pub status: u64,
    /// What to do.
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
        VIRTIO_BLK_T_GET_ID => Action::Identify { data },
        _ => Action::Refuse(Status::Unsupported),
    }
}

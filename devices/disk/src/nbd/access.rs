// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! What one connection does with the disk that it has chosen.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use super::Content;
use super::pace::Paced;
use super::wire::ability;
use crate::backend::{Abilities, BlockBackend, Operation, Space};
use crate::blocking::BlockingDisk;
use crate::frozen::FrozenReader;

/// Most that one request to a disk moves.
pub(super) const PIECE_BYTES_MAX: usize = 1 << 20;

/// What one connection does with the export that it has chosen: requests one after the other, which block its thread.
pub struct Access {
    opened: Opened,
    paced: Option<Paced>,
}

enum Opened {
    Frozen(FrozenReader),
    Disk {
        disk: Arc<dyn BlockBackend>,
        queue: BlockingDisk,
    },
}

impl Content {
    pub(super) fn size_bytes(&self) -> u64 {
        match self {
            Self::Frozen(frozen) => frozen.size_bytes(),
            Self::Disk(disk) => disk.geometry().size_bytes,
        }
    }

    /// Transmission flags. All queues of a disk write to the same image: a flush on one covers all.
    pub(super) fn abilities(&self) -> u16 {
        let shared = ability::HAS_FLAGS | ability::CAN_MULTI_CONN;
        let Self::Disk(disk) = self else {
            return shared | ability::READ_ONLY;
        };
        if disk.geometry().read_only {
            return shared | ability::READ_ONLY;
        }
        let Abilities {
            discard_bytes,
            write_zeroes,
            ..
        } = disk.abilities();
        let when = |has: bool, flag| if has { flag } else { 0 };
        shared
            | ability::SEND_FLUSH
            | ability::SEND_FUA
            | when(discard_bytes.is_some(), ability::SEND_TRIM)
            | when(write_zeroes, ability::SEND_WRITE_ZEROES)
    }

    /// Requests start and end at multiples of this: any byte of a frozen disk may be read.
    pub(super) fn unit_bytes(&self) -> u32 {
        match self {
            Self::Frozen(_) => 1,
            Self::Disk(disk) => disk.abilities().block_bytes,
        }
    }

    /// For one connection. Called where a queue may be opened.
    pub fn open(&self) -> io::Result<Access> {
        let opened = match self {
            Self::Frozen(frozen) => Opened::Frozen(frozen.open_reader()?),
            Self::Disk(disk) => Opened::Disk {
                queue: BlockingDisk::open(&**disk, PIECE_BYTES_MAX)?,
                disk: disk.clone(),
            },
        };
        Ok(Access {
            opened,
            paced: None,
        })
    }
}

impl Clone for Content {
    fn clone(&self) -> Self {
        match self {
            Self::Frozen(frozen) => Self::Frozen(frozen.clone()),
            Self::Disk(disk) => Self::Disk(disk.clone()),
        }
    }
}

impl Access {
    /// The same, whose reads keep to a rate.
    pub(super) fn paced(self, paced: Option<Paced>) -> Self {
        Self { paced, ..self }
    }

    /// Fills `buffer`, at most [`PIECE_BYTES_MAX`]. The range is on the disk, in whole units.
    pub(super) fn read(&mut self, offset_bytes: u64, buffer: &mut [u8]) -> io::Result<()> {
        if let Some(paced) = &self.paced {
            paced.wait(buffer.len() as u64)?;
        }
        match &mut self.opened {
            Opened::Frozen(reader) => reader.read(offset_bytes, buffer),
            Opened::Disk { queue, .. } => {
                buffer.copy_from_slice(queue.read(offset_bytes, buffer.len())?);
                Ok(())
            }
        }
    }

    /// Writes `data`, at most [`PIECE_BYTES_MAX`].
    pub(super) fn write(&mut self, offset_bytes: u64, data: &[u8]) -> io::Result<()> {
        let Opened::Disk { queue, .. } = &mut self.opened else {
            return Err(io::ErrorKind::ReadOnlyFilesystem.into());
        };
        queue.buffer(data.len())?.copy_from_slice(data);
        queue.act(Operation::Write, offset_bytes, data.len())
    }

    /// Makes durable what was written, by this connection and by others.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        match &mut self.opened {
            // Nothing was written.
            Opened::Frozen(_) => Ok(()),
            Opened::Disk { queue, .. } => queue.act(Operation::Flush, 0, 0),
        }
    }

    /// Discards a range.
    pub(super) fn discard(&mut self, range: Range<u64>) -> io::Result<()> {
        self.in_parts(range, |length_bytes| Operation::Discard { length_bytes })
    }

    /// Zeroes a range.
    pub(super) fn zero(&mut self, range: Range<u64>, space: Space) -> io::Result<()> {
        self.in_parts(range, |length_bytes| Operation::WriteZeroes {
            length_bytes,
            space,
        })
    }

    fn in_parts(
        &mut self,
        range: Range<u64>,
        operation: impl Fn(u64) -> Operation,
    ) -> io::Result<()> {
        let Opened::Disk { disk, queue } = &mut self.opened else {
            return Err(io::ErrorKind::ReadOnlyFilesystem.into());
        };
        let most = u64::from(disk.abilities().range_bytes_max);
        let mut at = range.start;
        while at < range.end {
            let length = most.min(range.end - at);
            queue.act(operation(length), at, 0)?;
            at += length;
        }
        Ok(())
    }
}

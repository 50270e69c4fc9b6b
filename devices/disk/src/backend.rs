// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The seam between a disk device and what stores its sectors.

use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::Segments;

/// Smallest unit of addressing; every backend's size is a multiple of it. VIRTIO 1.2 §5.2.4.
pub const SECTOR_BYTES: u64 = 512;

/// Shape of a disk, as its guest sees it: whole sectors of [`SECTOR_BYTES`]. Changes
/// by a resize only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Size in bytes, a multiple of 512.
    pub size_bytes: u64,
    /// Requests that change the disk are refused with [`io::ErrorKind::ReadOnlyFilesystem`].
    pub read_only: bool,
}

/// What a disk can do beside reading, writing and flushing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Abilities {
    /// Requests start and end at multiples of this; 512 but for direct I/O to a device of larger blocks.
    pub block_bytes: u32,
    /// Discards free space, in units of this many bytes; none are taken when absent.
    pub discard_bytes: Option<u32>,
    /// [`Operation::WriteZeroes`] is taken; without it the request is refused.
    pub write_zeroes: bool,
    /// Longest range that one request discards or zeroes.
    pub range_bytes_max: u32,
}

impl Default for Abilities {
    fn default() -> Self {
        Self {
            block_bytes: 512,
            discard_bytes: None,
            write_zeroes: false,
            range_bytes_max: 64 << 20,
        }
    }
}

/// Why a disk keeps its size, which nothing has been done to then.
#[derive(Debug, thiserror::Error)]
pub enum ResizeError {
    /// The guest may have data there.
    #[error("a disk in use can only grow: it has {size_bytes} bytes")]
    Shrink {
        /// Size now.
        size_bytes: u64,
    },
    /// No whole number of sectors.
    #[error("{size_bytes} bytes are not a multiple of {block_bytes}")]
    Unaligned {
        /// What was asked for.
        size_bytes: u64,
        /// The disk's unit.
        block_bytes: u32,
    },
    /// A device has the size that it has.
    #[error("the block device has {size_bytes} bytes: grow it first")]
    Device {
        /// Its size.
        size_bytes: u64,
    },
    /// Read-only, or of a kind that cannot.
    #[error("this disk cannot be resized while it is in use")]
    Unsupported,
    /// The file system refuses.
    #[error("resize the disk's image")]
    Io(#[from] io::Error),
}

/// Something that stores sectors. Shared by all queues of one disk.
pub trait BlockBackend: Send + Sync {
    /// Size and mode; only [`BlockBackend::resize`] changes the size while queues are open.
    fn geometry(&self) -> Geometry;

    /// What it takes beside reads, writes and flushes; constant.
    fn abilities(&self) -> Abilities {
        Abilities::default()
    }

    /// Whether a write is durable when it completes, without a flush; a write of zeroes by [`Operation::WriteZeroes`] need
    /// not be. Constant while queues are open.
    fn is_synchronous(&self) -> bool {
        false
    }

    /// Makes the disk `size_bytes` long, for all its queues at once. May block; called by the control thread.
    fn resize(&self, _size_bytes: u64) -> Result<(), ResizeError> {
        Err(ResizeError::Unsupported)
    }

    /// Opens a path for up to `depth` requests at a time: one at least, or some backends take none, and as many as a
    /// virtqueue can have (32768) at most, or the kernel refuses a ring of that size. Called once a virtqueue, by the
    /// control thread; the returned queue then belongs to that virtqueue's thread. Fails when the host has no ring, thread
    /// or descriptor left for it, which changes nothing for the queues that are open.
    fn open_queue(&self, depth: u16) -> io::Result<Box<dyn BlockQueue>>;
}

impl<B: BlockBackend + ?Sized> BlockBackend for std::sync::Arc<B> {
    fn geometry(&self) -> Geometry {
        (**self).geometry()
    }

    fn abilities(&self) -> Abilities {
        (**self).abilities()
    }

    fn is_synchronous(&self) -> bool {
        (**self).is_synchronous()
    }

    fn resize(&self, size_bytes: u64) -> Result<(), ResizeError> {
        (**self).resize(size_bytes)
    }

    fn open_queue(&self, depth: u16) -> io::Result<Box<dyn BlockQueue>> {
        (**self).open_queue(depth)
    }
}

/// Requests in flight of one virtqueue. Nothing here blocks, but dropping it waits for what is in flight, since
/// the kernel may still write to the requests' memory.
pub trait BlockQueue: Send {
    /// Readable while completions may wait. Level triggered: [`BlockQueue::complete`] resets it.
    fn completion_fd(&self) -> BorrowedFd<'_>;

    /// Readable when requests that were held back may go on, with the next [`BlockQueue::complete`].
    fn timer_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Holds nothing back from now on: the device stops and waits for what is in flight.
    fn hurry(&mut self) {}

    /// Takes one request; it starts at the latest with the next [`BlockQueue::kick`]. A request that reaches
    /// beyond the disk, or writes to a read-only one, completes with an error like any other.
    fn submit(&mut self, request: Request) -> Result<(), Full>;

    /// Hands everything submitted to the kernel, in one system call where the engine can.
    fn kick(&mut self) -> io::Result<()>;

    /// Moves finished requests to `done`, in the order in which they finished.
    fn complete(&mut self, done: &mut Vec<Completion>) -> io::Result<()>;

    /// Whether the next [`BlockQueue::complete`] finds something for sure: then there is no need to sleep. The
    /// completion descriptor says the same, by a system call.
    fn is_ready(&self) -> bool {
        false
    }

    /// Requests submitted whose completion has not been taken.
    fn in_flight(&self) -> usize;
}

/// One request of a queue's owner, who keeps its memory until the completion of `token` was taken. Offsets and lengths
/// are the guest's: a backend refuses what is not on the disk, it does not panic.
#[derive(Debug)]
pub struct Request {
    /// The caller's key, returned with the completion; the queue does not look at it.
    pub token: u64,
    /// What to do; with what length, where no data moves.
    pub operation: Operation,
    /// First byte on the disk; 0 for a flush.
    pub offset_bytes: u64,
    /// Host memory to fill or to write; its total length is the request's. Empty for what moves no data.
    pub segments: Segments,
}

/// What a request does. When a write is durable that no flush follows is [`crate::Cache`]'s matter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Disk to memory.
    Read,
    /// Memory to disk.
    Write,
    /// Makes all writes that completed before durable.
    Flush,
    /// The guest needs these bytes no more; what they read as afterwards is open. Advice: never an error.
    Discard {
        /// Bytes from the request's offset.
        length_bytes: u64,
    },
    /// These bytes read as zeroes afterwards.
    WriteZeroes {
        /// Bytes from the request's offset.
        length_bytes: u64,
        /// What becomes of their space.
        space: Space,
    },
}

/// What becomes of the host's space behind zeroes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Space {
    /// It stays reserved.
    Keep,
    /// It is given back where that is possible.
    Free,
}

/// A finished request. Each submitted one has exactly one, in any order; an error says what the host said, and how much of
/// a write has reached the disk then is not known.
#[derive(Debug)]
pub struct Completion {
    /// [`Request::token`] of the request that has ended.
    pub token: u64,
    /// Whether *all* bytes were transferred; a short transfer is an error.
    pub result: io::Result<()>,
    /// The request's memory, emptied, for reuse without an allocation.
    pub segments: Segments,
}

/// The queue already holds as many requests as it was opened for; the request comes back unharmed.
#[derive(Debug)]
pub struct Full(pub Request);

impl Request {
    /// Bytes of the disk that it touches; empty for a flush. The end saturates.
    pub fn range(&self) -> Range<u64> {
        let length = match self.operation {
            Operation::Read | Operation::Write => self.segments.total_bytes(),
            Operation::Flush => return 0..0,
            Operation::Discard { length_bytes } | Operation::WriteZeroes { length_bytes, .. } => {
                length_bytes
            }
        };
        self.offset_bytes..self.offset_bytes.saturating_add(length)
    }

    /// Bytes of the disk that it may change: for a decorator that records changes.
    pub fn changed_range(&self) -> Option<Range<u64>> {
        match self.operation {
            Operation::Read | Operation::Flush => None,
            Operation::Write | Operation::Discard { .. } | Operation::WriteZeroes { .. } => {
                Some(self.range())
            }
        }
    }

    /// Whether the request fits the disk: its error otherwise.
    pub(crate) fn check(&self, geometry: Geometry) -> io::Result<()> {
        if self.changed_range().is_some() && geometry.read_only {
            return Err(io::ErrorKind::ReadOnlyFilesystem.into());
        }
        // A saturated end is beyond every disk: sizes are multiples of 512.
        if self.range().end > geometry.size_bytes {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        Ok(())
    }

    /// Whether the kernel moved as many bytes as the request has.
    pub(crate) fn check_moved(&self, moved_bytes: u64) -> io::Result<()> {
        match self.operation {
            Operation::Read if moved_bytes < self.segments.total_bytes() => {
                Err(io::ErrorKind::UnexpectedEof.into())
            }
            Operation::Write if moved_bytes < self.segments.total_bytes() => {
                Err(io::ErrorKind::WriteZero.into())
            }
            _ => Ok(()),
        }
    }

    /// Turns the request into its completion.
    pub(crate) fn finish(mut self, result: io::Result<()>) -> Completion {
        self.segments.clear();
        Completion {
            token: self.token,
            result,
            segments: self.segments,
        }
    }
}

/// A geometry whose size grows while queues use it.
#[derive(Debug)]
pub(crate) struct SharedGeometry {
    size_bytes: AtomicU64,
    read_only: bool,
}

impl SharedGeometry {
    pub(crate) fn new(geometry: Geometry) -> Self {
        Self {
            size_bytes: AtomicU64::new(geometry.size_bytes),
            read_only: geometry.read_only,
        }
    }

    pub(crate) fn get(&self) -> Geometry {
        Geometry {
            size_bytes: self.size_bytes.load(Ordering::Acquire),
            read_only: self.read_only,
        }
    }

    /// Whether the disk may take that size: its error otherwise.
    pub(crate) fn check_growth(
        &self,
        size_bytes: u64,
        block_bytes: u32,
    ) -> Result<(), ResizeError> {
        let now = self.get();
        if now.read_only {
            return Err(ResizeError::Unsupported);
        }
        if !size_bytes.is_multiple_of(block_bytes.into()) {
            return Err(ResizeError::Unaligned {
                size_bytes,
                block_bytes,
            });
        }
        if size_bytes < now.size_bytes {
            let size_bytes = now.size_bytes;
            return Err(ResizeError::Shrink { size_bytes });
        }
        Ok(())
    }

    pub(crate) fn set_size(&self, size_bytes: u64) {
        self.size_bytes.store(size_bytes, Ordering::Release);
    }
}

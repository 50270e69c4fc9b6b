// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The seam between a disk device and what stores its sectors.

use std::io;
use std::os::fd::BorrowedFd;

use crate::Segments;

/// Smallest unit of addressing; every backend's size is a multiple of it. VIRTIO 1.2 §5.2.4.
pub const SECTOR_BYTES: u64 = 512;

/// Shape of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Size in bytes, a multiple of 512.
    pub size_bytes: u64,
    /// Writes are refused.
    pub read_only: bool,
}

/// Something that stores sectors. Shared by all queues of one disk.
pub trait BlockBackend: Send + Sync {
    /// Size and mode; constant while queues are open.
    fn geometry(&self) -> Geometry;

    /// Opens a path for up to `depth` requests at a time. Called once a virtqueue, by the control thread; the
    /// returned queue then belongs to that virtqueue's thread.
    fn open_queue(&self, depth: u16) -> io::Result<Box<dyn BlockQueue>>;
}

/// Requests in flight of one virtqueue. Nothing here blocks, but dropping it waits for what is in flight, since
/// the kernel may still write to the requests' memory.
pub trait BlockQueue: Send {
    /// Readable while completions may wait. Level triggered: [`BlockQueue::complete`] resets it.
    fn completion_fd(&self) -> BorrowedFd<'_>;

    /// Takes one request; it starts at the latest with the next [`BlockQueue::kick`]. A request that reaches
    /// beyond the disk, or writes to a read-only one, completes with an error like any other.
    fn submit(&mut self, request: Request) -> Result<(), Full>;

    /// Hands everything submitted to the kernel, in one system call where the engine can.
    fn kick(&mut self) -> io::Result<()>;

    /// Moves finished requests to `done`, in the order in which they finished.
    fn complete(&mut self, done: &mut Vec<Completion>) -> io::Result<()>;

    /// Requests submitted whose completion has not been taken.
    fn in_flight(&self) -> usize;
}

/// One request.
#[derive(Debug)]
pub struct Request {
    /// The caller's key, returned with the completion; the queue does not look at it.
    pub token: u64,
    /// What to do.
    pub operation: Operation,
    /// First byte on the disk; 0 for a flush.
    pub offset_bytes: u64,
    /// Host memory to fill or to write; its total length is the request's. Empty for a flush.
    pub segments: Segments,
}

/// What a request does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Disk to memory.
    Read,
    /// Memory to disk.
    Write,
    /// Makes all writes that completed before durable.
    Flush,
}

/// A finished request.
#[derive(Debug)]
pub struct Completion {
    /// The request's token.
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
    /// Whether the request fits the disk: its error otherwise.
    pub(crate) fn check(&self, geometry: Geometry) -> io::Result<()> {
        if self.operation == Operation::Flush {
            return Ok(());
        }
        if self.operation == Operation::Write && geometry.read_only {
            return Err(io::ErrorKind::ReadOnlyFilesystem.into());
        }
        let end = self.offset_bytes.checked_add(self.segments.total_bytes());
        if end.is_none_or(|end| end > geometry.size_bytes) {
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

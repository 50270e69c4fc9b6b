// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Requests to a disk that are waited for, with memory of ours: for threads that copy or serve, not for virtqueues.
#![expect(unsafe_code, reason = "requests point at this queue's own buffer")]

use std::io;

use rustix::event::{PollFd, PollFlags, poll};

use crate::backend::{BlockBackend, BlockQueue, Completion, Operation, Request};
use crate::segments::Segments;

/// A queue of a disk with room for one request, and the memory that it fills or writes.
///
/// Fields are dropped in their order: a dropped queue waits for what is in flight, so the memory outlives it.
pub(crate) struct BlockingDisk {
    queue: Box<dyn BlockQueue>,
    buffer: Vec<u8>,
    done: Vec<Completion>,
    /// The engine failed with a request in flight: the buffer is the kernel's until the queue is dropped.
    lost: bool,
}

impl BlockingDisk {
    /// Requests of up to `bytes_max`. Called where a queue may be opened; used on any one thread after that.
    pub(crate) fn open(disk: &dyn BlockBackend, bytes_max: usize) -> io::Result<Self> {
        Ok(Self {
            queue: disk.open_queue(1)?,
            buffer: vec![0; bytes_max],
            done: Vec::with_capacity(1),
            lost: false,
        })
    }

    /// Reads `length` bytes, at most as many as it was opened for. Start and length are multiples of the disk's
    /// block. Blocks.
    pub(crate) fn read(&mut self, offset_bytes: u64, length: usize) -> io::Result<&[u8]> {
        self.act(Operation::Read, offset_bytes, length)?;
        Ok(&self.buffer[..length])
    }

    /// What the next write takes, at most as many bytes as it was opened for.
    pub(crate) fn buffer(&mut self, length: usize) -> io::Result<&mut [u8]> {
        match self.lost {
            true => Err(lost()),
            false => Ok(&mut self.buffer[..length]),
        }
    }

    /// Carries out a request over the first `length` bytes of the buffer, 0 for what moves none. Blocks.
    pub(crate) fn act(
        &mut self,
        operation: Operation,
        offset_bytes: u64,
        length: usize,
    ) -> io::Result<()> {
        if self.lost {
            return Err(lost());
        }
        let target = &mut self.buffer[..length];
        let mut segments = Segments::new();
        if length > 0 {
            // SAFETY: the buffer is never resized, is not touched before the request has completed (`lost` sees to that
            // when its completion cannot be waited for), and is freed after the queue, whose drop waits.
            unsafe { segments.push(target.as_mut_ptr(), target.len()) };
        }
        let request = Request {
            token: 0,
            operation,
            offset_bytes,
            segments,
        };
        let submitted = self.queue.submit(request);
        submitted.expect("the queue is empty between calls");
        self.lost = true;
        let completion = loop {
            self.advance()?;
            if let Some(completion) = self.done.pop() {
                break completion;
            }
        };
        self.lost = false;
        completion.result
    }

    fn advance(&mut self) -> io::Result<()> {
        self.queue.kick()?;
        let event = PollFd::from_borrowed_fd(self.queue.completion_fd(), PollFlags::IN);
        match poll(&mut [event], None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        self.queue.complete(&mut self.done)
    }
}

fn lost() -> io::Error {
    io::Error::other("the disk's engine has failed")
}

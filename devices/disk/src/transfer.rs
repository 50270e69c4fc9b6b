// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! What one disk holds, put on another one: for whoever converts images that no machine has open. One request at a
//! time, which keeps disks busy enough, since they read ahead and write behind.

use std::io;
use std::ops::ControlFlow;

use rustix::event::{PollFd, PollFlags, poll};

use crate::alignment::AlignedBuffer;
use crate::backend::{BlockBackend, BlockQueue, Operation, Request};
use crate::segments::Segments;

/// Bytes of a request. Our choice: a multiple of every block and of the usual clusters.
const CHUNK_BYTES: u64 = 1 << 20;
/// Alignment of its memory: a page, which direct I/O is content with everywhere.
const MEMORY_BYTES: u32 = 4096;

/// How far a transfer is, after each of its requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Transferred {
    /// Bytes of the disk that are done.
    pub done_bytes: u64,
    /// Bytes that were written just now: none where there are zeroes.
    pub written_bytes: u64,
}

/// Writes what `from` holds to `to`, which is as large or larger and reads as zeroes: zeroes are left out. `progress`
/// is told of each request, may wait before the next one, and may end it. Blocks.
pub fn transfer(
    from: &dyn BlockBackend,
    to: &dyn BlockBackend,
    mut progress: impl FnMut(Transferred) -> ControlFlow<()>,
) -> io::Result<()> {
    let size_bytes = from.geometry().size_bytes;
    if to.geometry().size_bytes < size_bytes {
        return Err(io::Error::other("the target is smaller than the source"));
    }
    let (mut reads, mut writes) = (from.open_queue(1)?, to.open_queue(1)?);
    let mut offset_bytes = 0;
    while offset_bytes < size_bytes {
        let length = CHUNK_BYTES.min(size_bytes - offset_bytes);
        let length = usize::try_from(length).expect("a chunk fits into memory");
        let buffer = AlignedBuffer::new(length, MEMORY_BYTES);
        let request = |operation| Request {
            token: 0,
            operation,
            offset_bytes,
            segments: buffer.segments(),
        };
        one(&mut *reads, request(Operation::Read))?;
        let mut written_bytes = 0;
        if !buffer.segments().are_zero() {
            one(&mut *writes, request(Operation::Write))?;
            written_bytes = length as u64;
        }
        offset_bytes += length as u64;
        let transferred = Transferred {
            done_bytes: offset_bytes,
            written_bytes,
        };
        if progress(transferred).is_break() {
            return Err(io::ErrorKind::Interrupted.into());
        }
    }
    flush_through(&mut *writes)
}

/// Makes what has been written to a disk durable, so that another host finds it. For a disk that nobody writes to at the
/// moment. Blocks.
pub fn flush(disk: &dyn BlockBackend) -> io::Result<()> {
    let mut queue = disk.open_queue(1)?;
    queue.hurry();
    flush_through(&mut *queue)
}

fn flush_through(queue: &mut dyn BlockQueue) -> io::Result<()> {
    let flush = Request {
        token: 0,
        operation: Operation::Flush,
        offset_bytes: 0,
        segments: Segments::new(),
    };
    one(queue, flush)
}

/// Carries out one request and waits for it; nothing of it is in flight when this returns.
fn one(queue: &mut dyn BlockQueue, request: Request) -> io::Result<()> {
    queue
        .submit(request)
        .expect("an empty queue takes a request");
    let mut done = Vec::new();
    queue.kick()?;
    while queue.in_flight() > 0 {
        let mut fds = [PollFd::from_borrowed_fd(
            queue.completion_fd(),
            PollFlags::IN,
        )];
        match poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        queue.complete(&mut done)?;
    }
    done.into_iter().try_for_each(|one| one.result)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conformance::{read, write};
    use crate::{Geometry, MemoryBackend};

    fn disk(size_bytes: u64) -> MemoryBackend {
        MemoryBackend::new(Geometry {
            size_bytes,
            read_only: false,
        })
    }

    #[test]
    fn a_disk_becomes_what_another_one_is() {
        let (from, to) = (disk((2 << 20) + 512), disk(4 << 20));
        write(&from, 512, &[7; 1024]).unwrap();
        write(&from, 2 << 20, &[9; 512]).unwrap();
        let mut seen = Vec::new();
        transfer(&from, &to, |it| {
            seen.push((it.done_bytes, it.written_bytes));
            ControlFlow::Continue(())
        })
        .unwrap();
        let mib = 1 << 20;
        assert_eq!(seen, [(mib, mib), (2 * mib, 0), (2 * mib + 512, 512)]);
        let mut bytes = vec![1; 2048];
        read(&to, 0, &mut bytes).unwrap();
        assert_eq!(
            (bytes[0], bytes[512], bytes[1535], bytes[1536]),
            (0, 7, 7, 0)
        );
        let mut end = [0; 1024];
        read(&to, 2 << 20, &mut end).unwrap();
        assert_eq!((end[511], end[512]), (9, 0));
    }

    #[test]
    fn what_cannot_be_done_is_an_error() {
        let go_on = |_| ControlFlow::Continue(());
        assert!(transfer(&disk(1024), &disk(512), go_on).is_err());
        let stop = |_| ControlFlow::Break(());
        let stopped = transfer(&disk(4 << 20), &disk(4 << 20), stop).unwrap_err();
        assert_eq!(stopped.kind(), io::ErrorKind::Interrupted);
    }
}

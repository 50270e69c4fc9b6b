// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Copies sets of blocks from one disk to another, several chunks at a time. Knows nothing of who writes meanwhile.

use std::io;
use std::ops::{ControlFlow, Range};

use rustix::event::{PollFd, PollFlags, poll};

use super::MirrorError;
use crate::alignment::AlignedBuffer;
use crate::backend::{BlockBackend, BlockQueue, Completion, Operation, Request, Space};
use crate::changes::BlockSet;
use crate::segments::Segments;

/// Chunks under way at a time, so that the source is read while the target is written.
const SLOTS: u16 = 4;
/// Alignment of their memory: a page, which direct I/O is content with everywhere.
const MEMORY_BYTES: u32 = 4096;

/// Fields are dropped in their order: a dropped queue waits for what is in flight, so the memory outlives it.
pub(super) struct Copier {
    source: Box<dyn BlockQueue>,
    target: Box<dyn BlockQueue>,
    slots: Vec<Slot>,
    chunk_bytes: u64,
    /// Whether the target zeroes ranges.
    zeroes: bool,
    done: Vec<Completion>,
}

/// Room for one chunk. Its index is the token of its requests.
struct Slot {
    buffer: AlignedBuffer,
    /// What is under way in it.
    chunk: Option<Range<u64>>,
}

impl Copier {
    /// Chunks of `chunk_bytes`, a multiple of both disks' blocks. Called where queues may be opened.
    pub(super) fn open(
        source: &dyn BlockBackend,
        target: &dyn BlockBackend,
        chunk_bytes: u64,
    ) -> io::Result<Self> {
        let length = usize::try_from(chunk_bytes).expect("a chunk fits into memory");
        let slot = |_| Slot {
            buffer: AlignedBuffer::new(length, MEMORY_BYTES),
            chunk: None,
        };
        Ok(Self {
            source: source.open_queue(SLOTS)?,
            target: target.open_queue(SLOTS)?,
            slots: (0..SLOTS).map(slot).collect(),
            chunk_bytes,
            zeroes: target.abilities().write_zeroes,
            done: Vec::with_capacity(SLOTS.into()),
        })
    }

    /// The blocks as [`Copier::copy`] takes them.
    pub(super) fn chunks<'a>(&self, set: &'a BlockSet) -> impl Iterator<Item = Range<u64>> + 'a {
        let chunk_bytes = self.chunk_bytes;
        set.ranges()
            .flat_map(move |range| pieces(range, chunk_bytes))
    }

    /// Copies the chunks; nothing is in flight when this returns, unless an engine has failed: then the copier is of no
    /// more use, and its drop waits. Blocks of zeroes become holes where the target has such. `admit` is asked before
    /// each chunk, with its bytes, and may wait, or end it.
    pub(super) fn copy(
        &mut self,
        mut chunks: impl Iterator<Item = Range<u64>>,
        mut admit: impl FnMut(u64) -> ControlFlow<()>,
    ) -> Result<(), MirrorError> {
        let mut outcome = Ok(());
        loop {
            while outcome.is_ok()
                && let Some(index) = self.slots.iter().position(|slot| slot.chunk.is_none())
            {
                let Some(chunk) = chunks.next() else { break };
                match admit(chunk.end - chunk.start) {
                    ControlFlow::Continue(()) => self.read(index, chunk),
                    ControlFlow::Break(()) => outcome = Err(MirrorError::Stopped),
                }
            }
            if self.slots.iter().all(|slot| slot.chunk.is_none()) {
                return outcome;
            }
            self.wait()?;
            self.advance(&mut outcome)?;
        }
    }

    /// Makes durable what was copied.
    pub(super) fn flush(&mut self) -> Result<(), MirrorError> {
        let request = Request {
            token: 0,
            operation: Operation::Flush,
            offset_bytes: 0,
            segments: Segments::new(),
        };
        self.target.submit(request).expect("nothing is in flight");
        let mut done = Vec::new();
        while self.target.in_flight() > 0 {
            self.wait()?;
            self.target
                .complete(&mut done)
                .map_err(MirrorError::Target)?;
        }
        done.into_iter()
            .try_for_each(|one| one.result)
            .map_err(MirrorError::Target)
    }

    fn read(&mut self, index: usize, chunk: Range<u64>) {
        let request = self.request(index, &chunk, Operation::Read);
        self.slots[index].chunk = Some(chunk);
        self.source.submit(request).expect("a slot is room for it");
    }

    fn request(&self, index: usize, chunk: &Range<u64>, operation: Operation) -> Request {
        let segments = match operation {
            Operation::WriteZeroes { .. } => Segments::new(),
            _ => self.slots[index].buffer.first(length_of(chunk)),
        };
        Request {
            token: index as u64,
            operation,
            offset_bytes: chunk.start,
            segments,
        }
    }

    /// Until something has happened on either side.
    fn wait(&mut self) -> Result<(), MirrorError> {
        self.source.kick().map_err(MirrorError::Source)?;
        self.target.kick().map_err(MirrorError::Target)?;
        let fds = [&self.source, &self.target];
        let mut events =
            fds.map(|queue| PollFd::from_borrowed_fd(queue.completion_fd(), PollFlags::IN));
        match poll(&mut events, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(MirrorError::Source(error.into())),
        }
    }

    /// What was read is written, what was written is done. A request that fails is noted, and the others' chunks go on;
    /// an engine that fails is an error.
    fn advance(&mut self, outcome: &mut Result<(), MirrorError>) -> Result<(), MirrorError> {
        let mut done = std::mem::take(&mut self.done);
        self.source
            .complete(&mut done)
            .map_err(MirrorError::Source)?;
        for completion in done.drain(..) {
            let index = usize::try_from(completion.token).expect("a slot's index");
            let slot = &mut self.slots[index];
            if let Err(error) = completion.result {
                slot.chunk = None;
                fail(outcome, MirrorError::Source(error));
                continue;
            }
            let chunk = slot.chunk.clone().expect("it was being read");
            let is_zero = slot.buffer.first(length_of(&chunk)).are_zero();
            let operation = match is_zero && self.zeroes {
                true => Operation::WriteZeroes {
                    length_bytes: chunk.end - chunk.start,
                    space: Space::Free,
                },
                false => Operation::Write,
            };
            let request = self.request(index, &chunk, operation);
            self.target.submit(request).expect("a slot is room for it");
        }
        self.target
            .complete(&mut done)
            .map_err(MirrorError::Target)?;
        for completion in done.drain(..) {
            let index = usize::try_from(completion.token).expect("a slot's index");
            self.slots[index].chunk = None;
            if let Err(error) = completion.result {
                fail(outcome, MirrorError::Target(error));
            }
        }
        self.done = done;
        Ok(())
    }
}

/// The first failure is the one that matters.
fn fail(outcome: &mut Result<(), MirrorError>, error: MirrorError) {
    if outcome.is_ok() {
        *outcome = Err(error);
    }
}

/// A range in pieces that end at multiples of `chunk_bytes`.
fn pieces(range: Range<u64>, chunk_bytes: u64) -> impl Iterator<Item = Range<u64>> {
    let mut at = range.start;
    std::iter::from_fn(move || {
        let start = at;
        at = range.end.min((start / chunk_bytes + 1) * chunk_bytes);
        (start < range.end).then_some(start..at)
    })
}

fn length_of(chunk: &Range<u64>) -> usize {
    usize::try_from(chunk.end - chunk.start).expect("a chunk fits into memory")
}

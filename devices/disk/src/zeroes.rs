// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A decorator that looks at what is written: nothing but zeroes becomes [`Operation::WriteZeroes`], so that an
//! image does not grow by them. Costs a look at every write until its first other byte.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use crate::backend::{
    Abilities, BlockBackend, BlockQueue, Completion, Full, Geometry, Operation, Request,
    ResizeError, Space,
};

/// Longest write that is looked at: as long as one zeroing request may be.
const LENGTH_BYTES_MAX: u64 = crate::zeroing::LENGTH_BYTES_MAX;

/// See the module.
pub struct DetectZeroes {
    inner: Arc<dyn BlockBackend>,
    rule: Rule,
}

#[derive(Clone, Copy)]
struct Rule {
    space: Space,
    unit: u64,
}

impl DetectZeroes {
    /// Decorates a disk that takes zeroing; `free` also gives the space back.
    pub fn new(inner: Arc<dyn BlockBackend>, free: bool) -> Self {
        let space = if free { Space::Free } else { Space::Keep };
        // Smaller zeroes cost more as an operation of their own than as data.
        let unit = u64::from(inner.abilities().block_bytes.max(4096));
        let rule = Rule { space, unit };
        Self { inner, rule }
    }
}

impl Rule {
    fn apply(self, request: &mut Request) {
        let range = request.range();
        let length_bytes = range.end - range.start;
        if request.operation == Operation::Write
            && length_bytes > 0
            && length_bytes <= LENGTH_BYTES_MAX
            && (range.start | length_bytes).is_multiple_of(self.unit)
            && request.segments.are_zero()
        {
            let space = self.space;
            request.operation = Operation::WriteZeroes {
                length_bytes,
                space,
            };
        }
    }
}

impl BlockBackend for DetectZeroes {
    fn geometry(&self) -> Geometry {
        self.inner.geometry()
    }

    fn abilities(&self) -> Abilities {
        self.inner.abilities()
    }

    fn resize(&self, size_bytes: u64) -> Result<(), ResizeError> {
        self.inner.resize(size_bytes)
    }

    fn open_queue(&self, depth: u16) -> io::Result<Box<dyn BlockQueue>> {
        let inner = self.inner.open_queue(depth)?;
        let rule = self.rule;
        Ok(Box::new(DetectingQueue { inner, rule }))
    }
}

struct DetectingQueue {
    inner: Box<dyn BlockQueue>,
    rule: Rule,
}

impl BlockQueue for DetectingQueue {
    fn completion_fd(&self) -> BorrowedFd<'_> {
        self.inner.completion_fd()
    }

    fn timer_fd(&self) -> Option<BorrowedFd<'_>> {
        self.inner.timer_fd()
    }

    fn hurry(&mut self) {
        self.inner.hurry();
    }

    fn submit(&mut self, mut request: Request) -> Result<(), Full> {
        let operation = request.operation;
        self.rule.apply(&mut request);
        self.inner.submit(request).map_err(|Full(mut request)| {
            request.operation = operation;
            Full(request)
        })
    }

    fn kick(&mut self) -> io::Result<()> {
        self.inner.kick()
    }

    fn complete(&mut self, done: &mut Vec<Completion>) -> io::Result<()> {
        self.inner.complete(done)
    }

    fn in_flight(&self) -> usize {
        self.inner.in_flight()
    }
}

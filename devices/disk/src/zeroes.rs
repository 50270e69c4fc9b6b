// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A decorator that looks at what is written: nothing but zeroes becomes [`Operation::WriteZeroes`], so that an
//! image does not grow by them. Costs a look at every write until its first other byte.

use std::io;
use std::sync::Arc;

use crate::backend::{BlockBackend, BlockQueue, Full, Operation, Request, Space};
use crate::layer::{Layer, QueueLayer};

/// Longest write that is looked at: as long as one zeroing request may be.
const LENGTH_BYTES_MAX: u64 = crate::zeroing::LENGTH_BYTES_MAX;

/// A disk that zeroes instead of writing zeroes, so that its image stays small. Decides by the data of each write. See the
/// module.
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

impl Layer for DetectZeroes {
    fn below(&self) -> &dyn BlockBackend {
        &*self.inner
    }

    /// A write may become one of zeroes.
    fn is_synchronous(&self) -> bool {
        false
    }

    fn over(&self, inner: Box<dyn BlockQueue>, _depth: u16) -> io::Result<Box<dyn BlockQueue>> {
        let rule = self.rule;
        Ok(Box::new(DetectingQueue { inner, rule }))
    }
}

struct DetectingQueue {
    inner: Box<dyn BlockQueue>,
    rule: Rule,
}

impl QueueLayer for DetectingQueue {
    fn below(&self) -> &dyn BlockQueue {
        &*self.inner
    }

    fn below_mut(&mut self) -> &mut dyn BlockQueue {
        &mut *self.inner
    }

    fn submit(&mut self, mut request: Request) -> Result<(), Full> {
        let operation = request.operation;
        self.rule.apply(&mut request);
        self.inner.submit(request).map_err(|Full(mut request)| {
            request.operation = operation;
            Full(request)
        })
    }
}

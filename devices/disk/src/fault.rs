// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A decorator that makes chosen requests fail: what a bad disk does, on demand, for tests of what sits above.

use std::io;
use std::sync::Arc;

use crate::backend::{BlockBackend, BlockQueue, Completion, Full, Operation, Request};
use crate::layer::{Layer, QueueLayer};

/// Decides which requests fail: given an operation and its first byte, the error or nothing.
pub type Fault = dyn Fn(Operation, u64) -> Option<io::ErrorKind> + Send + Sync;

/// A backend whose requests fail where `Fault` says so; all others go to the inner backend.
pub struct Faulty<B> {
    inner: B,
    fault: Arc<Fault>,
}

impl<B: BlockBackend> Faulty<B> {
    /// Decorates a backend; `fault` is asked for each request.
    pub fn new(inner: B, fault: Arc<Fault>) -> Self {
        Self { inner, fault }
    }
}

impl<B: BlockBackend> Layer for Faulty<B> {
    fn below(&self) -> &dyn BlockBackend {
        &self.inner
    }

    fn over(&self, inner: Box<dyn BlockQueue>, _depth: u16) -> io::Result<Box<dyn BlockQueue>> {
        Ok(Box::new(FaultyQueue {
            inner,
            fault: Arc::clone(&self.fault),
            failing: Vec::new(),
        }))
    }
}

struct FaultyQueue {
    inner: Box<dyn BlockQueue>,
    fault: Arc<Fault>,
    /// Tokens of requests that go through as flushes, so that their failure arrives like any completion.
    failing: Vec<(u64, io::ErrorKind)>,
}

impl QueueLayer for FaultyQueue {
    fn below(&self) -> &dyn BlockQueue {
        &*self.inner
    }

    fn below_mut(&mut self) -> &mut dyn BlockQueue {
        &mut *self.inner
    }

    fn submit(&mut self, mut request: Request) -> Result<(), Full> {
        let Some(error) = (self.fault)(request.operation, request.offset_bytes) else {
            return self.inner.submit(request);
        };
        let (token, operation) = (request.token, request.operation);
        request.operation = Operation::Flush;
        if let Err(Full(mut request)) = self.inner.submit(request) {
            request.operation = operation;
            return Err(Full(request));
        }
        self.failing.push((token, error));
        Ok(())
    }

    fn complete(&mut self, done: &mut Vec<Completion>) -> io::Result<()> {
        let first_new = done.len();
        self.inner.complete(done)?;
        for completion in &mut done[first_new..] {
            let failing = self
                .failing
                .iter()
                .position(|(token, _)| *token == completion.token);
            if let Some(index) = failing {
                completion.result = Err(self.failing.swap_remove(index).1.into());
            }
        }
        Ok(())
    }
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Decorators: a backend over another, a queue over another. What a layer does not define passes on unchanged, so that
//! a call which the seam gains later reaches the disk through every layer that does not care.

use std::io;
use std::os::fd::BorrowedFd;

use crate::backend::{
    Abilities, BlockBackend, BlockQueue, Completion, Full, Geometry, Request, ResizeError,
};

/// A backend over another one. Implementing it makes a [`BlockBackend`].
pub trait Layer: Send + Sync {
    /// The backend below.
    fn below(&self) -> &dyn BlockBackend;

    /// Puts this layer's queue over one that was just opened below, for as many requests.
    fn over(&self, queue: Box<dyn BlockQueue>, depth: u16) -> io::Result<Box<dyn BlockQueue>>;

    /// See [`BlockBackend::geometry`].
    fn geometry(&self) -> Geometry {
        self.below().geometry()
    }

    /// See [`BlockBackend::abilities`].
    fn abilities(&self) -> Abilities {
        self.below().abilities()
    }

    /// See [`BlockBackend::is_synchronous`].
    fn is_synchronous(&self) -> bool {
        self.below().is_synchronous()
    }

    /// See [`BlockBackend::resize`].
    fn resize(&self, size_bytes: u64) -> Result<(), ResizeError> {
        self.below().resize(size_bytes)
    }
}

impl<L: Layer> BlockBackend for L {
    fn geometry(&self) -> Geometry {
        Layer::geometry(self)
    }

    fn abilities(&self) -> Abilities {
        Layer::abilities(self)
    }

    fn is_synchronous(&self) -> bool {
        Layer::is_synchronous(self)
    }

    fn resize(&self, size_bytes: u64) -> Result<(), ResizeError> {
        Layer::resize(self, size_bytes)
    }

    fn open_queue(&self, depth: u16) -> io::Result<Box<dyn BlockQueue>> {
        self.over(self.below().open_queue(depth)?, depth)
    }
}

/// A queue over another one. Implementing it makes a [`BlockQueue`]; each method's contract is that trait's.
pub trait QueueLayer: Send {
    /// The queue below.
    fn below(&self) -> &dyn BlockQueue;

    /// The queue below, to be used.
    fn below_mut(&mut self) -> &mut dyn BlockQueue;

    /// See [`BlockQueue::timer_fd`].
    fn timer_fd(&self) -> Option<BorrowedFd<'_>> {
        self.below().timer_fd()
    }

    /// See [`BlockQueue::hurry`].
    fn hurry(&mut self) {
        self.below_mut().hurry();
    }

    /// See [`BlockQueue::submit`].
    fn submit(&mut self, request: Request) -> Result<(), Full> {
        self.below_mut().submit(request)
    }

    /// See [`BlockQueue::kick`].
    fn kick(&mut self) -> io::Result<()> {
        self.below_mut().kick()
    }

    /// See [`BlockQueue::complete`].
    fn complete(&mut self, done: &mut Vec<Completion>) -> io::Result<()> {
        self.below_mut().complete(done)
    }

    /// See [`BlockQueue::is_ready`].
    fn is_ready(&self) -> bool {
        self.below().is_ready()
    }

    /// See [`BlockQueue::in_flight`].
    fn in_flight(&self) -> usize {
        self.below().in_flight()
    }
}

impl<L: QueueLayer> BlockQueue for L {
    fn completion_fd(&self) -> BorrowedFd<'_> {
        self.below().completion_fd()
    }

    fn timer_fd(&self) -> Option<BorrowedFd<'_>> {
        QueueLayer::timer_fd(self)
    }

    fn hurry(&mut self) {
        QueueLayer::hurry(self);
    }

    fn submit(&mut self, request: Request) -> Result<(), Full> {
        QueueLayer::submit(self, request)
    }

    fn kick(&mut self) -> io::Result<()> {
        QueueLayer::kick(self)
    }

    fn complete(&mut self, done: &mut Vec<Completion>) -> io::Result<()> {
        QueueLayer::complete(self, done)
    }

    fn is_ready(&self) -> bool {
        QueueLayer::is_ready(self)
    }

    fn in_flight(&self) -> usize {
        QueueLayer::in_flight(self)
    }
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A queue whose requests are carried out within `kick`, on the caller's thread.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::event::{EventfdFlags, eventfd};

use crate::backend::{BlockQueue, Completion, Full, Request, SharedGeometry};

/// Carries out one request that fits the disk.
pub(crate) type Transfer = dyn FnMut(&Request) -> io::Result<()> + Send;

/// Requests wait until the kick and are finished after it.
pub(crate) struct ImmediateQueue {
    geometry: Arc<SharedGeometry>,
    depth: usize,
    transfer: Box<Transfer>,
    waiting: VecDeque<Request>,
    finished: Vec<Completion>,
    event: OwnedFd,
}

impl ImmediateQueue {
    pub(crate) fn new(
        geometry: Arc<SharedGeometry>,
        depth: u16,
        transfer: Box<Transfer>,
    ) -> io::Result<Self> {
        Ok(Self {
            geometry,
            depth: depth.into(),
            transfer,
            waiting: VecDeque::new(),
            finished: Vec::new(),
            event: completion_event()?,
        })
    }
}

impl BlockQueue for ImmediateQueue {
    fn completion_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    fn submit(&mut self, request: Request) -> Result<(), Full> {
        if self.in_flight() >= self.depth {
            return Err(Full(request));
        }
        self.waiting.push_back(request);
        Ok(())
    }

    fn kick(&mut self) -> io::Result<()> {
        if self.waiting.is_empty() {
            return Ok(());
        }
        while let Some(request) = self.waiting.pop_front() {
            let result = request
                .check(self.geometry.get())
                .and_then(|()| (self.transfer)(&request));
            self.finished.push(request.finish(result));
        }
        signal(&self.event)
    }

    fn complete(&mut self, done: &mut Vec<Completion>) -> io::Result<()> {
        reset(&self.event)?;
        done.append(&mut self.finished);
        Ok(())
    }

    fn in_flight(&self) -> usize {
        self.waiting.len() + self.finished.len()
    }
}

/// The eventfd behind a queue's `completion_fd`.
pub(crate) fn completion_event() -> io::Result<OwnedFd> {
    Ok(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)
}

/// Makes a completion eventfd readable.
pub(crate) fn signal(event: &OwnedFd) -> io::Result<()> {
    rustix::io::write(event, &1_u64.to_ne_bytes())?;
    Ok(())
}

/// Makes a completion eventfd unreadable until the next signal.
pub(crate) fn reset(event: &OwnedFd) -> io::Result<()> {
    match rustix::io::read(event, &mut [0; 8]) {
        Ok(_) | Err(rustix::io::Errno::AGAIN) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

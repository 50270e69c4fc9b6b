// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A queue on io_uring: one ring a virtqueue, completions announced by an eventfd.
//!
//! A request lives in a slot until its completion arrives; the slot's number is what the kernel gives back, so
//! nothing that a guest chooses selects a buffer.
#![expect(
    unsafe_code,
    reason = "io_uring reads requests and their memory after the submitting call returned"
)]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use io_uring::{IoUring, opcode, squeue, types};

use crate::backend::{BlockQueue, Completion, Full, Geometry, Operation, Request};
use crate::immediate::{completion_event, reset, signal};

/// Whether this process may use io_uring at all: seccomp filters and sysctls may forbid it.
pub(crate) fn is_available() -> bool {
    IoUring::new(1).is_ok()
}

/// See the module.
pub(crate) struct UringQueue {
    ring: IoUring,
    file: Arc<File>,
    geometry: Geometry,
    event: OwnedFd,
    slots: Vec<Option<Request>>,
    free: Vec<usize>,
    /// Finished without the kernel: they did not fit the disk.
    refused: Vec<Completion>,
    /// Slots that the kernel asked to try again.
    again: Vec<usize>,
}

impl UringQueue {
    pub(crate) fn new(file: Arc<File>, geometry: Geometry, depth: u16) -> io::Result<Self> {
        let depth = depth.max(1);
        let ring = IoUring::new(u32::from(depth).next_power_of_two())?;
        let event = completion_event()?;
        ring.submitter().register_eventfd(event.as_raw_fd())?;
        Ok(Self {
            ring,
            file,
            geometry,
            event,
            slots: (0..depth).map(|_| None).collect(),
            free: (0..usize::from(depth)).rev().collect(),
            refused: Vec::new(),
            again: Vec::new(),
        })
    }

    fn enqueue(&mut self, slot: usize) {
        let request = self.slots[slot]
            .as_ref()
            .expect("a slot is enqueued while it holds a request");
        let entry = entry(self.file.as_raw_fd(), request).user_data(slot as u64);
        // SAFETY: the request and its list of ranges stay in the slot, unmoved on the heap, until the completion
        // was reaped or `drop` waited for it; the file is kept open by `self.file`; the ranges are valid for as
        // long by the contract of `Segments::push`.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        pushed.expect("the ring has at least as many entries as there are slots");
    }

    /// Takes all completions that the kernel has posted.
    fn reap(&mut self, done: &mut Vec<Completion>) {
        for entry in self.ring.completion() {
            let slot = usize::try_from(entry.user_data()).expect("user data is a slot of ours");
            if matches!(-entry.result(), libc::EAGAIN | libc::EINTR) {
                self.again.push(slot);
                continue;
            }
            let request = self.slots[slot]
                .take()
                .expect("the kernel completes a request once");
            self.free.push(slot);
            let result = outcome(&request, entry.result());
            done.push(request.finish(result));
        }
        while let Some(slot) = self.again.pop() {
            self.enqueue(slot);
        }
    }
}

impl BlockQueue for UringQueue {
    fn completion_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    fn submit(&mut self, request: Request) -> Result<(), Full> {
        if self.in_flight() >= self.slots.len() {
            return Err(Full(request));
        }
        if let Err(error) = request.check(self.geometry) {
            self.refused.push(request.finish(Err(error)));
            return Ok(());
        }
        let slot = self
            .free
            .pop()
            .expect("fewer requests are in flight than there are slots");
        self.slots[slot] = Some(request);
        self.enqueue(slot);
        Ok(())
    }

    fn kick(&mut self) -> io::Result<()> {
        if !self.refused.is_empty() {
            signal(&self.event)?;
        }
        if self.ring.submission().is_empty() {
            return Ok(());
        }
        loop {
            match self.ring.submit() {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => return result.map(drop),
            }
        }
    }

    fn complete(&mut self, done: &mut Vec<Completion>) -> io::Result<()> {
        reset(&self.event)?;
        done.append(&mut self.refused);
        self.reap(done);
        self.kick()
    }

    fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len() + self.refused.len()
    }
}

impl Drop for UringQueue {
    fn drop(&mut self) {
        let mut done = Vec::new();
        while self.free.len() < self.slots.len() {
            match self.ring.submit_and_wait(1) {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => {
                    // The kernel may still write to the requests' memory: going on would corrupt the guest.
                    panic!("io_uring does not give back its requests: {error}");
                }
                _ => self.reap(&mut done),
            }
        }
    }
}

fn entry(fd: i32, request: &Request) -> squeue::Entry {
    let ranges = request.segments.iovecs();
    let count = u32::try_from(ranges.len()).expect("a chain has at most 32,768 ranges");
    let fd = types::Fd(fd);
    match request.operation {
        Operation::Read => opcode::Readv::new(fd, ranges.as_ptr(), count)
            .offset(request.offset_bytes)
            .build(),
        Operation::Write => opcode::Writev::new(fd, ranges.as_ptr(), count)
            .offset(request.offset_bytes)
            .build(),
        Operation::Flush => opcode::Fsync::new(fd)
            .flags(types::FsyncFlags::DATASYNC)
            .build(),
    }
}

/// The kernel's result: a negative errno, or how many bytes it moved.
fn outcome(request: &Request, result: i32) -> io::Result<()> {
    let Ok(moved) = u64::try_from(result) else {
        return Err(io::Error::from_raw_os_error(-result));
    };
    request.check_moved(moved)
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A queue on io_uring: one ring a virtqueue, completions announced by an eventfd.
//!
//! A request lives in a slot until its completion arrives; the slot's number is what the kernel gives back, so
//! nothing that a guest chooses selects a buffer.
#![expect(
    unsafe_code,
    reason = "io_uring reads requests and their memory after the submitting call returned"
)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use io_uring::{IoUring, opcode, register::Restriction, squeue, types};

use crate::alignment::AlignedBuffer;
use crate::backend::{BlockQueue, Completion, Full, Operation, Request};
use crate::immediate::{completion_event, reset, signal};
use crate::raw::RawFile;
use crate::segments::Segments;
use crate::zeroing::{Way, zeroes};

/// Most that all copies of a queue take. What does not fit is carried out by the queue's thread, a part at a time.
const COPIES_BYTES_MAX: u64 = 4 << 20;

/// Whether this process may use io_uring at all: seccomp filters and sysctls may forbid it.
pub(crate) fn is_available() -> bool {
    ring(1).is_ok()
}

/// A ring that does what a disk needs and nothing else for whoever gets hold of it: io_uring passes by the
/// filters on system calls.
fn ring(entries: u32) -> io::Result<IoUring> {
    let ring = IoUring::builder().setup_r_disabled().build(entries)?;
    let mut allowed = [
        opcode::Readv::CODE,
        opcode::Writev::CODE,
        opcode::Fsync::CODE,
        opcode::Fallocate::CODE,
        opcode::Nop::CODE,
    ]
    .map(Restriction::sqe_op);
    ring.submitter().register_restrictions(&mut allowed)?;
    Ok(ring)
}

/// A request that the kernel has, and what it points to beside the request's own list of ranges.
struct Slot {
    request: Request,
    /// Stands in for memory that direct I/O does not take.
    copy: Option<AlignedBuffer>,
    /// Ranges other than the request's: those of the copy, or zeroes to write.
    ranges: Option<Segments>,
    /// For discards and zeroes: the way being tried.
    way: Option<Way>,
}

/// See the module.
pub(crate) struct UringQueue {
    ring: IoUring,
    file: Arc<RawFile>,
    event: OwnedFd,
    slots: Vec<Option<Slot>>,
    free: Vec<usize>,
    /// Finished without the ring: they did not fit the disk, or needed a larger copy than there is room for.
    finished: Vec<Completion>,
    /// Bytes of all copies in slots.
    copied_bytes: u64,
    /// Slots that go to the kernel once more.
    again: Vec<usize>,
}

impl UringQueue {
    pub(crate) fn new(file: Arc<RawFile>, depth: u16) -> io::Result<Self> {
        let depth = depth.max(1);
        let ring = ring(u32::from(depth).next_power_of_two())?;
        let event = completion_event()?;
        ring.submitter().register_eventfd(event.as_raw_fd())?;
        ring.submitter().register_enable_rings()?;
        Ok(Self {
            ring,
            file,
            event,
            slots: (0..depth).map(|_| None).collect(),
            free: (0..usize::from(depth)).rev().collect(),
            finished: Vec::new(),
            copied_bytes: 0,
            again: Vec::new(),
        })
    }

    fn enqueue(&mut self, index: usize) {
        let slot = self.slots[index]
            .as_ref()
            .expect("a slot is enqueued while it holds a request");
        let entry = entry(&self.file, slot).user_data(index as u64);
        // SAFETY: the slot's request, copy and lists of ranges stay where they are on the heap until the
        // completion was reaped or `drop` waited for it; the file is kept open by `self.file`; the ranges are
        // valid for as long by the contract of `Segments::push`.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        pushed.expect("the ring has at least as many entries as there are slots");
    }

    /// Takes all completions that the kernel has posted.
    fn reap(&mut self, done: &mut Vec<Completion>) {
        for entry in self.ring.completion() {
            let index = usize::try_from(entry.user_data()).expect("user data is a slot of ours");
            if matches!(-entry.result(), libc::EAGAIN | libc::EINTR) {
                self.again.push(index);
                continue;
            }
            let slot = self.slots[index]
                .as_mut()
                .expect("the kernel completes a request once");
            let result = outcome(slot, entry.result());
            if let (Some(way), Err(error)) = (slot.way, &result)
                && let Some(next) = way.after(slot.request.operation, error)
            {
                slot.take_way(next);
                self.again.push(index);
                continue;
            }
            let mut slot = self.slots[index].take().expect("looked at above");
            self.free.push(index);
            self.copied_bytes -= slot.copied_bytes();
            done.push(slot.finish(result));
        }
        while let Some(index) = self.again.pop() {
            self.enqueue(index);
        }
    }
}

impl Slot {
    fn new(request: Request, file: &RawFile) -> Self {
        let mut slot = Self {
            request,
            copy: None,
            ranges: None,
            way: None,
        };
        if let Some((way, _)) = Way::first(slot.request.operation) {
            slot.take_way(way);
        } else if let count @ 1.. = file.copied_bytes(&slot.request) {
            let count = usize::try_from(count).expect("at most COPIES_BYTES_MAX");
            let mut copy = AlignedBuffer::new(count, file.alignment.memory_bytes);
            if slot.request.operation == Operation::Write {
                slot.request.segments.drain_to(copy.bytes());
            }
            slot.ranges = Some(copy.segments());
            slot.copy = Some(copy);
        }
        slot
    }

    fn copied_bytes(&mut self) -> u64 {
        let copy = self.copy.as_mut();
        copy.map_or(0, |copy| copy.bytes().len() as u64)
    }

    fn take_way(&mut self, way: Way) {
        if way == Way::Write {
            let range = self.request.range();
            self.ranges = Some(zeroes(range.end - range.start));
        }
        self.way = Some(way);
    }

    fn finish(mut self, result: io::Result<()>) -> Completion {
        if let (Some(copy), Operation::Read, Ok(())) =
            (&mut self.copy, self.request.operation, &result)
        {
            self.request.segments.fill(copy.bytes());
        }
        self.request.finish(result)
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
        if let Err(error) = self.file.check(&request) {
            self.finished.push(request.finish(Err(error)));
            return Ok(());
        }
        let copied_bytes = match Way::first(request.operation) {
            Some(_) => 0,
            None => self.file.copied_bytes(&request),
        };
        if self.copied_bytes + copied_bytes > COPIES_BYTES_MAX {
            let result = self.file.transfer(&request);
            self.finished.push(request.finish(result));
            return Ok(());
        }
        self.copied_bytes += copied_bytes;
        let index = self
            .free
            .pop()
            .expect("fewer requests are in flight than there are slots");
        self.slots[index] = Some(Slot::new(request, &self.file));
        self.enqueue(index);
        Ok(())
    }

    fn kick(&mut self) -> io::Result<()> {
        if !self.finished.is_empty() {
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
        done.append(&mut self.finished);
        self.reap(done);
        self.kick()
    }

    fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len() + self.finished.len()
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

fn entry(file: &RawFile, slot: &Slot) -> squeue::Entry {
    let fd = types::Fd(file.file.as_raw_fd());
    let request = &slot.request;
    let ranges = slot.ranges.as_ref().unwrap_or(&request.segments).iovecs();
    let count = u32::try_from(ranges.len()).expect("a chain has at most 32,768 ranges");
    let offset = request.offset_bytes;
    let write = || {
        opcode::Writev::new(fd, ranges.as_ptr(), count)
            .offset(offset)
            .build()
    };
    match (request.operation, slot.way) {
        (_, Some(way)) => match way.fallocate_mode() {
            Some(mode) => {
                let range = request.range();
                opcode::Fallocate::new(fd, range.end - range.start)
                    .offset(offset)
                    .mode(mode)
                    .build()
            }
            None if way == Way::Write => write(),
            None => opcode::Nop::new().build(),
        },
        (Operation::Read, _) => opcode::Readv::new(fd, ranges.as_ptr(), count)
            .offset(offset)
            .build(),
        (Operation::Write, _) => write(),
        (Operation::Flush, _) if file.ignores_flush => opcode::Nop::new().build(),
        // Discards and zeroes have a way from their first moment on.
        (Operation::Flush | Operation::Discard { .. } | Operation::WriteZeroes { .. }, _) => {
            opcode::Fsync::new(fd)
                .flags(types::FsyncFlags::DATASYNC)
                .build()
        }
    }
}

/// The kernel's result: a negative errno, or how many bytes it moved.
fn outcome(slot: &Slot, result: i32) -> io::Result<()> {
    let Ok(moved) = u64::try_from(result) else {
        return Err(io::Error::from_raw_os_error(-result));
    };
    let range = slot.request.range();
    if slot.way == Some(Way::Write) && moved < range.end - range.start {
        return Err(io::ErrorKind::WriteZero.into());
    }
    slot.request.check_moved(moved)
}

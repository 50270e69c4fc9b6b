// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! virtio-blk: writes a pattern, flushes, reads it back (or only reads, when it may not write), and measures
//! reads of one sector: polled, and asleep until the interrupt.
#![expect(
    unsafe_code,
    reason = "requests in flight borrow their buffers beyond the call"
)]

use alloc::boxed::Box;
use alloc::vec;
use alloc::vec::Vec;

use virtio_drivers::device::blk::{BlkReq, BlkResp, SECTOR_SIZE, VirtIOBlk};

use super::Device;
use crate::clock::Clock;
use crate::interrupts::{self, Vector};
use crate::measure::median;
use crate::memory::Dma;
use crate::options::Options;
use crate::report::Report;
use crate::transport::MsixTransport;

/// Bytes of one request, and requests of the check: the first 64 KiB of the disk, or all of a smaller one.
const REQUEST_BYTES: usize = 4096;
const REQUESTS_MAX: u64 = 16;
const LATENCY_ROUNDS: usize = 65;

struct Blk {
    driver: VirtIOBlk<Dma, MsixTransport>,
    vector: Option<Vector>,
}

pub fn open(transport: MsixTransport) -> virtio_drivers::Result<Box<dyn Device>> {
    let vector = transport.taps().vectors[0].map(|(_, vector)| vector);
    let driver = VirtIOBlk::new(transport)?;
    Ok(Box::new(Blk { driver, vector }))
}

/// FNV-1a, 64 bits: small here and small in the test that computes it over the image file.
fn checksum(sum: u64, bytes: &[u8]) -> u64 {
    bytes.iter().fold(sum, |sum, byte| {
        (sum ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)
    })
}

const CHECKSUM_START: u64 = 0xcbf2_9ce4_8422_2325;

/// Bytes that differ from sector to sector: no misplaced sector looks right.
fn fill(request: u64, buffer: &mut [u8]) {
    let mut state = request.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for byte in buffer {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        *byte = (state >> 32) as u8;
    }
}

/// How a completion is noticed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Notice {
    Poll,
    Interrupt,
}

impl Blk {
    fn block(request: u64) -> usize {
        request as usize * (REQUEST_BYTES / SECTOR_SIZE)
    }

    fn write(&mut self, count: u64) -> virtio_drivers::Result<u64> {
        let mut buffer = vec![0; REQUEST_BYTES];
        let mut sum = CHECKSUM_START;
        for request in 0..count {
            fill(request, &mut buffer);
            sum = checksum(sum, &buffer);
            self.driver.write_blocks(Blk::block(request), &buffer)?;
        }
        self.driver.flush()?;
        Ok(sum)
    }

    fn read(&mut self, count: u64) -> virtio_drivers::Result<u64> {
        let mut buffer = vec![0; REQUEST_BYTES];
        let mut sum = CHECKSUM_START;
        for request in 0..count {
            buffer.fill(0xee);
            self.driver.read_blocks(Blk::block(request), &mut buffer)?;
            sum = checksum(sum, &buffer);
        }
        Ok(sum)
    }

    /// Nanoseconds from before the request to its completion seen; `None` when it never came.
    fn latency(&mut self, clock: &Clock, notice: Notice) -> Option<u64> {
        let mut samples = Vec::new();
        let (mut request, mut response) =
            (Box::new(BlkReq::default()), Box::new(BlkResp::default()));
        let mut buffer = vec![0; SECTOR_SIZE];
        for _ in 0..LATENCY_ROUNDS {
            let seen = self.vector.map(Vector::count);
            let start = clock.now_ns();
            // SAFETY: all three buffers stay untouched until the request is completed below; when it never
            // completes, they are never freed.
            let token = unsafe {
                self.driver
                    .read_blocks_nb(0, &mut request, &mut buffer, &mut response)
            }
            .ok()?;
            let vector = self.vector;
            let mut used = || self.driver.peek_used().is_some();
            let done = match notice {
                Notice::Poll => clock.wait(1000, used),
                // Both: an interrupt of an earlier request may have been waiting until now.
                Notice::Interrupt => interrupts::wait(|| {
                    (vector.is_none() || vector.map(Vector::count) != seen) && used()
                }),
            };
            if !done {
                core::mem::forget((request, response, buffer));
                return None;
            }
            samples.push(clock.now_ns() - start);
            // SAFETY: the same buffers as above, and the device has used them.
            unsafe {
                self.driver
                    .complete_read_blocks(token, &request, &mut buffer, &mut response)
            }
            .ok()?;
        }
        Some(median(samples))
    }
}

impl Device for Blk {
    fn name(&self) -> &'static str {
        "blk"
    }

    fn load(&mut self, round: u64) -> Result<(), &'static str> {
        let blocks = self.driver.capacity() as usize * SECTOR_SIZE / REQUEST_BYTES;
        if self.driver.readonly() || blocks == 0 {
            return Ok(());
        }
        let at = Blk::block(round % blocks as u64);
        let (mut data, mut back) = (vec![0; REQUEST_BYTES], vec![0xee; REQUEST_BYTES]);
        fill(round, &mut data);
        let done = self
            .driver
            .write_blocks(at, &data)
            .and_then(|()| self.driver.read_blocks(at, &mut back));
        match done {
            Err(_) => Err("a disk request failed"),
            Ok(()) if data != back => Err("the disk returned something else"),
            Ok(()) => Ok(()),
        }
    }

    fn check(&mut self, report: &mut Report, clock: &Clock, options: &Options) {
        let count =
            (self.driver.capacity() * SECTOR_SIZE as u64 / REQUEST_BYTES as u64).min(REQUESTS_MAX);
        report.number("sectors", self.driver.capacity());
        report.flag("readonly", self.driver.readonly());
        let written = if options.write && !self.driver.readonly() {
            match self.write(count) {
                Ok(sum) => Some(sum),
                Err(error) => return report.fail(error),
            }
        } else {
            None
        };
        report.flag("written", written.is_some());
        match self.read(count) {
            Ok(sum) => {
                report.number("checked_bytes", count * REQUEST_BYTES as u64);
                report.text("checksum", format_args!("{sum:016x}"));
                if written.is_some_and(|expected| expected != sum) {
                    report.fail("what was read is not what was written");
                }
            }
            Err(error) => return report.fail(error),
        }
        if count == 0 {
            return;
        }
        for (name, notice) in [
            ("read_ns", Notice::Poll),
            ("read_interrupt_ns", Notice::Interrupt),
        ] {
            match self.latency(clock, notice) {
                Some(ns) => report.number(name, ns),
                None => {
                    return report.fail(if notice == Notice::Poll {
                        "a read never ended"
                    } else {
                        "an interrupt was lost"
                    });
                }
            }
        }
    }
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The host's own speed: what a guest's sequential work is on its disk, done by this process on the image with
//! io_uring, as many requests of the same size in flight.
#![expect(
    unsafe_code,
    reason = "io_uring reads and writes memory after the submitting call returned"
)]

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::fs::File;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::time::Instant;

use anyhow::Context as _;
use io_uring::{IoUring, opcode, types};

use crate::disk::Work;

/// Direct I/O needs no more than that anywhere.
const ALIGNMENT: usize = 4096;

/// Memory for one request.
struct Buffer(*mut u8, Layout);

impl Buffer {
    fn new(bytes: u32) -> anyhow::Result<Self> {
        let layout = Layout::from_size_align(usize::try_from(bytes)?.max(1), ALIGNMENT)?;
        // SAFETY: the layout has a size above 0.
        let start = unsafe { alloc_zeroed(layout) };
        anyhow::ensure!(!start.is_null(), "no memory");
        // Touched, so that the first request costs no page faults.
        // SAFETY: the block was just allocated with that size.
        unsafe { start.write_bytes(1, layout.size()) };
        Ok(Self(start, layout))
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout; `transfer` waits for every request before it lets go.
        unsafe { dealloc(self.0, self.1) };
    }
}

/// Does `work` on `path`, one in eight requests more before the clock starts; returns nanoseconds.
pub fn transfer(path: &Path, direct: bool, work: Work) -> anyhow::Result<f64> {
    let flags = if direct { nix::libc::O_DIRECT } else { 0 };
    let file = File::options()
        .read(true)
        .write(work.writes())
        .custom_flags(flags)
        .open(path)
        .with_context(|| format!("open {}", path.display()))?;
    let places = file.metadata()?.len() / u64::from(work.bytes);
    let mut ring = IoUring::new(work.depth.next_power_of_two())?;
    let buffers = (0..work.depth)
        .map(|_| Buffer::new(work.bytes))
        .collect::<anyhow::Result<Vec<_>>>()?;
    let warm_up = work.count / 8;
    let (mut issued, mut done, mut failed) = (0, 0, None);
    let mut start = Instant::now();
    let mut free: Vec<usize> = (0..buffers.len()).collect();
    while done < issued || (issued < work.count + warm_up && failed.is_none()) {
        while issued < work.count + warm_up && failed.is_none() {
            let Some(index) = free.pop() else { break };
            let (at, memory) = (issued % places * u64::from(work.bytes), buffers[index].0);
            let fd = types::Fd(file.as_raw_fd());
            let entry = if work.writes() {
                opcode::Write::new(fd, memory, work.bytes)
                    .offset(at)
                    .build()
            } else {
                opcode::Read::new(fd, memory, work.bytes).offset(at).build()
            };
            // SAFETY: buffer and file outlive the request: this loop ends only when all have completed.
            let pushed = unsafe { ring.submission().push(&entry.user_data(index as u64)) };
            pushed.context("more requests than places in the ring")?;
            issued += 1;
        }
        ring.submit_and_wait(1).context("io_uring")?;
        for completion in ring.completion() {
            if u32::try_from(completion.result()) != Ok(work.bytes) {
                failed = Some(completion.result());
            }
            free.push(usize::try_from(completion.user_data())?);
            done += 1;
            if done == warm_up {
                start = Instant::now();
            }
        }
    }
    anyhow::ensure!(failed.is_none(), "a request ended with {failed:?}");
    Ok(start.elapsed().as_secs_f64() * 1e9)
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Requests on a disk or an image with io_uring, some of them always in flight: what the host itself can do, in
//! `disk`, and what a Linux guest does, in `bin/guest`.
#![expect(
    unsafe_code,
    reason = "io_uring reads and writes memory after the submitting call returned"
)]

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::fs::File;
use std::io::{Seek as _, SeekFrom};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use io_uring::{IoUring, opcode, types};

/// Direct I/O needs no more than that anywhere.
const ALIGNMENT: usize = 4096;

/// What is asked of the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Requests {
    /// Writes, not reads.
    pub write: bool,
    /// At random places, not one after the other.
    pub random: bool,
    /// Of each.
    pub bytes: u32,
    /// In flight.
    pub depth: u32,
}

/// How long it goes on after the clock has been started. An eighth of that comes before.
#[derive(Debug, Clone, Copy)]
pub enum Span {
    /// So many requests.
    Count(u64),
    /// So much time.
    Time(Duration),
}

/// What was done, by this machine's clock.
#[derive(Debug, Clone, Copy)]
pub struct Done {
    /// Requests.
    pub count: u64,
    /// Their time.
    pub time: Duration,
}

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

/// Where the requests go.
struct Places {
    count: u64,
    random: bool,
    state: u64,
}

impl Places {
    fn next(&mut self) -> u64 {
        if !self.random {
            self.state += 1;
            return (self.state - 1) % self.count;
        }
        // xorshift64 (Marsaglia 2003): places need not be unpredictable, but cheap.
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        self.state % self.count
    }
}

/// Where the clock is started and when it ends.
struct Clock {
    span: Span,
    begin: Instant,
    /// Since when it counts, and what had been done by then.
    counted: Option<(Instant, u64)>,
}

impl Clock {
    /// Whether more is to be done, now that `done` is.
    fn goes_on(&mut self, done: u64) -> bool {
        let now = Instant::now();
        let Some((start, before)) = self.counted else {
            let warm = match self.span {
                Span::Count(count) => done >= count / 8,
                Span::Time(time) => now - self.begin >= time / 8,
            };
            self.counted = warm.then_some((now, done));
            return true;
        };
        match self.span {
            Span::Count(count) => done - before < count,
            Span::Time(time) => now - start < time,
        }
    }
}

/// Makes requests of the disk at `path`.
pub fn transfer(path: &Path, direct: bool, what: Requests, span: Span) -> anyhow::Result<Done> {
    let flags = if direct { nix::libc::O_DIRECT } else { 0 };
    let mut file = File::options()
        .read(true)
        .write(what.write)
        .custom_flags(flags)
        .open(path)
        .with_context(|| format!("open {}", path.display()))?;
    let mut places = Places {
        count: file.seek(SeekFrom::End(0))? / u64::from(what.bytes),
        random: what.random,
        state: u64::from(what.random),
    };
    anyhow::ensure!(places.count > 0, "{} is too small", path.display());
    let mut ring = IoUring::new(what.depth.next_power_of_two())?;
    let buffers = (0..what.depth)
        .map(|_| Buffer::new(what.bytes))
        .collect::<anyhow::Result<Vec<_>>>()?;
    let (mut in_flight, mut done, mut failed) = (0, 0, None);
    let mut free: Vec<usize> = (0..buffers.len()).collect();
    let mut clock = Clock {
        span,
        begin: Instant::now(),
        counted: None,
    };
    let mut end = None;
    while in_flight > 0 || end.is_none() {
        while let (None, Some(index)) = (end, free.pop()) {
            let (at, memory) = (places.next() * u64::from(what.bytes), buffers[index].0);
            let fd = types::Fd(file.as_raw_fd());
            let entry = if what.write {
                opcode::Write::new(fd, memory, what.bytes)
                    .offset(at)
                    .build()
            } else {
                opcode::Read::new(fd, memory, what.bytes).offset(at).build()
            };
            // SAFETY: buffer and file outlive the request: this loop ends only when all have completed.
            let pushed = unsafe { ring.submission().push(&entry.user_data(index as u64)) };
            pushed.context("more requests than places in the ring")?;
            in_flight += 1;
        }
        ring.submit_and_wait(1).context("io_uring")?;
        for completion in ring.completion() {
            if u32::try_from(completion.result()) != Ok(what.bytes) {
                failed = Some(completion.result());
            }
            free.push(usize::try_from(completion.user_data())?);
            in_flight -= 1;
            done += 1;
        }
        if end.is_none() && (failed.is_some() || !clock.goes_on(done)) {
            end = Some((Instant::now(), done));
        }
    }
    anyhow::ensure!(failed.is_none(), "a request ended with {failed:?}");
    let (Some((start, before)), Some((end, done))) = (clock.counted, end) else {
        anyhow::bail!("it ended before its clock was started");
    };
    Ok(Done {
        count: done - before,
        time: end - start,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_span_ends_and_counts_what_it_says() {
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(1 << 20).unwrap();
        let mut what = Requests {
            write: true,
            random: true,
            bytes: 4096,
            depth: 8,
        };
        let done = transfer(image.path(), false, what, Span::Count(1000)).unwrap();
        assert!((1000..1008).contains(&done.count), "{done:?}");
        what.write = false;
        what.random = false;
        let time = Duration::from_millis(20);
        let done = transfer(image.path(), false, what, Span::Time(time)).unwrap();
        assert!(done.count > 0 && done.time >= time, "{done:?}");
    }
}

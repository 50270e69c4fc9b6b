// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Guest RAM whose content comes while the guest runs: the thread `memory` answers for pages that are touched before
//! they are there (`userfault`), and brings the others in order.
//!
//! ```text
//!                  fill (from the source)
//!   missing ──────────────────────────────► there        both are bits of a word: 64 pages, which are filled together
//!      │                                      │
//!      └──── removed, or zero in the source ──┴──► zero   a page of zeroes when it is touched, never the source's
//! ```
//! Once no page is missing that has something in it, the userfaultfd and the source are closed and the thread ends:
//! what is then not there is zeroes, as in any memory.
//!
//! **A removed page** (a balloon, free page reporting) must not come back with what the source has. Whoever gives memory
//! back waits until this thread has read that, and the kernel places nothing meanwhile (`EAGAIN`), so no page that was
//! read before can come after it.
//!
//! **A source that fails** has pages that nobody has. Whoever waits for one waits for ever, which is better than wrong
//! bytes in a guest or on its disk; hence [`Filling::start`]'s caller ends the machine.
//!
//! **What it costs.** Each page is a small one on the host, until khugepaged joins them. Whoever waits does so for as long as
//! one word takes, the one that is being filled or its own.
//!
//! Pages are numbered as in `saved::image`: the ranges of the address map one after the other. Not here: where the bytes
//! are (`saved::layers`).

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use atoll_devices::memory::{PAGE_BYTES, Ram};
use atoll_thread::Kind;
use atoll_vmm_protocol::api::FillingInfo;
use rustix::io::Errno;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::{Told, UserFault, UserFaultError};
use crate::saved::image::is_zero;

/// Pages that are filled together, those of one word.
pub const WORD_PAGES: usize = 64;
/// How long the kernel is left alone with memory that is being given back.
const REMOVAL_PAUSE: Duration = Duration::from_micros(50);

/// Where pages come from.
pub trait Source: Send {
    /// The first page at or after this one that may have something in it, if there is one.
    fn next(&mut self, from: u64) -> io::Result<Option<u64>>;

    /// Reads as many pages as there is room for, from `first` on.
    fn read(&mut self, first: u64, pages: &mut [u8]) -> io::Result<()>;
}

/// How far it is. Counts up.
#[derive(Debug, Default)]
struct Progress {
    pages: AtomicU64,
    faults: AtomicU64,
    complete: AtomicBool,
    /// The machine ends first.
    stop: AtomicBool,
}

/// RAM that is being filled, or has been. Dropped before RAM, and after everything that touches it: the thread ends with
/// it.
#[derive(Debug)]
pub struct Filling {
    progress: Arc<Progress>,
    thread: Option<JoinHandle<()>>,
}

impl Filling {
    /// Begins to fill zeroed, private and anonymous `ram` that nobody has touched, from a source of its size. `failed` is
    /// told when the source cannot be read: it ends whatever uses the memory.
    pub fn start(
        faults: UserFault,
        ram: Arc<Ram>,
        source: Box<dyn Source>,
        failed: impl FnOnce(io::Error) + Send + 'static,
    ) -> Result<Self, FillingError> {
        for region in ram.iter() {
            let length = usize::try_from(region.len()).expect("64-bit host");
            faults.register(region.as_ptr() as usize, length)?;
        }
        let progress = Arc::new(Progress::default());
        let mut filler = Filler::new(faults, &ram, source, progress.clone());
        let body = move || {
            // It stays mapped for as long as this thread places pages.
            let _ram = ram;
            match filler.run() {
                Ok(filled) => {
                    let progress = filler.progress.clone();
                    drop(filler);
                    progress.complete.store(filled, Ordering::SeqCst);
                }
                Err(error) => {
                    // Open for ever: closed, it would give zeroes to whoever waits.
                    std::mem::forget(filler);
                    failed(error);
                }
            }
        };
        let thread = atoll_thread::spawn(Kind::Memory, "memory", body);
        Ok(Self {
            progress,
            thread: Some(thread.map_err(FillingError::Thread)?),
        })
    }

    /// Whether every page is there, for good.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.progress.complete.load(Ordering::SeqCst)
    }

    /// How far it is.
    #[must_use]
    pub fn info(&self) -> FillingInfo {
        FillingInfo {
            complete: self.is_complete(),
            filled_bytes: self.progress.pages.load(Ordering::Relaxed) * PAGE_BYTES as u64,
            fault_count: self.progress.faults.load(Ordering::Relaxed),
        }
    }
}

impl Drop for Filling {
    fn drop(&mut self) {
        self.progress.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            // Its panic has ended the process.
            let _ = thread.join();
        }
    }
}

/// Why memory cannot be filled while it is used.
#[derive(Debug, thiserror::Error)]
pub enum FillingError {
    /// The kernel does not ask.
    #[error(transparent)]
    UserFault(#[from] UserFaultError),
    /// There is no thread.
    #[error("start the thread that reads memory")]
    Thread(#[source] io::Error),
}

/// One range of RAM: its first page's number, where it is in this process, and its pages.
struct Range {
    first: u64,
    host: usize,
    pages: u64,
}

/// What the thread has.
struct Filler {
    faults: UserFault,
    ranges: Vec<Range>,
    source: Box<dyn Source>,
    progress: Arc<Progress>,
    /// Pages that were placed; a bit a page.
    there: Vec<u64>,
    /// Pages that are zeroes when they are touched.
    zero: Vec<u64>,
    /// What the kernel has told and is not answered yet.
    told: Vec<Told>,
    /// Pages that somebody waits for. At most one a thread of the process.
    awaited: Vec<u64>,
    buffer: Vec<u8>,
}

impl Filler {
    fn new(faults: UserFault, ram: &Ram, source: Box<dyn Source>, progress: Arc<Progress>) -> Self {
        let mut first = 0;
        let mut ranges = Vec::new();
        for region in ram.iter() {
            let pages = region.len() / PAGE_BYTES as u64;
            assert!(
                pages.is_multiple_of(WORD_PAGES as u64),
                "ranges of RAM are whole MiB"
            );
            let host = region.as_ptr() as usize;
            ranges.push(Range { first, host, pages });
            first += pages;
        }
        let words = index(first) / WORD_PAGES;
        Self {
            faults,
            ranges,
            source,
            progress,
            there: vec![0; words],
            zero: vec![0; words],
            told: Vec::new(),
            awaited: Vec::new(),
            buffer: vec![0; WORD_PAGES * PAGE_BYTES],
        }
    }

    /// Until every page is there; or the machine ends, which is false.
    fn run(&mut self) -> io::Result<bool> {
        let started = Instant::now();
        let mut next = 0;
        while !self.progress.stop.load(Ordering::SeqCst) {
            self.answer()?;
            let Some(page) = self.source.next(next)? else {
                let (pages, faults) = (&self.progress.pages, &self.progress.faults);
                tracing::info!(
                    pages = pages.load(Ordering::Relaxed),
                    faults = faults.load(Ordering::Relaxed),
                    took_ms = started.elapsed().as_millis(),
                    "memory is all here"
                );
                return Ok(true);
            };
            let word = index(page) / WORD_PAGES;
            self.fill(word)?;
            next = ((word + 1) * WORD_PAGES) as u64;
        }
        Ok(false)
    }

    /// Answers everybody who waits now.
    fn answer(&mut self) -> io::Result<()> {
        self.listen()?;
        while let Some(page) = self.awaited.pop() {
            self.progress.faults.fetch_add(1, Ordering::Relaxed);
            let (word, bit) = (index(page) / WORD_PAGES, 1 << (page % WORD_PAGES as u64));
            if (self.there[word] | self.zero[word]) & bit == 0 {
                self.fill(word)?;
            }
            if self.zero[word] & bit != 0 {
                self.place_zeroes(page)?;
            }
            // It may have come before it was asked for.
            self.faults.wake(self.host(page), PAGE_BYTES)?;
            self.listen()?;
        }
        Ok(())
    }

    /// Reads all that the kernel has to tell.
    fn listen(&mut self) -> io::Result<()> {
        loop {
            self.faults.read(&mut self.told)?;
            if self.told.is_empty() {
                return Ok(());
            }
            for told in std::mem::take(&mut self.told) {
                match told {
                    Told::Missing(address) => self.awaited.extend(self.page(address)),
                    Told::Removed(start, end) => self.forget(start, end),
                }
            }
        }
    }

    /// Pages between these addresses are zeroes from now on.
    fn forget(&mut self, start: usize, end: usize) {
        for address in (start..end).step_by(PAGE_BYTES) {
            if let Some(page) = self.page(address) {
                let (word, bit) = (index(page) / WORD_PAGES, 1 << (page % WORD_PAGES as u64));
                self.zero[word] |= bit;
                self.there[word] &= !bit;
            }
        }
    }

    /// Brings what is missing of one word's pages.
    fn fill(&mut self, word: usize) -> io::Result<()> {
        if self.missing(word) == 0 {
            return Ok(());
        }
        let first = (word * WORD_PAGES) as u64;
        self.source.read(first, &mut self.buffer)?;
        let pages = self.buffer.chunks_exact(PAGE_BYTES).enumerate();
        let zero = pages.filter(|(_, bytes)| is_zero(bytes));
        let zero = zero.fold(0, |zero, (page, _)| zero | 1 << page);
        self.zero[word] |= self.missing(word) & zero;
        // Looked at again after each step: pages may be removed meanwhile.
        while let Some((page, count)) = first_run(self.missing(word)) {
            let bytes = &self.buffer[page * PAGE_BYTES..(page + count) * PAGE_BYTES];
            let host = self.host(first) + page * PAGE_BYTES;
            let placed = match self.faults.copy(host, bytes) {
                Ok(placed) => {
                    let placed = placed / PAGE_BYTES;
                    let progress = &self.progress.pages;
                    progress.fetch_add(placed as u64, Ordering::Relaxed);
                    placed
                }
                Err(error) => self.past(&error)?,
            };
            self.there[word] |= run(page, placed);
        }
        Ok(())
    }

    /// Puts zeroes where somebody waits, and behind it as far as there are zeroes in its word.
    fn place_zeroes(&mut self, page: u64) -> io::Result<()> {
        let word = index(page) / WORD_PAGES;
        let start = index(page) % WORD_PAGES;
        let count = (self.zero[word] >> start).trailing_ones() as usize;
        let mut done = 0;
        while done < count {
            let host = self.host(page) + done * PAGE_BYTES;
            done += match self.faults.zero(host, (count - done) * PAGE_BYTES) {
                Ok(placed) => placed / PAGE_BYTES,
                Err(error) => self.past(&error)?,
            };
        }
        Ok(())
    }

    /// Pages to skip after the kernel did not place the first one.
    fn past(&mut self, error: &io::Error) -> io::Result<usize> {
        match Errno::from_io_error(error) {
            // It is there; or something else is mapped there now, whose pages are not RAM's to fill.
            Some(Errno::EXIST | Errno::NOENT) => Ok(1),
            Some(Errno::AGAIN) => {
                self.listen()?;
                std::thread::sleep(REMOVAL_PAUSE);
                Ok(0)
            }
            _ => {
                let text = format!("place a page of guest memory: {error}");
                Err(io::Error::new(error.kind(), text))
            }
        }
    }

    /// Pages of a word of which nothing is known yet.
    fn missing(&self, word: usize) -> u64 {
        !(self.there[word] | self.zero[word])
    }

    /// The page at an address of this process, if RAM is there.
    fn page(&self, address: usize) -> Option<u64> {
        self.ranges.iter().find_map(|range| {
            let page = address.checked_sub(range.host)? / PAGE_BYTES;
            (page < index(range.pages)).then(|| range.first + page as u64)
        })
    }

    /// Where a page is in this process.
    fn host(&self, page: u64) -> usize {
        let behind = |range: &&Range| range.first <= page;
        let range = self.ranges.iter().rfind(behind);
        let range = range.expect("the first range has the first page");
        range.host + index(page - range.first) * PAGE_BYTES
    }
}

/// The first run of bits that are set: where it begins, and how many.
fn first_run(bits: u64) -> Option<(usize, usize)> {
    let first = bits.trailing_zeros();
    let rest = bits.checked_shr(first)?;
    Some((first as usize, rest.trailing_ones() as usize))
}

/// `count` bits from `first` on.
fn run(first: usize, count: usize) -> u64 {
    match count {
        0 => 0,
        _ => (u64::MAX >> (WORD_PAGES - count)) << first,
    }
}

fn index(value: u64) -> usize {
    usize::try_from(value).expect("64-bit host")
}

#[cfg(test)]
mod tests;

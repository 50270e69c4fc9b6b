// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! What is known of each page of RAM that is being filled, and how pages are put where they are missing.
//!
//! Not here: where their bytes come from (`filling`, `arrivals`).

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use atoll_devices::memory::{PAGE_BYTES, Ram, WORD_PAGES};
use rustix::io::Errno;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::{Progress, Told, UserFault};

/// How long the kernel is left alone with memory that is being given back.
const REMOVAL_PAUSE: Duration = Duration::from_micros(50);

/// One range of RAM: its first page's number, where it is for the guest and in this process, and its pages.
struct Range {
    first: u64,
    guest: u64,
    host: usize,
    pages: u64,
}

/// Pages of RAM by their numbers, and the kernel that asks for them.
pub(super) struct Places {
    faults: Arc<UserFault>,
    ranges: Vec<Range>,
    progress: Arc<Progress>,
    /// Pages that were placed; a bit a page.
    there: Vec<u64>,
    /// Pages that are zeroes when they are touched.
    pub(super) zero: Vec<u64>,
    /// What the kernel has told and is not answered yet.
    told: Vec<Told>,
    /// Pages that somebody waits for. At most one a thread of the process.
    pub(super) awaited: Vec<u64>,
}

impl Places {
    /// Of RAM of which nothing is known.
    pub(super) fn new(faults: Arc<UserFault>, ram: &Ram, progress: Arc<Progress>) -> Self {
        let mut first = 0;
        let mut ranges = Vec::new();
        for region in ram.iter() {
            let pages = region.len() / PAGE_BYTES as u64;
            assert!(
                pages.is_multiple_of(WORD_PAGES as u64),
                "ranges of RAM are whole MiB"
            );
            ranges.push(Range {
                first,
                guest: region.start_addr().0,
                host: region.as_ptr() as usize,
                pages,
            });
            first += pages;
        }
        let words = index(first) / WORD_PAGES;
        Self {
            faults,
            ranges,
            progress,
            there: vec![0; words],
            zero: vec![0; words],
            told: Vec::new(),
            awaited: Vec::new(),
        }
    }

    /// Reads all that the kernel has to tell.
    pub(super) fn listen(&mut self) -> io::Result<()> {
        loop {
            self.faults.read(&mut self.told)?;
            if self.told.is_empty() {
                return Ok(());
            }
            for told in std::mem::take(&mut self.told) {
                match told {
                    Told::Missing(address) => self.awaited.extend(self.page(address)),
                    Told::Removed(start, end) => self.forget(start, end),
                    // Nothing is protected by this one.
                    Told::Written(_) => {}
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

    /// Puts pages of one word, from `first` on, where they are missing.
    pub(super) fn put(&mut self, first: u64, pages: &[u8]) -> io::Result<()> {
        let (word, start) = (index(first) / WORD_PAGES, index(first) % WORD_PAGES);
        let wanted = run(start, pages.len() / PAGE_BYTES);
        // Looked at again after each step: pages may be removed meanwhile.
        while let Some((page, count)) = first_run(self.missing(word) & wanted) {
            let offset = (page - start) * PAGE_BYTES;
            let bytes = &pages[offset..offset + count * PAGE_BYTES];
            let placed = match self.faults.copy(self.host(first) + offset, bytes) {
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

    /// Has whoever waits for one of these pages look again.
    pub(super) fn wake(&self, first: u64, count: usize) -> io::Result<()> {
        self.faults.wake(self.host(first), count * PAGE_BYTES)
    }

    /// The page at an address of the guest, if RAM is there from it on for `count` pages.
    pub(super) fn page_at(&self, address: u64, count: usize) -> Option<u64> {
        self.ranges.iter().find_map(|range| {
            let offset = address.checked_sub(range.guest)?;
            let page = offset / PAGE_BYTES as u64;
            let is_whole = offset.is_multiple_of(PAGE_BYTES as u64);
            let end = page.checked_add(count as u64)?;
            (is_whole && end <= range.pages).then(|| range.first + page)
        })
    }

    /// Puts zeroes where somebody waits, and behind it as far as there are zeroes in its word.
    pub(super) fn place_zeroes(&mut self, page: u64) -> io::Result<()> {
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
    pub(super) fn missing(&self, word: usize) -> u64 {
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
pub(super) fn first_run(bits: u64) -> Option<(usize, usize)> {
    let first = bits.trailing_zeros();
    let rest = bits.checked_shr(first)?;
    Some((first as usize, rest.trailing_ones() as usize))
}

/// `count` bits from `first` on.
pub(super) fn run(first: usize, count: usize) -> u64 {
    match count {
        0 => 0,
        _ => (u64::MAX >> (WORD_PAGES - count)) << first,
    }
}

pub(super) fn index(value: u64) -> usize {
    usize::try_from(value).expect("64-bit host")
}

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

pub mod arrivals;
mod places;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Instant;

use atoll_devices::memory::{PAGE_BYTES, Ram, WORD_PAGES};
use atoll_thread::Kind;
use atoll_vmm_protocol::api::FillingInfo;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use self::arrivals::{Arrivals, Elsewhere};
use self::places::{Places, index};
use super::{Told, UserFault, UserFaultError};
use crate::saved::image::is_zero;

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
pub struct Filling {
    progress: Arc<Progress>,
    threads: Vec<JoinHandle<()>>,
    /// Where pages come by themselves.
    arrivals: Option<Arc<Arrivals>>,
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
            threads: vec![thread.map_err(FillingError::Thread)?],
            arrivals: None,
        })
    }

    /// Begins to take what is missing in private and anonymous `ram` from who has it.
    pub fn take(
        faults: UserFault,
        ram: Arc<Ram>,
        elsewhere: Elsewhere,
    ) -> Result<Self, FillingError> {
        let progress = Arc::default();
        let (arrivals, threads) = Arrivals::start(faults, ram, elsewhere, &progress)?;
        Ok(Self {
            progress,
            threads,
            arrivals: Some(arrivals),
        })
    }

    /// Whether pages are still another process's, which the guest cannot do without.
    #[must_use]
    pub fn is_elsewhere(&self) -> bool {
        self.arrivals.is_some() && !self.is_complete()
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
        if let Some(arrivals) = &self.arrivals {
            arrivals.stop();
        }
        for thread in self.threads.drain(..) {
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

/// What the thread has.
struct Filler {
    places: Places,
    source: Box<dyn Source>,
    progress: Arc<Progress>,
    buffer: Vec<u8>,
}

impl Filler {
    fn new(faults: UserFault, ram: &Ram, source: Box<dyn Source>, progress: Arc<Progress>) -> Self {
        Self {
            places: Places::new(Arc::new(faults), ram, progress.clone()),
            source,
            progress,
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
        self.places.listen()?;
        while let Some(page) = self.places.awaited.pop() {
            self.progress.faults.fetch_add(1, Ordering::Relaxed);
            let (word, bit) = (index(page) / WORD_PAGES, 1 << (page % WORD_PAGES as u64));
            if self.places.missing(word) & bit != 0 {
                self.fill(word)?;
            }
            if self.places.zero[word] & bit != 0 {
                self.places.place_zeroes(page)?;
            }
            // It may have come before it was asked for.
            self.places.wake(page, 1)?;
            self.places.listen()?;
        }
        Ok(())
    }

    /// Brings what is missing of one word's pages.
    fn fill(&mut self, word: usize) -> io::Result<()> {
        if self.places.missing(word) == 0 {
            return Ok(());
        }
        let first = (word * WORD_PAGES) as u64;
        self.source.read(first, &mut self.buffer)?;
        let pages = self.buffer.chunks_exact(PAGE_BYTES).enumerate();
        let zero = pages.filter(|(_, bytes)| is_zero(bytes));
        let zero = zero.fold(0, |zero, (page, _)| zero | 1 << page);
        self.places.zero[word] |= self.places.missing(word) & zero;
        self.places.put(first, &self.buffer)
    }
}

#[cfg(test)]
mod tests;

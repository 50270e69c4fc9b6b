// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! RAM whose missing pages come by themselves, from whoever had the guest before, while the guest runs.
//!
//! ```text
//!   kernel: missing ──► thread "memory" ── asks once ──► Lines ══► the other side
//!   threads "memory-N" ◄══ pages, asked for or not ══════════════════╝
//! ```
//! The other side says first which pages it still has; each of them is taken once, and no others. A page that is removed
//! meanwhile (a balloon) is zeroes: what comes of it is dropped.
//!
//! **A side that ends before all is here** has pages that nobody has: as in `filling`, the caller ends the machine.
//!
//! Not here: how pages travel (`migration::postcopy`).

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use atoll_devices::memory::{PAGE_BYTES, Ram, WORD_PAGES};
use atoll_thread::Kind;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::places::{Places, index, run};
use super::{FillingError, Progress, UserFault};

/// What takes pages: guest-physical address, their size in bytes, and their content unless that is zeroes.
pub type Take<'a> = dyn FnMut(u64, usize, Option<&[u8]>) -> io::Result<()> + 'a;

/// One connection that brings pages, to its end, which is an error where it is no end in order.
pub type Feed = Box<dyn FnOnce(&mut Take<'_>) -> io::Result<()> + Send>;

/// The way back to the other side. Called from several threads.
pub trait Lines: Send + Sync {
    /// Asks for a page, by its number. May block until the other side reads.
    fn ask(&self, page: u64) -> io::Result<()>;

    /// No more is needed: says so, and ends all connections, whose feeds end then.
    fn end(&self);
}

/// Pages that are elsewhere, and how they come.
pub struct Elsewhere {
    /// Which: a bit a page. They are not in RAM now; all others are there, or zeroes where nothing is.
    pub missing: Vec<u64>,
    /// What brings them.
    pub feeds: Vec<Feed>,
    /// What asks for them.
    pub lines: Box<dyn Lines>,
    /// Told once, if they cannot come any more: how many are missing, and why. It ends whatever uses the memory.
    pub failed: Failed,
}

/// See [`Elsewhere::failed`].
pub type Failed = Box<dyn FnOnce(u64, io::Error) + Send>;

/// What the threads share.
pub(super) struct Arrivals {
    /// Leaf lock, held for as long as a word of pages takes to be placed.
    state: Mutex<State>,
    lines: Box<dyn Lines>,
    /// Makes the thread that listens to the kernel look at the state.
    wake: OwnedFd,
    progress: Arc<Progress>,
}

struct State {
    /// Absent once all is here: the kernel asks no more.
    places: Option<Places>,
    expected: Expected,
    /// Pages that were asked for.
    asked: Vec<u64>,
    failed: Option<Failed>,
}

/// Pages that have still to come, each of them once.
struct Expected {
    words: Vec<u64>,
    count: u64,
}

impl Expected {
    fn of(words: Vec<u64>) -> Self {
        let count = words.iter().map(|word| u64::from(word.count_ones())).sum();
        Self { words, count }
    }

    /// Takes `count` pages of one word, or none of them.
    fn take(&mut self, first: u64, count: usize) -> io::Result<()> {
        let (word, start) = (index(first) / WORD_PAGES, index(first) % WORD_PAGES);
        let is_one_word = count > 0 && start + count <= WORD_PAGES;
        let mask = if is_one_word { run(start, count) } else { 0 };
        let expected = self.words.get_mut(word);
        match expected.filter(|word| is_one_word && **word & mask == mask) {
            Some(word) => {
                *word &= !mask;
                self.count -= count as u64;
                Ok(())
            }
            None => Err(io::Error::other("a page came that was not missing")),
        }
    }
}

impl Arrivals {
    /// Begins to take pages into `ram`, which is private and anonymous.
    pub(super) fn start(
        faults: UserFault,
        ram: Arc<Ram>,
        elsewhere: Elsewhere,
        progress: &Arc<Progress>,
    ) -> Result<(Arc<Self>, Vec<JoinHandle<()>>), FillingError> {
        for region in ram.iter() {
            let length = usize::try_from(region.len()).expect("64-bit host");
            faults.register(region.as_ptr() as usize, length)?;
        }
        let faults = Arc::new(faults);
        let mut places = Places::new(faults.clone(), &ram, progress.clone());
        assert_eq!(
            places.zero.len(),
            elsewhere.missing.len(),
            "the bitmap is RAM's"
        );
        for (zero, missing) in places.zero.iter_mut().zip(&elsewhere.missing) {
            *zero = !missing;
        }
        let arrivals = Arc::new(Self {
            state: Mutex::new(State {
                asked: vec![0; elsewhere.missing.len()],
                places: Some(places),
                expected: Expected::of(elsewhere.missing),
                failed: Some(elsewhere.failed),
            }),
            lines: elsewhere.lines,
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
                .map_err(|error| FillingError::Thread(error.into()))?,
            progress: progress.clone(),
        });
        let mut threads = Vec::new();
        let mut spawn = |name: &str, body: Box<dyn FnOnce() + Send>| {
            let thread = atoll_thread::spawn(Kind::Fetch, name, body);
            thread
                .map(|thread| threads.push(thread))
                .map_err(FillingError::Thread)
        };
        let shared = arrivals.clone();
        let listen = move || {
            // It stays mapped for as long as pages are placed.
            let _ram = ram;
            match shared.listen(&faults) {
                Ok(()) => drop(faults),
                Err(error) => {
                    // Open for ever: closed, it would give zeroes to whoever waits.
                    std::mem::forget(faults);
                    shared.fail(error);
                }
            }
        };
        spawn("memory", Box::new(listen))?;
        for (number, feed) in elsewhere.feeds.into_iter().enumerate() {
            let shared = arrivals.clone();
            let body = move || {
                let done = feed(&mut |address, size, bytes| shared.take(address, size, bytes));
                if let Err(error) = done {
                    shared.fail(error);
                }
            };
            spawn(&format!("memory-{number}"), Box::new(body))?;
        }
        if arrivals.lock().expected.count == 0 {
            arrivals.end();
        }
        Ok((arrivals, threads))
    }

    /// The machine ends, or could not be built.
    pub(super) fn stop(&self) {
        self.progress.stop.store(true, Ordering::SeqCst);
        self.end();
    }

    fn end(&self) {
        self.lines.end();
        // Full, it is read as soon as anybody can.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Answers the kernel until nothing is missing, or the machine ends.
    fn listen(&self, faults: &UserFault) -> io::Result<()> {
        loop {
            let mut events = [
                PollFd::new(faults, PollFlags::IN),
                PollFd::new(&self.wake, PollFlags::IN),
            ];
            match poll(&mut events, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            if self.is_stopped() {
                return Ok(());
            }
            let wanted = {
                let mut state = self.lock();
                if state.expected.count == 0 {
                    // With the caller's, the last handle: what is not there is zeroes from now on.
                    state.places = None;
                    self.progress.complete.store(true, Ordering::SeqCst);
                    let faults = self.progress.faults.load(Ordering::Relaxed);
                    tracing::info!(faults, "memory is all here");
                    return Ok(());
                }
                state.answer(&self.progress)?
            };
            self.ask(wanted)?;
        }
    }

    fn ask(&self, wanted: Vec<u64>) -> io::Result<()> {
        wanted.into_iter().try_for_each(|page| self.lines.ask(page))
    }

    /// Takes pages of one word that have come.
    fn take(&self, address: u64, size: usize, bytes: Option<&[u8]>) -> io::Result<()> {
        let (wanted, is_last) = {
            let mut state = self.lock();
            state.take(address, size, bytes)?;
            // What the kernel told while pages were placed.
            (state.answer(&self.progress)?, state.expected.count == 0)
        };
        self.ask(wanted)?;
        if is_last {
            self.end();
        }
        Ok(())
    }

    fn is_stopped(&self) -> bool {
        self.progress.stop.load(Ordering::SeqCst)
    }

    /// What cannot be read any more is of no interest, unless something is missing.
    fn fail(&self, error: io::Error) {
        let (failed, left) = {
            let mut state = self.lock();
            if state.expected.count == 0 || self.is_stopped() {
                return;
            }
            (state.failed.take(), state.expected.count)
        };
        if let Some(failed) = failed {
            failed(left, error);
        }
    }
}

impl State {
    /// Answers everybody who waits for what is here; the others' pages, which have to be asked for.
    fn answer(&mut self, progress: &Progress) -> io::Result<Vec<u64>> {
        let mut wanted = Vec::new();
        let Some(places) = &mut self.places else {
            return Ok(wanted);
        };
        places.listen()?;
        while let Some(page) = places.awaited.pop() {
            progress.faults.fetch_add(1, Ordering::Relaxed);
            let (word, bit) = (index(page) / WORD_PAGES, 1 << (page % WORD_PAGES as u64));
            if places.missing(word) & bit != 0 {
                if self.asked[word] & bit == 0 {
                    self.asked[word] |= bit;
                    wanted.push(page);
                }
            } else {
                if places.zero[word] & bit != 0 {
                    places.place_zeroes(page)?;
                }
                // It may have come before it was asked for.
                places.wake(page, 1)?;
            }
            places.listen()?;
        }
        Ok(wanted)
    }

    fn take(&mut self, address: u64, size: usize, bytes: Option<&[u8]>) -> io::Result<()> {
        let count = size / PAGE_BYTES;
        let places = self.places.as_mut();
        let places = places.filter(|_| size.is_multiple_of(PAGE_BYTES));
        let first = places.as_ref().and_then(|it| it.page_at(address, count));
        let (Some(places), Some(first)) = (places, first) else {
            return Err(io::Error::other("a page came that is none of memory"));
        };
        self.expected.take(first, count)?;
        match bytes {
            Some(bytes) => places.put(first, bytes),
            None => {
                let word = index(first) / WORD_PAGES;
                let zero = run(index(first) % WORD_PAGES, count);
                places.zero[word] |= places.missing(word) & zero;
                // Who waits asks again.
                places.wake(first, count)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_expected_page_is_taken_once_and_no_other() {
        let mut expected = Expected::of(vec![0b1110, 1 << 63]);
        assert_eq!(expected.count, 4);
        for (first, count) in [
            (0, 1),
            (3, 2),
            (1, 0),
            (127, 2),
            (63, 2),
            (128, 1),
            (u64::MAX >> 1, 1),
        ] {
            expected.take(first, count).unwrap_err();
        }
        expected.take(1, 2).unwrap();
        expected.take(1, 1).unwrap_err();
        expected.take(127, 1).unwrap();
        expected.take(127, 1).unwrap_err();
        assert_eq!(expected.count, 1);
        expected.take(3, 1).unwrap();
        assert_eq!((expected.count, &*expected.words), (0, &[0, 0][..]));
    }
}

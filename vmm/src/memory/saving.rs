// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Guest RAM that is written down as it was at one moment, while the guest goes on: from that moment on pages are
//! protected from writes (`userfault::Writes`), and the thread `saver` takes them in order, and at once those that
//! somebody waits to write to: a vCPU, one of our threads, or the kernel for either.
//!
//! ```text
//! held:  look what there is ─► protect it            read ─► allow writes ─► to the sink
//! runs:  in order, a unit at a time ─────────────►  ──────────────────────────────────
//!        written(address): its unit first ────────►
//! ```
//! **What it costs.** One unit's bytes, whatever the size of RAM. Who writes waits for one unit to be read, and before
//! that for the sink to take one: a guest that writes faster than the sink takes is as fast as the sink, no faster.
//!
//! **However it ends**, the userfaultfd is closed: nothing is protected then, and whoever waits goes on. A page that was
//! not taken is lost to the snapshot, never to the guest.
//!
//! **Memory that is given back** (a balloon, free page reporting) would lose its content unseen: whoever does that writes
//! to it first (`atoll_devices::memory`, `DirtyLog::keep`).
//!
//! Only what is written through this process's page tables waits, which is all that KVM, vhost in the kernel, io_uring and
//! our threads write. Not so another process that has the memory mapped, too: the caller looks that there is none.
//!
//! Pages are numbered as in `saved::image`. Not here: files (`saved`), what is saved beside RAM (`machine::live`).

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use atoll_devices::memory::{self, DirtyLog, PAGE_BYTES, Ram, WORD_PAGES};
use atoll_disk::TokenBucket;
use atoll_thread::Kind;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap};

use super::{Told, Writes, WritesError};

const WORD_BYTES: usize = WORD_PAGES * PAGE_BYTES;
/// How often a saver that waits looks whether it is wanted still.
const TICK: Duration = Duration::from_millis(20);

/// Where pages go.
pub trait Sink: Send {
    /// Takes pages of one word, those whose bits are set in `wanted`; `first` is the number of its first page, and `pages` are
    /// all of its bytes. Each word comes once, in any order. How much it has written.
    fn put(&mut self, first: u64, wanted: u64, pages: &[u8]) -> io::Result<u64>;

    /// All of them have come, and nobody waits any more.
    fn end(self: Box<Self>) -> io::Result<()>;
}

/// What is to be saved, and how.
pub struct Order {
    /// Watches nothing yet.
    pub writes: Writes,
    /// Whole MiB.
    pub ram: Arc<Ram>,
    /// Pages that are saved: a bit a page, words of one range after those of the other.
    pub wanted: Vec<u64>,
    /// Words that are allowed together: at least those of the memory's own page.
    pub unit_words: usize,
    /// What is written in order at most; what the guest wants to write comes in any case, and counts.
    pub bytes_per_second: Option<u64>,
    /// Where it goes.
    pub sink: Box<dyn Sink>,
}

/// Why memory was not saved. The guest has gone on in any case.
#[derive(Debug, thiserror::Error)]
pub enum SavingError {
    /// Writes do not wait.
    #[error(transparent)]
    Writes(#[from] WritesError),
    /// There is no thread.
    #[error("start the thread that saves memory")]
    Thread(#[source] io::Error),
    /// The kernel does not tell who waits, or does not let go on.
    #[error("answer for protected memory")]
    Faults(#[source] io::Error),
    /// The sink is full, or broken.
    #[error("write memory")]
    Sink(#[source] io::Error),
    /// Nobody wants it any more.
    #[error("it was cancelled")]
    Cancelled,
}

/// How far it is.
#[derive(Debug, Default)]
struct Progress {
    written_bytes: AtomicU64,
    left_bytes: AtomicU64,
    faults: AtomicU64,
    cancelled: AtomicBool,
}

/// RAM that is being saved, or has been. Dropped after everything that writes to it: the thread ends with it.
pub struct Saving {
    progress: Arc<Progress>,
    thread: Option<JoinHandle<()>>,
}

impl Saving {
    /// Begins, while nobody writes: what is in memory now is what is saved. `ended` is called by the saver when all is in the
    /// sink, with the bytes that it says it has written, or when nothing will come of it; the guest does not wait for that.
    pub fn start(
        order: Order,
        ended: impl FnOnce(Result<u64, SavingError>) + Send + 'static,
    ) -> Result<Self, SavingError> {
        let progress = Arc::new(Progress::default());
        let saver = Saver::new(order, progress.clone());
        saver.protect()?;
        let body = move || ended(saver.run());
        let thread = atoll_thread::spawn(Kind::Saver, "saver", body);
        Ok(Self {
            progress,
            thread: Some(thread.map_err(SavingError::Thread)?),
        })
    }

    /// Nothing is to come of it.
    pub fn cancel(&self) {
        self.progress.cancelled.store(true, Ordering::SeqCst);
    }

    /// Bytes that are in the sink.
    #[must_use]
    pub fn written_bytes(&self) -> u64 {
        self.progress.written_bytes.load(Ordering::Relaxed)
    }

    /// Bytes of RAM that are not yet in the sink.
    #[must_use]
    pub fn left_bytes(&self) -> u64 {
        self.progress.left_bytes.load(Ordering::Relaxed)
    }

    /// How often somebody waited to write.
    #[must_use]
    pub fn fault_count(&self) -> u64 {
        self.progress.faults.load(Ordering::Relaxed)
    }
}

impl Drop for Saving {
    fn drop(&mut self) {
        self.cancel();
        if let Some(thread) = self.thread.take() {
            // Its panic has ended the process.
            let _ = thread.join();
        }
    }
}

/// One range of RAM: its first word's number, where it is for the guest and in this process, and its words.
struct Range {
    first: usize,
    guest: u64,
    host: usize,
    words: usize,
}

fn ranges(ram: &Ram) -> Vec<Range> {
    let mut first = 0;
    let range = |region: &GuestRegionMmap<DirtyLog>| {
        let length = usize::try_from(region.len()).expect("64-bit host");
        assert!(
            length.is_multiple_of(WORD_BYTES),
            "ranges of RAM are whole MiB"
        );
        let range = Range {
            first,
            guest: region.start_addr().0,
            host: region.as_ptr() as usize,
            words: length / WORD_BYTES,
        };
        first += range.words;
        range
    };
    ram.iter().map(range).collect()
}

/// Makes room for what is asked about RAM: a word for 64 pages, of all ranges, as in [`Order::wanted`]. `mark` is given where
/// each range's words are in this process.
pub fn mark_words(ram: &Ram, words: &mut Vec<u64>, mut mark: impl FnMut(usize, &mut [u64])) {
    let ranges = ranges(ram);
    words.resize(ranges.iter().map(|range| range.words).sum(), 0);
    for range in ranges {
        mark(
            range.host,
            &mut words[range.first..range.first + range.words],
        );
    }
}

/// What the thread has.
struct Saver {
    writes: Writes,
    ram: Arc<Ram>,
    ranges: Vec<Range>,
    /// What is left to do.
    wanted: Vec<u64>,
    unit_words: usize,
    pace: Option<TokenBucket>,
    sink: Box<dyn Sink>,
    buffer: Vec<u8>,
    told: Vec<Told>,
    progress: Arc<Progress>,
}

impl Saver {
    fn new(order: Order, progress: Arc<Progress>) -> Self {
        let now = Instant::now();
        let rate = order.bytes_per_second;
        let left = order.wanted.iter().filter(|word| **word != 0).count() * WORD_BYTES;
        progress.left_bytes.store(left as u64, Ordering::Relaxed);
        Self {
            ranges: ranges(&order.ram),
            pace: rate.map(|rate| TokenBucket::new(rate, 1, now)),
            buffer: vec![0; order.unit_words * WORD_BYTES],
            writes: order.writes,
            ram: order.ram,
            wanted: order.wanted,
            unit_words: order.unit_words,
            sink: order.sink,
            told: Vec::new(),
            progress,
        }
    }

    /// From now on who writes to a page that is wanted waits.
    fn protect(&self) -> Result<(), WritesError> {
        self.keep(true);
        let done = self.ranges.iter().try_for_each(|range| {
            self.writes.watch(range.host, range.words * WORD_BYTES)?;
            let wanted = &self.wanted[range.first..range.first + range.words];
            let units = wanted.chunks(self.unit_words);
            let units: Vec<bool> = units
                .map(|unit| unit.iter().any(|word| *word != 0))
                .collect();
            let mut unit = 0;
            for run in units.chunk_by(|one, other| one == other) {
                let start = unit * self.unit_words;
                unit += run.len();
                let end = (unit * self.unit_words).min(range.words);
                if run[0] {
                    let length = (end - start) * WORD_BYTES;
                    self.writes
                        .protect(range.host + start * WORD_BYTES, length)?;
                }
            }
            Ok(())
        });
        if done.is_err() {
            self.keep(false);
        }
        done
    }

    /// Whether memory that is given back is to be written to first.
    fn keep(&self, on: bool) {
        let regions = self.ram.iter();
        regions.for_each(|region| memory::log(region).keep(on));
    }

    fn run(mut self) -> Result<u64, SavingError> {
        let done = self.save_all();
        // Closed before anything else may take its time: nobody waits any more.
        self.keep(false);
        drop(self.writes);
        done?;
        self.sink.end().map_err(SavingError::Sink)?;
        Ok(self.progress.written_bytes.load(Ordering::Relaxed))
    }

    fn save_all(&mut self) -> Result<(), SavingError> {
        for range in 0..self.ranges.len() {
            let words = self.ranges[range].words;
            for start in (0..words).step_by(self.unit_words) {
                while self.is_wanted(range, start) {
                    self.answer()?;
                    if self.progress.cancelled.load(Ordering::SeqCst) {
                        return Err(SavingError::Cancelled);
                    }
                    let now = Instant::now();
                    let wait = self
                        .pace
                        .as_mut()
                        .map_or(Duration::ZERO, |pace| pace.wait(now));
                    match wait.is_zero() {
                        true => self.save(range, start)?,
                        false => self.wait(wait.min(TICK))?,
                    }
                }
            }
        }
        Ok(())
    }

    /// Until somebody waits to write, for so long at most.
    fn wait(&self, time: Duration) -> Result<(), SavingError> {
        let time = Timespec::try_from(time).expect("a short time");
        let mut events = [PollFd::new(self.writes.faults(), PollFlags::IN)];
        match poll(&mut events, Some(&time)) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(SavingError::Faults(error.into())),
        }
    }

    /// Lets everybody go on who waits to write.
    fn answer(&mut self) -> Result<(), SavingError> {
        loop {
            let read = self.writes.faults().read(&mut self.told);
            read.map_err(SavingError::Faults)?;
            if self.told.is_empty() {
                return Ok(());
            }
            for told in std::mem::take(&mut self.told) {
                let (Told::Written(address) | Told::Missing(address)) = told else {
                    continue;
                };
                self.progress.faults.fetch_add(1, Ordering::Relaxed);
                if let Some((range, word)) = self.find(address) {
                    let start = word / self.unit_words * self.unit_words;
                    match self.is_wanted(range, start) {
                        true => self.save(range, start)?,
                        // Saved before this was read.
                        false => self.allow(range, start)?,
                    }
                }
            }
        }
    }

    /// The range that has this address, and its word.
    fn find(&self, address: usize) -> Option<(usize, usize)> {
        let ranges = self.ranges.iter().enumerate();
        { ranges }.find_map(|(index, range)| {
            let word = address.checked_sub(range.host)? / WORD_BYTES;
            (word < range.words).then_some((index, word))
        })
    }

    /// The words of the unit that begins with the range's word `start`.
    fn unit(&self, range: usize, start: usize) -> std::ops::Range<usize> {
        let Range { first, words, .. } = self.ranges[range];
        first + start..first + words.min(start + self.unit_words)
    }

    fn is_wanted(&self, range: usize, start: usize) -> bool {
        let unit = self.unit(range, start);
        self.wanted[unit].iter().any(|word| *word != 0)
    }

    /// Takes what is wanted of a unit, lets it be written, and puts it into the sink.
    fn save(&mut self, range: usize, start: usize) -> Result<(), SavingError> {
        if !self.is_wanted(range, start) {
            return Ok(());
        }
        let unit = self.unit(range, start);
        let Range { first, guest, .. } = self.ranges[range];
        for (word, buffer) in unit.clone().zip(self.buffer.chunks_exact_mut(WORD_BYTES)) {
            if self.wanted[word] != 0 {
                let at = GuestAddress(guest + ((word - first) * WORD_BYTES) as u64);
                self.ram.read_slice(buffer, at).expect("the range is RAM's");
            }
        }
        self.allow(range, start)?;
        for (word, buffer) in unit.zip(self.buffer.chunks_exact(WORD_BYTES)) {
            let wanted = std::mem::take(&mut self.wanted[word]);
            if wanted == 0 {
                continue;
            }
            let page = (word * WORD_PAGES) as u64;
            let written = self.sink.put(page, wanted, buffer);
            let written = written.map_err(SavingError::Sink)?;
            if let Some(pace) = &mut self.pace {
                pace.take(written);
            }
            let progress = &self.progress;
            progress.written_bytes.fetch_add(written, Ordering::Relaxed);
            progress
                .left_bytes
                .fetch_sub(WORD_BYTES as u64, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Lets a unit be written again.
    fn allow(&self, range: usize, start: usize) -> Result<(), SavingError> {
        let Range { host, words, .. } = self.ranges[range];
        let length = (words - start).min(self.unit_words) * WORD_BYTES;
        let allowed = self.writes.allow(host + start * WORD_BYTES, length);
        allowed.map_err(SavingError::Faults)
    }
}

#[cfg(test)]
mod tests;

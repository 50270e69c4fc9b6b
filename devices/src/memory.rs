// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The type of guest memory, chosen in one place, and the log of pages that this process has written in it. Not
//! the memory itself: the VMM makes that.
//!
//! KVM logs what vCPUs write; what devices write is logged here, since the kernel does not see it. Whatever
//! goes through `vm-memory` is logged by itself. Who lets the kernel write by a raw pointer (io_uring, readv)
//! calls [`mark`] once the bytes are there.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};

use vm_memory::bitmap::{Bitmap, NewBitmap, RefSlice, WithBitmapSlice};
use vm_memory::mmap::MmapRegion;
use vm_memory::{
    Address, GuestAddress, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryMmap,
    GuestMemoryRegion, GuestRegionMmap,
};

/// One snapshot of guest RAM: what a queue thread works on for one wake-up.
pub type Ram = GuestMemoryMmap<DirtyLog>;

/// Guest RAM as devices hold it. Regions may be added while they run; every user takes a snapshot by
/// `GuestAddressSpace::memory()`, and keeps it for as long as a host pointer into it lives.
pub type Memory = GuestMemoryAtomic<Ram>;

/// Bytes of a page, the unit of the log; KVM's log has the same.
pub const PAGE_BYTES: usize = 4096;

/// Pages of one word of a bitmap that has a bit a page, lowest first.
pub const WORD_PAGES: usize = 64;

/// Pages of one region that were written since they were last asked for. Logs nothing, and costs one load a
/// write, until it is switched on.
#[derive(Debug, Default)]
pub struct DirtyLog {
    on: AtomicBool,
    /// See [`DirtyLog::keep`].
    keeps: AtomicBool,
    /// One bit a page, lowest first.
    words: Vec<AtomicU64>,
}

impl DirtyLog {
    /// Logs from now on (or no longer). A write that is under way on another thread may be missed: whoever
    /// switches it on reads all of memory afterwards.
    pub fn switch(&self, on: bool) {
        self.on.store(on, Ordering::SeqCst);
        for word in &self.words {
            word.store(0, Ordering::SeqCst);
        }
    }

    /// Whether from now on whoever gives pages back to the host writes to each of them first, since somebody waits for that
    /// to keep what they hold. Called while no device works.
    pub fn keep(&self, on: bool) {
        self.keeps.store(on, Ordering::SeqCst);
    }

    /// Whether pages are to be written to before they are given back.
    #[must_use]
    pub fn keeps(&self) -> bool {
        self.keeps.load(Ordering::SeqCst)
    }

    /// Adds the written pages to `words`, which has a bit a page, and forgets them.
    pub fn take(&self, words: &mut [u64]) {
        for (to, from) in words.iter_mut().zip(&self.words) {
            if from.load(Ordering::Relaxed) != 0 {
                *to |= from.swap(0, Ordering::SeqCst);
            }
        }
    }
}

impl<'a> WithBitmapSlice<'a> for DirtyLog {
    type S = RefSlice<'a, Self>;
}

impl Bitmap for DirtyLog {
    fn mark_dirty(&self, offset: usize, length: usize) {
        if !self.on.load(Ordering::Relaxed) || length == 0 {
            return;
        }
        let last = offset.saturating_add(length - 1) / PAGE_BYTES;
        // The bytes are there before the log is looked at. Otherwise a bit might be seen that somebody takes away, who
        // then reads the page as it was: a CPU's own stores may become visible after its later loads.
        fence(Ordering::SeqCst);
        for page in offset / PAGE_BYTES..=last {
            let Some(word) = self.words.get(page / WORD_PAGES) else {
                return;
            };
            let bit = 1 << (page % WORD_PAGES);
            // Rings are written again and again: a page that is in the log already takes the word's cache line from
            // nobody.
            if word.load(Ordering::SeqCst) & bit == 0 {
                word.fetch_or(bit, Ordering::SeqCst);
            }
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        let page = offset / PAGE_BYTES;
        let word = self.words.get(page / WORD_PAGES);
        word.is_some_and(|word| word.load(Ordering::SeqCst) & 1 << (page % WORD_PAGES) != 0)
    }

    fn slice_at(&self, offset: usize) -> RefSlice<'_, Self> {
        RefSlice::new(self, offset)
    }
}

impl NewBitmap for DirtyLog {
    fn with_len(bytes: usize) -> Self {
        let words = bytes.div_ceil(PAGE_BYTES).div_ceil(WORD_PAGES);
        Self {
            on: AtomicBool::new(false),
            keeps: AtomicBool::new(false),
            words: (0..words).map(|_| AtomicU64::new(0)).collect(),
        }
    }
}

/// The log of one region's written pages, a bit a page of 4 KiB; writers of other processes and the kernel mark it by
/// [`mark`].
pub fn log(region: &GuestRegionMmap<DirtyLog>) -> &DirtyLog {
    let mapping: &MmapRegion<DirtyLog> = region;
    mapping.bitmap()
}

/// Numbers of the pages whose bits are set in the words of a bitmap, which are taken one by one as it comes to them.
pub fn pages_of(words: impl IntoIterator<Item = u64>) -> impl Iterator<Item = usize> {
    let words = (0..).step_by(WORD_PAGES).zip(words);
    words.flat_map(|(first, mut word)| {
        std::iter::from_fn(move || {
            let bit = (word != 0).then(|| word.trailing_zeros())?;
            word &= word - 1;
            Some(first + bit as usize)
        })
    })
}

/// Logs `size` bytes at a guest-physical address, which the kernel has written by a raw pointer.
pub fn mark(ram: &Ram, address: u64, size: u64) {
    let mut at = address;
    let end = address.saturating_add(size);
    // A range may span two adjacent regions.
    while at < end
        && let Some((region, start)) = ram.to_region_addr(GuestAddress(at))
    {
        let part = (region.len() - start.0).min(end - at);
        let bytes = |value: u64| usize::try_from(value).expect("64-bit host");
        log(region).mark_dirty(bytes(start.0), bytes(part));
        at += part;
    }
}

/// Words of a bitmap that has a bit a page of the guest's addresses, from 0 to the last of `ram`: how vhost tells which
/// pages it has written.
pub(crate) fn word_count(ram: &Ram) -> usize {
    let last = usize::try_from(ram.last_addr().raw_value()).expect("64-bit host");
    last / PAGE_BYTES / WORD_PAGES + 1
}

/// Puts the pages of such a bitmap, which others write to at the same time, into the log of `ram`, and forgets them.
pub(crate) fn drain<'a>(words: impl Iterator<Item = &'a AtomicU64>, ram: &Ram) {
    let words = words.map(|word| match word.load(Ordering::Relaxed) {
        0 => 0,
        _ => word.swap(0, Ordering::SeqCst),
    });
    for page in pages_of(words) {
        mark(ram, (page * PAGE_BYTES) as u64, PAGE_BYTES as u64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    #[test]
    fn what_is_written_is_logged_once_it_is_switched_on() {
        let half = 128 * PAGE_BYTES;
        let start = GuestAddress(half as u64);
        let ram = Ram::from_ranges(&[(GuestAddress(0), half), (start, half)]).unwrap();
        let logs: Vec<&DirtyLog> = ram.iter().map(log).collect();
        ram.write_obj(1_u8, GuestAddress(0)).unwrap();
        logs.iter().for_each(|log| log.switch(true));
        ram.write_slice(&[1; 2], GuestAddress(2 * 4096 - 1))
            .unwrap();
        ram.store(1_u16, GuestAddress(65 * 4096), Ordering::Release)
            .unwrap();
        mark(&ram, half as u64 - 1, 2);
        let mut words = [0; 2];
        logs[0].take(&mut words);
        assert_eq!(words, [0b110, 1 << 63 | 0b10]);
        words = [0; 2];
        logs[0].take(&mut words);
        assert_eq!(words, [0; 2]);
        logs[1].take(&mut words);
        assert_eq!(words, [1, 0]);
        assert!(!logs[1].dirty_at(0));
    }

    #[test]
    fn pages_that_others_have_noted_are_in_the_log() {
        let high = GuestAddress(4 << 30);
        let ram = Ram::from_ranges(&[(GuestAddress(0), 1 << 20), (high, 1 << 20)]).unwrap();
        ram.iter().for_each(|region| log(region).switch(true));
        let noted: Vec<AtomicU64> = (0..word_count(&ram)).map(|_| AtomicU64::new(0)).collect();
        assert_eq!(noted.len(), ((4 << 30) + (1 << 20)) / 4096 / 64);
        // Pages 1 and 64, the first above 4 GiB, and one that is none.
        noted[0].store(1 << 1, Ordering::Relaxed);
        noted[1].store(1 << 0, Ordering::Relaxed);
        noted[(4 << 30) / 4096 / 64].store(1, Ordering::Relaxed);
        noted[1000].store(!0, Ordering::Relaxed);
        for expected in [[0b10, 1, 1], [0, 0, 0]] {
            drain(noted.iter(), &ram);
            let mut words = [[0; 4]; 2];
            for (region, words) in ram.iter().zip(&mut words) {
                log(region).take(words);
            }
            assert_eq!([words[0][0], words[0][1], words[1][0]], expected);
        }
    }

    #[test]
    fn pages_of_a_bitmap_are_its_bits() {
        let pages: Vec<_> = pages_of([1 << 63 | 0b101, 0, !0, 1]).collect();
        let third = 128..192;
        let expected: Vec<_> = [0, 2, 63].into_iter().chain(third).chain([192]).collect();
        assert_eq!(pages, expected);
    }
}

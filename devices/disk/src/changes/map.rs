// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The map that requests mark: one bit a block, set by any number of queues at a time, taken by one reader.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock};

use super::set::{BlockSet, masks};

/// Blocks that may have changed since the map was taken last. Marking never waits for taking.
#[derive(Debug)]
pub struct ChangeMap {
    block_bytes: u32,
    /// Read to mark, written only to grow. A leaf lock.
    bits: RwLock<Bits>,
}

#[derive(Debug)]
struct Bits {
    size_bytes: u64,
    words: Vec<AtomicU64>,
}

impl ChangeMap {
    /// A map without marks. Panics unless `block_bytes` is a power of two: it comes from the program, or was checked.
    pub fn new(size_bytes: u64, block_bytes: u32) -> Self {
        let empty = BlockSet::new(size_bytes, block_bytes);
        Self {
            block_bytes,
            bits: RwLock::new(Bits {
                size_bytes,
                words: empty.words().iter().copied().map(AtomicU64::new).collect(),
            }),
        }
    }

    /// Bytes of the disk that one bit stands for.
    pub fn block_bytes(&self) -> u32 {
        self.block_bytes
    }

    /// Marks every block that has a byte of the range; what is beyond the disk's end is left out.
    pub fn mark(&self, range: &Range<u64>) {
        let bits = self.bits.read().unwrap_or_else(PoisonError::into_inner);
        for (index, mask) in masks(range, bits.size_bytes, self.block_bytes) {
            // Release: who takes the mark sees what the marking thread has learned about the disk before.
            bits.words[index].fetch_or(mask, Ordering::Release);
        }
    }

    /// Whether the block with this byte is marked.
    pub fn is_marked(&self, offset_bytes: u64) -> bool {
        let bits = self.bits.read().unwrap_or_else(PoisonError::into_inner);
        let range = offset_bytes..offset_bytes.saturating_add(1);
        let mut masks = masks(&range, bits.size_bytes, self.block_bytes);
        masks
            .next()
            .is_some_and(|(index, mask)| bits.words[index].load(Ordering::Acquire) & mask != 0)
    }

    /// Takes all marks: each is in exactly one taken set.
    pub fn take(&self) -> BlockSet {
        self.read(|word| word.swap(0, Ordering::AcqRel))
    }

    /// The marks now, which stay. For a look at what would be copied; whoever copies calls [`ChangeMap::take`].
    pub fn look(&self) -> BlockSet {
        self.read(|word| word.load(Ordering::Acquire))
    }

    /// Marks again what was taken in vain; the set may be in blocks of another size.
    pub fn put_back(&self, set: &BlockSet) {
        for range in set.ranges() {
            self.mark(&range);
        }
    }

    /// Makes room for a disk that grows; what is new is marked.
    pub(super) fn grow(&self, size_bytes: u64) {
        let mut bits = self.bits.write().unwrap_or_else(PoisonError::into_inner);
        let before = bits.size_bytes;
        if size_bytes <= before {
            return;
        }
        let wider = BlockSet::new(size_bytes, self.block_bytes);
        bits.words
            .resize_with(wider.words().len(), AtomicU64::default);
        bits.size_bytes = size_bytes;
        drop(bits);
        self.mark(&(before..size_bytes));
    }

    fn read(&self, read: impl Fn(&AtomicU64) -> u64) -> BlockSet {
        let bits = self.bits.read().unwrap_or_else(PoisonError::into_inner);
        let words = bits.words.iter().map(read).collect();
        BlockSet::from_words(bits.size_bytes, self.block_bytes, words)
    }
}

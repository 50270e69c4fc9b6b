// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A set of a disk's blocks, at rest: what was taken from a map, what a file holds.

use std::ops::Range;

/// Blocks of a disk of `size_bytes`, the last of which may be cut off by its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockSet {
    size_bytes: u64,
    block_bytes: u32,
    /// Bit `n % 64` of word `n / 64` is block `n`.
    words: Vec<u64>,
}

impl BlockSet {
    /// The empty set. Panics unless `block_bytes` is a power of two.
    pub fn new(size_bytes: u64, block_bytes: u32) -> Self {
        assert!(
            block_bytes.is_power_of_two(),
            "blocks of {block_bytes} bytes"
        );
        let words = size_bytes
            .div_ceil(block_bytes.into())
            .div_ceil(u64::BITS.into());
        let words = usize::try_from(words).expect("a map of a disk is far smaller than RAM");
        Self {
            size_bytes,
            block_bytes,
            words: vec![0; words],
        }
    }

    /// The set of all blocks of a disk of that size, the last of which its end may cut off. Panics as [`BlockSet::new`] does.
    pub fn all(size_bytes: u64, block_bytes: u32) -> Self {
        let mut all = Self::new(size_bytes, block_bytes);
        all.insert(&(0..size_bytes));
        all
    }

    pub(super) fn from_words(size_bytes: u64, block_bytes: u32, words: Vec<u64>) -> Self {
        let set = Self {
            size_bytes,
            block_bytes,
            words,
        };
        debug_assert_eq!(
            set.words.len(),
            Self::new(size_bytes, block_bytes).words.len()
        );
        set
    }

    /// Whether the words have bits of blocks beyond the disk's end: those of a file may.
    pub(super) fn exceeds_its_disk(&self) -> bool {
        let all = Self::all(self.size_bytes, self.block_bytes);
        let mut words = self.words.iter().zip(&all.words);
        words.any(|(word, whole)| word & !whole != 0)
    }

    pub(super) fn words(&self) -> &[u64] {
        &self.words
    }

    /// Size of the disk, bytes; the last block may be cut off there.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Size of a block, bytes: what one bit stands for.
    pub fn block_bytes(&self) -> u32 {
        self.block_bytes
    }

    /// Adds every block that has a byte of the range; what is beyond the disk's end is left out.
    pub fn insert(&mut self, range: &Range<u64>) {
        for (index, mask) in masks(range, self.size_bytes, self.block_bytes) {
            self.words[index] |= mask;
        }
    }

    /// Takes out every block that lies wholly within the range; the disk's end ends its last block.
    pub fn remove(&mut self, range: &Range<u64>) {
        let block = u64::from(self.block_bytes);
        let start = range.start.next_multiple_of(block);
        let end = match range.end >= self.size_bytes {
            true => self.size_bytes,
            false => range.end / block * block,
        };
        for (index, mask) in masks(&(start..end), self.size_bytes, self.block_bytes) {
            self.words[index] &= !mask;
        }
    }

    /// Whether the block that holds this byte is in the set.
    pub fn contains(&self, offset_bytes: u64) -> bool {
        let mut bits = masks(
            &(offset_bytes..offset_bytes.saturating_add(1)),
            self.size_bytes,
            self.block_bytes,
        );
        bits.next()
            .is_some_and(|(index, mask)| self.words[index] & mask != 0)
    }

    /// Whether no block is in the set.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|word| *word == 0)
    }

    /// Sum of the blocks' bytes, as far as they are on the disk.
    pub fn total_bytes(&self) -> u64 {
        self.ranges().map(|range| range.end - range.start).sum()
    }

    /// The blocks as ranges of bytes, ascending, adjacent ones as one; the last ends where the disk ends.
    pub fn ranges(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        self.ranges_from(0)
    }

    /// The same from the block on that holds this byte.
    pub fn ranges_from(&self, offset_bytes: u64) -> impl Iterator<Item = Range<u64>> + '_ {
        let block = u64::from(self.block_bytes);
        let mut from = offset_bytes / block;
        std::iter::from_fn(move || {
            let first = self.next(from, true)?;
            let end = self.next(first, false).unwrap_or(u64::MAX / block);
            from = end;
            Some(first * block..(end * block).min(self.size_bytes))
        })
    }

    /// The first block from `from` on that is in the set, or is not.
    fn next(&self, from: u64, wanted: bool) -> Option<u64> {
        let bits = u64::from(u64::BITS);
        let mut index = usize::try_from(from / bits).ok()?;
        let mut skip = u64::MAX << (from % bits);
        while let Some(&word) = self.words.get(index) {
            let word = if wanted { word } else { !word } & skip;
            if word != 0 {
                return Some(index as u64 * bits + u64::from(word.trailing_zeros()));
            }
            skip = u64::MAX;
            index += 1;
        }
        None
    }
}

/// The bits of the blocks that have a byte of the range: index of the word and mask, without those beyond the end.
pub(super) fn masks(
    range: &Range<u64>,
    size_bytes: u64,
    block_bytes: u32,
) -> impl Iterator<Item = (usize, u64)> + use<> {
    let shift = block_bytes.trailing_zeros();
    let bits = u64::from(u64::BITS);
    let end_byte = range.end.min(size_bytes);
    // First and end (exclusive) block; an empty range has none.
    let (mut block, end) = match range.start < end_byte {
        true => (range.start >> shift, ((end_byte - 1) >> shift) + 1),
        false => (0, 0),
    };
    std::iter::from_fn(move || {
        if block >= end {
            return None;
        }
        let index = usize::try_from(block / bits).expect("a word of a map that is in RAM");
        let low = block % bits;
        let count = (bits - low).min(end - block);
        block += count;
        // `count` is 1 to 64.
        Some((index, (u64::MAX >> (bits - count)) << low))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pairs(set: &BlockSet) -> Vec<(u64, u64)> {
        set.ranges().map(|range| (range.start, range.end)).collect()
    }

    #[test]
    fn ranges_are_those_inserted_in_whole_blocks() {
        let mut set = BlockSet::new(10_000, 512);
        assert!(set.is_empty());
        set.insert(&(511..513));
        set.insert(&(9_999..20_000));
        set.insert(&(4096..4096));
        set.insert(&(u64::MAX - 1..u64::MAX));
        assert_eq!(pairs(&set), [(0, 1024), (9728, 10_000)]);
        assert_eq!(set.total_bytes(), 1024 + 272);
        assert!(set.contains(0) && set.contains(1023) && !set.contains(1024));
        assert!(set.contains(9_999) && !set.contains(10_000) && !set.contains(u64::MAX));
    }

    #[test]
    fn only_whole_blocks_are_removed() {
        let mut set = BlockSet::all(10_000, 512);
        set.remove(&(1..1536));
        set.remove(&(9728..10_000));
        assert_eq!(pairs(&set), [(0, 512), (1536, 9728)]);
    }

    #[test]
    fn words_end_where_blocks_go_on() {
        for (first, count) in [(0, 64), (63, 2), (64, 64), (1, 200), (127, 1)] {
            let mut set = BlockSet::new(1 << 20, 512);
            let range = first * 512..(first + count) * 512;
            set.insert(&range);
            assert_eq!(pairs(&set), [(range.start, range.end)]);
            set.remove(&range);
            assert!(set.is_empty());
        }
        let all = BlockSet::all(1 << 20, 512);
        assert_eq!(pairs(&all), [(0, 1 << 20)]);
        assert!(BlockSet::all(0, 512).is_empty());
    }
}

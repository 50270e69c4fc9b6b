// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Reference counts made anew, for an image whose last user was killed.
//!
//! The guest's data is found by the first- and second-level tables alone, and `image` keeps those right in the file at
//! every moment. Counts only say which clusters are free; in the file they are right when the image is closed. Until
//! then its mark ("dirty") says that they are not. (Version 2 has no mark: its counts are compared with the tables.)
//! Nor are they when a feature is dropped that has clusters, such as QEMU's bitmaps.
//!
//! The new counts are put behind everything that is in use and made durable; then one write to the header's first
//! sector makes them the image's and takes the mark away. Whoever is killed in between leaves the image as it was.
//! Clusters that nobody refers to are free again.
//!
//! An image from elsewhere may hold anything: what contradicts itself is left alone and refused. Each table is read
//! once, and counts take at most [`COUNT_BYTES_MAX`].

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::io;
use std::ops::Range;

use imago::{Storage as _, StorageExt as _};

use super::header::{Header, Qcow2Error, REFCOUNT_TABLE_BYTES_MAX};
use super::storage::ImageStorage;
use super::tables::{COMPRESSED, OFFSET_MASK, compressed_place, read_entries};

/// Enough for 8 TiB in clusters of 64 KiB.
const COUNT_BYTES_MAX: usize = 256 << 20;
/// A count of 16 bits; its order in the header.
const COUNT_BYTES: u64 = 2;
const REFCOUNT_ORDER: u32 = 4;
/// In memory: a cluster that has one owner and cannot be shared. Less than this: so many compressed clusters touch it.
const OWNED: u16 = u16::MAX;

/// What an image was found with, and has no longer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Mended {
    /// Why its counts were made anew.
    pub(super) why: &'static str,
    /// How they were, if they were of 16 bits.
    pub(super) found: Option<Difference>,
}

/// How counts differ from what the tables refer to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Difference {
    /// Clusters in use whose counts are too low: the next write could have taken them for free ones.
    pub(super) too_low: u64,
    /// Clusters that are counted for nobody: space that was lost.
    pub(super) too_high: u64,
}

/// Makes the counts right, if they may not be. The image is ours alone, and nobody has read its tables yet.
pub(super) fn repair(
    storage: &ImageStorage,
    header: &Header,
) -> Result<Option<Mended>, Qcow2Error> {
    let has_mark = header.has_mark();
    if has_mark && !header.dirty && !header.has_extras {
        return Ok(None);
    }
    let counts = Counts::of(storage, header)?;
    let old = Old::read(storage, header).map_err(Qcow2Error::Tables)?;
    let comparable = header.refcount_order == REFCOUNT_ORDER;
    let found = comparable.then(|| old.differs_from(&counts, storage));
    let why = match found {
        _ if header.dirty => "nobody closed it",
        _ if has_mark => "it had what is not kept, as QEMU's bitmaps",
        Some(Difference { too_low: 1.., .. }) => "clusters in use were counted as free",
        _ => return Ok(None),
    };
    replace(storage, header, counts, &old)?;
    Ok(Some(Mended { why, found }))
}

fn index(number: u64) -> usize {
    usize::try_from(number).expect("64-bit host")
}

fn refused<T>(what: &'static str, offset: u64) -> Result<T, Qcow2Error> {
    Err(Qcow2Error::Repair { what, offset })
}

/// References to clusters, by the block that will hold their counts.
struct Counts {
    cluster_bytes: u64,
    file_bytes: u64,
    blocks: BTreeMap<u64, Box<[u16]>>,
}

impl Counts {
    /// Counts what the tables refer to.
    fn of(storage: &ImageStorage, header: &Header) -> Result<Self, Qcow2Error> {
        let cluster_bytes = u64::from(header.cluster_bytes);
        let mut counts = Self {
            cluster_bytes,
            file_bytes: storage.size().map_err(Qcow2Error::Tables)?,
            blocks: BTreeMap::new(),
        };
        counts.own(0)?;
        let table = header.l1.offset..header.l1.offset + u64::from(header.l1.entries) * 8;
        for at in table.step_by(index(cluster_bytes)) {
            counts.own(at)?;
        }
        let mut first = vec![0; index(header.l1.entries.into())];
        read_entries(storage, header.l1.offset, &mut first).map_err(Qcow2Error::Tables)?;
        let mut second = vec![0; index(cluster_bytes / 8)];
        for entry in first {
            let at = entry & OFFSET_MASK;
            if at == 0 {
                continue;
            }
            counts.own(at)?;
            if at + cluster_bytes > counts.file_bytes {
                return Err(counts.cut_off("an L2 table", at));
            }
            // Nobody writes a table that is empty, but a made-up image may have millions.
            if storage.is_hole(at, cluster_bytes) {
                continue;
            }
            read_entries(storage, at, &mut second).map_err(Qcow2Error::Tables)?;
            for entry in &second {
                counts.refer(*entry)?;
            }
        }
        Ok(counts)
    }

    /// An entry of a second-level table.
    fn refer(&mut self, entry: u64) -> Result<(), Qcow2Error> {
        if entry & COMPRESSED != 0 {
            let place = compressed_place(entry, self.cluster_bytes.trailing_zeros());
            return self.share(place);
        }
        match entry & OFFSET_MASK {
            0 => Ok(()),
            at => self.own(at),
        }
    }

    /// The cluster at an offset has an owner.
    fn own(&mut self, at: u64) -> Result<(), Qcow2Error> {
        if !at.is_multiple_of(self.cluster_bytes) {
            return refused("a cluster that begins nowhere", at);
        }
        match self.count(at)? {
            count @ 0 => *count = OWNED,
            _ => return refused("a cluster with two owners", at),
        }
        Ok(())
    }

    /// A compressed cluster touches those at `place`.
    fn share(&mut self, place: Range<u64>) -> Result<(), Qcow2Error> {
        let first = place.start / self.cluster_bytes * self.cluster_bytes;
        for at in (first..place.end).step_by(index(self.cluster_bytes)) {
            match self.count(at)? {
                &mut OWNED => return refused("a cluster with two owners", at),
                count if *count == OWNED - 1 => {
                    return refused("a cluster with too many owners", at);
                }
                count => *count += 1,
            }
        }
        Ok(())
    }

    fn count(&mut self, at: u64) -> Result<&mut u16, Qcow2Error> {
        // The last cluster may be cut off, where nobody has written to the end of it.
        if at > self.file_bytes {
            return Err(self.cut_off("a cluster of the disk", at));
        }
        self.slot(at / self.cluster_bytes)
    }

    /// The cluster at an offset is not in the file.
    fn cut_off(&self, what: &'static str, at: u64) -> Qcow2Error {
        Qcow2Error::CutOff {
            what,
            end: at.saturating_add(self.cluster_bytes),
            file_bytes: self.file_bytes,
        }
    }

    /// Clusters whose counts are in one block.
    fn block_clusters(&self) -> u64 {
        self.cluster_bytes / COUNT_BYTES
    }

    fn slot(&mut self, cluster: u64) -> Result<&mut u16, Qcow2Error> {
        let in_block = self.block_clusters();
        let (number, place) = (cluster / in_block, cluster % in_block);
        let room = COUNT_BYTES_MAX / index(self.cluster_bytes);
        if self.blocks.len() >= room && !self.blocks.contains_key(&number) {
            return refused(
                "too large to be repaired here: a cluster",
                cluster * self.cluster_bytes,
            );
        }
        let block = self.blocks.entry(number);
        let block = block.or_insert_with(|| vec![0; index(in_block)].into());
        Ok(&mut block[index(place)])
    }

    /// First cluster behind all that are in use.
    fn end(&self) -> u64 {
        let last = self.blocks.last_key_value();
        last.map_or(0, |(number, block)| {
            let free = block.iter().rev().take_while(|count| **count == 0).count();
            (number + 1) * self.block_clusters() - free as u64
        })
    }
}

/// The count as it is in the file.
fn in_file(count: u16) -> u16 {
    match count {
        OWNED => 1,
        shared => shared,
    }
}

/// The counts that the image has.
struct Old {
    cluster_bytes: u64,
    table: Range<u64>,
    blocks: Vec<u64>,
}

impl Old {
    fn read(storage: &ImageStorage, header: &Header) -> io::Result<Self> {
        let cluster_bytes = u64::from(header.cluster_bytes);
        let length = u64::from(header.refcount_clusters) * cluster_bytes;
        let mut blocks = vec![0; index(length / 8)];
        read_entries(storage, header.refcount_offset, &mut blocks)?;
        for block in &mut blocks {
            *block &= OFFSET_MASK;
        }
        Ok(Self {
            cluster_bytes,
            table: header.refcount_offset..header.refcount_offset + length,
            blocks,
        })
    }

    /// A block that cannot be read counts nothing; as many are looked at as there may be new ones.
    fn differs_from(&self, counts: &Counts, storage: &ImageStorage) -> Difference {
        let room = COUNT_BYTES_MAX / index(self.cluster_bytes);
        let places = self.blocks.iter().filter(|at| **at != 0);
        // The table and its blocks are counted too, and have no other owner.
        let table = self.table.clone().step_by(index(self.cluster_bytes));
        let own: HashSet<u64> = places.copied().chain(table).collect();
        let present = (0_u64..).zip(&self.blocks).filter(|(_, at)| **at != 0);
        let mut numbers: BTreeSet<u64> = present.map(|(number, _)| number).take(room).collect();
        numbers.extend(counts.blocks.keys());
        let mut difference = Difference::default();
        let mut bytes = vec![0; index(self.cluster_bytes)];
        for number in numbers {
            let place = self.blocks.get(index(number)).filter(|at| **at != 0);
            if place.is_none_or(|at| storage.read(&mut bytes[..], *at).is_err()) {
                bytes.fill(0);
            }
            let block = counts.blocks.get(&number);
            let first = number * counts.block_clusters();
            for (at, old) in bytes.as_chunks::<2>().0.iter().enumerate() {
                let old = u16::from_be_bytes(*old);
                let new = block.map_or(0, |block| in_file(block[at]));
                let offset = (first + at as u64) * self.cluster_bytes;
                difference.too_low += u64::from(old < new);
                difference.too_high += u64::from(old > new.max(own.contains(&offset).into()));
            }
        }
        difference
    }

    /// First cluster behind the table and those blocks that are in the file: they stay as they are until new ones are
    /// there.
    fn end(&self, file_bytes: u64) -> u64 {
        let within = self.blocks.iter().filter(|at| **at < file_bytes);
        let last = within.max().map_or(0, |at| at / self.cluster_bytes + 1);
        last.max(self.table.end / self.cluster_bytes)
    }
}

/// Writes new counts, and makes them the image's.
fn replace(
    storage: &ImageStorage,
    header: &Header,
    mut counts: Counts,
    old: &Old,
) -> Result<(), Qcow2Error> {
    let bytes = counts.cluster_bytes;
    let start = counts.end().max(old.end(counts.file_bytes));
    // They count themselves, which may take one more block, and so on.
    let (mut length, mut table_clusters) = (0, 0);
    loop {
        let own =
            start / counts.block_clusters()..(start + length).div_ceil(counts.block_clusters());
        let blocks: BTreeSet<u64> = counts.blocks.keys().copied().chain(own).collect();
        let entries = blocks.last().expect("the header has a cluster") + 1;
        table_clusters = (entries * 8).div_ceil(bytes).max(table_clusters);
        let needed = blocks.len() as u64 + table_clusters;
        if needed <= length {
            break;
        }
        length = needed;
    }
    if table_clusters * bytes > REFCOUNT_TABLE_BYTES_MAX {
        return refused(
            "too large to be repaired here: its last cluster",
            start * bytes,
        );
    }
    for cluster in start..start + length {
        *counts.slot(cluster)? = OWNED;
    }
    let table_offset = (start + length - table_clusters) * bytes;
    write_counts(storage, &counts, start, table_offset, table_clusters)
        .and_then(|()| adopt(storage, header, table_offset, table_clusters))
        .map_err(Qcow2Error::Tables)
}

fn write_counts(
    storage: &ImageStorage,
    counts: &Counts,
    start: u64,
    table_offset: u64,
    table_clusters: u64,
) -> io::Result<()> {
    let bytes = counts.cluster_bytes;
    let mut table = vec![0; index(table_clusters * bytes)];
    for ((number, block), at) in counts
        .blocks
        .iter()
        .zip((start * bytes..).step_by(index(bytes)))
    {
        let block: Vec<u8> = block
            .iter()
            .flat_map(|count| in_file(*count).to_be_bytes())
            .collect();
        storage.write(&block[..], at)?;
        let entry = index(*number) * 8;
        table[entry..entry + 8].copy_from_slice(&at.to_be_bytes());
    }
    storage.write(&table[..], table_offset)
}

/// One write to one sector. What it points to is durable before (`storage`).
fn adopt(storage: &ImageStorage, header: &Header, offset: u64, clusters: u64) -> io::Result<()> {
    let clusters = u32::try_from(clusters).map_err(io::Error::other)?;
    let mut head = vec![0; if header.has_mark() { 104 } else { 72 }];
    storage.read(&mut head[..], 0)?;
    head[48..56].copy_from_slice(&offset.to_be_bytes());
    head[56..60].copy_from_slice(&clusters.to_be_bytes());
    if header.has_mark() {
        // The autoclear features: they have lost their clusters.
        head[88..96].fill(0);
        head[96..100].copy_from_slice(&REFCOUNT_ORDER.to_be_bytes());
    }
    storage.hide_dirty(false);
    storage.write(&head[..], 0)?;
    storage.barrier()
}

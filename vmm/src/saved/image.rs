// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Guest RAM in a file: the ranges of the address map one after the other, pages of zeroes as holes.
//!
//! Read back in one of three ways ([`Mode`]; lazily: `layers`). Not here: streams (`migration`).

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use atoll_devices::memory::{DirtyLog, PAGE_BYTES, Ram};
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use vm_memory::bitmap::NewBitmap;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap,
};

use crate::board::Board;

/// Pages that are looked at together, and written together when they have something in them.
const CHUNK_BYTES: usize = 256 * PAGE_BYTES;

/// Bytes of a page's entry in the pagemap, and of those of a word of 64 pages; the pages' own bytes.
const ENTRY_BYTES: usize = 8;
const WORD_ENTRIES_BYTES: usize = 64 * ENTRY_BYTES;
const WORD_BYTES: usize = 64 * PAGE_BYTES;
/// Words whose entries are read together: those of 16 MiB.
const MARKED_WORDS: usize = 64;

/// How RAM comes back from its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Mode {
    /// Read before the guest runs. The file is not needed afterwards.
    #[default]
    Read,
    /// Map the file copy-on-write: pages are read when they are touched. The file must stay as it is for as long
    /// as the machine runs; clones of one snapshot share its pages.
    Map,
    /// Read while the guest runs: what is touched first, then the rest in order. Files must stay as they are until
    /// all is read (`ctl info` tells); they are not needed afterwards.
    Lazy,
}

/// Tells which pages of this process exist, so that RAM which the guest never touched is not looked at.
///
/// `/proc/PID/pagemap` (kernel `Documentation/admin-guide/mm/pagemap.rst`): eight bytes a page, bit 63 "in RAM", bit
/// 62 "in swap". A page of private anonymous memory that is neither is zero. It is not so with memory that is a
/// file, which is why only who made the RAM may use this, and has to name the parts of it that are
/// a file.
#[derive(Debug)]
pub struct Touched {
    pagemap: File,
    files: Vec<Range<usize>>,
}

impl Touched {
    /// Of this process. `None` where there is no /proc; then everything is looked at.
    #[must_use]
    pub fn open() -> Option<Self> {
        let pagemap = File::open("/proc/self/pagemap").ok()?;
        let files = Vec::new();
        Some(Self { pagemap, files })
    }

    /// The same for RAM in which there are files: all of their pages count as touched.
    #[must_use]
    pub fn with_files(&self, files: &[Range<usize>]) -> Option<Self> {
        let pagemap = self.pagemap.try_clone().ok()?;
        let files = files.to_vec();
        Some(Self { pagemap, files })
    }

    /// Whether any page in `length` bytes from `address` on, both multiples of a page, was ever touched. Pages of
    /// which nothing can be learnt count as touched.
    #[must_use]
    pub fn any(&self, address: usize, length: usize) -> bool {
        if self.is_file(address, length) {
            return true;
        }
        let mut entries = vec![0; length / PAGE_BYTES * ENTRY_BYTES];
        !self.read(address, &mut entries) || exists(&entries)
    }

    /// The same of each word of 64 pages, the first word's from `address` on: sets those with a touched page to all ones.
    pub fn mark(&self, address: usize, words: &mut [u64]) {
        let mut buffer = vec![0; MARKED_WORDS * WORD_ENTRIES_BYTES];
        for (piece, start) in words
            .chunks_mut(MARKED_WORDS)
            .zip((address..).step_by(MARKED_WORDS * WORD_BYTES))
        {
            if piece.iter().all(|word| *word == !0) {
                continue;
            }
            let entries = &mut buffer[..piece.len() * WORD_ENTRIES_BYTES];
            let is_known = self.read(start, entries);
            let entries = entries.chunks_exact(WORD_ENTRIES_BYTES);
            let addresses = (start..).step_by(WORD_BYTES);
            for ((word, entries), address) in piece.iter_mut().zip(entries).zip(addresses) {
                if !is_known || exists(entries) || self.is_file(address, WORD_BYTES) {
                    *word = !0;
                }
            }
        }
    }

    fn is_file(&self, address: usize, length: usize) -> bool {
        let mut files = self.files.iter();
        files.any(|file| file.start < address + length && address < file.end)
    }

    /// Whether the entries of the pages from `address` on could be read.
    fn read(&self, address: usize, entries: &mut [u8]) -> bool {
        let at = address / PAGE_BYTES * ENTRY_BYTES;
        self.pagemap.read_exact_at(entries, at as u64).is_ok()
    }
}

/// Whether one of these entries is of a page that is somewhere.
fn exists(entries: &[u8]) -> bool {
    let (entries, _) = entries.as_chunks::<ENTRY_BYTES>();
    let somewhere = |entry: &[u8; ENTRY_BYTES]| u64::from_le_bytes(*entry) >> 62 != 0;
    entries.iter().any(somewhere)
}

/// Writes all of `ram`; returns how many bytes were not zero, by page. `touched` is for private anonymous RAM only.
pub fn write(ram: &Ram, touched: Option<&Touched>, file: &File) -> io::Result<u64> {
    let total: u64 = ram.iter().map(GuestMemoryRegion::len).sum();
    file.set_len(0)?;
    file.set_len(total)?;
    let mut chunk = vec![0; CHUNK_BYTES];
    let (mut at, mut written) = (0, 0);
    for region in ram.iter() {
        let mut offset = 0;
        while offset < region.len() {
            let left = usize::try_from(region.len() - offset).unwrap_or(usize::MAX);
            let part = &mut chunk[..left.min(CHUNK_BYTES)];
            let host = region.as_ptr() as usize + usize::try_from(offset).expect("64-bit host");
            if touched.is_some_and(|touched| !touched.any(host, part.len())) {
                offset += part.len() as u64;
                continue;
            }
            let start = GuestAddress(region.start_addr().0 + offset);
            ram.read_slice(part, start).map_err(io::Error::other)?;
            for (first, run) in runs(part) {
                file.write_all_at(run, at + offset + first)?;
                written += run.len() as u64;
            }
            offset += part.len() as u64;
        }
        at += region.len();
    }
    Ok(written)
}

/// Whether there is nothing in these bytes.
#[must_use]
pub fn is_zero(bytes: &[u8]) -> bool {
    // In words first: a page is looked at once for each pass over memory.
    let (words, rest) = bytes.as_chunks::<64>();
    words.iter().all(|word| *word == [0; 64]) && rest.iter().all(|byte| *byte == 0)
}

/// The longest runs of pages that are not zero, with their offsets.
pub(super) fn runs(bytes: &[u8]) -> impl Iterator<Item = (u64, &[u8])> {
    let mut pages = bytes.chunks(PAGE_BYTES).enumerate().peekable();
    std::iter::from_fn(move || {
        let first = loop {
            let (index, page) = pages.next()?;
            if !is_zero(page) {
                break index;
            }
        };
        let mut last = first;
        while let Some((index, _)) = pages.next_if(|(_, page)| !is_zero(page)) {
            last = index;
        }
        let (start, end) = (first * PAGE_BYTES, (last + 1) * PAGE_BYTES);
        Some((start as u64, &bytes[start..end.min(bytes.len())]))
    })
}

/// Reads the file's data into `ram`, which is zeroed.
pub fn read(ram: &Ram, file: &File) -> io::Result<()> {
    let total = ram.iter().map(GuestMemoryRegion::len).sum();
    check_size(file, total)?;
    let mut at = 0;
    for region in ram.iter() {
        let end = at + region.len();
        let mut from = at;
        while let Some((start, stop)) = data(file, from)?.filter(|(start, _)| *start < end) {
            let (start, stop) = (start.max(at), stop.min(end));
            let length = usize::try_from(stop - start).expect("64-bit host");
            let to = GuestAddress(region.start_addr().0 + (start - at));
            seek(file, SeekFrom::Start(start))?;
            ram.read_exact_volatile_from(to, &mut file.as_fd(), length)
                .map_err(io::Error::other)?;
            from = stop;
        }
        at = end;
    }
    // A file that was cut off meanwhile has no data there either, which would be taken for zeroes.
    check_size(file, total)
}

/// The next range of the file that has data, at or after `from`.
pub(super) fn data(file: &File, from: u64) -> io::Result<Option<(u64, u64)>> {
    match seek(file, SeekFrom::Data(from)) {
        Ok(start) => Ok(Some((start, seek(file, SeekFrom::Hole(start))?))),
        Err(Errno::NXIO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// RAM of `memory_mib` that is the file, copy-on-write.
pub fn map(board: &Board, memory_mib: u64, file: &File) -> io::Result<Ram> {
    let bytes = memory_mib << 20;
    check_size(file, bytes)?;
    let mut at = 0;
    let mut regions = Vec::new();
    for (base, size) in board.ram(bytes) {
        let length = usize::try_from(size).expect("64-bit host");
        let mapping = MmapRegionBuilder::new_with_bitmap(length, DirtyLog::with_len(length))
            .with_file_offset(FileOffset::new(file.try_clone()?, at))
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_NORESERVE)
            .build()
            .map_err(io::Error::other)?;
        let region = GuestRegionMmap::new(mapping, GuestAddress(base));
        regions.push(region.expect("the address map does not wrap"));
        at += size;
    }
    Ram::from_regions(regions).map_err(io::Error::other)
}

/// Whether the file has so many bytes, or more.
pub(super) fn check_size(file: &File, expected: u64) -> io::Result<()> {
    let size = file.metadata()?.len();
    // Whoever keeps the file may have put something of its own behind the memory.
    if size >= expected {
        return Ok(());
    }
    Err(io::Error::other(format!(
        "the memory file has {size} bytes, the machine {expected}"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::board::MICRO;
    use crate::memory::{Backing, allocate};

    #[test]
    fn pages_come_back_and_zeroes_take_no_room() {
        let ram = allocate(&MICRO, 4, 40, Backing::Anonymous).unwrap();
        let put = |address, byte: u8| ram.write_obj(byte, GuestAddress(address)).unwrap();
        for (address, byte) in [(0, 1), (4095, 2), (0x1_0000, 3), (0x3f_ffff, 4)] {
            put(address, byte);
        }
        let file = tempfile::tempfile().unwrap();
        let touched = Touched::open();
        assert_eq!(write(&ram, touched.as_ref(), &file).unwrap(), 3 * 4096);
        // Over an older image: what is zero now is zero in the file.
        put(0x1_0000, 0);
        assert_eq!(write(&ram, None, &file).unwrap(), 2 * 4096);
        let again = allocate(&MICRO, 4, 40, Backing::Anonymous).unwrap();
        read(&again, &file).unwrap();
        for copy in [again, map(&MICRO, 4, &file).unwrap()] {
            let (mut left, mut right) = (vec![0; 4 << 20], vec![0; 4 << 20]);
            ram.read_slice(&mut left, GuestAddress(0)).unwrap();
            copy.read_slice(&mut right, GuestAddress(0)).unwrap();
            assert!(left == right);
            copy.write_obj(9_u8, GuestAddress(0)).unwrap();
        }
        let mut first = [0];
        file.read_exact_at(&mut first, 0).unwrap();
        assert_eq!(first, [1], "a mapping writes its own copy");
        let error = map(&MICRO, 8, &file).unwrap_err().to_string();
        assert_eq!(
            error,
            "the memory file has 4194304 bytes, the machine 8388608"
        );
    }

    /// Two slots, the second in the file behind the first.
    #[test]
    fn memory_around_the_hole_comes_back() {
        let mib = (MICRO.ram(u64::MAX >> 8)[0].1 >> 20) + 2;
        let ram = allocate(&MICRO, mib, 40, Backing::Anonymous).unwrap();
        let ranges = MICRO.ram(mib << 20);
        let [(_, low), (high, size)] = ranges[..] else {
            panic!("one hole: {ranges:?}");
        };
        let places = [0, low - 8, high, high + size - 8];
        for (value, place) in (1_u64..).zip(places) {
            ram.write_obj(value, GuestAddress(place)).unwrap();
        }
        let file = tempfile::tempfile().unwrap();
        let written = write(&ram, Touched::open().as_ref(), &file).unwrap();
        assert_eq!(written, 4 * 4096);
        let again = allocate(&MICRO, mib, 40, Backing::Anonymous).unwrap();
        read(&again, &file).unwrap();
        for copy in [again, map(&MICRO, mib, &file).unwrap()] {
            for (value, place) in (1_u64..).zip(places) {
                assert_eq!(copy.read_obj::<u64>(GuestAddress(place)).unwrap(), value);
            }
            assert!(copy.read_obj::<u8>(GuestAddress(low)).is_err(), "the hole");
        }
    }

    #[test]
    fn runs_are_the_pages_with_something_in_them() {
        let mut bytes = vec![0; 6 * PAGE_BYTES];
        for page in [1, 2, 5] {
            bytes[page * PAGE_BYTES + 100] = 1;
        }
        let found: Vec<(u64, usize)> = runs(&bytes).map(|(at, run)| (at, run.len())).collect();
        assert_eq!(found, [(4096, 8192), (5 * 4096, 4096)]);
        assert_eq!(runs(&[0; PAGE_BYTES]).count(), 0);
    }
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Guest RAM in a file, packed: only the pages that matter. All that are not zero, or those that were written since another
//! snapshot, the parent, whose RAM is needed to read this one's.
//!
//! ```text
//! header   "ATOLLRAM", version u32, blocks u32, bytes of RAM u64, offset of the index u64      little endian
//! blocks   each a zstd frame, or pages as they are
//! index    of each block: first page u64, offset u64, pages u32, bytes u32               ascending
//! ```
//! Pages are numbered as in `image`: the ranges of the address map one after the other. A block without bytes is pages of
//! zeroes. Blocks are read apart from each other. Nothing in a file is believed before it has been looked at. A machine writes
//! pages as they are, since it stands still meanwhile; they are compressed by whoever wanted that, when it goes on again.
//!
//! Not here: which pages those are, and whose child a snapshot is (`saved`, `machine::snapshot`).

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;

use atoll_devices::memory::{PAGE_BYTES, Ram};
use ruzstd::decoding::StreamingDecoder;
use ruzstd::encoding::{CompressionLevel, compress_to_vec};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use super::image::{Touched, is_zero};

const MAGIC: [u8; 8] = *b"ATOLLRAM";
const VERSION: u32 = 1;
/// Most pages of a block: those of one word of a bitmap.
const BLOCK_PAGES: usize = 64;
const BLOCK_BYTES: usize = BLOCK_PAGES * PAGE_BYTES;

#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Header {
    magic: [u8; 8],
    version: u32,
    block_count: u32,
    ram_bytes: u64,
    index_offset: u64,
}

/// Pages of RAM that follow one another, and where their bytes are.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Block {
    first_page: u64,
    offset: u64,
    pages: u32,
    bytes: u32,
}

impl Block {
    /// The page behind its last; of one that was checked.
    fn end(&self) -> u64 {
        self.first_page + u64::from(self.pages)
    }
}

/// Which pages of RAM are written to the file.
#[derive(Debug, Clone, Copy)]
pub enum Wanted<'a> {
    /// What is not zero. RAM that is private and anonymous tells what has never been touched.
    All(Option<&'a Touched>),
    /// These pages, whatever is in them: a bit a page, of each region.
    Written(&'a [Vec<u64>]),
}

/// Writes RAM, or a part of it, as it is to an empty file; returns the bytes of pages that were not zero.
pub fn write(ram: &Ram, wanted: Wanted<'_>, file: &File) -> io::Result<u64> {
    let mut out = Writer::new(file.try_clone()?);
    let keeps_zeroes = matches!(wanted, Wanted::Written(_));
    let mut buffer = vec![0; BLOCK_BYTES];
    let mut ram_bytes = 0;
    for (number, region) in ram.iter().enumerate() {
        let size = usize::try_from(region.len()).expect("64-bit host");
        for (word, offset) in (0..size).step_by(BLOCK_BYTES).enumerate() {
            let part = &mut buffer[..(size - offset).min(BLOCK_BYTES)];
            let mask = match wanted {
                Wanted::All(Some(touched)) => {
                    match touched.any(region.as_ptr() as usize + offset, part.len()) {
                        true => !0,
                        false => 0,
                    }
                }
                Wanted::All(None) => !0,
                Wanted::Written(pages) => pages[number][word],
            };
            if mask == 0 {
                continue;
            }
            let start = GuestAddress(region.start_addr().0 + offset as u64);
            ram.read_slice(part, start).map_err(io::Error::other)?;
            let first = (ram_bytes + offset as u64) / PAGE_BYTES as u64;
            out.pages(part, first, |page, zero| {
                mask & 1 << page != 0 && (keeps_zeroes || !zero)
            })?;
        }
        ram_bytes += size as u64;
    }
    out.end(ram_bytes)
}

/// Writes what is in one file to another, which is empty, with its blocks compressed.
pub fn compress(from: &File, to: &File) -> io::Result<()> {
    let mut header = Header::new_zeroed();
    from.read_exact_at(header.as_mut_bytes(), 0)?;
    let from = Packed::open(from.try_clone()?, header.ram_bytes)?;
    let mut out = Writer::new(to.try_clone()?);
    let mut buffer = vec![0; BLOCK_BYTES];
    for block in &from.blocks {
        let content = &mut buffer[..index(block.pages) * PAGE_BYTES];
        from.unpack(block, content)?;
        let packed = match block.bytes {
            0 => Vec::new(),
            _ => compress_to_vec(&*content, CompressionLevel::Fastest),
        };
        let bytes = if packed.len() < content.len() {
            &packed
        } else {
            &*content
        };
        out.block(block.first_page, index(block.pages), bytes)?;
    }
    out.end(header.ram_bytes).map(drop)
}

/// A file that grows.
#[derive(Debug)]
pub(super) struct Writer {
    file: File,
    offset: u64,
    blocks: Vec<Block>,
    written: u64,
}

impl Writer {
    /// Of an empty file.
    pub(super) fn new(file: File) -> Self {
        Self {
            file,
            offset: size_of::<Header>() as u64,
            blocks: Vec::new(),
            written: 0,
        }
    }

    /// Those of up to 64 pages that are wanted, by their number among these and whether they are zero.
    pub(super) fn pages(
        &mut self,
        bytes: &[u8],
        first_page: u64,
        wanted: impl Fn(usize, bool) -> bool,
    ) -> io::Result<()> {
        let pages = bytes.chunks_exact(PAGE_BYTES).enumerate();
        let kind = |(page, bytes): (usize, &[u8])| {
            let zero = is_zero(bytes);
            wanted(page, zero).then_some(zero)
        };
        let kinds: Vec<Option<bool>> = pages.map(kind).collect();
        let mut page = 0;
        for run in kinds.chunk_by(|one, other| one == other) {
            let end = page + run.len();
            if let Some(zero) = run[0] {
                let content = &bytes[page * PAGE_BYTES..end * PAGE_BYTES];
                let content = if zero { &[][..] } else { content };
                self.block(first_page + page as u64, run.len(), content)?;
            }
            page = end;
        }
        Ok(())
    }

    fn block(&mut self, first_page: u64, pages: usize, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, self.offset)?;
        let small = |value| u32::try_from(value).expect("at most 64 pages");
        self.blocks.push(Block {
            first_page,
            offset: self.offset,
            pages: small(pages),
            bytes: small(bytes.len()),
        });
        self.offset += bytes.len() as u64;
        self.written += bytes.len() as u64;
        Ok(())
    }

    /// Bytes of pages so far.
    pub(super) fn written(&self) -> u64 {
        self.written
    }

    /// The index, then the header, without which the file is nothing.
    pub(super) fn end(mut self, ram_bytes: u64) -> io::Result<u64> {
        // They may have come in any order.
        self.blocks.sort_unstable_by_key(|block| block.first_page);
        self.file
            .write_all_at(self.blocks.as_bytes(), self.offset)?;
        let header = Header {
            magic: MAGIC,
            version: VERSION,
            block_count: u32::try_from(self.blocks.len()).map_err(io::Error::other)?,
            ram_bytes,
            index_offset: self.offset,
        };
        self.file.write_all_at(header.as_bytes(), 0)?;
        Ok(self.written)
    }
}

/// A file whose header and index make sense.
#[derive(Debug)]
pub struct Packed {
    file: File,
    blocks: Vec<Block>,
}

impl Packed {
    /// Reads the index of a file for a machine with so much RAM.
    pub fn open(file: File, ram_bytes: u64) -> io::Result<Self> {
        let mut header = Header::new_zeroed();
        file.read_exact_at(header.as_mut_bytes(), 0)?;
        let damaged = |text: String| Err(io::Error::other(format!("packed memory: {text}")));
        if header.magic != MAGIC {
            return damaged("its file is not whole, or none".to_owned());
        }
        if header.version != VERSION {
            return damaged(format!(
                "version {}, this program knows {VERSION}",
                header.version
            ));
        }
        if header.ram_bytes != ram_bytes {
            return damaged(format!(
                "of {} bytes, the machine has {ram_bytes}",
                header.ram_bytes
            ));
        }
        let size = file.metadata()?.len();
        let pages = ram_bytes / PAGE_BYTES as u64;
        let index_bytes = u64::from(header.block_count) * size_of::<Block>() as u64;
        let end = header.index_offset.checked_add(index_bytes);
        if u64::from(header.block_count) > pages || end.is_none_or(|end| end > size) {
            return damaged("its index is not whole".to_owned());
        }
        let count = index(header.block_count);
        let mut blocks = vec![Block::new_zeroed(); count];
        file.read_exact_at(blocks.as_mut_bytes(), header.index_offset)?;
        let mut next_page = 0;
        for block in &blocks {
            let end = block.first_page.checked_add(u64::from(block.pages));
            let place_end = block.offset.checked_add(u64::from(block.bytes));
            let fits = (1..=BLOCK_PAGES).contains(&index(block.pages))
                && block.first_page >= next_page
                && end.is_some_and(|end| end <= pages)
                && place_end.is_some_and(|end| end <= header.index_offset)
                && index(block.bytes) <= index(block.pages) * PAGE_BYTES;
            match end {
                Some(end) if fits => next_page = end,
                _ => return damaged(format!("block {block:?} makes no sense")),
            }
        }
        Ok(Self { file, blocks })
    }

    /// Puts its pages into RAM of the size for which it was opened.
    pub fn read(&self, ram: &Ram) -> io::Result<()> {
        let mut buffer = vec![0; BLOCK_BYTES];
        let mut regions = ram.iter();
        let (mut region, mut base) = (regions.next(), 0);
        for block in &self.blocks {
            let pages = &mut buffer[..index(block.pages) * PAGE_BYTES];
            self.unpack(block, pages)?;
            // A block is of one word of a bitmap, so of one region, unless somebody else has written the file.
            for (page, bytes) in (block.first_page..).zip(pages.chunks_exact(PAGE_BYTES)) {
                let at = page * PAGE_BYTES as u64;
                while let Some(here) = region.filter(|here| at >= base + here.len()) {
                    (region, base) = (regions.next(), base + here.len());
                }
                let here = region.ok_or_else(|| io::Error::other("a page behind RAM"))?;
                let address = GuestAddress(here.start_addr().0 + (at - base));
                ram.write_slice(bytes, address).map_err(io::Error::other)?;
            }
        }
        Ok(())
    }

    /// The first page at or after this one that is in the file.
    #[must_use]
    pub fn next(&self, from: u64) -> Option<u64> {
        let block = self.blocks.get(self.first_block_behind(from))?;
        Some(block.first_page.max(from))
    }

    /// Puts those of the pages from `first` on into `pages` that are in the file; the others stay.
    pub fn overlay(&self, first: u64, pages: &mut [u8]) -> io::Result<()> {
        let mut buffer = vec![0; BLOCK_BYTES];
        let end = first + (pages.len() / PAGE_BYTES) as u64;
        let blocks = &self.blocks[self.first_block_behind(first)..];
        for block in blocks.iter().take_while(|block| block.first_page < end) {
            let content = &mut buffer[..index(block.pages) * PAGE_BYTES];
            self.unpack(block, content)?;
            let (from, to) = (block.first_page.max(first), block.end().min(end));
            let offset =
                |page: u64, of: u64| usize::try_from(page - of).expect("64-bit host") * PAGE_BYTES;
            let content = &content[offset(from, block.first_page)..offset(to, block.first_page)];
            pages[offset(from, first)..offset(to, first)].copy_from_slice(content);
        }
        Ok(())
    }

    /// Number of the first block that ends behind this page.
    fn first_block_behind(&self, page: u64) -> usize {
        self.blocks.partition_point(|block| block.end() <= page)
    }

    /// The content of one block.
    fn unpack(&self, block: &Block, pages: &mut [u8]) -> io::Result<()> {
        let size = index(block.bytes);
        if size == 0 {
            pages.fill(0);
            return Ok(());
        }
        if size == pages.len() {
            return self.file.read_exact_at(pages, block.offset);
        }
        let mut packed = vec![0; size];
        self.file.read_exact_at(&mut packed, block.offset)?;
        let unpacked = StreamingDecoder::new(&packed[..]).map_err(|error| error.to_string());
        let unpacked = unpacked
            .and_then(|mut stream| stream.read_exact(pages).map_err(|error| error.to_string()));
        unpacked.map_err(|error| io::Error::other(format!("packed memory: {block:?}: {error}")))
    }
}

fn index(value: u32) -> usize {
    usize::try_from(value).expect("64-bit host")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::board::MICRO;
    use crate::memory::{Backing, allocate};

    const MIB: u64 = 4;

    fn ram() -> Ram {
        allocate(&MICRO, MIB, 40, Backing::Anonymous).unwrap()
    }

    fn bytes(ram: &Ram) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(MIB << 20).unwrap()];
        ram.read_slice(&mut bytes, GuestAddress(0)).unwrap();
        bytes
    }

    fn fill(ram: &Ram, page: u64, with: impl Fn(usize) -> u8) {
        let content: Vec<u8> = (0..PAGE_BYTES).map(with).collect();
        let at = GuestAddress(page * PAGE_BYTES as u64);
        ram.write_slice(&content, at).unwrap();
    }

    /// What no compression makes shorter.
    fn noise(index: usize) -> u8 {
        let mixed = (index as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        ((mixed ^ mixed >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 56).to_le_bytes()[0]
    }

    #[test]
    fn a_whole_and_its_children_come_back() {
        let ram = ram();
        for page in [0, 1, 63, 64, 200, 1023] {
            fill(&ram, page, |index| (index as u64 + page).to_le_bytes()[0]);
        }
        fill(&ram, 500, noise);
        let whole = tempfile::tempfile().unwrap();
        let touched = Touched::open();
        let written = write(&ram, Wanted::All(touched.as_ref()), &whole).unwrap();
        assert_eq!(written, 7 * 4096);
        let small = tempfile::tempfile().unwrap();
        compress(&whole, &small).unwrap();
        let sizes = [&whole, &small].map(|file| file.metadata().unwrap().len());
        assert!(sizes[0] > 7 * 4096 && sizes[1] < 3 * 4096, "{sizes:?}");
        let open = |file: &File| Packed::open(file.try_clone().unwrap(), MIB << 20).unwrap();
        let [copy, other] = [&small, &whole].map(|file| {
            let copy = self::ram();
            open(file).read(&copy).unwrap();
            assert!(bytes(&ram) == bytes(&copy));
            copy
        });

        // One is written, one becomes zero, one is only said to be written.
        fill(&ram, 65, |_| 7);
        fill(&ram, 200, |_| 0);
        let mut pages = vec![vec![0; 16]];
        (pages[0][1], pages[0][3]) = (0b11, 1 << 8);
        let child = tempfile::tempfile().unwrap();
        let written = write(&ram, Wanted::Written(&pages), &child).unwrap();
        assert_eq!(written, 2 * 4096);
        open(&child).read(&copy).unwrap();
        assert!(bytes(&ram) == bytes(&copy));
        let small = tempfile::tempfile().unwrap();
        compress(&child, &small).unwrap();
        open(&small).read(&other).unwrap();
        assert!(bytes(&ram) == bytes(&other));
    }

    /// One byte after the other is wrong: an error, or other content, but nothing else happens.
    #[test]
    fn a_damaged_file_is_an_error() {
        let ram = ram();
        fill(&ram, 3, |index| index.to_le_bytes()[0]);
        fill(&ram, 9, noise);
        let [whole, file] = [(); 2].map(|()| tempfile::tempfile().unwrap());
        write(&ram, Wanted::All(None), &whole).unwrap();
        compress(&whole, &file).unwrap();
        let size = file.metadata().unwrap().len();
        let open = || Packed::open(file.try_clone().unwrap(), MIB << 20);
        for at in 0..size {
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).unwrap();
            for wrong in [!byte[0], 0] {
                file.write_all_at(&[wrong], at).unwrap();
                if let Ok(packed) = open() {
                    let _ = packed.read(&self::ram());
                }
            }
            file.write_all_at(&byte, at).unwrap();
        }
        for length in [0, 8, 31, size - 1] {
            let cut = tempfile::tempfile().unwrap();
            let mut start = vec![0; usize::try_from(length).unwrap()];
            file.read_exact_at(&mut start, 0).unwrap();
            cut.write_all_at(&start, 0).unwrap();
            let opened = Packed::open(cut, MIB << 20);
            let read = opened.and_then(|packed| packed.read(&self::ram()));
            assert!(read.is_err(), "{length}");
        }
        let other = Packed::open(file.try_clone().unwrap(), 8 << 20).unwrap_err();
        assert_eq!(
            other.to_string(),
            "packed memory: of 4194304 bytes, the machine has 8388608"
        );
        open().unwrap();
    }
}

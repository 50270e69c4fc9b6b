// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The files of a snapshot's RAM, written in any order, while the guest runs (`memory::saving`).

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use atoll_devices::memory::PAGE_BYTES;

use super::{image, packed};
use crate::memory::saving::Sink;

/// A file as [`image::write`] writes it.
#[derive(Debug)]
pub struct ImageSink(File);

impl ImageSink {
    /// Of an empty file, for so much RAM.
    pub fn new(file: File, ram_bytes: u64) -> io::Result<Self> {
        file.set_len(0)?;
        file.set_len(ram_bytes)?;
        Ok(Self(file))
    }
}

impl Sink for ImageSink {
    /// All that is not zero: whether it is wanted, too, makes no difference where all of RAM is.
    fn put(&mut self, first: u64, _wanted: u64, pages: &[u8]) -> io::Result<u64> {
        let mut written = 0;
        for (offset, run) in image::runs(pages) {
            self.0
                .write_all_at(run, first * PAGE_BYTES as u64 + offset)?;
            written += run.len() as u64;
        }
        Ok(written)
    }

    fn end(self: Box<Self>) -> io::Result<()> {
        Ok(())
    }
}

/// A file as [`packed::write`] writes it.
#[derive(Debug)]
pub struct PackedSink {
    writer: packed::Writer,
    ram_bytes: u64,
    keeps_zeroes: bool,
}

impl PackedSink {
    /// Of an empty file, for so much RAM. Pages of zeroes are in it where they change what a parent has.
    pub fn new(file: File, ram_bytes: u64, has_parent: bool) -> Self {
        Self {
            writer: packed::Writer::new(file),
            ram_bytes,
            keeps_zeroes: has_parent,
        }
    }
}

impl Sink for PackedSink {
    fn put(&mut self, first: u64, wanted: u64, pages: &[u8]) -> io::Result<u64> {
        let before = self.writer.written();
        self.writer.pages(pages, first, |page, zero| {
            wanted & 1 << page != 0 && (self.keeps_zeroes || !zero)
        })?;
        Ok(self.writer.written() - before)
    }

    fn end(self: Box<Self>) -> io::Result<()> {
        self.writer.end(self.ram_bytes).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::board::MICRO;
    use crate::memory::{Backing, allocate};
    use atoll_devices::memory::Ram;
    use vm_memory::{Bytes, GuestAddress};

    const MIB: u64 = 1;
    const WORD_BYTES: usize = 64 * PAGE_BYTES;

    /// What each page has, in each of two snapshots: nothing in every third.
    fn content(number: usize, snapshot: usize) -> u8 {
        match (number + snapshot) % 3 {
            0 => 0,
            _ => u8::try_from(number % 200 + 1).unwrap(),
        }
    }

    /// Puts four words in another order than theirs.
    fn put(mut sink: Box<dyn Sink>, snapshot: usize, wanted: u64) -> u64 {
        let mut written = 0;
        for word in [2, 0, 3, 1] {
            let pages: Vec<u8> = (word * 64..(word + 1) * 64)
                .flat_map(|number| [content(number, snapshot); PAGE_BYTES])
                .collect();
            assert_eq!(pages.len(), WORD_BYTES);
            written += sink.put((word * 64) as u64, wanted, &pages).unwrap();
        }
        sink.end().unwrap();
        written
    }

    #[test]
    fn pages_may_come_in_any_order() {
        let [image_file, packed_file, child_file] = [(); 3].map(|()| tempfile::tempfile().unwrap());
        let clone = |file: &File| file.try_clone().unwrap();
        let sink = ImageSink::new(clone(&image_file), MIB << 20).unwrap();
        let written = put(Box::new(sink), 0, !0);
        assert_eq!(written, 170 * PAGE_BYTES as u64);
        let sink = PackedSink::new(clone(&packed_file), MIB << 20, false);
        assert_eq!(put(Box::new(sink), 0, !0), written);
        let even = 0x5555_5555_5555_5555;
        let sink = PackedSink::new(clone(&child_file), MIB << 20, true);
        put(Box::new(sink), 1, even);

        let ram = || allocate(&MICRO, MIB, 40, Backing::Anonymous).unwrap();
        let (one, two) = (ram(), ram());
        image::read(&one, &image_file).unwrap();
        let open = |file| packed::Packed::open(file, MIB << 20).unwrap();
        open(packed_file).read(&two).unwrap();
        let byte = |ram: &Ram, number: usize| -> u8 {
            let at = GuestAddress((number * PAGE_BYTES) as u64 + 99);
            ram.read_obj(at).unwrap()
        };
        for number in 0..256 {
            assert_eq!(byte(&one, number), content(number, 0));
            assert_eq!(byte(&two, number), content(number, 0));
        }
        open(child_file).read(&two).unwrap();
        for number in 0..256 {
            assert_eq!(byte(&two, number), content(number, (number + 1) % 2));
        }
    }
}

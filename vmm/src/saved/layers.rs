// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! RAM of a snapshot and of those that it needs, page by page: for memory that is read while the guest runs.
//!
//! ```text
//! snapshot "2"   packed    .  B  .  0  .     what was written since "1", also where it is zeroes now
//! snapshot "1"   packed    .  b  C  D  .
//! snapshot "0"   image     A  .  c  d  .     holes are zeroes
//! a page is its newest     A  B  C  0  0
//! ```
//! Not here: who asks for which page (`memory::filling`).

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use atoll_devices::memory::PAGE_BYTES;

use super::packed::Packed;
use super::{Layer, image};
use crate::memory::filling::Source;

/// The files of one snapshot's RAM, the one that has all of it first.
#[derive(Debug)]
pub struct Layers {
    files: Vec<Opened>,
    ram_bytes: u64,
}

#[derive(Debug)]
enum Opened {
    Image(File),
    Packed(Packed),
}

impl Layers {
    /// Looks at the files' sizes and indexes, for a machine with so much RAM; not yet at a page.
    pub fn open(layers: Vec<Layer>, ram_bytes: u64) -> io::Result<Self> {
        let open = |layer: Layer| match layer.packed {
            true => Packed::open(layer.file, ram_bytes).map(Opened::Packed),
            false => {
                image::check_size(&layer.file, ram_bytes)?;
                Ok(Opened::Image(layer.file))
            }
        };
        let files = layers.into_iter().map(open).collect::<io::Result<_>>()?;
        Ok(Self { files, ram_bytes })
    }
}

impl Source for Layers {
    fn next(&mut self, from: u64) -> io::Result<Option<u64>> {
        let mut first = None;
        for file in &self.files {
            let next = match file {
                Opened::Packed(packed) => packed.next(from),
                Opened::Image(file) => {
                    let data = image::data(file, from * PAGE_BYTES as u64)?;
                    // A file that was cut off meanwhile has no data there either, which would be taken for zeroes.
                    image::check_size(file, self.ram_bytes)?;
                    let start = data.map(|(start, _)| start / PAGE_BYTES as u64);
                    // A hole may end within a page that was asked for.
                    start.map(|page| page.max(from))
                }
            };
            first = [first, next].into_iter().flatten().min();
        }
        Ok(first.filter(|page| *page < self.ram_bytes / PAGE_BYTES as u64))
    }

    fn read(&mut self, first: u64, pages: &mut [u8]) -> io::Result<()> {
        pages.fill(0);
        for file in &self.files {
            let read = match file {
                Opened::Packed(packed) => packed.overlay(first, pages),
                Opened::Image(file) => file.read_exact_at(pages, first * PAGE_BYTES as u64),
            };
            read.map_err(|error| io::Error::other(format!("page {first} and behind: {error}")))?;
        }
        Ok(())
    }
}

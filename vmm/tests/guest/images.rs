// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! What is in the images of RAM that snapshots are made of, page by page.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use atoll_vmm::board::MICRO;
use atoll_vmm::memory::{Backing, allocate};
use atoll_vmm::saved::packed::Packed;
use atoll_vmm::saved::{self, image};
use rustix::fs::{SeekFrom, seek};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

/// Pages of an image of RAM that are in its file, by number.
pub fn pages(path: &Path) -> BTreeMap<u64, Vec<u8>> {
    pages_in(&File::open(path).unwrap())
}

fn pages_in(file: &File) -> BTreeMap<u64, Vec<u8>> {
    let mut pages = BTreeMap::new();
    let mut at = 0;
    while let Ok(start) = seek(file, SeekFrom::Data(at)) {
        let end = seek(file, SeekFrom::Hole(start)).unwrap();
        for page in start / 4096..end / 4096 {
            let mut bytes = vec![0; 4096];
            file.read_exact_at(&mut bytes, page * 4096).unwrap();
            pages.insert(page, bytes);
        }
        at = end;
    }
    pages
}

/// The pages of RAM with something in them, as a restore would have it.
pub fn restored_pages(snapshot: &Path, memory_mib: u64) -> BTreeMap<u64, Vec<u8>> {
    let (_, layers) = saved::open(snapshot).unwrap();
    // In a file, which tells what was written.
    let ram = allocate(&MICRO, memory_mib, 40, Backing::Shared).unwrap();
    for layer in layers {
        match layer.packed {
            true => Packed::open(layer.file, memory_mib << 20)
                .unwrap()
                .read(&ram),
            false => image::read(&ram, &layer.file),
        }
        .unwrap();
    }
    let file = ram.iter().next().unwrap().file_offset().unwrap().file();
    let mut pages = pages_in(file);
    pages.retain(|_, page| !image::is_zero(page));
    pages
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A file on its way into guest memory: read, into huge pages where they fit, or mapped (`shared`).
//!
//! A vmlinux of 53 MB is 13,000 pages of 4 KiB, and a fault for each costs three times what its bytes cost. Memory that
//! is about to be written whole grows by nothing when it is made of huge pages, unlike the rest of the guest's, which
//! is left as the host has it.

#![expect(unsafe_code, reason = "madvise(2) on guest RAM")]

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;

use atoll_devices::memory::PAGE_BYTES;
use vm_memory::bitmap::BitmapSlice;
use vm_memory::{ReadVolatile, VolatileMemoryError, VolatileSlice};

use super::shared;
use crate::memory::HUGE_PAGE_BYTES;

/// The file, read from its position on.
pub(super) struct Source<'a> {
    file: &'a File,
    /// Whole pages are mapped, not read, and added here.
    mapped: Option<&'a mut Vec<Range<usize>>>,
}

impl<'a> Source<'a> {
    /// From the file's start on.
    pub(super) fn of(mut file: &'a File) -> io::Result<Self> {
        file.rewind()?;
        Ok(Self { file, mapped: None })
    }

    /// The same, mapped where that is possible.
    pub(super) fn mapping(file: &'a File, mapped: &'a mut Vec<Range<usize>>) -> io::Result<Self> {
        let mapped = Some(mapped);
        Ok(Self {
            mapped,
            ..Self::of(file)?
        })
    }
}

impl Read for Source<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.file.read(buffer)
    }
}

impl Seek for Source<'_> {
    fn seek(&mut self, position: SeekFrom) -> io::Result<u64> {
        self.file.seek(position)
    }
}

impl ReadVolatile for Source<'_> {
    fn read_volatile<B: BitmapSlice>(
        &mut self,
        memory: &mut VolatileSlice<'_, B>,
    ) -> Result<usize, VolatileMemoryError> {
        let Some(mapped) = &mut self.mapped else {
            want_huge_pages(memory);
            return self.file.read_volatile(memory);
        };
        let failed = VolatileMemoryError::IOError;
        let offset = self.file.stream_position().map_err(failed)?;
        let start = memory.ptr_guard_mut().as_ptr().addr();
        let head = start.next_multiple_of(PAGE_BYTES) - start;
        let pages = memory.len().saturating_sub(head) / PAGE_BYTES * PAGE_BYTES;
        let file_head = offset.next_multiple_of(PAGE_BYTES as u64) - offset;
        if pages == 0 || file_head != head as u64 {
            return self.file.read_volatile(memory);
        }
        // All of it at once: who asks takes less for the file's end.
        self.file
            .read_exact_volatile(&mut memory.subslice(0, head)?)?;
        let part = memory.subslice(head, pages)?;
        let place = shared::map(&part, self.file, offset + head as u64).map_err(failed)?;
        mapped.push(place);
        part.bitmap().mark_dirty(0, pages);
        let behind = i64::try_from(pages).expect("less than guest memory");
        self.file.seek_relative(behind).map_err(failed)?;
        self.file
            .read_exact_volatile(&mut memory.offset(head + pages)?)?;
        Ok(memory.len())
    }
}

/// Asks for huge pages inside memory that is about to be written whole. Where there are none it stays as it is.
fn want_huge_pages<B: BitmapSlice>(memory: &VolatileSlice<'_, B>) {
    let guard = memory.ptr_guard_mut();
    let start = guard.as_ptr().addr();
    let first = start.next_multiple_of(HUGE_PAGE_BYTES);
    let end = (start + memory.len()) / HUGE_PAGE_BYTES * HUGE_PAGE_BYTES;
    if first < end {
        let pointer = guard.as_ptr().with_addr(first);
        // SAFETY: whole pages inside a slice of mapped guest RAM; their content stays.
        unsafe { libc::madvise(pointer.cast(), end - first, libc::MADV_HUGEPAGE) };
    }
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! What direct I/O (O_DIRECT) wants of memory and offsets, and a copy for requests whose memory does not fit.
//!
//! Offsets are the guest's part: it is told the block size, and a request that is not made of whole blocks is an
//! error, as with hardware of that block size. Memory is ours: a guest may use any address.
#![expect(
    unsafe_code,
    reason = "an allocation of a chosen alignment, handed to the kernel as a range"
)]

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::ptr::NonNull;

use rustix::fs::{AtFlags, StatxFlags, ioctl_blksszget, statx};

use crate::segments::Segments;

/// `STATX_DIOALIGN` of `include/uapi/linux/stat.h`, Linux 6.1.
const STATX_DIOALIGN: StatxFlags = StatxFlags::from_bits_retain(0x2000);
/// What every device and file system of today is content with.
const SAFE_BYTES: u32 = 4096;

/// Units of one open file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Alignment {
    /// Address and length of each range of memory, a power of two.
    pub(crate) memory_bytes: u32,
    /// Offset and total length, a power of two, at least 512.
    pub(crate) offset_bytes: u32,
}

impl Alignment {
    /// Through the page cache.
    pub(crate) const BUFFERED: Self = Self {
        memory_bytes: 1,
        offset_bytes: 512,
    };

    /// What a file opened with O_DIRECT asks for.
    pub(crate) fn direct(file: &File) -> io::Result<Self> {
        let told = statx(file, "", AtFlags::EMPTY_PATH, STATX_DIOALIGN)?;
        let named = told.stx_mask & STATX_DIOALIGN.bits() != 0 && told.stx_dio_offset_align != 0;
        let (memory, offset) = match ioctl_blksszget(file.as_fd()) {
            _ if named => (told.stx_dio_mem_align, told.stx_dio_offset_align),
            Ok(block_bytes) => (block_bytes, block_bytes),
            // A file on an older kernel, or on a file system that does not say (tmpfs).
            Err(_) => (SAFE_BYTES, Self::probe(file)),
        };
        Ok(Self {
            memory_bytes: memory.next_power_of_two(),
            offset_bytes: offset.next_power_of_two().max(512),
        })
    }

    /// Tries to read the second sector.
    fn probe(file: &File) -> u32 {
        let mut buffer = AlignedBuffer::new(512, SAFE_BYTES);
        match rustix::io::pread(file, buffer.bytes(), 512) {
            Err(rustix::io::Errno::INVAL) => SAFE_BYTES,
            _ => 512,
        }
    }

    /// Whether the kernel takes these ranges as they are.
    pub(crate) fn suits(self, segments: &Segments) -> bool {
        let mask = self.memory_bytes as usize - 1;
        segments
            .iovecs()
            .iter()
            .all(|range| (range.iov_base as usize | range.iov_len) & mask == 0)
    }
}

/// Zeroed memory of a chosen alignment.
pub(crate) struct AlignedBuffer {
    start: NonNull<u8>,
    layout: Layout,
}

// SAFETY: the buffer is owned memory without ties to a thread.
unsafe impl Send for AlignedBuffer {}

impl AlignedBuffer {
    /// `size_bytes` must not be 0; `alignment` is a power of two.
    pub(crate) fn new(size_bytes: usize, alignment: u32) -> Self {
        let layout = Layout::from_size_align(size_bytes, alignment as usize)
            .expect("a power of two, and a size that guest memory had room for");
        assert!(size_bytes > 0, "an empty buffer needs no copy");
        // SAFETY: the layout's size is not 0.
        let start = unsafe { alloc_zeroed(layout) };
        let Some(start) = NonNull::new(start) else {
            handle_alloc_error(layout)
        };
        Self { start, layout }
    }

    pub(crate) fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: `start` has `size` initialized bytes, and the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.layout.size()) }
    }

    /// The buffer as a list of ranges; it must outlive whatever the list is used for.
    pub(crate) fn segments(&self) -> Segments {
        self.first(self.layout.size())
    }

    /// The same of its first `length` bytes.
    pub(crate) fn first(&self, length: usize) -> Segments {
        assert!(length <= self.layout.size(), "a part of the buffer");
        let mut segments = Segments::new();
        // SAFETY: the caller keeps the buffer until the request has completed, and borrows `bytes` before or after.
        unsafe { segments.push(self.start.as_ptr(), length) };
        segments
    }
}

impl Drop for AlignedBuffer {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout, and not freed before.
        unsafe { dealloc(self.start.as_ptr(), self.layout) }
    }
}

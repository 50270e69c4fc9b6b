// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The file of an image as `imago` sees it: all of it, but for one bit of the header.
//!
//! imago refuses an image with compressed clusters of another kind than zlib's. Their bit ("compression type", bit 3 of
//! the incompatible features) is hidden from it when the header is read and put back when it is written; the clusters
//! themselves are `zstd`'s work.
#![expect(
    unsafe_code,
    reason = "imago's storage trait has unsafe methods, passed on here"
)]

use std::fmt;
use std::io;

use imago::file::File;
use imago::io_buffers::{IoBuffer, IoVector, IoVectorMut};
use imago::storage::PreallocateMode;
use imago::storage::drivers::CommonStorageHelper;
use imago::{Storage, StorageOpenOptions};

/// The byte of the header that holds the bit.
const FEATURES_BYTE: u64 = 79;
/// The bit in it.
pub(super) const COMPRESSION_TYPE: u8 = 1 << 3;

/// See the module.
#[derive(Debug)]
pub(super) struct ImageStorage {
    file: File,
    /// Whether the header has the bit.
    hides_bit: bool,
}

impl ImageStorage {
    pub(super) fn new(
        file: std::fs::File,
        options: StorageOpenOptions,
        hides_bit: bool,
    ) -> io::Result<Self> {
        let file = File::from_open_file(file, options)?;
        Ok(Self { file, hides_bit })
    }

    /// Where the byte is in a request that touches it.
    fn byte_within(&self, offset: u64, length: u64) -> Option<usize> {
        let at = FEATURES_BYTE.checked_sub(offset)?;
        (self.hides_bit && at < length).then(|| usize::try_from(at).expect("below 80"))
    }
}

impl fmt::Display for ImageStorage {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.file.fmt(formatter)
    }
}

impl Storage for ImageStorage {
    fn mem_align(&self) -> usize {
        self.file.mem_align()
    }

    fn req_align(&self) -> usize {
        self.file.req_align()
    }

    fn zero_align(&self) -> usize {
        self.file.zero_align()
    }

    fn discard_align(&self) -> usize {
        self.file.discard_align()
    }

    fn size(&self) -> io::Result<u64> {
        self.file.size()
    }

    unsafe fn pure_readv(&self, mut bufv: IoVectorMut<'_>, offset: u64) -> io::Result<()> {
        let Some(at) = self.byte_within(offset, bufv.len()) else {
            // SAFETY: the caller's promise about alignment, passed on; the file's is the same.
            return unsafe { self.file.pure_readv(bufv, offset) };
        };
        let length = usize::try_from(bufv.len()).map_err(io::Error::other)?;
        let mut copy = IoBuffer::new(length, self.mem_align())?;
        // SAFETY: offset and length are the caller's, the memory is aligned as the file wants it.
        unsafe { self.file.pure_readv((&mut copy).into(), offset) }?;
        let bytes = copy.as_mut().into_slice();
        bytes[at] &= !COMPRESSION_TYPE;
        bufv.copy_from_slice(bytes);
        Ok(())
    }

    unsafe fn pure_writev(&self, bufv: IoVector<'_>, offset: u64) -> io::Result<()> {
        let Some(at) = self.byte_within(offset, bufv.len()) else {
            // SAFETY: the caller's promise about alignment, passed on; the file's is the same.
            return unsafe { self.file.pure_writev(bufv, offset) };
        };
        let mut copy = bufv.try_into_owned(self.mem_align())?;
        copy.as_mut().into_slice()[at] |= COMPRESSION_TYPE;
        // SAFETY: offset and length are the caller's, the memory is aligned as the file wants it.
        unsafe { self.file.pure_writev((&copy).into(), offset) }
    }

    unsafe fn pure_write_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        // SAFETY: the caller's promise, passed on. Nobody zeroes a header.
        unsafe { self.file.pure_write_zeroes(offset, length) }
    }

    unsafe fn pure_write_allocated_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        // SAFETY: the caller's promise, passed on. Nobody zeroes a header.
        unsafe { self.file.pure_write_allocated_zeroes(offset, length) }
    }

    unsafe fn pure_discard(&self, offset: u64, length: u64) -> io::Result<()> {
        // SAFETY: the caller's promise, passed on. Nobody discards a header.
        unsafe { self.file.pure_discard(offset, length) }
    }

    fn flush(&self) -> io::Result<()> {
        self.file.flush()
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync()
    }

    fn settle_writes(&self) -> io::Result<()> {
        self.file.settle_writes()
    }

    unsafe fn invalidate_cache(&self) -> io::Result<()> {
        // SAFETY: the caller's promise, passed on.
        unsafe { self.file.invalidate_cache() }
    }

    fn get_storage_helper(&self) -> &CommonStorageHelper {
        self.file.get_storage_helper()
    }

    fn resize(&self, new_size: u64, mode: PreallocateMode) -> io::Result<()> {
        self.file.resize(new_size, mode)
    }
}

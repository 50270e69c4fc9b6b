// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The file of an image as `imago` sees it: all of it, but for two bits of the header; and what is seen of imago's
//! work from here.
//!
//! imago refuses an image with the mark of one that is in use ("dirty", bit 0 of the incompatible features) and one
//! with compressed clusters of another kind than zlib's ("compression type", bit 3). Both bits are hidden from it when
//! the header is read and put back when it is written; the mark is `image`'s work, the clusters are `zstd`'s.
//!
//! Where a crash of the host matters, the order of writes is kept here:
//!
//! - Before the header or a table that leads to data changes, what was written before is made durable: it is what they
//!   are to lead to.
//! - Once clusters were given back, such tables are made durable before anything else is written: it may be to these
//!   clusters.
#![expect(
    unsafe_code,
    reason = "imago's storage trait has unsafe methods, passed on here"
)]

use std::collections::HashSet;
use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use imago::file::File;
use imago::io_buffers::{IoBuffer, IoVector, IoVectorMut};
use imago::storage::PreallocateMode;
use imago::storage::drivers::CommonStorageHelper;
use imago::{Storage, StorageExt as _, StorageOpenOptions};
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

use super::header::{Header, L1Place};
use super::tables::{OFFSET_MASK, read_entries};

/// The byte of the header that holds the bits.
const FEATURES_BYTE: u64 = 79;
/// The bits in it.
pub(super) const DIRTY: u8 = 1;
pub(super) const COMPRESSION_TYPE: u8 = 1 << 3;
/// The part of a header that says where tables are.
const POINTERS: std::ops::Range<u64> = 0..64;

/// What all handles of one image share.
#[derive(Debug, Default)]
pub(super) struct Watch {
    cluster_bytes: u64,
    /// Of the bits, those that the header has.
    hidden: AtomicU8,
    /// The header has a place for them.
    has_mark: bool,
    /// Where the first-level table is, first and last byte.
    first_level: (AtomicU64, AtomicU64),
    /// Whether the order of writes matters to a crash of the host, and is not kept by the file itself.
    ordered: bool,
    /// Where second-level tables are, if it is. Leaf lock.
    second_level: RwLock<HashSet<u64>>,
    /// Such a table was written since the last sync; something else was.
    unsynced_table: AtomicBool,
    unsynced_other: AtomicBool,
    /// imago has given clusters back since this was taken.
    gave_back: AtomicBool,
}

impl Watch {
    pub(super) fn new(header: &Header, ordered: bool) -> Self {
        let mut hidden = 0;
        if header.dirty {
            hidden |= DIRTY;
        }
        if header.zstd {
            hidden |= COMPRESSION_TYPE;
        }
        let watch = Self {
            hidden: AtomicU8::new(hidden),
            cluster_bytes: header.cluster_bytes.into(),
            has_mark: header.has_mark(),
            ordered,
            ..Self::default()
        };
        watch.follow(header.l1);
        watch
    }

    fn follow(&self, table: L1Place) {
        let end = table.offset.saturating_add(u64::from(table.entries) * 8);
        self.first_level.0.store(table.offset, Ordering::Relaxed);
        self.first_level.1.store(end, Ordering::Relaxed);
    }

    /// Entries of the first-level table.
    fn learn(&self, entries: &[u64]) {
        let tables = self.second_level.write();
        let mut tables = tables.unwrap_or_else(PoisonError::into_inner);
        tables.extend(entries.iter().map(|entry| entry & OFFSET_MASK));
    }

    /// Whether a write is one of a second-level table that the image has.
    fn is_table(&self, offset: u64, length: u64) -> bool {
        length == self.cluster_bytes && {
            let tables = self.second_level.read();
            tables
                .unwrap_or_else(PoisonError::into_inner)
                .contains(&offset)
        }
    }

    /// Whether a write changes where tables are.
    fn points(&self, offset: u64, length: u64) -> bool {
        let first = self.first_level.0.load(Ordering::Relaxed);
        let end = self.first_level.1.load(Ordering::Relaxed);
        let last = offset.saturating_add(length);
        offset < POINTERS.end || (offset < end && last > first)
    }

    /// Whether clusters were given back that tables in the file may refer to still. They must be there before any
    /// cluster is used anew.
    pub(super) fn has_given_back(&self) -> bool {
        self.gave_back.load(Ordering::Acquire)
    }

    /// The tables in the file are as those in memory.
    pub(super) fn settled(&self) {
        self.gave_back.store(false, Ordering::Release);
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct ImageStorage {
    file: File,
    /// The same open file: imago's handle lets nobody read or write while it syncs.
    beside: std::fs::File,
    watch: Arc<Watch>,
    #[cfg(test)]
    journal: super::tests::journal::Journal,
}

impl ImageStorage {
    pub(super) fn new(
        file: std::fs::File,
        options: StorageOpenOptions,
        watch: Arc<Watch>,
    ) -> io::Result<Self> {
        Ok(Self {
            beside: file.try_clone()?,
            file: File::from_open_file(file, options)?,
            watch,
            #[cfg(test)]
            journal: super::tests::journal::Journal::current(),
        })
    }

    /// Sets or clears the mark of an image that is in use, if it can have one.
    pub(super) fn mark(&self, dirty: bool) -> io::Result<()> {
        if !self.watch.has_mark {
            return Ok(());
        }
        self.hide_dirty(dirty);
        // None of the bits is imago's to see; what is hidden is put into it below.
        let seen = [0_u8];
        self.write(&seen[..], FEATURES_BYTE)
    }

    /// The next write to the header sets or clears the mark.
    pub(super) fn hide_dirty(&self, dirty: bool) {
        let bits = &self.watch.hidden;
        match dirty {
            true => bits.fetch_or(DIRTY, Ordering::Relaxed),
            false => bits.fetch_and(!DIRTY, Ordering::Relaxed),
        };
    }

    /// Makes durable what was written, where the order matters.
    pub(super) fn barrier(&self) -> io::Result<()> {
        match self.watch.ordered {
            true => self.sync(),
            false => Ok(()),
        }
    }

    /// The place of the features' byte in a request that touches it.
    fn byte_within(offset: u64, length: u64) -> Option<usize> {
        let at = FEATURES_BYTE.checked_sub(offset)?;
        (at < length).then(|| usize::try_from(at).expect("below 80"))
    }

    /// Whether a range of the file has no data: it reads as zeroes.
    pub(super) fn is_hole(&self, offset: u64, length: u64) -> bool {
        match seek(&self.beside, SeekFrom::Data(offset)) {
            Ok(data) => data >= offset.saturating_add(length),
            // None behind it. What cannot tell has data.
            Err(error) => error == Errno::NXIO,
        }
    }

    /// Learns where tables are, of an image that was opened and not used yet.
    pub(super) fn learn(&self, header: &Header) -> io::Result<()> {
        if self.watch.ordered {
            let mut entries = vec![0; usize::try_from(header.l1.entries).expect("64-bit host")];
            read_entries(self, header.l1.offset, &mut entries)?;
            self.watch.learn(&entries);
        }
        Ok(())
    }

    /// Keeps the order of writes: see the module.
    fn before_write(&self, leads: bool) -> io::Result<()> {
        let watch = &self.watch;
        if !watch.ordered {
            return Ok(());
        }
        let due = match leads {
            true => watch.unsynced_other.load(Ordering::Acquire),
            false => watch.unsynced_table.load(Ordering::Acquire) && watch.has_given_back(),
        };
        if due {
            self.sync()?;
        }
        Ok(())
    }

    fn after_write(&self, leads: bool) {
        let unsynced = match leads {
            true => &self.watch.unsynced_table,
            false => &self.watch.unsynced_other,
        };
        unsynced.store(true, Ordering::Release);
    }

    /// A write to the header or the first-level table.
    fn write_pointers(&self, bufv: IoVector<'_>, offset: u64) -> io::Result<()> {
        let length = bufv.len();
        let mut copy = bufv.try_into_owned(self.mem_align())?;
        let bytes = copy.as_mut().into_slice();
        if let Some(at) = Self::byte_within(offset, length) {
            bytes[at] |= self.watch.hidden.load(Ordering::Relaxed);
        }
        if offset == 0 {
            L1Place::in_header(bytes)
                .into_iter()
                .for_each(|table| self.watch.follow(table));
        } else {
            let entries = bytes.as_chunks::<8>().0.iter();
            let entries: Vec<_> = entries.map(|entry| u64::from_be_bytes(*entry)).collect();
            self.watch.learn(&entries);
        }
        #[cfg(test)]
        self.journal.write(&(&copy).into(), offset);
        // SAFETY: offset and length are the caller's, the memory is aligned as the file wants it.
        unsafe { self.file.pure_writev((&copy).into(), offset) }
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
        let hidden = self.watch.hidden.load(Ordering::Relaxed);
        let place = Self::byte_within(offset, bufv.len()).filter(|_| hidden != 0);
        let Some(at) = place else {
            // SAFETY: the caller's promise about alignment, passed on; the file's is the same.
            return unsafe { self.file.pure_readv(bufv, offset) };
        };
        let length = usize::try_from(bufv.len()).map_err(io::Error::other)?;
        let mut copy = IoBuffer::new(length, self.mem_align())?;
        // SAFETY: offset and length are the caller's, the memory is aligned as the file wants it.
        unsafe { self.file.pure_readv((&mut copy).into(), offset) }?;
        let bytes = copy.as_mut().into_slice();
        bytes[at] &= !hidden;
        bufv.copy_from_slice(bytes);
        Ok(())
    }

    unsafe fn pure_writev(&self, bufv: IoVector<'_>, offset: u64) -> io::Result<()> {
        let length = bufv.len();
        let points =
            self.watch.points(offset, length) || Self::byte_within(offset, length).is_some();
        let leads = points || self.watch.is_table(offset, length);
        self.before_write(leads)?;
        if points {
            self.write_pointers(bufv, offset)?;
        } else {
            #[cfg(test)]
            self.journal.write(&bufv, offset);
            // SAFETY: the caller's promise about alignment, passed on; the file's is the same.
            unsafe { self.file.pure_writev(bufv, offset) }?;
        }
        self.after_write(leads);
        Ok(())
    }

    unsafe fn pure_write_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        self.before_write(false)?;
        #[cfg(test)]
        self.journal.zeroes(offset, length);
        // SAFETY: the caller's promise, passed on. Nobody zeroes a table.
        unsafe { self.file.pure_write_zeroes(offset, length) }?;
        self.after_write(false);
        Ok(())
    }

    unsafe fn pure_write_allocated_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        self.before_write(false)?;
        #[cfg(test)]
        self.journal.zeroes(offset, length);
        // SAFETY: the caller's promise, passed on. Nobody zeroes a table.
        unsafe { self.file.pure_write_allocated_zeroes(offset, length) }?;
        self.after_write(false);
        Ok(())
    }

    unsafe fn pure_discard(&self, offset: u64, length: u64) -> io::Result<()> {
        self.before_write(false)?;
        #[cfg(test)]
        self.journal.zeroes(offset, length);
        // SAFETY: the caller's promise, passed on. Nobody discards a table.
        unsafe { self.file.pure_discard(offset, length) }?;
        self.after_write(false);
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        self.file.flush()
    }

    fn sync(&self) -> io::Result<()> {
        #[cfg(test)]
        self.journal.sync();
        // What is written from here on may be durable or not.
        self.watch.unsynced_table.store(false, Ordering::Release);
        self.watch.unsynced_other.store(false, Ordering::Release);
        self.beside.sync_data()
    }

    /// imago calls it before it gives clusters back, and for nothing else. Its writes in the form without futures are
    /// done when they return.
    fn settle_writes(&self) -> io::Result<()> {
        self.watch.gave_back.store(true, Ordering::Release);
        Ok(())
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

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! zstd-compressed clusters over `imago`, which knows only zlib's: they are found, read and unpacked here, and turned
//! into ordinary clusters before a part of one is written. Nothing is ever compressed.
//!
//! Where a compressed cluster lies is read from the image's own tables, each as it was before the first write to what
//! it maps: an entry stays what it was for as long as imago calls the cluster compressed, since nothing becomes
//! compressed. The caller lets nobody else in while it writes, zeroes or discards ([`ZstdImage`] has no lock of its own
//! for that), so that no cluster is given away while it is read.
#![expect(
    unsafe_code,
    reason = "imago's driver trait has unsafe methods, passed on here"
)]

use std::collections::HashMap;
use std::fmt;
use std::io::{self, Read as _};
use std::sync::{Arc, Mutex, PoisonError};

use imago::format::drivers::FormatDriverInstance;
use imago::format::{Format, PreallocateMode};
use imago::io_buffers::IoVectorMut;
use imago::qcow2::Qcow2;
use imago::{PreparedDataMapping, ShallowMapping, StorageExt as _};

use super::header::Header;
use super::storage::ImageStorage;
use super::tables::{COMPRESSED, OFFSET_MASK, compressed_place, read_entries};

/// A second-level table as the image had it; none when nothing in it is compressed.
type Table = Option<Arc<[u64]>>;

/// An image with the bit for zstd.
#[derive(Debug)]
pub(super) struct ZstdImage {
    inner: Qcow2<ImageStorage>,
    /// The same file, for reading what imago does not understand.
    file: ImageStorage,
    cluster_bits: u32,
    /// The first-level table as it was when the image was opened.
    first_level: Vec<u64>,
    /// Tables that were looked at: at most as large as those of the image. Leaf lock, held while one is read.
    tables: Mutex<HashMap<usize, Table>>,
}

impl ZstdImage {
    /// Over an image that was opened and not used yet; `file` is the same file again.
    pub(super) fn new(
        inner: Qcow2<ImageStorage>,
        file: ImageStorage,
        header: &Header,
    ) -> io::Result<Self> {
        let entries = usize::try_from(header.l1.entries).expect("64-bit host");
        let mut first_level = vec![0; entries];
        read_entries(&file, header.l1.offset, &mut first_level)?;
        Ok(Self {
            inner,
            file,
            cluster_bits: header.cluster_bytes.trailing_zeros(),
            first_level,
            tables: Mutex::default(),
        })
    }

    fn cluster_bytes(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// The table that maps `offset`, and the entry's place in it.
    fn table(&self, offset: u64) -> io::Result<(Table, usize)> {
        let cluster = usize::try_from(offset >> self.cluster_bits).map_err(io::Error::other)?;
        let entries = 1 << (self.cluster_bits - 3);
        let (number, place) = (cluster / entries, cluster % entries);
        let mut tables = self.tables.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(table) = tables.get(&number) {
            return Ok((table.clone(), place));
        }
        // A disk that has grown has more tables than it had, and nothing compressed in them.
        let at = self.first_level.get(number).copied().unwrap_or(0) & OFFSET_MASK;
        let mut table = None;
        if at != 0 {
            let mut all = vec![0; entries];
            read_entries(&self.file, at, &mut all)?;
            let compressed = all.iter().any(|entry| entry & COMPRESSED != 0);
            table = compressed.then(|| Arc::from(all));
        }
        tables.insert(number, table.clone());
        Ok((table, place))
    }

    /// Looks at all tables that map a range, before it changes.
    fn look(&self, offset: u64, length: u64) -> io::Result<()> {
        let mapped = self.cluster_bytes() << (self.cluster_bits - 3);
        let first = offset / mapped * mapped;
        let end = offset.saturating_add(length);
        let mut at = first;
        while at < end {
            self.table(at)?;
            at = at.saturating_add(mapped);
        }
        Ok(())
    }

    /// What a cluster that imago calls compressed holds.
    fn unpack(&self, offset: u64) -> io::Result<Vec<u8>> {
        let (table, place) = self.table(offset)?;
        let entry = table.map_or(0, |table| table[place]);
        if entry & COMPRESSED == 0 {
            return Err(io::Error::other("a compressed cluster that no table has"));
        }
        let place = compressed_place(entry, self.cluster_bits);
        let length = usize::try_from(place.end - place.start).map_err(io::Error::other)?;
        let mut packed = vec![0; length];
        self.file.read(&mut packed, place.start)?;
        let mut cluster = vec![0; usize::try_from(self.cluster_bytes()).map_err(io::Error::other)?];
        let damaged = |error: String| io::Error::other(format!("zstd-compressed cluster: {error}"));
        ruzstd::decoding::StreamingDecoder::new(&packed[..])
            .map_err(|error| damaged(error.to_string()))?
            .read_exact(&mut cluster)
            .map_err(|error| damaged(error.to_string()))?;
        Ok(cluster)
    }

    fn is_compressed(&self, offset: u64) -> io::Result<bool> {
        let (mapping, _) = self.inner.get_mapping(offset, 1)?;
        Ok(matches!(mapping, ShallowMapping::Special { .. }))
    }

    /// Makes ordinary clusters of those compressed ones that a write to the range leaves a part of.
    fn unpack_edges(&self, offset: u64, length: u64, overwrite: bool) -> io::Result<()> {
        self.look(offset, length)?;
        let bytes = self.cluster_bytes();
        let end = offset.saturating_add(length);
        let mut cluster = offset / bytes * bytes;
        while cluster < end {
            let whole = overwrite && cluster >= offset && cluster + bytes <= end;
            if !whole && self.is_compressed(cluster)? {
                self.rewrite(cluster)?;
            }
            // Between the edges everything is overwritten.
            let last = (end - 1) / bytes * bytes;
            cluster = match overwrite && cluster < last {
                true => last,
                false => cluster + bytes,
            };
        }
        Ok(())
    }

    fn rewrite(&self, cluster: u64) -> io::Result<()> {
        let data = self.unpack(cluster)?;
        let length = self
            .cluster_bytes()
            .min(self.inner.size().saturating_sub(cluster));
        if length < self.cluster_bytes() {
            // imago would read the rest of a cluster at the disk's end to keep it: there must be nothing to keep.
            self.inner.ensure_zero_mapping(cluster, length)?;
        }
        let mapping = self.inner.prepare_data_mapping(cluster, length, true)?;
        if mapping.length() < length {
            return Err(io::Error::other("a cluster in two places"));
        }
        let (storage, at) = (mapping.storage(), mapping.offset());
        let count = usize::try_from(length).map_err(io::Error::other)?;
        storage.write(&data[..count], at)?;
        self.inner.commit_data_mapping(mapping)
    }
}

impl fmt::Display for ZstdImage {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.inner.fmt(formatter)
    }
}

impl FormatDriverInstance for ZstdImage {
    type Storage = ImageStorage;

    fn format(&self) -> Format {
        self.inner.format()
    }

    unsafe fn probe(_storage: &ImageStorage) -> io::Result<bool> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn zero_granularity(&self) -> Option<u64> {
        self.inner.zero_granularity()
    }

    fn collect_storage_dependencies(&self) -> Vec<&ImageStorage> {
        self.inner.collect_storage_dependencies()
    }

    fn writable(&self) -> bool {
        self.inner.writable()
    }

    fn get_mapping<'a>(
        &'a self,
        offset: u64,
        max_length: u64,
    ) -> io::Result<(ShallowMapping<'a, ImageStorage>, u64)> {
        self.inner.get_mapping(offset, max_length)
    }

    fn prepare_data_mapping<'a>(
        &'a self,
        offset: u64,
        length: u64,
        overwrite: bool,
    ) -> io::Result<PreparedDataMapping<'a, ImageStorage>> {
        self.unpack_edges(offset, length, overwrite)?;
        self.inner.prepare_data_mapping(offset, length, overwrite)
    }

    fn commit_data_mapping(
        &self,
        mapping: PreparedDataMapping<'_, ImageStorage>,
    ) -> io::Result<()> {
        self.inner.commit_data_mapping(mapping)
    }

    fn ensure_zero_mapping(&self, offset: u64, length: u64) -> io::Result<(u64, u64)> {
        self.look(offset, length)?;
        self.inner.ensure_zero_mapping(offset, length)
    }

    unsafe fn discard_to_zero_unsafe(&self, offset: u64, length: u64) -> io::Result<(u64, u64)> {
        self.look(offset, length)?;
        // SAFETY: the caller's promise, passed on.
        unsafe { self.inner.discard_to_zero_unsafe(offset, length) }
    }

    unsafe fn discard_to_any_unsafe(&self, offset: u64, length: u64) -> io::Result<(u64, u64)> {
        self.look(offset, length)?;
        // SAFETY: the caller's promise, passed on.
        unsafe { self.inner.discard_to_any_unsafe(offset, length) }
    }

    unsafe fn discard_to_backing_unsafe(&self, offset: u64, length: u64) -> io::Result<(u64, u64)> {
        self.look(offset, length)?;
        // SAFETY: the caller's promise, passed on.
        unsafe { self.inner.discard_to_backing_unsafe(offset, length) }
    }

    fn readv_special(&self, bufv: IoVectorMut<'_>, offset: u64) -> io::Result<()> {
        match self.try_readv_special(bufv, offset)? {
            None => Ok(()),
            Some(_) => Err(io::Error::other("the range is not compressed any more")),
        }
    }

    fn try_readv_special<'a>(
        &self,
        mut bufv: IoVectorMut<'a>,
        mut offset: u64,
    ) -> io::Result<Option<(IoVectorMut<'a>, u64)>> {
        while !bufv.is_empty() {
            if !self.is_compressed(offset)? {
                return Ok(Some((bufv, offset)));
            }
            let cluster = self.unpack(offset)?;
            let from = usize::try_from(offset % self.cluster_bytes()).map_err(io::Error::other)?;
            let part = &cluster[from..];
            let count = bufv.len().min(part.len() as u64);
            let (mut chunk, rest) = bufv.split_at(count);
            chunk.copy_from_slice(&part[..usize::try_from(count).map_err(io::Error::other)?]);
            bufv = rest;
            offset += count;
        }
        Ok(None)
    }

    fn flush(&self) -> io::Result<()> {
        self.inner.flush()
    }

    fn sync(&self) -> io::Result<()> {
        self.inner.sync()
    }

    unsafe fn invalidate_cache(&self) -> io::Result<()> {
        // SAFETY: the caller's promise, passed on.
        unsafe { self.inner.invalidate_cache() }
    }

    fn resize_grow(&self, new_size: u64, prealloc_mode: PreallocateMode) -> io::Result<()> {
        self.inner.resize_grow(new_size, prealloc_mode)
    }

    fn resize_shrink(&mut self, new_size: u64) -> io::Result<()> {
        self.inner.resize_shrink(new_size)
    }
}

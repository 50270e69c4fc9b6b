// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! An image that is open, and what is found in its file when this process ends at any moment.
//!
//! imago keeps changed tables in memory, writes counts of references late, and a new second-level table at once. Three
//! rules make that safe; `storage` sees what they need to know:
//!
//! 1. *The mark.* Before the first change the header is marked ("dirty"): counts are not to be relied on. It goes when
//!    everything is written: when the last queue is closed, and when the image is. Who opens a marked image for writing
//!    makes the counts anew (`repair`, or QEMU's own tools).
//! 2. *Nothing is used anew too early.* A cluster that was given back may be needed still by the tables in the file.
//!    What gives clusters back is alone; before the next cluster is taken, all tables are written.
//! 3. *Pointers last.* Before a table that leads to data changes, that data is durable (`storage`).
//!
//! So at every moment the tables in the file lead to what was written before the last flush, or to what was written
//! after it, and never to anything else.
#![expect(
    unsafe_code,
    reason = "ranges of guest memory are handed to imago as volatile slices"
)]

use std::io;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use imago::format::PreallocateMode;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::{Mapping, ShallowMapping, Storage as _, StorageExt as _};
use vm_memory::VolatileSlice;

use super::Image;
use super::storage::{ImageStorage, Watch};
use crate::backend::{Operation, Request, Space};
use crate::open::Cache;
use crate::segments::Segments;

/// Most that the image is asked for at a time: it copies what direct I/O does not take as it is, and a guest may ask for
/// the same memory many times in one request.
const PIECE_BYTES_MAX: usize = 4 << 20;

/// What of an image its requests depend on.
#[derive(Debug, Clone, Copy)]
pub(super) struct Nature {
    pub(super) cache: Cache,
    /// Zeroes need no data.
    pub(super) write_zeroes: bool,
    /// Everything that changes the image is alone, since its zstd-compressed clusters are read past imago's locks.
    pub(super) changes_alone: bool,
    pub(super) cluster_bytes: u64,
}

/// See the module.
pub(super) struct OpenImage {
    /// Shared by everything that reads and writes; alone for what may give clusters back, also since imago forbids
    /// others to hold a mapping then. First in the lock order; imago's own locks follow.
    tables: RwLock<Tables>,
    /// Another handle of its file.
    storage: ImageStorage,
    watch: Arc<Watch>,
    nature: Nature,
}

struct Tables {
    image: Image,
    /// The header has the mark.
    marked: bool,
}

/// What a write does beside writing, from the least to the most.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Effect {
    InPlace,
    Allocates,
    /// It may: imago does not say whether zeroes have a cluster.
    GivesBack,
}

impl OpenImage {
    pub(super) fn new(
        image: Image,
        storage: ImageStorage,
        watch: Arc<Watch>,
        nature: Nature,
    ) -> Self {
        let tables = Tables {
            image,
            marked: false,
        };
        Self {
            tables: RwLock::new(tables),
            storage,
            watch,
            nature,
        }
    }

    /// Carries out one request that fits the disk.
    pub(super) fn transfer(&self, request: &Request) -> io::Result<()> {
        let at = request.offset_bytes;
        match request.operation {
            Operation::Read => {
                for (at, piece) in request.segments.pieces(at, PIECE_BYTES_MAX) {
                    let slices = slices(&piece);
                    let (vector, _guard) = IoVectorMut::from_volatile_slice(&slices);
                    self.shared().image.readv(vector, at)?;
                }
                return Ok(());
            }
            Operation::Flush => return self.flush(&self.shared().image),
            Operation::Write => {
                for (at, piece) in request.segments.pieces(at, PIECE_BYTES_MAX) {
                    self.write(&piece, at)?;
                }
            }
            // Advice: what the format cannot is left.
            Operation::Discard { length_bytes } => {
                let _ = self.change_alone(at, length_bytes, |image, at, length| {
                    self.empty(image, at, length);
                    image.discard_to_any(at, length)
                });
            }
            Operation::WriteZeroes { .. } if !self.nature.write_zeroes => {
                return Err(io::ErrorKind::Unsupported.into());
            }
            // Alone also where nothing is freed: imago 0.2.6 looks whether the rest of a cluster is zero before it
            // makes the whole cluster zero, and forgets what another queue wrote to the rest in between.
            Operation::WriteZeroes {
                length_bytes,
                space,
            } => self.change_alone(at, length_bytes, |image, at, length| match space {
                Space::Free => {
                    self.empty(image, at, length);
                    image.discard_to_zero(at, length)
                }
                Space::Keep => image.write_zeroes(at, length),
            })?,
        }
        match self.nature.cache.is_synchronous() {
            true => self.flush(&self.shared().image),
            false => Ok(()),
        }
    }

    /// Grows the disk.
    pub(super) fn resize(&self, size_bytes: u64) -> io::Result<()> {
        let mut tables = self.alone()?;
        self.settle(&tables.image)?;
        tables
            .image
            .resize_grow(size_bytes, PreallocateMode::None)?;
        self.close(&mut tables)
    }

    /// Writes everything and takes the mark away, for now: another process may open the image when this has returned.
    pub(super) fn rest(&self) -> io::Result<()> {
        let tables = self.tables.write();
        self.close(&mut tables.unwrap_or_else(PoisonError::into_inner))
    }

    fn close(&self, tables: &mut Tables) -> io::Result<()> {
        if !tables.marked {
            return Ok(());
        }
        self.flush(&tables.image)?;
        self.storage
            .mark(false)
            .inspect_err(|_| self.storage.hide_dirty(true))?;
        tables.marked = false;
        self.storage.barrier()
    }

    fn write(&self, segments: &Segments, at: u64) -> io::Result<()> {
        let slices = slices(segments);
        let (mut vector, _guard) = IoVector::from_volatile_slice(&slices);
        let length = vector.len();
        if let Some(tables) = self.to_write(at, length)? {
            return tables.image.writev(vector, at);
        }
        self.change_alone(at, length, |image, at, length| {
            let (part, rest) = std::mem::take(&mut vector).split_at(length);
            vector = rest;
            image.writev(part, at)
        })
    }

    /// The tables, shared, for a write that gives nothing back.
    fn to_write(&self, at: u64, length: u64) -> io::Result<Option<RwLockReadGuard<'_, Tables>>> {
        if self.nature.changes_alone {
            return Ok(None);
        }
        loop {
            let tables = self.to_change()?;
            match effect(&tables.image, at, length)? {
                Effect::GivesBack => return Ok(None),
                Effect::Allocates if self.watch.has_given_back() => drop(tables),
                Effect::Allocates | Effect::InPlace => return Ok(Some(tables)),
            }
            self.settle(&self.alone()?.image)?;
        }
    }

    /// Changes a range, one second-level table after the other: a new one must not take what the last one gave back.
    fn change_alone(
        &self,
        mut at: u64,
        length: u64,
        mut change: impl FnMut(&mut Image, u64, u64) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut tables = self.alone()?;
        let end = at.saturating_add(length);
        while at < end {
            self.settle(&tables.image)?;
            // A second-level table is one cluster of 8-byte entries.
            let cluster = self.nature.cluster_bytes;
            let mapped = cluster * (cluster / 8);
            let next = (at / mapped + 1).saturating_mul(mapped).min(end);
            change(&mut tables.image, at, next - at)?;
            at = next;
        }
        Ok(())
    }

    /// Gives the file's space back under whole clusters that are about to be freed: imago only marks them free, for
    /// data that comes later. Before they are, since then they may be anybody's; a crash in between leaves zeroes, which
    /// is what was asked for, or as good as anything. The caller is alone, so nobody writes there.
    fn empty(&self, image: &Image, offset_bytes: u64, length_bytes: u64) {
        let mut at = offset_bytes.next_multiple_of(self.nature.cluster_bytes);
        let end = offset_bytes + length_bytes;
        let end = end - end % self.nature.cluster_bytes;
        while at < end {
            let Ok((mapping, length)) = image.get_mapping(at, end - at) else {
                return;
            };
            // What may be written in place is this image's, and nobody else refers to it.
            if let Mapping::Raw {
                storage,
                offset,
                writable: true,
                ..
            } = mapping
            {
                // A file system that cannot do this keeps the space.
                let _ = storage.discard(offset, length);
            }
            if length == 0 {
                return;
            }
            at += length;
        }
    }

    /// What was given back may be taken from here on.
    fn settle(&self, image: &Image) -> io::Result<()> {
        match self.watch.has_given_back() {
            true => self.flush(image),
            false => Ok(()),
        }
    }

    fn flush(&self, image: &Image) -> io::Result<()> {
        image.flush()?;
        if self.nature.cache != Cache::Unsafe {
            self.storage.sync()?;
        }
        // Nobody gives anything back beside us: that takes all of the lock.
        self.watch.settled();
        Ok(())
    }

    // A poisoned lock: a thread panicked, which ends the process; nothing is half-changed here.
    fn shared(&self) -> RwLockReadGuard<'_, Tables> {
        self.tables.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Shared, and marked for as long as this is held.
    fn to_change(&self) -> io::Result<RwLockReadGuard<'_, Tables>> {
        loop {
            let tables = self.shared();
            if tables.marked {
                return Ok(tables);
            }
            drop(tables);
            drop(self.alone()?);
        }
    }

    /// Alone, and marked for as long as this is held.
    fn alone(&self) -> io::Result<RwLockWriteGuard<'_, Tables>> {
        let tables = self.tables.write();
        let mut tables = tables.unwrap_or_else(PoisonError::into_inner);
        if !tables.marked {
            self.storage.mark(true)?;
            self.storage.barrier()?;
            tables.marked = true;
        }
        Ok(tables)
    }
}

impl Drop for OpenImage {
    fn drop(&mut self) {
        // A mark that stays is seen to by the next one who opens the image.
        let _ = self.rest();
    }
}

/// What a write to a range does, by what is there.
fn effect(image: &Image, mut at: u64, length: u64) -> io::Result<Effect> {
    let end = at.saturating_add(length);
    let mut effect = Effect::InPlace;
    while at < end {
        let (mapping, length) = image.get_shallow_mapping(at, end - at)?;
        let here = match mapping {
            ShallowMapping::Raw { writable: true, .. } => Effect::InPlace,
            ShallowMapping::Zero {
                explicit: false, ..
            }
            | ShallowMapping::Indirect { .. } => Effect::Allocates,
            _ => Effect::GivesBack,
        };
        effect = effect.max(here);
        at += length.max(1);
    }
    Ok(effect)
}

fn slices(segments: &Segments) -> Vec<VolatileSlice<'_>> {
    let slice = |range: &libc::iovec| {
        // SAFETY: `Segments::push` promised that these bytes stay mapped and writable until the request completes,
        // and that they are only accessed by volatile copies or by the kernel.
        unsafe { VolatileSlice::new(range.iov_base.cast(), range.iov_len) }
    };
    segments.iovecs().iter().map(slice).collect()
}

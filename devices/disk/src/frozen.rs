// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A disk as it was at one moment, readable while the guest goes on writing: copy before write.
//!
//! ```text
//! guest writes block 7 ─► Freezable: is 7 saved? no: disk ──read──► fleece, then mark 7 saved; the write goes on
//! reader wants block 7 ─► FrozenReader: is 7 saved? yes: from the fleece
//!                                                   no:  from the disk; then asks again: a write may have come between
//! ```
//!
//! The fleece is a sparse file with the saved blocks at the disk's own offsets. Only the first write to a block waits
//! for its copy. **The guest goes first**: when the fleece cannot be written (no space), the frozen disk is broken and
//! says so to its readers, and the guest's write goes on.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};

use crate::backend::{BlockBackend, BlockQueue, Full, Request};
use crate::blocking::BlockingDisk;
use crate::changes::ChangeMap;
use crate::layer::{Layer, QueueLayer};

/// Unit of copying, bytes: a larger one makes the first small write to a block wait longer, a smaller one makes more
/// copies.
const BLOCK_BYTES: u32 = 64 << 10;
/// Most that one read takes from the disk or the fleece.
const READ_BYTES_MAX: usize = 1 << 20;

/// What [`Freezable`] and its queues share: the frozen disk, while there is one. A leaf lock, read by each request.
type Slot = RwLock<Option<Arc<Frozen>>>;

/// A disk that can be frozen: [`Freezable::freeze`] keeps a moment's content for readers, while the guest goes on writing.
pub struct Freezable {
    inner: Arc<dyn BlockBackend>,
    frozen: Arc<Slot>,
}

/// The disk as it was. Lives on after [`Freezable::thaw`], of no more use.
pub struct Frozen {
    size_bytes: u64,
    disk: Arc<dyn BlockBackend>,
    fleece: File,
    saved: ChangeMap,
    saved_bytes: AtomicU64,
    /// One copy at a time, so that no block is copied while another queue's write to it is under way. The lock is held
    /// over the copy's system calls: whoever waits for it would have to wait for that copy anyway, or for the disk.
    copier: Mutex<BlockingDisk>,
    /// Why it can be read no more.
    broken: OnceLock<String>,
}

/// Reads a frozen disk. One a thread.
pub struct FrozenReader {
    frozen: Arc<Frozen>,
    disk: BlockingDisk,
}

impl Freezable {
    /// Decorates a disk; it is not frozen.
    pub fn new(inner: Arc<dyn BlockBackend>) -> Self {
        Self {
            inner,
            frozen: Arc::default(),
        }
    }

    /// Freezes the disk as it is now; what is overwritten goes into `fleece`, an empty file of the caller's. An earlier
    /// frozen disk is given up. The caller holds the disk's queues, and may open a queue.
    pub fn freeze(&self, fleece: File) -> io::Result<Arc<Frozen>> {
        let size_bytes = self.inner.geometry().size_bytes;
        fleece.set_len(size_bytes)?;
        let frozen = Arc::new(Frozen {
            size_bytes,
            copier: Mutex::new(BlockingDisk::open(&*self.inner, BLOCK_BYTES as usize)?),
            disk: self.inner.clone(),
            fleece,
            saved: ChangeMap::new(size_bytes, BLOCK_BYTES),
            saved_bytes: AtomicU64::new(0),
            broken: OnceLock::new(),
        });
        self.replace(Some(frozen.clone()));
        Ok(frozen)
    }

    /// Saves nothing any more; readers get an error from now on.
    pub fn thaw(&self) {
        self.replace(None);
    }

    fn replace(&self, next: Option<Arc<Frozen>>) {
        let mut slot = self.frozen.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(frozen) = std::mem::replace(&mut *slot, next) {
            frozen.break_off("the export has ended");
        }
    }
}

impl Frozen {
    /// Size of the disk at that moment, bytes: a later growth is not in it.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Bytes that the guest's writes have made it save.
    pub fn saved_bytes(&self) -> u64 {
        self.saved_bytes.load(Ordering::Relaxed)
    }

    /// Why it can be read no more.
    pub fn broken(&self) -> Option<&str> {
        self.broken.get().map(String::as_str)
    }

    /// Another reader. Called where a queue may be opened.
    pub fn open_reader(self: &Arc<Self>) -> io::Result<FrozenReader> {
        Ok(FrozenReader {
            disk: BlockingDisk::open(&*self.disk, READ_BYTES_MAX)?,
            frozen: self.clone(),
        })
    }

    fn break_off(&self, reason: &str) {
        // The first reason is the one that matters.
        let _ = self.broken.set(reason.to_owned());
    }

    fn check(&self) -> io::Result<()> {
        match self.broken() {
            Some(reason) => Err(io::Error::other(reason)),
            None => Ok(()),
        }
    }

    /// Saves the blocks that a request is about to change.
    fn save(&self, range: &Range<u64>) {
        let block_bytes = u64::from(BLOCK_BYTES);
        let end = range.end.min(self.size_bytes);
        let mut start = range.start / block_bytes * block_bytes;
        while start < end && self.broken.get().is_none() {
            if !self.saved.is_marked(start) {
                let next = (start + block_bytes).min(self.size_bytes);
                if let Err(error) = self.copy(start..next) {
                    self.break_off(&format!("save what the guest overwrites: {error}"));
                }
            }
            start += block_bytes;
        }
    }

    fn copy(&self, block: Range<u64>) -> io::Result<()> {
        let mut copier = self.copier.lock().unwrap_or_else(PoisonError::into_inner);
        // Another queue may have been faster.
        if self.saved.is_marked(block.start) {
            return Ok(());
        }
        let length = usize::try_from(block.end - block.start).expect("a block");
        let data = copier.read(block.start, length)?;
        // A hole of the fleece reads as zeroes.
        if data.iter().any(|byte| *byte != 0) {
            self.fleece.write_all_at(data, block.start)?;
            self.saved_bytes.fetch_add(length as u64, Ordering::Relaxed);
        }
        self.saved.mark(&block);
        Ok(())
    }
}

impl FrozenReader {
    /// Size of the disk at the frozen moment, bytes.
    pub fn size_bytes(&self) -> u64 {
        self.frozen.size_bytes
    }

    /// Fills `buffer` with what was there. The range is on the disk. Blocks.
    pub fn read(&mut self, offset_bytes: u64, mut buffer: &mut [u8]) -> io::Result<()> {
        let mut at = offset_bytes;
        while !buffer.is_empty() {
            let inside = at % READ_BYTES_MAX as u64;
            let room = READ_BYTES_MAX as u64 - inside;
            let count = buffer.len().min(usize::try_from(room).expect("1 MiB"));
            let (part, rest) = buffer.split_at_mut(count);
            self.read_part(at, part)?;
            buffer = rest;
            at += count as u64;
        }
        self.frozen.check()
    }

    /// Within one aligned range of [`READ_BYTES_MAX`].
    fn read_part(&mut self, offset_bytes: u64, part: &mut [u8]) -> io::Result<()> {
        let frozen = &self.frozen;
        frozen.check()?;
        let block_bytes = u64::from(BLOCK_BYTES);
        let end = offset_bytes + part.len() as u64;
        let start = offset_bytes / block_bytes * block_bytes;
        // Whole blocks, whatever the disk's own unit is; the disk ends with a whole unit.
        let around = start..end.next_multiple_of(block_bytes).min(frozen.size_bytes);
        let length = usize::try_from(around.end - around.start).expect("1 MiB");
        let data = self.disk.read(around.start, length)?;
        let skip = usize::try_from(offset_bytes - start).expect("less than a block");
        part.copy_from_slice(&data[skip..skip + part.len()]);
        // A block that is not marked *now* was not being written when the disk was read: it is marked before its
        // first write is submitted. The fence keeps the question behind the read.
        fence(Ordering::SeqCst);
        let mut block = around.start;
        while block < around.end {
            let next = (block + block_bytes).min(around.end);
            if frozen.saved.is_marked(block) {
                let from = block.max(offset_bytes);
                let to = next.min(end);
                let place = |at: u64| usize::try_from(at - offset_bytes).expect("in the buffer");
                let saved = &mut part[place(from)..place(to)];
                frozen.fleece.read_exact_at(saved, from)?;
            }
            block = next;
        }
        Ok(())
    }
}

impl Layer for Freezable {
    fn below(&self) -> &dyn BlockBackend {
        &*self.inner
    }

    fn over(&self, inner: Box<dyn BlockQueue>, _depth: u16) -> io::Result<Box<dyn BlockQueue>> {
        let frozen = self.frozen.clone();
        Ok(Box::new(FreezableQueue { inner, frozen }))
    }
}

struct FreezableQueue {
    inner: Box<dyn BlockQueue>,
    frozen: Arc<Slot>,
}

impl QueueLayer for FreezableQueue {
    fn below(&self) -> &dyn BlockQueue {
        &*self.inner
    }

    fn below_mut(&mut self) -> &mut dyn BlockQueue {
        &mut *self.inner
    }

    fn submit(&mut self, request: Request) -> Result<(), Full> {
        if let Some(range) = request.changed_range() {
            let slot = self.frozen.read().unwrap_or_else(PoisonError::into_inner);
            let frozen = slot.clone();
            // Not held over the copy: whoever thaws the disk does not wait for it.
            drop(slot);
            if let Some(frozen) = frozen {
                frozen.save(&range);
            }
        }
        self.inner.submit(request)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{Geometry, Operation};
    use crate::conformance::{self, act, write};
    use crate::{MemoryBackend, Space};
    use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};

    const SIZE_BYTES: u64 = (5 << 20) + 512;

    fn disk() -> Freezable {
        Freezable::new(Arc::new(MemoryBackend::new(Geometry {
            size_bytes: SIZE_BYTES,
            read_only: false,
        })))
    }

    fn read(reader: &mut FrozenReader, offset: u64, length: usize) -> io::Result<Vec<u8>> {
        let mut buffer = vec![0xee; length];
        reader.read(offset, &mut buffer).map(|()| buffer)
    }

    #[test]
    fn what_was_there_stays_readable() {
        let disk = disk();
        write(&disk, 0, &[1; 512]).unwrap();
        write(&disk, SIZE_BYTES - 512, &[2; 512]).unwrap();
        let frozen = disk.freeze(tempfile::tempfile().unwrap()).unwrap();
        let mut reader = frozen.open_reader().unwrap();
        write(&disk, 0, &[9; 1024]).unwrap();
        write(&disk, SIZE_BYTES - 512, &[9; 512]).unwrap();
        write(&disk, (1 << 20) - 512, &[9; 1024]).unwrap();
        let zeroes = Operation::WriteZeroes {
            length_bytes: 1 << 20,
            space: Space::Free,
        };
        act(&disk, 0, zeroes).unwrap();
        assert_eq!(
            read(&mut reader, 0, 513).unwrap(),
            [vec![1; 512], vec![0]].concat()
        );
        assert_eq!(read(&mut reader, SIZE_BYTES - 1, 1).unwrap(), [2]);
        let whole = read(&mut reader, 0, usize::try_from(SIZE_BYTES).unwrap()).unwrap();
        assert!(!whole.contains(&9));
        assert_eq!(whole.iter().filter(|byte| **byte != 0).count(), 1024);
        // Blocks of zeroes take no space.
        assert_eq!(frozen.saved_bytes(), u64::from(BLOCK_BYTES) + 512);

        disk.thaw();
        let error = read(&mut reader, 0, 1).unwrap_err();
        assert_eq!(error.to_string(), "the export has ended");
        let again = disk.freeze(tempfile::tempfile().unwrap()).unwrap();
        let mut reader = again.open_reader().unwrap();
        assert_eq!(read(&mut reader, 0, 1).unwrap(), [0]);
        assert_eq!(read(&mut reader, SIZE_BYTES - 1, 1).unwrap(), [9]);
    }

    #[test]
    fn a_guest_goes_on_when_the_fleece_is_full() {
        let disk = disk();
        write(&disk, 0, &[1; 512]).unwrap();
        let fleece = memfd_create("fleece", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING);
        let fleece = File::from(fleece.unwrap());
        let frozen = disk.freeze(fleece.try_clone().unwrap()).unwrap();
        // From now on nothing can be written to it.
        fcntl_add_seals(&fleece, SealFlags::WRITE).unwrap();
        write(&disk, 0, &[2; 512]).unwrap();
        let mut reader = frozen.open_reader().unwrap();
        let error = read(&mut reader, 0, 1).unwrap_err().to_string();
        assert!(
            error.starts_with("save what the guest overwrites: "),
            "{error}"
        );
        let mut now = [0; 512];
        conformance::read(&disk, 0, &mut now).unwrap();
        assert_eq!(now, [2; 512]);
    }

    /// Writers and readers at the same time, each sector saying which it is and when it was written.
    #[test]
    fn nothing_that_was_written_later_is_seen() {
        let disk = disk();
        let sectors = SIZE_BYTES / 512;
        for sector in 0..sectors {
            let byte = u8::try_from(sector % 100).unwrap();
            write(&disk, sector * 512, &[byte; 512]).unwrap();
        }
        for _ in 0..5 {
            for sector in 0..sectors {
                let byte = u8::try_from(sector % 100).unwrap();
                write(&disk, sector * 512, &[byte; 512]).unwrap();
            }
            let frozen = disk.freeze(tempfile::tempfile().unwrap()).unwrap();
            std::thread::scope(|scope| {
                for queue in 0..3 {
                    let disk = &disk;
                    scope.spawn(move || {
                        // Every queue writes everywhere, so that they meet in the same blocks.
                        for step in 0..sectors / 3 {
                            let sector = (step * 7919 + queue) % sectors;
                            write(disk, sector * 512, &[200; 512]).unwrap();
                        }
                    });
                }
                for _ in 0..2 {
                    let mut reader = frozen.open_reader().unwrap();
                    scope.spawn(move || {
                        for chunk in 0..SIZE_BYTES / 4096 {
                            let data = read(&mut reader, chunk * 4096, 4096).unwrap();
                            for (sector, part) in (chunk * 8..).zip(data.chunks(512)) {
                                let byte = u8::try_from(sector % 100).unwrap();
                                assert!(part.iter().all(|found| *found == byte), "sector {sector}");
                            }
                        }
                    });
                }
            });
        }
    }

    #[test]
    fn a_frozen_disk_is_a_disk_like_any_other() {
        conformance::check(|geometry| {
            let disk = Freezable::new(Arc::new(MemoryBackend::new(geometry)));
            disk.freeze(tempfile::tempfile().unwrap()).unwrap();
            Box::new(disk)
        });
    }
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A disk whose backend can be exchanged for another one with the same content, while no queue of it is open. Below
//! whatever records changes: those of a disk stay what they are wherever it is stored.

use std::io;
use std::sync::{Arc, PoisonError, RwLock};

use crate::backend::{Abilities, BlockBackend, BlockQueue, Geometry, ResizeError};

/// See the module. What the disk can do is what its first backend could: a guest has been told.
pub struct Switchable {
    abilities: Abilities,
    /// Looked at when a queue opens and when the size is asked for. A leaf lock.
    current: RwLock<Arc<dyn BlockBackend>>,
}

/// Why a backend cannot take another one's place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum MisfitError {
    /// It is too small.
    #[error("it has {size_bytes} bytes, the disk has {needed_bytes}")]
    Size {
        /// Its size.
        size_bytes: u64,
        /// The disk's size.
        needed_bytes: u64,
    },
    /// One of them cannot be written.
    #[error("one of the two is read-only")]
    ReadOnly,
    /// The guest was told of a smaller unit.
    #[error("its blocks have {block_bytes} bytes, the disk's {needed_bytes}: use cache writeback")]
    Block {
        /// Its unit.
        block_bytes: u32,
        /// The disk's.
        needed_bytes: u32,
    },
    /// The guest was told that there are discards.
    #[error("it takes no discards, and the disk does")]
    Discard,
    /// The guest was told that there is zeroing.
    #[error("it zeroes no ranges, and the disk does")]
    WriteZeroes,
}

impl Switchable {
    /// A disk that `first` serves. The guest is told of `first`'s abilities, which bind every later backend.
    pub fn new(first: Arc<dyn BlockBackend>) -> Self {
        Self {
            abilities: first.abilities(),
            current: RwLock::new(first),
        }
    }

    /// Whether `next` could serve the disk from now on.
    pub fn check(&self, next: &dyn BlockBackend) -> Result<(), MisfitError> {
        let (now, then) = (self.geometry(), next.geometry());
        let (needed, there) = (self.abilities, next.abilities());
        if now.read_only || then.read_only {
            return Err(MisfitError::ReadOnly);
        }
        if then.size_bytes < now.size_bytes {
            return Err(MisfitError::Size {
                size_bytes: then.size_bytes,
                needed_bytes: now.size_bytes,
            });
        }
        if there.block_bytes > needed.block_bytes {
            return Err(MisfitError::Block {
                block_bytes: there.block_bytes,
                needed_bytes: needed.block_bytes,
            });
        }
        if needed.discard_bytes.is_some() && there.discard_bytes.is_none() {
            return Err(MisfitError::Discard);
        }
        if needed.write_zeroes
            && (!there.write_zeroes || there.range_bytes_max < needed.range_bytes_max)
        {
            return Err(MisfitError::WriteZeroes);
        }
        Ok(())
    }

    /// What serves it now; another one may a moment later, when its queues have been closed.
    pub fn current(&self) -> Arc<dyn BlockBackend> {
        let current = self.current.read().unwrap_or_else(PoisonError::into_inner);
        current.clone()
    }

    /// `next` serves the disk from now on; what served it until now is returned. The caller has closed the disk's
    /// queues, and promises that `next` has passed [`Switchable::check`] and holds the same.
    pub fn switch_to(&self, next: Arc<dyn BlockBackend>) -> Arc<dyn BlockBackend> {
        let mut current = self.current.write().unwrap_or_else(PoisonError::into_inner);
        std::mem::replace(&mut *current, next)
    }
}

impl BlockBackend for Switchable {
    fn geometry(&self) -> Geometry {
        self.current().geometry()
    }

    fn abilities(&self) -> Abilities {
        self.abilities
    }

    fn is_synchronous(&self) -> bool {
        self.current().is_synchronous()
    }

    fn resize(&self, size_bytes: u64) -> Result<(), ResizeError> {
        self.current().resize(size_bytes)
    }

    fn open_queue(&self, depth: u16) -> io::Result<Box<dyn BlockQueue>> {
        self.current().open_queue(depth)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::changes::Tracked;
    use crate::conformance::{self, read, write};
    use crate::{Cache, Format, MemoryBackend, OpenOptions, Source};

    fn memory(size_bytes: u64, read_only: bool) -> Arc<MemoryBackend> {
        Arc::new(MemoryBackend::new(Geometry {
            size_bytes,
            read_only,
        }))
    }

    #[test]
    fn it_is_a_disk_like_any_other() {
        conformance::check(|geometry| {
            Box::new(Switchable::new(Arc::new(MemoryBackend::new(geometry))))
        });
    }

    #[test]
    fn what_comes_after_the_switch_goes_to_the_other_one() {
        let (first, second) = (memory(4096, false), memory(8192, false));
        let switchable = Arc::new(Switchable::new(first.clone()));
        let disk = Tracked::new(switchable.clone());
        write(&disk, 0, &[1; 512]).unwrap();
        switchable.check(&*second).unwrap();
        switchable.switch_to(second.clone());
        write(&disk, 512, &[2; 512]).unwrap();
        let mut found = [9; 1024];
        read(&*first, 0, &mut found).unwrap();
        assert_eq!((found[0], found[512]), (1, 0));
        read(&*second, 0, &mut found).unwrap();
        assert_eq!((found[0], found[512]), (0, 2));
        assert_eq!(disk.geometry().size_bytes, 8192);
    }

    #[test]
    fn what_cannot_do_the_same_does_not_fit() {
        let disk = Switchable::new(memory(4096, false));
        let check = |size, read_only| disk.check(&*memory(size, read_only));
        let small = MisfitError::Size {
            size_bytes: 2048,
            needed_bytes: 4096,
        };
        assert_eq!(check(2048, false), Err(small));
        assert_eq!(check(4096, true), Err(MisfitError::ReadOnly));
        assert_eq!(check(4096, false), Ok(()));
        let raw = raw(OpenOptions::default());
        assert_eq!(disk.check(&*raw), Err(MisfitError::Discard));
    }

    /// A file without a name.
    fn raw(options: OpenOptions) -> Arc<dyn BlockBackend> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk");
        std::fs::write(&path, [0; 4096]).unwrap();
        let source = Source {
            path,
            format: Format::Raw,
            backing: Vec::new(),
        };
        crate::open(&source, options).unwrap()
    }

    #[test]
    fn writes_are_as_durable_as_where_they_go() {
        let is_synchronous = |cache, detect_zeroes| {
            let options = OpenOptions {
                cache,
                detect_zeroes,
                ..OpenOptions::default()
            };
            let switchable = Arc::new(Switchable::new(memory(4096, false)));
            let disk = Tracked::new(switchable.clone());
            assert!(!disk.is_synchronous());
            switchable.switch_to(raw(options));
            disk.is_synchronous()
        };
        assert!(!is_synchronous(Cache::Writeback, false));
        assert!(is_synchronous(Cache::Writethrough, false));
        // What is detected may become a hole, which the file's mode says nothing about.
        assert!(!is_synchronous(Cache::Writethrough, true));
    }
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Pages that a backend has written, as it notes them itself (vhost-user.rst, "Migration"): a bitmap in a memfd that both
//! processes map. A page's bit is there before the driver is told of what is in the page.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::AtomicU64;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use vm_memory::mmap::MmapRegion;
use vm_memory::{FileOffset, GuestAddressSpace, VolatileMemory};

use crate::memory::{self, Memory};

const WORD_BYTES: usize = size_of::<AtomicU64>();

/// The bitmap. Whoever serves the device, one after the other, notes in the same.
pub(super) struct PageLog {
    file: File,
    words: MmapRegion<()>,
    memory: Memory,
}

impl PageLog {
    /// For all of this memory, nothing noted. Its size is sealed, so that no backend can have us end by SIGBUS.
    pub(super) fn new(memory: Memory) -> io::Result<Self> {
        let size = memory::word_count(&memory.memory()) * WORD_BYTES;
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = memfd_create("vhost-user-log", flags)?;
        ftruncate(&file, size as u64)?;
        let seals = SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL;
        fcntl_add_seals(&file, seals)?;
        let file = File::from(file);
        let whole = FileOffset::new(file.try_clone()?, 0);
        let words = MmapRegion::from_file(whole, size).map_err(io::Error::other)?;
        Ok(Self {
            file,
            words,
            memory,
        })
    }

    /// What a backend maps.
    pub(super) fn file(&self) -> impl AsFd {
        &self.file
    }

    /// Bytes of it.
    pub(super) fn size(&self) -> u64 {
        self.words.size() as u64
    }

    /// Puts the pages into the log of guest memory, and forgets them. From any thread.
    pub(super) fn drain(&self) {
        let words = (0..self.words.size()).step_by(WORD_BYTES).map(|at| {
            let word = self.words.get_atomic_ref::<AtomicU64>(at);
            word.expect("within a mapping of whole words")
        });
        memory::drain(words, &self.memory.memory());
    }
}

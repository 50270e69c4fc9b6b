// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Which pages of guest RAM were written: by vCPUs (KVM's log of each memory slot), by this process (the log of
//! each region, see `atoll_devices::memory`), and by the kernel on a device's behalf (vhost, which tells that log).
//!
//! **Two ways to read KVM's log.** In the old one each reading forgets what it tells, which write-protects every page of
//! it at once: vCPUs wait meanwhile. Where KVM can (Linux 5.7), reading changes nothing, and whoever is about to read a
//! page forgets it just before, a piece at a time ([`WriteLog::forget`]). What the guest writes between the two is read
//! then, and does not come again; and switching the log on protects nothing, since every page counts as written until it
//! is forgotten (`api.rst` §7, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2).

use std::sync::Arc;

use atoll_devices::memory::{self, PAGE_BYTES, Ram, WORD_PAGES};
use atoll_devices::virtio::VirtioPci;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::{KvmError, VirtualMachine};

/// Words that are forgotten at once when all are: 256 MiB, for which vCPUs wait about as long as for an interrupt.
const PIECE_WORDS: usize = 1024;

/// A log that is on. Off again when dropped.
pub struct WriteLog {
    machine: VirtualMachine,
    memory: Arc<Ram>,
    /// Devices that may have somebody else write for them.
    functions: Vec<Arc<VirtioPci>>,
    /// Reading KVM's log does not empty it.
    is_manual: bool,
}

impl WriteLog {
    /// Logs from now on what is written to `memory`, which is the machine's, also for its `functions`. Pages that nobody
    /// has written may be in the log, too: whoever starts it looks at all of them first, or empties it.
    pub fn start(
        machine: VirtualMachine,
        memory: Arc<Ram>,
        functions: Vec<Arc<VirtioPci>>,
    ) -> Result<Self, KvmError> {
        let log = Self {
            is_manual: machine.log_is_manual(),
            machine,
            memory,
            functions,
        };
        let regions = log.memory.iter();
        regions.for_each(|region| memory::log(region).switch(true));
        for function in &log.functions {
            let told = function.log_writes(true);
            told.map_err(|source| KvmError::Failed {
                what: "have a device's writes logged",
                source,
            })?;
        }
        log.machine.log_writes(&log.memory, true)?;
        Ok(log)
    }

    /// The RAM whose log this is; its regions are those of [`WriteLog::take`]'s answer.
    #[must_use]
    pub fn memory(&self) -> &Arc<Ram> {
        &self.memory
    }

    /// Pages that were written since they were forgotten: a bit a page, of each region. Before a page is read it is
    /// forgotten ([`WriteLog::forget`]), or a later write to it may be lost.
    pub fn look(&self) -> Result<Vec<Vec<u64>>, KvmError> {
        self.functions.iter().for_each(|one| one.note_writes());
        (0_u32..)
            .zip(self.memory.iter())
            .map(|(slot, region)| {
                let size = usize::try_from(region.len()).expect("64-bit host");
                let log = self.machine.fd().get_dirty_log(slot, size);
                let mut words = log.map_err(KvmError::failed("read the log of written pages"))?;
                words.truncate(size.div_ceil(PAGE_BYTES).div_ceil(WORD_PAGES));
                memory::log(region).take(&mut words);
                Ok(words)
            })
            .collect()
    }

    /// Forgets these pages of a region, from its page `first_word` times 64 on; does nothing where looking has done it.
    pub fn forget(&self, region: usize, first_word: usize, words: &[u64]) -> Result<(), KvmError> {
        if !self.is_manual || words.iter().all(|word| *word == 0) {
            return Ok(());
        }
        let size = self.memory.iter().nth(region).map_or(0, |it| it.len());
        let pages = usize::try_from(size).expect("64-bit host") / PAGE_BYTES;
        let first_page = first_word * WORD_PAGES;
        let count = (words.len() * WORD_PAGES).min(pages.saturating_sub(first_page));
        let slot = u32::try_from(region).expect("few regions");
        self.machine.forget_writes(slot, first_page, count, words)
    }

    /// Pages that were written since the last call: a bit a page, of each region.
    pub fn take(&self) -> Result<Vec<Vec<u64>>, KvmError> {
        let pages = self.look()?;
        for (region, words) in pages.iter().enumerate() {
            for (index, piece) in words.chunks(PIECE_WORDS).enumerate() {
                self.forget(region, index * PIECE_WORDS, piece)?;
            }
        }
        Ok(pages)
    }
}

impl Drop for WriteLog {
    fn drop(&mut self) {
        let regions = self.memory.iter();
        regions.for_each(|region| memory::log(region).switch(false));
        for function in &self.functions {
            if let Err(error) = function.log_writes(false) {
                tracing::warn!(%error, "the log of a device's writes stays on");
            }
        }
        if let Err(error) = self.machine.log_writes(&self.memory, false) {
            tracing::warn!(%error, "the log of written pages stays on");
        }
    }
}

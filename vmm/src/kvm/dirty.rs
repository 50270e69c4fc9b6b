// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Which pages of guest RAM were written: by vCPUs (KVM's log of each memory slot), by this process (the log of
//! each region, see `atoll_devices::memory`), and by the kernel on a device's behalf (vhost, which tells that log).

use std::sync::Arc;

use atoll_devices::memory::{self, PAGE_BYTES, Ram};
use atoll_devices::virtio::VirtioPci;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::{KvmError, VirtualMachine};

/// A log that is on. Off again when dropped.
pub struct WriteLog {
    machine: VirtualMachine,
    memory: Arc<Ram>,
    /// Devices that may have somebody else write for them.
    functions: Vec<Arc<VirtioPci>>,
}

impl WriteLog {
    /// Logs from now on what is written to `memory`, which is the machine's, also for its `functions`.
    pub fn start(
        machine: VirtualMachine,
        memory: Arc<Ram>,
        functions: Vec<Arc<VirtioPci>>,
    ) -> Result<Self, KvmError> {
        let log = Self {
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

    /// Pages that were written since the last call: a bit a page, of each region.
    pub fn take(&self) -> Result<Vec<Vec<u64>>, KvmError> {
        self.functions.iter().for_each(|one| one.note_writes());
        (0_u32..)
            .zip(self.memory.iter())
            .map(|(slot, region)| {
                let size = usize::try_from(region.len()).expect("64-bit host");
                let log = self.machine.fd().get_dirty_log(slot, size);
                let mut words = log.map_err(KvmError::failed("read the log of written pages"))?;
                words.truncate(size.div_ceil(PAGE_BYTES).div_ceil(64));
                memory::log(region).take(&mut words);
                Ok(words)
            })
            .collect()
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

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Which pages of guest RAM were written: by vCPUs (KVM's log of each memory slot) and by this process (the log of
//! each region, see `atoll_devices::memory`).

use std::sync::Arc;

use atoll_devices::memory::{self, Ram};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::{KvmError, VirtualMachine};

/// A log that is on. Off again when dropped.
pub struct WriteLog {
    machine: VirtualMachine,
    memory: Arc<Ram>,
}

impl WriteLog {
    /// Logs from now on what is written to `memory`, which is the machine's.
    pub fn start(machine: VirtualMachine, memory: Arc<Ram>) -> Result<Self, KvmError> {
        memory
            .iter()
            .for_each(|region| memory::log(region).switch(true));
        machine.log_writes(&memory, true)?;
        Ok(Self { machine, memory })
    }

    /// The RAM whose log this is; its regions are those of [`WriteLog::take`]'s answer.
    #[must_use]
    pub fn memory(&self) -> &Arc<Ram> {
        &self.memory
    }

    /// Pages that were written since the last call: a bit a page, of each region.
    pub fn take(&self) -> Result<Vec<Vec<u64>>, KvmError> {
        (0_u32..)
            .zip(self.memory.iter())
            .map(|(slot, region)| {
                let size = usize::try_from(region.len()).expect("64-bit host");
                let log = self.machine.fd().get_dirty_log(slot, size);
                let mut words = log.map_err(KvmError::failed("read the log of written pages"))?;
                words.truncate(size.div_ceil(memory::PAGE_BYTES).div_ceil(64));
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
        if let Err(error) = self.machine.log_writes(&self.memory, false) {
            tracing::warn!(%error, "the log of written pages stays on");
        }
    }
}

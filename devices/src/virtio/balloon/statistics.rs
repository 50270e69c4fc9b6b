// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! What a guest tells of its memory, VIRTIO 1.2 §5.5.6.3: one buffer goes back and forth for ever.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Shared;
use crate::virtio::worker::{Progress, QueueHandler};
use crate::virtio::{Chain, DeviceQueue, QueueError};

/// How often the guest is asked.
const INTERVAL: Duration = Duration::from_secs(5);
/// `struct virtio_balloon_stat`: a 16-bit tag and a 64-bit value, without padding.
const ENTRY_BYTES: usize = 10;
/// Entries that are read of a buffer; sixteen tags are defined.
const ENTRIES_MAX: usize = 64;

/// Numbers about the guest's memory, in bytes but for the counts. Absent where the guest told none.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Bytes swapped in since the guest's boot (VIRTIO_BALLOON_S_SWAP_IN, §5.5.6.4).
    pub swapped_in: Option<u64>,
    /// Bytes swapped out since the guest's boot (VIRTIO_BALLOON_S_SWAP_OUT).
    pub swapped_out: Option<u64>,
    /// Page faults that waited for a disk, a count since boot (VIRTIO_BALLOON_S_MAJFLT).
    pub major_faults: Option<u64>,
    /// Page faults that did not, a count since boot (VIRTIO_BALLOON_S_MINFLT).
    pub minor_faults: Option<u64>,
    /// Bytes that are not used for anything (VIRTIO_BALLOON_S_MEMFREE).
    pub free: Option<u64>,
    /// Bytes that the guest's kernel manages, which are fewer than its RAM has (VIRTIO_BALLOON_S_MEMTOT).
    pub total: Option<u64>,
    /// What a program could get without swapping.
    pub available: Option<u64>,
    /// Bytes of files in memory, which can be dropped without input or output (VIRTIO_BALLOON_S_CACHES).
    pub caches: Option<u64>,
}

impl Statistics {
    fn parse(bytes: &[u8]) -> Self {
        let mut statistics = Self::default();
        let (entries, _) = bytes.as_chunks::<ENTRY_BYTES>();
        for &[t, u, a, b, c, d, e, f, g, h] in entries {
            let value = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
            let field = match u16::from_le_bytes([t, u]) {
                0 => &mut statistics.swapped_in,
                1 => &mut statistics.swapped_out,
                2 => &mut statistics.major_faults,
                3 => &mut statistics.minor_faults,
                4 => &mut statistics.free,
                5 => &mut statistics.total,
                6 => &mut statistics.available,
                7 => &mut statistics.caches,
                _ => continue,
            };
            *field = Some(value);
        }
        statistics
    }
}

/// Serves the statistics queue: takes the buffer, reads it, and gives it back after a while, which is the question
/// for new numbers.
pub(super) struct StatisticsQueue {
    shared: Arc<Shared>,
    chain: Chain,
    /// When the buffer that is held was filled; `None` while the driver has it.
    held_since: Option<Instant>,
}

impl StatisticsQueue {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self {
            shared,
            chain: Chain::new(),
            held_since: None,
        }
    }
}

impl QueueHandler for StatisticsQueue {
    fn process(&mut self, queue: &mut DeviceQueue) -> Result<Progress, QueueError> {
        if let Some(since) = self.held_since {
            let rest = INTERVAL.saturating_sub(since.elapsed());
            if !rest.is_zero() {
                return Ok(Progress::After(rest));
            }
            queue.push(self.chain.head(), 0)?;
            queue.signal()?;
            self.held_since = None;
        }
        if !queue.pop(&mut self.chain)? {
            let more = queue.enable_doorbell()?;
            return Ok(Progress::again_if(more));
        }
        let mut bytes = [0; ENTRY_BYTES * ENTRIES_MAX];
        let size = self.chain.readable().read(&mut bytes);
        *self.shared.lock_statistics() = Some(Statistics::parse(&bytes[..size]));
        self.held_since = Some(Instant::now());
        Ok(Progress::After(INTERVAL))
    }

    /// The buffer goes back unused, to be read again after a resume.
    fn drain(&mut self, queue: &mut DeviceQueue) -> Result<(), QueueError> {
        if self.held_since.take().is_some() {
            queue.undo_pop(1);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_tags_are_read_and_others_skipped() {
        let entry = |tag: u16, value: u64| {
            let mut bytes = tag.to_le_bytes().to_vec();
            bytes.extend(value.to_le_bytes());
            bytes
        };
        let mut bytes = [entry(4, 7), entry(99, 1), entry(5, u64::MAX), entry(4, 8)].concat();
        bytes.extend([5, 0, 1]);
        let statistics = Statistics::parse(&bytes);
        assert_eq!(
            (statistics.free, statistics.total),
            (Some(8), Some(u64::MAX))
        );
        assert_eq!(statistics.available, None);
    }
}

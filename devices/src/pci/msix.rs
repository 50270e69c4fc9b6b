// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The MSI-X table and pending bits of one function. PCI 3.0 §6.8.2.
//!
//! Queue threads call [`Msix::signal`], which takes no lock; vCPU threads write the table, which tells the VMM
//! where each vector goes. A vector that is masked when it is signalled sets its pending bit and is delivered on
//! unmasking, exactly once.

use std::io;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use crate::interrupt::{MsiMessage, MsixSink, RouteChange};
use crate::rate_limited::{RateLimit, warn_limited};

/// Bytes of one table entry: address (8), data (4), vector control (4).
pub const TABLE_ENTRY_BYTES: u64 = 16;
/// Vector control bit 0.
const ENTRY_MASKED: u32 = 1;
/// Message control: MSI-X is enabled.
const CONTROL_ENABLE: u16 = 1 << 15;
/// Message control: all vectors are masked.
const CONTROL_FUNCTION_MASK: u16 = 1 << 14;

/// State of one vector for [`Msix::signal`]: a message may be sent.
const OPEN: u8 = 0;
/// Masked, nothing waits.
const MASKED: u8 = 1;
/// Masked, and was signalled since.
const PENDING: u8 = 2;

#[derive(Debug, Clone, Copy)]
struct Entry {
    message: MsiMessage,
    control: u32,
}

struct Table {
    entries: Vec<Entry>,
    control: u16,
}

/// State of one function's vectors, as it is saved.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MsixState {
    control: u16,
    vectors: Vec<VectorState>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct VectorState {
    address: u64,
    data: u32,
    masked: bool,
    pending: bool,
}

/// Table, pending bits and the VMM's end of one function's vectors.
pub struct Msix {
    sink: Arc<dyn MsixSink>,
    vectors: Vec<AtomicU8>,
    /// The guest's table. Held while the VMM sets routes (an ioctl), on purpose: routes must follow the order of
    /// the table's writes. Only vCPU threads take it, and the sink takes no lock of ours.
    table: Mutex<Table>,
    limit: RateLimit,
}

impl Msix {
    /// A table with every vector masked and MSI-X disabled, as after reset.
    pub fn new(sink: Arc<dyn MsixSink>) -> Self {
        let count = usize::from(sink.vector_count());
        assert!(
            (1..=2048).contains(&count),
            "MSI-X has 1 to 2048 vectors, the VMM asked for {count}"
        );
        let entry = Entry {
            message: MsiMessage::default(),
            control: ENTRY_MASKED,
        };
        Self {
            sink,
            vectors: (0..count).map(|_| AtomicU8::new(MASKED)).collect(),
            table: Mutex::new(Table {
                entries: vec![entry; count],
                control: 0,
            }),
            limit: RateLimit::new(),
        }
    }

    /// Number of vectors, 1 to 2048 (PCI 3.0 §6.8.2); fixed for the life of the function.
    pub fn vector_count(&self) -> u16 {
        self.sink.vector_count()
    }

    /// Sends vector `vector`, or notes it as pending while masked. Out of range (also 0xffff, virtio's "no
    /// vector") does nothing. Returns whether a message was sent or noted.
    pub fn signal(&self, vector: u16) -> bool {
        let Some(state) = self.vectors.get(usize::from(vector)) else {
            return false;
        };
        let masked = state.fetch_update(Ordering::AcqRel, Ordering::Acquire, |now| {
            (now != OPEN).then_some(PENDING)
        });
        if masked.is_err() {
            self.send(vector);
        }
        true
    }

    /// A copy of what [`Msix::signal`] writes to, for signals that do not pass here; `None` for no vector. While
    /// the vector is masked it is disconnected, and what was written is delivered on unmasking: only the pending
    /// bit does not tell.
    pub fn event(&self, vector: u16) -> io::Result<Option<EventFd>> {
        if vector >= self.vector_count() {
            return Ok(None);
        }
        self.sink.event(vector).try_clone().map(Some)
    }

    fn send(&self, vector: u16) {
        // The counter is 64 bits wide and KVM empties it: the write cannot block.
        if let Err(error) = self.sink.event(vector).write(1) {
            warn_limited!(self.limit, vector, %error, "msi-x: signal");
        }
    }

    /// The guest wrote the capability's message control.
    pub fn set_control(&self, control: u16) {
        let mut table = self.lock();
        let old = table.control;
        table.control = control & (CONTROL_ENABLE | CONTROL_FUNCTION_MASK);
        if old != table.control {
            let all = 0..self.vector_count();
            self.apply(&table, all);
        }
    }

    /// The guest read `data` at `offset` of the table.
    pub fn table_read(&self, offset: u64, data: &mut [u8]) {
        let table = self.lock();
        let entry = usize::try_from(offset / TABLE_ENTRY_BYTES)
            .ok()
            .and_then(|index| table.entries.get(index));
        let bytes = entry.map_or([0; 16], |entry| entry.bytes());
        let within = usize::try_from(offset % TABLE_ENTRY_BYTES).unwrap_or(0);
        for (index, byte) in data.iter_mut().enumerate() {
            *byte = bytes.get(within + index).copied().unwrap_or(0);
        }
    }

    /// The guest wrote `data` at `offset` of the table. PCI 3.0 §6.8.2 allows aligned 4 and 8 bytes; the rest is
    /// ignored.
    pub fn table_write(&self, offset: u64, data: &[u8]) {
        if !matches!(data.len(), 4 | 8) || !offset.is_multiple_of(data.len() as u64) {
            warn_limited!(
                self.limit,
                offset,
                size = data.len(),
                "msi-x: odd table write"
            );
            return;
        }
        let mut table = self.lock();
        let Ok(index) = u16::try_from(offset / TABLE_ENTRY_BYTES) else {
            return;
        };
        let Some(entry) = table.entries.get_mut(usize::from(index)) else {
            return;
        };
        let mut bytes = entry.bytes();
        let within = usize::try_from(offset % TABLE_ENTRY_BYTES).unwrap_or(0);
        bytes[within..within + data.len()].copy_from_slice(data);
        let old = (entry.message, entry.control);
        *entry = Entry::from_bytes(bytes);
        if old != (entry.message, entry.control) {
            self.apply(&table, index..index + 1);
        }
    }

    /// The guest read the pending bit array.
    pub fn pending_read(&self, offset: u64, data: &mut [u8]) {
        for (index, byte) in data.iter_mut().enumerate() {
            let first = usize::try_from(offset)
                .ok()
                .and_then(|offset| offset.checked_add(index)?.checked_mul(8));
            *byte = (0..8).fold(0, |bits, bit| {
                let state = first.and_then(|first| self.vectors.get(first | bit));
                let pending = state.is_some_and(|state| state.load(Ordering::Acquire) == PENDING);
                bits | u8::from(pending) << bit
            });
        }
    }

    /// The table and what is pending. The machine is held: a vector that is signalled meanwhile may be missing.
    pub fn save(&self) -> MsixState {
        let table = self.lock();
        let vector = |(entry, state): (&Entry, &AtomicU8)| VectorState {
            address: entry.message.address,
            data: entry.message.data,
            masked: entry.control & ENTRY_MASKED != 0,
            pending: state.load(Ordering::Acquire) == PENDING,
        };
        MsixState {
            control: table.control,
            vectors: table
                .entries
                .iter()
                .zip(&self.vectors)
                .map(vector)
                .collect(),
        }
    }

    /// Puts a saved table into one as after reset; false if it is of another number of vectors.
    pub fn restore(&self, state: &MsixState) -> bool {
        let mut table = self.lock();
        if state.vectors.len() != table.entries.len() {
            return false;
        }
        table.control = state.control & (CONTROL_ENABLE | CONTROL_FUNCTION_MASK);
        for (index, vector) in state.vectors.iter().enumerate() {
            table.entries[index] = Entry {
                message: MsiMessage {
                    address: vector.address,
                    data: vector.data,
                },
                control: if vector.masked { ENTRY_MASKED } else { 0 },
            };
            let waiting = if vector.pending { PENDING } else { MASKED };
            self.vectors[index].store(waiting, Ordering::Release);
        }
        self.apply(&table, 0..self.vector_count());
        true
    }

    /// Makes routes and vector states follow the table.
    fn apply(&self, table: &Table, vectors: std::ops::Range<u16>) {
        let function_open =
            table.control & (CONTROL_ENABLE | CONTROL_FUNCTION_MASK) == CONTROL_ENABLE;
        let changes: Vec<RouteChange> = vectors
            .map(|vector| {
                let entry = &table.entries[usize::from(vector)];
                let open = function_open && entry.control & ENTRY_MASKED == 0;
                (vector, open.then_some(entry.message))
            })
            .collect();
        // Closing first: what is signalled from now on is noted, not sent to a route that goes away.
        for (vector, message) in &changes {
            if message.is_none() {
                let state = &self.vectors[usize::from(*vector)];
                let _ = state.compare_exchange(OPEN, MASKED, Ordering::AcqRel, Ordering::Acquire);
            }
        }
        if let Err(error) = self.sink.set_routes(&changes) {
            warn_limited!(self.limit, %error, "msi-x: set routes");
            return;
        }
        for (vector, message) in &changes {
            let state = &self.vectors[usize::from(*vector)];
            if message.is_some() && state.swap(OPEN, Ordering::AcqRel) == PENDING {
                self.send(*vector);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Entry {
    fn bytes(&self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.message.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.message.data.to_le_bytes());
        bytes[12..].copy_from_slice(&self.control.to_le_bytes());
        bytes
    }

    fn from_bytes(bytes: [u8; 16]) -> Self {
        let word = |at: usize| {
            u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        Self {
            message: MsiMessage {
                address: u64::from(word(0) & !3) | u64::from(word(4)) << 32,
                data: word(8),
            },
            control: word(12) & ENTRY_MASKED,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::CountingSink;

    fn unmask(msix: &Msix, vector: u64) {
        msix.table_write(vector * 16, &0xfee0_1000_u64.to_le_bytes());
        msix.table_write(vector * 16 + 8, &0x41_u64.to_le_bytes());
    }

    #[test]
    fn pending_while_masked_is_sent_once_on_unmask() {
        let sink = Arc::new(CountingSink::new(3));
        let msix = Msix::new(sink.clone());
        msix.signal(1);
        msix.signal(1);
        let mut bits = [0; 8];
        msix.pending_read(0, &mut bits);
        assert_eq!(bits, [0b10, 0, 0, 0, 0, 0, 0, 0]);
        unmask(&msix, 1);
        assert_eq!(sink.take(1), 0, "MSI-X is not enabled yet");
        msix.set_control(CONTROL_ENABLE);
        assert_eq!(sink.take(1), 1);
        let message = MsiMessage {
            address: 0xfee0_1000,
            data: 0x41,
        };
        assert_eq!(sink.route(1), Some(message));
        msix.pending_read(0, &mut bits);
        assert_eq!(bits, [0; 8]);
        msix.signal(1);
        assert_eq!(sink.take(1), 1);
    }

    #[test]
    fn function_mask_holds_everything_back() {
        let sink = Arc::new(CountingSink::new(2));
        let msix = Msix::new(sink.clone());
        unmask(&msix, 0);
        msix.set_control(CONTROL_ENABLE | CONTROL_FUNCTION_MASK);
        msix.signal(0);
        assert_eq!((sink.take(0), sink.route(0)), (0, None));
        msix.set_control(CONTROL_ENABLE);
        assert_eq!(sink.take(0), 1);
    }

    #[test]
    fn strange_accesses_do_nothing() {
        let sink = Arc::new(CountingSink::new(2));
        let msix = Msix::new(sink);
        assert!(!msix.signal(2));
        assert!(!msix.signal(0xffff));
        for (offset, size) in [(0, 1), (2, 4), (4, 8), (32, 4), (u64::MAX - 7, 8), (0, 0)] {
            msix.table_write(offset, &[0xff; 8][..size]);
        }
        let mut data = [0; 8];
        msix.table_read(0, &mut data);
        assert_eq!(data, [0; 8]);
        msix.table_read(u64::MAX - 3, &mut data);
        msix.pending_read(u64::MAX - 3, &mut data);
        assert_eq!(data, [0; 8]);
    }
}

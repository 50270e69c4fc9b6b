// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Numbers that only grow, for the control API's `counters`. Updated by queue threads without a lock.

use std::sync::atomic::{AtomicU64, Ordering};

use atoll_disk::Operation;

/// One number. Relaxed: readers want totals, not an order between them.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `amount`, wrapping at 2^64. Any thread, no lock.
    pub fn add(&self, amount: u64) {
        self.0.fetch_add(amount, Ordering::Relaxed);
    }

    /// The total so far. Numbers of different counters are not of the same instant.
    pub fn value(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A snapshot as the control API shows it: `(name, value)`.
pub type CounterList = Vec<(&'static str, u64)>;

/// What every virtqueue counts, from the making of its device on: a reset by the driver does not clear it.
#[derive(Debug, Default)]
pub struct QueueCounters {
    /// Wake-ups of the queue's thread by the driver's doorbell.
    pub doorbells: Counter,
    /// Descriptor chains taken from the available ring.
    pub chains: Counter,
    /// Interrupts sent: those left that the driver has not suppressed by flag or event index, VIRTIO 1.2 §2.7.7.
    pub interrupts: Counter,
    /// Mistakes of the driver (each of them ends in NEEDS_RESET or an error status).
    pub guest_errors: Counter,
}

impl QueueCounters {
    /// Adds these numbers to a device's list.
    pub fn list(&self) -> CounterList {
        vec![
            ("doorbells", self.doorbells.value()),
            ("chains", self.chains.value()),
            ("interrupts", self.interrupts.value()),
            ("guest_errors", self.guest_errors.value()),
        ]
    }
}

/// What every disk counts, whichever controller it is on: requests that were given to its backend, and their bytes.
#[derive(Debug, Default)]
pub struct DiskCounters {
    reads: Counter,
    read_bytes: Counter,
    writes: Counter,
    written_bytes: Counter,
    flushes: Counter,
    errors: Counter,
}

impl DiskCounters {
    /// A request that goes to the backend. Discards and zeroes move no data: the queue counts them.
    pub fn request(&self, operation: Operation, bytes: u64) {
        match operation {
            Operation::Read => {
                self.reads.add(1);
                self.read_bytes.add(bytes);
            }
            Operation::Write => {
                self.writes.add(1);
                self.written_bytes.add(bytes);
            }
            Operation::Flush => self.flushes.add(1),
            Operation::Discard { .. } | Operation::WriteZeroes { .. } => {}
        }
    }

    /// A request that was answered with an error.
    pub fn error(&self) {
        self.errors.add(1);
    }

    /// These numbers with their names in the control API, read one by one: not of one instant.
    pub fn list(&self) -> CounterList {
        vec![
            ("reads", self.reads.value()),
            ("read_bytes", self.read_bytes.value()),
            ("writes", self.writes.value()),
            ("written_bytes", self.written_bytes.value()),
            ("flushes", self.flushes.value()),
            ("errors", self.errors.value()),
        ]
    }
}

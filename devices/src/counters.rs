// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Numbers that only grow, for the control API's `counters`. Updated by queue threads without a lock.

use std::sync::atomic::{AtomicU64, Ordering};

/// One number. Relaxed: readers want totals, not an order between them.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `amount`.
    pub fn add(&self, amount: u64) {
        self.0.fetch_add(amount, Ordering::Relaxed);
    }

    /// The total so far.
    pub fn value(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A snapshot as the control API shows it: `(name, value)`.
pub type CounterList = Vec<(&'static str, u64)>;

/// What every virtqueue counts.
#[derive(Debug, Default)]
pub struct QueueCounters {
    /// Wake-ups of the queue's thread by the driver's doorbell.
    pub doorbells: Counter,
    /// Descriptor chains taken from the available ring.
    pub chains: Counter,
    /// Interrupts sent, after suppression.
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

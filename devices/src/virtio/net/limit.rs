// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The rate limit of one direction of a card, shared by its queues and changed while they run.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use atoll_disk::{LOOK_AGAIN, TokenBucket};

/// How much one direction of a card may carry, its Ethernet headers included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    /// Bytes in a second, on average.
    pub bytes_per_second: u64,
    /// What an idle card may carry at once; 0 for a tenth of a second's worth.
    pub burst_bytes: u64,
}

/// No limit, or a bucket.
#[derive(Default)]
pub(super) struct Limit {
    /// Whether there is a bucket: spares cards without limit the lock.
    limited: AtomicBool,
    /// Leaf lock, for the arithmetic of one packet.
    bucket: Mutex<Option<TokenBucket>>,
}

impl Limit {
    /// From now on.
    pub(super) fn set(&self, rate: Option<Rate>) {
        let bucket = rate
            .map(|rate| TokenBucket::new(rate.bytes_per_second, rate.burst_bytes, Instant::now()));
        let mut current = self.lock();
        self.limited.store(bucket.is_some(), Ordering::Release);
        *current = bucket;
    }

    /// How long the next packet has to wait before it is asked again, if it has to.
    pub(super) fn wait(&self) -> Option<Duration> {
        if !self.limited.load(Ordering::Acquire) {
            return None;
        }
        let wait = self.lock().as_mut()?.wait(Instant::now());
        (!wait.is_zero()).then_some(wait.min(LOOK_AGAIN))
    }

    /// A packet of `bytes` went.
    pub(super) fn take(&self, bytes: u64) {
        if self.limited.load(Ordering::Acquire)
            && let Some(bucket) = self.lock().as_mut()
        {
            bucket.take(bytes);
        }
    }

    pub(super) fn is_set(&self) -> bool {
        self.limited.load(Ordering::Acquire)
    }

    fn lock(&self) -> MutexGuard<'_, Option<TokenBucket>> {
        self.bucket.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! What guessing costs: failures are answered late, and only so many can be under way at once.
//!
//! Every failure waits in its own task, so that nobody else waits for it. Sign-ins with a password cost time to
//! check (argon2, PAM) and are worth guessing, so each holds a place of its address while it is checked and while
//! its failure waits; without a free place it is refused unchecked. Tickets and tokens cannot be guessed: theirs
//! are delayed like PVE's, and answered at once when too many wait.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::sync::{Semaphore, SemaphorePermit};

/// How long after its arrival a failed request is answered. PVE's value.
pub const FAILURE_DELAY: Duration = Duration::from_secs(3);

/// Sign-ins under way from one address.
const PER_ADDRESS_MAX: u32 = 8;
/// Sign-ins under way from all addresses together.
const TOTAL_MAX: u32 = 128;
/// Passwords checked at the same time: each takes tens of milliseconds of a processor.
const CHECKS_MAX: usize = 2;

/// The gate before everything that checks credentials.
pub struct Gate {
    /// Sign-ins under way by address. Held for a few instructions only, never over another lock or an await.
    places: Arc<Mutex<HashMap<IpAddr, u32>>>,
    checks: Semaphore,
    delays: Semaphore,
}

impl Default for Gate {
    fn default() -> Self {
        Self {
            places: Arc::default(),
            checks: Semaphore::new(CHECKS_MAX),
            delays: Semaphore::new(TOTAL_MAX as usize),
        }
    }
}

/// A place at the gate; given back when dropped.
pub struct Place {
    places: Arc<Mutex<HashMap<IpAddr, u32>>>,
    address: IpAddr,
}

impl Gate {
    /// A place for a sign-in from `address`, unless too many are under way.
    pub fn place(&self, address: IpAddr) -> Option<Place> {
        let mut places = self.places.lock().unwrap_or_else(|e| e.into_inner());
        let total: u32 = places.values().sum();
        let mine = places.entry(address).or_default();
        if *mine >= PER_ADDRESS_MAX || total >= TOTAL_MAX {
            return None;
        }
        *mine += 1;
        Some(Place {
            places: Arc::clone(&self.places),
            address,
        })
    }

    /// Waits for the right to check one password.
    pub async fn check(&self) -> SemaphorePermit<'_> {
        self.checks
            .acquire()
            .await
            .expect("the semaphore is never closed")
    }

    /// Waits until a failed request that arrived at `arrival` may be answered.
    pub async fn delay(&self, arrival: Instant) {
        if let Ok(_permit) = self.delays.try_acquire() {
            tokio::time::sleep_until((arrival + FAILURE_DELAY).into()).await;
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut places = self.places.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(count) = places.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                places.remove(&self.address);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_address_cannot_take_all_places() {
        let gate = Gate::default();
        let [a, b]: [IpAddr; 2] = [[127, 0, 0, 1].into(), [127, 0, 0, 2].into()];
        let held: Vec<_> = std::iter::from_fn(|| gate.place(a)).collect();
        assert_eq!(held.len(), PER_ADDRESS_MAX as usize);
        assert!(gate.place(b).is_some());
        drop(held);
        assert!(gate.place(a).is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn failures_wait_and_never_for_each_other() {
        let gate = Gate::default();
        let begin = tokio::time::Instant::now();
        let one = || gate.delay(begin.into_std());
        tokio::join!(one(), one(), one());
        assert_eq!(begin.elapsed(), FAILURE_DELAY);
    }
}

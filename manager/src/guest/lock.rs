// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! One lock a guest: whoever changes what a guest is or does holds it for as long as that takes.
//!
//! It lives in this process only. What must outlast a restart (a backup under way) is the config's key `lock`.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::OwnedMutexGuard;

use crate::error::Error;
use crate::id::GuestId;

/// How long a task waits for another one to finish with the same guest: PVE's time.
const PATIENCE: Duration = Duration::from_secs(10);

/// Held while a guest is being changed.
pub type Guard = OwnedMutexGuard<()>;

/// The locks of this node's guests.
#[derive(Debug, Default)]
pub struct Locks {
    /// Innermost lock, held only to look one up.
    guests: Mutex<HashMap<GuestId, Arc<tokio::sync::Mutex<()>>>>,
}

impl Locks {
    /// Takes a guest's lock, or gives up with the text that PVE's clients retry on.
    pub async fn acquire(&self, guest: GuestId) -> Result<Guard, Error> {
        tokio::time::timeout(PATIENCE, self.of(guest).lock_owned())
            .await
            .map_err(|_| {
                Error::refused(format!("can't lock file 'lock-{guest}.conf' - got timeout"))
            })
    }

    /// Takes a guest's lock only when it is free.
    pub fn try_acquire(&self, guest: GuestId) -> Option<Guard> {
        self.of(guest).try_lock_owned().ok()
    }

    /// Whether somebody works on a guest now.
    pub fn is_held(&self, guest: GuestId) -> bool {
        self.try_acquire(guest).is_none()
    }

    fn of(&self, guest: GuestId) -> Arc<tokio::sync::Mutex<()>> {
        let mut guests = self.guests.lock().unwrap_or_else(|e| e.into_inner());
        // Locks that nobody holds or waits for need no entry.
        guests.retain(|id, lock| *id == guest || Arc::strong_count(lock) > 1);
        guests.entry(guest).or_default().clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_second_waits_and_gives_up() {
        let (locks, guest) = (Locks::default(), "100".parse().unwrap());
        let held = locks.acquire(guest).await.unwrap();
        let error = locks.acquire(guest).await.unwrap_err().to_string();
        assert_eq!(error, "can't lock file 'lock-100.conf' - got timeout");
        assert!(locks.try_acquire(guest).is_none());
        drop(locks.acquire("101".parse().unwrap()).await.unwrap());
        drop(held);
        drop(locks.acquire(guest).await.unwrap());
        assert_eq!(locks.guests.lock().unwrap().len(), 1);
    }
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The store's double in memory: for tests and for programs that embed the manager without keeping anything.

use std::sync::Mutex;

use async_trait::async_trait;
use tokio::sync::watch;

use super::replica::Replica;
use super::{ConfigStore, Entry, Revision, StoreError, Write};

/// A store that forgets everything when it is dropped.
#[derive(Debug)]
pub struct MemoryStore {
    replica: Replica,
    /// Held from the check of a transaction to its end, so that transactions follow each other. Outside of the
    /// replica's lock.
    writer: Mutex<()>,
}

impl MemoryStore {
    /// An empty store.
    pub fn new() -> Self {
        Self {
            replica: Replica::new([], Revision(0)),
            writer: Mutex::new(()),
        }
    }
}

impl Default for MemoryStore {
    fn default() -> Self {
        Self::new()
    }
}

#[async_trait]
impl ConfigStore for MemoryStore {
    fn get(&self, key: &str) -> Result<Option<Entry>, StoreError> {
        Ok(self.replica.get(key))
    }

    fn list(&self, prefix: &str) -> Result<Vec<Entry>, StoreError> {
        Ok(self.replica.list(prefix))
    }

    async fn transaction(&self, writes: Vec<Write>) -> Result<Revision, StoreError> {
        let _writer = self.writer.lock().unwrap_or_else(|e| e.into_inner());
        self.replica.check(&writes)?;
        let revision = self.replica.revision();
        if writes.is_empty() {
            return Ok(revision);
        }
        let revision = Revision(revision.0 + 1);
        self.replica.apply(writes, revision);
        Ok(revision)
    }

    async fn barrier(&self) -> Result<Revision, StoreError> {
        Ok(self.replica.revision())
    }

    fn watch(&self) -> watch::Receiver<Revision> {
        self.replica.watch()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::conformance;

    #[tokio::test]
    async fn conforms() {
        conformance::run(|| std::sync::Arc::new(MemoryStore::new())).await;
    }
}

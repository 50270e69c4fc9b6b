// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The store: a small replicated key space with revisions. All configuration lives here, and nothing else does.
//!
//! Keys are the paths of PVE's cluster file system (`nodes/n1/qemu-server/100.conf`, `storage.cfg`), values are
//! the files' bytes, so that a FUSE view needs no translation. Engines: `memory` (tests), `redb` (one node);
//! etcd (a cluster) comes behind the same trait. Every engine passes the conformance suite.
//!
//! Reads come from a replica in memory (`replica`), so a list of 10,000 guests takes milliseconds on any engine.

#[cfg(test)]
mod conformance;
mod memory;
mod redb;
mod replica;

pub use self::memory::MemoryStore;
pub use self::redb::RedbStore;

use async_trait::async_trait;
use bytes::Bytes;

/// Longest key in bytes. Our choice: a Linux file name, several times.
pub const KEY_LENGTH_MAX: usize = 1024;

/// Largest value. PVE's file system takes 1 MiB; etcd must be told to take more than 1.5 MiB.
pub const VALUE_SIZE_MAX: usize = 16 << 20;

/// Number of a write; grows by one a transaction, over the whole store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Revision(pub u64);

/// What a write demands of the key's present state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expect {
    /// Whatever is there.
    Any,
    /// There is no such key.
    Absent,
    /// The key was last written at this revision.
    At(Revision),
}

/// A key with its value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Full key.
    pub key: String,
    /// Its bytes.
    pub value: Bytes,
    /// When it was last written.
    pub revision: Revision,
}

/// One write of a transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Write {
    /// Set a key.
    Put {
        /// Full key.
        key: String,
        /// New bytes.
        value: Bytes,
        /// Demand on the present state.
        expect: Expect,
    },
    /// Remove a key; removing what is not there is no error unless `expect` says so.
    Delete {
        /// Full key.
        key: String,
        /// Demand on the present state.
        expect: Expect,
    },
}

/// Why a store operation did not happen.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A write's `expect` did not hold; nothing was written. Read again and decide anew.
    #[error("{key} was changed by someone else")]
    Conflict {
        /// The first key that did not match.
        key: String,
    },
    /// The transaction itself is wrong, whatever the state: a key that is empty, too long or named twice, or a value
    /// that is too large.
    #[error("{key:?}: {reason}")]
    Invalid {
        /// The key.
        key: String,
        /// What is wrong.
        reason: &'static str,
    },
    /// The store has no quorum: reads go on, writes must wait.
    #[error("the store takes no writes now: {reason}")]
    ReadOnly {
        /// Why.
        reason: String,
    },
    /// The engine failed.
    #[error("store")]
    Engine(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl Write {
    /// Sets a key, whatever is there.
    pub fn put(key: impl Into<String>, value: impl Into<Bytes>) -> Self {
        Self::Put {
            key: key.into(),
            value: value.into(),
            expect: Expect::Any,
        }
    }

    /// Removes a key, whatever is there.
    pub fn delete(key: impl Into<String>) -> Self {
        Self::Delete {
            key: key.into(),
            expect: Expect::Any,
        }
    }

    /// The same with a demand on the present state.
    pub fn expecting(mut self, demand: Expect) -> Self {
        match &mut self {
            Self::Put { expect, .. } | Self::Delete { expect, .. } => *expect = demand,
        }
        self
    }

    /// The key it writes.
    pub fn key(&self) -> &str {
        match self {
            Self::Put { key, .. } | Self::Delete { key, .. } => key,
        }
    }

    fn expect(&self) -> Expect {
        match self {
            Self::Put { expect, .. } | Self::Delete { expect, .. } => *expect,
        }
    }
}

/// The replicated key space.
#[async_trait]
pub trait ConfigStore: Send + Sync + std::fmt::Debug {
    /// Reads one key from the local replica. Does not block on the network.
    fn get(&self, key: &str) -> Result<Option<Entry>, StoreError>;

    /// Reads all keys that begin with `prefix`, in byte order of their keys, from the local replica.
    fn list(&self, prefix: &str) -> Result<Vec<Entry>, StoreError>;

    /// Revision of the newest write that this node's reads see.
    fn revision(&self) -> Revision {
        *self.watch().borrow()
    }

    /// Writes all or nothing; returns once durable and visible to this node's reads. Dropping the future does not
    /// take the writes back. A transaction without writes does nothing.
    async fn transaction(&self, writes: Vec<Write>) -> Result<Revision, StoreError>;

    /// Waits until this node's replica holds everything that was written anywhere before the call.
    async fn barrier(&self) -> Result<Revision, StoreError>;

    /// Wakes after every write; carries no data but the newest revision, and may skip some.
    fn watch(&self) -> tokio::sync::watch::Receiver<Revision>;

    /// Sets one key.
    async fn put(&self, key: &str, value: Bytes, expect: Expect) -> Result<Revision, StoreError> {
        self.transaction(vec![Write::put(key, value).expecting(expect)])
            .await
    }

    /// Removes one key.
    async fn delete(&self, key: &str, expect: Expect) -> Result<Revision, StoreError> {
        self.transaction(vec![Write::delete(key).expecting(expect)])
            .await
    }
}

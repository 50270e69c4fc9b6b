// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The store: a small replicated key space with revisions. All configuration lives here, and nothing else does.
//!
//! Keys are the paths of PVE's cluster file system (`nodes/n1/qemu-server/100.conf`, `storage.cfg`), values are
//! the files' bytes, so that a FUSE view needs no translation. Engines: `memory` (tests), `redb` (one node);
//! etcd (a cluster) comes behind the same trait. Every engine passes the conformance suite.

use async_trait::async_trait;
use bytes::Bytes;

/// Number of a write; grows by one a transaction, over the whole store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
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

/// The replicated key space.
#[async_trait]
pub trait ConfigStore: Send + Sync {
    /// Reads one key from the local replica. Does not block on the network.
    fn get(&self, key: &str) -> Result<Option<Entry>, StoreError>;

    /// Reads all keys that begin with `prefix`, in byte order of their keys, from the local replica.
    fn list(&self, prefix: &str) -> Result<Vec<Entry>, StoreError>;

    /// Writes all or nothing; returns once durable and visible to this node's reads.
    async fn transaction(&self, writes: Vec<Write>) -> Result<Revision, StoreError>;

    /// Waits until this node's replica holds everything that was written anywhere before the call.
    async fn barrier(&self) -> Result<Revision, StoreError>;

    /// Wakes after every write; carries no data but the newest revision, and may skip some.
    fn watch(&self) -> tokio::sync::watch::Receiver<Revision>;

    /// Sets one key.
    async fn put(&self, key: &str, value: Bytes, expect: Expect) -> Result<Revision, StoreError> {
        self.transaction(vec![Write::Put {
            key: key.to_owned(),
            value,
            expect,
        }])
        .await
    }

    /// Removes one key.
    async fn delete(&self, key: &str, expect: Expect) -> Result<Revision, StoreError> {
        self.transaction(vec![Write::Delete {
            key: key.to_owned(),
            expect,
        }])
        .await
    }
}

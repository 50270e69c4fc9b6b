// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The store on a single node: redb, one file, every transaction durable before it is answered.
//!
//! The file is read once, at start; after that reads come from the replica, and redb only takes writes.

use std::path::Path;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use bytes::Bytes;
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use tokio::sync::watch;

use super::replica::Replica;
use super::{ConfigStore, Entry, Revision, StoreError, Write};

/// Key to (revision, value).
const ENTRIES: TableDefinition<'_, &str, (u64, &[u8])> = TableDefinition::new("entries");
/// One row, [`REVISION`]: the newest revision, which deletions raise too.
const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");
const REVISION: &str = "revision";

/// The embedded store.
#[derive(Debug)]
pub struct RedbStore {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    replica: Replica,
    /// Held from the check of a transaction to its end, so that transactions follow each other; only on threads that
    /// may block. Outside of the replica's lock.
    database: Mutex<Database>,
}

impl RedbStore {
    /// Opens the file, or makes an empty one. Blocks; one process at a time can have it open.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let database = Database::create(path).map_err(engine)?;
        restrict(path)?;
        let (entries, revision) = load(&database)?;
        Ok(Self {
            shared: Arc::new(Shared {
                replica: Replica::new(entries, revision),
                database: Mutex::new(database),
            }),
        })
    }
}

#[async_trait]
impl ConfigStore for RedbStore {
    fn get(&self, key: &str) -> Result<Option<Entry>, StoreError> {
        Ok(self.shared.replica.get(key))
    }

    fn list(&self, prefix: &str) -> Result<Vec<Entry>, StoreError> {
        Ok(self.shared.replica.list(prefix))
    }

    async fn transaction(&self, writes: Vec<Write>) -> Result<Revision, StoreError> {
        // The whole transaction runs on a blocking thread: it ends even when the caller goes away in the middle, so
        // that the replica never lacks what the file has.
        let shared = Arc::clone(&self.shared);
        let done = tokio::task::spawn_blocking(move || shared.commit(writes)).await;
        done.map_err(engine)?
    }

    async fn barrier(&self) -> Result<Revision, StoreError> {
        Ok(self.shared.replica.revision())
    }

    fn watch(&self) -> watch::Receiver<Revision> {
        self.shared.replica.watch()
    }
}

impl Shared {
    fn commit(&self, writes: Vec<Write>) -> Result<Revision, StoreError> {
        let database = self.database.lock().unwrap_or_else(|e| e.into_inner());
        self.replica.check(&writes)?;
        let newest = self.replica.revision();
        if writes.is_empty() {
            return Ok(newest);
        }
        let revision = Revision(newest.0 + 1);
        let transaction = database.begin_write().map_err(engine)?;
        {
            let mut entries = transaction.open_table(ENTRIES).map_err(engine)?;
            for write in &writes {
                match write {
                    Write::Put { key, value, .. } => {
                        let row = (revision.0, value.as_ref());
                        entries.insert(key.as_str(), row).map_err(engine)?;
                    }
                    Write::Delete { key, .. } => {
                        entries.remove(key.as_str()).map_err(engine)?;
                    }
                }
            }
            let mut meta = transaction.open_table(META).map_err(engine)?;
            meta.insert(REVISION, revision.0).map_err(engine)?;
        }
        transaction.commit().map_err(engine)?;
        self.replica.apply(writes, revision);
        Ok(revision)
    }
}

/// The file holds password hashes and keys: nobody but its owner may read it.
fn restrict(path: &Path) -> Result<(), StoreError> {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(engine)
}

fn load(database: &Database) -> Result<(Vec<Entry>, Revision), StoreError> {
    let transaction = database.begin_write().map_err(engine)?;
    {
        // Opening a table for writing makes it; the first start would not find one to read.
        transaction.open_table(ENTRIES).map_err(engine)?;
        transaction.open_table(META).map_err(engine)?;
    }
    transaction.commit().map_err(engine)?;
    let transaction = database.begin_read().map_err(engine)?;
    let meta = transaction.open_table(META).map_err(engine)?;
    let revision = meta.get(REVISION).map_err(engine)?.map_or(0, |r| r.value());
    let table = transaction.open_table(ENTRIES).map_err(engine)?;
    let mut entries = Vec::new();
    for row in table.iter().map_err(engine)? {
        let (key, value) = row.map_err(engine)?;
        let (revision, bytes) = value.value();
        entries.push(Entry {
            key: key.value().to_owned(),
            value: Bytes::copy_from_slice(bytes),
            revision: Revision(revision),
        });
    }
    Ok((entries, Revision(revision)))
}

fn engine(error: impl std::error::Error + Send + Sync + 'static) -> StoreError {
    StoreError::Engine(Box::new(error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{Expect, conformance};

    #[tokio::test]
    async fn conforms() {
        let directory = tempfile::tempdir().unwrap();
        let count = std::sync::atomic::AtomicU32::new(0);
        conformance::run(|| {
            let number = count.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            let path = directory.path().join(format!("{number}.redb"));
            Arc::new(RedbStore::open(&path).unwrap())
        })
        .await;
    }

    #[tokio::test]
    async fn a_restart_finds_everything() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s.redb");
        let store = RedbStore::open(&path).unwrap();
        store.put("a", "1".into(), Expect::Any).await.unwrap();
        store.put("b", "2".into(), Expect::Any).await.unwrap();
        let newest = store.delete("b", Expect::Any).await.unwrap();
        drop(store);
        let store = RedbStore::open(&path).unwrap();
        assert_eq!(store.revision(), newest);
        assert_eq!(store.get("a").unwrap().unwrap().revision, Revision(1));
        assert_eq!(store.list("").unwrap().len(), 1);
        use std::os::unix::fs::PermissionsExt;
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[tokio::test]
    async fn a_second_process_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s.redb");
        let _first = RedbStore::open(&path).unwrap();
        assert!(RedbStore::open(&path).is_err());
    }
}

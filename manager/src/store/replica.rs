// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The whole key space in memory, from which every engine answers reads.

use std::collections::{BTreeMap, HashSet};
use std::ops::Bound;
use std::sync::RwLock;

use tokio::sync::watch;

use super::{Entry, Expect, KEY_LENGTH_MAX, Revision, StoreError, VALUE_SIZE_MAX, Write};

/// Entries in key order, and the channel that wakes watchers. Engines apply writes one transaction at a time.
#[derive(Debug)]
pub(super) struct Replica {
    /// Protects the entries. Innermost; held for a lookup or a copy only.
    entries: RwLock<BTreeMap<String, Entry>>,
    revision: watch::Sender<Revision>,
}

impl Replica {
    pub(super) fn new(entries: impl IntoIterator<Item = Entry>, revision: Revision) -> Self {
        let entries = entries.into_iter().map(|e| (e.key.clone(), e)).collect();
        Self {
            entries: RwLock::new(entries),
            revision: watch::Sender::new(revision),
        }
    }

    pub(super) fn get(&self, key: &str) -> Option<Entry> {
        let entries = self.entries.read().unwrap_or_else(|e| e.into_inner());
        entries.get(key).cloned()
    }

    pub(super) fn list(&self, prefix: &str) -> Vec<Entry> {
        let entries = self.entries.read().unwrap_or_else(|e| e.into_inner());
        let from = (Bound::Included(prefix), Bound::Unbounded);
        entries
            .range::<str, _>(from)
            .take_while(|(key, _)| key.starts_with(prefix))
            .map(|(_, entry)| entry.clone())
            .collect()
    }

    pub(super) fn revision(&self) -> Revision {
        *self.revision.borrow()
    }

    pub(super) fn watch(&self) -> watch::Receiver<Revision> {
        self.revision.subscribe()
    }

    /// Whether the writes are well formed and all their demands hold now.
    pub(super) fn check(&self, writes: &[Write]) -> Result<(), StoreError> {
        check_form(writes)?;
        let entries = self.entries.read().unwrap_or_else(|e| e.into_inner());
        for write in writes {
            let present = entries.get(write.key()).map(|entry| entry.revision);
            let holds = match write.expect() {
                Expect::Any => true,
                Expect::Absent => present.is_none(),
                Expect::At(revision) => present == Some(revision),
            };
            if !holds {
                let key = write.key().to_owned();
                return Err(StoreError::Conflict { key });
            }
        }
        Ok(())
    }

    /// Applies checked writes and wakes watchers.
    pub(super) fn apply(&self, writes: Vec<Write>, revision: Revision) {
        let mut entries = self.entries.write().unwrap_or_else(|e| e.into_inner());
        for write in writes {
            match write {
                Write::Put { key, value, .. } => {
                    let entry = Entry {
                        key: key.clone(),
                        value,
                        revision,
                    };
                    entries.insert(key, entry);
                }
                Write::Delete { key, .. } => drop(entries.remove(&key)),
            }
        }
        drop(entries);
        self.revision.send_replace(revision);
    }
}

fn check_form(writes: &[Write]) -> Result<(), StoreError> {
    let mut keys = HashSet::new();
    for write in writes {
        let key = write.key();
        let reason = if key.is_empty() {
            "the key is empty"
        } else if key.len() > KEY_LENGTH_MAX {
            "the key is longer than 1024 bytes"
        } else if !keys.insert(key) {
            "the key is named twice in one transaction"
        } else if matches!(write, Write::Put { value, .. } if value.len() > VALUE_SIZE_MAX) {
            "the value is larger than 16 MiB"
        } else {
            continue;
        };
        let key = key.to_owned();
        return Err(StoreError::Invalid { key, reason });
    }
    Ok(())
}

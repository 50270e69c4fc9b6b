// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Guests' configs in the store: read with their revision, written at it.

use std::sync::Arc;

use super::config::GuestConfig;
use crate::error::Error;
use crate::id::{GuestId, GuestKind, parse_config_key};
use crate::store::{ConfigStore, Expect, Revision, StoreError, Write};

/// A config with the revision that it was read at.
#[derive(Debug, Clone)]
pub struct Stored {
    /// Node that the guest is on.
    pub node: String,
    /// Its number.
    pub id: GuestId,
    /// What the file says.
    pub config: GuestConfig,
    /// When it was written last.
    pub revision: Revision,
}

/// Reads a guest's config.
pub fn load(
    store: &dyn ConfigStore,
    node: &str,
    kind: GuestKind,
    id: GuestId,
) -> Result<Stored, Error> {
    let key = kind.config_key(node, id);
    let entry = store.get(&key)?.ok_or_else(|| does_not_exist(&key))?;
    Ok(Stored {
        node: node.to_owned(),
        id,
        config: GuestConfig::parse(kind, &String::from_utf8_lossy(&entry.value)),
        revision: entry.revision,
    })
}

/// Where a guest is, whatever its kind.
pub fn find(store: &dyn ConfigStore, id: GuestId) -> Result<Option<(String, GuestKind)>, Error> {
    for entry in store.list("nodes/")? {
        if let Some((node, kind, found)) = parse_config_key(&entry.key)
            && found == id
        {
            return Ok(Some((node.to_owned(), kind)));
        }
    }
    Ok(None)
}

/// Refuses a number that a guest of either kind on any node has.
pub fn refuse_taken(store: &dyn ConfigStore, id: GuestId) -> Result<(), Error> {
    match find(store, id)? {
        Some((node, kind)) => Err(already_exists(kind, id, &node)),
        None => Ok(()),
    }
}

/// Writes a new guest's config. Refuses a number that any guest has; two that come at the same time for one number
/// cannot both win, of whatever kind they are.
pub async fn create(
    store: &Arc<dyn ConfigStore>,
    node: &str,
    id: GuestId,
    config: &GuestConfig,
) -> Result<Revision, Error> {
    if let Some((_, kind)) = find(store.as_ref(), id)? {
        return Err(already_exists(kind, id, node));
    }
    let writes = GuestKind::ALL.map(|kind| {
        let key = kind.config_key(node, id);
        let write = if kind == config.kind {
            Write::put(key, config.print())
        } else {
            Write::delete(key)
        };
        write.expecting(Expect::Absent)
    });
    match store.transaction(writes.into()).await {
        Err(StoreError::Conflict { key }) => {
            let kind = parse_config_key(&key).map_or(config.kind, |(_, kind, _)| kind);
            Err(already_exists(kind, id, node))
        }
        result => Ok(result?),
    }
}

impl Stored {
    /// Writes the config; fails when somebody else has written it since it was read.
    pub async fn save(&mut self, store: &Arc<dyn ConfigStore>) -> Result<(), Error> {
        let key = self.config.kind.config_key(&self.node, self.id);
        let text = self.config.print();
        let expect = Expect::At(self.revision);
        self.revision = store.put(&key, text.clone().into(), expect).await?;
        self.config.digest = GuestConfig::parse(self.config.kind, &text).digest;
        Ok(())
    }

    /// Removes the config; fails when somebody else has written it since it was read.
    pub async fn delete(&self, store: &Arc<dyn ConfigStore>) -> Result<(), Error> {
        let key = self.config.kind.config_key(&self.node, self.id);
        store.delete(&key, Expect::At(self.revision)).await?;
        Ok(())
    }
}

/// PVE's text for a guest that is not there; every client matches on it.
fn does_not_exist(key: &str) -> Error {
    Error::refused(format!("Configuration file '{key}' does not exist"))
}

fn already_exists(kind: GuestKind, id: GuestId, node: &str) -> Error {
    let title = kind.title();
    Error::refused(format!(
        "unable to create {title} {id} - {title} {id} already exists on node '{node}'"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::MemoryStore;

    fn id() -> GuestId {
        "100".parse().unwrap()
    }

    #[tokio::test]
    async fn a_config_is_made_changed_and_removed() {
        let store: Arc<dyn ConfigStore> = Arc::new(MemoryStore::new());
        let absent = load(store.as_ref(), "n1", GuestKind::Vm, id()).unwrap_err();
        assert_eq!(
            absent.to_string(),
            "Configuration file 'nodes/n1/qemu-server/100.conf' does not exist"
        );
        let mut config = GuestConfig::new(GuestKind::Vm);
        config.set("cores", "2");
        create(&store, "n1", id(), &config).await.unwrap();
        let mut first = load(store.as_ref(), "n1", GuestKind::Vm, id()).unwrap();
        let mut second = first.clone();
        first.config.set("cores", "3");
        first.save(&store).await.unwrap();
        first.config.set("cores", "4");
        first.save(&store).await.unwrap();
        assert_eq!(
            second.save(&store).await.unwrap_err().to_string(),
            crate::error::MODIFIED
        );
        let read = load(store.as_ref(), "n1", GuestKind::Vm, id()).unwrap();
        assert_eq!(read.config.digest, first.config.digest);
        assert!(second.delete(&store).await.is_err());
        first.delete(&store).await.unwrap();
        assert_eq!(find(store.as_ref(), id()).unwrap(), None);
    }

    #[tokio::test]
    async fn a_number_is_given_once() {
        let store: Arc<dyn ConfigStore> = Arc::new(MemoryStore::new());
        let mut tasks = tokio::task::JoinSet::new();
        for index in 0..8 {
            let store = Arc::clone(&store);
            let config = GuestConfig::new(GuestKind::ALL[index % 2]);
            tasks.spawn(async move { create(&store, "n1", id(), &config).await });
        }
        let results = tasks.join_all().await;
        assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 1);
        let refused = results
            .into_iter()
            .find_map(Result::err)
            .unwrap()
            .to_string();
        assert!(refused.contains("100 already exists"), "{refused}");
    }
}

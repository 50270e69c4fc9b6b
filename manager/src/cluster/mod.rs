// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! What concerns all nodes: options of the datacenter, free numbers for guests, and the inventory of guests.

mod inventory;
mod options;

use std::sync::Arc;

pub use inventory::{GuestSummary, Inventory};
pub use options::OPTIONS;

use crate::error::Error;
use crate::id::GuestId;
use crate::store::ConfigStore;
use inventory::Cache;

/// The datacenter; cheap to clone.
#[derive(Debug, Clone)]
pub struct Cluster {
    store: Arc<dyn ConfigStore>,
    cache: Arc<Cache>,
}

impl Cluster {
    /// The datacenter that a store describes.
    pub fn new(store: Arc<dyn ConfigStore>) -> Self {
        Self {
            store,
            cache: Arc::default(),
        }
    }

    /// Every guest of every node, as the configs say; cheap when nothing has changed.
    pub fn guests(&self) -> Result<Arc<Inventory>, Error> {
        self.cache.refresh(self.store.as_ref())
    }

    /// The smallest number that no guest has, in the range that the options allow.
    pub fn next_id(&self) -> Result<GuestId, Error> {
        let (lower, upper) = self.id_range()?;
        let guests = self.guests()?;
        let free = (lower..upper)
            .filter_map(|number| GuestId::try_from(number).ok())
            .find(|id| guests.find(*id).is_none());
        free.ok_or_else(|| {
            Error::refused(format!(
                "unable to get any free VMID in range [{lower}, {upper}]"
            ))
        })
    }

    /// Refuses a number that a guest has, in the words that clients match on.
    pub fn check_free(&self, id: GuestId) -> Result<(), Error> {
        match self.guests()?.find(id) {
            None => Ok(()),
            Some(_) => Err(Error::invalid("vmid", format!("VM {id} already exists"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{MemoryStore, Write};

    async fn cluster(guests: std::ops::Range<u32>) -> Cluster {
        let store = Arc::new(MemoryStore::new());
        let write = |id: u32| {
            let kind = crate::id::GuestKind::ALL[usize::from(id.is_multiple_of(2))];
            let text = format!(
                "{}: g{id}\nmemory: 2048\ncores: 2\n",
                ["name", "hostname"][usize::from(id.is_multiple_of(2))]
            );
            Write::put(kind.config_key("n1", GuestId::try_from(id).unwrap()), text)
        };
        store
            .transaction(guests.map(write).collect())
            .await
            .unwrap();
        Cluster::new(store)
    }

    #[tokio::test]
    async fn numbers_are_free_until_somebody_takes_them() {
        let cluster = cluster(100..103).await;
        assert_eq!(cluster.next_id().unwrap().to_string(), "103");
        let taken = cluster.check_free("101".parse().unwrap()).unwrap_err();
        assert!(matches!(taken, Error::Invalid(e) if e[0].1 == "VM 101 already exists"));
        let range =
            std::collections::BTreeMap::from([("next-id".to_owned(), "lower=5000".to_owned())]);
        cluster.set_options(range, &[], None).await.unwrap();
        assert_eq!(cluster.next_id().unwrap().to_string(), "5000");
    }

    #[tokio::test]
    async fn the_inventory_follows_the_store() {
        let cluster = cluster(100..110).await;
        let before = cluster.guests().unwrap();
        assert_eq!(before.guests.len(), 10);
        let row = before.find("101".parse().unwrap()).unwrap();
        assert_eq!(
            (row.name.as_str(), row.memory_bytes, row.cpus),
            ("g101", 2048 << 20, 2.0)
        );
        assert!(
            Arc::ptr_eq(&before, &cluster.guests().unwrap()),
            "nothing changed, nothing made"
        );
        let key = row.kind.config_key("n1", row.id);
        cluster
            .store
            .put(
                &key,
                "name: new\nlock: backup\n".into(),
                crate::store::Expect::Any,
            )
            .await
            .unwrap();
        cluster
            .store
            .delete("nodes/n1/lxc/100.conf", crate::store::Expect::Any)
            .await
            .unwrap();
        let after = cluster.guests().unwrap();
        assert_eq!(after.guests.len(), 9);
        let row = after.find("101".parse().unwrap()).unwrap();
        assert_eq!(
            (row.name.as_str(), row.lock.as_deref()),
            ("new", Some("backup"))
        );
        assert!(Arc::ptr_eq(
            after.find("102".parse().unwrap()).unwrap(),
            before.find("102".parse().unwrap()).unwrap()
        ));
    }
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Changing `storage.cfg`: adding, changing and taking out storages. Volumes are never touched by it.
//!
//! Called by the API; every change is one write that fails when somebody else was faster.

use std::collections::BTreeMap;

use bytes::Bytes;

use super::section::{self, Section};
use super::{CONFIG_KEY, PLUGINS, Storages, name};
use crate::error::{Error, MODIFIED};
use crate::schema::{Format, Kind, Param, format, split_list};
use crate::store::Expect;

/// Types that a storage can have: the words of [`PLUGINS`], as a route's parameter needs them.
pub const TYPES: &[&str] = &["dir"];

/// Folder of a directory storage.
pub const PATH: Param = Param::new(
    "path",
    Kind::Text { length_max: 4096 },
    "Folder on the node, for type dir.",
);

/// What the storage may hold.
pub const CONTENT: Param = Param::new(
    "content",
    Kind::Format(Format {
        name: "pve-storage-content-list",
        check: check_contents,
    }),
    "What the storage may hold: images, rootdir, vztmpl, iso, snippets, backup.",
);

/// Nodes that have it.
pub const NODES: Param = Param::new(
    "nodes",
    Kind::Format(Format {
        name: "pve-node-list",
        check: |text| split_list(text).try_for_each(|node| (format::NODE.check)(node)),
    }),
    "Nodes that may use the storage; all when not given.",
);

/// Switched off.
pub const DISABLE: Param = Param::new("disable", Kind::Boolean, "Switch the storage off.");

/// The same volumes on every node.
pub const SHARED: Param = Param::new(
    "shared",
    Kind::Boolean,
    "The storage has the same volumes on every node.",
);

/// A change to one section.
#[derive(Debug, Clone, Default)]
pub struct Change {
    /// Keys to set.
    pub set: BTreeMap<String, String>,
    /// Keys to take out.
    pub delete: Vec<String>,
    /// Digest of the file as the caller read it.
    pub digest: Option<String>,
}

/// What is wrong with a list of contents.
pub fn check_contents(text: &str) -> Result<(), String> {
    let unknown = split_list(text).find(|word| word.parse::<name::Content>().is_err());
    unknown.map_or(Ok(()), |word| Err(format!("unknown content type '{word}'")))
}

impl Storages {
    /// Digest of the whole configuration, for callers who want to change what they have read.
    pub fn digest(&self) -> Result<String, Error> {
        let entry = self.store.get(CONFIG_KEY)?;
        Ok(digest(entry.as_ref().map_or(&[], |entry| &entry.value)))
    }

    /// Adds a storage.
    pub async fn create(&self, new: Section) -> Result<(), Error> {
        let plugin = PLUGINS.iter().find(|plugin| plugin.kind == new.kind);
        let plugin = plugin.ok_or_else(|| {
            Error::invalid(
                "type",
                format!("storage type '{}' is not supported", new.kind),
            )
        })?;
        if let Some(missing) = plugin
            .keys
            .iter()
            .find(|key| key.required && !new.keys.contains_key(key.name))
        {
            return Err(Error::invalid(missing.name, crate::schema::MISSING));
        }
        // What the plugin cannot open is not worth writing down.
        drop((plugin.open)(&new)?);
        self.edit(None, |sections| {
            if sections.iter().any(|section| section.name == new.name) {
                return Err(Error::refused(format!(
                    "storage ID '{}' already defined",
                    new.name
                )));
            }
            sections.push(new.clone());
            Ok(())
        })
        .await
    }

    /// Changes a storage's keys. Where its volumes are stays as it is.
    pub async fn update(&self, name: &name::StorageName, change: Change) -> Result<(), Error> {
        for key in change.delete.iter().chain(change.set.keys()) {
            let fixed = PLUGINS
                .iter()
                .flat_map(|plugin| plugin.keys)
                .any(|param| param.name == key);
            if fixed {
                return Err(Error::invalid(key, "can't change value of fixed parameter"));
            }
        }
        self.edit(change.digest.as_deref(), |sections| {
            let section = sections.iter_mut().find(|section| section.name == *name);
            let section = section.ok_or_else(|| not_there(name))?;
            section.keys.retain(|key, _| !change.delete.contains(key));
            section.keys.extend(change.set.clone());
            Ok(())
        })
        .await
    }

    /// Takes a storage out of the configuration.
    pub async fn remove(&self, name: &name::StorageName) -> Result<(), Error> {
        self.edit(None, |sections| {
            let before = sections.len();
            sections.retain(|section| section.name != *name);
            match sections.len() < before {
                true => Ok(()),
                false => Err(not_there(name)),
            }
        })
        .await
    }

    async fn edit(
        &self,
        expected: Option<&str>,
        change: impl Fn(&mut Vec<Section>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let entry = self.store.get(CONFIG_KEY)?;
        let (text, expect) = match &entry {
            Some(entry) => (
                String::from_utf8_lossy(&entry.value).into_owned(),
                Expect::At(entry.revision),
            ),
            None => (String::new(), Expect::Absent),
        };
        if expected.is_some_and(|expected| expected != digest(text.as_bytes())) {
            return Err(Error::refused(MODIFIED));
        }
        let mut sections =
            section::parse(&text).map_err(|error| Error::refused(error.to_string()))?;
        change(&mut sections)?;
        let text = Bytes::from(section::print(&sections));
        self.store.put(CONFIG_KEY, text, expect).await?;
        Ok(())
    }
}

fn not_there(name: &name::StorageName) -> Error {
    Error::refused(format!("storage '{name}' does not exist"))
}

/// SHA-1 in hexadecimal digits, as PVE's digests are; it guards against mistakes, not against malice.
fn digest(bytes: &[u8]) -> String {
    let hash = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA1_FOR_LEGACY_USE_ONLY, bytes);
    hash.as_ref()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::store::MemoryStore;

    fn storages() -> Storages {
        Storages::new(Arc::new(MemoryStore::default()), "n1")
    }

    fn section(name: &str) -> Section {
        Section {
            kind: "dir".to_owned(),
            name: name.parse().unwrap(),
            keys: [("path".to_owned(), format!("/srv/{name}"))].into(),
        }
    }

    #[test]
    fn types_are_the_plugins() {
        let kinds: Vec<&str> = PLUGINS.iter().map(|plugin| plugin.kind).collect();
        assert_eq!(kinds, TYPES);
    }

    #[tokio::test]
    async fn storages_come_change_and_go() {
        let storages = storages();
        storages.create(section("a1")).await.unwrap();
        let again = storages.create(section("a1")).await.unwrap_err();
        assert_eq!(again.to_string(), "storage ID 'a1' already defined");
        let name = "a1".parse().unwrap();
        let digest = storages.digest().unwrap();
        let change = |digest: &str| Change {
            set: [("content".to_owned(), "iso".to_owned())].into(),
            digest: Some(digest.to_owned()),
            ..Change::default()
        };
        storages.update(&name, change(&digest)).await.unwrap();
        let stale = storages.update(&name, change(&digest)).await.unwrap_err();
        assert_eq!(stale.to_string(), MODIFIED);
        assert_eq!(storages.section(&name).unwrap().keys["content"], "iso");
        storages.remove(&name).await.unwrap();
        assert!(storages.remove(&name).await.is_err());
    }

    #[tokio::test]
    async fn what_cannot_work_is_not_written() {
        let storages = storages();
        let mut relative = section("a1");
        relative.keys.insert("path".to_owned(), "srv".to_owned());
        assert!(storages.create(relative).await.is_err());
        let mut bare = section("a1");
        bare.keys.clear();
        assert!(storages.create(bare).await.is_err());
        assert!(storages.sections().unwrap().is_empty());
    }
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Storage: places for volumes. This file is the trait, the table of plugins and the handle that finds a storage
//! by its name; a plugin is one file beside it and one row here.
//!
//! Callers: guests' task steps (disks), the API (content, upload, download).

pub mod checksum;
pub mod configure;
pub mod convert;
pub mod copy;
pub mod dir;
pub mod download;
pub mod fetch;
pub mod incoming;
pub mod name;
mod pace;
pub mod section;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use atoll_disk::Format;
use bytes::Bytes;

use crate::error::Error;
use crate::id::GuestId;
use crate::schema::Param;
use crate::storage::convert::Image;
use crate::storage::incoming::Incoming;
use crate::storage::name::{Content, StorageName, VolumeId, VolumeName};
use crate::storage::section::Section;
use crate::store::{ConfigStore, Expect};
use crate::task::TaskContext;

/// Key of the storages' configuration in the store.
const CONFIG_KEY: &str = "storage.cfg";

/// Unit of `st_blocks`, whatever the file system's block size: stat(2).
pub const STAT_BLOCK_BYTES: u64 = 512;

/// Every plugin that there is.
pub const PLUGINS: &[Plugin] = &[dir::PLUGIN];

/// A row of [`PLUGINS`]: one way to store volumes.
#[derive(Debug, Clone, Copy)]
pub struct Plugin {
    /// Its word in `storage.cfg`.
    pub kind: &'static str,
    /// Content types that it can hold.
    pub contents: &'static [Content],
    /// Keys of its own; those of every storage are in [`KEYS`].
    pub keys: &'static [Param],
    /// Makes a storage from its section.
    pub open: fn(&Section) -> Result<Arc<dyn Storage>, Error>,
}

/// One volume of a listing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Volume {
    /// Its name.
    pub name: VolumeName,
    /// Size that a guest sees, or of the file, in bytes.
    pub size_bytes: u64,
    /// Space that it takes now, in bytes.
    pub used_bytes: u64,
    /// Last change of its inode, seconds since 1970.
    pub changed_at: i64,
}

/// Space of a storage, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Space {
    /// All of it.
    pub total_bytes: u64,
    /// Taken.
    pub used_bytes: u64,
    /// What can still be taken.
    pub available_bytes: u64,
}

/// A place for volumes. Every method may wait for a slow device, but not for ever: a plugin has its own deadlines.
#[async_trait]
pub trait Storage: Send + Sync {
    /// Where the volume is on this node. It exists, and nothing on the way is a symbolic link.
    async fn path(&self, volume: &VolumeName) -> Result<PathBuf, Error>;

    /// All volumes.
    async fn list(&self) -> Result<Vec<Volume>, Error>;

    /// Space of the storage.
    async fn space(&self) -> Result<Space, Error>;

    /// Size of a volume: of the disk in an image, of the file otherwise.
    async fn size_bytes(&self, volume: &VolumeName) -> Result<u64, Error>;

    /// Makes a new, empty disk for a guest, under the first free number.
    async fn allocate(
        &self,
        guest: GuestId,
        size_bytes: u64,
        format: Format,
    ) -> Result<VolumeName, Error>;

    /// Makes a raw disk of this very name; one that is there already is an error.
    async fn allocate_as(&self, volume: &VolumeName, size_bytes: u64) -> Result<(), Error>;

    /// Grows a disk; shrinking is refused.
    async fn resize(&self, volume: &VolumeName, size_bytes: u64) -> Result<(), Error>;

    /// Removes a volume. Removing what is not there is no error.
    async fn free(&self, volume: &VolumeName) -> Result<(), Error>;

    /// Keeps what a disk holds now under the name of a snapshot. Nobody writes to the disk meanwhile.
    async fn snapshot(
        &self,
        volume: &VolumeName,
        snapshot: &str,
        task: &TaskContext,
    ) -> Result<(), Error>;

    /// Where what a disk held at a snapshot is on this node. It exists; nobody may write to it.
    async fn snapshot_path(&self, volume: &VolumeName, snapshot: &str) -> Result<PathBuf, Error>;

    /// Makes a disk again what it was at a snapshot, which stays. Nobody has the disk open.
    async fn roll_back(
        &self,
        volume: &VolumeName,
        snapshot: &str,
        task: &TaskContext,
    ) -> Result<(), Error>;

    /// Removes what was kept of a disk for a snapshot. Removing what is not there is no error.
    async fn free_snapshot(&self, volume: &VolumeName, snapshot: &str) -> Result<(), Error>;

    /// Prepares the arrival of a file; it appears under its name when [`Incoming::commit`] is called.
    async fn receive(&self, volume: &VolumeName) -> Result<Incoming, Error>;

    /// The same for one that may have been begun: what has come of it before is in it. Only one at a time has it.
    async fn receive_rest(&self, volume: &VolumeName) -> Result<Incoming, Error>;
}

/// A configured storage with its state, for listings.
#[derive(Debug, Clone)]
pub struct Status {
    /// Its configuration.
    pub section: Section,
    /// What it may hold.
    pub contents: Vec<Content>,
    /// Not switched off.
    pub enabled: bool,
    /// Its space; absent when the storage does not answer.
    pub space: Option<Space>,
}

/// All storages that this node may use.
#[derive(Debug, Clone)]
pub struct Storages {
    store: Arc<dyn ConfigStore>,
    node: String,
}

impl Storages {
    /// The storages of a node, as configured in the store.
    pub fn new(store: Arc<dyn ConfigStore>, node: impl Into<String>) -> Self {
        Self {
            store,
            node: node.into(),
        }
    }

    /// Writes the configuration of a fresh node, one directory storage `local`, unless there is one already.
    pub async fn ensure_local(&self, path: &Path) -> Result<(), Error> {
        if self.store.get(CONFIG_KEY)?.is_some() {
            return Ok(());
        }
        let contents: Vec<&str> = Content::ALL
            .iter()
            .map(|content| content.as_str())
            .collect();
        let section = Section {
            kind: "dir".to_owned(),
            name: "local".parse().expect("'local' is a storage name"),
            keys: [
                ("path".to_owned(), path.to_string_lossy().into_owned()),
                ("content".to_owned(), contents.join(",")),
            ]
            .into(),
        };
        let text = section::print(&[section]);
        self.store
            .put(CONFIG_KEY, Bytes::from(text), Expect::Absent)
            .await?;
        Ok(())
    }

    /// Every storage of the configuration, whether this node may use it or not.
    pub fn sections(&self) -> Result<Vec<Section>, Error> {
        let Some(entry) = self.store.get(CONFIG_KEY)? else {
            return Ok(Vec::new());
        };
        let text = String::from_utf8_lossy(&entry.value);
        section::parse(&text).map_err(|error| Error::Refused(error.to_string()))
    }

    /// One storage's configuration.
    pub fn section(&self, name: &StorageName) -> Result<Section, Error> {
        self.sections()?
            .into_iter()
            .find(|section| section.name == *name)
            .ok_or_else(|| Error::Refused(format!("storage '{name}' does not exist")))
    }

    /// A storage that this node may use now.
    pub fn open(&self, name: &StorageName) -> Result<Arc<dyn Storage>, Error> {
        let section = self.section(name)?;
        if !self.is_enabled(&section) {
            return Err(Error::Refused(format!(
                "storage '{name}' is not available on node '{}'",
                self.node
            )));
        }
        let plugin = PLUGINS
            .iter()
            .find(|plugin| plugin.kind == section.kind)
            .ok_or_else(|| {
                Error::Refused(format!(
                    "storage '{name}': type '{}' is not supported",
                    section.kind
                ))
            })?;
        (plugin.open)(&section)
    }

    /// A storage that may hold this content.
    pub fn open_for(
        &self,
        name: &StorageName,
        content: Content,
    ) -> Result<Arc<dyn Storage>, Error> {
        if !contents(&self.section(name)?).contains(&content) {
            return Err(Error::Refused(format!(
                "storage '{name}' does not support content-type '{content}'"
            )));
        }
        self.open(name)
    }

    /// Where a volume is on this node.
    pub async fn path(&self, volume: &VolumeId) -> Result<PathBuf, Error> {
        self.open(&volume.storage)?.path(&volume.name).await
    }

    /// Size of a volume in bytes.
    pub async fn size_bytes(&self, volume: &VolumeId) -> Result<u64, Error> {
        self.open(&volume.storage)?.size_bytes(&volume.name).await
    }

    /// A volume as something to import a disk from.
    pub async fn image(&self, volume: &VolumeId) -> Result<Image, Error> {
        let path = self.path(volume).await?;
        let format = match (volume.name.content(), volume.name.image_format()) {
            (Content::Images | Content::Import, Some(format)) => format,
            (Content::Iso, _) => return Image::uploaded(path),
            _ => {
                return Err(Error::refused(format!(
                    "'{volume}' is not a disk image of format raw or qcow2: convert it before \
                     (qemu-img convert -O qcow2)"
                )));
            }
        };
        Ok(Image { path, format })
    }

    /// State of every storage of this node. One that does not answer has no space, and holds nobody up: each
    /// plugin gives up after its deadline.
    pub async fn status(&self) -> Result<Vec<Status>, Error> {
        let mut rows = Vec::new();
        for section in self.sections()? {
            rows.push(self.status_of(section).await);
        }
        Ok(rows)
    }

    /// State of one storage.
    pub async fn status_of(&self, section: Section) -> Status {
        let enabled = self.is_enabled(&section);
        let space = match self.open(&section.name) {
            Ok(storage) => storage.space().await.ok(),
            Err(_) => None,
        };
        Status {
            contents: contents(&section),
            enabled,
            space,
            section,
        }
    }

    /// Whether the configuration lets this node use it.
    pub fn is_enabled(&self, section: &Section) -> bool {
        let off = section
            .keys
            .get("disable")
            .is_some_and(|value| value != "0");
        let here = section.keys.get("nodes").is_none_or(|nodes| {
            nodes
                .split([',', ';', ' '])
                .any(|node| node == self.node.as_str())
        });
        !off && here
    }
}

/// What a storage may hold: its `content` key, limited to what its plugin can do.
pub fn contents(section: &Section) -> Vec<Content> {
    let possible = PLUGINS
        .iter()
        .find(|plugin| plugin.kind == section.kind)
        .map_or(&[][..], |plugin| plugin.contents);
    match section.keys.get("content") {
        Some(words) => words
            .split([',', ';', ' '])
            .filter_map(|word| word.parse().ok())
            .filter(|content| possible.contains(content))
            .collect(),
        None => possible.to_vec(),
    }
}

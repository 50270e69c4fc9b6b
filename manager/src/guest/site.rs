// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! What the guests of one node stand on: its folders and programs, the store with their configs, storage, locks.
//!
//! Task tables hold it in their contexts; it knows no kind of guest in particular.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::Error;
use crate::guest::config::GuestConfig;
use crate::guest::container::health::Healths;
use crate::guest::lock::{Guard, Locks};
use crate::guest::stored::{self, Stored};
use crate::guest::update;
use crate::id::{GuestId, GuestKind, parse_config_key};
use crate::oci::Images;
use crate::settings::Settings;
use crate::storage::Storages;
use crate::store::{ConfigStore, Expect};

/// See the module.
#[derive(Debug)]
pub struct Site {
    /// Where things are on this host.
    pub settings: Settings,
    /// Configs of all guests.
    pub store: Arc<dyn ConfigStore>,
    /// Their volumes.
    pub storage: Storages,
    /// OCI images of containers.
    pub images: Images,
    /// Whether containers work.
    pub health: Healths,
    /// Who works on which guest.
    pub locks: Locks,
    /// Who talks to which guest's agent.
    pub agents: Locks,
}

/// One guest on a site: what the steps of most tables work on.
#[derive(Debug, Clone)]
pub struct Seat {
    /// The node.
    pub site: Arc<Site>,
    /// VM or container.
    pub kind: GuestKind,
    /// Which one.
    pub id: GuestId,
}

impl Site {
    /// One of its guests, whether it exists or not.
    pub fn seat(self: &Arc<Self>, kind: GuestKind, id: GuestId) -> Seat {
        Seat {
            site: self.clone(),
            kind,
            id,
        }
    }

    /// Every guest whose config is on this node.
    pub fn guests(&self) -> Result<Vec<(GuestKind, GuestId)>, Error> {
        let prefix = format!("nodes/{}/", self.settings.node);
        let entries = self.store.list(&prefix)?;
        let guests = entries.iter().filter_map(|entry| {
            let (_, kind, id) = parse_config_key(&entry.key)?;
            Some((kind, id))
        });
        Ok(guests.collect())
    }

    /// Guests that have a folder of a run, or a state of the runtime, whether they have a config or not: all that run
    /// are among them.
    pub fn run_folders(&self) -> BTreeSet<(GuestKind, GuestId)> {
        let guest_of = |name: &str| {
            let (kind, id) = name.split_once('-')?;
            let kind = match kind {
                "vm" => GuestKind::Vm,
                "ct" => GuestKind::Container,
                _ => return None,
            };
            Some((kind, id.parse().ok()?))
        };
        let folders = [self.settings.run_dir(), self.containers_folder()];
        let entries = folders
            .into_iter()
            .flat_map(std::fs::read_dir)
            .flatten()
            .flatten();
        let names = entries.map(|entry| entry.file_name());
        names.filter_map(|name| guest_of(name.to_str()?)).collect()
    }

    /// Path of one of our programs.
    pub fn program(&self, name: &str) -> PathBuf {
        self.settings.bin_dir.join(name)
    }

    /// Root folder of `atoll-ct`, which has a folder for every container below it.
    pub fn containers_folder(&self) -> PathBuf {
        self.settings.run_dir().join("ct")
    }
}

impl Seat {
    /// Folder of what belongs to the guest's present run: sockets, spec or bundle, log.
    pub fn run_folder(&self) -> PathBuf {
        self.site.settings.run_dir().join(self.name())
    }

    /// Short name in paths and control groups: `vm-100`, `ct-101`.
    pub fn name(&self) -> String {
        match self.kind {
            GuestKind::Vm => format!("vm-{}", self.id),
            GuestKind::Container => format!("ct-{}", self.id),
        }
    }

    /// What error texts call it: `VM 100`.
    pub fn title(&self) -> String {
        format!("{} {}", self.kind.title(), self.id)
    }

    /// Takes its lock.
    pub async fn lock(&self) -> Result<Guard, Error> {
        self.site.locks.acquire(self.id).await
    }

    /// Its config as it is in the store.
    pub fn config(&self) -> Result<GuestConfig, Error> {
        Ok(self.stored()?.config)
    }

    /// Its config, ready to be changed.
    pub fn stored(&self) -> Result<Stored, Error> {
        let node = &self.site.settings.node;
        stored::load(self.site.store.as_ref(), node, self.kind, self.id)
    }

    /// Its config, refused when something holds the guest for longer than a task (key `lock`).
    pub fn unlocked(&self) -> Result<Stored, Error> {
        let stored = self.stored()?;
        match stored.config.get("lock") {
            Some(reason) => Err(Error::refused(format!(
                "{} is locked ({reason})",
                self.kind.title()
            ))),
            None => Ok(stored),
        }
    }

    /// The same, with the changes that waited for this start made current.
    pub async fn settled(&self) -> Result<GuestConfig, Error> {
        let mut stored = self.unlocked()?;
        if !stored.config.pending.is_empty() {
            let applied = stored.config.apply_pending();
            update::keep_volumes(&mut stored.config, &applied);
            stored.save(&self.site.store).await?;
        }
        Ok(stored.config)
    }

    /// Removes its config; removing what is not there is no error.
    pub async fn delete_config(&self) -> Result<(), Error> {
        let key = self.kind.config_key(&self.site.settings.node, self.id);
        self.site.store.delete(&key, Expect::Any).await?;
        Ok(())
    }

    /// Makes the run folder, empty.
    pub async fn make_run_folder(&self) -> Result<(), Error> {
        self.remove_run_folder().await?;
        let folder = self.run_folder();
        tokio::fs::create_dir_all(&folder)
            .await
            .map_err(|e| Error::failed(format!("make {}", folder.display()), e))
    }

    /// Removes the run folder, if there is one. Nothing may be mounted in it any more.
    pub async fn remove_run_folder(&self) -> Result<(), Error> {
        remove_folder(&self.run_folder()).await
    }
}

/// Removes a folder with all that is in it; removing what is not there is no error.
pub async fn remove_folder(folder: &Path) -> Result<(), Error> {
    match tokio::fs::remove_dir_all(folder).await {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::failed(format!("remove {}", folder.display()), e))
        }
        _ => Ok(()),
    }
}

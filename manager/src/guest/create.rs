// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! What creating a VM and creating a container have in common: a number that nobody else has, disks, a config.

use std::collections::{BTreeMap, BTreeSet};

use crate::error::Error;
use crate::guest::config::{ConfigUpdate, GuestConfig};
use crate::guest::lock::Guard;
use crate::guest::site::Seat;
use crate::guest::{disks, hardware, stored};
use crate::storage::name::VolumeId;
use crate::task::TaskContext;

/// What is asked for: config keys and the parameters of the creation itself, validated by their schema.
pub type Params = BTreeMap<String, String>;

/// A guest that is coming into being.
#[derive(Debug)]
pub struct Draft {
    /// Where.
    pub seat: Seat,
    /// Config keys as asked for.
    pub keys: Params,
    /// Raw lines of a container.
    pub raw: Vec<(String, String)>,
    /// Disks that were made for it.
    pub new_volumes: Vec<VolumeId>,
    guard: Option<Guard>,
    reserved: bool,
}

impl Draft {
    /// A draft with these config keys, which are checked by their table.
    pub fn new(seat: Seat, keys: Params) -> Result<Self, Error> {
        let none = BTreeSet::new();
        let update = ConfigUpdate::new(seat.kind, keys, none.clone(), none, None)?;
        Ok(Self {
            seat,
            keys: update.set,
            raw: Vec::new(),
            new_volumes: Vec::new(),
            guard: None,
            reserved: false,
        })
    }

    /// Takes the guest's lock and its number: a config with nothing but `lock: create`.
    pub async fn reserve(&mut self) -> Result<(), Error> {
        self.guard = Some(self.seat.lock().await?);
        let mut config = GuestConfig::new(self.seat.kind);
        config.set("lock", "create");
        let (site, id) = (&self.seat.site, self.seat.id);
        stored::create(&site.store, &site.settings.node, id, &config).await?;
        self.reserved = true;
        Ok(())
    }

    /// Gives the number back.
    pub async fn unreserve(&mut self) -> Result<(), Error> {
        if std::mem::take(&mut self.reserved) {
            self.seat.delete_config().await?;
        }
        Ok(())
    }

    /// Makes or finds the volume of every disk.
    pub async fn allocate(&mut self, task: &TaskContext) -> Result<(), Error> {
        let kind = self.seat.kind;
        for (key, value) in &mut self.keys {
            if !disks::is_disk(kind, key) {
                continue;
            }
            let (stored, new) = disks::provide(&self.seat, key, value, Some(task)).await?;
            if let Some(volume) = new {
                task.log(&format!("{key}: created volume {volume}"));
                self.new_volumes.push(volume);
            }
            *value = stored;
        }
        Ok(())
    }

    /// Removes the volumes again.
    pub async fn free(&mut self) -> Result<(), Error> {
        for volume in self.new_volumes.drain(..) {
            disks::free_own(&self.seat, &volume).await?;
        }
        Ok(())
    }

    /// Writes the config in place of the reservation.
    pub async fn write_config(&mut self) -> Result<(), Error> {
        let mut stored = self.seat.stored()?;
        stored.config.unset("lock");
        for (key, value) in &self.keys {
            stored.config.set(key, value);
        }
        stored.config.current.raw.append(&mut self.raw);
        hardware::complete(&mut stored.config);
        stored.save(&self.seat.site.store).await
    }
}

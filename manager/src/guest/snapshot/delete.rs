// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Tasks `qmdelsnapshot` and `vzdelsnapshot`.

use super::{find, locked_by};
use crate::error::Error;
use crate::guest::disks;
use crate::guest::lock::Guard;
use crate::guest::site::Seat;
use crate::guest::vm::saved;
use crate::step;
use crate::storage::name::VolumeId;
use crate::task::{TaskContext, TaskStep};

/// Value of the config's `lock` meanwhile. It stays after a failure; deleting again is what helps.
const LOCK: &str = "snapshot-delete";

/// What the steps hand on.
#[derive(Debug)]
pub struct Delete {
    seat: Seat,
    name: String,
    guard: Option<Guard>,
    volumes: Vec<VolumeId>,
    memory: Option<VolumeId>,
}

impl Delete {
    /// The end of a snapshot.
    pub fn new(seat: Seat, name: String) -> Self {
        Self {
            seat,
            name,
            guard: None,
            volumes: Vec::new(),
            memory: None,
        }
    }
}

/// The table. There is no way back from the second step on; each step can be done again.
pub const STEPS: &[TaskStep<Delete>] = &[
    step!("lock the configuration", lock),
    step!("remove copies", remove),
    step!("write the configuration", write_config),
];

async fn lock(delete: &mut Delete, _: &TaskContext) -> Result<(), Error> {
    delete.guard = Some(delete.seat.lock().await?);
    let mut stored = locked_by(&delete.seat, LOCK)?;
    let section = find(&stored.config, &delete.name)?;
    delete.memory = saved::of(&section.values);
    delete.volumes = disks::own_volumes(&delete.seat, &section.values)
        .into_iter()
        .map(|(_, volume)| volume)
        .collect();
    stored.config.set("lock", LOCK);
    stored.save(&delete.seat.site.store).await
}

async fn remove(delete: &mut Delete, _: &TaskContext) -> Result<(), Error> {
    for volume in &delete.volumes {
        let storage = delete.seat.site.storage.open(&volume.storage)?;
        storage.free_snapshot(&volume.name, &delete.name).await?;
    }
    saved::free(&delete.seat, delete.memory.as_ref()).await
}

async fn write_config(delete: &mut Delete, _: &TaskContext) -> Result<(), Error> {
    let mut stored = delete.seat.stored()?;
    let config = &mut stored.config;
    let gone = config.sections.remove(&delete.name).unwrap_or_default();
    // Whoever descended from it descends from where it came from.
    let parent = gone.values.get("parent");
    let others = config.sections.values_mut();
    for section in others.chain([&mut config.current]) {
        if section.values.get("parent") == Some(&delete.name) {
            match parent {
                Some(parent) => {
                    drop(section.values.insert("parent".to_owned(), parent.clone()));
                }
                None => drop(section.values.remove("parent")),
            }
        }
    }
    config.unset("lock");
    stored.save(&delete.seat.site.store).await
}

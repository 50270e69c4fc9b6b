// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Tasks `qmrollback` and `vzrollback`: a guest becomes again what it was. What it has done since is lost.

use std::collections::BTreeSet;

use super::{OWN_KEYS, PRESENT_KEYS, find, locked_by};
use crate::error::Error;
use crate::guest::config::{ConfigUpdate, Reach, Section};
use crate::guest::lock::Guard;
use crate::guest::site::Seat;
use crate::guest::vm::saved;
use crate::guest::{disks, guest, hardware, update};
use crate::step;
use crate::storage::name::VolumeId;
use crate::task::{TaskContext, TaskStep};

/// Value of the config's `lock` meanwhile. It stays after a failure, since the disks are no guest's then; going back
/// again is what helps.
const LOCK: &str = "rollback";

/// What the steps hand on.
#[derive(Debug)]
pub struct RollBack {
    seat: Seat,
    name: String,
    guard: Option<Guard>,
    section: Section,
}

impl RollBack {
    /// The guest on this seat, back to that snapshot.
    pub fn new(seat: Seat, name: String) -> Self {
        Self {
            seat,
            name,
            guard: None,
            section: Section::default(),
        }
    }

    /// The volume of the memory that the guest is to go on with, once the snapshot was found.
    pub fn memory(&self) -> Option<VolumeId> {
        saved::of(&self.section.values)
    }
}

/// The table. There is no way back from the second step on; each step can be done again.
pub const STEPS: &[TaskStep<RollBack>] = &[
    step!("find the snapshot", look),
    step!("end the guest", end),
    step!("lock the configuration", lock),
    step!("copy disks back", copy_back),
    step!("write the configuration", write_config),
];

async fn look(back: &mut RollBack, _: &TaskContext) -> Result<(), Error> {
    back.guard = Some(back.seat.lock().await?);
    let stored = locked_by(&back.seat, LOCK)?;
    back.section = find(&stored.config, &back.name)?.clone();
    if let Some(state) = back.section.values.get("snapstate") {
        return Err(Error::refused(format!(
            "unable to rollback to incomplete snapshot (snapstate = {state})"
        )));
    }
    if stored.config.is_set("template") {
        return Err(Error::refused("templates have no snapshots to go back to"));
    }
    // All that is needed is there before anything is given up.
    for (_, volume) in disks::own_volumes(&back.seat, &back.section.values) {
        let storage = back.seat.site.storage.open(&volume.storage)?;
        storage.snapshot_path(&volume.name, &back.name).await?;
    }
    if let Some(volume) = back.memory() {
        back.seat.site.storage.path(&volume).await?;
    }
    Ok(())
}

async fn end(back: &mut RollBack, task: &TaskContext) -> Result<(), Error> {
    let guest = guest(&back.seat);
    guest.end(task).await?;
    guest.clean_up().await
}

async fn lock(back: &mut RollBack, _: &TaskContext) -> Result<(), Error> {
    let mut stored = locked_by(&back.seat, LOCK)?;
    stored.config.set("lock", LOCK);
    stored.save(&back.seat.site.store).await
}

async fn copy_back(back: &mut RollBack, task: &TaskContext) -> Result<(), Error> {
    for (key, volume) in disks::own_volumes(&back.seat, &back.section.values) {
        let storage = back.seat.site.storage.open(&volume.storage)?;
        task.log(&format!("{key}: {volume} as it was"));
        storage.roll_back(&volume.name, &back.name, task).await?;
    }
    Ok(())
}

async fn write_config(back: &mut RollBack, _: &TaskContext) -> Result<(), Error> {
    let mut stored = back.seat.stored()?;
    let config = &mut stored.config;
    let is_guests = |key: &str| !OWN_KEYS.contains(&key) && !PRESENT_KEYS.contains(&key);
    let kept = back.section.values.iter();
    let wanted: std::collections::BTreeMap<String, String> = kept
        .filter(|(key, _)| is_guests(key))
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect();
    let gone = config.current.values.keys();
    let gone = gone.filter(|key| is_guests(key) && !key.starts_with("unused"));
    let gone: BTreeSet<String> = gone
        .filter(|key| !wanted.contains_key(*key))
        .cloned()
        .collect();
    let change = ConfigUpdate {
        set: wanted,
        delete: gone,
        ..ConfigUpdate::default()
    };
    // A disk that came after the snapshot stays as an unused one.
    let applied = config.apply(&change, Reach::Everything)?;
    update::keep_volumes(config, &applied);
    config.current.raw.clone_from(&back.section.raw);
    config.pending = Default::default();
    hardware::renew_generation(config);
    config.set("parent", &back.name);
    config.unset("lock");
    // What was unused and is a disk again now is not unused any more.
    let used: BTreeSet<String> = disks::own_volumes(&back.seat, &config.current.values)
        .into_iter()
        .map(|(_, volume)| volume.to_string())
        .collect();
    config
        .current
        .values
        .retain(|key, value| !key.starts_with("unused") || !used.contains(value));
    stored.save(&back.seat.site.store).await
}

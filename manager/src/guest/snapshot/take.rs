// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Tasks `qmsnapshot` and `vzsnapshot`.
//!
//! ```text
//! held:  memory begins to be written ─► disks are copied ─► the guest goes on
//!        of the moment of the hold   ────────────────────────────────────────► all of it is there
//! ```
//! A machine that cannot run meanwhile (`saved::begin`) is held until its memory is written.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use super::{PRESENT_KEYS, check_name, set_description};
use crate::error::Error;
use crate::guest::config::Section;
use crate::guest::hold::Hold;
use crate::guest::lock::Guard;
use crate::guest::site::Seat;
use crate::guest::vm::{Vm, saved};
use crate::guest::{disks, guest};
use crate::id::GuestKind;
use crate::step;
use crate::storage::name::VolumeId;
use crate::task::{TaskContext, TaskStep};

/// Value of the config's `lock` meanwhile.
pub const LOCK: &str = "snapshot";
/// Value of the snapshot's `snapstate` meanwhile.
pub const PREPARING: &str = "prepare";

/// What the steps hand on.
#[derive(Debug)]
pub struct Take {
    seat: Seat,
    name: String,
    description: String,
    /// The memory, too, if the guest is a machine that runs.
    with_memory: bool,
    guard: Option<Guard>,
    hold: Hold,
    held_at: Option<Instant>,
    noted: bool,
    memory: Option<VolumeId>,
    writing: Option<saved::Writing>,
    volumes: Vec<VolumeId>,
}

impl Take {
    /// A snapshot of the guest on this seat.
    pub fn new(seat: Seat, name: String, description: String) -> Self {
        Self {
            seat,
            name,
            description,
            with_memory: false,
            guard: None,
            hold: Hold::default(),
            held_at: None,
            noted: false,
            memory: None,
            writing: None,
            volumes: Vec::new(),
        }
    }

    /// The same with the memory, when the machine runs.
    pub fn with_memory(mut self) -> Self {
        self.with_memory = true;
        self
    }
}

/// The table.
pub const STEPS: &[TaskStep<Take>] = &[
    step!("note the snapshot", note, undo forget),
    step!("hold the guest", hold, undo release),
    step!("begin to write the memory", begin_memory, undo remove_memory),
    step!("copy disks", copy, undo remove),
    step!("let the guest go on", release),
    step!("write the rest of the memory", finish_memory),
    step!("write the configuration", write_config),
];

async fn note(take: &mut Take, _: &TaskContext) -> Result<(), Error> {
    check_name(&take.name)?;
    take.guard = Some(take.seat.lock().await?);
    let mut stored = take.seat.unlocked()?;
    let config = &mut stored.config;
    if config.is_set("template") {
        return Err(Error::refused(format!(
            "unable to create snapshot: {} is a template",
            take.seat.title()
        )));
    }
    if config.sections.contains_key(&take.name) {
        let name = &take.name;
        return Err(Error::refused(format!(
            "snapshot name '{name}' already used"
        )));
    }
    let mut section = Section {
        raw: config.current.raw.clone(),
        ..Section::default()
    };
    let kept = config.current.values.iter();
    let kept = kept.filter(|(key, _)| !PRESENT_KEYS.contains(&key.as_str()));
    section
        .values
        .extend(kept.map(|(key, value)| (key.clone(), value.clone())));
    set_description(&mut section, &take.description);
    section
        .values
        .insert("snapstate".to_owned(), PREPARING.to_owned());
    take.volumes = disks::own_volumes(&take.seat, &section.values)
        .into_iter()
        .map(|(_, volume)| volume)
        .collect();
    let is_machine = take.seat.kind == GuestKind::Vm;
    if take.with_memory && is_machine && guest(&take.seat).process().is_some() {
        let volume = saved::volume(&take.seat, &section.values, None, &take.name)?;
        section
            .values
            .insert(saved::KEY.to_owned(), volume.to_string());
        take.memory = Some(volume);
    }
    config.sections.insert(take.name.clone(), section);
    config.set("lock", LOCK);
    stored.save(&take.seat.site.store).await?;
    take.noted = true;
    Ok(())
}

async fn forget(take: &mut Take, _: &TaskContext) -> Result<(), Error> {
    if !std::mem::take(&mut take.noted) {
        return Ok(());
    }
    let mut stored = take.seat.stored()?;
    let section = stored.config.sections.remove(&take.name);
    match section.and_then(|section| section.values.get("parent").cloned()) {
        Some(parent) => stored.config.set("parent", parent),
        None => drop(stored.config.unset("parent")),
    }
    stored.config.unset("lock");
    stored.save(&take.seat.site.store).await
}

async fn hold(take: &mut Take, task: &TaskContext) -> Result<(), Error> {
    take.held_at = Some(Instant::now());
    take.hold.take(&take.seat, task).await
}

async fn release(take: &mut Take, task: &TaskContext) -> Result<(), Error> {
    let held_at = take.held_at.take().filter(|_| take.hold.is_taken());
    take.hold.release(&take.seat).await?;
    if let Some(held_at) = held_at {
        let ms = held_at.elapsed().as_millis();
        task.log(&format!("the guest goes on, after {ms} ms"));
    }
    Ok(())
}

async fn begin_memory(take: &mut Take, task: &TaskContext) -> Result<(), Error> {
    if let Some(volume) = &take.memory {
        let vm = Vm::new(take.seat.clone());
        take.writing = Some(saved::begin(&vm, volume, task).await?);
    }
    Ok(())
}

async fn finish_memory(take: &mut Take, task: &TaskContext) -> Result<(), Error> {
    match take.writing.take() {
        Some(writing) => saved::finish(&Vm::new(take.seat.clone()), writing, task).await,
        None => Ok(()),
    }
}

async fn remove_memory(take: &mut Take, _: &TaskContext) -> Result<(), Error> {
    saved::give_up(&take.seat, take.memory.as_ref()).await
}

async fn copy(take: &mut Take, task: &TaskContext) -> Result<(), Error> {
    for volume in &take.volumes {
        let storage = take.seat.site.storage.open(&volume.storage)?;
        task.log(&format!("copying {volume}"));
        storage.snapshot(&volume.name, &take.name, task).await?;
    }
    Ok(())
}

async fn remove(take: &mut Take, _: &TaskContext) -> Result<(), Error> {
    for volume in &take.volumes {
        let storage = take.seat.site.storage.open(&volume.storage)?;
        storage.free_snapshot(&volume.name, &take.name).await?;
    }
    Ok(())
}

async fn write_config(take: &mut Take, _: &TaskContext) -> Result<(), Error> {
    let mut stored = take.seat.stored()?;
    let config = &mut stored.config;
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let now = now.map_or(0, |since| since.as_secs());
    let section = config.sections.entry(take.name.clone()).or_default();
    section.values.remove("snapstate");
    section
        .values
        .insert("snaptime".to_owned(), now.to_string());
    config.set("parent", &take.name);
    config.unset("lock");
    stored.save(&take.seat.site.store).await
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Task `qmsuspend`: a machine's memory goes to a volume, and its process ends; the next start goes on from there.
//!
//! ```text
//! lock: suspending ─► held ─► volume written ─► lock: suspended ─► process ends
//! ```
//! Until the config says `suspended` the machine is what counts, and goes on after a failure; from then on the volume
//! is, and the machine only has to end. So the end is no step of the table: nothing may undo what was before it.

use super::{Vm, saved};
use crate::error::Error;
use crate::guest::Guest as _;
use crate::guest::hold::Hold;
use crate::guest::lock::Guard;
use crate::guest::site::Seat;
use crate::step;
use crate::storage::name::{StorageName, VolumeId};
use crate::task::{TaskContext, TaskStep, run_steps};

/// Value of the config's `lock` until the volume is complete.
pub const LOCK: &str = "suspending";
/// What the volume is called: of a date there can be one only.
const NAME: &str = "suspend";

/// What the steps hand on.
#[derive(Debug)]
pub struct Suspend {
    seat: Seat,
    storage: Option<StorageName>,
    guard: Option<Guard>,
    hold: Hold,
    volume: Option<VolumeId>,
}

impl Suspend {
    /// The machine on this seat, into a volume on `storage`, or where its config says.
    pub fn new(seat: Seat, storage: Option<StorageName>) -> Self {
        Self {
            seat,
            storage,
            guard: None,
            hold: Hold::default(),
            volume: None,
        }
    }
}

/// The table.
pub const STEPS: &[TaskStep<Suspend>] = &[
    step!("note the suspension", note, undo forget),
    step!("hold the guest", hold, undo release),
    step!("write the memory", write, undo remove),
    step!("write the configuration", write_config),
];

/// The table, then the end of the machine.
pub async fn run(mut suspend: Suspend, task: &TaskContext) -> Result<(), Error> {
    run_steps(STEPS, &mut suspend, task).await?;
    let vm = Vm::new(suspend.seat.clone());
    vm.end(task).await?;
    vm.clean_up().await
}

async fn note(suspend: &mut Suspend, _: &TaskContext) -> Result<(), Error> {
    suspend.guard = Some(suspend.seat.lock().await?);
    let seat = &suspend.seat;
    let mut stored = seat.unlocked()?;
    if Vm::new(seat.clone()).process().is_none() {
        return Err(Error::refused(format!("{} not running", seat.title())));
    }
    // Of a start whose daemon was killed at its end.
    saved::remove_folder(seat).await?;
    let storage = suspend.storage.clone();
    let volume = saved::volume(seat, &stored.config.current.values, storage, NAME)?;
    stored.config.set("lock", LOCK);
    stored.config.set(saved::KEY, volume.to_string());
    stored.save(&seat.site.store).await?;
    suspend.volume = Some(volume);
    Ok(())
}

async fn forget(suspend: &mut Suspend, _: &TaskContext) -> Result<(), Error> {
    if suspend.volume.is_none() {
        return Ok(());
    }
    let mut stored = suspend.seat.stored()?;
    stored.config.unset("lock");
    stored.config.unset(saved::KEY);
    stored.save(&suspend.seat.site.store).await
}

async fn hold(suspend: &mut Suspend, task: &TaskContext) -> Result<(), Error> {
    suspend.hold.take(&suspend.seat, task).await
}

async fn release(suspend: &mut Suspend, _: &TaskContext) -> Result<(), Error> {
    suspend.hold.release(&suspend.seat).await
}

async fn write(suspend: &mut Suspend, task: &TaskContext) -> Result<(), Error> {
    let Some(volume) = &suspend.volume else {
        return Ok(());
    };
    let vm = Vm::new(suspend.seat.clone());
    // As if the guest were to go on: so the machine tells how far it is, and can be told to stop. It stays held.
    let writing = saved::begin(&vm, volume, task).await?;
    saved::finish(&vm, writing, task).await
}

async fn remove(suspend: &mut Suspend, _: &TaskContext) -> Result<(), Error> {
    saved::give_up(&suspend.seat, suspend.volume.as_ref()).await
}

async fn write_config(suspend: &mut Suspend, _: &TaskContext) -> Result<(), Error> {
    let mut stored = suspend.seat.stored()?;
    stored.config.set("lock", saved::SUSPENDED);
    stored.save(&suspend.seat.site.store).await
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The end of snapshots that a daemon was taking when it was killed, and of suspensions to disk: the guest goes on, and
//! what there is of them is removed. A task `qmdelsnapshot` or `vzdelsnapshot` that the reconciler starts with the
//! next daemon.

use super::locked_by;
use super::take::{LOCK, PREPARING};
use crate::error::Error;
use crate::guest::disks;
use crate::guest::hold::Hold;
use crate::guest::lock::Guard;
use crate::guest::site::Seat;
use crate::guest::stored::Stored;
use crate::guest::vm::{saved, suspend};
use crate::step;
use crate::task::{TaskContext, TaskStep};

/// What the steps hand on.
#[derive(Debug)]
pub struct Abandon {
    seat: Seat,
    guard: Option<Guard>,
}

impl Abandon {
    /// The end of what is unfinished on this seat.
    pub fn new(seat: Seat) -> Self {
        Self { seat, guard: None }
    }
}

/// The table. There is no way back; each step can be done again.
pub const STEPS: &[TaskStep<Abandon>] = &[
    step!("let the guest go on", release),
    step!("remove copies", remove),
    step!("write the configuration", write_config),
];

async fn release(abandon: &mut Abandon, task: &TaskContext) -> Result<(), Error> {
    abandon.guard = Some(abandon.seat.lock().await?);
    cut_off(&abandon.seat)?;
    task.log("atolld ended while it was taking a snapshot of this guest, or suspending it");
    let mut hold = Hold::left(&abandon.seat);
    if hold.is_taken() {
        hold.release(&abandon.seat).await?;
        task.log("the guest was held, and goes on");
    }
    Ok(())
}

async fn remove(abandon: &mut Abandon, task: &TaskContext) -> Result<(), Error> {
    let stored = abandon.seat.stored()?;
    for name in unfinished(&stored) {
        task.log(&format!("removing what there is of snapshot '{name}'"));
        let values = &stored.config.sections[&name].values;
        for (_, volume) in disks::own_volumes(&abandon.seat, values) {
            let storage = abandon.seat.site.storage.open(&volume.storage)?;
            storage.free_snapshot(&volume.name, &name).await?;
        }
        saved::give_up(&abandon.seat, saved::of(values).as_ref()).await?;
    }
    let suspended = saved::of(&stored.config.current.values);
    saved::give_up(&abandon.seat, suspended.as_ref()).await
}

async fn write_config(abandon: &mut Abandon, _: &TaskContext) -> Result<(), Error> {
    let mut stored = abandon.seat.stored()?;
    for name in unfinished(&stored) {
        stored.config.sections.remove(&name);
    }
    stored.config.unset("lock");
    stored.config.unset(saved::KEY);
    stored.save(&abandon.seat.site.store).await
}

/// The config of a guest whose lock is of one of the tasks that end here, or nobody's any more.
fn cut_off(seat: &Seat) -> Result<Stored, Error> {
    locked_by(seat, LOCK).or_else(|_| locked_by(seat, suspend::LOCK))
}

/// Names of the snapshots that were being taken.
fn unfinished(stored: &Stored) -> Vec<String> {
    let sections = stored.config.sections.iter();
    let state = |values: &std::collections::BTreeMap<String, String>| {
        values.get("snapstate").map(String::as_str) == Some(PREPARING)
    };
    sections
        .filter(|(_, section)| state(&section.values))
        .map(|(name, _)| name.clone())
        .collect()
}

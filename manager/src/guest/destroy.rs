// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Tasks `qmdestroy` and `vzdestroy`. What fails half way leaves the config, so that it can be asked for again.

use crate::error::Error;
use crate::guest::config::GuestConfig;
use crate::guest::container::image;
use crate::guest::lock::Guard;
use crate::guest::site::Seat;
use crate::guest::{Ask, Phase, disks, guest, stop};
use crate::id::GuestKind;
use crate::step;
use crate::storage::name::VolumeId;
use crate::task::{TaskContext, TaskStep};

/// What the steps hand on.
#[derive(Debug)]
pub struct Destroy {
    seat: Seat,
    force: bool,
    guard: Option<Guard>,
    config: Option<GuestConfig>,
}

impl Destroy {
    /// The end of the guest on this seat; a running one is only stopped when `force` is set.
    pub fn new(seat: Seat, force: bool) -> Self {
        Self {
            seat,
            force,
            guard: None,
            config: None,
        }
    }
}

/// The table. There is no way back from the second step on, so it has no undos: each step can be done again.
pub const STEPS: &[TaskStep<Destroy>] = &[
    step!("check the guest", check),
    step!("clean up", clean_up),
    step!("free volumes", free),
    step!("remove the configuration", remove_config),
];

async fn check(destroy: &mut Destroy, task: &TaskContext) -> Result<(), Error> {
    let seat = destroy.seat.clone();
    let running = |seat: &Seat| matches!(guest(seat).phase(), Phase::Running { .. });
    // A guest that stays is not stopped first.
    removable(&seat, &seat.config()?)?;
    if destroy.force && running(&seat) {
        stop(&seat, Ask::default(), task).await?;
    }
    destroy.guard = Some(seat.lock().await?);
    let config = seat.unlocked()?.config;
    removable(&seat, &config)?;
    if running(&seat) {
        return Err(Error::refused(format!(
            "unable to destroy {} - {} is running",
            seat.title(),
            seat.kind.title()
        )));
    }
    destroy.config = Some(config);
    Ok(())
}

/// Refused when the guest is protected.
fn removable(seat: &Seat, config: &GuestConfig) -> Result<(), Error> {
    match config.is_set("protection") {
        true => Err(Error::refused(format!(
            "can't remove {} - protection mode enabled",
            seat.title()
        ))),
        false => Ok(()),
    }
}

async fn clean_up(destroy: &mut Destroy, _: &TaskContext) -> Result<(), Error> {
    guest(&destroy.seat).clean_up().await
}

async fn free(destroy: &mut Destroy, task: &TaskContext) -> Result<(), Error> {
    let Some(config) = &destroy.config else {
        return Ok(());
    };
    let pending = config.pending.values.iter();
    // A disk that was taken out since is only named by snapshots.
    let snapshots = config.sections.values().flat_map(|section| &section.values);
    let all = config.current.values.iter().chain(pending).chain(snapshots);
    for (key, value) in all {
        if !disks::holds_volume(destroy.seat.kind, key) {
            continue;
        }
        if let Ok(volume) = disks::volume_of(value).parse::<VolumeId>() {
            task.log(&format!("removing volume {volume}"));
            disks::free_own(&destroy.seat, &volume).await?;
        }
    }
    Ok(())
}

async fn remove_config(destroy: &mut Destroy, task: &TaskContext) -> Result<(), Error> {
    destroy.seat.delete_config().await?;
    // The guest is gone whether its image goes or not; the next one that goes takes it along.
    if destroy.seat.kind == GuestKind::Container
        && let Err(error) = image::prune(&destroy.seat.site).await
    {
        task.warn(&format!("images stay: {}", error.chain()));
    }
    Ok(())
}

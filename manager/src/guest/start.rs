// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! What the tasks `qmstart` and `vzstart` have in common: their context and their first step. The tables are in
//! `vm::start` and `container::start`.

use crate::error::Error;
use crate::guest::config::GuestConfig;
use crate::guest::lock::Guard;
use crate::guest::site::Seat;
use crate::guest::vm::saved;
use crate::guest::{Phase, guest};
use crate::id::GuestKind;
use crate::storage::name::VolumeId;
use crate::task::TaskContext;

/// What the steps hand on; `M` is what one kind of guest makes on the way.
#[derive(Debug)]
pub struct Start<M> {
    /// The guest.
    pub seat: Seat,
    /// What was made so far: a machine's spec, a container's process.
    pub made: Option<M>,
    /// The volume of the saved state that a machine goes on from.
    pub saved: Option<VolumeId>,
    guard: Option<Guard>,
    config: Option<GuestConfig>,
}

impl<M> Start<M> {
    /// A start of the guest on this seat.
    pub fn new(seat: Seat) -> Self {
        Self {
            seat,
            made: None,
            saved: None,
            guard: None,
            config: None,
        }
    }

    /// A start that goes on from a snapshot's state.
    pub fn from_saved(seat: Seat, saved: Option<VolumeId>) -> Self {
        Self {
            saved,
            ..Self::new(seat)
        }
    }

    /// The config that it starts with. An error before the first step.
    pub fn config(&self) -> Result<&GuestConfig, Error> {
        let config = self.config.as_ref();
        config.ok_or_else(|| Error::refused("the configuration was not read"))
    }
}

/// The config and the saved state of a machine that is suspended to disk.
fn suspended(seat: &Seat) -> Result<Option<(GuestConfig, VolumeId)>, Error> {
    let config = seat.config()?;
    if config.get("lock") != Some(saved::SUSPENDED) {
        return Ok(None);
    }
    let volume = saved::of(&config.current.values);
    let volume = volume.ok_or_else(|| {
        let title = seat.title();
        Error::refused(format!(
            "{title} is suspended, but its config names no saved memory: unlock it to start afresh"
        ))
    })?;
    Ok(Some((config, volume)))
}

/// The first step: takes the guest's lock, makes pending changes current, and removes what its last run left.
pub async fn read_config<M>(start: &mut Start<M>, _: &TaskContext) -> Result<(), Error> {
    start.guard = Some(start.seat.lock().await?);
    let config = match suspended(&start.seat)? {
        // As it was when it was suspended: what is pending waits for a start from nothing.
        Some((config, saved)) => {
            start.saved = Some(saved);
            config
        }
        None => start.seat.settled().await?,
    };
    let guest = guest(&start.seat);
    match guest.phase() {
        Phase::Running { .. } => {
            return Err(Error::refused(format!(
                "{} already running",
                start.seat.title()
            )));
        }
        Phase::Ended => guest.clean_up().await?,
        Phase::Stopped => {}
    }
    if config.is_set("template") {
        return Err(Error::refused(match start.seat.kind {
            GuestKind::Vm => "you can't start a vm if it's a template",
            GuestKind::Container => "you can't start a CT if it's a template",
        }));
    }
    start.config = Some(config);
    Ok(())
}

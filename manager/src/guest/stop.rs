// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Tasks `qmstop`, `vzstop`, `qmshutdown` and `vzshutdown`: one table to end a guest, one to ask it to end itself. What
//! differs between machines and containers is behind [`Guest`].

use std::time::Instant;

use crate::error::Error;
use crate::guest::lock::Guard;
use crate::guest::site::Seat;
use crate::guest::{Ask, Guest, Phase, guest, hook};
use crate::id::GuestKind;
use crate::step;
use crate::task::{TaskContext, TaskStep};

/// What the steps hand on.
#[derive(Debug)]
pub struct Stop {
    seat: Seat,
    ask: Ask,
    guard: Option<Guard>,
}

impl Stop {
    /// An end of the guest on this seat.
    pub fn new(seat: Seat, ask: Ask) -> Self {
        Self {
            seat,
            ask,
            guard: None,
        }
    }

    fn guest(&self) -> Box<dyn Guest> {
        guest(&self.seat)
    }
}

/// Ends a guest at once, like pulling the plug.
pub const STOP: &[TaskStep<Stop>] = &[
    step!("lock the guest", lock),
    step!("end the guest", end),
    step!("clean up", clean_up),
];

/// Asks a guest to power off and waits; the lock is not held meanwhile, so that a stop can overtake.
pub const SHUTDOWN: &[TaskStep<Stop>] = &[
    step!("ask the guest to power off", ask),
    step!("wait for the guest", wait),
    step!("lock the guest", lock),
    step!("clean up", clean_up),
];

async fn lock(stop: &mut Stop, _: &TaskContext) -> Result<(), Error> {
    stop.guard = Some(stop.seat.lock().await?);
    stop.seat.config()?;
    Ok(())
}

async fn end(stop: &mut Stop, task: &TaskContext) -> Result<(), Error> {
    if stop.guest().process().is_some() {
        hook::run(&stop.seat, &stop.seat.config()?, hook::PRE_STOP, task).await;
    }
    stop.guest().end(task).await
}

async fn ask(stop: &mut Stop, task: &TaskContext) -> Result<(), Error> {
    let _guard = stop.seat.lock().await?;
    let config = stop.seat.unlocked()?.config;
    let guest = stop.guest();
    if guest.process().is_none() {
        return Err(Error::refused(format!("{} not running", stop.seat.title())));
    }
    hook::run(&stop.seat, &config, hook::PRE_STOP, task).await;
    if guest.is_paused().await {
        guest.resume().await?;
    }
    guest.power_off(task).await
}

async fn wait(stop: &mut Stop, task: &TaskContext) -> Result<(), Error> {
    let Some(process) = stop.guest().process() else {
        return Ok(());
    };
    let deadline = Instant::now() + stop.ask.timeout;
    let ended = task
        .until_cancelled(async { Ok(process.ended_before(deadline).await) })
        .await?;
    if ended {
        return Ok(());
    }
    if !stop.ask.force {
        return Err(Error::refused(match stop.seat.kind {
            GuestKind::Vm => "VM quit/powerdown failed - got timeout",
            GuestKind::Container => "container did not stop - got timeout",
        }));
    }
    task.log("the guest did not power off in time, ending it");
    let _guard = stop.seat.lock().await?;
    stop.guest().end(task).await
}

async fn clean_up(stop: &mut Stop, _: &TaskContext) -> Result<(), Error> {
    // Meanwhile it may have been started again by somebody else.
    let guest = stop.guest();
    match guest.phase() {
        Phase::Ended => guest.clean_up().await,
        Phase::Running { .. } | Phase::Stopped => Ok(()),
    }
}

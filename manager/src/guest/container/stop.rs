// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Tasks `vzstop` and `vzshutdown`.

use std::time::Instant;

use crate::error::Error;
use crate::guest::container::Container;
use crate::guest::lock::Guard;
use crate::guest::site::Seat;
use crate::guest::{Ask, Guest, Phase};
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
    /// An end of the container on this seat.
    pub fn new(seat: Seat, ask: Ask) -> Self {
        Self {
            seat,
            ask,
            guard: None,
        }
    }

    fn container(&self) -> Container {
        Container::new(self.seat.clone())
    }
}

/// Kills every process of the container.
pub const STOP: &[TaskStep<Stop>] = &[
    step!("lock the guest", lock),
    step!("end the container", end),
];

/// Asks init to power off and waits; the lock is not held meanwhile, so that a stop can overtake.
pub const SHUTDOWN: &[TaskStep<Stop>] = &[
    step!("ask init to power off", ask),
    step!("wait for the container", wait),
    step!("lock the guest", lock),
    step!("clean up", clean_up),
];

async fn lock(stop: &mut Stop, _: &TaskContext) -> Result<(), Error> {
    stop.guard = Some(stop.seat.lock().await?);
    stop.seat.config()?;
    Ok(())
}

async fn end(stop: &mut Stop, _: &TaskContext) -> Result<(), Error> {
    // The runtime kills, thaws and collects whatever there is.
    stop.container().clean_up().await
}

async fn ask(stop: &mut Stop, task: &TaskContext) -> Result<(), Error> {
    let _guard = stop.seat.lock().await?;
    stop.seat.unlocked()?;
    let container = stop.container();
    if container.process().is_none() {
        return Err(Error::refused(format!("{} not running", stop.seat.title())));
    }
    if container.is_paused().await {
        container.command(&["resume"], &[]).await?;
    }
    let signal = tokio::fs::read_to_string(container.halt_file()).await;
    let signal = signal.unwrap_or_else(|_| "SIGPWR".to_owned());
    task.log(&format!("sending {signal} to init"));
    container.command(&["kill"], &[&signal]).await?;
    Ok(())
}

async fn wait(stop: &mut Stop, task: &TaskContext) -> Result<(), Error> {
    let Some(process) = stop.container().process() else {
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
        return Err(Error::refused("container did not stop - got timeout"));
    }
    task.log("init did not power off in time, killing the container");
    let _guard = stop.seat.lock().await?;
    stop.container().clean_up().await
}

async fn clean_up(stop: &mut Stop, _: &TaskContext) -> Result<(), Error> {
    // Meanwhile it may have been started again by somebody else.
    let container = stop.container();
    if container.phase() == Phase::Ended {
        container.clean_up().await?;
    }
    Ok(())
}

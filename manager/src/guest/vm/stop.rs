// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Tasks `qmstop` and `qmshutdown`.

use std::time::{Duration, Instant};

use atoll_vmm_protocol::api::Request;
use rustix::process::Signal;

use crate::error::Error;
use crate::guest::lock::Guard;
use crate::guest::site::Seat;
use crate::guest::vm::Vm;
use crate::guest::{Ask, Guest};
use crate::step;
use crate::task::{TaskContext, TaskStep};

/// Time that a machine has to end after it was told to through its API, before it is killed.
const END_MAX: Duration = Duration::from_secs(10);

/// What the steps hand on.
#[derive(Debug)]
pub struct Stop {
    seat: Seat,
    ask: Ask,
    guard: Option<Guard>,
}

impl Stop {
    /// An end of the machine on this seat.
    pub fn new(seat: Seat, ask: Ask) -> Self {
        Self {
            seat,
            ask,
            guard: None,
        }
    }

    fn vm(&self) -> Vm {
        Vm::new(self.seat.clone())
    }
}

/// Ends a machine at once, like pulling the plug.
pub const STOP: &[TaskStep<Stop>] = &[
    step!("lock the guest", lock),
    step!("end the machine", end),
    step!("clean up", clean_up),
];

/// Asks the guest to power off and waits; the lock is not held meanwhile, so that a stop can overtake.
pub const SHUTDOWN: &[TaskStep<Stop>] = &[
    step!("press the power button", press),
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
    let vm = stop.vm();
    let Some(process) = vm.process() else {
        return Ok(());
    };
    if let Err(error) = vm.act(Request::Shutdown).await {
        task.log(&format!("{}, killing it", error.chain()));
        process.signal(Signal::KILL);
    }
    if !process.ended_before(Instant::now() + END_MAX).await {
        task.log("the machine does not end, killing it");
        process.signal(Signal::KILL);
        if !process.ended_before(Instant::now() + END_MAX).await {
            return Err(Error::refused("the machine's process does not die"));
        }
    }
    Ok(())
}

async fn press(stop: &mut Stop, _: &TaskContext) -> Result<(), Error> {
    let _guard = stop.seat.lock().await?;
    stop.seat.unlocked()?;
    let vm = stop.vm();
    if vm.process().is_none() {
        return Err(Error::refused(format!("{} not running", stop.seat.title())));
    }
    if vm.is_paused().await {
        vm.act(Request::Resume).await?;
    }
    vm.act(Request::PowerButton).await
}

async fn wait(stop: &mut Stop, task: &TaskContext) -> Result<(), Error> {
    let Some(process) = stop.vm().process() else {
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
        return Err(Error::refused("VM quit/powerdown failed - got timeout"));
    }
    task.log("the guest did not power off in time, ending the machine");
    end(stop, task).await
}

async fn clean_up(stop: &mut Stop, _: &TaskContext) -> Result<(), Error> {
    // Meanwhile it may have been started again by somebody else.
    let vm = stop.vm();
    if vm.process().is_none() {
        vm.clean_up().await?;
    }
    Ok(())
}

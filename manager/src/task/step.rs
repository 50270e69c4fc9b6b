// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Tasks as tables: each step does one thing and knows how to undo it.
//!
//! ```text
//! const START: &[TaskStep<Start>] = &[
//!     step!("create taps", create_taps, undo remove_taps),
//!     step!("spawn the VMM", spawn, undo kill),
//!     step!("report", report),
//! ];
//! ```
//!
//! When step N fails or the task is stopped before it, the undo of step N (it may have got half way) and of all
//! steps before it run, last first. So an undo must accept that its step did nothing or only a part.
//! `task::fault` fails every step of every table in tests.

use std::future::Future;
use std::pin::Pin;

use super::TaskContext;
use crate::error::Error;

/// What a step returns: its future, bound to the context it works on.
pub type StepFuture<'a> = Pin<Box<dyn Future<Output = Result<(), Error>> + Send + 'a>>;

/// A step's function. `C` is the table's own context: what the steps hand on to each other.
pub type StepFn<C> = for<'a> fn(&'a mut C, &'a TaskContext) -> StepFuture<'a>;

/// One step of a task. Write it with [`step!`](crate::step).
pub struct TaskStep<C> {
    /// What it does, in a few words for the log, such as `create taps`.
    pub name: &'static str,
    /// Does it.
    pub run: StepFn<C>,
    /// Takes it back; `None` when there is nothing to take back.
    pub undo: Option<StepFn<C>>,
}

/// A row of a step table, from `async fn(&mut C, &TaskContext) -> Result<(), Error>`.
#[macro_export]
macro_rules! step {
    ($name:literal, $run:path) => {
        $crate::task::TaskStep {
            name: $name,
            run: |context, task| Box::pin($run(context, task)),
            undo: None,
        }
    };
    ($name:literal, $run:path, undo $undo:path) => {
        $crate::task::TaskStep {
            name: $name,
            run: |context, task| Box::pin($run(context, task)),
            undo: Some(|context, task| Box::pin($undo(context, task))),
        }
    };
}

/// Runs a table: every step in order, or, after a failure, the undos in reverse. Returns the first failure; a
/// failing undo is logged and the others still run.
pub async fn run_steps<C>(
    steps: &[TaskStep<C>],
    context: &mut C,
    task: &TaskContext,
) -> Result<(), Error> {
    for (index, step) in steps.iter().enumerate() {
        let result = if task.is_cancelled() {
            Err(Error::Interrupted)
        } else {
            task.run_step(index, step, context).await
        };
        if let Err(error) = result {
            undo(&steps[..=index], context, task).await;
            return Err(error);
        }
    }
    Ok(())
}

async fn undo<C>(steps: &[TaskStep<C>], context: &mut C, task: &TaskContext) {
    for step in steps.iter().rev() {
        let Some(undo) = step.undo else { continue };
        if let Err(error) = undo(context, task).await {
            task.warn(&format!("undo '{}' failed: {}", step.name, error.chain()));
        }
    }
}

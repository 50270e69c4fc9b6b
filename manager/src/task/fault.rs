// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The generic test of step tables: whatever step fails, and whenever, the world is afterwards as it was before.
//!
//! A table's test gives [`fails_cleanly`] the table, a function that makes a world with a context in it, and one
//! that describes the world. Tables that cannot be undone promise less, see [`can_be_repeated`]. Tables of guests are
//! listed in `guest::tables`. Called by tests only, those of crates that bring tables of their own included.

use std::fmt::Debug;

use super::{Fault, Moment, TaskContext, TaskStep, Upid, run_steps};

/// Fails every step of a table before and after its work, and stops the task before the first one. `make` builds a
/// fresh world and the table's context on it, `describe` says what the world looks like: files, taps, store keys.
pub async fn fails_cleanly<W, C, D: PartialEq + Debug>(
    steps: &[TaskStep<C>],
    make: impl AsyncFn() -> (W, C),
    describe: impl AsyncFn(&W) -> D,
) {
    for moment in [Moment::Before, Moment::After] {
        for (index, step) in steps.iter().enumerate() {
            let (world, mut context) = make().await;
            let before = describe(&world).await;
            let task = TaskContext::detached(
                upid(),
                Some(Fault {
                    step: index,
                    moment,
                }),
            );
            let result = run_steps(steps, &mut context, &task).await;
            let name = step.name;
            assert!(result.is_err(), "'{name}' was to fail {moment:?} its work");
            assert_eq!(
                describe(&world).await,
                before,
                "after '{name}' failed {moment:?} its work"
            );
            assert_eq!(
                task.warnings(),
                0,
                "an undo failed after '{name}' failed {moment:?}"
            );
        }
    }
    let (world, mut context) = make().await;
    let before = describe(&world).await;
    let task = TaskContext::detached(upid(), None);
    task.token().cancel();
    assert!(run_steps(steps, &mut context, &task).await.is_err());
    assert_eq!(
        describe(&world).await,
        before,
        "after a stop before the first step"
    );
}

/// Fails every step of a table before and after its work, and runs `again` (mostly the same table) in the same world,
/// which must succeed and leave the world as a run without a fault does. `make` builds a fresh world, `context` the
/// tables' context on one.
pub async fn can_be_repeated<W, C, D: PartialEq + Debug>(
    steps: &[TaskStep<C>],
    again: &[TaskStep<C>],
    make: impl AsyncFn() -> W,
    context: impl AsyncFn(&W) -> C,
    describe: impl AsyncFn(&W) -> D,
) {
    let run = async |steps: &[TaskStep<C>], world: &W, fault| {
        let task = TaskContext::detached(upid(), fault);
        run_steps(steps, &mut context(world).await, &task).await
    };
    let world = make().await;
    run(steps, &world, None)
        .await
        .expect("a run without a fault");
    let wanted = describe(&world).await;
    for moment in [Moment::Before, Moment::After] {
        for (index, step) in steps.iter().enumerate() {
            let world = make().await;
            let (name, fault) = (
                step.name,
                Fault {
                    step: index,
                    moment,
                },
            );
            let result = run(steps, &world, Some(fault)).await;
            assert!(result.is_err(), "'{name}' was to fail {moment:?} its work");
            let repeated = run(again, &world, None).await;
            // After the last step's work nothing is left to do, and some tables say so.
            let is_done = index + 1 == steps.len() && moment == Moment::After;
            assert!(
                repeated.is_ok() || is_done,
                "again after '{name}' failed {moment:?} its work: {repeated:?}"
            );
            assert_eq!(
                describe(&world).await,
                wanted,
                "after '{name}' failed {moment:?} its work"
            );
        }
    }
}

/// Some task's name.
pub fn upid() -> Upid {
    "UPID:n1:00000001:00000001:65F0AB12:test:100:root@pam:"
        .parse()
        .expect("the text is a UPID")
}

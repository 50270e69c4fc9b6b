// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The generic test of step tables: whatever step fails, and whenever, the world is afterwards as it was before.
//!
//! A table's test gives [`fails_cleanly`] the table, a function that makes a world with a context in it, and one
//! that describes the world as text. Tables are registered in `TABLES` of `guest::tables`, whose test checks that
//! none is left out.

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

/// Some task's name.
pub fn upid() -> Upid {
    "UPID:n1:00000001:00000001:65F0AB12:test:100:root@pam:"
        .parse()
        .expect("the text is a UPID")
}

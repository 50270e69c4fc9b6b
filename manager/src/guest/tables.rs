// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Every step table of guests, and what holds when one of its steps fails. `tests/faults.rs` fails each step of each
//! table in this list, before and after its work; a table that is not in it is not tested.

use super::{clone, container, destroy, move_disk, resize, snapshot, stop, vm};
use crate::task::TaskStep;

/// What is true after a failed step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Promise {
    /// The world is as it was before.
    Undone,
    /// There is no way back, but the same table run again succeeds; after a shutdown, a stop.
    Repeatable,
}

/// A table by name, with its promise and the names of its steps.
#[derive(Debug, Clone, Copy)]
pub struct Table {
    /// The task type, or the types when several share the table.
    pub name: &'static str,
    /// What holds after a failure.
    pub promise: Promise,
    /// Names of the steps.
    pub steps: fn() -> Vec<&'static str>,
}

/// All of them.
pub const TABLES: &[Table] = &[
    Table::new("qmcreate", Promise::Undone, || names(vm::create::STEPS)),
    Table::new("qmstart", Promise::Undone, || names(vm::start::STEPS)),
    Table::new("qmsuspend", Promise::Undone, || names(vm::suspend::STEPS)),
    Table::new("vzcreate", Promise::Undone, || {
        names(container::create::STEPS)
    }),
    Table::new("vzstart", Promise::Undone, || {
        names(container::start::STEPS)
    }),
    Table::new("vzupdate", Promise::Undone, || {
        names(container::renew::STEPS)
    }),
    Table::new("stop", Promise::Repeatable, || names(stop::STOP)),
    Table::new("shutdown", Promise::Repeatable, || names(stop::SHUTDOWN)),
    Table::new("resize", Promise::Repeatable, || names(resize::STEPS)),
    Table::new("snapshot", Promise::Undone, || names(snapshot::take::STEPS)),
    Table::new("rollback", Promise::Repeatable, || {
        names(snapshot::roll_back::STEPS)
    }),
    Table::new("delsnapshot", Promise::Repeatable, || {
        names(snapshot::delete::STEPS)
    }),
    Table::new("abandon", Promise::Repeatable, || {
        names(snapshot::abandon::STEPS)
    }),
    Table::new("clone", Promise::Undone, || names(clone::STEPS)),
    Table::new("move", Promise::Undone, || names(move_disk::STEPS)),
    Table::new("destroy", Promise::Repeatable, || names(destroy::STEPS)),
];

impl Table {
    const fn new(name: &'static str, promise: Promise, steps: fn() -> Vec<&'static str>) -> Self {
        Self {
            name,
            promise,
            steps,
        }
    }
}

fn names<C>(steps: &[TaskStep<C>]) -> Vec<&'static str> {
    steps.iter().map(|step| step.name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_have_names_of_their_own() {
        for table in TABLES {
            let mut steps = (table.steps)();
            let count = steps.len();
            steps.sort_unstable();
            steps.dedup();
            assert_eq!(steps.len(), count, "{}", table.name);
        }
    }
}

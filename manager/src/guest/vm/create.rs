// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Task `qmcreate`: a config and its disks.

use crate::error::Error;
use crate::guest::create::Draft;
use crate::step;
use crate::task::{TaskContext, TaskStep};

/// The table.
pub const STEPS: &[TaskStep<Draft>] = &[
    step!("reserve the number", reserve, undo unreserve),
    step!("allocate disks", allocate, undo free),
    step!("write the configuration", write_config),
];

async fn reserve(draft: &mut Draft, _: &TaskContext) -> Result<(), Error> {
    draft.reserve().await
}

async fn unreserve(draft: &mut Draft, _: &TaskContext) -> Result<(), Error> {
    draft.unreserve().await
}

async fn allocate(draft: &mut Draft, task: &TaskContext) -> Result<(), Error> {
    draft.allocate(task).await
}

async fn free(draft: &mut Draft, _: &TaskContext) -> Result<(), Error> {
    draft.free().await
}

async fn write_config(draft: &mut Draft, _: &TaskContext) -> Result<(), Error> {
    draft.write_config().await
}

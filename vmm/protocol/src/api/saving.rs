// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! How a snapshot is that is written while the guest runs. Not here: what asks for one (`Snapshot`).

use serde::{Deserialize, Serialize};

/// Where it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SavingStage {
    /// Memory is written.
    Saving,
    /// It is whole.
    Completed,
    /// Nothing came of it.
    Failed,
    /// Somebody gave it up.
    Cancelled,
}

/// Answer of the requests about a snapshot that is written while the guest runs: of the last one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavingInfo {
    /// Its directory, as whoever asked for it named it.
    pub to: String,
    /// Where it is.
    pub stage: SavingStage,
    /// Bytes of RAM that were written and not zero, by page.
    pub memory_bytes: u64,
    /// Bytes of RAM that are still to be looked at.
    pub remaining_bytes: u64,
    /// How often the guest or a device waited to write to memory that was still to be read.
    pub fault_count: u64,
    /// For how long the machine was held, in microseconds.
    pub held_us: u64,
    /// Time since it began, in milliseconds, or until it ended.
    pub elapsed_ms: u64,
    /// Why nothing came of it.
    #[serde(default)]
    pub error: Option<String>,
}

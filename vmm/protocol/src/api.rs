// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Bodies of the control API: HTTP/1.1 and JSON on the Unix socket of one `atoll-vmm`.

use serde::{Deserialize, Serialize};

/// What a machine is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MachineState {
    /// vCPUs run.
    Running,
    /// vCPUs are held; devices finish what they began.
    Paused,
    /// The guest powered off or was shut down; the process is about to end.
    Stopped,
}

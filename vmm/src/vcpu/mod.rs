// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! vCPUs.
//!
//! ```text
//! thread  runs the guest, answers its exits, obeys its owner
//! setup   registers before the first instruction
//! state   all of a vCPU's state, taken out of KVM and put back
//! ```

pub mod setup;
pub mod state;

mod thread;

pub use thread::{Buses, Exits, Pending, Report, Vcpu, handle_kicks};

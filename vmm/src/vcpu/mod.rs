// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! vCPUs.
//!
//! ```text
//! thread   runs the guest, answers its exits, obeys its owner
//! setup    registers before the first instruction
//! state    all of a vCPU's state, taken out of KVM and put back
//! counter  its time stamp counter, equal to the other vCPUs'
//! ```

pub mod setup;
pub mod state;

#[cfg(test)]
mod bare;
mod counter;
mod thread;

pub use counter::{Offset, Tsc};
pub use thread::{Buses, Exits, Pending, Report, Vcpu, handle_kicks};

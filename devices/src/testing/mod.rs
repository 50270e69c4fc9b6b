// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A machine without KVM, and the driver's side of virtio: for tests, examples and fuzz targets.
//!
//! Behind the feature `testing`; no release binary contains it.
#![expect(
    clippy::unwrap_used,
    reason = "a failed expectation here is a failed test"
)]

mod driver;
pub mod fuzz;
mod machine;

pub use driver::{Driver, RAM_BYTES, Ring, Segment};
pub use machine::{ControlLog, CountingSink, Line, NoDoorbells};

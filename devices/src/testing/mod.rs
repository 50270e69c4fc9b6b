// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A machine without KVM, and the driver's side of virtio: for tests, examples and fuzz targets.
//!
//! Behind the feature `testing`; no release binary contains it.
#![expect(
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a failed expectation here is a failed test, and the output its seed"
)]

mod driver;
pub mod fuzz;
mod machine;
pub mod replay;
mod testpmd;

pub use driver::{Driver, RAM_BYTES, Ring, Segment};
pub use machine::{ControlLog, CountingSink, Line, NoDoorbells};
pub use testpmd::start_testpmd;

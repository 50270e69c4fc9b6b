// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A machine without KVM, and the driver's side of virtio: for tests, examples and fuzz targets.
//!
//! Behind the feature `testing`; no release binary contains it.

mod machine;

pub use machine::{ControlLog, CountingSink, Line, NoDoorbells};

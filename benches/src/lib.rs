// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! What the benchmarks and the program in their Linux guests (`bin/guest`) share.

pub mod requests;
pub mod traffic;

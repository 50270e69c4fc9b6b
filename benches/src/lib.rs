// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! What is not the benchmarks' own affair: requests on a disk.

pub mod requests;

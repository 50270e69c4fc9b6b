// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Side-by-side benchmarks.

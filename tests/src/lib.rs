// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Whole-system tests, the lab and the checks on the tree itself.

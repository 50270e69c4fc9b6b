// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Integration tests that need more than one crate; one module a subject.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod api;
mod tidy;
mod web;

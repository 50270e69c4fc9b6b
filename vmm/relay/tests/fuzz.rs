// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Every fuzz target of the crate, replayed.

use atoll_relay::testing::TARGETS;
use atoll_vmm::testing::Target;

#[test]
fn every_target_has_a_test() {
    Target::each_has_a_test(TARGETS, include_str!("fuzz.rs"));
}

#[test]
fn relay() {
    Target::replay(TARGETS, "relay");
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Every fuzz target of the crate, replayed.

use atoll_relay::testing::TARGETS;
use atoll_vmm::testing::Target;

#[test]
fn every_target_has_a_test() {
    let text = include_str!("fuzz.rs");
    for target in TARGETS {
        let test = format!("\nfn {}()", target.name);
        assert!(text.contains(&test), "{}", target.name);
    }
}

#[test]
fn relay() {
    Target::replay(TARGETS, "relay");
}

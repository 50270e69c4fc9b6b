// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Every fuzz target of the crate, replayed.

use atoll_devices::testing::replay::Target;
use atoll_vmm::testing::TARGETS;

#[test]
fn every_target_has_a_test() {
    Target::each_has_a_test(TARGETS, include_str!("fuzz.rs"));
}

#[test]
fn kernel() {
    Target::replay(TARGETS, "kernel");
}

#[test]
fn initrd() {
    Target::replay(TARGETS, "initrd");
}

#[test]
fn flash() {
    Target::replay(TARGETS, "flash");
}

#[test]
fn arguments() {
    Target::replay(TARGETS, "arguments");
}

#[test]
fn spec() {
    Target::replay(TARGETS, "spec");
}

#[test]
fn request() {
    Target::replay(TARGETS, "request");
}

#[test]
fn response() {
    Target::replay(TARGETS, "response");
}

#[test]
fn state() {
    Target::replay(TARGETS, "state");
}

#[test]
fn packed() {
    Target::replay(TARGETS, "packed");
}

#[test]
fn migration() {
    Target::replay(TARGETS, "migration");
}

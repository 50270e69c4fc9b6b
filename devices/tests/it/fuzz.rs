// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Every fuzz target of the crate, replayed.

use atoll_devices::testing::fuzz::TARGETS;
use atoll_devices::testing::replay::Target;

#[test]
fn every_target_has_a_test() {
    Target::each_has_a_test(TARGETS, include_str!("fuzz.rs"));
}

#[test]
fn queue() {
    Target::replay(TARGETS, "queue");
}

#[test]
fn blk_request() {
    Target::replay(TARGETS, "blk_request");
}

#[test]
fn blk_device() {
    Target::replay(TARGETS, "blk_device");
}

#[test]
fn scsi_device() {
    Target::replay(TARGETS, "scsi_device");
}

#[test]
fn device() {
    Target::replay(TARGETS, "device");
}

#[test]
fn pci() {
    Target::replay(TARGETS, "pci");
}

#[test]
fn platform() {
    Target::replay(TARGETS, "platform");
}

#[test]
fn saved() {
    Target::replay(TARGETS, "saved");
}

#[test]
fn qcow2() {
    Target::replay(TARGETS, "qcow2");
}

#[test]
fn nbd() {
    Target::replay(TARGETS, "nbd");
}

#[test]
fn changes() {
    Target::replay(TARGETS, "changes");
}

#[test]
fn vhost_user() {
    Target::replay(TARGETS, "vhost_user");
}

#[test]
fn hotplug() {
    Target::replay(TARGETS, "hotplug");
}

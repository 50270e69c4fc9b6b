// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Tests on emulated Debian hosts with a real KVM; one module a subject.
//!
//! Each test resumes hosts of its own from the template and ends them; they run one at a time, since each host
//! wants both of the machine's cores.

#![allow(
    clippy::print_stdout,
    reason = "counted mishaps of the emulation, kept with the test's output"
)]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod board;
mod devices;
mod disks;
mod disturbances;
mod hotplug;
mod migration;
mod models;
mod node;
mod payload;
mod rig;
mod scopes;
mod segments;
mod sharing;
mod shell;
mod uefi;
mod vmm;
mod working;

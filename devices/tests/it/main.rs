// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Devices against a driver of our own, well-behaved and hostile. Needs no KVM; network tests need root.
#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "helpers of tests, which clippy does not take for tests"
)]

mod balloon;
mod blk;
mod bounds;
mod console;
mod fs;
mod fuzz;
mod hostile;
mod hotplug;
mod net;
mod net_flow;
mod pci;
mod pitfalls;
mod rng;
mod scsi;
mod state;
mod testpmd;
mod transport;
mod vhost_user;
mod vsock;
mod write_cache;

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The hardware a guest sees: PCI, virtio, serial port. Knows no KVM, no configuration file.
//!
//! The VMM (crate `atoll-vmm`) is the only caller. It gives guest memory ([`memory`]), interrupts
//! ([`interrupt`]), doorbells ([`pci::DoorbellSink`]) and addresses, and gets objects for its port and memory
//! buses ([`bus`]).
//!
//! ```text
//!   vCPU exit ──► bus ──► platform (serial port)
//!                  │
//!                  └────► pci (config space, BARs, MSI-X) ──► virtio::pci ──► blk │ scsi │ net │ console │ rng
//!   doorbell (ioeventfd) ─────────────────────────► virtio::worker thread of one queue
//! ```
//!
//! A guest's mistake is never our panic: it ends in the device status NEEDS_RESET or in a request's error
//! status, and in one rate-limited log line. Values read from the guest are parsed once into checked types.

pub mod bus;
pub mod console;
pub mod counters;
pub mod interrupt;
pub mod memory;
pub mod pci;
pub mod platform;
pub mod scsi;
pub mod state;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod virtio;

mod rate_limited;

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The virtual machine as the kernel knows it: `/dev/kvm`, memory slots, interrupt controllers.
//!
//! ```text
//! host       Kvm (what the host offers), VirtualMachine (one VM file descriptor)
//! cpu        the model that the guest's CPUs are
//! cpuid      each CPU's place among them
//! routes     interrupts: pins, and messages by irqfd
//! dirty      pages that were written
//! doorbells  writes that signal an eventfd
//! ```
//! Not here: running vCPUs (`vcpu`).

pub mod cpu;
pub mod cpuid;
pub mod dirty;
pub mod doorbells;
pub mod routes;

mod host;

pub use host::{DEVICE, Kvm, KvmError, VirtualMachine};
pub use routes::Routes;

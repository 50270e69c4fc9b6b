// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The virtual machine monitor: one process a VM, a library and the `atoll-vmm` command.
//!
//! ```text
//! main ─► ctl (client of a running machine)
//! main ─► cli ─► check ─► machine::run_machine(spec)
//!                              │ assembly: a table of steps, one a kind of device
//!                              ├─► kvm       /dev/kvm, memory slots, interrupts, doorbells
//!                              ├─► resources   files of disks and cards, opened here or by ctl
//!                              ├─► memory    guest RAM        layout, board   where everything is
//!                              ├─► flash, fw_cfg   firmware, what it is told
//!                              ├─► loader    kernel, initrd, what they are told (crate atoll-firmware)
//!                              ├─► saved     a machine at rest: snapshots
//!                              ├─► migration  a machine's move to another process (relay: the way to atoll-relay, over a network)
//!                              ├─► vcpu      threads vcpu0, vcpu1, …
//!                              ├─► sandbox   what the process may still do, once everything is open
//!                              └─► api       control API, thread api
//! ```
//! The thread that calls [`machine::run_machine`] owns the machine; vCPUs, the control API and signals send it
//! messages. Devices are in crate `atoll-devices`, which knows no KVM. No tokio here.
//!
//! **Where what is not here yet would go.** A display, USB and a TPM are devices: a `PciDevice` or `BusDevice` of
//! `atoll-devices`, and a row of `machine/devices.rs` that opens what it needs before the sandbox and adds it inside. A
//! device of the host (VFIO) is such a row, too, with its interrupts through `MsixSink` and its memory told to `kvm`. Memory
//! and vCPUs that come later begin in `layout` (where RAM may be) and `vcpu` (a thread that is held until it is wanted);
//! they and NUMA are told to the guest by tables of `atoll-firmware`'s `acpi`. Enlightenments for Windows are CPUID leaves
//! (`kvm/cpu`) and KVM capabilities.

pub mod api;
pub mod board;
pub mod check;
pub mod cli;
pub mod cpu_models;
pub mod ctl;
pub mod flash;
pub mod fw_cfg;
pub mod kvm;
pub mod layout;
pub mod loader;
pub mod log;
pub mod machine;
pub mod memory;
pub mod migration;
pub mod power;
pub mod probe;
pub mod relay;
pub mod resources;
pub mod sandbox;
pub mod saved;
pub mod serve;
pub mod socket;
pub mod terminal;
#[cfg(feature = "testing")]
pub mod testing;
pub mod vcpu;

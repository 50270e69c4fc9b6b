// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The CPU that a guest sees: from a spec's model to CPUID and MSRs, checked against the host.
//!
//! ```text
//! CpuSpec ──model──► Wanted ──fit──► GuestCpu: CPUID as all vCPUs have it ──cpuid::for_vcpu──► one vCPU's
//!          features           ▲      and feature MSRs     leaves
//!                          HostCpu (what this CPU and KVM can give)
//! ```
//! `features` is the table of names, `model` the models, `fit` the check with its messages, `leaves` the table of
//! CPUID, `compare` the question whether a saved guest can go on on another host. All pure; `HostCpu` is read once
//! from KVM (`Kvm::cpu`).

pub mod compare;
pub mod features;
pub mod model;

mod fit;
mod leaves;
#[cfg(test)]
mod tests;
mod xsave;

pub use fit::{CpuError, GuestCpu, HostCpu, HostExtras, best_level, lacks, resolve, runs_guests};

/// Vendors, as far as their CPUID differs. Hygon's is AMD's, all others' Intel's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Vendor {
    /// AMD and Hygon.
    Amd,
    /// Intel and others.
    Intel,
}

impl Vendor {
    /// By the 12 characters of leaf 0.
    #[must_use]
    pub fn of(name: &str) -> Self {
        match name {
            "AuthenticAMD" | "HygonGenuine" => Self::Amd,
            _ => Self::Intel,
        }
    }
}

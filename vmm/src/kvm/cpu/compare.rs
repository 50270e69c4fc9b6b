// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Whether a guest that has seen one CPU can go on on another host; if not, why, in names.

use kvm_bindings::kvm_cpuid_entry2;

use super::features::{Feature, FeatureSet, MSR_ARCH_CAPABILITIES};
use super::fit::{HostCpu, vendor_name};
use super::xsave;
use crate::kvm::cpuid::address_bits;

/// Why a guest cannot go on here.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Unlike {
    /// Intel is not AMD.
    #[error("it is of {host}, the guest's of {guest}")]
    Vendor {
        /// The guest's.
        guest: String,
        /// The host's.
        host: String,
    },
    /// Features that the guest has seen are not there.
    #[error(
        "it lacks {0}: give the guest a CPU that all its hosts have (see atoll-vmm cpu-models)"
    )]
    Lacks(String),
    /// The guest may use addresses that are not there.
    #[error("its physical addresses have {host} bits, the guest's {guest}")]
    PhysBits {
        /// The guest's.
        guest: u8,
        /// The host's.
        host: u8,
    },
    /// What the guest has saved in its memory would be read from the wrong place.
    #[error("its XSAVE area has the {0} elsewhere")]
    XsaveArea(String),
    /// Time would go faster or slower.
    #[error("its time stamp counter runs at {host} kHz, the guest's at {guest} kHz")]
    TscSpeed {
        /// The guest's.
        guest: u32,
        /// The host's.
        host: u32,
    },
}

/// Compares what one vCPU has seen with what the host can give. `msrs` are those of the vCPU; none when they are not
/// known yet.
pub fn check(
    cpuid: &[kvm_cpuid_entry2],
    msrs: &[(u32, u64)],
    host: &HostCpu,
) -> Result<(), Unlike> {
    let (guest_vendor, vendor) = (vendor_name(cpuid), host.vendor_name());
    if guest_vendor != vendor {
        return Err(Unlike::Vendor {
            guest: guest_vendor,
            host: vendor,
        });
    }
    let mut seen = FeatureSet::of_cpuid(cpuid);
    for (index, value) in feature_msrs(cpuid, msrs) {
        seen = seen.with_msr(index, value);
    }
    let missing = seen.without(host.features());
    if !missing.is_empty() {
        return Err(Unlike::Lacks(missing.to_string()));
    }
    let (guest_bits, host_bits) = (address_bits(cpuid), address_bits(host.entries()));
    if guest_bits > host_bits {
        return Err(Unlike::PhysBits {
            guest: guest_bits,
            host: host_bits,
        });
    }
    match xsave::moved(cpuid, host.entries()) {
        Some(part) => Err(Unlike::XsaveArea(part)),
        None => Ok(()),
    }
}

/// Those among `msrs` that tell features, and that a guest with this CPUID can read.
#[must_use]
pub fn feature_msrs(cpuid: &[kvm_cpuid_entry2], msrs: &[(u32, u64)]) -> Vec<(u32, u64)> {
    let told = FeatureSet::of_cpuid(cpuid).has(Feature::known("arch-capabilities"));
    let msrs = msrs.iter().copied();
    msrs.filter(|(index, _)| told && *index == MSR_ARCH_CAPABILITIES)
        .collect()
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Whether this host can give a CPU that was asked for; if not, what it lacks and what would fit.

use atoll_vmm_protocol::cpu::CpuSpec;
use kvm_bindings::kvm_cpuid_entry2;

use super::features::{EBX, ECX, EDX, Feature, FeatureSet, Location, MSR_ARCH_CAPABILITIES, value};
use super::model::{self, LEVELS, ModelError, Wanted};
use super::{Vendor, leaves};
use crate::kvm::cpuid;

/// Width of physical addresses of every model but `host`: what QEMU's models have, and most CPUs.
const PHYS_BITS: u8 = 40;

/// Leaf 1, ECX: a hypervisor is present; the local APIC timer takes a time stamp. What `KVM_GET_SUPPORTED_CPUID` leaves to
/// whoever calls it (`Documentation/virt/kvm/api.rst`, errata).
const UNLISTED: u32 = 1 << 31 | 1 << 24;

/// What a guest needs that runs guests, on Intel and on AMD.
const NESTED: [&str; 2] = ["vmx", "svm"];

/// What no guest is given, since a part of its state is not saved: a shadow stack's pointer is no MSR
/// (`KVM_REG_GUEST_SSP`), and AMX tiles are larger than what `KVM_GET_XSAVE` tells.
const NOT_SAVED: [&str; 2] = ["shstk", "amx-tile"];

/// Whether a guest with these features can run guests.
#[must_use]
pub fn runs_guests(features: &FeatureSet) -> bool {
    NESTED.iter().any(|one| features.has(Feature::known(one)))
}

/// What this host's CPU and KVM can give a guest.
#[derive(Debug, Clone)]
pub struct HostCpu {
    entries: Vec<kvm_cpuid_entry2>,
    features: FeatureSet,
}

/// What KVM says beside its list of leaves.
#[derive(Debug, Clone, Copy, Default)]
pub struct HostExtras {
    /// IA32_ARCH_CAPABILITIES, as far as KVM can give it; 0 where there is none.
    pub arch_capabilities: u64,
    /// Local APIC timers can be set by time stamp counter.
    pub tsc_deadline: bool,
    /// What a guest's own guests are doing can be saved. Where it cannot (before Linux 4.20 on Intel, 5.8 on AMD), no
    /// guest is given the means to run any: its snapshot would be a ruin.
    pub nested_state: bool,
}

impl HostCpu {
    /// The host's CPU by the answer of `KVM_GET_SUPPORTED_CPUID`, and by what that does not tell.
    #[must_use]
    pub fn new(entries: &[kvm_cpuid_entry2], extras: HostExtras) -> Self {
        let features = FeatureSet::of_cpuid(entries);
        let mut features = features.with_msr(MSR_ARCH_CAPABILITIES, extras.arch_capabilities);
        // KVM makes these itself, and old ones do not list them.
        features.insert(Feature::known("hypervisor"));
        let timer = ["tsc", "apic"].map(Feature::known);
        match extras.tsc_deadline && timer.iter().all(|part| features.has(*part)) {
            true => features.insert(Feature::known("tsc-deadline")),
            false => features.remove(Feature::known("tsc-deadline")),
        }
        let mut entries = entries.to_vec();
        for entry in entries.iter_mut().filter(|entry| entry.function == 0x1) {
            let told = features.leaf(0x1, 0, ECX) & UNLISTED;
            entry.ecx = (entry.ecx & !UNLISTED) | told;
        }
        let all = features;
        let nested = NESTED.iter().filter(|_| !extras.nested_state);
        for name in NOT_SAVED.iter().chain(nested) {
            features.remove(Feature::known(name));
        }
        leaves::withhold(&mut entries, &features, &all.without(&features));
        Self { entries, features }
    }

    /// As KVM lists it, with what it makes and does not list: without the bit of a hypervisor, Linux would look for no
    /// clock of KVM's.
    #[must_use]
    pub fn entries(&self) -> &[kvm_cpuid_entry2] {
        &self.entries
    }

    /// All features that a guest can be given here, with or without a name.
    #[must_use]
    pub fn features(&self) -> &FeatureSet {
        &self.features
    }

    /// Whether a guest that has all of it can run guests.
    #[must_use]
    pub fn runs_guests(&self) -> bool {
        runs_guests(&self.features)
    }

    /// Vendor as leaf 0 has it, 12 characters: `GenuineIntel`.
    #[must_use]
    pub fn vendor_name(&self) -> String {
        vendor_name(&self.entries)
    }

    /// Which of the known vendors it is, after [`HostCpu::vendor_name`].
    #[must_use]
    pub fn vendor(&self) -> Vendor {
        Vendor::of(&self.vendor_name())
    }
}

/// The 12 characters of leaf 0.
pub(super) fn vendor_name(entries: &[kvm_cpuid_entry2]) -> String {
    let bytes = [EBX, EDX, ECX].map(|at| value(entries, 0, 0, at).to_le_bytes());
    String::from_utf8_lossy(bytes.as_flattened()).into_owned()
}

/// The CPU of one machine: what each of its vCPUs answers, but for its own place.
#[derive(Debug, Clone)]
pub struct GuestCpu {
    /// Leaves of CPUID, but for what depends on a vCPU's place in the machine.
    pub cpuid: Vec<kvm_cpuid_entry2>,
    /// MSRs that tell features, where they differ from what KVM sets by itself.
    pub msrs: Vec<(u32, u64)>,
}

/// Why there is no such CPU here.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum CpuError {
    /// Nowhere.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// Not on this host.
    #[error(
        "CPU {cpu}: this host's CPU and KVM lack {missing}: {remedy} (see atoll-vmm cpu-models)"
    )]
    Lacks {
        /// As the spec has it.
        cpu: String,
        /// Names of features.
        missing: String,
        /// What would fit.
        remedy: String,
    },
    /// The model is another vendor's.
    #[error("CPU {cpu}: is for hosts of {wanted}, this one is of {host}")]
    Vendor {
        /// As the spec has it.
        cpu: String,
        /// The model's vendor.
        wanted: String,
        /// The host's.
        host: String,
    },
    /// Addresses wider than the host's.
    #[error("CPU {cpu}: this host's physical addresses have {host} bits")]
    PhysBits {
        /// As the spec has it.
        cpu: String,
        /// The host's width.
        host: u8,
    },
}

/// The guest's CPU on this host. `ram_end` is where the guest's memory ends.
pub fn resolve(spec: &CpuSpec, host: &HostCpu, ram_end: u64) -> Result<GuestCpu, CpuError> {
    let wanted = model::wanted(spec, host.vendor())?;
    let cpu = || wanted.text.clone();
    let vendor = host.vendor_name();
    if let Some(other) = wanted.identity.vendor.as_ref().filter(|it| **it != vendor) {
        return Err(CpuError::Vendor {
            cpu: cpu(),
            wanted: other.clone(),
            host: vendor,
        });
    }
    let features = features_of(&wanted, host);
    let missing = features.without(&host.features);
    if !missing.is_empty() {
        return Err(CpuError::Lacks {
            cpu: cpu(),
            missing: missing.to_string(),
            remedy: remedy(spec, &missing, host),
        });
    }
    let host_bits = cpuid::address_bits(&host.entries);
    let phys_bits = match wanted.phys_bits {
        Some(bits) if bits > host_bits => {
            return Err(CpuError::PhysBits {
                cpu: cpu(),
                host: host_bits,
            });
        }
        Some(bits) => bits,
        None if wanted.from_host || ram_end > 1 << (PHYS_BITS - 1) => host_bits,
        None => PHYS_BITS.min(host_bits),
    };
    Ok(GuestCpu {
        cpuid: leaves::of(&wanted, &features, host, phys_bits),
        msrs: msrs(&wanted, &features, host),
    })
}

/// All features of the guest's CPU.
fn features_of(wanted: &Wanted, host: &HostCpu) -> FeatureSet {
    let mut features = wanted.added;
    if wanted.from_host {
        features = features.with_all(&host.features);
        for feature in &wanted.removed {
            features.remove(*feature);
        }
    }
    if wanted.hidden {
        features = features.without_register(leaves::KVM_FEATURES);
    }
    features
}

/// What a host lacks for a model without flags; `None` if it cannot be told, because there is no such model.
#[must_use]
pub fn lacks(spec: &CpuSpec, host: &HostCpu) -> Option<FeatureSet> {
    let wanted = model::wanted(spec, host.vendor()).ok()?;
    Some(features_of(&wanted, host).without(&host.features))
}

/// The greatest of the psABI's levels that the host can give.
#[must_use]
pub fn best_level(host: &HostCpu) -> Option<&'static str> {
    LEVELS.into_iter().find(|level| {
        let spec = CpuSpec {
            model: (*level).to_owned(),
            ..CpuSpec::default()
        };
        lacks(&spec, host).is_some_and(|missing| missing.is_empty())
    })
}

/// What to do instead: without some flags, or with another model.
fn remedy(spec: &CpuSpec, missing: &FeatureSet, host: &HostCpu) -> String {
    let at_fault = |flag: &&String| {
        let feature = flag.strip_prefix('+').and_then(super::features::find);
        feature.is_some_and(|feature| missing.has(feature))
    };
    let faults: Vec<String> = spec.flags.iter().filter(at_fault).cloned().collect();
    let mut less = spec.clone();
    less.flags.retain(|flag| !faults.contains(flag));
    if !faults.is_empty() && lacks(&less, host).is_some_and(|missing| missing.is_empty()) {
        return format!("without {} it fits", faults.join(", "));
    }
    match best_level(host) {
        Some(level) => format!("the greatest level that fits is {level}"),
        None => "only host fits".to_owned(),
    }
}

/// IA32_ARCH_CAPABILITIES, where the guest has it and KVM's own value is not it.
fn msrs(wanted: &Wanted, features: &FeatureSet, host: &HostCpu) -> Vec<(u32, u64)> {
    let location = Location::Msr(MSR_ARCH_CAPABILITIES);
    let (value, own) = (
        features.register(location),
        host.features.register(location),
    );
    let there = features.has(Feature::known("arch-capabilities"));
    match there && (!wanted.from_host || value != own) {
        true => vec![(MSR_ARCH_CAPABILITIES, value)],
        false => vec![],
    }
}

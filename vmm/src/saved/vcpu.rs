// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The saved form of a vCPU. Structures of the kernel's interface are its bytes; what a reader may want to see
//! (MSRs, CPUID, the time stamp counter) are numbers.

use kvm_bindings::{
    kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs,
    kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use serde::{Deserialize, Serialize};

use super::Raw;
use crate::kvm::cpu::compare::feature_msrs;
use crate::vcpu::state::VcpuState;

/// One vCPU at rest.
#[derive(Debug, Serialize, Deserialize)]
pub struct VcpuSaved {
    /// Function, index, flags, EAX, EBX, ECX, EDX of each leaf.
    cpuid: Vec<[u32; 7]>,
    /// Time stamp counter.
    pub tsc: u64,
    /// Number and value of each, in the order of restoring.
    msrs: Vec<(u32, u64)>,
    mp_state: Raw<kvm_mp_state>,
    regs: Raw<kvm_regs>,
    sregs: Raw<kvm_sregs>,
    xsave: Box<Raw<kvm_xsave>>,
    xcrs: Raw<kvm_xcrs>,
    debug_regs: Raw<kvm_debugregs>,
    lapic: Box<Raw<kvm_lapic_state>>,
    events: Raw<kvm_vcpu_events>,
}

/// Function, index, flags, EAX, EBX, ECX, EDX of each leaf of CPUID.
#[must_use]
pub fn leaves(cpuid: &[kvm_cpuid_entry2]) -> Vec<[u32; 7]> {
    let leaf = |entry: &kvm_cpuid_entry2| {
        let kvm_cpuid_entry2 {
            function,
            index,
            flags,
            eax,
            ebx,
            ecx,
            edx,
            ..
        } = *entry;
        [function, index, flags, eax, ebx, ecx, edx]
    };
    cpuid.iter().map(leaf).collect()
}

/// What [`leaves`] was made from.
#[must_use]
pub fn entries(leaves: &[[u32; 7]]) -> Vec<kvm_cpuid_entry2> {
    let entry = |&[function, index, flags, eax, ebx, ecx, edx]: &[u32; 7]| kvm_cpuid_entry2 {
        function,
        index,
        flags,
        eax,
        ebx,
        ecx,
        edx,
        ..Default::default()
    };
    leaves.iter().map(entry).collect()
}

impl VcpuSaved {
    /// Of a vCPU that was made with `cpuid`. (KVM's own list is not read back: some KVMs add to it.)
    #[must_use]
    pub fn new(state: VcpuState, cpuid: &[kvm_cpuid_entry2]) -> Self {
        let msr = |entry: &kvm_msr_entry| (entry.index, entry.data);
        Self {
            cpuid: leaves(cpuid),
            tsc: state.tsc,
            msrs: state.msrs.iter().map(msr).collect(),
            mp_state: Raw(state.mp_state),
            regs: Raw(state.regs),
            sregs: Raw(state.sregs),
            xsave: Box::new(Raw(*state.xsave)),
            xcrs: Raw(state.xcrs),
            debug_regs: Raw(state.debug_regs),
            lapic: Box::new(Raw(state.lapic)),
            events: Raw(state.events),
        }
    }

    /// What it answers to CPUID.
    #[must_use]
    pub fn cpuid(&self) -> Vec<kvm_cpuid_entry2> {
        entries(&self.cpuid)
    }

    /// Number and value of each MSR.
    #[must_use]
    pub fn msrs(&self) -> &[(u32, u64)] {
        &self.msrs
    }

    /// Those of them that tell features, and that the guest can read.
    #[must_use]
    pub fn feature_msrs(&self) -> Vec<(u32, u64)> {
        feature_msrs(&self.cpuid(), &self.msrs)
    }

    /// The live form, with the time stamp counter `later_ticks` on.
    #[must_use]
    pub fn into_state(self, later_ticks: u64) -> VcpuState {
        let msr = |&(index, data): &(u32, u64)| kvm_msr_entry {
            index,
            data,
            ..Default::default()
        };
        VcpuState {
            tsc: self.tsc.wrapping_add(later_ticks),
            tsc_khz: 0,
            msrs: self.msrs.iter().map(msr).collect(),
            mp_state: self.mp_state.0,
            regs: self.regs.0,
            sregs: self.sregs.0,
            xsave: Box::new(self.xsave.0),
            xcrs: self.xcrs.0,
            debug_regs: self.debug_regs.0,
            lapic: self.lapic.0,
            events: self.events.0,
        }
    }
}

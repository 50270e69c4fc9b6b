// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The saved form of a vCPU. Structures of the kernel's interface are its bytes; what a reader may want to see
//! (MSRs, CPUID, the time stamp counter) are numbers.

use std::fmt;

use atoll_devices::state::hex;
use kvm_bindings::nested::KvmNestedStateBuffer;
use kvm_bindings::{
    kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry,
    kvm_nested_state, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use zerocopy::IntoBytes;

use super::Raw;
use crate::kvm::cpu::compare::feature_msrs;
use crate::vcpu::state::VcpuState;

/// One vCPU at rest, as it is written. Fields that came later are optional; none is ever left out again.
#[derive(Debug, Serialize, Deserialize)]
pub struct VcpuSaved {
    /// Function, index, flags, EAX, EBX, ECX, EDX of each leaf.
    cpuid: Vec<[u32; 7]>,
    /// Time stamp counter when the vCPU was held, ticks.
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
    /// Absent where the guest can run no guests, and in states of programs that did not save it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    nested: Option<Nested>,
}

/// What a vCPU's own guests are doing: KVM's header, and as much behind it as that says (`api.rst` §4.114).
struct Nested(Box<KvmNestedStateBuffer>);

impl fmt::Debug for Nested {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Nested({} bytes)", self.0.size)
    }
}

impl Serialize for Nested {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let size = usize::try_from(self.0.size).unwrap_or(usize::MAX);
        let bytes = self.0.as_bytes();
        hex::serialize(bytes.get(..size).unwrap_or(bytes), serializer)
    }
}

impl<'de> Deserialize<'de> for Nested {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let bytes = hex::deserialize(deserializer)?;
        let mut state = Box::new(KvmNestedStateBuffer::empty());
        let whole = state.as_mut_bytes();
        let sizes = size_of::<kvm_nested_state>()..=whole.len();
        if !sizes.contains(&bytes.len()) {
            let count = bytes.len();
            let wanted = format!("expected {} to {}", sizes.start(), sizes.end());
            return Err(D::Error::custom(format!("{count} bytes, {wanted}")));
        }
        whole[..bytes.len()].copy_from_slice(&bytes);
        match usize::try_from(state.size) == Ok(bytes.len()) {
            true => Ok(Self(state)),
            false => Err(D::Error::custom(format!(
                "{} bytes, not {}",
                bytes.len(),
                state.size
            ))),
        }
    }
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

/// Leaves in KVM's form: the inverse of [`leaves`].
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
            nested: state.nested.map(Nested),
        }
    }

    /// What the vCPU answers to CPUID, its own place in the machine included.
    #[must_use]
    pub fn cpuid(&self) -> Vec<kvm_cpuid_entry2> {
        entries(&self.cpuid)
    }

    /// Number and value of each saved MSR, in the order of restoring.
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
            nested: self.nested.map(|nested| nested.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Header of a state, the bytes behind it, and what it says of its size.
    fn written(bytes: usize, size: u32) -> String {
        let mut state = vec![0x5a; bytes];
        if let Some(field) = state.get_mut(4..8) {
            field.copy_from_slice(&size.to_le_bytes());
        }
        format!("\"{}\"", hex::encode(&state))
    }

    #[test]
    fn nested_state_is_as_long_as_it_says() {
        for size in [128, 4224, 8320] {
            let text = written(usize::try_from(size).unwrap(), size);
            let state: Nested = serde_json::from_str(&text).unwrap();
            assert_eq!(serde_json::to_string(&state).unwrap(), text);
        }
        let refused = |bytes, size| {
            let error = serde_json::from_str::<Nested>(&written(bytes, size)).unwrap_err();
            error.to_string()
        };
        assert_eq!(refused(127, 127), "127 bytes, expected 128 to 8320");
        assert_eq!(refused(8321, 8321), "8321 bytes, expected 128 to 8320");
        assert_eq!(refused(200, u32::MAX), "200 bytes, not 4294967295");
        assert_eq!(refused(200, 199), "200 bytes, not 199");
    }
}

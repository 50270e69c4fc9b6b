// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The time stamp counter of a vCPU whose state is put back: which value it gets, and how the counters of all of a
//! machine's vCPUs are kept equal.

#![expect(unsafe_code, reason = "an attribute of a vCPU is a pointer")]

use kvm_bindings::{
    KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, Msrs, kvm_device_attr, kvm_msr_entry,
};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

use super::state::VcpuState;

// Of a vCPU, which crate kvm-ioctls has for other processors only (`linux/kvm.h`).
ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);

/// Time stamp counter. It goes on over a reset, as on hardware with an invariant one, so that the vCPUs'
/// counters stay equal.
pub(super) const MSR_TSC: u32 = 0x10;
/// IA32_TSC_ADJUST: what the guest has added to it by writing either.
const MSR_TSC_ADJUST: u32 = 0x3b;
/// How far from the value that is meant the first vCPU's counter is set before: hours.
pub(super) const FAR_TICKS: u64 = 1 << 44;

/// What happens to the time stamp counter when a state is put back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tsc {
    /// It goes on: the same machine, reset.
    Keep,
    /// It is that of the state: another machine goes on where the saved one was, and this is the first of its vCPUs.
    SetFirst,
    /// The same for the others: as far from the host's as the first one's, whenever each was saved or is put back. KVM
    /// keeps no clock for all of a guest's vCPUs, and a guest trusts no counter, where they differ.
    Set(Offset),
}

/// How far a guest's time stamp counter is from the host's, in ticks, but for what the guest itself has added to that of
/// one vCPU (IA32_TSC_ADJUST). Absent in KVM before Linux 5.16.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Offset(Option<u64>);

/// How a counter is set.
#[derive(Debug, PartialEq, Eq)]
enum Counter {
    /// To each of these values, one after the other.
    To(Vec<u64>),
    /// So far from the host's.
    Offset(u64),
}

impl Tsc {
    /// Sets the counter of the vCPU that is put into `state`.
    pub(super) fn set(self, fd: &VcpuFd, state: &VcpuState) -> Result<(), kvm_ioctls::Error> {
        match self.counter(state) {
            Counter::To(values) => {
                for value in values {
                    let entry = kvm_msr_entry {
                        index: MSR_TSC,
                        data: value,
                        ..Default::default()
                    };
                    fd.set_msrs(&Msrs::from_entries(&[entry]).expect("one entry"))?;
                }
                Ok(())
            }
            Counter::Offset(mut ticks) => counter_attribute(fd, KVM_SET_DEVICE_ATTR(), &mut ticks),
        }
    }

    fn counter(self, state: &VcpuState) -> Counter {
        match self {
            Self::Keep => Counter::To(Vec::new()),
            // KVM before Linux 6.7 takes a value within a second of what the counter says for an attempt to keep vCPUs
            // together, and leaves it (`kvm_synchronize_tsc`): that of a guest which was saved in its first second would
            // be the new machine's. No value is near a far one.
            Self::SetFirst => Counter::To(vec![state.tsc.wrapping_add(FAR_TICKS), state.tsc]),
            Self::Set(Offset(Some(common))) => Counter::Offset(common.wrapping_add(state.adjust())),
            // The same attempt: it ends well when both values are of the same second.
            Self::Set(Offset(None)) => Counter::To(vec![state.tsc]),
        }
    }
}

impl Offset {
    /// That of a vCPU which was put into `state`.
    pub(super) fn of(fd: &VcpuFd, state: &VcpuState) -> Self {
        let ticks = counter_offset(fd);
        Self(ticks.map(|ticks| ticks.wrapping_sub(state.adjust())))
    }
}

impl VcpuState {
    /// What the guest has added to the counter.
    fn adjust(&self) -> u64 {
        let adjust = self.msrs.iter().find(|msr| msr.index == MSR_TSC_ADJUST);
        adjust.map_or(0, |msr| msr.data)
    }
}

/// Ticks from the host's counter to the vCPU's; `None` where KVM does not tell.
fn counter_offset(fd: &VcpuFd) -> Option<u64> {
    let mut ticks = 0;
    counter_attribute(fd, KVM_GET_DEVICE_ATTR(), &mut ticks).ok()?;
    Some(ticks)
}

/// Reads or writes `KVM_VCPU_TSC_OFFSET` (`Documentation/virt/kvm/devices/vcpu.rst` §4).
fn counter_attribute(
    fd: &VcpuFd,
    request: libc::c_ulong,
    ticks: &mut u64,
) -> Result<(), kvm_ioctls::Error> {
    let attribute = kvm_device_attr {
        group: KVM_VCPU_TSC_CTRL,
        attr: KVM_VCPU_TSC_OFFSET.into(),
        addr: &raw mut *ticks as u64,
        ..Default::default()
    };
    // SAFETY: the descriptor is a vCPU's. The kernel reads the struct, and reads or writes the eight bytes that it points
    // to, which are borrowed for the call.
    match unsafe { ioctl_with_ref(fd, request, &attribute) } {
        0 => Ok(()),
        _ => Err(kvm_ioctls::Error::last()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vcpu::bare::bare;
    use crate::vcpu::state::{restore, save};

    /// Two vCPUs are saved or put back hours apart: their counters are as far from the host's all the same, but for what
    /// the guest has added itself.
    #[test]
    fn counters_of_all_vcpus_are_set_alike_whenever_they_were_saved() {
        let Some(bare) = bare(&[]) else { return };
        let mut first = save(&bare.fd, &bare.scope).unwrap();
        let mut second = save(&bare.second, &bare.scope).unwrap();
        (first.tsc, second.tsc) = (1 << 50, 1 << 51);
        (*first.msr(MSR_TSC_ADJUST), *second.msr(MSR_TSC_ADJUST)) = (5, 9);
        let (far, value) = (first.tsc + FAR_TICKS, first.tsc);
        assert_eq!(Tsc::SetFirst.counter(&first), Counter::To(vec![far, value]));
        let common = Offset(Some(u64::MAX - 7));
        assert_eq!(Tsc::Set(common).counter(&second), Counter::Offset(1));

        let common = restore(&bare.fd, &first, Tsc::SetFirst).unwrap();
        let Some(ticks) = counter_offset(&bare.fd).filter(|ticks| *ticks != 0) else {
            println!("ATOLL-SKIP: this KVM does not tell, or its guests have the host's counter");
            return;
        };
        let ticks = ticks.wrapping_sub(5);
        assert_eq!(common, Offset(Some(ticks)));
        assert_eq!(
            restore(&bare.second, &second, Tsc::Set(common)).unwrap(),
            common
        );
        assert_eq!(counter_offset(&bare.second), Some(ticks.wrapping_add(9)));
    }
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! All of a vCPU's state, taken out of KVM and put back. A reset is putting back the state that the vCPU had
//! before its first instruction; a snapshot and a migration are the same with a later state, which is put into a
//! vCPU that was made with the same CPUID (`saved` has its written form).
//!
//! The order matters in both directions; it is that of the two functions below. Taken: the vCPU's run state
//! first, since reading it lets KVM finish what an INIT or SIPI began; pending events last. Put back: system
//! registers before MSRs (the APIC base is in both), MSRs with the deadline timer last (its write arms a timer
//! by the time stamp counter), events at the end.

#![expect(unsafe_code, reason = "KVM_SET_XSAVE reads as many bytes as KVM says")]

use std::io;

use kvm_bindings::{
    Msrs, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;

use crate::kvm::KvmError;

/// Time stamp counter. It goes on over a reset, as on hardware with an invariant one, so that the vCPUs'
/// counters stay equal. KVM takes values that are set within a second of each other for equal counters.
const MSR_TSC: u32 = 0x10;
/// Deadline of the local APIC timer.
const MSR_TSC_DEADLINE: u32 = 0x6e0;

/// A vCPU at rest.
pub struct VcpuState {
    pub(crate) tsc: u64,
    /// Ticks a millisecond; 0 when KVM does not say. Not put back either.
    pub(crate) tsc_khz: u32,
    pub(crate) mp_state: kvm_mp_state,
    pub(crate) regs: kvm_regs,
    pub(crate) sregs: kvm_sregs,
    pub(crate) xsave: Box<kvm_xsave>,
    pub(crate) xcrs: kvm_xcrs,
    pub(crate) debug_regs: kvm_debugregs,
    pub(crate) lapic: kvm_lapic_state,
    pub(crate) msrs: Vec<kvm_msr_entry>,
    pub(crate) events: kvm_vcpu_events,
}

/// What happens to the time stamp counter when a state is put back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tsc {
    /// It goes on: the same machine, reset.
    Keep,
    /// It is that of the state: another machine goes on where the saved one was.
    Set,
}

/// Takes the state out. The vCPU must not be running, and must have finished its last exit.
pub fn save(fd: &VcpuFd, msr_indices: &[u32]) -> Result<VcpuState, KvmError> {
    let failed = KvmError::failed;
    Ok(VcpuState {
        tsc: read_msrs(fd, &[MSR_TSC])?.first().map_or(0, |msr| msr.data),
        tsc_khz: fd.get_tsc_khz().unwrap_or(0),
        mp_state: fd.get_mp_state().map_err(failed("read a run state"))?,
        regs: fd.get_regs().map_err(failed("read registers"))?,
        sregs: fd.get_sregs().map_err(failed("read segments"))?,
        xsave: Box::new(fd.get_xsave().map_err(failed("read XSAVE state"))?),
        xcrs: fd.get_xcrs().map_err(failed("read XCR0"))?,
        debug_regs: fd
            .get_debug_regs()
            .map_err(failed("read debug registers"))?,
        lapic: fd.get_lapic().map_err(failed("read a local APIC"))?,
        msrs: read_msrs(fd, msr_indices)?
            .into_iter()
            .filter(|msr| msr.index != MSR_TSC)
            .collect(),
        events: fd.get_vcpu_events().map_err(failed("read events"))?,
    })
}

/// Puts a state back into a vCPU with the same CPUID.
pub fn restore(fd: &VcpuFd, state: &VcpuState, tsc: Tsc) -> Result<(), KvmError> {
    let failed = KvmError::failed;
    fd.set_mp_state(state.mp_state)
        .map_err(failed("set a run state"))?;
    fd.set_regs(&state.regs).map_err(failed("set registers"))?;
    fd.set_sregs(&state.sregs).map_err(failed("set segments"))?;
    // SAFETY: the kernel reads the 4096 bytes of kvm_xsave. It reads more only for features that a process
    // must ask for by arch_prctl(2) (AMX), which this one does not.
    unsafe { fd.set_xsave(&state.xsave) }.map_err(failed("set XSAVE state"))?;
    fd.set_xcrs(&state.xcrs).map_err(failed("set XCR0"))?;
    fd.set_debug_regs(&state.debug_regs)
        .map_err(failed("set debug registers"))?;
    fd.set_lapic(&state.lapic)
        .map_err(failed("set a local APIC"))?;
    if tsc == Tsc::Set {
        // Before the deadline, which is told in its ticks.
        let entry = kvm_msr_entry {
            index: MSR_TSC,
            data: state.tsc,
            ..Default::default()
        };
        let msrs = Msrs::from_entries(&[entry]).expect("one entry");
        fd.set_msrs(&msrs).map_err(failed("set the time stamp"))?;
    }
    restore_msrs(fd, &state.msrs)?;
    fd.set_vcpu_events(&state.events)
        .map_err(failed("set events"))
}

/// Reads MSRs, leaving out those that KVM lists for the host but this vCPU does not have.
fn read_msrs(fd: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, KvmError> {
    let mut wanted: Vec<kvm_msr_entry> = indices
        .iter()
        .map(|index| kvm_msr_entry {
            index: *index,
            ..Default::default()
        })
        .collect();
    wanted.sort_by_key(|entry| entry.index == MSR_TSC_DEADLINE);
    let mut saved = Vec::with_capacity(wanted.len());
    let mut rest = wanted.as_slice();
    while !rest.is_empty() {
        let mut msrs = Msrs::from_entries(rest).expect("KVM listed them itself");
        let count = fd
            .get_msrs(&mut msrs)
            .map_err(KvmError::failed("read MSRs"))?;
        saved.extend_from_slice(&msrs.as_slice()[..count]);
        // KVM stops at the first that it cannot read.
        rest = rest.get(count + 1..).unwrap_or_default();
    }
    Ok(saved)
}

/// Writes MSRs. One that is refused although it holds its value already (KVM lets some be read only) is no
/// loss; any other is an error that names it.
fn restore_msrs(fd: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<(), KvmError> {
    let mut rest = entries;
    while !rest.is_empty() {
        let msrs = Msrs::from_entries(rest).expect("as many as were read");
        let count = fd.set_msrs(&msrs).map_err(KvmError::failed("set MSRs"))?;
        if let Some(refused) = rest.get(count) {
            let now = read_msrs(fd, &[refused.index])?;
            if now.first().is_none_or(|entry| entry.data != refused.data) {
                let text = format!("MSR {:#x} was refused", refused.index);
                return Err(KvmError::Failed {
                    what: "set MSRs",
                    source: io::Error::other(text),
                });
            }
        }
        rest = rest.get(count + 1..).unwrap_or_default();
    }
    Ok(())
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! All of a vCPU's state, taken out of KVM and put back. A reset is putting back the state that the vCPU had
//! before its first instruction; a snapshot and a migration are the same with a later state, which is put into a
//! vCPU that was made with the same CPUID (`saved` has its written form).
//!
//! The order matters in both directions; it is that of the two functions below. Taken: the vCPU's run state
//! first, since reading it lets KVM finish what an INIT or SIPI began; pending events last. Put back: system
//! registers before MSRs (the APIC base is in both), MSRs with the deadline timer last (its write arms a timer
//! by the time stamp counter), events at the end.
//!
//! **A guest that runs guests.** Its vCPU may be in one of them: all registers are that guest's then, and what it goes
//! back to is in the nested state. Put back: MSRs that VMX operation fixes first (a feature control of 0, as at power-on,
//! also ends that operation, without which a reset's system registers would be refused; SDM vol. 3C §24.8), system
//! registers (EFER.SVME), the nested state, then everything else, which is the inner guest's.

#![expect(unsafe_code, reason = "KVM_SET_XSAVE reads as many bytes as KVM says")]

use std::io;

use kvm_bindings::nested::KvmNestedStateBuffer;
use kvm_bindings::{
    KVM_STATE_NESTED_FORMAT_SVM, KVM_STATE_NESTED_GUEST_MODE, Msrs, kvm_debugregs, kvm_lapic_state,
    kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;

use super::counter::{MSR_TSC, Offset, Tsc};
use crate::kvm::KvmError;

/// Deadline of the local APIC timer.
const MSR_TSC_DEADLINE: u32 = 0x6e0;

/// IA32_FEATURE_CONTROL, and those that say what VMX can do (SDM vol. 4, table 2-2; vol. 3D appendix A).
const MSR_FEATURE_CONTROL: u32 = 0x3a;
const MSRS_VMX: std::ops::RangeInclusive<u32> = 0x480..=0x491;

/// SVM is on (AMD APM vol. 2 §3.1.7).
const EFER_SVME: u64 = 1 << 12;
/// `KVM_STATE_NESTED_GIF_SET` as the state's field has it (`api.rst` §4.114).
const GIF_SET: u16 = 0x100;

/// What belongs to the state of a machine's vCPUs, beside what every vCPU has.
#[derive(Debug)]
pub struct Scope {
    /// MSRs that are saved and set ([`crate::kvm::Kvm::msr_indices`]).
    pub msr_indices: Vec<u32>,
    /// The guest sees VMX or SVM: what its own guests are doing is state, too.
    pub nested: bool,
}

/// A vCPU at rest: everything that KVM has of it, in KVM's own structures. Live form; [`crate::saved::VcpuSaved`] is the
/// written one.
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
    /// Absent where the guest can run no guests, and in states of programs that did not save it.
    pub(crate) nested: Option<Box<KvmNestedStateBuffer>>,
}

#[cfg(test)]
impl VcpuState {
    /// An MSR's value, to be changed.
    pub(super) fn msr(&mut self, index: u32) -> &mut u64 {
        let msr = self.msrs.iter_mut().find(|msr| msr.index == index);
        &mut msr.expect("KVM lists it").data
    }
}

/// Takes the state out. The vCPU must not be running, and must have finished its last exit.
pub fn save(fd: &VcpuFd, scope: &Scope) -> Result<VcpuState, KvmError> {
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
        msrs: read_msrs(fd, &scope.msr_indices)?
            .into_iter()
            .filter(|msr| msr.index != MSR_TSC)
            .collect(),
        nested: match scope.nested {
            true => Some(nested(fd)?),
            false => None,
        },
        events: fd.get_vcpu_events().map_err(failed("read events"))?,
    })
}

fn nested(fd: &VcpuFd) -> Result<Box<KvmNestedStateBuffer>, KvmError> {
    let mut state = Box::new(KvmNestedStateBuffer::empty());
    fd.nested_state(&mut state)
        .map_err(KvmError::failed("read the state of nested guests"))?;
    Ok(state)
}

/// A nested state that goes into a vCPU with this EFER. Where SVM is off and there is no inner guest, the global
/// interrupt flag is set, whatever the state says: it is so after a reset, only instructions of SVM clear it (AMD APM
/// vol. 2 §15.17), and KVM refuses anything else (`svm_set_nested_state`). The CPU that QEMU emulates has been seen
/// to lose the flag that KVM keeps in it (`V_GIF`).
fn with_interrupt_flag(mut state: KvmNestedStateBuffer, efer: u64) -> KvmNestedStateBuffer {
    let is_svm = u32::from(state.format) == KVM_STATE_NESTED_FORMAT_SVM;
    let in_guest = u32::from(state.flags) & KVM_STATE_NESTED_GUEST_MODE != 0;
    if is_svm && !in_guest && efer & EFER_SVME == 0 {
        state.flags |= GIF_SET;
    }
    state
}

/// Puts a state back into a vCPU with the same CPUID. Returns how its counter is set now, for the other vCPUs.
pub fn restore(fd: &VcpuFd, state: &VcpuState, tsc: Tsc) -> Result<Offset, KvmError> {
    let failed = KvmError::failed;
    fd.set_mp_state(state.mp_state)
        .map_err(failed("set a run state"))?;
    let fixed =
        |msr: &&kvm_msr_entry| msr.index == MSR_FEATURE_CONTROL || MSRS_VMX.contains(&msr.index);
    let fixed: Vec<kvm_msr_entry> = state.msrs.iter().filter(fixed).copied().collect();
    restore_msrs(fd, &fixed)?;
    fd.set_sregs(&state.sregs).map_err(failed("set segments"))?;
    if let Some(nested) = &state.nested {
        fd.set_nested_state(&with_interrupt_flag(**nested, state.sregs.efer))
            .map_err(failed("set the state of nested guests"))?;
    }
    fd.set_regs(&state.regs).map_err(failed("set registers"))?;
    // SAFETY: the kernel reads the 4096 bytes of kvm_xsave. It reads more only for features that a process
    // must ask for by arch_prctl(2) (AMX), which this one does not.
    unsafe { fd.set_xsave(&state.xsave) }.map_err(failed("set XSAVE state"))?;
    fd.set_xcrs(&state.xcrs).map_err(failed("set XCR0"))?;
    fd.set_debug_regs(&state.debug_regs)
        .map_err(failed("set debug registers"))?;
    fd.set_lapic(&state.lapic)
        .map_err(failed("set a local APIC"))?;
    // Before the deadline, which is told in its ticks.
    tsc.set(fd, state).map_err(failed("set the time stamp"))?;
    restore_msrs(fd, &state.msrs)?;
    fd.set_vcpu_events(&state.events)
        .map_err(failed("set events"))?;
    Ok(Offset::of(fd, state))
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

#[cfg(test)]
mod tests {
    use kvm_bindings::{
        KVM_MP_STATE_RUNNABLE, KVM_STATE_NESTED_FORMAT_VMX, KVM_STATE_NESTED_GIF_SET,
        KVM_VCPUEVENT_VALID_NMI_PENDING,
    };
    use kvm_ioctls::VcpuExit;

    use super::*;
    use crate::saved::VcpuSaved;
    use crate::vcpu::bare::{Bare, PORT, bare, in_time};
    use crate::vcpu::counter::FAR_TICKS;
    use crate::vcpu::setup;

    #[test]
    fn a_state_that_is_put_into_another_vcpu_is_the_same() {
        let (Some(one), Some(other)) = (bare(&[]), bare(&[])) else {
            return;
        };
        let (first, second, scope) = (one.fd, other.fd, one.scope);
        // Something of every kind that is not as at power-on.
        setup::entry(
            &first,
            setup::Entry::Long {
                address: 0x1234_5000,
            },
        )
        .unwrap();
        let mut state = save(&first, &scope).unwrap();
        state.mp_state.mp_state = KVM_MP_STATE_RUNNABLE;
        (state.regs.rax, state.regs.r15) = (0x1111_2222_3333_4444, u64::MAX);
        state.debug_regs.db[0] = 0x4000;
        state.sregs.cr2 = 0x5000;
        state.xsave.region[40] = 0x0bad_cafe;
        for msr in &mut state.msrs {
            // SYSENTER_EIP, PAT, KERNEL_GS_BASE, deadline.
            match msr.index {
                0x176 | 0xc000_0102 => msr.data = 0x7fff_1234,
                0x277 => msr.data = 0x0007_0406_0007_0401,
                _ => {}
            }
        }
        restore(&first, &state, Tsc::Keep).unwrap();
        let before = save(&first, &scope).unwrap();
        restore(&second, &before, Tsc::SetFirst).unwrap();
        let after = save(&second, &scope).unwrap();
        let again = save(&first, &scope).unwrap();
        assert_eq!(before.regs, after.regs);
        assert_eq!(
            (before.regs.rax, before.regs.r15),
            (state.regs.rax, u64::MAX)
        );
        assert_eq!(before.sregs, after.sregs);
        assert_eq!(before.debug_regs, after.debug_regs);
        assert_eq!(before.debug_regs.db[0], 0x4000);
        assert_eq!(before.mp_state, after.mp_state);
        assert_eq!(before.lapic, after.lapic);
        assert_eq!(before.xsave.region, after.xsave.region);
        assert_eq!(before.xcrs.xcrs[0], after.xcrs.xcrs[0]);
        let (least, most) = (before.tsc, before.tsc + FAR_TICKS / 2);
        assert!((least..most).contains(&after.tsc), "it goes on");
        assert_eq!(before.msrs.len(), after.msrs.len());
        for ((before, after), again) in before.msrs.iter().zip(&after.msrs).zip(&again.msrs) {
            // Those that count by themselves are another matter.
            let moves = before.data != again.data;
            assert!(moves || before == after, "MSR {:#x}", before.index);
        }
    }

    /// What other programs forgot, and what KVM does not list all of: whatever of it this vCPU has is in its state.
    #[test]
    fn every_msr_that_a_guest_may_have_set_is_in_the_state() {
        let Some(Bare { fd, scope, .. }) = bare(&[]) else {
            return;
        };
        let state = save(&fd, &scope).unwrap();
        // Time stamp and its adjustment, SYSENTER, ranges of memory types with their default, PAT, TSX_CTRL, XSS,
        // deadline, KVM's.
        let wanted = [
            MSR_TSC..=MSR_TSC,
            0x3b..=0x3b,
            0x174..=0x176,
            0x200..=0x20f,
            0x250..=0x250,
            0x258..=0x259,
            0x268..=0x26f,
            0x277..=0x277,
            0x2ff..=0x2ff,
            0x122..=0x122,
            0xda0..=0xda0,
            MSR_TSC_DEADLINE..=MSR_TSC_DEADLINE,
            0x11..=0x12,
            0x4b56_4d00..=0x4b56_4d07,
        ];
        let wanted: Vec<u32> = wanted.into_iter().flatten().collect();
        let saved = |index| index == MSR_TSC || state.msrs.iter().any(|msr| msr.index == index);
        // KVM reads one that the vCPU lacks as 0, and lets nothing else be written.
        let holds = |index| {
            (0..64).any(|bit| {
                let mut entry = read_msrs(&fd, &[index]).unwrap()[0];
                entry.data = 1 << bit;
                let set = restore_msrs(&fd, &[entry]).is_ok();
                set && read_msrs(&fd, &[index]).unwrap()[0].data == entry.data
            })
        };
        let readable = read_msrs(&fd, &wanted).unwrap();
        let left_out = readable.iter().map(|msr| msr.index);
        let left_out = left_out.filter(|index| !saved(*index) && holds(*index));
        let left_out: Vec<String> = left_out.map(|index| format!("{index:#x}")).collect();
        assert!(left_out.is_empty(), "{left_out:?}");
    }

    /// Vector of the deadline timer, in its local vector table entry's mode for deadlines (Intel SDM vol. 3A §11.5.4.1).
    const TIMER: u8 = 0x50;

    /// Has the local APIC deliver the deadline.
    fn expect_deadline(fd: &VcpuFd) {
        let mut lapic = fd.get_lapic().unwrap();
        // Spurious interrupt vector, with the APIC on; LVT timer.
        for (register, value) in [(0xf0, 0x1ff_u32), (0x320, 1 << 18 | u32::from(TIMER))] {
            for (to, from) in lapic.regs[register..].iter_mut().zip(value.to_le_bytes()) {
                *to = std::os::raw::c_char::from_le_bytes([from]);
            }
        }
        fd.set_lapic(&lapic).unwrap();
    }

    /// An exception and an NMI are on their way to the guest, and a deadline passes as soon as it goes on: it gets all
    /// three.
    #[test]
    fn a_deadline_and_what_is_pending_reach_the_guest_in_another_vcpu() {
        // sti; hlt; jmp to hlt
        let code = [0xfb, 0xf4, 0xeb, 0xfd];
        let (Some(one), Some(other)) = (bare(&code), bare(&code)) else {
            return;
        };
        expect_deadline(&one.fd);
        let mut state = save(&one.fd, &one.scope).unwrap();
        *state.msr(MSR_TSC_DEADLINE) = 1 << 62;
        (state.events.exception.injected, state.events.exception.nr) = (1, 6);
        state.events.nmi.pending = 1;
        state.events.flags |= KVM_VCPUEVENT_VALID_NMI_PENDING;
        restore(&one.fd, &state, Tsc::Keep).unwrap();
        let state = save(&one.fd, &one.scope).unwrap();
        assert_eq!(state.events.exception.injected, 1);
        assert_eq!(
            (state.events.exception.nr, state.events.nmi.pending),
            (6, 1)
        );
        let last = state.msrs.last().unwrap();
        assert_eq!((last.index, last.data), (MSR_TSC_DEADLINE, 1 << 62));

        // As it is written, but for the time: soon after that of the state, where a counter can be set.
        let written = serde_json::to_string(&VcpuSaved::new(state, &[])).unwrap();
        let written: VcpuSaved = serde_json::from_str(&written).unwrap();
        let mut state = written.into_state(1 << 50);
        Tsc::SetFirst.set(&one.fd, &state).unwrap();
        let is_set = read_msrs(&one.fd, &[MSR_TSC]).unwrap()[0].data >= 1 << 50;
        *state.msr(MSR_TSC_DEADLINE) = if is_set { state.tsc + 1 } else { 1 };
        restore(&other.fd, &state, Tsc::SetFirst).unwrap();
        let (mut fd, machine) = (other.fd, other.machine);
        let told = in_time(move || {
            let mut told = Vec::new();
            while !told.contains(&TIMER) {
                match fd.run() {
                    Ok(VcpuExit::IoOut(port, data)) if port == u16::from(PORT) => {
                        told.extend_from_slice(data);
                    }
                    Ok(_) => {}
                    Err(error) => assert!(matches!(error.errno(), libc::EINTR | libc::EAGAIN)),
                }
            }
            drop(machine);
            told
        });
        assert_eq!(told, [6, 2, TIMER]);
    }

    #[test]
    fn svm_that_is_off_does_not_hold_interrupts_back() {
        let settled = |format, flags, efer| {
            let mut state = KvmNestedStateBuffer::empty();
            (state.format, state.flags) = (format, flags);
            with_interrupt_flag(state, efer).flags
        };
        let [vmx, svm] = [KVM_STATE_NESTED_FORMAT_VMX, KVM_STATE_NESTED_FORMAT_SVM]
            .map(|format| u16::try_from(format).unwrap());
        let set = u16::try_from(KVM_STATE_NESTED_GIF_SET).unwrap();
        let in_guest = u16::try_from(KVM_STATE_NESTED_GUEST_MODE).unwrap();
        let (off, on) = (0xd01, 0xd01 | EFER_SVME);
        assert_eq!(settled(svm, 0, off), set);
        assert_eq!(settled(svm, set, off), set);
        // Between CLGI and STGI, in an inner guest, and where there is no such flag.
        assert_eq!(settled(svm, 0, on), 0);
        assert_eq!(settled(svm, in_guest, off), in_guest);
        assert_eq!(settled(vmx, 0, off), 0);
    }

    #[test]
    fn a_refused_msr_is_an_error_with_its_number() {
        let Some(Bare { fd, scope, .. }) = bare(&[]) else {
            return;
        };
        let mut state = save(&fd, &scope).unwrap();
        let unknown = kvm_msr_entry {
            index: 0x7fff_fff0,
            data: 1,
            ..Default::default()
        };
        state.msrs.insert(state.msrs.len() / 2, unknown);
        let error = restore(&fd, &state, Tsc::Keep).unwrap_err();
        let cause = std::error::Error::source(&error).unwrap().to_string();
        assert_eq!(cause, "MSR 0x7ffffff0 was refused");
        // One that KVM does not write, with the value that it has, is none.
        state.msrs.retain(|msr| msr.index != unknown.index);
        restore(&fd, &state, Tsc::Keep).unwrap();
    }
}

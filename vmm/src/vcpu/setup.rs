// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Registers of a vCPU before its first instruction.
//!
//! Not here: what is in guest memory then (`loader.rs`). Application processors get the same CPUID and MSRs
//! and no registers: they wait for the bootstrap processor's INIT and SIPI in KVM's local APIC.

use std::io;

use atoll_firmware::paging;
use kvm_bindings::{CpuId, Msrs, kvm_cpuid_entry2, kvm_fpu, kvm_msr_entry, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;

use crate::kvm::KvmError;
use crate::layout;

/// How the bootstrap processor enters the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// Linux's 64-bit boot protocol: long mode with an identity map, RSI is the zero page.
    Long {
        /// First instruction.
        address: u64,
    },
    /// PVH: 32-bit protected mode without paging, EBX is the start_info.
    Pvh {
        /// First instruction.
        address: u64,
    },
}

/// Control register bits (Intel SDM vol. 3A §2.5).
const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
/// IA32_EFER (§2.2.1).
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Bit 1 of RFLAGS is always set (Intel SDM vol. 1 §3.4.3).
const RFLAGS_FIXED: u64 = 1 << 1;
/// Power-on values of the x87 control word with exceptions masked, and of MXCSR (vol. 1 §8.1.5, §10.2.3).
const X87_CONTROL: u16 = 0x37f;
const MXCSR: u32 = 0x1f80;

const MSR_MISC_ENABLE: u32 = 0x1a0;
/// Fast strings (vol. 4, table 2-2).
const FAST_STRINGS: u64 = 1;
const MSR_MTRR_DEFAULT: u32 = 0x2ff;
/// MTRRs enabled, write-back by default (vol. 3A §12.11.2.1), so that a guest may set page attributes.
const MTRR_WRITE_BACK: u64 = 1 << 11 | 6;

/// Local vector table of a local APIC (vol. 3A §11.5.1): entries LINT0 and LINT1, and delivery modes.
const LAPIC_LINT0: usize = 0x350;
const LAPIC_LINT1: usize = 0x360;
const DELIVER_EXTINT: u32 = 7 << 8;
const DELIVER_NMI: u32 = 4 << 8;
const DELIVERY_MASK: u32 = 7 << 8;

/// What every vCPU gets; `msrs` are those of its CPU.
pub fn common(
    fd: &VcpuFd,
    cpuid: &[kvm_cpuid_entry2],
    msrs: &[(u32, u64)],
) -> Result<(), KvmError> {
    let cpuid = CpuId::from_entries(cpuid).map_err(|_| KvmError::Failed {
        what: "list a vCPU's features",
        source: io::ErrorKind::InvalidInput.into(),
    })?;
    // CPUID comes first: what a vCPU has decides which MSRs it has.
    fd.set_cpuid2(&cpuid)
        .map_err(KvmError::failed("set a vCPU's features"))?;
    set_msrs(fd, &[(MSR_MISC_ENABLE, FAST_STRINGS)])?;
    set_msrs(fd, msrs)?;
    let fpu = kvm_fpu {
        fcw: X87_CONTROL,
        mxcsr: MXCSR,
        ..Default::default()
    };
    fd.set_fpu(&fpu)
        .map_err(KvmError::failed("set a vCPU's floating-point registers"))
}

/// What a PC's firmware leaves to the kernel; only where none runs, since firmware expects power-on values.
pub fn as_firmware_leaves_it(fd: &VcpuFd) -> Result<(), KvmError> {
    set_msrs(fd, &[(MSR_MTRR_DEFAULT, MTRR_WRITE_BACK)])?;
    connect_local_interrupts(fd)
}

fn set_msrs(fd: &VcpuFd, values: &[(u32, u64)]) -> Result<(), KvmError> {
    let what = "set a vCPU's MSRs";
    let entries: Vec<kvm_msr_entry> = values
        .iter()
        .map(|&(index, data)| kvm_msr_entry {
            index,
            data,
            ..Default::default()
        })
        .collect();
    let msrs = Msrs::from_entries(&entries).expect("a handful of entries");
    let set = fd.set_msrs(&msrs).map_err(KvmError::failed(what))?;
    if set == entries.len() {
        return Ok(());
    }
    let refused = io::Error::other(format!("MSR {:#x} was refused", entries[set].index));
    Err(KvmError::Failed {
        what,
        source: refused,
    })
}

/// LINT0 takes the PICs' interrupts, LINT1 the NMI, as a PC's firmware leaves them.
fn connect_local_interrupts(fd: &VcpuFd) -> Result<(), KvmError> {
    let mut lapic = fd
        .get_lapic()
        .map_err(KvmError::failed("read a local APIC"))?;
    for (offset, mode) in [(LAPIC_LINT0, DELIVER_EXTINT), (LAPIC_LINT1, DELIVER_NMI)] {
        let mut bytes = [0; 4];
        for (byte, register) in bytes.iter_mut().zip(&lapic.regs[offset..]) {
            *byte = register.to_le_bytes()[0];
        }
        let value = (u32::from_le_bytes(bytes) & !DELIVERY_MASK) | mode;
        for (byte, register) in value.to_le_bytes().iter().zip(&mut lapic.regs[offset..]) {
            *register = std::os::raw::c_char::from_le_bytes([*byte]);
        }
    }
    fd.set_lapic(&lapic)
        .map_err(KvmError::failed("set a local APIC"))
}

/// What the bootstrap processor gets on top: where it begins.
pub fn entry(fd: &VcpuFd, entry: Entry) -> Result<(), KvmError> {
    let mut sregs = fd
        .get_sregs()
        .map_err(KvmError::failed("read a vCPU's segments"))?;
    let gdt = match entry {
        Entry::Long { .. } => paging::GDT,
        Entry::Pvh { .. } => paging::GDT_PVH,
    };
    let data = segment(gdt[2], 2);
    sregs.cs = segment(gdt[1], 1);
    (sregs.ds, sregs.es, sregs.fs) = (data, data, data);
    (sregs.gs, sregs.ss) = (data, data);
    sregs.tr = segment(gdt[3], 3);
    sregs.gdt.base = layout::GDT;
    sregs.gdt.limit = 4 * 8 - 1;
    sregs.idt.base = layout::IDT;
    sregs.idt.limit = 8 - 1;
    sregs.cr0 = CR0_PE | CR0_ET;
    (sregs.cr3, sregs.cr4, sregs.efer) = (0, 0, 0);
    if let Entry::Long { .. } = entry {
        sregs.cr0 |= CR0_PG;
        sregs.cr3 = layout::PAGE_TABLES;
        sregs.cr4 = CR4_PAE;
        sregs.efer = EFER_LME | EFER_LMA;
    }
    fd.set_sregs(&sregs)
        .map_err(KvmError::failed("set a vCPU's segments"))?;
    fd.set_regs(&registers(entry))
        .map_err(KvmError::failed("set a vCPU's registers"))
}

fn registers(entry: Entry) -> kvm_regs {
    let common = kvm_regs {
        rflags: RFLAGS_FIXED,
        ..Default::default()
    };
    match entry {
        Entry::Long { address } => kvm_regs {
            rip: address,
            rsi: layout::ZERO_PAGE,
            rsp: layout::BOOT_STACK,
            rbp: layout::BOOT_STACK,
            ..common
        },
        Entry::Pvh { address } => kvm_regs {
            rip: address,
            rbx: layout::PVH_START_INFO,
            ..common
        },
    }
}

/// A segment register that holds descriptor number `index` of the boot GDT.
fn segment(descriptor: u64, index: u16) -> kvm_segment {
    let bits = |from: u32, count: u32| {
        let field = (descriptor >> from) & ((1 << count) - 1);
        u8::try_from(field).expect("at most four bits")
    };
    let base = ((descriptor >> 16) & 0xff_ffff) | ((descriptor >> 32) & 0xff00_0000);
    let limit = (descriptor & 0xffff) | ((descriptor >> 32) & 0xf_0000);
    let mut limit = u32::try_from(limit).expect("20 bits");
    let granular = bits(55, 1);
    if granular == 1 {
        limit = (limit << 12) | 0xfff;
    }
    kvm_segment {
        base,
        limit,
        selector: index * 8,
        type_: bits(40, 4),
        s: bits(44, 1),
        dpl: bits(45, 2),
        present: bits(47, 1),
        avl: bits(52, 1),
        l: bits(53, 1),
        db: bits(54, 1),
        g: granular,
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_are_what_the_descriptors_say() {
        let code = segment(paging::GDT[1], 1);
        assert_eq!((code.selector, code.type_, code.l, code.db), (8, 11, 1, 0));
        assert_eq!((code.limit, code.g, code.present), (u32::MAX, 1, 1));
        let task = segment(paging::GDT_PVH[3], 3);
        assert_eq!((task.type_, task.s, task.limit), (11, 0, 0x67));
        assert_eq!(segment(0xab00_0012_3456_0000, 0).base, 0xab12_3456);
    }

    #[test]
    fn each_protocol_finds_its_parameters() {
        let long = registers(Entry::Long { address: 0x10_0200 });
        assert_eq!((long.rip, long.rsi), (0x10_0200, 0x7000));
        let pvh = registers(Entry::Pvh { address: 0x10_0000 });
        assert_eq!((pvh.rip, pvh.rbx, pvh.rflags), (0x10_0000, 0x6000, 2));
    }
}

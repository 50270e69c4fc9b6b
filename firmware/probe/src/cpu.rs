// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Single instructions: ports, time stamps, and the services of ring 0 that `entry.s` offers by `ud2`.
#![expect(
    unsafe_code,
    reason = "instructions that no Rust expression stands for"
)]

use core::arch::asm;

/// Number of the first service of `entry.s`.
const SERVICE: u64 = 0x5052_4f00;

/// Reads one byte from a port.
pub fn inb(port: u16) -> u8 {
    let value;
    // SAFETY: ring 3 has I/O privilege, and a port access touches no memory of this program.
    unsafe { asm!("in al, dx", out("al") value, in("dx") port, options(nomem, nostack)) };
    value
}

/// Writes one byte to a port.
pub fn outb(port: u16, value: u8) {
    // SAFETY: as for `inb`.
    unsafe { asm!("out dx, al", in("al") value, in("dx") port, options(nomem, nostack)) };
}

/// Reads two bytes from a port.
pub fn inw(port: u16) -> u16 {
    let value;
    // SAFETY: as for `inb`.
    unsafe { asm!("in ax, dx", out("ax") value, in("dx") port, options(nomem, nostack)) };
    value
}

/// Writes two bytes to a port.
pub fn outw(port: u16, value: u16) {
    // SAFETY: as for `inb`.
    unsafe { asm!("out dx, ax", in("ax") value, in("dx") port, options(nomem, nostack)) };
}

/// Reads four bytes from a port.
pub fn inl(port: u16) -> u32 {
    let value;
    // SAFETY: as for `inb`.
    unsafe { asm!("in eax, dx", out("eax") value, in("dx") port, options(nomem, nostack)) };
    value
}

/// Writes four bytes to a port.
pub fn outl(port: u16, value: u32) {
    // SAFETY: as for `inb`.
    unsafe { asm!("out dx, eax", in("eax") value, in("dx") port, options(nomem, nostack)) };
}

/// The time stamp counter, after everything before it.
pub fn time_stamp() -> u64 {
    let (low, high): (u64, u64);
    // SAFETY: both instructions only write the named registers.
    unsafe { asm!("lfence", "rdtsc", out("rax") low, out("rdx") high, options(nomem, nostack)) };
    high << 32 | low
}

/// Waits for an interrupt. The only moment that lets interrupts in: one that comes between a look for work and
/// this call is still pending and ends the wait at once.
pub fn halt() {
    // SAFETY: service 0 changes no register.
    unsafe { asm!("ud2", in("r8") SERVICE, options(nostack)) };
}

/// `cpuid` as ring 0 sees it: ring 3 of a KVM without hardware virtualization would see the host's.
pub fn processor_id(leaf: u32, index: u32) -> [u32; 4] {
    let (a, b, c, d): (u32, u64, u32, u32);
    // SAFETY: service 1 writes these four registers; rbx, which the compiler keeps, is put back.
    unsafe {
        asm!("mov {b}, rbx", "ud2", "xchg {b}, rbx", b = out(reg) b, inout("eax") leaf => a,
             inout("ecx") index => c, out("edx") d, in("r8") SERVICE + 1, options(nostack))
    };
    [a, b as u32, c, d]
}

/// Writes a model specific register.
pub fn write_register(register: u32, value: u64) {
    let (high, low) = (value >> 32, value & 0xffff_ffff);
    // SAFETY: service 2; the caller in `clock.rs` names kvmclock's register and memory that lives for ever.
    unsafe {
        asm!("ud2", in("rcx") u64::from(register), in("rdx") high, in("rax") low, in("r8") SERVICE + 2, options(nostack))
    };
}

/// Runs a loop of two instructions `count` times in ring 0.
pub fn spin_ring0(count: u64) {
    // SAFETY: service 3 changes rcx only.
    unsafe { asm!("ud2", inout("rcx") count => _, in("r8") SERVICE + 3, options(nostack)) };
}

/// Runs the same loop in ring 3.
pub fn spin_ring3(count: u64) {
    // SAFETY: changes the named register only.
    unsafe { asm!("2: dec {0}", "jnz 2b", inout(reg) count => _, options(nomem, nostack)) };
}

/// Reads a port `count` times from ring 0.
pub fn read_port_ring0(port: u16, count: u64) {
    // SAFETY: service 4 changes rcx and al.
    unsafe {
        asm!("ud2", inout("rcx") count => _, in("dx") port, out("al") _, in("r8") SERVICE + 4, options(nostack))
    };
}

/// Writes bytes to a port from ring 0, where a port access is three times cheaper under an emulating KVM.
pub fn write_port(port: u16, bytes: &[u8]) {
    if bytes.is_empty() {
        return;
    }
    // SAFETY: service 5 reads rcx bytes from rsi, which is this slice.
    unsafe {
        asm!("ud2", inout("rcx") bytes.len() => _, inout("rsi") bytes.as_ptr() => _, in("dx") port,
             out("al") _, in("r8") SERVICE + 5, options(nostack))
    };
}

/// An exception.
pub fn invalid_opcode() -> ! {
    // SAFETY: does not return.
    unsafe { asm!("ud2", in("r8") 0_u64, options(noreturn)) }
}

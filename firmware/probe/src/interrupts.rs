// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Interrupt gates, the local APIC and the I/O APIC. The handlers, in `entry.s`, only count.
#![expect(
    unsafe_code,
    reason = "tables and counters that are shared with assembly"
)]

use core::sync::atomic::{AtomicU8, AtomicU32, Ordering};

use crate::cpu;
use crate::memory::Mmio;

/// Local APIC and I/O APIC where every PC has them (Intel SDM vol. 3 §12.4.1, MADT of all machines we know).
const LOCAL_APIC: Mmio = Mmio(0xfee0_0000);
const IO_APIC: Mmio = Mmio(0xfec0_0000);

/// First of the vectors that have a counting stub in `entry.s`, and how many have.
const VECTOR_FIRST: u8 = 0x40;
const VECTOR_COUNT: usize = 32;
const EXCEPTION_COUNT: usize = 32;
/// Invalid opcode: how ring 3 calls ring 0, see `entry.s`.
const VECTOR_SERVICE: usize = 6;
const VECTOR_SPURIOUS: usize = 0xff;
const STUB_BYTES: u64 = 16;

/// Two words of the interrupt descriptor table, which has 256 such gates.
type Gate = [u64; 2];

unsafe extern "C" {
    static exception_stubs: u8;
    static interrupt_stubs: u8;
    static spurious_stub: u8;
    static ring0_service: u8;
    static mut gates: Gate;

    static interrupt_counts: [AtomicU32; VECTOR_COUNT];
}

/// One interrupt vector with its counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vector(u8);

impl Vector {
    /// The next free vector, `None` when all are taken.
    pub fn allocate() -> Option<Vector> {
        static NEXT: AtomicU8 = AtomicU8::new(0);
        let index = NEXT.fetch_add(1, Ordering::Relaxed);
        (usize::from(index) < VECTOR_COUNT - 1).then_some(Vector(index))
    }

    /// Interrupts so far.
    pub fn count(self) -> u32 {
        // SAFETY: `entry.s` defines this array; the handlers change it between instructions only.
        let counts = unsafe { &interrupt_counts };
        counts[usize::from(self.0)].load(Ordering::Acquire)
    }

    /// What a device writes to `MESSAGE_ADDRESS` to raise it (Intel SDM vol. 3 §12.11.2: fixed, edge).
    pub fn message(self) -> u32 {
        u32::from(VECTOR_FIRST + self.0)
    }

    /// Sends the I/O APIC's input here, edge triggered: a level that stays high interrupts once.
    pub fn listen_to(self, input: u32) {
        for (register, value) in [(0x11 + 2 * input, 0), (0x10 + 2 * input, self.message())] {
            IO_APIC.write32(0, register);
            IO_APIC.write32(0x10, value);
        }
    }
}

/// Where message-signalled interrupts go: the local APIC of CPU 0.
pub const MESSAGE_ADDRESS: u32 = 0xfee0_0000;

fn set_gate(vector: usize, gate: Gate) {
    let slot = (&raw mut gates).wrapping_add(vector);
    // SAFETY: the table has a gate for each of the 256 vectors, nothing else writes it, and interrupts are off.
    unsafe { slot.write_volatile(gate) };
}

/// Intel SDM vol. 3 §7.14.1: 64-bit interrupt gate, present, code segment 0x08.
fn gate(handler: u64) -> Gate {
    let low = (handler & 0xffff) | 0x08 << 16 | 0x8e << 40 | (handler >> 16 & 0xffff) << 48;
    [low, handler >> 32]
}

/// Ticks of the local APIC's timer until a wait ends without a device: about 0.27 s where the timer counts
/// nanoseconds, as KVM's and QEMU's do.
const ALARM_TICKS: u32 = 1 << 28;

/// Halts until `done`, or until four alarms in a row say that the interrupt is lost.
pub fn wait(mut done: impl FnMut() -> bool) -> bool {
    for _ in 0..4 {
        // Divide by 1; one shot; the last vector, which no device gets.
        LOCAL_APIC.write32(0x3e0, 0xb);
        LOCAL_APIC.write32(0x320, u32::from(VECTOR_FIRST) + VECTOR_COUNT as u32 - 1);
        LOCAL_APIC.write32(0x380, ALARM_TICKS);
        let alarms = alarm_count();
        while !done() && alarm_count() == alarms {
            cpu::halt();
        }
        LOCAL_APIC.write32(0x380, 0);
        if done() {
            return true;
        }
    }
    false
}

fn alarm_count() -> u32 {
    Vector(VECTOR_COUNT as u8 - 1).count()
}

/// Fills the gates, silences the old interrupt controller, turns the local APIC on.
pub fn install() {
    let stub = |first: *const u8, index: usize| gate(first as u64 + index as u64 * STUB_BYTES);
    for vector in 0..EXCEPTION_COUNT {
        set_gate(vector, stub(&raw const exception_stubs, vector));
    }
    for index in 0..VECTOR_COUNT {
        let vector = usize::from(VECTOR_FIRST) + index;
        set_gate(vector, stub(&raw const interrupt_stubs, index));
    }
    set_gate(VECTOR_SERVICE, stub(&raw const ring0_service, 0));
    set_gate(VECTOR_SPURIOUS, stub(&raw const spurious_stub, 0));
    cpu::outb(0x21, 0xff);
    cpu::outb(0xa1, 0xff);
    LOCAL_APIC.write32(0xf0, 0x100 | VECTOR_SPURIOUS as u32);
    LOCAL_APIC.write32(0x80, 0);
}

/// Ends the machine by a triple fault: no gate is left, and then an invalid opcode.
pub fn crash() -> ! {
    for vector in 0..256 {
        set_gate(vector, [0, 0]);
    }
    cpu::invalid_opcode()
}

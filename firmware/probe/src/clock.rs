// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Time since the start, from the time stamp counter; its frequency comes from kvmclock, or else from the PIT.

use core::sync::atomic::{AtomicU32, Ordering};

use crate::cpu;

/// Memory that KVM fills: `struct pvclock_vcpu_time_info`, kernel Documentation/virt/kvm/x86/msr.rst.
#[repr(C, align(64))]
struct SharedPage([AtomicU32; 8]);

static SHARED: SharedPage = SharedPage([const { AtomicU32::new(0) }; 8]);

/// MSR_KVM_SYSTEM_TIME_NEW, offered by bit 3 of CPUID 0x40000001 EAX.
const KVM_SYSTEM_TIME: u32 = 0x4b56_4d01;
const KVM_FEATURE_CLOCKSOURCE2: u32 = 1 << 3;

/// Input of the PIT's counters, Hz.
const PIT_HZ: u64 = 1_193_182;

/// Where the frequency came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The hypervisor said it.
    KvmClock,
    /// Counted against 10 ms of the interval timer.
    Pit,
}

/// A running clock.
pub struct Clock {
    start: u64,
    /// Time stamp ticks a millisecond.
    pub khz: u64,
    /// Where `khz` came from.
    pub source: Source,
}

impl Clock {
    /// Finds the frequency; `start` is now.
    pub fn start() -> Clock {
        let start = cpu::time_stamp();
        let (khz, source) = match kvm_khz() {
            Some(khz) => (khz, Source::KvmClock),
            None => (pit_khz(), Source::Pit),
        };
        Clock {
            start,
            khz: khz.max(1),
            source,
        }
    }

    /// Nanoseconds since the start.
    pub fn now_ns(&self) -> u64 {
        let ticks = cpu::time_stamp().wrapping_sub(self.start);
        let ns = u128::from(ticks) * 1_000_000 / u128::from(self.khz);
        u64::try_from(ns).unwrap_or(u64::MAX)
    }

    /// Nanoseconds that `work` takes.
    pub fn measure(&self, work: impl FnOnce()) -> u64 {
        let start = self.now_ns();
        work();
        self.now_ns() - start
    }

    /// Whether `done` became true within `timeout_ms`; asks all the time.
    pub fn wait(&self, timeout_ms: u64, mut done: impl FnMut() -> bool) -> bool {
        let deadline = self.now_ns() + timeout_ms * 1_000_000;
        while !done() {
            if self.now_ns() > deadline {
                return false;
            }
            core::hint::spin_loop();
        }
        true
    }
}

/// Has KVM keep its clock up to date in our memory from now on.
pub fn share() {
    cpu::write_register(KVM_SYSTEM_TIME, &raw const SHARED as u64 | 1);
}

/// What KVM's shared clock says, once it is shared.
pub struct Shared {
    /// Nanoseconds.
    pub ns: u64,
    /// `PVCLOCK_TSC_STABLE_BIT`, `PVCLOCK_GUEST_STOPPED`.
    pub flags: u8,
    /// The time stamp counter at that moment.
    pub ticks: u64,
}

/// Reads the shared clock.
pub fn shared() -> Shared {
    let word = |index: usize| SHARED.0[index].load(Ordering::Acquire);
    let wide = |index: usize| u64::from(word(index)) | u64::from(word(index + 1)) << 32;
    loop {
        let version = word(0);
        let ticks = cpu::time_stamp();
        let since = ticks.wrapping_sub(wide(2));
        let [shift, flags, ..] = word(7).to_le_bytes();
        let shift = shift as i8;
        let since = if shift < 0 {
            since >> -shift
        } else {
            since << shift
        };
        let since = (u128::from(since) * u128::from(word(6))) >> 32;
        let ns = wide(4).wrapping_add(since as u64);
        // Even and unchanged: KVM has not written meanwhile.
        if version & 1 == 0 && word(0) == version {
            return Shared { ns, flags, ticks };
        }
    }
}

/// The hypervisor's signature, twelve letters, when there is one.
pub fn hypervisor() -> Option<[u8; 12]> {
    if cpu::processor_id(1, 0)[2] & 1 << 31 == 0 {
        return None;
    }
    let [_, b, c, d] = cpu::processor_id(0x4000_0000, 0);
    let mut name = [0; 12];
    for (chunk, register) in name.chunks_mut(4).zip([b, c, d]) {
        chunk.copy_from_slice(&register.to_le_bytes());
    }
    Some(name)
}

fn kvm_khz() -> Option<u64> {
    if hypervisor() != Some(*b"KVMKVMKVM\0\0\0")
        || cpu::processor_id(0x4000_0001, 0)[0] & KVM_FEATURE_CLOCKSOURCE2 == 0
    {
        return None;
    }
    let page = &raw const SHARED;
    cpu::write_register(KVM_SYSTEM_TIME, page as u64 | 1);
    // Word 0 is the version, 6 the multiplier, the first byte of 7 the shift; KVM writes them before it runs us on.
    let word = |index: usize| SHARED.0[index].load(Ordering::Acquire);
    let (multiplier, shift) = (word(6), word(7) as u8 as i8);
    cpu::write_register(KVM_SYSTEM_TIME, 0);
    if word(0) == 0 || multiplier == 0 {
        return None;
    }
    // ns = (ticks << shift) * multiplier / 2^32
    let khz = (1_000_000_u64 << 32) / u64::from(multiplier);
    Some(if shift < 0 {
        khz << -shift
    } else {
        khz >> shift
    })
}

/// Counter 2 in mode 0, gated by port 0x61, counts 10 ms.
fn pit_khz() -> u64 {
    const COUNT: u16 = (PIT_HZ / 100) as u16;
    cpu::outb(0x61, cpu::inb(0x61) & !2 | 1);
    cpu::outb(0x43, 0xb0);
    let [low, high] = COUNT.to_le_bytes();
    cpu::outb(0x42, low);
    cpu::outb(0x42, high);
    let start = cpu::time_stamp();
    let mut end = start;
    // Bounded: a machine without this timer must not hold us here for ever.
    for _ in 0..1_000_000 {
        if cpu::inb(0x61) & 0x20 != 0 {
            break;
        }
        end = cpu::time_stamp();
    }
    (end - start) / 10
}

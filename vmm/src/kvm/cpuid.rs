// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! What one vCPU answers to CPUID: what all of them do (`cpu`), with the vCPU's own number and the machine's
//! topology (one socket, one thread a core) written in.
//!
//! Pure: entries in, entries out. Leaves are those of the Intel SDM vol. 2A (CPUID) and of the AMD APM vol. 3
//! appendix E.

use kvm_bindings::kvm_cpuid_entry2;

/// One vCPU among all of its machine: what APIC ids and topology follow from.
#[derive(Debug, Clone, Copy)]
pub struct Place {
    /// Its number, which is also its local APIC id.
    pub id: u8,
    /// vCPUs in the machine, this one included.
    pub count: u8,
}

/// Leaf 1, EDX: the package has more than one logical processor.
const MULTI_THREADED: u32 = 1 << 28;
/// Leaf 0x8000_0001, ECX: the same on AMD.
const CMP_LEGACY: u32 = 1 << 1;
/// Leaf 0xb and 0x1f, ECX: kind of a level.
const LEVEL_THREAD: u32 = 1 << 8;
const LEVEL_CORE: u32 = 2 << 8;
/// Width of physical addresses when the CPU does not say it.
const ADDRESS_BITS: u8 = 36;

/// The table of one vCPU: that of the machine's CPU with what depends on the vCPU's place, APIC ids and topology (SDM
/// vol. 2A, CPUID leaves 1, 4 and 0xb; APM vol. 3 appendix E).
#[must_use]
pub fn for_vcpu(cpu: &[kvm_cpuid_entry2], place: Place) -> Vec<kvm_cpuid_entry2> {
    cpu.iter().map(|entry| adjusted(*entry, place)).collect()
}

/// Width of a guest-physical address in bits.
#[must_use]
pub fn address_bits(cpu: &[kvm_cpuid_entry2]) -> u8 {
    cpu.iter()
        .find(|entry| entry.function == 0x8000_0008)
        .map_or(ADDRESS_BITS, |entry| entry.eax.to_le_bytes()[0])
}

fn adjusted(mut entry: kvm_cpuid_entry2, place: Place) -> kvm_cpuid_entry2 {
    let id = u32::from(place.id);
    let count = u32::from(place.count);
    // Bits that a core's number takes within an APIC id.
    let core_bits = u32::from(place.count).next_power_of_two().trailing_zeros();
    match entry.function {
        0x1 => {
            // CLFLUSH line size stays; logical processors and initial APIC id are ours.
            entry.ebx = (entry.ebx & 0xffff) | (count << 16) | (id << 24);
            entry.edx = with(entry.edx, MULTI_THREADED, count > 1);
        }
        // Intel's caches: first and second level belong to a core, the third to the package.
        0x4 if entry.eax & 0x1f != 0 => {
            let shared = if (entry.eax >> 5) & 7 >= 3 {
                (1 << core_bits) - 1
            } else {
                0
            };
            let cores = ((1_u32 << core_bits) - 1).min(0x3f);
            entry.eax = (entry.eax & 0x3fff) | (shared << 14) | (cores << 26);
        }
        0xb | 0x1f => {
            (entry.eax, entry.ebx, entry.ecx) = match entry.index {
                0 => (0, 1, LEVEL_THREAD),
                1 => (core_bits, count, 1 | LEVEL_CORE),
                level => (0, 0, level & 0xff),
            };
            entry.edx = id;
        }
        0x8000_0001 => entry.ecx = with(entry.ecx, CMP_LEGACY, count > 1),
        0x8000_0008 => {
            // Cores less one, and the bits of an APIC id that number them.
            entry.ecx = (entry.ecx & !0xf0ff) | (count - 1) | (core_bits << 12);
        }
        // AMD's caches, as Intel's.
        0x8000_001d if entry.eax & 0x1f != 0 => {
            let shared = if (entry.eax >> 5) & 7 >= 3 {
                count - 1
            } else {
                0
            };
            entry.eax = (entry.eax & 0x3fff) | (shared << 14);
        }
        // Extended APIC id, core id with one thread a core, one node.
        0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (id, id, 0),
        _ => {}
    }
    entry
}

fn with(register: u32, bits: u32, set: bool) -> u32 {
    if set {
        register | bits
    } else {
        register & !bits
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            index,
            ..Default::default()
        }
    }

    const PLACE: Place = Place { id: 5, count: 6 };

    #[test]
    fn a_vcpu_knows_its_number_and_the_topology() {
        let leaf = adjusted(
            kvm_cpuid_entry2 {
                ebx: 0x1234_0800,
                ..entry(1, 0)
            },
            PLACE,
        );
        assert_eq!(leaf.ebx, 0x0506_0800);
        assert_eq!(leaf.edx, MULTI_THREADED);
        let levels: Vec<_> = (0..3)
            .map(|index| adjusted(entry(0xb, index), PLACE))
            .map(|leaf| (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx))
            .collect();
        assert_eq!(levels, [(0, 1, 0x100, 5), (3, 6, 0x201, 5), (0, 0, 2, 5)]);
        let amd = adjusted(entry(0x8000_0008, 0), PLACE);
        assert_eq!(amd.ecx, 5 | 3 << 12);
    }

    #[test]
    fn a_single_vcpu_is_not_multi_threaded() {
        let place = Place { id: 0, count: 1 };
        let leaf = adjusted(
            kvm_cpuid_entry2 {
                edx: MULTI_THREADED,
                ..entry(1, 0)
            },
            place,
        );
        assert_eq!(leaf.edx, 0);
        assert_eq!(adjusted(entry(0xb, 1), place).eax, 0);
    }

    #[test]
    fn caches_of_the_third_level_are_shared_by_all() {
        // Types and levels: data L1, unified L3.
        let first = adjusted(
            kvm_cpuid_entry2 {
                eax: 0x21,
                ..entry(4, 0)
            },
            PLACE,
        );
        let third = adjusted(
            kvm_cpuid_entry2 {
                eax: 0x63,
                ..entry(4, 3)
            },
            PLACE,
        );
        assert_eq!((first.eax >> 14) & 0xfff, 0);
        assert_eq!((third.eax >> 14) & 0xfff, 7);
        assert_eq!(third.eax >> 26, 7);
    }

    #[test]
    fn address_width_is_read() {
        let leaf = kvm_cpuid_entry2 {
            eax: 0x3028,
            ..entry(0x8000_0008, 0)
        };
        assert_eq!(address_bits(&[leaf]), 40);
        assert_eq!(address_bits(&[]), 36);
    }
}

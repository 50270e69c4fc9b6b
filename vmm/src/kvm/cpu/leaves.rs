// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The table of CPUID of a guest's CPU.
//!
//! Of `host` with changes it is KVM's own table with bits taken out. Of any other model it is written from nothing, so
//! that a host has no part in it but its vendor and, in leaf 0xd, the places of the XSAVE area's parts (which `compare`
//! checks): the guest sees the same on every host.
//!
//! Leaves are those of the Intel SDM vol. 2A (CPUID) and of the AMD APM vol. 3 appendix E.

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

use super::Vendor;
use super::features::{
    AMD_ALIASES, EAX, EBX, ECX, EDX, Feature, FeatureSet, Location, REGISTERS, value,
};
use super::fit::HostCpu;
use super::model::Wanted;
use super::xsave;

/// Where KVM tells of itself: name and features.
const KVM_LEAF: u32 = 0x4000_0000;
/// Its features.
pub(super) const KVM_FEATURES: Location = Location::Cpuid(KVM_LEAF + 1, 0, EAX);
/// Leaves that hypervisors have for themselves.
const HYPERVISOR_LEAVES: std::ops::Range<u32> = KVM_LEAF..0x5000_0000;

/// A line of every cache of every 64-bit CPU, in bytes; in leaf 1 in units of eight.
const LINE_BYTES: u32 = 64;
/// Leaf 2: the first byte counts the calls that are needed, 0xff means that leaf 4 has the caches.
const CACHES_IN_LEAF_4: u32 = 0xff01;
/// Leaf 0x8000_0005 and 6 EAX, EBX: translation buffers of 64 entries each, associative; of 512 entries, 4 ways.
const TLB_1: u32 = 0xff40_ff40;
const TLB_2: u32 = 0x4200_4200;
/// Leaf 0x8000_000a: revision, and address space identifiers as KVM has them for nested guests.
const SVM_REVISION: u32 = 1;
const SVM_ASIDS: u32 = 8;
/// Width of a linear address with four and five levels of page tables.
const LINEAR_BITS: u32 = 48;
const LINEAR_BITS_LA57: u32 = 57;

/// One cache of a model, the same in all: type (1 data, 2 instructions, 3 both), level, KiB, ways.
struct Cache(u32, u32, u32, u32);
const CACHES: [Cache; 4] = [
    Cache(1, 1, 32, 8),
    Cache(2, 1, 32, 8),
    Cache(3, 2, 1024, 16),
    Cache(3, 3, 16384, 16),
];
/// Four bits for an associativity of 16 ways (APM vol. 3, leaf 0x8000_0006).
const WAYS_16: u32 = 8;

/// Everything but what depends on a vCPU's place.
pub(super) fn of(
    wanted: &Wanted,
    features: &FeatureSet,
    host: &HostCpu,
    phys_bits: u8,
) -> Vec<kvm_cpuid_entry2> {
    let mut entries = match wanted.from_host {
        true => masked(features, host),
        false => written(wanted, features, host),
    };
    if wanted.hidden {
        entries.retain(|entry| !HYPERVISOR_LEAVES.contains(&entry.function));
    }
    for entry in &mut entries {
        match entry.function {
            0x8000_0008 => entry.eax = (entry.eax & !0xff) | u32::from(phys_bits),
            0x1 if wanted.identity.family.is_some() => entry.eax = signature(wanted),
            0x8000_0002..=0x8000_0004 => {
                if let Some(text) = &wanted.identity.model_name {
                    let part = entry.function - 0x8000_0002;
                    [entry.eax, entry.ebx, entry.ecx, entry.edx] = name_part(text, part);
                }
            }
            _ => {}
        }
    }
    entries
}

/// The host's table without what is not among `features`.
fn masked(features: &FeatureSet, host: &HostCpu) -> Vec<kvm_cpuid_entry2> {
    let mut entries = host.entries().to_vec();
    let gone = host.features().without(features);
    withhold(&mut entries, features, &gone);
    let aliases = gone.leaf(0x1, 0, EDX) & AMD_ALIASES;
    for entry in &mut entries {
        if entry.function == 0x8000_0001 && host.vendor() == Vendor::Amd {
            entry.edx &= !aliases;
        }
    }
    entries
}

/// Takes the bits of the features that are gone out of a table, and their parts out of the XSAVE area; `features` stay.
pub(super) fn withhold(
    entries: &mut Vec<kvm_cpuid_entry2>,
    features: &FeatureSet,
    gone: &FeatureSet,
) {
    if gone.is_empty() {
        return;
    }
    clear(entries, gone);
    let area = xsave::leaves(features, entries);
    entries.retain(|entry| entry.function != xsave::LEAF);
    entries.extend(area);
}

fn clear(entries: &mut [kvm_cpuid_entry2], gone: &FeatureSet) {
    for entry in entries {
        for row in REGISTERS {
            if let Location::Cpuid(leaf, index, at) = row.location
                && (leaf, index) == (entry.function, entry.index)
            {
                let bits = gone.leaf(leaf, index, at);
                let register = match at {
                    EAX => &mut entry.eax,
                    EBX => &mut entry.ebx,
                    ECX => &mut entry.ecx,
                    _ => &mut entry.edx,
                };
                *register &= !bits;
            }
        }
    }
}

/// A table from nothing.
fn written(wanted: &Wanted, features: &FeatureSet, host: &HostCpu) -> Vec<kvm_cpuid_entry2> {
    let bits = |leaf, index, register| features.leaf(leaf, index, register);
    let vendor = [EBX, ECX, EDX].map(|at| value(host.entries(), 0, 0, at));
    let amd = host.vendor() == Vendor::Amd;
    let mut table = vec![
        leaf(0x0, wanted.level(), vendor[0], vendor[1], vendor[2]),
        leaf(
            0x1,
            signature(wanted),
            (LINE_BYTES / 8) << 8,
            bits(0x1, 0, ECX),
            bits(0x1, 0, EDX),
        ),
        leaf(0x6, bits(0x6, 0, EAX), 0, 0, 0),
    ];
    if !amd {
        table.push(leaf(0x2, CACHES_IN_LEAF_4, 0, 0, 0));
        table.extend(caches(0x4));
    }
    let last = [
        (2, bits(0x7, 2, EDX)),
        (1, bits(0x7, 1, EAX) | bits(0x7, 1, EDX)),
    ];
    let last = last.iter().find(|(_, bits)| *bits != 0);
    let last = last.map_or(0, |(index, _)| *index);
    let (ebx, ecx, edx) = (bits(0x7, 0, EBX), bits(0x7, 0, ECX), bits(0x7, 0, EDX));
    table.push(indexed(0x7, 0, last, ebx, ecx, edx));
    if last >= 1 {
        table.push(indexed(0x7, 1, bits(0x7, 1, EAX), 0, 0, bits(0x7, 1, EDX)));
    }
    if last >= 2 {
        table.push(indexed(0x7, 2, 0, 0, 0, bits(0x7, 2, EDX)));
    }
    // Filled in for each vCPU.
    table.extend((0..3).map(|index| indexed(0xb, index, 0, 0, 0, 0)));
    table.extend(xsave::leaves(features, host.entries()));
    let [b, c, d] = *b"KVMKVMKVM\0\0\0".as_chunks::<4>().0 else {
        unreachable!("twelve bytes are three registers");
    };
    let [b, c, d] = [b, c, d].map(u32::from_le_bytes);
    table.push(leaf(KVM_LEAF, KVM_LEAF + 1, b, c, d));
    table.push(leaf(KVM_LEAF + 1, bits(KVM_LEAF + 1, 0, EAX), 0, 0, 0));
    table.extend(extended(wanted, features, amd.then_some(vendor)));
    table.retain(|entry| {
        let limit = match entry.function {
            ..KVM_LEAF => wanted.level(),
            0x8000_0000.. => wanted.level_extended(features),
            _ => u32::MAX,
        };
        entry.function <= limit
    });
    table.sort_by_key(|entry| (entry.function, entry.index));
    table
}

/// Leaves from 0x8000_0000 on; `amd` is the vendor in the order of leaf 0, on AMD.
fn extended(
    wanted: &Wanted,
    features: &FeatureSet,
    amd: Option<[u32; 3]>,
) -> Vec<kvm_cpuid_entry2> {
    let bits = |leaf, index, register| features.leaf(leaf, index, register);
    let [b, c, d] = amd.unwrap_or_default();
    let (mut eax, mut edx) = (0, bits(0x8000_0001, 0, EDX));
    if amd.is_some() {
        eax = signature(wanted);
        edx |= bits(0x1, 0, EDX) & AMD_ALIASES;
    }
    let linear = match features.has(Feature::known("la57")) {
        true => LINEAR_BITS_LA57,
        false => LINEAR_BITS,
    };
    let mut table = vec![
        leaf(0x8000_0000, wanted.level_extended(features), b, c, d),
        leaf(0x8000_0001, eax, 0, bits(0x8000_0001, 0, ECX), edx),
        leaf(0x8000_0002, 0, 0, 0, 0),
        leaf(0x8000_0003, 0, 0, 0, 0),
        leaf(0x8000_0004, 0, 0, 0, 0),
        leaf(0x8000_0007, 0, 0, 0, bits(0x8000_0007, 0, EDX)),
        leaf(0x8000_0008, linear << 8, bits(0x8000_0008, 0, EBX), 0, 0),
        leaf(0x8000_0021, bits(0x8000_0021, 0, EAX), 0, 0, 0),
    ];
    let [data, code, second, third] = CACHES;
    if amd.is_some() {
        let first = |Cache(_, _, kib, ways): Cache| kib << 24 | ways << 16 | 1 << 8 | LINE_BYTES;
        table.push(leaf(0x8000_0005, TLB_1, TLB_1, first(data), first(code)));
        // Units of 512 KiB.
        let last = (third.2 / 512) << 18 | WAYS_16 << 12 | 1 << 8 | LINE_BYTES;
        let second = second.2 << 16 | WAYS_16 << 12 | 1 << 8 | LINE_BYTES;
        table.push(leaf(0x8000_0006, TLB_2, TLB_2, second, last));
    } else {
        let second = second.2 << 16 | WAYS_16 << 12 | LINE_BYTES;
        table.push(leaf(0x8000_0006, 0, 0, second, 0));
    }
    if features.has(Feature::known("svm")) {
        let edx = bits(0x8000_000a, 0, EDX);
        table.push(leaf(0x8000_000a, SVM_REVISION, SVM_ASIDS, 0, edx));
    }
    if features.has(Feature::known("topoext")) {
        table.extend(caches(0x8000_001d));
        table.push(leaf(0x8000_001e, 0, 0, 0, 0));
    }
    table
}

/// Leaf 4, and what AMD has in the same form, with an empty one behind the last.
fn caches(leaf: u32) -> impl Iterator<Item = kvm_cpuid_entry2> {
    let one = move |(index, Cache(kind, level, kib, ways)): (u32, Cache)| {
        let sets = kib * 1024 / LINE_BYTES / ways;
        // Bit 8: initialized by itself.
        let eax = kind | level << 5 | 1 << 8;
        indexed(
            leaf,
            index,
            eax,
            (ways - 1) << 22 | (LINE_BYTES - 1),
            sets - 1,
            0,
        )
    };
    let end = indexed(leaf, 4, 0, 0, 0, 0);
    (0..).zip(CACHES).map(one).chain([end])
}

/// Family, model and stepping as leaf 1 has them; of a 64-bit CPU of its first years when the model does not say.
fn signature(wanted: &Wanted) -> u32 {
    let identity = &wanted.identity;
    let family = u32::from(identity.family.unwrap_or(0xf));
    let model = u32::from(identity.model.unwrap_or(0));
    let stepping = u32::from(identity.stepping.unwrap_or(0));
    let (low, high) = (family.min(0xf), family.saturating_sub(0xf));
    high << 20 | (model >> 4) << 16 | low << 8 | (model & 0xf) << 4 | stepping
}

/// Sixteen bytes of a name of 48.
fn name_part(name: &str, part: u32) -> [u32; 4] {
    let mut bytes = [0; 48];
    bytes[..name.len()].copy_from_slice(name.as_bytes());
    let at = usize::try_from(part).expect("three parts") * 16;
    let (words, _) = bytes[at..at + 16].as_chunks::<4>();
    std::array::from_fn(|index| u32::from_le_bytes(words[index]))
}

fn leaf(function: u32, eax: u32, ebx: u32, ecx: u32, edx: u32) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 {
        function,
        eax,
        ebx,
        ecx,
        edx,
        ..Default::default()
    }
}

/// A leaf whose answer depends on ECX.
pub(super) fn indexed(
    function: u32,
    index: u32,
    eax: u32,
    ebx: u32,
    ecx: u32,
    edx: u32,
) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 {
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        ..leaf(function, eax, ebx, ecx, edx)
    }
}

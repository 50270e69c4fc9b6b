// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Leaf 0xd of CPUID: which parts the XSAVE area has, and where (Intel SDM vol. 1 §13.2, AMD APM vol. 3 appendix E.3.7).
//!
//! Which there are follows from the features; sizes and places are the CPU's, and differ between CPUs of one vendor.

use kvm_bindings::kvm_cpuid_entry2;

use super::features::{EAX, EBX, ECX, EDX, Feature, FeatureSet, value};
use super::leaves::indexed;

/// The leaf.
pub(super) const LEAF: u32 = 0xd;
/// The area as FXSAVE knows it, and the header behind it.
const FIXED_BYTES: u32 = 512 + 64;
/// x87 and SSE registers, which are in that part.
const FIXED: u64 = 0b11;

/// Parts by their bit of XCR0 or IA32_XSS, each with the features that it belongs to.
const PARTS: &[(u32, &[&str], &str)] = &[
    (2, &["avx"], "AVX registers"),
    (3, &["mpx"], "MPX bounds"),
    (4, &["mpx"], "MPX configuration"),
    (5, &["avx512f"], "AVX-512 masks"),
    (6, &["avx512f"], "upper halves of AVX-512 registers"),
    (7, &["avx512f"], "AVX-512 registers 16 to 31"),
    (8, &["intel-pt"], "processor trace"),
    (9, &["pku"], "protection keys"),
    (11, &["shstk", "ibt"], "user shadow stacks"),
    (12, &["shstk"], "supervisor shadow stacks"),
    (15, &["arch-lbr"], "branch records"),
    (17, &["amx-tile"], "AMX configuration"),
    (18, &["amx-tile"], "AMX tiles"),
];

/// Leaf 0xd for a guest with `features` on a CPU whose leaves are `host`; nothing without XSAVE.
pub(super) fn leaves(features: &FeatureSet, host: &[kvm_cpuid_entry2]) -> Vec<kvm_cpuid_entry2> {
    let has = |name: &&str| features.has(Feature::known(name));
    if !has(&"xsave") {
        return Vec::new();
    }
    let register = |index, at| value(host, LEAF, index, at);
    let wide = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
    let user = wide(register(0, EAX), register(0, EDX));
    let supervisor = wide(register(1, ECX), register(1, EDX));
    // Parts that this program does not know belong to features that it does not know either.
    let there = PARTS.iter().filter(|(_, owners, _)| owners.iter().any(has));
    let parts = there.fold(FIXED, |mask, (bit, ..)| mask | 1 << bit);
    let (user, supervisor) = (user & parts | FIXED, supervisor & parts);
    let supervisor = if has(&"xsaves") { supervisor } else { 0 };
    let sizes = (2..63).filter(|bit| (user | supervisor) & (1 << bit) != 0);
    let inner: Vec<_> = sizes
        .map(|bit| {
            indexed(
                LEAF,
                bit,
                register(bit, EAX),
                register(bit, EBX),
                register(bit, ECX),
                0,
            )
        })
        .collect();
    let ends = inner.iter().map(|part| part.eax.saturating_add(part.ebx));
    let bytes_max = ends.max().unwrap_or(0).max(FIXED_BYTES);
    let [low, high] = halves(user);
    let [xss_low, xss_high] = halves(supervisor);
    // EBX says how much the guest uses now: KVM keeps it up to date.
    let instructions = features.leaf(LEAF, 1, EAX);
    let mut table = vec![
        indexed(LEAF, 0, low, FIXED_BYTES, bytes_max, high),
        indexed(LEAF, 1, instructions, FIXED_BYTES, xss_low, xss_high),
    ];
    table.extend(inner);
    table
}

/// The first part of the guest's area that is elsewhere, or of another size, on a CPU with the leaves `host`.
pub(super) fn moved(guest: &[kvm_cpuid_entry2], host: &[kvm_cpuid_entry2]) -> Option<String> {
    if value(guest, 1, 0, ECX) & (1 << 26) == 0 {
        return None;
    }
    let mut bits = guest
        .iter()
        .filter(|entry| entry.function == LEAF && entry.index >= 2);
    let differs = |entry: &&kvm_cpuid_entry2| {
        let place = |leaves| [EAX, EBX].map(|at| value(leaves, LEAF, entry.index, at));
        entry.eax != 0 && place(guest) != place(host)
    };
    let bit = bits.find(differs)?.index;
    let known = PARTS.iter().find(|(one, ..)| *one == bit);
    Some(known.map_or_else(|| format!("part {bit}"), |(.., name)| (*name).to_owned()))
}

fn halves(mask: u64) -> [u32; 2] {
    let bytes = mask.to_le_bytes();
    let (words, _) = bytes.as_chunks::<4>();
    [words[0], words[1]].map(u32::from_le_bytes)
}

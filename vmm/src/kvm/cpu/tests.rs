// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Models on hosts that are made up: the table that each guest sees (`tests/golden.txt`), and what holds for all.

use atoll_vmm_protocol::cpu::{CpuModel, CpuSpec};
use expect_test::{Expect, expect, expect_file};
use kvm_bindings::kvm_cpuid_entry2;
use proptest::collection::vec;
use proptest::prelude::*;

use super::compare::{self, Unlike};
use super::features::{
    self, EAX, EBX, ECX, EDX, Feature, FeatureSet, Location, MSR_ARCH_CAPABILITIES, REGISTERS,
    value,
};
use super::leaves::indexed;
use super::{HostCpu, HostExtras, best_level, model, resolve};
use crate::kvm::cpuid::{Place, for_vcpu};

const INTEL: &str = "GenuineIntel";
const AMD: &str = "AuthenticAMD";

/// A host with these features; `phys_bits` and a place of the protection keys' part are what hosts differ in.
fn host(vendor: &str, features: &FeatureSet, phys_bits: u32, pkru_at: u32) -> HostCpu {
    let (words, _) = vendor.as_bytes().as_chunks::<4>();
    let [b, d, c] = [0, 1, 2].map(|at| u32::from_le_bytes(words[at]));
    let mut entries = vec![];
    let mut set = |leaf, index, at: usize, bits: u32| {
        let found = entries
            .iter_mut()
            .find(|entry: &&mut kvm_cpuid_entry2| (entry.function, entry.index) == (leaf, index));
        let entry = match found {
            Some(entry) => entry,
            None => {
                entries.push(indexed(leaf, index, 0, 0, 0, 0));
                entries.last_mut().unwrap()
            }
        };
        *[
            &mut entry.eax,
            &mut entry.ebx,
            &mut entry.ecx,
            &mut entry.edx,
        ][at] |= bits;
    };
    for (at, bits) in [(EAX, 0x20), (EBX, b), (ECX, c), (EDX, d)] {
        set(0, 0, at, bits);
    }
    set(1, 0, EAX, 0x000a_0f11);
    set(0x8000_0008, 0, EAX, phys_bits | 0x3900);
    for row in REGISTERS {
        if let Location::Cpuid(leaf, index, at) = row.location {
            set(leaf, index, at, features.leaf(leaf, index, at));
        }
    }
    // x87, SSE, AVX, AVX-512, protection keys: size and place.
    for (index, size, at) in [
        (2, 256, 576),
        (5, 64, 1088),
        (6, 512, 1152),
        (7, 1024, 1664),
        (9, 8, pkru_at),
    ] {
        set(0xd, index, EAX, size);
        set(0xd, index, EBX, at);
    }
    set(0xd, 0, EAX, 0x2e7);
    set(0xd, 0, ECX, pkru_at + 8);
    let extras = HostExtras {
        arch_capabilities: features.register(Location::Msr(MSR_ARCH_CAPABILITIES)),
        tsc_deadline: true,
        nested_state: true,
    };
    HostCpu::new(&entries, extras)
}

fn everything() -> FeatureSet {
    let mut all = FeatureSet::EMPTY;
    features::all().for_each(|feature| all.insert(feature));
    all
}

fn without(names: &[&str]) -> FeatureSet {
    let mut set = everything();
    names
        .iter()
        .for_each(|name| set.remove(Feature::known(name)));
    set
}

fn spec(text: &str) -> CpuSpec {
    let mut parts = text.split(',').map(str::to_owned);
    CpuSpec {
        model: parts.next().unwrap(),
        flags: parts.collect(),
        ..CpuSpec::default()
    }
}

fn table(entries: &[kvm_cpuid_entry2]) -> String {
    let line = |entry: &kvm_cpuid_entry2| {
        format!(
            "{:08x}.{} {:08x} {:08x} {:08x} {:08x}\n",
            entry.function, entry.index, entry.eax, entry.ebx, entry.ecx, entry.edx
        )
    };
    entries.iter().map(line).collect()
}

#[test]
fn each_model_is_a_table_that_does_not_change() {
    let mut text = String::from("leaf.index  eax ebx ecx edx, of the third of four vCPUs\n");
    for vendor in [INTEL, AMD] {
        let host = host(vendor, &everything(), 46, 2688);
        for model in model::known() {
            let cpu = resolve(&spec(&model.name), &host, 1 << 30).unwrap();
            let vcpu = for_vcpu(&cpu.cpuid, Place { id: 2, count: 4 });
            text += &format!("\n{} on {vendor}\n{}", model.name, table(&vcpu));
        }
    }
    expect_file!["tests/golden.txt"].assert_eq(&text);
}

#[test]
fn a_guest_sees_the_same_on_different_hosts() {
    let newest = host(INTEL, &everything(), 52, 2688);
    let oldest = host(INTEL, &without(&["avx512f", "pku", "svm"]), 40, 832);
    for level in ["x86-64", "x86-64-v2", "x86-64-v2-AES", "x86-64-v3", "kvm64"] {
        let seen = [&newest, &oldest].map(|host| resolve(&spec(level), host, 1 << 30).unwrap());
        assert_eq!(table(&seen[0].cpuid), table(&seen[1].cpuid), "{level}");
    }
}

#[test]
fn host_is_all_of_it() {
    let host = host(AMD, &everything(), 48, 2432);
    let cpu = resolve(&CpuSpec::default(), &host, 1 << 30).unwrap();
    assert_eq!(table(&cpu.cpuid), table(host.entries()));
    assert_eq!(cpu.msrs, []);
    // What is taken away is gone wherever it is.
    let cpu = resolve(&spec("host,-avx,-mmx,-rdctl-no"), &host, 1 << 30).unwrap();
    let seen = FeatureSet::of_cpuid(&cpu.cpuid);
    assert!(!seen.has(Feature::known("avx512vl")) && seen.has(Feature::known("xsave")));
    assert_eq!(
        value(&cpu.cpuid, 0xd, 0, EAX),
        0x203,
        "x87, SSE, protection keys"
    );
    assert_eq!(value(&cpu.cpuid, 0xd, 5, EAX), 0);
    assert_eq!(value(&cpu.cpuid, 0x8000_0001, 0, EDX) & 1 << 23, 0);
    let (index, bits) = cpu.msrs[0];
    assert_eq!((index, bits & 3), (MSR_ARCH_CAPABILITIES, 2));
}

#[track_caller]
fn check(cpu: &str, host: &HostCpu, expected: Expect) {
    let said = match resolve(&spec(cpu), host, 1 << 30) {
        Ok(_) => "fits".to_owned(),
        Err(error) => error.to_string(),
    };
    expected.assert_eq(&said);
}

#[test]
fn what_does_not_fit_is_refused_with_names_and_a_remedy() {
    let haswell = host(INTEL, &without(&["avx512f", "svm"]), 39, 832);
    check("x86-64-v3,+pcid", &haswell, expect!["fits"]);
    check(
        "x86-64-v4",
        &haswell,
        expect![
            "CPU x86-64-v4: this host's CPU and KVM lack avx512f, avx512dq, avx512cd, avx512bw, avx512vl: the greatest level that fits is x86-64-v3 (see atoll-vmm cpu-models)"
        ],
    );
    check(
        "x86-64-v3,+svm,+pcid",
        &haswell,
        expect![
            "CPU x86-64-v3,+svm,+pcid: this host's CPU and KVM lack svm: without +svm it fits (see atoll-vmm cpu-models)"
        ],
    );
    check(
        "host,+avx512f",
        &haswell,
        expect![
            "CPU host,+avx512f: this host's CPU and KVM lack avx512f: without +avx512f it fits (see atoll-vmm cpu-models)"
        ],
    );
    let none = host(INTEL, &without(&["sse2"]), 39, 832);
    check(
        "kvm64",
        &none,
        expect![
            "CPU kvm64: this host's CPU and KVM lack sse2, pni: only host fits (see atoll-vmm cpu-models)"
        ],
    );
    assert_eq!(best_level(&haswell), Some("x86-64-v3"));
    let wide = CpuSpec {
        phys_bits: Some(46),
        ..spec("x86-64")
    };
    let refused = resolve(&wide, &haswell, 1 << 30).unwrap_err();
    expect!["CPU x86-64,phys-bits=46: this host's physical addresses have 39 bits"]
        .assert_eq(&refused.to_string());
}

#[test]
fn what_is_no_cpu_is_refused_in_words() {
    let host = host(INTEL, &everything(), 46, 2688);
    check(
        "pentium",
        &host,
        expect![[
            r#"there is no CPU model "pentium"; there are host, x86-64, x86-64-v2, x86-64-v2-AES, x86-64-v3, x86-64-v4, kvm64, qemu64 (see atoll-vmm cpu-models)"#
        ]],
    );
    check(
        "host,avx",
        &host,
        expect![[r#"CPU flag "avx": expected + or - and a feature's name, as in +pcid"#]],
    );
    check(
        "host,+avx512foo",
        &host,
        expect!["CPU flag +avx512foo: there is no such feature; is it avx512f, avx512-fp16?"],
    );
    check(
        "host,+wings",
        &host,
        expect!["CPU flag +wings: there is no such feature"],
    );
    check(
        "x86-64-v2,+avx2",
        &host,
        expect!["CPU feature avx2 needs xsave, avx: add +xsave,+avx"],
    );
    check(
        "host,+avx2,-avx",
        &host,
        expect!["CPU feature avx2: is added and taken away"],
    );
    check(
        "host,+",
        &host,
        expect![[r#"CPU flag "+": expected + or - and a feature's name, as in +pcid"#]],
    );
}

fn own(name: &str, base: &str) -> CpuModel {
    CpuModel {
        name: name.to_owned(),
        base: (!base.is_empty()).then(|| base.to_owned()),
        ..CpuModel::default()
    }
}

fn office() -> CpuModel {
    CpuModel {
        flags: vec!["-aes".to_owned(), "+nested-virt".to_owned()],
        family: Some(25),
        model: Some(0x21),
        stepping: Some(2),
        model_name: Some("Office".to_owned()),
        ..own("office", "x86-64-v3")
    }
}

/// The first of these models, on a host of AMD's.
fn first_of(models: Vec<CpuModel>) -> Result<super::GuestCpu, super::CpuError> {
    let spec = CpuSpec {
        model: models[0].name.clone(),
        models,
        ..CpuSpec::default()
    };
    resolve(&spec, &host(AMD, &everything(), 48, 2432), 1 << 30)
}

#[test]
fn models_of_a_users_own_build_on_others() {
    let cpuid = first_of(vec![office()]).unwrap().cpuid;
    let seen = FeatureSet::of_cpuid(&cpuid);
    assert!(!seen.has(Feature::known("aes")) && seen.has(Feature::known("npt")));
    assert_eq!(value(&cpuid, 1, 0, EAX), 0x00a2_0f12);
    let name = value(&cpuid, 0x8000_0002, 0, EAX);
    assert_eq!(name.to_le_bytes(), *b"Offi");
    assert_eq!(value(&cpuid, 0x8000_0000, 0, EAX), 0x8000_000a);
}

#[test]
fn what_is_no_model_is_refused_in_words() {
    #[track_caller]
    fn refuse(models: Vec<CpuModel>, expected: Expect) {
        expected.assert_eq(&first_of(models).unwrap_err().to_string());
    }
    let changed = |change: fn(&mut CpuModel)| {
        let mut model = office();
        change(&mut model);
        vec![model]
    };
    refuse(
        vec![own("host", "")],
        expect!["CPU model host: there are two of that name"],
    );
    refuse(
        vec![own("kvm64", "")],
        expect!["CPU model kvm64: there are two of that name"],
    );
    refuse(
        vec![own("a b", "")],
        expect!["CPU model a b: a name has printable characters and no space"],
    );
    refuse(
        vec![own("a", "b"), own("b", "a")],
        expect!["CPU model a: is its own base"],
    );
    refuse(
        vec![own("a", "nothing")],
        expect![[
            r#"there is no CPU model "nothing"; there are host, x86-64, x86-64-v2, x86-64-v2-AES, x86-64-v3, x86-64-v4, kvm64, qemu64, a (see atoll-vmm cpu-models)"#
        ]],
    );
    refuse(
        changed(|it| it.vendor = Some(INTEL.to_owned())),
        expect!["CPU office: is for hosts of GenuineIntel, this one is of AuthenticAMD"],
    );
    refuse(
        changed(|it| it.vendor = Some("me".to_owned())),
        expect![[r#"CPU model office: vendor "me" has not 12 characters"#]],
    );
    refuse(
        changed(|it| it.family = Some(271)),
        expect!["CPU model office: family 271: at most 270"],
    );
    refuse(
        changed(|it| it.level = Some(4)),
        expect!["CPU model office: level 0x4 hides arat, which is in leaf 0x6"],
    );
    refuse(
        changed(|it| it.model_name = Some("x".repeat(48))),
        expect![[
            r#"CPU model office: name "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx" has more than 47 characters, or odd ones"#
        ]],
    );
}

#[test]
fn a_guest_that_is_not_told_of_kvm_has_none_of_it() {
    let host = host(INTEL, &everything(), 46, 2688);
    for model in ["host", "x86-64-v3"] {
        let hidden = CpuSpec {
            hidden: true,
            ..spec(model)
        };
        let cpu = resolve(&hidden, &host, 1 << 30).unwrap();
        let mut leaves = cpu.cpuid.iter().map(|entry| entry.function);
        assert!(!leaves.any(|leaf| leaf >> 28 == 4));
    }
}

#[test]
fn addresses_are_wide_enough_for_the_memory() {
    let host = host(INTEL, &everything(), 46, 2688);
    let bits = |text, end| {
        let cpu = resolve(&spec(text), &host, end).unwrap();
        crate::kvm::cpuid::address_bits(&cpu.cpuid)
    };
    assert_eq!(bits("host", 1 << 30), 46);
    assert_eq!(bits("x86-64", 1 << 30), 40);
    assert_eq!(bits("x86-64", 2 << 40), 46);
}

#[test]
fn a_saved_guest_goes_on_where_all_is_that_it_has_seen() {
    let all = host(INTEL, &everything(), 46, 2688);
    let cpu = |text: &str| resolve(&spec(text), &all, 1 << 30).unwrap();
    let check = |text: &str, other: &HostCpu| {
        let vcpu = for_vcpu(&cpu(text).cpuid, Place { id: 1, count: 2 });
        compare::check(&vcpu, &cpu(text).msrs, other)
    };
    let older = host(INTEL, &without(&["avx512f", "rdctl-no"]), 46, 2688);
    check("host", &all).unwrap();
    check("x86-64-v3", &older).unwrap();
    let lacks = check("x86-64-v4", &older).unwrap_err();
    expect!["it lacks avx512f, avx512dq, avx512cd, avx512bw, avx512vl: give the guest a CPU that all its hosts have (see atoll-vmm cpu-models)"].assert_eq(&lacks.to_string());
    let lacks = check("x86-64-v3,+arch-capabilities,+rdctl-no", &older).unwrap_err();
    assert!(
        lacks.to_string().starts_with("it lacks rdctl-no:"),
        "{lacks}"
    );
    let amd = host(AMD, &everything(), 46, 2688);
    let unlike = check("x86-64", &amd).unwrap_err();
    assert_eq!(
        unlike.to_string(),
        "it is of AuthenticAMD, the guest's of GenuineIntel"
    );
    let narrow = host(INTEL, &everything(), 39, 2688);
    let unlike = check("x86-64", &narrow).unwrap_err();
    assert_eq!(
        unlike,
        Unlike::PhysBits {
            guest: 40,
            host: 39
        }
    );
    // Protection keys are elsewhere in the XSAVE area; a guest without them does not mind.
    let other = host(INTEL, &everything(), 46, 832);
    check("x86-64-v4", &other).unwrap();
    let unlike = check("x86-64-v3,+pku", &other).unwrap_err();
    assert_eq!(unlike, Unlike::XsaveArea("protection keys".to_owned()));
}

/// Any features, each with all that it needs.
fn features() -> impl Strategy<Value = FeatureSet> {
    let count = features::all().count();
    vec(prop::bool::weighted(0.9), count).prop_map(|picks| {
        let mut set = everything();
        for (feature, pick) in features::all().zip(picks) {
            if !pick {
                set.remove(feature);
            }
        }
        set
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn no_guest_sees_what_its_host_lacks(
        features in features(),
        amd: bool,
        model in 0..=model::known().len(),
        flags in vec((any::<prop::sample::Index>(), any::<bool>()), 0..4),
    ) {
        let host = host(if amd { AMD } else { INTEL }, &features, 46, 2688);
        let names: Vec<Feature> = features::all().collect();
        let mut spec = spec(model.checked_sub(1).map_or("host", |at| &model::known()[at].name));
        for (index, add) in flags {
            let sign = if add { '+' } else { '-' };
            spec.flags.push(format!("{sign}{}", index.get(&names).name()));
        }
        if let Ok(cpu) = resolve(&spec, &host, 1 << 30) {
            let mut seen = FeatureSet::of_cpuid(&cpu.cpuid);
            for (index, value) in &cpu.msrs {
                seen = seen.with_msr(*index, *value);
            }
            prop_assert!(seen.without(host.features()).is_empty());
            prop_assert!(seen.without_register(Location::Msr(MSR_ARCH_CAPABILITIES)).unmet().is_none());
            for flag in &spec.flags {
                let there = seen.has(features::find(&flag[1..]).unwrap());
                let msr = matches!(features::find(&flag[1..]).unwrap().location(), Location::Msr(_));
                prop_assert!(msr || there == flag.starts_with('+'), "{flag}");
            }
            // The XSAVE area has parts of features that are there, and no other.
            let area = value(&cpu.cpuid, 0xd, 0, EAX);
            let avx = seen.has(Feature::known("avx"));
            if seen.has(Feature::known("xsave")) && spec.model != "host" {
                prop_assert_eq!(area & 4 != 0, avx);
            }
            compare::check(&cpu.cpuid, &cpu.msrs, &host).unwrap();
        }
    }
}

/// A guest that could run guests, and would be saved without them.
#[test]
fn nested_virtualization_is_not_given_where_it_cannot_be_saved() {
    let [vmx, svm] = [5, 2].map(|bit| 1 << bit);
    let listed = [
        indexed(0x1, 0, 0, 0, vmx, 0),
        indexed(0x8000_0001, 0, 0, 0, svm, 0),
        indexed(0x8000_000a, 0, 1, 8, 0, 1),
    ];
    let seen = |nested_state| {
        let extras = HostExtras {
            nested_state,
            ..HostExtras::default()
        };
        let host = HostCpu::new(&listed, extras);
        let cpu = resolve(&CpuSpec::default(), &host, 1 << 30).unwrap();
        let of = |leaf, register| value(&cpu.cpuid, leaf, 0, register);
        let more = resolve(&spec("host,+svm"), &host, 1 << 30).is_ok();
        let seen = [of(1, ECX) & vmx, of(0x8000_0001, ECX), of(0x8000_000a, EDX)];
        (seen, more)
    };
    assert_eq!(seen(true), ([vmx, svm, 1], true));
    assert_eq!(seen(false), ([0, 0, 0], false));
}

/// Part 11 of the XSAVE area is also that of indirect branch tracking, whose MSRs are saved.
#[test]
fn features_whose_state_is_not_saved_are_not_given() {
    let bits = |all: &[u32]| all.iter().fold(0, |mask, bit| mask | 1 << bit);
    let [xsave, lm, shstk, ibt, tiles] = [26, 29, 7, 20, 24];
    let part = |index, place| indexed(0xd, index, 64, place, 0, 0);
    let listed = [
        indexed(0x1, 0, 0, 0, bits(&[24, 25, 26, xsave]), bits(&[0, 6, 24])),
        indexed(0x7, 0, 0, 0, bits(&[shstk]), bits(&[ibt, 22, tiles, 25])),
        indexed(0xd, 0, bits(&[0, 1, 17, 18]), 576, 11008, 0),
        indexed(0xd, 1, 0b1010, 0, bits(&[11, 12]), 0),
        part(11, 0),
        part(12, 0),
        part(17, 2752),
        part(18, 2816),
        indexed(0x8000_0001, 0, 0, 0, 0, bits(&[lm])),
    ];
    let host = HostCpu::new(&listed, HostExtras::default());
    let cpu = resolve(&CpuSpec::default(), &host, 1 << 30).unwrap();
    let of = |leaf, index, register| value(&cpu.cpuid, leaf, index, register);
    assert_eq!([of(0x7, 0, ECX), of(0x7, 0, EDX)], [0, bits(&[ibt])]);
    let [user, supervisor] = [of(0xd, 0, EAX), of(0xd, 1, ECX)];
    assert_eq!([user, supervisor], [bits(&[0, 1]), bits(&[11])]);
    for part in [12, 17, 18] {
        assert_eq!(of(0xd, part, EAX), 0, "part {part}");
    }
    for more in ["host,+shstk", "host,+amx-int8"] {
        resolve(&spec(more), &host, 1 << 30).unwrap_err();
    }
}

/// KVM lists neither on hardware; a Linux that sees no hypervisor looks for no clock of KVM's, and waits for ticks of a
/// timer that the board has not.
#[test]
fn what_kvm_makes_and_does_not_list_is_told() {
    let tsc_and_apic = 1 << 4 | 1 << 9;
    let bare = [indexed(0x1, 0, 0, 0, 0, tsc_and_apic)];
    let ecx = |tsc_deadline| {
        let extras = HostExtras {
            tsc_deadline,
            ..HostExtras::default()
        };
        let host = HostCpu::new(&bare, extras);
        let cpu = resolve(&CpuSpec::default(), &host, 1 << 30).unwrap();
        value(&cpu.cpuid, 0x1, 0, ECX)
    };
    assert_eq!(ecx(false), 1 << 31);
    assert_eq!(ecx(true), 1 << 31 | 1 << 24);
}

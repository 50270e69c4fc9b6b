// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Names of CPU features, and where each is a bit: one table, [`REGISTERS`].
//!
//! Names are QEMU's; those of `/proc/cpuinfo` differ in dashes, dots and underscores only, which do not count, or are
//! in `OTHER_NAMES`. Bits without a name are known to no model, but are not lost: a set is all bits of the
//! registers.
//!
//! Sources: Intel SDM vol. 2A, CPUID, tables 3-8 and following; SDM vol. 4, table 2-2 (IA32_ARCH_CAPABILITIES); AMD APM
//! vol. 3 appendix E; for KVM's own, kernel `Documentation/virt/kvm/x86/cpuid.rst`. What needs what: SDM vol. 1 §13 to
//! §15 (each extension's "detection" section), APM vol. 2 §15.

use std::fmt;

use kvm_bindings::kvm_cpuid_entry2;

/// Where a register is whose bits are features.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Location {
    /// Leaf, index and register ([`EAX`] and so on) of CPUID.
    Cpuid(u32, u32, usize),
    /// A model-specific register.
    Msr(u32),
}

/// Number of a register in a leaf's answer.
pub const EAX: usize = 0;
/// Number of EBX, as [`EAX`].
pub const EBX: usize = 1;
/// Number of ECX, as [`EAX`].
pub const ECX: usize = 2;
/// Number of EDX, as [`EAX`].
pub const EDX: usize = 3;

/// IA32_ARCH_CAPABILITIES, Intel SDM vol. 4 table 2-2.
pub const MSR_ARCH_CAPABILITIES: u32 = 0x10a;

/// One register whose bits are features, and which of them have names.
pub struct Register {
    /// Where the register is; no two rows have the same.
    pub location: Location,
    /// Bits that are no features: what a vCPU's place in the machine says, what KVM copies from control registers, and
    /// what repeats another register.
    pub others: u64,
    /// Bit, name, and the features without which this one cannot be.
    bits: &'static [(u8, &'static str, &'static [&'static str])],
}

/// Leaf 1 EDX: more than one logical processor.
const HT: u64 = 1 << 28;
/// Leaf 1 ECX, leaf 7 ECX: the guest has turned XSAVE, protection keys on.
const OSXSAVE: u64 = 1 << 27;
const OSPKE: u64 = 1 << 4;
/// Leaf 0x8000_0001 ECX: more than one logical processor.
const CMP_LEGACY: u64 = 1 << 1;
/// Leaf 0x8000_0001 EDX, on AMD: the same bits of leaf 1 EDX once more.
pub const AMD_ALIASES: u32 = 0x0183_f3ff;

/// Every register with features; a set's words are in this order.
#[rustfmt::skip]
pub const REGISTERS: &[Register] = &[
    Register { location: Location::Cpuid(0x1, 0, EDX), others: HT, bits: &[
        (0, "fpu", &[]), (1, "vme", &[]), (2, "de", &[]), (3, "pse", &[]),
        (4, "tsc", &[]), (5, "msr", &[]), (6, "pae", &[]), (7, "mce", &[]),
        (8, "cx8", &[]), (9, "apic", &[]), (11, "sep", &[]),
        (12, "mtrr", &[]), (13, "pge", &[]), (14, "mca", &[]), (15, "cmov", &[]),
        (16, "pat", &[]), (17, "pse36", &[]), (18, "pn", &[]), (19, "clflush", &[]),
        (21, "ds", &[]), (22, "acpi", &[]), (23, "mmx", &["fpu"]),
        (24, "fxsr", &["fpu"]), (25, "sse", &["fxsr"]), (26, "sse2", &["sse"]), (27, "ss", &[]),
        (29, "tm", &[]), (30, "ia64", &[]), (31, "pbe", &[]),
    ]},
    Register { location: Location::Cpuid(0x1, 0, ECX), others: OSXSAVE, bits: &[
        (0, "pni", &["sse2"]), (1, "pclmulqdq", &["sse2"]), (2, "dtes64", &["ds"]), (3, "monitor", &[]),
        (4, "ds-cpl", &["ds"]), (5, "vmx", &[]), (6, "smx", &[]), (7, "est", &[]),
        (8, "tm2", &[]), (9, "ssse3", &["pni"]), (10, "cid", &[]),
        (12, "fma", &["avx"]), (13, "cx16", &["cx8"]), (14, "xtpr", &[]), (15, "pdcm", &[]),
        (17, "pcid", &["lm"]), (18, "dca", &[]), (19, "sse4.1", &["ssse3"]),
        (20, "sse4.2", &["sse4.1"]), (21, "x2apic", &["apic"]), (22, "movbe", &[]), (23, "popcnt", &[]),
        (24, "tsc-deadline", &["apic", "tsc"]), (25, "aes", &["sse2"]), (26, "xsave", &["fxsr"]),
        (28, "avx", &["xsave"]), (29, "f16c", &["avx"]), (30, "rdrand", &[]), (31, "hypervisor", &[]),
    ]},
    Register { location: Location::Cpuid(0x6, 0, EAX), others: 0, bits: &[
        (2, "arat", &["apic"]),
    ]},
    Register { location: Location::Cpuid(0x7, 0, EBX), others: 0, bits: &[
        (0, "fsgsbase", &["lm"]), (1, "tsc-adjust", &["tsc"]), (2, "sgx", &[]), (3, "bmi1", &[]),
        (4, "hle", &[]), (5, "avx2", &["avx"]), (6, "fdp-excptn-only", &[]), (7, "smep", &[]),
        (8, "bmi2", &[]), (9, "erms", &[]), (10, "invpcid", &["pcid"]), (11, "rtm", &[]),
        (13, "zero-fcs-fds", &[]), (14, "mpx", &["xsave"]),
        (16, "avx512f", &["avx2"]), (17, "avx512dq", &["avx512f"]), (18, "rdseed", &[]), (19, "adx", &[]),
        (20, "smap", &[]), (21, "avx512ifma", &["avx512f"]), (22, "pcommit", &[]), (23, "clflushopt", &[]),
        (24, "clwb", &[]), (25, "intel-pt", &[]), (26, "avx512pf", &["avx512f"]), (27, "avx512er", &["avx512f"]),
        (28, "avx512cd", &["avx512f"]), (29, "sha-ni", &["sse2"]), (30, "avx512bw", &["avx512f"]),
        (31, "avx512vl", &["avx512f"]),
    ]},
    Register { location: Location::Cpuid(0x7, 0, ECX), others: OSPKE, bits: &[
        (1, "avx512vbmi", &["avx512f"]), (2, "umip", &[]), (3, "pku", &["xsave", "lm"]),
        (5, "waitpkg", &[]), (6, "avx512vbmi2", &["avx512f"]), (7, "shstk", &["xsaves"]),
        (8, "gfni", &["sse2"]), (9, "vaes", &["avx", "aes"]), (10, "vpclmulqdq", &["avx", "pclmulqdq"]),
        (11, "avx512vnni", &["avx512f"]), (12, "avx512bitalg", &["avx512f"]),
        (14, "avx512-vpopcntdq", &["avx512f"]),
        (16, "la57", &["lm"]), (22, "rdpid", &[]),
        (24, "bus-lock-detect", &[]), (25, "cldemote", &[]), (27, "movdiri", &[]),
        (28, "movdir64b", &[]), (30, "sgxlc", &["sgx"]), (31, "pks", &["lm"]),
    ]},
    Register { location: Location::Cpuid(0x7, 0, EDX), others: 0, bits: &[
        (2, "avx512-4vnniw", &["avx512f"]), (3, "avx512-4fmaps", &["avx512f"]),
        (4, "fsrm", &[]), (8, "avx512-vp2intersect", &["avx512f"]), (10, "md-clear", &[]),
        (14, "serialize", &[]), (16, "tsx-ldtrk", &["rtm"]), (19, "arch-lbr", &[]), (20, "ibt", &["xsaves"]),
        (22, "amx-bf16", &["amx-tile"]), (23, "avx512-fp16", &["avx512bw"]),
        (24, "amx-tile", &["xsave", "lm"]), (25, "amx-int8", &["amx-tile"]), (26, "spec-ctrl", &[]), (27, "stibp", &[]),
        (28, "flush-l1d", &[]), (29, "arch-capabilities", &[]), (30, "core-capability", &[]), (31, "ssbd", &[]),
    ]},
    Register { location: Location::Cpuid(0x7, 1, EAX), others: 0, bits: &[
        (0, "sha512", &["avx2"]), (1, "sm3", &["avx"]), (2, "sm4", &["avx2"]),
        (4, "avx-vnni", &["avx2"]), (5, "avx512-bf16", &["avx512f"]), (7, "cmpccxadd", &["lm"]),
        (10, "fzrm", &[]), (11, "fsrs", &[]), (12, "fsrc", &[]),
        (17, "fred", &["lkgs"]), (18, "lkgs", &["lm"]), (19, "wrmsrns", &[]),
        (21, "amx-fp16", &["amx-tile"]), (23, "avx-ifma", &["avx2"]), (26, "lam", &["lm"]),
    ]},
    Register { location: Location::Cpuid(0x7, 1, EDX), others: 0, bits: &[
        (4, "avx-vnni-int8", &["avx2"]), (5, "avx-ne-convert", &["avx2"]), (8, "amx-complex", &["amx-tile"]),
        (10, "avx-vnni-int16", &["avx2"]), (14, "prefetchiti", &[]),
    ]},
    Register { location: Location::Cpuid(0x7, 2, EDX), others: 0, bits: &[
        (0, "intel-psfd", &["spec-ctrl"]), (1, "ipred-ctrl", &["spec-ctrl"]), (2, "rrsba-ctrl", &["spec-ctrl"]),
        (3, "ddpd-u", &["spec-ctrl"]), (4, "bhi-ctrl", &["spec-ctrl"]), (5, "mcdt-no", &[]),
    ]},
    Register { location: Location::Cpuid(0xd, 1, EAX), others: 0, bits: &[
        (0, "xsaveopt", &["xsave"]), (1, "xsavec", &["xsave"]), (2, "xgetbv1", &["xsave"]),
        (3, "xsaves", &["xsavec"]), (4, "xfd", &["xsave"]),
    ]},
    Register { location: Location::Cpuid(0x4000_0001, 0, EAX), others: 0, bits: &[
        (0, "kvmclock-old", &["kvmclock"]), (1, "kvm-nopiodelay", &[]), (2, "kvm-mmu", &[]), (3, "kvmclock", &["tsc"]),
        (4, "kvm-asyncpf", &[]), (5, "kvm-steal-time", &[]), (6, "kvm-pv-eoi", &["apic"]), (7, "kvm-pv-unhalt", &[]),
        (9, "kvm-pv-tlb-flush", &["kvm-steal-time"]), (10, "kvm-asyncpf-vmexit", &[]), (11, "kvm-pv-ipi", &["apic"]),
        (12, "kvm-poll-control", &[]), (13, "kvm-pv-sched-yield", &[]), (14, "kvm-asyncpf-int", &[]),
        (15, "kvm-msi-ext-dest-id", &[]), (16, "kvm-hc-map-gpa-range", &[]), (17, "kvm-migration-control", &[]),
        (24, "kvmclock-stable-bit", &["kvmclock"]),
    ]},
    Register { location: Location::Cpuid(0x8000_0001, 0, ECX), others: CMP_LEGACY, bits: &[
        (0, "lahf-lm", &["lm"]), (2, "svm", &[]), (3, "extapic", &["apic"]),
        (4, "cr8legacy", &[]), (5, "abm", &[]), (6, "sse4a", &["pni"]), (7, "misalignsse", &["sse"]),
        (8, "3dnowprefetch", &[]), (9, "osvw", &[]), (10, "ibs", &[]), (11, "xop", &["avx"]),
        (12, "skinit", &["svm"]), (13, "wdt", &[]), (15, "lwp", &["xsave"]),
        (16, "fma4", &["avx"]), (17, "tce", &[]), (19, "nodeid-msr", &[]),
        (21, "tbm", &[]), (22, "topoext", &[]), (23, "perfctr-core", &[]), (24, "perfctr-nb", &[]),
    ]},
    Register { location: Location::Cpuid(0x8000_0001, 0, EDX), others: AMD_ALIASES as u64, bits: &[
        (11, "syscall", &[]), (20, "nx", &["pae"]), (22, "mmxext", &["mmx"]),
        (25, "fxsr-opt", &["fxsr"]), (26, "pdpe1gb", &["lm"]), (27, "rdtscp", &["tsc"]),
        (29, "lm", &["pae"]), (30, "3dnowext", &["3dnow"]), (31, "3dnow", &["mmx"]),
    ]},
    Register { location: Location::Cpuid(0x8000_0007, 0, EDX), others: 0, bits: &[
        (8, "invtsc", &["tsc"]),
    ]},
    Register { location: Location::Cpuid(0x8000_0008, 0, EBX), others: 0, bits: &[
        (0, "clzero", &[]), (2, "xsaveerptr", &["xsave"]), (9, "wbnoinvd", &[]),
        (12, "ibpb", &[]), (14, "ibrs", &[]), (15, "amd-stibp", &[]), (17, "stibp-always-on", &["amd-stibp"]),
        (24, "amd-ssbd", &[]), (25, "virt-ssbd", &[]), (26, "amd-no-ssb", &[]), (28, "amd-psfd", &[]),
    ]},
    Register { location: Location::Cpuid(0x8000_000a, 0, EDX), others: 0, bits: &[
        (0, "npt", &["svm"]), (1, "lbrv", &["svm"]), (2, "svm-lock", &["svm"]), (3, "nrip-save", &["svm"]),
        (4, "tsc-scale", &["svm"]), (5, "vmcb-clean", &["svm"]), (6, "flushbyasid", &["svm"]),
        (7, "decodeassists", &["svm"]), (10, "pause-filter", &["svm"]), (12, "pfthreshold", &["pause-filter"]),
        (13, "avic", &["svm"]), (15, "v-vmsave-vmload", &["svm"]), (16, "vgif", &["svm"]), (25, "vnmi", &["svm"]),
        (28, "svme-addr-chk", &["svm"]),
    ]},
    Register { location: Location::Cpuid(0x8000_0021, 0, EAX), others: 0, bits: &[
        (0, "no-nested-data-bp", &[]), (2, "lfence-always-serializing", &[]), (6, "null-sel-clr-base", &[]),
        (8, "auto-ibrs", &[]), (24, "eraps", &[]), (27, "sbpb", &[]), (28, "ibpb-brtype", &[]), (29, "srso-no", &[]),
        (30, "srso-user-kernel-no", &[]),
    ]},
    Register { location: Location::Msr(MSR_ARCH_CAPABILITIES), others: 0, bits: &[
        (0, "rdctl-no", ARCH), (1, "ibrs-all", ARCH), (2, "rsba", ARCH), (3, "skip-l1dfl-vmentry", ARCH),
        (4, "ssb-no", ARCH), (5, "mds-no", ARCH), (6, "pschange-mc-no", ARCH), (7, "tsx-ctrl", ARCH),
        (8, "taa-no", ARCH), (13, "sbdr-ssdp-no", ARCH), (14, "fbsdp-no", ARCH), (15, "psdp-no", ARCH),
        (17, "fb-clear", ARCH), (20, "bhi-no", ARCH), (24, "pbrsb-no", ARCH), (26, "gds-no", ARCH),
        (27, "rfds-no", ARCH), (28, "rfds-clear", ARCH), (62, "its-no", ARCH),
    ]},
];
const ARCH: &[&str] = &["arch-capabilities"];

/// What `/proc/cpuinfo` and others call features of [`REGISTERS`].
const OTHER_NAMES: &[(&str, &str)] = &[
    ("sse3", "pni"),
    ("lzcnt", "abm"),
    ("xd", "nx"),
    ("i64", "lm"),
    ("dts", "ds"),
    ("rdrnd", "rdrand"),
    ("cmpxchg16b", "cx16"),
    ("tsc-deadline-timer", "tsc-deadline"),
    ("user-shstk", "shstk"),
    ("cet-ss", "shstk"),
    ("cet-ibt", "ibt"),
    ("nrips", "nrip-save"),
];

/// One named feature: its number in the table `ROWS`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Feature(usize);

/// Most features that one needs by its row of the table.
const NEEDS_MAX: usize = 2;

/// Where a feature is in [`REGISTERS`], and the numbers of those that it needs by its row there. Made by the compiler,
/// as numbers: every machine's process has this table, and what it had to compute or relocate would be memory of its
/// own.
#[derive(Clone, Copy)]
struct Row {
    register: u8,
    /// Number in the register's list.
    place: u8,
    bit: u8,
    needs: [Option<u16>; NEEDS_MAX],
}

const COUNT: usize = {
    let (mut count, mut register) = (0, 0);
    while register < REGISTERS.len() {
        count += REGISTERS[register].bits.len();
        register += 1;
    }
    count
};

static ROWS: [Row; COUNT] = rows();

/// Fails to compile when a feature needs one that is not in the table.
#[expect(
    clippy::cast_possible_truncation,
    reason = "a few registers, of 64 bits each"
)]
const fn rows() -> [Row; COUNT] {
    let none = Row {
        register: 0,
        place: 0,
        bit: 0,
        needs: [None; NEEDS_MAX],
    };
    let mut rows = [none; COUNT];
    let (mut number, mut register) = (0, 0);
    while register < REGISTERS.len() {
        let bits = REGISTERS[register].bits;
        let mut place = 0;
        while place < bits.len() {
            let (bit, _, names) = bits[place];
            let row = &mut rows[number];
            *row = Row {
                register: register as u8,
                place: place as u8,
                bit,
                needs: [None; NEEDS_MAX],
            };
            let mut need = 0;
            while need < names.len() {
                row.needs[need] = Some(number_of(names[need]));
                need += 1;
            }
            number += 1;
            place += 1;
        }
        register += 1;
    }
    rows
}

/// The number of a name of the table, as it is written there.
const fn number_of(name: &str) -> u16 {
    let (mut number, mut register) = (0, 0);
    while register < REGISTERS.len() {
        let bits = REGISTERS[register].bits;
        let mut place = 0;
        while place < bits.len() {
            if is_same(bits[place].1.as_bytes(), name.as_bytes()) {
                return number;
            }
            number += 1;
            place += 1;
        }
        register += 1;
    }
    panic!("a feature needs one that is not in the table")
}

const fn is_same(one: &[u8], other: &[u8]) -> bool {
    let mut at = 0;
    while at < one.len() && at < other.len() && one[at] == other[at] {
        at += 1;
    }
    at == one.len() && at == other.len()
}

/// How names are compared: dashes, dots, underscores and capitals do not count.
fn plain(name: &str) -> impl Iterator<Item = u8> {
    let letters = name.bytes().filter(u8::is_ascii_alphanumeric);
    letters.map(|letter| letter.to_ascii_lowercase())
}

/// The feature of that name. Case and everything but letters and digits do not matter: `sse4_1` is `SSE4.1`.
#[must_use]
pub fn find(name: &str) -> Option<Feature> {
    let is = |other: &str| plain(other).eq(plain(name));
    let other = OTHER_NAMES.iter().find(|(other, _)| is(other));
    match other {
        Some((_, name)) => all().find(|feature| feature.name() == *name),
        None => all().find(|feature| is(feature.name())),
    }
}

/// Names that begin as this one does, for whoever has mistyped one: those with most letters in common, at least three.
#[must_use]
pub fn similar(name: &str) -> Vec<&'static str> {
    let alike = |feature: Feature| {
        let pairs = plain(feature.name()).zip(plain(name));
        pairs.take_while(|(one, other)| one == other).count()
    };
    let most = all().map(alike).max().unwrap_or(0);
    let names = all().filter(|feature| most >= 3 && alike(*feature) == most);
    names.map(Feature::name).collect()
}

/// Every named feature, in the order of the table.
pub fn all() -> impl Iterator<Item = Feature> {
    (0..COUNT).map(Feature)
}

impl Feature {
    /// One that is named in this program, not by a user.
    #[must_use]
    pub fn known(name: &str) -> Self {
        find(name).expect("the program uses names of its own table")
    }

    fn row(self) -> &'static Row {
        &ROWS[self.0]
    }

    fn register(self) -> usize {
        self.row().register.into()
    }

    /// What it needs by its own row.
    fn needs(self) -> impl Iterator<Item = Self> {
        let needs = self.row().needs.iter().flatten();
        needs.map(|number| Self(usize::from(*number)))
    }

    /// Everything without which it cannot be.
    fn needs_all(self) -> FeatureSet {
        let mut set = FeatureSet::EMPTY;
        let mut todo: Vec<Self> = self.needs().collect();
        while let Some(needed) = todo.pop() {
            set.insert(needed);
            todo.extend(needed.needs());
        }
        set
    }

    /// Everything that cannot be without it, itself included.
    fn needed_by(self) -> FeatureSet {
        let mut set = FeatureSet::EMPTY;
        set.insert(self);
        loop {
            let before = set;
            for feature in all().filter(|feature| feature.needs().any(|need| before.has(need))) {
                set.insert(feature);
            }
            if set == before {
                return set;
            }
        }
    }

    /// Its name, as QEMU calls it.
    #[must_use]
    pub fn name(self) -> &'static str {
        REGISTERS[self.register()].bits[usize::from(self.row().place)].1
    }

    /// The register that its bit is in.
    #[must_use]
    pub fn location(self) -> Location {
        REGISTERS[self.register()].location
    }

    fn mask(self) -> u64 {
        1 << self.row().bit
    }
}

/// A set of features, those without a name among them.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct FeatureSet([u64; REGISTERS.len()]);

impl FeatureSet {
    /// The set without any feature, named or not.
    pub const EMPTY: Self = Self([0; REGISTERS.len()]);

    /// What a table of CPUID says: the bits of every register that is known to have features, the rest left out.
    #[must_use]
    pub fn of_cpuid(entries: &[kvm_cpuid_entry2]) -> Self {
        let mut set = Self::EMPTY;
        for (register, row) in set.0.iter_mut().zip(REGISTERS) {
            if let Location::Cpuid(leaf, index, at) = row.location {
                *register = u64::from(value(entries, leaf, index, at)) & !row.others;
            }
        }
        set
    }

    /// With what an MSR says, if it has features.
    #[must_use]
    pub fn with_msr(mut self, index: u32, value: u64) -> Self {
        for (register, row) in self.0.iter_mut().zip(REGISTERS) {
            if row.location == Location::Msr(index) {
                *register = value & !row.others;
            }
        }
        self
    }

    /// The bits of one register; none of one that is not in the table.
    #[must_use]
    pub fn register(&self, location: Location) -> u64 {
        let at = REGISTERS.iter().position(|row| row.location == location);
        at.map_or(0, |at| self.0[at])
    }

    /// The bits of one register of CPUID.
    #[must_use]
    pub fn leaf(&self, leaf: u32, index: u32, register: usize) -> u32 {
        let bits = self.register(Location::Cpuid(leaf, index, register));
        u32::try_from(bits).expect("registers of CPUID have 32 bits")
    }

    /// Whether the feature's bit is in the set.
    #[must_use]
    pub fn has(&self, feature: Feature) -> bool {
        self.0[feature.register()] & feature.mask() != 0
    }

    /// Puts the feature in, and nothing that it needs.
    pub fn insert(&mut self, feature: Feature) {
        self.0[feature.register()] |= feature.mask();
    }

    /// Takes it out, and all that need it.
    pub fn remove(&mut self, feature: Feature) {
        *self = self.without(&feature.needed_by());
    }

    /// What is in this set and not in that one.
    #[must_use]
    pub fn without(&self, other: &Self) -> Self {
        let mut set = *self;
        for (register, theirs) in set.0.iter_mut().zip(other.0) {
            *register &= !theirs;
        }
        set
    }

    /// The set of everything that is in either, bits without a name included.
    #[must_use]
    pub fn with_all(&self, other: &Self) -> Self {
        let mut set = *self;
        for (register, theirs) in set.0.iter_mut().zip(other.0) {
            *register |= theirs;
        }
        set
    }

    /// The set without what one register says.
    #[must_use]
    pub fn without_register(&self, location: Location) -> Self {
        let mut set = *self;
        for (register, row) in set.0.iter_mut().zip(REGISTERS) {
            if row.location == location {
                *register = 0;
            }
        }
        set
    }

    /// Whether there is no bit in the set, with or without a name.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::EMPTY
    }

    /// Named features, in the order of the table.
    pub fn features(&self) -> impl Iterator<Item = Feature> {
        all().filter(|feature| self.has(*feature))
    }

    /// The first of the named features that lacks what it needs, and what that is.
    #[must_use]
    pub fn unmet(&self) -> Option<(Feature, Self)> {
        let lacking = |feature: Feature| (feature, feature.needs_all().without(self));
        let mut lacking = self.features().map(lacking);
        lacking.find(|(_, missing)| !missing.is_empty())
    }
}

/// The names, with a place for what has none.
impl fmt::Display for FeatureSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut names: Vec<String> = self.features().map(|one| one.name().to_owned()).collect();
        for (bits, row) in self.0.iter().zip(REGISTERS) {
            let named = row
                .bits
                .iter()
                .fold(0, |mask, (bit, ..)| mask | 1_u64 << bit);
            for bit in (0..64).filter(|bit| bits & !named & (1 << bit) != 0) {
                names.push(format!("bit {bit} of {}", row.location));
            }
        }
        f.write_str(&names.join(", "))
    }
}

impl fmt::Debug for FeatureSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{{{self}}}")
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpuid(leaf, index, register) => {
                let register = ["EAX", "EBX", "ECX", "EDX"][*register];
                write!(f, "CPUID leaf {leaf:#x}.{index} {register}")
            }
            Self::Msr(index) => write!(f, "MSR {index:#x}"),
        }
    }
}

/// One register of a CPUID answer, 0 where there is no such leaf.
#[must_use]
pub fn value(entries: &[kvm_cpuid_entry2], leaf: u32, index: u32, register: usize) -> u32 {
    let mut entries = entries.iter();
    let found = entries.find(|entry| entry.function == leaf && entry.index == index);
    found.map_or(0, |entry| {
        [entry.eax, entry.ebx, entry.ecx, entry.edx][register]
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn the_table_is_consistent() {
        let mut names = BTreeSet::new();
        let mut places = BTreeSet::new();
        for feature in all() {
            let name = feature.name();
            assert!(names.insert(plain(name).collect::<Vec<_>>()), "{name}");
            let place = (feature.register(), feature.row().bit);
            assert!(places.insert(place), "{name}");
            assert_eq!(REGISTERS[feature.register()].others & feature.mask(), 0);
            assert_eq!(find(name), Some(feature));
            assert!(!feature.needs_all().has(feature), "{name} needs itself");
        }
        for (other, name) in OTHER_NAMES {
            let has = |name| names.contains(&plain(name).collect::<Vec<_>>());
            assert!(!has(other), "{other}");
            assert!(has(name), "{name}");
            assert_eq!(find(other), find(name), "{other}");
        }
    }

    #[test]
    fn names_of_the_kernel_and_of_qemu_are_the_same() {
        for (one, other) in [
            ("sse4_1", "sse4.1"),
            ("lahf_lm", "lahf-lm"),
            ("avx512_vnni", "avx512vnni"),
            ("sha_ni", "sha-ni"),
            ("lzcnt", "ABM"),
        ] {
            assert_eq!(find(one), find(other));
            assert!(find(one).is_some(), "{one}");
        }
        assert_eq!(find("wings"), None);
        assert_eq!(similar("avx512foo"), ["avx512f", "avx512-fp16"]);
    }

    #[test]
    fn taking_one_away_takes_all_that_need_it() {
        let mut set = FeatureSet::EMPTY;
        for name in ["fpu", "fxsr", "xsave", "avx", "avx2", "fma", "popcnt"] {
            set.insert(Feature::known(name));
        }
        set.remove(Feature::known("xsave"));
        assert_eq!(set.to_string(), "fpu, fxsr, popcnt");
        set.insert(Feature::known("avx2"));
        let (feature, missing) = set.unmet().unwrap();
        assert_eq!(
            (feature.name(), missing.to_string().as_str()),
            ("avx2", "xsave, avx")
        );
    }

    #[test]
    fn what_has_no_name_has_a_place() {
        let entry = kvm_cpuid_entry2 {
            function: 7,
            ecx: 1 << 29 | 1 << 3,
            ..Default::default()
        };
        let set = FeatureSet::of_cpuid(&[entry]).with_msr(MSR_ARCH_CAPABILITIES, 1 << 9);
        let expected = "pku, bit 29 of CPUID leaf 0x7.0 ECX, bit 9 of MSR 0x10a";
        assert_eq!(set.to_string(), expected);
    }
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! CPU models: the files that the program knows (`models/*.json`, in the form of `CpuModel`), those that a spec brings
//! with it, and what a spec's model with its flags amounts to.
//!
//! Pure: names in, a [`Wanted`] out, whatever the host. Whether a host can give it is `fit`'s question.
//!
//! **The levels.** Their features are those of the x86-64 psABI's micro-architecture levels and of PVE's models of the
//! same names; what is constant in every KVM guest (x2APIC, deadline timer, KVM's own features) comes on top, so that
//! CPUID is the same on all hosts. Family, model and stepping are those that QEMU's `qemu64` has, so that a guest which
//! comes from PVE finds the CPU that it knew. Neither tells a guest which hardware flaws its host has: whoever wants
//! the guest's kernel to work around them adds the flags for it (`+spec-ctrl`, `+ssbd`, `+md-clear`; AMD: `+ibpb`,
//! `+amd-ssbd`) or takes `host`.

use std::sync::LazyLock;

use atoll_vmm_protocol::cpu::{CpuModel, CpuSpec, HOST};

use super::Vendor;
use super::features::{self, Feature, FeatureSet, Location};

/// Data of the models that the program knows, the smallest first; those of one family come before others.
const FILES: [&str; 7] = [
    include_str!("models/x86-64.json"),
    include_str!("models/x86-64-v2.json"),
    include_str!("models/x86-64-v2-AES.json"),
    include_str!("models/x86-64-v3.json"),
    include_str!("models/x86-64-v4.json"),
    include_str!("models/kvm64.json"),
    include_str!("models/qemu64.json"),
];

static KNOWN: LazyLock<Vec<CpuModel>> = LazyLock::new(|| {
    let parse = |text| serde_json::from_str(text).expect("a test reads each of them");
    FILES.map(parse).to_vec()
});

/// The models that the program knows beside `host`.
#[must_use]
pub fn known() -> &'static [CpuModel] {
    &KNOWN
}

/// The levels of the x86-64 psABI, the greatest first: what is offered to a host that lacks something.
pub const LEVELS: [&str; 5] = [
    "x86-64-v4",
    "x86-64-v3",
    "x86-64-v2-AES",
    "x86-64-v2",
    "x86-64",
];

/// Nested virtualization, by the name that PVE has for it: the features of the host's vendor.
const NESTED: &str = "nested-virt";
const NESTED_AMD: [&str; 3] = ["svm", "npt", "nrip-save"];
const NESTED_INTEL: [&str; 1] = ["vmx"];

/// Highest basic leaf when a model names none: that of the XSAVE area.
const LEVEL: u32 = 0xd;
/// Highest extended leaf when a model names none and no feature needs more: that of address widths.
const LEVEL_EXTENDED: u32 = 0x8000_0008;
/// Narrowest and widest physical address (SDM vol. 3A §4.1.4).
const PHYS_BITS: std::ops::RangeInclusive<u8> = 32..=52;
/// Bytes of a vendor; most bytes of a name, its final zero not counted (SDM vol. 2A, CPUID, leaves 0 and 0x8000_0002).
const VENDOR_BYTES: usize = 12;
const NAME_BYTES_MAX: usize = 47;
/// What fits in leaf 1: an extended family of 8 bits is added to 15.
const FAMILY_MAX: u16 = 15 + 255;
const STEPPING_MAX: u8 = 15;

/// What is wrong with a CPU's spec, whatever the host.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ModelError {
    /// No such model.
    #[error("there is no CPU model {name:?}; there are {known} (see atoll-vmm cpu-models)")]
    Unknown {
        /// As it was written.
        name: String,
        /// All names.
        known: String,
    },
    /// Two of a name.
    #[error("CPU model {0}: there are two of that name")]
    Twice(String),
    /// Models that are each other's base.
    #[error("CPU model {0}: is its own base")]
    Loop(String),
    /// Neither + nor -.
    #[error("CPU flag {0:?}: expected + or - and a feature's name, as in +pcid")]
    Flag(String),
    /// No such feature.
    #[error("CPU flag {flag}: there is no such feature{hint}")]
    Feature {
        /// As it was written.
        flag: String,
        /// Names like it.
        hint: String,
    },
    /// Added and taken away.
    #[error("CPU feature {0}: is added and taken away")]
    Both(&'static str),
    /// Another feature is missing.
    #[error("CPU feature {feature} needs {needs}: add {flags}")]
    Needs {
        /// Which.
        feature: &'static str,
        /// What it lacks.
        needs: String,
        /// The same as flags.
        flags: String,
    },
    /// A number or a text that CPUID has no room for.
    #[error("CPU model {model}: {what}")]
    Identity {
        /// Which.
        model: String,
        /// What is wrong with it.
        what: String,
    },
    /// Impossible width.
    #[error("phys-bits {0}: physical addresses have 32 to 52 bits")]
    PhysBits(u8),
}

/// A CPU as it was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// As the spec has it, for messages.
    pub text: String,
    /// Whether the model begins with all that the host can give.
    pub from_host: bool,
    /// What is added to that, or everything. Complete: each feature has what it needs, unless the host gives that.
    pub added: FeatureSet,
    /// Features that the user takes from that.
    pub removed: Vec<Feature>,
    /// Vendor, family, model, stepping, name and highest leaves that the guest reads, where they are not the host's.
    pub identity: CpuModel,
    /// The guest is not told of KVM.
    pub hidden: bool,
    /// Width of physical addresses, if it was said.
    pub phys_bits: Option<u8>,
}

impl Wanted {
    /// Highest basic leaf of CPUID that the guest is told of.
    #[must_use]
    pub fn level(&self) -> u32 {
        self.identity.level.unwrap_or(LEVEL)
    }

    /// Highest extended leaf of CPUID (0x8000_0000 and above), for a guest with these features.
    #[must_use]
    pub fn level_extended(&self, features: &FeatureSet) -> u32 {
        let needed = features.features().filter_map(leaf).max().unwrap_or(0);
        let topology = features.has(Feature::known("topoext"));
        let topology = if topology { 0x8000_001e } else { 0 };
        let wanted = self.identity.level_extended;
        wanted.unwrap_or(LEVEL_EXTENDED.max(needed).max(topology))
    }
}

/// The leaf of CPUID that a feature is in.
fn leaf(feature: Feature) -> Option<u32> {
    match feature.location() {
        Location::Cpuid(leaf, ..) => Some(leaf),
        Location::Msr(_) => None,
    }
}

/// What a spec's CPU amounts to. `vendor` is the host's: what nested virtualization is depends on it.
pub fn wanted(spec: &CpuSpec, vendor: Vendor) -> Result<Wanted, ModelError> {
    for (index, model) in spec.models.iter().enumerate() {
        let twice = known().iter().chain(&spec.models[..index]);
        if model.name == HOST || twice.into_iter().any(|other| other.name == model.name) {
            return Err(ModelError::Twice(model.name.clone()));
        }
    }
    let mut chain = vec![];
    let mut name = Some(spec.model.as_str());
    while let Some(one) = name.filter(|name| *name != HOST) {
        let model = find(one, spec)?;
        if chain.len() > spec.models.len() + known().len() {
            return Err(ModelError::Loop(spec.model.clone()));
        }
        chain.push(model);
        name = model.base.as_deref();
    }
    let mut wanted = Wanted {
        text: spec.to_string(),
        from_host: name == Some(HOST),
        added: FeatureSet::EMPTY,
        removed: Vec::new(),
        identity: CpuModel {
            name: spec.model.clone(),
            ..CpuModel::default()
        },
        hidden: spec.hidden,
        phys_bits: spec.phys_bits,
    };
    for model in chain.into_iter().rev() {
        check_identity(model)?;
        inherit(&mut wanted.identity, model);
        apply(&mut wanted, &model.flags, vendor)?;
    }
    apply(&mut wanted, &spec.flags, vendor)?;
    check_levels(&wanted)?;
    match spec.phys_bits {
        Some(bits) if !PHYS_BITS.contains(&bits) => Err(ModelError::PhysBits(bits)),
        _ => Ok(wanted),
    }
}

fn find<'a>(name: &str, spec: &'a CpuSpec) -> Result<&'a CpuModel, ModelError> {
    let mut models = spec.models.iter().chain(known());
    models.find(|model| model.name == name).ok_or_else(|| {
        let names = known().iter().chain(&spec.models);
        let names: Vec<_> = names.map(|model| model.name.as_str()).collect();
        ModelError::Unknown {
            name: name.to_owned(),
            known: format!("{HOST}, {}", names.join(", ")),
        }
    })
}

/// What `model` says about itself instead of its base.
fn inherit(identity: &mut CpuModel, model: &CpuModel) {
    fn take<T: Clone>(of: &mut Option<T>, from: &Option<T>) {
        if from.is_some() {
            of.clone_from(from);
        }
    }
    take(&mut identity.vendor, &model.vendor);
    take(&mut identity.family, &model.family);
    take(&mut identity.model, &model.model);
    take(&mut identity.stepping, &model.stepping);
    take(&mut identity.model_name, &model.model_name);
    take(&mut identity.level, &model.level);
    take(&mut identity.level_extended, &model.level_extended);
}

fn check_identity(model: &CpuModel) -> Result<(), ModelError> {
    let refuse = |what: String| {
        let model = model.name.clone();
        Err(ModelError::Identity { model, what })
    };
    let printable = |text: &str| text.bytes().all(|byte| (b' '..=b'~').contains(&byte));
    match model {
        CpuModel { name, .. } if name.is_empty() || !name.bytes().all(|b| b.is_ascii_graphic()) => {
            refuse("a name has printable characters and no space".to_owned())
        }
        CpuModel {
            vendor: Some(vendor),
            ..
        } if vendor.len() != VENDOR_BYTES || !printable(vendor) => refuse(format!(
            "vendor {vendor:?} has not {VENDOR_BYTES} characters"
        )),
        CpuModel {
            model_name: Some(name),
            ..
        } if name.len() > NAME_BYTES_MAX || !printable(name) => refuse(format!(
            "name {name:?} has more than {NAME_BYTES_MAX} characters, or odd ones"
        )),
        CpuModel {
            family: Some(family),
            ..
        } if *family > FAMILY_MAX => refuse(format!("family {family}: at most {FAMILY_MAX}")),
        CpuModel {
            stepping: Some(stepping),
            ..
        } if *stepping > STEPPING_MAX => {
            refuse(format!("stepping {stepping}: at most {STEPPING_MAX}"))
        }
        _ => Ok(()),
    }
}

/// Adds and takes away what `flags` say, in any order.
fn apply(wanted: &mut Wanted, flags: &[String], vendor: Vendor) -> Result<(), ModelError> {
    let (mut added, mut removed) = (Vec::new(), Vec::new());
    for flag in flags {
        let bad = || ModelError::Flag(flag.clone());
        let (sign, name) = flag.split_at_checked(1).ok_or_else(bad)?;
        let list = match sign {
            "+" => &mut added,
            "-" => &mut removed,
            _ => return Err(bad()),
        };
        match (name, vendor) {
            ("", _) => return Err(bad()),
            (NESTED, Vendor::Amd) => list.extend(NESTED_AMD.map(Feature::known)),
            (NESTED, Vendor::Intel) => list.extend(NESTED_INTEL.map(Feature::known)),
            _ => list.push(features::find(name).ok_or_else(|| unknown(flag, name))?),
        }
    }
    if let Some(both) = added.iter().find(|one| removed.contains(one)) {
        return Err(ModelError::Both(both.name()));
    }
    for feature in &added {
        wanted.added.insert(*feature);
        wanted.removed.retain(|one| one != feature);
    }
    for feature in &removed {
        wanted.added.remove(*feature);
    }
    wanted.removed.extend(removed);
    // One that needs what another flag takes away.
    if let Some(lost) = added.iter().find(|one| !wanted.added.has(**one)) {
        return Err(ModelError::Both(lost.name()));
    }
    match wanted.added.unmet() {
        Some((feature, needs)) if !wanted.from_host => {
            let join = |sign: &str, between: &str| {
                let names = needs.features().map(|one| format!("{sign}{}", one.name()));
                names.collect::<Vec<_>>().join(between)
            };
            Err(ModelError::Needs {
                feature: feature.name(),
                needs: join("", ", "),
                flags: join("+", ","),
            })
        }
        _ => Ok(()),
    }
}

fn unknown(flag: &str, name: &str) -> ModelError {
    let similar = features::similar(name);
    ModelError::Feature {
        flag: flag.to_owned(),
        hint: match similar.as_slice() {
            [] => String::new(),
            names => format!("; is it {}?", names.join(", ")),
        },
    }
}

/// A leaf that holds a feature must be there.
fn check_levels(wanted: &Wanted) -> Result<(), ModelError> {
    const HYPERVISOR_LEAVES: std::ops::Range<u32> = 0x4000_0000..0x8000_0000;
    let identity = &wanted.identity;
    let refuse = |what: String| {
        let model = identity.name.clone();
        Err(ModelError::Identity { model, what })
    };
    if let Some(level) = identity.level_extended
        && level < LEVEL_EXTENDED
    {
        return refuse(format!(
            "extended level {level:#x}: at least {LEVEL_EXTENDED:#x}"
        ));
    }
    for feature in wanted.added.features() {
        let Some(leaf) = leaf(feature).filter(|leaf| !HYPERVISOR_LEAVES.contains(leaf)) else {
            continue;
        };
        let limit = match leaf {
            ..0x4000_0000 => identity.level,
            _ => identity.level_extended,
        };
        if let Some(limit) = limit.filter(|limit| leaf > *limit) {
            let name = feature.name();
            return refuse(format!(
                "level {limit:#x} hides {name}, which is in leaf {leaf:#x}"
            ));
        }
    }
    Ok(())
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The CPU that a guest sees: a model by its name, and what is changed about it; a part of the machine's spec.
//!
//! A model is data: `atoll-vmm cpu-models` lists those that the program knows, and [`CpuModel`] is the form of all of
//! them, also of a user's own. Features have the names that QEMU and `/proc/cpuinfo` give them.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Name of the model that is everything the host can give.
pub const HOST: &str = "host";

/// The guest's CPU; all that the host can give by default.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CpuSpec {
    /// `host`, a model that the program knows, or one of `models`.
    pub model: String,
    /// Features that the guest sees beside the model's (`+pcid`), or does not see (`-aes`).
    pub flags: Vec<String>,
    /// The guest is not told that it runs on KVM, and has none of KVM's own features (clock, steal time). Needs the
    /// board `pc`, since the other has no other clock.
    pub hidden: bool,
    /// Width of physical addresses in bits. When absent, the host's for `host`, and 40 for other models, or the
    /// host's where that is less, or where memory needs more.
    pub phys_bits: Option<u8>,
    /// Models that this spec brings with it. One with the name of a model that the program knows is refused.
    pub models: Vec<CpuModel>,
}

impl Default for CpuSpec {
    fn default() -> Self {
        Self {
            model: HOST.to_owned(),
            flags: Vec::new(),
            hidden: false,
            phys_bits: None,
            models: Vec::new(),
        }
    }
}

/// As `--cpu` takes it: `x86-64-v3,+pcid,hidden`.
impl fmt::Display for CpuSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.model)?;
        for flag in &self.flags {
            write!(f, ",{flag}")?;
        }
        if self.hidden {
            f.write_str(",hidden")?;
        }
        match self.phys_bits {
            Some(bits) => write!(f, ",phys-bits={bits}"),
            None => Ok(()),
        }
    }
}

/// A model: what its base has, and what is different. What neither names, the guest does not see.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CpuModel {
    /// Its name, for `model` and `base`.
    pub name: String,
    /// One sentence for whoever chooses.
    pub description: String,
    /// The model that this one begins with, which may be `host`; one without any feature when absent.
    pub base: Option<String>,
    /// Features beside those of the base (`+avx`), or taken from it (`-avx`).
    pub flags: Vec<String>,
    /// Vendor as CPUID has it: 12 characters, `GenuineIntel` or `AuthenticAMD`. Only hosts of that vendor have the
    /// model; each host's own when absent, here and in the base.
    pub vendor: Option<String>,
    /// Family, 0 to 270; that of the base when absent, as for all that follow.
    pub family: Option<u16>,
    /// Model number, 0 to 255.
    pub model: Option<u8>,
    /// Stepping, 0 to 15.
    pub stepping: Option<u8>,
    /// What the CPU calls itself, at most 47 characters.
    pub model_name: Option<String>,
    /// Highest basic leaf of CPUID; as high as the features need.
    pub level: Option<u32>,
    /// Highest extended leaf of CPUID, 0x80000008 and above.
    pub level_extended: Option<u32>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cpu_is_written_as_the_command_line_takes_it() {
        assert_eq!(CpuSpec::default().to_string(), "host");
        let spec: CpuSpec = serde_json::from_str(
            r#"{"model":"x86-64-v3","flags":["+pcid","-aes"],"hidden":true,"phys_bits":39}"#,
        )
        .expect("a spec");
        assert_eq!(spec.to_string(), "x86-64-v3,+pcid,-aes,hidden,phys-bits=39");
    }
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A machine at rest, as it is written: everything but the bytes of its RAM. Used by snapshots and migration.
//!
//! ```text
//! state.json  {"format":"atoll-machine-state","version":1,"program":"0.1.0", …}
//!   ├ devices   name, kind, version, payload of each (crate atoll-devices, `state`)
//!   ├ chips     interrupt controllers      clock   the guest's and the host's time
//!   └ vcpus     registers (`vcpu`)
//! ```
//! The head is read before anything else, so that the state of a newer program is refused with its version, not
//! with a parser's complaint. The format only grows: fields that come later have a default.
//!
//! Not here: taking the state out of a machine and putting it back (`machine::saved`), RAM (`image`,
//! `packed`, `layers` of both, and `sinks` for both).

pub mod image;
pub mod layers;
pub mod packed;
pub mod sinks;
mod vcpu;

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use atoll_devices::state::Saved;
use kvm_bindings::{kvm_cpuid_entry2, kvm_irqchip};
use serde::{Deserialize, Serialize};

pub use vcpu::{VcpuSaved, entries, leaves};

/// Files of a snapshot in its directory: the spec of the machine, its state, and its RAM (`image`, or `packed`).
pub const SPEC_FILE: &str = "spec.json";
/// File of the machine's state but RAM ([`MachineState`], JSON).
pub const STATE_FILE: &str = "state.json";
/// File of the machine's RAM (`image`), sparse where it is zero.
pub const MEMORY_FILE: &str = "memory";

/// Most snapshots of which each is the parent of the next.
const GENERATIONS_MAX: usize = 256;

/// What the first field of a state says.
pub const FORMAT: &str = "atoll-machine-state";
/// Newest version that this program writes and reads.
pub const VERSION: u32 = 1;

/// Why a machine's state cannot be read. Nothing has been built from it then.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// Not JSON, or cut off.
    #[error("machine state: damaged")]
    Damaged(#[source] serde_json::Error),
    /// A file of the snapshot cannot be read.
    #[error("{path}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// JSON of something else.
    #[error("machine state: the format is {0:?}, expected {FORMAT:?}")]
    Foreign(String),
    /// A snapshot that needs another one, which is not where it was.
    #[error("snapshot {directory}: its parent is another snapshot than {parent}")]
    Parent {
        /// The child.
        directory: PathBuf,
        /// Where the parent should be.
        parent: PathBuf,
    },
    /// More of them than anybody makes.
    #[error("snapshot {0}: more than {GENERATIONS_MAX} snapshots need each other")]
    Generations(PathBuf),
    /// Written by a newer program.
    #[error(
        "machine state: version {found}, written by atoll-vmm {program}; this program knows versions up to {VERSION}"
    )]
    Newer {
        /// The version.
        found: u32,
        /// Who wrote it.
        program: String,
    },
}

/// What every version begins with.
#[derive(Deserialize)]
struct Head {
    #[serde(default)]
    format: String,
    #[serde(default)]
    version: u32,
    #[serde(default)]
    program: String,
}

/// A machine at rest, without its RAM.
#[derive(Debug, Serialize, Deserialize)]
pub struct MachineState {
    /// [`FORMAT`], or this is no state.
    pub format: String,
    /// [`VERSION`] of the program that wrote it.
    pub version: u32,
    /// Version of the `atoll-vmm` that wrote it.
    pub program: String,
    /// Version of the address map and of the devices (`layout.rs`).
    pub machine_version: u32,
    /// vCPUs of the machine.
    pub cpu_count: u8,
    /// Guest RAM, MiB.
    pub memory_mib: u64,
    /// Slot of each PCI function, by its name. Absent where it is the order of the spec that gives them.
    #[serde(default)]
    pub slots: BTreeMap<String, usize>,
    /// The disk that the machine boots from, if it has one.
    #[serde(default)]
    pub boot_disk: Option<String>,
    /// The state of every device, each under its name in the machine.
    pub devices: Vec<DeviceEntry>,
    /// Interrupt controllers that vCPUs share, as `KVM_GET_IRQCHIP` told each.
    pub chips: Vec<Raw<kvm_irqchip>>,
    /// Time when the machine was held.
    pub clock: ClockState,
    /// State of each vCPU, in the order of their numbers.
    pub vcpus: Vec<VcpuSaved>,
    /// How its RAM is written. Absent in migrations, and in snapshots of programs that had only one way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<SnapshotForm>,
}

/// How a snapshot's RAM is written, and which other snapshot it needs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotForm {
    /// Name of this snapshot, by which a child knows its parent: 32 random digits.
    pub id: String,
    /// Its RAM is a file of [`packed`], otherwise one of [`image`].
    pub packed: bool,
    /// The snapshot whose RAM this one changes. Absent where this one has all of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<Parent>,
}

/// The snapshot that another one needs, and how it is found and known again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Parent {
    /// Its [`SnapshotForm::id`]: another snapshot in its place is refused.
    pub id: String,
    /// Its directory, from that of the child.
    pub directory: PathBuf,
}

/// State of one device, under its name in the machine.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DeviceEntry {
    /// Name of the device in the machine: `disk0`, `serial port`.
    pub name: String,
    /// Its state, versioned by its kind.
    pub device: Saved,
}

/// Time when the machine was held, in nanoseconds.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct ClockState {
    /// The guest's paravirtual clock, as `KVM_GET_CLOCK` told it.
    pub guest_ns: u64,
    /// The host's real time: nanoseconds since 1970.
    pub realtime_ns: u64,
    /// Ticks of the time stamp counter a millisecond; 0 when KVM does not say.
    pub tsc_khz: u32,
}

impl MachineState {
    /// The state as it is written: one line of JSON, which every later version reads.
    #[must_use]
    pub fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("saved types have string keys only")
    }

    /// Reads what [`MachineState::to_json`] of this or an earlier version wrote.
    pub fn from_json(bytes: &[u8]) -> Result<Self, ReadError> {
        let head: Head = serde_json::from_slice(bytes).map_err(ReadError::Damaged)?;
        if head.format != FORMAT {
            return Err(ReadError::Foreign(head.format));
        }
        if head.version > VERSION {
            return Err(ReadError::Newer {
                found: head.version,
                program: head.program,
            });
        }
        serde_json::from_slice(bytes).map_err(ReadError::Damaged)
    }

    /// What each vCPU answers to CPUID, in the order of their numbers.
    #[must_use]
    pub fn cpuid(&self) -> Vec<Vec<kvm_cpuid_entry2>> {
        self.vcpus.iter().map(VcpuSaved::cpuid).collect()
    }
}

/// RAM as one snapshot has it: all, or what its parent's lacks.
#[derive(Debug)]
pub struct Layer {
    /// The file of its RAM, open for reading.
    pub file: File,
    /// The form of that file, as in [`SnapshotForm::packed`].
    pub packed: bool,
}

/// Reads the state of the snapshot in `directory`, and opens its RAM: the layers of it and of those that it needs, the
/// one that has all first.
pub fn open(directory: &Path) -> Result<(MachineState, Vec<Layer>), ReadError> {
    let (state, layer) = open_one(directory)?;
    let mut layers = vec![layer];
    let (mut child, mut form) = (directory.to_owned(), state.snapshot.clone());
    while let Some(parent) = form.and_then(|form| form.parent) {
        if layers.len() == GENERATIONS_MAX {
            return Err(ReadError::Generations(directory.to_owned()));
        }
        let there = child.join(&parent.directory);
        let (state, layer) = open_one(&there)?;
        form = state.snapshot;
        if form.as_ref().is_none_or(|form| form.id != parent.id) {
            return Err(ReadError::Parent {
                directory: child,
                parent: there,
            });
        }
        layers.push(layer);
        child = there;
    }
    layers.reverse();
    Ok((state, layers))
}

fn open_one(directory: &Path) -> Result<(MachineState, Layer), ReadError> {
    let failed = |name: &str| {
        let path = directory.join(name);
        move |source| ReadError::File { path, source }
    };
    let state = std::fs::read(directory.join(STATE_FILE)).map_err(failed(STATE_FILE))?;
    let file = File::open(directory.join(MEMORY_FILE)).map_err(failed(MEMORY_FILE))?;
    let state = MachineState::from_json(&state)?;
    let packed = state.snapshot.as_ref().is_some_and(|form| form.packed);
    Ok((state, Layer { file, packed }))
}

/// A structure of the kernel's stable interface, written as its bytes in hexadecimal.
#[derive(Debug, Clone, Copy)]
pub struct Raw<T>(pub T);

impl<T: zerocopy::IntoBytes + zerocopy::Immutable> Serialize for Raw<T> {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        atoll_devices::state::hex::serialize(self.0.as_bytes(), serializer)
    }
}

impl<'de, T: zerocopy::FromBytes> Deserialize<'de> for Raw<T> {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let bytes = atoll_devices::state::hex::deserialize(deserializer)?;
        let value = T::read_from_bytes(&bytes);
        value.map(Self).map_err(|_| {
            let wanted = size_of::<T>();
            serde::de::Error::custom(format!("{} bytes, expected {wanted}", bytes.len()))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, expected: &str) {
        let error = MachineState::from_json(text.as_bytes()).unwrap_err();
        assert_eq!(error.to_string(), expected);
    }

    #[test]
    fn the_head_is_looked_at_first() {
        check(
            r#"{"format":"atoll-machine-state","version":2,"program":"9.0","vcpus":"otherwise"}"#,
            "machine state: version 2, written by atoll-vmm 9.0; this program knows versions up to 1",
        );
        check(
            "{}",
            "machine state: the format is \"\", expected \"atoll-machine-state\"",
        );
        check(
            r#"{"format":"atoll-machine-state","version":1}"#,
            "machine state: damaged",
        );
        check("{\"format\":", "machine state: damaged");
    }
}

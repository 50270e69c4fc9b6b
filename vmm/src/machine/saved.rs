// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Takes the state out of a held machine, and puts it into one that was just built (types: `crate::saved`).
//!
//! **Order.** Taken: devices before interrupt controllers and vCPUs, so that an interrupt that a device sends
//! while it finishes its work is in the state of whoever has it then. Put back: the guest's clock, which the vCPUs'
//! registers switch on; interrupt controllers; vCPUs; devices last, since they may interrupt at once.
//!
//! **Clocks.** KVM's clock and the time stamp counters go on from the saved values, after a migration with the time
//! since then added to both (that much at most: [`ABSENCE_NS_MAX`]); the CMOS clock shows the host's time on either
//! side. Each vCPU tells its guest that it stood still, so that no watchdog of the guest counts the jump.

use std::io;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use atoll_devices::state::{DeviceState, Saved, StateError};
use atoll_vmm_protocol::spec::MachineSpec;
use kvm_bindings::{KVM_CLOCK_REALTIME, kvm_clock_data};

use super::generation;
use super::parts::Parts;
use crate::kvm::KvmError;
use crate::kvm::cpu::HostCpu;
use crate::kvm::cpu::compare::{self, Unlike};
use crate::layout;
use crate::saved::{ClockState, DeviceEntry, FORMAT, MachineState, VERSION, VcpuSaved};
use crate::vcpu::{Pending, Tsc};

/// Time that may have passed between two hosts' clocks at a migration; more is taken for clocks that differ.
const ABSENCE_NS_MAX: u64 = 600_000_000_000;
/// Two time stamp counters are the same speed up to this (250 ppm, the kernel's own tolerance for guests).
const TSC_TOLERANCE: u32 = 4000;

/// Why a state does not go into this machine.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// Made by an incompatible release.
    #[error("the state is of machine version {found}, this atoll-vmm builds version {known}")]
    MachineVersion {
        /// In the state.
        found: u32,
        /// Ours.
        known: u32,
    },
    /// The spec describes a machine of another size.
    #[error("the state has {saved} {what}, the spec {spec}")]
    Size {
        /// `vCPUs`.
        what: &'static str,
        /// In the state.
        saved: u64,
        /// In the spec.
        spec: u64,
    },
    /// The host's CPU lacks something that the guest has seen.
    #[error("this host's CPU is not the guest's: {0}")]
    Cpu(#[from] Unlike),
    /// The spec describes a machine with other devices.
    #[error("the state has the devices {saved}, the machine {built}")]
    Devices {
        /// Names in the state.
        saved: String,
        /// Names in the machine.
        built: String,
    },
    /// The vCPUs have been made already, and are others.
    #[error("the state's CPUs are not those of which the other process has told")]
    OtherCpus,
    /// One device refused.
    #[error("{device}")]
    Device {
        /// Its name.
        device: String,
        /// Why.
        source: StateError,
    },
    /// There is no random number for a new generation id.
    #[error("take a random number")]
    Random(#[source] io::Error),
    /// KVM refused.
    #[error(transparent)]
    Kvm(#[from] KvmError),
}

/// What a guest is told about the time for which it did not exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Absence {
    /// Nothing: its clocks go on where they stopped. For a snapshot.
    Unseen,
    /// Its clocks go on as if it had been there. For a migration.
    Passed,
}

/// Takes the state out of a machine that is held.
pub(super) fn save(parts: &Parts, spec: &MachineSpec) -> Result<MachineState, KvmError> {
    let devices = parts
        .states()
        .into_iter()
        .map(|(name, device)| DeviceEntry {
            name: name.to_owned(),
            device: device.save(),
        });
    let devices = devices.collect();
    let slots = parts.backplane.places();
    let slots = slots.map(|(name, slot)| (name.to_owned(), slot));
    let guest_clock = parts.machine.fd().get_clock();
    let guest_clock = guest_clock.map_err(KvmError::failed("read the guest's clock"))?;
    let scope = &parts.pristine.scope;
    let vcpus = Pending::all(parts.vcpus.iter().map(|vcpu| vcpu.save(scope)))?;
    let chips = parts.machine.irqchips()?;
    Ok(MachineState {
        format: FORMAT.to_owned(),
        version: VERSION,
        program: env!("CARGO_PKG_VERSION").to_owned(),
        machine_version: layout::MACHINE_VERSION,
        cpu_count: spec.cpu_count,
        memory_mib: spec.memory_mib,
        slots: slots.collect(),
        boot_disk: parts.boot_disk.clone(),
        devices,
        chips: chips.into_iter().map(crate::saved::Raw).collect(),
        clock: ClockState {
            guest_ns: guest_clock.clock,
            realtime_ns: match guest_clock.flags & KVM_CLOCK_REALTIME {
                0 => realtime_ns(),
                // Of the same moment, where KVM says it (Linux 5.16).
                _ => guest_clock.realtime,
            },
            tsc_khz: parts.pristine.tsc_khz(),
        },
        vcpus: vcpus
            .into_iter()
            .zip(&parts.cpuid)
            .map(|(vcpu, cpuid)| VcpuSaved::new(vcpu, cpuid))
            .collect(),
        snapshot: None,
    })
}

/// What can be told before anything is built: whether this program and this host can have the guest.
pub(super) fn check(
    state: &MachineState,
    spec: &MachineSpec,
    host: &HostCpu,
) -> Result<(), RestoreError> {
    if state.machine_version != layout::MACHINE_VERSION {
        return Err(RestoreError::MachineVersion {
            found: state.machine_version,
            known: layout::MACHINE_VERSION,
        });
    }
    let same = |what, saved: u64, spec: u64| match saved == spec {
        true => Ok(()),
        false => Err(RestoreError::Size { what, saved, spec }),
    };
    same("vCPUs", state.cpu_count.into(), spec.cpu_count.into())?;
    let vcpus = state.vcpus.len() as u64;
    same("vCPUs", vcpus, spec.cpu_count.into())?;
    same("MiB of memory", state.memory_mib, spec.memory_mib)?;
    for vcpu in &state.vcpus {
        compare::check(&vcpu.cpuid(), vcpu.msrs(), host)?;
    }
    Ok(())
}

/// Puts the state into a machine that was built for it and has not run. RAM is there already.
pub(super) fn restore(
    parts: &Parts,
    state: MachineState,
    absence: Absence,
) -> Result<(), RestoreError> {
    let built = parts.states();
    let entries = entries_of(&built, &state.devices)?;
    same_speed(state.clock.tsc_khz, parts.pristine.tsc_khz())?;
    let away_ns = match absence {
        Absence::Unseen => 0,
        Absence::Passed => realtime_ns()
            .saturating_sub(state.clock.realtime_ns)
            .min(ABSENCE_NS_MAX),
    };
    let clock = kvm_clock_data {
        clock: state.clock.guest_ns + away_ns,
        ..Default::default()
    };
    let set = parts.machine.fd().set_clock(&clock);
    set.map_err(KvmError::failed("set the guest's clock"))?;
    let chips: Vec<_> = state.chips.iter().map(|chip| chip.0).collect();
    parts.machine.set_irqchips(&chips)?;
    let away_ticks = u128::from(away_ns) * u128::from(state.clock.tsc_khz) / 1_000_000;
    let away_ticks = u64::try_from(away_ticks).unwrap_or(0);
    let vcpus = parts.vcpus.iter().zip(state.vcpus);
    let mut vcpus = vcpus.map(|(vcpu, saved)| (vcpu, Arc::new(saved.into_state(away_ticks))));
    // The others' counters are set like the first one's.
    if let Some((vcpu, state)) = vcpus.next() {
        let offset = vcpu.restore(&state, Tsc::SetFirst).wait()?;
        Pending::all(vcpus.map(|(vcpu, state)| vcpu.restore(&state, Tsc::Set(offset))))?;
    }
    let built_with = parts.generation.as_ref().map(|device| device.value());
    for ((name, device), saved) in built.iter().zip(entries) {
        let restored = device.restore(&saved);
        restored.map_err(|source| RestoreError::Device {
            device: (*name).to_owned(),
            source,
        })?;
    }
    if let (Absence::Unseen, Some(device)) = (absence, &parts.generation) {
        let built_with = built_with.unwrap_or_default();
        generation::renew(device, &built_with).map_err(RestoreError::Random)?;
    }
    Ok(())
}

/// Whether a time stamp counter goes on at the guest's speed, in kHz; 0 is a KVM that does not say. Another speed is
/// refused also where KVM could scale the counter (`KVM_SET_TSC_KHZ`): no host at hand can, so it could not be tried.
fn same_speed(guest: u32, host: u32) -> Result<(), Unlike> {
    match guest != 0 && host != 0 && guest.abs_diff(host) > host / TSC_TOLERANCE {
        true => Err(Unlike::TscSpeed { guest, host }),
        false => Ok(()),
    }
}

/// The saved state of each device that was built, by its name: what was plugged in comes in another order here.
fn entries_of(
    built: &[(&str, &dyn DeviceState)],
    saved: &[DeviceEntry],
) -> Result<Vec<Saved>, RestoreError> {
    let find = |(name, _): &(&str, _)| {
        let mut entries = saved.iter();
        entries.find(|entry| entry.name == *name)
    };
    let found: Option<Vec<_>> = built.iter().map(find).collect();
    let found = found.filter(|found| found.len() == saved.len());
    let names = |names: Vec<&str>| names.join(", ");
    let found = found.ok_or_else(|| RestoreError::Devices {
        saved: names(saved.iter().map(|entry| &*entry.name).collect()),
        built: names(built.iter().map(|(name, _)| *name).collect()),
    });
    Ok(found?
        .into_iter()
        .map(|entry| entry.device.clone())
        .collect())
}

fn realtime_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| u64::try_from(since.as_nanos()).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_counter_of_another_speed_is_refused() {
        let host = 2_000_000;
        for (guest, same) in [
            (0, true),
            (host, true),
            (host + 500, true),
            (host - 500, true),
            (host + 501, false),
            (host - 501, false),
            (u32::MAX, false),
        ] {
            assert_eq!(same_speed(guest, host).is_ok(), same, "{guest}");
        }
        same_speed(host, 0).unwrap();
    }
}

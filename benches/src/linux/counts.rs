// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! What the host's KVM counts of a guest, which a busy machine does not spoil as it does times: how often the guest was
//! left, and how many interrupts it got, for each packet, request or MiB.

use std::cell::Cell;
use std::fs;
use std::path::Path;

/// Where KVM has a folder for each VM, named by the thread that made it (`Documentation/virt/kvm/api.rst` names none of
/// its files; they are those of `kvm_stat`).
const FOLDER: &str = "/sys/kernel/debug/kvm";

/// Sums over some works of one guest.
#[derive(Debug, Default)]
pub struct Counts {
    units: Cell<f64>,
    exits: Cell<f64>,
    interrupts: Cell<f64>,
}

impl Counts {
    /// Counts while `work` is done, by the VMM `process`; `units` tells of its result how much it was.
    pub fn during<T>(
        &self,
        process: u32,
        work: impl FnOnce() -> anyhow::Result<T>,
        units: impl FnOnce(&T) -> f64,
    ) -> anyhow::Result<T> {
        let before = now(process);
        let done = work()?;
        let after = now(process);
        if let (Some(before), Some(after)) = (before, after) {
            self.add(units(&done), [after[0] - before[0], after[1] - before[1]]);
        }
        Ok(done)
    }

    fn add(&self, units: f64, [exits, interrupts]: [f64; 2]) {
        let add = |sum: &Cell<f64>, more: f64| sum.set(sum.get() + more);
        add(&self.units, units);
        add(&self.exits, exits);
        add(&self.interrupts, interrupts);
    }

    /// Adds all that was counted since the VM of the VMM `process` was made, as one unit.
    pub fn add_whole(&self, process: u32) {
        if let Some(counted) = now(process) {
            self.add(1.0, counted);
        }
    }

    /// Exits and interrupts a unit since the last call.
    pub fn take(&self) -> Option<[f64; 2]> {
        let units = self.units.take();
        let sums = [self.exits.take(), self.interrupts.take()];
        (units > 0.0).then(|| sums.map(|sum| sum / units))
    }
}

fn now(process: u32) -> Option<[f64; 2]> {
    let tasks = format!("/proc/{process}/task");
    let of_process = |entry: &fs::DirEntry| {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let thread = name.split('-').next().unwrap_or_default();
        Path::new(&tasks).join(thread).exists()
    };
    let folder = fs::read_dir(FOLDER)
        .ok()?
        .flatten()
        .find(of_process)?
        .path();
    let number = |name: &str| {
        fs::read_to_string(folder.join(name))
            .ok()?
            .trim()
            .parse()
            .ok()
    };
    Some([number("exits")?, number("irq_injections")?])
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The other side of `upgrade`: a machine that another process of this host has, and that comes when all is ready here.
//!
//! Its guest runs while this process opens, confines itself, and makes memory, vCPUs and the other devices. What has to
//! wait until it is held is little: what both processes would change, or what the other one still writes to.
//!
//! | what | why it waits |
//! |---|---|
//! | images of disks | tables of a qcow2 image are the other process's until it has closed them; so is a record of changes |
//! | taps | to take one is to set it up, and the guest receives by it |
//! | state | it is what the guest does |
//!
//! Nobody who talks to the machine is heard here until it is this process's: what one of two processes reads, the other
//! does not get.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use atoll_devices::virtio::net::VhostNetFiles;
use atoll_disk::OpenError;

use super::assembly::BuildError;
use super::owner::Machine;
use super::saved::{self, Absence, RestoreError};
use super::{devices, disks};
use crate::kvm::Kvm;
use crate::resources::{CardEnd, Medium};
use crate::saved::{MachineState, leaves};

/// What of the host is taken when the guest is held.
pub(super) struct Awaited {
    kvm: Arc<Kvm>,
    /// The images of each disk, in the spec's order; `None` for a drive without a disc.
    pub(super) disks: Vec<Option<VecDeque<OwnedFd>>>,
    /// The taps of each card, in the spec's order, and the kernel's end of it.
    pub(super) cards: Vec<(VecDeque<OwnedFd>, Option<VhostNetFiles>)>,
}

impl Awaited {
    /// Nothing yet.
    pub(super) fn new(kvm: Arc<Kvm>) -> Self {
        Self {
            kvm,
            disks: Vec::new(),
            cards: Vec::new(),
        }
    }
}

impl Machine {
    /// Makes the machine what the other one is, which is held. Nothing of it runs here.
    pub(super) fn arrive(&mut self, state: MachineState) -> Result<(), BuildError> {
        let (parts, spec) = (&mut self.parts, &self.spec);
        let Awaited { kvm, disks, cards } = parts.awaited.take().expect("a machine comes once");
        saved::check(&state, spec, kvm.cpu()?)?;
        let told: Vec<_> = state.cpuid().iter().map(|one| leaves(one)).collect();
        let made: Vec<_> = parts.cpuid.iter().map(|one| leaves(one)).collect();
        if made != told {
            return Err(RestoreError::OtherCpus.into());
        }
        let take = |(disk, files): (_, Option<_>)| {
            files.map(|files| Medium::take(files, disk)).transpose()
        };
        let media = spec.disks.iter().zip(disks).map(take);
        let media = media.collect::<Result<_, OpenError>>()?;
        (parts.disks, parts.scsi) = disks::put(&mut parts.backplane, spec, media)?;
        for (net, (taps, kernel)) in spec.nets.iter().zip(cards) {
            let end = CardEnd::inherit(taps, kernel, net)?;
            let card = devices::card(&mut parts.backplane, net, end)?;
            parts.nets.push(card);
        }
        if state.boot_disk.is_some() {
            parts.boot_disk.clone_from(&state.boot_disk);
        }
        Ok(saved::restore(parts, state, Absence::Passed)?)
    }

    /// Takes again, or from now on, what comes from those who talk to the machine.
    pub(super) fn hear_clients(&self) {
        let consoles = self.parts.consoles.iter();
        consoles.for_each(|console| console.set_deaf(false));
        if let Some(gate) = &self.gate {
            gate.open();
        }
    }
}

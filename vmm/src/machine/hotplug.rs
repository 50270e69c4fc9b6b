// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Disks and network cards that come and go while the machine runs, or is paused. Called by the owner.
//!
//! ```text
//! add-disk, add-net   spec checked ─► files taken ─► device (as the build table makes it) ─► bus ─► guest told
//! remove-device       guest asked ── lets go ─► Released ─► off the bus, threads ended, files closed, out of the spec
//!                                └─ never ───► it stays; asked again, forced, or gone with the next reset
//! ```
//! The machine's spec is what it consists of now: snapshots and migrations carry it. Slots are in its state
//! (`backplane`). While the machine moves nothing changes: what a guest lets go then, the other side takes away.
//!
//! Not here: the registers (`atoll-devices`, `pci/hotplug.rs`), what the guest does with them (`atoll-firmware`,
//! `acpi/hotplug.rs`).

use atoll_devices::pci::{PciBusError, ReleaseSink};
use atoll_disk::chain;
use atoll_vmm_protocol::api::{
    AddDisk, AddNet, Added, DeviceInfo, Removal, RemovalStage, RemoveDevice,
};
use atoll_vmm_protocol::spec::MachineSpec;

use super::assembly::BuildError;
use super::owner::{GuestEvent, GuestVoice, Machine};
use super::{belongings, devices, disks};
use crate::api::{self, Answer, Asked};
use crate::check;
use crate::resources::{CardEnd, Medium};

impl ReleaseSink for GuestVoice {
    fn released(&self) {
        self.say(GuestEvent::Released);
    }
}

impl Machine {
    /// Plugs a disk in whose images came with the request.
    pub(super) fn add_disk(&mut self, asked: Asked) -> Result<Added, Answer> {
        let AddDisk { disk } = api::body(asked.body)?;
        let with = |spec: &mut MachineSpec| spec.disks.push(disk);
        let (spec, targets) = self.candidate(with)?;
        let (disk, target) = spec
            .disks
            .last()
            .zip(targets.last().copied())
            .expect("pushed");
        let files = asked.files;
        let id = disk.id.clone().unwrap_or_default();
        let name = belongings::disk(&id);
        if let (Some(kept), false) = (&mut self.parts.kept, files.is_empty()) {
            kept.keep(&name, &files);
        }
        let medium = match disk.path.as_os_str().is_empty() {
            true if files.is_empty() => None,
            true => return Err(api::refusal(400, "a drive without a disc takes no file")),
            false => {
                let disk = disk.clone();
                // Whether io_uring is to be had is found out by trying, which only the starter may.
                let taken = atoll_thread::in_starter(move || Medium::take(files, &disk));
                Some(taken.map_err(|error| refused(&error.into()))?)
            }
        };
        let added = disks::plug(&mut self.parts, &spec, medium, target);
        let host = added.map_err(|error| refused(&error))?;
        self.spec = spec;
        Ok(self.announce_function(id, host, target))
    }

    /// Plugs a network card in whose tap came with the request.
    pub(super) fn add_net(&mut self, asked: Asked) -> Result<Added, Answer> {
        let AddNet { net } = api::body(asked.body)?;
        let with = |spec: &mut MachineSpec| spec.nets.push(net);
        let (spec, _) = self.candidate(with)?;
        let net = spec.nets.last().expect("pushed");
        let end = CardEnd::take(asked.files, net);
        let taps = end.as_ref().ok().map(CardEnd::taps);
        let end =
            end.map_err(|error| api::refusal(400, format!("tap {}: {}", net.tap, chain(&error))))?;
        let card = devices::card(&mut self.parts.backplane, net, end);
        self.parts.nets.push(card.map_err(|error| refused(&error))?);
        // A log that is on does not know of it, and the kernel may write for it.
        self.tracked = None;
        let id = net.id.clone().unwrap_or_default();
        if let (Some(kept), Some(Ok(taps))) = (&mut self.parts.kept, taps) {
            kept.insert(belongings::card(&id), taps);
        }
        self.spec = spec;
        Ok(self.announce_function(id.clone(), Some(id), None))
    }

    /// The machine with one device more, if it can be one, and the target numbers of its disks.
    fn candidate(
        &self,
        with: impl FnOnce(&mut MachineSpec),
    ) -> Result<(MachineSpec, Vec<Option<u8>>), Answer> {
        let mut spec = self.spec.clone();
        with(&mut spec);
        let settled = check::settle(&spec).and_then(|spec| {
            check::shape(&spec)?;
            let targets = check::targets(&spec)?;
            Ok((spec, targets))
        });
        settled.map_err(|error| api::refusal(409, error.to_string()))
    }

    /// Tells the guest of the function that is new, if one is.
    fn announce_function(&self, id: String, function: Option<String>, target: Option<u8>) -> Added {
        let backplane = &self.parts.backplane;
        if let Some(slot) = function.and_then(|name| backplane.slot_of(&name)) {
            self.parts.hotplug.changed(slot);
        }
        let slot = match target {
            Some(_) => backplane.slot_of(disks::HOST),
            None => backplane.slot_of(&id),
        };
        let slot = small(slot.expect("it has been put there"));
        tracing::info!(name = self.spec.name, id, slot, target, "device added");
        Added { id, slot, target }
    }

    /// Asks the guest for a device, or takes it.
    pub(super) fn remove_device(&mut self, asked: Asked) -> Result<Removal, Answer> {
        let RemoveDevice { id, force, .. } = api::body(asked.body)?;
        let removable = self.parts.removable(&id);
        if !removable {
            let known: Vec<_> = self.parts.removable_ids().collect();
            let text = format!(
                "no disk or network card {id}; there are: {}",
                known.join(" ")
            );
            return Err(api::refusal(404, text));
        }
        if self.parts.boot_disk.as_deref() == Some(&*id) {
            let text = format!("{id} stays: the machine boots from it");
            return Err(api::refusal(409, text));
        }
        if self.is_exported(&id) {
            let text = format!("{id} is being exported: end-export first");
            return Err(api::refusal(409, text));
        }
        let gone = Removal {
            stage: RemovalStage::Gone,
        };
        let Some(slot) = self.parts.backplane.slot_of(&id) else {
            // A unit of the SCSI host, which the guest's driver lets go by itself.
            self.take_away(&id);
            return Ok(gone);
        };
        if force {
            self.parts.hotplug.forget(slot);
            self.take_away(&id);
            self.parts.hotplug.changed(slot);
            return Ok(gone);
        }
        self.parts.hotplug.ask(slot);
        tracing::info!(
            name = self.spec.name,
            id,
            slot,
            "the guest is asked to let a device go"
        );
        Ok(Removal {
            stage: RemovalStage::Asked,
        })
    }

    /// Takes away what the guest has let go. Not while the machine moves: its state says what is to be taken.
    pub(super) fn take_released(&mut self) {
        if !self.is_moving() {
            let slots = self.parts.hotplug.take_released();
            self.take_slots(slots);
        }
    }

    /// What the guest was asked for, its next life finds gone.
    pub(super) fn complete_removals(&mut self) {
        let slots = self.parts.hotplug.reset();
        self.take_slots(slots);
    }

    fn take_slots(&mut self, slots: Vec<usize>) {
        for slot in slots {
            if let Some(id) = self.parts.backplane.name_at(slot).map(str::to_owned) {
                self.take_away(&id);
            }
        }
    }

    /// Ends a device; its files are closed with it.
    fn take_away(&mut self, id: &str) {
        self.spec
            .disks
            .retain(|disk| disk.id.as_deref() != Some(id));
        self.spec.nets.retain(|net| net.id.as_deref() != Some(id));
        self.forget_mirror(id);
        self.forget_kept(id);
        let disk = disks::unplug(&mut self.parts, id);
        self.parts.nets.retain(|card| card.function.name() != id);
        self.parts.backplane.remove(id);
        if let Some(disk) = disk {
            self.close_record(disk);
        }
        tracing::info!(name = self.spec.name, id, "device removed");
    }

    /// Closes the copies of what a disk or a card had, whose locks they hold.
    pub(super) fn forget_kept(&mut self, id: &str) {
        if let Some(kept) = &mut self.parts.kept {
            kept.forget(&belongings::disk(id));
            kept.forget(&belongings::card(id));
        }
    }

    /// What `info` tells of the bus and the SCSI host.
    pub(super) fn device_infos(&self) -> Vec<DeviceInfo> {
        let backplane = &self.parts.backplane;
        let functions = backplane.places().map(|(name, slot)| DeviceInfo {
            id: name.to_owned(),
            slot: small(slot),
            target: None,
            removable: self.parts.removable(name) && self.parts.boot_disk.as_deref() != Some(name),
            leaving: self.parts.hotplug.is_leaving(slot),
        });
        let host = backplane.slot_of(disks::HOST);
        let units = self.parts.disks.iter().filter_map(|disk| {
            Some(DeviceInfo {
                id: disk.id().to_owned(),
                slot: small(host?),
                target: Some(disk.target()?),
                removable: self.parts.boot_disk.as_deref() != Some(disk.id()),
                leaving: false,
            })
        });
        functions.chain(units).collect()
    }
}

fn small(slot: usize) -> u8 {
    u8::try_from(slot).expect("a bus has 32 slots")
}

/// Why a device is not plugged in: what the asker can change is a conflict, the rest is ours.
fn refused(error: &BuildError) -> Answer {
    let status = match error {
        BuildError::Disk(_) | BuildError::Net(_) => 409,
        BuildError::Pci(PciBusError::Slot { .. }) => {
            return api::refusal(409, "the PCI bus is full: remove a device first");
        }
        _ => 500,
    };
    api::refusal(status, chain(error))
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Changes of a machine that runs: plugs and rates of its cards, rates and sizes of its disks, discs of its drives.
//!
//! The machine knows its devices by their places in the spec that it was started with, which is in its run folder; the
//! config's order may be another one by now.

use std::path::Path;

use atoll_vmm_protocol::api::{
    EjectDisk, InsertDisk, Request, ResizeDisk, SetDiskLimits, SetLink, SetNetLimits,
};
use atoll_vmm_protocol::spec::{DiskBus, MachineSpec};

use crate::error::Error;
use crate::guest::config::GuestConfig;
use crate::guest::disks;
use crate::guest::vm::{Vm, boot, drives, resolve};
use crate::storage::name::VolumeId;

/// Applies what changed in a config ([`Applied::now`](crate::guest::Applied)) to the running machine.
pub async fn apply(
    vm: &Vm,
    config: &GuestConfig,
    changed: &[(String, Option<String>, Option<String>)],
) -> Result<(), Error> {
    for (key, former, value) in changed {
        let (Some(_), Some(_)) = (former, value) else {
            continue;
        };
        if key.starts_with("net") {
            set_card(vm, config, key).await?;
        } else if disks::is_disk(config.kind, key) && key != boot::VARIABLES {
            set_drive(vm, config, key).await?;
        }
    }
    Ok(())
}

/// Grows a disk's image and tells the guest.
pub async fn resize(vm: &Vm, volume: &VolumeId, size_bytes: u64) -> Result<(), Error> {
    let path = vm.seat().site.storage.path(volume).await?;
    let id = disk_id(&vm.spec()?, &path)?;
    vm.ask_for(Request::ResizeDisk, ResizeDisk { id, size_bytes })
        .await
}

async fn set_card(vm: &Vm, config: &GuestConfig, key: &str) -> Result<(), Error> {
    let cards = resolve::cards(vm.seat().id, config)?;
    let keys = config.family("net[n]").into_iter().map(|(key, _)| key);
    let Some((_, card)) = keys.zip(cards).find(|(name, _)| *name == key) else {
        return Ok(());
    };
    let nets = vm.spec()?.nets;
    let index = nets.iter().position(|net| net.tap == card.tap);
    let index = index.ok_or_else(|| Error::refused(format!("the machine has no card {key}")))?;
    let id = format!("net{index}");
    let link = SetLink {
        id: id.clone(),
        up: !card.attachment.link_down,
    };
    vm.ask_for(Request::SetLink, link).await?;
    let limits = SetNetLimits {
        id,
        receive_bytes_per_second: card.limits.receive_bytes_per_second,
        receive_burst_bytes: card.limits.receive_burst_bytes,
        send_bytes_per_second: card.limits.send_bytes_per_second,
        send_burst_bytes: card.limits.send_burst_bytes,
    };
    if limits_differ(&nets[index].limits, &card.limits) {
        vm.ask_for(Request::SetNetLimits, limits).await?;
    }
    Ok(())
}

/// A card whose packets the kernel moves takes no limits, and is not asked to when there were none and are none.
fn limits_differ(
    started: &atoll_vmm_protocol::spec::NetLimits,
    now: &atoll_vmm_protocol::spec::NetLimits,
) -> bool {
    let none = Default::default();
    *started != none || *now != none
}

async fn set_drive(vm: &Vm, config: &GuestConfig, key: &str) -> Result<(), Error> {
    let drive = drives::drives(config)?.into_iter().find(|d| d.key == key);
    let Some(drive) = drive else { return Ok(()) };
    let path = match &drive.volume {
        None => None,
        Some(volume) => {
            let volume: VolumeId = volume
                .parse()
                .map_err(|e| Error::refused(format!("{key}: {e}")))?;
            Some(vm.seat().site.storage.path(&volume).await?)
        }
    };
    match path {
        _ if drive.is_cdrom() => change_disc(vm, key, path.as_deref()).await,
        None => Ok(()),
        Some(path) => {
            let body = SetDiskLimits {
                id: disk_id(&vm.spec()?, &path)?,
                limits: drives::limits(&drive.options),
            };
            vm.ask_for(Request::SetDiskLimits, body).await
        }
    }
}

/// Puts a disc into a drive, or takes it out. As in PVE, also when the guest has locked the tray.
async fn change_disc(vm: &Vm, key: &str, path: Option<&Path>) -> Result<(), Error> {
    let target = drives::target(key);
    let disks = vm.spec()?.disks;
    let is_drive = |bus: DiskBus, number| bus == DiskBus::Cdrom && number == target;
    let index = disks.iter().position(|d| is_drive(d.bus, d.target));
    let index = index.ok_or_else(|| {
        Error::refused(format!(
            "the machine runs without drive {key}: it is there after the next start"
        ))
    })?;
    let (id, force) = (format!("disk{index}"), true);
    let Some(path) = path else {
        return vm
            .ask_for(Request::EjectDisk, EjectDisk { id, force })
            .await;
    };
    let disc = std::fs::File::open(path)
        .map_err(|e| Error::failed(format!("open {}", path.display()), e))?;
    let body = InsertDisk {
        id,
        path: path.to_owned(),
        force,
    };
    vm.ask_for_with_file(Request::InsertDisk, body, disc).await
}

fn disk_id(spec: &MachineSpec, path: &Path) -> Result<String, Error> {
    let index = spec.disks.iter().position(|disk| disk.path == path);
    let index = index.ok_or_else(|| {
        Error::refused(format!("the machine runs without disk {}", path.display()))
    })?;
    Ok(format!("disk{index}"))
}

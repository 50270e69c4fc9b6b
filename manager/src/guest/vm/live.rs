// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Changes of a machine that runs: plugs and rates of its cards, rates and sizes of its disks.
//!
//! The machine knows its devices by their places in the spec that it was started with, which is in its run folder; the
//! config's order may be another one by now.

use std::path::Path;

use atoll_vmm_protocol::api::{Request, ResizeDisk, SetDiskLimits, SetLink, SetNetLimits};
use atoll_vmm_protocol::spec::MachineSpec;

use crate::error::Error;
use crate::guest::config::GuestConfig;
use crate::guest::disks;
use crate::guest::vm::{Vm, resolve};
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
        } else if disks::is_disk(config.kind, key) {
            set_disk_limits(vm, config, key).await?;
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

async fn set_disk_limits(vm: &Vm, config: &GuestConfig, key: &str) -> Result<(), Error> {
    let disk = resolve::disks(config)?.into_iter().find(|d| d.key == key);
    let Some(disk) = disk else { return Ok(()) };
    let volume: VolumeId = disk
        .volume
        .parse()
        .map_err(|e| Error::refused(format!("{key}: {e}")))?;
    let path = vm.seat().site.storage.path(&volume).await?;
    let body = SetDiskLimits {
        id: disk_id(&vm.spec()?, &path)?,
        limits: resolve::disk_limits(&disk.options),
    };
    vm.ask_for(Request::SetDiskLimits, body).await
}

fn disk_id(spec: &MachineSpec, path: &Path) -> Result<String, Error> {
    let index = spec.disks.iter().position(|disk| disk.path == path);
    let index = index.ok_or_else(|| {
        Error::refused(format!("the machine runs without disk {}", path.display()))
    })?;
    Ok(format!("disk{index}"))
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Changes of a machine that runs: disks and cards that come and go, plugs and rates of its cards, rates and sizes of
//! its disks, discs of its drives. The machine knows its disks and cards by the names of their keys.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;

use atoll_disk::{Cache, Format, OpenOptions};
use atoll_vmm_protocol::api::{
    AddDisk, EjectDisk, InsertDisk, RemovalStage, RemoveDevice, Request, ResizeDisk, SetDiskLimits,
    SetLink, SetNetLimits,
};
use atoll_vmm_protocol::spec::{CacheMode, DiskFormat, DiskSpec, NetLimits, NetSpec};

use crate::error::Error;
use crate::exec::Program;
use crate::guest::config::GuestConfig;
use crate::guest::disks;
use crate::guest::keys;
use crate::guest::vm::resolve::Card;
use crate::guest::vm::{Vm, boot, drives, resolve, start};
use crate::network::link::{self, Attachment};
use crate::storage::name::VolumeId;

/// How long a guest has to let a disk or a card go before the change waits for its next start; PVE's time.
const UNPLUG_MS_MAX: u64 = 5000;

/// A change as [`Applied::now`](crate::guest::Applied) has it: key, former value, new value.
pub type Change = (String, Option<String>, Option<String>);

/// Applies what changed in a config to the running machine. Devices that did not come or go are returned with the
/// reason: their change has to wait.
pub async fn apply(
    vm: &Vm,
    config: &GuestConfig,
    changed: &[Change],
) -> Result<Vec<(String, String)>, Error> {
    let is_card = |key: &str| key.starts_with("net");
    let is_drive = |key: &str| disks::is_disk(config.kind, key) && key != boot::VARIABLES;
    // First what can fail as a whole: after that, a disk is plugged in whose new volume must stay.
    for (key, former, value) in changed {
        match (former, value) {
            (Some(former), Some(_)) if is_card(key) => set_card(vm, config, key, former).await?,
            (Some(_), Some(_)) if is_drive(key) => set_drive(vm, config, key).await?,
            _ => {}
        }
    }
    let mut problems = Vec::new();
    for (key, former, value) in changed {
        let result = match (former, value) {
            (None, Some(_)) if is_card(key) => plug_card(vm, config, key).await,
            (None, Some(_)) if is_drive(key) => plug_drive(vm, config, key).await,
            (Some(_), None) if is_card(key) => unplug_card(vm, key).await,
            (Some(_), None) if is_drive(key) => unplug(vm, key).await,
            _ => continue,
        };
        if let Err(error) = result {
            problems.push((key.clone(), format!("hotplug problem - {}", error.chain())));
        }
    }
    Ok(problems)
}

/// Grows a disk's image and tells the guest.
pub async fn resize(vm: &Vm, key: &str, size_bytes: u64) -> Result<(), Error> {
    let id = key.to_owned();
    vm.ask_for(Request::ResizeDisk, ResizeDisk { id, size_bytes })
        .await
}

async fn unplug(vm: &Vm, key: &str) -> Result<(), Error> {
    let body = RemoveDevice {
        id: key.to_owned(),
        force: false,
        timeout_ms: Some(UNPLUG_MS_MAX),
    };
    match vm.remove_device(body).await?.stage {
        RemovalStage::Gone => Ok(()),
        RemovalStage::Asked => Err(Error::refused(
            "the guest has not let it go yet: it is gone when the guest does, or at the next start",
        )),
    }
}

async fn unplug_card(vm: &Vm, key: &str) -> Result<(), Error> {
    unplug(vm, key).await?;
    link::delete(&link::tap_name(vm.seat().id, card_index(key))).await
}

async fn plug_drive(vm: &Vm, config: &GuestConfig, key: &str) -> Result<(), Error> {
    let mut places = start::places(vm.seat());
    let drives = drives::drives(config)?;
    let Some(drive) = drives.into_iter().find(|drive| drive.key == key) else {
        // `none` where that is no drive.
        return Ok(());
    };
    if let Some(volume) = &drive.volume {
        let path = path_of(vm, key, volume).await?;
        places.volumes.insert(volume.clone(), path);
    }
    let disk = drives::spec(&drive, &places)?;
    let image = match drive.volume {
        Some(_) => open(&disk)?,
        None => None,
    };
    vm.plug(Request::AddDisk, AddDisk { disk }, image).await
}

/// An image as its disk's mode wants it, without a lock, which is the machine's: it can open no path.
pub(super) fn open(disk: &DiskSpec) -> Result<Option<OwnedFd>, Error> {
    let source = atoll_disk::Source {
        path: disk.path.clone(),
        format: match disk.format {
            DiskFormat::Raw => Format::Raw,
            DiskFormat::Qcow2 => Format::Qcow2,
            DiskFormat::Nbd => {
                return Err(Error::refused("a volume is an image or a block device"));
            }
        },
        backing: Vec::new(),
    };
    let options = OpenOptions {
        read_only: disk.readonly,
        cache: match disk.cache {
            CacheMode::Writeback => Cache::Writeback,
            CacheMode::None => Cache::None,
            CacheMode::Writethrough => Cache::Writethrough,
            CacheMode::Directsync => Cache::Directsync,
            CacheMode::Unsafe => Cache::Unsafe,
        },
        ..OpenOptions::default()
    };
    let files = atoll_disk::unlocked_files(&source, options);
    let files = files.map_err(|e| Error::failed("open the image", e))?;
    Ok(files.into_iter().next().map(OwnedFd::from))
}

/// By the command `ctl add-net`, which opens the tap as the VMM does at its start.
async fn plug_card(vm: &Vm, config: &GuestConfig, key: &str) -> Result<(), Error> {
    let card = find_card(vm, config, key)?;
    link::create_tap(&card.tap, &card.attachment).await?;
    let spec = resolve::net(key, &card);
    let added = Program::new(vm.seat().site.program("atoll-vmm"))
        .args(["ctl", "--api-socket"])
        .arg(vm.api_socket())
        .args(["add-net", "--net"])
        .arg(net_keys(key, &spec))
        .run()
        .await;
    if let Err(error) = added {
        link::delete(&card.tap).await?;
        return Err(error.into());
    }
    Ok(())
}

/// A card as `--net` takes it.
fn net_keys(key: &str, net: &NetSpec) -> String {
    let mut keys = format!("tap={},id={key}", net.tap);
    let mut add = |name: &str, value: Option<String>| {
        if let Some(value) = value {
            keys.push_str(&format!(",{name}={value}"));
        }
    };
    add("mac", net.mac.clone());
    add("mtu", net.mtu.map(|mtu| mtu.to_string()));
    add("queues", net.queue_pairs.map(|pairs| pairs.to_string()));
    add("link", net.link_down.then(|| "down".to_owned()));
    let rate = net.limits.send_bytes_per_second;
    add("rate", (rate > 0).then(|| rate.to_string()));
    keys
}

fn find_card(vm: &Vm, config: &GuestConfig, key: &str) -> Result<Card, Error> {
    let cards = resolve::cards(vm.seat().id, config)?;
    let card = cards.into_iter().find(|card| card.key == key);
    card.ok_or_else(|| Error::refused(format!("there is no card {key}")))
}

fn card_index(key: &str) -> u16 {
    key.trim_start_matches("net").parse().unwrap_or_default()
}

async fn set_card(vm: &Vm, config: &GuestConfig, key: &str, former: &str) -> Result<(), Error> {
    let card = find_card(vm, config, key)?;
    let former = Card::new(
        vm.seat().id,
        key,
        &keys::properties(config.kind, key, former)?,
    )?;
    // Only VLANs concern the tap; the plug is pulled in the machine.
    let attached = Attachment {
        vlans: former.attachment.vlans,
        ..card.attachment.clone()
    };
    link::change(&card.tap, &attached, &card.attachment).await?;
    let told = tell_of_card(vm, &card, &former.limits).await;
    if told.is_err()
        && let Err(error) = link::change(&card.tap, &card.attachment, &attached).await
    {
        tracing::warn!(
            guest = vm.seat().title(),
            key,
            error = error.chain(),
            "not taken back"
        );
    }
    told
}

async fn tell_of_card(vm: &Vm, card: &Card, former: &NetLimits) -> Result<(), Error> {
    let link = SetLink {
        id: card.key.clone(),
        up: !card.attachment.link_down,
    };
    vm.ask_for(Request::SetLink, link).await?;
    match limits_to_set(card, former) {
        Some(limits) => vm.ask_for(Request::SetNetLimits, limits).await,
        None => Ok(()),
    }
}

/// A card whose packets the kernel moves takes no limits, and is not asked to when there were none and are none.
fn limits_to_set(card: &Card, former: &NetLimits) -> Option<SetNetLimits> {
    let is_concerned = [former, &card.limits]
        .into_iter()
        .any(|limits| *limits != NetLimits::default());
    is_concerned.then(|| SetNetLimits {
        id: card.key.clone(),
        receive_bytes_per_second: card.limits.receive_bytes_per_second,
        receive_burst_bytes: card.limits.receive_burst_bytes,
        send_bytes_per_second: card.limits.send_bytes_per_second,
        send_burst_bytes: card.limits.send_burst_bytes,
    })
}

async fn set_drive(vm: &Vm, config: &GuestConfig, key: &str) -> Result<(), Error> {
    let drive = drives::drives(config)?.into_iter().find(|d| d.key == key);
    let Some(drive) = drive else { return Ok(()) };
    if drive.is_cdrom() {
        let path = match &drive.volume {
            None => None,
            Some(volume) => Some(path_of(vm, key, volume).await?),
        };
        return change_disc(vm, key, path.as_deref()).await;
    }
    let body = SetDiskLimits {
        id: key.to_owned(),
        limits: drives::limits(&drive.options),
    };
    vm.ask_for(Request::SetDiskLimits, body).await
}

/// Puts a disc into a drive, or takes it out. As in PVE, also when the guest has locked the tray.
async fn change_disc(vm: &Vm, key: &str, path: Option<&Path>) -> Result<(), Error> {
    let (id, force) = (key.to_owned(), true);
    let Some(path) = path else {
        return vm
            .ask_for(Request::EjectDisk, EjectDisk { id, force })
            .await;
    };
    let disc =
        File::open(path).map_err(|e| Error::failed(format!("open {}", path.display()), e))?;
    let body = InsertDisk {
        id,
        path: path.to_owned(),
        force,
    };
    vm.ask_for_with_file(Request::InsertDisk, body, disc).await
}

pub(super) async fn path_of(vm: &Vm, key: &str, volume: &str) -> Result<std::path::PathBuf, Error> {
    let volume: VolumeId = volume
        .parse()
        .map_err(|e| Error::refused(format!("{key}: {e}")))?;
    vm.seat().site.storage.path(&volume).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::GuestKind;

    /// Wherever the rate that goes came from: the start, a change since, a hot-plug.
    #[test]
    fn a_rate_that_goes_is_lifted() {
        let card = |text: &str| {
            let card = keys::properties(GuestKind::Vm, "net0", text).unwrap();
            Card::new("100".parse().unwrap(), "net0", &card).unwrap()
        };
        let (free, slow) = (
            card("virtio,bridge=vmbr0"),
            card("virtio,bridge=vmbr0,rate=1"),
        );
        let rate = |card: &Card, former: &Card| {
            let limits = limits_to_set(card, &former.limits)?;
            Some(limits.send_bytes_per_second)
        };
        assert_eq!(rate(&free, &free), None);
        assert_eq!(rate(&slow, &free), Some(1 << 20));
        assert_eq!(rate(&free, &slow), Some(0));
    }

    #[test]
    fn a_card_is_told_in_the_command_lines_words() {
        let net = NetSpec {
            mac: Some("BC:24:11:00:00:01".to_owned()),
            queue_pairs: Some(4),
            link_down: true,
            ..NetSpec::tap("tap100i1")
        };
        assert_eq!(
            net_keys("net1", &net),
            "tap=tap100i1,id=net1,mac=BC:24:11:00:00:01,queues=4,link=down"
        );
        assert_eq!(
            net_keys("net0", &NetSpec::tap("tap100i0")),
            "tap=tap100i0,id=net0"
        );
    }
}

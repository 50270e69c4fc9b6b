// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A disk of a running machine goes to another volume: the machine copies it while its guest goes on (`begin`,
//! `follow`), then stores it there (`complete`). Called by the task that moves a disk, which holds the guest around the
//! switch, so that the config and the machine say the same whatever happens in between.

use std::time::{Duration, Instant};

use atoll_vmm_protocol::api::{
    BeginMirror, CancelMirror, CompleteMirror, MirrorInfo, MirrorStage, Request,
};
use atoll_vmm_protocol::spec::DiskSpec;

use crate::error::Error;
use crate::guest::config::GuestConfig;
use crate::guest::vm::{Vm, drives, live, start};
use crate::guest::{Guest, disks};
use crate::storage::name::VolumeId;
use crate::task::TaskContext;

/// How often a mirror is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// Time between two lines of progress.
const PROGRESS_EVERY: Duration = Duration::from_secs(2);
/// How long a guest may be held for the rest of its disk.
const HELD_MAX: Duration = Duration::from_secs(30);
/// How often a mirror of a held guest is looked at.
const HELD_LOOK_EVERY: Duration = Duration::from_millis(20);
/// How long the last flush may take: within the time of an answer.
const FLUSH_MS_MAX: u64 = 4000;

/// Begins to copy the disk `key` to `volume`, which is there and large enough.
pub async fn begin(
    vm: &Vm,
    config: &GuestConfig,
    key: &str,
    volume: &VolumeId,
    bytes_per_second: Option<u64>,
) -> Result<(), Error> {
    let drives = drives::drives(config)?;
    let drive = drives.into_iter().find(|drive| drive.key == key);
    let mut drive = drive.ok_or_else(|| Error::refused(format!("disk '{key}' does not exist")))?;
    let (mut places, volume) = (start::places(vm.seat()), volume.to_string());
    let path = live::path_of(vm, key, &volume).await?;
    places.volumes.insert(volume.clone(), path);
    drive.volume = Some(volume);
    let disk = drives::spec(&drive, &places)?;
    let image = live::open(&disk)?;
    let to = DiskSpec {
        path: disk.path,
        format: disk.format,
        cache: disk.cache,
        ..DiskSpec::default()
    };
    let id = key.to_owned();
    let body = BeginMirror {
        id,
        to,
        bytes_per_second,
    };
    let _: MirrorInfo = vm.answer_to(Request::BeginMirror, body, image).await?;
    Ok(())
}

/// Waits until little is left to copy, and tells of it.
pub async fn follow(vm: &Vm, key: &str, task: &TaskContext) -> Result<(), Error> {
    let mut told: Option<Instant> = None;
    loop {
        if task.is_cancelled() {
            return Err(Error::Interrupted);
        }
        let info = of(vm, key).await?;
        let info = info.ok_or_else(|| Error::refused(format!("the mirror of {key} is gone")))?;
        if told.is_none_or(|told| told.elapsed() >= PROGRESS_EVERY)
            || info.stage == MirrorStage::Ready
        {
            task.log(&progress(&info));
            told = Some(Instant::now());
        }
        match info.stage {
            MirrorStage::Copying => tokio::time::sleep(LOOK_EVERY).await,
            MirrorStage::Ready => return Ok(()),
            MirrorStage::Switched | MirrorStage::Failed => {
                let reason = info.error.unwrap_or_default();
                return Err(Error::refused(format!("mirror {key}: {reason}")));
            }
        }
    }
}

/// One line about a mirror. What is left counts, not what was copied: that is more, when the guest writes meanwhile.
fn progress(info: &MirrorInfo) -> String {
    let total = info.size_bytes.max(1);
    let there = total.saturating_sub(info.left_bytes);
    let slowed = match info.slowed_to_bytes_per_second {
        Some(rate) => format!(
            ", the guest writes faster and is held to {} MiB/s",
            rate >> 20
        ),
        None => String::new(),
    };
    format!(
        "{}: transferred {} of {} MiB ({} %), {} MiB/s{slowed}",
        info.id,
        there >> 20,
        total >> 20,
        u128::from(there) * 100 / u128::from(total),
        info.bytes_per_second >> 20,
    )
}

/// Stores the disk at the target from now on. The guest is held, and has to be until the config says so, too.
pub async fn complete(vm: &Vm, key: &str, task: &TaskContext) -> Result<(), Error> {
    let deadline = Instant::now() + HELD_MAX;
    while of(vm, key).await?.is_some_and(|info| info.left_bytes > 0) {
        if Instant::now() > deadline {
            let text = format!("the rest of {key} is not copied while the guest is held");
            return Err(Error::refused(text));
        }
        tokio::time::sleep(HELD_LOOK_EVERY).await;
    }
    let body = CompleteMirror {
        id: key.to_owned(),
        downtime_limit_ms: Some(FLUSH_MS_MAX),
    };
    let info: MirrorInfo = vm.answer_to(Request::CompleteMirror, body, None).await?;
    task.log(&progress(&info));
    Ok(())
}

/// Leaves the disk where it is that was to go to `volume`, also after a switch while the guest has been held since. No
/// such mirror is no error.
pub async fn cancel(vm: &Vm, key: &str, volume: &VolumeId) -> Result<(), Error> {
    if vm.process().is_none() {
        return Ok(());
    }
    let path = live::path_of(vm, key, &volume.to_string()).await?;
    match of(vm, key).await? {
        Some(info) if info.path == path => end(vm, info.id).await,
        _ => Ok(()),
    }
}

/// Ends a mirror that a task of a daemon which is gone may have left.
pub async fn forget(vm: &Vm, key: &str) -> Result<(), Error> {
    match of(vm, key).await? {
        Some(info) if info.stage != MirrorStage::Switched => end(vm, info.id).await,
        _ => Ok(()),
    }
}

async fn end(vm: &Vm, id: String) -> Result<(), Error> {
    vm.ask_for(Request::CancelMirror, CancelMirror { id }).await
}

/// What a task that is gone has left of its mirrors, before its held guest goes on: a disk is where the config says.
pub async fn settle(vm: &Vm, config: &GuestConfig) -> Result<(), Error> {
    for info in vm.mirrors().await? {
        let key = &info.id;
        let volume = config.get(key).map(disks::volume_of);
        let is_there = match volume {
            Some(volume) => live::path_of(vm, key, volume).await? == info.path,
            None => false,
        };
        if !(is_there && info.stage == MirrorStage::Switched) {
            end(vm, info.id).await?;
        }
    }
    Ok(())
}

async fn of(vm: &Vm, key: &str) -> Result<Option<MirrorInfo>, Error> {
    let mirrors = vm.mirrors().await?;
    Ok(mirrors.into_iter().find(|info| info.id == key))
}

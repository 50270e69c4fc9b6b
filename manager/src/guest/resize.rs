// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Task `resize`: a larger disk, and for a container the file system on it.

use std::path::PathBuf;
use std::time::Duration;

use crate::error::Error;
use crate::exec::Program;
use crate::guest::lock::Guard;
use crate::guest::site::Seat;
use crate::guest::vm::{self, Vm};
use crate::guest::{Guest, Phase, disks, guest};
use crate::id::GuestKind;
use crate::step;
use crate::storage::name::VolumeId;
use crate::task::{TaskContext, TaskStep};

/// Longest check or growth of a file system.
const FILE_SYSTEM_MAX: Duration = Duration::from_secs(3600);

/// What the steps hand on.
#[derive(Debug)]
pub struct Resize {
    seat: Seat,
    disk: String,
    size: String,
    guard: Option<Guard>,
    grown: Option<(VolumeId, u64)>,
}

impl Resize {
    /// Makes the disk with that key as large as `size` says (`+8G`, `32G`).
    pub fn new(seat: Seat, disk: String, size: String) -> Self {
        Self {
            seat,
            disk,
            size,
            guard: None,
            grown: None,
        }
    }
}

/// The table. Growing cannot be taken back; a step that failed can be done again.
pub const STEPS: &[TaskStep<Resize>] = &[
    step!("grow the volume", grow_volume),
    step!("grow the file system", grow_file_system),
    step!("write the configuration", write_config),
];

async fn grow_volume(resize: &mut Resize, task: &TaskContext) -> Result<(), Error> {
    resize.guard = Some(resize.seat.lock().await?);
    let config = resize.seat.unlocked()?.config;
    let is_disk =
        disks::is_disk(resize.seat.kind, &resize.disk) && resize.disk != vm::boot::VARIABLES;
    let value = config
        .get(&resize.disk)
        .filter(|_| is_disk)
        .ok_or_else(|| Error::invalid("disk", format!("disk '{}' does not exist", resize.disk)))?;
    let volume: VolumeId = disks::volume_of(value)
        .parse()
        .map_err(|e| Error::invalid("disk", format!("{e}")))?;
    let storage = &resize.seat.site.storage;
    let size_now = storage.size_bytes(&volume).await?;
    let size_bytes = disks::resized(&resize.size, size_now)?;
    let vm = Vm::new(resize.seat.clone());
    if resize.seat.kind == GuestKind::Vm && vm.process().is_some() {
        // The machine grows its image itself, so that its guest is told.
        vm::live::resize(&vm, &resize.disk, size_bytes).await?;
    } else {
        let storage = storage.open(&volume.storage)?;
        storage.resize(&volume.name, size_bytes).await?;
    }
    task.log(&format!(
        "{volume}: {} -> {}",
        disks::print_size(size_now),
        disks::print_size(size_bytes)
    ));
    resize.grown = Some((volume, size_bytes));
    Ok(())
}

async fn grow_file_system(resize: &mut Resize, task: &TaskContext) -> Result<(), Error> {
    let Some((volume, size_bytes)) = &resize.grown else {
        return Ok(());
    };
    let running = matches!(guest(&resize.seat).phase(), Phase::Running { .. });
    if resize.seat.kind == GuestKind::Vm {
        return Ok(());
    }
    let image = resize.seat.site.storage.path(volume).await?;
    let target = if running {
        let device = loop_device(&image).await?;
        Program::new("losetup")
            .arg("--set-capacity")
            .arg(&device)
            .run()
            .await?;
        device
    } else {
        // resize2fs insists on a check; exit status 1 says that it repaired something, which is fine.
        let check = Program::new("e2fsck")
            .args(["-f", "-p"])
            .arg(&image)
            .deadline(FILE_SYSTEM_MAX);
        if let Err(error) = check.run().await {
            task.log(&error.to_string());
        }
        image
    };
    let grow = Program::new("resize2fs")
        .arg(&target)
        .deadline(FILE_SYSTEM_MAX);
    match grow.run().await {
        // Growing it mounted takes CAP_SYS_RESOURCE, which a node that is itself a container may lack.
        Err(error) if running => {
            let size = disks::print_size(*size_bytes);
            task.warn(&format!(
                "{error}; stop {} and resize to {size} again to grow its file system",
                resize.seat.title()
            ));
            Ok(())
        }
        other => Ok(other.map(drop)?),
    }
}

/// The loop device that a mounted image is behind.
async fn loop_device(image: &std::path::Path) -> Result<PathBuf, Error> {
    let printed = Program::new("losetup")
        .args(["--noheadings", "--output", "NAME", "--associated"])
        .arg(image)
        .run()
        .await?;
    let device = printed
        .lines()
        .next()
        .map(str::trim)
        .filter(|line| !line.is_empty());
    device
        .map(PathBuf::from)
        .ok_or_else(|| Error::refused(format!("{} is not mounted", image.display())))
}

async fn write_config(resize: &mut Resize, _: &TaskContext) -> Result<(), Error> {
    let Some((volume, size_bytes)) = &resize.grown else {
        return Ok(());
    };
    let mut stored = resize.seat.stored()?;
    let value = stored.config.get(&resize.disk).unwrap_or_default();
    let value = disks::with_volume(value, volume, *size_bytes);
    stored.config.set(&resize.disk, value);
    stored.save(&resize.seat.site.store).await
}

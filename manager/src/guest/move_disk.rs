// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Tasks `qmmove` and `move_volume`: a disk's content goes to a new volume, on another storage or in another format. A
//! machine that runs copies its disk itself, and its guest is held for a moment: from before the switch until the
//! config says where the disk is. A container must not run. The former volume becomes an unused one; who wants it gone
//! says so.

use atoll_disk::Format;

use crate::error::Error;
use crate::guest::config::Reach;
use crate::guest::hold::Hold;
use crate::guest::keys::drive::is_cdrom;
use crate::guest::lock::Guard;
use crate::guest::site::Seat;
use crate::guest::vm::{Vm, boot, cloud_init, mirror};
use crate::guest::{ConfigUpdate, disks, guest, update};
use crate::id::GuestKind;
use crate::step;
use crate::storage::convert::{Image, convert};
use crate::storage::name::{StorageName, VolumeId};
use crate::task::{TaskContext, TaskStep};

/// What is asked for.
#[derive(Debug, Clone)]
pub struct Wish {
    /// Key of the disk.
    pub disk: String,
    /// Where it goes; the storage where it is, when it is not given.
    pub storage: Option<StorageName>,
    /// Format of its image; the present one, when it is not given.
    pub format: Option<Format>,
    /// The former volume goes, once nothing needs it.
    pub deletes: bool,
    /// Most that is copied in a second.
    pub bytes_per_second: Option<u64>,
}

/// What the steps hand on.
#[derive(Debug)]
pub struct Move {
    seat: Seat,
    wish: Wish,
    guard: Option<Guard>,
    /// The disk's former value.
    former: Option<String>,
    from: Option<Image>,
    to: Option<(VolumeId, u64)>,
    /// The machine, if it runs.
    running: Option<Vm>,
    hold: Hold,
    written: bool,
}

impl Move {
    /// A move of a disk of the guest on this seat.
    pub fn new(seat: Seat, wish: Wish) -> Self {
        Self {
            seat,
            wish,
            guard: None,
            former: None,
            from: None,
            to: None,
            running: None,
            hold: Hold::default(),
            written: false,
        }
    }

    /// Lets the guest go on that was held for the switch. Called after the steps.
    pub async fn let_go(&mut self) -> Result<(), Error> {
        self.hold.release(&self.seat).await
    }

    /// Removes the volume from which the disk has moved away. Called after the steps.
    pub async fn delete_former(mut self) -> Result<(), Error> {
        // Free again for the update.
        drop(self.guard.take());
        let former = self.former.unwrap_or_default();
        let former = disks::volume_of(&former);
        let config = self.seat.config()?;
        let keys = config.current.values.iter();
        let keys = keys.filter(|(key, value)| key.starts_with("unused") && *value == former);
        let delete = keys.map(|(key, _)| key.clone()).collect();
        let change = ConfigUpdate {
            delete,
            ..ConfigUpdate::default()
        };
        update::update(&self.seat, change, None).await.map(drop)
    }
}

/// The table.
pub const STEPS: &[TaskStep<Move>] = &[
    step!("look at the disk", look),
    step!("allocate a volume", allocate, undo free),
    step!("copy the disk", copy, undo give_up),
    step!("switch the machine over", switch, undo switch_back),
    step!("write the configuration", write_config, undo restore_config),
];

async fn look(moving: &mut Move, _: &TaskContext) -> Result<(), Error> {
    moving.guard = Some(moving.seat.lock().await?);
    let (seat, disk) = (&moving.seat, &moving.wish.disk);
    let config = seat.unlocked()?.config;
    let value = config
        .get(disk)
        .filter(|_| disks::is_disk(seat.kind, disk))
        .ok_or_else(|| Error::refused(format!("disk '{disk}' does not exist")))?;
    let drive = config.properties(disk)?.unwrap_or_default();
    let volume: VolumeId = disks::volume_of(value)
        .parse()
        .map_err(|e| Error::invalid("disk", format!("{e}")))?;
    if is_cdrom(&drive) || cloud_init::is_drive(&volume.name) {
        return Err(Error::refused("you can't move a cdrom"));
    }
    if guest(seat).process().is_some() {
        if seat.kind == GuestKind::Container || disk == boot::VARIABLES {
            return Err(Error::refused(format!(
                "'{disk}' is not moved while the guest runs: shut {} down before",
                seat.title()
            )));
        }
        moving.running = Some(Vm::new(seat.clone()));
    }
    let present = volume.name.image_format().unwrap_or(Format::Raw);
    let wanted = moving.wish.format.unwrap_or(present);
    let is_raw_only = seat.kind == GuestKind::Container || disk == boot::VARIABLES;
    if is_raw_only && wanted != Format::Raw {
        return Err(Error::invalid("format", format!("'{disk}' is always raw")));
    }
    let storage = moving.wish.storage.as_ref().unwrap_or(&volume.storage);
    if *storage == volume.storage && wanted == present {
        return Err(Error::refused(
            "you can't move to the same storage with same format",
        ));
    }
    let snapshots = config.sections.values().flat_map(|s| s.values.values());
    let is_kept = snapshots
        .into_iter()
        .any(|value| disks::volume_of(value) == volume.to_string());
    if moving.wish.deletes && is_kept {
        return Err(Error::refused(
            "you can't move a disk with snapshots and delete the source",
        ));
    }
    moving.from = Some(Image {
        path: seat.site.storage.path(&volume).await?,
        format: present,
    });
    moving.wish.format = Some(wanted);
    moving.wish.storage = Some(storage.clone());
    moving.former = Some(value.to_owned());
    Ok(())
}

async fn allocate(moving: &mut Move, task: &TaskContext) -> Result<(), Error> {
    let seat = &moving.seat;
    let (Some(from), Some(storage), Some(format)) =
        (&moving.from, &moving.wish.storage, moving.wish.format)
    else {
        return Ok(());
    };
    let size_bytes = from.size_bytes()?;
    let target = seat
        .site
        .storage
        .open_for(storage, disks::content_of(seat.kind))?;
    let volume = VolumeId {
        storage: storage.clone(),
        name: target.allocate(seat.id, size_bytes, format).await?,
    };
    task.log(&format!("moving {} to {volume}", moving.wish.disk));
    moving.to = Some((volume, size_bytes));
    Ok(())
}

async fn free(moving: &mut Move, _: &TaskContext) -> Result<(), Error> {
    match moving.to.take() {
        Some((volume, _)) => disks::free_own(&moving.seat, &volume).await,
        None => Ok(()),
    }
}

async fn copy(moving: &mut Move, task: &TaskContext) -> Result<(), Error> {
    let (Some(from), Some((volume, _)), Some(format)) =
        (&moving.from, &moving.to, moving.wish.format)
    else {
        return Ok(());
    };
    if let Some(vm) = &moving.running {
        let (config, disk) = (moving.seat.config()?, &moving.wish.disk);
        mirror::forget(vm, disk).await?;
        mirror::begin(vm, &config, disk, volume, moving.wish.bytes_per_second).await?;
        return mirror::follow(vm, disk, task).await;
    }
    let path = moving.seat.site.storage.path(volume).await?;
    let limit = moving.wish.bytes_per_second;
    convert(from, &Image { path, format }, limit, task).await
}

async fn give_up(moving: &mut Move, _: &TaskContext) -> Result<(), Error> {
    match (&moving.running, &moving.to) {
        (Some(vm), Some((volume, _))) => mirror::cancel(vm, &moving.wish.disk, volume).await,
        _ => Ok(()),
    }
}

async fn switch(moving: &mut Move, task: &TaskContext) -> Result<(), Error> {
    let Some(vm) = &moving.running else {
        return Ok(());
    };
    moving.hold.take(&moving.seat, task).await?;
    mirror::complete(vm, &moving.wish.disk, task).await
}

async fn switch_back(moving: &mut Move, task: &TaskContext) -> Result<(), Error> {
    // Before the guest goes on: until then both volumes hold the same.
    give_up(moving, task).await?;
    moving.hold.release(&moving.seat).await
}

async fn write_config(moving: &mut Move, _: &TaskContext) -> Result<(), Error> {
    let (Some(former), Some((volume, size_bytes))) = (&moving.former, &moving.to) else {
        return Ok(());
    };
    let mut stored = moving.seat.stored()?;
    let value = disks::with_volume(former, volume, *size_bytes);
    let change = ConfigUpdate {
        set: [(moving.wish.disk.clone(), value)].into(),
        ..ConfigUpdate::default()
    };
    let applied = stored.config.apply(&change, Reach::Everything)?;
    update::keep_volumes(&mut stored.config, &applied);
    stored.save(&moving.seat.site.store).await?;
    moving.written = true;
    Ok(())
}

async fn restore_config(moving: &mut Move, _: &TaskContext) -> Result<(), Error> {
    let Some(former) = &moving.former else {
        return Ok(());
    };
    if !std::mem::take(&mut moving.written) {
        return Ok(());
    }
    let mut stored = moving.seat.stored()?;
    let volume = disks::volume_of(former);
    let values = &mut stored.config.current.values;
    values.retain(|key, value| !(key.starts_with("unused") && value == volume));
    values.insert(moving.wish.disk.clone(), former.clone());
    stored.save(&moving.seat.site.store).await
}

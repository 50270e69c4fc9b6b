// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Tasks `qmclone` and `vzclone`: a guest of its own with copies of another one's disks, as they are now or were at a
//! snapshot. A source that runs is held while they are copied.

use std::collections::BTreeMap;

use atoll_disk::Format;

use crate::error::Error;
use crate::guest::container::image;
use crate::guest::create::{Draft, Params};
use crate::guest::hold::Hold;
use crate::guest::keys::{self, Effect};
use crate::guest::lock::Guard;
use crate::guest::site::Seat;
use crate::guest::vm::{boot, cloud_init};
use crate::guest::{disks, snapshot};
use crate::id::GuestKind;
use crate::step;
use crate::storage::convert::{Image, convert};
use crate::storage::name::{StorageName, VolumeId};
use crate::task::{TaskContext, TaskStep};

/// Keys that a clone does not have from its source: each guest has an identity of its own.
const IDENTITY: &[&str] = &["vmgenid", "smbios1", "meta", "onboot"];

/// What is asked for.
#[derive(Debug, Clone, Default)]
pub struct Wish {
    /// Name or host name; the source's, when it is not given.
    pub name: Option<String>,
    /// Notes; the source's, when they are not given.
    pub description: Option<String>,
    /// The snapshot to copy instead of the present state.
    pub snapshot: Option<String>,
    /// Where the disks go; each beside its source's, when it is not given.
    pub storage: Option<StorageName>,
    /// Format of their images; each its source's, when it is not given.
    pub format: Option<Format>,
    /// Most that is copied in a second.
    pub bytes_per_second: Option<u64>,
}

/// What the steps hand on.
#[derive(Debug)]
pub struct Cloning {
    source: Seat,
    wish: Wish,
    draft: Draft,
    /// The source's config that is copied.
    values: BTreeMap<String, String>,
    guard: Option<Guard>,
    hold: Hold,
}

impl Cloning {
    /// A clone of the guest on `source`, on `target`.
    pub fn new(source: Seat, target: Seat, wish: Wish) -> Result<Self, Error> {
        Ok(Self {
            draft: Draft::new(target, Params::new())?,
            source,
            wish,
            values: BTreeMap::new(),
            guard: None,
            hold: Hold::default(),
        })
    }
}

/// The table.
pub const STEPS: &[TaskStep<Cloning>] = &[
    step!("read the source", read),
    step!("reserve the number", reserve, undo unreserve),
    step!("hold the source", hold, undo release),
    step!("copy disks", copy_disks, undo free),
    step!("let the source go on", release),
    step!("write the configuration", write_config),
];

async fn read(clone: &mut Cloning, _: &TaskContext) -> Result<(), Error> {
    clone.guard = Some(clone.source.lock().await?);
    let config = clone.source.unlocked()?.config;
    let section = match &clone.wish.snapshot {
        Some(name) => snapshot::find(&config, name)?,
        None => &config.current,
    };
    clone.values = section.values.clone();
    clone.draft.raw = section.raw.clone();
    Ok(())
}

async fn reserve(clone: &mut Cloning, _: &TaskContext) -> Result<(), Error> {
    clone.draft.reserve().await
}

async fn unreserve(clone: &mut Cloning, _: &TaskContext) -> Result<(), Error> {
    clone.draft.unreserve().await
}

async fn hold(clone: &mut Cloning, task: &TaskContext) -> Result<(), Error> {
    match clone.wish.snapshot {
        Some(_) => Ok(()),
        None => clone.hold.take(&clone.source, task).await,
    }
}

async fn release(clone: &mut Cloning, _: &TaskContext) -> Result<(), Error> {
    clone.hold.release(&clone.source).await
}

async fn copy_disks(clone: &mut Cloning, task: &TaskContext) -> Result<(), Error> {
    let storages = &clone.source.site.storage;
    let content = disks::content_of(clone.source.kind);
    for (key, volume) in disks::own_volumes(&clone.source, &clone.values) {
        let place = clone.wish.storage.as_ref().unwrap_or(&volume.storage);
        if cloud_init::is_drive(&volume.name) {
            // Nothing to copy: it is written at each start.
            let made = disks::cloud_init_drive(&clone.draft.seat, place.clone()).await?;
            clone.draft.new_volumes.push(made.clone());
            let value = clone.values.get(&key).map_or("", String::as_str);
            let value = disks::with_volume(value, &made, cloud_init::SIZE_BYTES);
            clone.values.insert(key, value);
            continue;
        }
        let from = match &clone.wish.snapshot {
            Some(name) => {
                let storage = storages.open(&volume.storage)?;
                storage.snapshot_path(&volume.name, name).await?
            }
            None => storages.path(&volume).await?,
        };
        let format = volume.name.image_format().unwrap_or(Format::Raw);
        let from = Image { path: from, format };
        let wanted = match clone.wish.format {
            Some(wanted) if key != boot::VARIABLES => wanted,
            _ => format,
        };
        let size = from.size_bytes()?;
        let target = storages.open_for(place, content)?;
        let name = target.allocate(clone.draft.seat.id, size, wanted).await?;
        let made = VolumeId {
            storage: place.clone(),
            name,
        };
        clone.draft.new_volumes.push(made.clone());
        task.log(&format!("{key}: copying {volume} to {made}"));
        let to = Image {
            path: target.path(&made.name).await?,
            format: wanted,
        };
        convert(&from, &to, clone.wish.bytes_per_second, task).await?;
        let value = clone.values.get(&key).map_or("", String::as_str);
        let value = disks::with_volume(value, &made, size);
        clone.values.insert(key, value);
    }
    Ok(())
}

async fn free(clone: &mut Cloning, _: &TaskContext) -> Result<(), Error> {
    clone.draft.free().await
}

async fn write_config(clone: &mut Cloning, _: &TaskContext) -> Result<(), Error> {
    let kind = clone.source.kind;
    let is_copied = |key: &str| {
        let row = keys::find(kind, key);
        let is_lasting = row.is_some_and(|row| row.effect != Effect::Server) || key == image::KEY;
        !IDENTITY.contains(&key) && is_lasting
    };
    let values = std::mem::take(&mut clone.values).into_iter();
    let mut values: BTreeMap<_, _> = values.filter(|(key, _)| is_copied(key)).collect();
    for (key, value) in &mut values {
        if key.starts_with("net") {
            *value = without_address(kind, key, value);
        }
    }
    let name = match kind {
        GuestKind::Vm => "name",
        GuestKind::Container => "hostname",
    };
    let given = [
        (name, clone.wish.name.clone()),
        ("description", clone.wish.description.clone()),
    ];
    for (key, value) in given {
        if let Some(value) = value {
            values.insert(key.to_owned(), value);
        }
    }
    clone.draft.keys = values;
    clone.draft.write_config().await
}

/// A card's value without its address, so that it gets one of its own.
fn without_address(kind: GuestKind, key: &str, value: &str) -> String {
    let Ok(mut card) = keys::properties(kind, key, value) else {
        return value.to_owned();
    };
    card.remove("macaddr");
    card.remove("hwaddr");
    keys::print_properties(kind, key, &card)
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Volumes of guests whose configs do not name them: a daemon was killed between making a volume, or taking it out, and
//! writing the config. They become `unusedN`, as PVE's `qm rescan` has it: nothing is removed that may hold data. Looked
//! for when a daemon starts. Not here: what a creation has left, which goes with its reservation (`reconcile`).

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::MetadataExt as _;
use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::error::Error;
use crate::guest::config::GuestConfig;
use crate::guest::site::{Seat, Site};
use crate::guest::vm::{Vm, mirror};
use crate::guest::{Guest as _, disks, update};
use crate::id::{GuestId, GuestKind};
use crate::storage::name::VolumeId;

/// Time between two attempts at guests that somebody works on.
const AGAIN_EVERY: Duration = Duration::from_secs(2);

/// Volumes with an owner, as they were found, by their owner.
type Found = BTreeMap<GuestId, Vec<VolumeId>>;

/// Lists every stray volume of this node's guests as unused, once. A guest that somebody works on, or that is locked, has
/// its turn when that has ended, or `stop` comes. What fails is logged.
pub async fn run(site: Arc<Site>, stop: CancellationToken) {
    let looked = async {
        let mut found = owned(&site).await?;
        loop {
            turn(&site, &mut found).await?;
            if found.is_empty() {
                return Ok::<_, Error>(());
            }
            tokio::time::sleep(AGAIN_EVERY).await;
        }
    };
    tokio::select! {
        () = stop.cancelled() => {}
        looked = looked => if let Err(error) = looked {
            tracing::warn!(error = error.chain(), "volumes that no config names are not looked for");
        }
    }
}

/// Sees to all guests that nobody works on, and leaves the others in `found`.
async fn turn(site: &Arc<Site>, found: &mut Found) -> Result<(), Error> {
    let mut left = Found::new();
    for (kind, id) in site.guests()? {
        let Some(volumes) = found.remove(&id) else {
            continue;
        };
        let seat = site.seat(kind, id);
        let guard = site.locks.try_acquire(id);
        if guard.is_none() || seat.unlocked().is_err() {
            left.insert(id, volumes);
        } else if let Err(error) = keep(&seat, &volumes).await {
            let guest = seat.title();
            tracing::warn!(
                guest,
                error = error.chain(),
                "its volumes are not looked at"
            );
        }
    }
    *found = left;
    Ok(())
}

/// Lists those of a guest's `volumes` as unused that no config names and that are there still. The caller has the guest's
/// lock.
async fn keep(seat: &Seat, volumes: &[VolumeId]) -> Result<(), Error> {
    let mut stored = seat.stored()?;
    let own = named(&stored.config);
    if volumes.iter().all(|volume| own.contains(volume)) {
        return Ok(());
    }
    let strays = strays(seat, volumes).await?;
    if strays.is_empty() {
        return Ok(());
    }
    let vm = Vm::new(seat.clone());
    if seat.kind == GuestKind::Vm && vm.process().is_some() {
        // The machine may still copy a disk there, for a task that is gone.
        mirror::settle(&vm, &stored.config).await?;
    }
    for volume in &strays {
        let key = update::set_unused(&mut stored.config, volume);
        let guest = seat.title();
        tracing::warn!(guest, %volume, key, "a volume that the config did not name");
    }
    stored.save(&seat.site.store).await
}

/// Those of `volumes` that no guest names by this name or, where a folder belongs to two storages, by another one.
async fn strays(seat: &Seat, volumes: &[VolumeId]) -> Result<Vec<VolumeId>, Error> {
    // They were found before the lock was taken: a task may have removed its own since.
    let mut there = owned(&seat.site).await?;
    let there = there.remove(&seat.id).unwrap_or_default();
    let mut taken = BTreeSet::new();
    // Others' too: a disk may be lent to another guest.
    for (kind, id) in seat.site.guests()? {
        let config = seat.site.seat(kind, id).config()?;
        for volume in named(&config) {
            taken.extend(file_of(&seat.site, &volume).await);
        }
    }
    let mut strays = Vec::new();
    for volume in volumes.iter().filter(|volume| there.contains(volume)) {
        if let Some(file) = file_of(&seat.site, volume).await
            && taken.insert(file)
        {
            strays.push(volume.clone());
        }
    }
    Ok(strays)
}

/// Volumes that a guest has: now, with its next start, or in a snapshot.
fn named(config: &GuestConfig) -> BTreeSet<VolumeId> {
    let sections = config.sections.values().map(|section| &section.values);
    let present = [&config.current.values, &config.pending.values];
    let values = present.into_iter().chain(sections);
    let values = values.flat_map(BTreeMap::values);
    let volumes = values.map(|value| disks::volume_of(value).parse());
    volumes.filter_map(Result::ok).collect()
}

/// The file that a volume is: device and inode. None when it cannot be looked at.
async fn file_of(site: &Site, volume: &VolumeId) -> Option<(u64, u64)> {
    let path = site.storage.path(volume).await.ok()?;
    let file = tokio::fs::metadata(path).await.ok()?;
    Some((file.dev(), file.ino()))
}

/// All volumes with an owner, of every storage that answers.
async fn owned(site: &Site) -> Result<Found, Error> {
    let mut found = Found::new();
    let mut sections = site.storage.sections()?;
    sections.retain(|section| site.storage.is_enabled(section));
    for section in sections {
        let listed = async { site.storage.open(&section.name)?.list().await };
        let volumes = listed.await.unwrap_or_else(|error| {
            let error = error.chain();
            tracing::warn!(storage = %section.name, error, "its volumes are not looked at");
            Vec::new()
        });
        for volume in volumes {
            if let Some(owner) = volume.name.owner() {
                found.entry(owner).or_default().push(VolumeId {
                    storage: section.name.clone(),
                    name: volume.name,
                });
            }
        }
    }
    Ok(found)
}

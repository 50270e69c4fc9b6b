// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Changing a guest's config: new disks are made, disks that go become `unused`, unused ones that go are freed.

use crate::error::Error;
use crate::guest::config::{Applied, ConfigUpdate, GuestConfig, Reach};
use crate::guest::container::{format, plug};
use crate::guest::site::Seat;
use crate::guest::vm::{self, Vm};
use crate::guest::{Phase, disks, guest, hardware};
use crate::id::GuestKind;
use crate::storage::name::VolumeId;
use crate::task::TaskContext;

/// Unused volumes that a guest can have, as many as its key's family.
const UNUSED_MAX: u16 = 256;

/// Applies an update. What it made is removed again when it cannot be written.
pub async fn update(
    seat: &Seat,
    mut update: ConfigUpdate,
    task: Option<&TaskContext>,
) -> Result<Applied, Error> {
    let _guard = seat.lock().await?;
    let mut stored = seat.unlocked()?;
    stored.config.check_digest(update.digest.as_deref())?;
    refuse_kept_volumes(&stored.config, &update)?;
    let mut new = Vec::new();
    let result = async {
        provide(seat, &stored.config, &mut update, &mut new, task).await?;
        let running = matches!(guest(seat).phase(), Phase::Running { .. });
        let reach = match running {
            true => stored.config.reach(),
            false => Reach::Everything,
        };
        let mut applied = stored.config.apply(&update, reach)?;
        hardware::complete(&mut stored.config);
        let mut problems = Vec::new();
        if running && seat.kind == GuestKind::Vm {
            let vm = Vm::new(seat.clone());
            problems = vm::live::apply(&vm, &stored.config, &applied.now).await?;
            for (key, _) in &problems {
                stored.config.postpone(key, &mut applied);
            }
        }
        let mut freed = keep_volumes(&mut stored.config, &applied);
        if update.frees {
            freed.extend(give_up(&mut stored.config, &applied));
        }
        if running && seat.kind == GuestKind::Container {
            plug::apply(seat, &stored.config, &applied.now).await?;
        }
        stored.save(&seat.site.store).await?;
        Ok((applied, freed, problems))
    };
    match result.await {
        Ok((applied, freed, problems)) => {
            for volume in freed {
                disks::free_own(seat, &volume).await?;
            }
            match problems.is_empty() {
                true => Ok(applied),
                // PVE's form: the change waits, and whoever asked for it is told.
                false => Err(Error::Invalid(problems)),
            }
        }
        Err(error) => {
            for volume in new {
                disks::free_own(seat, &volume).await?;
            }
            Err(error)
        }
    }
}

/// Refuses to free a volume that a snapshot has.
fn refuse_kept_volumes(config: &GuestConfig, update: &ConfigUpdate) -> Result<(), Error> {
    let frees = |key: &&String| {
        key.starts_with("unused") || (update.frees && disks::holds_volume(config.kind, key))
    };
    for key in update.delete.iter().filter(frees) {
        let volume = config.get(key).unwrap_or_default();
        let mut kept = config.sections.values().flat_map(|s| s.values.values());
        if kept.any(|value| disks::volume_of(value) == volume) {
            return Err(Error::refused(format!(
                "unable to delete '{volume}' - volume is still in use (snapshot?)"
            )));
        }
    }
    Ok(())
}

/// Makes the disks that the update asks for, and gives its cards addresses.
async fn provide(
    seat: &Seat,
    config: &GuestConfig,
    update: &mut ConfigUpdate,
    new: &mut Vec<VolumeId>,
    task: Option<&TaskContext>,
) -> Result<(), Error> {
    let present: Vec<&str> = config
        .current
        .values
        .values()
        .map(|value| disks::volume_of(value))
        .collect();
    for (key, value) in &mut update.set {
        if disks::is_disk(seat.kind, key) {
            let (value_now, volume) = disks::provide(seat, key, value, task).await?;
            if let Some(volume) = volume {
                new.push(volume.clone());
                if seat.kind == GuestKind::Container {
                    format(&seat.site.storage.path(&volume).await?).await?;
                }
            } else if key == "rootfs" && !present.contains(&disks::volume_of(value)) {
                return Err(Error::invalid(
                    "rootfs",
                    "the root file system cannot be exchanged",
                ));
            }
            *value = value_now;
        } else if key.starts_with("net") {
            *value = hardware::with_mac(seat.kind, key, value);
        }
    }
    Ok(())
}

/// Keeps the volumes of disks that were taken out as `unused`; returns those of unused keys that were removed.
pub fn keep_volumes(config: &mut GuestConfig, applied: &Applied) -> Vec<VolumeId> {
    let mut freed = Vec::new();
    let now = applied.now.iter();
    let now = now.filter_map(|(key, former, _)| Some((key, former.as_ref()?)));
    let dropped = applied.dropped.iter().map(|(key, value)| (key, value));
    for (key, former) in now.chain(dropped) {
        if !disks::holds_volume(config.kind, key) {
            continue;
        }
        let volume = disks::volume_of(former);
        let in_use = |value: &String| disks::volume_of(value) == volume;
        let mut values = config
            .current
            .values
            .values()
            .chain(config.pending.values.values());
        if values.any(in_use) {
            continue;
        }
        let Ok(id) = volume.parse::<VolumeId>() else {
            continue;
        };
        if key.starts_with("unused") {
            freed.push(id);
        } else if id.name.owner().is_some() {
            set_unused(config, &id);
        }
    }
    freed
}

/// Names a volume by the first free key of those that are in no use; tells which, unless all are taken.
pub fn set_unused(config: &mut GuestConfig, volume: &VolumeId) -> Option<String> {
    let free = (0..UNUSED_MAX)
        .map(|n| format!("unused{n}"))
        .find(|key| config.get(key).is_none())?;
    config.set(&free, volume.to_string());
    Some(free)
}

/// Takes the volumes of removed disks out of `unused` again, for who wants them gone; returns them.
fn give_up(config: &mut GuestConfig, applied: &Applied) -> Vec<VolumeId> {
    let removed = applied.now.iter().filter(|(_, _, value)| value.is_none());
    let volumes = removed.filter_map(|(_, former, _)| Some(disks::volume_of(former.as_ref()?)));
    let mut given_up = Vec::new();
    for volume in volumes {
        let values = config.current.values.iter();
        let unused: Vec<String> = values
            .filter(|(key, value)| key.starts_with("unused") && *value == volume)
            .map(|(key, _)| key.clone())
            .collect();
        for key in unused {
            config.unset(&key);
            given_up.extend(volume.parse::<VolumeId>());
        }
    }
    given_up
}

#[cfg(test)]
mod tests {
    use super::*;

    fn applied(config: &mut GuestConfig, set: &[(&str, &str)], delete: &[&str]) -> Vec<VolumeId> {
        let update = ConfigUpdate {
            set: set
                .iter()
                .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
                .collect(),
            delete: delete.iter().map(|k| (*k).to_owned()).collect(),
            ..ConfigUpdate::default()
        };
        let applied = config.apply(&update, Reach::Everything).unwrap();
        keep_volumes(config, &applied)
    }

    #[test]
    fn no_volume_is_lost() {
        let text =
            "scsi0: local:100/vm-100-disk-0.raw,size=1G\nide2: local:iso/x.iso,media=cdrom\n";
        let mut config = GuestConfig::parse(GuestKind::Vm, text);
        assert_eq!(applied(&mut config, &[], &["scsi0", "ide2"]), []);
        assert_eq!(config.get("unused0"), Some("local:100/vm-100-disk-0.raw"));
        assert_eq!(config.get("unused1"), None, "nobody's own volume");
        let back = [("virtio0", "local:100/vm-100-disk-0.raw,size=1G")];
        assert_eq!(applied(&mut config, &back, &["unused0"]), []);
        assert_eq!(applied(&mut config, &[], &["virtio0"]), []);
        config
            .pending
            .values
            .insert("scsi1".to_owned(), "local:100/vm-100-disk-1.raw".to_owned());
        assert_eq!(applied(&mut config, &[], &["scsi1"]), []);
        let waited = config.get("unused1");
        assert_eq!(
            waited,
            Some("local:100/vm-100-disk-1.raw"),
            "what waited is kept, too"
        );
        let freed = applied(&mut config, &[], &["unused0"]);
        assert_eq!(freed[0].to_string(), "local:100/vm-100-disk-0.raw");
    }
}

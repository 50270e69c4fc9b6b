// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Disks in configs: what a user may write for one (`local:8`), and what is stored (`local:100/vm-100-disk-0.raw,size=8G`).

use std::collections::BTreeMap;

use atoll_disk::Format;

use crate::error::Error;
use crate::guest::keys;
use crate::guest::site::Seat;
use crate::guest::vm::{boot, cloud_init, drives, saved};
use crate::id::GuestKind;
use crate::storage::Storages;
use crate::storage::convert::{Image, convert};
use crate::storage::name::{Content, StorageName, VolumeId, VolumeName, parse_format};
use crate::task::TaskContext;

/// Bytes of a GiB, the unit of sizes without a unit in `STORAGE:SIZE`.
const GIB: u64 = 1 << 30;
/// Largest disk: what a raw file on ext4 can be.
const SIZE_BYTES_MAX: u64 = 16 << 40;

/// Families of keys that hold disks; a firmware's variables are one, too.
const VM_FAMILIES: [&str; 5] = ["virtio", "scsi", "sata", "ide", "efidisk"];
const CONTAINER_FAMILIES: [&str; 2] = ["rootfs", "mp"];

/// What is asked for by the first item of a disk's value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wanted {
    /// A new disk: `local:8`.
    New {
        /// Where.
        storage: StorageName,
        /// How large.
        size_bytes: u64,
        /// What its image is like.
        format: Format,
    },
    /// A new disk with another one's content: `local:0,import-from=local:import/x.qcow2`.
    Import {
        /// Where.
        storage: StorageName,
        /// What its image is like.
        format: Format,
        /// What is copied.
        from: VolumeId,
    },
    /// A cloud-init drive: `local:cloudinit`.
    CloudInit(StorageName),
    /// One that is there: `local:100/vm-100-disk-0.raw`.
    Existing(VolumeId),
    /// An empty CD drive, `none`, or what the host has anyway.
    Nothing,
}

/// Whether a config key holds a disk.
pub fn is_disk(kind: GuestKind, key: &str) -> bool {
    let families: &[&str] = match kind {
        GuestKind::Vm => &VM_FAMILIES,
        GuestKind::Container => &CONTAINER_FAMILIES,
    };
    families.iter().any(|family| {
        key.strip_prefix(family).is_some_and(|number| {
            number.bytes().all(|b| b.is_ascii_digit()) && (number.is_empty() == (key == "rootfs"))
        })
    })
}

/// Whether a config key holds a volume: a disk, one that was taken out, or the memory of a suspended machine.
pub fn holds_volume(kind: GuestKind, key: &str) -> bool {
    key.starts_with("unused") || key == saved::KEY || is_disk(kind, key)
}

/// Reads a disk's value as a user gives it.
pub fn wanted(key: &str, value: &str) -> Result<Wanted, Error> {
    let volume = volume_of(value);
    if volume == "none" {
        return Ok(Wanted::Nothing);
    }
    // A directory or device of the host in a container.
    if volume.starts_with('/') && key.starts_with("mp") {
        return Ok(Wanted::Nothing);
    }
    if volume.starts_with('/') {
        return Err(Error::invalid(
            key,
            "paths of the host are not supported yet, use a volume of a storage",
        ));
    }
    let wrong = |text: String| Error::invalid(key, text);
    let option = |name: &str| value.split(',').find_map(|item| item.strip_prefix(name));
    let format = option("format=").map_or(Some(Format::Raw), parse_format);
    let format = format.ok_or_else(|| wrong("unknown format".to_owned()))?;
    let from = option("import-from=");
    if let Some((storage, size)) = volume.split_once(':')
        && let Ok(gib) = size.parse::<f64>()
    {
        let storage = storage.parse().map_err(|e| wrong(format!("{e}")))?;
        if let Some(from) = from.filter(|_| gib == 0.0) {
            return Ok(Wanted::Import {
                storage,
                format,
                from: from.parse().map_err(|e| wrong(format!("{e}")))?,
            });
        }
        let size_bytes =
            bytes_of_gib(gib).ok_or_else(|| wrong(format!("'{size}' is not a size in GiB")))?;
        if from.is_none() {
            return Ok(Wanted::New {
                storage,
                size_bytes,
                format,
            });
        }
    }
    if from.is_some() {
        return Err(wrong(
            "'import-from' makes a new volume of its source's size: say STORAGE:0".to_owned(),
        ));
    }
    if let Some((storage, cloud_init::NAME)) = volume.split_once(':') {
        let storage = storage.parse().map_err(|e| wrong(format!("{e}")))?;
        return Ok(Wanted::CloudInit(storage));
    }
    let volume: VolumeId = volume.parse().map_err(|e| wrong(format!("{e}")))?;
    Ok(Wanted::Existing(volume))
}

/// Bytes of a size in GiB, rounded up to whole MiB.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "the range is checked before"
)]
fn bytes_of_gib(gib: f64) -> Option<u64> {
    let mib = (gib * 1024.0).ceil();
    let fits = mib >= 1.0 && mib <= (SIZE_BYTES_MAX >> 20) as f64;
    fits.then_some((mib as u64) << 20)
}

/// The volume in a disk's value: its first item, with or without its key.
pub fn volume_of(value: &str) -> &str {
    let items = value.split(',');
    let mut named = items.clone().filter_map(|item| {
        item.strip_prefix("file=")
            .or_else(|| item.strip_prefix("volume="))
    });
    let first = value.split(',').next().unwrap_or_default();
    named.next().unwrap_or(first)
}

/// A disk's value with another volume and the volume's size, every other option kept but those that say how the volume
/// is to be made.
pub fn with_volume(value: &str, volume: &VolumeId, size_bytes: u64) -> String {
    let mut text = volume.to_string();
    let asked = volume_of(value);
    for item in value.split(',') {
        let names_volume =
            item == asked || item.starts_with("file=") || item.starts_with("volume=");
        let is_past = ["size=", "format=", "import-from="]
            .iter()
            .any(|name| item.starts_with(name));
        if !names_volume && !is_past {
            text.push(',');
            text.push_str(item);
        }
    }
    format!("{text},size={}", print_size(size_bytes))
}

/// A size as PVE writes it: the largest unit without a remainder.
pub fn print_size(bytes: u64) -> String {
    for (shift, unit) in [(40, "T"), (30, "G"), (20, "M"), (10, "K")] {
        if bytes > 0 && bytes.is_multiple_of(1 << shift) {
            return format!("{}{unit}", bytes >> shift);
        }
    }
    bytes.to_string()
}

/// The size that a resize asks for: `+8G` adds to the present size, `32G` is absolute.
pub fn resized(text: &str, size_bytes_now: u64) -> Result<u64, Error> {
    let wrong = || Error::invalid("size", format!("'{text}' is not a size such as +8G or 32G"));
    let (adds, number) = match text.strip_prefix('+') {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let (number, shift) = match number.as_bytes().last() {
        Some(b'K') => (&number[..number.len() - 1], 10),
        Some(b'M') => (&number[..number.len() - 1], 20),
        Some(b'G') => (&number[..number.len() - 1], 30),
        Some(b'T') => (&number[..number.len() - 1], 40),
        _ => (number, 0),
    };
    let number: f64 = number.parse().map_err(|_| wrong())?;
    let unit = (1_u64 << shift) as f64 / GIB as f64;
    let bytes = bytes_of_gib(number * unit).ok_or_else(wrong)?;
    let wanted = if adds {
        size_bytes_now.saturating_add(bytes)
    } else {
        bytes
    };
    if wanted > SIZE_BYTES_MAX {
        return Err(wrong());
    }
    Ok(wanted)
}

/// Makes or finds the volume that a disk's value asks for. Returns the value to store, and the volume when it is new.
/// An import is a task's work.
pub async fn provide(
    seat: &Seat,
    key: &str,
    value: &str,
    task: Option<&TaskContext>,
) -> Result<(String, Option<VolumeId>), Error> {
    let storages: &Storages = &seat.site.storage;
    match wanted(key, value)? {
        Wanted::Nothing if key == boot::VARIABLES => Err(Error::invalid(key, "needs a volume")),
        Wanted::Nothing => Ok((value.to_owned(), None)),
        Wanted::New { storage, .. } if key == boot::VARIABLES => {
            let wish = keys::properties(seat.kind, key, value)?;
            let (volume, size_bytes, made) = boot::make_variables(seat, storage, wish).await?;
            let value = keys::print_properties(seat.kind, key, &made);
            Ok((with_volume(&value, &volume, size_bytes), Some(volume)))
        }
        Wanted::New {
            storage,
            size_bytes,
            format,
        } => {
            let name = storages
                .open_for(&storage, content_of(seat.kind))?
                .allocate(seat.id, size_bytes, format)
                .await?;
            let volume = VolumeId { storage, name };
            Ok((with_volume(value, &volume, size_bytes), Some(volume)))
        }
        Wanted::Import {
            storage,
            format,
            from,
        } => {
            let task = task.ok_or_else(|| Error::refused("an import is a task's work"))?;
            let (volume, size_bytes) = import(seat, storage, format, &from, task).await?;
            Ok((with_volume(value, &volume, size_bytes), Some(volume)))
        }
        Wanted::CloudInit(storage) => {
            let volume = cloud_init_drive(seat, storage).await?;
            let stored = with_volume(value, &volume, cloud_init::SIZE_BYTES);
            // A disc wherever it can be one.
            let stored = match drives::target(key) {
                Some(_) if !stored.contains("media=") => {
                    let mut drive = keys::properties(seat.kind, key, &stored)?;
                    drive.set("media", "cdrom");
                    keys::print_properties(seat.kind, key, &drive)
                }
                _ => stored,
            };
            Ok((stored, Some(volume)))
        }
        Wanted::Existing(volume) => {
            let size_bytes = storages.size_bytes(&volume).await?;
            Ok((with_volume(value, &volume, size_bytes), None))
        }
    }
}

async fn import(
    seat: &Seat,
    storage: StorageName,
    format: Format,
    from: &VolumeId,
    task: &TaskContext,
) -> Result<(VolumeId, u64), Error> {
    let source = seat.site.storage.image(from).await?;
    let size_bytes = source.size_bytes()?;
    let target = seat.site.storage.open_for(&storage, Content::Images)?;
    let name = target.allocate(seat.id, size_bytes, format).await?;
    let filled = async {
        let path = target.path(&name).await?;
        task.log(&format!("importing {from} as {storage}:{name}"));
        convert(&source, &Image { path, format }, None, task).await
    };
    if let Err(error) = filled.await {
        target.free(&name).await?;
        return Err(error);
    }
    Ok((VolumeId { storage, name }, size_bytes))
}

/// What a storage must be able to hold for this kind of guest's disks.
pub fn content_of(kind: GuestKind) -> Content {
    match kind {
        GuestKind::Vm => Content::Images,
        GuestKind::Container => Content::Rootdir,
    }
}

/// Makes a guest's cloud-init drive; what it holds is written at each start.
pub async fn cloud_init_drive(seat: &Seat, storage: StorageName) -> Result<VolumeId, Error> {
    let name = VolumeName::image(seat.id, cloud_init::NAME, Format::Raw)
        .map_err(|e| Error::refused(format!("{e}")))?;
    seat.site
        .storage
        .open_for(&storage, Content::Images)?
        .allocate_as(&name, cloud_init::SIZE_BYTES)
        .await?;
    Ok(VolumeId { storage, name })
}

/// The volumes of a guest's own among these keys: its disks, without those that are taken out, images and empty drives.
pub fn own_volumes(seat: &Seat, values: &BTreeMap<String, String>) -> Vec<(String, VolumeId)> {
    let own = values.iter().filter_map(|(key, value)| {
        let volume: VolumeId = volume_of(value).parse().ok()?;
        let is_own = is_disk(seat.kind, key) && volume.name.owner() == Some(seat.id);
        is_own.then(|| (key.clone(), volume))
    });
    own.collect()
}

/// Removes a volume if it is this guest's own.
pub async fn free_own(seat: &Seat, volume: &VolumeId) -> Result<(), Error> {
    if volume.name.owner() != Some(seat.id) {
        return Ok(());
    }
    seat.site
        .storage
        .open(&volume.storage)?
        .free(&volume.name)
        .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_users_write() {
        let new = |size_bytes| Wanted::New {
            storage: "local".parse().unwrap(),
            size_bytes,
            format: Format::Raw,
        };
        let import = Wanted::Import {
            storage: "local".parse().unwrap(),
            format: Format::Qcow2,
            from: "local:iso/x.img".parse().unwrap(),
        };
        let asked = "local:0,import-from=local:iso/x.img,format=qcow2";
        assert_eq!(wanted("scsi0", asked).unwrap(), import);
        assert_eq!(wanted("scsi0", "local:8,ssd=1").unwrap(), new(8 * GIB));
        assert_eq!(wanted("scsi0", "file=local:0.5").unwrap(), new(GIB / 2));
        assert_eq!(wanted("ide2", "none,media=cdrom").unwrap(), Wanted::Nothing);
        let existing = "local:100/vm-100-disk-0.raw";
        assert_eq!(
            wanted("scsi0", existing).unwrap(),
            Wanted::Existing(existing.parse().unwrap())
        );
        for wrong in [
            "local:0",
            "local:-1",
            "local:nan",
            "local:inf",
            "local:1e9",
            "/dev/sda",
            "x",
            "local:",
            "local:../x",
            "local:8,import-from=local:iso/x.iso",
            "local:0,import-from=x",
            "local:100/vm-100-disk-0.raw,import-from=local:iso/x.iso",
            "local:8,format=vmdk",
        ] {
            assert!(wanted("scsi0", wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_is_stored() {
        let volume = "local:100/vm-100-disk-1.raw".parse().unwrap();
        assert_eq!(
            with_volume("local:8,format=raw,ssd=1,size=3G", &volume, 8 * GIB),
            "local:100/vm-100-disk-1.raw,ssd=1,size=8G"
        );
        assert_eq!(
            with_volume("ssd=1,file=local:8", &volume, GIB + (1 << 20)),
            "local:100/vm-100-disk-1.raw,ssd=1,size=1025M"
        );
    }

    #[test]
    fn resizes() {
        assert_eq!(resized("+1G", GIB).unwrap(), 2 * GIB);
        assert_eq!(resized("32G", GIB).unwrap(), 32 * GIB);
        assert_eq!(resized("+512M", 0).unwrap(), GIB / 2);
        for wrong in ["", "+", "G", "-1G", "1X", "99999T"] {
            assert!(resized(wrong, GIB).is_err(), "{wrong}");
        }
    }

    #[test]
    fn keys_of_disks() {
        for key in ["scsi0", "virtio15", "ide2", "efidisk0"] {
            assert!(is_disk(GuestKind::Vm, key), "{key}");
        }
        for key in ["scsihw", "scsi", "rootfs", "net0", "ide2x"] {
            assert!(!is_disk(GuestKind::Vm, key), "{key}");
        }
        assert!(is_disk(GuestKind::Container, "rootfs") && is_disk(GuestKind::Container, "mp3"));
        assert!(!is_disk(GuestKind::Container, "mp"));
    }
}

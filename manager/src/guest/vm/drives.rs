// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A machine's disks and CD-ROM drives: keys of the config become entries of the spec. Pure.

use atoll_disk::Format;
use atoll_vmm_protocol::spec::{CacheMode, DiskBus, DiskFormat, DiskLimits, DiskSpec};

use super::resolve::Places;
use super::{boot, cloud_init};
use crate::error::Error;
use crate::guest::config::GuestConfig;
use crate::guest::keys::drive::is_cdrom;
use crate::schema::Properties;
use crate::storage::name::VolumeId;

/// Unit of the rates in configs: `mbps=1`.
const MIB: f64 = 1_048_576.0;

/// A family of keys: what the guest finds its members on.
struct Family {
    name: &'static str,
    stem: &'static str,
    /// Target number of its first member on the SCSI host. The families' numbers do not meet.
    first_target: Option<u8>,
}

/// In the order of their slots.
const FAMILIES: [Family; 4] = [
    Family::new("virtio[n]", "virtio", None),
    Family::new("scsi[n]", "scsi", Some(0)),
    Family::new("sata[n]", "sata", Some(72)),
    Family::new("ide[n]", "ide", Some(64)),
];

impl Family {
    const fn new(name: &'static str, stem: &'static str, first_target: Option<u8>) -> Self {
        Self {
            name,
            stem,
            first_target,
        }
    }
}

/// One disk or drive of a config.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Drive {
    /// Its key.
    pub key: String,
    /// Its volume; none in a CD-ROM drive without a disc.
    pub volume: Option<String>,
    /// Its other options.
    pub options: Properties,
}

impl Drive {
    /// Whether its disc comes and goes.
    pub fn is_cdrom(&self) -> bool {
        // A cloud-init drive is a disc, whether an old config says so or not.
        let volume = self.volume.as_deref();
        let volume: Option<VolumeId> = volume.and_then(|volume| volume.parse().ok());
        let is_cloud_init = volume.is_some_and(|volume| cloud_init::is_drive(&volume.name));
        is_cdrom(&self.options) || (is_cloud_init && target(&self.key).is_some())
    }
}

/// All of a config: those of the boot order first, then by family and number. `none` is a drive without a disc where
/// that can be, and nothing elsewhere.
pub fn drives(config: &GuestConfig) -> Result<Vec<Drive>, Error> {
    let boot = config.properties("boot")?.unwrap_or_default();
    let order: Vec<&str> = boot.get("order").unwrap_or_default().split(';').collect();
    let mut keys: Vec<&str> = FAMILIES
        .iter()
        .flat_map(|family| config.family(family.name))
        .map(|(key, _)| key)
        .collect();
    let place = |key: &str| order.iter().position(|name| *name == key);
    keys.sort_by_key(|key| place(key).unwrap_or(usize::MAX));
    let mut drives = Vec::new();
    for key in keys {
        let options = config.properties(key)?.unwrap_or_default();
        let volume = options.get("file").filter(|file| *file != "none");
        if volume.is_some() || is_cdrom(&options) {
            drives.push(Drive {
                key: key.to_owned(),
                volume: volume.map(str::to_owned),
                options,
            });
        }
    }
    Ok(drives)
}

/// Target number of a key's disk or drive on the SCSI host; none for disks that are PCI functions.
pub fn target(key: &str) -> Option<u8> {
    let digits = key.trim_start_matches(|c: char| c.is_ascii_alphabetic());
    let stem = &key[..key.len() - digits.len()];
    let family = FAMILIES.iter().find(|family| family.stem == stem)?;
    family.first_target?.checked_add(digits.parse().ok()?)
}

/// The disks of the spec.
pub fn specs(
    config: &GuestConfig,
    places: &Places,
    way: boot::Way,
) -> Result<Vec<DiskSpec>, Error> {
    let order = match way {
        boot::Way::Firmware => boot::order(config)?,
        boot::Way::Kernel => Vec::new(),
    };
    let place = |key: &str| order.iter().position(|name| name == key);
    let drives = drives(config)?.into_iter();
    let specs = drives.map(|drive| {
        let boot_index = place(&drive.key).and_then(|place| u16::try_from(place).ok());
        Ok(DiskSpec {
            boot_index,
            ..spec(&drive, places)?
        })
    });
    specs.collect()
}

/// One disk of the spec; not in the boot order.
pub fn spec(drive: &Drive, places: &Places) -> Result<DiskSpec, Error> {
    let (key, options) = (&drive.key, &drive.options);
    let path = drive.volume.as_ref().map(|volume| places.find(volume));
    let path = path.transpose()?.unwrap_or_default();
    let volume = drive.volume.as_deref();
    let volume: Option<VolumeId> = volume.and_then(|volume| volume.parse().ok());
    let image_format = volume.and_then(|volume| volume.name.image_format());
    let common = DiskSpec {
        id: Some(key.clone()),
        format: match image_format {
            Some(Format::Qcow2) => DiskFormat::Qcow2,
            _ => DiskFormat::Raw,
        },
        target: target(key),
        serial: Some(options.get("serial").unwrap_or(key).to_owned()),
        ..DiskSpec::raw(path)
    };
    if drive.is_cdrom() {
        return Ok(DiskSpec {
            bus: DiskBus::Cdrom,
            readonly: true,
            ..common
        });
    }
    let bus = match common.target {
        None => DiskBus::Blk,
        Some(_) if key.starts_with("scsi") => DiskBus::Scsi,
        Some(_) => {
            return Err(Error::refused(format!(
                "{key}: IDE and SATA disks are not offered: give the volume to a key such as scsi0 or virtio0 \
                 (guests need virtio drivers)"
            )));
        }
    };
    Ok(DiskSpec {
        bus,
        readonly: options.is_set("ro"),
        cache: cache_mode(options),
        discard: options.get("discard") == Some("on"),
        detect_zeroes: options.is_set("detect_zeroes"),
        limits: limits(options),
        queue_count: options.number("queues").filter(|_| bus == DiskBus::Blk),
        ..common
    })
}

/// Rates that a disk is held to.
pub fn limits(disk: &Properties) -> DiskLimits {
    let bytes = |key: &str| disk.number(key).map(bytes_of_mib);
    let operations = |key: &str| disk.number::<u64>(key);
    let limits = DiskLimits {
        bytes_per_second: bytes("mbps"),
        bytes_burst: bytes("mbps_max"),
        operations_per_second: operations("iops"),
        operations_burst: operations("iops_max"),
        read_bytes_per_second: bytes("mbps_rd"),
        read_bytes_burst: bytes("mbps_rd_max"),
        read_operations_per_second: operations("iops_rd"),
        read_operations_burst: operations("iops_rd_max"),
        write_bytes_per_second: bytes("mbps_wr"),
        write_bytes_burst: bytes("mbps_wr_max"),
        write_operations_per_second: operations("iops_wr"),
        write_operations_burst: operations("iops_wr_max"),
    };
    without_zeroes(limits)
}

/// In configs, 0 is no limit, and a burst may be left of a rate that has gone.
fn without_zeroes(mut limits: DiskLimits) -> DiskLimits {
    for [(_, rate), (_, burst)] in limits.pairs() {
        *rate = rate.filter(|rate| *rate > 0);
        *burst = burst.filter(|burst| rate.is_some() && *burst > 0);
    }
    limits
}

/// Bytes of a rate in configs, which is in MiB.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "rates are checked to be from 0 to some thousand MiB"
)]
pub fn bytes_of_mib(rate: f64) -> u64 {
    (rate * MIB) as u64
}

/// What stands between the guest and the disk. Not PVE's default, no cache at all: that takes direct I/O, which not
/// every file system has.
fn cache_mode(disk: &Properties) -> CacheMode {
    match disk.get("cache") {
        Some("none") => CacheMode::None,
        Some("writethrough") => CacheMode::Writethrough,
        Some("directsync") => CacheMode::Directsync,
        Some("unsafe") => CacheMode::Unsafe,
        _ => CacheMode::Writeback,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_has_a_target_of_its_own() {
        assert_eq!(target("scsi30"), Some(30));
        assert_eq!((target("ide3"), target("sata0")), (Some(67), Some(72)));
        assert_eq!((target("virtio0"), target("scsihw")), (None, None));
    }
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Values of the keys that hold a machine's disks and drives: `scsi[n]`, `virtio[n]`, `ide[n]`, `sata[n]`, `efidisk0`.

use crate::schema::format::{DISK_SIZE, VOLUME_ID};
use crate::schema::{Format, Kind, Param, Properties};

/// A disk or a CD-ROM drive.
pub const DRIVE: Kind = Kind::PropertyString {
    keys: &[
        Param::new(
            "file",
            Kind::Format(DRIVE_FILE),
            "The volume; STORAGE:SIZE (in GiB) makes a new one, STORAGE:cloudinit a cloud-init drive; `none` is an \
             empty drive.",
        )
        .required(),
        Param::new("size", Kind::Format(DISK_SIZE), "Size; the server sets it."),
        Param::new(
            "format",
            Kind::Choice(&["raw", "qcow2"]),
            "Format of a new image, `raw` when it is not given.",
        ),
        Param::new(
            "media",
            Kind::Choice(&["cdrom", "disk"]),
            "Kind of medium; `cdrom` is a drive on the SCSI host, whose disc can be changed while the guest runs.",
        ),
        Param::new("ro", Kind::Boolean, "Read-only."),
        Param::new(
            "cache",
            Kind::Choice(&["none", "writethrough", "writeback", "unsafe", "directsync"]),
            "Cache of the host, `writeback` when it is not given; with `unsafe` a crash of the host loses the disk.",
        ),
        Param::new(
            "aio",
            Kind::Choice(&["native", "threads", "io_uring"]),
            "Without effect: always io_uring.",
        ),
        Param::new(
            "discard",
            Kind::Choice(&["ignore", "on"]),
            "Give back space that the guest frees.",
        ),
        Param::new(
            "iothread",
            Kind::Boolean,
            "Without effect: every queue has its thread.",
        ),
        Param::new(
            "ssd",
            Kind::Boolean,
            "Without effect: no disk says that it rotates.",
        ),
        Param::new(
            "queues",
            Kind::Integer { min: 1, max: 16 },
            "Queues of a virtio disk, one a vCPU when it is not given; on the SCSI host without effect.",
        ),
        Param::new("backup", Kind::Boolean, "Include it in backups."),
        Param::new("replicate", Kind::Boolean, "Include it in replication."),
        Param::new(
            "serial",
            Kind::Text { length_max: 20 },
            "Serial number that the guest sees.",
        ),
        Param::new(
            "wwn",
            Kind::Text { length_max: 18 },
            "Without effect: disks have a serial number only.",
        ),
        Param::new(
            "detect_zeroes",
            Kind::Boolean,
            "Writes of zeroes take no space.",
        ),
        Param::new(
            "rerror",
            Kind::Choice(&["ignore", "report", "stop"]),
            "Without effect: the guest is told of errors.",
        ),
        Param::new(
            "werror",
            Kind::Choice(&["enospc", "ignore", "report", "stop"]),
            "Without effect: the guest is told of errors.",
        ),
        Param::new(
            "shared",
            Kind::Boolean,
            "The volume is the same on all nodes.",
        ),
        Param::new("snapshot", Kind::Boolean, "Without effect."),
        Param::new(
            "import-from",
            Kind::Format(VOLUME_ID),
            "Make the new volume (STORAGE:0) a copy of this one: of content import, an uploaded .img, or a disk.",
        ),
        rate("mbps", "Most MiB a second, both directions together."),
        rate("mbps_rd", "Most MiB read a second."),
        rate("mbps_wr", "Most MiB written a second."),
        rate("mbps_max", "MiB that may come at once after idleness."),
        rate(
            "mbps_rd_max",
            "MiB that may be read at once after idleness.",
        ),
        rate(
            "mbps_wr_max",
            "MiB that may be written at once after idleness.",
        ),
        count("iops", "Most requests a second, both directions together."),
        count("iops_rd", "Most requests to read a second."),
        count("iops_wr", "Most requests to write a second."),
        count("iops_max", "Requests that may come at once after idleness."),
        count("iops_rd_max", "Requests to read that may come at once."),
        count("iops_wr_max", "Requests to write that may come at once."),
    ],
    default_key: Some("file"),
    value_key: None,
};

/// The firmware's variables.
pub const EFI_DISK: Kind = Kind::PropertyString {
    keys: &[
        Param::new(
            "file",
            Kind::Format(DRIVE_FILE),
            "The volume; STORAGE:1 makes a new one, whatever the number.",
        )
        .required(),
        Param::new("size", Kind::Format(DISK_SIZE), "Size; the server sets it."),
        Param::new("format", Kind::Choice(&["raw"]), "Format of the image."),
        Param::new(
            "efitype",
            Kind::Format(EFI_TYPE),
            "Size of the firmware: `4m`.",
        ),
        Param::new(
            "pre-enrolled-keys",
            Kind::Boolean,
            "Start with Secure Boot on, with the keys of Microsoft and the distributions.",
        ),
        Param::new(
            "ms-cert",
            Kind::Choice(&["2011", "2023", "2023w", "2023k"]),
            "Without effect: the keys are those of Debian's package ovmf.",
        ),
    ],
    default_key: Some("file"),
    value_key: None,
};

/// Properties of a drive that reach a running machine at once.
pub const DRIVE_LIVE: &[&str] = &[
    "backup",
    "iops",
    "iops_max",
    "iops_rd",
    "iops_rd_max",
    "iops_wr",
    "iops_wr_max",
    "mbps",
    "mbps_max",
    "mbps_rd",
    "mbps_rd_max",
    "mbps_wr",
    "mbps_wr_max",
    "replicate",
];
/// Those of a CD-ROM drive: its disc.
pub const DISC_LIVE: &[&str] = &["file", "size"];

/// `ide[n]` and `sata[n]` hold CD-ROM drives, cloud-init's among them, and nothing else.
pub fn cdrom_only(drive: &Properties) -> Result<(), String> {
    let is_cloud_init = drive
        .get("file")
        .is_some_and(|file| file.ends_with(":cloudinit"));
    match is_cdrom(drive) || is_cloud_init {
        true => Ok(()),
        false => Err(
            "IDE and SATA hold CD-ROM drives only (media=cdrom): use scsi0 or virtio0 for a disk"
                .to_owned(),
        ),
    }
}

/// `virtio[n]` holds disks: a CD-ROM drive needs a bus that has such.
pub fn disk_only(drive: &Properties) -> Result<(), String> {
    match is_cdrom(drive) {
        true => Err("a virtio disk cannot be a CD-ROM drive: use ide2 or a scsi key".to_owned()),
        false => Ok(()),
    }
}

/// Whether it is a drive whose disc comes and goes.
pub fn is_cdrom(drive: &Properties) -> bool {
    drive.get("media") == Some("cdrom")
}

/// A rate in MiB a second.
pub const fn rate(name: &'static str, what: &'static str) -> Param {
    let kind = Kind::Number {
        min: 0.0,
        max: 1_048_576.0,
    };
    Param::new(name, kind, what)
}

const fn count(name: &'static str, what: &'static str) -> Param {
    let kind = Kind::Integer {
        min: 0,
        max: 1 << 30,
    };
    Param::new(name, kind, what)
}

/// A volume, `none`, or `STORAGE:SIZE`. Paths of the host are not: they would reach around the storage's rights.
const DRIVE_FILE: Format = Format {
    name: "pve-volume-id-or-qm-path",
    check: |text| {
        if text == "none" || (VOLUME_ID.check)(text).is_ok() {
            return Ok(());
        }
        match text {
            "cdrom" => Err("the host's own drive is not available: use an ISO image".to_owned()),
            _ => Err(format!("unable to parse volume ID '{text}'")),
        }
    },
};

const EFI_TYPE: Format = Format {
    name: "pve-efi-type",
    check: |text| match text {
        "4m" => Ok(()),
        _ => Err(format!("'{text}' is not offered: use efitype=4m")),
    },
};

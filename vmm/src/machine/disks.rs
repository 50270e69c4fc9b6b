// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Disks: from their part of the spec to open images, to devices, and what the control API changes about them.
//! Rows of the build table (`devices`).

use std::sync::Arc;

use atoll_devices::virtio::VirtioPci;
use atoll_devices::virtio::blk::{Blk, BlkOptions};
use atoll_disk::{
    BlockBackend, Cache, Format, Limit, Limited, Limits, OpenOptions, Rate, ResizeError, Source,
};
use atoll_vmm_protocol::api::{ResizeDisk, SetDiskLimits};
use atoll_vmm_protocol::spec::{CacheMode, DiskFormat, DiskLimits, DiskSpec, MachineSpec};

use super::assembly::{Assembly, BuildError};
use super::devices::boots_from;
use super::opened::{Opened, WAS_OPENED};
use super::parts::Parts;
use crate::api::{self, Answer};
use crate::check;
use crate::fw_cfg::BootKind;

/// A disk of a built machine.
pub(super) struct Disk {
    pub(super) function: Arc<VirtioPci>,
    device: Arc<Blk>,
    backend: Arc<Limited>,
}

/// Opens and locks every image, and those behind it. Makes no thread.
pub(super) fn open(spec: &MachineSpec, opened: &mut Opened) -> Result<(), BuildError> {
    for disk in &spec.disks {
        let files = atoll_disk::files(&source(disk), options(disk))?;
        opened.disk_locks.extend(files.writer_lock()?);
        let backend = files.backend()?;
        let limited = Limited::new(backend, limits(&disk.limits));
        opened.disks.push_back(Arc::new(limited));
    }
    Ok(())
}

/// Puts a virtio-blk device for each disk into its slot.
pub(super) fn add(assembly: &mut Assembly<'_>) -> Result<(), BuildError> {
    for (index, disk) in assembly.spec.disks.iter().enumerate() {
        let backend = assembly.opened.disks.pop_front().expect(WAS_OPENED);
        let queues = u16::from(assembly.spec.cpu_count).min(check::QUEUE_COUNT_MAX);
        let name = format!("blk{index}");
        let serial = disk.serial.clone();
        let device = Arc::new(Blk::new(BlkOptions {
            name: name.clone(),
            backend: backend.clone(),
            serial: serial.unwrap_or_else(|| format!("disk{index}")),
            queue_count: disk.queue_count.unwrap_or(queues),
        }));
        let function = assembly.add(name, device.clone())?;
        boots_from(assembly, disk.boot_index, BootKind::Disk);
        assembly.disks.push(Disk {
            function,
            device,
            backend,
        });
    }
    Ok(())
}

fn source(disk: &DiskSpec) -> Source {
    let backing = disk.backing.iter();
    Source {
        path: disk.path.clone(),
        format: format(disk.format),
        backing: backing
            .map(|image| (image.path.clone(), format(image.format)))
            .collect(),
    }
}

fn format(format: DiskFormat) -> Format {
    match format {
        DiskFormat::Raw => Format::Raw,
        DiskFormat::Qcow2 => Format::Qcow2,
    }
}

fn options(disk: &DiskSpec) -> OpenOptions {
    OpenOptions {
        read_only: disk.readonly,
        engine: None,
        cache: match disk.cache {
            CacheMode::Writeback => Cache::Writeback,
            CacheMode::None => Cache::None,
            CacheMode::Writethrough => Cache::Writethrough,
            CacheMode::Directsync => Cache::Directsync,
            CacheMode::Unsafe => Cache::Unsafe,
        },
        discard: disk.discard,
        detect_zeroes: disk.detect_zeroes,
    }
}

fn limits(spec: &DiskLimits) -> Limits {
    let rate = |per_second, burst| Rate { per_second, burst };
    Limits {
        total: Limit {
            bytes: rate(spec.bytes_per_second, spec.bytes_burst),
            operations: rate(spec.operations_per_second, spec.operations_burst),
        },
        read: Limit {
            bytes: rate(spec.read_bytes_per_second, spec.read_bytes_burst),
            operations: rate(spec.read_operations_per_second, spec.read_operations_burst),
        },
        write: Limit {
            bytes: rate(spec.write_bytes_per_second, spec.write_bytes_burst),
            operations: rate(
                spec.write_operations_per_second,
                spec.write_operations_burst,
            ),
        },
    }
}

/// The disk that the control API calls `id`: `disk0` is the first of the spec.
fn find<'a>(parts: &'a Parts, id: &str) -> Result<&'a Disk, Answer> {
    let index = id
        .strip_prefix("disk")
        .and_then(|digits| digits.parse::<usize>().ok());
    let disk = index.and_then(|index| parts.disks.get(index));
    disk.ok_or_else(|| api::refusal(404, format!("no disk {id}; the first is disk0")))
}

/// Grows a disk and tells the guest.
pub(super) fn resize(parts: &Parts, body: &ResizeDisk) -> Result<(), Answer> {
    let disk = find(parts, &body.id)?;
    disk.backend.resize(body.size_bytes).map_err(|error| {
        let text = match &error {
            ResizeError::Io(source) => format!("{}: {error}: {source}", body.id),
            _ => format!("{}: {error}", body.id),
        };
        let status = if matches!(error, ResizeError::Io(_)) {
            500
        } else {
            409
        };
        api::refusal(status, text)
    })?;
    disk.device.resized();
    Ok(())
}

/// Holds a disk to other rates.
pub(super) fn set_limits(parts: &Parts, body: &SetDiskLimits) -> Result<(), Answer> {
    find(parts, &body.id)?.backend.set(limits(&body.limits));
    Ok(())
}

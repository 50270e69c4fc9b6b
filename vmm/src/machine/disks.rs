// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Disks: from their part of the spec to open images, to devices, and what the control API changes about them.
//! Rows of the build table (`devices`).

use std::collections::BTreeMap;
use std::fs::File;
use std::sync::Arc;

use atoll_devices::counters::CounterList;
use atoll_devices::scsi::{Target, TargetKind, TargetOptions};
use atoll_devices::virtio::VirtioPci;
use atoll_devices::virtio::blk::{Blk, BlkOptions};
use atoll_devices::virtio::scsi::{Scsi, ScsiOptions};
use atoll_disk::{BlockBackend, Format, Limited, OpenOptions, OpenedDisk, ResizeError};
use atoll_vmm_protocol::api::{EjectDisk, InsertDisk, ResizeDisk, SetDiskLimits};
use atoll_vmm_protocol::spec::{DiskBus, MachineSpec};

use super::assembly::{Assembly, BuildError};
use super::devices::boots_from;
use super::opened::{Opened, WAS_OPENED};
use super::parts::Parts;
use crate::api::{self, Answer};
use crate::check;
use crate::fw_cfg::BootKind;
use crate::resources::{Medium, limits};

/// A disk of a built machine.
pub(super) struct Disk {
    /// `None` for a drive: its disc comes and goes, without limits.
    backend: Option<Arc<Limited>>,
    place: Place,
}

/// What the guest finds it on.
enum Place {
    Blk {
        function: Arc<VirtioPci>,
        device: Arc<Blk>,
    },
    Scsi {
        host: Arc<Scsi>,
        number: u8,
        target: Arc<Target>,
    },
}

impl Disk {
    /// What it has done.
    pub(super) fn counters(&self) -> CounterList {
        match &self.place {
            Place::Blk { function, .. } => function.counters().0,
            Place::Scsi { target, .. } => target.counters().list(),
        }
    }
}

/// Opens and locks every image, and those behind it. Makes no thread.
pub(super) fn open(spec: &MachineSpec, opened: &mut Opened) -> Result<(), BuildError> {
    for disk in &spec.disks {
        let limited = match disk.path.as_os_str().is_empty() {
            true => None,
            false => {
                let Medium { backend, lock } = Medium::open(disk)?;
                opened.disk_locks.extend(lock);
                Some(backend)
            }
        };
        opened.disks.push_back(limited);
    }
    Ok(())
}

/// Puts a virtio-blk device for each disk into its slot, then the SCSI host with all others, if there are any.
pub(super) fn add(assembly: &mut Assembly<'_>) -> Result<(), BuildError> {
    let spec = assembly.spec;
    let queues = u16::from(spec.cpu_count).min(check::QUEUE_COUNT_MAX);
    let numbers = check::targets(spec).map_err(BuildError::device("SCSI host"))?;
    let mut targets = BTreeMap::new();
    let mut disks = Vec::new();
    for (index, (disk, number)) in spec.disks.iter().zip(numbers).enumerate() {
        let backend = assembly.opened.disks.pop_front().expect(WAS_OPENED);
        let serial = disk.serial.clone();
        let serial = serial.unwrap_or_else(|| format!("disk{index}"));
        let Some(number) = number else {
            let backend = backend.expect("only a drive has no path");
            let name = format!("blk{index}");
            let device = Arc::new(Blk::new(BlkOptions {
                name: name.clone(),
                backend: backend.clone(),
                serial,
                queue_count: disk.queue_count.unwrap_or(queues),
            }));
            let function = assembly.add(name, device.clone())?;
            boots_from(assembly, disk.boot_index, BootKind::Disk);
            let place = Place::Blk { function, device };
            disks.push((Some(backend), Ok(place)));
            continue;
        };
        let medium = backend.clone();
        let kind = match disk.bus {
            DiskBus::Cdrom => TargetKind::Cdrom,
            DiskBus::Scsi | DiskBus::Blk => TargetKind::Disk,
        };
        let target = Arc::new(Target::new(TargetOptions {
            kind,
            serial,
            medium: medium.map(|medium| -> Arc<dyn BlockBackend> { medium }),
        }));
        targets.insert(number, target.clone());
        let backend = backend.filter(|_| kind == TargetKind::Disk);
        disks.push((backend, Err((number, target))));
    }
    let host = match targets.is_empty() {
        true => None,
        false => Some(add_host(assembly, targets, queues)?),
    };
    for (disk, (_, place)) in spec.disks.iter().zip(&disks) {
        if let Err((number, _)) = place {
            boots_from(assembly, disk.boot_index, BootKind::Scsi(*number));
        }
    }
    for (backend, place) in disks {
        let place = place.unwrap_or_else(|(number, target)| Place::Scsi {
            host: host.clone().expect("there is one for its targets"),
            number,
            target,
        });
        assembly.disks.push(Disk { backend, place });
    }
    Ok(())
}

fn add_host(
    assembly: &mut Assembly<'_>,
    targets: BTreeMap<u8, Arc<Target>>,
    queue_count: u16,
) -> Result<Arc<Scsi>, BuildError> {
    let name = "scsi".to_owned();
    let options = ScsiOptions {
        name: name.clone(),
        queue_count,
        targets,
    };
    let host = Arc::new(Scsi::new(options).map_err(BuildError::device("SCSI host"))?);
    assembly.add(name, host.clone())?;
    Ok(host)
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
    let backend = disk.backend.as_ref().ok_or_else(|| no_disk(&body.id))?;
    backend.resize(body.size_bytes).map_err(|error| {
        let text = match &error {
            ResizeError::Io(source) => format!("{}: {error}: {source}", body.id),
            _ => format!("{}: {error}", body.id),
        };
        let failed = matches!(error, ResizeError::Io(_));
        api::refusal(if failed { 500 } else { 409 }, text)
    })?;
    match &disk.place {
        Place::Blk { device, .. } => device.resized(),
        Place::Scsi {
            host,
            number,
            target,
        } => host.resized(*number, target),
    }
    Ok(())
}

/// Holds a disk to other rates.
pub(super) fn set_limits(parts: &Parts, body: &SetDiskLimits) -> Result<(), Answer> {
    let backend = find(parts, &body.id)?.backend.as_ref();
    let backend = backend.ok_or_else(|| no_disk(&body.id))?;
    backend.set(limits(&body.limits));
    Ok(())
}

/// Takes the disc out of a drive.
pub(super) fn eject(parts: &Parts, body: &EjectDisk) -> Result<(), Answer> {
    let (host, target) = drive(parts, &body.id)?;
    let ejected = host.eject(target, body.force);
    ejected.map_err(|error| api::refusal(409, format!("{}: {error}", body.id)))
}

/// Puts a disc that the asker has opened into a drive.
pub(super) fn insert(parts: &Parts, body: &InsertDisk, disc: File) -> Result<(), Answer> {
    let (host, target) = drive(parts, &body.id)?;
    let path = body.path.clone();
    // Whether io_uring is to be had is found out by trying, which only the starter may.
    let opened = atoll_thread::in_starter(move || {
        let options = OpenOptions {
            read_only: true,
            ..OpenOptions::default()
        };
        OpenedDisk::from_file(disc, &path, Format::Raw, options).and_then(OpenedDisk::backend)
    });
    let medium = opened.map_err(|error| api::refusal(409, error.to_string()))?;
    let inserted = host.insert(target, medium, body.force);
    inserted.map_err(|error| api::refusal(409, format!("{}: {error}", body.id)))
}

fn drive<'a>(parts: &'a Parts, id: &str) -> Result<(&'a Scsi, &'a Target), Answer> {
    match &find(parts, id)?.place {
        Place::Scsi { host, target, .. } if target.kind() == TargetKind::Cdrom => {
            Ok((host, target))
        }
        _ => Err(api::refusal(
            409,
            format!("{id} is a disk: only a cdrom has discs"),
        )),
    }
}

fn no_disk(id: &str) -> Answer {
    api::refusal(409, format!("{id} is a cdrom: only a disk has this"))
}

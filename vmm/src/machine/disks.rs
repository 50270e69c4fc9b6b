// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Disks: from their part of the spec to open images, to devices, and what the control API changes about them.
//! Rows of the build table (`devices`).

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use atoll_devices::counters::CounterList;
use atoll_devices::scsi::{Target, TargetKind, TargetOptions};
use atoll_devices::virtio::VirtioPci;
use atoll_devices::virtio::blk::{Blk, BlkOptions};
use atoll_devices::virtio::scsi::{Scsi, ScsiOptions};
use atoll_disk::{
    BlockBackend, Format, Limited, OpenError, OpenOptions, OpenedDisk, ResizeError, WriterLock,
};
use atoll_vmm_protocol::api::{EjectDisk, InsertDisk, ResizeDisk, SetDiskLimits};
use atoll_vmm_protocol::spec::{CacheMode, DiskBus, DiskSpec, MachineSpec};

use super::assembly::{Assembly, BuildError};
use super::backplane::Backplane;
use super::belongings;
use super::opened::{Opened, WAS_OPENED};
use super::parts::Parts;
use crate::api::{self, Answer};
use crate::check;
use crate::resources::{Backup, Medium, Replacement, image_files, limits};

/// Name of the SCSI host.
pub(super) const HOST: &str = "scsi";

/// A disk of a built machine.
pub(super) struct Disk {
    id: String,
    /// `None` for a drive: its disc comes and goes, without limits.
    backend: Option<Arc<Limited>>,
    /// Of an image that is open for writing.
    lock: Option<WriterLock>,
    /// `None` for a drive.
    backup: Option<Backup>,
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
    /// Its name.
    pub(super) fn id(&self) -> &str {
        &self.id
    }

    /// Its number on the SCSI host, if it is there.
    pub(super) fn target(&self) -> Option<u8> {
        match self.place {
            Place::Blk { .. } => None,
            Place::Scsi { number, .. } => Some(number),
        }
    }

    /// The lock of its image, if it writes.
    pub(super) fn lock(&self) -> Option<&WriterLock> {
        self.lock.as_ref()
    }

    /// Where the guest's writes go, if it may write.
    pub(super) fn written(&self) -> Option<Arc<Limited>> {
        let backend = self.backend.clone();
        backend.filter(|backend| !backend.geometry().read_only)
    }

    /// Makes what the guest has written durable, while the machine is held.
    pub(super) fn flush(&self) -> io::Result<()> {
        self.written().map_or(Ok(()), flush)
    }

    /// What backups ask of it; a drive has nothing to back up.
    pub(super) fn backup(&self) -> Option<&Backup> {
        self.backup.as_ref()
    }

    /// The same, to be changed.
    pub(super) fn backup_mut(&mut self) -> Option<&mut Backup> {
        self.backup.as_mut()
    }

    /// What holds it to its rates; a drive has none.
    pub(super) fn limited(&self) -> Option<&Arc<Limited>> {
        self.backend.as_ref()
    }

    /// Stores it elsewhere from now on; the former place is returned. See [`Backup::exchange`].
    pub(super) fn exchange(&mut self, next: Replacement) -> Option<Replacement> {
        let backup = self.backup.as_mut()?;
        Some(backup.exchange(&mut self.lock, next))
    }

    /// Its size; 0 for a drive.
    pub(super) fn size_bytes(&self) -> u64 {
        let backend = self.backend.as_ref();
        backend.map_or(0, |backend| backend.geometry().size_bytes)
    }

    /// Tells the guest that it has another size.
    pub(super) fn tell_size(&self) {
        match &self.place {
            Place::Blk { device, .. } => device.resized(),
            Place::Scsi {
                host,
                number,
                target,
            } => host.resized(*number, target),
        }
    }

    /// Whether it is a drive without a disc.
    fn is_empty_drive(&self) -> bool {
        match &self.place {
            Place::Blk { .. } => false,
            Place::Scsi { target, .. } => {
                target.kind() == TargetKind::Cdrom && target.medium().1.is_none()
            }
        }
    }

    /// What it has done.
    pub(super) fn counters(&self) -> CounterList {
        match &self.place {
            Place::Blk { function, .. } => function.counters().0,
            Place::Scsi { target, .. } => target.counters().list(),
        }
    }
}

/// Makes what was written durable. From any thread.
pub(super) fn flush(backend: Arc<Limited>) -> io::Result<()> {
    // A queue's ring and threads are more than most may make.
    atoll_thread::in_starter(move || atoll_disk::flush(&*backend))
}

/// Opens and locks every image, and those behind it. Makes no thread. What another process writes to is looked at when it
/// does no longer (`arrival`).
pub(super) fn open(spec: &MachineSpec, opened: &mut Opened) -> Result<(), BuildError> {
    for disk in &spec.disks {
        let files = match disk.path.as_os_str().is_empty() {
            true => None,
            false => {
                let name = belongings::disk(check::id_of(&disk.id));
                let open = || {
                    let files = image_files(disk)?;
                    Ok::<_, OpenError>(files.into_iter().map(OwnedFd::from).collect())
                };
                Some(opened.obtain(&name, open)?)
            }
        };
        if opened.is_inherited() {
            opened.awaited(|awaited| awaited.disks.push(files));
            continue;
        }
        let medium = files.map(|files| Medium::take(files, disk)).transpose()?;
        opened.disks.push_back(medium);
    }
    Ok(())
}

/// Puts all of them on the bus, if they are not awaited.
pub(super) fn add(assembly: &mut Assembly<'_>) -> Result<(), BuildError> {
    if assembly.opened.is_inherited() {
        return Ok(());
    }
    let media = assembly.opened.disks.drain(..).collect();
    (assembly.disks, assembly.scsi) = put(&mut assembly.backplane, assembly.spec, media)?;
    Ok(())
}

/// Puts a virtio-blk device for each disk into its slot, then the SCSI host with all others, if there are any. `media` has
/// one entry for each disk of the spec.
pub(super) fn put(
    backplane: &mut Backplane,
    spec: &MachineSpec,
    media: Vec<Option<Medium>>,
) -> Result<(Vec<Disk>, Option<Arc<Scsi>>), BuildError> {
    let targets = check::targets(spec).map_err(BuildError::device("SCSI host"))?;
    assert_eq!(media.len(), spec.disks.len(), "{WAS_OPENED}");
    let rows = spec.disks.iter().zip(targets).zip(media).enumerate();
    let (units, functions): (Vec<_>, Vec<_>) =
        rows.partition(|(_, ((_, target), _))| target.is_some());
    let mut disks = BTreeMap::new();
    for (index, ((disk, _), medium)) in functions {
        let medium = medium.expect("only a drive has no path");
        disks.insert(index, function(backplane, spec, disk, medium)?);
    }
    // One from which the last unit was taken is there still.
    let has_host = !units.is_empty() || backplane.had(HOST);
    let scsi = has_host.then(|| host(backplane, spec)).transpose()?;
    for (index, ((disk, target), medium)) in units {
        let host = scsi.as_ref().expect("made for its units");
        let number = target.expect("partitioned so");
        disks.insert(index, unit(host, number, disk, medium));
    }
    Ok((disks.into_values().collect(), scsi))
}

/// Plugs the last disk of `spec` in. Names the function that is new on the bus, if one is.
pub(super) fn plug(
    parts: &mut Parts,
    spec: &MachineSpec,
    medium: Option<Medium>,
    target: Option<u8>,
) -> Result<Option<String>, BuildError> {
    let disk = spec.disks.last().expect("the one that is plugged in");
    let Some(number) = target else {
        let medium = medium.expect("only a drive has no path");
        let made = function(&mut parts.backplane, spec, disk, medium)?;
        let name = made.id.clone();
        parts.disks.push(made);
        return Ok(Some(name));
    };
    let (host, name) = match &parts.scsi {
        Some(host) => (host.clone(), None),
        None => {
            let host = host(&mut parts.backplane, spec)?;
            parts.scsi = Some(host.clone());
            (host, Some(HOST.to_owned()))
        }
    };
    parts.disks.push(unit(&host, number, disk, medium));
    Ok(name)
}

/// Gives a disk back, and takes it off the SCSI host if it is there.
pub(super) fn unplug(parts: &mut Parts, id: &str) -> Option<Disk> {
    let index = parts.disks.iter().position(|disk| disk.id == id)?;
    let disk = parts.disks.remove(index);
    if let Place::Scsi { host, number, .. } = &disk.place {
        host.unplug(*number);
    }
    Some(disk)
}

fn queue_count(spec: &MachineSpec) -> u16 {
    u16::from(spec.cpu_count).min(check::QUEUE_COUNT_MAX)
}

/// A disk on a slot of its own.
fn function(
    backplane: &mut Backplane,
    spec: &MachineSpec,
    disk: &DiskSpec,
    medium: Medium,
) -> Result<Disk, BuildError> {
    let id = check::id_of(&disk.id);
    let Medium {
        backend,
        lock,
        backup,
    } = medium;
    let device = Arc::new(Blk::new(BlkOptions {
        name: id.to_owned(),
        backend: backend.clone(),
        serial: disk.serial.clone().unwrap_or_else(|| id.to_owned()),
        queue_count: disk.queue_count.unwrap_or_else(|| queue_count(spec)),
    }));
    let function = backplane.add(id, device.clone())?;
    Ok(Disk {
        id: id.to_owned(),
        backend: Some(backend),
        lock,
        backup: Some(backup),
        place: Place::Blk { function, device },
    })
}

/// A SCSI host without units.
fn host(backplane: &mut Backplane, spec: &MachineSpec) -> Result<Arc<Scsi>, BuildError> {
    let options = ScsiOptions {
        name: HOST.to_owned(),
        queue_count: queue_count(spec),
        targets: BTreeMap::new(),
    };
    let host = Arc::new(Scsi::new(options).map_err(BuildError::device("SCSI host"))?);
    backplane.add(HOST, host.clone())?;
    Ok(host)
}

/// A disk or a drive on the SCSI host. Its driver is told, if it has begun; a driver that begins looks anyway.
fn unit(host: &Arc<Scsi>, number: u8, disk: &DiskSpec, medium: Option<Medium>) -> Disk {
    let id = check::id_of(&disk.id);
    let kind = match disk.bus {
        DiskBus::Cdrom => TargetKind::Cdrom,
        DiskBus::Scsi | DiskBus::Blk => TargetKind::Disk,
    };
    let (backend, lock, backup) = match medium {
        Some(medium) => (Some(medium.backend), medium.lock, Some(medium.backup)),
        None => (None, None, None),
    };
    let target = Arc::new(Target::new(TargetOptions {
        kind,
        serial: disk.serial.clone().unwrap_or_else(|| id.to_owned()),
        medium: backend
            .clone()
            .map(|medium| -> Arc<dyn BlockBackend> { medium }),
    }));
    host.plug(number, target.clone());
    Disk {
        id: id.to_owned(),
        backend: backend.filter(|_| kind == TargetKind::Disk),
        lock,
        backup: backup.filter(|_| kind == TargetKind::Disk),
        place: Place::Scsi {
            host: host.clone(),
            number,
            target,
        },
    }
}

/// The disk that the control API calls `id`.
pub(super) fn find<'a>(parts: &'a Parts, id: &str) -> Result<&'a Disk, Answer> {
    index_of(parts, id).map(|index| &parts.disks[index])
}

/// The same, to be changed.
pub(super) fn find_mut<'a>(parts: &'a mut Parts, id: &str) -> Result<&'a mut Disk, Answer> {
    index_of(parts, id).map(|index| &mut parts.disks[index])
}

fn index_of(parts: &Parts, id: &str) -> Result<usize, Answer> {
    let index = parts.disks.iter().position(|disk| disk.id == id);
    index.ok_or_else(|| {
        let known: Vec<_> = parts.disks.iter().map(Disk::id).collect();
        let text = format!("no disk {id}; there are: {}", known.join(" "));
        api::refusal(404, text)
    })
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
    disk.tell_size();
    Ok(())
}

/// The disk of that name in a machine's spec.
pub(super) fn in_spec<'a>(spec: &'a mut MachineSpec, id: &str) -> &'a mut DiskSpec {
    let mut disks = spec.disks.iter_mut();
    let disk = disks.find(|disk| check::id_of(&disk.id) == id);
    disk.expect("a machine's disks are its spec's")
}

/// Holds a disk to other rates.
pub(super) fn set_limits(
    parts: &Parts,
    spec: &mut MachineSpec,
    body: &SetDiskLimits,
) -> Result<(), Answer> {
    let backend = find(parts, &body.id)?.backend.as_ref();
    let backend = backend.ok_or_else(|| no_disk(&body.id))?;
    let meant = check::disk_limits(&body.limits);
    meant.map_err(|error| api::refusal(400, format!("{}: {error}", body.id)))?;
    backend.set(limits(&body.limits));
    in_spec(spec, &body.id).limits = body.limits;
    Ok(())
}

/// Takes the disc out of a drive.
pub(super) fn eject(
    parts: &mut Parts,
    spec: &mut MachineSpec,
    body: &EjectDisk,
) -> Result<(), Answer> {
    let (host, target) = drive(parts, &body.id)?;
    let ejected = host.eject(target, body.force);
    ejected.map_err(|error| api::refusal(409, format!("{}: {error}", body.id)))?;
    note_ejected(parts, spec);
    Ok(())
}

/// Puts a disc that the asker has opened into a drive.
pub(super) fn insert(
    parts: &mut Parts,
    spec: &mut MachineSpec,
    body: &InsertDisk,
    disc: File,
) -> Result<(), Answer> {
    let (host, target) = drive(parts, &body.id)?;
    let path = body.path.clone();
    if path.as_os_str().is_empty() {
        return Err(api::refusal(400, "a disc has a path"));
    }
    let copy = disc.try_clone();
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
    inserted.map_err(|error| api::refusal(409, format!("{}: {error}", body.id)))?;
    hold_disc(in_spec(spec, &body.id), &body.path);
    if let Some(kept) = &mut parts.kept {
        let name = belongings::disk(&body.id);
        match copy {
            Ok(copy) => kept.insert(name, vec![copy.into()]),
            Err(_) => kept.forget(&name),
        }
    }
    Ok(())
}

/// Says of each drive that is empty that it is. A guest that opens one tells nobody.
pub(super) fn note_ejected(parts: &mut Parts, spec: &mut MachineSpec) {
    for disk in parts.disks.iter().filter(|disk| disk.is_empty_drive()) {
        hold_disc(in_spec(spec, &disk.id), Path::new(""));
        if let Some(kept) = &mut parts.kept {
            kept.forget(&belongings::disk(&disk.id));
        }
    }
}

/// Says that a drive has this disc; none without a path. It was opened as it was, by another process.
fn hold_disc(drive: &mut DiskSpec, path: &Path) {
    path.clone_into(&mut drive.path);
    drive.cache = CacheMode::default();
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

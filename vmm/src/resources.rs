// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! What of the host a disk or a network card needs, from its part of the spec to open files.
//!
//! ```text
//! path ── open ──► files ──────────────── take ──► what a device is made of
//!         before the sandbox (`machine::opened`), and without a sandbox by `ctl` for a machine that runs: then the
//!         files travel with the request, and `take` is in the machine's process
//! ```

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use atoll_devices::virtio::net::{HostEnd, STATISTICS, Tap, TapError, VhostNetFiles};
use atoll_devices::virtio::vhost_user::{BackendOptions, PATIENCE};
use atoll_disk::changes::{ChangeFile, Found, ImageStamp, Recorder, Tracked};
use atoll_disk::{
    BlockBackend, Cache, Format, Freezable, Limit, Limited, Limits, OpenError, OpenOptions,
    OpenedDisk, Rate, Source, Switchable, WriterLock,
};
use atoll_vmm_protocol::services::VhostUserSocket;
use atoll_vmm_protocol::spec::{
    CacheMode, DiskBus, DiskFormat, DiskLimits, DiskSpec, NetLimits, NetSpec, VhostNet,
};

/// Unit in which changed blocks are recorded, bytes: what an incremental backup reads at least.
pub(crate) const CHANGE_BYTES: u32 = 64 << 10;
/// Connections with whoever serves a disk, and so requests that it has at a time.
const NBD_CONNECTIONS: usize = 4;

/// Why a card has no host end.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// The tap.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// The spec says that the kernel must move the packets.
    #[error("/dev/vhost-net")]
    Vhost(#[source] std::io::Error),
    /// Nobody listens, or this user may not connect.
    #[error("vhost-user {path}")]
    Backend {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Another process's socket came with something else, or not alone.
    #[error("{0} open files came for a vhost-user card: one, its connection")]
    Connection(usize),
    /// The machine's process has left the file system.
    #[error(
        "vhost-user {0}: only a card that the machine is started with can be connected again: leave out reconnect"
    )]
    Reconnect(PathBuf),
    /// Files of another number came.
    #[error(
        "{found} open files came for {pairs} pairs of queues: {pairs} of the tap, then none, or {pairs} of \
         /dev/vhost-net and none or {} of statistics",
        STATISTICS.len()
    )]
    Count {
        /// Files that came.
        found: usize,
        /// What the spec says.
        pairs: usize,
    },
}

/// A disk's images, open and locked, with all that backups, mirrors and rate limits put before them.
pub struct Medium {
    pub(crate) backend: Arc<Limited>,
    /// None of a disk that is only read.
    pub(crate) lock: Option<WriterLock>,
    pub(crate) backup: Backup,
}

/// What backups and mirrors ask of a disk.
pub(crate) struct Backup {
    pub(crate) freezable: Arc<Freezable>,
    pub(crate) tracked: Arc<Tracked>,
    pub(crate) switchable: Arc<Switchable>,
    /// Where the spec wants it.
    pub(crate) record: Option<Record>,
}

/// The record of a disk's changes.
pub(crate) struct Record {
    pub(crate) recorder: Recorder,
    image: File,
}

/// Another place for a disk that is in use: its image, open and locked.
pub(crate) struct Replacement {
    pub(crate) backend: Arc<dyn BlockBackend>,
    pub(crate) lock: Option<WriterLock>,
    /// For the record of changes.
    pub(crate) image: Option<File>,
}

impl Replacement {
    /// Takes images that [`image_files`] has opened elsewhere.
    pub(crate) fn take(files: VecDeque<OwnedFd>, disk: &DiskSpec) -> Result<Self, OpenError> {
        let files = files.into_iter().map(File::from).collect();
        let opened = opened(files, disk)?;
        Ok(Self {
            lock: opened.writer_lock()?,
            image: opened.image()?,
            backend: opened.backend()?,
        })
    }
}

impl Backup {
    /// `next` is the disk's place from now on; the former one is returned. The caller holds the disk's queues, and
    /// promises that both hold the same.
    pub(crate) fn exchange(
        &mut self,
        lock: &mut Option<WriterLock>,
        next: Replacement,
    ) -> Replacement {
        // What has changed since a backup has, wherever it is stored.
        let image = match (&mut self.record, next.image) {
            (Some(record), Some(image)) => Some(std::mem::replace(&mut record.image, image)),
            _ => None,
        };
        Replacement {
            backend: self.switchable.switch_to(next.backend),
            lock: std::mem::replace(lock, next.lock),
            image,
        }
    }
}

impl Record {
    /// Keeps it for the next run. After everything that writes to the disk is gone. Blocks.
    pub(crate) fn close(self) -> io::Result<()> {
        // The record may not outlive a crash of the host that the image does not.
        self.image.sync_all()?;
        self.recorder.close(ImageStamp::of(&self.image.metadata()?))
    }
}

impl Medium {
    /// Opens and locks the images that the spec names, and the record of changes. Blocks on the file system; makes no
    /// thread.
    pub fn open(disk: &DiskSpec) -> Result<Self, OpenError> {
        let files = opened(unlocked(disk)?, disk)?;
        let record = disk.changes.as_deref().map(record_file).transpose()?;
        Self::new(files, record, disk)
    }

    /// Takes images that [`image_files`] has opened elsewhere.
    pub fn take(files: VecDeque<OwnedFd>, disk: &DiskSpec) -> Result<Self, OpenError> {
        let mut files: Vec<_> = files.into_iter().map(File::from).collect();
        let record = disk.changes.as_ref().and_then(|_| files.pop());
        Self::new(opened(files, disk)?, record, disk)
    }

    fn new(opened: OpenedDisk, record: Option<File>, disk: &DiskSpec) -> Result<Self, OpenError> {
        let lock = opened.writer_lock()?;
        let image = opened.image()?;
        let switchable = Arc::new(Switchable::new(opened.backend()?));
        let tracked = Arc::new(Tracked::new(switchable.clone()));
        let record = record.zip(image);
        let record = record.map(|(file, image)| begin_record(file, image, &tracked, disk));
        let record = record.transpose()?;
        let freezable = Arc::new(Freezable::new(tracked.clone()));
        let backend = Limited::new(freezable.clone(), limits(&disk.limits));
        Ok(Self {
            backend: Arc::new(backend),
            lock,
            backup: Backup {
                freezable,
                tracked,
                switchable,
                record,
            },
        })
    }
}

/// Opens the file of a disk's changes.
fn record_file(path: &Path) -> Result<File, OpenError> {
    let mut options = File::options();
    let options = options.read(true).write(true).create(true).truncate(false);
    options
        .mode(0o600)
        .open(path)
        .map_err(|source| OpenError::Open {
            path: path.to_owned(),
            source,
        })
}

fn begin_record(
    file: File,
    image: File,
    tracked: &Tracked,
    disk: &DiskSpec,
) -> Result<Record, OpenError> {
    let path = disk.changes.clone().unwrap_or_default();
    let failed = |source| OpenError::Open { path, source };
    let begin = || {
        let stamp = ImageStamp::of(&image.metadata()?);
        Recorder::open(ChangeFile::new(file), tracked, stamp, CHANGE_BYTES)
    };
    let (recorder, found) = begin().map_err(failed)?;
    let image_path = disk.path.display();
    match found {
        Found::Since(_) => tracing::debug!(disk = %image_path, "changes are recorded"),
        Found::Nothing { reason } => tracing::info!(
            disk = %image_path,
            "the next backup reads the whole disk: its record of changes cannot be used: {reason}"
        ),
    }
    Ok(Record { recorder, image })
}

/// Opens a disk's images for another process, in the order in which it takes them.
pub fn image_files(disk: &DiskSpec) -> Result<Vec<File>, OpenError> {
    if disk.path.as_os_str().is_empty() {
        return Ok(Vec::new());
    }
    let mut files = unlocked(disk)?;
    files.extend(disk.changes.as_deref().map(record_file).transpose()?);
    Ok(files)
}

/// A disk without a guest.
pub(crate) fn bare_disk(disk: &DiskSpec) -> Result<Arc<dyn BlockBackend>, OpenError> {
    opened(unlocked(disk)?, disk)?.backend()
}

/// A disk's images without a lock, or connections with whoever serves it.
fn unlocked(disk: &DiskSpec) -> Result<Vec<File>, OpenError> {
    if disk.format != DiskFormat::Nbd {
        return atoll_disk::unlocked_files(&source(disk), options(disk));
    }
    let connect = |_| UnixStream::connect(&disk.path).map(OwnedFd::from);
    let streams = (0..NBD_CONNECTIONS).map(connect);
    let streams: io::Result<Vec<_>> = streams.collect();
    let streams = streams.map_err(|source| OpenError::Open {
        path: disk.path.clone(),
        source,
    })?;
    Ok(streams.into_iter().map(File::from).collect())
}

/// The same as a disk.
fn opened(files: Vec<File>, disk: &DiskSpec) -> Result<OpenedDisk, OpenError> {
    if disk.format != DiskFormat::Nbd {
        return OpenedDisk::from_files(files, &source(disk), options(disk));
    }
    let streams = files.into_iter().map(OwnedFd::from).collect();
    OpenedDisk::remote(streams, &disk.path, options(disk))
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
        DiskFormat::Qcow2 => Format::Qcow2,
        // A disk that is served has no image: it is asked for before.
        DiskFormat::Raw | DiskFormat::Nbd => Format::Raw,
    }
}

fn options(disk: &DiskSpec) -> OpenOptions {
    OpenOptions {
        read_only: disk.readonly || disk.bus == DiskBus::Cdrom,
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

/// Rates in the words of the disk's crate.
pub fn limits(spec: &DiskLimits) -> Limits {
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

/// A network card's end on the host, opened by this process or by one that has handed it over.
pub enum CardEnd {
    /// A tap.
    Tap {
        /// One a pair of queues.
        taps: Vec<Tap>,
        /// Where the kernel is to move the packets.
        kernel: Option<VhostNetFiles>,
    },
    /// Connected with another process.
    Backend(UnixStream),
}

impl CardEnd {
    /// Opens the tap, and the kernel's end where the spec wants it, or allows it and it is there; or connects.
    pub fn open(net: &NetSpec) -> Result<Self, NetError> {
        if let Some(socket) = &net.vhost_user {
            let stream = UnixStream::connect(&socket.path);
            let stream = stream.map_err(|source| NetError::Backend {
                path: socket.path.clone(),
                source,
            })?;
            return Ok(Self::Backend(stream));
        }
        let pairs = net.queue_pairs.unwrap_or(1);
        Ok(Self::Tap {
            taps: Tap::open_queues(&net.tap, pairs)?,
            kernel: vhost_net(net, pairs)?,
        })
    }

    /// Takes what [`CardEnd::into_files`] has given in another process.
    pub fn take(mut files: VecDeque<OwnedFd>, net: &NetSpec) -> Result<Self, NetError> {
        let found = files.len();
        if let Some(socket) = &net.vhost_user {
            if socket.reconnect {
                return Err(NetError::Reconnect(socket.path.clone()));
            }
            let stream = files.pop_front().filter(|_| found == 1);
            let stream = stream.ok_or(NetError::Connection(found))?;
            return Ok(Self::Backend(UnixStream::from(stream)));
        }
        let pairs = usize::from(net.queue_pairs.unwrap_or(1));
        let statistics = STATISTICS.len();
        if ![pairs, 2 * pairs, 2 * pairs + statistics].contains(&found) {
            return Err(NetError::Count { found, pairs });
        }
        let mut next = |count| -> Vec<File> { files.drain(..count).map(File::from).collect() };
        let taps = next(pairs).into_iter();
        let taps = taps.map(|file| Tap::from_file(file, &net.tap));
        let taps = taps.collect::<Result<_, TapError>>()?;
        let kernel = (found > pairs).then(|| {
            let kernel = next(pairs);
            VhostNetFiles::from_files(kernel, next(found - 2 * pairs))
        });
        Ok(Self::Tap { taps, kernel })
    }

    /// Another handle of what another process can go on with, for its [`CardEnd::inherit`]: the taps.
    pub(crate) fn taps(&self) -> io::Result<Vec<OwnedFd>> {
        match self {
            Self::Backend(_) => Ok(Vec::new()),
            Self::Tap { taps, .. } => taps.iter().map(Tap::try_clone).collect(),
        }
    }

    /// The kernel's end of a card whose taps come from another process.
    pub(crate) fn kernel(net: &NetSpec) -> Result<Option<VhostNetFiles>, NetError> {
        vhost_net(net, net.queue_pairs.unwrap_or(1))
    }

    /// Takes the taps of a card that another process had, and uses no more.
    pub(crate) fn inherit(
        files: VecDeque<OwnedFd>,
        kernel: Option<VhostNetFiles>,
        net: &NetSpec,
    ) -> Result<Self, NetError> {
        let pairs = net.queue_pairs.unwrap_or(1);
        let found = files.len();
        if found != usize::from(pairs) {
            let pairs = usize::from(pairs);
            return Err(NetError::Count { found, pairs });
        }
        let Self::Tap { taps, .. } = Self::take(files, net)? else {
            return Err(NetError::Connection(found));
        };
        Ok(Self::Tap { taps, kernel })
    }

    /// The files for another process, in the order in which [`CardEnd::take`] takes them.
    pub fn into_files(self) -> Vec<File> {
        match self {
            Self::Backend(stream) => vec![File::from(OwnedFd::from(stream))],
            Self::Tap { taps, kernel } => {
                let taps = taps.into_iter().map(Tap::into_file);
                let kernel = kernel.map(VhostNetFiles::into_files);
                taps.chain(kernel.unwrap_or_default()).collect()
            }
        }
    }

    /// The end as the card `name` takes it; `net` is the spec that it was opened for.
    pub fn into_host(self, name: &str, net: &NetSpec) -> HostEnd {
        match (self, &net.vhost_user) {
            (Self::Tap { taps, kernel }, _) => HostEnd::Tap { taps, kernel },
            (Self::Backend(stream), Some(socket)) => HostEnd::Backend {
                options: backend(name.to_owned(), stream, socket),
                pair_count: net.queue_pairs.unwrap_or(1),
            },
            (Self::Backend(_), None) => unreachable!("both are made from this spec"),
        }
    }
}

/// How the device `name` reaches the process that serves it.
pub fn backend(name: String, stream: UnixStream, socket: &VhostUserSocket) -> BackendOptions {
    BackendOptions {
        name,
        stream,
        reconnect: socket.reconnect.then(|| socket.path.clone()),
        patience: PATIENCE,
    }
}

/// The kernel's end of a card, where the spec wants it or allows it and it is there.
fn vhost_net(net: &NetSpec, pairs: u16) -> Result<Option<VhostNetFiles>, NetError> {
    let limited = net.limits != NetLimits::default();
    if net.vhost == VhostNet::Off || net.vhost == VhostNet::Auto && limited {
        return Ok(None);
    }
    match VhostNetFiles::open(&net.tap, pairs) {
        Ok(files) => Ok(Some(files)),
        Err(error) if net.vhost == VhostNet::Auto => {
            // Nobody asked for it, and many hosts do not have it.
            tracing::debug!(
                tap = net.tap,
                "own threads move the packets: /dev/vhost-net: {error}"
            );
            Ok(None)
        }
        Err(error) => Err(NetError::Vhost(error)),
    }
}

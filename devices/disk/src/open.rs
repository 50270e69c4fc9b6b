// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Everything about a disk that is opened: its image and the images behind it, checked, locked.
//!
//! [`files`] is the only place of this crate that opens a path. What it returns needs no path any more, so that a
//! process can open, then enter a sandbox, then build backends ([`OpenedDisk::backend`]).

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::backend::{BlockBackend, SECTOR_BYTES};
use crate::lock::{Use, WriterLock, lock};
use crate::nbd::{NbdBackend, NbdClientError};
use crate::qcow2::{Qcow2Backend, Qcow2Error};
use crate::raw::RawBackend;
use crate::uring;
use crate::zeroes::DetectZeroes;

/// Time that a holder of an image gets to let go of it. io_uring's last requests, and their files with them, go a moment
/// after the process that made them: who starts a killed machine again at once would be refused.
const LOCK_PATIENCE: Duration = Duration::from_secs(1);
/// Time between two attempts meanwhile.
const LOCK_POLL: Duration = Duration::from_millis(5);

/// How the requests of an image's queue reach the kernel. [`Engine::best`] finds out what this process may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Engine {
    /// io_uring: one system call for a batch, completions as they come.
    Uring,
    /// preadv and pwritev on a few threads.
    Threads,
    /// preadv and pwritev on the queue's own thread: for files that no request waits for.
    InPlace,
}

impl Engine {
    /// io_uring, if this process may use it: found out by trying.
    pub fn best() -> Self {
        if uring::is_available() {
            Self::Uring
        } else {
            Self::Threads
        }
    }

    /// The best one for `file`. Where sectors are memory, a request is one copy; io_uring would hand every write to
    /// a thread of the kernel, since these file systems have no writes that promise not to wait.
    pub(crate) fn best_for(file: &File) -> io::Result<Self> {
        Ok(match is_memory(file)? {
            true => Self::InPlace,
            false => Self::best(),
        })
    }
}

/// Whether the file's sectors are this host's memory: on tmpfs, ramfs or hugetlbfs. Others wait for a device or a
/// network, at least for what they have not cached.
fn is_memory(file: &File) -> io::Result<bool> {
    let kind = rustix::fs::fstatfs(file)?.f_type;
    Ok(matches!(
        kind,
        libc::TMPFS_MAGIC | RAMFS_MAGIC | libc::HUGETLBFS_MAGIC
    ))
}

/// `linux/magic.h`; the C library's headers lack it.
const RAMFS_MAGIC: libc::c_long = 0x8584_58f6;

/// What stands between the guest's writes and the disk, by the names that PVE and QEMU give them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Cache {
    /// The host's page cache; durable when the guest flushes.
    #[default]
    Writeback,
    /// No page cache (O_DIRECT); durable when the guest flushes.
    None,
    /// The host's page cache for reads; each write is durable when it completes (O_DSYNC).
    Writethrough,
    /// No page cache, and each write is durable when it completes (O_DIRECT and O_DSYNC).
    Directsync,
    /// The host's page cache, and flushes do nothing: a crash of the host loses the disk.
    Unsafe,
}

impl Cache {
    /// Whether data bypasses the host's page cache (`O_DIRECT`), so that buffers and offsets have the file's alignment.
    pub fn is_direct(self) -> bool {
        matches!(self, Self::None | Self::Directsync)
    }

    /// Whether each write is durable when it completes.
    pub fn is_synchronous(self) -> bool {
        matches!(self, Self::Writethrough | Self::Directsync)
    }
}

/// Formats of images. Always said, never guessed: a guest can write any header into a raw image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// The guest's sectors, byte for byte.
    Raw,
    /// QEMU's copy-on-write format, version 3.
    Qcow2,
}

impl Format {
    /// As specs and image headers call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

/// Where a disk's sectors are: an image, its format, and what is behind it. Nothing of it is probed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    /// Path of the image file or block device, opened by [`open`] or [`files`] only.
    pub path: PathBuf,
    /// Format of that image, by the user's word: what the image's bytes look like is never asked.
    pub format: Format,
    /// The images behind it, nearest first: exactly those that the images' own headers name.
    pub backing: Vec<(PathBuf, Format)>,
}

/// How to open a disk. The default is to read and write it by the host's page cache.
#[derive(Debug, Clone, Copy, Default)]
pub struct OpenOptions {
    /// Refuse writes; several readers may then share the image.
    pub read_only: bool,
    /// `None` takes the best one for the image.
    pub engine: Option<Engine>,
    /// When writes are durable, and whether the host caches sectors.
    pub cache: Cache,
    /// Give space back that the guest discards.
    pub discard: bool,
    /// Turn writes of nothing but zeroes into zeroed ranges.
    pub detect_zeroes: bool,
}

/// Why a disk could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The path cannot be opened in the wanted mode.
    #[error("open disk {path}")]
    Open {
        /// The image.
        path: PathBuf,
        /// The kernel's reason.
        source: io::Error,
    },
    /// Not something that has sectors.
    #[error("disk {path} is {what}, expected a file or a block device")]
    Kind {
        /// The image.
        path: PathBuf,
        /// What it is instead.
        what: &'static str,
    },
    /// No whole number of sectors, or none at all.
    #[error(
        "disk {path} has {size_bytes} bytes, expected a multiple of {unit} above 0 (truncate -s)"
    )]
    Size {
        /// The image.
        path: PathBuf,
        /// Its size.
        size_bytes: u64,
        /// What it should be a multiple of.
        unit: u32,
    },
    /// Somebody else has it open, and one of the two writes.
    #[error(
        "disk {path} is in use: another machine or qemu-img has it open; end that first, or make both read-only"
    )]
    InUse {
        /// The image.
        path: PathBuf,
    },
    /// The file system has no O_DIRECT.
    #[error("disk {path}: its file system does not support direct I/O: use cache writeback")]
    NoDirect {
        /// The image.
        path: PathBuf,
    },
    /// Not as many files as the disk has images.
    #[error("disk {path}: {found} open files came for {expected} images")]
    Count {
        /// The image.
        path: PathBuf,
        /// Files that came.
        found: usize,
        /// Images that the disk has.
        expected: usize,
    },
    /// A raw image has nothing behind it.
    #[error("disk {path}: a raw image has no backing file")]
    RawBacking {
        /// The image.
        path: PathBuf,
    },
    /// Whoever serves it does not.
    #[error("disk {path}")]
    Remote {
        /// The socket.
        path: PathBuf,
        /// What is wrong.
        source: NbdClientError,
    },
    /// The guest is to write to it.
    #[error("disk {path}: its server lets nobody write: make it read-only")]
    RemoteReadOnly {
        /// The socket.
        path: PathBuf,
    },
    /// The image is malformed, or of a kind that is not supported.
    #[error("disk {path}")]
    Qcow2 {
        /// The image.
        path: PathBuf,
        /// What is wrong.
        source: Qcow2Error,
    },
}

/// One open, locked file of a disk.
#[derive(Debug)]
pub(crate) struct ImageFile {
    pub(crate) file: File,
    /// For messages only.
    pub(crate) path: PathBuf,
    pub(crate) size_bytes: u64,
    pub(crate) is_device: bool,
}

/// All files of one disk, open and locked until the last backend or queue made from them is dropped; or the connections
/// with whoever has them.
pub struct OpenedDisk {
    content: Opened,
    options: OpenOptions,
}

enum Opened {
    Image {
        image: ImageFile,
        format: Format,
        backing: Vec<(ImageFile, Format)>,
    },
    Remote(NbdBackend),
}

/// Opens and locks all files of a disk: the image for what `options` say, those behind it for reading. Blocks for a
/// second before it says that somebody has one.
pub fn files(source: &Source, options: OpenOptions) -> Result<OpenedDisk, OpenError> {
    let unlocked = unlocked_files(source, options)?;
    OpenedDisk::from_files(unlocked, source, options)
}

/// Opens the same files without a lock, the image first, then those behind it, nearest first: for a process that opens
/// them for another one's [`OpenedDisk::from_files`]. Fails at the first that cannot be opened, or when a raw image is
/// said to have others behind it; no file stays open then.
pub fn unlocked_files(source: &Source, options: OpenOptions) -> Result<Vec<File>, OpenError> {
    source.check()?;
    let behind = source.backing.iter();
    std::iter::once((&source.path, options))
        .chain(behind.map(|(path, _)| (path, options.behind())))
        .map(|(path, options)| open_file(path, options))
        .collect()
}

impl Source {
    fn check(&self) -> Result<(), OpenError> {
        if self.format == Format::Raw && !self.backing.is_empty() {
            let path = self.path.clone();
            return Err(OpenError::RawBacking { path });
        }
        Ok(())
    }
}

impl OpenOptions {
    /// For the images behind one.
    fn behind(self) -> Self {
        Self {
            read_only: true,
            ..self
        }
    }
}

impl OpenedDisk {
    /// A disk over files that the caller opened in modes that fit `options`, in the order of [`unlocked_files`]. Locks
    /// them. The paths of `source` are only for messages.
    pub fn from_files(
        files: Vec<File>,
        source: &Source,
        options: OpenOptions,
    ) -> Result<Self, OpenError> {
        source.check()?;
        let count = 1 + source.backing.len();
        if files.len() != count {
            return Err(OpenError::Count {
                path: source.path.clone(),
                found: files.len(),
                expected: count,
            });
        }
        let mut files = files.into_iter();
        let image = files.next().expect("counted above");
        let backing = files.zip(&source.backing).map(|(file, (path, format))| {
            let file = take_file(file, path, options.behind())?;
            Ok((file, *format))
        });
        // Those behind first: a disk that cannot be has not locked its image.
        let backing = backing.collect::<Result<_, OpenError>>()?;
        let content = Opened::Image {
            image: take_file(image, &source.path, options)?,
            format: source.format,
            backing,
        };
        Ok(Self { content, options })
    }

    /// A disk that another process serves: the default export at the other end of connected sockets. Blocks for its
    /// answers.
    pub fn remote(
        streams: Vec<OwnedFd>,
        path: &Path,
        options: OpenOptions,
    ) -> Result<Self, OpenError> {
        let backend = NbdBackend::open(streams, "", options.read_only);
        let backend = backend.map_err(|source| OpenError::Remote {
            path: path.to_owned(),
            source,
        })?;
        if backend.geometry().read_only && !options.read_only {
            let path = path.to_owned();
            return Err(OpenError::RemoteReadOnly { path });
        }
        let content = Opened::Remote(backend);
        Ok(Self { content, options })
    }

    /// The same of a disk that is one file.
    pub fn from_file(
        file: File,
        path: &Path,
        format: Format,
        options: OpenOptions,
    ) -> Result<Self, OpenError> {
        let source = Source {
            path: path.to_owned(),
            format,
            backing: Vec::new(),
        };
        Self::from_files(vec![file], &source, options)
    }

    /// The lock of the image, if it is open for writing. Whoever serves a disk has its own.
    pub fn writer_lock(&self) -> Result<Option<WriterLock>, OpenError> {
        let Opened::Image { image, .. } = &self.content else {
            return Ok(None);
        };
        if self.options.read_only {
            return Ok(None);
        }
        let lock = WriterLock::of(&image.file).map_err(|source| OpenError::Open {
            path: image.path.clone(),
            source,
        })?;
        Ok(Some(lock))
    }

    /// Another handle of the image, for its attributes and to make it durable; none of a disk that is served.
    pub fn image(&self) -> Result<Option<File>, OpenError> {
        let Opened::Image { image, .. } = &self.content else {
            return Ok(None);
        };
        let file = image.file.try_clone();
        let file = file.map_err(|source| OpenError::Open {
            path: image.path.clone(),
            source,
        })?;
        Ok(Some(file))
    }

    /// The backend that serves it. Opens nothing.
    pub fn backend(self) -> Result<Arc<dyn BlockBackend>, OpenError> {
        let options = self.options;
        let backend: Arc<dyn BlockBackend> = match self.content {
            Opened::Remote(backend) => Arc::new(backend),
            Opened::Image {
                image,
                format,
                backing,
            } => match format {
                Format::Raw => Arc::new(RawBackend::new(image, options)?),
                Format::Qcow2 => Arc::new(Qcow2Backend::new(image, backing, options)?),
            },
        };
        match options.detect_zeroes && backend.abilities().write_zeroes && !options.read_only {
            true => Ok(Arc::new(DetectZeroes::new(backend, options.discard))),
            false => Ok(backend),
        }
    }
}

/// Opens a disk in one step, for whoever shares no files: opens, locks and checks all images, and makes the
/// decorators that `options` ask for. Blocks on the file system; makes no thread.
pub fn open(source: &Source, options: OpenOptions) -> Result<Arc<dyn BlockBackend>, OpenError> {
    files(source, options)?.backend()
}

fn open_file(path: &Path, options: OpenOptions) -> Result<File, OpenError> {
    let failed = |source| OpenError::Open {
        path: path.to_owned(),
        source,
    };
    // Looked at before opening: opening a FIFO blocks, and a directory's error would name neither.
    let kind = std::fs::metadata(path).map_err(failed)?.file_type();
    if let Some(what) = misfit(kind) {
        return Err(OpenError::Kind {
            path: path.to_owned(),
            what,
        });
    }
    let mut flags = 0;
    if options.cache.is_direct() {
        flags |= libc::O_DIRECT;
    }
    if options.cache.is_synchronous() {
        flags |= libc::O_DSYNC;
    }
    // For a block device, without O_CREAT: not while it is mounted or part of something (open(2)).
    if kind.is_block_device() && !options.read_only {
        flags |= libc::O_EXCL;
    }
    let opened = File::options()
        .read(true)
        .write(!options.read_only)
        .custom_flags(flags)
        .open(path);
    match opened {
        Ok(file) => Ok(file),
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) && options.cache.is_direct() => {
            Err(OpenError::NoDirect {
                path: path.to_owned(),
            })
        }
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => Err(OpenError::InUse {
            path: path.to_owned(),
        }),
        Err(error) => Err(failed(error)),
    }
}

/// Locks an open image and asks for its size.
fn take_file(mut file: File, path: &Path, options: OpenOptions) -> Result<ImageFile, OpenError> {
    let failed = |source| OpenError::Open {
        path: path.to_owned(),
        source,
    };
    let kind = file.metadata().map_err(failed)?.file_type();
    if let Some(what) = misfit(kind) {
        return Err(OpenError::Kind {
            path: path.to_owned(),
            what,
        });
    }
    let purpose = if options.read_only {
        Use::Read
    } else {
        Use::Write
    };
    if !lock_patiently(&file, purpose).map_err(failed)? {
        return Err(OpenError::InUse {
            path: path.to_owned(),
        });
    }
    // The end's offset is the size of files and of block devices alike.
    let size_bytes = file.seek(SeekFrom::End(0)).map_err(failed)?;
    Ok(ImageFile {
        file,
        path: path.to_owned(),
        size_bytes,
        is_device: kind.is_block_device(),
    })
}

/// [`lock`] that waits [`LOCK_PATIENCE`] for a holder that is ending.
fn lock_patiently(file: &File, purpose: Use) -> io::Result<bool> {
    let deadline = Instant::now() + LOCK_PATIENCE;
    loop {
        match lock(file, purpose)? {
            false if Instant::now() < deadline => std::thread::sleep(LOCK_POLL),
            held => return Ok(held),
        }
    }
}

fn misfit(kind: std::fs::FileType) -> Option<&'static str> {
    match kind {
        kind if kind.is_file() || kind.is_block_device() => None,
        kind if kind.is_dir() => Some("a directory"),
        kind if kind.is_char_device() => Some("a character device"),
        kind if kind.is_fifo() => Some("a pipe"),
        _ => Some("a socket"),
    }
}

impl ImageFile {
    /// Size of a block device now: storage below may have grown it.
    pub(crate) fn device_bytes(file: &File) -> io::Result<u64> {
        Ok(rustix::fs::seek(
            file.as_fd(),
            rustix::fs::SeekFrom::End(0),
        )?)
    }

    /// Whether it has a whole, positive number of `unit`s.
    pub(crate) fn check_size(&self, unit: u32) -> Result<(), OpenError> {
        let unit = unit.max(u32::try_from(SECTOR_BYTES).expect("512"));
        match self.size_bytes {
            size if size > 0 && size.is_multiple_of(unit.into()) => Ok(()),
            size_bytes => Err(OpenError::Size {
                path: self.path.clone(),
                size_bytes,
                unit,
            }),
        }
    }
}

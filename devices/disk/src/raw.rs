// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A raw disk: a file or block device whose bytes are the guest's sectors.
#![expect(
    unsafe_code,
    reason = "preadv and pwritev move bytes between files and ranges of guest memory"
)]

use std::fs::{File, TryLockError};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::backend::{BlockBackend, BlockQueue, Geometry, Operation, Request, SECTOR_BYTES};
use crate::immediate::ImmediateQueue;
use crate::uring::{self, UringQueue};

/// How requests reach the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Engine {
    /// io_uring: one system call for a batch, completions as they come.
    Uring,
    /// preadv and pwritev on the queue's thread, one request after the other.
    Blocking,
}

/// How to open a raw disk.
#[derive(Debug, Clone, Copy, Default)]
pub struct OpenOptions {
    /// Refuse writes; several readers may then share the image.
    pub read_only: bool,
    /// `None` takes io_uring where the process may use it.
    pub engine: Option<Engine>,
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
    #[error("disk {path} has {size_bytes} bytes, expected a multiple of 512 above 0 (truncate -s)")]
    Size {
        /// The image.
        path: PathBuf,
        /// Its size.
        size_bytes: u64,
    },
    /// Another process has it open, and one of the two writes.
    #[error("disk {path} is in use: another process has it open")]
    InUse {
        /// The image.
        path: PathBuf,
    },
}

/// An open raw disk. Holds a flock(2) on the image, exclusive unless read-only, until it is dropped.
#[derive(Debug)]
pub struct RawBackend {
    file: Arc<File>,
    geometry: Geometry,
    engine: Engine,
}

impl RawBackend {
    /// Opens and locks an image.
    pub fn open(path: &Path, options: OpenOptions) -> Result<Self, OpenError> {
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
        let file = File::options()
            .read(true)
            .write(!options.read_only)
            .open(path)
            .map_err(failed)?;
        Self::from_file(file, path, options)
    }

    /// Takes an open image; `path` is only for messages. The file's mode must fit `options`.
    pub fn from_file(mut file: File, path: &Path, options: OpenOptions) -> Result<Self, OpenError> {
        let failed = |source| OpenError::Open {
            path: path.to_owned(),
            source,
        };
        let lock = if options.read_only {
            file.try_lock_shared()
        } else {
            file.try_lock()
        };
        match lock {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(OpenError::InUse {
                    path: path.to_owned(),
                });
            }
            Err(TryLockError::Error(source)) => return Err(failed(source)),
        }
        // The end's offset is the size of files and of block devices alike.
        let size_bytes = file.seek(SeekFrom::End(0)).map_err(failed)?;
        if size_bytes == 0 || size_bytes % SECTOR_BYTES != 0 {
            return Err(OpenError::Size {
                path: path.to_owned(),
                size_bytes,
            });
        }
        let best = || {
            if uring::is_available() {
                Engine::Uring
            } else {
                Engine::Blocking
            }
        };
        Ok(Self {
            file: Arc::new(file),
            geometry: Geometry {
                size_bytes,
                read_only: options.read_only,
            },
            engine: options.engine.unwrap_or_else(best),
        })
    }

    /// The engine in use.
    pub fn engine(&self) -> Engine {
        self.engine
    }
}

impl BlockBackend for RawBackend {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn open_queue(&self, depth: u16) -> io::Result<Box<dyn BlockQueue>> {
        let file = Arc::clone(&self.file);
        match self.engine {
            Engine::Uring => Ok(Box::new(UringQueue::new(file, self.geometry, depth)?)),
            Engine::Blocking => {
                let transfer = Box::new(move |request: &Request| transfer(&file, request));
                Ok(Box::new(ImmediateQueue::new(
                    self.geometry,
                    depth,
                    transfer,
                )?))
            }
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

fn transfer(file: &File, request: &Request) -> io::Result<()> {
    let fd = file.as_raw_fd();
    let ranges = request.segments.iovecs();
    let count = i32::try_from(ranges.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let offset = i64::try_from(request.offset_bytes).map_err(|_| io::ErrorKind::InvalidInput)?;
    loop {
        let moved = match request.operation {
            Operation::Flush => return file.sync_data(),
            // SAFETY: `ranges` has `count` entries, each valid and writable by the contract of `Segments::push`.
            Operation::Read => unsafe { libc::preadv(fd, ranges.as_ptr(), count, offset) },
            // SAFETY: `ranges` has `count` entries, each valid and readable by the contract of `Segments::push`.
            Operation::Write => unsafe { libc::pwritev(fd, ranges.as_ptr(), count, offset) },
        };
        match u64::try_from(moved) {
            Ok(moved) => return request.check_moved(moved),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;
    use crate::conformance;

    fn image(size_bytes: u64) -> (tempfile::TempDir, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.raw");
        File::create(&path).unwrap().set_len(size_bytes).unwrap();
        (directory, path)
    }

    fn conform(engine: Engine) {
        conformance::check(|geometry| {
            let (directory, path) = image(geometry.size_bytes);
            let options = OpenOptions {
                read_only: geometry.read_only,
                engine: Some(engine),
            };
            let backend = RawBackend::open(&path, options).unwrap();
            // The open file outlives its name.
            drop(directory);
            Box::new(backend)
        });
    }

    #[test]
    fn conforms_with_uring() {
        if !uring::is_available() {
            println!("ATOLL-SKIP: io_uring is not available to this process");
            return;
        }
        conform(Engine::Uring);
    }

    #[test]
    fn conforms_with_blocking_calls() {
        conform(Engine::Blocking);
    }

    #[track_caller]
    fn check_error(path: &Path, options: OpenOptions, expected: &str) {
        let error = RawBackend::open(path, options).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
    }

    #[test]
    fn what_is_no_disk_is_refused_by_name() {
        let (directory, path) = image(1000);
        let options = OpenOptions::default();
        check_error(directory.path(), options, "is a directory");
        check_error(Path::new("/dev/null"), options, "is a character device");
        check_error(&directory.path().join("absent"), options, "absent");
        check_error(&path, options, "has 1000 bytes");
        File::options()
            .write(true)
            .open(&path)
            .unwrap()
            .set_len(0)
            .unwrap();
        check_error(&path, options, "has 0 bytes");
        let socket = directory.path().join("socket");
        let _listener = UnixListener::bind(&socket).unwrap();
        check_error(&socket, options, "is a socket");
    }

    #[test]
    fn an_image_has_one_writer_or_many_readers() {
        let (_directory, path) = image(4096);
        let (write, read) = (
            OpenOptions::default(),
            OpenOptions {
                read_only: true,
                ..OpenOptions::default()
            },
        );
        let writer = RawBackend::open(&path, write).unwrap();
        check_error(&path, write, "in use");
        check_error(&path, read, "in use");
        drop(writer);
        let _first = RawBackend::open(&path, read).unwrap();
        let _second = RawBackend::open(&path, read).unwrap();
        check_error(&path, write, "in use");
    }

    #[test]
    fn a_file_that_shrank_gives_an_error_and_no_stale_data() {
        let (_directory, path) = image(8192);
        for engine in [Engine::Uring, Engine::Blocking] {
            let options = OpenOptions {
                engine: Some(engine),
                ..OpenOptions::default()
            };
            let Ok(backend) = RawBackend::open(&path, options) else {
                continue;
            };
            backend.file.set_len(4096).unwrap();
            let mut buffer = vec![0; 4096];
            let error = conformance::read(&backend, 2048, &mut buffer).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
            backend.file.set_len(8192).unwrap();
        }
    }
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Locks on images: one writer, or several readers, across processes, so that no disk is opened twice for writing.
//!
//! Open file description locks (fcntl(2), `F_OFD_SETLK`): they belong to the open file, so they live exactly as
//! long as it does, survive being passed to another process, and two opens in one process exclude each other.
//!
//! QEMU and its tools lock single bytes of an image (its permission `p` is byte 100 + p, what a holder does not
//! let others do is byte 200 + p; reading is p = 0, writing p = 1). A writer here locks the whole file, which
//! conflicts with any of theirs; a reader speaks their language, so that readers of both kinds go together.
#![expect(unsafe_code, reason = "fcntl(2) with a struct flock")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// QEMU's byte for "reads".
const READS: i64 = 100;
/// QEMU's byte for "writes".
const WRITES: i64 = 101;
/// QEMU's byte for "lets nobody else write".
const REFUSES_WRITERS: i64 = 201;

/// What the holder of an image does with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Use {
    /// Reads, beside other readers.
    Read,
    /// Reads and writes, alone.
    Write,
}

/// Locks an open image. `false`: somebody else's use does not go with it.
pub(crate) fn lock(file: &File, purpose: Use) -> io::Result<bool> {
    match purpose {
        // Length 0 is "to the end, wherever that moves".
        Use::Write => set(file, libc::F_WRLCK, 0, 0),
        Use::Read => {
            let held = set(file, libc::F_RDLCK, READS, 1)?
                && set(file, libc::F_RDLCK, REFUSES_WRITERS, 1)?;
            Ok(held && !is_locked(file, WRITES)?)
        }
    }
}

/// The lock of one image that is open for writing, apart from who writes: it can change hands while both have the
/// image open, as in a live migration.
#[derive(Debug)]
pub struct WriterLock {
    /// The same open file as the backend's.
    file: File,
}

impl WriterLock {
    pub(crate) fn of(file: &File) -> io::Result<Self> {
        file.try_clone().map(|file| Self { file })
    }

    /// Lets another process have it. Nothing may be written until it is taken back.
    pub fn release(&self) -> io::Result<()> {
        set(&self.file, libc::F_UNLCK, 0, 0).map(drop)
    }

    /// Takes it back, also when it was never released. `false`: somebody else has it.
    pub fn take_back(&self) -> io::Result<bool> {
        lock(&self.file, Use::Write)
    }
}

fn request(kind: i32, start: i64, length: i64) -> libc::flock {
    libc::flock {
        l_type: i16::try_from(kind).expect("one of three small constants"),
        l_whence: 0, // SEEK_SET
        l_start: start,
        l_len: length,
        l_pid: 0, // As F_OFD_* wants it.
    }
}

fn set(file: &File, kind: i32, start: i64, length: i64) -> io::Result<bool> {
    let request = request(kind, start, length);
    // SAFETY: the descriptor is open, and F_OFD_SETLK reads one `struct flock`.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const request) };
    if result == 0 {
        return Ok(true);
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::EACCES) => Ok(false),
        _ => Err(error),
    }
}

/// Whether somebody else holds any lock on that byte.
fn is_locked(file: &File, start: i64) -> io::Result<bool> {
    let mut request = request(libc::F_WRLCK, start, 1);
    // SAFETY: the descriptor is open, and F_OFD_GETLK reads and writes one `struct flock`.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut request) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(i32::from(request.l_type) != libc::F_UNLCK)
}

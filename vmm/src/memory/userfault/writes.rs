// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The same for memory that is written: whoever writes to a protected page waits until it is not protected any more. The
//! page's content is what it was meanwhile, and can be read.
//!
//! ```text
//! descriptor of /dev/userfaultfd, of whoever asks ─► for_writes ─► watch RAM ─► protect ─► read: written(address) ─► allow
//! ```
//! Kernels before 6.4 do not protect pages of private memory that do not exist yet; there the pages are made first, which
//! takes page tables but no memory (Linux `Documentation/admin-guide/mm/userfaultfd.rst`, "Write Protect Notifications").
//! After `for_writes` nobody needs a right for any of this, so it can be done inside of the sandbox.

use std::fs::File;
use std::io;

use atoll_devices::memory::PAGE_BYTES;
use rustix::io::Errno;
use vmm_sys_util::ioctl::ioctl_with_mut_ref;
use vmm_sys_util::ioctl_iowr_nr;

use super::{Range, RegisterRequest, UFFDIO, UFFDIO_REGISTER, UserFault, done_or_error, range};
use crate::memory::HUGE_PAGE_BYTES;

/// `linux/userfaultfd.h`.
const UFFD_FEATURE_PAGEFAULT_FLAG_WP: u64 = 1;
/// Also memory that is a file's, since Linux 5.19.
const UFFD_FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
/// Also private pages that do not exist yet, since Linux 6.4.
const UFFD_FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
const UFFDIO_REGISTER_MODE_WP: u64 = 1 << 1;
const UFFDIO_WRITEPROTECT_MODE_WP: u64 = 1;
/// In a message: the page is there, and protected.
pub(super) const UFFD_PAGEFAULT_FLAG_WP: u64 = 1 << 1;

ioctl_iowr_nr!(UFFDIO_WRITEPROTECT, UFFDIO, 0x06, ProtectRequest);

/// `struct uffdio_writeprotect`.
#[derive(Debug)]
#[repr(C)]
struct ProtectRequest {
    range: Range,
    mode: u64,
}

/// Why writes to memory cannot be made to wait.
#[derive(Debug, thiserror::Error)]
pub enum WritesError {
    /// The descriptor is of something else, or there are too many.
    #[error("make a userfaultfd")]
    Make(#[source] io::Error),
    /// The kernel is too old for this memory.
    #[error(
        "this kernel's userfaultfd does not hold back writes to such memory (Linux 5.14 does to --memory SIZE, 5.19 to shared \
         memory and huge pages)"
    )]
    Features(#[source] io::Error),
    /// RAM is of another kind than it can do, or is being filled.
    #[error("have the kernel hold back writes to guest memory")]
    Watch(#[source] io::Error),
    /// No memory for page tables.
    #[error("protect guest memory from writes")]
    Protect(#[source] io::Error),
}

/// A userfaultfd of this process for memory that is written. When it is closed nothing is protected any more, and whoever
/// waits goes on.
#[derive(Debug)]
pub struct Writes {
    faults: UserFault,
    /// Pages have to exist to be protected.
    must_exist: bool,
}

impl Writes {
    /// One for private and anonymous memory, or for a memfd's (`shared`). `device` is an open `/dev/userfaultfd`, by which
    /// this process may have one that also answers for the kernel.
    pub fn open(device: &File, shared: bool) -> Result<Self, WritesError> {
        let needed = match shared {
            true => UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_WP_HUGETLBFS_SHMEM,
            false => UFFD_FEATURE_PAGEFAULT_FLAG_WP,
        };
        // A userfaultfd is asked once, and a feature that is not known is an error.
        let whole = Self::with(device, needed | UFFD_FEATURE_WP_UNPOPULATED, false);
        match whole {
            Err(WritesError::Features(_)) => Self::with(device, needed, !shared),
            done => done,
        }
    }

    /// As on a kernel before 6.4.
    #[cfg(test)]
    pub(in crate::memory) fn open_as_old(device: &File) -> Result<Self, WritesError> {
        Self::with(device, UFFD_FEATURE_PAGEFAULT_FLAG_WP, true)
    }

    fn with(device: &File, features: u64, must_exist: bool) -> Result<Self, WritesError> {
        let faults = UserFault::by_device(device).map_err(WritesError::Make)?;
        faults.greet(features).map_err(WritesError::Features)?;
        Ok(Self { faults, must_exist })
    }

    /// What is told of it.
    #[must_use]
    pub fn faults(&self) -> &UserFault {
        &self.faults
    }

    /// Memory of which ranges may be protected. Nothing is yet.
    pub fn watch(&self, address: usize, length: usize) -> Result<(), WritesError> {
        let mut request = RegisterRequest {
            range: range(address, length),
            mode: UFFDIO_REGISTER_MODE_WP,
            ioctls: 0,
        };
        // SAFETY: reads and writes one structure of this request's type; no content changes.
        let done = unsafe { ioctl_with_mut_ref(&self.faults.0, UFFDIO_REGISTER(), &mut request) };
        done_or_error(done).map_err(WritesError::Watch)
    }

    /// From now on whoever writes to these whole pages of watched memory waits.
    pub fn protect(&self, address: usize, length: usize) -> Result<(), WritesError> {
        if self.must_exist {
            let pointer = std::ptr::without_provenance_mut(address);
            // SAFETY: reads pages, no content changes; where nothing is mapped it is an error.
            let done = unsafe { libc::madvise(pointer, length, libc::MADV_POPULATE_READ) };
            done_or_error(done).map_err(WritesError::Features)?;
        }
        self.set(address, length, UFFDIO_WRITEPROTECT_MODE_WP)
            .map_err(WritesError::Protect)
    }

    /// No longer; wakes who waits.
    pub fn allow(&self, address: usize, length: usize) -> io::Result<()> {
        self.set(address, length, 0)
    }

    /// In parts where the range is several mappings, of which one call takes one before Linux 6.3: advice about a part of
    /// RAM (`crate::loader`) makes several of it.
    fn set(&self, address: usize, length: usize, mode: u64) -> io::Result<()> {
        let unit = match length {
            0..=HUGE_PAGE_BYTES => PAGE_BYTES,
            _ => HUGE_PAGE_BYTES,
        };
        let half = (length / 2).next_multiple_of(unit);
        match self.set_mapping(address, length, mode) {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) && half < length => {
                self.set(address, half, mode)?;
                self.set(address + half, length - half, mode)
            }
            done => done,
        }
    }

    fn set_mapping(&self, address: usize, length: usize, mode: u64) -> io::Result<()> {
        loop {
            let mut request = ProtectRequest {
                range: range(address, length),
                mode,
            };
            // SAFETY: reads one structure of this request's type; no content changes.
            let done =
                unsafe { ioctl_with_mut_ref(&self.faults.0, UFFDIO_WRITEPROTECT(), &mut request) };
            match done_or_error(done) {
                Err(error) if Errno::from_io_error(&error) == Some(Errno::AGAIN) => {
                    std::thread::yield_now();
                }
                done => return done,
            }
        }
    }
}

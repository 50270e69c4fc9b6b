// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! userfaultfd(2): the kernel asks this process for a page when it is touched for the first time, by the guest, by one of
//! our threads, or by the kernel on behalf of either.
//!
//! ```text
//! open (before the sandbox) ─► register RAM ─► read: missing(address) ─► copy or zero, which wakes who waits
//!                                                    removed(range): who gives memory back waits until this is read
//! ```
//! Not here: which bytes a page has (`filling`). Memory that is written: `writes`.
#![expect(
    unsafe_code,
    reason = "userfaultfd(2) and its ioctls, which put bytes where no reference may be"
)]

mod writes;

use std::fs::File;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, RawFd};
use std::os::raw::c_ulong;

use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};
use vmm_sys_util::{ioctl_io_nr, ioctl_ior_nr, ioctl_iowr_nr};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

pub use self::writes::{Writes, WritesError};

/// Gives a userfaultfd to whoever may open it, since Linux 6.1.
pub const USERFAULTFD: &str = "/dev/userfaultfd";

/// Opens [`USERFAULTFD`]; an error for whoever may not, and where there is none.
pub fn open_device() -> io::Result<File> {
    File::options().read(true).write(true).open(USERFAULTFD)
}

/// Of each userfaultfd.
const FLAGS: i32 = libc::O_CLOEXEC | libc::O_NONBLOCK;

/// `linux/userfaultfd.h`.
const UFFDIO: u32 = 0xaa;
const UFFD_API: u64 = 0xaa;
/// `madvise(MADV_DONTNEED)` is told, and waits until that has been read.
const UFFD_FEATURE_EVENT_REMOVE: u64 = 1 << 3;
const UFFDIO_REGISTER_MODE_MISSING: u64 = 1;
const UFFD_EVENT_PAGEFAULT: u8 = 0x12;
const UFFD_EVENT_REMOVE: u8 = 0x15;

ioctl_io_nr!(USERFAULTFD_IOC_NEW, UFFDIO, 0x00);
ioctl_iowr_nr!(UFFDIO_API, UFFDIO, 0x3f, ApiRequest);
ioctl_iowr_nr!(UFFDIO_REGISTER, UFFDIO, 0x00, RegisterRequest);
ioctl_ior_nr!(UFFDIO_WAKE, UFFDIO, 0x02, Range);
ioctl_iowr_nr!(UFFDIO_COPY, UFFDIO, 0x03, CopyRequest);
ioctl_iowr_nr!(UFFDIO_ZEROPAGE, UFFDIO, 0x04, ZeroRequest);

/// `struct uffdio_api`.
#[derive(Debug)]
#[repr(C)]
struct ApiRequest {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// `struct uffdio_range`.
#[derive(Debug)]
#[repr(C)]
struct Range {
    start: u64,
    length: u64,
}

/// `struct uffdio_register`.
#[derive(Debug)]
#[repr(C)]
struct RegisterRequest {
    range: Range,
    mode: u64,
    ioctls: u64,
}

/// `struct uffdio_copy`.
#[derive(Debug)]
#[repr(C)]
struct CopyRequest {
    to: u64,
    from: u64,
    length: u64,
    mode: u64,
    /// Bytes that were put, or an error number below zero.
    copied: i64,
}

/// `struct uffdio_zeropage`.
#[derive(Debug)]
#[repr(C)]
struct ZeroRequest {
    range: Range,
    mode: u64,
    /// As in [`CopyRequest`].
    zeroed: i64,
}

/// `struct uffd_msg`: what follows the event depends on it.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Message {
    event: u8,
    reserved: [u8; 7],
    words: [u64; 3],
}

/// Messages that are read at once.
const MESSAGES: usize = 16;

/// Why there is no userfaultfd.
#[derive(Debug, thiserror::Error)]
pub enum UserFaultError {
    /// Not for this user, or this kernel has none.
    #[error(
        "reading memory lazily takes a userfaultfd: let this user open {USERFAULTFD}, or set vm.unprivileged_userfaultfd=1 \
         (sysctl), or choose --memory-mode map or read"
    )]
    Refused(#[source] io::Error),
    /// It does not do what is needed.
    #[error(
        "this kernel's userfaultfd does not tell of memory that is given back: --memory-mode map, or read"
    )]
    Features(#[source] io::Error),
    /// RAM is of another kind than it can do.
    #[error("have the kernel ask for guest memory's pages")]
    Register(#[source] io::Error),
}

/// What the kernel tells. Addresses are the process's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Told {
    /// Somebody waits for the page at this address.
    Missing(usize),
    /// Somebody waits to write to the page at this address, which is protected.
    Written(usize),
    /// Memory from the first to before the second address is being given back: it reads as zeroes from now on.
    Removed(usize, usize),
}

/// A userfaultfd of this process. When it is closed, pages that are missing are zeroes, also for whoever waits for one.
#[derive(Debug)]
pub struct UserFault(File);

impl UserFault {
    /// One that also answers for the kernel (KVM, io_uring, vhost), which takes a right that the sandbox gives up.
    pub fn open() -> Result<Self, UserFaultError> {
        let device = open_device().and_then(|device| Self::by_device(&device));
        let faults = device.or_else(|_| Self::by_call());
        let faults = faults.map_err(UserFaultError::Refused)?;
        let greeted = faults.greet(UFFD_FEATURE_EVENT_REMOVE);
        greeted.map_err(UserFaultError::Features)?;
        Ok(faults)
    }

    fn by_device(device: &File) -> io::Result<Self> {
        let flags = c_ulong::try_from(FLAGS).expect("flags are positive");
        // SAFETY: takes its argument by value.
        let fd = unsafe { ioctl_with_val(device, USERFAULTFD_IOC_NEW(), flags) };
        own(fd).map(Self)
    }

    fn by_call() -> io::Result<Self> {
        // SAFETY: takes its argument by value.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, FLAGS) };
        own(i32::try_from(fd).expect("a descriptor, or -1")).map(Self)
    }

    /// Asks for features, before anything else; once, since one that is not known is an error.
    fn greet(&self, features: u64) -> io::Result<()> {
        let mut request = ApiRequest {
            api: UFFD_API,
            features,
            ioctls: 0,
        };
        // SAFETY: reads and writes one structure of this request's type.
        let done = unsafe { ioctl_with_mut_ref(&self.0, UFFDIO_API(), &mut request) };
        done_or_error(done)
    }

    /// From now on the kernel asks for pages of this private anonymous memory that are touched and not there.
    pub fn register(&self, address: usize, length: usize) -> Result<(), UserFaultError> {
        let mut request = RegisterRequest {
            range: range(address, length),
            mode: UFFDIO_REGISTER_MODE_MISSING,
            ioctls: 0,
        };
        // SAFETY: reads and writes one structure of this request's type; memory that is missing changes no content, it
        // is waited for.
        let done = unsafe { ioctl_with_mut_ref(&self.0, UFFDIO_REGISTER(), &mut request) };
        done_or_error(done).map_err(UserFaultError::Register)
    }

    /// What has been told since the last time, without waiting; nothing when `told` stays as it is.
    pub fn read(&self, told: &mut Vec<Told>) -> io::Result<()> {
        let mut bytes = [0; MESSAGES * size_of::<Message>()];
        let count = match io::Read::read(&mut &self.0, &mut bytes) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
            Err(error) => return Err(error),
        };
        for bytes in bytes[..count].chunks_exact(size_of::<Message>()) {
            let message = Message::read_from_bytes(bytes).expect("chunks of its size");
            let address = |word: u64| usize::try_from(word).expect("64-bit host");
            let [first, second, _] = message.words;
            match message.event {
                // Flags come first.
                UFFD_EVENT_PAGEFAULT if first & writes::UFFD_PAGEFAULT_FLAG_WP != 0 => {
                    told.push(Told::Written(address(second)));
                }
                UFFD_EVENT_PAGEFAULT => told.push(Told::Missing(address(second))),
                UFFD_EVENT_REMOVE => told.push(Told::Removed(address(first), address(second))),
                _ => {}
            }
        }
        Ok(())
    }

    /// Puts pages where they are missing, and wakes who waits for them; returns the bytes that were put before one was
    /// not missing. It is an error if none was: `EEXIST` when the first page is there, `ENOENT` when nothing registered is
    /// there, `EAGAIN` when something about the memory has to be read first.
    pub fn copy(&self, address: usize, bytes: &[u8]) -> io::Result<usize> {
        let mut request = CopyRequest {
            to: address as u64,
            from: bytes.as_ptr() as u64,
            length: bytes.len() as u64,
            mode: 0,
            copied: 0,
        };
        // SAFETY: reads and writes one structure of this request's type; the kernel reads `bytes`, and writes pages of
        // registered memory only, which had no content before.
        let done = unsafe { ioctl_with_mut_ref(&self.0, UFFDIO_COPY(), &mut request) };
        put(done, request.copied)
    }

    /// The same with pages of zeroes.
    pub fn zero(&self, address: usize, length: usize) -> io::Result<usize> {
        let mut request = ZeroRequest {
            range: range(address, length),
            mode: 0,
            zeroed: 0,
        };
        // SAFETY: as in `copy`.
        let done = unsafe { ioctl_with_mut_ref(&self.0, UFFDIO_ZEROPAGE(), &mut request) };
        put(done, request.zeroed)
    }

    /// Has whoever waits for a page look again.
    pub fn wake(&self, address: usize, length: usize) -> io::Result<()> {
        // SAFETY: reads one structure of this request's type.
        let done = unsafe { ioctl_with_ref(&self.0, UFFDIO_WAKE(), &range(address, length)) };
        done_or_error(done)
    }
}

impl AsFd for UserFault {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn range(address: usize, length: usize) -> Range {
    Range {
        start: address as u64,
        length: length as u64,
    }
}

fn own(fd: RawFd) -> io::Result<File> {
    done_or_error(fd)?;
    // SAFETY: the kernel has just made it, for nobody else.
    Ok(unsafe { File::from_raw_fd(fd) })
}

fn done_or_error(result: i32) -> io::Result<()> {
    match result {
        ..0 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// A request that did a part of its work ends with `EAGAIN`, and tells how much.
fn put(result: i32, bytes: i64) -> io::Result<usize> {
    match usize::try_from(bytes) {
        Ok(bytes) if bytes > 0 => Ok(bytes),
        _ => done_or_error(result).map(|()| 0),
    }
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A tap interface with virtio headers. Linux, `Documentation/networking/tuntap.rst` and `linux/if_tun.h`.
#![expect(
    unsafe_code,
    reason = "tun ioctls, writev from guest pages and readv to them"
)]

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::marker::PhantomData;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_UFO, VIRTIO_NET_F_GUEST_USO4,
    VIRTIO_NET_F_GUEST_USO6,
};

use crate::virtio::GuestBuffers;

/// Bytes of `struct virtio_net_hdr_v1` before each packet, VIRTIO 1.2 §5.1.6: its `num_buffers` is always there.
pub const HEADER_BYTES: usize = 12;
/// Pieces of a packet that are written without a copy: a header, and 17 pages of data in either half.
const PIECES_MAX: usize = 36;
/// Pieces of guest memory that a packet is read into: 64 KiB in buffers of 1500 bytes, and some that cross regions.
const ROOM_PIECES_MAX: usize = 60;
const NO_PIECE: libc::iovec = libc::iovec {
    iov_base: std::ptr::null_mut(),
    iov_len: 0,
};

const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNGETIFF: libc::c_ulong = 0x8004_54d2;
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;
const TUNSETQUEUE: libc::c_ulong = 0x4004_54d9;

/// What every tap of ours is.
const TAP_FLAGS: i32 = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
/// `IFF_ATTACH_QUEUE` and `IFF_DETACH_QUEUE`.
const ATTACH_QUEUE: i16 = 0x0200;
const DETACH_QUEUE: i16 = 0x0400;

/// The kernel may leave checksums to the guest.
const TUN_F_CSUM: u32 = 0x01;
/// Large TCP segments over IPv4, IPv6, with ECN; UDP fragmentation.
const TUN_F_TSO4: u32 = 0x02;
const TUN_F_TSO6: u32 = 0x04;
const TUN_F_TSO_ECN: u32 = 0x08;
const TUN_F_UFO: u32 = 0x10;
/// Large UDP segments over IPv4 and IPv6, since Linux 6.2.
const TUN_F_USO4: u32 = 0x20;
const TUN_F_USO6: u32 = 0x40;

/// Why a tap cannot be used. All of them are before the guest's start, and the operator's to mend.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// Longer than the kernel's 15 bytes, empty, or with a zero or a slash in it.
    #[error("tap name {name:?} is not an interface name")]
    Name {
        /// What was given.
        name: String,
    },
    /// No such device, or no permission.
    #[error("open /dev/net/tun")]
    Device(#[source] io::Error),
    /// Another machine's, most often.
    #[error(
        "tap {name} is in use by another process: end that, or give this card a tap of its own"
    )]
    Busy {
        /// The interface.
        name: String,
    },
    /// Made for another user, or not there, and only root may make one.
    #[error(
        "tap {name} is not this user's, or there is none: make it as root, with `ip tuntap add {name} mode tap user NAME`"
    )]
    NotAllowed {
        /// The interface.
        name: String,
    },
    /// As a bridge or a network card of the host.
    #[error(
        "{name} is an interface of the host, but no tap: name a tap, or none that exists to have it made"
    )]
    NoTap {
        /// The interface.
        name: String,
    },
    /// Whatever else the kernel says.
    #[error("attach to tap {name}")]
    Attach {
        /// The interface.
        name: String,
        /// Why.
        source: io::Error,
    },
    /// Made for one queue.
    #[error(
        "tap {name} has one queue, {count} are wanted: make it with `multi_queue`, or say queues=1"
    )]
    SingleQueue {
        /// The interface.
        name: String,
        /// Queue pairs that the card has.
        count: u16,
    },
    /// A descriptor that is not a tap with virtio headers and without packet information.
    #[error("descriptor of tap {name} is not a tap with IFF_VNET_HDR and IFF_NO_PI")]
    Kind {
        /// The interface.
        name: String,
    },
    /// A setting that the kernel refuses.
    #[error("tap {name}: {what}")]
    Set {
        /// The interface.
        name: String,
        /// What was set.
        what: &'static str,
        /// Why not.
        source: io::Error,
    },
}

/// One queue of a tap interface, attached (kernel `Documentation/networking/tuntap.rst`). Non-blocking; packets have the
/// header of VIRTIO 1.2 §5.1.6. The interface outlives it unless this made it.
#[derive(Debug)]
pub struct Tap {
    file: File,
    /// Whether packets come to this queue; true but for queues that wait to be used.
    attached: AtomicBool,
    ufo: bool,
    uso: bool,
    /// No tap at all, see [`Tap::stand_in`].
    #[cfg(feature = "testing")]
    stands_in: bool,
}

/// Where the next packet goes: some bytes of ours first, then pieces of guest memory, one after the other.
pub(super) struct Room<'a> {
    /// With a place for what does not fit.
    pieces: [libc::iovec; ROOM_PIECES_MAX + 2],
    count: usize,
    bytes: u64,
    memory: PhantomData<&'a mut [u8]>,
}

impl<'a> Room<'a> {
    /// For the first bytes of the packet.
    pub(super) fn new(head: &'a mut [u8]) -> Self {
        let mut room = Self {
            pieces: [NO_PIECE; ROOM_PIECES_MAX + 2],
            count: 0,
            bytes: 0,
            memory: PhantomData,
        };
        room.push(head.as_mut_ptr(), head.len());
        room
    }

    /// For those that follow. Not all of it is taken when it is in very many pieces, and then nothing after it.
    pub(super) fn add(&mut self, buffers: GuestBuffers<'a>) {
        buffers.each_host_range(|start, size| {
            if self.count <= ROOM_PIECES_MAX {
                self.push(start, size);
            }
        });
    }

    /// How large a packet it is for.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    fn push(&mut self, start: *mut u8, size: usize) {
        self.pieces[self.count] = libc::iovec {
            iov_base: start.cast(),
            iov_len: size,
        };
        self.count += 1;
        self.bytes += size as u64;
    }
}

/// `struct ifreq` with a flags member.
#[repr(C)]
struct Request {
    name: [u8; libc::IFNAMSIZ],
    flags: i16,
    _rest: [u8; 22],
}

impl Request {
    fn new(name: &str, flags: i32) -> Option<Self> {
        let mut request = Self {
            name: [0; libc::IFNAMSIZ],
            flags: i16::try_from(flags).ok()?,
            _rest: [0; 22],
        };
        let fits = (1..libc::IFNAMSIZ).contains(&name.len());
        if !fits || name.bytes().any(|byte| byte == 0 || byte == b'/') {
            return None;
        }
        request.name[..name.len()].copy_from_slice(name.as_bytes());
        Some(request)
    }
}

impl Tap {
    /// Attaches to the interface `name`, which is made (and goes with the process) when it does not exist.
    pub fn open(name: &str) -> Result<Self, TapError> {
        let file = match attach(name, TAP_FLAGS) {
            // It was made for several queues; one of them is enough.
            Err(AttachError::Attach(error)) if error.raw_os_error() == Some(libc::EINVAL) => {
                attach(name, TAP_FLAGS | libc::IFF_MULTI_QUEUE)
            }
            other => other,
        };
        Self::set_up(file.map_err(|error| error.of(name))?, name)
    }

    /// Attaches `count` queues to the interface `name`, which is made when it does not exist. What comes to the
    /// interface is spread over the queues that are attached.
    pub fn open_queues(name: &str, count: u16) -> Result<Vec<Self>, TapError> {
        if count == 1 {
            return Ok(vec![Self::open(name)?]);
        }
        let one = |_| match attach(name, TAP_FLAGS | libc::IFF_MULTI_QUEUE) {
            Ok(file) => Self::set_up(file, name),
            Err(AttachError::Attach(error))
                if error.raw_os_error() == Some(libc::EINVAL) && !is_no_tap(name) =>
            {
                Err(TapError::SingleQueue {
                    name: name.to_owned(),
                    count,
                })
            }
            Err(error) => Err(error.of(name)),
        };
        (0..count).map(one).collect()
    }

    /// Takes a descriptor that somebody else attached; `name` is for messages.
    pub fn from_file(file: File, name: &str) -> Result<Self, TapError> {
        let kind = || TapError::Kind {
            name: name.to_owned(),
        };
        let mut request = Request::new("?", 0).ok_or_else(kind)?;
        ioctl_request(&file, TUNGETIFF, &mut request).map_err(|_| kind())?;
        if i32::from(request.flags) & TAP_FLAGS != TAP_FLAGS {
            return Err(kind());
        }
        rustix::io::ioctl_fionbio(&file, true).map_err(|errno| TapError::Set {
            name: name.to_owned(),
            what: "make it non-blocking",
            source: errno.into(),
        })?;
        let tap = Self::set_up(file, name)?;
        // A queue that waits to be used, as the card's former process has left it: to detach it again is an error.
        let waits = request.flags & DETACH_QUEUE != 0;
        tap.attached.store(!waits, Ordering::Release);
        Ok(tap)
    }

    fn set_up(file: File, name: &str) -> Result<Self, TapError> {
        let fail = |what| {
            move |source| TapError::Set {
                name: name.to_owned(),
                what,
                source,
            }
        };
        let size = i32::try_from(HEADER_BYTES).expect("12");
        // SAFETY: an open descriptor; the kernel reads one int from the pointer.
        let result = unsafe { libc::ioctl(file.as_raw_fd(), TUNSETVNETHDRSZ, &raw const size) };
        check(result).map_err(fail("set the header size"))?;
        let mut tap = Self {
            file,
            attached: AtomicBool::new(true),
            ufo: true,
            uso: true,
            #[cfg(feature = "testing")]
            stands_in: false,
        };
        let most = TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN;
        tap.ufo = tap.set_offloads(most | TUN_F_UFO).is_ok();
        tap.uso = tap.set_offloads(most | TUN_F_USO4 | TUN_F_USO6).is_ok();
        tap.set_offloads(most).map_err(fail("enable offloads"))?;
        tap.set_offloads(0).map_err(fail("disable offloads"))?;
        Ok(tap)
    }

    /// A socket in a tap's place, which knows of packets but of no settings. For fuzz targets.
    #[cfg(feature = "testing")]
    pub fn stand_in(socket: std::os::unix::net::UnixDatagram) -> Self {
        Self {
            file: File::from(std::os::fd::OwnedFd::from(socket)),
            attached: AtomicBool::new(true),
            ufo: false,
            uso: false,
            stands_in: true,
        }
    }

    /// Takes the queue out of those that packets are spread over, or puts it back. Only for taps with several.
    pub(super) fn set_attached(&self, attached: bool) -> io::Result<()> {
        if self.attached.load(Ordering::Acquire) == attached {
            return Ok(());
        }
        let mut request = Request {
            name: [0; libc::IFNAMSIZ],
            flags: if attached { ATTACH_QUEUE } else { DETACH_QUEUE },
            _rest: [0; 22],
        };
        ioctl_request(&self.file, TUNSETQUEUE, &mut request)?;
        self.attached.store(attached, Ordering::Release);
        Ok(())
    }

    /// The tap's descriptor, which goes on being attached; for another process's [`Tap::from_file`].
    pub fn into_file(self) -> File {
        self.file
    }

    /// Another handle of the descriptor, of the same queue.
    pub fn try_clone(&self) -> io::Result<OwnedFd> {
        self.file.as_fd().try_clone_to_owned()
    }

    /// For a kernel thread that moves the packets itself.
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// Whether UDP fragmentation can be left to the kernel.
    pub(super) fn takes_ufo(&self) -> bool {
        self.ufo
    }

    /// Whether UDP segmentation can be left to the kernel.
    pub(super) fn takes_uso(&self) -> bool {
        self.uso
    }

    /// What the kernel may leave to the guest.
    pub(super) fn set_offloads(&self, bits: u32) -> io::Result<()> {
        #[cfg(feature = "testing")]
        if self.stands_in {
            return Ok(());
        }
        // SAFETY: an open descriptor; this ioctl takes its argument by value.
        let result = unsafe {
            libc::ioctl(
                self.file.as_raw_fd(),
                TUNSETOFFLOAD,
                libc::c_ulong::from(bits),
            )
        };
        check(result)
    }

    /// Reads one packet with its header into `room`, and what does not fit there into `spill`; returns its size.
    pub(super) fn read(&self, mut room: Room<'_>, spill: &mut [u8]) -> io::Result<usize> {
        room.push(spill.as_mut_ptr(), spill.len());
        let count = i32::try_from(room.count).expect("at most 62");
        // SAFETY: the first `count` pieces name mapped memory that the borrows in `room`, and `spill`, keep: bytes of
        // ours that nobody else uses, and guest RAM, which may change at any time and which nobody here has
        // references to.
        let size = unsafe { libc::readv(self.file.as_raw_fd(), room.pieces.as_ptr(), count) };
        usize::try_from(size).map_err(|_| io::Error::last_os_error())
    }

    /// Whether a write would go, after one that would not. If not, the descriptor becomes writable when one would.
    pub(super) fn takes_more(&self) -> bool {
        let mut event = [PollFd::new(&self.file, PollFlags::OUT)];
        // When it cannot be asked, the next write tells.
        poll(&mut event, Some(&Timespec::default())).map_or(true, |count| count > 0)
    }

    /// Writes one packet of our own with its header.
    pub(super) fn send(&self, packet: &[u8]) -> io::Result<()> {
        (&self.file).write(packet).map(drop)
    }

    /// Writes one packet with its header, from guest pages; through `spare` when it is in very many pieces.
    pub(super) fn write(&self, data: GuestBuffers<'_>, spare: &mut [u8]) -> io::Result<()> {
        let mut pieces = [NO_PIECE; PIECES_MAX];
        let mut count = 0;
        data.each_host_range(|start, size| {
            if let Some(piece) = pieces.get_mut(count) {
                piece.iov_base = start.cast();
                piece.iov_len = size;
            }
            count += 1;
        });
        if count > PIECES_MAX {
            let size = data.read(spare);
            pieces[0].iov_base = spare.as_mut_ptr().cast();
            pieces[0].iov_len = size;
            count = 1;
        }
        let count = i32::try_from(count).expect("at most 36");
        // SAFETY: the first `count` pieces name mapped memory: guest RAM that `data` holds, or `spare`. The kernel
        // only reads it; that the guest changes it meanwhile changes the packet and nothing else.
        let written = unsafe { libc::writev(self.file.as_raw_fd(), pieces.as_ptr(), count) };
        if written < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

/// The tap's offloads for what a driver accepted.
pub(super) fn offloads(features: u64) -> u32 {
    let table = [
        (VIRTIO_NET_F_GUEST_CSUM, TUN_F_CSUM),
        (VIRTIO_NET_F_GUEST_TSO4, TUN_F_TSO4),
        (VIRTIO_NET_F_GUEST_TSO6, TUN_F_TSO6),
        (VIRTIO_NET_F_GUEST_ECN, TUN_F_TSO_ECN),
        (VIRTIO_NET_F_GUEST_UFO, TUN_F_UFO),
        (VIRTIO_NET_F_GUEST_USO4, TUN_F_USO4),
        (VIRTIO_NET_F_GUEST_USO6, TUN_F_USO6),
    ];
    let bits: u32 = table
        .iter()
        .filter(|(feature, _)| features & 1 << feature != 0)
        .fold(0, |bits, (_, bit)| bits | bit);
    // Segments without checksums make no sense, and the kernel refuses them. §5.1.3.1 forbids a driver to ask.
    // Either both kinds of UDP segments or none: the kernel takes no other.
    let both = TUN_F_USO4 | TUN_F_USO6;
    let bits = if bits & both == both {
        bits
    } else {
        bits & !both
    };
    if bits & TUN_F_CSUM == 0 { 0 } else { bits }
}

enum AttachError {
    Name,
    Device(io::Error),
    Attach(io::Error),
}

impl AttachError {
    fn of(self, name: &str) -> TapError {
        let name = name.to_owned();
        match self {
            Self::Name => TapError::Name { name },
            Self::Device(source) => TapError::Device(source),
            Self::Attach(source) => match source.raw_os_error() {
                Some(libc::EBUSY) => TapError::Busy { name },
                Some(libc::EPERM) => TapError::NotAllowed { name },
                Some(libc::EINVAL) if is_no_tap(&name) => TapError::NoTap { name },
                _ => TapError::Attach { name, source },
            },
        }
    }
}

/// Whether an interface of that name is known to be something else. Of one that sysfs does not show, as of another
/// network namespace than its own, nothing is known.
fn is_no_tap(name: &str) -> bool {
    let interface = std::path::Path::new("/sys/class/net").join(name);
    interface.exists() && !interface.join("tun_flags").exists()
}

/// One more queue of the interface.
fn attach(name: &str, flags: i32) -> Result<File, AttachError> {
    let mut request = Request::new(name, flags).ok_or(AttachError::Name)?;
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")
        .map_err(AttachError::Device)?;
    ioctl_request(&file, TUNSETIFF, &mut request).map_err(AttachError::Attach)?;
    Ok(file)
}

fn ioctl_request(file: &File, number: libc::c_ulong, request: &mut Request) -> io::Result<()> {
    // SAFETY: an open descriptor; `request` is as large as the kernel's struct ifreq (40 bytes), which it reads
    // and writes.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), number, &raw mut *request) };
    check(result)
}

fn check(result: i32) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

const _: () = assert!(size_of::<Request>() == 40);

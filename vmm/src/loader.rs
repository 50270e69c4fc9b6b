// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Puts a kernel, its initial RAM disk and what they are told into guest memory; at start and at every reset.
//!
//! ```text
//! headers  what a file says, compared with its size and the guest's memory
//! source   a file as it is read into memory, or mapped
//! shared   memory that is the kernel's file, for machines that share its pages
//! lease    who writes to that file waits until they have their own
//! ```
//!
//! Not here: the bytes of what they are told (crate `atoll-firmware`), the registers (`vcpu/setup.rs`).

mod headers;
mod lease;
mod shared;
mod source;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use atoll_devices::memory::Ram;
use atoll_firmware::acpi::{self, Platform};
use atoll_firmware::boot::{self, Parameters};
use atoll_firmware::paging;
use atoll_vmm_protocol::spec::KernelSpec;
pub use headers::HeaderError;
use lease::Lease;
pub use lease::LeaseError;
use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::{BzImage, Elf, KernelLoader, KernelLoaderResult};
use shared::Shared;
use source::Source;
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryBackend};

use crate::board::Board;
use crate::layout;
use crate::vcpu::setup::Entry;

/// Offset of the 64-bit entry point in a loaded bzImage (kernel `Documentation/arch/x86/boot.rst`,
/// "64-bit Boot Protocol").
const ENTRY_64: u64 = 0x200;
/// `xloadflags`: the kernel has that entry point.
const XLF_KERNEL_64: u16 = 1;
/// First four bytes of an ELF file.
const ELF_MAGIC: [u8; 4] = *b"\x7fELF";
/// First version of the boot protocol with `xloadflags`.
const PROTOCOL_MIN: u16 = 0x020c;

/// Why the guest cannot be booted with these files.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A file cannot be opened or read.
    #[error("{what} {path}")]
    File {
        /// `kernel` or `initrd`.
        what: &'static str,
        /// From the spec.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// Something else than a kernel.
    #[error("kernel {path}: neither a bzImage with a 64-bit entry nor an ELF file with a PVH note")]
    NoKernel {
        /// From the spec.
        path: PathBuf,
    },
    /// The file and its headers, or they and the guest's memory, do not go together.
    #[error("kernel {path}")]
    Headers {
        /// From the spec.
        path: PathBuf,
        /// What is wrong.
        source: HeaderError,
    },
    /// The loader found something else damaged.
    #[error("kernel {path}: damaged: {reason}")]
    Kernel {
        /// From the spec.
        path: PathBuf,
        /// What the loader said, whose errors repeat their causes.
        reason: String,
    },
    /// The image says that it starts where there is no memory.
    #[error("kernel {path}: its entry {address:#x} is not in the guest's memory")]
    Entry {
        /// From the spec.
        path: PathBuf,
        /// From the image.
        address: u64,
    },
    /// Nobody would say when it is about to change.
    #[error("kernel {path} cannot be shared")]
    Shared {
        /// From the spec.
        path: PathBuf,
        /// Why.
        source: LeaseError,
    },
    /// There would be nothing to share.
    #[error("kernel {path}: only an uncompressed kernel, an ELF file (vmlinux), can be shared")]
    Compressed {
        /// From the spec.
        path: PathBuf,
    },
    /// No room for the initial RAM disk.
    #[error("initrd {path}")]
    Initrd {
        /// From the spec.
        path: PathBuf,
        /// The sizes.
        source: boot::NoRoom,
    },
    /// The command line is too long, or has a zero byte in it.
    #[error(
        "kernel command line of {bytes} bytes: this kernel takes {bytes_max}, without zero bytes"
    )]
    Cmdline {
        /// Its length.
        bytes: u64,
        /// The kernel's limit.
        bytes_max: u64,
    },
    /// Guest memory is smaller than what must be written into it.
    #[error("guest memory is too small to boot from")]
    Memory(#[source] vm_memory::GuestMemoryError),
}

/// The files of a boot, open, so that a reset needs no path.
#[derive(Debug)]
pub struct BootFiles {
    kernel: (PathBuf, File),
    initrd: Option<(PathBuf, File)>,
    cmdline: String,
    /// The kernel's pages are its file's, as long as nobody writes to that.
    shared: Option<Shared>,
}

/// What the kernel's image says about itself.
struct Image {
    entry: Entry,
    /// First address after the kernel, once it has unpacked itself.
    end: u64,
    /// End (exclusive) of the memory in which the initial RAM disk may be.
    initrd_ceiling: u64,
    cmdline_bytes_max: u64,
    setup_header: Option<Vec<u8>>,
}

impl BootFiles {
    /// Opens the files that the spec names.
    pub fn open(spec: &KernelSpec) -> Result<Self, LoadError> {
        Self::take(Self::files(spec)?.into(), spec)
    }

    /// Opens the same, in the order in which [`BootFiles::take`] takes them.
    pub fn files(spec: &KernelSpec) -> Result<Vec<OwnedFd>, LoadError> {
        let mut files = vec![open("kernel", &spec.image)?];
        if let Some(path) = &spec.initrd {
            files.push(open("initrd", path)?);
        }
        Ok(files)
    }

    /// Takes files that are open, here or in another process: the kernel's, then that of an initial RAM disk if the spec
    /// names one.
    pub fn take(mut files: VecDeque<OwnedFd>, spec: &KernelSpec) -> Result<Self, LoadError> {
        let mut next = |what, path: &Path| {
            let missing = || LoadError::File {
                what,
                path: path.to_owned(),
                source: io::ErrorKind::NotFound.into(),
            };
            let file = files.pop_front().ok_or_else(missing)?;
            Ok((path.to_owned(), File::from(file)))
        };
        Ok(Self {
            kernel: next("kernel", &spec.image)?,
            initrd: match &spec.initrd {
                Some(path) => Some(next("initrd", path)?),
                None => None,
            },
            cmdline: spec.cmdline.clone(),
            shared: None,
        })
    }

    /// From the next load on the kernel's whole pages are its file's, until [`BootFiles::part`]. Only into RAM that is this
    /// machine's alone.
    pub fn share(&mut self) -> Result<(), LoadError> {
        let (path, file) = &self.kernel;
        let lease = Lease::take(path, file).map_err(|source| LoadError::Shared {
            path: path.clone(),
            source,
        })?;
        self.shared = Some(Shared {
            lease: Some(lease),
            mapped: Vec::new(),
        });
        Ok(())
    }

    /// The same without a lease: for tests, whose file nobody else has.
    #[cfg(any(test, feature = "testing"))]
    pub(crate) fn share_alone(&mut self) {
        self.shared = Some(Shared {
            lease: None,
            mapped: Vec::new(),
        });
    }

    /// The next load copies, as without [`BootFiles::share`].
    pub fn copy(&mut self) {
        self.shared = None;
    }

    /// Calls `wanted` once, on a thread of its own, when somebody wants to write to a kernel that is shared.
    pub fn watch(&mut self, wanted: impl FnOnce() + Send + 'static) -> io::Result<()> {
        let shared = self.shared.as_mut();
        match shared.and_then(|shared| shared.lease.as_mut()) {
            Some(lease) => lease.watch(wanted),
            None => Ok(()),
        }
    }

    /// Where guest memory is the kernel's file: addresses of this process.
    #[must_use]
    pub fn mapped(&self) -> &[Range<usize>] {
        self.shared.as_ref().map_or(&[], |shared| &shared.mapped)
    }

    /// Whether guest memory is, or may be after a reset.
    #[must_use]
    pub fn is_shared(&self) -> bool {
        self.shared.is_some()
    }

    /// Makes guest memory the machine's own, with the same content, for good; returns how much of it. Nothing may write to
    /// it meanwhile. After an error it is as before.
    pub fn part(&mut self) -> io::Result<usize> {
        let Some(shared) = &mut self.shared else {
            return Ok(0);
        };
        let bytes = shared.mapped.iter().map(Range::len).sum();
        shared.mapped.iter().try_for_each(shared::part)?;
        self.shared = None;
        Ok(bytes)
    }

    /// Writes everything that must be in memory before the first instruction, and says where that is.
    pub fn load(
        &mut self,
        memory: &Ram,
        memory_bytes: u64,
        board: &Board,
        platform: &Platform,
    ) -> Result<Entry, LoadError> {
        let image = self.load_kernel(memory, memory_bytes.min(board.low_ram_end))?;
        let (Entry::Pvh { address } | Entry::Long { address }) = image.entry;
        if !memory.address_in_range(GuestAddress(address)) {
            return Err(LoadError::Entry {
                path: self.kernel.0.clone(),
                address,
            });
        }
        let initrd = self.load_initrd(memory, &image)?;
        let cmdline_size = self.load_cmdline(memory, &image)?;
        let map = board.memory_map(memory_bytes);
        let parameters = Parameters {
            memory: &map,
            cmdline_address: layout::CMDLINE,
            cmdline_size,
            initrd,
            rsdp_address: layout::ACPI,
        };
        let tables = acpi::tables(platform);
        let (reset_port, reset_value) = platform.reset_register();
        let reset = boot::reset_code(reset_port, reset_value).to_vec();
        let mut pieces = vec![
            (layout::ACPI, tables),
            (layout::RESET_VECTOR, reset),
            (layout::IDT, vec![0; 8]),
        ];
        match &image.setup_header {
            Some(header) => pieces.extend([
                (layout::GDT, descriptors(paging::GDT)),
                (
                    layout::PAGE_TABLES,
                    paging::identity_map(layout::PAGE_TABLES),
                ),
                (layout::ZERO_PAGE, boot::zero_page(header, &parameters)),
            ]),
            None => pieces.extend([
                (layout::GDT, descriptors(paging::GDT_PVH)),
                (
                    layout::PVH_START_INFO,
                    boot::pvh_start_info(layout::PVH_START_INFO, &parameters),
                ),
            ]),
        }
        for (address, bytes) in pieces {
            memory
                .write_slice(&bytes, GuestAddress(address))
                .map_err(LoadError::Memory)?;
        }
        Ok(image.entry)
    }

    fn load_kernel(&mut self, memory: &Ram, low_end: u64) -> Result<Image, LoadError> {
        let (path, file) = &self.kernel;
        let unreadable = |source| LoadError::File {
            what: "kernel",
            path: path.clone(),
            source,
        };
        let mut magic = [0; 4];
        let read = file.read_at(&mut magic, 0).map_err(unreadable)?;
        let mut source = match &mut self.shared {
            None => Source::of(file),
            Some(_) if magic != ELF_MAGIC => {
                return Err(LoadError::Compressed { path: path.clone() });
            }
            Some(shared) => {
                shared.mapped.clear();
                Source::mapping(file, &mut shared.mapped)
            }
        }
        .map_err(unreadable)?;
        let start = Some(GuestAddress(layout::KERNEL));
        let damaged = |error: linux_loader::loader::Error| LoadError::Kernel {
            path: path.clone(),
            reason: error.to_string(),
        };
        let headers = |source| LoadError::Headers {
            path: path.clone(),
            source,
        };
        let image = if read == magic.len() && magic == ELF_MAGIC {
            headers::check_elf(file, memory).map_err(headers)?;
            pvh_image(
                &Elf::load(memory, None, &mut source, start).map_err(damaged)?,
                low_end,
            )
        } else if headers::check_bzimage(file).map_err(headers)? {
            match BzImage::load(memory, start, &mut source, None) {
                Ok(loaded) => linux_image(&loaded, low_end),
                Err(linux_loader::loader::Error::Bzimage(
                    linux_loader::loader::bzimage::Error::InvalidBzImage
                    | linux_loader::loader::bzimage::Error::ReadBzImageHeader
                    | linux_loader::loader::bzimage::Error::Underflow,
                )) => None,
                Err(error) => return Err(damaged(error)),
            }
        } else {
            None
        };
        let image = image.ok_or_else(|| LoadError::NoKernel { path: path.clone() })?;
        // A compressed kernel unpacks itself into more memory than it was loaded to.
        let (start, bytes) = (layout::KERNEL, image.end.saturating_sub(layout::KERNEL));
        headers::check_fits(memory, start, bytes).map_err(headers)?;
        Ok(image)
    }

    fn load_initrd(&self, memory: &Ram, image: &Image) -> Result<Option<(u64, u64)>, LoadError> {
        let Some((path, file)) = &self.initrd else {
            return Ok(None);
        };
        let unreadable = |source| LoadError::File {
            what: "initrd",
            path: path.clone(),
            source,
        };
        let mut source = Source::of(file).map_err(unreadable)?;
        let size = source.seek(SeekFrom::End(0)).map_err(unreadable)?;
        source.rewind().map_err(unreadable)?;
        let address =
            boot::initrd_address(size, image.end, image.initrd_ceiling).map_err(|source| {
                LoadError::Initrd {
                    path: path.clone(),
                    source,
                }
            })?;
        let length = usize::try_from(size).expect("it fits into guest memory");
        memory
            .read_exact_volatile_from(GuestAddress(address), &mut source, length)
            .map_err(|error| unreadable(io::Error::other(error)))?;
        Ok(Some((address, size)))
    }

    fn load_cmdline(&self, memory: &Ram, image: &Image) -> Result<u32, LoadError> {
        let bytes = self.cmdline.len() as u64;
        if bytes > image.cmdline_bytes_max || self.cmdline.contains('\0') {
            return Err(LoadError::Cmdline {
                bytes,
                bytes_max: image.cmdline_bytes_max,
            });
        }
        let mut text = self.cmdline.clone().into_bytes();
        text.push(0);
        memory
            .write_slice(&text, GuestAddress(layout::CMDLINE))
            .map_err(LoadError::Memory)?;
        Ok(u32::try_from(bytes).expect("at most 64 KiB"))
    }
}

fn open(what: &'static str, path: &Path) -> Result<OwnedFd, LoadError> {
    let failed = |source| LoadError::File {
        what,
        path: path.to_owned(),
        source,
    };
    // Looked at before opening: opening a FIFO would wait for its other end.
    let kind = std::fs::metadata(path).map_err(failed)?.file_type();
    if kind.is_dir() {
        return Err(failed(io::ErrorKind::IsADirectory.into()));
    }
    if !kind.is_file() {
        return Err(failed(io::Error::other("is not a file")));
    }
    Ok(File::open(path).map_err(failed)?.into())
}

fn descriptors(table: [u64; 4]) -> Vec<u8> {
    table.into_iter().flat_map(u64::to_le_bytes).collect()
}

fn pvh_image(loaded: &KernelLoaderResult, low_end: u64) -> Option<Image> {
    let PvhBootCapability::PvhEntryPresent(address) = loaded.pvh_boot_cap else {
        return None;
    };
    Some(Image {
        entry: Entry::Pvh { address: address.0 },
        end: loaded.kernel_end,
        initrd_ceiling: low_end,
        cmdline_bytes_max: layout::CMDLINE_BYTES_MAX - 1,
        setup_header: None,
    })
}

fn linux_image(loaded: &KernelLoaderResult, low_end: u64) -> Option<Image> {
    let header = loaded.setup_header?;
    if header.version < PROTOCOL_MIN || header.xloadflags & XLF_KERNEL_64 == 0 {
        return None;
    }
    // The kernel unpacks itself where it was loaded or where it prefers to be, whichever is higher.
    let start = loaded.kernel_load.0.max(header.pref_address);
    let unpacked = start.saturating_add(header.init_size.into());
    Some(Image {
        entry: Entry::Long {
            address: loaded.kernel_load.0 + ENTRY_64,
        },
        end: unpacked.max(loaded.kernel_end),
        initrd_ceiling: low_end.min(u64::from(header.initrd_addr_max) + 1),
        cmdline_bytes_max: u64::from(header.cmdline_size).min(layout::CMDLINE_BYTES_MAX - 1),
        setup_header: Some(header.as_slice().to_vec()),
    })
}

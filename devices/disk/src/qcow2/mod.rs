// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A disk in a qcow2 image: grows with its content, may be a difference to other images. What is made here is version 3;
//! older images (version 2) work, too, but have no cheap zeroes.
//!
//! The tables are crate `imago`'s work. Ours: what is accepted (`header`), that files behind an image are those
//! that the spec names and no others, threads for its blocking calls, and clusters that zstd compressed (`zstd`).
//!
//! Durability: imago holds changed tables in memory and writes them in an order that never points to what is not
//! there; a guest's flush writes them all. A process that is killed between leaves at worst clusters that nobody
//! refers to (`qemu-img check` calls them leaked).
#![expect(
    unsafe_code,
    reason = "ranges of guest memory are handed to imago as volatile slices"
)]

mod create;
mod header;
mod storage;
mod zstd;

pub use create::{CreateError, Qcow2Options, ResizeImageError, create, resize};
pub use header::Qcow2Error;

use std::fs::File;
use std::io;
use std::sync::{Arc, PoisonError, RwLock};

use imago::format::PreallocateMode;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{
    DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder, Mapping, StorageExt,
    StorageOpenOptions,
};
use vm_memory::VolatileSlice;

use self::header::{Backing, HEAD_BYTES, Header};
use self::storage::ImageStorage;
use self::zstd::ZstdImage;
use crate::alignment::{AlignedBuffer, Alignment};
use crate::backend::{
    Abilities, BlockBackend, BlockQueue, Geometry, Operation, Request, ResizeError, SharedGeometry,
    Space,
};
use crate::open::{Cache, Format, ImageFile, OpenError, OpenOptions};
use crate::pool::Pooled;
use crate::segments::Segments;

type Image = FormatAccess<ImageStorage>;

/// An open qcow2 disk.
pub struct Qcow2Backend {
    image: Arc<Shared>,
    pool: Pooled,
    abilities: Abilities,
}

struct Shared {
    /// Shared by everything that reads and writes; alone for what zeroes or frees clusters, since imago forbids others
    /// to hold a mapping then. First in the lock order; imago's own locks follow.
    image: RwLock<Image>,
    geometry: Arc<SharedGeometry>,
    cache: Cache,
    write_zeroes: bool,
    cluster_bytes: u64,
    /// Everything that changes the image is alone, since its zstd-compressed clusters are read past imago's locks.
    changes_alone: bool,
}

impl Qcow2Backend {
    pub(crate) fn new(
        image: ImageFile,
        backing: Vec<(ImageFile, Format)>,
        options: OpenOptions,
    ) -> Result<Self, OpenError> {
        let path = image.path.clone();
        let failed = |error| OpenError::Qcow2 {
            path: path.clone(),
            source: Qcow2Error::Tables(error),
        };
        let header = read_header(&image)?;
        let direct = options.cache.is_direct();
        let block_bytes = match direct {
            true => Alignment::direct(&image.file).map_err(failed)?.offset_bytes,
            false => 512,
        };
        let below = open_chain(&image, &header, backing, direct)?;
        let image = open_image(image, below, options, &header)?;
        let geometry = Arc::new(SharedGeometry::new(Geometry {
            size_bytes: header.size_bytes,
            read_only: options.read_only,
        }));
        // imago 0.2.6 computes a negative length, and panics, where a part of an image is zeroed that is smaller
        // than one cluster. There the guest writes its zeroes itself.
        let whole_cluster = header.size_bytes >= header.cluster_bytes.into();
        let write_zeroes = header.has_zero_clusters && whole_cluster;
        let image = Arc::new(Shared {
            image: RwLock::new(image),
            geometry: geometry.clone(),
            cache: options.cache,
            write_zeroes,
            cluster_bytes: header.cluster_bytes.into(),
            changes_alone: header.zstd,
        });
        let serving = image.clone();
        let transfer = Arc::new(move |request: &Request| serving.transfer(request));
        Ok(Self {
            image,
            pool: Pooled::new(geometry, transfer),
            abilities: Abilities {
                block_bytes,
                discard_bytes: options.discard.then_some(header.cluster_bytes),
                write_zeroes,
                ..Abilities::default()
            },
        })
    }
}

impl BlockBackend for Qcow2Backend {
    fn geometry(&self) -> Geometry {
        self.image.geometry.get()
    }

    fn abilities(&self) -> Abilities {
        self.abilities
    }

    fn resize(&self, size_bytes: u64) -> Result<(), ResizeError> {
        let geometry = &self.image.geometry;
        geometry.check_growth(size_bytes, self.abilities.block_bytes)?;
        let image = self.image.image.read();
        let image = image.unwrap_or_else(PoisonError::into_inner);
        image.resize_grow(size_bytes, PreallocateMode::None)?;
        geometry.set_size(size_bytes);
        Ok(())
    }

    fn open_queue(&self, depth: u16) -> io::Result<Box<dyn BlockQueue>> {
        Ok(Box::new(self.pool.queue(depth)?))
    }
}

impl Shared {
    /// Carries out one request that fits the disk.
    fn transfer(&self, request: &Request) -> io::Result<()> {
        let at = request.offset_bytes;
        // A poisoned lock: a thread panicked, which ends the process; nothing is half-changed here.
        let image = || self.image.read().unwrap_or_else(PoisonError::into_inner);
        let alone = || self.image.write().unwrap_or_else(PoisonError::into_inner);
        match request.operation {
            Operation::Read => {
                let slices = slices(&request.segments);
                let (vector, _guard) = IoVectorMut::from_volatile_slice(&slices);
                return image().readv(vector, at);
            }
            Operation::Flush => return self.flush(&image()),
            Operation::Write => {
                let slices = slices(&request.segments);
                let (vector, _guard) = IoVector::from_volatile_slice(&slices);
                match self.changes_alone {
                    true => alone().writev(vector, at)?,
                    false => image().writev(vector, at)?,
                }
            }
            // Advice: what the format cannot is left.
            Operation::Discard { length_bytes } => {
                let mut image = alone();
                self.empty(&image, at, length_bytes);
                let _ = image.discard_to_any(at, length_bytes);
            }
            Operation::WriteZeroes { .. } if !self.write_zeroes => {
                return Err(io::ErrorKind::Unsupported.into());
            }
            // Alone also where nothing is freed: imago 0.2.6 looks whether the rest of a cluster is zero before it
            // makes the whole cluster zero, and forgets what another queue wrote to the rest in between.
            Operation::WriteZeroes {
                length_bytes,
                space,
            } => match space {
                Space::Free => {
                    let mut image = alone();
                    self.empty(&image, at, length_bytes);
                    image.discard_to_zero(at, length_bytes)?;
                }
                Space::Keep => alone().write_zeroes(at, length_bytes)?,
            },
        }
        match self.cache.is_synchronous() {
            true => self.flush(&image()),
            false => Ok(()),
        }
    }

    /// Gives the file's space back under whole clusters that are about to be freed: imago only marks them free, for
    /// data that comes later. Before they are, since then they may be anybody's; a crash in between leaves zeroes, which
    /// is what was asked for, or as good as anything. The caller is alone, so nobody writes there.
    fn empty(&self, image: &Image, offset_bytes: u64, length_bytes: u64) {
        let mut at = offset_bytes.next_multiple_of(self.cluster_bytes);
        let end = offset_bytes + length_bytes;
        let end = end - end % self.cluster_bytes;
        while at < end {
            let Ok((mapping, length)) = image.get_mapping(at, end - at) else {
                return;
            };
            // What may be written in place is this image's, and nobody else refers to it.
            if let Mapping::Raw {
                storage,
                offset,
                writable: true,
                ..
            } = mapping
            {
                // A file system that cannot do this keeps the space.
                let _ = storage.discard(offset, length);
            }
            if length == 0 {
                return;
            }
            at += length;
        }
    }

    fn flush(&self, image: &Image) -> io::Result<()> {
        image.flush()?;
        match self.cache {
            Cache::Unsafe => Ok(()),
            _ => image.sync(),
        }
    }
}

fn slices(segments: &Segments) -> Vec<VolatileSlice<'_>> {
    let slice = |range: &libc::iovec| {
        // SAFETY: `Segments::push` promised that these bytes stay mapped and writable until the request completes,
        // and that they are only accessed by volatile copies or by the kernel.
        unsafe { VolatileSlice::new(range.iov_base.cast(), range.iov_len) }
    };
    segments.iovecs().iter().map(slice).collect()
}

fn read_header(image: &ImageFile) -> Result<Header, OpenError> {
    header_of(&image.file, image.size_bytes).map_err(|source| OpenError::Qcow2 {
        path: image.path.clone(),
        source,
    })
}

/// Size of the disk in an image that stands alone, by its header: locks nothing, so a machine may have it open. An
/// image that cannot be used, or is a difference to another one, is an error.
pub fn inspect(file: &File) -> Result<u64, Qcow2Error> {
    let file_bytes = file.metadata().map_err(Qcow2Error::Tables)?.len();
    let header = header_of(file, file_bytes)?;
    match header.backing {
        Some(Backing { name, .. }) => Err(Qcow2Error::UnnamedBacking { name }),
        None => Ok(header.size_bytes),
    }
}

fn header_of(file: &File, file_bytes: u64) -> Result<Header, Qcow2Error> {
    // Aligned for a file that is open for direct I/O; and so are the places of tables, but for small clusters.
    let mut head = AlignedBuffer::new(HEAD_BYTES, 4096);
    let count = read_at(file, 0, head.bytes()).map_err(Qcow2Error::Tables)?;
    let header = Header::parse(&head.bytes()[..count], file_bytes)?;
    let at = usize::try_from(header.refcount_offset % 4096).expect("below a page");
    let page = &mut head.bytes()[..4096];
    page.fill(0);
    read_at(file, header.refcount_offset - at as u64, page).map_err(Qcow2Error::Tables)?;
    let entry = page[at..].first_chunk().expect("tables begin at sectors");
    Header::check_refcounts(*entry)?;
    Ok(header)
}

/// Reads up to the end of the buffer or of the file; gives the number of bytes.
fn read_at(file: &File, offset: u64, bytes: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < bytes.len() {
        match rustix::io::pread(file, &mut bytes[filled..], offset + filled as u64) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(rustix::io::Errno::INTR) => {}
            // Direct I/O behind the unaligned end of a file.
            Err(rustix::io::Errno::INVAL) if filled > 0 => break,
            Err(error) => return Err(error.into()),
        }
    }
    Ok(filled)
}

/// The images behind `top`, as one: exactly those that the headers name, each of the format that the spec says.
fn open_chain(
    top: &ImageFile,
    header: &Header,
    backing: Vec<(ImageFile, Format)>,
    direct: bool,
) -> Result<Option<Image>, OpenError> {
    let (mut above, mut expected) = (top.path.clone(), header.backing.clone());
    let mut headers = Vec::new();
    for (image, format) in &backing {
        agree(expected.as_ref(), *format).map_err(|source| OpenError::Qcow2 {
            path: above,
            source,
        })?;
        above = image.path.clone();
        let header = match format {
            Format::Raw => None,
            Format::Qcow2 => Some(read_header(image)?),
        };
        expected = header.as_ref().and_then(|header| header.backing.clone());
        headers.push(header);
    }
    if let Some(Backing { name, .. }) = expected {
        return Err(OpenError::Qcow2 {
            path: above,
            source: Qcow2Error::UnnamedBacking { name },
        });
    }
    let cache = if direct {
        Cache::None
    } else {
        Cache::Writeback
    };
    let options = OpenOptions {
        read_only: true,
        cache,
        ..OpenOptions::default()
    };
    let mut below = None;
    for ((image, _), header) in backing.into_iter().zip(headers).rev() {
        below = Some(match header {
            None => open_raw(image, direct)?,
            Some(header) => open_image(image, below, options, &header)?,
        });
    }
    Ok(below)
}

/// Whether a header speaks of a backing file, of the format that the spec says.
fn agree(told: Option<&Backing>, named: Format) -> Result<(), Qcow2Error> {
    let told = told.ok_or(Qcow2Error::NoBacking)?;
    let named = named.name();
    match &told.format {
        Some(told) if told != named => Err(Qcow2Error::BackingFormat {
            told: told.clone(),
            named,
        }),
        _ => Ok(()),
    }
}

fn storage(file: File, direct: bool, write: bool, zstd: bool) -> io::Result<ImageStorage> {
    let options = StorageOpenOptions::new().direct(direct).write(write);
    ImageStorage::new(file, options, zstd)
}

fn open_image(
    image: ImageFile,
    below: Option<Image>,
    options: OpenOptions,
    header: &Header,
) -> Result<Image, OpenError> {
    let opened = || -> io::Result<Image> {
        let (direct, write) = (options.cache.is_direct(), !options.read_only);
        let again = image.file.try_clone()?;
        let qcow2 =
            Qcow2::<ImageStorage>::builder(storage(image.file, direct, write, header.zstd)?)
                .write(write)
                .backing(below)
                .data_file(None)
                .open(DenyImplicitOpenGate::default())?;
        if !header.zstd {
            return Ok(Image::new(qcow2));
        }
        let file = storage(again, direct, false, true)?;
        Ok(Image::new(ZstdImage::new(qcow2, file, header)?))
    };
    let path = image.path.clone();
    opened().map_err(|error| OpenError::Qcow2 {
        path,
        source: Qcow2Error::Tables(error),
    })
}

fn open_raw(image: ImageFile, direct: bool) -> Result<Image, OpenError> {
    let opened = storage(image.file, direct, false, false)
        .and_then(|file| Raw::builder(file).open(DenyImplicitOpenGate::default()));
    match opened {
        Ok(raw) => Ok(Image::new(raw)),
        Err(source) => Err(OpenError::Open {
            path: image.path,
            source,
        }),
    }
}

#[cfg(test)]
mod tests;

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A disk in a qcow2 image: grows with its content, may be a difference to other images. What is made here is version 3;
//! older images (version 2) work, too, but have no cheap zeroes.
//!
//! The tables are crate `imago`'s work. Ours: what is accepted (`header`), that files behind an image are those
//! that the spec names and no others, threads for its blocking calls, clusters that zstd compressed (`zstd`), and what
//! is left of an image when its process is killed (`image`, `storage`, `repair`), and whether its file is whole (`whole`).
//!
//! What a guest can rely on, by [`Cache`]:
//!
//! - The process is killed, at any moment: a sector holds what it held at the last flush that completed, or what was
//!   written to it since (a discard counts as a write of zeroes). In every mode; each write is a flush in the
//!   synchronous ones.
//! - The host crashes: the same, if its file system keeps what it has said is durable. Not with
//!   [`Cache::Unsafe`].
//! - In both cases the image keeps a mark ("dirty") that its reference counts are not to be relied on. Opening it for
//!   writing, here or by QEMU, makes them anew, with nothing lost and nothing leaked; for reading it is as good as any.
//!   An image of version 2 has no place for the mark: here its counts are checked whenever it is opened for writing,
//!   and what was leaked stays so; other programs need `qemu-img check -r all` first.
//! - An image that contradicts itself, whoever wrote it, is refused when it is opened, or a request on it fails.
//!
//! While no queue is open everything is in the file and the mark is gone: a paused machine's image is closed.

mod create;
mod header;
mod image;
mod repair;
mod storage;
mod tables;
mod whole;
mod zstd;

pub use create::{CreateError, Qcow2Options, ResizeImageError, create, resize};
pub use header::Qcow2Error;

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;

use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{
    DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder, Storage as _, StorageOpenOptions,
};

use self::header::{Backing, HEAD_BYTES, Header};
use self::image::{Nature, OpenImage};
use self::repair::{Difference, Mended};
use self::storage::{ImageStorage, Watch};
use self::zstd::ZstdImage;
use crate::alignment::{AlignedBuffer, Alignment};
use crate::backend::{
    Abilities, BlockBackend, BlockQueue, Geometry, Request, ResizeError, SharedGeometry,
};
use crate::open::{Cache, Format, ImageFile, OpenError, OpenOptions};
use crate::pool::{Pooled, calls_for};

type Image = FormatAccess<ImageStorage>;

/// An open qcow2 disk, locked by its files: while queues are open its reference counts are in memory, and the image
/// is marked as in use.
pub struct Qcow2Backend {
    image: Arc<OpenImage>,
    geometry: Arc<SharedGeometry>,
    pool: Pooled,
    is_synchronous: bool,
    abilities: Abilities,
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
        let mut header = read_header(&image)?;
        if !options.read_only {
            header = repaired(&image, header, options)?;
        }
        let direct = options.cache.is_direct();
        let block_bytes = match direct {
            true => Alignment::direct(&image.file).map_err(failed)?.offset_bytes,
            false => 512,
        };
        check_whole(&image, &header, options)?;
        let below = open_chain(&image, &header, backing, direct)?;
        // imago 0.2.6 computes a negative length, and panics, where a part of an image is zeroed that is smaller
        // than one cluster. There the guest writes its zeroes itself.
        let whole_cluster = header.size_bytes >= header.cluster_bytes.into();
        let nature = Nature {
            cache: options.cache,
            write_zeroes: header.has_zero_clusters && whole_cluster,
            changes_alone: header.zstd,
            cluster_bytes: header.cluster_bytes.into(),
        };
        let watch = watch(&header, options);
        let beside = image.file.try_clone();
        let beside = beside.and_then(|file| storage(file, options, &watch));
        let beside = beside.map_err(failed)?;
        beside.learn(&header).map_err(failed)?;
        let image = open_image(image, below, options, &header, watch.clone())?;
        let image = Arc::new(OpenImage::new(image, beside, watch, nature));
        let geometry = Arc::new(SharedGeometry::new(Geometry {
            size_bytes: header.size_bytes,
            read_only: options.read_only,
        }));
        let (serving, resting) = (image.clone(), image.clone());
        let transfer = Arc::new(move |request: &Request| serving.transfer(request));
        // If it fails, the mark stays, and the next one who opens the image repairs it.
        let rest = Arc::new(move || drop(resting.rest()));
        let calls = calls_for(options.cache);
        Ok(Self {
            image,
            geometry: geometry.clone(),
            pool: Pooled::new(calls, geometry, transfer, rest),
            is_synchronous: options.cache.is_synchronous(),
            abilities: Abilities {
                block_bytes,
                discard_bytes: options.discard.then_some(header.cluster_bytes),
                write_zeroes: nature.write_zeroes,
                ..Abilities::default()
            },
        })
    }
}

impl BlockBackend for Qcow2Backend {
    fn geometry(&self) -> Geometry {
        self.geometry.get()
    }

    fn abilities(&self) -> Abilities {
        self.abilities
    }

    fn is_synchronous(&self) -> bool {
        self.is_synchronous
    }

    fn resize(&self, size_bytes: u64) -> Result<(), ResizeError> {
        let block_bytes = self.abilities.block_bytes;
        self.geometry.check_growth(size_bytes, block_bytes)?;
        self.image.resize(size_bytes)?;
        self.geometry.set_size(size_bytes);
        Ok(())
    }

    fn open_queue(&self, depth: u16) -> io::Result<Box<dyn BlockQueue>> {
        Ok(Box::new(self.pool.queue(depth)?))
    }
}

fn read_header(image: &ImageFile) -> Result<Header, OpenError> {
    header_of(&image.file, image.size_bytes).map_err(|source| OpenError::Qcow2 {
        path: image.path.clone(),
        source,
    })
}

/// The header of an image that is to be written, after its reference counts were made right if they were not.
fn repaired(image: &ImageFile, header: Header, options: OpenOptions) -> Result<Header, OpenError> {
    let repair = || {
        let file = image.file.try_clone().map_err(Qcow2Error::Tables)?;
        let storage = storage(file, options, &watch(&header, options));
        let storage = storage.map_err(Qcow2Error::Tables)?;
        if let Some(mended) = repair::repair(&storage, &header)? {
            tell(&image.path, mended);
        }
        header_of(&image.file, storage.size().map_err(Qcow2Error::Tables)?)
    };
    repair().map_err(|source| OpenError::Qcow2 {
        path: image.path.clone(),
        source,
    })
}

/// See `whole`; of an image that nobody uses yet.
fn check_whole(image: &ImageFile, header: &Header, options: OpenOptions) -> Result<(), OpenError> {
    let read_only = OpenOptions {
        read_only: true,
        ..options
    };
    let file = image.file.try_clone();
    let storage = file.and_then(|file| storage(file, read_only, &Arc::default()));
    let checked = storage.map_err(Qcow2Error::Tables);
    let checked = checked.and_then(|storage| whole::check(&storage, header));
    checked.map_err(|source| OpenError::Qcow2 {
        path: image.path.clone(),
        source,
    })
}

/// One line in the log.
fn tell(path: &Path, mended: Mended) {
    let (path, why) = (path.display(), mended.why);
    match mended.found {
        Some(Difference { too_low, too_high }) => tracing::warn!(
            %path, why, too_low, too_high,
            "qcow2: the reference counts of the image were made anew"
        ),
        None => tracing::warn!(
            %path, why,
            "qcow2: the reference counts of the image were made anew"
        ),
    }
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
    if !header.dirty {
        Header::check_refcounts(*entry)?;
    }
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
            None => open_raw(image, options)?,
            Some(header) => {
                check_whole(&image, &header, options)?;
                let watch = watch(&header, options);
                open_image(image, below, options, &header, watch)?
            }
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

fn storage(file: File, options: OpenOptions, watch: &Arc<Watch>) -> io::Result<ImageStorage> {
    let opened = StorageOpenOptions::new()
        .direct(options.cache.is_direct())
        .write(!options.read_only);
    ImageStorage::new(file, opened, watch.clone())
}

fn watch(header: &Header, options: OpenOptions) -> Arc<Watch> {
    // Each write of a synchronous file is durable before the next one; of an unsafe one nothing ever is.
    let ordered = matches!(options.cache, Cache::Writeback | Cache::None);
    Arc::new(Watch::new(header, ordered && !options.read_only))
}

fn open_image(
    image: ImageFile,
    below: Option<Image>,
    options: OpenOptions,
    header: &Header,
    watch: Arc<Watch>,
) -> Result<Image, OpenError> {
    let opened = || -> io::Result<Image> {
        let again = image.file.try_clone()?;
        let qcow2 = Qcow2::<ImageStorage>::builder(storage(image.file, options, &watch)?)
            .write(!options.read_only)
            .backing(below)
            .data_file(None)
            .open(DenyImplicitOpenGate::default())?;
        if !header.zstd {
            return Ok(Image::new(qcow2));
        }
        let read_only = OpenOptions {
            read_only: true,
            ..options
        };
        let file = storage(again, read_only, &watch)?;
        Ok(Image::new(ZstdImage::new(qcow2, file, header)?))
    };
    let path = image.path.clone();
    opened().map_err(|error| OpenError::Qcow2 {
        path,
        source: Qcow2Error::Tables(error),
    })
}

fn open_raw(image: ImageFile, options: OpenOptions) -> Result<Image, OpenError> {
    let opened = storage(image.file, options, &Arc::default())
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

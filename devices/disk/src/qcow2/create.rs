// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Makes qcow2 images and changes the size of those that no machine has open. Called by whoever manages volumes.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use imago::qcow2::Qcow2;
use imago::{FormatCreateBuilder, StorageOpenOptions};

use crate::open::{Format, OpenError, OpenOptions, Source, open};

/// What a new image is like beside its size.
#[derive(Debug, Clone)]
pub struct Qcow2Options {
    /// A power of two, 512 bytes to 2 MiB; QEMU's default is 64 KiB.
    pub cluster_bytes: usize,
    /// What the image is a difference to: the name that its header will say, and that image's format.
    pub backing: Option<(String, Format)>,
}

impl Default for Qcow2Options {
    fn default() -> Self {
        Self {
            cluster_bytes: 64 << 10,
            backing: None,
        }
    }
}

/// Why there is no new image. Nothing is left at its path, but what was there before.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// No image can be like this.
    #[error(
        "disk {path}: {size_bytes} bytes in clusters of {cluster_bytes}: expected a multiple of 512 above 0, and a power of two from 512 to 2097152"
    )]
    Shape {
        /// The image.
        path: PathBuf,
        /// What was asked for.
        size_bytes: u64,
        /// What was asked for.
        cluster_bytes: usize,
    },
    /// The file system refused, or there is such a file.
    #[error("create disk {path}")]
    Io {
        /// The image.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Creates an image of `size_bytes` at a path where nothing is; leaves nothing there when it fails.
pub fn create(path: &Path, size_bytes: u64, options: &Qcow2Options) -> Result<(), CreateError> {
    let cluster_bytes = options.cluster_bytes;
    let sane = size_bytes > 0
        && size_bytes.is_multiple_of(512)
        && cluster_bytes.is_power_of_two()
        && (512..=2 << 20).contains(&cluster_bytes);
    if !sane {
        return Err(CreateError::Shape {
            path: path.to_owned(),
            size_bytes,
            cluster_bytes,
        });
    }
    let failed = |source| CreateError::Io {
        path: path.to_owned(),
        source,
    };
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(path)
        .map_err(failed)?;
    fill(file, size_bytes, options).map_err(|error| {
        let _ = std::fs::remove_file(path);
        failed(error)
    })
}

fn fill(file: File, size_bytes: u64, options: &Qcow2Options) -> io::Result<()> {
    let storage = StorageOpenOptions::new().write(true);
    let storage = imago::file::File::from_open_file(file, storage)?;
    let mut builder = Qcow2::<imago::file::File>::create_builder(storage)
        .size(size_bytes)
        .cluster_size(options.cluster_bytes);
    if let Some((name, format)) = &options.backing {
        builder = builder.backing(name.clone(), format.name().to_owned());
    }
    builder.create()
}

/// Grows an image that no machine has open. `source` names what is behind it, as for a machine.
pub fn resize(source: &Source, size_bytes: u64) -> Result<(), ResizeImageError> {
    open(source, OpenOptions::default())?.resize(size_bytes)?;
    Ok(())
}

/// Why [`resize`] has not changed an image's size.
#[derive(Debug, thiserror::Error)]
pub enum ResizeImageError {
    /// It cannot be opened for writing.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// It cannot have that size.
    #[error(transparent)]
    Resize(#[from] crate::backend::ResizeError),
}

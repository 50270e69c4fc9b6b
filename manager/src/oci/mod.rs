// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! OCI images: pulled from a registry or brought as an archive, their layers kept once and shared by all containers.
//!
//! ```text
//! registry ──► archive (a volume `vztmpl/NAME.tar`) ──► layers/DIFF_ID/…   unpacked once, read-only
//!                                                   ├─► frames/DIFF_ID    the rest of its tar, to write it again
//!                                                   └─► images/DIGEST.json  which layers, and how to run it
//! ```
//!
//! A container's config names the image by its digest (key `image`), its root volume holds what it has changed, and
//! the runtime lays both over each other. Everything is checked by its digest; nothing of an image is trusted.

pub mod archive;
pub mod digest;
pub mod export;
mod frame;
pub mod image;
mod layer;
pub mod registry;

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::sync::{OwnedRwLockReadGuard, RwLock};

use crate::error::Error;
use archive::Archive;
use digest::Digest;
use image::Image;

/// Why an image cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// Reading or writing failed.
    #[error("{what}")]
    Io {
        /// What was tried.
        what: String,
        /// The host's answer.
        source: io::Error,
    },
    /// A document of it does not parse.
    #[error("parse {what}")]
    Json {
        /// Which document.
        what: String,
        /// Where and why.
        source: serde_json::Error,
    },
    /// Its parts do not fit together, or it is for another kind of machine.
    #[error("{0}")]
    Invalid(String),
    /// Somebody asked to stop.
    #[error("stopped")]
    Interrupted,
}

impl From<ImageError> for Error {
    fn from(error: ImageError) -> Self {
        match error {
            ImageError::Interrupted => Error::Interrupted,
            other => Error::failed("the image cannot be used", other),
        }
    }
}

/// The images of a node. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Images {
    folder: PathBuf,
    /// Read by whoever makes use of images that no config names yet; written by whoever removes them.
    in_use: Arc<RwLock<()>>,
}

/// While it lives, no image is removed.
#[derive(Debug)]
pub struct Hold {
    _guard: OwnedRwLockReadGuard<()>,
}

impl Images {
    /// The images below a folder, which is made when the first one comes.
    pub fn new(folder: PathBuf) -> Self {
        Self {
            folder,
            in_use: Arc::default(),
        }
    }

    /// Keeps every image from being removed.
    pub async fn hold(&self) -> Hold {
        Hold {
            _guard: self.in_use.clone().read_owned().await,
        }
    }

    /// Takes an image in from an archive. Layers that are here already are not unpacked again. Blocks.
    pub fn take_in(&self, archive: &Path, log: &dyn Fn(&str)) -> Result<Image, ImageError> {
        let archive = Archive::open(archive)?;
        let archive::Contents { image, layers, .. } = archive.contents()?;
        for (id, layer) in image.layers.iter().zip(&layers) {
            if self.layer(id).exists() && self.frame(id).exists() {
                log(&format!("layer {id} is here already"));
                continue;
            }
            let bytes = self.unpack(id, archive.open_blob(layer)?)?;
            log(&format!("layer {id}: {} MiB", bytes >> 20));
        }
        self.save(&image)?;
        Ok(image)
    }

    /// Unpacks a layer to where it belongs, its frame first: a layer without one cannot be written again.
    fn unpack(&self, id: &Digest, blob: archive::Blob) -> Result<u64, ImageError> {
        let name = format!(".new-{}", uuid::Uuid::new_v4());
        let (folder, frame) = (
            self.folder.join("layers").join(&name),
            self.folder.join("frames").join(&name),
        );
        std::fs::create_dir_all(&folder).at("create", &folder)?;
        let frames = self.folder.join("frames");
        std::fs::create_dir_all(&frames).at("create", &frames)?;
        let target = layer::Target {
            folder: &folder,
            frame: &frame,
        };
        let published = layer::unpack(blob, id, &target).and_then(|bytes| {
            std::fs::rename(&frame, self.frame(id)).at("publish", &self.frame(id))?;
            match std::fs::rename(&folder, self.layer(id)) {
                // It was here without its frame, or somebody else has unpacked it meanwhile.
                Err(_) if self.layer(id).exists() => {
                    std::fs::remove_dir_all(&folder).at("remove", &folder)?;
                }
                other => other.at("publish", &self.layer(id))?,
            }
            Ok(bytes)
        });
        published.inspect_err(|_| {
            std::fs::remove_dir_all(&folder).ok();
            std::fs::remove_file(&frame).ok();
        })
    }

    /// An image that was taken in.
    pub fn get(&self, digest: &Digest) -> Result<Image, ImageError> {
        let path = self.record(digest);
        let text = std::fs::read(&path).at("read", &path)?;
        serde_json::from_slice(&text).map_err(|source| ImageError::Json {
            what: path.display().to_string(),
            source,
        })
    }

    /// Folders of its layers, the topmost first, as overlayfs wants them.
    pub fn layers(&self, image: &Image) -> Vec<PathBuf> {
        image.layers.iter().rev().map(|id| self.layer(id)).collect()
    }

    /// Removes every image but these, and the layers that none of these has. Does nothing while somebody makes use of
    /// an image that no config names yet. Answers how many layers went. Blocks.
    pub fn prune(&self, kept: &BTreeSet<Digest>) -> Result<usize, ImageError> {
        let Ok(_guard) = self.in_use.try_write() else {
            return Ok(0);
        };
        let mut layers = BTreeSet::new();
        for digest in kept {
            // One that a config names and that is not here has nothing to keep.
            if let Ok(image) = self.get(digest) {
                layers.extend(image.layers.iter().map(Digest::hex).map(str::to_owned));
            }
        }
        let kept: BTreeSet<String> = kept
            .iter()
            .map(|digest| format!("{}.json", digest.hex()))
            .collect();
        let gone = |name: &str, kept: &BTreeSet<String>| !kept.contains(name);
        for path in entries(&self.folder.join("images"))?.filter(|(name, _)| gone(name, &kept)) {
            std::fs::remove_file(&path.1).at("remove", &path.1)?;
        }
        for path in entries(&self.folder.join("frames"))?.filter(|(name, _)| gone(name, &layers)) {
            std::fs::remove_file(&path.1).at("remove", &path.1)?;
        }
        let mut count = 0;
        for path in entries(&self.folder.join("layers"))?.filter(|(name, _)| gone(name, &layers)) {
            std::fs::remove_dir_all(&path.1).at("remove", &path.1)?;
            count += 1;
        }
        Ok(count)
    }

    fn save(&self, image: &Image) -> Result<(), ImageError> {
        let path = self.record(&image.digest);
        let folder = self.folder.join("images");
        std::fs::create_dir_all(&folder).at("create", &folder)?;
        let temporary = folder.join(format!(".new-{}", uuid::Uuid::new_v4()));
        let text = serde_json::to_vec_pretty(image).map_err(|source| ImageError::Json {
            what: path.display().to_string(),
            source,
        })?;
        std::fs::write(&temporary, text).at("write", &temporary)?;
        std::fs::rename(&temporary, &path).at("publish", &path)
    }

    fn record(&self, digest: &Digest) -> PathBuf {
        self.folder
            .join("images")
            .join(format!("{}.json", digest.hex()))
    }

    fn frame(&self, id: &Digest) -> PathBuf {
        self.folder.join("frames").join(id.hex())
    }

    fn layer(&self, id: &Digest) -> PathBuf {
        self.folder.join("layers").join(id.hex())
    }
}

/// Names and paths in a folder, which may be missing.
fn entries(folder: &Path) -> Result<impl Iterator<Item = (String, PathBuf)>, ImageError> {
    let entries = match std::fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        other => Some(other.at("read", folder)?),
    };
    let named = |entry: io::Result<std::fs::DirEntry>| {
        let entry = entry.ok()?;
        Some((entry.file_name().into_string().ok()?, entry.path()))
    };
    Ok(entries.into_iter().flatten().filter_map(named))
}

/// Adds what was tried to a host's error.
trait Context<T> {
    fn at(self, verb: &str, path: &Path) -> Result<T, ImageError>;
}

impl<T> Context<T> for io::Result<T> {
    fn at(self, verb: &str, path: &Path) -> Result<T, ImageError> {
        self.map_err(|source| ImageError::Io {
            what: format!("{verb} {}", path.display()),
            source,
        })
    }
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Images in one file: an OCI image layout in a tar (image-spec, "Image Layout"), or what `docker save` writes. Which of
//! both is told by the files in it. The tar is only read through once for its headers; blobs are found by their place.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Take};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::digest::{Digest, Hashing};
use super::image::Image;
use super::{Context, ImageError};

/// Most files in an archive: an image has a few dozen.
const ENTRIES_MAX: usize = 10_000;
/// Largest document. Registries refuse manifests beyond this size, too.
const DOCUMENT_BYTES_MAX: u64 = 4 << 20;
/// Deepest index in an index.
const DEPTH_MAX: u32 = 3;

/// An open archive.
#[derive(Debug)]
pub struct Archive {
    path: PathBuf,
    /// Where each file's bytes are: offset and length.
    files: HashMap<String, (u64, u64)>,
}

/// A layer as it is packed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packed {
    /// Its file in the archive.
    file: String,
    /// Digest of the file, if it has one.
    digest: Option<Digest>,
}

impl Packed {
    /// Digest of the file, if it has one.
    pub(super) fn digest(&self) -> Option<&Digest> {
        self.digest.as_ref()
    }
}

/// What is in an archive.
#[derive(Debug)]
pub struct Contents {
    /// The image.
    pub image: Image,
    /// Its packed layers, in the order of the image's.
    pub layers: Vec<Packed>,
    /// The manifest of an image layout.
    pub manifest: Option<RawManifest>,
}

/// A manifest byte for byte.
#[derive(Debug)]
pub struct RawManifest {
    /// What it is.
    pub media_type: String,
    /// The bytes that its digest is of.
    pub bytes: Vec<u8>,
}

/// A descriptor of image-spec.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Descriptor {
    #[serde(default)]
    media_type: String,
    digest: Digest,
    #[serde(default)]
    platform: Option<Platform>,
    #[serde(default)]
    annotations: HashMap<String, String>,
}

#[derive(Debug, Deserialize)]
struct Platform {
    architecture: String,
    os: String,
}

#[derive(Debug, Deserialize)]
struct Index {
    manifests: Vec<Descriptor>,
}

#[derive(Debug, Deserialize)]
struct Manifest {
    config: Descriptor,
    layers: Vec<Descriptor>,
}

/// One image of `docker save`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Saved {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

impl Archive {
    /// Reads the headers.
    pub fn open(path: &Path) -> Result<Self, ImageError> {
        let file = File::open(path).at("open", path)?;
        let mut files = HashMap::new();
        let mut tar = tar::Archive::new(file);
        for entry in tar.entries_with_seek().at("read", path)? {
            let entry = entry.at("read", path)?;
            if !entry.header().entry_type().is_file() {
                continue;
            }
            if files.len() == ENTRIES_MAX {
                let text = format!("{} has too many files for an image", path.display());
                return Err(ImageError::Invalid(text));
            }
            let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
            let name = name.trim_start_matches("./").to_owned();
            files.insert(name, (entry.raw_file_position(), entry.size()));
        }
        Ok(Self {
            path: path.to_owned(),
            files,
        })
    }

    /// The image in it.
    pub fn contents(&self) -> Result<Contents, ImageError> {
        let contents = if self.files.contains_key("index.json") {
            self.oci_image()?
        } else if self.files.contains_key("manifest.json") {
            self.docker_image()?
        } else {
            return Err(ImageError::Invalid(format!(
                "{} is no image: there is neither index.json nor manifest.json in it",
                self.path.display()
            )));
        };
        if contents.image.layers.len() != contents.layers.len() {
            return Err(ImageError::Invalid(
                "the manifest and the configuration have different numbers of layers".to_owned(),
            ));
        }
        Ok(contents)
    }

    /// A layer's bytes, as they are packed. What reads them to the end may check them.
    pub(super) fn open_blob(&self, layer: &Packed) -> Result<Blob, ImageError> {
        let file = self.open_file(&layer.file)?;
        Ok(Blob {
            reader: Hashing::new(file),
            digest: layer.digest.clone(),
        })
    }

    fn oci_image(&self) -> Result<Contents, ImageError> {
        let mut index: Index = self.document("index.json", None)?;
        for _ in 0..DEPTH_MAX {
            let chosen = choose(index.manifests)?;
            let name = chosen
                .annotations
                .get("org.opencontainers.image.ref.name")
                .cloned();
            let file = blob_file(&chosen.digest);
            if chosen.media_type.ends_with("index.v1+json")
                || chosen.media_type.ends_with("list.v2+json")
            {
                index = self.document(&file, Some(&chosen.digest))?;
                continue;
            }
            let bytes = self.bytes(&file, Some(&chosen.digest))?;
            let manifest: Manifest = parse(&file, &bytes)?;
            let config = self.bytes(
                &blob_file(&manifest.config.digest),
                Some(&manifest.config.digest),
            )?;
            let packed = |layer: &Descriptor| Packed {
                file: blob_file(&layer.digest),
                digest: Some(layer.digest.clone()),
            };
            let layers = manifest.layers.iter().map(packed).collect();
            let media_type = match chosen.media_type.is_empty() {
                true => oci_client::manifest::OCI_IMAGE_MEDIA_TYPE.to_owned(),
                false => chosen.media_type,
            };
            return Ok(Contents {
                image: Image::parse(chosen.digest, name, &config)?,
                layers,
                manifest: Some(RawManifest { media_type, bytes }),
            });
        }
        Err(ImageError::Invalid(
            "indexes lie too deep in each other".to_owned(),
        ))
    }

    fn docker_image(&self) -> Result<Contents, ImageError> {
        let mut saved: Vec<Saved> = self.document("manifest.json", None)?;
        let (Some(one), true) = (saved.pop(), saved.is_empty()) else {
            return Err(ImageError::Invalid(
                "the archive has to have exactly one image".to_owned(),
            ));
        };
        let config = self.bytes(&one.config, None)?;
        let name = one.repo_tags.into_iter().flatten().next();
        let layers = one
            .layers
            .into_iter()
            .map(|file| Packed { file, digest: None });
        Ok(Contents {
            image: Image::parse(Digest::of(&config), name, &config)?,
            layers: layers.collect(),
            manifest: None,
        })
    }

    fn document<T: DeserializeOwned>(
        &self,
        name: &str,
        digest: Option<&Digest>,
    ) -> Result<T, ImageError> {
        parse(name, &self.bytes(name, digest)?)
    }

    fn bytes(&self, name: &str, digest: Option<&Digest>) -> Result<Vec<u8>, ImageError> {
        let file = self.open_file(name)?;
        if file.limit() > DOCUMENT_BYTES_MAX {
            return Err(ImageError::Invalid(format!(
                "{name} of the image is too large"
            )));
        }
        let mut reader = Hashing::new(file);
        let mut bytes = Vec::new();
        reader.read_to_end(&mut bytes).at("read", &self.path)?;
        if let Some(digest) = digest {
            reader.verify(digest)?;
        }
        Ok(bytes)
    }

    fn open_file(&self, name: &str) -> Result<Take<File>, ImageError> {
        let place = self.files.get(name);
        let (offset, size) =
            place.ok_or_else(|| ImageError::Invalid(format!("{name} is missing in the image")))?;
        let mut file = File::open(&self.path).at("open", &self.path)?;
        file.seek(SeekFrom::Start(*offset)).at("read", &self.path)?;
        Ok(file.take(*size))
    }
}

/// A packed layer that is being read.
pub(super) struct Blob {
    reader: Hashing<Take<File>>,
    digest: Option<Digest>,
}

impl Blob {
    /// Reads what is left, and refuses bytes that are not those of the digest.
    pub(super) fn verify(self) -> Result<(), ImageError> {
        match &self.digest {
            Some(digest) => self.reader.verify(digest).map(drop),
            None => Ok(()),
        }
    }
}

impl Read for Blob {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        self.reader.read(buffer)
    }
}

fn parse<T: DeserializeOwned>(name: &str, text: &[u8]) -> Result<T, ImageError> {
    serde_json::from_slice(text).map_err(|source| ImageError::Json {
        what: format!("{name} of the image"),
        source,
    })
}

fn blob_file(digest: &Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

/// The manifest for this kind of machine; one that says nothing is taken when it is the only one.
fn choose(mut manifests: Vec<Descriptor>) -> Result<Descriptor, ImageError> {
    let fits = |descriptor: &Descriptor| {
        let platform = descriptor.platform.as_ref();
        platform.is_some_and(|p| p.architecture == "amd64" && p.os == "linux")
    };
    let missing = || ImageError::Invalid("the image is not there for linux on amd64".to_owned());
    if let Some(index) = manifests.iter().position(fits) {
        return Ok(manifests.swap_remove(index));
    }
    match manifests.pop() {
        Some(only) if manifests.is_empty() && only.platform.is_none() => Ok(only),
        _ => Err(missing()),
    }
}

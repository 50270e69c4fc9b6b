// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Writing an image to one file, for other programs: an OCI image layout in a tar, or what `docker load` reads.
//!
//! What comes out has the digest of the image's configuration that came in, which is what Docker calls the image's id, and
//! the same digests of unpacked layers. The digest of the manifest, a registry's name for it, depends on how the layers
//! are packed:
//!
//! | from | to an OCI archive | to a Docker archive |
//! |---|---|---|
//! | an OCI archive | every blob byte for byte, the manifest too | layers unpacked; no manifest |
//! | a Docker archive | layers as they are there, a new manifest | layers unpacked; no manifest |
//! | the layers kept here | layers unpacked, a new manifest | layers unpacked; no manifest |
//!
//! Nothing depends on time or chance: the same image gives the same bytes. The file is written once from its beginning to
//! its end, without copies beside it; only headers are filled in later, when a part's length and digest are known.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufReader, Read, Write};
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::archive::{Archive, Packed, RawManifest};
use super::digest::{Digest, Hashing};
use super::frame::Framed;
use super::image::Image;
use super::layer::{self, Packing};
use super::{ImageError, Images, registry};

/// An empty block of a tar. POSIX.1-2001, pax.
const BLOCK: [u8; 512] = [0; 512];
/// Bytes that are read and written at a time.
const CHUNK_BYTES: usize = 256 << 10;
/// Time between two lines of progress.
const PROGRESS_EVERY: Duration = Duration::from_secs(2);
/// image-spec, "OCI Image Media Types".
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIGURATION: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";

/// Kinds of archives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// An image layout in a tar: image-spec, "Image Layout".
    Oci,
    /// What `docker save` writes: image-spec of Moby, version 1.2.
    Docker,
}

/// Where an image is taken from.
#[derive(Debug, Clone)]
pub enum Source {
    /// An archive of either form.
    Archive(PathBuf),
    /// What was taken in.
    Kept(Digest),
}

/// What came out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exported {
    /// Digest of the configuration: the image's id.
    pub id: Digest,
    /// Digest of the manifest, where the form has one.
    pub manifest: Option<Digest>,
    /// Length of the file.
    pub bytes: u64,
}

/// Who looks on.
pub struct Watch<'a> {
    /// Takes lines of progress.
    pub log: &'a dyn Fn(&str),
    /// Whether the work is to be given up.
    pub is_stopped: &'a dyn Fn() -> bool,
}

impl Images {
    /// Writes an image to an empty file. The file is of no use after an error. Blocks.
    pub fn export(
        &self,
        source: &Source,
        form: Form,
        file: File,
        watch: &Watch<'_>,
    ) -> Result<Exported, ImageError> {
        let parts = self.parts(source)?;
        let mut tar = Tar {
            file,
            position: 0,
            watch,
            told: Instant::now(),
        };
        let id = Digest::of(parts.configuration.as_bytes());
        let manifest = match form {
            Form::Oci => Some(write_oci(&mut tar, &parts, &id)?),
            Form::Docker => {
                write_docker(&mut tar, &parts, &id)?;
                None
            }
        };
        Ok(Exported {
            id,
            manifest,
            bytes: tar.end()?,
        })
    }

    fn parts(&self, source: &Source) -> Result<Parts<'_>, ImageError> {
        let (image, layers, archive, manifest) = match source {
            Source::Archive(path) => {
                let archive = Archive::open(path)?;
                let contents = archive.contents()?;
                let layers = contents.layers.into_iter().map(Some).collect();
                (contents.image, layers, Some(archive), contents.manifest)
            }
            Source::Kept(digest) => {
                let image = self.get(digest)?;
                let layers = vec![None; image.layers.len()];
                (image, layers, None, None)
            }
        };
        let configuration = image.configuration.clone().ok_or_else(|| {
            ImageError::Invalid(format!(
                "{} was taken in before its configuration was kept: take it in again from its archive",
                image.digest
            ))
        })?;
        Ok(Parts {
            images: self,
            image,
            configuration,
            layers,
            archive,
            manifest,
        })
    }
}

/// An image that is read.
struct Parts<'a> {
    images: &'a Images,
    image: Image,
    configuration: String,
    /// Where each layer is in the archive.
    layers: Vec<Option<Packed>>,
    archive: Option<Archive>,
    manifest: Option<RawManifest>,
}

impl Parts<'_> {
    /// A layer as it is there.
    fn blob(&self, index: usize) -> Result<Box<dyn Read>, ImageError> {
        match (&self.archive, &self.layers[index]) {
            (Some(archive), Some(packed)) => Ok(Box::new(archive.open_blob(packed)?)),
            _ => self.kept(&self.image.layers[index]),
        }
    }

    /// A layer's tar.
    fn tar(&self, index: usize) -> Result<Box<dyn Read>, ImageError> {
        match (&self.archive, &self.layers[index]) {
            (Some(archive), Some(packed)) => layer::unpacked(archive.open_blob(packed)?),
            _ => self.kept(&self.image.layers[index]),
        }
    }

    fn kept(&self, id: &Digest) -> Result<Box<dyn Read>, ImageError> {
        let framed = Framed::open(&self.images.frame(id), &self.images.layer(id));
        let framed = framed.map_err(|source| ImageError::Io {
            what: format!("read layer {id}; if it was unpacked before its frame was kept, take its image in again"),
            source,
        })?;
        Ok(Box::new(framed))
    }
}

/// Answers the manifest's digest.
fn write_oci(tar: &mut Tar<'_>, parts: &Parts<'_>, id: &Digest) -> Result<Digest, ImageError> {
    tar.add_document("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
    tar.add_document(&blob_path(id), parts.configuration.as_bytes())?;
    let count = parts.layers.len();
    // An image may have a layer twice, such as an empty one.
    let mut written: HashMap<&Digest, Value> = HashMap::new();
    let mut descriptors = Vec::new();
    for (index, diff) in parts.image.layers.iter().enumerate() {
        if let Some(descriptor) = written.get(diff) {
            descriptors.push(descriptor.clone());
            continue;
        }
        let mut blob = BufReader::with_capacity(CHUNK_BYTES, parts.blob(index)?);
        let packing = layer::packing(&mut blob).map_err(|source| failed("read", diff, source))?;
        let (digest, size) = tar.add(&blob_path, &mut blob)?;
        let packed = parts.layers[index].as_ref();
        let expected = match packing {
            _ if packed.is_some_and(|p| p.digest().is_some()) => packed.and_then(Packed::digest),
            Packing::Plain => Some(diff),
            Packing::Gzip | Packing::Zstd => None,
        };
        check(expected, &digest)?;
        tar.tell(&format!(
            "layer {} of {count}, {diff}: {} MiB",
            index + 1,
            size >> 20
        ));
        let ending = match packing {
            Packing::Plain => "",
            Packing::Gzip => "+gzip",
            Packing::Zstd => "+zstd",
        };
        let descriptor = json!({
            "mediaType": format!("{LAYER}{ending}"), "digest": digest, "size": size,
        });
        descriptors.push(descriptor.clone());
        written.insert(diff, descriptor);
    }
    let new = || {
        json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": {
                "mediaType": CONFIGURATION, "digest": id, "size": parts.configuration.len(),
            },
            "layers": descriptors,
        })
    };
    let manifest = match &parts.manifest {
        Some(manifest) => manifest.bytes.clone(),
        None => new().to_string().into_bytes(),
    };
    let digest = Digest::of(&manifest);
    tar.add_document(&blob_path(&digest), &manifest)?;
    let kind = parts.manifest.as_ref().map(|m| m.media_type.as_str());
    let mut descriptor = json!({
        "mediaType": kind.unwrap_or(MANIFEST), "digest": digest, "size": manifest.len(),
    });
    if let Some(name) = &parts.image.name {
        descriptor["annotations"] = json!({ "org.opencontainers.image.ref.name": name });
    }
    let index = json!({ "schemaVersion": 2, "manifests": [descriptor] });
    tar.add_document("index.json", index.to_string().as_bytes())?;
    Ok(digest)
}

fn write_docker(tar: &mut Tar<'_>, parts: &Parts<'_>, id: &Digest) -> Result<(), ImageError> {
    let configuration = format!("{}.json", id.hex());
    tar.add_document(&configuration, parts.configuration.as_bytes())?;
    let path = |id: &Digest| format!("{}.tar", id.hex());
    let count = parts.layers.len();
    for (index, diff) in parts.image.layers.iter().enumerate() {
        if parts.image.layers[..index].contains(diff) {
            continue;
        }
        let (digest, size) = tar.add(&path, &mut parts.tar(index)?)?;
        check(Some(diff), &digest)?;
        tar.tell(&format!(
            "layer {} of {count}, {diff}: {} MiB",
            index + 1,
            size >> 20
        ));
    }
    let layers: Vec<String> = parts.image.layers.iter().map(path).collect();
    let name = parts.image.name.as_deref().filter(|name| is_tagged(name));
    let manifest = json!([{
        "Config": configuration,
        "RepoTags": name.into_iter().collect::<Vec<_>>(),
        "Layers": layers,
    }]);
    tar.add_document("manifest.json", manifest.to_string().as_bytes())
}

/// Whether Docker takes it as a name: it wants a tag there, and no digest.
fn is_tagged(name: &str) -> bool {
    let last = name.rsplit('/').next().unwrap_or_default();
    last.contains(':') && !last.contains('@') && registry::reference(name).is_ok()
}

fn check(expected: Option<&Digest>, found: &Digest) -> Result<(), ImageError> {
    match expected {
        Some(expected) if expected != found => Err(ImageError::Invalid(format!(
            "expected {expected}, found {found}: the layer is not any more what it was"
        ))),
        _ => Ok(()),
    }
}

fn blob_path(id: &Digest) -> String {
    format!("blobs/sha256/{}", id.hex())
}

fn failed(verb: &str, what: &dyn std::fmt::Display, source: std::io::Error) -> ImageError {
    ImageError::Io {
        what: format!("{verb} {what}"),
        source,
    }
}

/// A tar that is being written.
struct Tar<'a> {
    file: File,
    position: u64,
    watch: &'a Watch<'a>,
    /// When progress was told last.
    told: Instant,
}

impl Tar<'_> {
    fn add_document(&mut self, name: &str, mut bytes: &[u8]) -> Result<(), ImageError> {
        self.add(&|_| name.to_owned(), &mut bytes).map(drop)
    }

    /// Adds a file that is named for its digest. Answers the digest and the length.
    fn add(
        &mut self,
        name: &dyn Fn(&Digest) -> String,
        content: &mut dyn Read,
    ) -> Result<(Digest, u64), ImageError> {
        let start = self.position;
        let mut content = Hashing::new(content);
        let mut chunk = vec![0; CHUNK_BYTES];
        self.write(&BLOCK)?;
        loop {
            if (self.watch.is_stopped)() {
                return Err(ImageError::Interrupted);
            }
            let read = content.read(&mut chunk);
            let count = read.map_err(|source| failed("read", &"the image", source))?;
            if count == 0 {
                break;
            }
            self.write(&chunk[..count])?;
            if self.told.elapsed() >= PROGRESS_EVERY {
                self.tell(&format!("{} MiB written so far", self.position >> 20));
            }
        }
        let block = BLOCK.len() as u64;
        let size = self.position - start - block;
        let padding = size.next_multiple_of(block) - size;
        self.write(&BLOCK[..usize::try_from(padding).unwrap_or_default()])?;
        let digest = content.finish();
        let header = header(&name(&digest), size)?;
        let written = self.file.write_all_at(header.as_bytes(), start);
        written.map_err(|source| failed("write", &"the archive", source))?;
        Ok((digest, size))
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), ImageError> {
        let written = self.file.write_all(bytes);
        written.map_err(|source| failed("write", &"the archive", source))?;
        self.position += bytes.len() as u64;
        Ok(())
    }

    fn tell(&mut self, line: &str) {
        self.told = Instant::now();
        (self.watch.log)(line);
    }

    /// Two empty blocks. Answers the archive's length.
    fn end(mut self) -> Result<u64, ImageError> {
        self.write(&BLOCK)?;
        self.write(&BLOCK)?;
        Ok(self.position)
    }
}

fn header(name: &str, size: u64) -> Result<tar::Header, ImageError> {
    let mut header = tar::Header::new_ustar();
    let named = header.set_path(name);
    named.map_err(|source| failed("name", &name, source))?;
    header.set_size(size);
    header.set_mode(0o644);
    header.set_mtime(0);
    header.set_uid(0);
    header.set_gid(0);
    header.set_entry_type(tar::EntryType::Regular);
    header.set_cksum();
    Ok(header)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_docker_takes() {
        for name in ["registry.example:5000/team/app:1", "app:1"] {
            assert!(is_tagged(name), "{name}");
        }
        let digest = format!("app@sha256:{}", "a".repeat(64));
        for name in ["1.29", "registry.example:5000/app", "A:b c", &digest] {
            assert!(!is_tagged(name), "{name}");
        }
    }
}

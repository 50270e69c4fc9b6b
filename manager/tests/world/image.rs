// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! OCI images made by hand: layers from entries, honest or not, and the archives around them.

#![allow(clippy::unwrap_used, reason = "test helpers")]

use std::io::Write as _;
use std::path::Path;

use atoll_manager::oci::digest::Digest;
use serde_json::{Value, json};
use tar::{EntryType, Header};

/// One entry of a layer.
pub struct Entry<'a> {
    pub path: &'a str,
    pub kind: EntryType,
    pub mode: u32,
    pub owner: (u64, u64),
    /// Bytes of a file, target of a link.
    pub content: &'a [u8],
}

pub fn file<'a>(path: &'a str, content: &'a str) -> Entry<'a> {
    Entry {
        path,
        kind: EntryType::Regular,
        mode: 0o644,
        owner: (0, 0),
        content: content.as_bytes(),
    }
}

pub fn folder(path: &str) -> Entry<'_> {
    Entry {
        kind: EntryType::Directory,
        mode: 0o755,
        ..file(path, "")
    }
}

pub fn link<'a>(path: &'a str, target: &'a str) -> Entry<'a> {
    Entry {
        kind: EntryType::Symlink,
        ..file(path, target)
    }
}

pub fn hard_link<'a>(path: &'a str, target: &'a str) -> Entry<'a> {
    Entry {
        kind: EntryType::Link,
        ..file(path, target)
    }
}

/// A layer's tar. Paths are written as they are, also those that no library would write.
pub fn layer(entries: &[Entry<'_>]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for entry in entries {
        let mut header = Header::new_ustar();
        let name = &mut header.as_old_mut().name;
        name[..entry.path.len()].copy_from_slice(entry.path.as_bytes());
        header.set_entry_type(entry.kind);
        header.set_mode(entry.mode);
        header.set_uid(entry.owner.0);
        header.set_gid(entry.owner.1);
        header.set_mtime(1_000_000_000);
        let is_link = matches!(entry.kind, EntryType::Symlink | EntryType::Link);
        let content = if is_link { &[][..] } else { entry.content };
        if is_link {
            header.as_old_mut().linkname[..entry.content.len()].copy_from_slice(entry.content);
        }
        header.set_size(content.len() as u64);
        header.set_cksum();
        tar.append(&header, content).unwrap();
    }
    tar.into_inner().unwrap()
}

pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// An image with its blobs; what a test wants wrong it changes.
pub struct Sample {
    pub configuration: Value,
    pub manifest: Value,
    /// Digest by content, packed layers and the configuration.
    pub blobs: Vec<Vec<u8>>,
}

impl Sample {
    /// An image of these layers, gzipped, that runs by `run` (the member `config`).
    pub fn new(layers: &[Vec<u8>], run: Value) -> Self {
        let ids: Vec<String> = layers
            .iter()
            .map(|layer| Digest::of(layer).to_string())
            .collect();
        let packed: Vec<Vec<u8>> = layers.iter().map(|layer| gzip(layer)).collect();
        let configuration = json!({
            "architecture": "amd64", "os": "linux", "config": run,
            "rootfs": { "type": "layers", "diff_ids": ids },
        });
        let mut sample = Self {
            configuration,
            manifest: Value::Null,
            blobs: packed,
        };
        sample.describe();
        sample
    }

    /// Writes the manifest for the blobs and the configuration as they are.
    pub fn describe(&mut self) {
        let descriptor = |kind: &str, bytes: &[u8]| {
            json!({
                "mediaType": format!("application/vnd.oci.image.{kind}"),
                "digest": Digest::of(bytes).to_string(),
                "size": bytes.len(),
            })
        };
        let configuration = self.configuration.to_string().into_bytes();
        let layers = self
            .blobs
            .iter()
            .map(|blob| descriptor("layer.v1.tar+gzip", blob));
        self.manifest = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": descriptor("config.v1+json", &configuration),
            "layers": layers.collect::<Vec<_>>(),
        });
    }

    /// Every blob of it with the digest that it should have, the manifest last.
    pub fn all(&self) -> Vec<(String, Vec<u8>)> {
        let manifest = self.manifest.to_string().into_bytes();
        let layers = self.manifest["layers"].as_array().unwrap();
        let named = |descriptor: &Value| descriptor["digest"].as_str().unwrap().to_owned();
        let mut all: Vec<_> = layers
            .iter()
            .map(named)
            .zip(self.blobs.iter().cloned())
            .collect();
        let configuration = self.configuration.to_string().into_bytes();
        all.push((named(&self.manifest["config"]), configuration));
        all.push((Digest::of(&manifest).to_string(), manifest));
        all
    }

    /// Writes it as an OCI archive.
    pub fn write(&self, path: &Path) {
        let all = self.all();
        let (digest, manifest) = all.last().unwrap();
        let index = json!({
            "schemaVersion": 2,
            "manifests": [{
                "mediaType": self.manifest["mediaType"], "digest": digest, "size": manifest.len(),
            }],
        });
        let mut files = vec![
            (
                "oci-layout".to_owned(),
                br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec(),
            ),
            ("index.json".to_owned(), index.to_string().into_bytes()),
        ];
        files.extend(
            all.into_iter()
                .map(|(digest, bytes)| (digest.replace("sha256:", "blobs/sha256/"), bytes)),
        );
        write_tar(path, &files);
    }

    /// Writes it as `docker save` does, layers unpacked.
    pub fn write_docker(&self, path: &Path, layers: &[Vec<u8>]) {
        let named = layers
            .iter()
            .enumerate()
            .map(|(n, layer)| (format!("{n}/layer.tar"), layer.clone()));
        let mut files: Vec<_> = named.collect();
        let names: Vec<&String> = files.iter().map(|(name, _)| name).collect();
        let manifest = json!([{ "Config": "config.json", "RepoTags": ["app:1"], "Layers": names }]);
        files.push((
            "manifest.json".to_owned(),
            manifest.to_string().into_bytes(),
        ));
        files.push((
            "config.json".to_owned(),
            self.configuration.to_string().into_bytes(),
        ));
        write_tar(path, &files);
    }
}

pub fn write_tar(path: &Path, files: &[(String, Vec<u8>)]) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    let mut tar = tar::Builder::new(std::fs::File::create(path).unwrap());
    for (name, bytes) in files {
        let mut header = Header::new_ustar();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, name, bytes.as_slice())
            .unwrap();
    }
    tar.finish().unwrap();
}

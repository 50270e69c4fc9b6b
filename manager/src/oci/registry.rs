// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Pulling an image from a registry into an archive of one file, and listing a repository's tags. The protocol and its
//! tokens are the crate's; that every blob is the one of its digest is checked by it, and again when the image is
//! taken in.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use oci_client::client::{ClientConfig, ClientProtocol};
use oci_client::manifest::OciDescriptor;
use oci_client::secrets::RegistryAuth;
use oci_client::{Client, Reference};
use serde_json::json;
use tokio::fs::File;
use tokio::io::{AsyncSeekExt as _, AsyncWriteExt as _};

use crate::error::Error;

/// Longest silence of a registry.
const SILENCE_MAX: Duration = Duration::from_secs(60);
/// Most tags that are listed.
const TAGS_MAX: usize = 10_000;
/// Length of the blocks of a tar. POSIX.1-2001, pax.
const BLOCK_BYTES: usize = 512;

/// What an image is asked for by: `registry/repository:tag` or `…@sha256:…`; the usual registry is Docker's.
pub fn reference(text: &str) -> Result<Reference, Error> {
    text.parse()
        .map_err(|e| Error::invalid("reference", format!("{text}: {e}")))
}

/// The repository's tags, sorted. Debian's registry knows no pages and answers with all of them every time.
pub async fn tags(reference: &Reference) -> Result<Vec<String>, Error> {
    let (client, mut tags, mut last) = (client(reference), BTreeSet::new(), None::<String>);
    loop {
        let page = client
            .list_tags(reference, &RegistryAuth::Anonymous, None, last.as_deref())
            .await
            .map_err(|e| Error::failed(format!("list the tags of {reference}"), e))?;
        let before = tags.len();
        last = page.tags.last().cloned();
        tags.extend(page.tags);
        if tags.len() == before || tags.len() >= TAGS_MAX {
            return Ok(tags.into_iter().collect());
        }
    }
}

/// Writes the image to an empty file, as an OCI image layout in a tar. `bytes_max` is what there is room for.
pub async fn pull(
    reference: &Reference,
    path: &Path,
    bytes_max: u64,
    log: &(dyn Fn(&str) + Sync),
) -> Result<(), Error> {
    let client = client(reference);
    let failed = |e| Error::failed(format!("pull {reference}"), e);
    log(&format!("asking for {reference}"));
    let pulled = client
        .pull_image_manifest(reference, &RegistryAuth::Anonymous)
        .await;
    let (manifest, digest) = pulled.map_err(failed)?;
    // The very bytes, which the digest is of.
    let accepted = [manifest
        .media_type
        .as_deref()
        .unwrap_or(oci_client::manifest::OCI_IMAGE_MEDIA_TYPE)];
    let exact = reference.clone_with_digest(digest.clone());
    let raw = client
        .pull_manifest_raw(&exact, &RegistryAuth::Anonymous, &accepted)
        .await;
    let (raw, _) = raw.map_err(failed)?;
    let parts: Vec<&OciDescriptor> = std::iter::once(&manifest.config)
        .chain(&manifest.layers)
        .collect();
    let total = parts.iter().map(|part| part.size.max(0)).sum::<i64>();
    if u64::try_from(total).is_ok_and(|total| total > bytes_max) {
        return Err(Error::refused(format!(
            "{reference} needs {} MiB, and there is not room for it",
            total >> 20
        )));
    }
    log(&format!(
        "{digest}: {} layers, {} MiB",
        manifest.layers.len(),
        total >> 20
    ));
    let file = File::options().write(true).open(path).await;
    let mut tar = Tar {
        file: file.map_err(|e| Error::failed(format!("open {}", path.display()), e))?,
    };
    let index = json!({
        "schemaVersion": 2,
        "manifests": [{
            "mediaType": accepted[0],
            "digest": digest,
            "size": raw.len(),
            "annotations": { "org.opencontainers.image.ref.name": reference.whole() },
        }],
    });
    tar.add("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)
        .await?;
    tar.add("index.json", index.to_string().as_bytes()).await?;
    tar.add(&blob_path(&digest)?, &raw).await?;
    let mut there = vec![digest];
    for part in parts {
        if there.contains(&part.digest) {
            continue;
        }
        tar.pull(&client, &exact, part).await?;
        log(&format!("{}: {} MiB", part.digest, part.size >> 20));
        there.push(part.digest.clone());
    }
    tar.end().await
}

/// A registry on this host speaks HTTP, as Docker has it; all others HTTPS.
fn client(reference: &Reference) -> Client {
    let registry = reference.resolve_registry();
    let host = registry.rsplit_once(':').map_or(registry, |(host, _)| host);
    let protocol = match host {
        "localhost" | "127.0.0.1" | "[::1]" => ClientProtocol::Http,
        _ => ClientProtocol::Https,
    };
    Client::new(ClientConfig {
        protocol,
        read_timeout: Some(SILENCE_MAX),
        connect_timeout: Some(SILENCE_MAX),
        ..ClientConfig::default()
    })
}

fn blob_path(digest: &str) -> Result<String, Error> {
    let digest: super::digest::Digest = digest.parse()?;
    Ok(format!("blobs/sha256/{}", digest.hex()))
}

/// A tar that is being written.
struct Tar {
    file: File,
}

impl Tar {
    async fn add(&mut self, name: &str, bytes: &[u8]) -> Result<(), Error> {
        self.begin(name, bytes.len() as u64).await?;
        self.write(bytes).await?;
        self.pad(bytes.len() as u64).await
    }

    async fn pull(
        &mut self,
        client: &Client,
        image: &Reference,
        part: &OciDescriptor,
    ) -> Result<(), Error> {
        let size = u64::try_from(part.size).unwrap_or_default();
        self.begin(&blob_path(&part.digest)?, size).await?;
        let before = self.position().await?;
        client
            .pull_blob(image, part, &mut self.file)
            .await
            .map_err(|e| Error::failed(format!("pull {}", part.digest), e))?;
        let received = self.position().await? - before;
        if received != size {
            return Err(Error::refused(format!(
                "{}: {received} bytes came, and {size} were announced",
                part.digest
            )));
        }
        self.pad(size).await
    }

    async fn begin(&mut self, name: &str, size: u64) -> Result<(), Error> {
        let mut header = tar::Header::new_ustar();
        header
            .set_path(name)
            .map_err(|e| Error::failed(format!("name a file {name}"), e))?;
        header.set_size(size);
        header.set_mode(0o644);
        header.set_entry_type(tar::EntryType::Regular);
        header.set_cksum();
        self.write(header.as_bytes()).await
    }

    async fn pad(&mut self, size: u64) -> Result<(), Error> {
        let rest = (BLOCK_BYTES - usize::try_from(size % BLOCK_BYTES as u64).unwrap_or_default())
            % BLOCK_BYTES;
        self.write(&vec![0; rest]).await
    }

    /// Two empty blocks.
    async fn end(mut self) -> Result<(), Error> {
        self.write(&[0; 2 * BLOCK_BYTES]).await?;
        self.file
            .sync_all()
            .await
            .map_err(|e| Error::failed("write the image", e))
    }

    async fn write(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.file
            .write_all(bytes)
            .await
            .map_err(|e| Error::failed("write the image", e))
    }

    async fn position(&mut self) -> Result<u64, Error> {
        let position = async {
            self.file.flush().await?;
            self.file.stream_position().await
        };
        position
            .await
            .map_err(|e| Error::failed("write the image", e))
    }
}

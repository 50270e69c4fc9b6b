// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The task `ociexport`: an image, from an archive or as a container has it, becomes an archive in a storage, a template
//! like others and what other programs read.

use std::fs::File;
use std::sync::Arc;

use crate::error::Error;
use crate::guest::container::image;
use crate::guest::site::Site;
use crate::id::{GuestId, GuestKind};
use crate::oci::export::{Form, Source, Watch};
use crate::storage::incoming::Existing;
use crate::storage::name::{Content, VolumeId};
use crate::task::TaskContext;

/// Which image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum From {
    /// The one in an archive: `STORAGE:vztmpl/NAME.tar`.
    Archive(VolumeId),
    /// The one that a container is made from.
    Container(GuestId),
}

/// What is asked for.
#[derive(Debug, Clone)]
pub struct Export {
    /// Which image.
    pub from: From,
    /// Kind of the new archive.
    pub form: Form,
    /// The new archive, whose name is free.
    pub to: VolumeId,
}

/// Writes the archive; it appears when it is whole.
pub async fn export(site: &Arc<Site>, export: Export, task: &TaskContext) -> Result<(), Error> {
    let _hold = site.images.hold().await;
    let source = match export.from {
        From::Archive(volume) if !image::is_archive(&volume) => {
            return Err(Error::refused(format!("'{volume}' is no OCI image")));
        }
        From::Archive(volume) => Source::Archive(site.storage.path(&volume).await?),
        From::Container(id) => {
            let seat = site.seat(GuestKind::Container, id);
            let digest = image::digest(&seat.config()?)?;
            Source::Kept(digest.ok_or_else(|| {
                Error::refused(format!("{} is not made from an image", seat.title()))
            })?)
        }
    };
    let storage = site.storage.open_for(&export.to.storage, Content::Vztmpl)?;
    let incoming = storage.receive(&export.to.name).await?;
    let path = incoming.path().to_owned();
    let (images, watched) = (site.images.clone(), task.clone());
    let work = tokio::task::spawn_blocking(move || {
        let file = File::options().write(true).open(&path);
        let file = file.map_err(|e| Error::failed(format!("open {}", path.display()), e))?;
        let watch = Watch {
            log: &|line| watched.log(line),
            is_stopped: &|| watched.is_cancelled(),
        };
        Ok::<_, Error>(images.export(&source, export.form, file, &watch)?)
    });
    let done = work
        .await
        .map_err(|e| Error::failed("export the image", e))??;
    incoming.commit(None, Existing::Refuse).await?;
    task.log(&format!("image {}, {} MiB", done.id, done.bytes >> 20));
    if let Some(manifest) = done.manifest {
        task.log(&format!("manifest {manifest}"));
    }
    task.log(&format!("exported to '{}'", export.to));
    Ok(())
}

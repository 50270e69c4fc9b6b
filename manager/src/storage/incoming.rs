// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A file on its way into a storage: written under a temporary name beside its destination, renamed when it is
//! whole and its checksum right, removed when it is dropped before.

use std::io;
use std::path::{Path, PathBuf};

use crate::error::Error;
use crate::storage::checksum::Checksum;

/// What to do when the name is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Existing {
    /// Put the new file in the old one's place.
    Replace,
    /// Keep the old file and fail.
    Refuse,
}

/// A file that is being written.
#[derive(Debug)]
pub struct Incoming {
    temporary: PathBuf,
    destination: PathBuf,
    committed: bool,
}

impl Incoming {
    /// For plugins: `temporary` exists and is on the same file system as `destination`.
    pub fn new(temporary: PathBuf, destination: PathBuf) -> Self {
        Self {
            temporary,
            destination,
            committed: false,
        }
    }

    /// The empty file to write to.
    pub fn path(&self) -> &Path {
        &self.temporary
    }

    /// Where it will appear.
    pub fn destination(&self) -> &Path {
        &self.destination
    }

    /// Checks the file, makes it durable and gives it its name.
    pub async fn commit(
        mut self,
        checksum: Option<&Checksum>,
        existing: Existing,
    ) -> Result<PathBuf, Error> {
        if let Some(checksum) = checksum {
            checksum.verify(&self.temporary).await?;
        }
        let (from, to) = (self.temporary.clone(), self.destination.clone());
        tokio::task::spawn_blocking(move || publish(&from, &to, existing))
            .await
            .map_err(|error| Error::failed("publish the file".to_owned(), error))?
            .map_err(|error| match error.kind() {
                io::ErrorKind::AlreadyExists => Error::Refused(format!(
                    "refusing to override existing file '{}'",
                    self.destination.display()
                )),
                _ => Error::failed(
                    format!("cannot write {}", self.destination.display()),
                    error,
                ),
            })?;
        self.committed = true;
        Ok(self.destination.clone())
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        if !self.committed {
            // Nobody to tell; the leading dot keeps a leftover out of every listing.
            let _ = std::fs::remove_file(&self.temporary);
        }
    }
}

fn publish(from: &Path, to: &Path, existing: Existing) -> io::Result<()> {
    use rustix::fs::{CWD, RenameFlags};
    std::fs::File::open(from)?.sync_all()?;
    let flags = match existing {
        Existing::Replace => RenameFlags::empty(),
        Existing::Refuse => RenameFlags::NOREPLACE,
    };
    rustix::fs::renameat_with(CWD, from, CWD, to, flags)?;
    let folder = to.parent().unwrap_or(Path::new("/"));
    std::fs::File::open(folder)?.sync_all()
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A file on its way into a storage: written under a temporary name beside its destination, renamed when it is
//! whole and its checksum right, removed when it is dropped before. One that says where it comes from stays, for who
//! goes on with it.

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

/// Extended attribute of an unfinished file that says where it comes from.
const MARK: &str = "user.atoll.download";
/// Longest mark, in bytes.
const MARK_BYTES_MAX: usize = 4096;

/// A file that is being written.
#[derive(Debug)]
pub struct Incoming {
    temporary: PathBuf,
    destination: PathBuf,
    committed: bool,
    /// Open and locked, so that nobody else goes on with it.
    part: Option<std::fs::File>,
}

impl Incoming {
    /// For plugins: `temporary` exists and is on the same file system as `destination`.
    pub fn new(temporary: PathBuf, destination: PathBuf) -> Self {
        Self {
            temporary,
            destination,
            committed: false,
            part: None,
        }
    }

    /// For plugins: one that may have something in it, and may stay unfinished. `part` is `temporary`, locked.
    pub fn part(part: std::fs::File, temporary: PathBuf, destination: PathBuf) -> Self {
        let mut incoming = Self::new(temporary, destination);
        incoming.part = Some(part);
        incoming
    }

    /// What the one who wrote it has noted about where it comes from.
    pub fn mark(&self) -> Option<String> {
        let mut bytes = vec![0; MARK_BYTES_MAX];
        let length = rustix::fs::fgetxattr(self.part.as_ref()?, MARK, &mut bytes[..]).ok()?;
        String::from_utf8(bytes[..length].to_vec()).ok()
    }

    /// Notes that. Where the file system has no such attributes, the file is not kept.
    pub fn set_mark(&self, text: &str) {
        if let Some(part) = &self.part {
            let flags = rustix::fs::XattrFlags::empty();
            let _ = rustix::fs::fsetxattr(part, MARK, text.as_bytes(), flags);
        }
    }

    /// Takes the note away: nobody can go on with it.
    pub fn clear_mark(&self) {
        if let Some(part) = &self.part {
            let _ = rustix::fs::fremovexattr(part, MARK);
        }
    }

    /// The file to write to.
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
        if !self.committed && self.mark().is_none() {
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

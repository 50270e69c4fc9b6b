// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Temporary directories of labs. A host's disk takes a gigabyte: what a test that was killed could not remove, the next
//! one does.

use std::fs::{self, File};
use std::path::Path;

use anyhow::{Context, Result};
use tempfile::TempDir;

const PREFIX: &str = "atoll-lab-";
const LOCK: &str = "lock";

/// A directory that goes with the value, or when a later one is made beside it after this process was killed.
#[derive(Debug)]
pub struct Scratch {
    directory: TempDir,
    /// Locked while the directory is in use: the kernel lets go, however a process ends.
    _lock: File,
}

impl Scratch {
    /// A new one in `parent`.
    pub fn new_in(parent: &Path) -> Result<Self> {
        sweep(parent);
        let make = || {
            let directory = tempfile::Builder::new().prefix(PREFIX).tempdir_in(parent)?;
            // It has its name only when it is held: until then nobody sweeps.
            let unnamed = directory.path().join("lock.new");
            let lock = File::create(&unnamed)?;
            lock.lock()?;
            fs::rename(unnamed, directory.path().join(LOCK))?;
            Ok(Self {
                directory,
                _lock: lock,
            })
        };
        let made: std::io::Result<Self> = make();
        made.with_context(|| format!("make a directory in {}", parent.display()))
    }

    /// Where it is. It holds a file `lock`.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }
}

/// Removes those that nobody holds. What cannot be removed stays for the next.
fn sweep(parent: &Path) {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with(PREFIX)
            && let Ok(lock) = File::open(entry.path().join(LOCK))
            && lock.try_lock().is_ok()
        {
            drop(fs::remove_dir_all(entry.path()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_nobody_holds_is_removed() {
        let parent = tempfile::tempdir().unwrap();
        let held = Scratch::new_in(parent.path()).unwrap();
        let killed = Scratch::new_in(parent.path()).unwrap();
        fs::write(killed.path().join("disk"), "x").unwrap();
        let Scratch { directory, _lock } = killed;
        let left = directory.keep();
        drop(_lock);
        let young = parent.path().join("atoll-lab-young");
        fs::create_dir(&young).unwrap();
        let next = Scratch::new_in(parent.path()).unwrap();
        assert!(held.path().exists() && next.path().exists() && young.exists());
        assert!(!left.exists());
    }
}

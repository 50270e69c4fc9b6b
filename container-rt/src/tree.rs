// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Paths in a tree that somebody else arranged: an image's, or a container's. They are resolved below its root and lead
//! nowhere outside, whatever links were planted there (openat2(2): `RESOLVE_IN_ROOT`, and no magic links).

use std::os::fd::OwnedFd;
use std::path::{Component, Path, PathBuf};

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2};
use nix::sys::stat::{Mode, mkdirat};

/// Mode of files that are made in it, less the umask.
const MADE: Mode = Mode::from_bits_truncate(0o644);

/// The root of such a tree.
#[derive(Debug)]
pub(crate) struct Tree(OwnedFd);

impl Tree {
    /// The tree below a directory, which itself is ours.
    pub(crate) fn below(root: &Path) -> nix::Result<Self> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        Ok(Self(open(root, flags, Mode::empty())?))
    }

    /// Opens what is at a path, absolute or not; the descriptor is closed on exec.
    pub(crate) fn open(&self, path: &Path, flags: OFlag) -> nix::Result<OwnedFd> {
        let mode = match flags.contains(OFlag::O_CREAT) {
            true => MADE,
            // The kernel refuses one where nothing is made.
            false => Mode::empty(),
        };
        let how = OpenHow::new()
            .flags(flags | OFlag::O_CLOEXEC)
            .mode(mode)
            .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
        openat2(&self.0, path, how)
    }

    /// The directory at a path.
    pub(crate) fn directory(&self, path: &Path) -> nix::Result<OwnedFd> {
        self.open(path, OFlag::O_PATH | OFlag::O_DIRECTORY)
    }

    /// What is at a path. What is missing is made, the last part as a folder or as an empty file.
    pub(crate) fn make(&self, path: &Path, is_folder: bool) -> nix::Result<OwnedFd> {
        let names = path.components().filter_map(|part| match part {
            Component::Normal(name) => Some(name),
            _ => None,
        });
        let names: Vec<_> = names.collect();
        let mut made = PathBuf::from("/");
        for (index, name) in names.iter().enumerate() {
            let parent = self.directory(&made)?;
            made.push(name);
            let is_last = index + 1 == names.len();
            if self.open(&made, OFlag::O_PATH).is_ok() {
                continue;
            }
            if is_last && !is_folder {
                self.open(&made, OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_WRONLY)?;
            } else {
                mkdirat(&parent, *name, Mode::from_bits_truncate(0o755))?;
            }
        }
        self.open(&made, OFlag::O_PATH)
    }
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A container's root file system, mounted on the host and written to from outside.
//!
//! The container's root user may have planted anything in it. Every path is resolved inside the root by
//! openat2(2), so that a link to `/etc/shadow` means the container's own. Only regular files are read and written, and
//! nothing else is opened even to look: opening a device is an act by itself.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

/// Largest file that is read from a container: a hosts file has a few hundred bytes.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// The root folder of a container.
#[derive(Debug)]
pub struct GuestRoot {
    folder: OwnedFd,
    path: PathBuf,
}

impl GuestRoot {
    /// Opens the folder where the file system is mounted.
    pub fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self {
            folder: rustix::fs::openat(CWD, path, flags, Mode::empty())?,
            path: path.to_owned(),
        })
    }

    /// Where it is mounted on the host.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether there is something under that name, links followed.
    pub fn exists(&self, path: &str) -> bool {
        self.open_at(path, OFlags::PATH, Mode::empty()).is_ok()
    }

    /// Reads a regular file; `None` when there is none.
    pub fn read(&self, path: &str) -> io::Result<Option<String>> {
        let file = match self.open_regular(path, OFlags::RDONLY, ResolveFlags::empty()) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other?,
        };
        let mut bytes = Vec::new();
        file.take(FILE_BYTES_MAX).read_to_end(&mut bytes)?;
        Ok(Some(String::from_utf8_lossy(&bytes).into_owned()))
    }

    /// Opens a regular file to read.
    pub fn open_file(&self, path: &Path) -> io::Result<std::fs::File> {
        let path = path.to_str().ok_or_else(not_utf8)?;
        self.open_regular(path, OFlags::RDONLY, ResolveFlags::empty())
    }

    /// Writes a regular file. Its mode is kept when it exists; a missing folder is made.
    pub fn write(&self, path: &str, text: &str, mode: u32) -> io::Result<()> {
        if let Some((parent, _)) = path.rsplit_once('/') {
            self.make_folders(parent)?;
        }
        let mut file = match self.open_regular(path, OFlags::WRONLY, ResolveFlags::empty()) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::NONBLOCK;
                regular(self.open_at(path, flags, Mode::from_raw_mode(mode))?)?.into()
            }
            other => other?,
        };
        file.set_len(0)?;
        file.write_all(text.as_bytes())
    }

    /// Replaces the content of a regular file of a container that runs. False, and nothing is changed, when there is
    /// none of that name, or when a link is on the way: its owner has something else in mind.
    ///
    /// Nothing is made, so that the folder may be the upper layer of an overlay that is mounted: the file is the one
    /// that overlayfs shows.
    pub fn overwrite(&self, path: &str, text: &str) -> io::Result<bool> {
        let opened = self.open_regular(path, OFlags::WRONLY, ResolveFlags::NO_SYMLINKS);
        let mut file = match opened {
            Ok(file) => file,
            Err(_) if !self.is_regular(path) => return Ok(false),
            Err(error) => return Err(error),
        };
        file.set_len(0)?;
        file.write_all(text.as_bytes())?;
        Ok(true)
    }

    /// Makes an empty file in a container that may run. False, and nothing is changed, when something has that name
    /// already, be it a link that leads nowhere, or when the way to it is missing or has a link.
    pub fn create(&self, path: &str, mode: u32) -> io::Result<bool> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL;
        let mode = Mode::from_raw_mode(mode);
        match self.resolve(path, flags, mode, ResolveFlags::NO_SYMLINKS) {
            Ok(_) => Ok(true),
            Err(error) => match Errno::from_io_error(&error) {
                Some(Errno::EXIST | Errno::NOENT | Errno::LOOP | Errno::NOTDIR) => Ok(false),
                _ => Err(error),
            },
        }
    }

    /// Makes a symbolic link unless something has that name already.
    pub fn link(&self, target: &str, path: &str) -> io::Result<()> {
        let (parent, name) = path.rsplit_once('/').unwrap_or((".", path));
        self.make_folders(parent)?;
        let folder = self.open_at(parent, OFlags::PATH | OFlags::DIRECTORY, Mode::empty())?;
        match rustix::fs::symlinkat(target, &folder, name) {
            Ok(()) | Err(Errno::EXIST) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Opens a folder below the root, links followed inside it; what is missing is made.
    pub fn folder(&self, path: &Path) -> io::Result<OwnedFd> {
        let text = path.to_str().ok_or_else(not_utf8)?;
        self.make_folders(text)?;
        let text = if text.is_empty() { "." } else { text };
        self.open_at(text, OFlags::PATH | OFlags::DIRECTORY, Mode::empty())
    }

    /// The folder of a path, made if it is missing, and the path's last part.
    pub fn parent<'a>(&self, path: &'a Path) -> io::Result<(OwnedFd, &'a std::ffi::OsStr)> {
        let name = path.file_name();
        let name = name.ok_or_else(|| io::Error::other("the path has no last part"))?;
        let folder = path.parent().unwrap_or_else(|| Path::new("."));
        Ok((self.folder(folder)?, name))
    }

    /// Makes a symbolic link in the place of a file or link of that name.
    pub fn replace_link(&self, target: &str, path: &str) -> io::Result<()> {
        let (parent, name) = path.rsplit_once('/').unwrap_or((".", path));
        self.make_folders(parent)?;
        let folder = self.open_at(parent, OFlags::PATH | OFlags::DIRECTORY, Mode::empty())?;
        match rustix::fs::unlinkat(&folder, name, rustix::fs::AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(rustix::fs::symlinkat(target, &folder, name)?)
    }

    /// Last part of the path that a link finally leads to, such as `systemd` for `sbin/init`.
    pub fn resolved_name(&self, path: &str) -> Option<String> {
        let mut path = path.to_owned();
        // Linux follows 40 links at most, path_resolution(7).
        for _ in 0..40 {
            let (parent, name) = path.rsplit_once('/').unwrap_or((".", &path));
            let folder = self
                .open_at(parent, OFlags::PATH | OFlags::DIRECTORY, Mode::empty())
                .ok()?;
            let Ok(target) = rustix::fs::readlinkat(&folder, name, Vec::new()) else {
                return self.exists(&path).then(|| name.to_owned());
            };
            let target = target.into_string().ok()?;
            path = if target.starts_with('/') {
                target.trim_start_matches('/').to_owned()
            } else {
                format!("{parent}/{target}")
            };
        }
        None
    }

    fn make_folders(&self, path: &str) -> io::Result<()> {
        let mut made = String::new();
        for part in path.split('/').filter(|part| !part.is_empty()) {
            let parent = if made.is_empty() { "." } else { &made };
            let folder = self.open_at(parent, OFlags::PATH | OFlags::DIRECTORY, Mode::empty())?;
            match rustix::fs::mkdirat(&folder, part, Mode::from_raw_mode(0o755)) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(error) => return Err(error.into()),
            }
            made = format!("{made}/{part}").trim_start_matches('/').to_owned();
        }
        Ok(())
    }

    /// Whether a regular file has that name, without any link.
    fn is_regular(&self, path: &str) -> bool {
        self.resolve(path, OFlags::PATH, Mode::empty(), ResolveFlags::NO_SYMLINKS)
            .is_ok_and(|file| regular(file).is_ok())
    }

    /// Opens what is there, once it is known to be a regular file.
    fn open_regular(
        &self,
        path: &str,
        flags: OFlags,
        resolve: ResolveFlags,
    ) -> io::Result<std::fs::File> {
        let found = regular(self.resolve(path, OFlags::PATH, Mode::empty(), resolve)?)?;
        let again = format!("/proc/self/fd/{}", found.as_raw_fd());
        let flags = flags | OFlags::NONBLOCK | OFlags::CLOEXEC;
        Ok(rustix::fs::openat(CWD, again, flags, Mode::empty())?.into())
    }

    fn open_at(&self, path: &str, flags: OFlags, mode: Mode) -> io::Result<OwnedFd> {
        self.resolve(path, flags, mode, ResolveFlags::empty())
    }

    fn resolve(
        &self,
        path: &str,
        flags: OFlags,
        mode: Mode,
        more: ResolveFlags,
    ) -> io::Result<OwnedFd> {
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS | more;
        let flags = flags | OFlags::CLOEXEC;
        Ok(rustix::fs::openat2(
            self.folder.as_fd(),
            path,
            flags,
            mode,
            resolve,
        )?)
    }
}

fn not_utf8() -> io::Error {
    io::Error::other("the path is not UTF-8")
}

fn regular(file: OwnedFd) -> io::Result<OwnedFd> {
    let stat = rustix::fs::fstat(&file)?;
    if FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile {
        Ok(file)
    } else {
        Err(io::Error::other("not a regular file"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn links_stay_inside() {
        let folder = tempfile::tempdir().unwrap();
        let outside = folder.path().join("outside");
        std::fs::write(&outside, "kept").unwrap();
        let path = folder.path().join("root");
        std::fs::create_dir_all(path.join("etc")).unwrap();
        symlink(&outside, path.join("etc/hostname")).unwrap();
        symlink("../../../outside", path.join("etc/hosts")).unwrap();
        symlink(folder.path(), path.join("up")).unwrap();
        let root = GuestRoot::open(&path).unwrap();
        let _ = root.write("etc/hostname", "x", 0o644);
        let _ = root.write("etc/hosts", "x", 0o644);
        let _ = root.write("up/outside", "x", 0o644);
        let _ = root.write("../outside", "x", 0o644);
        assert_eq!(std::fs::read_to_string(&outside).unwrap(), "kept");
        assert_eq!(
            std::fs::read_to_string(path.join("outside")).unwrap(),
            "x",
            "the link was followed inside the root"
        );
    }

    #[test]
    fn of_a_running_container_only_what_is_there_is_overwritten() {
        let folder = tempfile::tempdir().unwrap();
        let root = GuestRoot::open(folder.path()).unwrap();
        root.write("etc/kept", "kept", 0o600).unwrap();
        let path = |name: &str| folder.path().join(name);
        assert!(!root.overwrite("etc/resolv.conf", "x").unwrap());
        assert!(!path("etc/resolv.conf").exists(), "nothing is made");
        symlink("kept", path("etc/resolv.conf")).unwrap();
        symlink("etc", path("link")).unwrap();
        let fifo = path("etc/fifo");
        rustix::fs::mkfifoat(CWD, &fifo, Mode::from_raw_mode(0o600)).unwrap();
        for name in ["etc/resolv.conf", "link/kept", "etc/fifo", "etc", "no/file"] {
            assert!(!root.overwrite(name, "x").unwrap(), "{name}");
        }
        assert_eq!(root.read("etc/kept").unwrap().as_deref(), Some("kept"));
        assert!(root.overwrite("etc/kept", "new").unwrap());
        assert_eq!(root.read("etc/kept").unwrap().as_deref(), Some("new"));
    }

    #[test]
    fn a_file_is_made_only_where_nothing_is() {
        let folder = tempfile::tempdir().unwrap();
        let root = GuestRoot::open(folder.path()).unwrap();
        root.write("etc/kept", "kept", 0o600).unwrap();
        symlink("nowhere", folder.path().join("etc/dangling")).unwrap();
        symlink("etc", folder.path().join("link")).unwrap();
        for name in [
            "etc/kept",
            "etc/dangling",
            "link/new",
            "no/new",
            "etc/kept/new",
        ] {
            assert!(!root.create(name, 0o644).unwrap(), "{name}");
        }
        let names = || {
            std::fs::read_dir(folder.path().join("etc"))
                .unwrap()
                .count()
        };
        assert_eq!(names(), 2);
        assert!(root.create("etc/new", 0o644).unwrap());
        assert_eq!(root.read("etc/new").unwrap().as_deref(), Some(""));
        assert_eq!(root.read("etc/kept").unwrap().as_deref(), Some("kept"));
    }

    #[test]
    fn only_regular_files_are_touched() {
        let folder = tempfile::tempdir().unwrap();
        let root = GuestRoot::open(folder.path()).unwrap();
        let fifo = folder.path().join("fifo");
        rustix::fs::mkfifoat(CWD, &fifo, Mode::from_raw_mode(0o600)).unwrap();
        // Opened without a reader, the first would have failed with ENXIO.
        let refused = root.write("fifo", "x", 0o644).unwrap_err();
        assert_eq!(refused.to_string(), "not a regular file");
        assert!(root.read("fifo").is_err());
        assert_eq!(root.read("none").unwrap(), None);
        root.write("a/b/c", "text", 0o600).unwrap();
        root.write("a/b/c", "t", 0o644).unwrap();
        assert_eq!(root.read("/a/b/c").unwrap().as_deref(), Some("t"));
    }

    #[test]
    fn the_name_behind_links() {
        let folder = tempfile::tempdir().unwrap();
        let root = GuestRoot::open(folder.path()).unwrap();
        root.write("usr/lib/systemd/systemd", "", 0o755).unwrap();
        symlink("usr/lib", folder.path().join("lib")).unwrap();
        std::fs::create_dir(folder.path().join("sbin")).unwrap();
        symlink("/lib/systemd/systemd", folder.path().join("sbin/init")).unwrap();
        symlink("loop", folder.path().join("loop")).unwrap();
        assert_eq!(root.resolved_name("sbin/init").as_deref(), Some("systemd"));
        assert_eq!(root.resolved_name("loop"), None);
        assert_eq!(root.resolved_name("sbin/none"), None);
    }
}

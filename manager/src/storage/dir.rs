// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The `dir` plugin: volumes are files below one folder, in PVE's layout.
//!
//! ```text
//! PATH/images/100/snap-NAME/vm-100-disk-0.raw                what the disk held at snapshot NAME: a copy, shared
//!                                                            extents where the file system can
//! PATH/images/100/vm-100-disk-0.raw    template/cache/*.tar.zst    template/iso/*.iso    snippets/*    dump/*    import/*
//! ```
//!
//! Every access is resolved by openat2(2) beneath the folder, with symbolic links refused, so that neither a name
//! nor something planted in the folder leads elsewhere. All calls run on a blocking thread with a deadline: a
//! dead network mount below the folder costs that one call.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use atoll_disk::qcow2::{self, Qcow2Options};
use atoll_disk::{Format, Source};
use rustix::fs::{AtFlags, CWD, FileType, FlockOperation, Mode, OFlags, ResolveFlags, Stat};
use rustix::io::Errno;

use crate::error::Error;
use crate::id::GuestId;
use crate::schema::{Kind, Param};
use crate::storage::copy::copy;
use crate::storage::incoming::Incoming;
use crate::storage::name::{Content, FORMATS, VolumeName};
use crate::storage::section::Section;
use crate::storage::{Plugin, STAT_BLOCK_BYTES, Space, Storage, Volume};
use crate::task::TaskContext;

/// This plugin's row.
pub const PLUGIN: Plugin = Plugin {
    kind: "dir",
    contents: &Content::ALL,
    keys: &[Param {
        name: "path",
        count: 0,
        description: "Folder on the node.",
        kind: Kind::Text { length_max: 4096 },
        required: true,
        default: None,
    }],
    open,
};

/// Longest wait for one call to the file system below the folder.
const DEADLINE: Duration = Duration::from_secs(20);
/// What folders of snapshots begin with, beside a guest's disks.
const SNAPSHOT_PREFIX: &str = "snap-";
/// Ending of an unfinished file's name, which begins with a dot.
const PART: &str = ".part";
/// How long it is kept for somebody to go on with it.
const PART_AGE_MAX: Duration = Duration::from_secs(7 * 24 * 3600);
/// Disks that one guest may have here.
const DISKS_MAX: u32 = 1024;

fn open(section: &Section) -> Result<Arc<dyn Storage>, Error> {
    let path = section.keys.get("path").map(PathBuf::from);
    match path {
        Some(path) if path.is_absolute() => Ok(Arc::new(Dir { path })),
        _ => Err(Error::Refused(format!(
            "storage '{}': 'path' is not an absolute path",
            section.name
        ))),
    }
}

#[derive(Debug, Clone)]
struct Dir {
    path: PathBuf,
}

#[async_trait]
impl Storage for Dir {
    async fn path(&self, volume: &VolumeName) -> Result<PathBuf, Error> {
        let name = volume.clone();
        self.blocking(volume, move |dir| {
            let root = dir.root()?;
            regular(&root, &relative(&name))?;
            Ok(dir.path.join(relative(&name)))
        })
        .await
    }

    async fn list(&self) -> Result<Vec<Volume>, Error> {
        self.blocking("listing", |dir| dir.scan()).await
    }

    async fn space(&self) -> Result<Space, Error> {
        self.blocking("space", |dir| {
            let stat = rustix::fs::statvfs(&dir.path)?;
            let bytes = |blocks: u64| blocks.saturating_mul(stat.f_frsize);
            Ok(Space {
                total_bytes: bytes(stat.f_blocks),
                used_bytes: bytes(stat.f_blocks.saturating_sub(stat.f_bfree)),
                available_bytes: bytes(stat.f_bavail),
            })
        })
        .await
    }

    async fn size_bytes(&self, volume: &VolumeName) -> Result<u64, Error> {
        let name = volume.clone();
        self.blocking(volume, move |dir| {
            let flags = OFlags::RDONLY | OFlags::NONBLOCK;
            let path = relative(&name);
            let file = open_beneath(dir.root()?.as_fd(), &path, flags, Mode::empty())?;
            let stat = regular_stat(&file)?;
            match name.image_format() {
                Some(Format::Qcow2) => qcow2::inspect(&File::from(file)).map_err(io::Error::other),
                _ => Ok(size_of(&stat)),
            }
        })
        .await
    }

    async fn allocate(
        &self,
        guest: GuestId,
        size_bytes: u64,
        format: Format,
    ) -> Result<VolumeName, Error> {
        self.blocking("allocation", move |dir| {
            let folder = dir.folder(&format!("images/{guest}"))?;
            for number in 0..DISKS_MAX {
                let disk = format!("disk-{number}");
                let named = |format| VolumeName::image(guest, &disk, format);
                let name = named(format).map_err(io::Error::other)?;
                // A number is one disk's, whatever its format.
                let others = FORMATS.into_iter().filter(|other| *other != format);
                let others = others.filter_map(|other| named(other).ok());
                if others.into_iter().any(|other| exists(&folder, &other)) {
                    continue;
                }
                match fill(&folder, &name, size_bytes, format) {
                    Ok(()) => return Ok(name),
                    Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                    Err(error) => return Err(error),
                }
            }
            Err(io::Error::other(format!(
                "guest {guest} has {DISKS_MAX} disks here"
            )))
        })
        .await
    }

    async fn allocate_as(&self, volume: &VolumeName, size_bytes: u64) -> Result<(), Error> {
        let name = volume.clone();
        self.blocking(volume, move |dir| {
            let file = create(&dir.folder(&parent_of(&name))?, file_of(&name))?;
            Ok(rustix::fs::ftruncate(&file, size_bytes)?)
        })
        .await
    }

    async fn resize(&self, volume: &VolumeName, size_bytes: u64) -> Result<(), Error> {
        let name = volume.clone();
        let shrinks = self
            .blocking(volume, move |dir| {
                let file = open_beneath(
                    dir.root()?.as_fd(),
                    &relative(&name),
                    OFlags::RDWR | OFlags::NONBLOCK,
                    Mode::empty(),
                )?;
                let size_now = size_of(&regular_stat(&file)?);
                match name.image_format() {
                    Some(Format::Qcow2) => grow_qcow2(file, size_bytes),
                    _ if size_bytes < size_now => Ok(true),
                    _ => rustix::fs::ftruncate(&file, size_bytes)
                        .map(|()| false)
                        .map_err(io::Error::from),
                }
            })
            .await?;
        if shrinks {
            return Err(Error::Refused(
                "shrinking disks is not supported".to_owned(),
            ));
        }
        Ok(())
    }

    async fn free(&self, volume: &VolumeName) -> Result<(), Error> {
        let name = volume.clone();
        self.blocking(volume, move |dir| {
            let (root, relative) = (dir.root()?, relative(&name));
            let parent = relative.parent().unwrap_or(Path::new("."));
            let folder = match open_folder(root.as_fd(), parent) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                other => other?,
            };
            match rustix::fs::unlinkat(&folder, file_of(&name), AtFlags::empty()) {
                Ok(()) | Err(rustix::io::Errno::NOENT) => {}
                Err(error) => return Err(error.into()),
            }
            if name.owner().is_some() {
                for snapshot in entries(&root, parent)? {
                    if snapshot.starts_with(SNAPSHOT_PREFIX) {
                        unlink_snapshot(&root, &parent.join(&snapshot), file_of(&name))?;
                    }
                }
                // The last disk takes its guest's folder along; a folder with more in it stays.
                let _ = rustix::fs::unlinkat(&root, parent, AtFlags::REMOVEDIR);
            }
            Ok(())
        })
        .await
    }

    async fn snapshot(
        &self,
        volume: &VolumeName,
        snapshot: &str,
        task: &TaskContext,
    ) -> Result<(), Error> {
        let from = self.path(volume).await?;
        let (name, folder) = (volume.clone(), snapshot_folder(volume, snapshot));
        let to = self
            .blocking(volume, move |dir| {
                dir.folder(&folder)?;
                Ok(dir.path.join(&folder).join(file_of(&name)))
            })
            .await?;
        copy(&from, &to, task).await
    }

    async fn snapshot_path(&self, volume: &VolumeName, snapshot: &str) -> Result<PathBuf, Error> {
        let path = Path::new(&snapshot_folder(volume, snapshot)).join(file_of(volume));
        self.blocking(format!("{volume}@{snapshot}"), move |dir| {
            regular(&dir.root()?, &path)?;
            Ok(dir.path.join(&path))
        })
        .await
    }

    async fn roll_back(
        &self,
        volume: &VolumeName,
        snapshot: &str,
        task: &TaskContext,
    ) -> Result<(), Error> {
        let from = self.snapshot_path(volume, snapshot).await?;
        // Not self.path(): an attempt that was cut off may have left no disk.
        copy(&from, &self.path.join(relative(volume)), task).await
    }

    async fn free_snapshot(&self, volume: &VolumeName, snapshot: &str) -> Result<(), Error> {
        let (name, folder) = (volume.clone(), snapshot_folder(volume, snapshot));
        self.blocking(volume, move |dir| {
            unlink_snapshot(&dir.root()?, Path::new(&folder), file_of(&name))
        })
        .await
    }

    async fn receive(&self, volume: &VolumeName) -> Result<Incoming, Error> {
        let name = volume.clone();
        self.blocking(volume, move |dir| {
            let parent = parent_of(&name);
            let folder = dir.folder(&parent)?;
            let temporary = format!(".{}.{}", file_of(&name), token());
            create(&folder, &temporary)?;
            let parent = dir.path.join(parent);
            Ok(Incoming::new(
                parent.join(temporary),
                parent.join(file_of(&name)),
            ))
        })
        .await
    }

    async fn receive_rest(&self, volume: &VolumeName) -> Result<Incoming, Error> {
        let name = volume.clone();
        let part = self.blocking(volume, move |dir| {
            let parent = parent_of(&name);
            let folder = dir.folder(&parent)?;
            sweep_parts(&folder)?;
            let temporary = format!(".{}{PART}", file_of(&name));
            let parent = dir.path.join(parent);
            let (path, destination) = (parent.join(&temporary), parent.join(file_of(&name)));
            let part = lock_part(&folder, &temporary)?;
            Ok(part.map(|part| Incoming::part(part.into(), path, destination)))
        });
        let busy = || Error::refused(format!("another task is downloading '{volume}'"));
        part.await?.ok_or_else(busy)
    }
}

impl Dir {
    /// Runs one piece of work on a blocking thread; `subject` names it in errors.
    async fn blocking<T: Send + 'static>(
        &self,
        subject: impl std::fmt::Display,
        work: impl FnOnce(&Self) -> io::Result<T> + Send + 'static,
    ) -> Result<T, Error> {
        let dir = self.clone();
        let task = tokio::task::spawn_blocking(move || work(&dir));
        let subject = format!("directory {}: {subject}", self.path.display());
        match tokio::time::timeout(DEADLINE, task).await {
            Ok(Ok(Ok(value))) => Ok(value),
            Ok(Ok(Err(error))) if error.kind() == io::ErrorKind::NotFound => {
                Err(Error::Refused(format!("{subject} does not exist")))
            }
            Ok(Ok(Err(error))) => Err(Error::failed(subject, error)),
            Ok(Err(error)) => Err(Error::failed(subject, error)),
            Err(_) => Err(Error::Refused(format!(
                "{subject}: no answer within {} s",
                DEADLINE.as_secs()
            ))),
        }
    }

    fn root(&self) -> io::Result<OwnedFd> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(rustix::fs::openat(CWD, &self.path, flags, Mode::empty())?)
    }

    /// Opens a folder beneath the root, making what is missing of it.
    fn folder(&self, relative: &str) -> io::Result<OwnedFd> {
        std::fs::create_dir_all(&self.path)?;
        let mut folder = self.root()?;
        for part in relative.split('/') {
            match rustix::fs::mkdirat(&folder, part, Mode::from_raw_mode(0o755)) {
                Ok(()) | Err(rustix::io::Errno::EXIST) => {}
                Err(error) => return Err(error.into()),
            }
            folder = open_folder(folder.as_fd(), Path::new(part))?;
        }
        Ok(folder)
    }

    fn scan(&self) -> io::Result<Vec<Volume>> {
        let root = self.root()?;
        let mut volumes = Vec::new();
        for content in [
            Content::Vztmpl,
            Content::Iso,
            Content::Snippets,
            Content::Backup,
            Content::Import,
        ] {
            collect(&root, folder_of(content), &mut volumes, |file| {
                VolumeName::file(content, file).ok()
            })?;
        }
        for guest in entries(&root, Path::new("images"))? {
            collect(&root, &format!("images/{guest}"), &mut volumes, |file| {
                format!("{guest}/{file}").parse().ok()
            })?;
        }
        volumes.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(volumes)
    }
}

/// Folder of what a guest's disks held at a snapshot, beneath the root.
fn snapshot_folder(volume: &VolumeName, snapshot: &str) -> String {
    format!("{}/{SNAPSHOT_PREFIX}{snapshot}", parent_of(volume))
}

/// Removes one disk's copy from a snapshot's folder, a copy that was cut off too, and the folder when it was the last.
fn unlink_snapshot(root: &OwnedFd, folder: &Path, file: &str) -> io::Result<()> {
    let open = match open_folder(root.as_fd(), folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    for file in [file, &format!("{file}.part")] {
        match rustix::fs::unlinkat(&open, file, AtFlags::empty()) {
            Ok(()) | Err(rustix::io::Errno::NOENT) => {}
            Err(error) => return Err(error.into()),
        }
    }
    // One with more in it stays.
    let _ = rustix::fs::unlinkat(root, folder, AtFlags::REMOVEDIR);
    Ok(())
}

/// Adds the regular files of one folder whose names `parse` accepts.
fn collect(
    root: &OwnedFd,
    folder: &str,
    volumes: &mut Vec<Volume>,
    parse: impl Fn(&str) -> Option<VolumeName>,
) -> io::Result<()> {
    for file in entries(root, Path::new(folder))? {
        let Some(name) = parse(&file) else { continue };
        // What is a link, or went away since it was listed, is not a volume.
        let Ok(stat) = regular(root, &Path::new(folder).join(&file)) else {
            continue;
        };
        // A damaged image is still a file of some size.
        let inside = match name.image_format() {
            Some(Format::Qcow2) => virtual_size(root, &Path::new(folder).join(&file)),
            _ => None,
        };
        volumes.push(Volume {
            name,
            size_bytes: inside.unwrap_or_else(|| size_of(&stat)),
            used_bytes: u64::try_from(stat.st_blocks).unwrap_or(0) * STAT_BLOCK_BYTES,
            changed_at: stat.st_ctime,
        });
    }
    Ok(())
}

/// Names in a folder; none when it is absent or not a plain folder.
fn entries(root: &OwnedFd, folder: &Path) -> io::Result<Vec<String>> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY;
    let Ok(fd) = open_beneath(root.as_fd(), folder, flags, Mode::empty()) else {
        return Ok(Vec::new());
    };
    let mut names = Vec::new();
    for entry in rustix::fs::Dir::new(fd)? {
        if let Ok(name) = entry?.file_name().to_str()
            && name != "."
            && name != ".."
        {
            names.push(name.to_owned());
        }
    }
    Ok(names)
}

fn open_beneath(
    root: BorrowedFd<'_>,
    path: &Path,
    flags: OFlags,
    mode: Mode,
) -> io::Result<OwnedFd> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    Ok(rustix::fs::openat2(
        root,
        path,
        flags | OFlags::CLOEXEC,
        mode,
        resolve,
    )?)
}

fn open_folder(root: BorrowedFd<'_>, path: &Path) -> io::Result<OwnedFd> {
    open_beneath(root, path, OFlags::PATH | OFlags::DIRECTORY, Mode::empty())
}

fn create(folder: &OwnedFd, file: &str) -> io::Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
    open_beneath(
        folder.as_fd(),
        Path::new(file),
        flags,
        Mode::from_raw_mode(0o640),
    )
}

/// Opens an unfinished file, made when it is missing; none when somebody works on it.
fn lock_part(folder: &OwnedFd, file: &str) -> io::Result<Option<OwnedFd>> {
    loop {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NONBLOCK;
        let mode = Mode::from_raw_mode(0o640);
        let part = open_beneath(folder.as_fd(), Path::new(file), flags, mode)?;
        let stat = regular_stat(&part)?;
        match rustix::fs::flock(&part, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) => return Ok(None),
            locked => locked?,
        }
        // Whoever had the lock before may have given the file its name, or removed it.
        match rustix::fs::statat(folder, file, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(now) if (now.st_dev, now.st_ino) == (stat.st_dev, stat.st_ino) => {
                return Ok(Some(part));
            }
            Ok(_) | Err(Errno::NOENT) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Removes unfinished files that nobody has gone on with for long.
fn sweep_parts(folder: &OwnedFd) -> io::Result<()> {
    let old = std::time::SystemTime::now() - PART_AGE_MAX;
    for file in entries(folder, Path::new("."))? {
        if !file.starts_with('.') || !file.ends_with(PART) {
            continue;
        }
        let path = by_descriptor(folder).join(&file);
        let changed = std::fs::symlink_metadata(path).and_then(|metadata| metadata.modified());
        if changed.is_ok_and(|changed| changed < old) {
            rustix::fs::unlinkat(folder, &file, AtFlags::empty())?;
        }
    }
    Ok(())
}

fn exists(folder: &OwnedFd, volume: &VolumeName) -> bool {
    rustix::fs::statat(folder, file_of(volume), AtFlags::SYMLINK_NOFOLLOW).is_ok()
}

/// Makes an empty disk; leaves nothing when it fails.
fn fill(folder: &OwnedFd, name: &VolumeName, size_bytes: u64, format: Format) -> io::Result<()> {
    if format == Format::Qcow2 {
        // By the open folder, so that nothing on the way is a link. The file itself must not be there.
        let path = by_descriptor(folder).join(file_of(name));
        return match qcow2::create(&path, size_bytes, &Qcow2Options::default()) {
            Err(qcow2::CreateError::Io { source, .. }) => Err(source),
            other => other.map_err(io::Error::other),
        };
    }
    let file = create(folder, file_of(name))?;
    rustix::fs::ftruncate(&file, size_bytes).map_err(|error| {
        let _ = rustix::fs::unlinkat(folder, file_of(name), AtFlags::empty());
        io::Error::from(error)
    })
}

/// Grows an image that no machine has open. Answers whether it would have to shrink, which it does not.
fn grow_qcow2(file: OwnedFd, size_bytes: u64) -> io::Result<bool> {
    let source = Source {
        path: by_descriptor(&file),
        format: Format::Qcow2,
        backing: Vec::new(),
    };
    let file = File::from(file);
    if size_bytes < qcow2::inspect(&file).map_err(io::Error::other)? {
        return Ok(true);
    }
    qcow2::resize(&source, size_bytes).map_err(io::Error::other)?;
    Ok(false)
}

/// The path of something open, for who wants a path: proc(5).
fn by_descriptor(fd: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}

fn virtual_size(root: &OwnedFd, path: &Path) -> Option<u64> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK;
    let file = open_beneath(root.as_fd(), path, flags, Mode::empty()).ok()?;
    qcow2::inspect(&File::from(file)).ok()
}

fn regular(root: &OwnedFd, path: &Path) -> io::Result<Stat> {
    regular_stat(&open_beneath(
        root.as_fd(),
        path,
        OFlags::PATH,
        Mode::empty(),
    )?)
}

fn regular_stat(file: &OwnedFd) -> io::Result<Stat> {
    let stat = rustix::fs::fstat(file)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(io::Error::other("not a regular file"));
    }
    Ok(stat)
}

fn size_of(stat: &Stat) -> u64 {
    u64::try_from(stat.st_size).unwrap_or(0)
}

fn folder_of(content: Content) -> &'static str {
    match content {
        Content::Images | Content::Rootdir => "images",
        Content::Vztmpl => "template/cache",
        Content::Iso => "template/iso",
        Content::Snippets => "snippets",
        Content::Backup => "dump",
        Content::Import => "import",
    }
}

fn parent_of(volume: &VolumeName) -> String {
    match volume {
        VolumeName::Image { guest, .. } => format!("images/{guest}"),
        VolumeName::File { content, .. } => folder_of(*content).to_owned(),
    }
}

fn file_of(volume: &VolumeName) -> &str {
    let (VolumeName::Image { file, .. } | VolumeName::File { file, .. }) = volume;
    file
}

fn relative(volume: &VolumeName) -> PathBuf {
    Path::new(&parent_of(volume)).join(file_of(volume))
}

/// Distinguishes two uploads of the same name.
fn token() -> String {
    use std::sync::atomic::{AtomicU64, Ordering};
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    format!("{}-{number}.part", std::process::id())
}

#[cfg(test)]
mod tests;

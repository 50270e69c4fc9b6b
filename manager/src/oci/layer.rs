// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Unpacking one layer into a folder that overlayfs takes as a lower one: image-spec, "Image Layer Filesystem Changeset".
//!
//! The layer may be hostile. Every path is resolved below the folder by openat2(2), also where the layer itself has
//! made links before; nothing is ever opened through a last link; device nodes are left out, since no container could
//! use them. A whiteout becomes overlayfs' own: a character device 0:0, or the mark of an opaque directory.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Timespec, Timestamps, Uid, XattrFlags};
use rustix::io::Errno;
use tar::{Entry, EntryType};

use super::archive::Blob;
use super::digest::{Digest, Hashing};
use super::frame::{Recorder, Recording};
use super::{Context, ImageError};
use crate::guest::container::root::GuestRoot;

/// Most bytes of one layer, unpacked: a small file may unpack to any size.
const BYTES_MAX: u64 = 64 << 30;
/// Most entries of one layer.
const ENTRIES_MAX: u64 = 4_000_000;
/// What marks a name that is gone.
const WHITEOUT: &[u8] = b".wh.";
/// What marks a directory of which nothing below is seen.
const OPAQUE: &[u8] = b".wh..wh..opq";
/// Names of extended attributes in PAX records: libarchive's and GNU tar's `SCHILY.xattr.NAME`.
const PAX_XATTR: &str = "SCHILY.xattr.";
/// Extended attributes that are taken over. What overlayfs or a security module of the host reads is not a layer's matter.
const XATTRS: &[&str] = &["user.", "security.capability"];

/// Where a layer goes.
pub(super) struct Target<'a> {
    /// An empty folder.
    pub(super) folder: &'a Path,
    /// A file to write its frame to.
    pub(super) frame: &'a Path,
}

/// Unpacks a layer, whatever packs it. Answers its bytes. The target is not to be used after an error.
pub(super) fn unpack(blob: Blob, id: &Digest, target: &Target<'_>) -> Result<u64, ImageError> {
    let mut blob = BufReader::new(blob);
    let packing = packing(&mut blob).at("read", target.folder)?;
    match packing {
        Packing::Plain => {
            let blob = unpack_tar(blob, id, target)?;
            blob.1.into_inner().verify()?;
            Ok(blob.0)
        }
        Packing::Gzip => {
            let (bytes, decoder) =
                unpack_tar(flate2::bufread::MultiGzDecoder::new(blob), id, target)?;
            decoder.into_inner().into_inner().verify()?;
            Ok(bytes)
        }
        Packing::Zstd => {
            let decoder = ruzstd::decoding::StreamingDecoder::new(blob);
            let decoder = decoder.map_err(|e| ImageError::Invalid(format!("layer {id}: {e}")))?;
            let (bytes, decoder) = unpack_tar(decoder, id, target)?;
            decoder.into_inner().into_inner().verify()?;
            Ok(bytes)
        }
    }
}

/// The tar in a layer, whatever packs it.
pub(super) fn unpacked(blob: Blob) -> Result<Box<dyn Read>, ImageError> {
    let mut blob = BufReader::new(blob);
    let read = |source| ImageError::Io {
        what: "read a layer".to_owned(),
        source,
    };
    Ok(match packing(&mut blob).map_err(read)? {
        Packing::Plain => Box::new(blob),
        Packing::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(blob)),
        Packing::Zstd => {
            let decoder = ruzstd::decoding::StreamingDecoder::new(blob);
            Box::new(decoder.map_err(|e| ImageError::Invalid(format!("a layer: {e}")))?)
        }
    })
}

/// How a layer is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Packing {
    Plain,
    Gzip,
    Zstd,
}

/// By the first bytes: RFC 1952 and RFC 8878.
pub(super) fn packing(blob: &mut impl BufRead) -> io::Result<Packing> {
    let start = blob.fill_buf()?;
    Ok(match start {
        [0x1f, 0x8b, ..] => Packing::Gzip,
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Packing::Zstd,
        _ => Packing::Plain,
    })
}

fn unpack_tar<R: Read>(
    reader: R,
    id: &Digest,
    target: &Target<'_>,
) -> Result<(u64, R), ImageError> {
    let folder = target.folder;
    let root = GuestRoot::open(folder).at("open", folder)?;
    let frame = File::create(target.frame).at("make", target.frame)?;
    let mut bytes = 0;
    let recording = Recording::new(Hashing::new(reader), frame);
    let recorder = recording.recorder();
    let mut tar = tar::Archive::new(recording);
    for (count, entry) in (0_u64..).zip(tar.entries().at("read", folder)?) {
        let mut entry = entry.map_err(|e| wrong(id, "an entry", e))?;
        bytes += entry.size();
        if bytes > BYTES_MAX || count > ENTRIES_MAX {
            return Err(ImageError::Invalid(format!("layer {id} is too large")));
        }
        let name = entry.path_bytes().into_owned();
        let name = PathBuf::from(OsStr::from_bytes(&name));
        record(&recorder, &name, &entry)
            .and_then(|()| place(&root, &name, &mut entry))
            .map_err(|e| wrong(id, &name.display().to_string(), e))?;
    }
    let recorded = tar.into_inner().finish();
    let hashing = recorded.at("read to", target.frame)?;
    Ok((bytes, hashing.verify(id)?))
}

/// A file's content need not be in the frame.
fn record<R: Read>(recorder: &Recorder, path: &Path, entry: &Entry<'_, R>) -> io::Result<()> {
    let kind = entry.header().entry_type();
    let is_file = matches!(kind, EntryType::Regular | EntryType::Continuous);
    match inside(path)?.filter(|path| is_file && path.to_str().is_some()) {
        Some(path) => recorder.content(&path, entry.raw_file_position(), entry.size()),
        None => Ok(()),
    }
}

fn wrong(id: &Digest, name: &str, source: io::Error) -> ImageError {
    ImageError::Io {
        what: format!("layer {id}: {name}"),
        source,
    }
}

/// A path of a layer below its root: no `..`, no beginning slash. `None` is the root itself.
fn inside(path: &Path) -> io::Result<Option<PathBuf>> {
    let mut clean = PathBuf::new();
    for part in path.components() {
        match part {
            Component::Normal(name) => clean.push(name),
            Component::RootDir | Component::CurDir => {}
            Component::ParentDir | Component::Prefix(_) => {
                return Err(io::Error::other("the path leads out of the layer"));
            }
        }
    }
    Ok((!clean.as_os_str().is_empty()).then_some(clean))
}

fn place<R: Read>(root: &GuestRoot, path: &Path, entry: &mut Entry<'_, R>) -> io::Result<()> {
    let Some(path) = inside(path)? else {
        let folder = root.folder(Path::new("."))?;
        return finish_folder(&folder, entry);
    };
    let (parent, name) = root.parent(&path)?;
    let name = name.as_bytes();
    if name == OPAQUE {
        return Ok(rustix::fs::fsetxattr(
            open_folder(&parent)?,
            "trusted.overlay.opaque",
            b"y",
            XattrFlags::empty(),
        )?);
    }
    if let Some(gone) = name.strip_prefix(WHITEOUT) {
        return whiteout(&parent, gone);
    }
    let kind = entry.header().entry_type();
    if kind != EntryType::Directory {
        remove(&parent, name)?;
    }
    match kind {
        EntryType::Directory => make_folder(&parent, name, entry),
        EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
            make_file(&parent, name, entry)
        }
        EntryType::Symlink => make_link(&parent, name, entry),
        EntryType::Link => hard_link(root, &parent, name, entry),
        EntryType::Fifo => {
            let mode = Mode::from_raw_mode(entry.header().mode()? & 0o7777);
            rustix::fs::mknodat(&parent, name, FileType::Fifo, mode, 0)?;
            own(&parent, name, entry)
        }
        EntryType::Char | EntryType::Block => Ok(()),
        // Records that describe the archive.
        _ => Ok(()),
    }
}

fn whiteout(parent: &OwnedFd, gone: &[u8]) -> io::Result<()> {
    // `.wh..wh.…` is AUFS's own bookkeeping.
    if gone.starts_with(WHITEOUT) {
        return Ok(());
    }
    if matches!(gone, b"" | b"." | b"..") {
        return Err(io::Error::other("a whiteout of nothing"));
    }
    remove(parent, gone)?;
    Ok(rustix::fs::mknodat(
        parent,
        gone,
        FileType::CharacterDevice,
        Mode::empty(),
        0,
    )?)
}

/// Removes what an earlier entry of the layer has made; a folder only when it is empty.
fn remove(parent: &OwnedFd, name: &[u8]) -> io::Result<()> {
    match rustix::fs::unlinkat(parent, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(Errno::ISDIR) => Ok(rustix::fs::unlinkat(parent, name, AtFlags::REMOVEDIR)?),
        Err(error) => Err(error.into()),
    }
}

fn make_folder<R: Read>(parent: &OwnedFd, name: &[u8], entry: &mut Entry<'_, R>) -> io::Result<()> {
    let open = || {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        rustix::fs::openat(parent, name, flags, Mode::empty())
    };
    let folder = match rustix::fs::mkdirat(parent, name, Mode::from_raw_mode(0o700)) {
        Err(Errno::EXIST) => match open() {
            // A file or a link was there; a link to a folder is replaced, too, as layers are unpacked by everyone.
            Err(Errno::NOTDIR | Errno::LOOP) => {
                remove(parent, name)?;
                rustix::fs::mkdirat(parent, name, Mode::from_raw_mode(0o700))?;
                open()?
            }
            other => other?,
        },
        other => {
            other?;
            open()?
        }
    };
    finish_folder(&folder, entry)
}

fn finish_folder<R: Read>(folder: &OwnedFd, entry: &mut Entry<'_, R>) -> io::Result<()> {
    let folder = open_folder(folder)?;
    let (uid, gid) = owner(entry)?;
    rustix::fs::fchown(&folder, Some(uid), Some(gid))?;
    rustix::fs::fchmod(
        &folder,
        Mode::from_raw_mode(entry.header().mode()? & 0o7777),
    )?;
    set_xattrs(&folder, entry)
}

fn make_file<R: Read>(parent: &OwnedFd, name: &[u8], entry: &mut Entry<'_, R>) -> io::Result<()> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = rustix::fs::openat(parent, name, flags, Mode::from_raw_mode(0o600))?;
    let mut file = File::from(file);
    io::copy(entry, &mut file)?;
    let (uid, gid) = owner(entry)?;
    // The owner first: a change of owner takes set-user-id away.
    rustix::fs::fchown(&file, Some(uid), Some(gid))?;
    rustix::fs::fchmod(&file, Mode::from_raw_mode(entry.header().mode()? & 0o7777))?;
    set_xattrs(file.as_fd(), entry)?;
    let seconds = i64::try_from(entry.header().mtime()?).unwrap_or_default();
    let time = Timespec {
        tv_sec: seconds,
        tv_nsec: 0,
    };
    let times = Timestamps {
        last_access: time,
        last_modification: time,
    };
    Ok(rustix::fs::futimens(&file, &times)?)
}

fn make_link<R: Read>(parent: &OwnedFd, name: &[u8], entry: &mut Entry<'_, R>) -> io::Result<()> {
    let target = entry.link_name_bytes().unwrap_or_default().into_owned();
    rustix::fs::symlinkat(target.as_slice(), parent, name)?;
    own(parent, name, entry)
}

fn hard_link<R: Read>(
    root: &GuestRoot,
    parent: &OwnedFd,
    name: &[u8],
    entry: &mut Entry<'_, R>,
) -> io::Result<()> {
    let target = entry.link_name_bytes().unwrap_or_default().into_owned();
    let target = inside(Path::new(OsStr::from_bytes(&target)))?;
    let target = target.ok_or_else(|| io::Error::other("a link to the root"))?;
    let (target_parent, target_name) = root.parent(&target)?;
    Ok(rustix::fs::linkat(
        &target_parent,
        target_name,
        parent,
        name,
        AtFlags::empty(),
    )?)
}

fn own<R: Read>(parent: &OwnedFd, name: &[u8], entry: &Entry<'_, R>) -> io::Result<()> {
    let (uid, gid) = owner(entry)?;
    let flags = AtFlags::SYMLINK_NOFOLLOW;
    Ok(rustix::fs::chownat(
        parent,
        name,
        Some(uid),
        Some(gid),
        flags,
    )?)
}

fn owner<R: Read>(entry: &Entry<'_, R>) -> io::Result<(Uid, Gid)> {
    let number = |id: u64| {
        let id = u32::try_from(id).ok().filter(|id| *id != u32::MAX);
        id.ok_or_else(|| io::Error::other("an owner beyond what there can be"))
    };
    let uid = Uid::from_raw(number(entry.header().uid()?)?);
    Ok((uid, Gid::from_raw(number(entry.header().gid()?)?)))
}

fn set_xattrs<R: Read>(file: impl AsFd, entry: &mut Entry<'_, R>) -> io::Result<()> {
    let Some(records) = entry.pax_extensions()? else {
        return Ok(());
    };
    for record in records {
        let record = record?;
        let Some(name) = record
            .key()
            .ok()
            .and_then(|key| key.strip_prefix(PAX_XATTR))
        else {
            continue;
        };
        if XATTRS.iter().any(|known| name.starts_with(known)) {
            rustix::fs::fsetxattr(
                file.as_fd(),
                name,
                record.value_bytes(),
                XattrFlags::empty(),
            )?;
        }
    }
    Ok(())
}

/// The same folder, open for more than its path.
fn open_folder(folder: &OwnedFd) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(folder, ".", flags, Mode::empty())?)
}

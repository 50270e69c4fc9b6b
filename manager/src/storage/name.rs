// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Names of storages and volumes, checked once. A value of these types can never leave its storage's folder:
//! no separators, no leading dot, no control characters.
//!
//! ```text
//! local:100/vm-100-disk-0.raw     StorageName ':' VolumeName::Image, the ending says the format
//! local:vztmpl/debian.tar.zst     StorageName ':' VolumeName::File { content, name }
//! ```

use std::fmt;
use std::str::FromStr;

pub use atoll_disk::Format;

use crate::id::{GuestId, InvalidId};

/// Formats that guests' disks may have.
pub const FORMATS: [Format; 2] = [Format::Raw, Format::Qcow2];
/// Longest file name of a volume, in bytes; leaves room for suffixes within the 255 of Linux's file systems.
const FILE_NAME_BYTES_MAX: usize = 200;

/// Name of a storage, as in the section headers of `storage.cfg`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StorageName(String);

impl StorageName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for StorageName {
    type Err = InvalidId;

    fn from_str(text: &str) -> Result<Self, InvalidId> {
        let bytes = text.as_bytes();
        let inner = |b: &u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-');
        let fits = bytes.len() >= 2
            && bytes.len() <= 100
            && bytes[0].is_ascii_alphabetic()
            && bytes[bytes.len() - 1].is_ascii_alphanumeric()
            && bytes.iter().all(inner);
        if fits {
            Ok(Self(text.to_owned()))
        } else {
            Err(invalid(text, "storage ID"))
        }
    }
}

impl fmt::Display for StorageName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a volume is for. The words are PVE's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Content {
    /// Disks of virtual machines.
    Images,
    /// Root file systems and mount points of containers.
    Rootdir,
    /// Container templates.
    Vztmpl,
    /// CD images.
    Iso,
    /// Small files: kernels, initial RAM disks, cloud-init data, hook scripts.
    Snippets,
    /// Backup archives.
    Backup,
    /// Disk images from elsewhere, to make guests' disks from.
    Import,
}

impl Content {
    /// Every kind, in the order in which PVE lists them.
    pub const ALL: [Self; 7] = [
        Self::Images,
        Self::Rootdir,
        Self::Vztmpl,
        Self::Iso,
        Self::Snippets,
        Self::Backup,
        Self::Import,
    ];

    /// PVE's word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Images => "images",
            Self::Rootdir => "rootdir",
            Self::Vztmpl => "vztmpl",
            Self::Iso => "iso",
            Self::Snippets => "snippets",
            Self::Backup => "backup",
            Self::Import => "import",
        }
    }

    /// Endings that a file of this content may have; none means any.
    pub fn endings(self) -> &'static [&'static str] {
        match self {
            // A plain one holds an OCI image.
            Self::Vztmpl => &[".tar.gz", ".tar.xz", ".tar.zst", ".tar"],
            Self::Iso => &[".iso", ".img"],
            Self::Backup => &[
                ".vma", ".vma.gz", ".vma.lzo", ".vma.zst", ".tar", ".tar.gz", ".tar.lzo",
                ".tar.zst", ".tgz",
            ],
            Self::Import => &[".qcow2", ".raw", ".vmdk", ".ova", ".ovf"],
            Self::Images | Self::Rootdir | Self::Snippets => &[],
        }
    }
}

impl FromStr for Content {
    type Err = InvalidId;

    fn from_str(text: &str) -> Result<Self, InvalidId> {
        Self::ALL
            .into_iter()
            .find(|content| content.as_str() == text)
            .ok_or_else(|| invalid(text, "content type"))
    }
}

impl fmt::Display for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Name of a volume within its storage.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum VolumeName {
    /// A disk that belongs to a guest: `100/vm-100-disk-0.raw`.
    Image {
        /// The guest that owns it.
        guest: GuestId,
        /// File name, `vm-GUEST-…​.raw` or `.qcow2`.
        file: String,
    },
    /// A file that belongs to nobody: `iso/x.iso`.
    File {
        /// Which kind, never [`Content::Images`] nor [`Content::Rootdir`].
        content: Content,
        /// File name with an ending that fits the content.
        file: String,
    },
}

impl VolumeName {
    /// The disk of a guest with a name such as `disk-0`.
    pub fn image(guest: GuestId, name: &str, format: Format) -> Result<Self, InvalidId> {
        format!("{guest}/vm-{guest}-{name}.{}", format.name()).parse()
    }

    /// A file of some content.
    pub fn file(content: Content, file: &str) -> Result<Self, InvalidId> {
        let endings = content.endings();
        let owned_by_guest = matches!(content, Content::Images | Content::Rootdir);
        let ending_fits = endings.is_empty() || endings.iter().any(|end| file.ends_with(end));
        if owned_by_guest || !is_file_name(file) || !ending_fits {
            return Err(invalid(file, "file name for this content type"));
        }
        Ok(Self::File {
            content,
            file: file.to_owned(),
        })
    }

    /// Content type; a container's disk counts as an image here, since the name does not tell.
    pub fn content(&self) -> Content {
        match self {
            Self::Image { .. } => Content::Images,
            Self::File { content, .. } => *content,
        }
    }

    /// The guest that owns it, if it has an owner.
    pub fn owner(&self) -> Option<GuestId> {
        match self {
            Self::Image { guest, .. } => Some(*guest),
            Self::File { .. } => None,
        }
    }

    /// Format of the disk image in it, by the ending; none in what is no image, or of a format that nothing here reads.
    pub fn image_format(&self) -> Option<Format> {
        match self.content() {
            Content::Images | Content::Import => parse_format(self.format()),
            _ => None,
        }
    }

    /// PVE's word for the format, by the ending: `raw`, `iso`, `tzst` and so on.
    pub fn format(&self) -> &str {
        let (Self::Image { file, .. } | Self::File { file, .. }) = self;
        match (self.content(), file.rsplit_once('.')) {
            (Content::Snippets, _) => "snippet",
            (Content::Iso, _) => "iso",
            (Content::Vztmpl, Some((_, "gz"))) => "tgz",
            (Content::Vztmpl, Some((_, "xz"))) => "txz",
            (Content::Vztmpl, Some((_, "zst"))) => "tzst",
            (_, Some((_, ending))) => ending,
            (_, None) => "raw",
        }
    }
}

impl FromStr for VolumeName {
    type Err = InvalidId;

    fn from_str(text: &str) -> Result<Self, InvalidId> {
        let wrong = || invalid(text, "volume name");
        let (folder, file) = text.split_once('/').ok_or_else(wrong)?;
        if let Ok(content) = folder.parse::<Content>() {
            return Self::file(content, file).map_err(|_| wrong());
        }
        let guest: GuestId = folder.parse().map_err(|_| wrong())?;
        let disk = file
            .strip_prefix(&format!("vm-{guest}-"))
            .and_then(|rest| {
                let endings = FORMATS.iter().map(|format| format.name());
                let mut stems = endings.filter_map(|end| rest.strip_suffix(end)?.strip_suffix('.'));
                stems.next()
            })
            .ok_or_else(wrong)?;
        // "0100/…" parses as a number but would be a second name of the same disk.
        if disk.is_empty() || !is_file_name(file) || folder != guest.to_string() {
            return Err(wrong());
        }
        Ok(Self::Image {
            guest,
            file: file.to_owned(),
        })
    }
}

impl fmt::Display for VolumeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Image { guest, file } => write!(f, "{guest}/{file}"),
            Self::File { content, file } => write!(f, "{content}/{file}"),
        }
    }
}

/// A volume with its storage: PVE's volid.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct VolumeId {
    /// Where it is.
    pub storage: StorageName,
    /// Which one.
    pub name: VolumeName,
}

impl FromStr for VolumeId {
    type Err = InvalidId;

    fn from_str(text: &str) -> Result<Self, InvalidId> {
        let (storage, name) = text
            .split_once(':')
            .ok_or_else(|| invalid(text, "volume ID"))?;
        Ok(Self {
            storage: storage.parse()?,
            name: name.parse().map_err(|_| invalid(text, "volume ID"))?,
        })
    }
}

impl fmt::Display for VolumeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.storage, self.name)
    }
}

/// A format of disk images by its name.
pub fn parse_format(text: &str) -> Option<Format> {
    FORMATS.into_iter().find(|format| format.name() == text)
}

fn is_file_name(text: &str) -> bool {
    let bytes = text.as_bytes();
    let fits = |b: &u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-' | b'+' | b'@');
    bytes.len() <= FILE_NAME_BYTES_MAX
        && bytes.first().is_some_and(u8::is_ascii_alphanumeric)
        && bytes.iter().all(fits)
}

fn invalid(text: &str, what: &'static str) -> InvalidId {
    InvalidId {
        text: text.to_owned(),
        what,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn volids_round_trip() {
        for text in [
            "local:100/vm-100-disk-0.raw",
            "local:100/vm-100-cloudinit.raw",
            "local:100/vm-100-disk-1.qcow2",
            "local:import/debian-13.qcow2",
            "local-2.x:vztmpl/debian-12_20260101.tar.zst",
            "local:iso/x.iso",
            "local:snippets/vmlinuz",
            "local:backup/vzdump-qemu-100-2026_01_01-00_00_00.vma.zst",
        ] {
            assert_eq!(text.parse::<VolumeId>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn hostile_names_are_refused() {
        for text in [
            "",
            ":",
            "local:",
            "local:/etc/passwd",
            "local:../x",
            "local:iso/../x.iso",
            "local:iso//x.iso",
            "local:iso/.x.iso",
            "local:iso/a/b.iso",
            "local:iso/x\0.iso",
            "local:iso/x y.iso",
            "local:iso/-x\n.iso",
            "local:iso/-rf.iso",
            "local:iso/x.exe",
            "local:vztmpl/x.iso",
            "local:images/x.raw",
            "local:100/vm-101-disk-0.raw",
            "local:100/vm-100-.raw",
            "local:100/vm-100-disk-0.vmdk",
            "local:100/vm-100-disk-0.rawqcow2",
            "local:import/x.exe",
            "local:100/vm-100-/../../x.raw",
            "local:0100/vm-100-disk-0.raw",
            "local:99/vm-99-disk-0.raw",
            "../x:iso/x.iso",
            "l:iso/x.iso",
            "local-:iso/x.iso",
        ] {
            assert!(text.parse::<VolumeId>().is_err(), "{text:?} was accepted");
        }
        let long = format!("local:iso/{}.iso", "x".repeat(300));
        assert!(long.parse::<VolumeId>().is_err());
    }
}

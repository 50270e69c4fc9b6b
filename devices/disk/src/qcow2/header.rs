// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The header of a qcow2 image, read before anything else looks at the file: what is malformed or not supported
//! is told in one sentence, and no table is larger than a sane image's.
//!
//! Offsets and bits are those of QEMU's `docs/interop/qcow2.rst`; all numbers are big-endian.

/// Bytes of the file that are looked at. Header, extensions and the backing file's name lie in the first
/// cluster; of larger clusters no more than this is used for them.
pub(crate) const HEAD_BYTES: usize = 64 << 10;
const MAGIC: u32 = 0x5146_49fb;
/// Fields of version 2, and of version 3 without the optional ones.
const V2_BYTES: u32 = 72;
const V3_BYTES: u32 = 104;
/// QEMU's own bounds: 32 MiB for the first-level table, 8 MiB for the refcount table.
const L1_BYTES_MAX: u64 = 32 << 20;
pub(crate) const REFCOUNT_TABLE_BYTES_MAX: u64 = 8 << 20;
/// Extension that names the backing file's format.
const BACKING_FORMAT: u32 = 0xe279_2aca;
const BACKING_NAME_BYTES_MAX: u32 = 1023;
/// Extension that names features, for messages; and an entry: two numbers, and the name.
const FEATURE_NAMES: u32 = 0x6803_f857;
const FEATURE_NAME_BYTES: u32 = 48;

/// The incompatible features, by bit, and what to do about each.
const INCOMPATIBLE: [(&str, &str); 5] = [
    ("", ""), // In use, or left by who was killed: `repair`.
    ("is marked corrupt", "repair it: qemu-img check -r all"),
    (
        "has its data in another file",
        "convert it: qemu-img convert -O qcow2",
    ),
    ("", ""), // Compression type: looked at by itself.
    (
        "has extended L2 entries",
        "convert it: qemu-img convert -O qcow2",
    ),
];
/// The bit of an image whose reference counts are not to be relied on.
const DIRTY_BIT: usize = 0;
/// The bit that a compression type other than zlib sets, and the types.
const COMPRESSION_TYPE_BIT: usize = 3;
const ZLIB: u8 = 0;
const ZSTD: u8 = 1;

/// What is wrong with an image, or why its tables cannot be read. Every one is before its first request.
#[derive(Debug, thiserror::Error)]
pub enum Qcow2Error {
    /// Not the format that the spec says.
    #[error("is not a qcow2 image: say its real format")]
    Magic,
    /// A version of the format that nobody has seen.
    #[error("is qcow2 version {0}, expected 2 or 3")]
    Version(u32),
    /// The file ends within the header, or a field points nowhere.
    #[error("malformed qcow2 header: {what} is {value}, expected {expected}")]
    Field {
        /// The field.
        what: &'static str,
        /// Its value.
        value: u64,
        /// What would be right.
        expected: &'static str,
    },
    /// A copy that failed, or a file system that was full.
    #[error(
        "the image is cut off: {what} ends at byte {end}, the file at {file_bytes}: copy it again, or see what is left \
         of it: qemu-img check"
    )]
    CutOff {
        /// What the file has no longer.
        what: &'static str,
        /// Where that should end.
        end: u64,
        /// The file's size.
        file_bytes: u64,
    },
    /// A feature of the image.
    #[error("{what}, which is not supported: {remedy}")]
    Feature {
        /// The feature.
        what: &'static str,
        /// What to do.
        remedy: &'static str,
    },
    /// The header names a file that the spec does not.
    #[error(
        "its header names the backing file {name:?}, which the disk's spec does not: add backing=, or rebase it"
    )]
    UnnamedBacking {
        /// The name in the header.
        name: String,
    },
    /// The spec names a file that the header does not.
    #[error("the disk's spec names a backing file, but the image's header names none")]
    NoBacking,
    /// The spec and the header disagree.
    #[error("its header says that its backing file is {told}, the disk's spec says {named}")]
    BackingFormat {
        /// By the header.
        told: String,
        /// By the spec.
        named: &'static str,
    },
    /// Who wrote to it was killed, and its tables contradict themselves.
    #[error(
        "was not closed, and its tables contradict themselves: {what} at byte {offset}: qemu-img check -r all"
    )]
    Repair {
        /// What is wrong.
        what: &'static str,
        /// Where.
        offset: u64,
    },
    /// The library that reads the tables found something, or the kernel did.
    #[error("cannot be used as qcow2")]
    Tables(#[source] std::io::Error),
}

/// What is used of a checked header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) size_bytes: u64,
    pub(crate) cluster_bytes: u32,
    /// Version 3: that a cluster is zero can be said without its data.
    pub(crate) has_zero_clusters: bool,
    pub(crate) backing: Option<Backing>,
    /// The table of reference counts' blocks, and its size.
    pub(crate) refcount_offset: u64,
    pub(crate) refcount_clusters: u32,
    /// A count has two to this many bits.
    pub(crate) refcount_order: u32,
    pub(crate) l1: L1Place,
    /// Who wrote to it last has not closed it, or has it open.
    pub(crate) dirty: bool,
    /// Things in clusters of their own, which a writer that does not know them drops (autoclear features).
    pub(crate) has_extras: bool,
    /// Compressed clusters are zstd's, not zlib's.
    pub(crate) zstd: bool,
}

/// Where the first-level table is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct L1Place {
    pub(crate) offset: u64,
    pub(crate) entries: u32,
}

impl L1Place {
    /// As the first bytes of an image say; `None` if these are too few.
    pub(crate) fn in_header(head: &[u8]) -> Option<Self> {
        let fields = Fields(head);
        Some(Self {
            offset: fields.u64(40).ok()?,
            entries: fields.u32(36).ok()?,
        })
    }
}

/// The file that an image is a difference to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Backing {
    pub(crate) name: String,
    /// `None`: to be probed, says the header; never by us.
    pub(crate) format: Option<String>,
}

struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn u32(&self, at: usize) -> Result<u32, Qcow2Error> {
        let bytes = self.0.get(at..at.saturating_add(4));
        let bytes = bytes.ok_or(Qcow2Error::CutOff {
            what: "its header",
            end: u64::from(V3_BYTES).max(at as u64 + 4),
            file_bytes: self.0.len() as u64,
        })?;
        Ok(u32::from_be_bytes(bytes.try_into().expect("4 bytes")))
    }

    fn u64(&self, at: usize) -> Result<u64, Qcow2Error> {
        Ok(u64::from(self.u32(at)?) << 32 | u64::from(self.u32(at + 4)?))
    }

    fn text(&self, at: usize, length: usize) -> Option<String> {
        let bytes = self.0.get(at..at.checked_add(length)?)?;
        Some(String::from_utf8_lossy(bytes).into_owned())
    }
}

fn within(
    what: &'static str,
    value: u64,
    sane: bool,
    expected: &'static str,
) -> Result<(), Qcow2Error> {
    match sane {
        true => Ok(()),
        false => Err(Qcow2Error::Field {
            what,
            value,
            expected,
        }),
    }
}

impl Header {
    /// Version 3: there is a place for features.
    pub(crate) fn has_mark(&self) -> bool {
        self.has_zero_clusters
    }

    /// Checks the first entry of the table of reference counts. It covers the header itself, so there must be one; imago
    /// 0.2.6 makes one where it is missing, at the place of the header, and then another one for ever.
    pub(crate) fn check_refcounts(first_entry: [u8; 8]) -> Result<(), Qcow2Error> {
        let entry = u64::from_be_bytes(first_entry);
        let expected = "where the header's own is: qemu-img check -r all";
        within("first refcount block", entry, entry >> 9 != 0, expected)
    }

    /// Checks the first bytes of an image ([`HEAD_BYTES`], fewer if it is shorter) of `file_bytes`.
    pub(crate) fn parse(head: &[u8], file_bytes: u64) -> Result<Self, Qcow2Error> {
        let fields = Fields(head);
        if fields.u32(0).ok() != Some(MAGIC) {
            return Err(Qcow2Error::Magic);
        }
        let version = fields.u32(4)?;
        if !(2..=3).contains(&version) {
            return Err(Qcow2Error::Version(version));
        }
        check_features(&fields, version)?;
        let bits = fields.u32(20)?;
        let sane = (9..=21).contains(&bits);
        within("cluster_bits", bits.into(), sane, "9 to 21")?;
        let cluster_bytes = 1_u32 << bits;
        let size_bytes = fields.u64(24)?;
        let sane = size_bytes > 0 && size_bytes.is_multiple_of(512) && size_bytes < 1 << 56;
        let expected = "a multiple of 512 bytes, less than 64 PiB";
        within("size", size_bytes, sane, expected)?;
        let length = match version {
            2 => V2_BYTES,
            _ => check_v3(&fields, cluster_bytes)?,
        };
        check_tables(&fields, cluster_bytes, size_bytes, file_bytes)?;
        Ok(Self {
            has_zero_clusters: version == 3,
            size_bytes,
            cluster_bytes,
            backing: backing(&fields, length, cluster_bytes)?,
            refcount_offset: fields.u64(48)?,
            refcount_clusters: fields.u32(56)?,
            refcount_order: match version {
                2 => 4,
                _ => fields.u32(96)?,
            },
            l1: L1Place {
                offset: fields.u64(40)?,
                entries: fields.u32(36)?,
            },
            has_extras: version == 3 && fields.u64(88)? != 0,
            dirty: version == 3 && fields.u64(72)? & 1 << DIRTY_BIT != 0,
            zstd: is_zstd(&fields, length)?,
        })
    }
}

/// The fields of version 3 that are not features; gives the header's length.
fn check_v3(fields: &Fields<'_>, cluster_bytes: u32) -> Result<u32, Qcow2Error> {
    let order = fields.u32(96)?;
    within("refcount_order", order.into(), order <= 6, "0 to 6")?;
    let length = fields.u32(100)?;
    let sane = length >= V3_BYTES && length.is_multiple_of(8) && length <= cluster_bytes;
    let expected = "104 or more, within a cluster";
    within("header_length", length.into(), sane, expected)?;
    check_extensions(fields, length, cluster_bytes)?;
    Ok(length)
}

/// Walks the header's extensions as imago 0.2.6 does, which panics where a table of names ends within an entry.
fn check_extensions(
    fields: &Fields<'_>,
    header_length: u32,
    cluster_bytes: u32,
) -> Result<(), Qcow2Error> {
    let mut at = u64::from(header_length);
    while at + 8 <= cluster_bytes.into() {
        let place = usize::try_from(at).expect("within a cluster");
        let (Ok(kind), Ok(length)) = (fields.u32(place), fields.u32(place + 4)) else {
            // Nothing is behind the file's end. Of a large cluster we have not looked at all.
            let seen = fields.0.len() < HEAD_BYTES;
            return within("place of an extension", at, seen, "within the first 64 KiB");
        };
        if kind == 0 {
            break;
        }
        let whole = kind != FEATURE_NAMES || length.is_multiple_of(FEATURE_NAME_BYTES);
        let expected = "48 bytes for each name";
        within("feature name table", length.into(), whole, expected)?;
        at += 8 + u64::from(length).next_multiple_of(8);
    }
    Ok(())
}

fn check_features(fields: &Fields<'_>, version: u32) -> Result<(), Qcow2Error> {
    let refuse = |what, remedy| Err(Qcow2Error::Feature { what, remedy });
    if fields.u32(32)? != 0 {
        return refuse("is encrypted", "convert it: qemu-img convert");
    }
    if fields.u32(60)? != 0 {
        let remedy = "delete them (qemu-img snapshot -d), or convert it: qemu-img convert -O qcow2";
        return refuse("has internal snapshots", remedy);
    }
    if version == 2 {
        return Ok(()); // It has none.
    }
    let incompatible = fields.u64(72)?;
    let refused = incompatible & !(1 << DIRTY_BIT | 1 << COMPRESSION_TYPE_BIT);
    for (bit, (what, remedy)) in INCOMPATIBLE.into_iter().enumerate() {
        if refused & 1 << bit != 0 {
            return refuse(what, remedy);
        }
    }
    let (what, expected) = ("incompatible_features", "no unknown bit");
    within(what, incompatible, refused == 0, expected)
}

/// The compression type is an optional field; its bit says that it is there and not zlib.
fn is_zstd(fields: &Fields<'_>, header_length: u32) -> Result<bool, Qcow2Error> {
    if header_length == V2_BYTES {
        return Ok(false);
    }
    let kind = match header_length {
        V3_BYTES => ZLIB,
        _ => fields.u32(104)?.to_be_bytes()[0],
    };
    let bit = fields.u64(72)? & 1 << COMPRESSION_TYPE_BIT != 0;
    let expected = "0 for zlib without incompatible feature 3, or 1 for zstd with it";
    let sane = [(ZLIB, false), (ZSTD, true)].contains(&(kind, bit));
    within("compression_type", kind.into(), sane, expected)?;
    Ok(bit)
}

fn check_tables(
    fields: &Fields<'_>,
    cluster_bytes: u32,
    size_bytes: u64,
    file_bytes: u64,
) -> Result<(), Qcow2Error> {
    let cluster = u64::from(cluster_bytes);
    let table = |what, field, offset: u64, length: u64, length_max: u64| {
        let end = offset.checked_add(length);
        let sane = offset >= cluster && offset.is_multiple_of(cluster) && length <= length_max;
        let expected = "a table at a cluster's start, of a sane size";
        within(field, offset, sane && end.is_some(), expected)?;
        match end {
            Some(end) if end > file_bytes => Err(Qcow2Error::CutOff {
                what,
                end,
                file_bytes,
            }),
            _ => Ok(()),
        }
    };
    let l1_entries = u64::from(fields.u32(36)?);
    // An L2 table is one cluster of 8-byte entries.
    let needed = size_bytes.div_ceil(cluster * (cluster / 8));
    let expected = "enough for the disk's size";
    within("l1_size", l1_entries, l1_entries >= needed, expected)?;
    table(
        "the L1 table",
        "l1_table_offset",
        fields.u64(40)?,
        l1_entries * 8,
        L1_BYTES_MAX,
    )?;
    let clusters = u64::from(fields.u32(56)?);
    within(
        "refcount_table_clusters",
        clusters,
        clusters > 0,
        "1 or more",
    )?;
    table(
        "the table of reference counts",
        "refcount_table_offset",
        fields.u64(48)?,
        clusters * cluster,
        REFCOUNT_TABLE_BYTES_MAX,
    )
}

fn backing(
    fields: &Fields<'_>,
    header_length: u32,
    cluster_bytes: u32,
) -> Result<Option<Backing>, Qcow2Error> {
    let offset = fields.u64(8)?;
    if offset == 0 {
        return Ok(None);
    }
    let length = fields.u32(16)?;
    let end = offset.saturating_add(length.into());
    let sane = (1..=BACKING_NAME_BYTES_MAX).contains(&length)
        && end <= u64::from(cluster_bytes).min(HEAD_BYTES as u64);
    let expected = "a name of 1 to 1023 bytes in the first cluster";
    within("backing_file_offset", offset, sane, expected)?;
    let place = usize::try_from(offset)
        .ok()
        .zip(usize::try_from(length).ok());
    let name = place.and_then(|(at, length)| fields.text(at, length));
    Ok(Some(Backing {
        name: name.ok_or(Qcow2Error::Field {
            what: "the file's size",
            value: fields.0.len() as u64,
            expected: "the backing file's name",
        })?,
        format: backing_format(fields, header_length, end)?,
    }))
}

/// Walks the header's extensions: type, length, data padded to 8 bytes.
fn backing_format(
    fields: &Fields<'_>,
    header_length: u32,
    end: u64,
) -> Result<Option<String>, Qcow2Error> {
    let mut at = usize::try_from(header_length).expect("within a cluster");
    let end = usize::try_from(end).expect("within the head");
    while at + 8 <= end {
        let (kind, length) = (fields.u32(at)?, fields.u32(at + 4)?);
        let length = usize::try_from(length).expect("64-bit host");
        match kind {
            0 => break,
            BACKING_FORMAT => return Ok(fields.text(at + 8, length)),
            _ => at += 8 + length.next_multiple_of(8),
        }
    }
    Ok(None)
}

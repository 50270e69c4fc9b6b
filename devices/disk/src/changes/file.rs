// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A set of blocks in a file, from one run of a machine to the next.
//!
//! ```text
//! 0     Header (its last field is a checksum of the others)
//! 4096  the bits, 64 to a little-endian word
//! ```
//!
//! The file says `in use` while a machine runs, durably before the disk's first write; the bits are written when it
//! ends, then the header says `clean`. So after a crash, of the process or of the host, the file is known to be of no
//! use, and nothing has to be written to it while the machine runs.
//!
//! A clean file is of no use either once somebody else wrote to the image. The header has the image's change time
//! ([`ImageStamp`]) to tell; a block device has none, there it is up to who owns the device.

use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};

use zerocopy::little_endian::{I64, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::recorder::CheckpointId;
use super::set::BlockSet;

/// First bytes of every such file.
const MAGIC: [u8; 8] = *b"atollchg";
/// Version of the layout.
const VERSION: u32 = 1;
/// Where the bits begin: one page, so that a header is written by itself.
const BITS_OFFSET: u64 = 4096;
/// Smallest and largest size of a block that a file may say, bytes.
const BLOCK_BYTES: std::ops::RangeInclusive<u32> = 512..=1 << 30;
/// The machine runs, or ended without having closed the file.
const IN_USE: u32 = 0;
/// The bits are complete.
const CLEAN: u32 = 1;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Header {
    magic: [u8; 8],
    version: U32,
    state: U32,
    size_bytes: U64,
    block_bytes: U32,
    /// CRC-32 of the bits.
    bits_checksum: U32,
    checkpoint: [u8; 16],
    /// Zeroes for a block device.
    image_inode: U64,
    image_seconds: I64,
    image_nanoseconds: U32,
    /// CRC-32 of all fields above.
    checksum: U32,
}

/// Where a file's bytes are: a [`File`], or in tests something that loses them.
pub trait Medium {
    /// Fills `buffer` from `offset_bytes`; an error at the end of the file.
    fn read_exact_at(&self, buffer: &mut [u8], offset_bytes: u64) -> io::Result<()>;
    /// Writes all of it.
    fn write_all_at(&mut self, data: &[u8], offset_bytes: u64) -> io::Result<()>;
    /// Makes what was written durable.
    fn sync(&mut self) -> io::Result<()>;
}

impl Medium for File {
    fn read_exact_at(&self, buffer: &mut [u8], offset_bytes: u64) -> io::Result<()> {
        FileExt::read_exact_at(self, buffer, offset_bytes)
    }

    fn write_all_at(&mut self, data: &[u8], offset_bytes: u64) -> io::Result<()> {
        FileExt::write_all_at(self, data, offset_bytes)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.sync_data()
    }
}

/// Which state of an image a file belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ImageStamp {
    inode: u64,
    /// When the image's content or attributes changed last (`st_ctime`): unlike the time of modification, no program
    /// can set it.
    seconds: i64,
    nanoseconds: u32,
}

impl ImageStamp {
    /// Of an image file; of a block device the stamp that says nothing.
    pub fn of(metadata: &Metadata) -> Self {
        if !metadata.is_file() {
            return Self::default();
        }
        Self {
            inode: metadata.ino(),
            seconds: metadata.ctime(),
            nanoseconds: u32::try_from(metadata.ctime_nsec()).unwrap_or_default(),
        }
    }
}

/// What a file held.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Content {
    /// The disk's changes since that checkpoint.
    Changes(CheckpointId, BlockSet),
    /// Nothing that can be relied on, and why.
    Useless(&'static str),
}

/// One such file. Its caller sees to it that no two processes have it: the disk's lock covers it.
#[derive(Debug)]
pub struct ChangeFile<M = File> {
    medium: M,
}

impl<M: Medium> ChangeFile<M> {
    /// A record of changes on `medium`, of which nothing is read or written yet.
    pub fn new(medium: M) -> Self {
        Self { medium }
    }

    /// Reads what the last run left, for a disk of that size whose image is as `stamp` says.
    pub(super) fn read(&self, size_bytes: u64, stamp: ImageStamp) -> io::Result<Content> {
        let mut bytes = [0; size_of::<Header>()];
        match self.medium.read_exact_at(&mut bytes, 0) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                return Ok(Content::Useless("it is new"));
            }
            result => result?,
        }
        let header = Header::read_from_bytes(&bytes).expect("of that length");
        if let Some(reason) = header.fault(size_bytes, stamp) {
            return Ok(Content::Useless(reason));
        }
        let empty = BlockSet::new(size_bytes, header.block_bytes.get());
        let mut bits = vec![0; empty.words().len() * 8];
        match self.medium.read_exact_at(&mut bits, BITS_OFFSET) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                return Ok(Content::Useless("it is cut off"));
            }
            result => result?,
        }
        if crc32fast::hash(&bits) != header.bits_checksum.get() {
            return Ok(Content::Useless("its bits are damaged"));
        }
        let words = bits.chunks_exact(8);
        let words = words.map(|word| u64::from_le_bytes(word.try_into().expect("8 bytes")));
        let set = BlockSet::from_words(size_bytes, header.block_bytes.get(), words.collect());
        if set.exceeds_its_disk() {
            return Ok(Content::Useless("its bits are damaged"));
        }
        Ok(Content::Changes(CheckpointId(header.checkpoint), set))
    }

    /// Says durably that the file is of no use until [`ChangeFile::close`]. Before anything writes to the disk.
    pub(super) fn use_disk(&mut self) -> io::Result<()> {
        let empty = BlockSet::new(0, *BLOCK_BYTES.start());
        let header = Header::new(
            IN_USE,
            CheckpointId::default(),
            &empty,
            ImageStamp::default(),
        );
        self.medium.write_all_at(header.as_bytes(), 0)?;
        self.medium.sync()
    }

    /// Keeps the changes since `checkpoint` for the next run. After everything that writes to the disk is gone, and
    /// the image durable.
    pub(super) fn close(
        mut self,
        checkpoint: CheckpointId,
        set: &BlockSet,
        stamp: ImageStamp,
    ) -> io::Result<()> {
        let mut header = Header::new(CLEAN, checkpoint, set, stamp);
        let bits: Vec<u8> = set
            .words()
            .iter()
            .flat_map(|word| word.to_le_bytes())
            .collect();
        header.bits_checksum = crc32fast::hash(&bits).into();
        header.seal();
        self.medium.write_all_at(&bits, BITS_OFFSET)?;
        // No header may vouch for bits that a crash can still lose.
        self.medium.sync()?;
        self.medium.write_all_at(header.as_bytes(), 0)?;
        self.medium.sync()
    }
}

impl Header {
    fn new(state: u32, checkpoint: CheckpointId, set: &BlockSet, stamp: ImageStamp) -> Self {
        let mut header = Self {
            magic: MAGIC,
            version: VERSION.into(),
            state: state.into(),
            size_bytes: set.size_bytes().into(),
            block_bytes: set.block_bytes().into(),
            bits_checksum: 0.into(),
            checkpoint: checkpoint.0,
            image_inode: stamp.inode.into(),
            image_seconds: stamp.seconds.into(),
            image_nanoseconds: stamp.nanoseconds.into(),
            checksum: 0.into(),
        };
        header.seal();
        header
    }

    fn sum(&self) -> u32 {
        let bytes = self.as_bytes();
        crc32fast::hash(&bytes[..bytes.len() - size_of::<U32>()])
    }

    fn seal(&mut self) {
        self.checksum = self.sum().into();
    }

    /// Why the bits behind it must not be used.
    fn fault(&self, size_bytes: u64, stamp: ImageStamp) -> Option<&'static str> {
        let image = ImageStamp {
            inode: self.image_inode.get(),
            seconds: self.image_seconds.get(),
            nanoseconds: self.image_nanoseconds.get(),
        };
        let block_bytes = self.block_bytes.get();
        let faults = [
            (self.magic != MAGIC, "it is no record of changes"),
            (self.checksum.get() != self.sum(), "its header is damaged"),
            (
                self.version.get() != VERSION,
                "it is of another version of this program",
            ),
            (
                self.state.get() != CLEAN,
                "the machine did not end properly",
            ),
            (
                !block_bytes.is_power_of_two() || !BLOCK_BYTES.contains(&block_bytes),
                "its blocks have no possible size",
            ),
            (
                self.size_bytes.get() != size_bytes,
                "the disk had another size",
            ),
            (
                image != stamp,
                "the image was changed while no machine used it",
            ),
        ];
        faults
            .into_iter()
            .find_map(|(is_so, reason)| is_so.then_some(reason))
    }
}

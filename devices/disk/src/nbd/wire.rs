// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Numbers of the NBD protocol (`doc/proto.md`, "Values"), and its integers: big-endian.

use std::io::{self, Read};

use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Server's first eight bytes: `NBDMAGIC`.
pub(super) const HELLO: u64 = 0x4e42_444d_4147_4943;
/// Before each option, and second in the hello: `IHAVEOPT`.
pub(super) const OPTION: u64 = 0x4948_4156_454f_5054;
/// Before each reply to an option.
pub(super) const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
/// Before each request.
pub(super) const REQUEST: u32 = 0x2560_9513;
/// Before each simple reply.
pub(super) const SIMPLE_REPLY: u32 = 0x6744_6698;
/// Before each chunk of a structured reply.
pub(super) const STRUCTURED_REPLY: u32 = 0x668e_33ef;

/// Handshake flags, the same bits both ways.
pub(super) mod handshake {
    pub(in super::super) const FIXED_NEWSTYLE: u16 = 1;
    pub(in super::super) const NO_ZEROES: u16 = 2;
}

/// Options.
pub(super) mod option {
    pub(in super::super) const EXPORT_NAME: u32 = 1;
    pub(in super::super) const ABORT: u32 = 2;
    pub(in super::super) const LIST: u32 = 3;
    pub(in super::super) const INFO: u32 = 6;
    pub(in super::super) const GO: u32 = 7;
    pub(in super::super) const STRUCTURED_REPLY: u32 = 8;
    pub(in super::super) const LIST_META_CONTEXT: u32 = 9;
    pub(in super::super) const SET_META_CONTEXT: u32 = 10;
}

/// Types of replies to options.
pub(super) mod reply {
    pub(in super::super) const ACK: u32 = 1;
    pub(in super::super) const SERVER: u32 = 2;
    pub(in super::super) const INFO: u32 = 3;
    pub(in super::super) const META_CONTEXT: u32 = 4;
    pub(in super::super) const UNSUPPORTED: u32 = 1 << 31 | 1;
    pub(in super::super) const INVALID: u32 = 1 << 31 | 3;
    pub(in super::super) const UNKNOWN: u32 = 1 << 31 | 6;
    pub(in super::super) const TOO_BIG: u32 = 1 << 31 | 9;
    /// Bit of every error.
    pub(in super::super) const ERROR: u32 = 1 << 31;
}

/// Pieces of information about an export.
pub(super) mod info {
    pub(in super::super) const EXPORT: u16 = 0;
    pub(in super::super) const NAME: u16 = 1;
    pub(in super::super) const BLOCK_SIZE: u16 = 3;
}

/// Transmission flags: what an export can.
pub(super) mod ability {
    pub(in super::super) const HAS_FLAGS: u16 = 1;
    pub(in super::super) const READ_ONLY: u16 = 1 << 1;
    pub(in super::super) const SEND_FLUSH: u16 = 1 << 2;
    pub(in super::super) const SEND_FUA: u16 = 1 << 3;
    pub(in super::super) const SEND_TRIM: u16 = 1 << 5;
    pub(in super::super) const SEND_WRITE_ZEROES: u16 = 1 << 6;
    pub(in super::super) const SEND_DF: u16 = 1 << 7;
    pub(in super::super) const CAN_MULTI_CONN: u16 = 1 << 8;
}

/// Types of requests.
pub(super) mod command {
    pub(in super::super) const READ: u16 = 0;
    pub(in super::super) const WRITE: u16 = 1;
    pub(in super::super) const DISCONNECT: u16 = 2;
    pub(in super::super) const FLUSH: u16 = 3;
    pub(in super::super) const TRIM: u16 = 4;
    pub(in super::super) const WRITE_ZEROES: u16 = 6;
    pub(in super::super) const BLOCK_STATUS: u16 = 7;
    /// Flag: durable before the reply.
    pub(in super::super) const FUA: u16 = 1;
    /// Flag: zeroes keep their space.
    pub(in super::super) const NO_HOLE: u16 = 1 << 1;
    /// Flag: the reply to a read is not cut into pieces.
    pub(in super::super) const DONT_FRAGMENT: u16 = 1 << 2;
    /// Flag: one extent a context is enough.
    pub(in super::super) const ONE_EXTENT: u16 = 1 << 3;
}

/// Types of chunks.
pub(super) mod chunk {
    /// Flag: the reply's last.
    pub(in super::super) const DONE: u16 = 1;
    pub(in super::super) const NONE: u16 = 0;
    pub(in super::super) const DATA: u16 = 1;
    pub(in super::super) const HOLE: u16 = 2;
    pub(in super::super) const BLOCK_STATUS: u16 = 5;
    pub(in super::super) const ERROR: u16 = 1 << 15 | 1;
}

/// Errors of requests.
pub(super) mod error {
    pub(in super::super) const PERMISSION: u32 = 1;
    pub(in super::super) const IO: u32 = 5;
    pub(in super::super) const INVALID: u32 = 22;
    pub(in super::super) const NO_SPACE: u32 = 28;
    pub(in super::super) const OVERFLOW: u32 = 75;
}

/// An option's head; its data follows.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct OptionHead {
    pub(super) magic: U64,
    pub(super) option: U32,
    pub(super) length: U32,
}

/// Head of a reply to an option; its data follows.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct OptionReplyHead {
    pub(super) magic: U64,
    pub(super) option: U32,
    pub(super) kind: U32,
    pub(super) length: U32,
}

/// A request.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct RequestHead {
    pub(super) magic: U32,
    pub(super) flags: U16,
    pub(super) command: U16,
    pub(super) cookie: [u8; 8],
    pub(super) offset: U64,
    pub(super) length: U32,
}

/// Head of a simple reply; a read's data follows.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct SimpleReplyHead {
    pub(super) magic: U32,
    pub(super) error: U32,
    pub(super) cookie: [u8; 8],
}

/// Head of a chunk; its data follows.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct ChunkHead {
    pub(super) magic: U32,
    pub(super) flags: U16,
    pub(super) kind: U16,
    pub(super) cookie: [u8; 8],
    pub(super) length: U32,
}

/// Reads one of the above.
pub(super) fn read<T: FromBytes + IntoBytes>(stream: &mut impl Read) -> io::Result<T> {
    let mut value = T::new_zeroed();
    stream.read_exact(value.as_mut_bytes())?;
    Ok(value)
}

/// Takes integers and texts off the front of an option's data.
pub(super) struct Fields<'a>(pub(super) &'a [u8]);

impl<'a> Fields<'a> {
    pub(super) fn u16(&mut self) -> Option<u16> {
        let bytes = self.0.split_off(..2)?;
        Some(u16::from_be_bytes(bytes.try_into().ok()?))
    }

    pub(super) fn u64(&mut self) -> Option<u64> {
        let bytes = self.0.split_off(..8)?;
        Some(u64::from_be_bytes(bytes.try_into().ok()?))
    }

    pub(super) fn u32(&mut self) -> Option<u32> {
        let bytes = self.0.split_off(..4)?;
        Some(u32::from_be_bytes(bytes.try_into().ok()?))
    }

    /// A text with its length before it; what is not UTF-8 names nothing here.
    pub(super) fn text(&mut self) -> Option<&'a str> {
        let length = usize::try_from(self.u32()?).ok()?;
        let bytes = self.0.split_off(..length)?;
        Some(std::str::from_utf8(bytes).unwrap_or("\u{fffd}"))
    }
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! How an open file gets zeroes or loses space: by fallocate(2) where its file system can, by writing otherwise.
//!
//! Shared by both engines: which way comes first, and which next when the kernel says that it has no such thing.
#![expect(
    unsafe_code,
    reason = "a static full of zeroes as ranges for the kernel"
)]

use std::io;

use crate::backend::{Operation, Space};
use crate::segments::Segments;

/// Zeroes to write from. Aligned for direct I/O to any device.
#[repr(align(4096))]
struct Zeroes([u8; ZEROES_BYTES]);

const ZEROES_BYTES: usize = 64 << 10;
static ZEROES: Zeroes = Zeroes([0; ZEROES_BYTES]);

/// Longest request that is taken ([`crate::Abilities::range_bytes_max`]), so that one list of ranges can write all of it (`IOV_MAX` is 1024).
pub(crate) const LENGTH_BYTES_MAX: u64 = 1024 * ZEROES_BYTES as u64;

/// One way to do it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    /// Cut a hole.
    Punch,
    /// Turn the range into reserved space that reads as zeroes.
    ZeroRange,
    /// Write zeroes.
    Write,
    /// Leave it: a discard is advice.
    Nothing,
}

impl Way {
    /// The first to be tried; `None` for an operation that is not of this kind.
    pub(crate) fn first(operation: Operation) -> Option<(Self, u64)> {
        match operation {
            Operation::Discard { length_bytes } => Some((Self::Punch, length_bytes)),
            Operation::WriteZeroes {
                length_bytes,
                space,
            } => Some(match space {
                Space::Free => (Self::Punch, length_bytes),
                Space::Keep => (Self::ZeroRange, length_bytes),
            }),
            Operation::Read | Operation::Write | Operation::Flush => None,
        }
    }

    /// The next, if `error` says that the kernel does not have this one for this file.
    pub(crate) fn after(self, operation: Operation, error: &io::Error) -> Option<Self> {
        let missing = matches!(
            error.raw_os_error(),
            Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV | libc::EINVAL)
        );
        match self {
            Self::Punch | Self::ZeroRange if missing => Some(match operation {
                Operation::Discard { .. } => Self::Nothing,
                _ => Self::Write,
            }),
            _ => None,
        }
    }

    /// Mode for fallocate(2), for the ways that use it.
    pub(crate) fn fallocate_mode(self) -> Option<i32> {
        match self {
            Self::Punch => Some(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE),
            Self::ZeroRange => Some(libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE),
            Self::Write | Self::Nothing => None,
        }
    }
}

/// Ranges that hold `length_bytes` zeroes, for the kernel to read.
pub(crate) fn zeroes(length_bytes: u64) -> Segments {
    let mut left = usize::try_from(length_bytes).expect("at most LENGTH_BYTES_MAX");
    let mut segments = Segments::new();
    while left > 0 {
        let count = left.min(ZEROES_BYTES);
        // SAFETY: a static is there for ever, and this list is only ever written from, never into.
        unsafe { segments.push(ZEROES.0.as_ptr().cast_mut(), count) };
        left -= count;
    }
    segments
}

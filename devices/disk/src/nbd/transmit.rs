// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Requests after the negotiation, one at a time, in their order (`doc/proto.md`, "Transmission").

use std::io::{self, Read, Write};
use std::ops::Range;

use zerocopy::IntoBytes;

use super::NbdError;
use super::access::{Access, PIECE_BYTES_MAX};
use super::negotiate::{Agreed, Context, PAYLOAD_BYTES_MAX};
use super::wire::{
    self, ChunkHead, REQUEST, RequestHead, SIMPLE_REPLY, STRUCTURED_REPLY, SimpleReplyHead,
    ability, chunk, command, error,
};
use crate::backend::Space;
use crate::changes::BlockSet;

/// Data of one chunk: as much as an access takes.
const CHUNK_BYTES: u32 = 1 << 20;
const _: () = assert!(CHUNK_BYTES as usize == PIECE_BYTES_MAX);
/// Extents of one answer, in one context; a client asks for the rest.
const EXTENTS_MAX: usize = 8192;
/// Longest data of a refused request that is read to be thrown away.
const SKIPPED_BYTES_MAX: u64 = 64 << 20;
/// `base:allocation`: there is data, as far as anybody knows who has not read it.
const DATA: u32 = 0;
/// `qemu:dirty-bitmap`: it changed.
const DIRTY: u32 = 1;

/// Until the client leaves.
pub(super) fn transmit(
    stream: &mut (impl Read + Write),
    agreed: &Agreed<'_>,
    access: &mut Access,
) -> Result<(), NbdError> {
    let mut buffer = vec![0; PIECE_BYTES_MAX];
    let content = &agreed.export.content;
    let bounds = Bounds {
        size_bytes: content.size_bytes(),
        unit_bytes: content.unit_bytes().into(),
        writable: content.abilities() & ability::READ_ONLY == 0,
    };
    loop {
        let head: RequestHead = wire::read(stream)?;
        if head.magic.get() != REQUEST {
            return Err(NbdError::Protocol("it sends something that is no request"));
        }
        let mut replies = Replies {
            stream,
            structured: agreed.structured,
            cookie: head.cookie,
        };
        match head.command.get() {
            command::DISCONNECT => return Ok(()),
            command::READ => replies.read(&head, bounds, access, &mut buffer)?,
            command::WRITE => replies.write(&head, bounds, access, &mut buffer)?,
            command::TRIM | command::WRITE_ZEROES => replies.clear(&head, bounds, access)?,
            command::BLOCK_STATUS => replies.block_status(&head, agreed, bounds.size_bytes)?,
            command::FLUSH => replies.end(access.flush())?,
            _ => replies.refuse(error::INVALID, "no such request")?,
        }
    }
}

/// What requests have to keep to.
#[derive(Clone, Copy)]
struct Bounds {
    size_bytes: u64,
    unit_bytes: u64,
    writable: bool,
}

impl Bounds {
    /// The request's range, or why it has none here.
    fn check(self, head: &RequestHead) -> Result<Range<u64>, (u32, &'static str)> {
        let (start, length) = (head.offset.get(), u64::from(head.length.get()));
        let end = start.checked_add(length);
        let end = end.filter(|end| *end <= self.size_bytes && length > 0);
        let end = end.ok_or((error::INVALID, "the range is not on the disk"))?;
        match (start | end).is_multiple_of(self.unit_bytes) {
            true => Ok(start..end),
            false => Err((error::INVALID, "the range cuts a block")),
        }
    }

    /// The same of a request that changes something.
    fn check_change(self, head: &RequestHead) -> Result<Range<u64>, (u32, &'static str)> {
        match self.writable {
            true => self.check(head),
            false => Err((error::PERMISSION, "the export is read-only")),
        }
    }
}

/// Throws away the data of a request that is refused anyway.
fn skip(stream: &mut impl Read, length: u64) -> Result<(), NbdError> {
    if length > SKIPPED_BYTES_MAX {
        return Err(NbdError::Protocol("it sends a write of more than 64 MiB"));
    }
    io::copy(&mut stream.take(length), &mut io::sink())?;
    Ok(())
}

/// Answers to one request.
struct Replies<'a, S> {
    stream: &'a mut S,
    structured: bool,
    cookie: [u8; 8],
}

impl<S: Read + Write> Replies<'_, S> {
    fn read(
        &mut self,
        head: &RequestHead,
        bounds: Bounds,
        access: &mut Access,
        buffer: &mut [u8],
    ) -> Result<(), NbdError> {
        let (offset, length) = (head.offset.get(), head.length.get());
        let whole = head.flags.get() & command::DONT_FRAGMENT != 0;
        if let Err((number, reason)) = bounds.check(head) {
            return self.refuse(number, reason);
        }
        if length > PAYLOAD_BYTES_MAX || whole && length > CHUNK_BYTES {
            return self.refuse(error::OVERFLOW, "too much for one reply");
        }
        let mut done = 0;
        while done < length {
            let count = (length - done).min(CHUNK_BYTES);
            let at = offset + u64::from(done);
            let data = &mut buffer[..usize::try_from(count).expect("1 MiB")];
            if let Err(failed) = access.read(at, data) {
                if done > 0 && !self.structured {
                    // The reply has begun as a success: only the connection's end can tell.
                    return Err(NbdError::Connection(failed));
                }
                return self.refuse(error::IO, &failed.to_string());
            }
            done += count;
            match self.structured {
                true => self.piece(at, data, done == length)?,
                false => {
                    if done == count {
                        self.head(0)?;
                    }
                    self.stream.write_all(data)?;
                }
            }
        }
        Ok(())
    }

    /// Takes the request's data, all of it, whatever becomes of it.
    fn write(
        &mut self,
        head: &RequestHead,
        bounds: Bounds,
        access: &mut Access,
        buffer: &mut [u8],
    ) -> Result<(), NbdError> {
        let range = match bounds.check_change(head) {
            Ok(range) => range,
            Err((number, reason)) => {
                skip(self.stream, head.length.get().into())?;
                return self.refuse(number, reason);
            }
        };
        if head.length.get() > PAYLOAD_BYTES_MAX {
            skip(self.stream, head.length.get().into())?;
            return self.refuse(error::OVERFLOW, "too much for one request");
        }
        let mut done = Ok(());
        let mut at = range.start;
        while at < range.end {
            let count = (range.end - at).min(CHUNK_BYTES.into());
            let piece = &mut buffer[..usize::try_from(count).expect("1 MiB")];
            self.stream.read_exact(piece)?;
            if done.is_ok() {
                done = access.write(at, piece);
            }
            at += count;
        }
        self.end(done.and_then(|()| sync(head, access)))
    }

    /// Discards or zeroes a range.
    fn clear(
        &mut self,
        head: &RequestHead,
        bounds: Bounds,
        access: &mut Access,
    ) -> Result<(), NbdError> {
        let range = match bounds.check_change(head) {
            Ok(range) => range,
            Err((number, reason)) => return self.refuse(number, reason),
        };
        let done = match (head.command.get(), head.flags.get() & command::NO_HOLE) {
            (command::TRIM, _) => access.discard(range),
            (_, 0) => access.zero(range, Space::Free),
            _ => access.zero(range, Space::Keep),
        };
        self.end(done.and_then(|()| sync(head, access)))
    }

    /// The answer to a request without data.
    fn end(&mut self, done: io::Result<()>) -> Result<(), NbdError> {
        match done {
            Ok(()) => self.done(),
            Err(failed) if failed.kind() == io::ErrorKind::StorageFull => {
                self.refuse(error::NO_SPACE, &failed.to_string())
            }
            Err(failed) => self.refuse(error::IO, &failed.to_string()),
        }
    }

    /// Data, or a hole where it is all zeroes.
    fn piece(&mut self, at: u64, data: &[u8], last: bool) -> Result<(), NbdError> {
        let flags = if last { chunk::DONE } else { 0 };
        if data.iter().all(|byte| *byte == 0) {
            let length = u32::try_from(data.len()).expect("1 MiB");
            let hole = [&at.to_be_bytes()[..], &length.to_be_bytes()].concat();
            return self.chunk(flags, chunk::HOLE, &[&hole]);
        }
        self.chunk(flags, chunk::DATA, &[&at.to_be_bytes(), data])
    }

    fn block_status(
        &mut self,
        head: &RequestHead,
        agreed: &Agreed<'_>,
        size_bytes: u64,
    ) -> Result<(), NbdError> {
        let (offset, length) = (head.offset.get(), head.length.get());
        let end = offset.checked_add(length.into());
        let end = end.filter(|end| *end <= size_bytes && length > 0);
        let Some(end) = end else {
            return self.refuse(error::INVALID, "the range is not on the disk");
        };
        if agreed.contexts.is_empty() {
            return self.refuse(error::INVALID, "no metadata context was chosen");
        }
        let extents_max = match head.flags.get() & command::ONE_EXTENT {
            0 => EXTENTS_MAX,
            _ => 1,
        };
        for (index, context) in agreed.contexts.iter().enumerate() {
            let extents = match (context, &agreed.export.changed) {
                (Context::Changed, Some((_, set))) => changed(set, offset..end, extents_max),
                _ => vec![(length, DATA)],
            };
            let mut data = (*context as u32).to_be_bytes().to_vec();
            for (length, flags) in extents {
                data.extend(length.to_be_bytes());
                data.extend(flags.to_be_bytes());
            }
            let last = index + 1 == agreed.contexts.len();
            let flags = if last { chunk::DONE } else { 0 };
            self.chunk(flags, chunk::BLOCK_STATUS, &[&data])?;
        }
        Ok(())
    }

    /// An answer that is nothing but success.
    fn done(&mut self) -> Result<(), NbdError> {
        match self.structured {
            true => self.chunk(chunk::DONE, chunk::NONE, &[]),
            false => self.head(0),
        }
    }

    fn refuse(&mut self, error: u32, reason: &str) -> Result<(), NbdError> {
        if !self.structured {
            return self.head(error);
        }
        // The protocol's longest text.
        let reason = &reason.as_bytes()[..reason.len().min(4096)];
        let length = u16::try_from(reason.len()).expect("4096");
        self.chunk(
            chunk::DONE,
            chunk::ERROR,
            &[&error.to_be_bytes(), &length.to_be_bytes(), reason],
        )
    }

    /// Head of a simple reply.
    fn head(&mut self, error: u32) -> Result<(), NbdError> {
        let head = SimpleReplyHead {
            magic: SIMPLE_REPLY.into(),
            error: error.into(),
            cookie: self.cookie,
        };
        Ok(self.stream.write_all(head.as_bytes())?)
    }

    fn chunk(&mut self, flags: u16, kind: u16, parts: &[&[u8]]) -> Result<(), NbdError> {
        let length: usize = parts.iter().map(|part| part.len()).sum();
        let head = ChunkHead {
            magic: STRUCTURED_REPLY.into(),
            flags: flags.into(),
            kind: kind.into(),
            cookie: self.cookie,
            length: u32::try_from(length)
                .expect("little more than 1 MiB")
                .into(),
        };
        self.stream.write_all(head.as_bytes())?;
        for part in parts {
            self.stream.write_all(part)?;
        }
        Ok(())
    }
}

/// What the client wants durable before it is answered.
fn sync(head: &RequestHead, access: &mut Access) -> io::Result<()> {
    match head.flags.get() & command::FUA {
        0 => Ok(()),
        _ => access.flush(),
    }
}

/// The range as lengths of what changed and what did not, at most so many of them.
fn changed(set: &BlockSet, range: Range<u64>, count_max: usize) -> Vec<(u32, u32)> {
    let mut extents = Vec::new();
    let mut at = range.start;
    let mut tell = |to: u64, flags: u32| {
        let to = to.min(range.end);
        if to > at && extents.len() < count_max {
            let length = u32::try_from(to - at).expect("within a request's length");
            extents.push((length, flags));
            at = to;
        }
    };
    for dirty in set.ranges_from(range.start) {
        if dirty.start >= range.end {
            break;
        }
        tell(dirty.start, 0);
        tell(dirty.end, DIRTY);
    }
    tell(range.end, 0);
    extents
}

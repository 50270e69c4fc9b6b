// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! What a layer's tar is besides the content of its files: headers, PAX records, padding, the end. It is written down
//! while a layer is unpacked, so that the very bytes of the tar, and with them its digest, come out again later without
//! a second copy of the content on disk.
//!
//! ```text
//! gzip of records:   BYTES length:u32le bytes…              to be written as they are
//!                    FILE  length:u32le path… size:u64le    to be read from the unpacked layer
//! ```
//!
//! Whoever reads a tar from its frame checks the digest: a file that was changed below, or that the layer itself replaced
//! by a later entry, is told by it.

use std::cell::RefCell;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Take, Write};
use std::ops::Range;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use flate2::Compression;
use flate2::read::GzDecoder;
use flate2::write::GzEncoder;

use crate::guest::container::root::GuestRoot;

const BYTES: u8 = b'B';
const FILE: u8 = b'F';
/// Longest record: what lies between two files is gathered up to here.
const RECORD_BYTES_MAX: usize = 64 << 10;

/// Passes a tar on to whoever unpacks it, and writes its frame down.
pub(super) struct Recording<R> {
    inner: R,
    recorder: Recorder,
}

/// Tells a recording which of its bytes are a file's content: the recording itself is the unpacker's meanwhile.
#[derive(Clone)]
pub(super) struct Recorder(Rc<RefCell<Record>>);

struct Record {
    out: GzEncoder<BufWriter<File>>,
    /// How much of the tar has gone by.
    position: u64,
    /// The content of the file that goes by.
    content: Range<u64>,
    gathered: Vec<u8>,
}

impl<R: Read> Recording<R> {
    /// Writes to an empty file.
    pub(super) fn new(inner: R, out: File) -> Self {
        let record = Record {
            out: GzEncoder::new(BufWriter::new(out), Compression::fast()),
            position: 0,
            content: 0..0,
            gathered: Vec::new(),
        };
        Self {
            inner,
            recorder: Recorder(Rc::new(RefCell::new(record))),
        }
    }

    pub(super) fn recorder(&self) -> Recorder {
        self.recorder.clone()
    }

    /// Reads what is left, and completes the frame.
    pub(super) fn finish(mut self) -> io::Result<R> {
        io::copy(&mut self, &mut io::sink())?;
        let mut record = self.recorder.0.borrow_mut();
        record.flush()?;
        record.out.try_finish()?;
        record.out.get_mut().flush()?;
        drop(record);
        Ok(self.inner)
    }
}

impl<R: Read> Read for Recording<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.recorder.0.borrow_mut().pass(&buffer[..count])?;
        Ok(count)
    }
}

impl Recorder {
    /// The next bytes, which begin at `position` of the tar, will be found in the layer's folder.
    pub(super) fn content(&self, path: &Path, position: u64, size: u64) -> io::Result<()> {
        let mut record = self.0.borrow_mut();
        if size == 0 || position != record.position {
            // A sparse file's content is not in one piece: it is kept as it is.
            return Ok(());
        }
        record.flush()?;
        let path = path.as_os_str().as_bytes();
        record.write(FILE, path)?;
        record.out.write_all(&size.to_le_bytes())?;
        record.content = position..position.saturating_add(size);
        Ok(())
    }
}

impl Record {
    fn pass(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        if self.content.contains(&self.position) {
            let left = self.content.end - self.position;
            let count = usize::try_from(left).map_or(bytes.len(), |left| left.min(bytes.len()));
            self.position += count as u64;
            bytes = &bytes[count..];
        }
        self.position += bytes.len() as u64;
        self.gathered.extend_from_slice(bytes);
        match self.gathered.len() > RECORD_BYTES_MAX {
            true => self.flush(),
            false => Ok(()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        let gathered = std::mem::take(&mut self.gathered);
        gathered
            .chunks(RECORD_BYTES_MAX)
            .try_for_each(|bytes| self.write(BYTES, bytes))
    }

    fn write(&mut self, kind: u8, bytes: &[u8]) -> io::Result<()> {
        let length = u32::try_from(bytes.len()).map_err(io::Error::other)?;
        self.out.write_all(&[kind])?;
        self.out.write_all(&length.to_le_bytes())?;
        self.out.write_all(bytes)
    }
}

/// A layer's tar, put together again.
pub(super) struct Framed {
    frame: GzDecoder<BufReader<File>>,
    layer: GuestRoot,
    part: Part,
}

enum Part {
    Bytes(io::Cursor<Vec<u8>>),
    File(Take<File>),
}

impl Framed {
    pub(super) fn open(frame: &Path, layer: &Path) -> io::Result<Self> {
        Ok(Self {
            frame: GzDecoder::new(BufReader::new(File::open(frame)?)),
            layer: GuestRoot::open(layer)?,
            part: Part::Bytes(io::Cursor::default()),
        })
    }

    /// The next part; `None` at the end.
    fn next(&mut self) -> io::Result<Option<Part>> {
        let mut kind = [0];
        if self.frame.read(&mut kind)? == 0 {
            return Ok(None);
        }
        let mut length = [0; 4];
        self.frame.read_exact(&mut length)?;
        let length = u32::from_le_bytes(length) as usize;
        if length > RECORD_BYTES_MAX {
            return Err(io::Error::other("a record of the frame is too long"));
        }
        let mut bytes = vec![0; length];
        self.frame.read_exact(&mut bytes)?;
        match kind {
            [BYTES] => Ok(Some(Part::Bytes(io::Cursor::new(bytes)))),
            [FILE] => {
                let mut size = [0; 8];
                self.frame.read_exact(&mut size)?;
                let file = self
                    .layer
                    .open_file(&PathBuf::from(OsStr::from_bytes(&bytes)))?;
                Ok(Some(Part::File(file.take(u64::from_le_bytes(size)))))
            }
            _ => Err(io::Error::other("an unknown record in the frame")),
        }
    }
}

impl Read for Framed {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        loop {
            let count = match &mut self.part {
                Part::Bytes(bytes) => bytes.read(buffer)?,
                Part::File(file) => file.read(buffer)?,
            };
            if count > 0 {
                return Ok(count);
            }
            match self.next()? {
                Some(part) => self.part = part,
                None => return Ok(0),
            }
        }
    }
}

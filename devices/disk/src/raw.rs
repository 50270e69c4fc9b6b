// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A raw disk: a file or block device whose bytes are the guest's sectors.
#![expect(
    unsafe_code,
    reason = "preadv and pwritev move bytes between files and ranges of guest memory"
)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::retry_on_intr;

use crate::alignment::{AlignedBuffer, Alignment};
use crate::backend::{
    Abilities, BlockBackend, BlockQueue, Geometry, Operation, Request, ResizeError, SharedGeometry,
};
use crate::immediate::ImmediateQueue;
use crate::open::{Cache, Engine, ImageFile, OpenError, OpenOptions};
use crate::pool::{Pooled, calls_for};
use crate::segments::Segments;
use crate::uring::UringQueue;
use crate::zeroing::{LENGTH_BYTES_MAX, Way, zeroes};

/// Most that is copied at a time for a request whose memory direct I/O does not take.
const COPY_BYTES_MAX: usize = 1 << 20;

/// What every engine needs of a raw disk.
#[derive(Debug)]
pub(crate) struct RawFile {
    pub(crate) file: File,
    pub(crate) alignment: Alignment,
    pub(crate) geometry: Arc<SharedGeometry>,
    /// Cache mode "unsafe".
    pub(crate) ignores_flush: bool,
}

impl RawFile {
    /// Whether the disk takes the request: its error otherwise.
    pub(crate) fn check(&self, request: &Request) -> io::Result<()> {
        request.check(self.geometry.get())?;
        let range = request.range();
        let block = u64::from(self.alignment.offset_bytes);
        let length = range.end - range.start;
        // Buffered files take any range; what fallocate and direct I/O want are whole blocks.
        let whole = (range.start | length).is_multiple_of(block);
        let strict = block > 512 || Way::first(request.operation).is_some();
        if strict && !whole || Way::first(request.operation).is_some() && length > LENGTH_BYTES_MAX
        {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        Ok(())
    }

    /// Carries out any request, blocking.
    fn serve(&self, request: &Request) -> io::Result<()> {
        self.check(request)?;
        self.transfer(request)
    }

    /// Carries out a request that [`RawFile::check`] accepted, blocking.
    pub(crate) fn transfer(&self, request: &Request) -> io::Result<()> {
        if let Some((way, _)) = Way::first(request.operation) {
            return self.zero(request, way);
        }
        match request.operation {
            Operation::Flush if self.ignores_flush => return Ok(()),
            Operation::Flush => return self.file.sync_data(),
            _ => {}
        }
        let (operation, at) = (request.operation, request.offset_bytes);
        if self.copied_bytes(request) > 0 {
            return self.transfer_copied(request);
        }
        let moved = self.transfer_ranges(operation, at, &request.segments)?;
        request.check_moved(moved)
    }

    /// Bytes of a read or write that go through a copy, since direct I/O does not take their memory.
    pub(crate) fn copied_bytes(&self, request: &Request) -> u64 {
        match self.alignment.suits(&request.segments) {
            true => 0,
            false => request.segments.total_bytes(),
        }
    }

    /// Carries out a read or write through a copy of a part at a time, blocking: a guest may ask for as much as its
    /// memory has, and for the same memory many times.
    fn transfer_copied(&self, request: &Request) -> io::Result<()> {
        let most = usize::try_from(request.segments.total_bytes()).unwrap_or(COPY_BYTES_MAX);
        let most = most.min(COPY_BYTES_MAX);
        let mut copy = AlignedBuffer::new(most, self.alignment.memory_bytes);
        for (at, piece) in request.segments.pieces(request.offset_bytes, most) {
            let length = piece.total_bytes();
            let count = usize::try_from(length).expect("it fits the copy");
            if request.operation == Operation::Write {
                piece.drain_to(&mut copy.bytes()[..count]);
            }
            let moved = self.transfer_ranges(request.operation, at, &copy.first(count))?;
            if moved < length {
                return request.check_moved(0);
            }
            if request.operation == Operation::Read {
                piece.fill(&copy.bytes()[..count]);
            }
        }
        Ok(())
    }

    fn zero(&self, request: &Request, first: Way) -> io::Result<()> {
        let mut way = first;
        loop {
            let done = self.zero_by(request, way);
            match done
                .as_ref()
                .err()
                .and_then(|error| way.after(request.operation, error))
            {
                Some(next) => way = next,
                None => return done,
            }
        }
    }

    fn zero_by(&self, request: &Request, way: Way) -> io::Result<()> {
        let range = request.range();
        let length = range.end - range.start;
        match way.fallocate_mode() {
            Some(mode) => {
                let mode = FallocateFlags::from_bits_retain(mode.cast_unsigned());
                // tmpfs ends it for a signal, also for one without effect.
                let done = retry_on_intr(|| fallocate(&self.file, mode, range.start, length));
                Ok(done?)
            }
            None if way == Way::Nothing => Ok(()),
            None => {
                let moved = self.transfer_ranges(Operation::Write, range.start, &zeroes(length))?;
                match moved == length {
                    true => Ok(()),
                    false => Err(io::ErrorKind::WriteZero.into()),
                }
            }
        }
    }

    /// One preadv or pwritev.
    fn transfer_ranges(
        &self,
        operation: Operation,
        at: u64,
        segments: &Segments,
    ) -> io::Result<u64> {
        let ranges = segments.iovecs();
        let fd = self.file.as_raw_fd();
        let count = i32::try_from(ranges.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        let offset = i64::try_from(at).map_err(|_| io::ErrorKind::InvalidInput)?;
        loop {
            let moved = if operation == Operation::Read {
                // SAFETY: `ranges` has `count` entries, each valid and writable by the contract of
                // `Segments::push`, or owned by the caller.
                unsafe { libc::preadv(fd, ranges.as_ptr(), count, offset) }
            } else {
                // SAFETY: `ranges` has `count` entries, each valid and readable by the contract of
                // `Segments::push`, or owned by the caller.
                unsafe { libc::pwritev(fd, ranges.as_ptr(), count, offset) }
            };
            match u64::try_from(moved) {
                Ok(moved) => return Ok(moved),
                Err(_) => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Err(error);
                    }
                }
            }
        }
    }
}

/// An open raw disk. Its image stays locked until it and its queues are dropped.
pub struct RawBackend {
    file: Arc<RawFile>,
    abilities: Abilities,
    is_synchronous: bool,
    is_device: bool,
    engine: Engine,
    /// For [`Engine::Threads`].
    pool: Option<Pooled>,
}

impl RawBackend {
    pub(crate) fn new(image: ImageFile, options: OpenOptions) -> Result<Self, OpenError> {
        let failed = |source| OpenError::Open {
            path: image.path.clone(),
            source,
        };
        let alignment = match options.cache.is_direct() {
            true => Alignment::direct(&image.file).map_err(failed)?,
            false => Alignment::BUFFERED,
        };
        image.check_size(alignment.offset_bytes)?;
        let geometry = Arc::new(SharedGeometry::new(Geometry {
            size_bytes: image.size_bytes,
            read_only: options.read_only,
        }));
        let engine = match options.engine {
            Some(engine) => engine,
            None => Engine::best_for(&image.file).map_err(failed)?,
        };
        let is_device = image.is_device;
        let file = Arc::new(RawFile {
            file: image.file,
            alignment,
            geometry: geometry.clone(),
            ignores_flush: options.cache == Cache::Unsafe,
        });
        let pool = (engine == Engine::Threads).then(|| {
            let serving = file.clone();
            let serve = move |request: &Request| serving.serve(request);
            let calls = calls_for(options.cache);
            Pooled::new(calls, geometry, Arc::new(serve), Arc::new(|| {}))
        });
        let block_bytes = alignment.offset_bytes;
        Ok(Self {
            file,
            is_synchronous: options.cache.is_synchronous(),
            abilities: Abilities {
                block_bytes,
                discard_bytes: options.discard.then_some(block_bytes.max(DISCARD_BYTES)),
                write_zeroes: true,
                ..Abilities::default()
            },
            is_device,
            engine,
            pool,
        })
    }

    /// The engine in use: the one that was asked for, or the best one for the image.
    pub fn engine(&self) -> Engine {
        self.engine
    }
}

/// Smallest range worth discarding: a file system's block.
const DISCARD_BYTES: u32 = 4096;

impl BlockBackend for RawBackend {
    fn geometry(&self) -> Geometry {
        self.file.geometry.get()
    }

    fn abilities(&self) -> Abilities {
        self.abilities
    }

    fn is_synchronous(&self) -> bool {
        self.is_synchronous
    }

    fn resize(&self, size_bytes: u64) -> Result<(), ResizeError> {
        let geometry = &self.file.geometry;
        geometry.check_growth(size_bytes, self.abilities.block_bytes)?;
        if self.is_device {
            let device_bytes = ImageFile::device_bytes(&self.file.file)?;
            if device_bytes < size_bytes {
                let size_bytes = device_bytes;
                return Err(ResizeError::Device { size_bytes });
            }
        } else {
            self.file.file.set_len(size_bytes)?;
        }
        geometry.set_size(size_bytes);
        Ok(())
    }

    fn open_queue(&self, depth: u16) -> io::Result<Box<dyn BlockQueue>> {
        Ok(match &self.pool {
            Some(pool) => Box::new(pool.queue(depth)?),
            None if self.engine == Engine::InPlace => {
                let (geometry, file) = (self.file.geometry.clone(), self.file.clone());
                let serve = Box::new(move |request: &Request| file.serve(request));
                Box::new(ImmediateQueue::new(geometry, depth, serve)?)
            }
            None => Box::new(UringQueue::new(self.file.clone(), depth)?),
        })
    }
}

#[cfg(test)]
mod tests;

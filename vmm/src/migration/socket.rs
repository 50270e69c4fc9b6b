// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A connection for pages. It ends at the other machine's process, over the network too where nobody encrypts what goes
//! through it: then it is a TCP socket, otherwise a Unix one.
//!
//! **Pages by reference.** What goes into a Unix socket need not be copied: the kernel keeps references to the pages
//! (vmsplice(2), splice(2)), and whoever reads the socket reads them. A sender of guest memory may do that: what is
//! written to a page after it was sent is sent again, and the last pages are those of a guest that stands still. Not so
//! with TCP: on loopback the receiver pays more for pages that come one by one than the sender saves.

#![expect(unsafe_code, reason = "vmsplice(2) of guest memory")]

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::io::retry_on_intr;
use rustix::net::{AddressFamily, Shutdown, sockopt};
use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice};
use vm_memory::bitmap::BitmapSlice;
use vm_memory::{ReadVolatile, VolatileMemoryError, VolatileSlice, WriteVolatile};

use super::pages::RUN_BYTES_MAX;

/// A stream socket of any family, whose calls block.
#[derive(Debug)]
pub struct Socket {
    stream: File,
    by_reference: Option<Pipe>,
}

impl<T: Into<OwnedFd>> From<T> for Socket {
    fn from(descriptor: T) -> Self {
        Self {
            stream: File::from(descriptor.into()),
            by_reference: None,
        }
    }
}

impl Socket {
    /// Another handle of it, which copies what is written.
    pub fn try_clone(&self) -> io::Result<Self> {
        self.stream.try_clone().map(Self::from)
    }

    /// Has it take guest memory by reference where that is cheaper: the other side reads what is in there then. A socket
    /// that cannot copies.
    #[must_use]
    pub fn by_reference(self) -> Self {
        let is_unix = sockopt::socket_domain(&self.stream) == Ok(AddressFamily::UNIX);
        Self {
            by_reference: is_unix.then(|| Pipe::new().ok()).flatten(),
            ..self
        }
    }

    /// Ends it, for every handle and for the other side. Never blocks.
    pub fn end(&self) {
        // Fails when the other side has ended it.
        let _ = rustix::net::shutdown(&self.stream, Shutdown::Both);
    }
}

impl Read for Socket {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.stream.read(buffer)
    }
}

impl Write for Socket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.stream.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl ReadVolatile for Socket {
    fn read_volatile<B: BitmapSlice>(
        &mut self,
        memory: &mut VolatileSlice<'_, B>,
    ) -> Result<usize, VolatileMemoryError> {
        self.stream.read_volatile(memory)
    }
}

impl WriteVolatile for Socket {
    fn write_volatile<B: BitmapSlice>(
        &mut self,
        memory: &VolatileSlice<'_, B>,
    ) -> Result<usize, VolatileMemoryError> {
        // Nothing has gone when the kernel takes no reference: of memory that is broken, or because it is old.
        match self.by_reference.as_ref().map(|pipe| pipe.fill(memory)) {
            Some(Ok(count)) => {
                let pipe = self.by_reference.as_ref().expect("it was filled");
                pipe.empty_into(&self.stream, count)
                    .map_err(VolatileMemoryError::IOError)
            }
            _ => self.stream.write_volatile(memory),
        }
    }
}

/// What references to pages pass through on their way into a socket. Empty in between.
#[derive(Debug)]
struct Pipe {
    from: OwnedFd,
    to: OwnedFd,
}

impl Pipe {
    fn new() -> io::Result<Self> {
        let (from, to) = pipe_with(PipeFlags::CLOEXEC)?;
        // One place a page. With fewer, where a user has too many, a run takes some calls more.
        let _ = fcntl_setpipe_size(&to, RUN_BYTES_MAX);
        Ok(Self { from, to })
    }

    /// References to the beginning of `memory`, as many as there is room for. Returns how many bytes that is.
    fn fill(&self, memory: &VolatileSlice<'_, impl BitmapSlice>) -> io::Result<usize> {
        let guard = memory.ptr_guard();
        let part = libc::iovec {
            iov_base: guard.as_ptr().cast_mut().cast(),
            iov_len: memory.len(),
        };
        // SAFETY: one vector, of memory that the slice keeps mapped; nothing is written to it.
        let count = unsafe { libc::vmsplice(self.to.as_raw_fd(), &raw const part, 1, 0) };
        usize::try_from(count).map_err(|_| io::Error::last_os_error())
    }

    /// Moves `count` bytes on, which are in it.
    fn empty_into(&self, stream: &File, count: usize) -> io::Result<usize> {
        let mut left = count;
        while left > 0 {
            let flags = SpliceFlags::empty();
            match retry_on_intr(|| splice(&self.from, None, stream, None, left, flags))? {
                0 => return Err(io::ErrorKind::WriteZero.into()),
                moved => left -= moved,
            }
        }
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};
    use std::os::unix::net::UnixStream;

    use rustix::event::{PollFd, PollFlags, poll};

    use super::*;
    use crate::board::MICRO;
    use crate::memory::{Backing, allocate};
    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

    /// What the other side reads of `backing` that was changed after it was written to the socket.
    fn read_after_a_change(near: impl Into<OwnedFd>, mut far: impl Read, backing: Backing) -> u8 {
        const PAGES: usize = 16 << 10;
        let ram = allocate(&MICRO, 1, 40, backing).unwrap();
        ram.write_slice(&[1; PAGES], GuestAddress(4096)).unwrap();
        let mut near = Socket::from(near.into()).by_reference();
        let pages = ram.get_slice(GuestAddress(4096), PAGES).unwrap();
        near.write_all_volatile(&pages).unwrap();
        ram.write_slice(&[2; PAGES], GuestAddress(4096)).unwrap();
        let mut read = [0; PAGES];
        far.read_exact(&mut read).unwrap();
        assert!(read.iter().all(|byte| *byte == read[0]));
        read[0]
    }

    #[test]
    fn a_unix_socket_takes_pages_by_reference_and_tcp_copies() {
        for backing in [Backing::Anonymous, Backing::Shared] {
            let (near, far) = UnixStream::pair().unwrap();
            assert_eq!(read_after_a_change(near, far, backing), 2);
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let (far, _) = listener.accept().unwrap();
            assert_eq!(read_after_a_change(near, far, backing), 1);
        }
    }

    #[test]
    fn the_end_of_a_socket_ends_a_write_by_reference() {
        let ram = allocate(&MICRO, 4, 40, Backing::Anonymous).unwrap();
        let (near, far) = UnixStream::pair().unwrap();
        let mut near = Socket::from(near).by_reference();
        let end = near.try_clone().unwrap();
        // More than it takes when nobody reads.
        let write = move || {
            let pages = ram.get_slice(GuestAddress(0), 4 << 20).unwrap();
            near.write_all_volatile(&pages).unwrap_err();
        };
        let writer = atoll_thread::spawn(atoll_thread::Kind::Migration, "writes", write).unwrap();
        poll(&mut [PollFd::new(&far, PollFlags::IN)], None).unwrap();
        end.end();
        writer.join().unwrap();
    }
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A connection for pages. It ends at the other machine's process, over the network too where nobody encrypts what goes
//! through it: then it is a TCP socket, otherwise a Unix one.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;

use rustix::net::Shutdown;
use vm_memory::bitmap::BitmapSlice;
use vm_memory::{ReadVolatile, VolatileMemoryError, VolatileSlice, WriteVolatile};

/// A stream socket of any family, whose calls block.
#[derive(Debug)]
pub struct Socket(File);

impl<T: Into<OwnedFd>> From<T> for Socket {
    fn from(descriptor: T) -> Self {
        Self(File::from(descriptor.into()))
    }
}

impl Socket {
    /// Another handle of it.
    pub fn try_clone(&self) -> io::Result<Self> {
        self.0.try_clone().map(Self)
    }

    /// Ends it, for every handle and for the other side. Never blocks.
    pub fn end(&self) {
        // Fails when the other side has ended it.
        let _ = rustix::net::shutdown(&self.0, Shutdown::Both);
    }
}

impl Read for Socket {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl Write for Socket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes)
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
        self.0.read_volatile(memory)
    }
}

impl WriteVolatile for Socket {
    fn write_volatile<B: BitmapSlice>(
        &mut self,
        memory: &VolatileSlice<'_, B>,
    ) -> Result<usize, VolatileMemoryError> {
        self.0.write_volatile(memory)
    }
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! One connection's bytes, with TLS or without, over a socket that never blocks.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustls::Connection;

/// Bytes of TLS that are gathered before the socket takes them.
const OUTPUT_BYTES_MAX: usize = 1 << 20;

/// The state of one connection.
pub(crate) enum Session {
    /// What the socket has not taken.
    Plain(Vec<u8>),
    Tls(Box<Connection>),
}

impl Session {
    pub(crate) fn plain() -> Self {
        Self::Plain(Vec::new())
    }

    pub(crate) fn tls(mut connection: Connection) -> Self {
        connection.set_buffer_limit(Some(OUTPUT_BYTES_MAX));
        Self::Tls(Box::new(connection))
    }

    /// Takes bytes to be sent, of which there are less than [`OUTPUT_BYTES_MAX`] since [`Self::has_output`] was false.
    pub(crate) fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Plain(output) => {
                output.extend_from_slice(bytes);
                Ok(())
            }
            Self::Tls(connection) => connection.writer().write_all(bytes),
        }
    }

    /// Whether the socket should take something.
    pub(crate) fn has_output(&self) -> bool {
        match self {
            Self::Plain(output) => !output.is_empty(),
            Self::Tls(connection) => connection.wants_write(),
        }
    }

    /// Gives the socket what it takes now. Returns how much that is.
    pub(crate) fn write_to(&mut self, mut socket: &TcpStream) -> io::Result<usize> {
        let mut written = 0;
        while self.has_output() {
            let result = match self {
                Self::Plain(output) => socket.write(output).inspect(|count| {
                    output.drain(..*count);
                }),
                Self::Tls(connection) => connection.write_tls(&mut socket),
            };
            match result {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => written += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(written)
    }

    /// Reads what has come. Fails with [`io::ErrorKind::WouldBlock`] when nothing has; 0 is the end.
    pub(crate) fn read_from(
        &mut self,
        mut socket: &TcpStream,
        buffer: &mut [u8],
    ) -> io::Result<usize> {
        let Self::Tls(connection) = self else {
            return socket.read(buffer);
        };
        loop {
            match connection.reader().read(buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                // Without rustls's long explanation.
                Err(error) => return Err(error.kind().into()),
                read => return read,
            }
            if connection.read_tls(&mut socket)? == 0 && connection.is_handshaking() {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            if let Err(error) = connection.process_new_packets() {
                // The alert that tells the other side why. It may be gone already.
                let _ = connection.write_tls(&mut socket);
                return Err(io::Error::new(io::ErrorKind::InvalidData, error));
            }
        }
    }

    /// Says to the other side that nothing comes any more, if it can be said now.
    pub(crate) fn close(&mut self, socket: &TcpStream) {
        if let Self::Tls(connection) = self {
            connection.send_close_notify();
        }
        let _ = self.write_to(socket);
        let _ = socket.shutdown(std::net::Shutdown::Write);
    }

    /// Sends `bytes`, and the rest of what there is, until the deadline.
    pub(crate) fn say(
        &mut self,
        socket: &TcpStream,
        bytes: &[u8],
        deadline: Instant,
    ) -> io::Result<()> {
        self.put(bytes)?;
        loop {
            self.write_to(socket)?;
            if !self.has_output() {
                return Ok(());
            }
            wait(&[(socket.as_fd(), PollFlags::OUT)], deadline)?;
        }
    }

    /// Reads as many bytes as `buffer` has, until the deadline; agrees on TLS first.
    pub(crate) fn hear(
        &mut self,
        socket: &TcpStream,
        buffer: &mut [u8],
        deadline: Instant,
    ) -> io::Result<()> {
        let mut filled = 0;
        while filled < buffer.len() {
            self.write_to(socket)?;
            match self.read_from(socket, &mut buffer[filled..]) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.write_to(socket)?;
                    let output = match self.has_output() {
                        true => PollFlags::OUT,
                        false => PollFlags::empty(),
                    };
                    wait(&[(socket.as_fd(), PollFlags::IN | output)], deadline)?;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// Waits until something can be done with one of the descriptors. Fails with [`io::ErrorKind::TimedOut`] after the
/// deadline.
pub(crate) fn wait(wanted: &[(BorrowedFd<'_>, PollFlags)], deadline: Instant) -> io::Result<()> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(io::ErrorKind::TimedOut.into());
    }
    let left = Timespec::try_from(left).map_err(io::Error::other)?;
    let mut events: Vec<_> = wanted
        .iter()
        .map(|(fd, flags)| PollFd::from_borrowed_fd(*fd, *flags))
        .collect();
    match poll(&mut events, Some(&left)) {
        Ok(0) => Err(io::ErrorKind::TimedOut.into()),
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

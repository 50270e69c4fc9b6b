// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Open files that come with a request (SCM_RIGHTS, unix(7)): the machine's process can open no path, so whoever
//! asks for something that needs a file opens it, with his own rights, and sends the descriptor.
//!
//! The descriptors travel with the first bytes of the request. Which is which, the request's body says by their
//! order.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};

/// Most descriptors in one request: a network card may have 64 pairs of queues, each a tap and a `/dev/vhost-net`, and
/// its statistics. Linux takes 253 (`SCM_MAX_FD`).
pub const FILES_MAX: usize = 160;

/// The server's end of a connection: bytes are read as usual, descriptors are gathered meanwhile.
pub struct Receiving<'a> {
    stream: &'a UnixStream,
    files: Vec<OwnedFd>,
}

impl<'a> Receiving<'a> {
    /// Of a connection from which nothing has been read.
    #[must_use]
    pub fn new(stream: &'a UnixStream) -> Self {
        Self {
            stream,
            files: Vec::new(),
        }
    }

    /// What came, in order.
    #[must_use]
    pub fn into_files(self) -> Vec<OwnedFd> {
        self.files
    }
}

impl Read for Receiving<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FILES_MAX))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let received = rustix::net::recvmsg(
            self.stream,
            &mut [IoSliceMut::new(bytes)],
            &mut ancillary,
            RecvFlags::CMSG_CLOEXEC,
        )?;
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(files) = message {
                self.files.extend(files);
            }
        }
        let too_many = received.flags.contains(ReturnFlags::CTRUNC);
        if too_many || self.files.len() > FILES_MAX {
            let text = format!("more than {FILES_MAX} files came with the request");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        Ok(received.bytes)
    }
}

/// The client's end of a connection: the descriptors go with the first bytes that are written.
pub struct Sending<'a> {
    stream: &'a UnixStream,
    files: &'a [BorrowedFd<'a>],
}

impl<'a> Sending<'a> {
    /// On a connection.
    #[must_use]
    pub fn new(stream: &'a UnixStream, files: &'a [BorrowedFd<'a>]) -> Self {
        Self { stream, files }
    }
}

impl Write for Sending<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let files = std::mem::take(&mut self.files);
        if files.is_empty() {
            return self.stream.write(bytes);
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FILES_MAX))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if files.len() > FILES_MAX || !ancillary.push(SendAncillaryMessage::ScmRights(files)) {
            let text = format!("a request takes at most {FILES_MAX} files");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        let slices = [IoSlice::new(bytes)];
        let flags = SendFlags::NOSIGNAL;
        Ok(rustix::net::sendmsg(
            self.stream,
            &slices,
            &mut ancillary,
            flags,
        )?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::Seek;
    use std::os::fd::AsFd;

    #[test]
    fn files_come_in_order_with_the_first_bytes() {
        let (client, server) = UnixStream::pair().unwrap();
        let mut sent: Vec<File> = (0..2).map(|_| tempfile::tempfile().unwrap()).collect();
        for (file, text) in sent.iter_mut().zip(["one", "two"]) {
            file.write_all(text.as_bytes()).unwrap();
            file.rewind().unwrap();
        }
        let fds: Vec<_> = sent.iter().map(AsFd::as_fd).collect();
        let mut sending = Sending {
            stream: &client,
            files: &fds,
        };
        sending.write_all(b"hello").unwrap();
        let mut receiving = Receiving::new(&server);
        let mut bytes = [0; 5];
        receiving.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"hello");
        let texts: Vec<String> = receiving
            .into_files()
            .into_iter()
            .map(|fd| std::io::read_to_string(File::from(fd)).unwrap())
            .collect();
        assert_eq!(texts, ["one", "two"]);
    }

    #[test]
    fn too_many_files_are_an_error_on_either_side() {
        let (client, server) = UnixStream::pair().unwrap();
        let file = tempfile::tempfile().unwrap();
        let many = vec![file.as_fd(); FILES_MAX + 1];
        let mut sending = Sending {
            stream: &client,
            files: &many,
        };
        assert!(sending.write(b"x").is_err());
        // A client that does not care: twice as many as fit, in two messages.
        for _ in 0..2 {
            let mut sending = Sending {
                stream: &client,
                files: &many[1..],
            };
            sending.write_all(b"x").unwrap();
        }
        let mut receiving = Receiving::new(&server);
        assert!(receiving.read_exact(&mut [0; 2]).is_err());
    }
}

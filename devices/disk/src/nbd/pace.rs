// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! How fast the clients of one server may read, all of them and all its exports together: a backup that takes its time
//! leaves processors and disks to the guests.
//!
//! A piece waits until the bucket owes nothing, in the thread of its connection; it sleeps on the connection itself, so
//! that its end, whoever brings it about, ends the sleep.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::bucket::TokenBucket;

/// The rate of a server.
pub(super) struct Pace {
    /// Leaf lock, for the arithmetic of one piece.
    bucket: Mutex<TokenBucket>,
}

impl Pace {
    pub(super) fn new(bytes_per_second: u64) -> Self {
        Self {
            bucket: Mutex::new(TokenBucket::new(bytes_per_second, 0, Instant::now())),
        }
    }
}

/// One connection's part in it.
pub(super) struct Paced {
    pub(super) pace: Arc<Pace>,
    /// The connection, for its end.
    pub(super) stream: UnixStream,
}

impl Paced {
    /// Blocks until `bytes` may be read; an error once the connection has ended.
    pub(super) fn wait(&self, bytes: u64) -> io::Result<()> {
        loop {
            let wait = {
                let mut bucket = self.pace.bucket.lock();
                let bucket = bucket.as_mut().unwrap_or_else(PoisonError::get_mut);
                let wait = bucket.wait(Instant::now());
                if wait.is_zero() {
                    bucket.take(bytes);
                    return Ok(());
                }
                wait
            };
            // Nothing is asked for: the end of both directions is always told.
            let mut ends = [PollFd::from_borrowed_fd(
                self.stream.as_fd(),
                PollFlags::empty(),
            )];
            let wait = Timespec::try_from(wait).expect("at most 2^64 ns");
            match poll(&mut ends, Some(&wait)) {
                Ok(0) | Err(rustix::io::Errno::INTR) => {}
                Ok(_) => return Err(io::ErrorKind::ConnectionAborted.into()),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixListener;
    use std::path::Path;
    use std::time::Duration;

    use super::*;
    use crate::backend::Geometry;
    use crate::conformance::{read, write};
    use crate::nbd::tests::{option, request};
    use crate::nbd::{Content, Export, NbdBackend, NbdServer};
    use crate::{Freezable, MemoryBackend};

    const MIB: u64 = 1 << 20;
    const SIZE_BYTES: u64 = 8 * MIB;
    const PATIENCE: Duration = Duration::from_secs(60);

    /// A server of a frozen disk at that rate, and what it has.
    fn serve(socket: &Path, bytes_per_second: u64) -> (NbdServer, Vec<u8>) {
        let disk = Freezable::new(Arc::new(MemoryBackend::new(Geometry {
            size_bytes: SIZE_BYTES,
            read_only: false,
        })));
        let size = usize::try_from(SIZE_BYTES).unwrap();
        let content: Vec<u8> = (0..=250).cycle().take(size).collect();
        write(&disk, 0, &content).unwrap();
        let export = Export {
            name: "disk0".to_owned(),
            content: Content::Frozen(disk.freeze(tempfile::tempfile().unwrap()).unwrap()),
            changed: None,
        };
        let listener = UnixListener::bind(socket).unwrap();
        let rate = Some(bytes_per_second);
        let server = NbdServer::start_at_most(listener, vec![export], rate).unwrap();
        (server, content)
    }

    fn connect(socket: &Path) -> NbdBackend {
        let stream = OwnedFd::from(UnixStream::connect(socket).unwrap());
        NbdBackend::open(vec![stream], "", true).unwrap()
    }

    /// Two halves at once have the rate together: each alone would be done in half the time.
    #[test]
    fn clients_keep_to_the_rate_together() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("nbd");
        let began = Instant::now();
        let (_server, content) = serve(&socket, 4 * MIB);
        let half = content.len() / 2;
        std::thread::scope(|scope| {
            for (at, expected) in [(0, &content[..half]), (SIZE_BYTES / 2, &content[half..])] {
                let socket = &socket;
                scope.spawn(move || {
                    let mut found = vec![0; half];
                    read(&connect(socket), at, &mut found).unwrap();
                    assert!(found == expected, "it reads something else");
                });
            }
        });
        // The last MiB waits for all before it but what the bucket had and may owe.
        let took = began.elapsed();
        assert!(took >= Duration::from_millis(1500), "{took:?}");
    }

    /// A client that has asked for the first 2 MiB.
    fn asking(socket: &Path) -> UnixStream {
        let mut client = UnixStream::connect(socket).unwrap();
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        let length = u32::try_from(2 * MIB).unwrap();
        let says = [
            &[0, 0, 0, 3],
            &option(1, b"")[..],
            &request(0, 0, 0, length),
        ]
        .concat();
        client.write_all(&says).unwrap();
        // The greeting, the export's size and its flags.
        client.read_exact(&mut [0; 18 + 10]).unwrap();
        client
    }

    #[test]
    fn whoever_leaves_does_not_wait_for_a_debt_of_days() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("nbd");
        let (server, _) = serve(&socket, 1);
        let mut first = asking(&socket);
        let mut piece = vec![0; 16 + usize::try_from(MIB).unwrap()];
        first.read_exact(&mut piece).unwrap();
        let second = asking(&socket);
        assert_eq!(server.connection_count(), 2);
        drop(second);
        let deadline = Instant::now() + PATIENCE;
        while server.connection_count() > 1 {
            assert!(Instant::now() < deadline, "its thread waits still");
            std::thread::yield_now();
        }
        drop(server);
        assert_eq!(first.read(&mut piece).unwrap(), 0);
    }
}

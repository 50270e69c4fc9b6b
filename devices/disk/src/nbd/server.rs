// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The listener's thread, and one a connection.

use std::io;
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use atoll_thread::Kind;

use super::pace::{Pace, Paced};
use super::{Export, NbdError, converse};

/// Connections that are served at a time; one more is closed at once. Tools open four to eight.
pub const CONNECTIONS_MAX: usize = 16;

/// A running server. Dropping it ends every connection and waits for the threads.
pub struct NbdServer {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    exports: Vec<Export>,
    listener: UnixListener,
    pace: Option<Arc<Pace>>,
    /// Of the connections now. A leaf lock, held to look, to add and to remove.
    streams: Mutex<Streams>,
}

#[derive(Default)]
struct Streams {
    ended: bool,
    next: usize,
    open: Vec<(usize, UnixStream)>,
}

impl NbdServer {
    /// Serves `exports`, at least one, to whoever connects to `listener`.
    pub fn start(listener: UnixListener, exports: Vec<Export>) -> io::Result<Self> {
        Self::start_at_most(listener, exports, None)
    }

    /// The same, with the most that its clients read in a second, all together; a tenth of that at once. Zeroes count:
    /// they are read, too, before they are told as holes. Who waits for the rate does not keep the server from its end.
    pub fn start_at_most(
        listener: UnixListener,
        exports: Vec<Export>,
        bytes_per_second: Option<u64>,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            exports,
            listener,
            pace: bytes_per_second.map(|rate| Arc::new(Pace::new(rate))),
            streams: Mutex::default(),
        });
        let accepting = shared.clone();
        let thread = atoll_thread::spawn(Kind::Export, "nbd", move || accept(&accepting))?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// What is served, in the order in which clients list it.
    pub fn exports(&self) -> &[Export] {
        &self.shared.exports
    }

    /// Connections that are served now, at most [`CONNECTIONS_MAX`].
    pub fn connection_count(&self) -> usize {
        self.shared.streams().open.len()
    }
}

impl Drop for NbdServer {
    fn drop(&mut self) {
        {
            let mut streams = self.shared.streams();
            streams.ended = true;
            for (_, stream) in &streams.open {
                // Gone already: its thread is about to say so.
                let _ = stream.shutdown(Shutdown::Both);
            }
        }
        // Wakes the thread's accept(2).
        let _ = rustix::net::shutdown(&self.shared.listener, rustix::net::Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn streams(&self) -> MutexGuard<'_, Streams> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Takes connections until the server ends, then waits for their threads.
fn accept(shared: &Arc<Shared>) {
    let mut threads: Vec<JoinHandle<()>> = Vec::new();
    loop {
        let stream = match shared.listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            // A client that was gone before it was there, or a moment without descriptors.
            Err(_) if !shared.streams().ended => {
                std::thread::sleep(std::time::Duration::from_millis(100));
                continue;
            }
            Err(_) => break,
        };
        if let Some(number) = admit(shared, &stream) {
            let serving = shared.clone();
            let name = format!("nbd-{number}");
            match atoll_thread::spawn(Kind::Export, &name, move || serve(&serving, number, stream))
            {
                Ok(thread) => threads.push(thread),
                Err(_) => leave(shared, number),
            }
        }
        threads.retain(|thread| !thread.is_finished());
    }
    for thread in threads {
        let _ = thread.join();
    }
}

/// Notes a connection, if there is room for it.
fn admit(shared: &Shared, stream: &UnixStream) -> Option<usize> {
    let kept = stream.try_clone().ok()?;
    let mut streams = shared.streams();
    if streams.ended || streams.open.len() >= CONNECTIONS_MAX {
        return None;
    }
    let number = streams.next;
    streams.next += 1;
    streams.open.push((number, kept));
    Some(number)
}

fn leave(shared: &Shared, number: usize) {
    shared.streams().open.retain(|(open, _)| *open != number);
}

fn serve(shared: &Shared, number: usize, mut stream: UnixStream) {
    let paced = shared.pace.clone().map(|pace| {
        let stream = stream.try_clone()?;
        Ok::<_, io::Error>(Paced { pace, stream })
    });
    let open = |export: &Export| {
        let content = export.content.clone();
        let access = atoll_thread::in_starter(move || content.open())?;
        Ok(access.paced(paced.transpose()?))
    };
    // A client that misbehaves or leaves has nobody to be told.
    let _: Result<(), NbdError> = converse(&mut stream, &shared.exports, open);
    leave(shared, number);
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The host's end of a console, shared by the serial port and the virtio console.
//!
//! A device holds a [`ConsolePort`]: it writes output (never blocks) and takes input. A thread named `console`
//! carries bytes between the port and its clients ([`ConsoleBackend`]): standard streams, a pseudo-terminal, or
//! any number of Unix socket connections.
//!
//! Output goes into one ring. Each client has a position in it; a client that falls behind by more than the
//! ring loses the oldest bytes and nobody waits for it. A new client of a socket begins [`BACKLOG_BYTES`] back.
//!
//! Opening ([`ConsoleEnd::open`]) and starting the thread ([`Console::start`]) are two steps, since a VMM opens
//! everything before it enters its sandbox and makes threads only after.

mod pump;

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;

use atoll_thread::Kind;
use rustix::event::{EventfdFlags, eventfd};

/// Output that a new client first gets.
pub const BACKLOG_BYTES: usize = 64 << 10;
/// Output that is kept for slow clients.
const RING_BYTES: usize = 256 << 10;
/// Input that waits for the guest; clients are not read while it is full.
const INPUT_BYTES: usize = 4 << 10;

/// Where a console ends on the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ConsoleBackend {
    /// Output is dropped (the backlog is not even kept), nothing is typed.
    Null,
    /// Standard input and output of the process. Raw mode of a terminal is the VMM's affair.
    Stdio,
    /// A pseudo-terminal, [`Console::pty_path`].
    Pty,
    /// A Unix stream socket at this path, made by us (mode 0600), removed at the end.
    Socket(PathBuf),
    /// The same without a backlog: a new client gets only what comes after it, so that a question is not answered
    /// by what the guest said to somebody else.
    Channel(PathBuf),
}

/// Why a console could not be made.
#[derive(Debug, thiserror::Error)]
pub enum ConsoleError {
    /// The socket: a path that exists, is too long, or cannot be made.
    #[error("console socket {path}")]
    Socket {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The pseudo-terminal.
    #[error("open a pseudo-terminal")]
    Pty(#[source] io::Error),
    /// Other descriptors than the backend has came from another process.
    #[error("{0} open files came for a console, which are not its own")]
    Files(usize),
    /// The thread or its eventfd.
    #[error("start the console's thread")]
    Thread(#[source] io::Error),
}

#[derive(Default)]
struct Buffers {
    /// The last bytes of output.
    ring: VecDeque<u8>,
    /// Bytes of output ever; the ring ends here.
    written: u64,
    input: VecDeque<u8>,
    /// The thread has been woken and has not looked yet: spares a system call a byte.
    woken: bool,
    closing: bool,
    /// Clients are not read, and none is accepted.
    deaf: bool,
}

/// The device's side of a console: bytes of the guest go in by [`ConsolePort::write`], bytes for it come out of a bounded
/// buffer. No call blocks.
pub struct ConsolePort {
    /// Leaf lock, held for copies only.
    buffers: Mutex<Buffers>,
    /// Wakes the thread; absent for [`ConsoleBackend::Null`].
    wake: Option<OwnedFd>,
    on_input: OnceLock<Box<dyn Fn() + Send + Sync>>,
}

impl ConsolePort {
    fn new(wake: Option<OwnedFd>) -> Self {
        Self {
            buffers: Mutex::default(),
            wake,
            on_input: OnceLock::new(),
        }
    }

    /// Takes the guest's output, by the device's thread or a vCPU. Never blocks: where no client reads, the oldest
    /// bytes of the backlog are lost; without a backend all of them are.
    pub fn write(&self, data: &[u8]) {
        let Some(wake) = &self.wake else { return };
        let mut buffers = self.lock();
        buffers.written += data.len() as u64;
        let kept = &data[data.len().saturating_sub(RING_BYTES)..];
        let surplus = (buffers.ring.len() + kept.len()).saturating_sub(RING_BYTES);
        buffers.ring.drain(..surplus);
        buffers.ring.extend(kept);
        let wake_up = !std::mem::replace(&mut buffers.woken, true);
        drop(buffers);
        if wake_up {
            signal(wake);
        }
    }

    /// Takes what has been typed; returns how much.
    pub fn read(&self, data: &mut [u8]) -> usize {
        if data.is_empty() {
            return 0;
        }
        let mut buffers = self.lock();
        let was_full = buffers.input.len() >= INPUT_BYTES;
        let count = data.len().min(buffers.input.len());
        for (to, from) in data.iter_mut().zip(buffers.input.drain(..count)) {
            *to = from;
        }
        drop(buffers);
        if let (true, Some(wake)) = (was_full && count > 0, &self.wake) {
            signal(wake); // The thread reads its clients again.
        }
        count
    }

    /// Bytes that were typed and wait for [`ConsolePort::read`]; bounded, since the console's thread reads no more of
    /// its clients while the buffer is full.
    pub fn input_size(&self) -> usize {
        self.lock().input.len()
    }

    /// Sets what the console's thread calls after input has come. Once; a second call does nothing.
    pub fn on_input(&self, call: Box<dyn Fn() + Send + Sync>) {
        let _ = self.on_input.set(call);
    }

    fn lock(&self) -> MutexGuard<'_, Buffers> {
        self.buffers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Fails only if the eventfd's counter is full: then the thread is awake anyway.
fn signal(wake: &OwnedFd) {
    let _ = rustix::io::write(wake, &1u64.to_ne_bytes());
}

/// A running console. Dropping it ends the thread, after what is in the ring was offered to its clients, and
/// removes the socket; not while it is deaf, since then that is another process's.
pub struct Console {
    port: Arc<ConsolePort>,
    thread: Option<JoinHandle<()>>,
    socket: Option<PathBuf>,
    pty: Option<PathBuf>,
}

/// A console's backend, open, before its thread.
pub struct ConsoleEnd {
    /// None for [`ConsoleBackend::Null`].
    clients: Option<pump::Clients>,
    socket: Option<PathBuf>,
    pty: Option<PathBuf>,
    deaf: bool,
}

/// Bytes of past output that a new client gets: of a channel none, whose ends talk to each other.
fn backlog(backend: &ConsoleBackend) -> usize {
    match backend {
        ConsoleBackend::Channel(_) => 0,
        _ => BACKLOG_BYTES,
    }
}

impl ConsoleEnd {
    /// Opens the backend: makes the pseudo-terminal, or creates the socket and listens. Needs the file system, so it
    /// comes before the sandbox; makes no thread and does not wait for a client.
    pub fn open(backend: &ConsoleBackend) -> Result<Self, ConsoleError> {
        let mut end = Self {
            clients: None,
            socket: None,
            pty: None,
            deaf: false,
        };
        end.clients = match backend {
            ConsoleBackend::Null => None,
            ConsoleBackend::Stdio => Some(pump::Clients::stdio()),
            ConsoleBackend::Pty => {
                let (clients, path) = pump::Clients::pty().map_err(ConsoleError::Pty)?;
                end.pty = Some(path);
                Some(clients)
            }
            ConsoleBackend::Socket(path) | ConsoleBackend::Channel(path) => {
                let clients = pump::Clients::listen(path, backlog(backend)).map_err(|source| {
                    ConsoleError::Socket {
                        path: path.clone(),
                        source,
                    }
                })?;
                end.socket = Some(path.clone());
                Some(clients)
            }
        };
        Ok(end)
    }

    /// One whose clients are another process's until [`Console::set_deaf`] says that they are this one's.
    #[must_use]
    pub fn deaf(self) -> Self {
        Self { deaf: true, ..self }
    }

    /// What is open, for [`ConsoleEnd::take`] here or in another process.
    pub fn into_files(self) -> Vec<OwnedFd> {
        self.clients
            .map_or_else(Vec::new, pump::Clients::into_files)
    }

    /// Takes what [`ConsoleEnd::into_files`] has given for the same backend.
    pub fn take(files: Vec<OwnedFd>, backend: &ConsoleBackend) -> Result<Self, ConsoleError> {
        let count = files.len();
        let mut files = files.into_iter();
        let mut next = || files.next().ok_or(ConsoleError::Files(count));
        let mut end = Self {
            clients: None,
            socket: None,
            pty: None,
            deaf: false,
        };
        end.clients = match backend {
            ConsoleBackend::Null => None,
            ConsoleBackend::Stdio => Some(pump::Clients::of_streams(next()?, next()?)),
            ConsoleBackend::Pty => {
                let pty = pump::Clients::of_pty(next()?, next()?);
                let (clients, path) = pty.map_err(ConsoleError::Pty)?;
                end.pty = Some(path);
                Some(clients)
            }
            ConsoleBackend::Socket(path) | ConsoleBackend::Channel(path) => {
                end.socket = Some(path.clone());
                Some(pump::Clients::of_listener(next()?.into(), backlog(backend)))
            }
        };
        Ok(end)
    }
}

impl Console {
    /// Opens the backend and starts its thread.
    pub fn open(backend: &ConsoleBackend) -> Result<Self, ConsoleError> {
        Self::start(ConsoleEnd::open(backend)?)
    }

    /// Starts the thread of an open backend.
    pub fn start(end: ConsoleEnd) -> Result<Self, ConsoleError> {
        let Some(clients) = end.clients else {
            return Ok(Self {
                port: Arc::new(ConsolePort::new(None)),
                thread: None,
                socket: None,
                pty: None,
            });
        };
        let flags = EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC;
        let wake = eventfd(0, flags).map_err(|errno| ConsoleError::Thread(errno.into()))?;
        let port = Arc::new(ConsolePort::new(Some(wake)));
        port.lock().deaf = end.deaf;
        let carrier = pump::Pump::new(port.clone(), clients);
        let thread = atoll_thread::spawn(Kind::Console, "console", move || carrier.run())
            .map_err(ConsoleError::Thread)?;
        Ok(Self {
            port,
            thread: Some(thread),
            socket: end.socket,
            pty: end.pty,
        })
    }

    /// The device's side of it; every call gives the same one.
    pub fn port(&self) -> Arc<ConsolePort> {
        self.port.clone()
    }

    /// Reads nothing of its clients and accepts none from now on, or does so again: another process may have the same
    /// descriptors, and what one takes the other does not get. What has been read is the guest's to take.
    pub fn set_deaf(&self, deaf: bool) {
        self.port.lock().deaf = deaf;
        if let Some(wake) = &self.port.wake {
            signal(wake);
        }
    }

    /// The terminal to open, if the backend is a pseudo-terminal.
    pub fn pty_path(&self) -> Option<&Path> {
        self.pty.as_deref()
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        let deaf = {
            let mut buffers = self.port.lock();
            buffers.closing = true;
            buffers.deaf
        };
        if let (Some(wake), Some(thread)) = (&self.port.wake, self.thread.take()) {
            signal(wake);
            if thread.join().is_err() {
                tracing::error!("the console's thread panicked");
            }
        }
        // In a sandbox there is no such path: the next machine replaces the socket.
        if let Some(path) = &self.socket
            && !deaf
            && let Err(error) = std::fs::remove_file(path)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(path = %path.display(), %error, "remove the console's socket");
        }
    }
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The far end of a console: a line of a guest, a shell in it, or a shell of the node.

use std::path::PathBuf;
use std::sync::Arc;

use atoll_manager::access::Identity;
use atoll_manager::error::Error;
use atoll_manager::exec::Program;
use atoll_manager::guest::Console;
use atoll_manager::id::{GuestId, GuestKind};
use atoll_manager::shell::{Shell, SignIn};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;

use super::Place;
use crate::daemon::Daemon;

/// Where a console will come from once its browser is there.
pub enum Source {
    /// A line of a guest, and its socket.
    Guest {
        /// Tells it the size of the window.
        size: Size,
        /// The socket.
        socket: PathBuf,
    },
    /// A shell in a guest.
    Inside(Program),
    /// The node.
    Node(SignIn),
}

/// Who is told the size of the window.
pub struct Size {
    daemon: Arc<Daemon>,
    kind: GuestKind,
    guest: GuestId,
    tty: Option<u8>,
}

/// A console that is open.
pub enum Terminal {
    /// A line of a guest.
    Guest {
        /// Tells it the size of the window.
        size: Size,
        /// Raw bytes both ways.
        stream: UnixStream,
    },
    /// A shell, of the node or in a guest.
    Shell(Shell),
}

impl Source {
    /// The source of a place's console; a guest must run. Only root@pam himself, without a token, has proved that he
    /// knows root's password.
    pub fn find(daemon: &Arc<Daemon>, place: Place, caller: &Identity) -> Result<Self, Error> {
        match place {
            Place::Guest(kind, guest) => Ok(match daemon.node.guests().console(kind, guest)? {
                Console::Line { socket, tty } => Self::Guest {
                    socket,
                    size: Size {
                        daemon: Arc::clone(daemon),
                        kind,
                        guest,
                        tty,
                    },
                },
                Console::Program(program) => Self::Inside(program),
            }),
            Place::Node if caller.is_root() => Ok(Self::Node(SignIn::Root)),
            Place::Node => Ok(Self::Node(SignIn::Asked)),
        }
    }

    /// Opens it.
    pub async fn open(self) -> Result<Terminal, Error> {
        match self {
            Self::Guest { size, socket } => {
                let stream = UnixStream::connect(socket)
                    .await
                    .map_err(|error| Error::failed("connect to the guest's console", error))?;
                Ok(Terminal::Guest { size, stream })
            }
            Self::Inside(program) => Ok(Terminal::Shell(Shell::within(program)?)),
            Self::Node(sign_in) => Ok(Terminal::Shell(Shell::open(sign_in)?)),
        }
    }
}

impl Terminal {
    /// Waits for output; 0 at its end.
    pub async fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        match self {
            Self::Guest { stream, .. } => stream.read(buffer).await,
            Self::Shell(shell) => shell.read(buffer).await,
        }
    }

    /// Types.
    pub async fn write_all(&mut self, bytes: &[u8]) -> Result<(), Error> {
        let written = match self {
            Self::Guest { stream, .. } => stream.write_all(bytes).await,
            Self::Shell(shell) => shell.write_all(bytes).await,
        };
        written.map_err(|error| Error::failed("write to the console", error))
    }

    /// Tells it the size of the window. A console that keeps its size is still a console.
    pub async fn resize(&mut self, columns: u16, rows: u16) {
        let resized = match self {
            Self::Guest { size, .. } => {
                let guests = size.daemon.node.guests();
                guests
                    .resize_console(size.kind, size.guest, size.tty, (columns, rows))
                    .await
            }
            Self::Shell(shell) => shell
                .resize(columns, rows)
                .map_err(|error| Error::failed("resize the terminal", error)),
        };
        if let Err(error) = resized {
            tracing::debug!(error = error.chain(), "resize a console");
        }
    }
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The far end of a console: a guest's console socket, or a shell of the node.

use std::path::PathBuf;
use std::sync::Arc;

use atoll_manager::access::Identity;
use atoll_manager::error::Error;
use atoll_manager::id::{GuestId, GuestKind};
use atoll_manager::shell::{Shell, SignIn};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;

use super::Place;
use crate::daemon::Daemon;

/// Where a console will come from once its browser is there.
pub enum Source {
    /// A guest, and the socket of its console.
    Guest {
        /// Tells it the size of the window.
        size: Size,
        /// The socket.
        socket: PathBuf,
    },
    /// The node.
    Node(SignIn),
}

/// Who is told the size of the window.
pub struct Size {
    daemon: Arc<Daemon>,
    kind: GuestKind,
    guest: GuestId,
}

/// A console that is open.
pub enum Terminal {
    /// Of a guest.
    Guest {
        /// Tells it the size of the window.
        size: Size,
        /// Raw bytes both ways.
        stream: UnixStream,
    },
    /// Of the node.
    Node(Shell),
}

impl Source {
    /// The source of a place's console; a guest must run. Only root@pam himself, without a token, has proved that he
    /// knows root's password.
    pub fn find(daemon: &Arc<Daemon>, place: Place, caller: &Identity) -> Result<Self, Error> {
        match place {
            Place::Guest(kind, guest) => Ok(Self::Guest {
                socket: daemon.node.guests().console(kind, guest)?,
                size: Size {
                    daemon: Arc::clone(daemon),
                    kind,
                    guest,
                },
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
            Self::Node(sign_in) => Ok(Terminal::Node(Shell::open(sign_in)?)),
        }
    }
}

impl Terminal {
    /// Waits for output; 0 at its end.
    pub async fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        match self {
            Self::Guest { stream, .. } => stream.read(buffer).await,
            Self::Node(shell) => shell.read(buffer).await,
        }
    }

    /// Types.
    pub async fn write_all(&mut self, bytes: &[u8]) -> Result<(), Error> {
        let written = match self {
            Self::Guest { stream, .. } => stream.write_all(bytes).await,
            Self::Node(shell) => shell.write_all(bytes).await,
        };
        written.map_err(|error| Error::failed("write to the console", error))
    }

    /// Tells it the size of the window. A console that keeps its size is still a console.
    pub async fn resize(&mut self, columns: u16, rows: u16) {
        let resized = match self {
            Self::Guest { size, .. } => {
                let guests = size.daemon.node.guests();
                guests
                    .resize_console(size.kind, size.guest, columns, rows)
                    .await
            }
            Self::Node(shell) => shell
                .resize(columns, rows)
                .map_err(|error| Error::failed("resize the terminal", error)),
        };
        if let Err(error) = resized {
            tracing::debug!(error = error.chain(), "resize a console");
        }
    }
}

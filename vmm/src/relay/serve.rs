// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The target's side: a process of its own beside `atoll-vmm receive`, made with the network's socket and a local
//! connection over which it hands local connections to the machine-to-be. One thread a connection.
//!
//! ```text
//!   no journey ── first preface of a kind "control" ──► Moving ── Taken read from the machine ──► Taken
//!                                                         │
//!                                                         └── its end without that ──► NotTaken
//! ```
//! It ends when both sides know how it ended; otherwise it stays for inquiries, a bounded time.
#![expect(unsafe_code, reason = "sigaction(2): children are left to the kernel")]

use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio, exit};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use atoll_disk::chain;
use atoll_thread::Kind;
use atoll_vmm_protocol::files::{Receiving, Sending};

use super::tls::Server;
use super::wire::{Connection, END, GONE, Plainly, Side, carry};
use super::{
    Address, GREETING_PATIENCE, Journey, PREFACE_BYTES, Preface, Protection, RelayError, Role,
    Verdict, milliseconds,
};
use crate::migration::{Message, send};
use crate::sandbox::{self, Confinement};

/// Connections at one time, strangers included: twice as many as one machine may have.
const CONNECTIONS_MAX: usize = 130;
/// Silence limits for which an answer to a doubt is kept.
const INQUIRY_SILENCES: u32 = 8;
/// What the relay says to `receive` when it listens; whatever else it says is why it does not.
const LISTENS: u8 = b'+';

/// The way from the relay's process to the machine-to-be.
#[derive(Debug)]
pub struct Served(UnixStream);

/// Listens on the network, and starts the relay's process with `arguments`. Returns where it listens, too.
pub fn start(address: &Address, arguments: &[OsString]) -> Result<(Served, String), RelayError> {
    let places = address.resolve("listen on")?;
    let network = |source| RelayError::Network {
        what: "listen on",
        address: address.to_string(),
        source,
    };
    let listener = TcpListener::bind(&*places).map_err(network)?;
    let place = listener.local_addr().map_err(network)?;
    let host = |what| move |source| RelayError::Host { what, source };
    let (mut near, far) = UnixStream::pair().map_err(host("make a pair of sockets"))?;
    // A child that has ended is nobody's: this process becomes a machine, which waits for none.
    forget_children().map_err(host("leave children to the kernel"))?;
    Command::new("/proc/self/exe")
        .args(arguments)
        .stdin(Stdio::from(OwnedFd::from(far)))
        .stdout(Stdio::from(OwnedFd::from(listener)))
        .spawn()
        .map_err(host("start the relay's process"))?;
    let mut first = [0];
    let read = near.read(&mut first).map_err(host("hear of the relay"))?;
    if read == 0 || first != [LISTENS] {
        let mut rest = Vec::new();
        let _ = near.read_to_end(&mut rest);
        let text = [&first[..read], &rest].concat();
        return Err(RelayError::Ended(
            String::from_utf8_lossy(&text).into_owned(),
        ));
    }
    Ok((Served(near), format!("tcp:{place}")))
}

/// SIGCHLD is ignored from now on: whoever ends is not kept for a wait(2).
fn forget_children() -> io::Result<()> {
    use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
    let ignore = SigAction::new(SigHandler::SigIgn, SaFlags::empty(), SigSet::empty());
    // SAFETY: no handler is installed, and none was.
    let set = unsafe { sigaction(Signal::SIGCHLD, &ignore) };
    set.map(drop).map_err(io::Error::from)
}

impl Served {
    /// The next local connection; the first is for messages.
    pub fn next(&self) -> io::Result<UnixStream> {
        let mut receiving = Receiving::new(&self.0);
        receiving.read_exact(&mut [0])?;
        let file = receiving.into_files().pop();
        let file = file.ok_or_else(|| io::Error::other("the relay sent no connection"))?;
        Ok(file.into())
    }
}

impl AsFd for Served {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Runs the relay's process to its end. Standard input is the machine-to-be, standard output the network's socket.
pub fn run(
    protection: &Protection,
    silence: Duration,
    confinement: &Confinement,
) -> Result<(), RelayError> {
    let host = |what| move |source| RelayError::Host { what, source };
    // Started by a path that tells nothing.
    let _ = rustix::thread::set_name(c"atoll-relay");
    let machine = io::stdin().as_fd().try_clone_to_owned();
    let mut machine = UnixStream::from(machine.map_err(host("take the machine's socket"))?);
    let listener = io::stdout().as_fd().try_clone_to_owned();
    let listener = TcpListener::from(listener.map_err(host("take the network's socket"))?);
    let prepared = Server::new(protection).map_err(|error| chain(&error));
    let prepared = prepared.and_then(|server| {
        let entered = sandbox::enter(confinement, &[]);
        entered.map_err(|error| chain(&error))?;
        Ok(server)
    });
    let server = match prepared {
        Ok(server) => server,
        Err(text) => {
            // Said once, by the process that was asked.
            let _ = machine.write_all(text.as_bytes());
            return Ok(());
        }
    };
    let machine_again = machine.try_clone().map_err(host("keep the socket"))?;
    let relay = Arc::new(Relay {
        server,
        silence,
        shared: Mutex::new(Shared {
            machine: machine_again,
            journey: None,
            verdict: Verdict::Undecided,
            connections: 0,
        }),
    });
    let watched = relay.clone();
    let watch = machine.try_clone().map_err(host("keep the socket"))?;
    let watch = move || watched.watch(watch);
    atoll_thread::spawn(Kind::Relay, "watch", watch).map_err(host("start a thread"))?;
    sandbox::seal(Kind::Relay);
    machine
        .write_all(&[LISTENS])
        .map_err(host("tell that the network is listened to"))?;
    relay.listen(&listener).map_err(host("take a connection"))
}

struct Relay {
    server: Server,
    silence: Duration,
    /// Leaf lock, held for a moment only: what all connections are about.
    shared: Mutex<Shared>,
}

struct Shared {
    machine: UnixStream,
    journey: Option<Journey>,
    verdict: Verdict,
    connections: usize,
}

impl Relay {
    fn shared(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the process with the machine-to-be, if that ends before anything has come.
    fn watch(&self, mut machine: UnixStream) {
        // Nothing is ever sent this way.
        let _ = machine.read(&mut [0]);
        if self.shared().journey.is_none() {
            exit(0);
        }
    }

    fn listen(self: &Arc<Self>, listener: &TcpListener) -> io::Result<()> {
        loop {
            let socket = match listener.accept() {
                Ok((socket, _)) => socket,
                Err(error) if is_the_peers(&error) => continue,
                Err(error) => return Err(error),
            };
            let is_full = {
                let mut shared = self.shared();
                shared.connections += 1;
                shared.connections > CONNECTIONS_MAX
            };
            let relay = self.clone();
            let body = move || {
                if let Err(error) = relay.serve(socket) {
                    tracing::warn!(%error, "a connection of the migration ended");
                }
                relay.shared().connections -= 1;
            };
            if is_full || atoll_thread::spawn(Kind::Relay, "relay", body).is_err() {
                self.shared().connections -= 1;
            }
        }
    }

    fn serve(&self, socket: TcpStream) -> io::Result<()> {
        let deadline = Instant::now() + GREETING_PATIENCE;
        socket.set_nodelay(true)?;
        socket.set_nonblocking(true)?;
        let mut session = self.server.session().map_err(io::Error::other)?;
        let mut preface = [0; PREFACE_BYTES];
        session.hear(&socket, &mut preface, deadline)?;
        let preface =
            Preface::of_bytes(preface).ok_or_else(|| io::Error::other("this is no ctl migrate"))?;
        let (verdict, local) = self.admit(&preface)?;
        let said = session.say(&socket, &verdict.to_bytes(), deadline);
        if said.is_err() && preface.role == Role::Control && local.is_some() {
            // The machine-to-be ends with its only source.
            exit(0);
        }
        said?;
        let Some(local) = local else {
            session.close(&socket);
            return Ok(());
        };
        let connection = Connection {
            socket,
            session,
            silence: self.silence,
            silence_there: Duration::from_millis(preface.silence_ms.into()),
        };
        match preface.role {
            Role::Control => self.converse(connection, &local),
            _ => carry(connection, &local, &mut Plainly),
        }
    }

    /// What a connection is told; if it is to go on, the machine-to-be has been given its end.
    fn admit(&self, preface: &Preface) -> io::Result<(Verdict, Option<UnixStream>)> {
        let mut shared = self.shared();
        let is_ours = shared.journey == Some(preface.journey);
        match preface.role {
            Role::Inquiry if is_ours => return Ok((shared.verdict, None)),
            Role::Control if shared.journey.is_none() => shared.journey = Some(preface.journey),
            Role::Data if is_ours && shared.verdict == Verdict::Undecided => {}
            _ => return Ok((Verdict::Busy, None)),
        }
        let (inner, outer) = UnixStream::pair()?;
        Sending::new(&shared.machine, &[outer.as_fd()]).write_all(&[0])?;
        let welcome = Verdict::Welcome(milliseconds(self.silence));
        Ok((welcome, Some(inner)))
    }

    /// Carries messages, and knows afterwards what became of the machine. Ends the process.
    fn converse(&self, connection: Connection, local: &UnixStream) -> io::Result<()> {
        let mut reader = Messages::default();
        let carried = carry(connection, local, &mut reader);
        // If the network broke, the machine-to-be may still have read Commit before: it is heard out.
        let _ = local.set_nonblocking(false);
        let _ = local.shutdown(std::net::Shutdown::Write);
        let mut bytes = [0; 4096];
        let mut machine = local;
        while let Ok(count @ 1..) = machine.read(&mut bytes) {
            reader.leaves(&bytes[..count]);
        }
        let verdict = match reader.taken {
            true => Verdict::Taken,
            false => Verdict::NotTaken,
        };
        self.shared().verdict = verdict;
        match &carried {
            Ok(()) => exit(0),
            Err(error) => tracing::warn!(%error, ?verdict, "the connection with the source broke"),
        }
        std::thread::sleep(self.silence * INQUIRY_SILENCES);
        exit(0)
    }
}

/// Whether an accept failed for a reason that is over with this connection (accept(2)).
fn is_the_peers(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::Interrupted
            | io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::HostUnreachable
            | io::ErrorKind::NetworkUnreachable
            | io::ErrorKind::NetworkDown
            | io::ErrorKind::TimedOut
    )
}

/// The target's end of the connection for messages: looks for Taken among those that leave.
#[derive(Default)]
struct Messages {
    /// The present message, as far as it has come, or its beginning.
    head: Vec<u8>,
    /// Bytes of it that are not looked at.
    skip: usize,
    taken: bool,
}

/// Longest message that is looked at.
const HEAD_BYTES_MAX: usize = 32;

impl Side for Messages {
    fn leaves(&mut self, bytes: &[u8]) {
        let mut taken = Vec::new();
        send(&mut taken, &Message::Taken).expect("a short message");
        for byte in bytes {
            if self.skip > 0 {
                self.skip -= 1;
                continue;
            }
            self.head.push(*byte);
            let Some((size, body)) = self.head.split_first_chunk::<4>() else {
                continue;
            };
            let size = usize::try_from(u32::from_le_bytes(*size)).expect("64-bit host");
            if size > HEAD_BYTES_MAX {
                self.skip = size;
                self.head.clear();
            } else if body.len() == size {
                self.taken |= self.head == taken;
                self.head.clear();
            }
        }
    }

    fn last(&mut self) -> u32 {
        let is_whole = self.head.is_empty() && self.skip == 0;
        match self.taken || !is_whole {
            true => END,
            false => GONE,
        }
    }

    fn gone(&mut self) -> Vec<u8> {
        Vec::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn taken_is_found_among_messages_in_any_pieces() {
        let reason = "x".repeat(100);
        let all = [Message::Welcome, Message::Failed { reason }, Message::Taken];
        let mut bytes = Vec::new();
        for message in &all {
            send(&mut bytes, message).unwrap();
        }
        let before_taken = bytes.len() - 11;
        for size in 1..bytes.len() {
            let mut reader = Messages::default();
            for piece in bytes[..before_taken].chunks(size) {
                reader.leaves(piece);
            }
            assert_eq!(reader.last(), GONE);
            reader.leaves(&bytes[before_taken..before_taken + 3]);
            assert_eq!(reader.last(), END, "in the middle of a message");
            reader.leaves(&bytes[before_taken + 3..]);
            assert!(reader.taken && reader.last() == END);
        }
    }
}

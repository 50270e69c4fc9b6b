// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The target's side, beside `atoll-vmm receive`, its caller, to which it hands the machine-to-be's ends of local
//! connections. One thread a connection.
//!
//! ```text
//!   no journey ── first preface of a kind "control" ──► Moving ── Taken read from the machine ──► Taken
//!                                                         │
//!                                                         └── its end without that ──► NotTaken
//! ```
//! It ends when both sides know how it ended; otherwise it stays for inquiries, a bounded time.

use std::io::{self, Read};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::process::exit;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use atoll_thread::Kind;
use atoll_vmm::migration::{Message, send};
use atoll_vmm::relay::Caller;
use atoll_vmm::sandbox::{self, Confinement};

use crate::session::Session;
use crate::tls::Server;
use crate::wire::{Connection, END, GONE, Plainly, Side, carry};
use crate::{
    Address, GREETING_PATIENCE, Journey, PREFACE_BYTES, Preface, Protection, RelayError, Role,
    Verdict, milliseconds,
};

/// Connections at one time, strangers included: twice as many as one machine may have.
const CONNECTIONS_MAX: usize = 130;
/// Silence limits for which an answer to a doubt is kept.
const INQUIRY_SILENCES: u32 = 8;
/// How often it is looked whether pages are still carried.
const END_POLL: Duration = Duration::from_millis(20);

/// Listens, and carries one machine's connections. `caller` is the machine-to-be.
pub fn serve(
    caller: &mut Caller,
    address: &Address,
    protection: &Protection,
    silence: Duration,
    confinement: &Confinement,
) -> Result<(), RelayError> {
    let host = |what| move |source| RelayError::Host { what, source };
    let network = |source| RelayError::Network {
        what: "listen on",
        address: address.to_string(),
        source,
    };
    let server = Server::new(protection)?;
    let places = address.resolve("listen on")?;
    let listener = TcpListener::bind(&*places).map_err(network)?;
    let place = listener.local_addr().map_err(network)?;
    sandbox::enter(confinement, &[])?;
    let again = || caller.try_clone().map_err(host("keep the caller's socket"));
    let relay = Arc::new(Relay {
        server,
        silence,
        shared: Mutex::new(Shared {
            machine: again()?,
            journey: None,
            verdict: Verdict::Undecided,
            connections: 0,
            carried: 0,
        }),
    });
    let (watched, watch) = (relay.clone(), again()?);
    let watch = move || watched.watch(watch);
    atoll_thread::spawn(Kind::Relay, "watch", watch).map_err(host("start a thread"))?;
    sandbox::seal(Kind::Relay);
    caller
        .begin(&format!("tcp:{place}"))
        .map_err(host("tell that the network is listened to"))?;
    // It has begun: the log is all that can be told now, and its end says the rest.
    let error = relay.listen(&listener);
    tracing::error!(%error, "no more connections are taken");
    Ok(())
}

struct Relay {
    server: Server,
    silence: Duration,
    /// Leaf lock, held for a moment only: what all connections are about.
    shared: Mutex<Shared>,
}

struct Shared {
    machine: Caller,
    journey: Option<Journey>,
    verdict: Verdict,
    connections: usize,
    /// Connections for pages that are being carried: a guest may run while they are.
    carried: usize,
}

impl Relay {
    fn shared(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the process with the machine-to-be, if that ends before anything has come.
    fn watch(&self, mut machine: Caller) {
        // It has no questions: this is its end.
        let _ = machine.question();
        if self.shared().journey.is_none() {
            exit(0);
        }
    }

    /// Serves whoever connects, until that fails.
    fn listen(self: &Arc<Self>, listener: &TcpListener) -> io::Error {
        loop {
            let socket = match listener.accept() {
                Ok((socket, _)) => socket,
                Err(error) if is_the_peers(&error) => continue,
                Err(error) => return error,
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
        if preface.role == Role::Pages {
            return self.admit_pages(&preface, &socket, deadline);
        }
        let (verdict, local) = self.admit(&preface)?;
        let said = session.say(&socket, &verdict.to_bytes(), deadline);
        if said.is_err() && local.is_some() {
            match preface.role {
                // The machine-to-be ends with its only source.
                Role::Control => exit(0),
                _ => self.shared().carried -= 1,
            }
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
            _ => {
                let carried = carry(connection, &local, &mut Plainly);
                // The machine-to-be knows by its end.
                drop(local);
                self.shared().carried -= 1;
                carried
            }
        }
    }

    /// Gives the machine-to-be a connection that needs nobody in between. That is told first, as the machine may write to
    /// it at once, and before the source makes the next one: they come to the machine in the order of their making.
    fn admit_pages(
        &self,
        preface: &Preface,
        socket: &TcpStream,
        deadline: Instant,
    ) -> io::Result<()> {
        let shared = self.shared();
        let is_ours = shared.journey == Some(preface.journey);
        let is_bare = matches!(self.server, Server::Insecure);
        let admitted = is_ours && is_bare && shared.verdict == Verdict::Undecided;
        let verdict = match admitted {
            true => Verdict::Welcome(milliseconds(self.silence)),
            false => Verdict::Busy,
        };
        // A few bytes in a socket that has none.
        Session::plain().say(socket, &verdict.to_bytes(), deadline)?;
        if admitted {
            socket.set_nonblocking(false)?;
            shared.machine.give(socket)?;
        }
        Ok(())
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
        shared.machine.give(&outer)?;
        shared.carried += usize::from(preface.role == Role::Data);
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
            Ok(()) => self.end(),
            Err(error) => tracing::warn!(%error, ?verdict, "the connection with the source broke"),
        }
        std::thread::sleep(self.silence * INQUIRY_SILENCES);
        self.end()
    }

    /// Ends the process, once no pages are carried any more.
    fn end(&self) -> ! {
        while self.shared().carried > 0 {
            std::thread::sleep(END_POLL);
        }
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

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The source's side: connects, hands out the machine's ends of local connections, and carries their bytes with one
//! thread each. It lives as long as `ctl migrate`, its caller, which asks it questions at the end; where a guest may run at
//! the target without all of its memory, as long as its connections.

use std::io;
use std::iter::repeat_n;
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use atoll_thread::Kind;
use atoll_vmm::migration::{Message, send};
use atoll_vmm::relay::{Caller, NOT_TAKEN, Question, TAKEN};

use crate::session::Session;
use crate::tls::Client;
use crate::wire::{self, Connection, Plainly, Side, carry};
use crate::{
    Address, GREETING_PATIENCE, Journey, Preface, Protection, RelayError, Role, VERDICT_BYTES,
    Verdict, milliseconds,
};

/// How often a target is asked what became of the machine.
const INQUIRY_PAUSE: Duration = Duration::from_millis(200);
/// How long the target may take to part in order from a source whose machine it has; nothing hangs on it.
const FINISH_PATIENCE: Duration = Duration::from_secs(5);
/// See [`FINISH_PATIENCE`].
const FINISH_POLL: Duration = Duration::from_millis(5);

/// The connections of one machine's move.
pub struct Relay {
    address: Address,
    client: Client,
    journey: Journey,
    silence: Duration,
    threads: Vec<JoinHandle<()>>,
    /// Why the first connection ended that did not end in order.
    trouble: Arc<OnceLock<String>>,
}

impl Relay {
    /// Connects for messages, `pages` times for pages and then `others` times for whatever else there is. `name` is what
    /// the target's certificate is for, unless that is the host of the address. Returns the machine's ends, that for
    /// messages first.
    pub fn open(
        address: Address,
        protection: &Protection,
        name: Option<&str>,
        silence: Duration,
        [pages, others]: [usize; 2],
    ) -> Result<(Self, Vec<OwnedFd>), RelayError> {
        let client = Client::new(protection, name.unwrap_or(&address.host))?;
        let mut relay = Self {
            address,
            client,
            journey: *uuid::Uuid::new_v4().as_bytes(),
            silence,
            threads: Vec::new(),
            trouble: Arc::default(),
        };
        let role = match protection {
            Protection::Tls(_) => Role::Data,
            Protection::Insecure => Role::Pages,
        };
        let roles = std::iter::once(Role::Control)
            .chain(repeat_n(role, pages))
            .chain(repeat_n(Role::Data, others));
        let ends = roles.map(|role| relay.extend(role));
        let ends = ends.collect::<Result<_, _>>()?;
        Ok((relay, ends))
    }

    /// One more connection, and the machine's end of it.
    fn extend(&mut self, role: Role) -> Result<OwnedFd, RelayError> {
        let (socket, session, verdict) = self.greet(role)?;
        let Verdict::Welcome(silence_ms) = verdict else {
            return Err(self.refused("another machine is on its way there"));
        };
        let host = |what| move |source| RelayError::Host { what, source };
        if role == Role::Pages {
            let blocks = socket.set_nonblocking(false);
            blocks.map_err(host("have a connection block"))?;
            return Ok(socket.into());
        }
        let connection = Connection {
            socket,
            session,
            silence: self.silence,
            silence_there: Duration::from_millis(silence_ms.into()),
        };
        let (inner, outer) = UnixStream::pair().map_err(host("make a pair of sockets"))?;
        let trouble = self.trouble.clone();
        let body = move || {
            let carried = match role {
                Role::Control => carry(connection, &inner, &mut Control),
                _ => carry(connection, &inner, &mut Plainly),
            };
            if let Err(error) = carried {
                // Only the first one tells; then the machine is told, by the end of its connection.
                let _ = trouble.set(error.to_string());
            }
            drop(inner);
        };
        let thread = atoll_thread::spawn(Kind::Relay, "relay", body);
        self.threads.push(thread.map_err(host("start a thread"))?);
        Ok(outer.into())
    }

    /// Connects, agrees on TLS, says what it is for, and is answered.
    fn greet(&self, role: Role) -> Result<(TcpStream, Session, Verdict), RelayError> {
        let deadline = Instant::now() + GREETING_PATIENCE;
        let socket = self.connect(deadline)?;
        let mut session = self.client.session()?;
        let preface = Preface {
            role,
            journey: self.journey,
            silence_ms: milliseconds(self.silence),
        };
        let mut greet = || {
            socket.set_nodelay(true)?;
            socket.set_nonblocking(true)?;
            session.say(&socket, &preface.to_bytes(), deadline)?;
            let mut verdict = [0; VERDICT_BYTES];
            session.hear(&socket, &mut verdict, deadline)?;
            Ok(verdict)
        };
        let verdict = greet().map_err(self.failed("greet"))?;
        let verdict = Verdict::of_bytes(verdict).ok_or_else(|| {
            self.refused("no atoll-vmm receive answers there, or only one side uses TLS")
        })?;
        Ok((socket, session, verdict))
    }

    fn connect(&self, deadline: Instant) -> Result<TcpStream, RelayError> {
        let mut last = io::Error::from(io::ErrorKind::NotFound);
        for place in self.address.resolve("connect to")? {
            let left = deadline.saturating_duration_since(Instant::now());
            match TcpStream::connect_timeout(&place, left.max(Duration::from_millis(1))) {
                Ok(socket) => return Ok(socket),
                Err(error) => last = error,
            }
        }
        Err(self.failed("connect to")(last))
    }

    fn failed(&self, what: &'static str) -> impl FnOnce(io::Error) -> RelayError {
        let address = self.address.to_string();
        move |source| RelayError::Network {
            what,
            address,
            source,
        }
    }

    fn refused(&self, reason: &'static str) -> RelayError {
        let address = self.address.to_string();
        RelayError::Refused { address, reason }
    }

    /// Hands out the machine's ends, then answers the caller's questions. Returns when there are no more: the caller has
    /// said that all is over, or has ended, and with `to_the_end` all connections have, too.
    pub fn answer(
        self,
        caller: &mut Caller,
        ends: Vec<OwnedFd>,
        to_the_end: bool,
    ) -> Result<(), RelayError> {
        let host = |source| RelayError::Host {
            what: "tell the caller",
            source,
        };
        // Where it connects to is the caller's own word.
        caller.begin("").map_err(host)?;
        for end in ends {
            caller.give(&end).map_err(host)?;
        }
        while let Some(question) = caller.question() {
            let text = match question {
                Question::Trouble => self.trouble.get().map_or("", String::as_str),
                Question::WasTaken => match self.was_taken() {
                    Some(true) => TAKEN,
                    Some(false) => NOT_TAKEN,
                    None => "",
                },
                Question::Finish => {
                    self.finish();
                    return Ok(());
                }
            };
            caller.answer(text).map_err(host)?;
        }
        if to_the_end {
            // Threads end with their connections; a panic has ended the process.
            self.threads
                .into_iter()
                .for_each(|thread| drop(thread.join()));
        }
        Ok(())
    }

    /// Asks the target's relay whether the target has the machine; `None` when nobody could tell for as long as a
    /// silence may last, twice.
    fn was_taken(&self) -> Option<bool> {
        let deadline = Instant::now() + self.silence * 2;
        loop {
            match self.greet(Role::Inquiry) {
                Ok((_, _, Verdict::Taken)) => return Some(true),
                Ok((_, _, Verdict::NotTaken)) => return Some(false),
                Ok(_) => {}
                Err(error) => tracing::debug!(%error, "no answer about the machine"),
            }
            if Instant::now() >= deadline {
                return None;
            }
            std::thread::sleep(INQUIRY_PAUSE);
        }
    }

    /// Waits a moment until everything has been carried, after the machine has closed its ends.
    fn finish(&self) {
        let deadline = Instant::now() + FINISH_PATIENCE;
        while !self.threads.iter().all(JoinHandle::is_finished) && Instant::now() < deadline {
            std::thread::sleep(FINISH_POLL);
        }
    }
}

/// The source's end of the connection for messages.
struct Control;

impl Side for Control {
    fn leaves(&mut self, _: &[u8]) {}

    fn last(&mut self) -> u32 {
        wire::END
    }

    fn gone(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        let reason = "the target ended before it took the machine".to_owned();
        let written = send(&mut bytes, &Message::Failed { reason });
        written.expect("a short message");
        bytes
    }
}

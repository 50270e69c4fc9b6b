// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! All connections of one guest, and the Unix sockets they go to: the state that both queues' threads share.
//!
//! The host's end, as Firecracker made it common: a program of the host connects to `PATH`, writes `CONNECT port`
//! and a newline, and reads `OK` with a port of its own; a guest that connects to port P of the host reaches
//! whoever listens on `PATH_P`.

use std::collections::{BTreeMap, VecDeque};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::connection::{Broken, Connection, Stage};
use super::packet::{Header, Operation, Ports};
use crate::virtio::unix;

/// Connections of one guest, those that ask included. Bounds memory: each has a buffer.
const CONNECTIONS_MAX: usize = 1024;
/// Resets and answers that wait for the driver's buffers. A driver that provokes more and never takes them loses
/// the rest.
const WAITING_MAX: usize = 1024;
/// Longest line by which a program of the host asks: `CONNECT 4294967295` and a newline.
const QUESTION_BYTES_MAX: usize = 32;
/// Host ports of connections that begin on the host.
const FIRST_PORT: u32 = 1 << 30;
/// Tokens of the poll: this, streams of connections, and of those that ask with the high bit.
const LISTENER: u64 = u64::MAX;
const QUESTION: u64 = 1 << 63;

/// A program of the host that has connected and not yet said to which port.
struct Question {
    stream: UnixStream,
    line: Vec<u8>,
}

/// See the module.
pub(super) struct Muxer {
    cid: u64,
    path: PathBuf,
    listener: UnixListener,
    poll: Epoll,
    /// Somebody could not be accepted, most likely since this process may open no more files: nothing tells of them again.
    missed: bool,
    connections: BTreeMap<Ports, Connection>,
    /// Ports by the poll's token.
    tokens: BTreeMap<u64, Ports>,
    questions: BTreeMap<u64, Question>,
    next_token: u64,
    next_port: u32,
    /// Packets without data, in order.
    waiting: VecDeque<Header>,
    /// Connection that was served last, so that all get their turn.
    last: Option<Ports>,
}

impl Muxer {
    pub(super) fn new(cid: u64, path: PathBuf, listener: UnixListener) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let poll = Epoll::new()?;
        let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, LISTENER);
        poll.ctl(ControlOperation::Add, listener.as_raw_fd(), event)?;
        Ok(Self {
            cid,
            path,
            listener,
            poll,
            missed: false,
            connections: BTreeMap::new(),
            tokens: BTreeMap::new(),
            questions: BTreeMap::new(),
            next_token: 0,
            next_port: FIRST_PORT,
            waiting: VecDeque::new(),
            last: None,
        })
    }

    /// Becomes readable when [`Muxer::look`] has something to do.
    pub(super) fn poll_fd(&self) -> RawFd {
        self.poll.as_raw_fd()
    }

    /// The guest has forgotten everything: so do we.
    pub(super) fn clear(&mut self) {
        self.connections.clear();
        self.tokens.clear();
        self.waiting.clear();
        self.last = None;
    }

    /// Connections that are open or asked for.
    pub(super) fn connection_count(&self) -> usize {
        self.connections.len()
    }

    /// One packet of the guest, `data` being what follows its header.
    pub(super) fn receive(&mut self, header: &Header, data: &[u8]) {
        let ports = header.ports;
        let Some(operation) = header.operation else {
            return self.reset(ports);
        };
        let Some(connection) = self.connections.get_mut(&ports) else {
            return match operation {
                Operation::Request => self.connect(header),
                Operation::Reset => {}
                _ => self.reset(ports),
            };
        };
        connection.note_credit(header);
        let done = match (operation, connection.stage) {
            (Operation::Response, Stage::Asked) => {
                connection.stage = Stage::Open;
                let line = format!("OK {}\n", ports.host);
                // So few bytes always fit into a socket that nothing was written to.
                connection
                    .stream
                    .write_all(line.as_bytes())
                    .map_err(|_| Broken)
            }
            (Operation::Data, _) => connection.take(data),
            (Operation::Shutdown, _) => {
                connection.shut_down(header.flags);
                Ok(())
            }
            (Operation::CreditUpdate, _) => Ok(()),
            (Operation::CreditRequest, _) => {
                let update = connection.header(ports, Operation::CreditUpdate);
                self.say(update);
                return;
            }
            (Operation::Reset, _) => {
                self.forget(ports);
                return;
            }
            (Operation::Request | Operation::Response, _) => Err(Broken),
        };
        self.settle(ports, done);
    }

    /// After something happened to a connection: its end, or the credit that the guest should know of.
    fn settle(&mut self, ports: Ports, done: Result<(), Broken>) {
        let Some(connection) = self.connections.get_mut(&ports) else {
            return;
        };
        if done.is_err() || connection.is_over() {
            self.forget(ports);
            self.reset(ports);
        } else if connection.owes_credit() {
            let update = connection.header(ports, Operation::CreditUpdate);
            self.say(update);
        }
    }

    /// The guest wants to be connected with who listens on the host.
    fn connect(&mut self, header: &Header) {
        let mut path = self.path.clone().into_os_string();
        path.push(format!("_{}", header.ports.host));
        let stream = match unix::connect(Path::new(&path)) {
            Ok(stream) if self.connections.len() < CONNECTIONS_MAX => stream,
            _ => return self.reset(header.ports),
        };
        let mut connection = Connection::new(stream, Stage::Open);
        connection.note_credit(header);
        let response = connection.header(header.ports, Operation::Response);
        match self.add(header.ports, connection) {
            Ok(()) => self.say(response),
            Err(_) => self.reset(header.ports),
        }
    }

    fn add(&mut self, ports: Ports, connection: Connection) -> io::Result<()> {
        connection.stream.set_nonblocking(true)?;
        let token = self.token();
        let events = EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED;
        let fd = connection.stream.as_raw_fd();
        // A stream that asked before is in the poll with another token.
        let event = EpollEvent::new(events, token);
        self.poll
            .ctl(ControlOperation::Add, fd, event)
            .or_else(|_| self.poll.ctl(ControlOperation::Modify, fd, event))?;
        self.tokens.insert(token, ports);
        self.connections.insert(ports, connection);
        Ok(())
    }

    fn token(&mut self) -> u64 {
        self.next_token += 1;
        self.next_token
    }

    /// Closing its stream takes it out of the poll as well, and leaves a file for who could not be accepted.
    fn forget(&mut self, ports: Ports) {
        self.connections.remove(&ports);
        self.tokens.retain(|_, other| *other != ports);
        if self.missed {
            self.accept();
        }
    }

    fn reset(&mut self, ports: Ports) {
        self.say(Header {
            ports,
            size: 0,
            operation: Some(Operation::Reset),
            flags: 0,
            buffer_bytes: 0,
            forwarded: 0,
        });
    }

    fn say(&mut self, header: Header) {
        if self.waiting.len() < WAITING_MAX {
            self.waiting.push_back(header);
        }
    }

    /// Takes in what happened on the host's side since the last call.
    pub(super) fn look(&mut self) {
        if self.missed {
            self.accept();
        }
        let mut events = [EpollEvent::default(); 64];
        while let Ok(count @ 1..) = self.poll.wait(0, &mut events) {
            for event in &events[..count] {
                self.happened(event.data(), event.event_set());
            }
        }
    }

    fn happened(&mut self, token: u64, events: EventSet) {
        if token == LISTENER {
            self.accept();
        } else if token & QUESTION != 0 {
            self.read_question(token);
        } else if let Some(ports) = self.tokens.get(&token).copied()
            && let Some(connection) = self.connections.get_mut(&ports)
        {
            connection.readable |= events.contains(EventSet::IN)
                || events.intersects(EventSet::HANG_UP | EventSet::ERROR);
            connection.writable |= events.contains(EventSet::OUT);
            let done = connection.flush();
            self.settle(ports, done);
        }
    }

    fn accept(&mut self) {
        loop {
            let stream = match self.listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) => {
                    self.missed = error.kind() != io::ErrorKind::WouldBlock;
                    return;
                }
            };
            if self.connections.len() + self.questions.len() >= CONNECTIONS_MAX
                || stream.set_nonblocking(true).is_err()
            {
                continue; // Closed, which its program sees.
            }
            let token = self.token() | QUESTION;
            let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, token);
            if self
                .poll
                .ctl(ControlOperation::Add, stream.as_raw_fd(), event)
                .is_ok()
            {
                let line = Vec::new();
                self.questions.insert(token, Question { stream, line });
            }
        }
    }

    /// Reads byte by byte, since what follows the line is the guest's.
    fn read_question(&mut self, token: u64) {
        let Some(mut question) = self.questions.remove(&token) else {
            return;
        };
        let mut byte = [0];
        loop {
            match question.stream.read(&mut byte) {
                Ok(1) if byte[0] == b'\n' => return self.ask(question),
                Ok(1) if question.line.len() < QUESTION_BYTES_MAX => question.line.push(byte[0]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.questions.insert(token, question);
                    return;
                }
                _ => return, // Gone, or not a question.
            }
        }
    }

    /// A program of the host has said which port of the guest it wants.
    fn ask(&mut self, question: Question) {
        let line = String::from_utf8_lossy(&question.line);
        let port = line.trim_end().strip_prefix("CONNECT ");
        let Some(guest) = port.and_then(|port| port.parse().ok()) else {
            return;
        };
        let ports = loop {
            let host = self.next_port;
            self.next_port = host.checked_add(1).unwrap_or(FIRST_PORT);
            let ports = Ports { host, guest };
            if !self.connections.contains_key(&ports) {
                break ports;
            }
        };
        let mut connection = Connection::new(question.stream, Stage::Asked);
        let request = connection.header(ports, Operation::Request);
        if self.add(ports, connection).is_ok() {
            self.say(request);
        }
    }

    /// Whether [`Muxer::send`] may have a packet.
    pub(super) fn has_more(&self) -> bool {
        !self.waiting.is_empty() || self.connections.values().any(Connection::may_read)
    }

    /// The next packet for the guest: header and data, which fit in `room` bytes with the header. `None`: nothing.
    pub(super) fn send<'a>(
        &mut self,
        room: usize,
        data: &'a mut [u8],
    ) -> Option<(Header, &'a [u8])> {
        if let Some(header) = self.waiting.pop_front() {
            return Some((header, &[]));
        }
        loop {
            // The one after the last, round and round.
            let after = self
                .last
                .map_or(std::ops::Bound::Unbounded, std::ops::Bound::Excluded);
            let mut later = self.connections.range((after, std::ops::Bound::Unbounded));
            let ports = later
                .find(|(_, connection)| connection.may_read())
                .or_else(|| self.connections.iter().find(|(_, one)| one.may_read()))
                .map(|(ports, _)| *ports)?;
            self.last = Some(ports);
            let connection = self.connections.get_mut(&ports)?;
            let credit = usize::try_from(connection.credit()).unwrap_or(usize::MAX);
            let most = data.len().min(room).min(credit);
            match connection.read(&mut data[..most]) {
                Ok(Some(count)) => {
                    let mut header = connection.header(ports, Operation::Data);
                    header.size = u32::try_from(count).expect("at most 64 KiB");
                    return Some((header, &data[..count]));
                }
                Ok(None) if connection.host_is_done() => {
                    if connection.is_over() {
                        self.settle(ports, Ok(()));
                        return self.waiting.pop_front().map(|header| (header, &[][..]));
                    }
                    return Some((connection.header(ports, Operation::Shutdown), &[]));
                }
                Ok(None) => {}
                Err(Broken) => {
                    self.settle(ports, Err(Broken));
                    return self.waiting.pop_front().map(|header| (header, &[][..]));
                }
            }
        }
    }

    pub(super) fn cid(&self) -> u64 {
        self.cid
    }
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A disk that another process serves over NBD, as a backend: the client's side of `doc/proto.md`.
//!
//! ```text
//! connected sockets ─► negotiate each: option GO ─► NbdBackend: a request takes a connection, and waits for its reply
//! ```
//!
//! One request a connection at a time, on the threads of `pool`, so that replies are simple and come in order; several
//! connections where the server promises that a flush on one covers all (`NBD_FLAG_CAN_MULTI_CONN`). The process that
//! uses it opens no path and connects to nothing: a connection that breaks, or whose server does not answer in
//! [`PATIENCE`], is given up, and with the last one every request fails.
//!
//! Own code: `nbd` (the one crate that is not abandoned) knows neither flush nor FUA, trim and zeroes, nor several
//! connections. What a server sends is checked like what a guest sends.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::net::sockopt::{Timeout, set_socket_timeout};
use zerocopy::IntoBytes;

use super::wire::{
    self, Fields, HELLO, OPTION, OPTION_REPLY, OptionHead, OptionReplyHead, REQUEST, RequestHead,
    SIMPLE_REPLY, SimpleReplyHead, ability, command, handshake, info, option, reply,
};
use crate::backend::{
    Abilities, BlockBackend, BlockQueue, Geometry, Operation, Request, SECTOR_BYTES,
    SharedGeometry, Space,
};
use crate::pool::{CALLS, Pooled};
use crate::segments::Segments;

/// How long a server may take to read or to answer.
pub const PATIENCE: Duration = Duration::from_secs(30);
/// Longest data of a reply to an option.
const REPLY_BYTES_MAX: u32 = 64 << 10;
/// Replies to one option after which a server is given up.
const REPLIES_MAX: usize = 100;
/// Data of one request, also where the server takes more.
const PIECE_BYTES_MAX: usize = 1 << 20;

/// Why a server's export is no disk.
#[derive(Debug, thiserror::Error)]
pub enum NbdClientError {
    /// The server does not speak the protocol.
    #[error("nbd server: {0}")]
    Protocol(&'static str),
    /// The server refuses.
    #[error("nbd export {name:?}: {reason}")]
    Refused {
        /// The export.
        name: String,
        /// What it says.
        reason: String,
    },
    /// What is written could not be made durable.
    #[error("nbd export {name:?}: the server does not flush")]
    NoFlush {
        /// The export.
        name: String,
    },
    /// No whole number of sectors.
    #[error("nbd export {name:?} has {size_bytes} bytes, expected a multiple of {unit} above 0")]
    Size {
        /// The export.
        name: String,
        /// Its size.
        size_bytes: u64,
        /// Its unit.
        unit: u32,
    },
    /// The connection broke.
    #[error("nbd connection")]
    Connection(#[from] io::Error),
}

/// A disk that an NBD server has, over connections that its requests share. A connection that breaks is given up;
/// with the last one every request fails.
pub struct NbdBackend {
    geometry: Arc<SharedGeometry>,
    abilities: Abilities,
    pool: Pooled,
}

/// What a server says of an export.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Told {
    size_bytes: u64,
    abilities: u16,
    block_bytes: u32,
    piece_bytes: usize,
}

/// The connections; a request waits for a free one.
struct Lines {
    told: Told,
    // A leaf lock, held to take and to give back.
    free: Mutex<Free>,
    freed: Condvar,
}

#[derive(Default)]
struct Free {
    lines: Vec<Line>,
    /// Connections that work, in use or not.
    count: usize,
}

/// One connection after the negotiation.
struct Line {
    stream: File,
    cookie: u64,
}

impl NbdBackend {
    /// Chooses `export` on connected sockets, at least one; `read_only` refuses writes that the server would take. Blocks
    /// until the server has answered, at most half a minute for each answer.
    pub fn open(
        streams: Vec<OwnedFd>,
        export: &str,
        read_only: bool,
    ) -> Result<Self, NbdClientError> {
        let mut told = None;
        let mut lines = Vec::new();
        for stream in streams {
            if told.is_some_and(|told: Told| told.abilities & ability::CAN_MULTI_CONN == 0) {
                break;
            }
            set_socket_timeout(&stream, Timeout::Recv, Some(PATIENCE)).map_err(io::Error::from)?;
            set_socket_timeout(&stream, Timeout::Send, Some(PATIENCE)).map_err(io::Error::from)?;
            // By read(2) and write(2): what every thread that serves a disk may do.
            let mut stream = File::from(stream);
            let says = negotiate(&mut stream, export)?;
            if told.is_some_and(|told| told != says) {
                let text = "it tells each connection something else of the export";
                return Err(NbdClientError::Protocol(text));
            }
            told = Some(says);
            lines.push(Line { stream, cookie: 0 });
        }
        let told = told.ok_or(NbdClientError::Protocol("there is no connection"))?;
        Self::check(told, export)?;
        Ok(Self::new(told, lines, read_only))
    }

    fn check(told: Told, export: &str) -> Result<(), NbdClientError> {
        let name = || export.to_owned();
        let (size_bytes, unit) = (told.size_bytes, told.block_bytes);
        if size_bytes == 0 || !size_bytes.is_multiple_of(unit.into()) {
            let name = name();
            return Err(NbdClientError::Size {
                name,
                size_bytes,
                unit,
            });
        }
        let needs_flush = told.abilities & ability::READ_ONLY == 0;
        if needs_flush && told.abilities & ability::SEND_FLUSH == 0 {
            return Err(NbdClientError::NoFlush { name: name() });
        }
        Ok(())
    }

    fn new(told: Told, lines: Vec<Line>, read_only: bool) -> Self {
        let geometry = Arc::new(SharedGeometry::new(Geometry {
            size_bytes: told.size_bytes,
            read_only: read_only || told.abilities & ability::READ_ONLY != 0,
        }));
        let has = |flag| told.abilities & flag != 0;
        let abilities = Abilities {
            block_bytes: told.block_bytes,
            discard_bytes: has(ability::SEND_TRIM).then_some(told.block_bytes.max(4096)),
            write_zeroes: has(ability::SEND_WRITE_ZEROES),
            ..Abilities::default()
        };
        let count = lines.len();
        let lines = Lines {
            told,
            free: Mutex::new(Free { lines, count }),
            freed: Condvar::new(),
        };
        let transfer = move |request: &Request| lines.carry_out(request);
        Self {
            pool: Pooled::new(CALLS, geometry.clone(), Arc::new(transfer), Arc::new(|| {})),
            geometry,
            abilities,
        }
    }
}

impl BlockBackend for NbdBackend {
    fn geometry(&self) -> Geometry {
        self.geometry.get()
    }

    fn abilities(&self) -> Abilities {
        self.abilities
    }

    fn open_queue(&self, depth: u16) -> io::Result<Box<dyn BlockQueue>> {
        Ok(Box::new(self.pool.queue(depth)?))
    }
}

impl Lines {
    fn lock(&self) -> MutexGuard<'_, Free> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self) -> io::Result<Line> {
        let mut free = self.lock();
        loop {
            if let Some(line) = free.lines.pop() {
                return Ok(line);
            }
            if free.count == 0 {
                return Err(io::ErrorKind::NotConnected.into());
            }
            free = self
                .freed
                .wait(free)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// On one connection; one that broke is closed.
    fn carry_out(&self, request: &Request) -> io::Result<()> {
        let mut line = self.take()?;
        let result = line.carry_out(request, self.told);
        let mut free = self.lock();
        let (answer, broken) = match result {
            Ok(answer) => (answer, false),
            Err(error) => (Err(error), true),
        };
        match broken {
            true => free.count -= 1,
            false => free.lines.push(line),
        }
        // Each who waits has to know when none is left.
        self.freed.notify_all();
        answer
    }
}

impl Drop for Lines {
    fn drop(&mut self) {
        for line in &mut self.lock().lines {
            // A server that is gone needs no farewell.
            let _ = line.send(command::DISCONNECT, 0, 0, 0);
        }
    }
}

impl Line {
    /// The server's answer; an error of the connection, which is of no more use then.
    fn carry_out(&mut self, request: &Request, told: Told) -> io::Result<io::Result<()>> {
        let at = request.offset_bytes;
        match request.operation {
            Operation::Read => {
                let mut data = Vec::new();
                for (at, piece) in request.segments.pieces(at, told.piece_bytes) {
                    data.resize(length(&piece)?, 0);
                    self.send(command::READ, 0, at, data.len())?;
                    if let Err(error) = self.answer()? {
                        return Ok(Err(error));
                    }
                    self.stream.read_exact(&mut data)?;
                    piece.fill(&data);
                }
                Ok(Ok(()))
            }
            Operation::Write => {
                let mut data = Vec::new();
                for (at, piece) in request.segments.pieces(at, told.piece_bytes) {
                    data.resize(length(&piece)?, 0);
                    piece.drain_to(&mut data);
                    self.send(command::WRITE, 0, at, data.len())?;
                    self.stream.write_all(&data)?;
                    if let Err(error) = self.answer()? {
                        return Ok(Err(error));
                    }
                }
                Ok(Ok(()))
            }
            Operation::Flush if told.abilities & ability::SEND_FLUSH == 0 => Ok(Ok(())),
            Operation::Flush => self.simple(command::FLUSH, 0, 0, 0),
            // Advice: what the server says to it does not matter.
            Operation::Discard { length_bytes } => {
                if told.abilities & ability::SEND_TRIM != 0 {
                    let _ = self.simple(command::TRIM, 0, at, length_bytes)?;
                }
                Ok(Ok(()))
            }
            Operation::WriteZeroes { .. } if told.abilities & ability::SEND_WRITE_ZEROES == 0 => {
                Ok(Err(io::ErrorKind::Unsupported.into()))
            }
            Operation::WriteZeroes {
                length_bytes,
                space,
            } => {
                let flags = match space {
                    Space::Keep => command::NO_HOLE,
                    Space::Free => 0,
                };
                self.simple(command::WRITE_ZEROES, flags, at, length_bytes)
            }
        }
    }

    fn simple(
        &mut self,
        command: u16,
        flags: u16,
        at: u64,
        length_bytes: u64,
    ) -> io::Result<io::Result<()>> {
        let Ok(length) = usize::try_from(length_bytes) else {
            return Ok(Err(io::ErrorKind::InvalidInput.into()));
        };
        self.send(command, flags, at, length)?;
        self.answer()
    }

    fn send(&mut self, command: u16, flags: u16, at: u64, length: usize) -> io::Result<()> {
        self.cookie += 1;
        let length = u32::try_from(length).map_err(|_| io::ErrorKind::InvalidInput)?;
        let head = RequestHead {
            magic: REQUEST.into(),
            flags: flags.into(),
            command: command.into(),
            cookie: self.cookie.to_be_bytes(),
            offset: at.into(),
            length: length.into(),
        };
        self.stream.write_all(head.as_bytes())
    }

    fn answer(&mut self) -> io::Result<io::Result<()>> {
        let head: SimpleReplyHead = wire::read(&mut self.stream)?;
        if head.magic.get() != SIMPLE_REPLY || head.cookie != self.cookie.to_be_bytes() {
            let text = "the nbd server answers something that was not asked";
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        Ok(match i32::try_from(head.error.get()) {
            Ok(0) => Ok(()),
            // The protocol's errors have Linux's numbers ("Error values").
            Ok(number) => Err(io::Error::from_raw_os_error(number)),
            Err(_) => Err(io::ErrorKind::Other.into()),
        })
    }
}

fn length(segments: &Segments) -> io::Result<usize> {
    usize::try_from(segments.total_bytes()).map_err(|_| io::ErrorKind::InvalidInput.into())
}

/// Fixed newstyle negotiation, to the choice of the export.
fn negotiate(stream: &mut (impl Read + Write), export: &str) -> Result<Told, NbdClientError> {
    let mut hello = [0; 18];
    stream.read_exact(&mut hello)?;
    let mut fields = Fields(&hello);
    let flags = match (fields.u64(), fields.u64(), fields.u16()) {
        (Some(HELLO), Some(OPTION), Some(flags)) => flags,
        _ => {
            return Err(NbdClientError::Protocol(
                "it knows only the old negotiation",
            ));
        }
    };
    if flags & handshake::FIXED_NEWSTYLE == 0 {
        let text = "it does not know the fixed newstyle negotiation";
        return Err(NbdClientError::Protocol(text));
    }
    let ours = handshake::FIXED_NEWSTYLE | flags & handshake::NO_ZEROES;
    let name_bytes = u32::try_from(export.len()).expect("a name is short");
    let mut data = name_bytes.to_be_bytes().to_vec();
    data.extend(export.as_bytes());
    data.extend(1_u16.to_be_bytes());
    data.extend(info::BLOCK_SIZE.to_be_bytes());
    let head = OptionHead {
        magic: OPTION.into(),
        option: option::GO.into(),
        length: u32::try_from(data.len()).expect("a name is short").into(),
    };
    let mut message = u32::from(ours).to_be_bytes().to_vec();
    message.extend(head.as_bytes());
    message.extend(data);
    stream.write_all(&message)?;
    let mut told = None;
    // Without it, 512 to 32 MiB ("Block size constraints").
    let mut blocks = (512, 32 << 20);
    for _ in 0..REPLIES_MAX {
        let (kind, data) = option_reply(stream)?;
        match kind {
            reply::INFO => {
                let mut fields = Fields(&data);
                match fields.u16() {
                    Some(info::EXPORT) => told = fields.u64().zip(fields.u16()),
                    Some(info::BLOCK_SIZE) => {
                        let sizes = (fields.u32(), fields.u32(), fields.u32());
                        if let (Some(least), Some(_), Some(most)) = sizes {
                            blocks = (least, most);
                        }
                    }
                    _ => {}
                }
            }
            reply::ACK => return agree(told, blocks),
            kind if kind & reply::ERROR != 0 => {
                let text = String::from_utf8_lossy(&data).into_owned();
                let reason = match (kind, text.as_str()) {
                    (reply::UNKNOWN, "") => "there is no such export".to_owned(),
                    (_, "") => format!("refused with error {}", kind & !reply::ERROR),
                    _ => text,
                };
                let name = export.to_owned();
                return Err(NbdClientError::Refused { name, reason });
            }
            _ => {}
        }
    }
    Err(NbdClientError::Protocol("it talks and talks"))
}

fn option_reply(stream: &mut impl Read) -> Result<(u32, Vec<u8>), NbdClientError> {
    let head: OptionReplyHead = wire::read(stream)?;
    if head.magic.get() != OPTION_REPLY || head.option.get() != option::GO {
        let text = "it answers something that is no reply to an option";
        return Err(NbdClientError::Protocol(text));
    }
    let length = head.length.get();
    if length > REPLY_BYTES_MAX {
        return Err(NbdClientError::Protocol("a reply has more than 64 KiB"));
    }
    let mut data = vec![0; usize::try_from(length).expect("64 KiB")];
    stream.read_exact(&mut data)?;
    Ok((head.kind.get(), data))
}

fn agree(told: Option<(u64, u16)>, (least, most): (u32, u32)) -> Result<Told, NbdClientError> {
    let Some((size_bytes, abilities)) = told else {
        return Err(NbdClientError::Protocol(
            "it does not tell the export's size",
        ));
    };
    let sector = u32::try_from(SECTOR_BYTES).expect("512");
    let block_bytes = least.max(sector);
    if !block_bytes.is_power_of_two() || most < block_bytes {
        return Err(NbdClientError::Protocol("its block sizes are none"));
    }
    let piece_bytes = usize::try_from(most).unwrap_or(PIECE_BYTES_MAX);
    let piece_bytes =
        piece_bytes.min(PIECE_BYTES_MAX) / block_bytes as usize * block_bytes as usize;
    if piece_bytes == 0 {
        return Err(NbdClientError::Protocol("its blocks have more than 1 MiB"));
    }
    Ok(Told {
        size_bytes,
        abilities,
        block_bytes,
        piece_bytes,
    })
}

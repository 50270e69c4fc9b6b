// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Carries one local connection through one of the network.
//!
//! ```text
//! frame = length (4 bytes, little endian), that many bytes
//!         0        a beat: still here
//!         END      the local connection's writer has ended
//!         GONE     the same, and the process behind it never takes the machine
//! ```
//! Both directions, one thread. Bounds: one frame in each direction, what TLS gathers, the sockets' buffers.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::PollFlags;

use crate::session::{Session, wait};

/// Bytes of the longest frame.
const FRAME_BYTES_MAX: usize = 256 << 10;
const BEAT: u32 = 0;
pub(crate) const END: u32 = u32::MAX;
pub(crate) const GONE: u32 = u32::MAX - 1;
const LENGTH_BYTES: usize = 4;
/// Beats in a silence limit.
const BEATS: u32 = 4;
/// How long the other side may take to close its connection as well.
const PARTING_PATIENCE: Duration = Duration::from_secs(1);

/// A connection whose two sides have greeted each other.
pub(crate) struct Connection {
    pub(crate) socket: TcpStream,
    pub(crate) session: Session,
    /// After which silence the other side is taken for gone.
    pub(crate) silence: Duration,
    /// After which silence the other side takes this one for gone.
    pub(crate) silence_there: Duration,
}

/// What one side does differently from the other.
pub(crate) trait Side {
    /// Bytes leave the local connection for the network.
    fn leaves(&mut self, bytes: &[u8]);
    /// The local connection's writer has ended: which frame says so.
    fn last(&mut self) -> u32;
    /// The other side's last frame was [`GONE`]: what the local connection reads last.
    fn gone(&mut self) -> Vec<u8>;
}

/// A connection that carries pages: nothing to look at.
pub(crate) struct Plainly;

impl Side for Plainly {
    fn leaves(&mut self, _: &[u8]) {}

    fn last(&mut self) -> u32 {
        END
    }

    fn gone(&mut self) -> Vec<u8> {
        Vec::new()
    }
}

/// Carries bytes both ways until both writers have ended. An error is the end of the connection on the network; the
/// local one is as it was.
pub(crate) fn carry(
    connection: Connection,
    local: &UnixStream,
    side: &mut dyn Side,
) -> io::Result<()> {
    connection.socket.set_nonblocking(true)?;
    local.set_nonblocking(true)?;
    let beat = connection.silence.min(connection.silence_there) / BEATS;
    let mut pump = Pump {
        connection,
        local,
        side,
        frame: vec![0; LENGTH_BYTES + FRAME_BYTES_MAX],
        decoder: Decoder::default(),
        arrived: Vec::new(),
        local_open: true,
        remote_open: true,
        local_told: false,
        heard: Instant::now(),
        spoke: Instant::now(),
        beat,
    };
    while !pump.is_over() {
        pump.turn()?;
    }
    pump.part();
    Ok(())
}

struct Pump<'a> {
    connection: Connection,
    local: &'a UnixStream,
    side: &'a mut dyn Side,
    frame: Vec<u8>,
    decoder: Decoder,
    /// What the local connection has not taken.
    arrived: Vec<u8>,
    local_open: bool,
    remote_open: bool,
    /// Whether the local connection has been told that nothing comes any more.
    local_told: bool,
    heard: Instant,
    spoke: Instant,
    beat: Duration,
}

impl Pump<'_> {
    fn is_over(&self) -> bool {
        let ended = !self.local_open && !self.remote_open;
        ended && self.arrived.is_empty() && !self.connection.session.has_output()
    }

    /// Closes the connection in order. What the other side sent last is read: to close a socket with bytes in it would
    /// take back what has been written to it.
    fn part(&mut self) {
        let Connection {
            socket, session, ..
        } = &mut self.connection;
        session.close(socket);
        let deadline = Instant::now() + PARTING_PATIENCE;
        loop {
            match session.read_from(socket, &mut self.frame) {
                Ok(1..) => {}
                Err(error) if is_again(&error) => {
                    if wait(&[(socket.as_fd(), PollFlags::IN)], deadline).is_err() {
                        return;
                    }
                }
                Ok(0) | Err(_) => return,
            }
        }
    }

    /// One pass over all that can be done now, then a wait for more.
    fn turn(&mut self) -> io::Result<()> {
        let came = self.take_from_network()?;
        let went = self.take_from_local()?;
        if came || went || self.is_over() {
            return Ok(());
        }
        let now = Instant::now();
        if now >= self.spoke + self.beat && !self.connection.session.has_output() {
            self.say(&BEAT.to_le_bytes())?;
        }
        // Who does not listen has heard nothing wrong.
        if !self.arrived.is_empty() {
            self.heard = now;
        }
        let given_up = self.heard + self.connection.silence;
        if now >= given_up {
            let text = "the other side is silent";
            return Err(io::Error::new(io::ErrorKind::TimedOut, text));
        }
        let next_beat = match self.connection.session.has_output() {
            true => now + self.beat,
            false => self.spoke + self.beat,
        };
        let until = given_up.min(next_beat);
        match self.wait(until) {
            Err(error) if error.kind() == io::ErrorKind::TimedOut => Ok(()),
            waited => waited,
        }
    }

    fn wait(&self, until: Instant) -> io::Result<()> {
        let flag = |wanted, flag| match wanted {
            true => flag,
            false => PollFlags::empty(),
        };
        let has_output = self.connection.session.has_output();
        let network =
            flag(self.arrived.is_empty(), PollFlags::IN) | flag(has_output, PollFlags::OUT);
        let local = flag(self.local_open && !has_output, PollFlags::IN)
            | flag(!self.arrived.is_empty(), PollFlags::OUT);
        // A descriptor of which nothing is wanted would still tell of its end, again and again.
        let wanted: Vec<_> = [
            (self.connection.socket.as_fd(), network),
            (self.local.as_fd(), local),
        ]
        .into_iter()
        .filter(|(_, flags)| !flags.is_empty())
        .collect();
        wait(&wanted, until)
    }

    fn say(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.connection.session.put(bytes)?;
        self.push()
    }

    fn push(&mut self) -> io::Result<()> {
        if self.connection.session.write_to(&self.connection.socket)? > 0 {
            self.spoke = Instant::now();
        }
        Ok(())
    }

    /// One read from the network, and what came of it to the local connection. Whether there was anything.
    fn take_from_network(&mut self) -> io::Result<bool> {
        self.deliver()?;
        if !self.arrived.is_empty() {
            return Ok(false);
        }
        let Connection {
            socket, session, ..
        } = &mut self.connection;
        let count = match session.read_from(socket, &mut self.frame[..FRAME_BYTES_MAX]) {
            Ok(0) if !self.remote_open && !self.local_open => return Ok(false),
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => count,
            Err(error) if is_again(&error) => return Ok(false),
            Err(error) => return Err(error),
        };
        self.heard = Instant::now();
        let last = self.decoder.feed(&self.frame[..count], &mut self.arrived)?;
        if let Some(last) = last {
            if !self.remote_open {
                return Err(io::Error::other("a connection that ends twice"));
            }
            self.remote_open = false;
            if last == GONE {
                self.arrived.extend(self.side.gone());
            }
        }
        self.deliver()?;
        Ok(true)
    }

    fn deliver(&mut self) -> io::Result<()> {
        while !self.arrived.is_empty() {
            match (&mut &*self.local).write(&self.arrived) {
                Ok(count) => drop(self.arrived.drain(..count)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Nobody reads it any more; what it has written still counts.
                Err(_) => self.arrived.clear(),
            }
        }
        if !self.remote_open && !self.local_told {
            // Fails when the other end is gone, which then knows.
            let _ = self.local.shutdown(Shutdown::Write);
            self.local_told = true;
        }
        Ok(())
    }

    /// One read from the local connection, and a frame for it. Whether there was anything.
    fn take_from_local(&mut self) -> io::Result<bool> {
        self.push()?;
        if !self.local_open || self.connection.session.has_output() {
            return Ok(false);
        }
        let count = match (&mut &*self.local).read(&mut self.frame[LENGTH_BYTES..]) {
            Ok(count) => count,
            Err(error) if is_again(&error) => return Ok(false),
            // As good as its end.
            Err(_) => 0,
        };
        if count == 0 {
            self.local_open = false;
            let last = self.side.last();
            self.say(&last.to_le_bytes())?;
            return Ok(true);
        }
        let length = u32::try_from(count).expect("a frame is short");
        self.frame[..LENGTH_BYTES].copy_from_slice(&length.to_le_bytes());
        let bytes = &self.frame[..LENGTH_BYTES + count];
        self.side.leaves(&bytes[LENGTH_BYTES..]);
        self.connection.session.put(bytes)?;
        self.push()?;
        Ok(true)
    }
}

fn is_again(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}

/// Frames as they come, in pieces of any size.
#[derive(Debug, Default)]
pub(crate) struct Decoder {
    /// Of a length that has come in part.
    length: Vec<u8>,
    /// Bytes that the present frame still has.
    left: usize,
}

impl Decoder {
    /// Adds what frames carry to `payload`: at most as many bytes as came. Returns the last frame, when it comes.
    pub(crate) fn feed(
        &mut self,
        mut bytes: &[u8],
        payload: &mut Vec<u8>,
    ) -> io::Result<Option<u32>> {
        let mut last = None;
        while !bytes.is_empty() {
            if self.left > 0 {
                let (part, rest) = bytes.split_at(self.left.min(bytes.len()));
                payload.extend_from_slice(part);
                self.left -= part.len();
                bytes = rest;
                continue;
            }
            let missing = LENGTH_BYTES - self.length.len();
            let (part, rest) = bytes.split_at(missing.min(bytes.len()));
            self.length.extend_from_slice(part);
            bytes = rest;
            let Ok(length) = <[u8; LENGTH_BYTES]>::try_from(&*self.length) else {
                return Ok(last);
            };
            self.length.clear();
            match u32::from_le_bytes(length) {
                BEAT => {}
                ended @ (END | GONE) if last.is_none() => last = Some(ended),
                length => {
                    self.left = usize::try_from(length).expect("64-bit host");
                    if self.left > FRAME_BYTES_MAX || last.is_some() {
                        return Err(io::Error::other("a frame that makes no sense"));
                    }
                }
            }
        }
        Ok(last)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn frames_in_pieces_are_frames() {
        let mut bytes = vec![0, 0, 0, 0, 3, 0, 0, 0, 1, 2, 3];
        bytes.extend(END.to_le_bytes());
        for size in 1..=bytes.len() {
            let (mut decoder, mut payload, mut last) = (Decoder::default(), Vec::new(), None);
            for piece in bytes.chunks(size) {
                last = last.or(decoder.feed(piece, &mut payload).unwrap());
            }
            assert_eq!((&*payload, last), (&[1, 2, 3][..], Some(END)));
        }
        let long = (1_u32 << 20).to_le_bytes();
        Decoder::default().feed(&long, &mut Vec::new()).unwrap_err();
        let after = [&END.to_le_bytes()[..], &[1, 0, 0, 0, 7]].concat();
        Decoder::default()
            .feed(&after, &mut Vec::new())
            .unwrap_err();
    }

    fn pair() -> [TcpStream; 2] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        [near, listener.accept().unwrap().0]
    }

    fn connection(socket: TcpStream, silence: Duration) -> Connection {
        Connection {
            socket,
            session: Session::plain(),
            silence,
            silence_there: silence,
        }
    }

    #[test]
    fn much_goes_both_ways_and_both_ends_are_told() {
        let silence = Duration::from_secs(60);
        std::thread::scope(|scope| {
            let ends = pair().map(|socket| {
                let (inner, outer) = UnixStream::pair().unwrap();
                let connection = connection(socket, silence);
                scope.spawn(move || carry(connection, &inner, &mut Plainly).unwrap());
                outer
            });
            let copies: Vec<_> = ends
                .into_iter()
                .map(|end| {
                    let mut writer = end.try_clone().unwrap();
                    scope.spawn(move || {
                        writer.write_all(&vec![7; 3 << 20]).unwrap();
                        writer.shutdown(Shutdown::Write).unwrap();
                    });
                    scope.spawn(move || {
                        let mut all = Vec::new();
                        (&end).read_to_end(&mut all).unwrap();
                        all
                    })
                })
                .collect();
            for copy in copies {
                assert_eq!(copy.join().unwrap(), vec![7; 3 << 20]);
            }
        });
    }

    #[test]
    fn silence_is_an_error_and_quiet_is_not() {
        let silence = Duration::from_millis(500);
        let [near, far] = pair();
        let (inner, outer) = UnixStream::pair().unwrap();
        let error = carry(connection(near, silence), &inner, &mut Plainly).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        drop((far, outer));
        // Nothing to carry for longer than the limit, with somebody at the other side.
        std::thread::scope(|scope| {
            let ends = pair().map(|socket| {
                let (inner, outer) = UnixStream::pair().unwrap();
                let connection = connection(socket, silence);
                let carried = scope.spawn(move || carry(connection, &inner, &mut Plainly));
                (outer, carried)
            });
            std::thread::sleep(silence * 2);
            let carried = ends.map(|(end, carried)| {
                drop(end);
                carried
            });
            for carried in carried {
                carried.join().unwrap().unwrap();
            }
        });
    }
}

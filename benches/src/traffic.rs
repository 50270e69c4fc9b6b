// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Works that a Linux guest and its host do with each other, and how long they take: streams, round trips, small
//! packets, requests on the guest's disk. [`serve`] is the guest's part, [`measure`] the host's, whose clock counts.
//!
//! ```text
//! host ── TCP, a connection a work: "WORK MILLISECONDS\n" ──► guest
//!      ◄─ data, echoes, or an answer of one line ─────────────
//!      ◄─ UDP on the same port, for works that say so ───────►
//! ```

use std::fmt::{self, Display};
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::str::FromStr;
use std::time::{Duration, Instant};

use anyhow::Context as _;

use crate::requests::{Requests, Span, transfer};

/// Where the guest listens, TCP and UDP.
pub const PORT: u16 = 7777;
/// Longest silence of the other side.
const SILENCE: Duration = Duration::from_secs(10);
/// Of a stream's reads and writes.
const PIECE_BYTES: usize = 256 << 10;
/// Datagrams on their way, and how many of them are acknowledged at once.
const WINDOW: u64 = 64;
const ACKNOWLEDGED: u64 = 16;
/// The smallest frame on a wire: 18 bytes beside the headers of Ethernet, IP and UDP.
const DATAGRAM_BYTES: usize = 18;
/// First byte of a datagram.
const DATA: u8 = 0;
const ACKNOWLEDGEMENT: u8 = 1;
const END: u8 = 2;

/// What is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    /// A stream, in bytes a second.
    TcpToHost,
    /// A stream, in bytes a second.
    TcpToGuest,
    /// One byte there and back; the median, in seconds.
    TcpRoundTrip,
    /// One byte there and back; the median, in seconds.
    UdpRoundTrip,
    /// Datagrams in the smallest frames, a window of them on their way, a second.
    UdpToHost,
    /// Datagrams in the smallest frames, a window of them on their way, a second.
    UdpToGuest,
    /// Requests on the guest's disk a second.
    Disk(Requests),
}

const NAMES: [(&str, Work); 6] = [
    ("tcp-to-host", Work::TcpToHost),
    ("tcp-to-guest", Work::TcpToGuest),
    ("tcp-round-trip", Work::TcpRoundTrip),
    ("udp-round-trip", Work::UdpRoundTrip),
    ("udp-to-host", Work::UdpToHost),
    ("udp-to-guest", Work::UdpToGuest),
];

impl Display for Work {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Work::Disk(what) = self {
            let Requests {
                write,
                random,
                bytes,
                depth,
            } = what;
            return write!(f, "disk:{write}:{random}:{bytes}:{depth}");
        }
        let named = NAMES.iter().find(|(_, work)| work == self);
        f.write_str(named.map_or("", |(name, _)| name))
    }
}

impl FromStr for Work {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        if let Some((_, work)) = NAMES.iter().find(|(name, _)| *name == text) {
            return Ok(*work);
        }
        let words: Vec<&str> = text.split(':').collect();
        let ["disk", write, random, bytes, depth] = words[..] else {
            anyhow::bail!("no such work: {text}");
        };
        Ok(Work::Disk(Requests {
            write: write.parse()?,
            random: random.parse()?,
            bytes: bytes.parse()?,
            depth: depth.parse()?,
        }))
    }
}

/// The guest's part of one work, whichever the host asks for next.
pub fn serve(listener: &TcpListener, disk: &Path) -> anyhow::Result<()> {
    let (mut control, _) = listener.accept().context("accept")?;
    prepare(&control)?;
    let line = read_line(&mut control)?;
    let (work, ms) = line.split_once(' ').context("a work and a time")?;
    let time = Duration::from_millis(ms.parse()?);
    let datagrams = || -> anyhow::Result<UdpSocket> {
        let socket = UdpSocket::bind(listener.local_addr()?)?;
        socket.set_read_timeout(Some(SILENCE))?;
        Ok(socket)
    };
    match work.parse()? {
        Work::TcpToHost => {
            let piece = vec![0; PIECE_BYTES];
            // Until the host has enough.
            while control.write_all(&piece).is_ok() {}
        }
        Work::TcpToGuest => {
            let mut piece = vec![0; PIECE_BYTES];
            let mut total = 0_u64;
            loop {
                match control.read(&mut piece)? {
                    0 => break,
                    count => total += count as u64,
                }
            }
            writeln!(control, "{total}")?;
        }
        Work::TcpRoundTrip => {
            let mut byte = [0];
            while control.read(&mut byte)? == 1 {
                control.write_all(&byte)?;
            }
        }
        Work::UdpRoundTrip => {
            let socket = datagrams()?;
            meet(&mut control, &socket)?;
            let mut byte = [0];
            while receive(&socket, &mut byte)? == 1 && byte[0] != END {
                send(&socket, &byte)?;
            }
        }
        Work::UdpToHost => {
            let socket = datagrams()?;
            meet(&mut control, &socket)?;
            flood(&socket, |_| true)?;
        }
        Work::UdpToGuest => {
            let socket = datagrams()?;
            meet(&mut control, &socket)?;
            acknowledge(&socket, |_| true)?;
        }
        Work::Disk(what) => {
            let begin = Instant::now();
            let done = transfer(disk, true, what, Span::Time(time))?;
            let (count, ns) = (done.count, done.time.as_nanos());
            writeln!(control, "{count} {ns} {}", begin.elapsed().as_nanos())?;
        }
    }
    Ok(())
}

/// Longest way of one word between the two, in nanoseconds.
const WORD_NS: f64 = 1e9;

/// What a measurement gives.
#[derive(Debug, Clone, Copy)]
pub struct Measured {
    /// In the work's unit.
    pub value: f64,
    /// Bytes, round trips, datagrams or requests, also those before the clock was started.
    pub count: f64,
}

/// Lets the guest at `address` do `work` for about `time`.
pub fn measure(address: SocketAddr, work: Work, time: Duration) -> anyhow::Result<Measured> {
    let mut control = TcpStream::connect_timeout(&address, SILENCE).context("connect")?;
    prepare(&control)?;
    let begin = Instant::now();
    control.write_all(format!("{work} {}\n", time.as_millis()).as_bytes())?;
    let datagrams = |control: &mut TcpStream| -> anyhow::Result<UdpSocket> {
        let any = SocketAddr::new([0, 0, 0, 0].into(), 0);
        let socket = UdpSocket::bind(any)?;
        socket.set_read_timeout(Some(SILENCE))?;
        socket.connect(address)?;
        read_line(control).context("the guest is ready")?;
        Ok(socket)
    };
    match work {
        Work::TcpToHost => stream_in(&mut control, time),
        Work::TcpToGuest => stream_out(&mut control, time),
        Work::TcpRoundTrip => round_trip(time, || {
            let mut byte = [DATA];
            control.write_all(&byte)?;
            control.read_exact(&mut byte)
        }),
        Work::UdpRoundTrip => {
            let socket = datagrams(&mut control)?;
            socket.send(&[DATA])?;
            let measured = round_trip(time, || {
                let mut byte = [DATA];
                socket.send(&byte)?;
                socket.recv(&mut byte).map(drop)
            })?;
            socket.send(&[END])?;
            Ok(measured)
        }
        Work::UdpToHost => {
            let socket = datagrams(&mut control)?;
            socket.send(&[DATA])?;
            counted(time, |go_on| acknowledge(&socket, go_on))
        }
        Work::UdpToGuest => {
            let socket = datagrams(&mut control)?;
            socket.send(&[DATA])?;
            counted(time, |go_on| flood(&socket, go_on))
        }
        Work::Disk(_) => {
            let line = read_line(&mut control)?;
            let elapsed_ns = begin.elapsed().as_secs_f64() * 1e9;
            let numbers: Result<Vec<f64>, _> = line.split(' ').map(str::parse).collect();
            let [count, ns, whole_ns] = numbers?[..] else {
                anyhow::bail!("{line:?} is not three numbers");
            };
            // With its preparations it takes as long by its clock as by ours, but for the word's way here.
            let right = whole_ns <= elapsed_ns && elapsed_ns <= 3.0 * whole_ns + WORD_NS;
            anyhow::ensure!(
                right,
                "{whole_ns} ns by the guest's clock, {elapsed_ns} by ours"
            );
            let value = count * 1e9 / ns;
            Ok(Measured { value, count })
        }
    }
}

fn prepare(control: &TcpStream) -> io::Result<()> {
    control.set_nodelay(true)?;
    control.set_read_timeout(Some(SILENCE))?;
    control.set_write_timeout(Some(SILENCE))
}

/// Byte by byte: what follows the line is somebody else's.
fn read_line(stream: &mut TcpStream) -> anyhow::Result<String> {
    let mut line = Vec::new();
    let mut byte = [0];
    loop {
        stream.read_exact(&mut byte)?;
        match byte[0] {
            b'\n' => return Ok(String::from_utf8_lossy(&line).into_owned()),
            other => line.push(other),
        }
    }
}

/// Tells the host that the socket is there, and learns from its first datagram where the others go.
fn meet(control: &mut TcpStream, socket: &UdpSocket) -> anyhow::Result<()> {
    writeln!(control, "ready")?;
    let mut byte = [0];
    let (_, from) = socket.recv_from(&mut byte).context("the first datagram")?;
    Ok(socket.connect(from)?)
}

fn stream_in(stream: &mut TcpStream, time: Duration) -> anyhow::Result<Measured> {
    let mut piece = vec![0; PIECE_BYTES];
    counted(time, |go_on| {
        let mut total = 0;
        loop {
            let count = stream.read(&mut piece)?;
            anyhow::ensure!(count > 0, "the guest ended the stream");
            total += count as u64;
            if !go_on(total) {
                return Ok(total);
            }
        }
    })
}

/// All of the stream, up to the guest's word that it has come.
fn stream_out(stream: &mut TcpStream, time: Duration) -> anyhow::Result<Measured> {
    let piece = vec![0; PIECE_BYTES];
    let begin = Instant::now();
    while begin.elapsed() < time {
        stream.write_all(&piece)?;
    }
    stream.shutdown(Shutdown::Write)?;
    let count: f64 = read_line(stream)?.parse()?;
    let value = count / begin.elapsed().as_secs_f64();
    Ok(Measured { value, count })
}

fn round_trip(
    time: Duration,
    mut once: impl FnMut() -> io::Result<()>,
) -> anyhow::Result<Measured> {
    let begin = Instant::now();
    let mut each = Vec::new();
    while begin.elapsed() < time {
        let start = Instant::now();
        once().context("a round trip")?;
        each.push(start.elapsed());
    }
    each.sort_unstable();
    let median = each.get(each.len() / 2).context("no round trip")?;
    Ok(Measured {
        value: median.as_secs_f64(),
        count: each.len() as f64,
    })
}

/// The rate of `work`, which asks its argument with the count so far whether to go on, and gives the count in the end.
fn counted(
    time: Duration,
    work: impl FnOnce(&mut dyn FnMut(u64) -> bool) -> anyhow::Result<u64>,
) -> anyhow::Result<Measured> {
    let begin = Instant::now();
    let mut start: Option<(Instant, u64)> = None;
    let mut value = 0.0;
    let count = work(&mut |count| {
        let now = Instant::now();
        let Some((start, before)) = start else {
            start = (now - begin >= time / 8).then_some((now, count));
            return true;
        };
        let elapsed = now - start;
        value = (count - before) as f64 / elapsed.as_secs_f64();
        elapsed < time
    })?;
    let count = count as f64;
    Ok(Measured { value, count })
}

/// Sends datagrams as fast as they are acknowledged, until the other side ends it, or `go_on` does.
fn flood(socket: &UdpSocket, mut go_on: impl FnMut(u64) -> bool) -> anyhow::Result<u64> {
    let (mut sent, mut acknowledged) = (0, 0);
    let data = [DATA; DATAGRAM_BYTES];
    let mut answer = [0; 9];
    loop {
        while sent - acknowledged < WINDOW {
            send(socket, &data)?;
            sent += 1;
        }
        let size = receive(socket, &mut answer).context("datagrams were lost")?;
        if size == answer.len() && answer[0] == ACKNOWLEDGEMENT {
            let mut count = [0; 8];
            count.copy_from_slice(&answer[1..]);
            acknowledged = u64::from_le_bytes(count);
        }
        if answer[0] == END {
            return Ok(acknowledged);
        }
        if !go_on(acknowledged) {
            socket.send(&[END])?;
            return Ok(acknowledged);
        }
    }
}

/// The other end of [`flood`].
fn acknowledge(socket: &UdpSocket, mut go_on: impl FnMut(u64) -> bool) -> anyhow::Result<u64> {
    let mut count = 0_u64;
    let mut data = [0; DATAGRAM_BYTES];
    loop {
        receive(socket, &mut data).context("datagrams were lost")?;
        if data[0] == END {
            return Ok(count);
        }
        count += 1;
        if !count.is_multiple_of(ACKNOWLEDGED) {
            continue;
        }
        if !go_on(count) {
            socket.send(&[END])?;
            return Ok(count);
        }
        let mut answer = [ACKNOWLEDGEMENT; 9];
        answer[1..].copy_from_slice(&count.to_le_bytes());
        send(socket, &answer)?;
    }
}

/// Sends to an end that may be gone: it has said so before, which is still to be read. A host's own kernel tells by
/// ICMP that nobody is at the port any more.
fn send(socket: &UdpSocket, data: &[u8]) -> io::Result<()> {
    match socket.send(data) {
        Err(error) if error.kind() != io::ErrorKind::ConnectionRefused => Err(error),
        _ => Ok(()),
    }
}

/// Receives what has come, also from an end that is gone.
fn receive(socket: &UdpSocket, data: &mut [u8]) -> io::Result<usize> {
    loop {
        match socket.recv(data) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
            received => return received,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_work_goes_through_this_machine_itself() {
        let disk = tempfile::NamedTempFile::new_in(".").unwrap();
        disk.as_file().set_len(1 << 20).unwrap();
        let what = Requests {
            write: true,
            random: true,
            bytes: 4096,
            depth: 4,
        };
        let works: Vec<Work> = NAMES.iter().map(|(_, work)| *work).collect();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for _ in 0..=works.len() {
                    serve(&listener, disk.path()).unwrap();
                }
            });
            for work in works.iter().copied().chain([Work::Disk(what)]) {
                assert_eq!(work.to_string().parse::<Work>().unwrap(), work);
                let measured = measure(address, work, Duration::from_millis(40)).unwrap();
                assert!(measured.value > 0.0, "{work}: {measured:?}");
                assert!(measured.count > 0.0, "{work}: {measured:?}");
            }
        });
    }
}

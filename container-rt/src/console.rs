// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A terminal of a monitored container, its console or one of its ttys: one source of output (a pty, or the pipe of a program without one),
//! any number of clients on its socket, and the recent past, which a new client gets first; `console.log` keeps the
//! console's. Everything is bounded: a client that does not read is dropped, never waited for.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::poll::{PollFd, PollFlags};

use crate::error::{Context, Error, Result};
use crate::state::{Directory, Line};
use crate::sys;
use crate::terminal::set_non_blocking;

/// Output that a new client gets first; our choice, a few screens.
const BACKLOG_BYTES: usize = 64 << 10;
/// Size at which console.log is cut back to the backlog.
const LOG_BYTES_MAX: usize = 4 * BACKLOG_BYTES;
/// Output that may wait for a slow client.
const CLIENT_BYTES_MAX: usize = 4 * BACKLOG_BYTES;
/// Clients at a time; our choice.
const CLIENTS_MAX: usize = 16;
/// Bytes moved at once.
const CHUNK_BYTES: usize = 8192;

/// The recent output, in memory and, of the console, on disk.
#[derive(Debug)]
struct Backlog {
    recent: VecDeque<u8>,
    file: Option<File>,
    file_bytes: usize,
}

impl Backlog {
    fn create(path: &Path) -> Result<Self> {
        Ok(Self {
            file: Some(File::create(path).at("create", path)?),
            ..Self::in_memory()
        })
    }

    fn in_memory() -> Self {
        Self {
            recent: VecDeque::new(),
            file: None,
            file_bytes: 0,
        }
    }

    /// Keeps output. A full disk costs the log, not the console.
    fn append(&mut self, bytes: &[u8]) {
        let excess = (self.recent.len() + bytes.len()).saturating_sub(BACKLOG_BYTES);
        self.recent.drain(..excess.min(self.recent.len()));
        self.recent.extend(bytes);
        if self.file_bytes + bytes.len() > LOG_BYTES_MAX {
            self.rewrite().ok();
        } else if let Some(file) = &mut self.file
            && file.write_all(bytes).is_ok()
        {
            self.file_bytes += bytes.len();
        }
    }

    fn rewrite(&mut self) -> std::io::Result<()> {
        let Some(file) = &mut self.file else {
            return Ok(());
        };
        file.set_len(0)?;
        file.seek(SeekFrom::Start(0))?;
        file.write_all(self.recent.make_contiguous())?;
        self.file_bytes = self.recent.len();
        Ok(())
    }
}

/// Somebody who looks at the console.
#[derive(Debug)]
struct Client {
    stream: UnixStream,
    output: VecDeque<u8>,
}

impl Client {
    /// Writes what it takes now; false when it is gone or too slow.
    fn flush(&mut self) -> bool {
        while !self.output.is_empty() {
            match self.stream.write(self.output.as_slices().0) {
                Ok(count) => drop(self.output.drain(..count)),
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => break,
                Err(_) => return false,
            }
        }
        self.output.len() <= CLIENT_BYTES_MAX
    }
}

/// What the container's output comes from.
#[derive(Debug)]
pub enum Source {
    /// A pty's controlling side. We keep the other side open, too: while no process in the container has it open
    /// (systemd closes it now and then) reading would fail.
    Terminal {
        /// The controlling side.
        pty: OwnedFd,
    },
    /// Output of a program without a terminal. Input goes nowhere.
    Pipe {
        /// The end to read.
        output: OwnedFd,
    },
}

/// One terminal of a container.
#[derive(Debug)]
pub struct Console {
    source: Option<File>,
    _peer: Option<OwnedFd>,
    is_terminal: bool,
    backlog: Backlog,
    listener: UnixListener,
    control: UnixDatagram,
    clients: Vec<Client>,
    input: Vec<u8>,
    sockets: [PathBuf; 2],
}

impl Console {
    /// Opens the sockets in the container's directory, and the console's log.
    pub fn open(directory: &Directory, line: Line, source: Source) -> Result<Self> {
        let (fd, peer, is_terminal) = match source {
            Source::Terminal { pty } => {
                let peer = sys::pty_peer(pty.as_fd()).context(|| "open the pty".to_owned())?;
                (pty, Some(peer), true)
            }
            Source::Pipe { output } => (output, None, false),
        };
        set_non_blocking(fd.as_fd())?;
        let path = directory.terminal_socket(line);
        let listener = in_directory(&path, |path| UnixListener::bind(path))?;
        listener.set_nonblocking(true).at("listen at", &path)?;
        let control_path = directory.control_socket(line);
        let control = in_directory(&control_path, |path| UnixDatagram::bind(path))?;
        control
            .set_nonblocking(true)
            .at("listen at", &control_path)?;
        let backlog = match line {
            Line::Console => Backlog::create(&directory.console_log())?,
            Line::Tty(_) => Backlog::in_memory(),
        };
        Ok(Self {
            source: Some(fd.into()),
            _peer: peer,
            is_terminal,
            backlog,
            listener,
            control,
            clients: Vec::new(),
            input: Vec::new(),
            sockets: [path, control_path],
        })
    }

    /// What to wait for. [`Self::serve`] then looks at everything: at most a score of descriptors.
    pub fn poll_fds(&self) -> Vec<PollFd<'_>> {
        let mut fds = vec![
            PollFd::new(self.listener.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.control.as_fd(), PollFlags::POLLIN),
        ];
        if let Some(source) = &self.source {
            let mut wanted = PollFlags::POLLIN;
            wanted.set(PollFlags::POLLOUT, !self.input.is_empty());
            fds.push(PollFd::new(source.as_fd(), wanted));
        }
        for client in &self.clients {
            let mut wanted = PollFlags::empty();
            // While input waits for the program, clients wait.
            wanted.set(PollFlags::POLLIN, self.input.is_empty());
            wanted.set(PollFlags::POLLOUT, !client.output.is_empty());
            fds.push(PollFd::new(client.stream.as_fd(), wanted));
        }
        fds
    }

    /// Does whatever can be done without waiting.
    pub fn serve(&mut self) {
        self.accept();
        self.obey();
        self.read_clients();
        self.write_input();
        self.copy_output();
        self.clients.retain_mut(Client::flush);
    }

    /// Takes the last output of a container that has ended.
    pub fn finish(&mut self) {
        while self.copy_output() {}
        self.clients.retain_mut(Client::flush);
    }

    /// Removes the sockets: nobody can come any more.
    pub fn close(self) {
        for path in &self.sockets {
            // Whoever deletes the container may have been faster.
            std::fs::remove_file(path).ok();
        }
    }

    fn accept(&mut self) {
        while let Ok((stream, _)) = self.listener.accept() {
            if self.clients.len() >= CLIENTS_MAX || stream.set_nonblocking(true).is_err() {
                continue;
            }
            let output = self.backlog.recent.clone();
            self.clients.push(Client { stream, output });
        }
    }

    /// Messages of `resize`: columns and rows, two bytes each.
    fn obey(&mut self) {
        let mut message = [0; 8];
        while let Ok(count) = self.control.recv(&mut message) {
            if let ([c0, c1, r0, r1], Some(source)) = (&message[..count], &self.source) {
                let (columns, rows) = (
                    u16::from_ne_bytes([*c0, *c1]),
                    u16::from_ne_bytes([*r0, *r1]),
                );
                // Without a terminal there is nothing to resize.
                sys::set_window_size(source.as_fd(), columns, rows).ok();
            }
        }
    }

    fn read_clients(&mut self) {
        let Self { clients, input, .. } = self;
        clients.retain_mut(|client| {
            if !input.is_empty() {
                return true;
            }
            let mut bytes = [0; CHUNK_BYTES];
            match client.stream.read(&mut bytes) {
                Ok(0) => false,
                Ok(count) => {
                    input.extend_from_slice(&bytes[..count]);
                    true
                }
                Err(e) => e.kind() == std::io::ErrorKind::WouldBlock,
            }
        });
    }

    fn write_input(&mut self) {
        match &mut self.source {
            Some(source) if self.is_terminal => crate::terminal::flush(source, &mut self.input),
            _ => self.input.clear(),
        }
    }

    /// Copies a chunk to the log and every client; false when there was none.
    fn copy_output(&mut self) -> bool {
        let mut bytes = [0; CHUNK_BYTES];
        let Some(source) = &mut self.source else {
            return false;
        };
        match source.read(&mut bytes) {
            Ok(count) if count > 0 => {
                self.backlog.append(&bytes[..count]);
                for client in &mut self.clients {
                    client.output.extend(&bytes[..count]);
                }
                true
            }
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => false,
            // The end of a pipe, or a pty that is gone for good.
            _ => {
                self.source = None;
                false
            }
        }
    }
}

/// Runs a socket call on a path that may be longer than a socket address holds.
pub(crate) fn in_directory<T>(
    path: &Path,
    call: impl FnOnce(&Path) -> std::io::Result<T>,
) -> Result<T> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(Error::Argument(format!("{} names no file", path.display())));
    };
    let directory = File::open(parent).at("open", parent)?;
    let short = Path::new("/proc/self/fd")
        .join(std::os::fd::AsRawFd::as_raw_fd(&directory).to_string())
        .join(name);
    call(&short).at("listen at", path)
}

/// Asks the monitor to give a terminal a new size.
pub fn resize(directory: &Directory, line: Line, columns: u16, rows: u16) -> Result<()> {
    let socket = UnixDatagram::unbound().context(|| "open a socket".to_owned())?;
    let mut message = columns.to_ne_bytes().to_vec();
    message.extend(rows.to_ne_bytes());
    let path = directory.control_socket(line);
    let parent = File::open(&directory.path).at("open", &directory.path)?;
    let short =
        Path::new("/proc/self/fd").join(std::os::fd::AsRawFd::as_raw_fd(&parent).to_string());
    let name = path.file_name().expect("it is a file of the directory");
    socket.send_to(&message, short.join(name)).context(|| {
        format!(
            "send to the monitor at {} (created with --monitor?)",
            path.display()
        )
    })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backlog_keeps_the_end_and_bounds_the_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let mut backlog = Backlog::create(&path).unwrap();
        for number in 0..100_000_u32 {
            backlog.append(format!("{number:07}\n").as_bytes());
        }
        let recent: Vec<u8> = backlog.recent.iter().copied().collect();
        assert_eq!(recent.len(), BACKLOG_BYTES);
        assert!(recent.ends_with(b"0099999\n"));
        let file = std::fs::read(&path).unwrap();
        assert!(file.len() <= LOG_BYTES_MAX);
        assert!(
            file.ends_with(b"0099998\n0099999\n"),
            "the file ends with the latest output"
        );
    }
}

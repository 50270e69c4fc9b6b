// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The console's thread: one poll(2) over listener, clients and wake-up.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};

use super::{ConsolePort, INPUT_BYTES};

/// Clients of one socket at a time; further ones wait in the listen queue.
const CLIENTS_MAX: usize = 16;
/// Bytes that are moved at once.
const CHUNK_BYTES: usize = 4 << 10;
/// At the end, clients have this long to take what is left.
const FAREWELL: Duration = Duration::from_millis(500);

/// Somebody at the host's end.
struct Client {
    input: Option<OwnedFd>,
    output: Option<OwnedFd>,
    /// Next byte of output it gets, counted from the start.
    position: u64,
    /// A file or terminal that may block is written only after poll said it takes some.
    writable: bool,
    /// A pseudo-terminal or the standard streams: stays when one direction ends.
    permanent: bool,
}

/// All of them.
pub(super) struct Clients {
    listener: Option<UnixListener>,
    /// Bytes of past output that a new client gets.
    backlog: u64,
    list: Vec<Client>,
    /// Kept open so that the terminal's master never sees the last user leave.
    _terminal: Option<OwnedFd>,
}

impl Clients {
    fn of(client: Client) -> Self {
        Self {
            listener: None,
            backlog: 0,
            list: vec![client],
            _terminal: None,
        }
    }

    pub(super) fn stdio() -> Self {
        let copy = |fd: BorrowedFd<'_>| rustix::io::fcntl_dupfd_cloexec(fd, 3).ok();
        Self::permanent(copy(io::stdin().as_fd()), copy(io::stdout().as_fd()))
    }

    pub(super) fn of_streams(input: OwnedFd, output: OwnedFd) -> Self {
        Self::permanent(Some(input), Some(output))
    }

    fn permanent(input: Option<OwnedFd>, output: Option<OwnedFd>) -> Self {
        Self::of(Client {
            input,
            output,
            position: 0,
            writable: false,
            permanent: true,
        })
    }

    /// A pseudo-terminal by its two ends, with its path.
    pub(super) fn of_pty(master: OwnedFd, terminal: OwnedFd) -> io::Result<(Self, PathBuf)> {
        let name = rustix::pty::ptsname(&master, Vec::new())?;
        let path = PathBuf::from(name.to_string_lossy().into_owned());
        let mut clients = Self::of_streams(master.try_clone()?, master);
        clients._terminal = Some(terminal);
        Ok((clients, path))
    }

    pub(super) fn of_listener(listener: UnixListener, backlog: usize) -> Self {
        Self {
            listener: Some(listener),
            backlog: backlog as u64,
            list: Vec::new(),
            _terminal: None,
        }
    }

    /// The descriptors from which one of the functions above makes the same: of clients that nobody has connected to yet.
    pub(super) fn into_files(self) -> Vec<OwnedFd> {
        let terminal = self._terminal;
        let listener = self.listener.map(OwnedFd::from);
        let has_terminal = terminal.is_some();
        let client = self.list.into_iter().flat_map(|client| match has_terminal {
            // Both of its directions are one.
            true => [client.output, None],
            false => [client.input, client.output],
        });
        let client: Vec<_> = client.flatten().collect();
        listener.into_iter().chain(client).chain(terminal).collect()
    }

    pub(super) fn pty() -> io::Result<(Self, PathBuf)> {
        use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = openpt(flags)?;
        grantpt(&master)?;
        unlockpt(&master)?;
        let name = ptsname(&master, Vec::new())?;
        let path = PathBuf::from(name.to_string_lossy().into_owned());
        let terminal = rustix::fs::open(
            &path,
            rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY | rustix::fs::OFlags::CLOEXEC,
            rustix::fs::Mode::empty(),
        )?;
        let mut mode = tcgetattr(&terminal)?;
        mode.make_raw();
        tcsetattr(&terminal, OptionalActions::Now, &mode)?;
        rustix::io::ioctl_fionbio(&master, true)?;
        Self::of_pty(master, terminal)
    }

    /// New clients get the last `backlog` bytes first.
    pub(super) fn listen(path: &Path, backlog: usize) -> io::Result<Self> {
        let listener = UnixListener::bind(path)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
        listener.set_nonblocking(true)?;
        Ok(Self::of_listener(listener, backlog))
    }

    fn accept(&mut self, port: &ConsolePort) {
        let Some(listener) = &self.listener else {
            return;
        };
        let Ok((stream, _)) = listener.accept() else {
            return; // Gone again, or a passing shortage: poll will tell.
        };
        let input = stream
            .set_nonblocking(true)
            .and_then(|()| stream.try_clone());
        match input {
            Ok(input) => self.list.push(Client {
                input: Some(input.into()),
                output: Some(stream.into()),
                position: port.lock().written.saturating_sub(self.backlog),
                writable: true,
                permanent: false,
            }),
            Err(error) => tracing::warn!(%error, "console client"),
        }
    }
}

impl Client {
    /// Writes from the ring until the client takes no more or has everything. `false` when it has gone.
    fn send(&mut self, port: &ConsolePort) -> bool {
        let mut chunk = [0; CHUNK_BYTES];
        while self.writable {
            let count = port.output_from(&mut self.position, &mut chunk);
            let Some(output) = (count > 0).then_some(self.output.as_ref()).flatten() else {
                return true;
            };
            match rustix::io::write(output, &chunk[..count]) {
                Ok(sent) => {
                    self.position += sent as u64;
                    // One write after each poll where a write could block.
                    self.writable = !self.permanent;
                }
                Err(rustix::io::Errno::AGAIN) => self.writable = false,
                Err(rustix::io::Errno::INTR) => {}
                Err(_) => {
                    self.output = None;
                    return self.permanent;
                }
            }
        }
        true
    }

    /// Reads once. `false` when it has gone.
    fn receive(&mut self, port: &ConsolePort) -> bool {
        let mut chunk = [0; CHUNK_BYTES];
        let room = INPUT_BYTES
            .saturating_sub(port.input_size())
            .min(chunk.len());
        let Some(input) = (room > 0).then_some(self.input.as_ref()).flatten() else {
            return true;
        };
        match rustix::io::read(input, &mut chunk[..room]) {
            Ok(0) => {
                self.input = None;
                self.permanent
            }
            Ok(count) => {
                port.lock().input.extend(&chunk[..count]);
                true
            }
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => true,
            Err(_) => {
                self.input = None;
                self.permanent
            }
        }
    }
}

impl ConsolePort {
    /// Copies output from `position`, which is moved forward when it has left the ring.
    fn output_from(&self, position: &mut u64, chunk: &mut [u8]) -> usize {
        let buffers = self.lock();
        let oldest = buffers.written - buffers.ring.len() as u64;
        *position = (*position).max(oldest);
        let from = usize::try_from(*position - oldest).unwrap_or(usize::MAX);
        let mut count = 0;
        for (to, byte) in chunk.iter_mut().zip(buffers.ring.iter().skip(from)) {
            *to = *byte;
            count += 1;
        }
        count
    }
}

/// The thread's state.
pub(super) struct Pump {
    port: Arc<ConsolePort>,
    clients: Clients,
}

impl Pump {
    pub(super) fn new(port: Arc<ConsolePort>, clients: Clients) -> Self {
        Self { port, clients }
    }

    pub(super) fn run(mut self) {
        while !self.port.lock().closing {
            if let Err(error) = self.turn(None) {
                tracing::error!(%error, "console: poll");
                return;
            }
        }
        let deadline = std::time::Instant::now() + FAREWELL;
        while self
            .clients
            .list
            .iter()
            .any(|client| client.lags(&self.port))
            && std::time::Instant::now() < deadline
        {
            let pause = Timespec::try_from(Duration::from_millis(20)).ok();
            if self.turn(pause).is_err() {
                return;
            }
        }
    }

    /// Waits once and serves everybody.
    fn turn(&mut self, timeout: Option<Timespec>) -> io::Result<()> {
        let ready = self.wait(timeout)?;
        if ready.woken {
            if let Some(wake) = &self.port.wake {
                // Non-blocking, and its value has no meaning.
                let _ = rustix::io::read(wake, &mut [0; 8]);
            }
            self.port.lock().woken = false;
        }
        let had_input = self.port.input_size();
        let port = &self.port;
        let mut flags = ready.clients.into_iter();
        self.clients.list.retain_mut(|client| {
            let (readable, writable) = flags.next().unwrap_or_default();
            client.writable |= writable;
            (!readable || client.receive(port)) && client.send(port)
        });
        if ready.accept {
            self.clients.accept(port);
            if let Some(client) = self.clients.list.last_mut() {
                client.send(port);
            }
        }
        if self.port.input_size() > had_input
            && let Some(call) = self.port.on_input.get()
        {
            call();
        }
        Ok(())
    }

    fn wait(&self, timeout: Option<Timespec>) -> io::Result<Ready> {
        let deaf = self.port.lock().deaf;
        let wants_input = !deaf && self.port.input_size() < INPUT_BYTES;
        let mut fds = Vec::with_capacity(2 + 2 * self.clients.list.len());
        if let Some(wake) = &self.port.wake {
            fds.push(PollFd::new(wake, PollFlags::IN));
        }
        let listening = !deaf && self.clients.list.len() < CLIENTS_MAX;
        let listener = self.clients.listener.as_ref().filter(|_| listening);
        if let Some(listener) = listener {
            fds.push(PollFd::new(listener, PollFlags::IN));
        }
        let first = fds.len();
        let mut places = Vec::with_capacity(self.clients.list.len());
        for client in &self.clients.list {
            let input = client.input.as_ref().filter(|_| wants_input);
            let output = client.output.as_ref();
            let output = output.filter(|_| !client.writable && client.lags(&self.port));
            places.push((
                input.map(|fd| push(&mut fds, fd, PollFlags::IN)),
                output.map(|fd| push(&mut fds, fd, PollFlags::OUT)),
            ));
        }
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let fired =
            |place: &Option<usize>| place.is_some_and(|place| !fds[place].revents().is_empty());
        Ok(Ready {
            woken: fired(&Some(0)),
            accept: first == 2 && fired(&Some(1)),
            clients: places
                .iter()
                .map(|(input, output)| (fired(input), fired(output)))
                .collect(),
        })
    }
}

struct Ready {
    woken: bool,
    accept: bool,
    /// (readable, writable) of each client.
    clients: Vec<(bool, bool)>,
}

impl Client {
    fn lags(&self, port: &ConsolePort) -> bool {
        self.output.is_some() && self.position < port.lock().written
    }
}

fn push<'a>(fds: &mut Vec<PollFd<'a>>, fd: &'a OwnedFd, flags: PollFlags) -> usize {
    fds.push(PollFd::new(fd, flags));
    fds.len() - 1
}

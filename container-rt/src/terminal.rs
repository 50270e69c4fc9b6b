// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Terminals: how a pty's controlling side travels from inside a container to whoever serves it, and the
//! foreground that joins it to our own terminal while forwarding signals. The monitor's console, with many
//! clients and a log, is `console`.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Instant;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, UnixAddr, recvmsg, sendmsg};
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

use crate::error::{Context, Result};
use crate::process::{ExitStatus, ProcessFd, wait_child};
use crate::sys;

/// Bytes moved at once.
const CHUNK_BYTES: usize = 8192;

/// Connects to a Unix socket whose path may be longer than a socket address holds (107 bytes).
pub fn connect(path: &Path) -> io::Result<UnixStream> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return UnixStream::connect(path);
    };
    if path.as_os_str().len() < 100 {
        return UnixStream::connect(path);
    }
    let directory = File::open(parent)?;
    let short = Path::new("/proc/self/fd").join(directory.as_raw_fd().to_string());
    UnixStream::connect(short.join(name))
}

/// Receives the descriptor that comes over `socket`: the pty of the container's init or of an exec'd process, or a
/// filter's listener.
pub fn receive_fd(socket: &UnixStream) -> Result<OwnedFd> {
    let none = || io::Error::new(io::ErrorKind::UnexpectedEof, "no descriptor came");
    let what = || "receive a descriptor of the container's".to_owned();
    let (_, fd) = receive(socket.as_fd(), &mut [0; 64]).context(what)?;
    fd.ok_or_else(none).context(what)
}

/// Receives bytes, and the descriptor that comes with them.
pub(crate) fn receive(
    socket: BorrowedFd<'_>,
    bytes: &mut [u8],
) -> nix::Result<(usize, Option<OwnedFd>)> {
    let mut slices = [IoSliceMut::new(bytes)];
    let mut space = nix::cmsg_space!([std::os::fd::RawFd; 1]);
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<UnixAddr>(socket.as_raw_fd(), &mut slices, Some(&mut space), flags)?;
    let mut found = None;
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = control {
            found = fds.first().copied();
        }
    }
    Ok((message.bytes, found.map(take)))
}

#[expect(
    unsafe_code,
    reason = "a descriptor that arrived in a message becomes owned"
)]
fn take(raw: std::os::fd::RawFd) -> OwnedFd {
    // SAFETY: the kernel installed this descriptor for us with the message; nothing else owns it.
    unsafe { OwnedFd::from_raw_fd(raw) }
}

/// Sends a descriptor over a socket.
pub fn send_fd(socket: BorrowedFd<'_>, fd: BorrowedFd<'_>) -> io::Result<()> {
    let fds = [fd.as_raw_fd()];
    let message = [IoSlice::new(b"pty")];
    let control = [ControlMessage::ScmRights(&fds)];
    sendmsg::<UnixAddr>(
        socket.as_raw_fd(),
        &message,
        &control,
        MsgFlags::empty(),
        None,
    )?;
    Ok(())
}

/// Our own terminal in raw mode, until dropped.
struct RawMode {
    before: Termios,
}

impl RawMode {
    /// Nothing when standard input is no terminal.
    fn enter() -> Option<Self> {
        let stdin = io::stdin();
        let before = tcgetattr(&stdin).ok()?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(&stdin, SetArg::TCSANOW, &raw).ok()?;
        Some(Self { before })
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        tcsetattr(io::stdin(), SetArg::TCSANOW, &self.before).ok();
    }
}

/// Signals blocked for reading through a descriptor, since before the container exists: none is missed.
pub struct Signals {
    fd: SignalFd,
}

impl Signals {
    /// Blocks all signals but those that a fault raises or that cannot be blocked. `become_program` unblocks
    /// them in the container.
    pub fn block() -> Result<Self> {
        let mut set = SigSet::all();
        for fault in [
            Signal::SIGSEGV,
            Signal::SIGBUS,
            Signal::SIGILL,
            Signal::SIGFPE,
            Signal::SIGABRT,
        ] {
            set.remove(fault);
        }
        sigprocmask(SigmaskHow::SIG_BLOCK, Some(&set), None)
            .context(|| "block signals".to_owned())?;
        let flags = SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC;
        let fd =
            SignalFd::with_flags(&set, flags).context(|| "open a signal descriptor".to_owned())?;
        Ok(Self { fd })
    }

    /// The next signal that arrived, if any.
    pub fn take(&mut self) -> Option<i32> {
        let information = self.fd.read_signal().ok()??;
        i32::try_from(information.ssi_signo).ok()
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Serves a container's process in the foreground until it ends: our terminal to its pty, our signals to it.
pub fn foreground(child: &ProcessFd, pty: Option<OwnedFd>, signals: Signals) -> Result<ExitStatus> {
    let ended = foreground_until(child, pty, signals, None)?;
    Ok(ended.expect("without a deadline it is served until it ends"))
}

/// The same, but no longer than to `deadline`: nothing when it still runs then.
pub fn foreground_until(
    child: &ProcessFd,
    pty: Option<OwnedFd>,
    mut signals: Signals,
    deadline: Option<Instant>,
) -> Result<Option<ExitStatus>> {
    let mut pty = pty.map(File::from);
    let _raw = pty.as_ref().and_then(|_| RawMode::enter());
    // While no process in the container has its side open, reading ours would fail: keep it open.
    let _peer = pty.as_ref().and_then(|pty| sys::pty_peer(pty.as_fd()).ok());
    if let Some(pty) = &pty {
        set_non_blocking(pty.as_fd())?;
        copy_window_size(pty.as_fd());
    }
    let stdin = io::stdin();
    let mut pending: Vec<u8> = Vec::new();
    let mut stdin_open = pty.is_some();
    loop {
        let mut wanted = PollFlags::POLLIN;
        wanted.set(PollFlags::POLLOUT, !pending.is_empty());
        let mut polled = vec![
            PollFd::new(child.as_fd(), PollFlags::POLLIN),
            PollFd::new(signals.as_fd(), PollFlags::POLLIN),
        ];
        let read_stdin = stdin_open && pending.is_empty() && pty.is_some();
        if let Some(pty) = &pty {
            polled.push(PollFd::new(pty.as_fd(), wanted));
        }
        if read_stdin {
            polled.push(PollFd::new(stdin.as_fd(), PollFlags::POLLIN));
        }
        match poll(&mut polled, time_left(deadline)) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(source) => return Err(source).context(|| "poll".to_owned()),
        }
        let ready: Vec<bool> = polled.iter().map(|p| p.any().unwrap_or(false)).collect();
        while let Some(signal) = signals.take() {
            forward(signal, child, pty.as_ref().map(AsFd::as_fd));
        }
        if read_stdin && ready[3] {
            stdin_open = read_some(&mut stdin.lock(), &mut pending);
        }
        if let Some(open) = &mut pty {
            flush(open, &mut pending);
            if ready[2] && !copy_out(open) {
                pty = None;
            }
        }
        if ready[0] {
            while pty.as_mut().is_some_and(copy_out_some) {}
            return wait_child(child).map(Some);
        }
        if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            return Ok(None);
        }
    }
}

/// How long to wait at most, rounded up; the longest time that fits is enough, since it is looked at again.
fn time_left(deadline: Option<Instant>) -> PollTimeout {
    let Some(deadline) = deadline else {
        return PollTimeout::NONE;
    };
    let left = deadline.saturating_duration_since(Instant::now());
    PollTimeout::try_from(left.as_millis() + 1).unwrap_or(PollTimeout::MAX)
}

/// What a signal to us means for the container.
fn forward(signal: i32, child: &ProcessFd, pty: Option<BorrowedFd<'_>>) {
    match (signal, pty) {
        (libc::SIGCHLD | libc::SIGPIPE | libc::SIGURG, _) => {}
        (libc::SIGWINCH, Some(pty)) => copy_window_size(pty),
        // The child may have ended a moment ago; the loop sees that next.
        _ => drop(child.signal(signal)),
    }
}

fn copy_window_size(pty: BorrowedFd<'_>) {
    if let Ok((columns, rows)) = sys::window_size(io::stdin().as_fd())
        && (columns, rows) != (0, 0)
    {
        sys::set_window_size(pty, columns, rows).ok();
    }
}

/// Makes reads and writes answer instead of wait.
pub(crate) fn set_non_blocking(fd: BorrowedFd<'_>) -> Result<()> {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    let flags = fcntl(fd, FcntlArg::F_GETFL).context(|| "fcntl".to_owned())?;
    let flags = OFlag::from_bits_retain(flags) | OFlag::O_NONBLOCK;
    fcntl(fd, FcntlArg::F_SETFL(flags)).context(|| "fcntl".to_owned())?;
    Ok(())
}

/// Appends what can be read; false at the end of the input.
fn read_some(from: &mut impl Read, pending: &mut Vec<u8>) -> bool {
    let mut bytes = [0; CHUNK_BYTES];
    match from.read(&mut bytes) {
        Ok(0) => false,
        Ok(count) => {
            pending.extend_from_slice(&bytes[..count]);
            true
        }
        Err(e) => e.kind() == io::ErrorKind::WouldBlock || e.kind() == io::ErrorKind::Interrupted,
    }
}

/// Writes what the other side takes now.
pub(crate) fn flush(to: &mut impl Write, pending: &mut Vec<u8>) {
    if pending.is_empty() {
        return;
    }
    match to.write(pending) {
        Ok(count) => drop(pending.drain(..count)),
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
        // The other side is gone; nobody will ever read this.
        Err(_) => pending.clear(),
    }
}

/// Copies output once; false when the pty is closed for good.
fn copy_out(pty: &mut File) -> bool {
    let mut bytes = [0; CHUNK_BYTES];
    match pty.read(&mut bytes) {
        Ok(0) => false,
        Ok(count) => {
            let mut stdout = io::stdout().lock();
            stdout
                .write_all(&bytes[..count])
                .and_then(|()| stdout.flush())
                .is_ok()
        }
        // EIO: the last process has closed the other side.
        Err(e) => e.kind() == io::ErrorKind::WouldBlock || e.kind() == io::ErrorKind::Interrupted,
    }
}

/// Copies output once; false when there was none.
fn copy_out_some(pty: &mut File) -> bool {
    let mut polled = [PollFd::new(pty.as_fd(), PollFlags::POLLIN)];
    let readable = poll(&mut polled, PollTimeout::ZERO).is_ok_and(|count| count > 0);
    readable && copy_out(pty)
}

/// Joins our terminal to a stream until the stream ends or the user types `detach` (a byte) at a line's start.
pub fn attach(stream: UnixStream, detach: Option<u8>) -> Result<()> {
    let _raw = RawMode::enter();
    let mut stream = stream;
    stream
        .set_nonblocking(true)
        .context(|| "attach".to_owned())?;
    let stdin = io::stdin();
    let mut pending: Vec<u8> = Vec::new();
    let mut stdin_open = true;
    loop {
        let mut wanted = PollFlags::POLLIN;
        wanted.set(PollFlags::POLLOUT, !pending.is_empty());
        let mut polled = vec![PollFd::new(stream.as_fd(), wanted)];
        if stdin_open && pending.is_empty() {
            polled.push(PollFd::new(stdin.as_fd(), PollFlags::POLLIN));
        }
        match poll(&mut polled, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(source) => return Err(source).context(|| "poll".to_owned()),
        }
        let ready: Vec<bool> = polled.iter().map(|p| p.any().unwrap_or(false)).collect();
        if ready.get(1) == Some(&true) {
            stdin_open = read_some(&mut stdin.lock(), &mut pending);
            if detach.is_some_and(|key| pending.contains(&key)) {
                return Ok(());
            }
        }
        flush(&mut stream, &mut pending);
        if ready[0] {
            let mut bytes = [0; CHUNK_BYTES];
            match stream.read(&mut bytes) {
                Ok(0) => return Ok(()),
                Ok(count) => {
                    let mut stdout = io::stdout().lock();
                    let written = stdout
                        .write_all(&bytes[..count])
                        .and_then(|()| stdout.flush());
                    written.context(|| "write to standard output".to_owned())?;
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(source) => return Err(source).context(|| "read the console".to_owned()),
            }
        }
    }
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A program on a pseudo-terminal, ended when it is dropped: login(1) on the node itself, or a shell in a container.
//!
//! Called by the API for a terminal in the browser; who may have one is its matter.

#![expect(
    unsafe_code,
    reason = "tokio wants a promise about the terminal's descriptor"
)]

use std::io::{self, Read as _, Write as _};
use std::os::fd::OwnedFd;

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};
use tokio::io::unix::AsyncFd;
use tokio::process::Child;

use crate::error::Error;
use crate::exec::Program;

/// Who signs in at a shell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SignIn {
    /// root, who has proved that already.
    Root,
    /// Whoever knows a name and its password: login asks.
    Asked,
}

/// See the module.
#[derive(Debug)]
pub struct Shell {
    terminal: AsyncFd<std::fs::File>,
    program: Child,
    end: End,
}

/// What the program gets when it is dropped; the end of the terminal takes those that were started from it along.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// SIGKILL.
    Killed,
    /// The terminal's hangup alone: it has something to see to before it ends.
    HungUp,
}

impl Drop for Shell {
    fn drop(&mut self) {
        if self.end == End::Killed {
            // It may have ended by itself.
            drop(self.program.start_kill());
        }
    }
}

impl Shell {
    /// Starts one of the node.
    pub fn open(sign_in: SignIn) -> Result<Self, Error> {
        let login = match sign_in {
            SignIn::Root => Program::new("login").args(["-f", "root"]),
            SignIn::Asked => Program::new("login"),
        };
        Self::start(login, End::Killed)
    }

    /// Starts a program that carries a terminal on to somewhere else: the runtime's, to a container. It takes what it
    /// has started there along when the terminal hangs up; killed, it would leave it to nobody.
    pub fn within(program: Program) -> Result<Self, Error> {
        Self::start(program, End::HungUp)
    }

    fn start(program: Program, end: End) -> Result<Self, Error> {
        let (terminal, inner) = pair().map_err(|e| Error::failed("open a terminal", e))?;
        let program = program.spawn_on_terminal(inner)?;
        let terminal = watch(terminal).map_err(|e| Error::failed("watch a terminal", e))?;
        Ok(Self {
            terminal,
            program,
            end,
        })
    }

    /// Waits for output; 0 when the shell has ended. Loses nothing when it is dropped before it is ready.
    pub async fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self
            .terminal
            .async_io(tokio::io::Interest::READABLE, |mut file| file.read(buffer));
        match read.await {
            // Nobody has the inner end open any more. pty(7), ioctl_tty(2).
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error()) => {
                Ok(0)
            }
            result => result,
        }
    }

    /// Types.
    pub async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let written = self
                .terminal
                .async_io(tokio::io::Interest::WRITABLE, |mut file| file.write(bytes))
                .await?;
            bytes = &bytes[written..];
        }
        Ok(())
    }

    /// Tells the programs the size of the window.
    pub fn resize(&self, columns: u16, rows: u16) -> io::Result<()> {
        let size = Winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        Ok(tcsetwinsize(self.terminal.get_ref(), size)?)
    }
}

/// A pseudo-terminal: our end, which never blocks, and that of the programs.
fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let ours = openpt(flags)?;
    grantpt(&ours)?;
    unlockpt(&ours)?;
    let theirs = ioctl_tiocgptpeer(&ours, flags)?;
    fcntl_setfl(&ours, fcntl_getfl(&ours)? | OFlags::NONBLOCK)?;
    Ok((ours, theirs))
}

fn watch(terminal: OwnedFd) -> io::Result<AsyncFd<std::fs::File>> {
    let terminal = std::fs::File::from(terminal);
    // SAFETY: a File owns its descriptor, always gives the same one, and nothing here closes or replaces it while the
    // AsyncFd, which owns the File, lives.
    let watched = unsafe { AsyncFd::register(terminal) };
    Ok(watched?)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Everything that it says until it ends.
    async fn rest(shell: &Shell) -> String {
        let (mut seen, mut buffer) = (Vec::new(), [0; 4096]);
        loop {
            match shell.read(&mut buffer).await.unwrap() {
                0 => return String::from_utf8_lossy(&seen).into_owned(),
                count => seen.extend_from_slice(&buffer[..count]),
            }
        }
    }

    #[tokio::test]
    async fn programs_have_a_terminal_with_a_size_and_its_end_is_seen() {
        let shell = Shell::within(Program::new("sh")).unwrap();
        shell.resize(91, 17).unwrap();
        let line = b"stty size; tty >/dev/tty; echo is-$((40+2)); exit\n";
        shell.write_all(line).await.unwrap();
        let said = rest(&shell).await;
        for text in ["17 91", "/dev/pts/", "is-42"] {
            assert!(said.contains(text), "{text}: {said}");
        }
    }
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The way to the program `atoll-relay` (crate of that name), which carries a migration through a network. It is the
//! only one of a machine's programs that knows TLS: no process of a guest has its code, its memory or its keys.
//!
//! `ctl migrate` and `receive` start it, and are its caller. Its standard input is the one connection between them:
//!
//! ```text
//! relay ─► caller    "+" PLACE "\n"     it is at work (`receive`: it listens at PLACE)
//!                    anything else      why it is not; then it ends
//!                    "." + descriptor   a connection for the machine, the first one for messages
//! caller ─► relay    "f" "t" "w"        a question of `ctl migrate` (`Question`)
//! relay ─► caller    TEXT "\n"          the answer
//! ```
//! The end of either process is the end of this connection, which the other one notices.
#![expect(unsafe_code, reason = "sigaction(2): children are left to the kernel")]

use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use atoll_vmm_protocol::files::{Receiving, Sending};

use crate::terminal::one_line;

/// What an address on the network begins with.
pub const SCHEME: &str = "tcp:";
/// The program, in the directory of this one.
const PROGRAM: &str = "atoll-relay";
/// See the head of the file.
const AT_WORK: u8 = b'+';
/// See the head of the file.
const CONNECTION: u8 = b'.';
/// The longest answer that is read.
const LINE_BYTES_MAX: usize = 4096;

/// Why the network cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RelayError {
    /// It cannot be started.
    #[error(
        "start {path}, the program that carries a machine through a network: it has to be where atoll-vmm is"
    )]
    Program {
        /// Where it was looked for.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The host lacks something.
    #[error("{what}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// It does not work, and says why.
    #[error("{0}")]
    Refused(String),
}

/// What a source asks at the end of its move.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Question {
    /// Carry the rest. The answer is the end of the process.
    Finish,
    /// Which trouble there was on the network; nothing when there was none.
    Trouble,
    /// Whether the target has the machine: [`TAKEN`], [`NOT_TAKEN`], or something else when nobody could tell.
    WasTaken,
}

impl Question {
    const ALL: [Self; 3] = [Self::Finish, Self::Trouble, Self::WasTaken];

    fn byte(self) -> u8 {
        match self {
            Self::Finish => b'f',
            Self::Trouble => b't',
            Self::WasTaken => b'w',
        }
    }
}

/// An answer to [`Question::WasTaken`].
pub const TAKEN: &str = "taken";
/// See [`TAKEN`].
pub const NOT_TAKEN: &str = "not taken";

/// The caller's end.
#[derive(Debug)]
pub struct Relay(UnixStream);

impl Relay {
    /// Starts the program. Returns once it is at work, and where.
    pub fn start(arguments: &[OsString]) -> Result<(Self, String), RelayError> {
        let host = |what| move |source| RelayError::Host { what, source };
        let own = std::env::current_exe().map_err(host("find this program's own file"))?;
        let path = own.with_file_name(PROGRAM);
        let (near, far) = UnixStream::pair().map_err(host("make a pair of sockets"))?;
        // A child that has ended is nobody's: this process may become a machine, which waits for none.
        forget_children().map_err(host("leave children to the kernel"))?;
        Command::new(&path)
            .args(arguments)
            .stdin(Stdio::from(OwnedFd::from(far)))
            .stdout(Stdio::null())
            // What a terminal interrupts is the caller, which says what becomes of this.
            .process_group(0)
            .spawn()
            .map_err(|source| RelayError::Program { path, source })?;
        Self::hear(near)
    }

    /// The first that the program says.
    fn hear(mut near: UnixStream) -> Result<(Self, String), RelayError> {
        let host = |source| RelayError::Host {
            what: "hear of atoll-relay",
            source,
        };
        let mut first = [0];
        let read = near.read(&mut first).map_err(host)?;
        if read == 1 && first == [AT_WORK] {
            let place = line(&mut near).map_err(host)?;
            return Ok((Self(near), place));
        }
        let mut text = first[..read].to_vec();
        let limit = u64::try_from(LINE_BYTES_MAX).expect("a number of bytes");
        let rest = near.take(limit).read_to_end(&mut text);
        rest.map_err(host)?;
        let text = String::from_utf8_lossy(&text).into_owned();
        Err(RelayError::Refused(match text.is_empty() {
            true => "atoll-relay has ended before it was at work".to_owned(),
            false => text,
        }))
    }

    /// The next connection for the machine.
    pub fn next(&self) -> io::Result<OwnedFd> {
        let mut receiving = Receiving::new(&self.0);
        receiving.read_exact(&mut [0])?;
        let file = receiving.into_files().pop();
        file.ok_or_else(|| io::Error::other("atoll-relay sent no connection"))
    }

    fn ask(&mut self, question: Question) -> io::Result<String> {
        self.0.write_all(&[question.byte()])?;
        line(&mut self.0)
    }

    /// Which trouble there was on the network, if any.
    pub fn trouble(&mut self) -> Option<String> {
        let text = match self.ask(Question::Trouble) {
            Ok(text) => text,
            Err(error) => format!("atoll-relay has ended: {error}"),
        };
        (!text.is_empty()).then_some(text)
    }

    /// Whether the target has the machine; `None` when nobody could tell for as long as a silence may last, twice.
    pub fn was_taken(&mut self) -> Option<bool> {
        match self.ask(Question::WasTaken).as_deref() {
            Ok(TAKEN) => Some(true),
            Ok(NOT_TAKEN) => Some(false),
            _ => None,
        }
    }

    /// Waits a moment until everything has been carried, after the machine has closed its ends.
    pub fn finish(mut self) {
        // Fails when it has ended already.
        let _ = self.ask(Question::Finish);
    }
}

impl AsFd for Relay {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The program's end.
#[derive(Debug)]
pub struct Caller(UnixStream);

impl Caller {
    /// Who has started this program, which is `atoll-relay`.
    pub fn of_this_program() -> io::Result<Self> {
        let fd = io::stdin().as_fd().try_clone_to_owned()?;
        Ok(Self(fd.into()))
    }

    /// Another handle of it.
    pub fn try_clone(&self) -> io::Result<Self> {
        self.0.try_clone().map(Self)
    }

    /// Tells that it is at work, and where.
    pub fn begin(&mut self, place: &str) -> io::Result<()> {
        let mut said = vec![AT_WORK];
        said.extend(place.as_bytes());
        said.push(b'\n');
        self.0.write_all(&said)
    }

    /// Tells why it is not. The process ends then.
    pub fn refuse(&mut self, reason: &str) -> io::Result<()> {
        self.0.write_all(reason.as_bytes())
    }

    /// Gives one connection.
    pub fn give(&self, connection: impl AsFd) -> io::Result<()> {
        Sending::new(&self.0, &[connection.as_fd()]).write_all(&[CONNECTION])
    }

    /// Waits for a question; `None` when the caller has ended, or makes no sense.
    pub fn question(&mut self) -> Option<Question> {
        let mut byte = [0];
        self.0.read_exact(&mut byte).ok()?;
        let mut all = Question::ALL.into_iter();
        all.find(|question| [question.byte()] == byte)
    }

    /// Answers it.
    pub fn answer(&mut self, text: &str) -> io::Result<()> {
        self.0.write_all(format!("{}\n", one_line(text)).as_bytes())
    }
}

/// Reads to the end of a line and no further: a connection may come behind it.
fn line(stream: &mut impl Read) -> io::Result<String> {
    let mut text = Vec::new();
    let mut byte = [0];
    loop {
        stream.read_exact(&mut byte)?;
        match byte {
            [b'\n'] => return Ok(String::from_utf8_lossy(&text).into_owned()),
            _ if text.len() == LINE_BYTES_MAX => return Err(io::ErrorKind::InvalidData.into()),
            [byte] => text.push(byte),
        }
    }
}

/// SIGCHLD is ignored from now on: whoever ends is not kept for a wait(2).
fn forget_children() -> io::Result<()> {
    use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
    let ignore = SigAction::new(SigHandler::SigIgn, SaFlags::empty(), SigSet::empty());
    // SAFETY: no handler is installed, and none was.
    let set = unsafe { sigaction(Signal::SIGCHLD, &ignore) };
    set.map(drop).map_err(io::Error::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (UnixStream, Caller) {
        let (near, far) = UnixStream::pair().unwrap();
        (near, Caller(far))
    }

    #[test]
    fn a_place_connections_and_answers_come_as_they_were_said() {
        let (near, mut caller) = pair();
        caller.begin("tcp:[::1]:7").unwrap();
        let ends = [(); 2].map(|()| UnixStream::pair().unwrap());
        for (inner, _) in &ends {
            caller.give(inner).unwrap();
        }
        let (mut relay, place) = Relay::hear(near).unwrap();
        assert_eq!(place, "tcp:[::1]:7");
        for (index, (_, outer)) in ends.iter().enumerate() {
            let byte = [u8::try_from(index).unwrap()];
            UnixStream::from(relay.next().unwrap())
                .write_all(&byte)
                .unwrap();
            let mut read = [9];
            (&*outer).read_exact(&mut read).unwrap();
            assert_eq!(read, byte);
        }
        let answers = [
            (Question::Trouble, "two\nlines"),
            (Question::WasTaken, TAKEN),
        ];
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for (question, text) in answers {
                    assert_eq!(caller.question(), Some(question));
                    caller.answer(text).unwrap();
                }
                assert_eq!(caller.question(), Some(Question::Finish));
                drop(caller);
            });
            assert_eq!(relay.trouble().as_deref(), Some("two\\nlines"));
            assert_eq!(relay.was_taken(), Some(true));
            relay.finish();
        });
    }

    #[test]
    fn a_relay_that_ends_has_not_begun_and_knows_nothing() {
        let (near, caller) = pair();
        drop(caller);
        let error = Relay::hear(near).unwrap_err().to_string();
        assert_eq!(error, "atoll-relay has ended before it was at work");
        let (near, mut caller) = pair();
        caller.refuse("TLS key nowhere: no").unwrap();
        drop(caller);
        let error = Relay::hear(near).unwrap_err().to_string();
        assert_eq!(error, "TLS key nowhere: no");
        let (near, mut caller) = pair();
        caller.begin("").unwrap();
        let (mut relay, _) = Relay::hear(near).unwrap();
        drop(caller);
        relay.next().unwrap_err();
        assert_eq!(relay.was_taken(), None);
        assert!(relay.trouble().unwrap().contains("has ended"));
    }
}

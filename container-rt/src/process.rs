// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Processes of the host, named so that a reused id is never mistaken for them: id plus start time on disk, a
//! pidfd while we hold them. Also signal names and exit statuses.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};

use crate::error::{Context, Error, Result};
use crate::sys::{self, Pid};

/// A process as saved: the id alone may be somebody else's by now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// The id in the host's process namespace.
    pub pid: Pid,
    /// Clock ticks after boot at which it started. proc(5), stat field 22.
    pub start_ticks: u64,
}

impl ProcessId {
    /// Names the process that has this id now.
    pub fn of(pid: Pid) -> Result<Self> {
        let (_, start_ticks) = stat(pid).context(|| format!("read /proc/{pid}/stat"))?;
        Ok(Self { pid, start_ticks })
    }

    /// Whether it runs: neither gone, nor a zombie, nor replaced by another process of the same id.
    pub fn is_alive(self) -> bool {
        matches!(stat(self.pid), Ok((state, start)) if start == self.start_ticks && !matches!(state, b'Z' | b'X'))
    }

    /// A descriptor for exactly this process, or nothing when it is gone.
    pub fn open(self) -> Option<ProcessFd> {
        let fd = sys::pidfd_open(self.pid).ok()?;
        // The id may have been reused between saving and opening; after opening it cannot any more.
        self.is_alive().then_some(ProcessFd { fd })
    }
}

/// State letter and start time of a process. The command name may hold anything, so fields count from its end.
fn stat(pid: Pid) -> io::Result<(u8, u64)> {
    let text = fs::read(format!("/proc/{pid}/stat"))?;
    let unreadable = || io::Error::from(io::ErrorKind::InvalidData);
    let end = text
        .iter()
        .rposition(|b| *b == b')')
        .ok_or_else(unreadable)?;
    let rest = String::from_utf8_lossy(&text[end + 1..]).into_owned();
    let mut fields = rest.split_ascii_whitespace();
    let state = fields.next().and_then(|f| f.bytes().next());
    let start = fields.nth(18).and_then(|f| f.parse().ok());
    state.zip(start).ok_or_else(unreadable)
}

/// A process held open.
#[derive(Debug)]
pub struct ProcessFd {
    fd: OwnedFd,
}

impl ProcessFd {
    /// Opens a process that cannot be gone: our own unreaped child.
    pub fn of_child(pid: Pid) -> Result<Self> {
        let fd = sys::pidfd_open(pid).context(|| format!("open process {pid}"))?;
        Ok(Self { fd })
    }

    /// Sends a signal.
    pub fn signal(&self, signal: i32) -> io::Result<()> {
        sys::pidfd_send_signal(self.fd.as_fd(), signal)
    }

    /// Waits until the process has ended; false when it has not within `limit`.
    pub fn wait_end(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            match poll(
                &mut [PollFd::new(self.fd.as_fd(), PollFlags::POLLIN)],
                timeout,
            ) {
                Ok(0) if left.is_zero() => return false,
                Ok(0) | Err(Errno::EINTR) => {}
                Ok(_) => return true,
                Err(_) => return false,
            }
        }
    }
}

impl AsFd for ProcessFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExitStatus {
    /// The shell's convention: the code, or 128 plus the signal.
    pub code: i32,
    /// The signal that killed it.
    pub signal: Option<i32>,
}

/// Reaps a child and says how it ended. Blocks until then.
pub fn wait_child(child: &ProcessFd) -> Result<ExitStatus> {
    let ended = sys::wait(child.as_fd()).context(|| "wait for a child".to_owned())?;
    Ok(match ended {
        Ok(code) => ExitStatus { code, signal: None },
        Err(signal) => ExitStatus {
            code: 128 + signal,
            signal: Some(signal),
        },
    })
}

/// Names of the signals by number, 1 to 31, on every architecture that we build for.
const SIGNALS: [&str; 31] = [
    "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2",
    "PIPE", "ALRM", "TERM", "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG",
    "XCPU", "XFSZ", "VTALRM", "PROF", "WINCH", "IO", "PWR", "SYS",
];

/// First and last real-time signal as the C library counts them (it keeps two of the kernel's for itself).
const RT_RANGE: (i32, i32) = (34, 64);

/// Reads a signal: a number, a name with or without `SIG`, or `RTMIN+n` / `RTMAX-n`.
pub fn parse_signal(text: &str) -> Result<i32> {
    let unknown = || {
        Error::Argument(format!(
            "unknown signal {text:?}: use a number, or a name as in KILL or RTMIN+3"
        ))
    };
    if let Ok(number) = text.parse::<i32>() {
        return (0..=RT_RANGE.1)
            .contains(&number)
            .then_some(number)
            .ok_or_else(unknown);
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    let relative = |rest: &str, sign: &str| match rest {
        "" => Some(0),
        _ => rest.strip_prefix(sign)?.parse::<i32>().ok(),
    };
    let number = if let Some(rest) = name.strip_prefix("RTMIN") {
        relative(rest, "+").map(|n| RT_RANGE.0 + n)
    } else if let Some(rest) = name.strip_prefix("RTMAX") {
        relative(rest, "-").map(|n| RT_RANGE.1 - n)
    } else {
        let standard = SIGNALS.iter().zip(1..).find(|(n, _)| **n == name);
        return standard.map(|(_, number)| number).ok_or_else(unknown);
    };
    number
        .filter(|n| (RT_RANGE.0..=RT_RANGE.1).contains(n))
        .ok_or_else(unknown)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_by_every_spelling() {
        for (text, number) in [
            ("9", 9),
            ("KILL", 9),
            ("sigkill", 9),
            ("SIGTERM", 15),
            ("0", 0),
            ("RTMIN", 34),
            ("SIGRTMIN+3", 37),
            ("RTMAX-2", 62),
            ("PWR", 30),
        ] {
            assert_eq!(parse_signal(text).unwrap(), number, "{text}");
        }
        for text in ["", "SIG", "65", "-1", "RTMIN+31", "RTMIN-1", "KILLED"] {
            assert!(parse_signal(text).is_err(), "{text}");
        }
    }

    #[test]
    fn own_process_is_alive_and_its_id_with_another_start_is_not() {
        let own = ProcessId::of(std::process::id().cast_signed()).unwrap();
        assert!(own.is_alive());
        assert!(own.open().is_some());
        let reused = ProcessId {
            start_ticks: own.start_ticks + 1,
            ..own
        };
        assert!(!reused.is_alive());
        assert!(reused.open().is_none());
    }
}

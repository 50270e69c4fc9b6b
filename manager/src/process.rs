// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A process of the host that this one may not have started: found by number, then held by a pidfd, so that
//! signals and waiting can never hit a later process of the same number.
//!
//! Callers: adoption of guests after a restart, the DHCP server.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, Signal};
/// How often a waiter asks the pidfd: tokio offers no safe way to register a foreign descriptor, and nobody
/// waits for long.
const POLL_EVERY: Duration = Duration::from_millis(25);

/// Unit of times in `/proc/PID/stat`: USER_HZ, which is 100 on every architecture that Linux runs KVM on.
const TICKS_PER_SECOND: u64 = 100;

/// A running process.
#[derive(Debug)]
pub struct Process {
    pid: u32,
    fd: OwnedFd,
}

impl Process {
    /// Takes hold of a process by its number; none when there is no such process, or only its remains.
    pub fn open(pid: u32) -> Option<Self> {
        let raw = i32::try_from(pid).ok().and_then(Pid::from_raw)?;
        let fd = rustix::process::pidfd_open(raw, PidfdFlags::empty()).ok()?;
        let process = Self { pid, fd };
        (!process.has_ended()).then_some(process)
    }

    /// Its number.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Its argument vector. After an `exec` it is the new program's.
    pub fn arguments(&self) -> Option<Vec<String>> {
        let bytes = std::fs::read(format!("/proc/{}/cmdline", self.pid)).ok()?;
        let text = String::from_utf8_lossy(&bytes).into_owned();
        let text = text.strip_suffix('\0').unwrap_or(&text);
        (!text.is_empty() && !self.has_ended())
            .then(|| text.split('\0').map(str::to_owned).collect())
    }

    /// Sends a signal; a process that has ended meanwhile does not mind.
    pub fn signal(&self, signal: Signal) {
        let _ = rustix::process::pidfd_send_signal(&self.fd, signal);
    }

    /// Whether it is over (dead, perhaps not yet collected by its parent).
    pub fn has_ended(&self) -> bool {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let mut fds = [PollFd::new(&self.fd, PollFlags::IN)];
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        matches!(poll(&mut fds, Some(&now)), Ok(count) if count > 0)
    }

    /// Waits for its end, at most until `deadline`; says whether it ended.
    pub async fn ended_before(&self, deadline: Instant) -> bool {
        let _ = tokio::time::timeout_at(deadline.into(), self.ended()).await;
        self.has_ended()
    }

    /// Waits for its end.
    pub async fn ended(&self) {
        while !self.has_ended() {
            tokio::time::sleep(POLL_EVERY).await;
        }
    }
}

/// CPU time that a process and its threads have used, in nanoseconds; 0 when it is gone.
pub fn cpu_ns(pid: u32) -> u64 {
    let ticks = stat_field(pid, 14) + stat_field(pid, 15);
    ticks * (1_000_000_000 / TICKS_PER_SECOND)
}

/// Memory of a process that is in RAM, in bytes; 0 when it is gone.
pub fn resident_bytes(pid: u32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or(0) << 10
}

/// How long a process has existed, in seconds; 0 when it is gone.
pub fn age_seconds(pid: u32) -> u64 {
    let started = stat_field(pid, 22) / TICKS_PER_SECOND;
    if started == 0 {
        0
    } else {
        uptime_seconds().saturating_sub(started)
    }
}

/// Time since the host's start, in seconds.
pub fn uptime_seconds() -> u64 {
    let text = std::fs::read_to_string("/proc/uptime").unwrap_or_default();
    let whole = text.split('.').next().unwrap_or_default();
    whole.parse().unwrap_or(0)
}

/// One numeric field of `/proc/PID/stat`, counted from 1 as in proc(5); only those after the name.
fn stat_field(pid: u32, field: usize) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The name, field 2, is in parentheses and may contain anything.
    let rest = text.rsplit_once(')').map_or("", |(_, rest)| rest);
    let value = rest.split_whitespace().nth(field.saturating_sub(3));
    value.and_then(|text| text.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exec::Program;

    #[tokio::test]
    async fn a_process_is_found_signalled_and_awaited() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        let child = Program::new("sleep")
            .arg("60")
            .spawn_detached(&log)
            .unwrap();
        let process = Process::open(child.id().unwrap()).unwrap();
        assert!(!process.has_ended());
        let soon = Instant::now() + Duration::from_millis(20);
        assert!(!process.ended_before(soon).await);
        process.signal(Signal::KILL);
        assert!(
            process
                .ended_before(Instant::now() + Duration::from_secs(20))
                .await
        );
        assert_eq!(process.arguments(), None);
    }

    #[test]
    fn our_own_numbers() {
        let pid = std::process::id();
        assert!(resident_bytes(pid) > 1 << 16);
        assert!(age_seconds(pid) < 3600);
        assert!(cpu_ns(pid) < 3600 * 1_000_000_000);
        assert_eq!((cpu_ns(u32::MAX), age_seconds(u32::MAX)), (0, 0));
    }

    #[test]
    fn nobody_is_nobody() {
        assert!(Process::open(0).is_none());
        assert!(Process::open(u32::MAX).is_none());
    }
}

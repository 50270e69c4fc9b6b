// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! One moment to wait for, set by vCPUs and waited for by a device's thread: timerfd_create(2).

use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

pub(super) struct Timer(OwnedFd);

impl Timer {
    pub(super) fn new() -> io::Result<Self> {
        let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC)?;
        Ok(Self(timer))
    }

    /// Fires at that moment, or at once if it has passed; `None` stops it. Does not block.
    pub(super) fn set(&self, at: Option<Instant>) {
        let left = at.map(|at| {
            let left = at.saturating_duration_since(Instant::now());
            left.max(Duration::from_nanos(1)) // Zero would stop it.
        });
        let zero = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let value = Timespec::try_from(left.unwrap_or_default()).unwrap_or(zero);
        let setting = Itimerspec {
            it_interval: zero,
            it_value: value,
        };
        if let Err(error) = timerfd_settime(&self.0, TimerfdTimerFlags::empty(), &setting) {
            tracing::error!(%error, "set a device's timer");
        }
    }

    /// Waits until it fires.
    pub(super) fn wait(&self) -> io::Result<()> {
        rustix::io::read(&self.0, &mut [0; 8])?;
        Ok(())
    }
}

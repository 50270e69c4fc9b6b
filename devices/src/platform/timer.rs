// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A device's own time: one moment to wait for, set by vCPUs ([`Timer`], timerfd_create(2)), and the thread that waits
//! for it and then does what the device says ([`TimerThread`]).

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use atoll_thread::Kind;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

pub(super) struct Timer {
    fd: OwnedFd,
    /// Its thread is to end, and whatever the device sets meanwhile is now. Leaf lock, held over timerfd_settime(2).
    closing: Mutex<bool>,
}

/// Dropping it ends the thread, and waits for that.
pub(super) struct TimerThread {
    timer: Arc<Timer>,
    thread: Option<JoinHandle<()>>,
}

impl Timer {
    pub(super) fn new() -> io::Result<Arc<Self>> {
        let fd = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC)?;
        Ok(Arc::new(Self {
            fd,
            closing: Mutex::default(),
        }))
    }

    /// Fires at that moment, or at once if it has passed; `None` stops it. Does not block.
    pub(super) fn set(&self, at: Option<Instant>) {
        let closing = self.closing();
        let at = if *closing { Some(Instant::now()) } else { at };
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
        if let Err(error) = timerfd_settime(&self.fd, TimerfdTimerFlags::empty(), &setting) {
            tracing::error!(%error, "set a device's timer");
        }
    }

    fn closing(&self) -> MutexGuard<'_, bool> {
        self.closing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until it fires. `false`: the thread is to end.
    fn wait(&self) -> bool {
        let fired = rustix::io::read(&self.fd, &mut [0; 8]).is_ok();
        fired && !*self.closing()
    }
}

impl TimerThread {
    /// Calls `expire` on a thread `name` each time that the timer has fired.
    pub(super) fn spawn(
        name: &str,
        timer: &Arc<Timer>,
        expire: impl Fn() + Send + 'static,
    ) -> io::Result<Self> {
        let waited = timer.clone();
        let thread = atoll_thread::spawn(Kind::Queue, name, move || {
            while waited.wait() {
                expire();
            }
        })?;
        Ok(Self {
            timer: timer.clone(),
            thread: Some(thread),
        })
    }
}

impl Drop for TimerThread {
    fn drop(&mut self) {
        *self.timer.closing() = true;
        // At once, since it is closing.
        self.timer.set(None);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What its last call sets must not take back that the thread is to end.
    #[test]
    fn a_thread_that_is_at_work_ends_too() {
        for round in 0..500 {
            let timer = Timer::new().unwrap();
            let setting = timer.clone();
            let expire = move || {
                setting.set(Some(Instant::now()));
                setting.set(None);
            };
            let thread = TimerThread::spawn("timer-test", &timer, expire).unwrap();
            timer.set(Some(Instant::now()));
            (0..round % 50).for_each(|_| std::thread::yield_now());
            drop(thread);
        }
    }
}

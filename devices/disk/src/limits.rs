// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A decorator that holds requests back so that a disk keeps to a rate, with bursts; changeable at any time.
//!
//! All queues of the disk share the buckets. A request waits in its queue, in order, until every bucket that it
//! draws from has something; a timerfd wakes the queue's thread for it.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

use crate::backend::{BlockBackend, BlockQueue, Completion, Full, Operation, Request};
use crate::bucket::{LOOK_AGAIN, TokenBucket};
use crate::layer::{Layer, QueueLayer};
use crate::zeroing::LENGTH_BYTES_MAX;

/// One rate, of bytes or of requests; without `per_second` there is no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Rate {
    /// Units in a second, on average; `None` is without limit.
    pub per_second: Option<u64>,
    /// Units that may come at once after idleness; a tenth of a second's when absent.
    pub burst: Option<u64>,
}

/// Bytes and requests of one direction, each held by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Limit {
    /// Bytes of data.
    pub bytes: Rate,
    /// Requests, whatever their size.
    pub operations: Rate,
}

/// Limits of a disk. A read draws from `total` and `read`; everything that writes from `total` and `write`; a
/// flush from neither.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Limits {
    /// Both directions together, beside what each has.
    pub total: Limit,
    /// Reads alone.
    pub read: Limit,
    /// Writes, discards and writes of zeroes.
    pub write: Limit,
}

#[derive(Default)]
struct Buckets {
    /// In the order total, read, write; bytes, then operations.
    all: [[Option<TokenBucket>; 2]; 3],
    /// Bytes of writes, for who copies the disk meanwhile.
    ceiling: Option<TokenBucket>,
}

impl Buckets {
    fn new(limits: Limits, now: Instant) -> Self {
        let bucket = |rate: Rate| {
            let per_second = rate.per_second?;
            Some(TokenBucket::new(per_second, rate.burst.unwrap_or(0), now))
        };
        let pair = |limit: Limit| [bucket(limit.bytes), bucket(limit.operations)];
        Self {
            all: [pair(limits.total), pair(limits.read), pair(limits.write)],
            ceiling: None,
        }
    }

    fn are_empty(&self) -> bool {
        self.all.iter().flatten().all(Option::is_none) && self.ceiling.is_none()
    }

    /// Takes what the request needs; or says how long to wait.
    fn admit(&mut self, request: &Request, now: Instant) -> Result<(), Duration> {
        let direction = match request.operation {
            Operation::Flush => return Ok(()),
            Operation::Read => 1,
            Operation::Write | Operation::Discard { .. } | Operation::WriteZeroes { .. } => 2,
        };
        let bytes = match request.operation {
            // Some file systems have nothing else than to write them. More than this is refused below.
            Operation::WriteZeroes { length_bytes, .. } => length_bytes.min(LENGTH_BYTES_MAX),
            _ => request.segments.total_bytes(),
        };
        let mut wait = Duration::ZERO;
        for at in [0, direction] {
            for bucket in self.all[at].iter_mut().flatten() {
                wait = wait.max(bucket.wait(now));
            }
        }
        let mut ceiling = self.ceiling.as_mut().filter(|_| direction == 2);
        if let Some(ceiling) = &mut ceiling {
            wait = wait.max(ceiling.wait(now));
        }
        if !wait.is_zero() {
            return Err(wait);
        }
        if let Some(ceiling) = ceiling {
            ceiling.take(bytes);
        }
        for at in [0, direction] {
            for (bucket, amount) in self.all[at].iter_mut().zip([bytes, 1]) {
                if let Some(bucket) = bucket {
                    bucket.take(amount);
                }
            }
        }
        Ok(())
    }
}

#[derive(Default)]
struct Shared {
    /// Whether any limit is set: a disk without pays for this look alone.
    active: AtomicBool,
    // Leaf lock, held for one request's arithmetic.
    buckets: Mutex<Buckets>,
}

/// A disk that is no faster than its [`Limits`]: requests above them wait in their queue, none is refused. See the module.
pub struct Limited {
    inner: Arc<dyn BlockBackend>,
    shared: Arc<Shared>,
}

impl Limited {
    /// Decorates a disk with limits, which [`Limited::set`] changes while it runs.
    pub fn new(inner: Arc<dyn BlockBackend>, limits: Limits) -> Self {
        let shared = Arc::default();
        let limited = Self { inner, shared };
        limited.set(limits);
        limited
    }

    /// Other limits from now on, with full bursts. What is being held back follows them within half a second.
    pub fn set(&self, limits: Limits) {
        let buckets = Buckets::new(limits, Instant::now());
        self.change(|now| {
            now.all = buckets.all;
        });
    }

    /// Holds writes to a rate beside the limits, which stay what they are: for who copies a disk that is written faster
    /// than it can be copied. `None` ends it.
    pub fn slow_writes(&self, bytes_per_second: Option<u64>) {
        let now = Instant::now();
        let ceiling = bytes_per_second.map(|rate| TokenBucket::new(rate, 0, now));
        self.change(|now| now.ceiling = ceiling);
    }

    fn change(&self, change: impl FnOnce(&mut Buckets)) {
        let mut buckets = self.shared.lock();
        change(&mut buckets);
        let active = !buckets.are_empty();
        // Within the lock: the last change is the one that counts.
        self.shared.active.store(active, Ordering::Release);
    }
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, Buckets> {
        self.buckets.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Layer for Limited {
    fn below(&self) -> &dyn BlockBackend {
        &*self.inner
    }

    fn over(&self, inner: Box<dyn BlockQueue>, depth: u16) -> io::Result<Box<dyn BlockQueue>> {
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        Ok(Box::new(LimitedQueue {
            inner,
            depth: depth.max(1).into(),
            held: VecDeque::new(),
            hurrying: false,
            timer: timerfd_create(TimerfdClockId::Monotonic, flags)?,
            shared: self.shared.clone(),
        }))
    }
}

struct LimitedQueue {
    inner: Box<dyn BlockQueue>,
    depth: usize,
    held: VecDeque<Request>,
    hurrying: bool,
    timer: OwnedFd,
    shared: Arc<Shared>,
}

impl LimitedQueue {
    /// Passes on what may go; arms the timer for the rest.
    fn release(&mut self) -> io::Result<()> {
        while let Some(request) = self.held.front() {
            if !self.hurrying && self.shared.active.load(Ordering::Acquire) {
                let admitted = self.shared.lock().admit(request, Instant::now());
                if let Err(wait) = admitted {
                    return self.arm(wait.min(LOOK_AGAIN));
                }
            }
            let request = self.held.pop_front().expect("looked at above");
            if let Err(Full(request)) = self.inner.submit(request) {
                // Not reached: the queue below is as deep as this one. It waits for the next completion.
                self.held.push_front(request);
                return Ok(());
            }
        }
        Ok(())
    }

    fn arm(&self, wait: Duration) -> io::Result<()> {
        let value = Timespec {
            tv_sec: i64::try_from(wait.as_secs()).unwrap_or(i64::MAX),
            // Zero would disarm it.
            tv_nsec: i64::from(wait.subsec_nanos().max(1)),
        };
        let once = Itimerspec {
            it_interval: Timespec {
                tv_sec: 0,
                tv_nsec: 0,
            },
            it_value: value,
        };
        timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once)?;
        Ok(())
    }
}

impl QueueLayer for LimitedQueue {
    fn below(&self) -> &dyn BlockQueue {
        &*self.inner
    }

    fn below_mut(&mut self) -> &mut dyn BlockQueue {
        &mut *self.inner
    }

    fn timer_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.timer.as_fd())
    }

    fn hurry(&mut self) {
        self.hurrying = true;
        self.inner.hurry();
    }

    fn submit(&mut self, request: Request) -> Result<(), Full> {
        if QueueLayer::in_flight(self) >= self.depth {
            return Err(Full(request));
        }
        if self.held.is_empty() && !self.shared.active.load(Ordering::Acquire) {
            return self.inner.submit(request);
        }
        self.held.push_back(request);
        Ok(())
    }

    fn kick(&mut self) -> io::Result<()> {
        self.release()?;
        self.inner.kick()
    }

    fn complete(&mut self, done: &mut Vec<Completion>) -> io::Result<()> {
        if !self.held.is_empty() {
            match rustix::io::read(&self.timer, &mut [0; 8]) {
                Ok(_) | Err(rustix::io::Errno::AGAIN) => {}
                Err(error) => return Err(error.into()),
            }
            self.release()?;
            self.inner.kick()?;
        }
        self.inner.complete(done)
    }

    fn in_flight(&self) -> usize {
        self.held.len() + self.inner.in_flight()
    }
}

impl Drop for LimitedQueue {
    fn drop(&mut self) {
        // What was kicked is on the disk when the queue is gone; an error has nobody left to be told.
        self.hurrying = true;
        let _ = self.release();
        let _ = self.inner.kick();
    }
}

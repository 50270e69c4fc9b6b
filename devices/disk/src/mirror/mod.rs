// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A copy of a running disk that follows it until it can take the disk's place.
//!
//! ```text
//! begin          queues held: everything is marked; the guest goes on
//! thread mirror  take the marks ─► copy those blocks ─► again: each pass has what was written during the last
//! settle         queues held: the last marks are copied, the target is flushed: both hold the same, durably
//! ```
//!
//! The guest's requests never reach the target, and never wait for it. What they change is marked by [`Tracked`], whose
//! marks promise that a block which was copied too early is marked again. A guest that writes faster than the target
//! takes it is slowed down, more with each pass that leaves no less than the one before, until the rest is small.
//!
//! The source is complete at every moment, whatever happens to the mirror: **a failure ends the mirror, and nothing
//! else**. What the target holds before `settle` has said so is of no use to anybody.
//!
//! Choice: passes over marks, not writes to both. Writing to both makes the guest wait for the slower disk from the
//! first moment on, and has to keep guest memory from changing between the two writes. To be looked at again if
//! slowing a guest down turns out to hurt more.
//!
//! Bounds: four chunks of 1 MiB in memory, one bit for 64 KiB of the disk.

mod copier;

#[cfg(test)]
mod tests;

use std::io;
use std::ops::ControlFlow;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use atoll_thread::Kind;

use self::copier::Copier;
use crate::backend::BlockBackend;
use crate::bucket::TokenBucket;
use crate::chain::chain;
use crate::changes::{BlockSet, ChangeMap, Tracked};
use crate::layer::Layer;

/// Unit of the marks, bytes: what one small write makes the mirror copy again.
const BLOCK_BYTES: u32 = 64 << 10;
/// Bytes of a request. Our choice: a multiple of every block and of the usual clusters.
const CHUNK_BYTES: u64 = 1 << 20;
/// A pass of so much is small: the disk's queues need not be held for longer than such a pass takes.
const READY_BYTES: u64 = 16 << 20;
/// Written at most before it is made durable, bytes: the host of the target has a share of its memory to cache writes, and
/// a flush that waits for all of that takes minutes, which nobody waits for.
const UNFLUSHED_BYTES_MAX: u64 = 256 << 20;
/// Pause after a small pass: a block that the guest writes all the time is not copied all the time.
const IDLE: Duration = Duration::from_millis(100);
/// The guest is not slowed down below this, bytes a second.
const SLOWEST: u64 = 1 << 20;
/// How long a rate is measured.
const METERED: Duration = Duration::from_secs(1);

/// Why a mirror ended.
#[derive(Debug, thiserror::Error)]
pub enum MirrorError {
    /// What it should copy cannot be read.
    #[error("read the disk")]
    Source(#[source] io::Error),
    /// The target cannot be written.
    #[error("write to the target")]
    Target(#[source] io::Error),
    /// Somebody wanted it so.
    #[error("it was stopped")]
    Stopped,
}

/// Why the target is not the same as the disk yet.
#[derive(Debug, thiserror::Error)]
pub enum SettleError {
    /// The mirror has ended before.
    #[error("the mirror has failed: {0}")]
    Failed(String),
    /// Too much is left, or the target too slow: it goes on.
    #[error("the rest was not copied in {} ms", .0.as_millis())]
    Late(Duration),
}

/// How a mirror goes about it.
pub struct MirrorOptions {
    /// Most that it copies in a second, until it settles; without limit when absent.
    pub bytes_per_second: Option<u64>,
    /// Called from the mirror's thread with the most that the guest may write in a second, and with `None` at the end.
    pub slow_down: Box<dyn Fn(Option<u64>) + Send>,
}

/// How far a mirror is.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct MirrorProgress {
    /// Size of the disk.
    pub size_bytes: u64,
    /// Copied so far, all passes together.
    pub copied_bytes: u64,
    /// What is left to copy now.
    pub left_bytes: u64,
    /// Copied in a second, as measured last.
    pub bytes_per_second: u64,
    /// Passes that are complete.
    pub passes: u32,
    /// What is left is small.
    pub ready: bool,
    /// Most that the guest may write in a second, while it is slowed down.
    pub slowed_to: Option<u64>,
    /// Why it has ended.
    pub failed: Option<String>,
}

/// A mirror. Dropping it ends the copying, and waits for the request that is under way.
pub struct Mirror {
    disk: Arc<Tracked>,
    map: Arc<ChangeMap>,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    // What follows. A leaf lock, held to look and to note.
    state: Mutex<State>,
    /// Told of every change that somebody waits for.
    changed: Condvar,
}

#[derive(Default)]
struct State {
    progress: MirrorProgress,
    /// Of the pass under way.
    pass_left: u64,
    stopped: bool,
    /// Somebody waits for the end: no limit, no pause.
    hurry: bool,
    /// Number of the last question whether both are the same, and of the last that was answered so.
    asked: u64,
    settled: u64,
}

impl Mirror {
    /// Begins to copy `disk` to `target`, which has passed [`crate::Switchable::check`]. The caller holds the disk's
    /// queues, and may open a queue.
    pub fn begin(
        disk: Arc<Tracked>,
        target: &dyn BlockBackend,
        options: MirrorOptions,
    ) -> io::Result<Self> {
        let copier = Copier::open(disk.below(), target, CHUNK_BYTES)?;
        let size_bytes = disk.geometry().size_bytes;
        let map = disk.watch(BLOCK_BYTES);
        map.put_back(&BlockSet::all(size_bytes, BLOCK_BYTES));
        let shared = Arc::new(Shared::default());
        shared.lock().progress.size_bytes = size_bytes;
        let mut follower = Follower {
            copier,
            map: map.clone(),
            unflushed_bytes: Some(0),
            unflushed_bytes_max: UNFLUSHED_BYTES_MAX,
        };
        let telling = shared.clone();
        let body = move || {
            if let Err(error) = follow(&mut follower, &telling, &options) {
                telling.lock().progress.failed = Some(chain(&error));
            }
            (options.slow_down)(None);
            telling.changed.notify_all();
        };
        let thread = atoll_thread::spawn(Kind::Mirror, "mirror", body);
        let mut mirror = Self {
            disk,
            map,
            shared,
            thread: None,
        };
        // Also when there is no thread, its drop unwatches.
        mirror.thread = Some(thread?);
        Ok(mirror)
    }

    /// How far it is.
    pub fn progress(&self) -> MirrorProgress {
        let state = self.shared.lock();
        let mut progress = state.progress.clone();
        progress.left_bytes = state.pass_left + self.map.look().total_bytes();
        progress
    }

    /// Waits until the target holds what the disk holds, and durably. The caller holds the disk's queues, and they stay
    /// so for as long as that matters.
    pub fn settle(&self, patience: Duration) -> Result<(), SettleError> {
        let deadline = Instant::now() + patience;
        let mut state = self.shared.lock();
        state.asked += 1;
        state.hurry = true;
        let asked = state.asked;
        self.shared.changed.notify_all();
        loop {
            if let Some(reason) = &state.progress.failed {
                return Err(SettleError::Failed(reason.clone()));
            }
            if state.settled >= asked {
                state.hurry = false;
                return Ok(());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                state.hurry = false;
                return Err(SettleError::Late(patience));
            }
            state = self.shared.wait(state, left);
        }
    }
}

impl Drop for Mirror {
    fn drop(&mut self) {
        self.shared.lock().stopped = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        self.disk.unwatch(&self.map);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>, most: Duration) -> MutexGuard<'a, State> {
        let waited = self.changed.wait_timeout(state, most);
        waited.unwrap_or_else(PoisonError::into_inner).0
    }
}

/// What copies, and what it has to copy.
struct Follower {
    copier: Copier,
    map: Arc<ChangeMap>,
    /// Written to the target since it was flushed last; none when that was the last.
    unflushed_bytes: Option<u64>,
    /// See [`UNFLUSHED_BYTES_MAX`].
    unflushed_bytes_max: u64,
}

impl Follower {
    /// Copies what was marked, and makes the copy durable, if nothing was, or if that will take long. After an error the
    /// marks are gone.
    fn pass(
        &mut self,
        set: &BlockSet,
        mut admit: impl FnMut(u64) -> ControlFlow<()>,
    ) -> Result<(), MirrorError> {
        let mut chunks = self.copier.chunks(set).peekable();
        // Whoever settles after a small pass waits for the flush of little more than that.
        let most = match set.total_bytes() {
            0 => 0,
            bytes if bytes <= READY_BYTES => READY_BYTES.min(self.unflushed_bytes_max),
            _ => self.unflushed_bytes_max,
        };
        loop {
            let mut written = self.unflushed_bytes.unwrap_or(0);
            let portion = std::iter::from_fn(|| {
                let chunk = chunks.next_if(|_| written < most)?;
                written += chunk.end - chunk.start;
                Some(chunk)
            });
            self.copier.copy(portion, &mut admit)?;
            if written > 0 {
                self.unflushed_bytes = Some(written);
            }
            if written >= most && self.unflushed_bytes.take().is_some() {
                self.copier.flush()?;
            }
            if chunks.peek().is_none() {
                return Ok(());
            }
        }
    }
}

/// The thread: pass after pass, until it is stopped.
fn follow(
    follower: &mut Follower,
    shared: &Shared,
    options: &MirrorOptions,
) -> Result<(), MirrorError> {
    let mut pace = Pace::new(options.bytes_per_second);
    let mut before = u64::MAX;
    loop {
        let asked = match shared.lock() {
            state if state.stopped => return Err(MirrorError::Stopped),
            state => state.asked,
        };
        let set = follower.map.take();
        let bytes = set.total_bytes();
        shared.lock().pass_left = bytes;
        follower.pass(&set, |chunk| pace.admit(chunk, shared))?;
        let mut state = shared.lock();
        state.pass_left = 0;
        if bytes == 0 {
            // Marked before the question or not at all: the queues are held.
            state.settled = state.settled.max(asked);
            shared.changed.notify_all();
        } else {
            state.progress.passes += 1;
        }
        state.progress.ready = bytes <= READY_BYTES;
        if state.progress.ready {
            if !state.stopped && !state.hurry {
                drop(shared.wait(state, IDLE));
            }
        } else if state.progress.passes > 1 && bytes > before / 2 {
            let slower = state.progress.slowed_to.map_or_else(
                || state.progress.bytes_per_second / 2,
                |slowed_to| slowed_to / 2,
            );
            let slower = slower.max(SLOWEST);
            state.progress.slowed_to = Some(slower);
            drop(state);
            (options.slow_down)(Some(slower));
        }
        before = bytes;
    }
}

/// Holds the copying to its rate, and measures it.
struct Pace {
    bucket: Option<TokenBucket>,
    since: Instant,
    bytes: u64,
}

impl Pace {
    fn new(bytes_per_second: Option<u64>) -> Self {
        let now = Instant::now();
        Self {
            bucket: bytes_per_second.map(|rate| TokenBucket::new(rate, 0, now)),
            since: now,
            bytes: 0,
        }
    }

    /// Waits until a chunk may be copied.
    fn admit(&mut self, chunk_bytes: u64, shared: &Shared) -> ControlFlow<()> {
        let mut state = shared.lock();
        while !state.stopped
            && !state.hurry
            && let Some(bucket) = &mut self.bucket
        {
            let wait = bucket.wait(Instant::now());
            if wait.is_zero() {
                break;
            }
            state = shared.wait(state, wait);
        }
        if state.stopped {
            return ControlFlow::Break(());
        }
        if let Some(bucket) = &mut self.bucket {
            bucket.take(chunk_bytes);
        }
        self.bytes += chunk_bytes;
        state.progress.copied_bytes += chunk_bytes;
        state.pass_left = state.pass_left.saturating_sub(chunk_bytes);
        let elapsed = self.since.elapsed();
        if elapsed >= METERED / 20 {
            let rate = u128::from(self.bytes) * 1_000_000 / elapsed.as_micros().max(1);
            state.progress.bytes_per_second = u64::try_from(rate).unwrap_or(u64::MAX);
        }
        if elapsed >= METERED {
            (self.since, self.bytes) = (Instant::now(), 0);
        }
        ControlFlow::Continue(())
    }
}

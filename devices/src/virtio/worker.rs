// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! One named thread a virtqueue: sleeps on the doorbell and the handler's own descriptors, calls the handler.
//!
//! A handler that reports a driver's mistake puts the device into NEEDS_RESET and is not called again; its thread
//! then only waits to be stopped.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use atoll_thread::Kind;
use virtio_queue::QueueState;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{DeviceQueue, QueueError, QueueStart, StartError, StartedQueue};

/// What to do after a handler returned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// Sleep until the doorbell or a source.
    Sleep,
    /// There is more to do; look for a stop first, then call again.
    Again,
    /// There is more to do, but not before this time: sleep as with `Sleep`, at most so long.
    After(Duration),
}

impl Progress {
    /// `Again` when there is more, which [`DeviceQueue::enable_doorbell`] tells; else `Sleep`.
    #[must_use]
    pub fn again_if(more: bool) -> Self {
        if more { Self::Again } else { Self::Sleep }
    }
}

/// What serves a queue, on the queue's thread.
pub trait QueueHandler: Send {
    /// Descriptors that wake the thread beside the doorbell, edge-triggered: after a wake-up the handler goes on
    /// until they would block. Asked for once; they must stay open as long as the handler lives.
    fn sources(&self) -> Vec<(RawFd, EventSet)> {
        Vec::new()
    }

    /// Does whatever can be done now: called after every wake-up, whatever its cause. A bounded amount of work.
    fn process(&mut self, queue: &mut DeviceQueue) -> Result<Progress, QueueError>;

    /// Completes everything in flight. Called before the thread ends, also after an error.
    fn drain(&mut self, _queue: &mut DeviceQueue) -> Result<(), QueueError> {
        Ok(())
    }
}

const DOORBELL: u64 = u64::MAX;
const STOP: u64 = u64::MAX - 1;

struct Running {
    stop: Arc<(AtomicBool, EventFd)>,
    thread: JoinHandle<QueueState>,
}

impl StartedQueue for Running {
    fn stop(self: Box<Self>) -> QueueState {
        self.stop.0.store(true, Ordering::Release);
        self.stop.1.write(1).expect("an eventfd of our own");
        self.thread
            .join()
            .expect("a queue thread does not panic: guest mistakes are errors")
    }
}

/// Starts a thread `name` (at most 15 bytes are shown by the kernel) that serves the queue with `handler`, under
/// the system-call filter of `kind`.
pub fn spawn(
    kind: Kind,
    name: &str,
    start: QueueStart,
    handler: Box<dyn QueueHandler>,
) -> Result<Box<dyn StartedQueue>, StartError> {
    #[cfg(feature = "testing")]
    if inline::is_on() {
        return Ok(inline::serve(start, handler));
    }
    let index = start.index;
    let spawned = || -> io::Result<Running> {
        let stop = Arc::new((AtomicBool::new(false), EventFd::new(EFD_NONBLOCK)?));
        let epoll = Epoll::new()?;
        let add = |fd: RawFd, events: EventSet, token: u64| {
            epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(events, token))
        };
        // Edge-triggered, so that a kick costs no read(2): each signal of an eventfd is an edge. A kick that came
        // while nobody listened is covered by the first call of the handler.
        let edge = EventSet::IN | EventSet::EDGE_TRIGGERED;
        add(start.doorbell.as_raw_fd(), edge, DOORBELL)?;
        add(stop.1.as_raw_fd(), EventSet::IN, STOP)?;
        for (token, (fd, events)) in (0..).zip(handler.sources()) {
            add(fd, events | EventSet::EDGE_TRIGGERED, token)?;
        }
        let worker = Worker {
            epoll,
            stop: stop.clone(),
            start,
            handler,
        };
        let thread = atoll_thread::spawn(kind, name, move || worker.run())?;
        Ok(Running { stop, thread })
    };
    match spawned() {
        Ok(running) => Ok(Box::new(running)),
        Err(source) => Err(StartError { index, source }),
    }
}

struct Worker {
    epoll: Epoll,
    stop: Arc<(AtomicBool, EventFd)>,
    start: QueueStart,
    handler: Box<dyn QueueHandler>,
}

impl Worker {
    fn run(mut self) -> QueueState {
        // Buffers may be waiting from before: DRIVER_OK comes after the first kick, a resume after many.
        let mut result = self.serve();
        if let Ok(()) = result {
            result = self.handler.drain(&mut self.start.queue);
        }
        if let Err(error) = result {
            self.give_up(&error);
        }
        self.start.queue.state()
    }

    fn serve(&mut self) -> Result<(), QueueError> {
        let mut events = [EpollEvent::default(); 8];
        loop {
            let progress = match self.handler.process(&mut self.start.queue) {
                Ok(progress) => progress,
                Err(error) => {
                    self.give_up(&error);
                    self.handler.drain(&mut self.start.queue)?;
                    self.wait_for_stop(&mut events)?;
                    return Ok(());
                }
            };
            let timeout = match progress {
                Progress::Again => 0,
                Progress::Sleep => -1,
                // In milliseconds, rounded up so that the next call does not come too early.
                Progress::After(time) => i32::try_from(time.as_millis() + 1).unwrap_or(i32::MAX),
            };
            self.wait(timeout, &mut events)?;
            if self.stop.0.load(Ordering::Acquire) {
                return Ok(());
            }
        }
    }

    fn wait(&self, timeout: i32, events: &mut [EpollEvent]) -> Result<(), QueueError> {
        let count = match self.epoll.wait(timeout, events) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(source) => {
                let what = "wait for the doorbell";
                return Err(QueueError::Host { what, source });
            }
        };
        if events[..count].iter().any(|event| event.data() == DOORBELL) {
            self.start.counters.doorbells.add(1);
        }
        Ok(())
    }

    fn wait_for_stop(&self, events: &mut [EpollEvent]) -> Result<(), QueueError> {
        while !self.stop.0.load(Ordering::Acquire) {
            self.wait(-1, events)?;
        }
        Ok(())
    }

    fn give_up(&self, error: &QueueError) {
        if !matches!(error, QueueError::Host { .. }) {
            self.start.counters.guest_errors.add(1);
        }
        let reason = chain_text(error);
        self.start.queue.interrupt().device().needs_reset(&reason);
    }
}

/// Queues without threads: they serve what is in their rings when they are started, on the caller's thread. A fuzz
/// target makes some thousand of them a second, and what it reaches depends on nothing but its input.
#[cfg(feature = "testing")]
pub mod inline {
    use std::cell::Cell;

    use virtio_queue::QueueState;

    use super::{Progress, QueueHandler};
    use crate::virtio::{QueueStart, StartedQueue};

    /// Calls of a handler that has more to do.
    const ROUNDS_MAX: u32 = 4;

    thread_local! {
        static ON: Cell<bool> = const { Cell::new(false) };
    }

    /// Every queue that `body` starts is of this kind.
    pub fn queues<R>(body: impl FnOnce() -> R) -> R {
        ON.set(true);
        let result = body();
        ON.set(false);
        result
    }

    pub(super) fn is_on() -> bool {
        ON.get()
    }

    struct Served(QueueState);

    impl StartedQueue for Served {
        fn stop(self: Box<Self>) -> QueueState {
            self.0
        }
    }

    pub(super) fn serve(
        mut start: QueueStart,
        mut handler: Box<dyn QueueHandler>,
    ) -> Box<dyn StartedQueue> {
        for _ in 0..ROUNDS_MAX {
            if !matches!(handler.process(&mut start.queue), Ok(Progress::Again)) {
                break;
            }
        }
        let _ = handler.drain(&mut start.queue);
        Box::new(Served(start.queue.state()))
    }
}

/// An error with its causes, on one line.
fn chain_text(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

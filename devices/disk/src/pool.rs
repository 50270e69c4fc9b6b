// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Queues served by a few threads that make blocking calls: where io_uring is absent, and for image formats whose
//! code blocks.
//!
//! ```text
//! queue ──kick──► jobs (bounded by the queues' depths) ──► thread disk-io ──► completions of that queue, eventfd
//! ```

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;

use atoll_thread::Kind;
use rustix::event::{PollFd, PollFlags, poll};

use crate::backend::{BlockQueue, Completion, Full, Request, SharedGeometry};
use crate::immediate::{completion_event, reset, signal};
use crate::open::Cache;

/// Blocking calls that one disk has at a time.
pub(crate) const CALLS: usize = 4;
/// The same past the page cache, where they wait for the disk, which serves several at a time; in it they are work for
/// CPUs, and more of them are in each other's way. Measured with 128 requests of 4 KiB in flight: 8 instead of 4 made a
/// tmpfs slower by a tenth and a disk faster by a quarter.
const DIRECT_CALLS: usize = 8;

/// How many calls a file that is opened like that is worth.
pub(crate) fn calls_for(cache: Cache) -> usize {
    match cache.is_direct() {
        true => DIRECT_CALLS,
        false => CALLS,
    }
}

/// Carries out one request that fits the disk, on any thread.
pub(crate) type Transfer = dyn Fn(&Request) -> io::Result<()> + Send + Sync;
/// Called by the last of the threads, when no queue is open any more.
pub(crate) type Rest = dyn Fn() + Send + Sync;

struct Job {
    request: Request,
    to: Arc<Finished>,
}

/// What of one queue is done.
struct Finished {
    // Leaf lock, held to push or to take.
    list: Mutex<Vec<Completion>>,
    event: OwnedFd,
}

/// What the threads of one pool share. A pool that is about to end and the next one of the same disk have nothing in
/// common: the one's end must not end the other.
struct Shared {
    geometry: Arc<SharedGeometry>,
    transfer: Arc<Transfer>,
    rest: Arc<Rest>,
    /// Threads that have not come to their end.
    serving: AtomicUsize,
    // Jobs, and whether the threads are to end. Leaf lock, held to push or to take.
    jobs: Mutex<(VecDeque<Job>, bool)>,
    wake: Condvar,
}

/// The threads of one disk; they end with the last of its queues.
struct Pool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

/// Opens queues, and starts the threads with the first: a disk is opened before its process may have threads.
pub(crate) struct Pooled {
    calls: usize,
    geometry: Arc<SharedGeometry>,
    transfer: Arc<Transfer>,
    rest: Arc<Rest>,
    // The pool that open queues keep alive. Taken alone, on the control path.
    pool: Mutex<Weak<Pool>>,
}

impl Pooled {
    /// With so many threads as there are `calls` at a time.
    pub(crate) fn new(
        calls: usize,
        geometry: Arc<SharedGeometry>,
        transfer: Arc<Transfer>,
        rest: Arc<Rest>,
    ) -> Self {
        Self {
            calls,
            geometry,
            transfer,
            rest,
            pool: Mutex::default(),
        }
    }

    pub(crate) fn queue(&self, depth: u16) -> io::Result<PoolQueue> {
        let mut current = locked(&self.pool);
        let pool = match current.upgrade() {
            Some(pool) => pool,
            None => Pool::start(self.shared(), self.calls)?,
        };
        *current = Arc::downgrade(&pool);
        Ok(PoolQueue {
            pool,
            depth: depth.max(1).into(),
            waiting: Vec::new(),
            in_flight: 0,
            finished: Arc::new(Finished {
                list: Mutex::default(),
                event: completion_event()?,
            }),
        })
    }

    fn shared(&self) -> Shared {
        Shared {
            geometry: self.geometry.clone(),
            transfer: self.transfer.clone(),
            rest: self.rest.clone(),
            serving: AtomicUsize::new(0),
            jobs: Mutex::default(),
            wake: Condvar::new(),
        }
    }
}

impl Pool {
    fn start(shared: Shared, threads: usize) -> io::Result<Arc<Self>> {
        let mut pool = Self {
            shared: Arc::new(shared),
            threads: Vec::new(),
        };
        for _ in 0..threads {
            let shared = pool.shared.clone();
            shared.serving.fetch_add(1, Ordering::Relaxed);
            let thread = atoll_thread::spawn(Kind::Disk, "disk-io", move || shared.serve())?;
            pool.threads.push(thread);
        }
        Ok(Arc::new(pool))
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        locked(&self.shared.jobs).1 = true;
        self.shared.wake.notify_all();
        for thread in self.threads.drain(..) {
            // A thread that panicked has aborted the process already.
            let _ = thread.join();
        }
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // No holder leaves its list half-changed.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    fn serve(&self) {
        while let Some(job) = self.next() {
            let result = job
                .request
                .check(self.geometry.get())
                .and_then(|()| (self.transfer)(&job.request));
            let mut list = locked(&job.to.list);
            list.push(job.request.finish(result));
            let is_first = list.len() == 1;
            drop(list);
            // The queue takes the whole list at once, so it is told of the first that is there.
            if is_first {
                signal(&job.to.event).expect("an eventfd of our own, far from its maximum");
            }
        }
        if self.serving.fetch_sub(1, Ordering::AcqRel) == 1 {
            (self.rest)();
        }
    }

    fn next(&self) -> Option<Job> {
        let mut jobs = locked(&self.jobs);
        loop {
            if let Some(job) = jobs.0.pop_front() {
                return Some(job);
            }
            if jobs.1 {
                return None;
            }
            jobs = self.wake.wait(jobs).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// See the module.
pub(crate) struct PoolQueue {
    pool: Arc<Pool>,
    depth: usize,
    waiting: Vec<Request>,
    /// Submitted and not taken, `waiting` included.
    in_flight: usize,
    finished: Arc<Finished>,
}

impl BlockQueue for PoolQueue {
    fn completion_fd(&self) -> BorrowedFd<'_> {
        self.finished.event.as_fd()
    }

    fn submit(&mut self, request: Request) -> Result<(), Full> {
        if self.in_flight >= self.depth {
            return Err(Full(request));
        }
        self.in_flight += 1;
        self.waiting.push(request);
        Ok(())
    }

    fn kick(&mut self) -> io::Result<()> {
        let count = self.waiting.len();
        if count == 0 {
            return Ok(());
        }
        let to = &self.finished;
        let jobs = self.waiting.drain(..).map(|request| Job {
            request,
            to: to.clone(),
        });
        locked(&self.pool.shared.jobs).0.extend(jobs);
        match count {
            1 => self.pool.shared.wake.notify_one(),
            _ => self.pool.shared.wake.notify_all(),
        }
        Ok(())
    }

    fn complete(&mut self, done: &mut Vec<Completion>) -> io::Result<()> {
        // First the event: what finishes after the list was taken signals again.
        reset(&self.finished.event)?;
        let mut list = locked(&self.finished.list);
        self.in_flight -= list.len();
        done.append(&mut list);
        Ok(())
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }
}

impl Drop for PoolQueue {
    fn drop(&mut self) {
        self.in_flight -= self.waiting.len();
        let mut done = Vec::new();
        while self.in_flight > 0 {
            let event = PollFd::from_borrowed_fd(self.finished.event.as_fd(), PollFlags::IN);
            let waited = poll(&mut [event], None);
            let taken = self.complete(&mut done);
            if !matches!(waited, Ok(_) | Err(rustix::io::Errno::INTR)) || taken.is_err() {
                // A thread may still write to the requests' memory: going on would corrupt the guest.
                panic!("the disk's threads do not give back their requests: {waited:?}, {taken:?}");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;

    use super::*;
    use crate::backend::{Geometry, Operation};
    use crate::segments::Segments;

    /// The last queue of a disk ends while another thread opens the next first one.
    #[test]
    fn a_pool_that_ends_does_not_stop_the_next_one() {
        let geometry = Geometry {
            size_bytes: 512,
            read_only: false,
        };
        let geometry = Arc::new(SharedGeometry::new(geometry));
        let pooled = Pooled::new(
            CALLS,
            geometry,
            Arc::new(|_: &Request| Ok(())),
            Arc::new(|| {}),
        );
        let now = Barrier::new(2);
        let round = |queue: &mut Option<PoolQueue>| {
            now.wait();
            *queue = None;
            let queue = queue.insert(pooled.queue(1).unwrap());
            let request = Request {
                token: 0,
                operation: Operation::Flush,
                offset_bytes: 0,
                segments: Segments::new(),
            };
            queue.submit(request).map_err(|_| "full").unwrap();
            // Dropping it in the next round waits for the request.
            queue.kick().unwrap();
        };
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    let mut queue = None;
                    (0..2000).for_each(|_| round(&mut queue));
                });
            }
        });
    }
}

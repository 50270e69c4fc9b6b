// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Named threads that serve virtqueues: a thread sleeps on the doorbells of its queues and on the descriptors of
//! their handlers, and calls the handlers of those that were woken.
//!
//! Most queues have a thread of their own ([`spawn`]). Queues whose work is one piece share one ([`QueueThread`]): it
//! is made for the first of them, and ends with the last.
//!
//! ```text
//!   start_queue, stop ── Order ──► thread: epoll ──► `process` of each queue that is due, highest queue first
//! ```
//! A handler that reports a driver's mistake puts the device into NEEDS_RESET and is not called again; its queue
//! then only waits to be stopped.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::mpsc::{Receiver, Sender, SyncSender, TryRecvError, channel, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

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
    /// There is more to do; look for a stop and at the thread's other queues first, then call again.
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
    /// Descriptors that wake the queue beside its doorbell, edge-triggered: after a wake-up the handler goes on
    /// until they would block. Asked for once; they must stay open as long as the handler lives, and no other handler
    /// of the same thread has them.
    fn sources(&self) -> Vec<(RawFd, EventSet)> {
        Vec::new()
    }

    /// Does whatever can be done now: called once at the start and after every wake-up of its queue, whatever its
    /// cause. A bounded amount of work.
    fn process(&mut self, queue: &mut DeviceQueue) -> Result<Progress, QueueError>;

    /// Completes everything in flight. Called before the queue stops, also after an error.
    fn drain(&mut self, _queue: &mut DeviceQueue) -> Result<(), QueueError> {
        Ok(())
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
    QueueThread::new(kind, name.to_owned()).serve(start, handler)
}

/// A thread for several queues of one device, which come and go one by one.
pub struct QueueThread {
    kind: Kind,
    name: String,
    running: SharedRunning,
}

/// The thread, while it has queues. Held while a queue comes or goes, so that a thread that ends has ended before
/// another one is made; the thread itself never takes it.
type SharedRunning = Arc<Mutex<Option<Running>>>;

fn lock(running: &Mutex<Option<Running>>) -> MutexGuard<'_, Option<Running>> {
    running.lock().unwrap_or_else(PoisonError::into_inner)
}

impl QueueThread {
    /// A thread `name` under the filter of `kind`, which does not run yet.
    pub fn new(kind: Kind, name: String) -> Self {
        Self {
            kind,
            name,
            running: Arc::default(),
        }
    }

    /// Serves one more queue with `handler`, from now on.
    pub fn serve(
        &self,
        start: QueueStart,
        handler: Box<dyn QueueHandler>,
    ) -> Result<Box<dyn StartedQueue>, StartError> {
        #[cfg(feature = "testing")]
        if inline::is_on() {
            return Ok(inline::serve(start, handler));
        }
        let index = start.index;
        match self.add(Member::new(start, handler)) {
            Ok(()) => Ok(Box::new(Started {
                index,
                running: self.running.clone(),
            })),
            Err(source) => Err(StartError { index, source }),
        }
    }

    fn add(&self, member: Member) -> io::Result<()> {
        let mut running = lock(&self.running);
        let mut thread = match running.take() {
            Some(thread) => thread,
            None => Running::start(self.kind, &self.name)?,
        };
        let added = thread.order(|answer| Order::Add(Box::new(member), answer));
        thread.queue_count += usize::from(added.is_ok());
        *running = thread.unless_idle();
        added
    }
}

/// A queue on a thread.
struct Started {
    index: u16,
    running: SharedRunning,
}

impl StartedQueue for Started {
    fn stop(self: Box<Self>) -> QueueState {
        let mut running = lock(&self.running);
        let mut thread = running.take().expect("it runs while it has queues");
        let state = thread.order(|answer| Order::Remove(self.index, answer));
        thread.queue_count -= 1;
        *running = thread.unless_idle();
        state
    }
}

/// What a thread is told, and where it answers.
enum Order {
    Add(Box<Member>, SyncSender<io::Result<()>>),
    Remove(u16, SyncSender<QueueState>),
}

/// The other end of a thread. When `orders` is dropped, the thread ends.
struct Running {
    orders: Sender<Order>,
    wake: EventFd,
    thread: JoinHandle<()>,
    queue_count: usize,
}

impl Running {
    fn start(kind: Kind, name: &str) -> io::Result<Self> {
        let (orders, received) = channel();
        let wake = EventFd::new(EFD_NONBLOCK)?;
        let epoll = Epoll::new()?;
        let edge = EventSet::IN | EventSet::EDGE_TRIGGERED;
        let event = EpollEvent::new(edge, ORDERS);
        epoll.ctl(ControlOperation::Add, wake.as_raw_fd(), event)?;
        let worker = Worker {
            epoll,
            orders: received,
            members: Vec::new(),
        };
        let thread = atoll_thread::spawn(kind, name, move || worker.run())?;
        Ok(Self {
            orders,
            wake,
            thread,
            queue_count: 0,
        })
    }

    /// Sends an order and waits for its answer.
    fn order<T>(&self, order: impl FnOnce(SyncSender<T>) -> Order) -> T {
        let (answer, answered) = sync_channel(1);
        let sent = self.orders.send(order(answer));
        self.wake.write(1).expect("an eventfd of our own");
        let answer = sent.ok().and_then(|()| answered.recv().ok());
        answer.expect("a queue thread does not panic: guest mistakes are errors")
    }

    /// Itself, or nothing once the thread has ended because it has no queue.
    fn unless_idle(self) -> Option<Self> {
        if self.queue_count > 0 {
            return Some(self);
        }
        drop(self.orders);
        self.wake.write(1).expect("an eventfd of our own");
        let ended = self.thread.join();
        ended.expect("a queue thread does not panic: guest mistakes are errors");
        None
    }
}

/// Tokens of events: a queue's number with the number of a source, or of its doorbell; and of the orders.
const ORDERS: u64 = u64::MAX;
const DOORBELL: u64 = 0xffff;

fn token(queue: u16, source: u64) -> u64 {
    u64::from(queue) << 16 | source
}

/// A queue and what serves it.
struct Member {
    start: QueueStart,
    handler: Box<dyn QueueHandler>,
    sources: Vec<(RawFd, EventSet)>,
    /// The handler is called before the thread sleeps.
    due: bool,
    /// It is due from then on.
    due_at: Option<Instant>,
    /// The handler is never called again.
    broken: bool,
}

impl Member {
    fn new(start: QueueStart, handler: Box<dyn QueueHandler>) -> Self {
        Self {
            sources: handler.sources(),
            start,
            handler,
            // Buffers may be waiting from before: DRIVER_OK comes after the first kick, a resume after many.
            due: true,
            due_at: None,
            broken: false,
        }
    }

    fn process(&mut self) {
        (self.due, self.due_at) = (false, None);
        match self.handler.process(&mut self.start.queue) {
            Ok(Progress::Sleep) => {}
            Ok(Progress::Again) => self.due = true,
            Ok(Progress::After(time)) => self.due_at = Some(Instant::now() + time),
            Err(error) => {
                self.give_up(&error);
                self.drain();
                self.broken = true;
            }
        }
    }

    fn stop(mut self) -> QueueState {
        if !self.broken {
            self.drain();
        }
        self.start.queue.state()
    }

    fn drain(&mut self) {
        if let Err(error) = self.handler.drain(&mut self.start.queue) {
            self.give_up(&error);
        }
    }

    fn give_up(&self, error: &QueueError) {
        if !matches!(error, QueueError::Host { .. }) {
            self.start.counters.guest_errors.add(1);
        }
        let reason = atoll_disk::chain(error);
        self.start.queue.interrupt().device().needs_reset(&reason);
    }

    /// What wakes it: descriptors, events and tokens.
    fn wakers(&self) -> impl Iterator<Item = (RawFd, EventSet, u64)> {
        let index = self.start.index;
        let doorbell = (self.start.doorbell.as_raw_fd(), EventSet::IN, DOORBELL);
        let sources = (0..).zip(&self.sources);
        let sources = sources.map(|(number, (fd, events))| (*fd, *events, number));
        std::iter::once(doorbell)
            .chain(sources)
            .map(move |(fd, events, number)| (fd, events, token(index, number)))
    }
}

struct Worker {
    epoll: Epoll,
    orders: Receiver<Order>,
    /// Highest queue first: a card sends before it receives, so that what is answered at once is in one batch.
    members: Vec<Member>,
}

impl Worker {
    fn run(mut self) {
        while let Ok(()) = self.obey() {
            loop {
                let due = self.members.iter_mut().filter(|member| member.due);
                due.for_each(Member::process);
                if self.wait() {
                    break;
                }
            }
        }
    }

    /// Does what it is told; an error when nobody will tell it anything any more.
    fn obey(&mut self) -> Result<(), TryRecvError> {
        loop {
            // Whoever gave an order waits for the answer.
            match self.orders.try_recv() {
                Ok(Order::Add(member, answer)) => drop(answer.send(self.add(*member))),
                Ok(Order::Remove(index, answer)) => drop(answer.send(self.remove(index))),
                Err(TryRecvError::Empty) => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }

    /// Edge-triggered, so that a kick costs no read(2): each signal of an eventfd is an edge. A kick that came while
    /// nobody listened is covered by the first call of the handler.
    fn add(&mut self, member: Member) -> io::Result<()> {
        for (fd, events, token) in member.wakers() {
            let event = EpollEvent::new(events | EventSet::EDGE_TRIGGERED, token);
            if let Err(error) = self.epoll.ctl(ControlOperation::Add, fd, event) {
                self.forget(&member);
                return Err(error);
            }
        }
        let index = member.start.index;
        let place = self
            .members
            .partition_point(|other| other.start.index > index);
        self.members.insert(place, member);
        Ok(())
    }

    fn remove(&mut self, index: u16) -> QueueState {
        let place = self
            .members
            .iter()
            .position(|member| member.start.index == index);
        let member = self
            .members
            .remove(place.expect("only queues that were added are removed"));
        self.forget(&member);
        member.stop()
    }

    /// A descriptor that has copies stays in an epoll when it is closed.
    fn forget(&self, member: &Member) {
        for (fd, ..) in member.wakers() {
            // It fails for those that were not added.
            let _ = self
                .epoll
                .ctl(ControlOperation::Delete, fd, EpollEvent::default());
        }
    }

    /// Sleeps until a queue is due or there are orders, which it tells.
    fn wait(&mut self) -> bool {
        let mut events = [EpollEvent::default(); 16];
        let count = match self.epoll.wait(self.timeout(), &mut events) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => panic!("wait on an epoll of our own: {error}"),
        };
        let mut ordered = false;
        for event in &events[..count] {
            let (index, source) = (event.data() >> 16, event.data() & 0xffff);
            ordered |= event.data() == ORDERS;
            let mut members = self.members.iter_mut();
            let woken = members.find(|member| u64::from(member.start.index) == index);
            if let Some(member) = woken {
                member.due = !member.broken;
                member
                    .start
                    .counters
                    .doorbells
                    .add(u64::from(source == DOORBELL));
            }
        }
        if self.members.iter().any(|member| member.due_at.is_some()) {
            let now = Instant::now();
            for member in &mut self.members {
                member.due |= member.due_at.is_some_and(|at| at <= now);
            }
        }
        ordered
    }

    /// Milliseconds, rounded up so that no call comes too early; -1: for ever.
    fn timeout(&self) -> i32 {
        if self.members.iter().any(|member| member.due) {
            return 0;
        }
        let first = self.members.iter().filter_map(|member| member.due_at).min();
        first.map_or(-1, |at| {
            let left = at.saturating_duration_since(Instant::now());
            i32::try_from(left.as_millis() + 1).unwrap_or(i32::MAX)
        })
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

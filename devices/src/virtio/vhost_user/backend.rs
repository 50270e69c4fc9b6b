// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The other process, as a device of ours sees it: features, configuration, and rings that it is given and that it
//! gives back.
//!
//! One thread talks to it (`conversation`). Everybody else hands that thread a job and waits for its result, for
//! [`BackendOptions::patience`] at most: then the connection is cut, which ends whatever the thread waits for.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use atoll_thread::Kind;
use rustix::event::{EventfdFlags, eventfd};
use virtio_queue::QueueState;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::conversation::Conversation;
use super::log::PageLog;
use crate::memory::{self, Memory};
use crate::virtio::{QueueStart, StartError, StartedQueue};

/// What the transport offers to every driver, and the backend must know: indirect descriptors, event index, and
/// version 1.
pub(super) const NEEDED: u64 = 1 << 28 | 1 << 29 | 1 << 32;

/// What a backend lacks whose writes cannot be logged.
pub(super) const NO_LOG: &str = "it lacks VHOST_F_LOG_ALL or VHOST_USER_PROTOCOL_F_LOG_SHMFD";

/// Why the other process does not serve the device.
#[derive(Debug, thiserror::Error)]
pub enum VhostUserError {
    /// It said no, or went away.
    #[error("the backend did not {what}")]
    Refused {
        /// What it was asked.
        what: &'static str,
        /// Its answer.
        source: vhost::Error,
    },
    /// It is too old, or something else.
    #[error("the backend lacks the features {lacking:#x}")]
    Features {
        /// What is needed, or was there before, and it has not.
        lacking: u64,
    },
    /// It was made for fewer.
    #[error("the backend has {found} queues, {wanted} are wanted")]
    Queues {
        /// What it has.
        found: u64,
        /// What the device is to have.
        wanted: u64,
    },
    /// What it writes would be in no log, and somebody goes by that now.
    #[error("the backend does not log what it writes: {NO_LOG}")]
    NoLog,
    /// It does not keep the configuration of such a device.
    #[error("the backend has no configuration space (VHOST_USER_PROTOCOL_F_CONFIG)")]
    NoConfiguration,
    /// A thread, an eventfd or a socket could not be made.
    #[error("prepare for the backend")]
    Host(#[source] io::Error),
    /// Nobody is there.
    #[error("connect to the backend")]
    Connect(#[source] io::Error),
}

/// How to reach the other process, how long to wait for it, and what to do when it ends.
pub struct BackendOptions {
    /// The device's name, in logs and thread names: `net0`.
    pub name: String,
    /// A connection with it, of which nothing has been read or written.
    pub stream: UnixStream,
    /// Where to look for another one when it has ended.
    pub reconnect: Option<PathBuf>,
    /// How long it may take to answer.
    pub patience: Duration,
}

/// What a device wants of its backend.
#[derive(Debug, Clone, Copy)]
pub(in crate::virtio) struct Terms {
    /// Feature bits that the driver may have, of those that the backend has.
    pub(in crate::virtio) features: u64,
    /// Bytes of configuration space that the backend keeps, if it does.
    pub(in crate::virtio) config_bytes: usize,
    /// Rings that it is given.
    pub(in crate::virtio) ring_count: usize,
    /// What it must answer when it is asked for its queues: for a network card, pairs of them.
    pub(in crate::virtio) queue_number: u64,
    /// Another process can go on with the rings, since nothing is known but their positions, and what is lost is lost.
    pub(in crate::virtio) survives: bool,
    /// It uses every buffer that it is offered, soon. A ring is taken back when it has: QEMU's storage daemon hangs up when
    /// it comes to the end of a request of a ring that it has let go of.
    pub(in crate::virtio) completes: bool,
    /// For a network card.
    pub(in crate::virtio) mtu: Option<u16>,
}

/// What a device has to tell its driver. Told on the thread that talks to the backend: who listens asks the backend
/// nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::virtio) enum Event {
    /// It has ended.
    Gone,
    /// Another one is there.
    Back,
    /// Its configuration changed.
    Configured,
}

type Listener = Box<dyn Fn(Event) + Send + Sync>;

/// What the talking thread tells the others.
pub(super) struct Shared {
    pub(super) name: String,
    pub(super) terms: Terms,
    pub(super) reconnect: Option<PathBuf>,
    /// What the driver may have: fixed by the first backend, since the driver has seen it.
    pub(super) features: AtomicU64,
    /// Whether somebody is at the other end.
    pub(super) alive: AtomicBool,
    /// Whether that one, or the last one, can note which pages it writes.
    pub(super) can_log: AtomicBool,
    /// Where that is noted: there once it has been wanted and guest memory is known. Leaf lock, for a copy.
    pub(super) log: Mutex<Option<Arc<PageLog>>>,
    /// Copy of the configuration space. Leaf lock, for a copy.
    pub(super) config: Mutex<Vec<u8>>,
    /// The connection, to be cut. Leaf lock, over one system call that does not wait.
    pub(super) stream: Mutex<Option<UnixStream>>,
    /// An eventfd: there are jobs, or nobody is left who has any.
    pub(super) wake: OwnedFd,
    listener: OnceLock<Listener>,
}

impl Shared {
    pub(super) fn tell(&self, event: Event) {
        if let Some(listener) = self.listener.get() {
            listener(event);
        }
    }

    pub(super) fn lock_config(&self) -> MutexGuard<'_, Vec<u8>> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn lock_stream(&self) -> MutexGuard<'_, Option<UnixStream>> {
        self.stream.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn lock_log(&self) -> MutexGuard<'_, Option<Arc<PageLog>>> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts what backends have noted into the log of guest memory.
    pub(super) fn note_writes(&self) {
        let log = self.lock_log().clone();
        if let Some(log) = log {
            log.drain();
        }
    }

    fn wake(&self) {
        let written = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
        assert!(written.is_ok(), "an eventfd of our own is written to");
    }

    /// Whoever waits for the backend waits no longer.
    fn cut(&self) {
        if let Some(stream) = &*self.lock_stream() {
            // An error says that the other end has done it already.
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
    }
}

pub(super) type Job = Box<dyn FnOnce(&mut Conversation) + Send>;

/// The other process of a vhost-user device, over its socket (QEMU `docs/interop/vhost-user.rst`). Questions wait for an
/// answer at most as long as its patience; a process that is gone is looked for again, where that was asked for.
pub struct Backend {
    shared: Arc<Shared>,
    patience: Duration,
    /// Leaf lock, since a sender is not shared; gone when the backend is dropped.
    jobs: Mutex<Option<Sender<Job>>>,
    thread: Option<JoinHandle<()>>,
}

impl Backend {
    /// Greets the process at the other end, and waits until it has answered.
    pub(in crate::virtio) fn new(
        options: BackendOptions,
        terms: Terms,
    ) -> Result<Arc<Self>, VhostUserError> {
        let shared = Arc::new(Shared {
            name: options.name,
            terms,
            reconnect: options.reconnect,
            features: AtomicU64::new(0),
            alive: AtomicBool::new(false),
            can_log: AtomicBool::new(false),
            log: Mutex::default(),
            config: Mutex::default(),
            stream: Mutex::default(),
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
                .map_err(|errno| VhostUserError::Host(errno.into()))?,
            listener: OnceLock::new(),
        });
        let (jobs, received) = channel();
        let conversation = Conversation::new(shared.clone());
        let name = format!("{}-user", shared.name);
        let thread = atoll_thread::spawn(Kind::Backend, &name, move || conversation.run(&received));
        let backend = Self {
            shared,
            patience: options.patience,
            jobs: Mutex::new(Some(jobs)),
            thread: Some(thread.map_err(VhostUserError::Host)?),
        };
        let stream = options.stream;
        backend.ask(move |conversation| conversation.meet(stream))?;
        Ok(Arc::new(backend))
    }

    /// What the driver may have.
    pub(in crate::virtio) fn features(&self) -> u64 {
        self.shared.features.load(Ordering::Acquire)
    }

    /// Rings that it serves.
    pub(in crate::virtio) fn ring_count(&self) -> usize {
        self.shared.terms.ring_count
    }

    /// Whether it is there.
    pub(in crate::virtio) fn is_alive(&self) -> bool {
        self.shared.alive.load(Ordering::Acquire)
    }

    /// Whether it can tell which pages it writes.
    pub(in crate::virtio) fn can_log(&self) -> bool {
        self.shared.can_log.load(Ordering::Acquire)
    }

    /// Whether it notes from now on which pages it writes, for [`Backend::note_writes`].
    pub(in crate::virtio) fn log_writes(&self, on: bool) -> io::Result<()> {
        self.ask(move |conversation| conversation.log_writes(on))
            .map_err(io::Error::other)
    }

    /// Puts what it has written since the last call into the log of guest memory. Does not wait for it.
    pub(in crate::virtio) fn note_writes(&self) {
        self.shared.note_writes();
    }

    /// From now on (once) somebody is told what happens.
    pub(in crate::virtio) fn listen(&self, listener: Listener) {
        assert!(
            self.shared.listener.set(listener).is_ok(),
            "a backend has one device"
        );
    }

    /// Reads the copy of its configuration space.
    pub(in crate::virtio) fn config_read(&self, offset: u64, data: &mut [u8]) {
        crate::virtio::read_config(&self.shared.lock_config(), offset, data);
    }

    /// The driver wrote to its configuration space.
    pub(in crate::virtio) fn config_write(&self, offset: u64, data: &[u8]) {
        let size = self.shared.terms.config_bytes;
        let fits = |offset: &usize| {
            offset
                .checked_add(data.len())
                .is_some_and(|end| end <= size)
        };
        if let Some(offset) = usize::try_from(offset).ok().filter(fits) {
            let data = data.to_vec();
            self.ask(move |conversation| conversation.configure(offset, &data));
        }
    }

    /// Has ring `ring` served from now on; `enabled` as in [`Backend::enable`]. When nobody is there, the ring waits; if it
    /// cannot, because its driver must begin anew, there is nothing to stop.
    pub(in crate::virtio) fn start(
        self: &Arc<Self>,
        ring: usize,
        start: &QueueStart,
        enabled: bool,
    ) -> Result<Option<Box<dyn StartedQueue>>, StartError> {
        let index = start.index;
        let given = Ring::of(start, enabled).map_err(|source| StartError { index, source })?;
        let state = given.state;
        let memory = given.memory.clone();
        if !self.ask(move |conversation| conversation.start(ring, given)) {
            return Ok(None);
        }
        Ok(Some(Box::new(Given {
            backend: self.clone(),
            ring,
            state,
            memory,
        })))
    }

    /// Whether a ring that is served is looked at: not so for a network card's pairs that its driver does not use.
    pub(in crate::virtio) fn enable(&self, ring: usize, enabled: bool) {
        self.ask(move |conversation| conversation.enable(ring, enabled));
    }

    /// Has the network told where the guest `mac` is; returns whether the backend can do that.
    pub(in crate::virtio) fn announce(&self, mac: [u8; 6]) -> bool {
        self.ask(move |conversation| conversation.announce(mac))
    }

    /// Has the talking thread do something, and waits for it.
    fn ask<T: Send + 'static>(
        &self,
        job: impl FnOnce(&mut Conversation) -> T + Send + 'static,
    ) -> T {
        let (sender, answer) = sync_channel(1);
        let job: Job = Box::new(move |conversation| {
            // The asker waits below for as long as this takes.
            let _ = sender.send(job(conversation));
        });
        let jobs = self.lock_jobs();
        let sent = jobs.as_ref().map(|jobs| jobs.send(job).is_ok());
        drop(jobs);
        assert_eq!(sent, Some(true), "the thread lives as long as the backend");
        self.shared.wake();
        match answer.recv_timeout(self.patience) {
            Ok(result) => return result,
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => unreachable!("jobs are done, not dropped"),
        }
        let (name, patience) = (&self.shared.name, self.patience);
        tracing::error!(device = name, ?patience, "vhost-user: no answer: cut off");
        // A vCPU may not do this itself.
        let shared = self.shared.clone();
        atoll_thread::in_starter(move || shared.cut());
        let done = answer.recv();
        done.expect("a job ends when the connection has, and does not panic")
    }

    fn lock_jobs(&self) -> MutexGuard<'_, Option<Sender<Job>>> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        *self.lock_jobs() = None;
        self.shared.cut();
        self.shared.wake();
        if let Some(thread) = self.thread.take() {
            // It does not panic; and if it did, there is nobody left to be told.
            let _ = thread.join();
        }
    }
}

/// A ring, and all that its server needs.
pub(super) struct Ring {
    pub(super) state: QueueState,
    pub(super) memory: Memory,
    /// Features that the driver accepted.
    pub(super) features: u64,
    pub(super) doorbell: EventFd,
    pub(super) call: EventFd,
    pub(super) enabled: bool,
    /// Whether the backend has it.
    pub(super) served: bool,
}

impl Ring {
    fn of(start: &QueueStart, enabled: bool) -> io::Result<Self> {
        let call = match start.queue.interrupt().event()? {
            Some(event) => event,
            // The driver polls: nobody listens.
            None => EventFd::new(EFD_NONBLOCK)?,
        };
        Ok(Self {
            state: start.queue.state(),
            memory: start.queue.memory().clone(),
            features: start.features,
            doorbell: start.doorbell.try_clone()?,
            call,
            enabled,
            served: false,
        })
    }
}

/// What its used ring says of where a ring stands; all that is known when its server has ended.
pub(super) fn used_index(memory: &Memory, state: &QueueState) -> u16 {
    let index = GuestAddress(state.used_ring.wrapping_add(2));
    let used: Result<u16, _> = memory.memory().load(index, Ordering::Acquire);
    used.map_or(state.next_used, u16::from_le)
}

/// What its driver says of how much it has offered.
pub(super) fn offered_index(memory: &Memory, state: &QueueState) -> u16 {
    let index = GuestAddress(state.avail_ring.wrapping_add(2));
    let offered: Result<u16, _> = memory.memory().load(index, Ordering::Acquire);
    offered.map_or(state.next_avail, u16::from_le)
}

/// Logs the used ring as written, which its server may not have come to when it ended.
pub(super) fn mark_used(memory: &Memory, state: &QueueState) {
    // Flags, index, an entry of 8 bytes each, and the driver's event index, VIRTIO 1.2 §2.7.8.
    let size = 2 + 2 + 8 * u64::from(state.size) + 2;
    memory::mark(&memory.memory(), state.used_ring, size);
}

/// A queue in the other process's hands.
struct Given {
    backend: Arc<Backend>,
    ring: usize,
    state: QueueState,
    memory: Memory,
}

impl StartedQueue for Given {
    fn stop(self: Box<Self>) -> QueueState {
        let ring = self.ring;
        let base = self
            .backend
            .ask(move |conversation| conversation.take_back(ring));
        let used = used_index(&self.memory, &self.state);
        QueueState {
            next_avail: base.unwrap_or(used),
            next_used: used,
            ..self.state
        }
    }
}

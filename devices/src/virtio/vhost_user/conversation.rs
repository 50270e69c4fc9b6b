// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The thread that talks to a backend: greets it, gives it rings and takes them back, hears when it ends, and looks
//! for another one.
//!
//! ```text
//!   alone ── meet: owner, features, configuration ──► linked ── rings: memory, addresses, doorbells ──► served
//!     ▲                                                 │
//!     └──────────── an error, or the end of the connection ─────────── once a second, if wanted: connect
//! ```

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserVringAddrFlags,
};
use vhost::vhost_user::{
    Error as ProtocolError, Frontend, VhostUserFrontend, VhostUserProtocolFeatures,
    VhostUserVirtioFeatures,
};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemoryBackend};

use super::backend::{
    Event, Job, NEEDED, Ring, Shared, VhostUserError, mark_used, offered_index, used_index,
};
use super::log::PageLog;
use super::messages;
use crate::virtio::unix;

/// How often a new backend is looked for.
const RETRY: Duration = Duration::from_secs(1);
/// How long a backend may take to finish what it was given before a ring is taken back, and how often it is looked.
const SETTLE_MAX: Duration = Duration::from_secs(5);
/// See [`SETTLE_MAX`].
const SETTLE_LOOK: Duration = Duration::from_millis(1);
/// Why configuration is written (`VHOST_USER_SET_CONFIG`, flags): the driver did. The protocol has numbers here, 0 for
/// this and 1 for a migration; the crate has them as bits, and takes 1 for this, which QEMU's backends refuse.
const BY_DRIVER: VhostUserConfigFlags = VhostUserConfigFlags::empty();
const PROTOCOL: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
/// The backend notes which pages it writes. A feature between it and us, not one of the guest's.
const LOG_ALL: u64 = VhostUserVirtioFeatures::LOG_ALL.bits();

/// A connection that has been greeted.
struct Link {
    frontend: Frontend,
    /// The same connection, for messages of our own and for its end.
    stream: UnixStream,
    /// On which the backend speaks first.
    notices: Option<UnixStream>,
    features: u64,
    protocol: VhostUserProtocolFeatures,
}

impl Link {
    fn can_log(&self) -> bool {
        let shares = self.protocol.contains(VhostUserProtocolFeatures::LOG_SHMFD);
        shares && self.features & LOG_ALL != 0
    }
}

/// State of the thread.
pub(super) struct Conversation {
    shared: Arc<Shared>,
    link: Option<Link>,
    rings: Vec<Option<Ring>>,
    /// Somebody wants to know which pages backends write.
    is_logged: bool,
    /// There has been a first backend, so that others may follow.
    met: bool,
    /// When a new one was last looked for.
    looked: Option<Instant>,
    /// Why the last attempt to find a new backend failed; told once.
    last_refusal: String,
}

fn refused(what: &'static str) -> impl FnOnce(vhost::Error) -> VhostUserError {
    move |source| VhostUserError::Refused { what, source }
}

fn refused_io(what: &'static str) -> impl FnOnce(io::Error) -> VhostUserError {
    move |source| VhostUserError::Refused {
        what,
        source: vhost::Error::IOError(source),
    }
}

impl Conversation {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self {
            rings: (0..shared.terms.ring_count).map(|_| None).collect(),
            shared,
            link: None,
            is_logged: false,
            met: false,
            looked: None,
            last_refusal: String::new(),
        }
    }

    /// The thread's body: until nobody is left who could ask.
    pub(super) fn run(mut self, jobs: &Receiver<Job>) {
        loop {
            let (hung_up, notice) = self.sleep();
            // Cleared first: a job that comes later wakes the thread again.
            let _ = rustix::io::read(&self.shared.wake, &mut [0; 8]);
            loop {
                match jobs.try_recv() {
                    Ok(job) => job(&mut self),
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => return,
                }
            }
            if hung_up {
                self.lose("it hung up");
            }
            if notice {
                self.take_notices();
            }
            self.look_for_another();
        }
    }

    /// Until something happens: whether the backend hung up, and whether it says something.
    fn sleep(&self) -> (bool, bool) {
        let end = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
        let mut sources = vec![PollFd::new(&self.shared.wake, PollFlags::IN)];
        if let Some(link) = &self.link {
            sources.push(PollFd::new(&link.stream, end));
            if let Some(notices) = &link.notices {
                sources.push(PollFd::new(notices, PollFlags::IN));
            }
        }
        let looks = self.met && self.link.is_none() && self.shared.reconnect.is_some();
        let timeout = looks.then(|| RETRY.try_into().expect("a second"));
        // An interrupted or impossible wait is one that ended at once.
        let _ = poll(&mut sources, timeout.as_ref());
        let happened = |at: usize, flags: PollFlags| {
            let source: Option<&PollFd<'_>> = sources.get(at);
            source.is_some_and(|source| source.revents().intersects(flags))
        };
        (happened(1, end), happened(2, PollFlags::IN | end))
    }

    /// Greets the process at the other end of `stream`.
    pub(super) fn meet(&mut self, stream: UnixStream) -> Result<(), VhostUserError> {
        // From now on it can be cut off.
        *self.shared.lock_stream() = Some(stream.try_clone().map_err(VhostUserError::Host)?);
        let link = self.greet(stream)?;
        if !self.met {
            let features = link.features & self.shared.terms.features;
            self.shared.features.store(features, Ordering::Release);
            self.met = true;
        }
        self.shared.can_log.store(link.can_log(), Ordering::Release);
        self.link = Some(link);
        self.shared.alive.store(true, Ordering::Release);
        Ok(())
    }

    fn greet(&self, stream: UnixStream) -> Result<Link, VhostUserError> {
        let terms = &self.shared.terms;
        let own = stream.try_clone().map_err(VhostUserError::Host)?;
        let mut frontend = Frontend::from_stream(stream, terms.ring_count as u64);
        let owned = frontend.set_owner();
        owned.map_err(refused("take us for its owner"))?;
        let features = frontend.get_features();
        let features = features.map_err(refused("tell its features"))?;
        let before = self.shared.features.load(Ordering::Acquire);
        let lacking = (NEEDED | before) & !features;
        if lacking != 0 {
            return Err(VhostUserError::Features { lacking });
        }
        let mut protocol = VhostUserProtocolFeatures::empty();
        if features & PROTOCOL != 0 {
            let known = frontend.get_protocol_features();
            protocol = known.map_err(refused("tell its protocol features"))? & self.wanted();
            let set = frontend.set_protocol_features(protocol);
            set.map_err(refused("take protocol features"))?;
            if protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
                frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
            }
        }
        let mut link = Link {
            frontend,
            stream: own,
            notices: None,
            features,
            protocol,
        };
        if self.is_logged && !link.can_log() {
            return Err(VhostUserError::NoLog);
        }
        self.agree(&mut link)?;
        Ok(link)
    }

    /// Protocol features that are of use for this device.
    fn wanted(&self) -> VhostUserProtocolFeatures {
        let terms = &self.shared.terms;
        let mut wanted = VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::LOG_SHMFD;
        if terms.config_bytes > 0 {
            wanted |= VhostUserProtocolFeatures::CONFIG | VhostUserProtocolFeatures::BACKEND_REQ;
        }
        if terms.survives {
            wanted |= VhostUserProtocolFeatures::RARP | VhostUserProtocolFeatures::MTU;
        }
        wanted
    }

    /// What is said once, before any ring.
    fn agree(&self, link: &mut Link) -> Result<(), VhostUserError> {
        let terms = &self.shared.terms;
        if link.protocol.contains(VhostUserProtocolFeatures::MQ) {
            let found = messages::ask(&link.stream, messages::GET_QUEUE_NUM);
            let found = found.map_err(refused_io("tell its number of queues"))?;
            if found < terms.queue_number {
                let wanted = terms.queue_number;
                return Err(VhostUserError::Queues { found, wanted });
            }
        }
        if let Some(mtu) = terms.mtu
            && link.protocol.contains(VhostUserProtocolFeatures::MTU)
        {
            let told = messages::tell(&link.stream, messages::NET_SET_MTU, mtu.into());
            told.map_err(refused_io("take the MTU"))?;
        }
        if terms.config_bytes == 0 {
            return Ok(());
        }
        if !link.protocol.contains(VhostUserProtocolFeatures::CONFIG) {
            return Err(VhostUserError::NoConfiguration);
        }
        if link
            .protocol
            .contains(VhostUserProtocolFeatures::BACKEND_REQ)
        {
            let (ours, its) = UnixStream::pair().map_err(VhostUserError::Host)?;
            ours.set_nonblocking(true).map_err(VhostUserError::Host)?;
            let set = link.frontend.set_backend_request_fd(&its);
            set.map_err(refused("take a channel for its own messages"))?;
            link.notices = Some(ours);
        }
        let config = configuration(link, terms.config_bytes)?;
        *self.shared.lock_config() = config;
        Ok(())
    }

    /// Gives the backend a ring, or keeps it for the next one. `false`: there is nobody, and none can go on with it.
    pub(super) fn start(&mut self, ring: usize, given: Ring) -> bool {
        if self.link.is_some() || self.shared.terms.survives {
            self.rings[ring] = Some(given);
            self.serve(ring);
        }
        self.rings[ring].is_some()
    }

    /// Does nothing without a ring, or without a backend.
    fn serve(&mut self, index: usize) {
        let alone = !self.rings.iter().flatten().any(|ring| ring.served);
        let Some(link) = &mut self.link else { return };
        let Some(ring) = self.rings[index].as_mut() else {
            return;
        };
        // Features and memory are said once: saying it again while rings are served makes some backends map memory
        // anew under their own feet.
        let logged = self.is_logged;
        let told = match alone {
            true => tell_device(link, ring, logged).and_then(|()| match logged {
                true => tell_log(link, &self.shared, ring),
                false => Ok(()),
            }),
            false => Ok(()),
        };
        match told.and_then(|()| tell_ring(link, index, ring, logged)) {
            Ok(()) => ring.served = true,
            Err(error) => self.lose(&format!("ring {index}: {error}")),
        }
    }

    /// Takes a ring back, when the backend has finished what it took: where it stands, if the backend could tell.
    pub(super) fn take_back(&mut self, index: usize) -> Option<u16> {
        let ring = self.rings[index].take()?;
        let link = self.link.as_mut().filter(|_| ring.served)?;
        let mut taken = match self.shared.terms.completes {
            true => settle(link, &ring).map_err(vhost::Error::IOError),
            false => Ok(()),
        };
        if link.features & PROTOCOL != 0 {
            taken = taken.and_then(|()| link.frontend.set_vring_enable(index, false));
        }
        let base = taken.and_then(|()| link.frontend.get_vring_base(index));
        self.shared.note_writes();
        match base {
            Ok(base) => Some(u16::try_from(base & 0xffff).expect("masked")),
            Err(error) => {
                mark_used(&ring.memory, &ring.state);
                self.lose(&format!("take ring {index} back: {error}"));
                None
            }
        }
    }

    /// Has a ring looked at, or not.
    pub(super) fn enable(&mut self, index: usize, enabled: bool) {
        let Some(ring) = self.rings[index].as_mut() else {
            return;
        };
        ring.enabled = enabled;
        let link = self.link.as_mut().filter(|link| {
            // Without these its rings are enabled from the start, for good.
            ring.served && link.features & PROTOCOL != 0
        });
        if let Some(link) = link
            && let Err(error) = link.frontend.set_vring_enable(index, enabled)
        {
            self.lose(&format!("enable ring {index}: {error}"));
        }
    }

    /// Whether the backend notes from now on which pages it writes, and its successors. Fails when it says no; without
    /// one nothing is written.
    pub(super) fn log_writes(&mut self, on: bool) -> Result<(), VhostUserError> {
        self.is_logged = on;
        let served: Vec<_> = (0..self.rings.len())
            .filter(|index| self.rings[*index].as_ref().is_some_and(|ring| ring.served))
            .collect();
        // Otherwise it is said with the first ring.
        let (Some(link), Some(first)) = (&mut self.link, served.first()) else {
            return Ok(());
        };
        if on && !link.can_log() {
            return Err(VhostUserError::NoLog);
        }
        let ring = |index: usize| self.rings[index].as_ref().expect("it is served");
        let mut told = match on {
            true => tell_log(link, &self.shared, ring(*first)),
            false => Ok(()),
        };
        told = told.and_then(|()| tell_features(link, ring(*first), on));
        for index in &served {
            let place = || place(ring(*index), on);
            told = told.and_then(|()| link.frontend.set_vring_addr(*index, &place()?));
        }
        match told {
            Err(source @ vhost::Error::VhostUserProtocol(ProtocolError::BackendInternalError)) => {
                let what = "change whether it logs what it writes";
                Err(VhostUserError::Refused { what, source })
            }
            Err(error) => {
                self.lose(&format!("log what it writes: {error}"));
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }

    /// The driver changed configuration.
    pub(super) fn configure(&mut self, offset: usize, data: &[u8]) {
        let Some(link) = &mut self.link else { return };
        let at = u32::try_from(offset).expect("within the configuration space");
        let set = link.frontend.set_config(at, BY_DRIVER, data);
        match set {
            Ok(()) => {
                let mut config = self.shared.lock_config();
                if let Some(part) = config.get_mut(offset..offset + data.len()) {
                    part.copy_from_slice(data);
                }
            }
            Err(error) => self.lose(&format!("configure: {error}")),
        }
    }

    /// Has the backend send a frame that shows where the guest is.
    pub(super) fn announce(&mut self, mac: [u8; 6]) -> bool {
        let Some(link) = &mut self.link else {
            return false;
        };
        if !link.protocol.contains(VhostUserProtocolFeatures::RARP) {
            return false;
        }
        let [a, b, c, d, e, f] = mac;
        let value = u64::from_le_bytes([a, b, c, d, e, f, 0, 0]);
        match messages::tell(&link.stream, messages::SEND_RARP, value) {
            Ok(()) => true,
            Err(error) => {
                self.lose(&format!("announce: {error}"));
                false
            }
        }
    }

    fn take_notices(&mut self) {
        let mut changed = false;
        let Some(link) = &mut self.link else { return };
        while let Some(notices) = &link.notices {
            match messages::take_notice(notices) {
                Ok(one) => changed |= one,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => link.notices = None,
            }
        }
        if !changed {
            return;
        }
        match configuration(link, self.shared.terms.config_bytes) {
            Ok(config) => {
                *self.shared.lock_config() = config;
                self.shared.tell(Event::Configured);
            }
            Err(error) => self.lose(&error.to_string()),
        }
    }

    /// The backend is gone, or as good as that.
    fn lose(&mut self, why: &str) {
        if self.link.take().is_none() {
            return;
        }
        *self.shared.lock_stream() = None;
        self.shared.alive.store(false, Ordering::Release);
        for ring in self.rings.iter_mut().flatten() {
            if std::mem::take(&mut ring.served) {
                mark_used(&ring.memory, &ring.state);
            }
        }
        self.shared.note_writes();
        let reconnects = self.shared.reconnect.is_some();
        let device = &self.shared.name;
        tracing::error!(device, why, reconnects, "vhost-user: the backend is gone");
        self.shared.tell(Event::Gone);
        if !self.shared.terms.survives {
            // Their driver has to begin anew; until then nobody may serve them.
            self.rings.iter_mut().for_each(|ring| *ring = None);
        }
    }

    fn look_for_another(&mut self) {
        let wanted = self.met && self.link.is_none();
        let Some(path) = self.shared.reconnect.clone().filter(|_| wanted) else {
            return;
        };
        if self.looked.is_some_and(|looked| looked.elapsed() < RETRY) {
            return;
        }
        self.looked = Some(Instant::now());
        let found = unix::connect(&path).map_err(VhostUserError::Connect);
        if let Err(error) = found.and_then(|stream| self.meet(stream)) {
            *self.shared.lock_stream() = None;
            let why = format!("{error}: {}", source(&error));
            if why != self.last_refusal {
                let device = &self.shared.name;
                tracing::info!(device, why, "vhost-user: no backend yet");
                self.last_refusal = why;
            }
            return;
        }
        self.last_refusal.clear();
        for index in 0..self.rings.len() {
            if let Some(ring) = &mut self.rings[index] {
                // What was taken and not used is offered again.
                ring.state.next_used = used_index(&ring.memory, &ring.state);
                ring.state.next_avail = ring.state.next_used;
            }
            self.serve(index);
        }
        if self.link.is_some() {
            tracing::info!(device = self.shared.name, "vhost-user: a backend is there");
            self.shared.tell(Event::Back);
        }
    }
}

fn source(error: &dyn std::error::Error) -> String {
    let source = error.source().map(ToString::to_string);
    source.unwrap_or_default()
}

/// Waits until the backend has used all that the driver has offered on a ring, but not for long: the driver may have
/// offered nonsense, or go on offering. An error says that the connection has ended.
fn settle(link: &Link, ring: &Ring) -> io::Result<()> {
    let deadline = Instant::now() + SETTLE_MAX;
    // The driver may have been held just before it rang.
    ring.doorbell.write(1)?;
    loop {
        let offered = offered_index(&ring.memory, &ring.state);
        let left = offered.wrapping_sub(used_index(&ring.memory, &ring.state));
        if left == 0 || left > ring.state.size || Instant::now() > deadline {
            return Ok(());
        }
        let mut end = [PollFd::new(&link.stream, PollFlags::RDHUP)];
        let look = SETTLE_LOOK.try_into().expect("a millisecond");
        if matches!(poll(&mut end, Some(&look)), Ok(count) if count > 0) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
}

/// What the driver accepted, and guest memory.
fn tell_device(link: &mut Link, ring: &Ring, logged: bool) -> Result<(), vhost::Error> {
    let memory = ring.memory.memory();
    let regions = memory.iter();
    let regions: Result<Vec<_>, _> = regions
        .map(VhostUserMemoryRegionInfo::from_guest_region)
        .collect();
    tell_features(link, ring, logged)?;
    link.frontend.set_mem_table(&regions?)?;
    Ok(())
}

fn tell_features(link: &mut Link, ring: &Ring, logged: bool) -> Result<(), vhost::Error> {
    let log = if logged { LOG_ALL } else { 0 };
    let features = (ring.features | PROTOCOL) & link.features;
    link.frontend.set_features(features | log)
}

/// Where to note pages, after memory: some backends keep it with that.
fn tell_log(link: &mut Link, shared: &Shared, ring: &Ring) -> Result<(), vhost::Error> {
    let mut log = shared.lock_log();
    let log = match &*log {
        Some(log) => log.clone(),
        None => {
            let new = PageLog::new(ring.memory.clone()).map_err(vhost::Error::IOError)?;
            log.insert(Arc::new(new)).clone()
        }
    };
    let told = messages::set_log(&link.stream, log.file(), log.size());
    told.map_err(vhost::Error::IOError)
}

/// Where a ring is; its used part's address is for the log, too, by which writes to that are noted.
fn place(ring: &Ring, logged: bool) -> Result<VringConfigData, vhost::Error> {
    let state = &ring.state;
    let memory = ring.memory.memory();
    let host = |address: u64| {
        let pointer = memory.get_host_address(GuestAddress(address));
        let pointer = pointer.map_err(|error| vhost::Error::IOError(io::Error::other(error)));
        pointer.map(|pointer| pointer as u64)
    };
    let flags = match logged {
        true => VhostUserVringAddrFlags::VHOST_VRING_F_LOG,
        false => VhostUserVringAddrFlags::empty(),
    };
    Ok(VringConfigData {
        queue_max_size: state.max_size,
        queue_size: state.size,
        flags: flags.bits(),
        desc_table_addr: host(state.desc_table)?,
        used_ring_addr: host(state.used_ring)?,
        avail_ring_addr: host(state.avail_ring)?,
        log_addr: logged.then_some(state.used_ring),
    })
}

fn tell_ring(link: &mut Link, index: usize, ring: &Ring, logged: bool) -> Result<(), vhost::Error> {
    let state = &ring.state;
    let place = place(ring, logged)?;
    let frontend = &mut link.frontend;
    frontend.set_vring_num(index, state.size)?;
    frontend.set_vring_base(index, state.next_avail)?;
    frontend.set_vring_addr(index, &place)?;
    frontend.set_vring_call(index, &ring.call)?;
    frontend.set_vring_kick(index, &ring.doorbell)?;
    if link.features & PROTOCOL != 0 {
        frontend.set_vring_enable(index, ring.enabled)?;
    }
    // Buffers that were offered to another server have no doorbell of their own any more.
    ring.doorbell.write(1).map_err(vhost::Error::IOError)
}

/// Reads the whole configuration space.
fn configuration(link: &mut Link, bytes: usize) -> Result<Vec<u8>, VhostUserError> {
    let size = u32::try_from(bytes).expect("a 16-bit number");
    let read = link
        .frontend
        .get_config(0, size, VhostUserConfigFlags::empty(), &vec![0; bytes]);
    let (_, config) = read.map_err(refused("tell its configuration"))?;
    Ok(config)
}

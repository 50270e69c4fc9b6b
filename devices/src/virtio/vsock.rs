// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Socket device, VIRTIO 1.2 §5.10: streams between programs of the guest (AF_VSOCK) and Unix sockets of the host.
//!
//! ```text
//!  transmit queue ──► packets of the guest ──► muxer ──► Unix streams
//!  receive queue  ◄── answers and data     ◄── muxer ◄── (one poll for all of them)
//!  event queue    ◄── "all connections are gone", after a restore
//! ```
//! Or the kernel serves the first two, and the host's programs have AF_VSOCK sockets too (`kernel`).
//!
//! Not here: datagrams, sequenced packets (but for the kernel's), sockets between guests.

mod connection;
mod kernel;
mod muxer;
mod packet;

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use atoll_thread::Kind;
use serde::{Deserialize, Serialize};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use self::kernel::Kernel;
use self::muxer::Muxer;
use self::packet::{HEADER_BYTES, Header};
use super::worker::{self, Progress, QueueHandler};
use super::{
    Act, Chain, DeviceQueue, QueueError, QueueStart, StartError, StartedQueue, VirtioDevice,
    device_id,
};
use crate::counters::{Counter, CounterList};
use crate::state::{DeviceState, Saved, SavedState, StateError, same};

pub use self::kernel::VhostVsockFile;

/// Entries of every queue.
const QUEUE_SIZE: u16 = 256;
/// Data of one packet at most, `VIRTIO_VSOCK_MAX_PKT_BUF_SIZE` of Linux.
const DATA_BYTES_MAX: usize = 64 << 10;
/// Queues, §5.10.2.
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`, §5.10.6.8.
const TRANSPORT_RESET: [u8; 4] = [0; 4];

#[derive(Default)]
struct Counters {
    received: Counter,
    sent: Counter,
}

struct Shared {
    /// Connections and streams. Held for one packet's worth of non-blocking work.
    muxer: Mutex<Muxer>,
    /// There is something to send to the guest.
    wake: EventFd,
    counters: Counters,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Muxer> {
        self.muxer.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Who is at the other end of the guest's sockets.
enum Host {
    /// Unix sockets.
    Sockets(Arc<Shared>),
    /// AF_VSOCK sockets.
    Kernel(Arc<Kernel>),
}

/// The socket device, VIRTIO 1.2 §5.10, whose host end are Unix sockets: one poll for all connections.
pub struct Vsock {
    cid: u64,
    host: Host,
    /// The guest's connections did not survive (a restore), and it has not been told.
    reset_event: Arc<AtomicBool>,
}

impl Vsock {
    /// For a guest with the address `cid`, 3 or more, whose host's programs connect to `listener`, which is bound
    /// to `path`; the guest reaches the sockets `path_PORT`.
    pub fn new(cid: u32, path: PathBuf, listener: UnixListener) -> io::Result<Self> {
        let cid = u64::from(cid);
        let shared = Shared {
            muxer: Mutex::new(Muxer::new(cid, path, listener)?),
            wake: EventFd::new(EFD_NONBLOCK)?,
            counters: Counters::default(),
        };
        Ok(Self::with(cid, Host::Sockets(Arc::new(shared))))
    }

    /// For a guest with the address `cid` that the kernel has reserved with `file`.
    pub fn in_kernel(cid: u32, file: VhostVsockFile) -> io::Result<Self> {
        let kernel = Arc::new(Kernel::new(file)?);
        Ok(Self::with(cid.into(), Host::Kernel(kernel)))
    }

    fn with(cid: u64, host: Host) -> Self {
        Self {
            cid,
            host,
            reset_event: Arc::default(),
        }
    }
}

impl VirtioDevice for Vsock {
    fn device_id(&self) -> u16 {
        device_id::VSOCK
    }

    fn features(&self) -> u64 {
        match &self.host {
            Host::Sockets(_) => 0,
            Host::Kernel(kernel) => kernel.features,
        }
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 3]
    }

    fn config_read(&self, offset: u64, data: &mut [u8]) {
        super::read_config(&self.cid.to_le_bytes(), offset, data);
    }

    fn start_queue(&self, start: QueueStart) -> Result<Box<dyn StartedQueue>, StartError> {
        let chain = Chain::new();
        if start.index > TRANSMIT {
            let reset_event = self.reset_event.clone();
            let handler = Box::new(Events { reset_event, chain });
            return worker::spawn(Kind::Vsock, "vsock-event", start, handler);
        }
        let shared = match &self.host {
            Host::Sockets(shared) => shared.clone(),
            Host::Kernel(kernel) => return kernel.start(&start),
        };
        let (name, handler): (_, Box<dyn QueueHandler>) = match start.index {
            RECEIVE => {
                let poll = shared.lock().poll_fd();
                let data = vec![0; DATA_BYTES_MAX];
                let handler = ToGuest {
                    shared,
                    poll,
                    chain,
                    data,
                };
                ("vsock-rx", Box::new(handler))
            }
            _ => {
                let data = vec![0; DATA_BYTES_MAX];
                let handler = FromGuest {
                    shared,
                    chain,
                    data,
                };
                ("vsock-tx", Box::new(handler))
            }
        };
        worker::spawn(Kind::Vsock, name, start, handler)
    }

    fn reset(&self) {
        if let Host::Sockets(shared) = &self.host {
            shared.lock().clear();
        }
        self.reset_event.store(false, Ordering::Release);
    }

    fn obstacle(&self, act: Act) -> Option<String> {
        let in_kernel = matches!(self.host, Host::Kernel(_));
        (in_kernel && act == Act::Migration).then(|| {
            "what vhost-vsock writes into memory is not logged: start the machine with --vsock cid=,socket= to migrate"
                .to_owned()
        })
    }

    /// What the kernel carries, it does not count.
    fn counters(&self) -> CounterList {
        let Host::Sockets(shared) = &self.host else {
            return Vec::new();
        };
        let counters = &shared.counters;
        vec![
            ("received_bytes", counters.received.value()),
            ("sent_bytes", counters.sent.value()),
            ("connections", shared.lock().connection_count() as u64),
        ]
    }
}

/// Connections stay with the host that they were made on.
#[derive(Serialize, Deserialize)]
struct VsockState {
    cid: u64,
}

impl SavedState for VsockState {
    const KIND: &'static str = "virtio-vsock";
    const VERSION: u32 = 1;
}

impl DeviceState for Vsock {
    fn save(&self) -> Saved {
        Saved::of(&VsockState { cid: self.cid })
    }

    fn restore(&self, saved: &Saved) -> Result<(), StateError> {
        let state: VsockState = saved.open()?;
        same::<VsockState, _>("the guest's address", state.cid, self.cid)?;
        self.reset_event.store(true, Ordering::Release);
        Ok(())
    }
}

/// Host to guest.
struct ToGuest {
    shared: Arc<Shared>,
    poll: RawFd,
    chain: Chain,
    data: Vec<u8>,
}

impl QueueHandler for ToGuest {
    fn sources(&self) -> Vec<(RawFd, EventSet)> {
        let wake = self.shared.wake.as_raw_fd();
        vec![(wake, EventSet::IN), (self.poll, EventSet::IN)]
    }

    fn process(&mut self, queue: &mut DeviceQueue) -> Result<Progress, QueueError> {
        queue.disable_doorbell()?;
        self.shared.lock().look();
        for _ in 0..queue.size() {
            if !self.shared.lock().has_more() {
                // Buffers that come in need no doorbell until there is something to put into them.
                queue.signal()?;
                return Ok(Progress::Sleep);
            }
            if !queue.pop(&mut self.chain)? {
                queue.signal()?;
                let more = queue.enable_doorbell()?;
                return Ok(Progress::again_if(more));
            }
            let buffers = self.chain.writable();
            let room = usize::try_from(buffers.size()).unwrap_or(usize::MAX);
            let Some(room) = room.checked_sub(HEADER_BYTES).filter(|room| *room > 0) else {
                return Err(self.chain.malformed("no room for a packet"));
            };
            let mut muxer = self.shared.lock();
            let Some((header, data)) = muxer.send(room, &mut self.data) else {
                drop(muxer);
                queue.undo_pop(1);
                continue;
            };
            buffers.write(&header.bytes(muxer.cid()));
            drop(muxer);
            if let Some(rest) = buffers.skip(HEADER_BYTES as u64) {
                rest.write(data);
            }
            self.shared.counters.received.add(data.len() as u64);
            let size =
                u32::try_from(HEADER_BYTES + data.len()).expect("at most 64 KiB and a header");
            queue.push(self.chain.head(), size)?;
        }
        queue.signal()?;
        Ok(Progress::Again)
    }
}

/// Guest to host.
struct FromGuest {
    shared: Arc<Shared>,
    chain: Chain,
    data: Vec<u8>,
}

impl QueueHandler for FromGuest {
    fn process(&mut self, queue: &mut DeviceQueue) -> Result<Progress, QueueError> {
        queue.disable_doorbell()?;
        for _ in 0..queue.size() {
            if !queue.pop(&mut self.chain)? {
                break;
            }
            let packet = self.chain.readable();
            let mut header = [0; HEADER_BYTES];
            if packet.read(&mut header) < HEADER_BYTES {
                return Err(self.chain.malformed("no whole header"));
            }
            let rest = packet.skip(HEADER_BYTES as u64);
            let rest = rest.expect("the header was there");
            let mut muxer = self.shared.lock();
            if let Some(header) = Header::parse(&header, muxer.cid()) {
                let size = u64::from(header.size);
                let data = rest.take(size).filter(|_| size <= DATA_BYTES_MAX as u64);
                let Some(data) = data else {
                    return Err(self.chain.malformed("a packet of impossible size"));
                };
                let count = data.read(&mut self.data);
                muxer.receive(&header, &self.data[..count]);
                self.shared.counters.sent.add(size);
            }
            drop(muxer);
            queue.push(self.chain.head(), 0)?;
        }
        queue.signal()?;
        if self.shared.lock().has_more() {
            // Fails only when its counter is full: then the thread is awake anyway.
            let _ = self.shared.wake.write(1);
        }
        let more = queue.enable_doorbell()?;
        Ok(Progress::again_if(more))
    }
}

/// What happens to the device as a whole.
struct Events {
    reset_event: Arc<AtomicBool>,
    chain: Chain,
}

impl QueueHandler for Events {
    fn process(&mut self, queue: &mut DeviceQueue) -> Result<Progress, QueueError> {
        if self.reset_event.load(Ordering::Acquire) && queue.pop(&mut self.chain)? {
            if self.chain.writable().write(&TRANSPORT_RESET) < TRANSPORT_RESET.len() {
                return Err(self.chain.malformed("no room for an event"));
            }
            queue.push(self.chain.head(), 4)?;
            queue.signal()?;
            self.reset_event.store(false, Ordering::Release);
        }
        Ok(Progress::Sleep)
    }
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A device whose queues another process serves, by the vhost-user protocol (QEMU, `docs/interop/vhost-user.rst`).
//! First use: virtio-fs (VIRTIO 1.2 §5.11), a directory of the host by `virtiofsd`.
//!
//! The other process maps guest memory, so that this must be a file's (a memfd). It finds the rings where the driver
//! put them, and shares doorbell and interrupt with us as eventfds. What it writes is in no log of written pages, and
//! what it knows of open files is its own: such a machine can be neither saved nor migrated.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vhost::vhost_user::{
    Frontend, VhostUserFrontend, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_queue::QueueState;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryBackend};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{QueueStart, StartError, StartedQueue, VirtioDevice, device_id};
use crate::memory::Memory;
use crate::state::{DeviceState, Saved, SavedState, StateError};

/// Entries of each queue.
const QUEUE_SIZE: u16 = 256;
/// What the transport offers to every driver, and the backend must know: indirect descriptors, event index, and
/// version 1.
const NEEDED: u64 = 1 << 28 | 1 << 29 | 1 << 32;
/// Bytes of a tag, §5.11.4.
pub const TAG_BYTES_MAX: usize = 36;

/// Why the other process does not serve the device.
#[derive(Debug, thiserror::Error)]
pub enum VhostUserError {
    /// It said no, or went away.
    #[error("{what}")]
    Refused {
        /// What it was asked.
        what: &'static str,
        /// Its answer.
        source: vhost::Error,
    },
    /// It is too old, or something else.
    #[error("the backend has features {features:#x}, {NEEDED:#x} are needed")]
    Features {
        /// What it has.
        features: u64,
    },
}

/// The other process.
struct Backend {
    /// One message at a time, each with its answer. Leaf lock.
    frontend: Mutex<Frontend>,
    features: u64,
    has_protocol: bool,
}

impl Backend {
    fn lock(&self) -> MutexGuard<'_, Frontend> {
        self.frontend.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A directory of the host.
pub struct VhostUserFs {
    tag: String,
    backend: Arc<Backend>,
}

/// Queues of a file system: one for urgent requests, one for all others.
const FS_QUEUES: usize = 2;

impl VhostUserFs {
    /// For the process at the other end of `stream`; the guest mounts it as `tag`, of 1 to 36 bytes.
    pub fn new(tag: &str, stream: UnixStream) -> Result<Self, VhostUserError> {
        let refused = |what| move |source| VhostUserError::Refused { what, source };
        let mut frontend = Frontend::from_stream(stream, FS_QUEUES as u64);
        frontend.set_owner().map_err(refused("become its owner"))?;
        let features = frontend
            .get_features()
            .map_err(refused("ask its features"))?;
        if features & NEEDED != NEEDED {
            return Err(VhostUserError::Features { features });
        }
        let protocol = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        let has_protocol = features & protocol != 0;
        if has_protocol {
            let known = frontend
                .get_protocol_features()
                .map_err(refused("ask its protocol features"))?;
            let wanted = VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::REPLY_ACK;
            frontend
                .set_protocol_features(known & wanted)
                .map_err(refused("set its protocol features"))?;
        }
        Ok(Self {
            tag: tag.to_owned(),
            backend: Arc::new(Backend {
                frontend: Mutex::new(frontend),
                features,
                has_protocol,
            }),
        })
    }
}

impl VirtioDevice for VhostUserFs {
    fn device_id(&self) -> u16 {
        device_id::FS
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; FS_QUEUES]
    }

    /// The tag, padded with zeroes, and the number of request queues.
    fn config_read(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; TAG_BYTES_MAX + 4];
        let tag = self.tag.as_bytes();
        let size = tag.len().min(TAG_BYTES_MAX);
        config[..size].copy_from_slice(&tag[..size]);
        config[TAG_BYTES_MAX] = 1;
        super::read_config(&config, offset, data);
    }

    fn start_queue(&self, start: QueueStart) -> Result<Box<dyn StartedQueue>, StartError> {
        let index = start.index;
        self.backend
            .start(&start)
            .map_err(|source| StartError { index, source })?;
        Ok(Box::new(Served {
            backend: self.backend.clone(),
            index: index.into(),
            state: start.queue.state(),
            memory: start.queue.memory().clone(),
        }))
    }
}

impl Backend {
    fn start(&self, start: &QueueStart) -> io::Result<()> {
        let index = usize::from(start.index);
        let memory = start.queue.memory().memory();
        let regions: Result<Vec<_>, _> = memory
            .iter()
            .map(VhostUserMemoryRegionInfo::from_guest_region)
            .collect();
        let state = start.queue.state();
        let host = |address: u64| {
            let pointer = memory.get_host_address(GuestAddress(address));
            pointer
                .map(|pointer| pointer as u64)
                .map_err(io::Error::other)
        };
        let place = VringConfigData {
            queue_max_size: state.max_size,
            queue_size: state.size,
            flags: 0,
            desc_table_addr: host(state.desc_table)?,
            used_ring_addr: host(state.used_ring)?,
            avail_ring_addr: host(state.avail_ring)?,
            log_addr: None,
        };
        let call = match start.queue.interrupt().event()? {
            Some(event) => event,
            None => EventFd::new(EFD_NONBLOCK)?,
        };
        let protocol = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        let features = (start.features | protocol) & self.features;
        let mut frontend = self.lock();
        let tell = || {
            // Said again with every queue: it changes nothing, and no order of queues has to be known.
            frontend.set_features(features)?;
            frontend.set_mem_table(&regions?)?;
            frontend.set_vring_num(index, state.size)?;
            frontend.set_vring_base(index, state.next_avail)?;
            frontend.set_vring_addr(index, &place)?;
            frontend.set_vring_call(index, &call)?;
            frontend.set_vring_kick(index, &start.doorbell)?;
            if self.has_protocol {
                frontend.set_vring_enable(index, true)?;
            }
            Ok::<_, vhost::Error>(())
        };
        tell().map_err(io::Error::other)
    }
}

/// A queue in the other process's hands.
struct Served {
    backend: Arc<Backend>,
    index: usize,
    state: QueueState,
    memory: Memory,
}

impl StartedQueue for Served {
    fn stop(self: Box<Self>) -> QueueState {
        // A vCPU that resets the device may not talk to sockets itself.
        atoll_thread::in_starter(move || self.take_back())
    }
}

impl Served {
    fn take_back(&self) -> QueueState {
        let mut frontend = self.backend.lock();
        if self.backend.has_protocol
            && let Err(error) = frontend.set_vring_enable(self.index, false)
        {
            tracing::warn!(queue = self.index, %error, "vhost-user: disable");
        }
        // It answers when it has finished what it took, and touches nothing any more.
        let base = frontend.get_vring_base(self.index);
        drop(frontend);
        let next_avail = match base {
            Ok(base) => u16::try_from(base & 0xffff).expect("masked"),
            Err(error) => {
                tracing::warn!(queue = self.index, %error, "vhost-user: the backend is gone");
                self.state.next_avail
            }
        };
        let index = GuestAddress(self.state.used_ring.wrapping_add(2));
        let used: Result<u16, _> = self.memory.memory().load(index, Ordering::Acquire);
        QueueState {
            next_avail,
            next_used: used.map_or(self.state.next_used, u16::from_le),
            ..self.state
        }
    }
}

/// The other process keeps what matters; a machine with such a device is refused by the snapshot.
#[derive(serde::Serialize, serde::Deserialize)]
struct FsState {
    tag: String,
}

impl SavedState for FsState {
    const KIND: &'static str = "virtio-fs";
    const VERSION: u32 = 1;
}

impl DeviceState for VhostUserFs {
    fn save(&self) -> Saved {
        let tag = self.tag.clone();
        Saved::of(&FsState { tag })
    }

    fn restore(&self, _saved: &Saved) -> Result<(), StateError> {
        Err(StateError::Differs {
            kind: FsState::KIND,
            what: "the files that the guest had open are gone: stop it, and start it anew"
                .to_owned(),
        })
    }
}

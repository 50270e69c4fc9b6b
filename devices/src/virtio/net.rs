// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Network card, VIRTIO 1.2 §5.1, on a tap: one pair of queues, each with its own thread.
//!
//! The tap speaks the same 12-byte header as the driver (`virtio_net_hdr_v1`), so that checksums and segmentation
//! that one side leaves to the other cross the boundary as they are. Guest to host: straight from guest pages.
//! Host to guest: through one buffer, since only a read tells how many of the driver's buffers a packet takes.

mod tap;

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use atoll_thread::Kind;
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_UFO, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_UFO, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS,
};
use vmm_sys_util::epoll::EventSet;

pub use self::tap::{HEADER_BYTES, Tap, TapError};
use super::worker::{self, Progress, QueueHandler};
use super::{
    Chain, DeviceInterrupts, DeviceQueue, QueueError, QueueStart, StartError, StartedQueue,
    VirtioDevice, device_id,
};
use crate::counters::{Counter, CounterList};
use crate::state::{DeviceState, Saved, SavedState, StateError, same};

/// Entries of both queues.
const QUEUE_SIZE: u16 = 256;
/// Queue from the host to the guest.
const RECEIVE: u16 = 0;
/// Largest packet, with its header: 64 KiB of IP and an Ethernet header with a VLAN tag.
const PACKET_BYTES_MAX: usize = HEADER_BYTES + 65_535 + 18;
/// Smallest packet worth sending: an Ethernet header.
const FRAME_BYTES_MIN: u64 = 14;
/// Where the header counts the buffers of a packet, §5.1.6.
const NUM_BUFFERS: usize = 10;

/// What a card is made of.
pub struct NetOptions {
    /// In logs and thread names: `net0`.
    pub name: String,
    /// The host's end.
    pub tap: Tap,
    /// Address that the guest reads.
    pub mac: [u8; 6],
    /// MTU that the guest reads; none is announced when absent.
    pub mtu: Option<u16>,
}

#[derive(Default)]
struct Counters {
    received: Counter,
    received_bytes: Counter,
    sent: Counter,
    sent_bytes: Counter,
    dropped: Counter,
}

/// What the queues' threads and the control side share.
struct Shared {
    link_up: AtomicBool,
    counters: Counters,
}

/// The card.
pub struct Net {
    name: String,
    tap: Arc<Tap>,
    /// Changed only by a restore, since the address may be a random one. Leaf lock, held for a copy.
    mac: Mutex<[u8; 6]>,
    mtu: Option<u16>,
    shared: Arc<Shared>,
    /// Leaf lock: how to tell the driver of changes, once there is one.
    interrupts: Mutex<Option<DeviceInterrupts>>,
}

impl Net {
    /// A card on `options.tap`.
    pub fn new(options: NetOptions) -> Self {
        Self {
            name: options.name,
            tap: Arc::new(options.tap),
            mac: Mutex::new(options.mac),
            mtu: options.mtu,
            shared: Arc::new(Shared {
                link_up: AtomicBool::new(true),
                counters: Counters::default(),
            }),
            interrupts: Mutex::default(),
        }
    }

    /// Pulls the plug or puts it in: without it packets are lost in both directions, and the guest is told.
    pub fn set_link(&self, up: bool) {
        if self.shared.link_up.swap(up, Ordering::AcqRel) != up {
            let interrupts = self.lock_interrupts().clone();
            if let Some(interrupts) = interrupts {
                interrupts.config_changed();
            }
        }
    }

    /// Whether the plug is in.
    pub fn link_up(&self) -> bool {
        self.shared.link_up.load(Ordering::Acquire)
    }

    fn lock_interrupts(&self) -> MutexGuard<'_, Option<DeviceInterrupts>> {
        self.interrupts
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn mac(&self) -> [u8; 6] {
        *self.mac.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `struct virtio_net_config` up to `mtu`, §5.1.4.
    fn config(&self) -> [u8; 12] {
        let mut config = [0; 12];
        // Bit 0: VIRTIO_NET_S_LINK_UP.
        config[0..6].copy_from_slice(&self.mac());
        config[6] = u8::from(self.link_up());
        config[8..10].copy_from_slice(&1u16.to_le_bytes());
        config[10..12].copy_from_slice(&self.mtu.unwrap_or(0).to_le_bytes());
        config
    }
}

impl VirtioDevice for Net {
    fn device_id(&self) -> u16 {
        device_id::NET
    }

    fn features(&self) -> u64 {
        let offloads = [
            VIRTIO_NET_F_CSUM,
            VIRTIO_NET_F_GUEST_CSUM,
            VIRTIO_NET_F_GUEST_TSO4,
            VIRTIO_NET_F_GUEST_TSO6,
            VIRTIO_NET_F_GUEST_ECN,
            VIRTIO_NET_F_HOST_TSO4,
            VIRTIO_NET_F_HOST_TSO6,
            VIRTIO_NET_F_HOST_ECN,
        ];
        let fragmentation = [VIRTIO_NET_F_GUEST_UFO, VIRTIO_NET_F_HOST_UFO];
        let plain = [
            VIRTIO_NET_F_MAC,
            VIRTIO_NET_F_MRG_RXBUF,
            VIRTIO_NET_F_STATUS,
        ];
        let bits = |list: &[u32]| list.iter().fold(0, |bits, bit| bits | 1u64 << bit);
        let mtu = u64::from(self.mtu.is_some()) << VIRTIO_NET_F_MTU;
        let ufo = if self.tap.takes_ufo() {
            bits(&fragmentation)
        } else {
            0
        };
        bits(&offloads) | bits(&plain) | ufo | mtu
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 2]
    }

    fn config_read(&self, offset: u64, data: &mut [u8]) {
        super::read_config(&self.config(), offset, data);
    }

    fn connect(&self, interrupts: DeviceInterrupts) {
        *self.lock_interrupts() = Some(interrupts);
    }

    fn reset(&self) {
        *self.lock_interrupts() = None;
    }

    fn start_queue(&self, start: QueueStart) -> Result<Box<dyn StartedQueue>, StartError> {
        let index = start.index;
        let (tap, shared) = (self.tap.clone(), self.shared.clone());
        if index == RECEIVE {
            let offloads = tap::offloads(start.features);
            tap.set_offloads(offloads)
                .map_err(|source| StartError { index, source })?;
            let handler = Receive {
                tap,
                shared,
                merge: start.features & 1 << VIRTIO_NET_F_MRG_RXBUF != 0,
                packet: vec![0; PACKET_BYTES_MAX],
                waiting: 0,
                chains: Vec::new(),
                held: 0,
            };
            worker::spawn(
                Kind::Net,
                &format!("{}-rx", self.name),
                start,
                Box::new(handler),
            )
        } else {
            let handler = Transmit {
                tap,
                shared,
                chain: Chain::new(),
                packet: vec![0; PACKET_BYTES_MAX],
            };
            worker::spawn(
                Kind::Net,
                &format!("{}-tx", self.name),
                start,
                Box::new(handler),
            )
        }
    }

    fn counters(&self) -> CounterList {
        let counters = &self.shared.counters;
        vec![
            ("received", counters.received.value()),
            ("received_bytes", counters.received_bytes.value()),
            ("sent", counters.sent.value()),
            ("sent_bytes", counters.sent_bytes.value()),
            ("dropped", counters.dropped.value()),
        ]
    }
}

/// What the guest has seen of the card, beside the transport.
#[derive(Serialize, Deserialize)]
struct NetState {
    mac: [u8; 6],
    /// 0 when none was announced.
    mtu: u16,
    /// Whether the plug is in.
    link_up: bool,
}

impl SavedState for NetState {
    const KIND: &'static str = "virtio-net";
    const VERSION: u32 = 1;
}

impl DeviceState for Net {
    fn save(&self) -> Saved {
        Saved::of(&NetState {
            mac: self.mac(),
            mtu: self.mtu.unwrap_or(0),
            link_up: self.link_up(),
        })
    }

    fn restore(&self, saved: &Saved) -> Result<(), StateError> {
        let state: NetState = saved.open()?;
        same::<NetState, _>("the MTU", state.mtu, self.mtu.unwrap_or(0))?;
        *self.mac.lock().unwrap_or_else(PoisonError::into_inner) = state.mac;
        self.shared.link_up.store(state.link_up, Ordering::Release);
        Ok(())
    }
}

/// Host to guest.
struct Receive {
    tap: Arc<Tap>,
    shared: Arc<Shared>,
    merge: bool,
    packet: Vec<u8>,
    /// Bytes of a packet that was read and has no buffers yet; 0 when there is none.
    waiting: usize,
    /// The buffers of one packet, reused; the first `held` are the driver's, taken and not yet given back. They
    /// stay with us when they are too few, so that the next doorbell we ask for is that of the next buffer.
    chains: Vec<Chain>,
    held: u16,
}

impl QueueHandler for Receive {
    fn sources(&self) -> Vec<(RawFd, EventSet)> {
        vec![(self.tap.as_raw_fd(), EventSet::IN)]
    }

    fn process(&mut self, queue: &mut DeviceQueue) -> Result<Progress, QueueError> {
        queue.disable_doorbell()?;
        for _ in 0..queue.size() {
            if self.waiting == 0 {
                match self.tap.read(&mut self.packet) {
                    Ok(_) if !self.shared.link_up.load(Ordering::Acquire) => continue,
                    Ok(size) => self.waiting = size,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        // Nothing to deliver: buffers that come in need no doorbell until the next packet.
                        queue.signal()?;
                        return Ok(Progress::Sleep);
                    }
                    Err(error) if tap_is_down(&error) => {
                        queue.signal()?;
                        return Ok(Progress::Sleep);
                    }
                    Err(source) => {
                        let what = "read the tap";
                        return Err(QueueError::Host { what, source });
                    }
                }
            }
            if !self.deliver(queue)? {
                queue.signal()?;
                let more = queue.enable_doorbell()?;
                return Ok(if more {
                    Progress::Again
                } else {
                    Progress::Sleep
                });
            }
        }
        queue.signal()?;
        Ok(Progress::Again)
    }

    fn drain(&mut self, queue: &mut DeviceQueue) -> Result<(), QueueError> {
        queue.undo_pop(std::mem::take(&mut self.held));
        Ok(())
    }
}

/// Reads fail while the interface is down; the tap becomes readable again when it is up.
fn tap_is_down(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EIO | libc::EBADFD | libc::EINTR)
    )
}

impl Receive {
    /// Puts the waiting packet into the driver's buffers. `false` when there are not enough yet.
    fn deliver(&mut self, queue: &mut DeviceQueue) -> Result<bool, QueueError> {
        let most = if self.merge { queue.size() } else { 1 };
        let wanted = self.waiting as u64;
        let held = self.chains[..self.held.into()].iter();
        let mut room: u64 = held.map(|chain| chain.writable().size()).sum();
        while room < wanted && self.held < most {
            let next = usize::from(self.held);
            if self.chains.len() == next {
                self.chains.push(Chain::new());
            }
            if !queue.pop(&mut self.chains[next])? {
                return Ok(false);
            }
            self.held += 1;
            let size = self.chains[next].writable().size();
            if size == 0 {
                // Enough of these would be held for ever, and every packet lost without a word.
                return Err(self.chains[next].malformed("a receive buffer without room"));
            }
            room += size;
        }
        if room < wanted {
            // Too small for it whatever else comes: the driver's fault, the packet's loss.
            self.shared.counters.dropped.add(1);
            self.waiting = 0;
            return Ok(true);
        }
        self.fill(queue)
    }

    /// The buffers that are held are large enough: fills as many as it takes.
    fn fill(&mut self, queue: &mut DeviceQueue) -> Result<bool, QueueError> {
        // A packet that came before may have left more than this one needs.
        let mut room = 0;
        let needed = self.chains[..self.held.into()].iter().take_while(|chain| {
            let short = room < self.waiting as u64;
            room += chain.writable().size();
            short
        });
        let count = u16::try_from(needed.count()).expect("at most the queue's size");
        self.packet[NUM_BUFFERS..HEADER_BYTES].copy_from_slice(&count.to_le_bytes());
        let mut rest = &self.packet[..self.waiting];
        for chain in &self.chains[..count.into()] {
            let written = chain.writable().write(rest);
            rest = &rest[written..];
            let written = u32::try_from(written).expect("a packet is below 128 KiB");
            queue.push(chain.head(), written)?;
        }
        self.chains[..self.held.into()].rotate_left(count.into());
        self.held -= count;
        self.shared.counters.received.add(1);
        self.shared.counters.received_bytes.add(self.waiting as u64);
        self.waiting = 0;
        Ok(true)
    }
}

/// Guest to host.
struct Transmit {
    tap: Arc<Tap>,
    shared: Arc<Shared>,
    chain: Chain,
    /// For the rare packet in too many pieces.
    packet: Vec<u8>,
}

impl QueueHandler for Transmit {
    fn sources(&self) -> Vec<(RawFd, EventSet)> {
        vec![(self.tap.as_raw_fd(), EventSet::OUT)]
    }

    fn process(&mut self, queue: &mut DeviceQueue) -> Result<Progress, QueueError> {
        queue.disable_doorbell()?;
        for _ in 0..queue.size() {
            if !queue.pop(&mut self.chain)? {
                break;
            }
            let data = self.chain.readable();
            let size = data.size();
            if size < HEADER_BYTES as u64 + FRAME_BYTES_MIN || size > PACKET_BYTES_MAX as u64 {
                return Err(self.chain.malformed("a packet of impossible size"));
            }
            if !self.shared.link_up.load(Ordering::Acquire) {
                self.shared.counters.dropped.add(1);
                queue.push(self.chain.head(), 0)?;
                continue;
            }
            match self.tap.write(data, &mut self.packet) {
                Ok(()) => {
                    self.shared.counters.sent.add(1);
                    self.shared.counters.sent_bytes.add(size);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    queue.undo_pop(1);
                    queue.signal()?;
                    return Ok(Progress::Sleep); // Until the tap takes more.
                }
                // A header that the kernel refuses, an interface that is down: as on a wire, nobody answers.
                Err(_) => self.shared.counters.dropped.add(1),
            }
            queue.push(self.chain.head(), 0)?;
        }
        queue.signal()?;
        let more = queue.enable_doorbell()?;
        Ok(if more {
            Progress::Again
        } else {
            Progress::Sleep
        })
    }
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Network card, VIRTIO 1.2 §5.1, on a tap or on another process: pairs of queues and a control queue.
//!
//! The tap speaks the same 12-byte header as the driver (`virtio_net_hdr_v1`), so that checksums and segmentation
//! that one side leaves to the other cross the boundary as they are.
//!
//! ```text
//!            ┌ receive 0 ◄── tap queue 0 ┐                 a thread of ours a pair (`receive`, `transmit`), or
//!   driver ──┤ transmit 0 ──► tap queue 0 ├── interface     the kernel's where there is vhost-net (`kernel`);
//!            │ … one pair a vCPU …       ┘                 or a process with rings for a wire (`vhost_user`)
//!            └ control ──► filter, number of pairs, offloads, announcement (`control`, on the first pair's thread)
//! ```
//! **One thread for both directions of a pair.** What the guest sends is often answered before it has all been sent: one
//! thread sends the whole batch, then takes all the answers, where two would wake each other every few packets. Of a
//! long batch the guest is told in pieces of `SIGNAL_PACKETS`, so that it works on those while the thread goes on.
//!
//! **Steering.** Which pair a packet from the host takes is the tap's choice: that on which the guest last sent for its
//! flow (automatic receive steering, §5.1.6.5.5). VIRTIO_NET_F_RSS, by which a driver says it with a hash and a table,
//! is not offered: a tap takes that as a BPF program whose map changes with each command, so that the VMM would keep
//! bpf(2) in its sandbox; and automatic steering sends a flow where the guest's own scheduler has put its socket.

mod control;
mod filter;
mod kernel;
mod limit;
mod receive;
mod tap;
mod transmit;
mod wire;

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;
use atoll_thread::Kind;
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CTRL_MAC_ADDR, VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_CTRL_RX_EXTRA,
    VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_GUEST_UFO, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6, VIRTIO_NET_F_MAC,
    VIRTIO_NET_F_MQ, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS,
};

use self::control::Control;
use self::filter::Filter;
use self::kernel::{KernelPair, TapStatistics};
use self::limit::Limit;
use self::receive::Receive;
use self::transmit::Transmit;
use self::wire::Wire;

pub use self::filter::Mac;
pub use self::kernel::{STATISTICS, VhostNetFiles};
pub use self::limit::Rate;
pub use self::tap::{HEADER_BYTES, Tap, TapError};
pub(super) use self::wire::BACKEND_FEATURES;
pub use self::wire::HostEnd;
use super::vhost_kernel::KernelRings;
use super::vhost_user::{self, Event};
use super::worker::{QueueHandler, QueueThread};
use super::{
    Act, Chain, DeviceInterrupts, QueueStart, StartError, StartedQueue, VirtioDevice, bits,
    device_id,
};
use crate::counters::{Counter, CounterList};
use crate::state::{DeviceState, Saved, SavedState, StateError, same};

/// Entries of the queues that carry packets.
const QUEUE_SIZE: u16 = 256;
/// Entries of the control queue.
const CONTROL_QUEUE_SIZE: u16 = 64;
/// Largest packet, with its header: 64 KiB of IP and an Ethernet header with a VLAN tag.
const PACKET_BYTES_MAX: usize = HEADER_BYTES + 65_535 + 18;
/// Packets of a batch after which the guest is told of them, if it wants to hear of it (§2.7.7, §2.7.10). With fewer,
/// a guest that keeps up would be interrupted all the time; with more, one that could work waits. Our choice.
const SIGNAL_PACKETS: u16 = 16;
/// `VIRTIO_NET_S_LINK_UP` and `VIRTIO_NET_S_ANNOUNCE`, §5.1.4.
const STATUS_LINK_UP: u8 = 1;
const STATUS_ANNOUNCE: u8 = 2;
/// Features that the driver may turn off and on again by its control queue, §5.1.6.5.6.1.
const GUEST_OFFLOADS: [u32; 7] = [
    VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_GUEST_ECN,
    VIRTIO_NET_F_GUEST_UFO,
    VIRTIO_NET_F_GUEST_USO4,
    VIRTIO_NET_F_GUEST_USO6,
];

/// What every card has, whoever moves its packets.
const CARD_FEATURES: [u32; 7] = [
    VIRTIO_NET_F_MAC,
    VIRTIO_NET_F_STATUS,
    VIRTIO_NET_F_CTRL_VQ,
    VIRTIO_NET_F_CTRL_RX,
    VIRTIO_NET_F_CTRL_RX_EXTRA,
    VIRTIO_NET_F_CTRL_MAC_ADDR,
    VIRTIO_NET_F_GUEST_ANNOUNCE,
];

/// What a card is made of, by the VMM: its host's end is open or connected already.
pub struct NetOptions {
    /// Name of the card in logs and thread names: `net0`.
    pub name: String,
    /// The host's end; with it the card's number of queue pairs.
    pub host: HostEnd,
    /// Address that the guest reads in the card's configuration, §5.1.4; the driver may use another one.
    pub mac: Mac,
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
    wire: Wire,
    /// Whether the plug is in.
    plugged: AtomicBool,
    /// The guest has been asked to announce itself and has not answered.
    announce: AtomicBool,
    /// Features that the driver accepted, and those of them that are offloads in force now.
    features: AtomicU64,
    guest_offloads: AtomicU64,
    /// Pairs that the driver uses, at least 1.
    active_pairs: AtomicU16,
    filter: ArcSwap<Filter>,
    receive_limit: Limit,
    send_limit: Limit,
    counters: Counters,
}

impl Shared {
    /// The plug is in, and somebody is at the other end.
    fn link_up(&self) -> bool {
        self.plugged.load(Ordering::Acquire) && self.wire.is_connected()
    }

    /// Packets come to the first `count` queues from now on.
    fn set_active_pairs(&self, count: u16) -> io::Result<()> {
        if count == 0 || count > self.wire.pair_count() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let plugged = self.plugged.load(Ordering::Acquire);
        self.wire.use_pairs(count, plugged)?;
        self.active_pairs.store(count, Ordering::Release);
        Ok(())
    }

    /// What the kernel may leave to the guest; only what the driver accepted.
    fn set_guest_offloads(&self, offloads: u64) -> io::Result<()> {
        let allowed = self.features.load(Ordering::Acquire) & bits(&GUEST_OFFLOADS);
        if offloads & !allowed != 0 {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.wire.set_offloads(offloads)?;
        self.guest_offloads.store(offloads, Ordering::Release);
        Ok(())
    }
}

/// How to tell the driver of changes, once there is one. Leaf lock.
#[derive(Default)]
struct Driver(Mutex<Option<DeviceInterrupts>>);

impl Driver {
    fn set(&self, interrupts: Option<DeviceInterrupts>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = interrupts;
    }

    /// Configuration changed.
    fn tell(&self) {
        let interrupts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let interrupts = interrupts.clone();
        if let Some(interrupts) = interrupts {
            interrupts.config_changed();
        }
    }
}

/// The network card, VIRTIO 1.2 §5.1, on a tap or on what takes its place: one thread a pair of queues, and a control
/// queue.
pub struct Net {
    name: String,
    /// The card's own, which a reset puts back. Changed only by a restore, since it may be a random one. Leaf lock,
    /// held for a copy.
    mac: Mutex<Mac>,
    mtu: Option<u16>,
    shared: Arc<Shared>,
    kernel: Option<(Vec<Arc<KernelPair>>, TapStatistics)>,
    driver: Arc<Driver>,
    /// One a pair, for queues that neither the kernel nor another process serves.
    threads: Vec<QueueThread>,
}

impl Net {
    /// A card with its plug in. Waits until another process that it is connected with has answered.
    pub fn new(options: NetOptions) -> io::Result<Self> {
        let (wire, kernel) = match options.host {
            HostEnd::Tap { taps, kernel } => {
                let taps = taps.into_iter().map(Arc::new).collect();
                (Wire::Taps(taps), kernel.map(VhostNetFiles::into_parts))
            }
            HostEnd::Backend {
                options: backend,
                pair_count,
            } => (Wire::greet(backend, pair_count, options.mtu)?, None),
        };
        let driver = Arc::new(Driver::default());
        if let Wire::Backend { backend, .. } = &wire {
            let driver = driver.clone();
            backend.listen(Box::new(move |event| match event {
                Event::Gone | Event::Back => driver.tell(),
                Event::Configured => {} // A card's configuration is ours.
            }));
        }
        let shared = Shared {
            wire,
            plugged: AtomicBool::new(true),
            announce: AtomicBool::new(false),
            features: AtomicU64::new(0),
            guest_offloads: AtomicU64::new(0),
            active_pairs: AtomicU16::new(1),
            filter: ArcSwap::from_pointee(Filter::new(options.mac)),
            receive_limit: Limit::default(),
            send_limit: Limit::default(),
            counters: Counters::default(),
        };
        shared.set_active_pairs(1)?;
        let thread = |pair| QueueThread::new(Kind::Net, format!("{}-pair{pair}", options.name));
        Ok(Self {
            threads: (0..shared.wire.pair_count()).map(thread).collect(),
            name: options.name,
            mac: Mutex::new(options.mac),
            mtu: options.mtu,
            shared: Arc::new(shared),
            kernel,
            driver,
        })
    }

    /// What the kernel has of the card, if it has anything.
    fn kernel_rings(&self) -> impl Iterator<Item = &KernelRings> {
        let pairs = self.kernel.iter().flat_map(|(pairs, _)| pairs);
        pairs.map(|pair| pair.rings())
    }

    /// Pulls the plug or puts it in: without it packets are lost in both directions, and the guest is told.
    pub fn set_link(&self, up: bool) {
        if self.shared.plugged.swap(up, Ordering::AcqRel) == up {
            return;
        }
        match &self.shared.wire {
            Wire::Taps(taps) => {
                let kernel = self.kernel.iter().flat_map(|(pairs, _)| pairs);
                for (pair, tap) in kernel.zip(taps) {
                    pair.set_link(tap, up);
                }
            }
            Wire::Backend { .. } => {
                let count = self.shared.active_pairs.load(Ordering::Acquire);
                let used = self.shared.wire.use_pairs(count, up);
                used.expect("another process is told, and does not refuse");
            }
        }
        self.driver.tell();
    }

    /// Whether the plug is in, and somebody is at the other end.
    pub fn link_up(&self) -> bool {
        self.shared.link_up()
    }

    /// Why the card's rate cannot be limited, if it cannot: others move its packets.
    pub fn limit_refusal(&self) -> Option<&'static str> {
        match &self.shared.wire {
            Wire::Backend { .. } => Some("a vhost-user backend moves this card's packets"),
            Wire::Taps(_) if self.kernel.is_some() => {
                Some("vhost-net moves this card's packets: start it with vhost=off")
            }
            Wire::Taps(_) => None,
        }
    }

    /// Pairs of queues that the card has.
    pub fn pair_count(&self) -> u16 {
        self.shared.wire.pair_count()
    }

    /// Limits what the guest receives and sends from now on; `None` for no limit. A packet that is being held back follows
    /// within half a second. Not for a card in the kernel.
    pub fn set_limits(&self, receive: Option<Rate>, send: Option<Rate>) {
        self.shared.receive_limit.set(receive);
        self.shared.send_limit.set(send);
    }

    /// Whether either direction is held to a rate by [`Net::set_limits`].
    pub fn is_limited(&self) -> bool {
        self.shared.receive_limit.is_set() || self.shared.send_limit.is_set()
    }

    /// Tells the network where the guest is now, after it has moved: by a frame that teaches switches the card's
    /// address, and by asking the guest, which knows its IP addresses, to do the same.
    pub fn announce(&self) {
        let mac = self.shared.filter.load().mac;
        if self.link_up()
            && let Err(error) = self.shared.wire.announce(mac)
        {
            tracing::warn!(card = %self.name, %error, "announce the guest to the network");
        }
        let features = self.shared.features.load(Ordering::Acquire);
        if features & 1 << VIRTIO_NET_F_GUEST_ANNOUNCE != 0 {
            self.shared.announce.store(true, Ordering::Release);
            self.driver.tell();
        }
    }

    fn mac(&self) -> Mac {
        *self.mac.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `struct virtio_net_config` up to `mtu`, §5.1.4.
    fn config(&self) -> [u8; 12] {
        let mut config = [0; 12];
        config[0..6].copy_from_slice(&self.shared.filter.load().mac);
        let announce = self.shared.announce.load(Ordering::Acquire);
        config[6] =
            (u8::from(self.link_up()) * STATUS_LINK_UP) | (u8::from(announce) * STATUS_ANNOUNCE);
        config[8..10].copy_from_slice(&self.pair_count().to_le_bytes());
        config[10..12].copy_from_slice(&self.mtu.unwrap_or(0).to_le_bytes());
        config
    }

    /// Without MQ the driver knows of one pair, and the control queue follows it, §5.1.2.
    fn control_queue(&self, features: u64) -> u16 {
        let multiple = features & 1 << VIRTIO_NET_F_MQ != 0;
        2 * if multiple { self.pair_count() } else { 1 }
    }

    /// The driver is ready, or the machine resumes.
    fn start(&self, features: u64) -> io::Result<()> {
        let offloads = if self.shared.features.swap(features, Ordering::AcqRel) == 0 {
            features & bits(&GUEST_OFFLOADS)
        } else {
            self.shared.guest_offloads.load(Ordering::Acquire)
        };
        self.shared.set_guest_offloads(offloads)
    }
}

impl VirtioDevice for Net {
    fn device_id(&self) -> u16 {
        device_id::NET
    }

    fn features(&self) -> u64 {
        let optional = |offered: bool, feature: u32| u64::from(offered) << feature;
        self.shared.wire.features()
            | bits(&CARD_FEATURES)
            | optional(self.mtu.is_some(), VIRTIO_NET_F_MTU)
            | optional(self.pair_count() > 1, VIRTIO_NET_F_MQ)
    }

    fn queue_sizes(&self) -> Vec<u16> {
        let mut sizes = vec![QUEUE_SIZE; 2 * usize::from(self.pair_count())];
        sizes.push(CONTROL_QUEUE_SIZE);
        sizes
    }

    fn config_read(&self, offset: u64, data: &mut [u8]) {
        super::read_config(&self.config(), offset, data);
    }

    fn connect(&self, interrupts: DeviceInterrupts) {
        self.driver.set(Some(interrupts));
    }

    fn start_queue(&self, start: QueueStart) -> Result<Box<dyn StartedQueue>, StartError> {
        let index = start.index;
        let shared = self.shared.clone();
        if index == self.control_queue(start.features) {
            let chain = Chain::new();
            return self.threads[0].serve(start, Box::new(Control { shared, chain }));
        }
        if index == 0 {
            self.start(start.features)
                .map_err(|source| StartError { index, source })?;
        }
        let pair = usize::from(index / 2);
        if pair >= self.pair_count().into() {
            // The control queue's place with MQ, where a driver without MQ has no business.
            let source = io::ErrorKind::NotFound.into();
            return Err(StartError { index, source });
        }
        let tap = match &self.shared.wire {
            Wire::Taps(taps) => taps[pair].clone(),
            Wire::Backend { backend, .. } => {
                let active = shared.active_pairs.load(Ordering::Acquire);
                let enabled = shared.plugged.load(Ordering::Acquire) && index / 2 < active;
                let started = backend.start(index.into(), &start, enabled)?;
                return Ok(started.expect("a card's rings wait for their server"));
            }
        };
        if let Some((pairs, _)) = &self.kernel {
            return pairs[pair].start(usize::from(index % 2), &start, &tap, &shared);
        }
        let handler: Box<dyn QueueHandler> = if index.is_multiple_of(2) {
            Box::new(Receive::new(tap, shared, start.features))
        } else {
            let handler = Transmit::new(tap, shared);
            Box::new(handler.map_err(|source| StartError { index, source })?)
        };
        self.threads[pair].serve(start, handler)
    }

    fn reset(&self) {
        self.driver.set(None);
        self.shared.features.store(0, Ordering::Release);
        self.shared.guest_offloads.store(0, Ordering::Release);
        self.shared.announce.store(false, Ordering::Release);
        self.shared.filter.store(Arc::new(Filter::new(self.mac())));
        if let Err(error) = self.shared.set_active_pairs(1) {
            tracing::error!(card = %self.name, %error, "detach the tap's queues");
        }
    }

    fn obstacle(&self, act: Act) -> Option<String> {
        match (&self.shared.wire, act) {
            (Wire::Backend { backend, .. }, _) => vhost_user::obstacle(backend, act, "unplug it"),
            (Wire::Taps(_), Act::Migration) if !self.kernel_rings().all(KernelRings::can_log) => {
                let text = "this host's vhost-net does not log what it writes into memory: start the card with vhost=off to migrate";
                Some(text.to_owned())
            }
            (Wire::Taps(_), _) => None,
        }
    }

    fn log_writes(&self, on: bool) -> io::Result<()> {
        if let Wire::Backend { backend, .. } = &self.shared.wire {
            return backend.log_writes(on);
        }
        self.kernel_rings()
            .try_for_each(|rings| rings.log_writes(on))
    }

    fn note_writes(&self) {
        if let Wire::Backend { backend, .. } = &self.shared.wire {
            backend.note_writes();
        }
        self.kernel_rings().for_each(KernelRings::note_writes);
    }

    /// What another process moves is counted by nobody here.
    fn counters(&self) -> CounterList {
        if let Some((_, statistics)) = &self.kernel {
            return statistics.list();
        }
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

/// What the guest has seen of the card or said to it, beside the transport.
#[derive(Serialize, Deserialize)]
struct NetState {
    mac: Mac,
    /// 0 when none was announced.
    mtu: u16,
    /// Whether the plug is in.
    link_up: bool,
    /// 0 in a state that knows only of one.
    #[serde(default)]
    pair_count: u16,
    /// What the driver has asked for by its control queue; absent when it did not get so far.
    #[serde(default)]
    asked: Option<AskedState>,
}

#[derive(Serialize, Deserialize)]
struct AskedState {
    features: u64,
    guest_offloads: u64,
    active_pairs: u16,
    filter: Filter,
    announce: bool,
}

impl SavedState for NetState {
    const KIND: &'static str = "virtio-net";
    const VERSION: u32 = 1;
}

impl DeviceState for Net {
    fn save(&self) -> Saved {
        let shared = &self.shared;
        let features = shared.features.load(Ordering::Acquire);
        let asked = AskedState {
            features,
            guest_offloads: shared.guest_offloads.load(Ordering::Acquire),
            active_pairs: shared.active_pairs.load(Ordering::Acquire),
            filter: Filter::clone(&shared.filter.load()),
            announce: shared.announce.load(Ordering::Acquire),
        };
        Saved::of(&NetState {
            mac: self.mac(),
            mtu: self.mtu.unwrap_or(0),
            link_up: self.shared.plugged.load(Ordering::Acquire),
            pair_count: self.pair_count(),
            asked: (features != 0).then_some(asked),
        })
    }

    fn restore(&self, saved: &Saved) -> Result<(), StateError> {
        let state: NetState = saved.open()?;
        let shared = &self.shared;
        same::<NetState, _>("the MTU", state.mtu, self.mtu.unwrap_or(0))?;
        let pairs = state.pair_count.max(1);
        same::<NetState, _>("the number of queue pairs", pairs, self.pair_count())?;
        *self.mac.lock().unwrap_or_else(PoisonError::into_inner) = state.mac;
        shared.plugged.store(state.link_up, Ordering::Release);
        let Some(asked) = state.asked else {
            shared.filter.store(Arc::new(Filter::new(state.mac)));
            return Ok(());
        };
        let refused = |error: io::Error| StateError::Differs {
            kind: NetState::KIND,
            what: format!("{} of {pairs} queue pairs: {error}", asked.active_pairs),
        };
        shared
            .set_active_pairs(asked.active_pairs)
            .map_err(refused)?;
        shared.features.store(asked.features, Ordering::Release);
        // The tap is told when the queues start.
        shared
            .guest_offloads
            .store(asked.guest_offloads, Ordering::Release);
        shared.announce.store(asked.announce, Ordering::Release);
        shared.filter.store(Arc::new(asked.filter));
        Ok(())
    }
}

/// A reverse ARP request that asks nothing (RFC 903): every switch on its way learns where `mac` is.
fn reverse_arp(mac: Mac) -> Vec<u8> {
    let mut packet = vec![0; HEADER_BYTES];
    packet.extend([0xff; 6]);
    packet.extend(mac);
    packet.extend([0x80, 0x35]); // Ethertype.
    packet.extend([0, 1, 8, 0, 6, 4, 0, 3]); // Ethernet, IPv4, sizes of their addresses, "request reverse".
    for _ in 0..2 {
        packet.extend(mac);
        packet.extend([0; 4]);
    }
    packet.resize(HEADER_BYTES + 60, 0);
    packet
}

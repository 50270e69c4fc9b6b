// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Devices whose queues another process serves, by the vhost-user protocol (QEMU, `docs/interop/vhost-user.rst`).
//!
//! ```text
//!   driver ◄── rings in shared memory, doorbells, interrupts ──► the other process
//!     │                                                             ▲
//!   VhostUser or net::Net ── jobs ──► Conversation (a thread) ── messages
//! ```
//! [`KINDS`] says what each kind of device is made of; [`Backend`] is the other process, for whichever device;
//! [`VhostUser`] is the device of every kind but one, since a network card has a control queue and a plug of its own
//! (`net`).
//!
//! The other process maps guest memory, so that this must be a file's (a memfd). It finds the rings where the driver
//! put them, and shares doorbell and interrupt with us as eventfds.
//!
//! **When it ends** the device is told: a network card loses its link, every other device needs a reset. With
//! [`BackendOptions::reconnect`] the next process at the same socket is greeted, and gets a card's rings where they
//! stand; other devices go on when their driver has reset them. Nobody waits for it for longer than
//! [`BackendOptions::patience`].
//!
//! **The log.** What it writes goes past this process. While somebody wants to know
//! ([`VirtioDevice::log_writes`](super::VirtioDevice::log_writes)), it notes each page in a bitmap that it shares with us
//! (vhost-user.rst, "Migration"); what is in there goes into guest memory's own log whenever that is asked for, and when a
//! ring ends. Of one that ends without a word the used rings count as written: it marks the pages of a request before
//! those, but may not have come to these.

mod backend;
mod conversation;
mod device;
mod log;
mod messages;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_GEOMETRY, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};

pub use self::backend::{Backend, BackendOptions, VhostUserError};
pub(super) use self::backend::{Event, Terms};
pub use self::device::{Layout, TAG_BYTES_MAX, VhostUser};
use super::{Act, bits, device_id};

/// How long a backend may take to answer; also what it has to finish what it has begun, when the machine is paused.
pub const PATIENCE: std::time::Duration = std::time::Duration::from_secs(30);

/// What a kind of device is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceKind {
    /// Name of the kind on the command line and in specs: `blk`.
    pub name: &'static str,
    /// Virtio's number for it, VIRTIO 1.2 §5.
    pub id: u16,
    /// The device's own feature bits that its driver may have, if the backend has them.
    features: u64,
    /// Bytes of configuration space that the backend keeps; where there are none, the device has its own, or none.
    config_bytes: u16,
    /// Queues, unless it is said otherwise.
    queue_count: u16,
    /// All that there is to be known of a paused device is where its rings stand.
    keeps_nothing: bool,
}

/// All bits that belong to the kind of device and not to the transport, §2.2.
const DEVICE_FEATURES: u64 = 0xff_ffff | !0 << 50;

/// The kinds that have a name. Any other device is [`DeviceKind::of`] its number.
pub const KINDS: &[DeviceKind] = &[
    DeviceKind {
        name: "net", // Its own device: `net::Net`.
        id: device_id::NET,
        features: crate::virtio::net::BACKEND_FEATURES,
        config_bytes: 0,
        queue_count: 2,
        keeps_nothing: true,
    },
    DeviceKind {
        name: "blk",
        id: device_id::BLOCK,
        features: bits(&[
            VIRTIO_BLK_F_SIZE_MAX,
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_GEOMETRY,
            VIRTIO_BLK_F_RO,
            VIRTIO_BLK_F_BLK_SIZE,
            VIRTIO_BLK_F_FLUSH,
            VIRTIO_BLK_F_TOPOLOGY,
            VIRTIO_BLK_F_CONFIG_WCE,
            VIRTIO_BLK_F_MQ,
            VIRTIO_BLK_F_DISCARD,
            VIRTIO_BLK_F_WRITE_ZEROES,
        ]),
        config_bytes: 60, // `struct virtio_blk_config`, §5.2.4.
        queue_count: 1,
        keeps_nothing: true,
    },
    DeviceKind {
        name: "rng",
        id: device_id::RNG,
        features: 0,
        config_bytes: 0,
        queue_count: 1,
        keeps_nothing: true,
    },
    DeviceKind {
        name: "scsi",
        id: device_id::SCSI,
        features: DEVICE_FEATURES,
        config_bytes: 36, // `struct virtio_scsi_config`, §5.6.4.
        queue_count: 3,
        keeps_nothing: false,
    },
    DeviceKind {
        name: "fs",
        id: device_id::FS,
        features: 0,
        config_bytes: 0, // The tag is ours.
        queue_count: 2,  // One for urgent requests, one for all others.
        keeps_nothing: false,
    },
];

impl DeviceKind {
    /// The kind with this number: a row of [`KINDS`], or one of which nothing is known but what the backend says.
    #[must_use]
    pub fn of(id: u16) -> Self {
        let row = KINDS.iter().find(|kind| kind.id == id);
        row.copied().unwrap_or(Self {
            name: "device",
            id,
            features: DEVICE_FEATURES,
            config_bytes: 0,
            queue_count: 1,
            keeps_nothing: false,
        })
    }

    /// What is asked of a backend that has a ring for each of `queue_count` queues.
    fn terms(&self, queue_count: u16, config_bytes: Option<u16>) -> Terms {
        Terms {
            features: self.features,
            config_bytes: config_bytes.unwrap_or(self.config_bytes).into(),
            ring_count: queue_count.into(),
            queue_number: queue_count.into(),
            survives: false,
            completes: self.id == device_id::BLOCK,
            mtu: None,
        }
    }
}

/// Why this cannot be done with a machine that has a device of this backend. `remedy` is how the machine comes to be
/// without the device.
pub(super) fn obstacle(backend: &Backend, act: Act, remedy: &str) -> Option<String> {
    let what = "what its vhost-user backend writes into memory";
    match act {
        Act::Migration if !backend.can_log() => Some(format!(
            "{what} is not logged, since {}: {remedy}",
            backend::NO_LOG
        )),
        Act::LiveSnapshot => Some(format!(
            "{what} does not wait: leave out --live, or {remedy}"
        )),
        Act::Migration | Act::Snapshot => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_told_apart_and_leave_the_transport_alone() {
        for (index, kind) in KINDS.iter().enumerate() {
            let before = &KINDS[..index];
            assert!(before.iter().all(|other| other.id != kind.id), "{kind:?}");
            assert_eq!(kind.features & !DEVICE_FEATURES, 0, "{kind:?}");
            assert_eq!(DeviceKind::of(kind.id), *kind);
        }
        assert_eq!(DeviceKind::of(41).name, "device");
        assert_eq!(DEVICE_FEATURES & 0x3ff_ffff << 24, 0);
    }
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The host's end of a card, whichever it is: a tap's queues, or another process (vhost-user).

use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_GUEST_UFO, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6,
    VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_UFO,
    VIRTIO_NET_F_HOST_USO, VIRTIO_NET_F_MRG_RXBUF,
};

use super::tap::{self, Tap};
use super::{Mac, VhostNetFiles, reverse_arp};
use crate::virtio::bits;
use crate::virtio::vhost_user::{Backend, BackendOptions, Terms};

/// What packets may be: left to the guest, left to the host, in several buffers.
const PACKET_FEATURES: [u32; 11] = [
    VIRTIO_NET_F_CSUM,
    VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_GUEST_ECN,
    VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_HOST_ECN,
    VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_GUEST_UFO,
    VIRTIO_NET_F_HOST_UFO,
];
/// Large UDP segments, since VIRTIO 1.3.
const USO_FEATURES: [u32; 3] = [
    VIRTIO_NET_F_GUEST_USO4,
    VIRTIO_NET_F_GUEST_USO6,
    VIRTIO_NET_F_HOST_USO,
];
/// Those of them that only a new kernel's tap has, or that a kernel may have been built without.
const UFO_FEATURES: [u32; 2] = [VIRTIO_NET_F_GUEST_UFO, VIRTIO_NET_F_HOST_UFO];
/// All of them: what a vhost-user backend may have, and its card's driver.
pub(in crate::virtio) const BACKEND_FEATURES: u64 = bits(&PACKET_FEATURES) | bits(&USO_FEATURES);

/// What a card is connected with. All pairs of one card have the same.
pub enum HostEnd {
    /// A tap.
    Tap {
        /// One for each pair of queues, all of one interface.
        taps: Vec<Tap>,
        /// vhost-net, if the kernel is to move the packets; opened for as many pairs.
        kernel: Option<VhostNetFiles>,
    },
    /// Another process, by vhost-user.
    Backend {
        /// How to reach it.
        options: BackendOptions,
        /// Pairs of queues that the card has.
        pair_count: u16,
    },
}

/// The same, in use.
pub(super) enum Wire {
    Taps(Vec<Arc<Tap>>),
    Backend {
        backend: Arc<Backend>,
        pair_count: u16,
    },
}

impl Wire {
    /// Greets the other process.
    pub(super) fn greet(
        options: BackendOptions,
        pair_count: u16,
        mtu: Option<u16>,
    ) -> io::Result<Self> {
        let terms = Terms {
            features: BACKEND_FEATURES,
            config_bytes: 0,
            ring_count: 2 * usize::from(pair_count),
            queue_number: pair_count.into(),
            survives: true,
            completes: false,
            mtu,
        };
        let backend = Backend::new(options, terms).map_err(io::Error::other)?;
        Ok(Self::Backend {
            backend,
            pair_count,
        })
    }

    /// Feature bits that depend on the wire.
    pub(super) fn features(&self) -> u64 {
        match self {
            Self::Backend { backend, .. } => backend.features(),
            Self::Taps(taps) => {
                let without = |taken: bool, features: &[u32]| match taken {
                    true => 0,
                    false => bits(features),
                };
                // Any queue of the interface will do.
                let lacking = without(taps[0].takes_ufo(), &UFO_FEATURES)
                    | without(taps[0].takes_uso(), &USO_FEATURES);
                let own = 1 << VIRTIO_NET_F_CTRL_GUEST_OFFLOADS;
                (BACKEND_FEATURES | own) & !lacking
            }
        }
    }

    pub(super) fn pair_count(&self) -> u16 {
        match self {
            Self::Taps(taps) => u16::try_from(taps.len()).expect("made from a u16"),
            Self::Backend { pair_count, .. } => *pair_count,
        }
    }

    /// Whether there is somebody at the other end.
    pub(super) fn is_connected(&self) -> bool {
        match self {
            Self::Taps(_) => true,
            Self::Backend { backend, .. } => backend.is_alive(),
        }
    }

    /// Packets come to the first `count` pairs from now on; with the plug pulled, other processes look at none.
    pub(super) fn use_pairs(&self, count: u16, link_up: bool) -> io::Result<()> {
        match self {
            // The first queue is always attached, so that the interface never loses its carrier.
            Self::Taps(taps) => taps
                .iter()
                .enumerate()
                .try_for_each(|(index, tap)| tap.set_attached(index < usize::from(count))),
            Self::Backend { backend, .. } => {
                for ring in 0..backend.ring_count() {
                    backend.enable(ring, link_up && ring < 2 * usize::from(count));
                }
                Ok(())
            }
        }
    }

    /// What the kernel may leave to the guest. Another process has been told with the features, for good.
    pub(super) fn set_offloads(&self, features: u64) -> io::Result<()> {
        match self {
            // A setting of the interface: any queue of it will do.
            Self::Taps(taps) => taps[0].set_offloads(tap::offloads(features)),
            Self::Backend { .. } => Ok(()),
        }
    }

    /// Sends a frame that teaches switches where the guest is.
    pub(super) fn announce(&self, mac: Mac) -> io::Result<()> {
        match self {
            Self::Taps(taps) => taps[0].send(&reverse_arp(mac)),
            Self::Backend { backend, .. } if backend.announce(mac) => Ok(()),
            Self::Backend { .. } => Err(io::Error::other("the vhost-user backend cannot")),
        }
    }
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Block backends: what the host does for a guest's disk.
//!
//! ```text
//! open::files ──► OpenedDisk ──backend──► BlockBackend ──open_queue──► BlockQueue
//! the only place that opens,              Limited                      one a virtqueue, owned by its thread:
//! checks and locks paths                    └ DetectZeroes             submit … kick … completion_fd readable …
//!                                              └ raw │ qcow2           complete
//! ```
//!
//! Decorators ([`Layer`]) are in this order, outermost first, because each one's meaning depends on it:
//!
//! 1. [`Limited`]: a guest is charged for what it asked for, before anything is optimized away.
//! 2. whatever records changes ([`changes::Tracked`]), keeps what was there before ([`Freezable`]) or injects faults
//!    ([`Faulty`]): it sees requests as the guest made them.
//! 3. [`Switchable`]: what is above stays when a [`Mirror`] takes the disk's place.
//! 4. [`DetectZeroes`]: rewrites requests for the image alone.
//!
//! Engines: a raw disk whose file is the host's memory (tmpfs) is served by its queues' own threads; any other by
//! io_uring where the process may use it, else by a few threads; qcow2 always by threads. A backend knows sectors and host memory, nothing of virtio, guests or image names. Offsets come
//! from the guest: an implementation must not panic on any of them.

mod alignment;
mod backend;
mod blocking;
mod bucket;
mod chain;
pub mod changes;
pub mod conformance;
#[cfg(test)]
mod dice;
mod fault;
mod frozen;
mod immediate;
mod layer;
mod limits;
mod lock;
mod memory;
mod mirror;
pub mod nbd;
mod open;
mod pool;
pub mod qcow2;
mod raw;
mod segments;
mod switchable;
mod transfer;
mod uring;
mod zeroes;
mod zeroing;

pub use backend::{
    Abilities, BlockBackend, BlockQueue, Completion, Full, Geometry, Operation, Request,
    ResizeError, SECTOR_BYTES, Space,
};
pub use bucket::{LOOK_AGAIN, TokenBucket};
pub use chain::chain;
pub use fault::{Fault, Faulty};
pub use frozen::{Freezable, Frozen, FrozenReader};
pub use layer::{Layer, QueueLayer};
pub use limits::{Limit, Limited, Limits, Rate};
pub use lock::WriterLock;
pub use memory::MemoryBackend;
pub use mirror::{Mirror, MirrorError, MirrorOptions, MirrorProgress, SettleError};
pub use open::{
    Cache, Engine, Format, OpenError, OpenOptions, OpenedDisk, Source, files, open, unlocked_files,
};
pub use raw::RawBackend;
pub use segments::Segments;
pub use switchable::{MisfitError, Switchable};
pub use transfer::{Transferred, flush, transfer};
pub use zeroes::DetectZeroes;

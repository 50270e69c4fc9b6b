// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Block backends: what the host does for a guest's disk.
//!
//! ```text
//! device ──► BlockBackend ──open_queue──► BlockQueue   one a virtqueue, owned by that queue's thread
//!            raw file or block device      submit … kick … completion_fd readable … complete
//! ```
//!
//! A backend knows sectors and host memory, nothing of virtio, guests or image names. Offsets come from the
//! guest: an implementation must not panic on any of them. Not here: image formats other than raw.

mod backend;
mod bucket;
pub mod conformance;
mod fault;
mod immediate;
mod memory;
mod raw;
mod segments;
mod uring;

pub use backend::{
    BlockBackend, BlockQueue, Completion, Full, Geometry, Operation, Request, SECTOR_BYTES,
};
pub use bucket::TokenBucket;
pub use fault::{Fault, Faulty};
pub use memory::MemoryBackend;
pub use raw::{Engine, OpenError, OpenOptions, RawBackend};
pub use segments::Segments;

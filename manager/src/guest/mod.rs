// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Guests: VMs and containers, from what the user asked for to what runs.
//!
//! ```text
//! keys ──► config ──► stored (nodes/N/qemu-server/ID.conf, nodes/N/lxc/ID.conf)
//!    └───► view (JSON)
//! ```

pub mod config;
pub mod keys;
pub mod stored;
pub mod view;

pub use config::{Applied, ConfigUpdate, GuestConfig, PendingRow};
pub use stored::Stored;

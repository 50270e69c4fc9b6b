// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The node manager as a library: store, tasks, guests, storage, network, access.
//!
//! ```text
//! api ──► Node ──┬─ store     ConfigStore: the replicated key space (redb, in-memory double)
//!                ├─ task      UPIDs, step tables with undo, logs
//!                ├─ access    users, tokens, privileges, realms
//!                ├─ guest     configs through the key table; VM and container behind one trait
//!                ├─ storage   volumes; one file a plugin
//!                ├─ network   bridges, taps, NAT, DHCP
//!                ├─ templates signed indexes of container templates
//!                ├─ metrics   time series per guest and node
//!                └─ reconcile drives actual towards intended
//! ```
//!
//! Not here: HTTP, JSON names of the public API, tickets (crate `atoll-api`); KVM and libcontainer, which this
//! crate reaches only as the programs `atoll-vmm` and `atoll-ct`.

pub mod access;
pub mod cluster;
pub mod error;
pub mod exec;
pub mod guest;
pub mod host;
pub mod id;
pub mod metrics;
pub mod network;
mod node;
pub mod oci;
mod percent;
pub mod process;
pub mod reconcile;
pub mod sampler;
pub mod schema;
mod settings;
pub mod shell;
pub mod storage;
pub mod store;
pub mod task;
pub mod templates;

pub use node::Node;
pub use settings::Settings;

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Disks over NBD. As a server: frozen disks, read-only, for whatever makes backups (`qemu-img`, `nbdcopy`, `nbdinfo`, or
//! our own), and disks to be written, for who moves one here. As a client: disks that others serve (`client`).
//!
//! The protocol is that of `doc/proto.md` of the NetworkBlockDevice project: fixed newstyle negotiation (`negotiate`),
//! then simple or structured replies (`transmit`), in which zeroes are told as holes. Which blocks changed since the
//! last backup is a metadata context, `qemu:dirty-bitmap:NAME`, so that QEMU's and libnbd's tools read it. There is no
//! encryption: the listener is a Unix socket, and who may connect is decided by its directory.
//!
//! ```text
//! listener ─► thread `nbd` ─► one thread a connection: negotiate ─► transmit ─► Access: a frozen disk, or a disk
//! ```
//!
//! A server can have a rate at which its clients read, together (`pace`).
//!
//! Bounds: [`CONNECTIONS_MAX`] connections, 64 KiB of an option's data, 32 MiB a read, a buffer of 1 MiB a connection.

mod access;
mod client;
mod negotiate;
mod pace;
mod server;
mod transmit;
mod wire;

#[cfg(test)]
mod tests;

use std::io;
use std::sync::Arc;

use crate::backend::BlockBackend;
use crate::changes::BlockSet;
use crate::frozen::Frozen;

pub use access::Access;
pub use client::{NbdBackend, NbdClientError};
pub use server::{CONNECTIONS_MAX, NbdServer};

/// One disk for clients.
pub struct Export {
    /// What clients call it; the first export also answers to the empty name.
    pub name: String,
    /// Its content.
    pub content: Content,
    /// Blocks to tell of in a metadata context, and its name behind `qemu:dirty-bitmap:`.
    pub changed: Option<(String, BlockSet)>,
}

/// What clients find in an export.
pub enum Content {
    /// A disk as it was, to be read.
    Frozen(Arc<Frozen>),
    /// A disk, to be read and written. Whoever serves it sees to it that nobody else uses it.
    Disk(Arc<dyn BlockBackend>),
}

/// Why a connection ended before its client wanted.
#[derive(Debug, thiserror::Error)]
pub enum NbdError {
    /// The client does not speak the protocol.
    #[error("nbd client: {0}")]
    Protocol(&'static str),
    /// The connection broke.
    #[error("nbd connection")]
    Connection(#[from] io::Error),
}

/// Serves one client until it leaves, from the first byte of the negotiation on; `open` opens the export that it
/// chooses. Blocks for as long as the client is silent. For whoever has a listener of his own; [`NbdServer`]
/// calls it on a thread a connection.
pub fn converse(
    stream: &mut (impl io::Read + io::Write),
    exports: &[Export],
    open: impl FnOnce(&Export) -> io::Result<Access>,
) -> Result<(), NbdError> {
    let Some(agreed) = negotiate::negotiate(stream, exports)? else {
        return Ok(());
    };
    let mut access = open(agreed.export)?;
    transmit::transmit(stream, &agreed, &mut access)
}

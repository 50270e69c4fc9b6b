// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! SCSI logical units without a transport: disks (SBC-3) and CD-ROM drives (MMC-5), on SPC-4.
//!
//! ```text
//! command   32 bytes of CDB ──► a checked Command
//! target    one unit: its medium, its pending attentions; a Command ──► what is to be done
//! pages     bytes of INQUIRY, MODE SENSE, READ TOC and the like
//! sense     why a command failed
//! ```
//!
//! Called by the virtio-scsi device. Pure but for reading a parameter list: what a command does to a medium is
//! returned as an [`Act`], which the caller carries out.

mod command;
mod pages;
mod sense;
mod target;

pub use command::CDB_BYTES;
pub use sense::Sense;
pub use target::{Act, EjectError, Target, TargetKind, TargetOptions, TargetState};

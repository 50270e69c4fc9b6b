// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! PCI: one bus of functions with configuration space, memory BARs and MSI-X.
//!
//! [`PciBus`] holds the functions and answers configuration cycles (ECAM and ports CF8/CFC) and the memory
//! window in which BARs live. [`PciDevice`] is what a function implements; [`Msix`] its interrupt table;
//! [`PciHotplug`] tells the guest of functions that come and go.
//! No bridges, no INTx, no port BARs: every device of ours is a virtio function on bus 0.

mod bus;
mod config;
mod hotplug;
mod msix;

pub use bus::{ConfigPorts, DoorbellSink, Ecam, PciBus, PciBusError, PciWindow, Window};
pub use config::{Bar, Capability, ConfigSpace, Identity};
pub use hotplug::{PciHotplug, ReleaseSink};
pub use msix::{Msix, MsixState, TABLE_ENTRY_BYTES};

use vmm_sys_util::eventfd::EventFd;

/// Device numbers on a bus; 0 is the host bridge's.
pub const SLOT_COUNT: usize = 32;

/// An address which, when the guest writes to it, does nothing but signal an eventfd.
pub struct Doorbell {
    /// Index of the BAR it lies in, as in [`Bar::index`].
    pub bar: usize,
    /// Bytes from the beginning of that BAR to the address.
    pub offset: u64,
    /// What a write there signals, whatever its value and size.
    pub event: EventFd,
}

/// One PCI function, as the bus sees it.
///
/// Called by vCPU threads. The bus serialises configuration cycles; BAR accesses come concurrently.
pub trait PciDevice: Send + Sync {
    /// The initial configuration space, asked for once.
    fn config_space(&self) -> ConfigSpace;

    /// A memory read inside a BAR.
    fn bar_read(&self, bar: usize, offset: u64, data: &mut [u8]);

    /// A memory write inside a BAR.
    fn bar_write(&self, bar: usize, offset: u64, data: &[u8]);

    /// Doorbells for the VMM to connect wherever the BARs are; asked for once.
    fn doorbells(&self) -> Vec<Doorbell> {
        Vec::new()
    }

    /// Called before a configuration read, so that live registers can be brought up to date in `config`.
    fn before_config_read(&self, _config: &mut ConfigSpace, _offset: u16, _size: usize) {}

    /// Called after a configuration write went into `config`.
    fn after_config_write(&self, _config: &mut ConfigSpace, _offset: u16, _size: usize) {}
}

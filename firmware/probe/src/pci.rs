// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! PCI bus 0: configuration space by ECAM or by ports 0xcf8 and 0xcfc, capabilities, MSI-X.

use crate::acpi::Platform;
use crate::cpu;
use crate::interrupts::{MESSAGE_ADDRESS, Vector};
use crate::memory::Mmio;

/// Offsets in the type 0 header and the MSI-X capability, PCI Local Bus 3.0 §6.1 and §6.8.2.
const COMMAND: u16 = 0x04;
const BAR0: u16 = 0x10;
const CAPABILITIES: u16 = 0x34;
const CAPABILITY_MSIX: u8 = 0x11;
const COMMAND_MEMORY_AND_MASTER: u32 = 0x6;
const MSIX_ENABLE: u32 = 1 << 31;
const MSIX_ENTRY_BYTES: u64 = 16;

/// A way to configuration space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bus {
    /// Memory-mapped.
    Ecam(Mmio),
    /// Address port and data port.
    Ports,
}

/// One device (function 0).
#[derive(Clone, Copy, Debug)]
pub struct Device {
    bus: Bus,
    /// Device number.
    pub slot: u8,
    /// Vendor in the low half, device in the high half.
    pub id: u32,
}

/// The MSI-X table of a device.
#[derive(Clone, Copy, Debug)]
pub struct Msix {
    table: Mmio,
    entry_count: u16,
}

impl Bus {
    /// The way that ACPI names, or the ports.
    pub fn find(platform: &Platform) -> Bus {
        platform
            .ecam
            .and_then(Mmio::map)
            .map_or(Bus::Ports, Bus::Ecam)
    }

    /// Devices of bus 0, in order.
    pub fn devices(self) -> impl Iterator<Item = Device> {
        (0..32).filter_map(move |slot| self.device(slot))
    }

    /// What is in a slot.
    pub fn device(self, slot: u8) -> Option<Device> {
        let id = Device {
            bus: self,
            slot,
            id: 0,
        }
        .read(0);
        (id & 0xffff != 0xffff).then_some(Device {
            bus: self,
            slot,
            id,
        })
    }
}

impl Device {
    /// Reads the register at `offset`, a multiple of 4.
    pub fn read(self, offset: u16) -> u32 {
        match self.bus {
            Bus::Ecam(base) => base.read32(u64::from(self.slot) << 15 | u64::from(offset)),
            Bus::Ports => {
                cpu::outl(
                    0xcf8,
                    1 << 31 | u32::from(self.slot) << 11 | u32::from(offset),
                );
                cpu::inl(0xcfc)
            }
        }
    }

    fn write(self, offset: u16, value: u32) {
        match self.bus {
            Bus::Ecam(base) => base.write32(u64::from(self.slot) << 15 | u64::from(offset), value),
            Bus::Ports => {
                cpu::outl(
                    0xcf8,
                    1 << 31 | u32::from(self.slot) << 11 | u32::from(offset),
                );
                cpu::outl(0xcfc, value);
            }
        }
    }

    /// Answers memory accesses and may write memory itself.
    pub fn enable(self) {
        self.write(
            COMMAND,
            self.read(COMMAND) & 0xffff | COMMAND_MEMORY_AND_MASTER,
        );
    }

    /// Capabilities: (offset, first word).
    pub fn capabilities(self) -> impl Iterator<Item = (u16, u32)> {
        let mut next = (self.read(CAPABILITIES) & 0xfc) as u16;
        // At most 48 fit into the space behind the header: a loop in the list ends.
        (0..48).map_while(move |_| {
            let offset = (next != 0).then_some(next)?;
            let word = self.read(offset);
            next = (word >> 8 & 0xfc) as u16;
            Some((offset, word))
        })
    }

    /// Memory of a BAR.
    pub fn bar(self, index: u8) -> Option<Mmio> {
        let offset = BAR0 + 4 * u16::from(index);
        let low = self.read(offset);
        if index > 5 || low & 1 != 0 {
            return None;
        }
        let high = if low & 0x6 == 0x4 {
            u64::from(self.read(offset + 4))
        } else {
            0
        };
        let address = high << 32 | u64::from(low & !0xf);
        if address == 0 {
            None
        } else {
            Mmio::map(address)
        }
    }

    /// Turns MSI-X on, all vectors masked.
    pub fn msix(self) -> Option<Msix> {
        let (offset, word) = self
            .capabilities()
            .find(|(_, word)| *word as u8 == CAPABILITY_MSIX)?;
        let location = self.read(offset + 4);
        let table = Mmio(self.bar((location & 7) as u8)?.0 + u64::from(location & !7));
        self.write(offset, word | MSIX_ENABLE);
        Some(Msix {
            table,
            entry_count: (word >> 16 & 0x7ff) as u16 + 1,
        })
    }
}

impl Msix {
    /// Highest entry of the table.
    pub fn last(self) -> u16 {
        self.entry_count - 1
    }

    /// Routes entry `index`, at most `last`, to `vector` and unmasks it.
    pub fn route(self, index: u16, vector: Vector) {
        let entry = Mmio(self.table.0 + u64::from(index) * MSIX_ENTRY_BYTES);
        for (offset, value) in [(0, MESSAGE_ADDRESS), (4, 0), (8, vector.message()), (12, 0)] {
            entry.write32(offset, value);
        }
    }
}

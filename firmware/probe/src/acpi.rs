// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! What ACPI tells us: where PCI configuration space is mapped, how to power off, how the power button speaks, and where
//! functions come and go ([`Hotplug`]). Table layouts: ACPI 6.5 §5.2; all fields little endian and unaligned.

use core::cell::Cell;

use alloc::vec::Vec;

use crate::cpu;
use crate::hotplug::Hotplug;
use crate::interrupts::{self, Vector};
use crate::memory::{Mmio, firmware_bytes};

/// Where a PC without a hint has the root pointer (ACPI 6.5 §5.2.5.1).
const RSDP_SEARCH: (u64, usize) = (0xe0000, 0x20000);
const POWER_BUTTON: u16 = 1 << 8;
const SLEEP_ENABLE: u16 = 1 << 13;
/// Fixed flags of the FADT.
const HARDWARE_REDUCED: u32 = 1 << 20;

/// What the tables said; empty on a machine without them.
#[derive(Default)]
pub struct Platform {
    /// Memory-mapped configuration space of PCI segment 0.
    pub ecam: Option<u64>,
    /// PM1a event block: status, then enable.
    events: Option<u16>,
    events_bytes: u16,
    control: Option<u16>,
    /// Sleep control register of a hardware-reduced machine: (is memory, address).
    sleep_control: Option<(bool, u64)>,
    /// Input of the I/O APIC for ACPI's events.
    interrupt: Option<u32>,
    /// The event device of a hardware-reduced machine, once listened to, and its interrupts seen.
    button: Cell<Option<(Vector, u32)>>,
    /// Sleep type of \_S5_.
    off_type: u16,
    /// Whether functions come and go.
    pub hotplug: Option<Hotplug>,
}

/// Two bytes of a table; zero past its end.
pub fn u16_at(table: &[u8], offset: usize) -> u16 {
    u64_at(table, offset, 2) as u16
}

fn u32_at(table: &[u8], offset: usize) -> u32 {
    u64_at(table, offset, 4) as u32
}

fn u64_at(table: &[u8], offset: usize, size: usize) -> u64 {
    let bytes = table.get(offset..offset + size).unwrap_or_default();
    bytes
        .iter()
        .rev()
        .fold(0, |value, byte| value << 8 | u64::from(*byte))
}

fn table(address: u64) -> &'static [u8] {
    let length = u32_at(firmware_bytes(address, 36), 4);
    firmware_bytes(address, length as usize)
}

/// The sleep type in `Name(_S5_, Package{type, ...})`: found by its name, as the bytecode has no index.
fn off_type(dsdt: &[u8]) -> Option<u16> {
    let start = dsdt.windows(5).position(|bytes| bytes == b"_S5_\x12")? + 5;
    // Package length: its two top bits count further length bytes. Then the element count, then the first element.
    let element = start + 1 + usize::from(dsdt.get(start)? >> 6) + 1;
    match dsdt.get(element)? {
        0x0a => dsdt.get(element + 1).map(|byte| u16::from(*byte)),
        byte => Some(u16::from(*byte)),
    }
}

/// The interrupts of the generic event device (ACPI 6.5 §5.6.9), the one in a machine of ours: the extended interrupt
/// descriptors (§6.4.3.6) behind its name.
fn event_device_interrupts(dsdt: &[u8]) -> Vec<u32> {
    let name = dsdt.windows(8).position(|bytes| bytes == b"ACPI0013");
    let resources = dsdt.get(name.unwrap_or(dsdt.len())..).unwrap_or_default();
    resources
        .windows(9)
        .filter(|bytes| bytes[..3] == [0x89, 6, 0] && bytes[4] == 1)
        .map(|descriptor| u32_at(descriptor, 5))
        .collect()
}

impl Platform {
    /// Follows the tables from the root pointer, or from where a PC keeps it when `rsdp` is 0.
    pub fn find(rsdp: u64) -> Platform {
        let mut platform = Platform::default();
        let rsdp = if rsdp == 0 {
            let area = firmware_bytes(RSDP_SEARCH.0, RSDP_SEARCH.1);
            let found = area
                .chunks(16)
                .position(|chunk| chunk.starts_with(b"RSD PTR "));
            match found {
                Some(index) => RSDP_SEARCH.0 + index as u64 * 16,
                None => return platform,
            }
        } else {
            rsdp
        };
        let root = firmware_bytes(rsdp, 36);
        let (list, entry_bytes) = match (root[15], u64_at(root, 24, 8)) {
            (2.., xsdt) if xsdt != 0 => (table(xsdt), 8),
            _ => (table(u64_at(root, 16, 4)), 4),
        };
        for entry in list[36..].chunks_exact(entry_bytes) {
            let found = table(u64_at(entry, 0, entry_bytes));
            match &found[..4] {
                b"FACP" => platform.read_fadt(found),
                b"MCFG" => platform.ecam = Some(u64_at(found, 44, 8)),
                _ => {}
            }
        }
        platform
    }

    fn read_fadt(&mut self, fadt: &[u8]) {
        let port = |old: usize, new: usize| {
            let extended = if fadt.get(new) == Some(&1) {
                u64_at(fadt, new + 4, 8)
            } else {
                0
            };
            let address = if extended == 0 {
                u64_at(fadt, old, 4)
            } else {
                extended
            };
            u16::try_from(address).ok().filter(|port| *port != 0)
        };
        let dsdt = match u64_at(fadt, 140, 8) {
            0 => u64_at(fadt, 40, 4),
            extended => extended,
        };
        let dsdt = table(dsdt);
        self.off_type = off_type(dsdt).unwrap_or(0);
        if u32_at(fadt, 112) & HARDWARE_REDUCED == 0 {
            self.interrupt = Some(u32::from(u16_at(fadt, 46)));
            self.events = port(56, 148);
            self.events_bytes = u16::from(fadt[88]);
            self.control = port(64, 172);
            let events = port(80, 220).map(|port| (port, u16::from(fadt[92])));
            self.hotplug = Hotplug::find(dsdt, &[], events);
        } else if u64_at(fadt, 248, 8) != 0 {
            let interrupts = event_device_interrupts(dsdt);
            self.interrupt = interrupts.first().copied();
            self.hotplug = Hotplug::find(dsdt, &interrupts, None);
            self.sleep_control = Some((fadt[244] == 0, u64_at(fadt, 248, 8)));
        }
    }

    /// Whether the machine can be powered off by software.
    pub fn can_power_off(&self) -> bool {
        self.control.is_some() || self.sleep_control.is_some()
    }

    /// Powers the machine off; when it has no ACPI, crashes it, which ends it too.
    pub fn power_off(&self) -> ! {
        if let Some(port) = self.control {
            cpu::outw(port, self.off_type << 10 | SLEEP_ENABLE);
        }
        // ACPI 6.5 §4.8.3.7: sleep type in bits 2 to 4, enable in bit 5.
        let value = (self.off_type << 2 | 1 << 5) as u8;
        match self.sleep_control {
            Some((true, address)) => {
                if let Some(register) = Mmio::map(address) {
                    register.write8(0, value);
                }
            }
            Some((false, address)) => cpu::outb(address as u16, value),
            None => {}
        }
        interrupts::crash()
    }

    /// Lets the power button interrupt, and what functions come and go.
    pub fn listen(&self) {
        if let Some(hotplug) = self.hotplug {
            hotplug.listen();
        }
        let Some((vector, interrupt)) = Vector::allocate().zip(self.interrupt) else {
            return;
        };
        vector.listen_to(interrupt);
        match self.events {
            Some(port) => {
                cpu::outw(port, POWER_BUTTON);
                cpu::outw(port + self.events_bytes / 2, POWER_BUTTON);
            }
            None => self.button.set(Some((vector, vector.count()))),
        }
    }

    /// Whether the power button was pressed since the last call. The button is all that the event device of a
    /// hardware-reduced machine of ours reports.
    pub fn button_pressed(&self) -> bool {
        if let Some((vector, seen)) = self.button.get() {
            let count = vector.count();
            self.button.set(Some((vector, count)));
            return count != seen;
        }
        let Some(port) = self.events else {
            return false;
        };
        let pressed = cpu::inw(port) & POWER_BUTTON != 0;
        if pressed {
            cpu::outw(port, POWER_BUTTON);
        }
        pressed
    }
}

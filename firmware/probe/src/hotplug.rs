// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Functions that come to the PCI bus and leave it: the registers that our machines' AML drives, driven without AML. The
//! tables say where they are and which event speaks for them; both are found by their names in the bytecode.

use crate::acpi::u16_at;
use crate::cpu;
use crate::interrupts::Vector;

const LEAVE: u16 = 4;
const EJECT: u16 = 8;

/// The registers and their event.
#[derive(Clone, Copy, Debug)]
pub struct Hotplug {
    port: u16,
    event: Event,
}

#[derive(Clone, Copy, Debug)]
enum Event {
    /// An interrupt of the generic event device, by its input of the I/O APIC.
    Interrupt(u32),
    /// A bit of the status register at that port; the enable register is so many ports on.
    Bit { port: u16, enable: u16, bit: u8 },
}

impl Hotplug {
    /// Looks for them. `interrupts` are those of the generic event device, `events` first port and bytes of the
    /// general-purpose event block.
    pub fn find(dsdt: &[u8], interrupts: &[u32], events: Option<(u16, u16)>) -> Option<Hotplug> {
        // OperationRegion (REGS, SystemIO, a word, …
        let region = dsdt.windows(6).position(|bytes| bytes == b"REGS\x01\x0b")?;
        let port = u16_at(dsdt, region + 6);
        let event = match events {
            // The button's is the first.
            None => Event::Interrupt(*interrupts.get(1)?),
            Some((base, bytes)) => {
                // Method (_Exx, 0) { \_SB.PHPC.SCAN () }
                let call = dsdt
                    .windows(12)
                    .position(|bytes| bytes == b"_SB_PHPCSCAN")?;
                let name = dsdt.get(call.checked_sub(8)?..call - 4)?;
                let digits = core::str::from_utf8(name.strip_prefix(b"_E")?).ok()?;
                let number = u8::from_str_radix(digits, 16).ok()?;
                Event::Bit {
                    port: base + u16::from(number / 8),
                    enable: bytes / 2,
                    bit: 1 << (number % 8),
                }
            }
        };
        Some(Hotplug { port, event })
    }

    /// Lets the event interrupt.
    pub fn listen(self) {
        match self.event {
            Event::Interrupt(input) => {
                if let Some(vector) = Vector::allocate() {
                    vector.listen_to(input);
                }
            }
            Event::Bit { port, enable, bit } => {
                cpu::outb(port, bit);
                cpu::outb(port + enable, bit);
            }
        }
    }

    /// Slots to look at and slots that are wanted back, since the last call.
    pub fn take(self) -> (u32, u32) {
        if let Event::Bit { port, bit, .. } = self.event {
            cpu::outb(port, bit);
        }
        let take = |port: u16| {
            let value = cpu::inl(port);
            if value != 0 {
                cpu::outl(port, value);
            }
            value
        };
        (take(self.port), take(self.port + LEAVE))
    }

    /// Lets a slot's function go.
    pub fn eject(self, slot: u8) {
        cpu::outl(self.port + EJECT, 1 << (slot & 31));
    }
}

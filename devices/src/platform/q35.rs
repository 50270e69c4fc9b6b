// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The PCI functions by which firmware recognises a Q35 board: the host bridge (82G33, 0:0.0) and the LPC bridge
//! (ICH9, 0:1f.0).
//!
//! Registers that firmware programs hold what is written and change nothing: the board's map is fixed where OVMF
//! puts it (PCIEXBAR, PMBASE), RAM is writable everywhere (PAM), and there are no pins to route (PIRQ).

use crate::pci::{ConfigSpace, Identity, PciDevice};

/// Slot of the LPC bridge, where an ICH9 has it (0:1f.0).
pub const LPC_SLOT: usize = 0x1f;

/// Host bridge: PCI Express base address (Intel 3 Series Express Chipset datasheet §5.1.16), eight bytes.
const PCIEXBAR: usize = 0x60;
/// Bits of it that can be written: base from 64 MiB granularity on, length, enable.
const PCIEXBAR_WRITABLE: [u8; 8] = [0x07, 0, 0, 0xfc, 0x0f, 0, 0, 0];
/// Programmable attribute maps: seven bytes of where ROM shadows are writable (§5.1.20).
const PAM: usize = 0x90;
/// SMRAM control, extended SMRAM control (§5.1.30).
const SMRAM: usize = 0x9d;

/// LPC bridge: command register, whose I/O, memory and bus master bits are always set (ICH9 datasheet §13.1.3).
/// OVMF finds out by writing; without I/O it connects nothing behind the bridge, the serial port least of all.
const COMMAND: usize = 0x04;
const COMMAND_ALWAYS: u8 = 0x07;
/// PM base address (§13.1.13).
const PMBASE: usize = 0x40;
/// ACPI control (§13.1.14): bit 7 enables the ports at PMBASE.
const ACPI_CONTROL: usize = 0x44;
const ACPI_ENABLE: u8 = 1 << 7;
/// Interrupt routes of the pins A to D, and E to H (§13.1.17).
const PIRQ: [usize; 2] = [0x60, 0x68];
/// No interrupt for that pin.
const PIRQ_DISABLED: u8 = 1 << 7;
/// Root complex base address (§13.1.37).
const ROOT_COMPLEX: usize = 0xf0;

/// Configuration space of the host bridge at power-on, for [`crate::pci::PciBus`]'s slot 0.
#[must_use]
pub fn host_bridge() -> ConfigSpace {
    let mut space = ConfigSpace::new(Identity {
        vendor: 0x8086,
        device: 0x29c0,
        subsystem_vendor: 0x1af4,
        subsystem: 0x1100,
        class: 0x06_00_00,
        revision: 0,
    });
    space.set_writable(PCIEXBAR, &PCIEXBAR_WRITABLE);
    space.set_writable(PAM, &[0x30, 0x33, 0x33, 0x33, 0x33, 0x33, 0x33]);
    // Neither opens nor locks anything: there is no system management mode.
    space.set_writable(SMRAM, &[0, 0]);
    space
}

/// The LPC bridge, with its PM ports enabled at `pm_base` from power-on.
pub struct LpcBridge {
    /// First port of the PM block, which PMBASE shows at power-on; to write another one there moves nothing.
    pub pm_base: u16,
}

impl PciDevice for LpcBridge {
    fn config_space(&self) -> ConfigSpace {
        let mut space = ConfigSpace::new(Identity {
            vendor: 0x8086,
            device: 0x2918,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
            class: 0x06_01_00,
            revision: 2,
        });
        space.put(COMMAND, &[COMMAND_ALWAYS]);
        space.set_writable(COMMAND, &[0]);
        // Bit 0 says that these are ports. Read-only, since the ports do not move.
        space.put(PMBASE, &(self.pm_base | 1).to_le_bytes());
        space.put(ACPI_CONTROL, &[ACPI_ENABLE]);
        for first in PIRQ {
            space.put(first, &[PIRQ_DISABLED; 4]);
            space.set_writable(first, &[0x8f; 4]);
        }
        space.set_writable(ROOT_COMPLEX, &[0x01, 0xc0, 0xff, 0xff]);
        space
    }

    fn bar_read(&self, _: usize, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn bar_write(&self, _: usize, _: u64, _: &[u8]) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn firmware_finds_the_identities_and_the_pm_ports() {
        let bridge = host_bridge();
        assert_eq!(bridge.get::<4>(0), [0x86, 0x80, 0xc0, 0x29]);
        let mut lpc = LpcBridge { pm_base: 0x600 }.config_space();
        assert_eq!(lpc.get::<4>(0), [0x86, 0x80, 0x18, 0x29]);
        assert_eq!(lpc.get::<3>(9), [0, 1, 6]);
        assert_eq!(lpc.get::<5>(0x40), [0x01, 0x06, 0, 0, 0x80]);
        for written in [0, 0xff] {
            lpc.write(0x04, &[written]);
            assert_eq!(lpc.get::<1>(0x04), [0x07]);
        }
        lpc.write(0x40, &[0xff; 8]);
        assert_eq!(lpc.get::<5>(0x40), [0x01, 0x06, 0, 0, 0x80]);
    }

    #[test]
    fn what_firmware_programs_is_kept() {
        let mut bridge = host_bridge();
        bridge.write(0x60, &0xb000_0001_u32.to_le_bytes());
        assert_eq!(bridge.get::<4>(0x60), 0xb000_0001_u32.to_le_bytes());
        bridge.write(0x90, &[0xff; 8]);
        assert_eq!(
            bridge.get::<8>(0x90),
            [0x30, 0x33, 0x33, 0x33, 0x33, 0x33, 0x33, 0]
        );
    }
}

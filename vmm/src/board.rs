// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The two boards as data: where the profiles differ. What they share is in `layout.rs`; both are migration ABI
//! of machine version 1.
//!
//! ```text
//!               micro                          pc (a Q35's map, as OVMF expects it)
//! low RAM       up to 3 GiB                    up to 2 GiB
//! ECAM          0xe000_0000                    0xb000_0000 (OVMF programs PCIEXBAR so)
//! BAR window    0xc000_0000, 512 MiB           0xc000_0000, 960 MiB; and above RAM
//! KVM's pages   0xfffb_c000                    0xfeff_c000, below the firmware's flash
//! ACPI          hardware-reduced, GED          PM1, GPE0, PM timer at 0x600; SCI 9
//! legacy        serial port                    also RTC, PIT, fw_cfg, flash, debug port, LPC bridge
//! ```

use atoll_devices::pci::Window;
use atoll_firmware::acpi::{AcpiDevice, Platform, Power};
use atoll_firmware::boot::{MemoryKind, MemoryRange};
use atoll_vmm_protocol::spec::Profile;

use crate::layout;

/// One board: its address map and which parts it has. A constant; what is in it is migration ABI (`layout.rs`).
#[derive(Debug)]
pub struct Board {
    /// The name by which a spec chooses it.
    pub profile: Profile,
    /// End (exclusive) of RAM below the holes for devices under 4 GiB.
    pub low_ram_end: u64,
    /// First address of PCI configuration space by memory (ECAM), 1 MiB a bus.
    pub ecam: u32,
    /// Window for the BARs of PCI devices below 4 GiB.
    pub window: u32,
    /// Length of that window, bytes.
    pub window_bytes: u32,
    /// Whether BARs may also be above RAM. Firmware puts 64-bit BARs there.
    pub high_window: bool,
    /// A page and then three pages that KVM needs on some Intel CPUs: identity map, task state segment
    /// (`Documentation/virt/kvm/api.rst` §4.35, §4.36).
    pub kvm_pages: u64,
    /// Power registers and the place of events.
    pub power: Power,
    /// Numbers that ACPI devices can have for their events (see [`Power`]), in the order they are given.
    pub events: &'static [u8],
}

/// The smallest machine: a kernel is booted directly, and ACPI is hardware-reduced.
pub const MICRO: Board = Board {
    profile: Profile::Micro,
    low_ram_end: 3 << 30,
    ecam: 0xe000_0000,
    window: 0xc000_0000,
    window_bytes: 0x2000_0000,
    high_window: false,
    kvm_pages: 0xfffb_c000,
    power: Power::Reduced {
        button_gsi: 5,
        sleep_port: layout::POWER_PORT,
        reset_port: layout::POWER_PORT + 2,
    },
    // Pins that nothing else has: not the serial port's 4, the button's 5, nor those with a fixed meaning.
    events: &[6, 7, 9, 10, 11, 12, 16, 17, 18, 19],
};

/// A machine for firmware and stock disk images: a Q35's map, with a PC's power management.
pub const PC: Board = Board {
    profile: Profile::Pc,
    low_ram_end: 2 << 30,
    ecam: 0xb000_0000,
    window: 0xc000_0000,
    window_bytes: 0x3c00_0000,
    high_window: true,
    kvm_pages: 0xfeff_c000,
    power: Power::Pc {
        pm_base: layout::PM_PORT,
        sci_gsi: 9,
    },
    events: &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15],
};

impl Board {
    /// The board of that name; there is one for each.
    #[must_use]
    pub fn of(profile: Profile) -> &'static Self {
        match profile {
            Profile::Micro => &MICRO,
            Profile::Pc => &PC,
        }
    }

    /// RAM of a machine: base and size of each range, ascending.
    #[must_use]
    pub fn ram(&self, memory_bytes: u64) -> Vec<(u64, u64)> {
        let low = memory_bytes.min(self.low_ram_end);
        let mut ranges = vec![(0, low)];
        if memory_bytes > low {
            ranges.push((layout::HIGH_RAM, memory_bytes - low));
        }
        ranges
    }

    /// End (exclusive) of the last range of RAM.
    #[must_use]
    pub fn ram_end(&self, memory_bytes: u64) -> u64 {
        self.ram(memory_bytes)
            .last()
            .map_or(0, |(base, size)| base + size)
    }

    /// Where BARs may be, the window of power-on first.
    #[must_use]
    pub fn windows(&self, memory_bytes: u64, address_bits: u8) -> Vec<Window> {
        let mut windows = vec![Window {
            base: self.window.into(),
            size: self.window_bytes.into(),
        }];
        let end = 1_u64 << address_bits;
        let base = self
            .ram_end(memory_bytes)
            .max(layout::HIGH_RAM)
            .next_multiple_of(1 << 30);
        if self.high_window && base < end {
            let size = end - base;
            windows.push(Window { base, size });
        }
        windows
    }

    /// The memory map that a directly booted kernel is told.
    #[must_use]
    pub fn memory_map(&self, memory_bytes: u64) -> Vec<MemoryRange> {
        let range = |base, end, kind| MemoryRange {
            base,
            size: end - base,
            kind,
        };
        let low_end = memory_bytes.min(self.low_ram_end);
        let mut map = vec![
            range(0, layout::CONVENTIONAL_END, MemoryKind::Ram),
            range(
                layout::CONVENTIONAL_END,
                layout::KERNEL,
                MemoryKind::Reserved,
            ),
        ];
        if low_end > layout::KERNEL {
            map.push(range(layout::KERNEL, low_end, MemoryKind::Ram));
        }
        let ecam = u64::from(self.ecam);
        let ecam_end = ecam + (u64::from(layout::BUS_COUNT) << 20);
        map.push(range(ecam, ecam_end, MemoryKind::Reserved));
        for (base, size) in self.ram(memory_bytes).into_iter().skip(1) {
            map.push(range(base, base + size, MemoryKind::Ram));
        }
        map
    }

    /// The hardware as ACPI tells it; `windows` are those of [`Board::windows`].
    #[must_use]
    pub fn platform(
        &self,
        cpu_count: u8,
        windows: &[Window],
        devices: Vec<AcpiDevice>,
    ) -> Platform {
        let high = windows.get(1);
        Platform {
            tables_address: layout::ACPI,
            cpu_count,
            lapic_address: layout::LAPIC,
            ioapic_address: layout::IOAPIC,
            ecam_address: self.ecam,
            bus_count: layout::BUS_COUNT,
            window_address: self.window,
            window_size: self.window_bytes,
            high_window: high.map(|window| (window.base, window.base + (window.size - 1))),
            serial_port: layout::SERIAL_PORT,
            serial_gsi: layout::SERIAL_GSI,
            power: self.power,
            devices,
            hotplug: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use atoll_firmware::acpi::PciHotplug;

    #[test]
    fn ram_goes_around_the_hole() {
        assert_eq!(MICRO.ram(1 << 20), [(0, 1 << 20)]);
        assert_eq!(MICRO.ram(3 << 30), [(0, 3 << 30)]);
        assert_eq!(MICRO.ram(5 << 30), [(0, 3 << 30), (4 << 30, 2 << 30)]);
        assert_eq!(PC.ram(5 << 30), [(0, 2 << 30), (4 << 30, 3 << 30)]);
        let ends = [2 << 30, 5 << 30].map(|bytes| MICRO.ram_end(bytes));
        assert_eq!(ends, [2 << 30, 6 << 30]);
    }

    #[test]
    fn the_memory_map_ascends_without_overlap_and_holds_all_ram() {
        for board in [&MICRO, &PC] {
            for mib in [1, 2, 512, 3072, 3073, 1 << 20] {
                let map = board.memory_map(mib << 20);
                for pair in map.windows(2) {
                    assert!(pair[0].base + pair[0].size <= pair[1].base, "{pair:?}");
                }
                let ram: u64 = map
                    .iter()
                    .filter(|range| range.kind == MemoryKind::Ram)
                    .map(|range| range.size)
                    .sum();
                let hole = layout::KERNEL - layout::CONVENTIONAL_END;
                assert_eq!(ram, (mib << 20) - hole);
            }
        }
    }

    #[test]
    fn the_high_window_is_above_ram_and_within_the_address_space() {
        let windows = PC.windows(5 << 30, 40);
        let gib = 1_u64 << 30;
        assert_eq!((windows[1].base, windows[1].size), (7 * gib, 1017 * gib));
        assert_eq!(PC.windows(1 << 30, 40)[1].base, 4 * gib);
        assert_eq!(PC.windows(1 << 30, 32).len(), 1);
        assert_eq!(MICRO.windows(5 << 30, 40).len(), 1);
    }

    #[test]
    fn tables_of_the_largest_machine_fit_below_the_reset_code() {
        for board in [&MICRO, &PC] {
            let windows = board.windows(1 << 30, 40);
            let mut platform = board.platform(layout::CPU_COUNT_MAX, &windows, Vec::new());
            platform.hotplug = Some(PciHotplug {
                port: layout::PCI_HOTPLUG_PORT,
                event: board.events[0],
                slots: u32::MAX,
            });
            let tables = atoll_firmware::acpi::tables(&platform);
            let end = layout::ACPI + tables.len() as u64;
            assert!(end <= layout::SMBIOS, "{end:#x}");
        }
    }
}

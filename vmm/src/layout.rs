// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The machine's address map: guest-physical addresses, ports and interrupts, for machine version 1.
//!
//! It is migration ABI: a guest keeps its map for as long as it runs, across hosts and releases of this
//! program. A change is a new machine version beside this one, never an edit.
//!
//! ```text
//! 0x0000_0500  boot GDT and IDT        0x0010_0000  kernel
//! 0x0000_6000  PVH start_info          …            initial RAM disk, as high as it may be
//! 0x0000_7000  Linux zero page         0xc000_0000  end of low RAM; window for BARs, 512 MiB
//! 0x0000_9000  boot page tables        0xe000_0000  PCI configuration (ECAM), 1 MiB a bus
//! 0x0002_0000  command line            0xfec0_0000  I/O APIC
//! 0x0009_fc00  end of conventional RAM 0xfee0_0000  local APICs
//! 0x000e_0000  ACPI tables             0x1_0000_0000 high RAM
//! ```

use atoll_firmware::acpi::Platform;
use atoll_firmware::boot::{MemoryKind, MemoryRange};

/// Version of everything in this file, told by `info`.
pub const MACHINE_VERSION: u32 = 1;

/// Most vCPUs: local APIC ids are bytes, and 255 is the broadcast.
pub const CPU_COUNT_MAX: u8 = 255;

/// Boot GDT, four descriptors.
pub const GDT: u64 = 0x500;
/// Boot IDT, one empty gate.
pub const IDT: u64 = 0x520;
/// PVH start_info with its lists.
pub const PVH_START_INFO: u64 = 0x6000;
/// Linux zero page.
pub const ZERO_PAGE: u64 = 0x7000;
/// Stack pointer at the first instruction of a Linux kernel.
pub const BOOT_STACK: u64 = 0x8ff0;
/// PML4, PDPT and page directory of the boot identity map.
pub const PAGE_TABLES: u64 = 0x9000;
/// Kernel command line.
pub const CMDLINE: u64 = 0x2_0000;
/// Bytes for it, its final zero included.
pub const CMDLINE_BYTES_MAX: u64 = 0x1_0000;
/// End of the RAM that a PC calls conventional: what is above, up to the kernel, belongs to firmware.
pub const CONVENTIONAL_END: u64 = 0x9_fc00;
/// ACPI tables, the RSDP first, where a kernel that is not told searches for it.
pub const ACPI: u64 = 0xe_0000;
/// Where a PC's processors begin after a reset, as real mode sees it (F000:FFF0): a kernel that gives up on
/// other ways to restart jumps here. Also the end of the ACPI tables' room.
pub const RESET_VECTOR: u64 = 0xf_fff0;
/// Kernel image.
pub const KERNEL: u64 = 0x10_0000;
/// End (exclusive) of RAM below the holes for devices under 4 GiB.
pub const LOW_RAM_END: u64 = 3 << 30;
/// Window for the BARs of PCI devices.
pub const WINDOW: u32 = 0xc000_0000;
/// Its length.
pub const WINDOW_BYTES: u32 = 0x2000_0000;
/// PCI configuration space by memory.
pub const ECAM: u32 = 0xe000_0000;
/// PCI buses.
pub const BUS_COUNT: u8 = 1;
/// Four pages that KVM needs on some Intel CPUs: identity map, then task state segment
/// (`Documentation/virt/kvm/api.rst` §4.35, §4.36).
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// The three pages after it.
pub const KVM_TSS: usize = 0xfffb_d000;
/// I/O APIC, where KVM's is.
pub const IOAPIC: u32 = 0xfec0_0000;
/// Local APICs, where KVM's are.
pub const LAPIC: u32 = 0xfee0_0000;
/// Start of the RAM that does not fit below [`LOW_RAM_END`].
pub const HIGH_RAM: u64 = 4 << 30;

/// COM1.
pub const SERIAL_PORT: u16 = 0x3f8;
/// Ports of COM1.
pub const SERIAL_PORT_COUNT: u16 = 8;
/// Interrupt of COM1.
pub const SERIAL_GSI: u32 = 4;
/// Interrupt of the power button's event device.
pub const POWER_GSI: u32 = 5;
/// Sleep control and sleep status registers, then the reset register: a byte each.
pub const POWER_PORT: u16 = 0x600;
/// Ports of the power registers.
pub const POWER_PORT_COUNT: u16 = 3;
/// Address register of PCI configuration mechanism #1; the data register is four ports on.
pub const PCI_CONFIG_PORT: u16 = 0xcf8;
/// Ports of that mechanism.
pub const PCI_CONFIG_PORT_COUNT: u16 = 8;

/// First interrupt number that is no pin of the I/O APIC: MSIs are routed from here on.
pub const MSI_GSI: u32 = 24;

/// RAM of a machine: base and size of each range, ascending.
#[must_use]
pub fn ram(memory_bytes: u64) -> Vec<(u64, u64)> {
    let low = memory_bytes.min(LOW_RAM_END);
    let mut ranges = vec![(0, low)];
    if memory_bytes > low {
        ranges.push((HIGH_RAM, memory_bytes - low));
    }
    ranges
}

/// End (exclusive) of the last range of RAM.
#[must_use]
pub fn ram_end(memory_bytes: u64) -> u64 {
    ram(memory_bytes)
        .last()
        .map_or(0, |(base, size)| base + size)
}

/// The memory map that the kernel is told.
#[must_use]
pub fn memory_map(memory_bytes: u64) -> Vec<MemoryRange> {
    let range = |base, end, kind| MemoryRange {
        base,
        size: end - base,
        kind,
    };
    let low_end = memory_bytes.min(LOW_RAM_END);
    let mut map = vec![
        range(0, CONVENTIONAL_END, MemoryKind::Ram),
        range(CONVENTIONAL_END, KERNEL, MemoryKind::Reserved),
    ];
    if low_end > KERNEL {
        map.push(range(KERNEL, low_end, MemoryKind::Ram));
    }
    let ecam = u64::from(ECAM);
    let ecam_end = ecam + (u64::from(BUS_COUNT) << 20);
    map.push(range(ecam, ecam_end, MemoryKind::Reserved));
    for (base, size) in ram(memory_bytes).into_iter().skip(1) {
        map.push(range(base, base + size, MemoryKind::Ram));
    }
    map
}

/// The hardware as ACPI tells it.
#[must_use]
pub fn platform(cpu_count: u8) -> Platform {
    Platform {
        tables_address: ACPI,
        cpu_count,
        lapic_address: LAPIC,
        ioapic_address: IOAPIC,
        ecam_address: ECAM,
        bus_count: BUS_COUNT,
        window_address: WINDOW,
        window_size: WINDOW_BYTES,
        serial_port: SERIAL_PORT,
        serial_gsi: SERIAL_GSI,
        power_gsi: POWER_GSI,
        sleep_port: POWER_PORT,
        reset_port: POWER_PORT + 2,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_goes_around_the_hole() {
        assert_eq!(ram(1 << 20), [(0, 1 << 20)]);
        assert_eq!(ram(3 << 30), [(0, 3 << 30)]);
        assert_eq!(ram(5 << 30), [(0, 3 << 30), (4 << 30, 2 << 30)]);
        assert_eq!((ram_end(2 << 30), ram_end(5 << 30)), (2 << 30, 6 << 30));
    }

    #[test]
    fn the_memory_map_ascends_without_overlap_and_holds_all_ram() {
        for mib in [1, 2, 512, 3072, 3073, 1 << 20] {
            let map = memory_map(mib << 20);
            for pair in map.windows(2) {
                assert!(pair[0].base + pair[0].size <= pair[1].base, "{pair:?}");
            }
            let ram: u64 = map
                .iter()
                .filter(|range| range.kind == MemoryKind::Ram)
                .map(|range| range.size)
                .sum();
            assert_eq!(ram, (mib << 20) - (KERNEL - CONVENTIONAL_END));
        }
    }

    #[test]
    fn tables_of_the_largest_machine_fit_below_the_kernel() {
        let tables = atoll_firmware::acpi::tables(&platform(CPU_COUNT_MAX));
        assert!(ACPI + tables.len() as u64 <= KERNEL, "{}", tables.len());
    }
}

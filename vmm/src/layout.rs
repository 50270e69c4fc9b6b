// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The machine's address map: guest-physical addresses, ports and interrupts, for machine version 1, as far as
//! the boards share them (where they differ: `board.rs`).
//!
//! It is migration ABI: a guest keeps its map for as long as it runs, across hosts and releases of this
//! program. A change is a new machine version beside this one, never an edit.
//!
//! ```text
//! 0x0000_0500  boot GDT and IDT        0x0010_0000  kernel
//! 0x0000_6000  PVH start_info          …            initial RAM disk, as high as it may be
//! 0x0000_7000  Linux zero page         0xc000_0000  window for BARs
//! 0x0000_9000  boot page tables        0xffff_fff0  reset vector (`pc`: the firmware's flash ends at 4 GiB)
//! 0x0002_0000  command line            0xfec0_0000  I/O APIC
//! 0x0009_fc00  end of conventional RAM 0xfee0_0000  local APICs
//! 0x000d_f000  generation id           0x1_0000_0000 high RAM
//! 0x000e_0000  ACPI tables
//! 0x000f_0000  SMBIOS (`pc`)
//! ```

/// Version of everything in this file, told by `info`.
pub const MACHINE_VERSION: u32 = 1;

/// Most vCPUs: local APIC ids are bytes, and 255 is the broadcast.
pub const CPU_COUNT_MAX: u8 = 255;

/// Boot GDT: four descriptors of eight bytes.
pub const GDT: u64 = 0x500;
/// Boot IDT: one empty gate, as interrupts are off until a kernel has its own.
pub const IDT: u64 = 0x520;
/// PVH's `hvm_start_info`, with its memory map and module list behind it.
pub const PVH_START_INFO: u64 = 0x6000;
/// Linux's zero page (`struct boot_params`), 4096 bytes.
pub const ZERO_PAGE: u64 = 0x7000;
/// Stack pointer at the first instruction of a Linux kernel.
pub const BOOT_STACK: u64 = 0x8ff0;
/// PML4, PDPT and page directory of the boot identity map.
pub const PAGE_TABLES: u64 = 0x9000;
/// Kernel command line, ended by a zero byte.
pub const CMDLINE: u64 = 0x2_0000;
/// Bytes for it, its final zero included.
pub const CMDLINE_BYTES_MAX: u64 = 0x1_0000;
/// End of the RAM that a PC calls conventional: what is above, up to the kernel, belongs to firmware.
pub const CONVENTIONAL_END: u64 = 0x9_fc00;
/// Generation id of a kernel that is booted directly: sixteen bytes, alone in their page.
pub const GENERATION_ID: u32 = 0xd_f000;
/// ACPI tables, the RSDP first, where a kernel that is not told searches for it.
pub const ACPI: u64 = 0xe_0000;
/// SMBIOS entry point and tables of a kernel that is booted directly on the `pc` board: Linux searches from here.
pub const SMBIOS: u64 = 0xf_0000;
/// Where a PC's processors begin after a reset, as real mode sees it (F000:FFF0): a kernel that gives up on
/// other ways to restart jumps here. Also the end of the SMBIOS tables' room.
pub const RESET_VECTOR: u64 = 0xf_fff0;
/// First address for a kernel's image, the end of a PC's first MiB.
pub const KERNEL: u64 = 0x10_0000;
/// PCI buses, each with 32 slots; the only one is 0.
pub const BUS_COUNT: u8 = 1;
/// Registers of the I/O APIC, where KVM's are and a PC's.
pub const IOAPIC: u32 = 0xfec0_0000;
/// Registers of the local APICs, where KVM's are and a PC's.
pub const LAPIC: u32 = 0xfee0_0000;
/// Start of the RAM that does not fit below the holes under 4 GiB.
pub const HIGH_RAM: u64 = 4 << 30;

/// First port of the serial port COM1.
pub const SERIAL_PORT: u16 = 0x3f8;
/// Ports of COM1: a 16550's eight registers.
pub const SERIAL_PORT_COUNT: u16 = 8;
/// Interrupt of COM1, a pin of the I/O APIC.
pub const SERIAL_GSI: u32 = 4;
/// Interrupt of the CMOS clock on the `pc` board: a PC's.
pub const CLOCK_GSI: u32 = 8;
/// Sleep control and sleep status registers, then the reset register: a byte each.
pub const POWER_PORT: u16 = 0x600;
/// Ports from [`POWER_PORT`] on.
pub const POWER_PORT_COUNT: u16 = 3;
/// `pc`: first port of the PM blocks, where an ICH9's PMBASE is set by OVMF.
pub const PM_PORT: u16 = 0x600;
/// Address register of PCI configuration mechanism #1; the data register is four ports on.
pub const PCI_CONFIG_PORT: u16 = 0xcf8;
/// Ports from [`PCI_CONFIG_PORT`] on: both registers of that mechanism.
pub const PCI_CONFIG_PORT_COUNT: u16 = 8;
/// Registers of PCI hot-plug: our choice, where nothing of a PC's is.
pub const PCI_HOTPLUG_PORT: u16 = 0xae00;

/// First interrupt number that is no pin of the I/O APIC: MSIs are routed from here on.
pub const MSI_GSI: u32 = 24;

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Bytes in guest memory before the first instruction: ACPI tables, boot parameters, page tables.
//!
//! Pure: everything here turns numbers into bytes, for x86_64. Where the bytes go in guest memory is the
//! VMM's address map (`atoll-vmm`, `layout.rs`); which ports and interrupts answer is in [`acpi::Platform`].
//! Called by the VMM's loader, at start and at every reset.
//!
//! ```text
//! acpi          RSDP, XSDT, FADT, FACS, MADT, MCFG, DSDT
//! boot          memory map, Linux zero page, PVH start_info, place of the initrd
//! paging        GDT and identity map for an entry in long mode
//! smbios        what the guest reads about its board
//! table_loader  the ACPI tables as firmware fetches and places them
//! ```

pub mod acpi;
pub mod boot;
pub mod paging;
pub mod smbios;
pub mod table_loader;

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! What a kernel is told when it is entered: the map of memory, the command line, the initial RAM disk.
//!
//! Two protocols say the same: Linux's zero page (kernel `Documentation/arch/x86/boot.rst`, for a bzImage)
//! and PVH's `hvm_start_info` (Xen `include/public/arch-x86/hvm/start_info.h`, for an ELF with a PVH note).

/// Bytes of Linux's `struct boot_params`, the zero page: what [`zero_page`] returns.
pub const ZERO_PAGE_BYTES: usize = 4096;
/// Most entries of the zero page's memory map (`E820_MAX_ENTRIES_ZEROPAGE`).
pub const E820_ENTRIES_MAX: usize = 128;

/// `HVM_START_MAGIC_VALUE`.
const PVH_MAGIC: u32 = 0x336e_c578;
/// Version 1 has the memory map.
const PVH_VERSION: u32 = 1;
/// Granularity of the initial RAM disk's place.
const PAGE_BYTES: u64 = 4096;

/// What a range of guest-physical addresses is. The numbers are those of ACPI's E820 map, which PVH shares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MemoryKind {
    /// Free for the kernel.
    Ram = 1,
    /// Not RAM, or not the kernel's.
    Reserved = 2,
}

/// One range of the memory map that firmware or a kernel reads; ranges ascend and do not overlap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryRange {
    /// First guest-physical address.
    pub base: u64,
    /// Length, bytes, at least 1.
    pub size: u64,
    /// What the guest may do with it.
    pub kind: MemoryKind,
}

/// The map as firmware reads it from the file `etc/e820`: 20 bytes a range, as in Linux's zero page.
#[must_use]
pub fn e820(map: &[MemoryRange]) -> Vec<u8> {
    map.iter().flat_map(e820_entry).collect()
}

fn e820_entry(range: &MemoryRange) -> Vec<u8> {
    let mut entry = Vec::with_capacity(20);
    entry.extend(range.base.to_le_bytes());
    entry.extend(range.size.to_le_bytes());
    entry.extend((range.kind as u32).to_le_bytes());
    entry
}

/// Everything that either boot protocol hands over: Linux's zero page (kernel `Documentation/arch/x86/boot.rst`) or PVH's
/// start_info (Xen `docs/misc/pvh.pandoc`). Addresses are guest-physical.
#[derive(Debug, Clone, Copy)]
pub struct Parameters<'a> {
    /// RAM and reserved ranges, ascending, at most [`E820_ENTRIES_MAX`].
    pub memory: &'a [MemoryRange],
    /// Address of the command line, which ends with a zero byte.
    pub cmdline_address: u64,
    /// Length of the command line without that byte.
    pub cmdline_size: u32,
    /// Address and size of the initial RAM disk.
    pub initrd: Option<(u64, u64)>,
    /// Address of ACPI's RSDP; the rest of the tables is found from there.
    pub rsdp_address: u64,
}

/// The initial RAM disk does not fit between the kernel and the end of the memory it may use.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "an initial RAM disk of {size} bytes does not fit below {ceiling:#x}, above the kernel's end at {floor:#x}: give the machine more memory"
)]
pub struct NoRoom {
    size: u64,
    floor: u64,
    ceiling: u64,
}

/// What a processor finds at the reset vector, in real mode: a write of `value` to the reset register, whose port
/// is given, and then rest. Linux ends here where the ACPI is hardware-reduced and there is no EFI: its
/// `reboot_init` then prefers EFI's way to restart, and after that the PC's, a jump to F000:FFF0
/// (`machine_real_restart`).
#[must_use]
pub const fn reset_code(port: u16, value: u8) -> [u8; 9] {
    let [low, high] = port.to_le_bytes();
    // mov dx, port; mov al, value; out dx, al; hlt; jmp to the hlt
    [0xba, low, high, 0xb0, value, 0xee, 0xf4, 0xeb, 0xfd]
}

/// Address of an initial RAM disk of `size` bytes: as high as possible, so that it is out of the kernel's way,
/// between `floor` (end of the kernel, once it is unpacked) and `ceiling`.
pub fn initrd_address(size: u64, floor: u64, ceiling: u64) -> Result<u64, NoRoom> {
    let address = ceiling
        .checked_sub(size)
        .map(|address| address & !(PAGE_BYTES - 1));
    address.filter(|address| *address >= floor).ok_or(NoRoom {
        size,
        floor,
        ceiling,
    })
}

/// Linux's zero page. `setup_header` is the kernel's own header, as it stands in the bzImage from offset
/// 0x1f1 on; the fields that a boot loader must fill in are set here.
#[must_use]
pub fn zero_page(setup_header: &[u8], parameters: &Parameters<'_>) -> Vec<u8> {
    assert!(
        parameters.memory.len() <= E820_ENTRIES_MAX,
        "the memory map is a handful of ranges"
    );
    assert!(
        setup_header.len() <= 0x290 - 0x1f1,
        "the setup header ends before edd_mbr_sig_buffer"
    );
    let mut page = vec![0; ZERO_PAGE_BYTES];
    put(&mut page, 0x1f1, setup_header);
    put(&mut page, 0x070, &parameters.rsdp_address.to_le_bytes()); // acpi_rsdp_addr
    page[0x210] = 0xff; // type_of_loader: not one of the registered ones
    let (low, high) = halves(parameters.cmdline_address);
    put(&mut page, 0x228, &low); // cmd_line_ptr
    put(&mut page, 0x0c8, &high); // ext_cmd_line_ptr
    put(&mut page, 0x238, &parameters.cmdline_size.to_le_bytes()); // cmdline_size
    if let Some((address, size)) = parameters.initrd {
        let (low, high) = halves(address);
        put(&mut page, 0x218, &low); // ramdisk_image
        put(&mut page, 0x0c0, &high); // ext_ramdisk_image
        let (low, high) = halves(size);
        put(&mut page, 0x21c, &low); // ramdisk_size
        put(&mut page, 0x0c4, &high); // ext_ramdisk_size
    }
    for (index, range) in parameters.memory.iter().enumerate() {
        let entry = e820_entry(range);
        put(&mut page, 0x2d0 + index * entry.len(), &entry); // e820_table
        page[0x1e8] += 1; // e820_entries
    }
    page
}

/// PVH's `hvm_start_info`, to be written at `base`: the structure, the module list and the memory map.
/// EBX is `base` when the kernel is entered.
#[must_use]
pub fn pvh_start_info(base: u64, parameters: &Parameters<'_>) -> Vec<u8> {
    const START_INFO_BYTES: u64 = 56;
    const MODULE_BYTES: u64 = 32;
    let modules = base + START_INFO_BYTES;
    let map = modules + MODULE_BYTES;
    let entries =
        u32::try_from(parameters.memory.len()).expect("the memory map is a handful of ranges");
    let mut bytes = Vec::new();
    bytes.extend(PVH_MAGIC.to_le_bytes());
    bytes.extend(PVH_VERSION.to_le_bytes());
    bytes.extend(0_u32.to_le_bytes()); // flags
    bytes.extend(u32::from(parameters.initrd.is_some()).to_le_bytes()); // nr_modules
    bytes.extend(modules.to_le_bytes());
    bytes.extend(parameters.cmdline_address.to_le_bytes());
    bytes.extend(parameters.rsdp_address.to_le_bytes());
    bytes.extend(map.to_le_bytes());
    bytes.extend(entries.to_le_bytes());
    bytes.extend(0_u32.to_le_bytes()); // reserved
    let (address, size) = parameters.initrd.unwrap_or_default();
    for word in [address, size, 0, 0] {
        bytes.extend(word.to_le_bytes());
    }
    for range in parameters.memory {
        bytes.extend(range.base.to_le_bytes());
        bytes.extend(range.size.to_le_bytes());
        bytes.extend((range.kind as u32).to_le_bytes());
        bytes.extend(0_u32.to_le_bytes()); // reserved
    }
    bytes
}

fn put(page: &mut [u8], offset: usize, bytes: &[u8]) {
    page[offset..offset + bytes.len()].copy_from_slice(bytes);
}

fn halves(value: u64) -> ([u8; 4], [u8; 4]) {
    let bytes = value.to_le_bytes();
    let [a, b, c, d, e, f, g, h] = bytes;
    ([a, b, c, d], [e, f, g, h])
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEMORY: [MemoryRange; 2] = [
        MemoryRange {
            base: 0,
            size: 0x9_fc00,
            kind: MemoryKind::Ram,
        },
        MemoryRange {
            base: 0xe000_0000,
            size: 0x10_0000,
            kind: MemoryKind::Reserved,
        },
    ];

    fn parameters() -> Parameters<'static> {
        Parameters {
            memory: &MEMORY,
            cmdline_address: 0x2_0000,
            cmdline_size: 7,
            initrd: Some((0x1_2345_6000, 0x789)),
            rsdp_address: 0xe_0000,
        }
    }

    fn u32_at(bytes: &[u8], offset: usize) -> u32 {
        u32::from_le_bytes(bytes[offset..offset + 4].try_into().unwrap())
    }

    fn u64_at(bytes: &[u8], offset: usize) -> u64 {
        u64::from_le_bytes(bytes[offset..offset + 8].try_into().unwrap())
    }

    #[test]
    fn zero_page_holds_what_linux_reads() {
        let header: Vec<u8> = (0..0x77).map(|_| 0xaa).collect();
        let page = zero_page(&header, &parameters());
        assert_eq!(page.len(), 4096);
        assert_eq!(u64_at(&page, 0x70), 0xe_0000);
        assert_eq!(
            (u32_at(&page, 0x218), u32_at(&page, 0xc0)),
            (0x2345_6000, 1)
        );
        assert_eq!((u32_at(&page, 0x21c), u32_at(&page, 0xc4)), (0x789, 0));
        assert_eq!((u32_at(&page, 0x228), u32_at(&page, 0x238)), (0x2_0000, 7));
        assert_eq!((page[0x1f1], page[0x210], page[0x1e8]), (0xaa, 0xff, 2));
        assert_eq!(u64_at(&page, 0x2d0 + 20), 0xe000_0000);
        assert_eq!(u32_at(&page, 0x2d0 + 36), 2);
    }

    #[test]
    fn start_info_points_at_its_own_lists() {
        let bytes = pvh_start_info(0x6000, &parameters());
        assert_eq!(bytes.len(), 56 + 32 + 2 * 24);
        assert_eq!(u32_at(&bytes, 0), 0x336e_c578);
        assert_eq!(u32_at(&bytes, 12), 1);
        let modules = usize::try_from(u64_at(&bytes, 16) - 0x6000).unwrap();
        assert_eq!(u64_at(&bytes, modules), 0x1_2345_6000);
        assert_eq!(u64_at(&bytes, modules + 8), 0x789);
        let map = usize::try_from(u64_at(&bytes, 40) - 0x6000).unwrap();
        assert_eq!(u32_at(&bytes, 48), 2);
        assert_eq!(u64_at(&bytes, map + 24), 0xe000_0000);
        assert_eq!(u32_at(&bytes, map + 24 + 16), 2);
    }

    #[test]
    fn the_initrd_is_high_and_never_in_the_kernel() {
        assert_eq!(initrd_address(0x1001, 0x10_0000, 0x100_0000), Ok(0xff_e000));
        assert_eq!(initrd_address(0, 0x10_0000, 0x10_0000), Ok(0x10_0000));
        let refused = initrd_address(0x10_0000, 0x10_0000, 0x1f_ffff).unwrap_err();
        assert!(refused.to_string().contains("more memory"), "{refused}");
        assert!(initrd_address(u64::MAX, 0, 0x1000).is_err());
    }
}

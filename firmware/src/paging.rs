// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! GDT and page tables for a kernel that is entered in long mode (Linux 64-bit boot protocol).

/// Segment descriptors of the boot GDT, by selector / 8.
pub const GDT: [u64; 4] = [
    0,
    descriptor(0xa09b, 0, 0xf_ffff), // 0x08: 64-bit code
    descriptor(0xc093, 0, 0xf_ffff), // 0x10: data
    descriptor(0x808b, 0, 0xf_ffff), // 0x18: 64-bit TSS, busy
];

/// Segment descriptors for a PVH entry: 32-bit protected mode, flat.
pub const GDT_PVH: [u64; 4] = [
    0,
    descriptor(0xc09b, 0, 0xf_ffff), // 0x08: 32-bit code
    descriptor(0xc093, 0, 0xf_ffff), // 0x10: data
    descriptor(0x008b, 0, 0x67),     // 0x18: 32-bit TSS, busy
];

/// Bytes that [`identity_map`] maps, from address 0.
pub const IDENTITY_BYTES: u64 = 1 << 30;

const PAGE_BYTES: u64 = 4096;
/// Intel SDM vol. 3A §4.5: present and writable.
const TABLE: u64 = 0x03;
/// Intel SDM vol. 3A §4.5: present, writable, page size 2 MiB.
const LARGE_PAGE: u64 = 0x83;

/// Packs a segment descriptor (Intel SDM vol. 3A §3.4.5): `flags` are bits 40 to 55 of it.
#[must_use]
pub const fn descriptor(flags: u16, base: u32, limit: u32) -> u64 {
    let (flags, base, limit) = (flags as u64, base as u64, limit as u64);
    ((base & 0xff00_0000) << 32)
        | ((flags & 0xf0ff) << 40)
        | ((limit & 0xf_0000) << 32)
        | ((base & 0xff_ffff) << 16)
        | (limit & 0xffff)
}

/// Three pages to be written at `base`: PML4, PDPT and page directory, which map the first
/// [`IDENTITY_BYTES`] onto themselves. CR3 is `base`.
#[must_use]
pub fn identity_map(base: u64) -> Vec<u8> {
    let mut entries = vec![0_u64; 3 * 512];
    entries[0] = (base + PAGE_BYTES) | TABLE;
    entries[512] = (base + 2 * PAGE_BYTES) | TABLE;
    for (index, entry) in (0_u64..).zip(&mut entries[1024..]) {
        *entry = (index << 21) | LARGE_PAGE;
    }
    entries.into_iter().flat_map(u64::to_le_bytes).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_packed_as_the_manual_says() {
        assert_eq!(GDT[1], 0x00af_9b00_0000_ffff);
        assert_eq!(GDT[2], 0x00cf_9300_0000_ffff);
        assert_eq!(GDT_PVH[1], 0x00cf_9b00_0000_ffff);
        assert_eq!(GDT_PVH[3], 0x0000_8b00_0000_0067);
        assert_eq!(descriptor(0, 0x1234_5678, 0x9_abcd), 0x1209_0034_5678_abcd);
    }

    #[test]
    fn the_last_large_page_ends_the_identity_map() {
        let bytes = identity_map(0x9000);
        assert_eq!(bytes.len(), 3 * 4096);
        let last = u64::from_le_bytes(bytes[bytes.len() - 8..].try_into().unwrap());
        assert_eq!(last & !0xfff, IDENTITY_BYTES - (2 << 20));
        assert_eq!(&bytes[..2], &[0x03, 0xa0]);
    }
}

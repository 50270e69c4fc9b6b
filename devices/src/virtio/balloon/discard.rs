// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Gives pages of guest RAM back to the host. They read as zeroes, or as they were, until the guest writes them.
#![expect(unsafe_code, reason = "madvise(2) on guest RAM")]

use std::io;

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::memory::{self, Ram};

/// Discards the whole host pages among `size` bytes at the guest-physical `address`; returns their bytes. What is
/// not RAM is an error. May be called by whoever has the RAM, while nothing of the guest runs or at its own wish.
pub fn discard(ram: &Ram, address: u64, size: u64) -> io::Result<u64> {
    let outside = || io::Error::from(io::ErrorKind::InvalidInput);
    let length = usize::try_from(size).map_err(|_| outside())?;
    let start = GuestAddress(address);
    if size == 0 || !GuestMemoryBackend::check_range(ram, start, length) {
        return Err(outside());
    }
    // Memory that is a file's (a memfd) stays in the file unless it is punched out.
    let region = ram.find_region(start).ok_or_else(outside)?;
    let advice = match region.file_offset() {
        None => libc::MADV_DONTNEED,
        Some(_) => libc::MADV_REMOVE,
    };
    let page = rustix::param::page_size();
    let mut discarded = 0;
    for slice in GuestMemoryBackend::get_slices(ram, start, length).flatten() {
        let guard = slice.ptr_guard_mut();
        let first = guard.as_ptr().addr().next_multiple_of(page);
        let end = (guard.as_ptr().addr() + slice.len()) / page * page;
        if first >= end {
            continue;
        }
        if memory::log(region).keeps() {
            let mut pages =
                (first - guard.as_ptr().addr()..end - guard.as_ptr().addr()).step_by(page);
            let written = pages.try_for_each(|offset| slice.write_obj(0_u8, offset));
            written.map_err(io::Error::other)?;
        }
        let pointer = guard.as_ptr().with_addr(first);
        // SAFETY: whole pages inside a slice of mapped guest RAM, which nobody holds Rust references into: all
        // access is volatile, and zeroes instead of old bytes are as good as any that the guest could have written.
        let result = unsafe { libc::madvise(pointer.cast(), end - first, advice) };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        discarded += (end - first) as u64;
    }
    Ok(discarded)
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    #[test]
    fn whole_pages_inside_ram_become_zeroes() {
        let ranges = [(GuestAddress(0x1000), 0x4000)];
        let ram = Ram::from_ranges(&ranges).unwrap();
        ram.write_slice(&[7; 0x4000], GuestAddress(0x1000)).unwrap();
        assert_eq!(discard(&ram, 0x1800, 0x2000).unwrap(), 0x1000);
        let mut seen = [0; 0x4000];
        ram.read_slice(&mut seen, GuestAddress(0x1000)).unwrap();
        assert!(seen[..0x1000].iter().all(|byte| *byte == 7));
        assert!(seen[0x1000..0x2000].iter().all(|byte| *byte == 0));
        assert!(seen[0x2000..].iter().all(|byte| *byte == 7));
        for (address, size) in [
            (0, 0x1000),
            (0x4000, 0x2000),
            (u64::MAX - 10, 0x1000),
            (0x1000, 0),
            (0x1000, u64::MAX),
        ] {
            assert!(discard(&ram, address, size).is_err(), "{address:#x}");
        }
    }
}

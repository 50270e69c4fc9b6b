// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Guest memory that is a kernel's file: its pages are the host's page cache, once for all machines of that kernel, until
//! a guest writes to one and has it for itself (`MAP_PRIVATE`).
//!
//! ```text
//!   file     │ headers │ segment ················· │ segment ···· │
//!   mapped             ▕▔▔▔▔▔▔▔ whole pages ▔▔▔▔▔▏    (others are copied)
//!   guest RAM  ────────┴──────────────────────────┴───────────────── anonymous
//! ```
//!
//! **The file must stay as it is.** A page that no guest has written to is the file's: written in place, the file would
//! change under running guests; truncated, they would be killed by SIGBUS. Where the file lies so that nobody is stopped
//! (no leases), or is being written to, nothing is shared. A lease (`lease`) holds up who wants to write until the
//! machine has copies of its own ([`part`]). A new kernel that is renamed over the old one, as package managers do, is
//! another file, and bothers nobody.
//!
//! What reads guest memory reads these pages as any others, but a page that is not there is no page of zeroes (see
//! `crate::saved::image::Touched`), nor is one that the balloon gave back: it is the file's again.
//!
//! What a guest can learn: by timing, which pages of its kernel's file the host has in memory. Kernels are no secret; still
//! it is for who asks for it.
#![expect(unsafe_code, reason = "mmap(2) and mremap(2) over guest RAM")]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::ptr;

use atoll_devices::memory::PAGE_BYTES;
use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

use super::lease::Lease;
use crate::saved::image::is_zero;

/// Bytes that are copied at a time.
const CHUNK_BYTES: usize = 512 * PAGE_BYTES;

/// A kernel's file whose pages may be guest memory.
#[derive(Debug)]
pub(super) struct Shared {
    /// Absent in tests of what is mapped.
    pub(super) lease: Option<Lease>,
    /// Where its pages are now: addresses of this process.
    pub(super) mapped: Vec<Range<usize>>,
}

/// Makes memory the file's pages from `offset` on; all three begin and end with a page. Returns where that is.
pub(super) fn map<B: BitmapSlice>(
    memory: &VolatileSlice<'_, B>,
    file: &File,
    offset: u64,
) -> io::Result<Range<usize>> {
    let (guard, length) = (memory.ptr_guard_mut(), memory.len());
    let start = guard.as_ptr().expose_provenance();
    assert!(
        [start, length]
            .iter()
            .all(|it| it.is_multiple_of(PAGE_BYTES)),
        "whoever maps has looked for whole pages"
    );
    let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
    // SAFETY: the pages are guest RAM, whole and of one region, which nobody holds Rust references into. They stay mapped,
    // readable and writable, and go with their region.
    let mapped = unsafe {
        libc::mmap(
            guard.as_ptr().cast(),
            length,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE,
            file.as_raw_fd(),
            offset,
        )
    };
    match mapped {
        libc::MAP_FAILED => Err(io::Error::last_os_error()),
        _ => Ok(start..start + length),
    }
}

/// Puts anonymous memory with the same content in the place of what is mapped there. Nothing may write to it meanwhile.
pub(super) fn part(mapped: &Range<usize>) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK_BYTES];
    for start in mapped.clone().step_by(CHUNK_BYTES) {
        let content = &mut buffer[..CHUNK_BYTES.min(mapped.end - start)];
        let length = content.len();
        let from: *mut u8 = ptr::with_exposed_provenance_mut(start);
        // SAFETY: `map` has mapped these pages in guest RAM, which is mapped still, and the caller lets nothing write.
        unsafe { ptr::copy_nonoverlapping(from, content.as_mut_ptr(), length) };
        // SAFETY: a new mapping.
        let copy = unsafe {
            libc::mmap(
                ptr::null_mut(),
                length,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if copy == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        for (index, page) in content.chunks_exact(PAGE_BYTES).enumerate() {
            if !is_zero(page) {
                let to = copy.cast::<u8>().wrapping_add(index * PAGE_BYTES);
                // SAFETY: a page of the new mapping.
                unsafe { ptr::copy_nonoverlapping(page.as_ptr(), to, PAGE_BYTES) };
            }
        }
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        // SAFETY: moves the new mapping over the old one, of the same length, in one step.
        let moved = unsafe { libc::mremap(copy, length, length, flags, from) };
        if moved == libc::MAP_FAILED {
            let error = io::Error::last_os_error();
            // SAFETY: nobody has seen it.
            unsafe { libc::munmap(copy, length) };
            return Err(error);
        }
    }
    Ok(())
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Memory that only the start of a machine needed: what the arguments were parsed into, ACPI tables, filters, and how
//! deep the calls went. A host with a hundred machines has it a hundred times. Called once the guest runs, by the
//! thread that owns the machine, before its filter.
#![expect(unsafe_code, reason = "malloc_trim(3), and madvise(2) on the stack")]

/// Bytes below the stack pointer that calls of the start may have used: the kernel lets no mapping come closer to the
/// first thread's stack than 128 MiB below its top (`mmap_base` in arch/x86/mm/mmap.c).
const STACK_BYTES: usize = 1 << 20;
const PAGE_BYTES: usize = 4096;

/// Gives it back to the host.
pub(super) fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: touches no memory that is allocated.
    unsafe {
        libc::malloc_trim(0)
    };
    // Another thread's stack has other mappings below it.
    if rustix::thread::gettid() == rustix::process::getpid() {
        give_stack_back();
    }
}

/// Never inlined: its frame is below its caller's.
#[inline(never)]
fn give_stack_back() {
    let here = 0_u8;
    // A page for the call itself, and for what the compiler keeps below the stack pointer.
    let end = (&raw const here).addr() / PAGE_BYTES * PAGE_BYTES - PAGE_BYTES;
    let start = end - STACK_BYTES;
    // SAFETY: nothing but this thread's stack is there, and nothing is kept so far below its pointer. Where the stack has
    // not grown to, there is no memory to give back (ENOMEM).
    unsafe {
        libc::madvise(
            std::ptr::without_provenance_mut(start),
            STACK_BYTES,
            libc::MADV_DONTNEED,
        )
    };
}

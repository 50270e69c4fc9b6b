// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Memory: device registers, the heap behind the image, what the compiler expects of a C library, and the
//! drivers' view of physical memory (which is the virtual one).
#![expect(unsafe_code, reason = "raw memory and device registers")]

use core::alloc::{GlobalAlloc, Layout};
use core::arch::asm;
use core::cell::Cell;
use core::ptr::NonNull;

use virtio_drivers::{BufferDirection, Hal, PAGE_SIZE, PhysAddr};

/// Bytes after the image that the heap may use: queues of four devices and their buffers.
const HEAP_BYTES: usize = 1 << 20;

/// Mapped by `entry.s`.
const MAPPED_BYTES: u64 = 4 << 30;

unsafe extern "C" {
    static mut bss_start: u8;
    static mut bss_end: u8;
    static mut heap_start: u8;
    /// First of 512 entries.
    static mut page_directories: u64;
}

/// A register block at a guest-physical address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mmio(pub u64);

macro_rules! access {
    ($read:ident, $write:ident, $type:ty) => {
        /// Reads the register at `offset`.
        pub fn $read(self, offset: u64) -> $type {
            // SAFETY: a register of a device or APIC, mapped; no memory of this program lies there.
            unsafe { ((self.0 + offset) as *const $type).read_volatile() }
        }

        /// Writes the register at `offset`.
        pub fn $write(self, offset: u64, value: $type) {
            // SAFETY: as for reading.
            unsafe { ((self.0 + offset) as *mut $type).write_volatile(value) }
        }
    };
}

impl Mmio {
    access!(read8, write8, u8);
    access!(read16, write16, u16);
    access!(read32, write32, u32);

    /// Makes `address` reachable: below 4 GiB everything is, above it gets a map of its gigabyte.
    pub fn map(address: u64) -> Option<Mmio> {
        if address >= MAPPED_BYTES {
            let gigabyte = usize::try_from(address >> 30)
                .ok()
                .filter(|index| *index < 512)?;
            let entry = (&raw mut page_directories).wrapping_add(gigabyte);
            // SAFETY: one of the 512 entries of the live page table, which only this function changes.
            let present = unsafe { entry.read_volatile() };
            if present == 0 {
                let (table, _) = Dma::dma_alloc(1, BufferDirection::Both);
                for index in 0..512_u64 {
                    Mmio(table).write64(index * 8, (address >> 30 << 30 | index << 21) | 0x87);
                }
                // SAFETY: as above; the new table is complete.
                unsafe { entry.write_volatile(table | 0x7) };
            }
        }
        Some(Mmio(address))
    }

    /// Writes eight bytes as two registers, low half first, as drivers of 64-bit virtio fields do.
    pub fn write64(self, offset: u64, value: u64) {
        self.write32(offset, (value & 0xffff_ffff) as u32);
        self.write32(offset + 4, (value >> 32) as u32);
    }
}

/// RAM that nobody else uses, in pages.
pub struct Pages {
    first: Mmio,
    count: u64,
}

impl Pages {
    /// `size` bytes at `start`, both multiples of a gigabyte's part that one map covers; `None` when they cannot
    /// be reached, are over this program, or are none.
    pub fn new(start: u64, size: u64) -> Option<Pages> {
        let own_end = (&raw const heap_start as u64) + HEAP_BYTES as u64;
        let last = start.checked_add(size)?.checked_sub(1)?;
        if start < own_end || start >> 30 != last >> 30 || size < PAGE_SIZE as u64 {
            return None;
        }
        Some(Pages {
            first: Mmio::map(start)?,
            count: size / PAGE_SIZE as u64,
        })
    }

    /// Pages.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Fills a page with a number.
    pub fn fill(&self, page: u64, value: u64) {
        self.words(page)
            .for_each(|at| self.first.write64(at, value));
    }

    /// Whether a page is full of that number.
    pub fn has(&self, page: u64, value: u64) -> bool {
        let (low, high) = (value as u32, (value >> 32) as u32);
        self.words(page)
            .all(|at| self.first.read32(at) == low && self.first.read32(at + 4) == high)
    }

    /// Offsets of a page's words.
    fn words(&self, page: u64) -> impl Iterator<Item = u64> {
        let start = page * PAGE_SIZE as u64;
        (start..start + PAGE_SIZE as u64).step_by(8)
    }
}

/// A slice of guest memory that firmware or VMM wrote before the first instruction.
pub fn firmware_bytes(address: u64, length: usize) -> &'static [u8] {
    // SAFETY: tables of the VMM lie in mapped RAM and are not written after the start; the caller has the
    // length from the table itself.
    unsafe { core::slice::from_raw_parts(address as *const u8, length) }
}

/// Zeroes the data that starts as zero: after a reset it holds what the last run left.
pub fn clear_bss() {
    let (start, end) = (&raw mut bss_start, &raw const bss_end);
    // SAFETY: the linker script puts nothing but zero-initialized data between the two, and no reference exists yet.
    unsafe { start.write_bytes(0, end as usize - start as usize) };
}

/// Bump allocator with one free list a size class; one thread, never used by an interrupt handler.
struct Heap {
    used: Cell<usize>,
    free: [Cell<usize>; 16],
}

// SAFETY: there is one CPU, and interrupt handlers are assembly that does not allocate.
unsafe impl Sync for Heap {}

#[global_allocator]
static HEAP: Heap = Heap {
    used: Cell::new(0),
    free: [const { Cell::new(0) }; 16],
};

impl Heap {
    fn bump(&self, size: usize, align: usize) -> *mut u8 {
        let base = (&raw mut heap_start) as usize;
        let start = (base + self.used.get()).next_multiple_of(align);
        assert!(start + size <= base + HEAP_BYTES, "heap is full");
        self.used.set(start + size - base);
        start as *mut u8
    }

    /// Size class of a layout: blocks of class n have 1 << n bytes and are as aligned, up to a page.
    fn class(layout: Layout) -> usize {
        layout
            .size()
            .max(layout.align())
            .max(16)
            .next_power_of_two()
            .trailing_zeros() as usize
    }
}

// SAFETY: blocks are disjoint, aligned to their size, and reused only after `dealloc`.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let class = Heap::class(layout);
        let list = &self.free[class];
        if list.get() == 0 {
            return self.bump(1 << class, 1 << class);
        }
        let block = list.get() as *mut usize;
        // SAFETY: `dealloc` put the next block's address in the first word of this free block.
        list.set(unsafe { block.read() });
        block.cast()
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        let list = &self.free[Heap::class(layout)];
        // SAFETY: the block has at least 16 aligned bytes and is the allocator's again.
        unsafe { block.cast::<usize>().write(list.get()) };
        list.set(block as usize);
    }
}

/// Physical memory for the drivers.
pub struct Dma;

// SAFETY: virtual is physical; pages come zeroed from the heap and are never handed out twice.
unsafe impl Hal for Dma {
    fn dma_alloc(pages: usize, _: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        let start = HEAP.bump(pages * PAGE_SIZE, PAGE_SIZE);
        // SAFETY: the block was just reserved.
        unsafe { start.write_bytes(0, pages * PAGE_SIZE) };
        let pointer = NonNull::new(start).expect("the heap is not at address 0");
        (start as PhysAddr, pointer)
    }

    unsafe fn dma_dealloc(_: PhysAddr, _: NonNull<u8>, _: usize) -> i32 {
        0
    }

    unsafe fn mmio_phys_to_virt(address: PhysAddr, _: usize) -> NonNull<u8> {
        NonNull::new(address as *mut u8).expect("no device is at address 0")
    }

    unsafe fn share(buffer: NonNull<[u8]>, _: BufferDirection) -> PhysAddr {
        buffer.as_ptr().cast::<u8>() as PhysAddr
    }

    unsafe fn unshare(_: PhysAddr, _: NonNull<[u8]>, _: BufferDirection) {}
}

// What the compiler calls, as no C library is linked. String instructions, so that they never call themselves.

#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, count: usize) -> *mut u8 {
    // SAFETY: the caller promises `count` readable and writable bytes that do not overlap.
    unsafe {
        asm!("rep movsb", inout("rcx") count => _, inout("rdi") to => _, inout("rsi") from => _, options(nostack))
    };
    to
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, count: usize) -> *mut u8 {
    if (to as usize).wrapping_sub(from as usize) >= count {
        // SAFETY: copying upwards never reads a byte that it has written.
        return unsafe { memcpy(to, from, count) };
    }
    let (last_to, last_from) = (
        to.wrapping_add(count).wrapping_sub(1),
        from.wrapping_add(count).wrapping_sub(1),
    );
    // SAFETY: the destination begins inside the source: downwards from the end, then the direction is put back.
    unsafe {
        asm!("std", "rep movsb", "cld", inout("rcx") count => _, inout("rdi") last_to => _, inout("rsi") last_from => _, options(nostack))
    };
    to
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, value: i32, count: usize) -> *mut u8 {
    // SAFETY: the caller promises `count` writable bytes.
    unsafe {
        asm!("rep stosb", inout("rcx") count => _, inout("rdi") to => _, in("al") value as u8, options(nostack))
    };
    to
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(left: *const u8, right: *const u8, count: usize) -> i32 {
    for index in 0..count {
        // SAFETY: the caller promises `count` readable bytes on both sides.
        let l = unsafe { left.wrapping_add(index).read() };
        // SAFETY: as above.
        let r = unsafe { right.wrapping_add(index).read() };
        if l != r {
            return i32::from(l) - i32::from(r);
        }
    }
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(left: *const u8, right: *const u8, count: usize) -> i32 {
    // SAFETY: the same contract.
    unsafe { memcmp(left, right, count) }
}

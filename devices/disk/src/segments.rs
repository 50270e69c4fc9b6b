// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Host memory of one request: a list of ranges, in guest order.
#![expect(
    unsafe_code,
    reason = "ranges of guest memory are raw pointers that the kernel reads and writes"
)]

/// Ranges of host memory. Keeps its capacity when emptied, so that a queue that recycles them does not allocate.
#[derive(Debug, Default)]
pub struct Segments {
    ranges: Vec<libc::iovec>,
    total_bytes: u64,
}

// SAFETY: the pointers are only handed to the kernel or copied through by the one owner of the list, and
// `push`'s contract keeps their target valid whichever thread that is.
unsafe impl Send for Segments {}

impl Segments {
    /// An empty list, which allocates when the first range is appended.
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends a range.
    ///
    /// # Safety
    ///
    /// From now until the request's completion was taken (or the queue dropped), the `length_bytes` bytes at
    /// `start` stay mapped, readable and, for a read request, writable; and no Rust reference to them exists.
    /// Guest memory, which is only accessed by volatile copies, satisfies the latter; that the guest's vCPUs
    /// write there at the same time is expected.
    pub unsafe fn push(&mut self, start: *mut u8, length_bytes: usize) {
        self.ranges.push(libc::iovec {
            iov_base: start.cast(),
            iov_len: length_bytes,
        });
        self.total_bytes = self.total_bytes.saturating_add(length_bytes as u64);
    }

    /// Sum of all lengths, bytes; saturates.
    pub fn total_bytes(&self) -> u64 {
        self.total_bytes
    }

    /// Number of ranges, of which some may be empty.
    pub fn count(&self) -> usize {
        self.ranges.len()
    }

    /// Empties the list and keeps its capacity, for the next request. The ranges' memory is not touched.
    pub fn clear(&mut self) {
        self.ranges.clear();
        self.total_bytes = 0;
    }

    /// Whether every byte is zero now.
    pub(crate) fn are_zero(&self) -> bool {
        let mut page = [0_u8; 4096];
        self.ranges.iter().all(|range| {
            (0..range.iov_len).step_by(page.len()).all(|at| {
                let count = page.len().min(range.iov_len - at);
                // SAFETY: `at` is less than the `iov_len` bytes that `push` promised.
                let start = unsafe { range.iov_base.cast::<u8>().add(at) };
                // SAFETY: `count` bytes are left from there, as many fit into `page`, and host memory outside the
                // guest cannot overlap them.
                unsafe { std::ptr::copy_nonoverlapping(start, page.as_mut_ptr(), count) };
                page[..count].iter().all(|byte| *byte == 0)
            })
        })
    }

    /// The same memory as lists of at most `most_bytes` each, in order, none of them empty; and where on the disk each of
    /// them begins when the first one begins at `at`, bytes.
    pub(crate) fn pieces(&self, at: u64, most_bytes: usize) -> impl Iterator<Item = (u64, Self)> {
        let mut ranges = self.ranges.iter().copied();
        let mut rest: Option<libc::iovec> = None;
        let mut next = at;
        std::iter::from_fn(move || {
            let mut piece = Self::new();
            let mut room = most_bytes;
            while room > 0
                && let Some(mut range) = rest.take().or_else(|| ranges.next())
            {
                let taken = range.iov_len.min(room);
                if taken > 0 {
                    // SAFETY: a part of a range, whose contract is that of the whole list.
                    unsafe { piece.push(range.iov_base.cast(), taken) };
                }
                room -= taken;
                if taken < range.iov_len {
                    range.iov_base = range.iov_base.wrapping_byte_add(taken);
                    range.iov_len -= taken;
                    rest = Some(range);
                }
            }
            let at = next;
            next += piece.total_bytes;
            (piece.total_bytes > 0).then_some((at, piece))
        })
    }

    /// The list as the kernel reads it.
    pub(crate) fn iovecs(&self) -> &[libc::iovec] {
        &self.ranges
    }

    /// Fills the ranges with `source`, whose length is the total.
    pub(crate) fn fill(&self, mut source: &[u8]) {
        for range in &self.ranges {
            let (part, rest) = source.split_at(range.iov_len);
            // SAFETY: `push` promised `iov_len` writable bytes there; `part` has as many, and as host memory
            // outside the guest cannot overlap them.
            unsafe {
                std::ptr::copy_nonoverlapping(part.as_ptr(), range.iov_base.cast(), part.len())
            };
            source = rest;
        }
    }

    /// Copies the ranges into `target`, whose length is the total.
    pub(crate) fn drain_to(&self, mut target: &mut [u8]) {
        for range in &self.ranges {
            let (part, rest) = target.split_at_mut(range.iov_len);
            // SAFETY: `push` promised `iov_len` readable bytes there; `part` has as many, and as host memory
            // outside the guest cannot overlap them.
            unsafe {
                std::ptr::copy_nonoverlapping(range.iov_base.cast(), part.as_mut_ptr(), part.len());
            }
            target = rest;
        }
    }
}

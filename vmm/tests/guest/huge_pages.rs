// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Huge pages for a test's machines, on a host that has none in reserve: the kernel makes some, and has them back as memory
//! when the machines have ended. Made before a machine asks: one that waits for its memory to be put together may wait for
//! minutes.

use std::fs::File;

use atoll_vmm::board::MICRO;
use atoll_vmm::memory::{Backing, HugePage, allocate};

/// Linux `Documentation/admin-guide/mm/hugetlbpage.rst`: how many there are. It makes as many as it can without long work.
const RESERVE: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";

/// Until it is dropped machines may have huge pages.
pub struct HugePages {
    before: String,
    /// One test at a time: each sets the number back to what it has found.
    _lock: File,
}

impl HugePages {
    /// As many as machines with so much memory in all need; says so when this host has none.
    pub fn lend(mib: u64) -> Option<Self> {
        let lock = std::env::temp_dir().join("atoll-test-huge-pages");
        let lock = File::create(lock).unwrap();
        lock.lock().unwrap();
        let lent = std::fs::read_to_string(RESERVE).and_then(|before| {
            let count = before.trim().parse().unwrap_or(0) + mib / 2;
            std::fs::write(RESERVE, count.to_string())?;
            let _lock = lock;
            Ok(Self { before, _lock })
        });
        let there = lent.map_err(|error| format!("{RESERVE}: {error}"));
        let there = there.and_then(|lent| {
            let all = allocate(&MICRO, mib, 40, Backing::Huge(HugePage::Mib2));
            all.map(|_| lent).map_err(|error| error.to_string())
        });
        there
            .map_err(|why| println!("ATOLL-SKIP: no huge pages: {why}"))
            .ok()
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        // What a machine has it keeps.
        let _ = std::fs::write(RESERVE, &self.before);
    }
}

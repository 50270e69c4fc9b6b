// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Clocks that never go back, on no CPU and not from one CPU to another.

use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result, ensure};
use rustix::thread::{CpuSet, sched_setaffinity};
use rustix::time::{ClockId, clock_gettime};

use super::{Shared, rest};

/// What is read, without what somebody may set: nobody sets the time of day where this runs, so that is among them.
const CLOCKS: [(&str, ClockId); 4] = [
    ("CLOCK_MONOTONIC", ClockId::Monotonic),
    ("CLOCK_MONOTONIC_RAW", ClockId::MonotonicRaw),
    ("CLOCK_BOOTTIME", ClockId::Boottime),
    ("CLOCK_REALTIME", ClockId::Realtime),
];
/// Looks at each clock between two rests.
const LOOKS: u32 = 50;

/// The latest time that any thread has seen, and the longest that one has not.
#[derive(Default)]
pub(super) struct Latest {
    clocks: [AtomicU64; CLOCKS.len()],
    gap_ns: AtomicU64,
}

impl Latest {
    pub(super) fn longest_gap_ms(&self) -> u64 {
        self.gap_ns.load(Ordering::Relaxed) / 1_000_000
    }

    fn look(&self) -> Result<u64> {
        let mut monotonic = 0;
        for ((name, id), latest) in CLOCKS.into_iter().zip(&self.clocks) {
            let before = latest.load(Ordering::SeqCst);
            let time = clock_gettime(id);
            let seconds = u64::try_from(time.tv_sec).context("after 1970")?;
            let now = seconds * 1_000_000_000 + u64::try_from(time.tv_nsec).context("positive")?;
            ensure!(
                now >= before,
                "{name} went back by {} ns, from {before} to {now}",
                before - now
            );
            latest.fetch_max(now, Ordering::SeqCst);
            if id == ClockId::Monotonic {
                monotonic = now;
            }
        }
        Ok(monotonic)
    }
}

/// Looks at the clocks on CPU `cpu`, or on any where it is not there.
pub(super) fn read(shared: &Shared, cpu: usize) -> Result<()> {
    let name = if cpu == 0 { "clocks0" } else { "clocks1" };
    let mut set = CpuSet::new();
    set.set(cpu);
    // A machine with one CPU.
    let _ = sched_setaffinity(None, &set);
    let mut last = shared.latest.look()?;
    loop {
        for _ in 0..LOOKS {
            let now = shared.latest.look()?;
            let gap = now.saturating_sub(last);
            shared.latest.gap_ns.fetch_max(gap, Ordering::Relaxed);
            last = now;
        }
        shared.count(name);
        if !rest(shared, 2) {
            return Ok(());
        }
    }
}

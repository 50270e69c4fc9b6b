// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The rate at which an image is copied, when somebody asks for one (PVE's `bwlimit`). Pure: the caller tells the time,
//! and waits.

use std::time::{Duration, Instant};

use atoll_disk::TokenBucket;

/// Holds a copy to its rate.
#[derive(Debug)]
pub struct Pace(Option<TokenBucket>);

impl Pace {
    /// At most so much in a second; without a limit when there is none.
    pub fn new(bytes_per_second: Option<u64>, now: Instant) -> Self {
        Self(bytes_per_second.map(|rate| TokenBucket::new(rate, 0, now)))
    }

    /// How long whoever has just copied so much waits before there is more.
    pub fn wait_after(&mut self, bytes: u64, now: Instant) -> Duration {
        let Some(bucket) = &mut self.0 else {
            return Duration::ZERO;
        };
        bucket.take(bytes);
        bucket.wait(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The time that a copy of `count` times `bytes` takes, with a clock that only its waits move.
    fn takes(rate: Option<u64>, count: u64, bytes: u64) -> Duration {
        let start = Instant::now();
        let (mut pace, mut now) = (Pace::new(rate, start), start);
        for _ in 0..count {
            now += pace.wait_after(bytes, now);
        }
        now - start
    }

    #[test]
    fn a_copy_takes_as_long_as_its_rate_says() {
        let mib = 1 << 20;
        assert_eq!(takes(None, 100, mib), Duration::ZERO);
        // Without what a tenth of a second brings, which is there at first.
        let time = takes(Some(2 * mib), 100, mib);
        let expected = Duration::from_millis(49_900);
        assert!(
            time.abs_diff(expected) < Duration::from_millis(1),
            "{time:?}"
        );
        assert_eq!(takes(Some(mib), 100, 0), Duration::ZERO, "zeroes");
    }
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A token bucket: a rate with a burst. Pure: the caller tells the time, waits, and shares it.
//!
//! Own code: the crates that exist (`governor` and the like) bring concurrent maps and futures for these few
//! lines, and none lets a request be larger than the burst, which a disk request may be.

use std::time::{Duration, Instant};

/// How long whoever is held back waits at most before the bucket is looked at again: it may have been replaced by one of a
/// higher rate.
pub const LOOK_AGAIN: Duration = Duration::from_millis(500);

/// Tokens that come at a rate, up to a burst. Whoever finds one may take more than there are: the debt delays
/// the next one, so that the average holds for requests of any size.
#[derive(Debug, Clone)]
pub struct TokenBucket {
    per_second: u64,
    burst: u64,
    /// Billionths of a token; negative while in debt.
    nano_tokens: i128,
    filled_at: Instant,
}

const NANO: i128 = 1_000_000_000;

impl TokenBucket {
    /// A full bucket. `burst` 0 means what comes in a tenth of a second; a rate of 0 counts as 1.
    pub fn new(per_second: u64, burst: u64, now: Instant) -> Self {
        let per_second = per_second.max(1);
        let burst = if burst == 0 { per_second / 10 } else { burst }.max(1);
        Self {
            per_second,
            burst,
            nano_tokens: i128::from(burst) * NANO,
            filled_at: now,
        }
    }

    /// How long until [`TokenBucket::take`] may be called; zero when it may be now.
    pub fn wait(&mut self, now: Instant) -> Duration {
        self.fill(now);
        let missing = NANO - self.nano_tokens;
        if missing <= 0 {
            return Duration::ZERO;
        }
        // Rounded up, so that the wait is never in vain.
        let nanos = missing.div_euclid(i128::from(self.per_second)) + 1;
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    /// Takes `amount`, also when that is more than there is.
    pub fn take(&mut self, amount: u64) {
        self.nano_tokens -= i128::from(amount) * NANO;
    }

    fn fill(&mut self, now: Instant) {
        let since = now.saturating_duration_since(self.filled_at).as_nanos();
        let earned = i128::try_from(since)
            .unwrap_or(i128::MAX)
            .saturating_mul(self.per_second.into());
        self.nano_tokens = self.nano_tokens.saturating_add(earned);
        self.nano_tokens = self.nano_tokens.min(i128::from(self.burst) * NANO);
        self.filled_at = self.filled_at.max(now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes `amount` as often as the clock, which the waits move, allows within `seconds`.
    fn run(bucket: &mut TokenBucket, start: Instant, amount: u64, seconds: u64) -> u64 {
        let (mut now, end) = (start, start + Duration::from_secs(seconds));
        let mut total = 0;
        loop {
            let wait = bucket.wait(now);
            now += wait;
            if now >= end {
                return total;
            }
            if wait.is_zero() {
                bucket.take(amount);
                total += amount;
            }
        }
    }

    #[test]
    fn the_average_is_the_rate_for_small_and_for_large_requests() {
        let start = Instant::now();
        for (rate, burst, amount) in [(100, 1, 1), (100, 50, 7), (1000, 10, 4096), (1, 1, 1)] {
            let mut bucket = TokenBucket::new(rate, burst, start);
            let total = run(&mut bucket, start, amount, 100);
            let expected = rate * 100;
            assert!(
                total.abs_diff(expected) <= burst + amount + 1,
                "{rate}/s, burst {burst}, {amount} each: {total}"
            );
        }
    }

    #[test]
    fn an_idle_bucket_gives_its_burst_at_once() {
        let start = Instant::now();
        let mut bucket = TokenBucket::new(10, 500, start);
        for _ in 0..500 {
            assert_eq!(bucket.wait(start), Duration::ZERO);
            bucket.take(1);
        }
        assert!(bucket.wait(start) > Duration::from_millis(50));
        assert_eq!(
            bucket.wait(start + Duration::from_secs(1000)),
            Duration::ZERO
        );
    }

    #[test]
    fn no_numbers_overflow() {
        let start = Instant::now();
        let mut bucket = TokenBucket::new(u64::MAX, u64::MAX, start);
        bucket.take(u64::MAX);
        bucket.take(u64::MAX);
        let later = start + Duration::from_secs(1 << 33);
        assert_eq!(bucket.wait(later), Duration::ZERO);
        let mut bucket = TokenBucket::new(0, 0, start);
        bucket.take(u64::MAX);
        assert!(bucket.wait(start) > Duration::from_secs(1 << 32));
    }
}

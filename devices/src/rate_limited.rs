// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Log lines that a guest can cause: a burst, then a few a second, and a count of what was dropped.

use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Lines that are always let through at first.
const BURST: u32 = 10;
/// One further line is let through in each such interval.
const INTERVAL: Duration = Duration::from_secs(5);

/// A token bucket for one call site or one device.
#[derive(Debug)]
pub(crate) struct RateLimit {
    /// Leaf lock: nothing else is taken while it is held.
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    tokens: u32,
    refilled: Option<Instant>,
    dropped: u64,
}

impl RateLimit {
    pub(crate) const fn new() -> Self {
        Self {
            state: Mutex::new(State {
                tokens: BURST,
                refilled: None,
                dropped: 0,
            }),
        }
    }

    /// `Some(lines dropped since the last one)` when a line may be written now.
    pub(crate) fn permit(&self) -> Option<u64> {
        self.permit_at(Instant::now())
    }

    fn permit_at(&self, now: Instant) -> Option<u64> {
        let mut state = self
            .state
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        let since = now.saturating_duration_since(*state.refilled.get_or_insert(now));
        let earned = u32::try_from(since.as_secs() / INTERVAL.as_secs()).unwrap_or(u32::MAX);
        if earned > 0 {
            state.tokens = state.tokens.saturating_add(earned).min(BURST);
            state.refilled = Some(now);
        }
        if state.tokens == 0 {
            state.dropped += 1;
            return None;
        }
        state.tokens -= 1;
        Some(std::mem::take(&mut state.dropped))
    }
}

/// Writes one warning through `$limit`, with the number of lines that were dropped before it.
macro_rules! warn_limited {
    ($limit:expr, $($rest:tt)+) => {
        if let Some(dropped) = $limit.permit() {
            tracing::warn!(dropped, $($rest)+);
        }
    };
}
pub(crate) use warn_limited;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_then_one_an_interval() {
        let limit = RateLimit::new();
        let start = Instant::now();
        let passed = (0..100)
            .filter(|_| limit.permit_at(start).is_some())
            .count();
        assert_eq!(passed, 10);
        assert_eq!(limit.permit_at(start + INTERVAL), Some(90));
        assert_eq!(limit.permit_at(start + INTERVAL), None);
    }
}

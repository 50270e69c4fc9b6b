// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Key `restart`: whether a container whose program has ended by itself is started again. Decisions are pure; the
//! reconciler makes them and remembers what was done.

use std::time::{Duration, Instant};

use crate::error::Error;
use crate::guest::config::GuestConfig;

/// Pause before the second restart in a row; it doubles from there.
const PAUSE_FIRST: Duration = Duration::from_secs(1);
/// Longest pause.
const PAUSE_MAX: Duration = Duration::from_secs(60);
/// A container that has run this long after a restart begins a new row.
const ROW_ENDS_AFTER: Duration = Duration::from_secs(600);

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ended {
    /// With another exit code than 0, or by a signal.
    pub failed: bool,
}

/// Restarts in a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Row {
    /// How many.
    pub count: u32,
    /// When the last one was.
    pub last: Instant,
}

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It stays down.
    Stay,
    /// It is started, but not yet.
    Wait,
    /// It is started.
    Start,
}

/// Whether a container with this config, which ended so and was restarted so often, is started again.
pub fn verdict(
    config: &GuestConfig,
    ended: Ended,
    row: Option<Row>,
    now: Instant,
) -> Result<Verdict, Error> {
    let Some(policy) = config.properties("restart")? else {
        return Ok(Verdict::Stay);
    };
    let wanted = match policy.get("policy") {
        Some("always") => true,
        Some("on-failure") => ended.failed,
        _ => false,
    };
    let row = row.filter(|row| now.duration_since(row.last) < ROW_ENDS_AFTER);
    let count = row.map_or(0, |row| row.count);
    let is_over = policy
        .number::<u32>("retries")
        .is_some_and(|most| count >= most);
    if !wanted || is_over {
        return Ok(Verdict::Stay);
    }
    let pause = match count {
        0 => Duration::ZERO,
        count => PAUSE_FIRST
            .saturating_mul(1 << (count - 1).min(16))
            .min(PAUSE_MAX),
    };
    let is_due = row.is_none_or(|row| now.duration_since(row.last) >= pause);
    Ok(if is_due {
        Verdict::Start
    } else {
        Verdict::Wait
    })
}

/// The row after one more restart.
pub fn counted(row: Option<Row>, now: Instant) -> Row {
    let row = row.filter(|row| now.duration_since(row.last) < ROW_ENDS_AFTER);
    Row {
        count: row.map_or(0, |row| row.count) + 1,
        last: now,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::GuestKind;

    #[test]
    fn policies_and_pauses() {
        let now = Instant::now();
        let after = |seconds: u64| now + Duration::from_secs(seconds);
        let check = |line: &str, failed: bool, row: Option<Row>, at: Instant, expected: Verdict| {
            let config = GuestConfig::parse(GuestKind::Container, line);
            assert_eq!(
                verdict(&config, Ended { failed }, row, at).unwrap(),
                expected,
                "{line}"
            );
        };
        check("", true, None, now, Verdict::Stay);
        check("restart: no", true, None, now, Verdict::Stay);
        check("restart: always", false, None, now, Verdict::Start);
        check("restart: on-failure", false, None, now, Verdict::Stay);
        check("restart: on-failure", true, None, now, Verdict::Start);
        let third = Some(Row {
            count: 3,
            last: now,
        });
        check("restart: always", true, third, after(3), Verdict::Wait);
        check("restart: always", true, third, after(4), Verdict::Start);
        check(
            "restart: always,retries=3",
            true,
            third,
            after(4),
            Verdict::Stay,
        );
        check(
            "restart: always,retries=3",
            true,
            third,
            after(601),
            Verdict::Start,
        );
        let many = Some(Row {
            count: 99,
            last: now,
        });
        check("restart: always", true, many, after(59), Verdict::Wait);
        check("restart: always", true, many, after(60), Verdict::Start);
        assert_eq!(counted(third, after(4)).count, 4);
        assert_eq!(counted(third, after(700)).count, 1);
    }
}

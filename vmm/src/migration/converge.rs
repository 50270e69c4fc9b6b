// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! When the guest is held for the rest of its memory, and what is done while it writes too fast for that. Decides only.
//!
//! A round that leaves nearly as much as it has sent is a bad one. After two of them the vCPUs are made to rest, after
//! each further one for more of their time. When that is all and rounds stay bad, it is as the caller wants: the move is
//! off, or goes on until the guest writes less.

use std::time::Duration;

use atoll_vmm_protocol::api::WhenLate;

use super::MigrationError;

/// What a hand-over takes beside its last pages: state, building the other machine. An estimate, to plan with.
const HANDOVER: Duration = Duration::from_millis(30);
/// A round with less in it tells nothing about the speed of the connections: a page takes its time.
const TELLING_BYTES: u64 = 1 << 20;
/// Percent of their time for which vCPUs rest, one step after the other.
const THROTTLE: [u8; 7] = [20, 40, 60, 80, 90, 95, 99];
/// Bad rounds before the first step.
const BAD_ROUNDS: usize = 2;
/// Bad rounds in a row after the last step, or where there are none, before the guest is given up.
const LATE_ROUNDS: usize = 5;
/// Rounds in which an end has to come, whatever they are like, unless the move is to go on.
const ROUNDS_MAX: u32 = 60;

/// What a caller wants of a migration's course.
#[derive(Debug, Clone, Copy)]
pub struct Convergence {
    /// How long the guest may stand still.
    pub downtime_limit: Duration,
    /// Most bytes in a second on all connections together; `None` is without limit.
    pub max_bytes_per_second: Option<u64>,
    /// Whether its vCPUs may be slowed down.
    pub throttle: bool,
    /// What to do when that does not help.
    pub when_late: WhenLate,
}

/// What one round of copying was, measured.
#[derive(Debug, Clone, Copy)]
pub struct Round {
    /// Bytes of memory that the round had to send.
    pub written: u64,
    /// Bytes that it took on the connections: less, where memory is zero.
    pub sent: u64,
    /// How long the round took.
    pub time: Duration,
    /// Bytes of memory that the guest has written meanwhile.
    pub left: u64,
}

/// What comes after a round of copying.
#[derive(Debug)]
pub enum Next {
    /// The guest is held, and the rest is sent.
    Switch,
    /// Another round.
    GoOn,
    /// Another round, with vCPUs that rest for so many percent of their time.
    Throttle(u8),
    /// The guest is held, and the rest is sent while it runs there.
    PostCopy,
    /// The guest stays.
    GiveUp(MigrationError),
}

/// The rounds so far, and what they tell of the ones to come.
#[derive(Debug)]
pub struct Rounds {
    convergence: Convergence,
    count: u32,
    /// Seconds that a byte takes, by the last round that could tell.
    seconds_per_byte: Option<f64>,
    /// In a row.
    bad: usize,
    /// Steps of [`THROTTLE`] that were taken.
    steps: usize,
}

impl Rounds {
    /// No round so far.
    #[must_use]
    pub fn new(convergence: Convergence) -> Self {
        Self {
            convergence,
            count: 0,
            seconds_per_byte: None,
            bad: 0,
            steps: 0,
        }
    }

    /// Rounds so far, the first one of all memory.
    #[must_use]
    pub fn count(&self) -> u32 {
        self.count
    }

    /// One more; the first one is of all memory.
    #[expect(clippy::cast_precision_loss, reason = "an estimate")]
    pub fn after(&mut self, round: &Round) -> Next {
        self.count += 1;
        let seconds = round.time.as_secs_f64().max(1e-6);
        if round.sent >= TELLING_BYTES {
            self.seconds_per_byte = Some(seconds / round.sent as f64);
        }
        let measured = self.seconds_per_byte;
        let speed = measured.unwrap_or(seconds / TELLING_BYTES as f64);
        let speed = match self.convergence.max_bytes_per_second {
            Some(limit) => speed.max(1. / limit.max(1) as f64),
            None => speed,
        };
        let needed = Duration::try_from_secs_f64(round.left as f64 * speed);
        let needed = needed.unwrap_or(Duration::MAX).saturating_add(HANDOVER);
        if round.left == 0 || needed <= self.convergence.downtime_limit.max(HANDOVER * 2) {
            return Next::Switch;
        }
        // Much of all memory is zero, or has never been touched: what is left of it tells nothing.
        let is_bad = self.count > 1 && round.left > round.written / 10 * 7;
        self.bad = if is_bad { self.bad + 1 } else { 0 };
        let steps = if self.convergence.throttle {
            &THROTTLE[self.steps..]
        } else {
            &[]
        };
        match steps.first() {
            Some(percent) if self.bad >= BAD_ROUNDS => {
                self.steps += 1;
                // The next step comes after the next bad round.
                self.bad = BAD_ROUNDS - 1;
                Next::Throttle(*percent)
            }
            Some(_) => self.unless_endless(round),
            None if self.bad >= LATE_ROUNDS => self.late(round),
            None => self.unless_endless(round),
        }
    }

    fn unless_endless(&self, round: &Round) -> Next {
        match self.count >= ROUNDS_MAX {
            true => self.late(round),
            false => Next::GoOn,
        }
    }

    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "for a message"
    )]
    fn late(&self, round: &Round) -> Next {
        match self.convergence.when_late {
            WhenLate::GoOn => return Next::GoOn,
            WhenLate::PostCopy => return Next::PostCopy,
            WhenLate::Cancel => {}
        }
        let seconds = round.time.as_secs_f64().max(1e-6);
        let rate = |bytes: u64| (bytes as f64 / seconds) as u64 >> 10;
        let limit_ms = self.convergence.downtime_limit.as_millis();
        Next::GiveUp(MigrationError::Diverges {
            dirty: rate(round.left),
            sent: rate(round.sent),
            limit_ms: u64::try_from(limit_ms).unwrap_or(u64::MAX),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A guest that writes `dirty` MiB/s all over its memory, over a connection of 10 MiB/s. What was done, and in how
    /// many rounds; at most 100.
    fn simulate(mut dirty: u64, convergence: Convergence) -> (Vec<u8>, String, u32) {
        let mut rounds = Rounds::new(convergence);
        let (mut written, mut throttled) = (1_u64 << 30, Vec::new());
        let full = dirty;
        for _ in 0..100 {
            let time =
                Duration::from_secs_f64(f64::from(u32::try_from(written >> 10).unwrap()) / 10240.);
            let written_meanwhile = (dirty << 20) * u64::try_from(time.as_millis()).unwrap() / 1000;
            let left = written_meanwhile.min(1 << 30);
            let round = Round {
                written,
                sent: written,
                time,
                left,
            };
            match rounds.after(&round) {
                Next::Switch => return (throttled, "switch".to_owned(), rounds.count()),
                Next::GoOn => {}
                Next::PostCopy => return (throttled, "post-copy".to_owned(), rounds.count()),
                Next::Throttle(percent) => {
                    throttled.push(percent);
                    dirty = full * u64::from(100 - percent) / 100;
                }
                Next::GiveUp(error) => return (throttled, error.to_string(), rounds.count()),
            }
            written = left;
        }
        (throttled, "goes on".to_owned(), rounds.count())
    }

    #[test]
    fn guests_of_any_speed_come_to_an_end() {
        let convergence = |throttle, when_late| Convergence {
            downtime_limit: Duration::from_millis(300),
            max_bytes_per_second: None,
            throttle,
            when_late,
        };
        let cancel = convergence(true, WhenLate::Cancel);
        let (throttled, end, rounds) = simulate(1, cancel);
        assert_eq!((throttled.len(), &*end), (0, "switch"));
        assert!(rounds < 6);
        // Four times as fast as the connection: slowed down until it fits.
        let (throttled, end, _) = simulate(40, cancel);
        assert_eq!((&*throttled, &*end), (&[20, 40, 60, 80, 90][..], "switch"));
        let (_, end, rounds) = simulate(40, convergence(false, WhenLate::Cancel));
        assert!(end.contains("allow more than 300 ms"), "{end}");
        assert!(rounds < 10);
        let (_, end, rounds) = simulate(40, convergence(false, WhenLate::PostCopy));
        assert_eq!((&*end, rounds < 10), ("post-copy", true));
        // Nothing helps.
        let (throttled, end, _) = simulate(4000, cancel);
        assert_eq!(throttled, THROTTLE);
        assert!(end.starts_with("the guest writes "), "{end}");
        let (throttled, end, rounds) = simulate(4000, convergence(true, WhenLate::GoOn));
        assert_eq!(
            (throttled.len(), &*end, rounds),
            (THROTTLE.len(), "goes on", 100)
        );
    }
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! What a task's log says about bytes on their way: how many are there, of how many, and how fast they come.

use std::time::{Duration, Instant};

/// Time between two such lines.
pub const PROGRESS_EVERY: Duration = Duration::from_secs(2);

/// Work on bytes, from its beginning on.
#[derive(Debug, Clone, Copy)]
pub struct Progress {
    verb: &'static str,
    began: Instant,
}

impl Progress {
    /// It begins now; `verb` says in the past tense what happens to the bytes.
    pub fn begin(verb: &'static str) -> Self {
        let began = Instant::now();
        Self { verb, began }
    }

    /// One line: `copied 12 of 40 MiB (30 %), 6 MiB/s`.
    pub fn line(&self, done: u64, total: u64) -> String {
        line(self.verb, done, total, self.began.elapsed())
    }
}

fn line(verb: &str, done: u64, total: u64, elapsed: Duration) -> String {
    let done = done.min(total);
    let percent = u128::from(done) * 100 / u128::from(total.max(1));
    let rate = u128::from(done) * 1000 / elapsed.as_millis().max(1);
    let (done, total, rate) = (done >> 20, total >> 20, rate >> 20);
    format!("{verb} {done} of {total} MiB ({percent} %), {rate} MiB/s")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_percent_and_rate() {
        let mib: u64 = 1 << 20;
        let say =
            |done, total, ms| line("copied", done * mib, total * mib, Duration::from_millis(ms));
        assert_eq!(say(12, 40, 2000), "copied 12 of 40 MiB (30 %), 6 MiB/s");
        assert_eq!(say(41, 40, 500), "copied 40 of 40 MiB (100 %), 80 MiB/s");
        assert_eq!(say(0, 0, 0), "copied 0 of 0 MiB (0 %), 0 MiB/s");
    }
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Chance for tests, by a seed that is printed.

/// xorshift64*: numbers that a seed repeats.
pub(crate) struct Dice(pub(crate) u64);

impl Dice {
    pub(crate) fn roll(&mut self, below: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11) % below
    }
}

/// A new seed each run, unless one is given to repeat a failure.
pub(crate) fn seed() -> u64 {
    let given = std::env::var("ATOLL_SEED").ok();
    let seed = given.map_or_else(
        || {
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
            u64::try_from(now.unwrap().as_nanos() & u128::from(u64::MAX)).unwrap() | 1
        },
        |text| text.parse().unwrap(),
    );
    eprintln!("ATOLL_SEED={seed}");
    seed
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Replays the fuzz targets' corpus, its mutations by a seeded generator, and random bytes.

use atoll_devices::testing::fuzz;

/// Random inputs a target; the corpus is mutated as often.
const ROUNDS: u64 = 300;

/// SplitMix64: small, and the same everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    fn byte(&mut self) -> u8 {
        self.next().to_le_bytes()[0]
    }

    fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.next() % end as u64).unwrap()
    }
}

fn replay(target: fn(&[u8])) {
    let corpus = fuzz::corpus();
    corpus.iter().for_each(|input| target(input));
    for seed in 0..ROUNDS {
        // A panic names its input: run the target with this seed again.
        println!("seed {seed}");
        let mut random = Random(seed);
        let bytes: Vec<u8> = (0..random.below(700)).map(|_| random.byte()).collect();
        target(&bytes);
        let mut input = corpus[random.below(corpus.len())].clone();
        for _ in 0..=random.below(6) {
            let end = input.len().clamp(1, 92);
            let at = random.below(end);
            if let Some(byte) = input.get_mut(at) {
                *byte = match random.below(3) {
                    0 => random.byte(),
                    1 => *byte ^ 1 << random.below(8),
                    _ => [0, 1, 2, 4, 0x10, 0x7f, 0x80, 0xff][random.below(8)],
                };
            }
        }
        target(&input);
    }
}

#[test]
fn queue() {
    replay(fuzz::queue);
}

#[test]
fn blk_request() {
    replay(fuzz::blk_request);
}

#[test]
fn blk_device() {
    replay(fuzz::blk_device);
}

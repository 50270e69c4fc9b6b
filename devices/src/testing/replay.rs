// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Replays a fuzz target on the stable toolchain: its corpus, the corpus's mutations by a seeded generator, and random
//! bytes. Finds less than a fuzzer that sees which code it reaches, but with every run of the tests.

/// SplitMix64: small, and the same everywhere.
#[derive(Debug)]
pub struct Random(pub u64);

impl Random {
    /// The next 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// The next byte.
    pub fn byte(&mut self) -> u8 {
        self.bits().to_le_bytes()[0]
    }

    /// A number below `end`.
    pub fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.bits() % end as u64).expect("below a usize")
    }
}

/// How much is replayed, and where mutations are worth while.
#[derive(Debug, Clone, Copy)]
pub struct Replay {
    /// Random inputs, and as many mutations of the corpus.
    pub rounds: u64,
    /// Length of the longest random input.
    pub random_bytes_max: usize,
    /// Only the first bytes of an input are mutated: what follows is data to the target.
    pub mutated_bytes: usize,
}

/// A fuzz target: what runs on any bytes, and inputs that reach far. A panic is a finding.
#[derive(Debug)]
pub struct Target {
    /// Its name, for `make fuzz` and for its test.
    pub name: &'static str,
    /// Runs on one input.
    pub run: fn(&[u8]),
    /// Makes the inputs to begin with.
    pub corpus: fn() -> Vec<Vec<u8>>,
    /// How its test replays it.
    pub replay: Replay,
}

impl Target {
    /// Replays the target of that name; for its test.
    pub fn replay(all: &[Self], name: &str) {
        let target = all.iter().find(|target| target.name == name).unwrap();
        replay(target.replay, &(target.corpus)(), target.run);
    }

    /// Panics unless every target has a test of its name in `source`, the text of the tests.
    pub fn each_has_a_test(all: &[Self], source: &str) {
        for target in all {
            let test = format!("\nfn {}()", target.name);
            assert!(source.contains(&test), "{}", target.name);
        }
    }
}

/// Bytes that bounds are off by.
const EDGES: [u8; 8] = [0, 1, 2, 4, 0x10, 0x7f, 0x80, 0xff];

/// Runs `target` on all of it. A panic names its seed on the line before.
fn replay(how: Replay, corpus: &[Vec<u8>], target: impl Fn(&[u8])) {
    corpus.iter().for_each(|input| target(input));
    for seed in 0..how.rounds {
        println!("seed {seed}");
        let mut random = Random(seed);
        let size = random.below(how.random_bytes_max);
        let bytes: Vec<u8> = (0..size).map(|_| random.byte()).collect();
        target(&bytes);
        if corpus.is_empty() {
            continue;
        }
        let mut input = corpus[random.below(corpus.len())].clone();
        for _ in 0..=random.below(6) {
            let end = input.len().clamp(1, how.mutated_bytes);
            let at = random.below(end);
            if let Some(byte) = input.get_mut(at) {
                *byte = match random.below(3) {
                    0 => random.byte(),
                    1 => *byte ^ 1 << random.below(8),
                    _ => EDGES[random.below(EDGES.len())],
                };
            }
        }
        if random.below(8) == 0 {
            input.truncate(random.below(input.len() + 1));
        }
        target(&input);
    }
}

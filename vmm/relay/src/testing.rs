// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Fuzz targets: what comes from the network. Ordinary tests replay a corpus, its mutations and random bytes; `make
//! fuzz` runs them under libFuzzer (`vmm/fuzz`). Behind the feature `testing`.

use atoll_disk::chain;
use atoll_vmm::testing::{Replay, Target};

use crate::wire::Decoder;
use crate::{PREFACE_BYTES, Preface, VERDICT_BYTES, Verdict};

/// Every target of this crate.
pub const TARGETS: &[Target] = &[Target {
    name: "relay",
    run: relay,
    corpus: relay_corpus,
    replay: Replay {
        rounds: 1000,
        random_bytes_max: 200,
        mutated_bytes: 60,
    },
}];

/// Reads the input as a greeting of either side, which is understood as it would be written; then as frames, which
/// carry no more than came.
fn relay(input: &[u8]) {
    if let Some(bytes) = input.first_chunk::<PREFACE_BYTES>()
        && let Some(preface) = Preface::of_bytes(*bytes)
    {
        assert_eq!(preface.to_bytes(), *bytes);
    }
    if let Some(bytes) = input.first_chunk::<VERDICT_BYTES>()
        && let Some(verdict) = Verdict::of_bytes(*bytes)
    {
        assert_eq!(Verdict::of_bytes(verdict.to_bytes()), Some(verdict));
    }
    let (mut frames, mut payload) = (Decoder::default(), Vec::new());
    for part in input.chunks(7) {
        if let Err(error) = frames.feed(part, &mut payload) {
            let text = chain(&error);
            assert!(!text.contains('\n') && text.len() < 1000, "{text}");
            break;
        }
    }
    assert!(payload.len() <= input.len());
}

/// Greetings, and frames: a beat, three bytes, the end.
fn relay_corpus() -> Vec<Vec<u8>> {
    let preface = Preface {
        role: crate::Role::Data,
        journey: [7; 16],
        silence_ms: 20_000,
    };
    vec![
        preface.to_bytes().to_vec(),
        Verdict::Welcome(500).to_bytes().to_vec(),
        vec![0, 0, 0, 0, 3, 0, 0, 0, 1, 2, 3, 255, 255, 255, 255],
    ]
}

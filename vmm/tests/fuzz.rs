// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Every fuzz target of `vmm/fuzz`, replayed.

use atoll_devices::testing::replay::{Replay, replay};
use atoll_vmm::testing;

#[test]
fn kernel() {
    let how = Replay {
        rounds: 400,
        random_bytes_max: 4096,
        // The headers of an ELF file, and of a bzImage.
        mutated_bytes: 0x268,
    };
    replay(how, &testing::kernel_corpus(), testing::kernel);
}

#[test]
fn request() {
    let how = Replay {
        rounds: 2000,
        random_bytes_max: 300,
        mutated_bytes: 120,
    };
    replay(how, &testing::request_corpus(), testing::request);
}

#[test]
fn spec() {
    let how = Replay {
        rounds: 2000,
        random_bytes_max: 200,
        mutated_bytes: 400,
    };
    replay(how, &testing::spec_corpus(), testing::spec);
}

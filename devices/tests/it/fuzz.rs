// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Every fuzz target of `devices/fuzz`, replayed.

use atoll_devices::testing::fuzz;
use atoll_devices::testing::replay::{Replay, replay};

const QUEUE: Replay = Replay {
    rounds: 300,
    random_bytes_max: 700,
    // Rings, descriptors and a request's header; then sectors.
    mutated_bytes: 92,
};

#[test]
fn queue() {
    replay(QUEUE, &fuzz::corpus(), fuzz::queue);
}

#[test]
fn blk_request() {
    replay(QUEUE, &fuzz::corpus(), fuzz::blk_request);
}

#[test]
fn blk_device() {
    replay(QUEUE, &fuzz::corpus(), fuzz::blk_device);
}

#[test]
fn pci() {
    let how = Replay {
        rounds: 500,
        random_bytes_max: 1200,
        mutated_bytes: 1200,
    };
    replay(how, &fuzz::pci_corpus(), fuzz::pci);
}

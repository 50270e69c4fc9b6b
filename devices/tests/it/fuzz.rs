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

/// The same inputs for every queue of every other kind of device; the first byte says which.
#[test]
fn device() {
    let corpus: Vec<Vec<u8>> = (0..64)
        .flat_map(|which| {
            fuzz::corpus().into_iter().map(move |input| {
                let mut with_kind = vec![which];
                with_kind.extend(input);
                with_kind
            })
        })
        .collect();
    replay(QUEUE, &corpus, fuzz::device);
}

#[test]
fn scsi_device() {
    // Every command once, then mutations.
    replay(QUEUE, &fuzz::scsi_corpus(), fuzz::scsi_device);
}

#[test]
fn pci() {
    let how = Replay {
        rounds: 200,
        random_bytes_max: 1200,
        mutated_bytes: 1200,
    };
    replay(how, &fuzz::pci_corpus(), fuzz::pci);
}

#[test]
fn vhost_user() {
    let how = Replay {
        rounds: 200,
        random_bytes_max: 300,
        mutated_bytes: 120,
    };
    replay(how, &fuzz::vhost_user_corpus(), fuzz::vhost_user);
}

#[test]
fn hotplug() {
    let how = Replay {
        rounds: 200,
        random_bytes_max: 1200,
        mutated_bytes: 1200,
    };
    replay(how, &fuzz::hotplug_corpus(), fuzz::hotplug);
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Runs the fuzz target that the environment names: ATOLL_FUZZ_TARGET. `list` prints all names. Where ATOLL_FUZZ_SEEDS
//! names a directory, the target's corpus is written there first. Everything else are libFuzzer's own arguments.
#![no_main]

use std::path::Path;
use std::process::exit;
use std::sync::LazyLock;

use atoll_devices::testing::replay::Target;

fn targets() -> impl Iterator<Item = &'static Target> {
    let devices = atoll_devices::testing::fuzz::TARGETS;
    let vmm = atoll_vmm::testing::TARGETS;
    devices.iter().chain(vmm).chain(atoll_relay::testing::TARGETS)
}

static TARGET: LazyLock<&'static Target> = LazyLock::new(|| {
    let name = std::env::var("ATOLL_FUZZ_TARGET").unwrap_or_default();
    if name == "list" {
        targets().for_each(|target| println!("{}", target.name));
        exit(0);
    }
    targets().find(|target| target.name == name).unwrap_or_else(|| {
        eprintln!("ATOLL_FUZZ_TARGET={name:?}: no such target, `list` shows them");
        exit(2)
    })
});

/// Before libFuzzer itself begins. One file an input, so that it begins where the tests are.
fn begin() {
    LazyLock::force(&TARGET);
    let Some(directory) = std::env::var_os("ATOLL_FUZZ_SEEDS") else {
        return;
    };
    for (index, input) in (TARGET.corpus)().iter().enumerate() {
        let path = Path::new(&directory).join(format!("seed-{index}"));
        std::fs::write(&path, input).expect("a directory for the corpus");
    }
}

libfuzzer_sys::fuzz_target!(
    init: begin(),
    |input: &[u8]| (TARGET.run)(input)
);

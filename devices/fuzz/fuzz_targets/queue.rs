// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Any bytes as rings and descriptors: chains end, and lie in guest memory.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| atoll_devices::testing::fuzz::queue(input));

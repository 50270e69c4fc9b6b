// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Any bytes as the rings of entropy sources, balloons and consoles, served by their own threads.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| atoll_devices::testing::fuzz::device(input));

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Any bytes as a connection to the control API.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| atoll_vmm::testing::request(input));

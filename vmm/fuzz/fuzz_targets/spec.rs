// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Any bytes as a machine's spec.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| atoll_vmm::testing::spec(input));

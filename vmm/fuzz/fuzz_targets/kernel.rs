// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Any bytes as a kernel: an entry in guest memory, or one line that says why not.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| atoll_vmm::testing::kernel(input));

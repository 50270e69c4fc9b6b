// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Any bytes as block requests: what the parser accepts fits what was offered.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| atoll_devices::testing::fuzz::blk_request(input));

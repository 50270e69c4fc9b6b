// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Any bytes as the rings of a whole block device with a disk in memory.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| atoll_devices::testing::fuzz::blk_device(input));

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Any bytes as the answers of a process that serves a device.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| atoll_devices::testing::fuzz::vhost_user(input));

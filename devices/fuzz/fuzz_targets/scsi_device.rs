// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Any bytes as the request queue of a SCSI host with a disk and a drive.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| atoll_devices::testing::fuzz::scsi_device(input));

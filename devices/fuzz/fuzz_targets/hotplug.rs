// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Any bytes as accesses to a PCI bus whose functions come and go, and as what their owner does meanwhile.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| atoll_devices::testing::fuzz::hotplug(input));

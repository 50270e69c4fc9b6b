// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Any bytes as accesses to the PCI bus: configuration space both ways, and BARs wherever they are moved.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| atoll_devices::testing::fuzz::pci(input));

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! For tests: memory of a few pages, looked at by their numbers.

use atoll_devices::memory::{PAGE_BYTES, Ram};
use vm_memory::{Bytes, GuestAddress};

/// Pages of the machines of these tests.
pub(super) const PAGES: u64 = 1024;
/// The same in MiB.
pub(super) const MIB: u64 = PAGES >> 8;

/// Where a page is for the guest.
pub(super) fn at(page: u64) -> GuestAddress {
    GuestAddress(page * PAGE_BYTES as u64)
}

/// What a page has.
pub(super) fn page(ram: &Ram, number: u64) -> Vec<u8> {
    let mut bytes = vec![0; PAGE_BYTES];
    ram.read_slice(&mut bytes, at(number)).unwrap();
    bytes
}

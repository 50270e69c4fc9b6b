// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The type of guest memory, chosen in one place. Not the memory itself: the VMM makes that.

use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

/// One snapshot of guest RAM: what a queue thread works on for one wake-up.
pub type Ram = GuestMemoryMmap<()>;

/// Guest RAM as devices hold it. Regions may be added while they run; every user takes a snapshot by
/// `GuestAddressSpace::memory()`, and keeps it for as long as a host pointer into it lives.
pub type Memory = GuestMemoryAtomic<Ram>;

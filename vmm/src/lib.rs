// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The virtual machine monitor: one process a VM, a library and the atoll-vmm command.

pub mod probe;

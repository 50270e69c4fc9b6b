// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Brings `entry.s` into the program: the PVH entry and all that runs in ring 0.
#![expect(unsafe_code, reason = "assembly")]

core::arch::global_asm!(include_str!("entry.s"), options(raw));

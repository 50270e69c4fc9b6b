// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The PC's own devices, on ports. Only the serial port is here: the machine is hardware-reduced ACPI, whose few
//! registers belong to the VMM, and guests take the time from KVM's clock.

mod serial;

pub use serial::Serial;

/// What a guest can ask of the whole machine. The VMM implements it; called on vCPU threads, so it only notes
/// the wish and returns.
pub trait MachineControl: Send + Sync {
    /// The guest turned itself off (ACPI S5).
    fn power_off(&self);
    /// The guest asked for a reset.
    fn reset(&self);
}

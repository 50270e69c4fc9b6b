// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The PC's own devices, on ports: serial, power management, clock, keyboard controller's reset line.

mod i8042;
mod pm;
mod rtc;
mod serial;

pub use i8042::I8042;
pub use pm::{PmBlock, SleepType};
pub use rtc::Rtc;
pub use serial::Serial;

/// What a guest can ask of the whole machine. The VMM implements it; called on vCPU threads, so it only notes
/// the wish and returns.
pub trait MachineControl: Send + Sync {
    /// The guest turned itself off (ACPI S5).
    fn power_off(&self);
    /// The guest asked for a reset.
    fn reset(&self);
}

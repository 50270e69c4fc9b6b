// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The board's own devices, on ports and at fixed addresses. The `micro` board has the serial port only: it is
//! hardware-reduced ACPI, whose few registers belong to the VMM, and guests take the time from KVM's clock.
//!
//! ```text
//! serial       COM1                                  pm           ACPI registers, PM timer
//! fw_cfg       what firmware asks the VMM            rtc          clock and CMOS memory
//! flash        firmware's variables                  debug        firmware's debug console
//! q35          host bridge and LPC bridge            reset_ports  resets of old
//! pvpanic      a PCI function: the guest crashed     watchdog     a PCI function: the guest must feed it
//! generation   bytes in memory: the machine is a copy  timer        a moment that a device waits for
//! ```

mod debug;
mod flash;
pub mod fw_cfg;
mod generation;
mod moment;
mod pm;
mod pvpanic;
mod reset_ports;
mod rtc;
mod serial;
mod timer;
mod watchdog;

pub mod q35;

pub use debug::DebugPort;
pub use flash::{BLOCK_BYTES as FLASH_BLOCK_BYTES, Flash, FlashWindow};
pub use fw_cfg::{FwCfg, FwCfgItems};
pub use generation::GenerationId;
pub use moment::Moment;
pub use pm::AcpiPm;
pub use pvpanic::{PanicDevice, PanicEvent};
pub use reset_ports::{KeyboardReset, SystemControl};
pub use rtc::Rtc;
pub use serial::Serial;
pub use watchdog::Watchdog;

/// What a guest can ask of the whole machine. The VMM implements it; called on vCPU threads, so it only notes
/// the wish and returns.
pub trait MachineControl: Send + Sync {
    /// The guest turned itself off (ACPI S5).
    fn power_off(&self);
    /// The guest asked for a reset.
    fn reset(&self);
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! ACPI fixed hardware: PM1 event and control registers, and the power management timer. ACPI 6.5 §4.8.3.
//!
//! ```text
//!  +0  PM1_STS (write 1 to clear)    +4  PM1_CNT              +8  PM_TMR, 24 bits
//!  +2  PM1_EN                        +6  (reads 0)
//! ```

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::MachineControl;
use crate::bus::BusDevice;
use crate::interrupt::IrqLine;

/// Status and enable bit of the power button.
const POWER_BUTTON: u16 = 1 << 8;
/// Status bits that exist here; the rest reads 0.
const STATUS_BITS: u16 = POWER_BUTTON;
/// Enable bits a guest may keep: timer, global lock, power button, sleep button, clock.
const ENABLE_BITS: u16 = 0x0721;
/// Control: the machine is in ACPI mode, always.
const SCI_ENABLE: u16 = 1;
/// Control: sleep type, three bits from here.
const SLEEP_TYPE_SHIFT: u16 = 10;
/// Control: go to sleep (write only).
const SLEEP_ENABLE: u16 = 1 << 13;
/// Rate of the timer, in Hz. ACPI 6.5 §4.8.3.3.
const TIMER_HZ: u128 = 3_579_545;

/// Values of SLP_TYP that the DSDT must name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum SleepType {
    /// `\_S5`: off.
    Off = 5,
}

#[derive(Default)]
struct Registers {
    status: u16,
    enable: u16,
    control: u16,
}

/// PM1 registers, timer and the SCI wire.
pub struct PmBlock {
    control: Arc<dyn MachineControl>,
    sci: Arc<dyn IrqLine>,
    /// Held while the SCI level is set, so that the wire follows the registers. No lock is taken under it.
    registers: Mutex<Registers>,
    started: Instant,
}

impl PmBlock {
    /// Ports.
    pub const SIZE: u64 = 12;
    /// Offset of the event block (4 bytes): FADT PM1a_EVT_BLK.
    pub const EVENT: u64 = 0;
    /// Offset of the control block (2 bytes): FADT PM1a_CNT_BLK.
    pub const CONTROL: u64 = 4;
    /// Offset of the timer (4 bytes, 24 bits used): FADT PM_TMR_BLK.
    pub const TIMER: u64 = 8;

    /// `control` is told of S5; `sci` is level-triggered, active high.
    pub fn new(control: Arc<dyn MachineControl>, sci: Arc<dyn IrqLine>) -> Self {
        Self {
            control,
            sci,
            registers: Mutex::default(),
            started: Instant::now(),
        }
    }

    /// Somebody pressed the power button; an ACPI guest shuts down.
    pub fn press_power_button(&self) {
        let mut registers = self.lock();
        registers.status |= POWER_BUTTON;
        self.drive(&registers);
    }

    /// As after a machine reset.
    pub fn reset(&self) {
        let mut registers = self.lock();
        *registers = Registers::default();
        self.drive(&registers);
    }

    fn drive(&self, registers: &Registers) {
        self.sci.set_level(registers.status & registers.enable != 0);
    }

    fn image(&self) -> [u8; 12] {
        let registers = self.lock();
        let ticks = self.started.elapsed().as_nanos() * TIMER_HZ / 1_000_000_000;
        let timer = u32::try_from(ticks & 0xff_ffff).expect("24 bits");
        let mut image = [0; 12];
        image[0..2].copy_from_slice(&registers.status.to_le_bytes());
        image[2..4].copy_from_slice(&registers.enable.to_le_bytes());
        image[4..6].copy_from_slice(&(registers.control | SCI_ENABLE).to_le_bytes());
        image[8..12].copy_from_slice(&timer.to_le_bytes());
        image
    }

    fn write_byte(&self, registers: &mut Registers, offset: u64, value: u8) {
        let high = offset & 1 != 0;
        let shifted = u16::from(value) << if high { 8 } else { 0 };
        let other: u16 = if high { 0x00ff } else { 0xff00 };
        match offset & !1 {
            0 => registers.status &= !(shifted & STATUS_BITS),
            2 => registers.enable = registers.enable & other | shifted & ENABLE_BITS,
            4 => {
                registers.control = registers.control & other | shifted & !SLEEP_ENABLE;
                let kind = registers.control >> SLEEP_TYPE_SHIFT & 7;
                if shifted & SLEEP_ENABLE != 0 && kind == SleepType::Off as u16 {
                    self.control.power_off();
                }
            }
            _ => {}
        }
    }

    fn lock(&self) -> MutexGuard<'_, Registers> {
        self.registers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl BusDevice for PmBlock {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let image = self.image();
        let from = usize::try_from(offset).unwrap_or(image.len());
        for (index, byte) in data.iter_mut().enumerate() {
            *byte = image.get(from + index).copied().unwrap_or(0);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut registers = self.lock();
        for (at, &value) in (offset..).zip(data) {
            self.write_byte(&mut registers, at, value);
        }
        self.drive(&registers);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{ControlLog, Line};

    fn block() -> (PmBlock, Arc<ControlLog>, Arc<Line>) {
        let (log, line) = (Arc::new(ControlLog::default()), Arc::new(Line::default()));
        (PmBlock::new(log.clone(), line.clone()), log, line)
    }

    #[test]
    fn power_button_holds_the_sci_until_it_is_cleared() {
        let (pm, _, line) = block();
        pm.press_power_button();
        assert!(!line.level(), "not enabled");
        pm.write(2, &POWER_BUTTON.to_le_bytes());
        assert!(line.level());
        let mut status = [0; 2];
        pm.read(0, &mut status);
        assert_eq!(u16::from_le_bytes(status), POWER_BUTTON);
        pm.write(0, &POWER_BUTTON.to_le_bytes());
        assert!(!line.level());
    }

    #[test]
    fn s5_by_word_or_by_byte() {
        let word = SLEEP_ENABLE | 5 << SLEEP_TYPE_SHIFT;
        let (pm, log, _) = block();
        pm.write(4, &(word ^ 1 << SLEEP_TYPE_SHIFT).to_le_bytes());
        assert_eq!(log.power_offs(), 0, "S4 is not offered");
        pm.write(4, &word.to_le_bytes());
        assert_eq!(log.power_offs(), 1);
        let (pm, log, _) = block();
        pm.write(5, &[(word >> 8).to_le_bytes()[0]]);
        assert_eq!(log.power_offs(), 1);
    }

    #[test]
    fn the_timer_runs_and_acpi_mode_is_on() {
        let (pm, ..) = block();
        let ticks = || {
            let mut data = [0; 4];
            pm.read(8, &mut data);
            u32::from_le_bytes(data)
        };
        let first = ticks();
        while ticks() == first {}
        let mut control = [0; 8];
        pm.read(4, &mut control);
        assert_eq!(control[0], 1);
        pm.read(11, &mut control);
        pm.write(11, &[0xff; 8]);
    }
}

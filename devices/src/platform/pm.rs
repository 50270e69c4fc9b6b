// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A PC's ACPI registers: PM1 events and control, the power management timer, general-purpose events (ACPI 6.5
//! §4.8). Offsets are those of an ICH9's PM block (datasheet §13.8.3), which firmware for a Q35 board expects.
//!
//! ```text
//! 0x00 PM1 status   0x02 PM1 enable   0x04 PM1 control   0x08 timer   0x20 GPE0 status   0x28 GPE0 enable
//! ```
//! The machine is in ACPI mode from power-on and stays there: there is no SMI. Not here: the sleep and reset
//! registers of the `micro` board (they belong to the VMM), the reset register 0xcf9 (`pci::ConfigPorts`).

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::MachineControl;
use crate::bus::BusDevice;
use crate::interrupt::IrqLine;
use crate::state::{DeviceState, Saved, SavedState, StateError};

/// Frequency of the timer in Hz. ACPI 6.5 §4.8.3.3.
const TIMER_HZ: u128 = 3_579_545;
/// PM1 status and enable: the power button.
const POWER_BUTTON: u16 = 1 << 8;
/// PM1 control: events cause the SCI. Always set.
const SCI_ENABLE: u16 = 1 << 0;
/// PM1 control: sleep type (three bits from here), and "go to sleep now", which reads as zero.
const SLEEP_TYPE_SHIFT: u32 = 10;
const SLEEP_TYPE_MASK: u16 = 7 << SLEEP_TYPE_SHIFT;
const SLEEP_ENABLE: u16 = 1 << 13;
/// Sleep type of soft-off, as OVMF assumes and the DSDT says.
const SLEEP_TYPE_OFF: u16 = 0;
/// Bits of PM1 status and enable that exist: timer, global lock, power button, sleep button, RTC, wake.
const PM1_STATUS_BITS: u16 = 0x8721;
const PM1_ENABLE_BITS: u16 = 0x0721;
/// General-purpose events.
const EVENT_COUNT: u8 = 64;
/// Bytes of the registers that exist.
const REGISTER_BYTES: usize = 0x30;

/// ACPI's fixed registers: PM1 event and control blocks, PM timer, GPE0 (ACPI 6.5 §4.8). Called by vCPUs on the port bus,
/// and by the VMM for its power button and events; raises the SCI.
pub struct AcpiPm {
    control: Arc<dyn MachineControl>,
    sci: Arc<dyn IrqLine>,
    /// Taken by vCPU threads and by whoever raises an event. Held while the SCI is driven, so that the wire
    /// follows the registers' order; the wire takes no lock of ours.
    registers: Mutex<Registers>,
}

#[derive(Debug, Clone, Copy)]
struct Registers {
    status: u16,
    enable: u16,
    control: u16,
    event_status: u64,
    event_enable: u64,
    timer: Timer,
}

/// Ticks that had passed at a moment of the host's clock.
#[derive(Debug, Clone, Copy)]
struct Timer {
    ticks: u32,
    at: Instant,
}

/// One general-purpose event. Its `pulse` sets the status bit.
struct Event {
    pm: Arc<AcpiPm>,
    bit: u8,
}

impl IrqLine for Event {
    fn set_level(&self, asserted: bool) {
        if asserted {
            self.pm
                .change(|registers| registers.event_status |= 1 << self.bit);
        }
    }
}

struct PowerButton(Arc<AcpiPm>);

impl IrqLine for PowerButton {
    fn set_level(&self, asserted: bool) {
        if asserted {
            self.0.change(|registers| registers.status |= POWER_BUTTON);
        }
    }
}

impl AcpiPm {
    /// Ports of the block, as those at an ICH9's PMBASE.
    pub const SIZE: u16 = 0x80;

    /// Registers that tell `control` of soft-off and drive `sci`, which is level-triggered.
    pub fn new(control: Arc<dyn MachineControl>, sci: Arc<dyn IrqLine>) -> Arc<Self> {
        Arc::new(Self {
            control,
            sci,
            registers: Mutex::new(Registers::new(Timer {
                ticks: 0,
                at: Instant::now(),
            })),
        })
    }

    /// The power button's line: each pulse presses it.
    pub fn power_button(self: &Arc<Self>) -> Arc<dyn IrqLine> {
        Arc::new(PowerButton(self.clone()))
    }

    /// The line of general-purpose event `bit`: each pulse is one event.
    pub fn event(self: &Arc<Self>, bit: u8) -> Arc<dyn IrqLine> {
        assert!(bit < EVENT_COUNT, "GPE0 has 64 bits");
        Arc::new(Event {
            pm: self.clone(),
            bit,
        })
    }

    /// As at power-on; the timer goes on.
    pub fn reset(&self) {
        self.change(|registers| *registers = Registers::new(registers.timer));
    }

    fn change(&self, change: impl FnOnce(&mut Registers)) {
        let mut registers = self.lock();
        change(&mut registers);
        self.sci.set_level(registers.wants_interrupt());
    }

    fn lock(&self) -> MutexGuard<'_, Registers> {
        self.registers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Timer {
    fn ticks(&self) -> u32 {
        let passed = self.at.elapsed().as_nanos() * TIMER_HZ / 1_000_000_000;
        // A 32-bit counter that wraps.
        let passed = u32::try_from(passed & 0xffff_ffff).expect("masked");
        self.ticks.wrapping_add(passed)
    }
}

impl Registers {
    fn new(timer: Timer) -> Self {
        Self {
            status: 0,
            enable: 0,
            control: 0,
            event_status: 0,
            event_enable: 0,
            timer,
        }
    }

    fn wants_interrupt(&self) -> bool {
        self.status & self.enable != 0 || self.event_status & self.event_enable != 0
    }

    fn bytes(&self) -> [u8; REGISTER_BYTES] {
        let mut bytes = [0; REGISTER_BYTES];
        bytes[0..2].copy_from_slice(&self.status.to_le_bytes());
        bytes[2..4].copy_from_slice(&self.enable.to_le_bytes());
        bytes[4..6].copy_from_slice(&(self.control | SCI_ENABLE).to_le_bytes());
        bytes[8..12].copy_from_slice(&self.timer.ticks().to_le_bytes());
        bytes[0x20..0x28].copy_from_slice(&self.event_status.to_le_bytes());
        bytes[0x28..0x30].copy_from_slice(&self.event_enable.to_le_bytes());
        bytes
    }

    /// One byte of a guest's write. Whether it said "go to sleep".
    fn write(&mut self, offset: usize, value: u8) -> bool {
        let word = |offset: usize| u16::from(value) << (8 * (offset & 1));
        let set = |old: u16, bits: u16, offset: usize| {
            let byte = 0xff << (8 * (offset & 1));
            (old & !byte) | (word(offset) & byte & bits)
        };
        let long = |offset: usize| u64::from(value) << (8 * (offset & 7));
        match offset {
            0 | 1 => self.status &= !(word(offset) & PM1_STATUS_BITS),
            2 | 3 => self.enable = set(self.enable, PM1_ENABLE_BITS, offset),
            4 | 5 => {
                self.control = set(self.control, SLEEP_TYPE_MASK, offset);
                return word(offset) & SLEEP_ENABLE != 0;
            }
            0x20..=0x27 => self.event_status &= !long(offset),
            0x28..=0x2f => {
                let byte = 0xff << (8 * (offset & 7));
                self.event_enable = (self.event_enable & !byte) | long(offset);
            }
            _ => {}
        }
        false
    }
}

#[derive(Serialize, Deserialize)]
struct PmState {
    status: u16,
    enable: u16,
    control: u16,
    event_status: u64,
    event_enable: u64,
    timer: u32,
}

impl SavedState for PmState {
    const KIND: &'static str = "acpi-pm";
    const VERSION: u32 = 1;
}

impl DeviceState for AcpiPm {
    fn save(&self) -> Saved {
        let registers = self.lock();
        Saved::of(&PmState {
            status: registers.status,
            enable: registers.enable,
            control: registers.control,
            event_status: registers.event_status,
            event_enable: registers.event_enable,
            timer: registers.timer.ticks(),
        })
    }

    /// The timer goes on from where it was.
    fn restore(&self, saved: &Saved) -> Result<(), StateError> {
        let state: PmState = saved.open()?;
        self.change(|registers| {
            *registers = Registers {
                status: state.status & PM1_STATUS_BITS,
                enable: state.enable & PM1_ENABLE_BITS,
                control: state.control & SLEEP_TYPE_MASK,
                event_status: state.event_status,
                event_enable: state.event_enable,
                timer: Timer {
                    ticks: state.timer,
                    at: Instant::now(),
                },
            };
        });
        Ok(())
    }
}

impl BusDevice for AcpiPm {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let registers = *self.lock();
        let bytes = registers.bytes();
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        for (index, byte) in data.iter_mut().enumerate() {
            let at = start.saturating_add(index);
            *byte = bytes.get(at).copied().unwrap_or(0);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let mut off = false;
        self.change(|registers| {
            let mut sleep = false;
            for (index, value) in data.iter().enumerate() {
                sleep |= registers.write(start.saturating_add(index), *value);
            }
            off =
                sleep && registers.control & SLEEP_TYPE_MASK == SLEEP_TYPE_OFF << SLEEP_TYPE_SHIFT;
        });
        if off {
            self.control.power_off();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{ControlLog, Line};

    fn pm() -> (Arc<AcpiPm>, Arc<ControlLog>, Arc<Line>) {
        let (control, sci) = (Arc::new(ControlLog::default()), Arc::new(Line::default()));
        (AcpiPm::new(control.clone(), sci.clone()), control, sci)
    }

    fn word(pm: &AcpiPm, offset: u64) -> u16 {
        let mut data = [0; 2];
        pm.read(offset, &mut data);
        u16::from_le_bytes(data)
    }

    #[test]
    fn the_power_button_holds_the_sci_until_its_status_is_cleared() {
        let (pm, _, sci) = pm();
        pm.power_button().pulse();
        assert!(!sci.level(), "not enabled yet");
        pm.write(2, &POWER_BUTTON.to_le_bytes());
        assert!(sci.level());
        pm.write(0, &0xfeff_u16.to_le_bytes());
        assert!(sci.level(), "other bits");
        pm.write(0, &POWER_BUTTON.to_le_bytes());
        assert_eq!((sci.level(), word(&pm, 0)), (false, 0));
        pm.power_button().pulse();
        pm.reset();
        assert_eq!((sci.level(), word(&pm, 2)), (false, 0));
    }

    #[test]
    fn soft_off_is_the_documented_value_in_one_write_or_two() {
        let (pm, control, _) = pm();
        pm.write(4, &(SLEEP_ENABLE | 5 << SLEEP_TYPE_SHIFT).to_le_bytes());
        pm.write(4, &1_u16.to_le_bytes());
        assert_eq!(control.power_offs(), 0);
        assert_eq!(word(&pm, 4), SCI_ENABLE);
        pm.write(4, &(SLEEP_ENABLE | 1).to_le_bytes());
        pm.write(5, &[0x20]);
        assert_eq!(control.power_offs(), 2);
        assert_eq!(word(&pm, 4), SCI_ENABLE, "reads as zero");
    }

    #[test]
    fn general_purpose_events_are_bits_of_their_own() {
        let (pm, _, sci) = pm();
        let event = pm.event(9);
        pm.write(0x29, &[0x02]);
        event.pulse();
        assert!(sci.level());
        assert_eq!(word(&pm, 0x20), 1 << 9);
        pm.write(0x20, &0xff_u16.to_le_bytes());
        assert!(sci.level());
        pm.write(0x21, &[0x02]);
        assert!(!sci.level());
    }

    #[test]
    fn a_copy_goes_on_where_the_original_was() {
        let (one, _, _) = pm();
        one.write(2, &POWER_BUTTON.to_le_bytes());
        one.power_button().pulse();
        let (two, _, sci) = pm();
        two.restore(&one.save()).unwrap();
        assert!(sci.level());
        assert_eq!(word(&two, 2), POWER_BUTTON);
    }

    #[test]
    fn the_timer_counts_up_and_strange_accesses_do_nothing() {
        let (pm, _, _) = pm();
        let timer = || {
            let mut data = [0; 4];
            pm.read(8, &mut data);
            u32::from_le_bytes(data)
        };
        let first = timer();
        while timer() == first {}
        let mut data = [1; 8];
        pm.read(0x7c, &mut data);
        pm.read(u64::MAX, &mut data);
        assert_eq!(data, [0; 8]);
        pm.write(0x2c, &[0xff; 8]);
        pm.write(u64::MAX, &[0xff; 8]);
    }
}

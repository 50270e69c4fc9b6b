// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The two old ways to reset a PC: a pulse by the keyboard controller (port 0x64), and the fast reset of system
//! control port A (port 0x92). There is no keyboard: its ports read as an absent device's.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use serde::{Deserialize, Serialize};

use super::MachineControl;
use crate::bus::BusDevice;
use crate::state::{DeviceState, Saved, SavedState, StateError};

/// Command to the keyboard controller: pulse the line that resets the processor.
const PULSE_RESET: u8 = 0xfe;
/// System control port A: a rising bit resets; the other is the A20 gate, which is always open here.
const FAST_RESET: u8 = 1 << 0;
const A20: u8 = 1 << 1;

/// Port 0x64, commands to the keyboard controller.
pub struct KeyboardReset(pub Arc<dyn MachineControl>);

impl KeyboardReset {
    /// Port of the 8042's commands; only the reset pulse (0xfe) does something.
    pub const PORT: u16 = 0x64;
}

/// Nothing: a pulse has been passed on before the vCPU that wrote it stops.
#[derive(Serialize, Deserialize)]
struct KeyboardState {}

impl SavedState for KeyboardState {
    const KIND: &'static str = "keyboard-reset";
    const VERSION: u32 = 1;
}

impl DeviceState for KeyboardReset {
    fn save(&self) -> Saved {
        Saved::of(&KeyboardState {})
    }

    fn restore(&self, saved: &Saved) -> Result<(), StateError> {
        saved.open::<KeyboardState>().map(drop)
    }
}

impl BusDevice for KeyboardReset {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write(&self, _: u64, data: &[u8]) {
        if data == [PULSE_RESET] {
            self.0.reset();
        }
    }
}

/// Port 0x92: fast reset, and the A20 gate, which is always open here.
pub struct SystemControl {
    control: Arc<dyn MachineControl>,
    value: AtomicU8,
}

impl SystemControl {
    /// Port of a PC's system control register A.
    pub const PORT: u16 = 0x92;

    /// A port that tells `control` of resets.
    #[must_use]
    pub fn new(control: Arc<dyn MachineControl>) -> Self {
        Self {
            control,
            value: AtomicU8::new(A20),
        }
    }

    /// Puts the register back to what it is at power-on; called by the machine's owner while vCPUs are held.
    pub fn reset(&self) {
        self.value.store(A20, Ordering::SeqCst);
    }
}

#[derive(Serialize, Deserialize)]
struct SystemControlState {
    value: u8,
}

impl SavedState for SystemControlState {
    const KIND: &'static str = "system-control";
    const VERSION: u32 = 1;
}

impl DeviceState for SystemControl {
    fn save(&self) -> Saved {
        let value = self.value.load(Ordering::SeqCst);
        Saved::of(&SystemControlState { value })
    }

    fn restore(&self, saved: &Saved) -> Result<(), StateError> {
        let state: SystemControlState = saved.open()?;
        self.value.store(state.value, Ordering::SeqCst);
        Ok(())
    }
}

impl BusDevice for SystemControl {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(self.value.load(Ordering::SeqCst));
    }

    fn write(&self, _: u64, data: &[u8]) {
        let [value] = *data else { return };
        let old = self.value.swap(value & !FAST_RESET | A20, Ordering::SeqCst);
        if value & !old & FAST_RESET != 0 {
            self.control.reset();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::ControlLog;

    #[test]
    fn only_the_documented_values_reset() {
        let control = Arc::new(ControlLog::default());
        let keyboard = KeyboardReset(control.clone());
        let system = SystemControl::new(control.clone());
        for value in [0, 0xd1, 0xff] {
            keyboard.write(0, &[value]);
            system.write(0, &[value & !1]);
        }
        keyboard.write(0, &[PULSE_RESET, 0]);
        assert_eq!(control.resets(), 0);
        keyboard.write(0, &[PULSE_RESET]);
        system.write(0, &[1]);
        assert_eq!(control.resets(), 2);
        let mut data = [0];
        system.read(0, &mut data);
        assert_eq!(data, [A20]);
    }
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The machine's three power registers, as ACPI tells the guest: sleep control, sleep status, reset.

use std::sync::Arc;

use atoll_devices::bus::BusDevice;
use atoll_devices::platform::MachineControl;
use atoll_devices::state::{DeviceState, Saved, SavedState, StateError};
use atoll_firmware::acpi::{RESET_VALUE, SLEEP_ENABLE, SLEEP_TYPE_OFF};
use serde::{Deserialize, Serialize};

/// Bits 2 to 4 of the sleep control register (ACPI 6.5 §4.8.3.7).
const SLEEP_TYPE_SHIFT: u8 = 2;
const SLEEP_TYPE_MASK: u8 = 7;

/// The registers: offset 0 sleep control, 1 sleep status, 2 reset. All of them read as zero: the machine has
/// no sleeping state from which it could have woken.
pub struct PowerRegisters {
    control: Arc<dyn MachineControl>,
}

impl PowerRegisters {
    /// Registers that tell `control`, from the vCPU thread that wrote them.
    pub fn new(control: Arc<dyn MachineControl>) -> Self {
        Self { control }
    }
}

/// Nothing: a wish has been passed on before the vCPU that wrote it stops.
#[derive(Serialize, Deserialize)]
struct PowerState {}

impl SavedState for PowerState {
    const KIND: &'static str = "power-registers";
    const VERSION: u32 = 1;
}

impl DeviceState for PowerRegisters {
    fn save(&self) -> Saved {
        Saved::of(&PowerState {})
    }

    fn restore(&self, saved: &Saved) -> Result<(), StateError> {
        saved.open::<PowerState>().map(drop)
    }
}

impl BusDevice for PowerRegisters {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let off = SLEEP_ENABLE | (SLEEP_TYPE_OFF << SLEEP_TYPE_SHIFT);
        let known = SLEEP_ENABLE | (SLEEP_TYPE_MASK << SLEEP_TYPE_SHIFT);
        match (offset, data) {
            (0, [value, ..]) if value & known == off => self.control.power_off(),
            (2, [value, ..]) if *value == RESET_VALUE => self.control.reset(),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[derive(Default)]
    struct Seen(Mutex<Vec<&'static str>>);

    impl MachineControl for Seen {
        fn power_off(&self) {
            self.0.lock().unwrap().push("off");
        }
        fn reset(&self) {
            self.0.lock().unwrap().push("reset");
        }
    }

    #[track_caller]
    fn check(offset: u64, value: u8, expected: &[&str]) {
        let seen = Arc::new(Seen::default());
        PowerRegisters::new(seen.clone()).write(offset, &[value]);
        assert_eq!(*seen.0.lock().unwrap(), expected);
    }

    #[test]
    fn only_the_documented_values_do_something() {
        check(0, 5 << 2 | 1 << 5, &["off"]);
        check(0, 5 << 2, &[]);
        check(0, 3 << 2 | 1 << 5, &[]);
        check(2, 1, &["reset"]);
        check(2, 0xff, &[]);
        check(1, 1, &[]);
    }
}

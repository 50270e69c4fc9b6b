// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The keyboard controller's command port, for the one command that still matters: pulse the reset line.
//! There is no keyboard behind it.

use std::sync::Arc;

use super::MachineControl;
use crate::bus::BusDevice;

/// Command: pulse output line 0, which resets the processor.
const COMMAND_RESET: u8 = 0xfe;

/// Port 0x64.
pub struct I8042 {
    control: Arc<dyn MachineControl>,
}

impl I8042 {
    /// Its port.
    pub const PORT: u64 = 0x64;

    /// `control` is told of resets.
    pub fn new(control: Arc<dyn MachineControl>) -> Self {
        Self { control }
    }
}

impl BusDevice for I8042 {
    /// Status 0: both buffers are empty, so that a driver which waits before its command does not wait.
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        if data == [COMMAND_RESET] {
            self.control.reset();
        }
    }
}

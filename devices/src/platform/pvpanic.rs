// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The panic device (QEMU, `docs/specs/pvpanic.rst`) as a PCI function: one byte by which a guest's kernel says
//! that it has crashed. Linux binds `pvpanic-pci`.

use serde::{Deserialize, Serialize};

use crate::pci::{Bar, ConfigSpace, Identity, PciDevice};
use crate::rate_limited::{RateLimit, warn_limited};
use crate::state::{DeviceState, Saved, SavedState, StateError};

/// Red Hat's number for it; the class is "other system peripheral".
const IDENTITY: Identity = Identity {
    vendor: 0x1b36,
    device: 0x0011,
    subsystem_vendor: 0x1af4,
    subsystem: 0x1100,
    class: 0x08_80_00,
    revision: 1,
};
/// The BAR; only its first byte means something.
const BAR_BYTES: u64 = 4096;
/// Events: the kernel panicked; it crashed and has loaded another one that looks at the remains.
const PANICKED: u8 = 1;
const CRASH_LOADED: u8 = 2;

/// What a guest says of itself (QEMU `docs/specs/pvpanic.rst`): a bit each, of which unknown ones are ignored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PanicEvent {
    /// The kernel panicked.
    Panicked,
    /// The kernel panicked and another one takes over to write a dump.
    CrashLoaded,
}

/// The function: a byte in its BAR that a guest's kernel writes when it crashes, and reads to know which events there are.
pub struct PanicDevice {
    report: Box<dyn Fn(PanicEvent) + Send + Sync>,
    limit: RateLimit,
}

impl PanicDevice {
    /// Tells `report`, on the vCPU's thread, which must not block.
    pub fn new(report: Box<dyn Fn(PanicEvent) + Send + Sync>) -> Self {
        Self {
            report,
            limit: RateLimit::new(),
        }
    }
}

impl PciDevice for PanicDevice {
    fn config_space(&self) -> ConfigSpace {
        let mut config = ConfigSpace::new(IDENTITY);
        config.add_bar(Bar {
            index: 0,
            size: BAR_BYTES,
        });
        config
    }

    /// Which events it knows.
    fn bar_read(&self, _bar: usize, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if offset == 0
            && let Some(first) = data.first_mut()
        {
            *first = PANICKED | CRASH_LOADED;
        }
    }

    fn bar_write(&self, _bar: usize, offset: u64, data: &[u8]) {
        let Some(value) = data.first().filter(|_| offset == 0) else {
            return;
        };
        let event = match value {
            value if value & PANICKED != 0 => PanicEvent::Panicked,
            value if value & CRASH_LOADED != 0 => PanicEvent::CrashLoaded,
            _ => return,
        };
        warn_limited!(
            self.limit,
            ?event,
            "the guest's kernel says that it crashed"
        );
        (self.report)(event);
    }
}

/// It remembers nothing.
#[derive(Serialize, Deserialize)]
struct PanicState {}

impl SavedState for PanicState {
    const KIND: &'static str = "pvpanic";
    const VERSION: u32 = 1;
}

impl DeviceState for PanicDevice {
    fn save(&self) -> Saved {
        Saved::of(&PanicState {})
    }

    fn restore(&self, saved: &Saved) -> Result<(), StateError> {
        saved.open::<PanicState>().map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    #[test]
    fn what_is_written_is_told() {
        let told = Arc::new(Mutex::new(Vec::new()));
        let report = {
            let told = told.clone();
            Box::new(move |event| told.lock().unwrap().push(event))
        };
        let device = PanicDevice::new(report);
        let mut byte = [0];
        device.bar_read(0, 0, &mut byte);
        assert_eq!(byte, [3]);
        for (offset, value) in [(0, 1), (0, 2), (0, 3), (0, 4), (0, 0), (1, 1)] {
            device.bar_write(0, offset, &[value]);
        }
        use PanicEvent::{CrashLoaded, Panicked};
        assert_eq!(*told.lock().unwrap(), [Panicked, CrashLoaded, Panicked]);
    }
}

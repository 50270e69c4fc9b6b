// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The debug console of firmware at port 0x402: what debug builds of OVMF print, into a file.
//!
//! A release build (Debian's) prints nothing. What a guest may write is bounded, since the file is the host's.

use std::fs::File;
use std::io::Write;
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use crate::bus::BusDevice;
use crate::state::{DeviceState, Saved, SavedState, StateError};

/// What a read answers, so that firmware finds the port (OVMF `PlatformDebugLibIoPort`).
const PRESENT: u8 = 0xe9;
/// Bytes that are kept of one machine's life.
const BYTES_MAX: usize = 4 << 20;

/// The port at which OVMF logs (`DebugLib`, port 0x402): the first 4 MiB go to a file, and a read says that somebody
/// listens. A vCPU waits for the host's file system.
pub struct DebugPort {
    /// The file and what may still be written to it. Leaf lock.
    log: Mutex<(File, usize)>,
}

impl DebugPort {
    /// Port that OVMF writes its log to, a byte at a time.
    pub const PORT: u16 = 0x402;

    /// A port that writes to the end of `log`.
    #[must_use]
    pub fn new(log: File) -> Self {
        Self {
            log: Mutex::new((log, BYTES_MAX)),
        }
    }
}

/// Nothing: the log is the host's.
#[derive(Serialize, Deserialize)]
struct DebugState {}

impl SavedState for DebugState {
    const KIND: &'static str = "debug-port";
    const VERSION: u32 = 1;
}

impl DeviceState for DebugPort {
    fn save(&self) -> Saved {
        Saved::of(&DebugState {})
    }

    fn restore(&self, saved: &Saved) -> Result<(), StateError> {
        saved.open::<DebugState>().map(drop)
    }
}

impl BusDevice for DebugPort {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(PRESENT);
    }

    fn write(&self, _: u64, data: &[u8]) {
        let mut log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        let (file, left) = &mut *log;
        let count = data.len().min(*left);
        *left -= count;
        // A log that cannot be written is not the guest's trouble.
        let _ = file.write_all(&data[..count]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Seek};

    #[test]
    fn bytes_go_to_the_file_up_to_a_bound() {
        let mut file = tempfile::tempfile().unwrap();
        let port = DebugPort::new(file.try_clone().unwrap());
        let mut data = [0];
        port.read(0, &mut data);
        assert_eq!(data, [0xe9]);
        port.write(0, b"SecCoreStartup\n");
        for _ in 0..=BYTES_MAX / 4096 {
            port.write(0, &[b'x'; 4096]);
        }
        let mut text = String::new();
        file.rewind().unwrap();
        file.read_to_string(&mut text).unwrap();
        assert!(text.starts_with("SecCoreStartup\nx"));
        assert_eq!(text.len(), BYTES_MAX);
    }
}

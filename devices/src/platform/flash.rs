// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! NOR flash with the Intel command set, in which firmware keeps its variables; every byte goes to a file.
//!
//! ```text
//!             any other command                     0x10, 0x40: one byte follows, then status
//!   array ◄──────────────────────► commands ──┬──►  0x20: 0xd0 follows, the block is erased, then status
//!             0xff, 0x00                      └──►  0xe8: count, bytes, 0xd0 follow, then status
//! ```
//! While the array is shown, the guest reads it as memory without an exit ([`FlashWindow`]); otherwise, and for
//! every write, its accesses come here. Reads answer with the status (or an identifier) then. A write takes effect
//! when the file has it. OVMF's driver is `OvmfPkg/QemuFlashFvbServicesRuntimeDxe`, in which blocks are 4 KiB.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress};

use crate::bus::BusDevice;
use crate::rate_limited::{RateLimit, warn_limited};
use crate::state::{DeviceState, Saved, SavedState, StateError};

/// Unit of erasure, bytes: an erased block reads as ones.
pub const BLOCK_BYTES: u64 = 4096;
/// Commands (Intel 28FxxxJ3 datasheet, table "Command Definitions").
const READ_ARRAY: u8 = 0xff;
const READ_ARRAY_TOO: u8 = 0x00;
const READ_IDENTIFIER: u8 = 0x90;
const READ_STATUS: u8 = 0x70;
const CLEAR_STATUS: u8 = 0x50;
const PROGRAM: u8 = 0x40;
const PROGRAM_TOO: u8 = 0x10;
const ERASE: u8 = 0x20;
const WRITE_BUFFER: u8 = 0xe8;
const CONFIRM: u8 = 0xd0;
/// Status: an operation is done; erasing failed; programming failed. Clearing it leaves nothing set: by a status of
/// zero OVMF knows that this is no RAM or ROM.
const READY: u8 = 1 << 7;
const ERASE_FAILED: u8 = 1 << 5;
const PROGRAM_FAILED: u8 = 1 << 4;
/// Manufacturer and device code.
const IDENTIFIER: [u8; 2] = [0x89, 0x18];

/// Shows or hides the array to the guest; the VMM implements it with a read-only memory slot.
pub trait FlashWindow: Send + Sync {
    /// Whether the guest reads the array as memory from now on. Called on vCPU threads.
    fn show(&self, array: bool) -> io::Result<()>;
}

/// A CFI flash chip of firmware's variables. Reads come from a memory slot while the array is shown; a write is in the
/// file before the vCPU goes on, hence blocks for that long.
pub struct Flash {
    array: Arc<GuestRegionMmap>,
    file: File,
    window: Box<dyn FlashWindow>,
    /// Where the state machine is. Held while the window changes, since both are one state for the guest.
    state: Mutex<State>,
    limit: RateLimit,
}

/// Also the saved form; the bytes of the array are in the file, which goes with the machine like a disk.
#[derive(Clone, Serialize, Deserialize)]
struct State {
    mode: Mode,
    status: u8,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Mode {
    Array,
    Status,
    Identifier,
    Program,
    Erase,
    BufferCount,
    Buffer {
        start: Option<u64>,
        data: Vec<u8>,
        left: usize,
    },
    BufferConfirm {
        start: u64,
        data: Vec<u8>,
    },
}

impl Flash {
    /// A flash whose bytes are in `array` and, the same, in `file`; `window` shows the array already.
    #[must_use]
    pub fn new(array: Arc<GuestRegionMmap>, file: File, window: Box<dyn FlashWindow>) -> Self {
        Self {
            array,
            file,
            window,
            state: Mutex::new(State {
                mode: Mode::Array,
                status: 0,
            }),
            limit: RateLimit::new(),
        }
    }

    /// Shows the array, as at power-on; its bytes stay.
    pub fn reset(&self) {
        let mut state = self.lock();
        state.status = 0;
        self.enter(&mut state, Mode::Array);
    }

    fn enter(&self, state: &mut State, mode: Mode) {
        let (was, is) = (state.mode == Mode::Array, mode == Mode::Array);
        state.mode = mode;
        if was != is
            && let Err(error) = self.window.show(is)
        {
            // Still correct while hidden: reads of the array come here, too.
            warn_limited!(self.limit, %error, array = is, "flash: change the guest's view");
        }
    }

    fn command(&self, state: &mut State, command: u8) {
        let mode = match command {
            READ_ARRAY | READ_ARRAY_TOO => Mode::Array,
            READ_STATUS => Mode::Status,
            CLEAR_STATUS => {
                state.status = 0;
                Mode::Array
            }
            READ_IDENTIFIER => Mode::Identifier,
            PROGRAM | PROGRAM_TOO => Mode::Program,
            ERASE => Mode::Erase,
            WRITE_BUFFER => Mode::BufferCount,
            _ => {
                warn_limited!(self.limit, command, "flash: unknown command");
                Mode::Array
            }
        };
        self.enter(state, mode);
    }

    /// A write while a command waits for its arguments.
    fn argument(&self, state: &mut State, offset: u64, value: u8) {
        let mode = std::mem::replace(&mut state.mode, Mode::Status);
        match mode {
            Mode::Array | Mode::Status | Mode::Identifier => {
                state.mode = mode;
                self.command(state, value);
            }
            Mode::Program => self.store(state, offset, &[value], PROGRAM_FAILED),
            Mode::Erase if value == CONFIRM => {
                let block = offset & !(BLOCK_BYTES - 1);
                self.store(state, block, &[0xff; 4096], ERASE_FAILED);
            }
            Mode::Erase => state.status |= ERASE_FAILED,
            Mode::BufferCount => {
                state.mode = Mode::Buffer {
                    start: None,
                    data: Vec::new(),
                    left: usize::from(value) + 1,
                };
            }
            Mode::Buffer {
                start,
                mut data,
                left,
            } => {
                let start = start.unwrap_or(offset);
                data.push(value);
                state.mode = match left {
                    0 | 1 => Mode::BufferConfirm { start, data },
                    _ => Mode::Buffer {
                        start: Some(start),
                        data,
                        left: left - 1,
                    },
                };
            }
            Mode::BufferConfirm { start, data } if value == CONFIRM => {
                self.store(state, start, &data, PROGRAM_FAILED);
            }
            Mode::BufferConfirm { .. } => state.status |= PROGRAM_FAILED,
        }
    }

    /// Writes to the file, then to the array; `failure` is the status bit of one that could not be done.
    fn store(&self, state: &mut State, offset: u64, data: &[u8], failure: u8) {
        let end = offset.checked_add(data.len() as u64);
        if end.is_none_or(|end| end > self.array.len()) {
            state.status |= failure;
            return;
        }
        if let Err(error) = self.file.write_all_at(data, offset) {
            warn_limited!(self.limit, %error, "flash: write the variables' file");
            state.status |= failure;
            return;
        }
        state.status |= READY;
        let stored = self.array.write_slice(data, MemoryRegionAddress(offset));
        stored.expect("within the array, as checked");
    }

    /// Has the array show what the file has.
    fn read_file(&self) -> io::Result<()> {
        let mut bytes = vec![0; usize::try_from(self.array.len()).expect("it is mapped")];
        self.file.read_exact_at(&mut bytes, 0)?;
        let stored = self.array.write_slice(&bytes, MemoryRegionAddress(0));
        stored.map_err(io::Error::other)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl SavedState for State {
    const KIND: &'static str = "flash";
    const VERSION: u32 = 1;
}

impl DeviceState for Flash {
    fn save(&self) -> Saved {
        Saved::of(&*self.lock())
    }

    fn restore(&self, saved: &Saved) -> Result<(), StateError> {
        let saved: State = saved.open()?;
        let mut state = self.lock();
        // Another process may have written to it since it was opened here.
        self.read_file().map_err(|error| StateError::Differs {
            kind: State::KIND,
            what: format!("the variables' file: {error}"),
        })?;
        state.status = saved.status;
        self.enter(&mut state, saved.mode);
        Ok(())
    }
}

impl BusDevice for Flash {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let state = self.lock();
        match state.mode {
            Mode::Array => {
                data.fill(0xff);
                // An access over the end is cut short.
                let _ = self.array.read(data, MemoryRegionAddress(offset));
            }
            Mode::Identifier => {
                data.fill(0);
                if let Some(byte) = usize::try_from(offset & 0xff)
                    .ok()
                    .and_then(|at| IDENTIFIER.get(at))
                    && let Some(first) = data.first_mut()
                {
                    *first = *byte;
                }
            }
            _ => data.fill(state.status),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut state = self.lock();
        for (index, value) in data.iter().enumerate() {
            self.argument(&mut state, offset.wrapping_add(index as u64), *value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};
    use vm_memory::{GuestAddress, MmapRegion};

    struct View(Arc<AtomicBool>);

    impl FlashWindow for View {
        fn show(&self, array: bool) -> io::Result<()> {
            assert_ne!(self.0.swap(array, Ordering::SeqCst), array, "only changes");
            Ok(())
        }
    }

    fn flash() -> (Flash, Arc<AtomicBool>) {
        let region = MmapRegion::new(2 * 4096).unwrap();
        let array = Arc::new(GuestRegionMmap::new(region, GuestAddress(0)).unwrap());
        let file = tempfile::tempfile().unwrap();
        file.set_len(2 * 4096).unwrap();
        let shown = Arc::new(AtomicBool::new(true));
        (
            Flash::new(array, file, Box::new(View(shown.clone()))),
            shown,
        )
    }

    fn read(flash: &Flash, offset: u64) -> u8 {
        let mut data = [0];
        flash.read(offset, &mut data);
        data[0]
    }

    fn file_byte(flash: &Flash, offset: u64) -> u8 {
        let mut data = [0];
        flash.file.read_exact_at(&mut data, offset).unwrap();
        data[0]
    }

    fn program(flash: &Flash, offset: u64, data: &[u8]) {
        for (byte, offset) in data.iter().zip(offset..) {
            flash.write(offset, &[PROGRAM_TOO]);
            flash.write(offset, &[*byte]);
        }
    }

    /// OVMF tells flash from RAM and ROM by a byte that is neither a command nor a status.
    #[test]
    fn ovmf_detects_it() {
        let (flash, shown) = flash();
        program(&flash, 7, &[0x33]);
        assert_eq!(
            (read(&flash, 7), shown.load(Ordering::SeqCst)),
            (READY, false)
        );
        flash.write(7, &[READ_ARRAY]);
        flash.write(7, &[CLEAR_STATUS]);
        assert_eq!(
            (read(&flash, 7), shown.load(Ordering::SeqCst)),
            (0x33, true)
        );
        flash.write(7, &[READ_STATUS]);
        assert_eq!((read(&flash, 7), shown.load(Ordering::SeqCst)), (0, false));
        flash.write(7, &[READ_ARRAY]);
        assert_eq!(
            (read(&flash, 7), shown.load(Ordering::SeqCst)),
            (0x33, true)
        );
        flash.write(7, &[READ_IDENTIFIER]);
        assert_eq!((read(&flash, 0), read(&flash, 1)), (0x89, 0x18));
    }

    #[test]
    fn what_is_written_is_in_the_file_and_erased_by_blocks() {
        let (flash, _) = flash();
        program(&flash, 4094, b"abcd");
        flash.write(5000, &[ERASE]);
        flash.write(5000, &[CONFIRM]);
        flash.write(0, &[READ_ARRAY]);
        for (offset, expected) in [
            (4094, b'a'),
            (4095, b'b'),
            (4096, 0xff),
            (8191, 0xff),
            (0, 0),
        ] {
            assert_eq!(read(&flash, offset), expected, "{offset}");
            assert_eq!(file_byte(&flash, offset), expected, "{offset}");
        }
    }

    #[test]
    fn a_buffered_write_needs_its_confirmation() {
        let (flash, shown) = flash();
        let buffered = |end: u8| {
            flash.write(0x20, &[WRITE_BUFFER]);
            assert_eq!(read(&flash, 0x20) & PROGRAM_FAILED, 0);
            for (byte, offset) in [2, b'x', b'y', b'z', end]
                .into_iter()
                .zip([0x20, 0x20, 0x21, 0x22, 0x20])
            {
                flash.write(offset, &[byte]);
            }
            read(&flash, 0x20)
        };
        assert_eq!(buffered(READ_ARRAY) & PROGRAM_FAILED, PROGRAM_FAILED);
        assert_eq!(file_byte(&flash, 0x20), 0);
        flash.write(0, &[CLEAR_STATUS]);
        assert_eq!(buffered(CONFIRM), READY);
        assert_eq!([0x20, 0x21, 0x22].map(|at| file_byte(&flash, at)), *b"xyz");
        flash.reset();
        assert_eq!(
            (read(&flash, 0x22), shown.load(Ordering::SeqCst)),
            (b'z', true)
        );
    }

    #[test]
    fn mistakes_are_status_bits() {
        let (flash, _) = flash();
        program(&flash, 2 * 4096, &[1]);
        assert_eq!(read(&flash, 0), PROGRAM_FAILED);
        flash.write(0, &[CLEAR_STATUS]);
        flash.write(0, &[ERASE]);
        flash.write(0, &[READ_ARRAY]);
        assert_eq!(read(&flash, 0), ERASE_FAILED);
        flash.write(u64::MAX, &[ERASE]);
        flash.write(u64::MAX, &[CONFIRM]);
        let mut data = [0; 8];
        flash.write(0, &[READ_ARRAY]);
        flash.read(2 * 4096 - 2, &mut data);
        assert_eq!(data, [0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]);
        flash.read(u64::MAX, &mut data);
        flash.write(0, &[0x77; 8]);
    }
}

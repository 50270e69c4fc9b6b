// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The firmware configuration device: named items that firmware reads before it knows anything else (QEMU
//! `docs/specs/fw_cfg.rst`, the interface that OVMF is built for).
//!
//! ```text
//! port 0x510  selector, 16 bits       port 0x511  data, a byte at a time
//! port 0x514  address of a DMA request, high half; port 0x518 its low half, which starts it (both big-endian)
//! ```
//! Items are fixed when the machine is built, and read-only, but for files by which firmware answers: what it writes
//! there is told to whoever made the file. What items say is the VMM's business (`atoll-firmware` makes most of their
//! bytes).

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use crate::bus::BusDevice;
use crate::memory::{Memory, Ram};
use crate::rate_limited::{RateLimit, warn_limited};
use crate::state::{DeviceState, Saved, SavedState, StateError};

/// Items with a fixed number.
const SIGNATURE: u16 = 0x00;
const FEATURES: u16 = 0x01;
/// Machine's UUID, 16 bytes as in SMBIOS.
pub const UUID: u16 = 0x02;
/// Number of vCPUs at power-on, 16 bits.
pub const CPU_COUNT: u16 = 0x05;
/// Whether a boot menu is offered, 16 bits.
pub const BOOT_MENU: u16 = 0x0e;
/// Most vCPUs there can be, 16 bits.
pub const CPU_COUNT_MAX: u16 = 0x0f;
const DIRECTORY: u16 = 0x19;
/// Number of the first file.
const FILES: u16 = 0x20;
/// Bits of the features: the port interface, and DMA.
const FEATURE_PORTS: u32 = 1 << 0;
const FEATURE_DMA: u32 = 1 << 1;
/// Bytes of a file's name in the directory, its final zero included.
const NAME_BYTES: usize = 56;

/// Bits of a DMA request's control word; its upper half is a selector.
const DMA_ERROR: u32 = 1 << 0;
const DMA_READ: u32 = 1 << 1;
const DMA_SKIP: u32 = 1 << 2;
const DMA_SELECT: u32 = 1 << 3;
const DMA_WRITE: u32 = 1 << 4;
/// Bytes of a request: control, length, address.
const DMA_REQUEST_BYTES: usize = 16;
/// What the device answers where the address of a request is written.
const DMA_SIGNATURE: [u8; 8] = *b"QEMU CFG";
/// Longest request. A vCPU is busy for that long; no item is as large.
const DMA_BYTES_MAX: u32 = 64 << 20;
/// Unit in which zeroes are written after an item's end.
const CHUNK_BYTES: usize = 4096;

/// Is told the whole of a file that firmware has written to.
pub type Listener = Arc<dyn Fn(&[u8]) + Send + Sync>;

/// Items of a machine, by number or by name, as QEMU's `docs/specs/fw_cfg.rst` has them. Put together by the VMM before
/// the machine starts; they do not change afterwards.
#[derive(Default, Clone)]
pub struct FwCfgItems {
    numbered: BTreeMap<u16, Vec<u8>>,
    /// By name, in the order in which the directory shows them.
    files: BTreeMap<String, Vec<u8>>,
    /// Of those, which firmware writes.
    listeners: BTreeMap<String, Listener>,
}

impl FwCfgItems {
    /// Sets an item with a fixed number.
    pub fn set(&mut self, number: u16, bytes: impl Into<Vec<u8>>) {
        self.numbered.insert(number, bytes.into());
    }

    /// Adds a file, or replaces it. The name has at most 55 bytes.
    pub fn add(&mut self, name: &str, bytes: impl Into<Vec<u8>>) {
        assert!(
            name.len() < NAME_BYTES,
            "{name} is too long for the directory"
        );
        self.files.insert(name.to_owned(), bytes.into());
    }

    /// Adds a file of so many zeroes that firmware writes (by DMA only).
    pub fn add_written(&mut self, name: &str, size: usize, listener: Listener) {
        self.add(name, vec![0; size]);
        self.listeners.insert(name.to_owned(), listener);
    }

    /// Content of the file with that name in the directory; `None` where there is none.
    #[must_use]
    pub fn file(&self, name: &str) -> Option<&[u8]> {
        self.files.get(name).map(Vec::as_slice)
    }

    /// Who is told of writes, by the file's number.
    fn listeners(&self) -> BTreeMap<u16, Listener> {
        let files = self.files.keys().zip(FILES..);
        let listener = |(name, number): (&String, u16)| {
            let listener = self.listeners.get(name)?;
            Some((number, listener.clone()))
        };
        files.filter_map(listener).collect()
    }

    /// Everything by number, with signature, features and directory.
    fn table(self) -> BTreeMap<u16, Vec<u8>> {
        let mut table = self.numbered;
        table.insert(SIGNATURE, b"QEMU".to_vec());
        let features = FEATURE_PORTS | FEATURE_DMA;
        table.insert(FEATURES, features.to_le_bytes().to_vec());
        let count = u32::try_from(self.files.len()).expect("a handful of files");
        let mut directory = count.to_be_bytes().to_vec();
        for ((name, bytes), number) in self.files.into_iter().zip(FILES..) {
            let size = u32::try_from(bytes.len()).expect("files are small");
            directory.extend(size.to_be_bytes());
            directory.extend(number.to_be_bytes());
            directory.extend([0; 2]);
            let mut padded = name.into_bytes();
            padded.resize(NAME_BYTES, 0);
            directory.extend(padded);
            table.insert(number, bytes);
        }
        table.insert(DIRECTORY, directory);
        table
    }
}

/// The device: a selector and a data port, and DMA (`docs/specs/fw_cfg.rst`). Called by vCPUs; an access touches guest RAM
/// only where a DMA descriptor says so, and one that cannot be obeyed gets its error bit.
pub struct FwCfg {
    items: BTreeMap<u16, Vec<u8>>,
    listeners: BTreeMap<u16, Listener>,
    memory: Memory,
    /// What firmware has selected. Held during a DMA request, so that two vCPUs' requests do not mix; nothing
    /// else is locked while it is held, but what a listener locks.
    state: Mutex<State>,
    limit: RateLimit,
}

/// Also the saved form: items are made anew from the spec.
#[derive(Debug, Default, Clone, Serialize, Deserialize)]
struct State {
    selected: u16,
    offset: usize,
    dma_high: u32,
}

impl SavedState for State {
    const KIND: &'static str = "fw-cfg";
    const VERSION: u32 = 1;
}

impl DeviceState for FwCfg {
    fn save(&self) -> Saved {
        Saved::of(&*self.lock())
    }

    fn restore(&self, saved: &Saved) -> Result<(), StateError> {
        *self.lock() = saved.open()?;
        Ok(())
    }
}

/// A DMA request that points out of RAM, or asks for what there is not.
struct Refused;

impl FwCfg {
    /// First port, the selector's; data is at the port after it, the DMA address four ports on (QEMU
    /// `docs/specs/fw_cfg.rst`).
    pub const PORT: u16 = 0x510;
    /// Ports: from the selector to the end of the DMA address register.
    pub const SIZE: u16 = 12;

    /// A device with these items, whose DMA goes to `memory`.
    #[must_use]
    pub fn new(items: FwCfgItems, memory: Memory) -> Self {
        Self {
            listeners: items.listeners(),
            items: items.table(),
            memory,
            state: Mutex::default(),
            limit: RateLimit::new(),
        }
    }

    /// Puts the device back to power-on: nothing is selected; items stay. Called by the machine's owner while vCPUs
    /// are held.
    pub fn reset(&self) {
        *self.lock() = State::default();
    }

    /// The next bytes of the selected item; zeroes after its end.
    fn next(&self, state: &mut State, data: &mut [u8]) {
        let item = self
            .items
            .get(&state.selected)
            .map_or(&[][..], Vec::as_slice);
        for byte in data {
            *byte = item.get(state.offset).copied().unwrap_or(0);
            state.offset = state.offset.saturating_add(1);
        }
    }

    fn dma(&self, state: &mut State, address: u64) {
        let memory = self.memory.memory();
        let mut request = [0; DMA_REQUEST_BYTES];
        if memory
            .read_slice(&mut request, GuestAddress(address))
            .is_err()
        {
            warn_limited!(self.limit, address, "fw_cfg: request outside of RAM");
            return;
        }
        let word = |at: usize| u32::from_be_bytes([0, 1, 2, 3].map(|byte| request[at + byte]));
        let (control, length) = (word(0), word(4));
        let target = u64::from(word(8)) << 32 | u64::from(word(12));
        let result = match self.transfer(state, &memory, control, (target, length)) {
            Ok(()) => 0,
            Err(Refused) => {
                warn_limited!(self.limit, control, length, target, "fw_cfg: bad request");
                DMA_ERROR
            }
        };
        // The request was readable; that it cannot be written is the guest's loss.
        let _ = memory.write_slice(&result.to_be_bytes(), GuestAddress(address));
    }

    fn transfer(
        &self,
        state: &mut State,
        memory: &Ram,
        control: u32,
        (target, length): (u64, u32),
    ) -> Result<(), Refused> {
        if control & DMA_SELECT != 0 {
            state.selected = u16::try_from(control >> 16).expect("upper half");
            state.offset = 0;
        }
        if length > DMA_BYTES_MAX {
            return Err(Refused);
        }
        let mut left = usize::try_from(length).expect("at least 32 bits");
        if control & DMA_WRITE != 0 {
            return self.take(state, memory, (target, left));
        }
        if control & DMA_READ != 0 {
            let mut chunk = [0; CHUNK_BYTES];
            let mut target = target;
            while left > 0 {
                let part = &mut chunk[..left.min(CHUNK_BYTES)];
                self.next(state, part);
                memory
                    .write_slice(part, GuestAddress(target))
                    .map_err(|_| Refused)?;
                left -= part.len();
                target = target.checked_add(part.len() as u64).ok_or(Refused)?;
            }
        } else if control & DMA_SKIP != 0 {
            state.offset = state.offset.saturating_add(left);
        }
        Ok(())
    }

    /// Takes what firmware writes to a file, at the place that it has skipped to.
    fn take(
        &self,
        state: &mut State,
        memory: &Ram,
        (source, length): (u64, usize),
    ) -> Result<(), Refused> {
        let listener = self.listeners.get(&state.selected).ok_or(Refused)?;
        let mut file = self.items.get(&state.selected).cloned().ok_or(Refused)?;
        let end = state.offset.checked_add(length).ok_or(Refused)?;
        let place = file.get_mut(state.offset..end).ok_or(Refused)?;
        memory
            .read_slice(place, GuestAddress(source))
            .map_err(|_| Refused)?;
        state.offset = end;
        listener(&file);
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BusDevice for FwCfg {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match offset {
            // A string instruction reads many bytes at once.
            1 => self.next(&mut self.lock(), data),
            4..12 => {
                let from = usize::try_from(offset - 4).expect("below eight");
                for (index, byte) in data.iter_mut().enumerate() {
                    *byte = DMA_SIGNATURE.get(from + index).copied().unwrap_or(0);
                }
            }
            _ => data.fill(0),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut state = self.lock();
        match (offset, data) {
            (0, &[low, high]) => {
                state.selected = u16::from_le_bytes([low, high]);
                state.offset = 0;
            }
            (4, &[a, b, c, d]) => state.dma_high = u32::from_be_bytes([a, b, c, d]),
            (8, &[a, b, c, d]) => {
                let low = u32::from_be_bytes([a, b, c, d]);
                let address = u64::from(state.dma_high) << 32 | u64::from(low);
                state.dma_high = 0;
                self.dma(&mut state, address);
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device() -> FwCfg {
        let mut items = FwCfgItems::default();
        items.set(CPU_COUNT, 3_u16.to_le_bytes());
        items.add("etc/e820", [7; 20]);
        items.add("bootorder", *b"/pci\n\0");
        let ram = Ram::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap();
        FwCfg::new(items, Memory::new(ram))
    }

    fn by_port(device: &FwCfg, item: u16, size: usize) -> Vec<u8> {
        device.write(0, &item.to_le_bytes());
        let mut data = vec![0; size];
        for byte in data.chunks_mut(1) {
            device.read(1, byte);
        }
        data
    }

    /// Sends a request that stands at 0x100, and gives the control word it left.
    fn by_dma(device: &FwCfg, control: u32, length: u32, target: u64) -> u32 {
        let memory = device.memory.memory();
        let mut request = control.to_be_bytes().to_vec();
        request.extend(length.to_be_bytes());
        request.extend(target.to_be_bytes());
        memory.write_slice(&request, GuestAddress(0x100)).unwrap();
        device.write(4, &[0; 4]);
        device.write(8, &0x100_u32.to_be_bytes());
        let mut left = [0; 4];
        memory.read_slice(&mut left, GuestAddress(0x100)).unwrap();
        u32::from_be_bytes(left)
    }

    #[test]
    fn firmware_finds_files_by_the_directory() {
        let device = device();
        assert_eq!(by_port(&device, 0, 4), b"QEMU");
        assert_eq!(by_port(&device, 1, 4), [3, 0, 0, 0]);
        assert_eq!(by_port(&device, CPU_COUNT, 4), [3, 0, 0, 0]);
        let directory = by_port(&device, DIRECTORY, 4 + 2 * 64);
        assert_eq!(directory[..4], [0, 0, 0, 2]);
        assert_eq!(directory[4..22], *b"\0\0\0\x06\0\x20\0\0bootorder\0");
        assert_eq!(directory[68..84], *b"\0\0\0\x14\0\x21\0\0etc/e820");
        assert_eq!(by_port(&device, 0x20, 7), b"/pci\n\0\0");
    }

    #[test]
    fn dma_selects_skips_and_reads() {
        let device = device();
        let mut signature = [0; 8];
        device.read(4, &mut signature);
        assert_eq!(&signature, b"QEMU CFG");
        assert_eq!(by_dma(&device, 0x20_0000 | DMA_SELECT | DMA_SKIP, 1, 0), 0);
        assert_eq!(by_dma(&device, DMA_READ, 5, 0x2000), 0);
        let mut data = [9; 6];
        let memory = device.memory.memory();
        memory.read_slice(&mut data, GuestAddress(0x2000)).unwrap();
        assert_eq!(&data, b"pci\n\0\0");
    }

    #[test]
    fn what_firmware_writes_is_told_and_nothing_else_can_be_written() {
        let told = Arc::new(Mutex::new(Vec::new()));
        let mut items = FwCfgItems::default();
        items.add("a", [7; 4]);
        let all = told.clone();
        let listener = move |bytes: &[u8]| all.lock().unwrap().push(bytes.to_vec());
        items.add_written("b", 8, Arc::new(listener));
        let ram = Ram::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap();
        let device = FwCfg::new(items, Memory::new(ram));
        let memory = device.memory.memory();
        memory
            .write_slice(&[1, 2, 3, 4], GuestAddress(0x200))
            .unwrap();
        let select = 0x21_0000 | DMA_SELECT;
        assert_eq!(by_dma(&device, select | DMA_SKIP, 2, 0), 0);
        assert_eq!(by_dma(&device, DMA_WRITE, 4, 0x200), 0);
        assert_eq!(told.lock().unwrap()[..], [[0, 0, 1, 2, 3, 4, 0, 0]]);
        for (control, length, source) in [
            (DMA_WRITE, 3, 0x200),
            (select | DMA_WRITE, 9, 0x200),
            (select | DMA_WRITE, 8, 0xfffc),
            (select | DMA_WRITE, u32::MAX, 0x200),
            (0x20_0000 | DMA_SELECT | DMA_WRITE, 1, 0x200),
            (0x77_0000 | DMA_SELECT | DMA_WRITE, 0, 0x200),
        ] {
            assert_eq!(by_dma(&device, control, length, source), DMA_ERROR);
        }
        assert_eq!(told.lock().unwrap().len(), 1);
    }

    #[test]
    fn what_cannot_be_done_is_an_error_in_the_request() {
        let device = device();
        let select = 0x20_0000 | DMA_SELECT;
        for (control, length, target) in [
            (select | DMA_READ, 6, 0xffff),
            (select | DMA_READ, 6, u64::MAX - 2),
            (select | DMA_READ, u32::MAX, 0),
            (select | DMA_WRITE, 1, 0x2000),
        ] {
            assert_eq!(by_dma(&device, control, length, target), DMA_ERROR);
        }
        // A request outside of RAM has nobody to tell.
        device.write(4, &[0xff; 4]);
        device.write(8, &[0xff; 4]);
        device.write(0, &[1]);
        device.write(11, &[1; 4]);
        assert_eq!(by_port(&device, 0xbfff, 2), [0, 0]);
    }
}

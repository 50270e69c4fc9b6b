// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Any bytes as a guest's accesses to what is not virtio: fw_cfg with its DMA and the pointer to the generation id,
//! flash, ACPI registers, clock, serial port, reset ports, panic device, watchdog.
//!
//! Byte 0 chooses the device. Then each access is [`ACCESS_BYTES`]: what to do (bit 0 writes, bit 1 saves and restores
//! first, bits 2 to 4 the size, bits 5 to 7 higher bits of the offset), the offset, eight bytes of data.

use std::io;
use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryRegion, GuestRegionMmap};
use vm_memory::{MemoryRegionAddress, MmapRegion};

use crate::bus::BusDevice;
use crate::console::{Console, ConsoleBackend};
use crate::memory::{Memory, Ram};
use crate::pci::{ConfigSpace, PciDevice};
use crate::platform::{
    AcpiPm, DebugPort, Flash, FlashWindow, FwCfg, FwCfgItems, GenerationId, KeyboardReset,
    PanicDevice, Rtc, Serial, SystemControl, Watchdog,
};
use crate::state::DeviceState;
use crate::testing::{ControlLog, Line};

/// Kinds of device.
pub(super) const KINDS: u8 = 9;
const ACCESS_BYTES: usize = 10;
/// Accesses of one input.
const ACCESSES_MAX: usize = 2000;
const RAM_BYTES: usize = 0x8000;
const FLASH_BYTES: usize = 2 * 4096;
/// A file of fw_cfg, and what it holds.
const FILE: [u8; 100] = [0x5a; 100];
/// How far behind the start of its page the generation id is.
const GENERATION_OFFSET: u64 = 40;
/// Where a BAR of [`OfPci`] begins; below it is configuration space.
const BAR: u64 = 0x100;

/// A device of the board.
pub(super) trait Part: BusDevice + DeviceState {
    /// What must hold after every access.
    fn check(&self) {}
}

impl Part for AcpiPm {}
impl Part for DebugPort {}
impl Part for KeyboardReset {}
impl Part for Rtc {}
impl Part for Serial {}
impl Part for SystemControl {}

/// fw_cfg, the memory that its DMA goes to, and the generation id that is there where firmware says.
struct WithMemory(FwCfg, Memory, Arc<GenerationId>);

impl WithMemory {
    fn new() -> Self {
        let ram = Ram::from_ranges(&[(GuestAddress(0), RAM_BYTES)]).unwrap();
        let memory = Memory::new(ram);
        let event = Arc::new(Line::default());
        let generation = Arc::new(GenerationId::new([0; 16], memory.clone(), event));
        let mut items = FwCfgItems::default();
        items.add("file", FILE);
        let pointer = GenerationId::pointer(&generation, GENERATION_OFFSET);
        items.add_written("generation", 8, pointer);
        Self(FwCfg::new(items, memory.clone()), memory, generation)
    }
}

impl BusDevice for WithMemory {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.0.read(offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        // The request stands where it points to, made of the same bytes: control, and two each of length and address.
        let mut given = [0; 8];
        given
            .iter_mut()
            .zip(data.iter().cycle())
            .for_each(|(to, from)| *to = *from);
        let [a, b, c, d, e, f, g, h] = given;
        let mut request = vec![a, b, c, d];
        request.extend(i32::from(i16::from_be_bytes([e, f])).to_be_bytes());
        request.extend(i64::from(i16::from_be_bytes([g, h])).to_be_bytes());
        let at = GuestAddress(offset << 4 & 0x7ff0);
        self.1.memory().write_slice(&request, at).unwrap();
        self.0.write(offset & 0xf, data);
    }
}

impl DeviceState for WithMemory {
    fn save(&self) -> crate::state::Saved {
        self.0.save()
    }

    fn restore(&self, saved: &crate::state::Saved) -> Result<(), crate::state::StateError> {
        self.0.restore(saved)
    }
}

impl Part for WithMemory {
    /// Items are read-only, whatever the guest did; and another generation is written where it said, or nowhere.
    fn check(&self) {
        let mut next = self.2.value();
        next[0] = next[0].wrapping_add(1);
        self.2.renew(next.as_slice().try_into().unwrap());
        let place = self.2.save().state["address"].as_u64();
        let mut seen = [0; 16];
        let memory = self.1.memory();
        if place.is_some_and(|at| memory.read_slice(&mut seen, GuestAddress(at)).is_ok()) {
            assert_eq!(seen[..], next);
        }
        let before = self.0.save();
        self.0.write(0, &0x20_u16.to_le_bytes());
        let mut file = [0; FILE.len() + 1];
        self.0.read(1, &mut file);
        assert!(file[..FILE.len()] == FILE && file[FILE.len()] == 0);
        self.0.restore(&before).unwrap();
    }
}

struct Window;

impl FlashWindow for Window {
    fn show(&self, _array: bool) -> io::Result<()> {
        Ok(())
    }
}

/// A flash, its array and its file.
struct WithArray(Flash, Arc<GuestRegionMmap>, std::fs::File);

impl BusDevice for WithArray {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.0.read(offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.0.write(offset, data);
    }
}

impl DeviceState for WithArray {
    fn save(&self) -> crate::state::Saved {
        self.0.save()
    }

    fn restore(&self, saved: &crate::state::Saved) -> Result<(), crate::state::StateError> {
        self.0.restore(saved)
    }
}

impl Part for WithArray {
    /// What the guest sees is what is kept.
    fn check(&self) {
        use std::os::unix::fs::FileExt;
        let (mut seen, mut kept) = ([0; FLASH_BYTES], [0; FLASH_BYTES]);
        self.1
            .read_slice(&mut seen, MemoryRegionAddress(0))
            .unwrap();
        self.2.read_exact_at(&mut kept, 0).unwrap();
        assert!(seen == kept && self.2.metadata().unwrap().len() == self.1.len());
    }
}

/// A PCI function without its bus: configuration space, then BAR 0.
struct OfPci<D> {
    device: D,
    config: std::sync::Mutex<ConfigSpace>,
}

impl<D: PciDevice> OfPci<D> {
    fn new(device: D) -> Self {
        let config = std::sync::Mutex::new(device.config_space());
        Self { device, config }
    }
}

impl<D: PciDevice> BusDevice for OfPci<D> {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match u16::try_from(offset) {
            Ok(offset) if u64::from(offset) + data.len() as u64 <= BAR => {
                let mut config = self.config.lock().unwrap();
                self.device
                    .before_config_read(&mut config, offset, data.len());
                config.read(offset, data);
            }
            _ => self.device.bar_read(0, offset.saturating_sub(BAR), data),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match u16::try_from(offset) {
            Ok(offset) if u64::from(offset) + data.len() as u64 <= BAR => {
                let mut config = self.config.lock().unwrap();
                config.write(offset, data);
                self.device
                    .after_config_write(&mut config, offset, data.len());
            }
            _ => self.device.bar_write(0, offset.saturating_sub(BAR), data),
        }
    }
}

impl<D: PciDevice + DeviceState> DeviceState for OfPci<D> {
    fn save(&self) -> crate::state::Saved {
        self.device.save()
    }

    fn restore(&self, saved: &crate::state::Saved) -> Result<(), crate::state::StateError> {
        self.device.restore(saved)
    }
}

impl<D: PciDevice + DeviceState> Part for OfPci<D> {}

/// A scratch file in memory.
pub(super) fn scratch(name: &str, size_bytes: u64) -> std::fs::File {
    let flags = rustix::fs::MemfdFlags::CLOEXEC;
    let file = std::fs::File::from(rustix::fs::memfd_create(name, flags).expect("a memfd"));
    file.set_len(size_bytes).expect("memory for it");
    file
}

pub(super) fn part(kind: u8) -> Arc<dyn Part> {
    let control = Arc::new(ControlLog::default());
    match kind {
        0 => Arc::new(WithMemory::new()),
        1 => {
            let region = MmapRegion::new(FLASH_BYTES).unwrap();
            let array = Arc::new(GuestRegionMmap::new(region, GuestAddress(0)).unwrap());
            let file = scratch("flash", FLASH_BYTES as u64);
            let flash = Flash::new(array.clone(), file.try_clone().unwrap(), Box::new(Window));
            Arc::new(WithArray(flash, array, file))
        }
        2 => AcpiPm::new(control, Arc::new(Line::default())),
        3 => {
            let clock = Rtc::new(3 << 30, 1 << 30, Arc::new(Line::default())).unwrap();
            clock.resume();
            Arc::new(clock)
        }
        4 => {
            let console = Console::open(&ConsoleBackend::Null).unwrap();
            Serial::new(console.port(), Arc::new(Line::default()))
        }
        5 => Arc::new(SystemControl::new(control)),
        6 => Arc::new(KeyboardReset(control)),
        7 => Arc::new(OfPci::new(PanicDevice::new(Box::new(|_| {})))),
        _ => Arc::new(OfPci::new(Watchdog::new(Box::new(|| {})).unwrap())),
    }
}

/// Makes the accesses. What a device saves at any moment goes back into it.
pub fn platform(input: &[u8]) {
    let Some((&kind, rest)) = input.split_first() else {
        return;
    };
    let part = part(kind % KINDS);
    for bytes in rest.chunks_exact(ACCESS_BYTES).take(ACCESSES_MAX) {
        let what = bytes[0];
        let offset = u64::from(bytes[1]) | u64::from(what >> 5) << 10;
        let size = [1, 2, 4, 8, 3, 5, 0, 4][usize::from(what >> 2 & 7)];
        if what & 2 != 0 {
            part.restore(&part.save()).expect("its own state");
        }
        if what & 1 != 0 {
            part.write(offset, &bytes[2..][..size]);
        } else {
            part.read(offset, &mut [0xa5; 8][..size]);
        }
        part.check();
    }
}

/// Accesses that get far with each device.
pub fn platform_corpus() -> Vec<Vec<u8>> {
    let access = |what: u8, offset: u8, data: [u8; 8]| {
        let mut bytes = vec![what, offset];
        bytes.extend(data);
        bytes
    };
    let (byte, word, long) = (1, 1 | 1 << 2, 1 | 2 << 2);
    let number = |value: u32| {
        let mut data = [0; 8];
        data[..4].copy_from_slice(&value.to_be_bytes());
        data
    };
    let mut all = vec![Vec::new()];
    // A request of firmware's at 0x2f0: control, then length and address.
    let dma = |control: u32, rest: [u8; 4]| {
        let mut request = number(control);
        request[4..].copy_from_slice(&rest);
        [
            access(1 | 3 << 2, 0x2f, request),
            access(long, 4, [0; 8]),
            access(long, 8, number(0x2f0)),
            access(0, 1, [0; 8]),
        ]
        .concat()
    };
    for control in [0, 2, 4, 8, 0x10, 0x20_000a, 0x20_000c] {
        for rest in [[0, 64, 0x10, 0], [0, 64, 0x7f, 0xf0], [0xff, 0xff, 0, 0]] {
            all.push([vec![0], dma(control, rest)].concat());
        }
    }
    // Pointers to the generation id's page, written to file 0x21 from 0x500: in RAM, over its end, over every end.
    for pointer in [0x1000_u64, 0x7fd1, 0xffff_ffff, u64::MAX] {
        let bytes = access(1 | 3 << 2, 0x50, pointer.to_le_bytes());
        let written = dma(0x21_0018, [0, 8, 5, 0]);
        all.push([vec![0], bytes, written].concat());
    }
    for commands in [
        &[0x40, 0x12, 0xff][..],
        &[0x20, 0xd0, 0x70, 0x50],
        &[0xe8, 1, 7, 8, 0xd0, 0xff],
        &[0x90, 0x00, 0x99],
        &[0x90],
    ] {
        let steps = commands.iter().flat_map(|command| {
            let mut data = [0; 8];
            data[0] = *command;
            access(byte, 9, data)
        });
        let mut input: Vec<u8> = std::iter::once(1).chain(steps).collect();
        // Found by the fuzzer: a read of no bytes, of the identifier.
        input.extend(access(6 << 2, 0, [0; 8]));
        all.push(input);
    }
    for kind in 2..KINDS {
        let steps = (0..=255_u8).step_by(2).flat_map(|offset| {
            [
                access(byte, offset, [0xff; 8]),
                access(word | 2, offset, [0x86; 8]),
                access(long, offset, [1; 8]),
                access(2 << 2, offset, [0; 8]),
            ]
            .concat()
        });
        all.push(std::iter::once(kind).chain(steps).collect());
    }
    all
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Any bytes as a guest's accesses to the PCI bus. Each access is six bytes: way and size, two of offset, and what is
//! written; see [`Access`].

use std::sync::Arc;

use vm_memory::GuestAddress;

use crate::bus::BusDevice;
use crate::memory::{Memory, Ram};
use crate::pci::{ConfigPorts, Ecam, PciBus, PciWindow, Window};
use crate::testing::{ControlLog, CountingSink, NoDoorbells};
use crate::virtio::rng::Rng;
use crate::virtio::{VirtioPci, VirtioPciOptions};

const WINDOW: Window = Window {
    base: 0xc000_0000,
    size: 0x8_0000,
};
const ACCESS_BYTES: usize = 7;
/// Accesses of one input.
const ACCESSES_MAX: usize = 4000;
/// Register of the PCI header, and its bit that makes BARs answer.
const COMMAND: u64 = 4;
const MEMORY_SPACE: u8 = 2;
/// A virtio function's BAR, and where the first doorbell is in it (`virtio/pci.rs`).
const BAR_BYTES: u64 = 0x2_0000;
const DOORBELLS: u64 = 0x3000;
/// Functions, in slots 1 and up.
const FUNCTIONS: usize = 2;

/// One access: byte 0 says by which way (bits 0 and 1), whether it writes (bit 2), how many bytes (bits 3 to 5) and how
/// far the offset is shifted to reach all of a slot or of the window (bits 6 and 7); then offset and data.
struct Access<'a> {
    way: u8,
    writes: bool,
    size: usize,
    offset: u64,
    data: &'a [u8],
}

impl<'a> Access<'a> {
    fn of(bytes: &'a [u8]) -> Self {
        let offset = u64::from(u16::from_le_bytes([bytes[1], bytes[2]]));
        Self {
            way: bytes[0] & 3,
            writes: bytes[0] & 4 != 0,
            size: [1, 2, 4, 8, 3, 5, 0, 4][usize::from(bytes[0] >> 3 & 7)],
            offset: offset << (bytes[0] >> 6),
            data: &bytes[3..],
        }
    }
}

/// Makes the accesses on a bus with two functions. Afterwards a reset of the machine must bring back what the guest saw
/// first, whatever it did.
pub fn pci(input: &[u8]) {
    let doorbells = Arc::new(NoDoorbells::default());
    let bus = PciBus::new(vec![WINDOW], doorbells.clone());
    let functions = add_functions(&bus);
    let ports = ConfigPorts::new(bus.clone(), Arc::new(ControlLog::default()));
    let ecam = Ecam(bus.clone());
    let window = PciWindow::new(bus.clone(), WINDOW.base);
    let before = image(&ecam);
    for bytes in input.chunks_exact(ACCESS_BYTES).take(ACCESSES_MAX) {
        let access = Access::of(bytes);
        let device: &dyn BusDevice = match access.way {
            0 => &ports,
            1 => &ecam,
            _ => &window,
        };
        let mut data = [0xa5; 8];
        let size = access.size.min(data.len());
        if access.writes {
            let given = access.data.iter().cycle();
            data.iter_mut()
                .zip(given)
                .for_each(|(to, from)| *to = *from);
            device.write(access.offset, &data[..size]);
        } else {
            device.read(access.offset, &mut data[..size]);
            assert!(data[size..].iter().all(|byte| *byte == 0xa5));
        }
        for address in doorbells.connected() {
            assert!((WINDOW.base..WINDOW.base + WINDOW.size).contains(&address));
        }
    }
    functions.iter().for_each(|function| function.reset());
    bus.reset();
    assert_eq!(image(&ecam), before, "a reset leaves nothing of the guest");
    for slot in 1..=FUNCTIONS as u64 {
        ecam.write((slot << 15) + COMMAND, &[MEMORY_SPACE, 0]);
    }
    let first: Vec<u64> = (0..FUNCTIONS as u64)
        .map(|function| WINDOW.base + function * BAR_BYTES + DOORBELLS)
        .collect();
    assert_eq!(
        doorbells.connected(),
        first,
        "BARs are back at their places"
    );
}

fn add_functions(bus: &Arc<PciBus>) -> Vec<Arc<VirtioPci>> {
    let mut next = WINDOW.base;
    (1..=FUNCTIONS)
        .map(|slot| {
            let ram = Ram::from_ranges(&[(GuestAddress(0), 4096)]).unwrap();
            let options = VirtioPciOptions {
                name: format!("rng{slot}"),
                memory: Memory::new(ram),
                msix: Arc::new(CountingSink::new(2)),
            };
            let function = Arc::new(VirtioPci::new(Arc::new(Rng::new()), options).unwrap());
            next = bus.add(slot, function.clone(), next).unwrap();
            function
        })
        .collect()
}

/// Configuration spaces of the host bridge and all functions, and of the slot behind them.
fn image(ecam: &Ecam) -> Vec<u8> {
    let mut image = Vec::new();
    for slot in 0..=FUNCTIONS as u64 + 1 {
        for register in (0..256).step_by(4) {
            let mut data = [0; 4];
            ecam.read((slot << 15) + register, &mut data);
            image.extend(data);
        }
    }
    image
}

/// Inputs that reach far: enabling and moving BARs, both status machines, the window of configuration space.
pub fn pci_corpus() -> Vec<Vec<u8>> {
    let ecam = |slot: u16, register: u16, data: u32| {
        // Shifted by 3: offsets count in 8 bytes, enough for registers that are a multiple of 8.
        let offset = (slot << 12) + register / 8;
        let mut bytes = vec![0b1101_0101];
        bytes.extend(offset.to_le_bytes());
        bytes.extend(data.to_le_bytes());
        bytes
    };
    let bar = |offset: u16, size: u8, data: u32| {
        let mut bytes = vec![0b0000_0110 | size << 3];
        bytes.extend(offset.to_le_bytes());
        bytes.extend(data.to_le_bytes());
        bytes
    };
    let port = |offset: u16, data: u32| {
        let mut bytes = vec![0b0001_0100];
        bytes.extend(offset.to_le_bytes());
        bytes.extend(data.to_le_bytes());
        bytes
    };
    let enable = |slot: u32| [port(0, 1 << 31 | slot << 11 | 4), port(4, 6)].concat();
    let place = |slot: u32, at: u32| [port(0, 1 << 31 | slot << 11 | 0x10), port(4, at)].concat();
    let base = u32::try_from(WINDOW.base).expect("below 4 GiB");
    let statuses: Vec<u8> = [1_u32, 3, 11, 15, 0]
        .iter()
        .flat_map(|status| bar(0x14, 0, *status))
        .collect();
    let queue: Vec<u8> = [
        (0x16, 1, 0),
        (0x18, 1, 8),
        (0x20, 2, 0),
        (0x28, 2, 0x200),
        (0x30, 2, 0x400),
        (0x1c, 1, 1),
    ]
    .iter()
    .flat_map(|(offset, size, data)| bar(*offset, *size, *data))
    .collect();
    vec![
        Vec::new(),
        [enable(1), enable(2), statuses.clone()].concat(),
        [
            enable(1),
            place(1, base + 0x2_0000),
            enable(2),
            place(2, base),
        ]
        .concat(),
        [
            enable(1),
            place(1, u32::MAX),
            place(1, 0),
            place(1, base + 0x7_0000),
        ]
        .concat(),
        [
            enable(1),
            bar(0x14, 0, 1),
            bar(0x14, 0, 3),
            queue,
            bar(0x14, 0, 15),
            bar(0x3000, 1, 0),
        ]
        .concat(),
        [
            ecam(1, 0, 0),
            ecam(2, 8, u32::MAX),
            ecam(3, 0x40, 7),
            enable(2),
        ]
        .concat(),
        (0..64)
            .flat_map(|at| [port(0, 1 << 31 | 1 << 11 | at * 4), port(4, u32::MAX)].concat())
            .collect(),
    ]
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Any bytes as a guest's accesses to the PCI bus. Each access is six bytes: way and size, two of offset, and what is
//! written; see [`Access`].

use std::sync::Arc;

use vm_memory::GuestAddress;

use crate::bus::BusDevice;
use crate::memory::{Memory, Ram};
use crate::pci::{ConfigPorts, Ecam, PciBus, PciWindow, Window};
use crate::platform::q35::{self, LPC_SLOT, LpcBridge};
use crate::testing::{ControlLog, CountingSink, NoDoorbells};
use crate::virtio::rng::Rng;
use crate::virtio::{VirtioPci, VirtioPciOptions};

const WINDOW: Window = Window {
    base: 0xc000_0000,
    size: 0x8_0000,
};
/// Where the LPC bridge says that its PM ports are.
const PM_BASE: u16 = 0x600;
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

/// Makes the accesses on a bus with the board's two bridges and two functions. Which functions they are must never
/// change, nor where the LPC bridge's ports are; and a reset of the machine must bring back what the guest saw first,
/// whatever it did.
pub fn pci(input: &[u8]) {
    let doorbells = Arc::new(NoDoorbells::default());
    let bus = PciBus::with_host_bridge(q35::host_bridge(), vec![WINDOW], doorbells.clone());
    let functions = add_functions(&bus);
    let lpc = Arc::new(LpcBridge { pm_base: PM_BASE });
    bus.add(LPC_SLOT, lpc, WINDOW.base).unwrap();
    let ports = ConfigPorts::new(bus.clone(), Arc::new(ControlLog::default()));
    let ecam = Ecam(bus.clone());
    let window = PciWindow::new(bus.clone(), WINDOW.base);
    let (before, fixed_before) = (image(&ecam), fixed(&ecam));
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
    assert_eq!(fixed(&ecam), fixed_before);
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

/// Slots of the bridges and all functions, and the slot behind them.
fn slots() -> impl Iterator<Item = u64> {
    (0..=FUNCTIONS as u64 + 1).chain([LPC_SLOT as u64])
}

fn read(ecam: &Ecam, slot: u64, register: u64) -> [u8; 4] {
    let mut data = [0; 4];
    ecam.read((slot << 15) + register, &mut data);
    data
}

/// Configuration spaces of [`slots`].
fn image(ecam: &Ecam) -> Vec<[u8; 4]> {
    let whole = |slot| (0..256).step_by(4).map(move |register| (slot, register));
    let registers = slots().flat_map(whole);
    registers.map(|(slot, at)| read(ecam, slot, at)).collect()
}

/// What no write changes: identities and classes of [`slots`], and where the LPC bridge's ports are (ICH9 datasheet
/// §13.1.13, §13.1.14).
fn fixed(ecam: &Ecam) -> Vec<[u8; 4]> {
    let registers = slots().flat_map(|slot| [(slot, 0), (slot, 8)]);
    let ports = [0x40, 0x44].map(|register| (LPC_SLOT as u64, register));
    let registers = registers.chain(ports);
    registers.map(|(slot, at)| read(ecam, slot, at)).collect()
}

/// An access as input; `size` is the index of [`Access::of`]'s list.
fn access(way: u8, size: u8, shift: u8, offset: u16, data: u32) -> Vec<u8> {
    let mut bytes = vec![way | 4 | size << 3 | shift << 6];
    bytes.extend(offset.to_le_bytes());
    bytes.extend(data.to_le_bytes());
    bytes
}

/// A configuration write of four bytes by the ports.
fn configure(slot: u32, register: u32, data: u32) -> Vec<u8> {
    let address = 1 << 31 | slot << 11 | register;
    [access(0, 2, 0, 0, address), access(0, 2, 0, 4, data)].concat()
}

/// Inputs that reach far: enabling and moving BARs, the status machine, a queue that starts.
pub fn pci_corpus() -> Vec<Vec<u8>> {
    let common = |offset: u16, size: u8, data: u32| access(2, size, 0, offset, data);
    let enable = |slot: u32| configure(slot, 4, 6);
    let place = |slot: u32, at: u32| configure(slot, 0x10, at);
    let base = u32::try_from(WINDOW.base).expect("below 4 GiB");
    let statuses: Vec<u8> = [1, 3, 11, 15, 0]
        .into_iter()
        .flat_map(|status| common(0x14, 0, status))
        .collect();
    let queue = [
        (0x14, 0, 1),
        (0x14, 0, 3),
        (0x08, 2, 1),
        (0x0c, 2, 1),
        (0x14, 0, 11),
        (0x16, 1, 0),
        (0x18, 1, 8),
        (0x20, 2, 0),
        (0x28, 2, 0x200),
        (0x30, 2, 0x400),
        (0x1c, 1, 1),
        (0x14, 0, 15),
        (0x3000, 1, 0),
    ];
    let queue = queue
        .into_iter()
        .flat_map(|(at, size, data)| common(at, size, data));
    let everything = |slot, data| (0..64).flat_map(move |index| configure(slot, 4 * index, data));
    let lpc = u32::try_from(LPC_SLOT).expect("five bits");
    // ECAM offsets are shifted by three: of registers that are multiples of eight.
    let ecam = |slot: u16, register: u16| access(1, 2, 3, (slot << 12) + register / 8, u32::MAX);
    vec![
        Vec::new(),
        [enable(1), enable(2), statuses].concat(),
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
            place(1, base + 0x6_0000),
        ]
        .concat(),
        enable(1).into_iter().chain(queue).collect(),
        [ecam(1, 0), ecam(2, 8), ecam(3, 0x40), enable(2)].concat(),
        everything(1, u32::MAX).collect(),
        // What firmware programs, and everything else: on, then off.
        everything(0, u32::MAX).chain(everything(0, 0)).collect(),
        everything(lpc, u32::MAX)
            .chain(everything(lpc, 0))
            .collect(),
        // Found by the fuzzer: a read of the ISR byte that is of no bytes.
        [enable(1), vec![2 | 6 << 3, 0, 0x10, 0, 0, 0, 0]].concat(),
    ]
}

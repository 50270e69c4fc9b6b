// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The bus itself: both configuration mechanisms, and BARs of two functions that come into each other's way.

use std::sync::Arc;

use atoll_devices::bus::BusDevice;
use atoll_devices::memory::{Memory, Ram};
use atoll_devices::pci::{ConfigPorts, Ecam, PciBus, PciBusError, PciWindow, Window};
use atoll_devices::testing::{ControlLog, CountingSink, NoDoorbells};
use atoll_devices::virtio::rng::Rng;
use atoll_devices::virtio::{VirtioPci, VirtioPciOptions};
use vm_memory::GuestAddress;

const WINDOW: Window = Window {
    base: 0xc000_0000,
    size: 0x10_0000,
};

fn function() -> Arc<VirtioPci> {
    let ram = Ram::from_ranges(&[(GuestAddress(0), 4096)]).unwrap();
    let options = VirtioPciOptions {
        name: "rng0".to_owned(),
        memory: Memory::new(ram),
        msix: Arc::new(CountingSink::new(2)),
    };
    Arc::new(VirtioPci::new(Arc::new(Rng::new()), options).unwrap())
}

fn word(device: &dyn BusDevice, offset: u64) -> u32 {
    let mut data = [0; 4];
    device.read(offset, &mut data);
    u32::from_le_bytes(data)
}

fn put(device: &dyn BusDevice, offset: u64, value: u32) {
    device.write(offset, &value.to_le_bytes());
}

#[test]
fn ports_and_ecam_show_the_same_functions() {
    let bus = PciBus::new(vec![WINDOW], Arc::new(NoDoorbells::default()));
    bus.add(3, function(), WINDOW.base).unwrap();
    let log = Arc::new(ControlLog::default());
    let ports = ConfigPorts::new(bus.clone(), log.clone());
    let ecam = Ecam(bus);
    for (slot, identity) in [(0, 0x0008_1b36), (3, 0x1044_1af4), (1, u32::MAX)] {
        put(&ports, 0, 1 << 31 | slot << 11);
        assert_eq!(word(&ports, 4), identity);
        assert_eq!(word(&ecam, u64::from(slot) << 15), identity);
    }
    // Single bytes, in the data port and of the address.
    put(&ports, 0, 1 << 31 | 3 << 11 | 8);
    let mut byte = [0];
    ports.read(4, &mut byte);
    assert_eq!(byte, [1]);
    assert_eq!(word(&ports, 0), 1 << 31 | 3 << 11 | 8);
    // Another bus, another function, disabled: nobody.
    for address in [1 << 31 | 1 << 16, 1 << 31 | 1 << 8, 0] {
        put(&ports, 0, address);
        assert_eq!(word(&ports, 4), u32::MAX);
    }
    assert_eq!(word(&ecam, 1 << 12), u32::MAX);
    assert_eq!(word(&ecam, Ecam::SIZE), u32::MAX);
    assert_eq!(log.resets(), 0);
    ports.write(1, &[ConfigPorts::RESET_VALUE]);
    assert_eq!(log.resets(), 1);
}

#[test]
fn slots_and_room_are_checked() {
    let bus = PciBus::new(vec![WINDOW], Arc::new(NoDoorbells::default()));
    let next = bus.add(1, function(), WINDOW.base).unwrap();
    assert_eq!(next, WINDOW.base + 0x2_0000);
    for slot in [0, 1, 32] {
        let refused = bus.add(slot, function(), next);
        assert!(matches!(refused, Err(PciBusError::Slot { .. })));
    }
    let end = WINDOW.base + WINDOW.size;
    for address in [0, end - 0x1_0000, end] {
        let refused = bus.add(2, function(), address);
        assert!(matches!(refused, Err(PciBusError::Bar { .. })));
    }
}

#[test]
fn a_bar_is_not_moved_over_one_in_use() {
    let doorbells = Arc::new(NoDoorbells::default());
    let bus = PciBus::new(vec![WINDOW], doorbells.clone());
    let second = bus.add(1, function(), WINDOW.base).unwrap();
    bus.add(2, function(), second).unwrap();
    let ecam = Ecam(bus.clone());
    let window = PciWindow::new(bus.clone(), WINDOW.base);
    let (command, bar) = (4, 0x10);
    let register = |slot: u64, register: u64| (slot << 15) + register;
    let base = u32::try_from(WINDOW.base).unwrap();
    assert_eq!(word(&window, 0x12), u32::MAX, "not enabled");
    put(&ecam, register(1, command), 2);
    put(&ecam, register(2, command), 2);
    let rings = [WINDOW.base + 0x3000, second + 0x3000];
    assert_eq!(doorbells.connected(), rings);
    // Refused: the other one answers there.
    put(&ecam, register(2, bar), base);
    assert_eq!(doorbells.connected(), rings);
    // Once the other one is disabled, it may.
    put(&ecam, register(1, command), 0);
    put(&ecam, register(2, bar), base);
    assert_eq!(doorbells.connected(), rings[..1]);
    assert_eq!(word(&window, 0x2_0012), u32::MAX);
    // A reset of the machine brings back the first addresses.
    bus.reset();
    put(&ecam, register(1, command), 2);
    put(&ecam, register(2, command), 2);
    assert_eq!(word(&window, 0x10) >> 16, 1);
    assert_eq!(word(&window, 0x2_0010) >> 16, 1);
    assert_eq!(doorbells.connected(), rings);
}

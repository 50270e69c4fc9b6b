// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Functions that come and go: the registers as AML drives them, a guest that does something else, and what is left of a
//! function that is gone.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Barrier};

use atoll_devices::bus::BusDevice;
use atoll_devices::memory::{Memory, Ram};
use atoll_devices::pci::{Ecam, PciBus, PciHotplug, PciWindow, ReleaseSink, Window};
use atoll_devices::state::DeviceState;
use atoll_devices::testing::{CountingSink, Line, NoDoorbells};
use atoll_devices::virtio::rng::Rng;
use atoll_devices::virtio::{VirtioPci, VirtioPciOptions};
use vm_memory::GuestAddress;

const WINDOW: Window = Window {
    base: 0xc000_0000,
    size: 0x10_0000,
};
const BAR_BYTES: u64 = 0x2_0000;
const COMMAND: u64 = 4;
/// Registers.
const LOOK: u64 = 0;
const LEAVE: u64 = 4;
const EJECT: u64 = 8;

#[derive(Clone, Default)]
struct Released(Arc<AtomicU32>);

impl ReleaseSink for Released {
    fn released(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

struct Machine {
    bus: Arc<PciBus>,
    doorbells: Arc<NoDoorbells>,
    event: Arc<Line>,
    released: Released,
    hotplug: PciHotplug,
    ecam: Ecam,
    window: PciWindow,
}

impl Machine {
    fn new() -> Self {
        let doorbells = Arc::new(NoDoorbells::default());
        let bus = PciBus::new(vec![WINDOW], doorbells.clone());
        let (event, released) = (Arc::new(Line::default()), Released::default());
        Self {
            hotplug: PciHotplug::new(bus.clone(), event.clone(), Box::new(released.clone())),
            ecam: Ecam(bus.clone()),
            window: PciWindow::new(bus.clone(), WINDOW.base),
            bus,
            doorbells,
            event,
            released,
        }
    }

    fn plug(&self, slot: usize) -> Arc<VirtioPci> {
        let ram = Ram::from_ranges(&[(GuestAddress(0), 4096)]).unwrap();
        let options = VirtioPciOptions {
            name: format!("rng{slot}"),
            memory: Memory::new(ram),
            msix: Arc::new(CountingSink::new(2)),
        };
        let function = Arc::new(VirtioPci::new(Arc::new(Rng::new()), options).unwrap());
        let address = WINDOW.base + slot as u64 * BAR_BYTES;
        self.bus.add(slot, function.clone(), address).unwrap();
        self.hotplug.changed(slot);
        function
    }

    fn config(&self, slot: u64, register: u64) -> u32 {
        word(&self.ecam, (slot << 15) + register)
    }

    fn enable(&self, slot: u64) {
        put(&self.ecam, (slot << 15) + COMMAND, 2);
    }

    /// Reads a register, and clears what was read, as AML does.
    fn take(&self, register: u64) -> u32 {
        let value = word(&self.hotplug, register);
        put(&self.hotplug, register, value);
        value
    }
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
fn a_function_comes_is_asked_for_and_goes_again_and_again() {
    let machine = Machine::new();
    for round in 1..=3 {
        let function = machine.plug(5);
        assert_eq!(machine.event.edges(), 3 * round - 2);
        assert_eq!((machine.take(LOOK), machine.take(LOOK)), (1 << 5, 0));
        machine.enable(5);
        assert_eq!(machine.doorbells.connected().len(), 1);

        machine.hotplug.ask(5);
        machine.hotplug.ask(5);
        assert!(machine.hotplug.is_leaving(5));
        assert_eq!((machine.take(LEAVE), machine.take(LEAVE)), (1 << 5, 0));
        assert_eq!(machine.hotplug.take_released(), Vec::<usize>::new());
        put(&machine.hotplug, EJECT, 1 << 5);
        assert_eq!(machine.released.0.load(Ordering::SeqCst), round);
        // At once, whatever the VMM does meanwhile.
        assert_eq!(machine.config(5, 0), u32::MAX);
        assert!(machine.doorbells.connected().is_empty());
        put(&machine.hotplug, EJECT, 1 << 5);
        machine.hotplug.ask(5);
        assert_eq!(word(&machine.hotplug, LEAVE), 0);

        assert_eq!(machine.hotplug.take_released(), [5]);
        assert!(machine.bus.remove(5) && !machine.bus.remove(5));
        function.retire();
        assert_eq!(Arc::strong_count(&function), 1, "nobody else holds it");
        assert!(!machine.hotplug.is_leaving(5));
    }
}

/// A guest that looks all the time, and not only when it is told: what it sees first is whole.
#[test]
fn a_function_that_is_seen_answers_at_once() {
    const ROUNDS: usize = 2000;
    let machine = &Machine::new();
    let bar = 5 * BAR_BYTES;
    let (seen, is_seen) = channel();
    let round_ends = &Barrier::new(2);
    let looks = move || {
        for _ in 0..ROUNDS {
            while machine.config(5, 0) == u32::MAX {
                std::hint::spin_loop();
            }
            machine.enable(5);
            let queue_count = word(&machine.window, bar + 0x10) >> 16;
            let doorbells = machine.doorbells.connected().len();
            seen.send((queue_count, doorbells)).unwrap();
            round_ends.wait();
        }
    };
    let mut answers = Vec::new();
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new();
        thread.spawn_scoped(scope, looks).unwrap();
        for _ in 0..ROUNDS {
            let function = machine.plug(5);
            answers.push(is_seen.recv().unwrap());
            machine.hotplug.ask(5);
            put(&machine.hotplug, EJECT, 1 << 5);
            machine.hotplug.take_released();
            machine.bus.remove(5);
            function.retire();
            round_ends.wait();
        }
    });
    assert_eq!(answers, [(1, 1); ROUNDS], "queues and doorbells");
}

#[test]
fn what_nobody_asked_for_stays_whatever_the_guest_writes() {
    let machine = Machine::new();
    let _functions = [machine.plug(1), machine.plug(2)];
    machine.hotplug.ask(2);
    for offset in 0..16 {
        for data in [&[0xff; 1][..], &[0xff; 2], &[0xff; 8], &[]] {
            machine.hotplug.write(offset, data);
        }
    }
    for offset in [1, 2, 3, 5, 9, 12, u64::MAX - 3, u64::MAX] {
        put(&machine.hotplug, offset, u32::MAX);
    }
    assert_eq!(word(&machine.hotplug, LEAVE), 1 << 2, "nothing was cleared");
    assert_eq!(word(&machine.hotplug, EJECT), 0);
    let mut data = [1; 8];
    machine.hotplug.read(u64::MAX - 1, &mut data);
    assert_eq!(data, [0; 8]);
    put(&machine.hotplug, EJECT, u32::MAX);
    assert_eq!(machine.hotplug.take_released(), [2]);
    assert_eq!(machine.config(0, 0), 0x0008_1b36);
    assert_eq!(machine.config(1, 0), 0x1044_1af4);
    assert_eq!(machine.config(2, 0), u32::MAX);
    assert!(!machine.bus.remove(0) && !machine.bus.remove(32) && !machine.bus.remove(9));
}

#[test]
fn nothing_answers_in_the_place_of_what_is_gone() {
    let machine = Machine::new();
    let function = machine.plug(3);
    machine.enable(3);
    let bar = 3 * BAR_BYTES;
    // Acknowledged, and found a driver.
    machine.window.write(bar + 0x14, &[3]);
    assert_eq!(word(&machine.window, bar + 0x14) & 0xff, 3);
    machine.hotplug.ask(3);
    put(&machine.hotplug, EJECT, 1 << 3);
    for offset in [0, 0x14, 0x3000, 0x8000] {
        put(&machine.window, bar + offset, 0);
        assert_eq!(word(&machine.window, bar + offset), u32::MAX);
    }
    machine.enable(3);
    put(
        &machine.ecam,
        (3 << 15) + 0x10,
        u32::try_from(WINDOW.base).unwrap(),
    );
    assert!(machine.doorbells.connected().is_empty());
    machine.hotplug.take_released();
    assert!(machine.bus.remove(3));
    // An access that was under way when the function went.
    function.retire();
    atoll_devices::pci::PciDevice::bar_write(&*function, 0, 0x14, &[1]);
    let mut status = [0xff];
    atoll_devices::pci::PciDevice::bar_read(&*function, 0, 0x14, &mut status);
    assert_eq!(status, [0]);
    // Another one in its slot is a new one.
    machine.plug(3);
    assert_eq!(machine.config(3, COMMAND) & 0xffff, 0);
    machine.enable(3);
    assert_eq!(word(&machine.window, bar + 0x14) & 0xff, 0);
}

#[test]
fn a_reset_gives_what_was_asked_for_and_forgets_the_rest() {
    let machine = Machine::new();
    let _functions = [machine.plug(1), machine.plug(2), machine.plug(3)];
    machine.hotplug.ask(2);
    machine.hotplug.ask(3);
    put(&machine.hotplug, EJECT, 1 << 3);
    assert_eq!(machine.hotplug.reset(), [2, 3]);
    assert_eq!((machine.take(LOOK), machine.take(LEAVE)), (0, 0));
    assert_eq!(machine.hotplug.reset(), Vec::<usize>::new());
    machine.hotplug.ask(1);
    machine.hotplug.forget(1);
    assert!(!machine.hotplug.is_leaving(1));
    put(&machine.hotplug, EJECT, 1 << 1);
    assert_eq!(machine.config(1, 0), 0x1044_1af4);
}

#[test]
fn a_copy_goes_on_where_the_original_was() {
    let original = Machine::new();
    let _functions = [original.plug(1), original.plug(2), original.plug(4)];
    original.take(LOOK);
    original.enable(2);
    original.hotplug.ask(1);
    original.hotplug.ask(2);
    put(&original.hotplug, EJECT, 1 << 2);
    let copy = Machine::new();
    let _copies = [copy.plug(1), copy.plug(2), copy.plug(4)];
    let edges = copy.event.edges();
    copy.bus.restore(&original.bus.save()).unwrap();
    copy.hotplug.restore(&original.hotplug.save()).unwrap();
    assert_eq!(copy.event.edges(), edges + 1);
    assert_eq!(word(&copy.hotplug, LEAVE), 1 << 1);
    assert_eq!(copy.config(2, 0), u32::MAX, "released, and not yet taken");
    put(&copy.hotplug, EJECT, 1 << 1);
    assert_eq!(copy.hotplug.take_released(), [1, 2]);
    assert_eq!(copy.config(4, 0), 0x1044_1af4);
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Any bytes as a guest's accesses to a bus whose functions come and go, and as what their owner does meanwhile. Each step
//! is seven bytes: what is done and with how many bytes, two of offset, and what is written; see [`step`].

use std::collections::BTreeMap;
use std::sync::Arc;

use vm_memory::GuestAddress;

use crate::bus::BusDevice;
use crate::memory::{Memory, Ram};
use crate::pci::{Ecam, PciBus, PciHotplug, PciWindow, ReleaseSink, Window};
use crate::testing::{CountingSink, Line, NoDoorbells};
use crate::virtio::rng::Rng;
use crate::virtio::{VirtioPci, VirtioPciOptions};

const WINDOW: Window = Window {
    base: 0xc000_0000,
    size: 0x40_0000,
};
const STEP_BYTES: usize = 7;
/// Steps of one input.
const STEPS_MAX: usize = 1500;
/// Slots that are used, from 1.
const SLOTS: usize = 4;
const BAR_BYTES: u64 = 0x2_0000;
const EJECT: u64 = 8;
/// What the first register of a function says, and of an empty slot.
const RNG: u32 = 0x1044_1af4;
const EMPTY: u32 = u32::MAX;

struct Nobody;

impl ReleaseSink for Nobody {
    fn released(&self) {}
}

struct Model {
    bus: Arc<PciBus>,
    doorbells: Arc<NoDoorbells>,
    hotplug: PciHotplug,
    ecam: Ecam,
    window: PciWindow,
    /// What the owner has put on the bus, and whether it has asked for it.
    functions: BTreeMap<usize, (Arc<VirtioPci>, bool)>,
}

/// Makes the steps. What was not asked for stays; what is gone answers nowhere and has no doorbell; nothing holds it.
pub fn hotplug(input: &[u8]) {
    let doorbells = Arc::new(NoDoorbells::default());
    let bus = PciBus::new(vec![WINDOW], doorbells.clone());
    let mut model = Model {
        hotplug: PciHotplug::new(bus.clone(), Arc::new(Line::default()), Box::new(Nobody)),
        ecam: Ecam(bus.clone()),
        window: PciWindow::new(bus.clone(), WINDOW.base),
        doorbells,
        bus,
        functions: BTreeMap::new(),
    };
    for bytes in input.chunks_exact(STEP_BYTES).take(STEPS_MAX) {
        model.step(bytes);
        model.check();
    }
    let asked = model.hotplug.reset();
    model.take(asked);
    assert!(model.functions.values().all(|(_, asked)| !asked));
    model.check();
}

impl Model {
    /// Byte 0: what is done (bits 0 to 2), whether it writes (bit 3), how many bytes (bits 4 and 5), how far the offset is
    /// shifted (bits 6 and 7); then offset and data. What an owner does takes its slot from the offset.
    fn step(&mut self, bytes: &[u8]) {
        let offset = u64::from(u16::from_le_bytes([bytes[1], bytes[2]]));
        let size = 1 << (bytes[0] >> 4 & 3);
        let mut data = [0; 8];
        let given = bytes[3..].iter().cycle();
        data.iter_mut()
            .zip(given)
            .for_each(|(to, from)| *to = *from);
        let slot = 1 + usize::from(bytes[1]) % SLOTS;
        let device: &dyn BusDevice = match bytes[0] & 7 {
            0 => &self.hotplug,
            1 => &self.ecam,
            2 => &self.window,
            3 => return self.plug(slot),
            4 => return self.ask(slot),
            5 => {
                let slots = self.hotplug.take_released();
                return self.take(slots);
            }
            6 => return self.force(slot),
            // An eject of four slots at once, as AML may write it.
            _ => {
                let slots = u32::from(bytes[1] & 15) << 1;
                return self.hotplug.write(EJECT, &slots.to_le_bytes());
            }
        };
        let offset = offset << (bytes[0] >> 6);
        if bytes[0] & 8 != 0 {
            device.write(offset, &data[..size]);
        } else {
            device.read(offset, &mut data[..size]);
        }
    }

    fn plug(&mut self, slot: usize) {
        if self.functions.contains_key(&slot) {
            return;
        }
        let ram = Ram::from_ranges(&[(GuestAddress(0), 4096)]).unwrap();
        let options = VirtioPciOptions {
            name: format!("rng{slot}"),
            memory: Memory::new(ram),
            msix: Arc::new(CountingSink::new(2)),
        };
        let function = Arc::new(VirtioPci::new(Arc::new(Rng::new()), options).unwrap());
        let address = WINDOW.base + slot as u64 * BAR_BYTES;
        let added = self.bus.add(slot, function.clone(), address);
        added.expect("what was taken has left its slot");
        self.functions.insert(slot, (function, false));
        self.hotplug.changed(slot);
    }

    fn ask(&mut self, slot: usize) {
        if let Some((_, asked)) = self.functions.get_mut(&slot) {
            *asked = true;
            self.hotplug.ask(slot);
            assert!(self.hotplug.is_leaving(slot));
        }
    }

    fn force(&mut self, slot: usize) {
        if let Some((_, asked)) = self.functions.get_mut(&slot) {
            *asked = true;
            self.hotplug.forget(slot);
            self.take(vec![slot]);
            self.hotplug.changed(slot);
        }
    }

    fn take(&mut self, slots: Vec<usize>) {
        for slot in slots {
            let (function, asked) = self.functions.remove(&slot).expect("it was plugged in");
            assert!(asked, "slot {slot} was taken, and nobody had asked");
            assert!(self.bus.remove(slot));
            function.retire();
            assert_eq!(Arc::strong_count(&function), 1);
        }
    }

    fn check(&self) {
        for slot in 1..=SLOTS {
            let mut data = [0; 4];
            self.ecam.read((slot as u64) << 15, &mut data);
            let found = u32::from_le_bytes(data);
            match self.functions.get(&slot) {
                None => assert_eq!(found, EMPTY),
                Some((_, false)) => assert_eq!(found, RNG),
                // The guest may have let it go.
                Some((_, true)) => assert!([RNG, EMPTY].contains(&found)),
            }
        }
        let connected = self.doorbells.connected();
        assert!(connected.len() <= self.functions.len());
        let end = WINDOW.base + WINDOW.size;
        assert!(connected.iter().all(|at| (WINDOW.base..end).contains(at)));
    }
}

/// What is done, its offset and its data as a step.
fn step(what: u8, offset: u16, data: u32) -> Vec<u8> {
    let mut bytes = vec![what];
    bytes.extend(offset.to_le_bytes());
    bytes.extend(data.to_le_bytes());
    bytes
}

/// Inputs that reach far: every slot comes, is enabled, asked for, let go and taken; the same out of order.
pub fn hotplug_corpus() -> Vec<Vec<u8>> {
    const WRITE_4: u8 = 8 | 2 << 4;
    let plug = |slot: u16| step(3, slot, 0);
    let ask = |slot: u16| step(4, slot, 0);
    let take = || step(5, 0, 0);
    let force = |slot: u16| step(6, slot, 0);
    let eject = |slots: u16| step(7, slots, 0);
    // By ECAM, whose offsets are shifted by two here: register 4 of a slot by its number.
    let enable = |slot: u16| step(1 | WRITE_4 | 2 << 6, (slot << 13) + 1, 6);
    let register = |offset: u16, value: u32| step(WRITE_4, offset, value);
    let all = |of: &dyn Fn(u16) -> Vec<u8>| -> Vec<u8> { (0..4).flat_map(of).collect() };
    vec![
        Vec::new(),
        [all(&plug), all(&ask), eject(15), take(), all(&plug)].concat(),
        [
            plug(0),
            enable(1),
            ask(0),
            eject(1),
            plug(0),
            take(),
            plug(0),
        ]
        .concat(),
        [all(&plug), eject(15), take(), all(&force), all(&plug)].concat(),
        [
            plug(2),
            ask(2),
            force(2),
            eject(15),
            take(),
            plug(2),
            eject(15),
        ]
        .concat(),
        [
            plug(1),
            register(0, !0),
            register(4, !0),
            register(8, !0),
            ask(1),
        ]
        .concat(),
        [
            plug(3),
            ask(3),
            register(8, !0),
            force(3),
            ask(3),
            take(),
            plug(3),
        ]
        .concat(),
    ]
}

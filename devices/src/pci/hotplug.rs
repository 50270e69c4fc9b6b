// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Functions that come to bus 0 and leave it while the guest runs: three registers, which AML reads and writes
//! (`atoll-firmware`, `acpi/hotplug.rs`), so that every system that has ACPI has the driver.
//!
//! Decision: **ACPI hot-plug of bus 0**, not native PCIe hot-plug. Context: a guest must be told that a slot has
//! something new, and must say when it has let go of something. Native hot-plug is a slot of a root port, so each
//! slot costs a bridge with a secondary bus, windows that firmware sizes beforehand, a hot-plug capability with a state
//! machine of lamps, latches and timers, and a device moves to another bus than the one it would be on at boot. The
//! registers here are 12 ports; a device that is plugged is where it would have been from the start, with the same
//! name in the guest; direct boot needs no firmware to number buses; and Linux (acpiphp, built in), Windows and the
//! BSDs carry the driver for emulators' sake. Cost: AML runs in the guest, 24 slots are all there are, and a guest
//! without an ACPI interpreter notices nothing. To be looked at again when VFIO needs PCIe ports of its own, or a guest
//! more slots than bus 0 has.
//!
//! ```text
//! 0x0  look    slots whose content has changed; writing a bit clears it
//! 0x4  leave   slots whose function the machine wants back; writing a bit clears it
//! 0x8  eject   writing a bit lets the function go, if it was asked for; reads as zero
//! ```
//! ```text
//! empty ── arrived ──► there ── ask ──► asked ── eject (guest) ──► released ── take_released ──► empty
//!                        ▲                │  ▲ ask again                          (the VMM drops the device)
//!                        └──── (stays) ───┘──┘
//! ```
//! Only 32-bit accesses at these offsets write. An eject of what nobody asked for is ignored: what a machine has is its
//! owner's affair, and a guest that turns a slot off and on again finds its device where it was.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use super::PciBus;
use crate::bus::BusDevice;
use crate::interrupt::IrqLine;
use crate::rate_limited::{RateLimit, warn_limited};
use crate::state::{DeviceState, Saved, SavedState, StateError};

const LOOK: u64 = 0;
const LEAVE: u64 = 4;
const EJECT: u64 = 8;

/// Who takes functions away that the guest has let go. The VMM implements it; called on vCPU threads, so it only notes
/// that there is something for [`PciHotplug::take_released`].
pub trait ReleaseSink: Send + Sync {
    /// The guest has let go of something.
    fn released(&self);
}

/// Each a set of slots, one bit a slot.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Registers {
    look: u32,
    leave: u32,
    /// What the guest was asked for and has not let go.
    asked: u32,
    /// What it has let go and the VMM has not taken.
    released: u32,
}

/// The registers by which ACPI's methods learn which slot came or is to go (`firmware/src/acpi/hotplug.rs`), and what the
/// VMM asks for. Called by vCPUs on the port bus and by the machine's owner.
pub struct PciHotplug {
    bus: Arc<PciBus>,
    event: Arc<dyn IrqLine>,
    sink: Box<dyn ReleaseSink>,
    /// Held while a slot is hidden, so that the VMM does not take its function and put another one there meanwhile.
    /// Before the PCI bus's lock.
    registers: Mutex<Registers>,
    limit: RateLimit,
}

impl PciHotplug {
    /// Ports of the block, from the base that the VMM's layout gives it.
    pub const SIZE: u16 = 12;

    /// Registers for `bus`. Each pulse of `event` lets the guest read them.
    pub fn new(bus: Arc<PciBus>, event: Arc<dyn IrqLine>, sink: Box<dyn ReleaseSink>) -> Self {
        Self {
            bus,
            event,
            sink,
            registers: Mutex::default(),
            limit: RateLimit::new(),
        }
    }

    /// Tells the guest that what is in `slot` has changed: something came, or was taken without asking.
    pub fn changed(&self, slot: usize) {
        self.lock().look |= bit(slot);
        self.event.pulse();
    }

    /// Asks the guest for what is in `slot`; again, if it was asked before.
    pub fn ask(&self, slot: usize) {
        let mut registers = self.lock();
        if registers.released & bit(slot) != 0 {
            return;
        }
        registers.asked |= bit(slot);
        registers.leave |= bit(slot);
        drop(registers);
        self.event.pulse();
    }

    /// Whether the guest was asked for what is in `slot`, and the VMM has not taken it yet.
    pub fn is_leaving(&self, slot: usize) -> bool {
        let registers = self.lock();
        (registers.asked | registers.released) & bit(slot) != 0
    }

    /// Slots whose functions the VMM is to take away now, and which it takes: nothing is remembered of them.
    pub fn take_released(&self) -> Vec<usize> {
        slots(std::mem::take(&mut self.lock().released))
    }

    /// As at power-on. The slots that the guest was asked for: its next life finds them empty.
    pub fn reset(&self) -> Vec<usize> {
        let before = std::mem::take(&mut *self.lock());
        slots(before.asked | before.released)
    }

    /// Nothing is remembered of `slot`, whose function the VMM takes without the guest.
    pub fn forget(&self, slot: usize) {
        let mut registers = self.lock();
        let Registers {
            look,
            leave,
            asked,
            released,
        } = &mut *registers;
        for set in [look, leave, asked, released] {
            *set &= !bit(slot);
        }
    }

    fn eject(&self, value: u32) {
        let mut registers = self.lock();
        let let_go = value & registers.asked;
        if let_go != value {
            warn_limited!(
                self.limit,
                value,
                asked = registers.asked,
                "pci hot-plug: the guest ejects what nobody asked for"
            );
        }
        if let_go == 0 {
            return;
        }
        registers.asked &= !let_go;
        registers.leave &= !let_go;
        registers.look &= !let_go;
        registers.released |= let_go;
        for slot in slots(let_go) {
            self.bus.hide(slot);
        }
        drop(registers);
        self.sink.released();
    }

    fn lock(&self) -> MutexGuard<'_, Registers> {
        self.registers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

fn bit(slot: usize) -> u32 {
    assert!(slot < super::SLOT_COUNT, "a bus has 32 slots");
    1 << slot
}

fn slots(set: u32) -> Vec<usize> {
    (0..super::SLOT_COUNT)
        .filter(|slot| set & bit(*slot) != 0)
        .collect()
}

impl BusDevice for PciHotplug {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let registers = *self.lock();
        let mut image = [0; Self::SIZE as usize];
        image[..4].copy_from_slice(&registers.look.to_le_bytes());
        image[4..8].copy_from_slice(&registers.leave.to_le_bytes());
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        for (index, byte) in data.iter_mut().enumerate() {
            let at = start.saturating_add(index);
            *byte = image.get(at).copied().unwrap_or(0);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let &[a, b, c, d] = data else {
            return;
        };
        let value = u32::from_le_bytes([a, b, c, d]);
        match offset {
            LOOK => self.lock().look &= !value,
            LEAVE => self.lock().leave &= !value,
            EJECT => self.eject(value),
            _ => {}
        }
    }
}

impl SavedState for Registers {
    const KIND: &'static str = "pci-hotplug";
    const VERSION: u32 = 1;
}

impl DeviceState for PciHotplug {
    fn save(&self) -> Saved {
        Saved::of(&*self.lock())
    }

    /// The bus has been restored. What is still to be taken away is for the VMM to ask for.
    fn restore(&self, saved: &Saved) -> Result<(), StateError> {
        let state: Registers = saved.open()?;
        let mut registers = self.lock();
        *registers = state;
        for slot in slots(state.released) {
            self.bus.hide(slot);
        }
        drop(registers);
        // An interrupt on its way is in no saved state; one too many only makes the guest look.
        if state.look | state.leave != 0 {
            self.event.pulse();
        }
        Ok(())
    }
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The virtual machine's generation: sixteen bytes in guest memory that change when the machine becomes another one
//! (a snapshot is restored, a second time perhaps), so that the guest makes its random numbers and identities anew.
//! Microsoft "Virtual Machine Generation ID"; Linux `drivers/virt/vmgenid.c`.
//!
//! ```text
//! power-on, migration, pause, reset   the same value
//! restore of a snapshot               another value, then the board's event: the guest looks
//! ```
//! The device is one of ACPI's only: no register, no bus. Where the bytes are is said by the VMM when it boots a kernel
//! itself; firmware chooses a page, and says where by a pointer that it writes (`fw_cfg`).

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use super::fw_cfg::Listener;
use crate::interrupt::IrqLine;
use crate::memory::Memory;
use crate::rate_limited::{RateLimit, warn_limited};
use crate::state::{DeviceState, Saved, SavedState, StateError};

/// 16 bytes in guest memory that change whenever the guest is a copy of another one (Microsoft's "Virtual Machine
/// Generation ID"), and the event that tells of it. The VMM changes it after a restore, before vCPUs run.
pub struct GenerationId {
    memory: Memory,
    event: Arc<dyn IrqLine>,
    /// Held while the bytes are written, so that they are one value; nothing else is locked meanwhile.
    state: Mutex<State>,
    limit: RateLimit,
}

/// Also the saved form.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct State {
    /// As it is in memory.
    #[serde(with = "crate::state::hex")]
    value: Vec<u8>,
    /// Where it is in memory; nowhere until somebody said so.
    address: Option<u64>,
}

impl SavedState for State {
    const KIND: &'static str = "generation-id";
    const VERSION: u32 = 1;
}

impl GenerationId {
    /// A device that is nowhere yet; `event` is the board's.
    #[must_use]
    pub fn new(value: [u8; 16], memory: Memory, event: Arc<dyn IrqLine>) -> Self {
        let state = State {
            value: value.to_vec(),
            address: None,
        };
        Self {
            memory,
            event,
            state: Mutex::new(state),
            limit: RateLimit::new(),
        }
    }

    /// The value, as it is in memory.
    #[must_use]
    pub fn value(&self) -> Vec<u8> {
        self.lock().value.clone()
    }

    /// The bytes are at `address` from now on; `None` when the guest has forgotten it, after a reset.
    pub fn place(&self, address: Option<u64>) {
        let mut state = self.lock();
        state.address = address;
        self.write(&state);
    }

    /// Takes the pointer to a page that firmware writes to a file of eight bytes: from then on the value is `offset_bytes`
    /// behind the page's start.
    #[must_use]
    pub fn pointer(device: &Arc<Self>, offset_bytes: u64) -> Listener {
        let device = device.clone();
        Arc::new(move |bytes: &[u8]| {
            let bytes = <[u8; 8]>::try_from(bytes).expect("the file has eight bytes");
            device.place(u64::from_le_bytes(bytes).checked_add(offset_bytes));
        })
    }

    /// Another value, and the guest is told.
    pub fn renew(&self, value: [u8; 16]) {
        {
            let mut state = self.lock();
            state.value = value.to_vec();
            self.write(&state);
        }
        self.event.pulse();
    }

    fn write(&self, state: &State) {
        let Some(address) = state.address else {
            return;
        };
        let memory = self.memory.memory();
        let written = memory.write_slice(&state.value, GuestAddress(address));
        if written.is_err() {
            warn_limited!(self.limit, address, "generation id: its place is not RAM");
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl DeviceState for GenerationId {
    fn save(&self) -> Saved {
        Saved::of(&*self.lock())
    }

    fn restore(&self, saved: &Saved) -> Result<(), StateError> {
        let state: State = saved.open()?;
        if state.value.len() != 16 {
            return Err(StateError::Differs {
                kind: State::KIND,
                what: format!("{} bytes, expected 16", state.value.len()),
            });
        }
        *self.lock() = state;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::memory::Ram;

    #[derive(Default)]
    struct Event(AtomicUsize);

    impl IrqLine for Event {
        fn set_level(&self, asserted: bool) {
            self.0.fetch_add(usize::from(asserted), Ordering::SeqCst);
        }
    }

    fn device(value: u8) -> (GenerationId, Arc<Event>) {
        let ram = Ram::from_ranges(&[(GuestAddress(0), 0x2000)]).unwrap();
        let event = Arc::new(Event::default());
        let device = GenerationId::new([value; 16], Memory::new(ram), event.clone());
        (device, event)
    }

    fn seen(device: &GenerationId, address: u64) -> [u8; 16] {
        let mut bytes = [0; 16];
        let memory = device.memory.memory();
        memory
            .read_slice(&mut bytes, GuestAddress(address))
            .unwrap();
        bytes
    }

    #[test]
    fn the_guest_finds_the_value_where_it_was_said_and_is_told_of_another() {
        let (device, event) = device(1);
        device.place(Some(0x1000));
        assert_eq!(seen(&device, 0x1000), [1; 16]);
        assert_eq!(event.0.load(Ordering::SeqCst), 0);
        device.renew([2; 16]);
        assert_eq!(seen(&device, 0x1000), [2; 16]);
        assert_eq!(event.0.load(Ordering::SeqCst), 1);
        // After a reset it is nowhere, and memory the guest's own.
        device.place(None);
        device.renew([3; 16]);
        assert_eq!(seen(&device, 0x1000), [2; 16]);
    }

    #[test]
    fn a_restored_device_has_value_and_place() {
        let (device, _) = device(1);
        device.place(Some(0x800));
        let (other, event) = super::tests::device(9);
        other.restore(&device.save()).unwrap();
        assert_eq!(other.value(), [1; 16]);
        assert_eq!(event.0.load(Ordering::SeqCst), 0);
        other.renew([4; 16]);
        assert_eq!(seen(&other, 0x800), [4; 16]);
    }

    #[test]
    fn a_place_that_is_no_memory_is_the_guests_loss() {
        let (device, _) = device(1);
        for address in [0x1ff1, 0x2000, u64::MAX - 3, u64::MAX] {
            device.place(Some(address));
            device.renew([5; 16]);
        }
        let mut saved = device.save();
        let text = serde_json::to_string(&saved).unwrap();
        let short = text.replace("0505050505", "05");
        saved = serde_json::from_str(&short).unwrap();
        let refused = device.restore(&saved).unwrap_err().to_string();
        assert!(refused.contains("expected 16"), "{refused}");
    }
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Saved state of the transport, the same for every kind of virtio device: registers, interrupts and where the
//! rings stand. The device's own payload is inside.

use serde::{Deserialize, Serialize};

use super::{Setup, State, VirtioPci, status};
use crate::pci::MsixState;
use crate::state::{DeviceState, Saved, SavedState, StateError, same};
use crate::virtio::QueueState;

#[derive(Serialize, Deserialize)]
struct TransportState {
    device_id: u16,
    status: u8,
    /// Whether the device waits for a reset by its driver.
    broken: bool,
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    queue_select: u16,
    generation: u8,
    isr: u8,
    config_vector: u16,
    queues: Vec<RingState>,
    msix: MsixState,
    device: Saved,
}

impl SavedState for TransportState {
    const KIND: &'static str = "virtio-pci";
    const VERSION: u32 = 1;
}

#[derive(Serialize, Deserialize)]
struct RingState {
    size: u16,
    enabled: bool,
    descriptors: u64,
    driver: u64,
    device: u64,
    vector: u16,
    /// Where the rings stood, if the queue was being served.
    position: Option<Position>,
}

#[derive(Serialize, Deserialize)]
struct Position {
    next_available: u16,
    next_used: u16,
}

impl DeviceState for VirtioPci {
    fn save(&self) -> Saved {
        let state = self.lock();
        let (config_vector, generation, isr, broken) = self.interrupts.save();
        let ring = |slot: &super::Slot| {
            assert!(
                slot.running.is_none(),
                "a device is paused before it is saved"
            );
            RingState {
                size: slot.setup.size,
                enabled: slot.setup.enabled,
                descriptors: slot.setup.descriptors,
                driver: slot.setup.driver,
                device: slot.setup.device,
                vector: slot.interrupt.vector(),
                position: slot.paused.map(|position| Position {
                    next_available: position.next_avail,
                    next_used: position.next_used,
                }),
            }
        };
        Saved::of(&TransportState {
            device_id: self.device.device_id(),
            status: state.status,
            broken,
            device_feature_select: state.device_feature_select,
            driver_feature_select: state.driver_feature_select,
            driver_features: state.driver_features,
            queue_select: state.queue_select,
            generation,
            isr,
            config_vector,
            queues: state.queues.iter().map(ring).collect(),
            msix: self.msix.save(),
            device: self.device.save(),
        })
    }

    fn restore(&self, saved: &Saved) -> Result<(), StateError> {
        let saved: TransportState = saved.open()?;
        let mut state = self.lock();
        let now = self.device.device_id();
        same::<TransportState, _>("the virtio device number", saved.device_id, now)?;
        let (was, now) = (saved.queues.len(), state.queues.len());
        same::<TransportState, _>("the number of queues", was, now)?;
        let missing = saved.driver_features & !self.offered();
        if missing != 0 && saved.status & status::FEATURES_OK != 0 {
            return Err(differs(format!(
                "the driver uses features {missing:#x}, which this device does not offer"
            )));
        }
        let device = self.device.device_id();
        let part = StateError::part(format!("virtio device {device}"));
        self.device.restore(&saved.device).map_err(part)?;
        if !self.msix.restore(&saved.msix) {
            return Err(differs(
                "the number of interrupt vectors changed".to_owned(),
            ));
        }
        let interrupts = (
            saved.config_vector,
            saved.generation,
            saved.isr,
            saved.broken,
        );
        self.interrupts.restore(interrupts);
        state.status = saved.status;
        state.device_feature_select = saved.device_feature_select;
        state.driver_feature_select = saved.driver_feature_select;
        state.driver_features = saved.driver_features;
        state.queue_select = saved.queue_select;
        for (at, ring) in saved.queues.iter().enumerate() {
            self.restore_ring(&mut state, at, ring);
        }
        state.restored = true;
        if state.status & status::DRIVER_OK != 0 {
            self.device.connect(self.interrupts.clone());
        }
        Ok(())
    }
}

impl VirtioPci {
    fn restore_ring(&self, state: &mut State, at: usize, ring: &RingState) {
        let event_idx = super::event_index(state.driver_features);
        let slot = &mut state.queues[at];
        slot.setup = Setup {
            size: ring.size,
            enabled: ring.enabled,
            descriptors: ring.descriptors,
            driver: ring.driver,
            device: ring.device,
        };
        slot.interrupt.set_vector(ring.vector);
        // `resume` starts it from there; rings that cannot be break the device then, as a driver's would.
        slot.paused = ring.position.as_ref().map(|position| QueueState {
            next_avail: position.next_available,
            next_used: position.next_used,
            ..slot.setup.position(slot.max_size, event_idx)
        });
    }
}

fn differs(what: String) -> StateError {
    StateError::Differs {
        kind: TransportState::KIND,
        what,
    }
}

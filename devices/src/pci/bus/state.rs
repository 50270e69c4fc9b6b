// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Saved state of the bus: each function's configuration space, and where its BARs are mapped. The mapping is not
//! what the registers say while a guest sizes a BAR, or has turned the function's memory off.

use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};

use super::{ConfigPorts, Mapping, PciBus};
use crate::state::{DeviceState, Saved, SavedState, StateError, hex, same};

#[derive(Serialize, Deserialize)]
struct BusState {
    functions: Vec<FunctionState>,
}

#[derive(Serialize, Deserialize)]
struct FunctionState {
    slot: usize,
    #[serde(with = "hex")]
    config: Vec<u8>,
    mappings: Vec<MappingState>,
}

#[derive(Serialize, Deserialize)]
struct MappingState {
    bar: usize,
    base: u64,
}

impl SavedState for BusState {
    const KIND: &'static str = "pci-bus";
    const VERSION: u32 = 1;
}

impl DeviceState for PciBus {
    fn save(&self) -> Saved {
        let state = self.lock();
        let mappings = self.mappings.load();
        let functions = (0..).zip(&state.slots).filter_map(|(slot, function)| {
            let of_slot = mappings.iter().filter(|mapping| mapping.slot == slot);
            Some(FunctionState {
                slot,
                config: function.as_ref()?.config.bytes().to_vec(),
                mappings: of_slot
                    .map(|mapping| MappingState {
                        bar: mapping.bar,
                        base: mapping.base,
                    })
                    .collect(),
            })
        });
        let functions = functions.collect();
        Saved::of(&BusState { functions })
    }

    fn restore(&self, saved: &Saved) -> Result<(), StateError> {
        let saved: BusState = saved.open()?;
        let mut state = self.lock();
        let now = state.slots.iter().flatten().count();
        same::<BusState, _>("the number of functions", saved.functions.len(), now)?;
        for function in &saved.functions {
            let slot = state.slots.get_mut(function.slot).and_then(Option::as_mut);
            let restored = slot.is_some_and(|slot| slot.config.restore(&function.config));
            if !restored {
                return Err(differs(function.slot, "is another function now"));
            }
        }
        for function in &saved.functions {
            for mapping in &function.mappings {
                let slot = state.slots[function.slot]
                    .as_ref()
                    .expect("looked at above");
                let bars = slot.config.bars();
                let bar = bars.iter().find(|bar| bar.index == mapping.bar);
                let (Some(bar), Some(device)) = (bar, slot.device.clone()) else {
                    return Err(differs(function.slot, "has no such BAR"));
                };
                if !self.in_window(mapping.base, bar.size) {
                    return Err(differs(function.slot, "has a BAR outside of every window"));
                }
                let wanted = Mapping {
                    base: mapping.base,
                    size: bar.size,
                    slot: function.slot,
                    bar: bar.index,
                    device,
                };
                let old = self.mapping_of(function.slot, *bar);
                self.replace(&state, old, wanted);
            }
        }
        Ok(())
    }
}

fn differs(slot: usize, what: &str) -> StateError {
    StateError::Differs {
        kind: BusState::KIND,
        what: format!("slot {slot} {what}"),
    }
}

/// The address register of the old configuration mechanism.
#[derive(Serialize, Deserialize)]
struct PortsState {
    address: u32,
}

impl SavedState for PortsState {
    const KIND: &'static str = "pci-config-ports";
    const VERSION: u32 = 1;
}

impl DeviceState for ConfigPorts {
    fn save(&self) -> Saved {
        let address = self.address.load(Ordering::Relaxed);
        Saved::of(&PortsState { address })
    }

    fn restore(&self, saved: &Saved) -> Result<(), StateError> {
        let state: PortsState = saved.open()?;
        self.address.store(state.address, Ordering::Relaxed);
        Ok(())
    }
}

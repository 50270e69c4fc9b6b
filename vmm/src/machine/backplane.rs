// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The PCI bus with the machine's functions in it, by name: filled by the build table, and changed by hot-plug. There is
//! no other way by which a function gets on the bus or off it.
//!
//! **Slots are migration ABI.** At power-on the table's order gives them: each function takes the lowest that is free.
//! From then on a function keeps its slot, and the machine's state says which one ([`Backplane::places`]), since after a
//! hot-plug no order gives it any more. A slot's BARs begin at the slot's place in the window, where firmware, or the
//! guest, may move them.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use atoll_devices::memory::Memory;
use atoll_devices::pci::{PciBus, PciDevice, SLOT_COUNT};
use atoll_devices::platform::q35;
use atoll_devices::state::DeviceState;
use atoll_devices::virtio::{VirtioDevice, VirtioPci, VirtioPciOptions};

use super::assembly::BuildError;
use crate::kvm::routes::Routes;

/// Room for the BARs of one slot: a virtio function's.
const SLOT_BYTES: u64 = 0x2_0000;

/// The bus and what is on it.
pub(super) struct Backplane {
    memory: Memory,
    routes: Arc<Routes>,
    pci: Arc<PciBus>,
    /// Where the first slot's BARs begin.
    window: u64,
    /// Where a machine that goes on here had its functions.
    places: BTreeMap<String, usize>,
    functions: BTreeMap<usize, Function>,
}

struct Function {
    name: String,
    /// What most functions are.
    virtio: Option<Arc<VirtioPci>>,
    state: Arc<dyn DeviceState>,
}

impl Backplane {
    /// An empty bus. `places` are those of a machine that goes on here.
    pub(super) fn new(
        pci: Arc<PciBus>,
        memory: Memory,
        routes: Arc<Routes>,
        window: u64,
        places: BTreeMap<String, usize>,
    ) -> Self {
        Self {
            memory,
            routes,
            pci,
            window,
            places,
            functions: BTreeMap::new(),
        }
    }

    /// Puts a virtio device into a slot, with a vector for each queue and one for configuration.
    pub(super) fn add(
        &mut self,
        name: &str,
        device: Arc<dyn VirtioDevice>,
    ) -> Result<Arc<VirtioPci>, BuildError> {
        let queues = u16::try_from(device.queue_sizes().len()).expect("a handful of queues");
        let host = |source: io::Error| BuildError::Host {
            what: "make eventfds for a device",
            source,
        };
        let options = VirtioPciOptions {
            name: name.to_owned(),
            memory: self.memory.clone(),
            msix: self.routes.vectors(queues + 1).map_err(host)?,
        };
        let function = Arc::new(VirtioPci::new(device, options).map_err(host)?);
        self.put(name, function.clone(), Some(function.clone()))?;
        Ok(function)
    }

    /// Puts any PCI function into a slot.
    pub(super) fn add_function(
        &mut self,
        name: &str,
        function: Arc<impl PciDevice + DeviceState + 'static>,
    ) -> Result<(), BuildError> {
        self.put(name, function, None)
    }

    fn put(
        &mut self,
        name: &str,
        function: Arc<impl PciDevice + DeviceState + 'static>,
        virtio: Option<Arc<VirtioPci>>,
    ) -> Result<(), BuildError> {
        let slot = self.slot_for(name);
        let address = self.window + (slot as u64 - 1) * SLOT_BYTES;
        self.pci.add(slot, function.clone(), address)?;
        let function = Function {
            name: name.to_owned(),
            virtio,
            state: function,
        };
        self.functions.insert(slot, function);
        Ok(())
    }

    /// Where it was, or the lowest slot that is free and is nobody's. One too many, which the bus refuses, when there is
    /// none.
    fn slot_for(&self, name: &str) -> usize {
        if let Some(slot) = self.places.get(name) {
            return *slot;
        }
        let taken = |slot: &usize| {
            self.functions.contains_key(slot) || self.places.values().any(|other| other == slot)
        };
        let mut free = (1..q35::LPC_SLOT).filter(|slot| !taken(slot));
        free.next().unwrap_or(SLOT_COUNT)
    }

    /// Takes a function off the bus, and ends it.
    pub(super) fn remove(&mut self, name: &str) {
        self.places.remove(name);
        let Some(slot) = self.slot_of(name) else {
            return;
        };
        self.pci.remove(slot);
        if let Some(function) = self.functions.remove(&slot)
            && let Some(virtio) = function.virtio
        {
            virtio.retire();
        }
    }

    /// Where a function is.
    pub(super) fn slot_of(&self, name: &str) -> Option<usize> {
        let mut functions = self.functions.iter();
        let found = functions.find(|(_, function)| function.name == name);
        found.map(|(slot, _)| *slot)
    }

    /// Where a function is, or will be in a machine that goes on here.
    pub(super) fn place_of(&self, name: &str) -> Option<usize> {
        let place = || self.places.get(name).copied();
        self.slot_of(name).or_else(place)
    }

    /// Whose a slot is, as [`Backplane::place_of`] says.
    pub(super) fn name_of(&self, slot: usize) -> Option<&str> {
        let place = || {
            let mut places = self.places.iter();
            let found = places.find(|(_, other)| **other == slot);
            found.map(|(name, _)| name.as_str())
        };
        self.name_at(slot).or_else(place)
    }

    /// Name of what is in a slot.
    pub(super) fn name_at(&self, slot: usize) -> Option<&str> {
        self.functions
            .get(&slot)
            .map(|function| function.name.as_str())
    }

    /// Whether a machine that goes on here had a function of that name.
    pub(super) fn had(&self, name: &str) -> bool {
        self.places.contains_key(name)
    }

    /// Name and slot of every function, in the order of slots.
    pub(super) fn places(&self) -> impl Iterator<Item = (&str, usize)> {
        let functions = self.functions.iter();
        functions.map(|(slot, function)| (function.name.as_str(), *slot))
    }

    /// Every virtio function, in the order of slots.
    pub(super) fn functions(&self) -> impl Iterator<Item = &Arc<VirtioPci>> {
        self.functions
            .values()
            .filter_map(|function| function.virtio.as_ref())
    }

    /// What is saved, in the order of restoring: the bus, then its functions.
    pub(super) fn states(&self) -> Vec<(&str, &dyn DeviceState)> {
        let bus: (&str, &dyn DeviceState) = ("PCI bus", self.pci.as_ref());
        let functions = self.functions.values();
        let functions = functions.map(|function| (function.name.as_str(), function.state.as_ref()));
        std::iter::once(bus).chain(functions).collect()
    }

    /// Every function, and the bus, as at power-on.
    pub(super) fn reset(&self) {
        self.functions().for_each(|function| function.reset());
        self.pci.reset();
    }

    /// The bus.
    pub(super) fn pci(&self) -> &Arc<PciBus> {
        &self.pci
    }
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Bus 0: its functions, where their BARs are now, and the three ways in which a guest reaches them.
//!
//! Configuration cycles (rare) are serialised by one lock. Memory accesses go through an immutable table that is
//! replaced when a BAR moves, so that vCPUs never wait for each other.
//!
//! A BAR is mapped where its registers say as soon as the function's memory space is enabled and the range lies
//! in a window. While a guest sizes a BAR the registers hold no such address, and the old mapping stays: sizing
//! costs nothing. A range that another enabled function has is refused with a log line.

mod state;

use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arc_swap::ArcSwap;
use vmm_sys_util::eventfd::EventFd;

use super::config::CONFIG_BYTES;
use super::{Bar, ConfigSpace, Doorbell, Identity, PciDevice, SLOT_COUNT};
use crate::bus::BusDevice;
use crate::platform::MachineControl;
use crate::rate_limited::{RateLimit, warn_limited};

/// Bytes of ECAM a function has. PCIe base specification 3.0 §7.2.2.
const ECAM_FUNCTION_BYTES: u64 = 4096;
/// Bytes of ECAM one bus has.
const ECAM_BUS_BYTES: u64 = 1 << 20;
/// Host bridge: Red Hat's generic PCIe host bridge, which no driver binds to.
const HOST_BRIDGE: Identity = Identity {
    vendor: 0x1b36,
    device: 0x0008,
    subsystem_vendor: 0x1af4,
    subsystem: 0x1100,
    class: 0x06_00_00,
    revision: 0,
};

/// Connects doorbells to KVM (ioeventfd); the VMM implements it. Called on the control path.
pub trait DoorbellSink: Send + Sync {
    /// From now on a write of any size to guest-physical `address` signals `event` and reaches no bus.
    fn connect(&self, address: u64, event: &EventFd) -> io::Result<()>;
    /// Undoes `connect` with the same arguments.
    fn disconnect(&self, address: u64, event: &EventFd) -> io::Result<()>;
}

/// A range of guest-physical addresses where BARs may be; the VMM's layout says which.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// First guest-physical address of the window.
    pub base: u64,
    /// Bytes of the window.
    pub size: u64,
}

/// Why a function could not be added.
#[derive(Debug, thiserror::Error)]
pub enum PciBusError {
    /// 31 beside the host bridge.
    #[error("pci slot {slot} is taken or not in 1..32")]
    Slot {
        /// The number asked for.
        slot: usize,
    },
    /// In no window.
    #[error("pci slot {slot}: no room for a BAR of {size:#x} bytes at {address:#x}")]
    Bar {
        /// The function.
        slot: usize,
        /// Where the VMM wanted it.
        address: u64,
        /// Its size.
        size: u64,
    },
}

struct Slot {
    config: ConfigSpace,
    initial: ConfigSpace,
    device: Option<Arc<dyn PciDevice>>,
    doorbells: Vec<Doorbell>,
    /// The guest has let it go: it finds the slot empty.
    hidden: bool,
}

/// A BAR in the memory map.
#[derive(Clone)]
struct Mapping {
    base: u64,
    size: u64,
    slot: usize,
    bar: usize,
    device: Arc<dyn PciDevice>,
}

struct State {
    /// Two configuration spaces take 1.1 KiB: those of slots that are empty would be most of a small machine's heap.
    slots: [Option<Box<Slot>>; SLOT_COUNT],
}

impl State {
    /// What the guest finds in a slot.
    fn visible(&mut self, slot: usize) -> Option<&mut Slot> {
        let slot = self.slots[slot].as_deref_mut();
        slot.filter(|slot| !slot.hidden)
    }
}

/// Bus 0 of the machine. Shared by its bus devices and the VMM.
pub struct PciBus {
    windows: Vec<Window>,
    doorbells: Arc<dyn DoorbellSink>,
    /// Configuration spaces. Held during configuration cycles, also while a device handles one (its MSI-X table,
    /// a reset through the configuration window) and while doorbells move: their order is the guest's. First in
    /// the lock order: devices' locks come after it, and no device calls back into the bus.
    state: Mutex<State>,
    /// Sorted by base; replaced under `state`, read without a lock.
    mappings: ArcSwap<Vec<Mapping>>,
    limit: RateLimit,
}

impl PciBus {
    /// A bus with nothing but a generic host bridge in slot 0.
    pub fn new(windows: Vec<Window>, doorbells: Arc<dyn DoorbellSink>) -> Arc<Self> {
        Self::with_host_bridge(ConfigSpace::new(HOST_BRIDGE), windows, doorbells)
    }

    /// The same with a host bridge of the caller's choice.
    pub fn with_host_bridge(
        config: ConfigSpace,
        windows: Vec<Window>,
        doorbells: Arc<dyn DoorbellSink>,
    ) -> Arc<Self> {
        let mut slots = [const { None }; SLOT_COUNT];
        slots[0] = Some(Box::new(Slot {
            initial: config.clone(),
            config,
            device: None,
            doorbells: Vec::new(),
            hidden: false,
        }));
        Arc::new(Self {
            windows,
            doorbells,
            state: Mutex::new(State { slots }),
            mappings: ArcSwap::default(),
            limit: RateLimit::new(),
        })
    }

    /// Adds a function, its BARs one after the other from `address` up (the VMM's layout, as firmware would
    /// assign them; each aligned to its size). The guest still has to enable memory space. Returns the first
    /// address after the BARs. Fails when the slot is taken or a BAR's place is in no window, and leaves the slot as it
    /// was; that places of BARs overlap is not looked for, the guest's first to enable its own has it.
    pub fn add(
        &self,
        slot: usize,
        device: Arc<dyn PciDevice>,
        address: u64,
    ) -> Result<u64, PciBusError> {
        let mut state = self.lock();
        if slot == 0 || slot >= SLOT_COUNT || state.slots[slot].is_some() {
            return Err(PciBusError::Slot { slot });
        }
        let mut config = device.config_space();
        let mut next = address;
        for bar in config.bars().to_vec() {
            let base = next.next_multiple_of(bar.size);
            if !self.in_window(base, bar.size) {
                let size = bar.size;
                let address = base;
                return Err(PciBusError::Bar {
                    slot,
                    address,
                    size,
                });
            }
            config.set_bar_address(bar, base);
            next = base + bar.size;
        }
        state.slots[slot] = Some(Box::new(Slot {
            initial: config.clone(),
            config,
            doorbells: device.doorbells(),
            device: Some(device),
            hidden: false,
        }));
        Ok(next)
    }

    /// From now on the guest finds `slot` empty: no configuration space, no BARs, no doorbells. The function is there
    /// for [`PciBus::remove`]. Nothing happens to an empty slot.
    pub fn hide(&self, slot: usize) {
        let mut state = self.lock();
        if let Some(function) = state.slots.get_mut(slot).and_then(Option::as_mut) {
            function.hidden = true;
            self.unmap_slot(&state, slot);
        }
    }

    /// Takes the function out of `slot`; the guest finds it empty. An access that is under way may still reach the
    /// function when this has returned. False if there is none.
    pub fn remove(&self, slot: usize) -> bool {
        self.hide(slot);
        let taken = match self.lock().slots.get_mut(slot) {
            // The host bridge is no function of the VMM's.
            Some(function) if slot > 0 => function.take(),
            _ => None,
        };
        // Dropped without the lock: a device's end may take a while.
        taken.is_some()
    }

    /// Takes every function's registers back to what they were when it was added, BARs included: a reset of the
    /// machine. The devices' own state is the VMM's to reset.
    pub fn reset(&self) {
        let mut state = self.lock();
        for slot in state.slots.iter_mut().flatten() {
            slot.config = slot.initial.clone();
            if let Some(device) = slot.device.clone() {
                device.after_config_write(&mut slot.config, 0, CONFIG_BYTES);
            }
        }
    }

    fn config_read(&self, slot: usize, offset: u16, data: &mut [u8]) {
        let mut state = self.lock();
        let Some(slot) = state.visible(slot) else {
            data.fill(0xff);
            return;
        };
        if let Some(device) = slot.device.clone() {
            device.before_config_read(&mut slot.config, offset, data.len());
        }
        slot.config.read(offset, data);
    }

    fn config_write(&self, index: usize, offset: u16, data: &[u8]) {
        let mut state = self.lock();
        let Some(slot) = state.visible(index) else {
            return;
        };
        slot.config.write(offset, data);
        if let Some(device) = slot.device.clone() {
            device.after_config_write(&mut slot.config, offset, data.len());
        }
        if ConfigSpace::moves_bars(offset, data.len()) && slot.config.memory_enabled() {
            self.remap(&mut state, index);
        }
    }

    /// Brings the mappings of slot `index`, which is enabled, in line with its BAR registers.
    fn remap(&self, state: &mut State, index: usize) {
        let Some(slot) = &state.slots[index] else {
            return;
        };
        let Some(device) = slot.device.clone() else {
            return;
        };
        for bar in slot.config.bars().to_vec() {
            let base = slot.config.bar_address(bar);
            let wanted = Mapping {
                base,
                size: bar.size,
                slot: index,
                bar: bar.index,
                device: device.clone(),
            };
            let old = self.mapping_of(index, bar);
            if old.as_ref().is_some_and(|old| old.base == base) || !self.in_window(base, bar.size) {
                continue;
            }
            if self.evict_disabled(state, &wanted) {
                self.replace(state, old, wanted);
            } else {
                warn_limited!(
                    self.limit,
                    slot = index,
                    base,
                    "pci: BAR moved over another"
                );
            }
        }
    }

    fn mapping_of(&self, slot: usize, bar: Bar) -> Option<Mapping> {
        let mappings = self.mappings.load();
        let found = mappings
            .iter()
            .find(|mapping| mapping.slot == slot && mapping.bar == bar.index);
        found.cloned()
    }

    /// Removes mappings of disabled functions that `wanted` overlaps. False if an enabled one is in the way.
    fn evict_disabled(&self, state: &State, wanted: &Mapping) -> bool {
        let mappings = self.mappings.load_full();
        let in_the_way: Vec<&Mapping> = mappings
            .iter()
            .filter(|other| {
                (other.slot, other.bar) != (wanted.slot, wanted.bar)
                    && other.base < wanted.base + wanted.size
                    && wanted.base < other.base + other.size
            })
            .collect();
        let enabled = |other: &&Mapping| {
            let slot = state.slots[other.slot].as_ref();
            slot.is_some_and(|slot| slot.config.memory_enabled())
        };
        if in_the_way.iter().any(enabled) {
            return false;
        }
        for other in in_the_way {
            self.unmap(state, other);
        }
        true
    }

    fn unmap(&self, state: &State, old: &Mapping) {
        self.each_doorbell(state, old, |address, event| {
            self.doorbells.disconnect(address, event)
        });
        let mut table = Vec::clone(&self.mappings.load_full());
        table.retain(|mapping| (mapping.slot, mapping.bar) != (old.slot, old.bar));
        self.mappings.store(Arc::new(table));
    }

    fn unmap_slot(&self, state: &State, slot: usize) {
        let mappings = self.mappings.load_full();
        let of_slot = mappings.iter().filter(|mapping| mapping.slot == slot);
        of_slot.for_each(|mapping| self.unmap(state, mapping));
    }

    fn replace(&self, state: &State, old: Option<Mapping>, new: Mapping) {
        if let Some(old) = &old {
            tracing::info!(
                slot = new.slot,
                from = old.base,
                to = new.base,
                "pci: BAR moved"
            );
            self.each_doorbell(state, old, |address, event| {
                self.doorbells.disconnect(address, event)
            });
        }
        self.each_doorbell(state, &new, |address, event| {
            self.doorbells.connect(address, event)
        });
        let mut table = Vec::clone(&self.mappings.load_full());
        table.retain(|mapping| (mapping.slot, mapping.bar) != (new.slot, new.bar));
        table.push(new);
        table.sort_by_key(|mapping| mapping.base);
        self.mappings.store(Arc::new(table));
    }

    /// A doorbell that cannot be connected still works: its write exits to [`PciDevice::bar_write`].
    fn each_doorbell(
        &self,
        state: &State,
        mapping: &Mapping,
        act: impl Fn(u64, &EventFd) -> io::Result<()>,
    ) {
        let slot = state.slots[mapping.slot].as_ref();
        for doorbell in slot.map_or(&[][..], |slot| &slot.doorbells) {
            if doorbell.bar == mapping.bar
                && let Err(error) = act(mapping.base + doorbell.offset, &doorbell.event)
            {
                warn_limited!(self.limit, slot = mapping.slot, %error, "pci: doorbell");
            }
        }
    }

    fn in_window(&self, base: u64, size: u64) -> bool {
        self.windows.iter().any(|window| {
            base >= window.base
                && base
                    .checked_add(size)
                    .is_some_and(|end| end - window.base <= window.size)
        })
    }

    fn find(&self, address: u64) -> Option<(u64, Mapping)> {
        let mappings = self.mappings.load();
        let after = mappings.partition_point(|mapping| mapping.base <= address);
        let mapping = mappings.get(after.checked_sub(1)?)?;
        let offset = address - mapping.base;
        (offset < mapping.size).then(|| (offset, mapping.clone()))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The enhanced configuration area of bus 0: 1 MiB on the memory bus, announced by the MCFG table.
pub struct Ecam(pub Arc<PciBus>);

impl Ecam {
    /// Size of its range on the memory bus.
    pub const SIZE: u64 = ECAM_BUS_BYTES;

    fn locate(offset: u64) -> Option<(usize, u16)> {
        let function = offset / ECAM_FUNCTION_BYTES;
        // Functions 1 to 7 of every device are absent, and so are other buses.
        if offset >= ECAM_BUS_BYTES || !function.is_multiple_of(8) {
            return None;
        }
        let slot = usize::try_from(function / 8).ok()?;
        let register = u16::try_from(offset % ECAM_FUNCTION_BYTES).ok()?;
        Some((slot, register))
    }
}

impl BusDevice for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match Self::locate(offset) {
            Some((slot, register)) => self.0.config_read(slot, register, data),
            None => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some((slot, register)) = Self::locate(offset) {
            self.0.config_write(slot, register, data);
        }
    }
}

/// Ports 0xcf8 to 0xcff: the old configuration mechanism, and the reset control register at 0xcf9 that sits
/// inside it.
pub struct ConfigPorts {
    bus: Arc<PciBus>,
    control: Arc<dyn MachineControl>,
    address: AtomicU32,
}

impl ConfigPorts {
    /// First port: the address register of configuration mechanism #1, PCI 3.0 §3.2.2.3.2.
    pub const BASE: u64 = 0xcf8;
    /// Ports: four of the address register, four of the data register.
    pub const SIZE: u64 = 8;
    /// What software writes to port 0xcf9: a full reset, on the transition of bit 2.
    pub const RESET_VALUE: u8 = 0x06;
    /// Bit 2: reset the processors.
    const RESET_CPU: u8 = 1 << 2;
    /// Bit 31 of the address: configuration cycles are enabled.
    const ENABLE: u32 = 1 << 31;

    /// Ports of `bus`; `control` is told of resets.
    pub fn new(bus: Arc<PciBus>, control: Arc<dyn MachineControl>) -> Self {
        Self {
            bus,
            control,
            address: AtomicU32::new(0),
        }
    }

    /// Slot and register that a data access at `offset` means; only bus 0, function 0.
    fn locate(&self, offset: u64) -> Option<(usize, u16)> {
        let address = self.address.load(Ordering::Relaxed);
        if address & Self::ENABLE == 0 || address & 0x00ff_0700 != 0 {
            return None;
        }
        let slot = usize::try_from(address >> 11 & 31).ok()?;
        let register = u16::try_from(address & 0xfc).ok()? + u16::try_from(offset & 3).ok()?;
        Some((slot, register))
    }
}

impl BusDevice for ConfigPorts {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if offset >= 4 {
            if let Some((slot, register)) = self.locate(offset) {
                self.bus.config_read(slot, register, data);
            }
        } else if offset == 0 && data.len() == 4 {
            data.copy_from_slice(&self.address.load(Ordering::Relaxed).to_le_bytes());
        } else if offset == 1 && data.len() == 1 {
            data[0] = 0;
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (0, &[a, b, c, d]) => {
                self.address
                    .store(u32::from_le_bytes([a, b, c, d]), Ordering::Relaxed);
            }
            (1, &[value]) if value & Self::RESET_CPU != 0 => self.control.reset(),
            (4.., data) => {
                if let Some((slot, register)) = self.locate(offset) {
                    self.bus.config_write(slot, register, data);
                }
            }
            _ => {}
        }
    }
}

/// One window of the memory bus; whatever BAR is mapped at an address answers.
pub struct PciWindow {
    bus: Arc<PciBus>,
    base: u64,
}

impl PciWindow {
    /// The window of `bus` that starts at guest-physical `base`.
    pub fn new(bus: Arc<PciBus>, base: u64) -> Self {
        Self { bus, base }
    }
}

impl BusDevice for PciWindow {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match self.bus.find(self.base + offset) {
            Some((offset, mapping)) => mapping.device.bar_read(mapping.bar, offset, data),
            None => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some((offset, mapping)) = self.bus.find(self.base + offset) {
            mapping.device.bar_write(mapping.bar, offset, data);
        }
    }
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Virtio over PCI, modern only (VIRTIO 1.2 §4.1): registers, status machine, start and stop of queues.
//!
//! One 64-bit memory BAR:
//! ```text
//!  0x00000  common configuration        0x03000  doorbells, 4 bytes a queue
//!  0x01000  ISR status                  0x08000  MSI-X table
//!  0x02000  device configuration        0x10000  MSI-X pending bits
//! ```
//! Not here: the rings (`queue`), the threads (`worker`), what the device does (its [`VirtioDevice`]).

mod state;

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::status::{self, Step};
use super::{
    Act, DeviceInterrupts, DeviceQueue, QueueInterrupt, QueueStart, QueueState, StartError,
    StartedQueue, VirtioDevice,
};
use crate::counters::{CounterList, QueueCounters};
use crate::interrupt::MsixSink;
use crate::memory::Memory;
use crate::pci::{
    Bar, Capability, ConfigSpace, Doorbell, Identity, Msix, PciDevice, TABLE_ENTRY_BYTES,
};

const COMMON: u64 = 0x0_0000;
const ISR: u64 = 0x0_1000;
const DEVICE: u64 = 0x0_2000;
const DOORBELLS: u64 = 0x0_3000;
const MSIX_TABLE: u64 = 0x0_8000;
const MSIX_PENDING: u64 = 0x1_0000;
const BAR_BYTES: u64 = 0x2_0000;

/// Bytes of the common configuration structure, §4.1.4.3.
const COMMON_BYTES: usize = 0x3c;
/// Distance of two queues' doorbells (`notify_off_multiplier`).
const DOORBELL_STRIDE: u64 = 4;
/// Vendor of all virtio devices, §4.1.2.
const VENDOR: u16 = 0x1af4;
/// Device ID of a modern device is this plus its virtio ID.
const DEVICE_BASE: u16 = 0x1040;
/// PCI capability IDs.
const CAPABILITY_VENDOR: u8 = 0x09;
const CAPABILITY_MSIX: u8 = 0x11;

/// What the VMM gives to one virtio function.
pub struct VirtioPciOptions {
    /// Name of the device in logs and thread names: `disk0`.
    pub name: String,
    /// Guest RAM: where rings and buffers may be. Nothing else is reachable for the driver.
    pub memory: Memory,
    /// Its vectors: best one a queue and one for configuration changes. With fewer, the driver shares them.
    pub msix: Arc<dyn MsixSink>,
}

/// A queue of a paused machine did not start again.
#[derive(Debug, thiserror::Error)]
#[error("{device}: resume")]
pub struct PauseError {
    /// Name of the device, as in [`VirtioPciOptions::name`].
    pub device: String,
    /// Which queue, and what the host refused.
    #[source]
    pub source: StartError,
}

/// A virtio device as a PCI function.
pub struct VirtioPci {
    name: String,
    device: Arc<dyn VirtioDevice>,
    memory: Memory,
    msix: Arc<Msix>,
    interrupts: DeviceInterrupts,
    config: ConfigSpace,
    msix_capability: u16,
    window_capability: u16,
    /// One a queue; also read by accesses that must not wait for `state`.
    doorbells: Vec<EventFd>,
    counters: Vec<Arc<QueueCounters>>,
    /// The registers. Held while queues start and stop, so that a reset is over when its write returns; queue
    /// threads never take it. After the PCI bus's lock, before the MSI-X table's.
    state: Mutex<State>,
}

struct State {
    status: u8,
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    queue_select: u16,
    queues: Vec<Slot>,
    /// The queues that `resume` starts come from another machine.
    restored: bool,
    /// Off its bus for good: an access that was under way starts nothing.
    retired: bool,
}

struct Slot {
    setup: Setup,
    max_size: u16,
    interrupt: QueueInterrupt,
    running: Option<Box<dyn StartedQueue>>,
    /// Where the rings stood when the queue was stopped by a pause.
    paused: Option<QueueState>,
}

/// What the driver says about a queue.
#[derive(Default, Clone, Copy)]
struct Setup {
    size: u16,
    enabled: bool,
    descriptors: u64,
    driver: u64,
    device: u64,
}

impl Setup {
    /// Rings of which nothing has been used yet.
    fn position(self, max_size: u16, event_index: bool) -> QueueState {
        QueueState {
            max_size,
            next_avail: 0,
            next_used: 0,
            event_idx_enabled: event_index,
            size: self.size,
            ready: true,
            desc_table: self.descriptors,
            avail_ring: self.driver,
            used_ring: self.device,
        }
    }
}

/// Whether the driver took interrupt suppression by index.
fn event_index(driver_features: u64) -> bool {
    driver_features & 1 << VIRTIO_RING_F_EVENT_IDX != 0
}

impl VirtioPci {
    /// Wraps `device`. Fails when no doorbell can be made.
    pub fn new(device: Arc<dyn VirtioDevice>, options: VirtioPciOptions) -> io::Result<Self> {
        let msix = Arc::new(Msix::new(options.msix));
        let interrupts = DeviceInterrupts::new(&options.name, msix.clone());
        let sizes = device.queue_sizes();
        let slot = |&max_size: &u16| Slot {
            setup: Setup {
                size: max_size,
                ..Setup::default()
            },
            max_size,
            interrupt: interrupts.queue(),
            running: None,
            paused: None,
        };
        let (config, msix_capability, window_capability) =
            config_space(device.device_id(), sizes.len(), msix.vector_count());
        Ok(Self {
            name: options.name,
            memory: options.memory,
            config,
            msix_capability,
            window_capability,
            doorbells: sizes
                .iter()
                .map(|_| EventFd::new(EFD_NONBLOCK))
                .collect::<io::Result<_>>()?,
            counters: sizes.iter().map(|_| Arc::default()).collect(),
            state: Mutex::new(State {
                status: 0,
                device_feature_select: 0,
                driver_feature_select: 0,
                driver_features: 0,
                queue_select: 0,
                queues: sizes.iter().map(slot).collect(),
                restored: false,
                retired: false,
            }),
            device,
            msix,
            interrupts,
        })
    }

    /// Name of the device in logs, as in [`VirtioPciOptions::name`].
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Stops every queue and keeps where it stood. For a machine whose vCPUs are held.
    pub fn pause(&self) {
        for slot in &mut self.lock().queues {
            if let Some(running) = slot.running.take() {
                slot.paused = Some(running.stop());
            }
        }
    }

    /// Starts again what [`VirtioPci::pause`] stopped, here or on the machine whose state was restored. Fails when the
    /// host refuses what a queue needs, such as a thread: the queues before that one run then, and it is lost until a
    /// reset, while those after it are still paused and start with the next call.
    pub fn resume(&self) -> Result<(), PauseError> {
        let mut state = self.lock();
        let restored = std::mem::take(&mut state.restored);
        if restored {
            self.interrupts.tell_again();
        }
        for index in 0..state.queues.len() {
            if let Some(position) = state.queues[index].paused.take() {
                // An interrupt on its way from the eventfd to the local APIC is in no saved state; one too many
                // only makes the driver look.
                if restored {
                    state.queues[index].interrupt.signal();
                }
                self.start_queue(&mut state, index, position)
                    .map_err(|source| PauseError {
                        device: self.name.clone(),
                        source,
                    })?;
            }
        }
        Ok(())
    }

    /// See [`VirtioDevice::log_writes`].
    pub fn log_writes(&self, on: bool) -> io::Result<()> {
        self.device.log_writes(on)
    }

    /// See [`VirtioDevice::note_writes`].
    pub fn note_writes(&self) {
        self.device.note_writes();
    }

    /// Why this cannot be done with the device's machine, if it cannot.
    pub fn obstacle(&self, act: Act) -> Option<String> {
        self.device.obstacle(act)
    }

    /// Stops everything and forgets what the driver said: a reset of the machine.
    pub fn reset(&self) {
        self.reset_locked(&mut self.lock());
    }

    /// Stops everything for good, for a function that was taken off its bus.
    pub fn retire(&self) {
        let mut state = self.lock();
        self.reset_locked(&mut state);
        state.retired = true;
    }

    /// Numbers of the device and of each queue.
    pub fn counters(&self) -> (CounterList, Vec<CounterList>) {
        let queues = self.counters.iter().map(|queue| queue.list()).collect();
        (self.device.counters(), queues)
    }

    /// Whether the device waits for a reset by its driver.
    pub fn needs_reset(&self) -> bool {
        self.interrupts.is_broken()
    }

    fn offered(&self) -> u64 {
        self.device.features()
            | 1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | 1 << VIRTIO_RING_F_EVENT_IDX
    }

    fn set_status(&self, state: &mut State, new: u8) {
        match status::step(state.status, new) {
            Step::Stay => {}
            Step::Set(bits) => state.status |= bits,
            Step::SettleFeatures => {
                let features = state.driver_features;
                if features & !self.offered() != 0 || features & 1 << VIRTIO_F_VERSION_1 == 0 {
                    // The driver reads the status back and sees that the bit is missing, §3.1.1.
                    self.interrupts
                        .note(&format_args!("features {features:#x} refused"));
                } else {
                    state.status |= status::FEATURES_OK;
                }
            }
            Step::Start => self.start(state),
            Step::Reset => self.reset_locked(state),
            Step::Illegal => {
                let old = state.status;
                self.interrupts
                    .needs_reset(&format_args!("status {old:#x} to {new:#x}"));
            }
        }
    }

    fn start(&self, state: &mut State) {
        state.status |= status::DRIVER_OK;
        self.device.connect(self.interrupts.clone());
        let event_index = event_index(state.driver_features);
        for index in 0..state.queues.len() {
            let slot = &state.queues[index];
            if !slot.setup.enabled {
                continue;
            }
            let position = slot.setup.position(slot.max_size, event_index);
            if let Err(error) = self.start_queue(state, index, position) {
                let cause = std::error::Error::source(&error).map(ToString::to_string);
                let cause = cause.unwrap_or_default();
                self.interrupts
                    .needs_reset(&format_args!("{error}: {cause}"));
                return;
            }
        }
    }

    /// Starts one queue. Rings that cannot be are the driver's mistake and break the device; an error is ours.
    fn start_queue(
        &self,
        state: &mut State,
        at: usize,
        position: QueueState,
    ) -> Result<(), StartError> {
        let features = state.driver_features;
        let slot = &mut state.queues[at];
        let counters = self.counters[at].clone();
        let queue = match DeviceQueue::new(
            position,
            self.memory.clone(),
            slot.interrupt.clone(),
            counters.clone(),
        ) {
            Ok(queue) => queue,
            Err(error) => {
                self.interrupts
                    .needs_reset(&format_args!("queue {at}: {error}"));
                return Ok(());
            }
        };
        let index = u16::try_from(at).expect("at most 65535 queues");
        let doorbell = self.doorbells[at]
            .try_clone()
            .map_err(|source| StartError { index, source })?;
        let start = QueueStart {
            index,
            queue,
            features,
            doorbell,
            counters,
        };
        // This may be a vCPU's thread, which is not allowed to make rings and threads.
        let device = self.device.clone();
        let started = atoll_thread::in_starter(move || device.start_queue(start));
        slot.running = Some(started?);
        Ok(())
    }

    fn reset_locked(&self, state: &mut State) {
        for slot in &mut state.queues {
            if let Some(running) = slot.running.take() {
                running.stop();
            }
            slot.paused = None;
            slot.setup = Setup {
                size: slot.max_size,
                ..Setup::default()
            };
            slot.interrupt.set_vector(super::notify::NO_VECTOR);
        }
        self.device.reset();
        self.interrupts.reset();
        state.status = 0;
        state.driver_features = 0;
        state.device_feature_select = 0;
        state.driver_feature_select = 0;
        state.queue_select = 0;
    }

    fn common_read(&self, offset: usize, data: &mut [u8]) {
        let image = self.common_image(&self.lock());
        for (at, byte) in (offset..).zip(data) {
            *byte = image.get(at).copied().unwrap_or(0);
        }
    }

    /// The whole structure as the driver may read it now.
    fn common_image(&self, state: &State) -> [u8; COMMON_BYTES] {
        let mut image = [0; COMMON_BYTES];
        let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
        let half = |features: u64, select: u32| match select {
            0 => u32::try_from(features & 0xffff_ffff).expect("masked"),
            1 => u32::try_from(features >> 32).expect("shifted"),
            _ => 0,
        };
        let broken = u8::from(self.interrupts.is_broken()) * status::NEEDS_RESET;
        let queue_count = u16::try_from(state.queues.len()).expect("at most 65535 queues");
        put(0x00, &state.device_feature_select.to_le_bytes());
        put(
            0x04,
            &half(self.offered(), state.device_feature_select).to_le_bytes(),
        );
        put(0x08, &state.driver_feature_select.to_le_bytes());
        put(
            0x0c,
            &half(state.driver_features, state.driver_feature_select).to_le_bytes(),
        );
        put(0x10, &self.interrupts.config_vector().to_le_bytes());
        put(0x12, &queue_count.to_le_bytes());
        put(0x14, &[state.status | broken, self.interrupts.generation()]);
        put(0x16, &state.queue_select.to_le_bytes());
        // A queue that does not exist reads as zeroes: size 0 says so, §4.1.4.3.
        if let Some(slot) = state.queues.get(usize::from(state.queue_select)) {
            put(0x18, &slot.setup.size.to_le_bytes());
            put(0x1a, &slot.interrupt.vector().to_le_bytes());
            put(0x1c, &u16::from(slot.setup.enabled).to_le_bytes());
            put(0x1e, &state.queue_select.to_le_bytes());
            put(0x20, &slot.setup.descriptors.to_le_bytes());
            put(0x28, &slot.setup.driver.to_le_bytes());
            put(0x30, &slot.setup.device.to_le_bytes());
        }
        image
    }

    fn common_write(&self, offset: u64, data: &[u8]) {
        let mut state = self.lock();
        let state = &mut *state;
        if state.retired {
            return;
        }
        match (offset, data) {
            (0x00, &[a, b, c, d]) => state.device_feature_select = u32::from_le_bytes([a, b, c, d]),
            (0x08, &[a, b, c, d]) => state.driver_feature_select = u32::from_le_bytes([a, b, c, d]),
            (0x0c, &[a, b, c, d]) => self.accept(state, u32::from_le_bytes([a, b, c, d])),
            (0x10, &[a, b]) => self
                .interrupts
                .set_config_vector(u16::from_le_bytes([a, b])),
            (0x14, &[new]) => self.set_status(state, new),
            (0x16, &[a, b]) => state.queue_select = u16::from_le_bytes([a, b]),
            (0x1a, &[a, b]) => {
                if let Some(slot) = state.queues.get(usize::from(state.queue_select)) {
                    slot.interrupt.set_vector(u16::from_le_bytes([a, b]));
                }
            }
            (0x18 | 0x1c | 0x20..=0x37, data) => self.set_up_queue(state, offset, data),
            _ => self.interrupts.note(&format_args!(
                "write of {} bytes at {offset:#x} of the common configuration ignored",
                data.len()
            )),
        }
    }

    fn accept(&self, state: &mut State, half: u32) {
        if state.status & status::FEATURES_OK != 0 {
            self.interrupts.note(&"features changed after FEATURES_OK");
            return;
        }
        let low = state.driver_features & 0xffff_ffff;
        let high = state.driver_features & !0xffff_ffff;
        match state.driver_feature_select {
            0 => state.driver_features = high | u64::from(half),
            1 => state.driver_features = low | u64::from(half) << 32,
            _ if half == 0 => {}
            select => self
                .interrupts
                .note(&format_args!("features of word {select} do not exist")),
        }
    }

    fn set_up_queue(&self, state: &mut State, offset: u64, data: &[u8]) {
        let allowed = state.status & (status::FEATURES_OK | status::DRIVER_OK);
        if allowed != status::FEATURES_OK {
            self.interrupts
                .note(&"queue set up outside FEATURES_OK..DRIVER_OK");
            return;
        }
        let Some(slot) = state.queues.get_mut(usize::from(state.queue_select)) else {
            return;
        };
        let setup = &mut slot.setup;
        match (offset, data) {
            (0x1c, &[1, 0]) => setup.enabled = true,
            _ if setup.enabled => self.interrupts.note(&"an enabled queue cannot be changed"),
            (0x18, &[a, b]) => {
                let size = u16::from_le_bytes([a, b]);
                if size.is_power_of_two() && size <= slot.max_size {
                    setup.size = size;
                } else {
                    self.interrupts
                        .needs_reset(&format_args!("queue size {size}"));
                }
            }
            (0x20..=0x27, data) => set_part(&mut setup.descriptors, offset - 0x20, data),
            (0x28..=0x2f, data) => set_part(&mut setup.driver, offset - 0x28, data),
            (0x30..=0x37, data) => set_part(&mut setup.device, offset - 0x30, data),
            _ => self
                .interrupts
                .note(&format_args!("odd write at {offset:#x} ignored")),
        }
    }

    fn ring(&self, offset: u64) {
        let queue = usize::try_from(offset / DOORBELL_STRIDE).ok();
        if let Some(doorbell) = queue.and_then(|queue| self.doorbells.get(queue))
            && let Err(error) = doorbell.write(1)
        {
            self.interrupts.note(&format_args!("doorbell: {error}"));
        }
    }

    /// The window of `virtio_pci_cfg_cap`: BAR, offset and length that the driver set, if they make sense.
    fn window(&self, config: &ConfigSpace) -> Option<(u64, usize)> {
        let at = usize::from(self.window_capability);
        let [bar] = config.get::<1>(at + 4);
        let offset = u64::from(u32::from_le_bytes(config.get(at + 8)));
        let size = usize::try_from(u32::from_le_bytes(config.get(at + 12))).ok()?;
        (bar == 0 && matches!(size, 1 | 2 | 4) && offset < BAR_BYTES).then_some((offset, size))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for VirtioPci {
    fn drop(&mut self) {
        self.reset();
    }
}

impl PciDevice for VirtioPci {
    fn config_space(&self) -> ConfigSpace {
        self.config.clone()
    }

    fn bar_read(&self, _bar: usize, offset: u64, data: &mut [u8]) {
        data.fill(0);
        match offset {
            COMMON..ISR => {
                self.common_read(usize::try_from(offset).expect("below 4096"), data);
            }
            ISR => {
                if let Some(first) = data.first_mut() {
                    *first = self.interrupts.take_isr();
                }
            }
            DEVICE..DOORBELLS => self.device.config_read(offset - DEVICE, data),
            MSIX_TABLE..MSIX_PENDING => self.msix.table_read(offset - MSIX_TABLE, data),
            MSIX_PENDING..BAR_BYTES => self.msix.pending_read(offset - MSIX_PENDING, data),
            _ => {}
        }
    }

    fn bar_write(&self, _bar: usize, offset: u64, data: &[u8]) {
        match offset {
            COMMON..ISR => self.common_write(offset, data),
            DEVICE..DOORBELLS => self.device.config_write(offset - DEVICE, data),
            DOORBELLS..MSIX_TABLE => self.ring(offset - DOORBELLS),
            MSIX_TABLE..MSIX_PENDING => self.msix.table_write(offset - MSIX_TABLE, data),
            _ => {}
        }
    }

    fn doorbells(&self) -> Vec<Doorbell> {
        (0u64..)
            .zip(&self.doorbells)
            .filter_map(|(queue, event)| {
                // Without a copy the doorbell works by exits, see `ring`.
                let event = event.try_clone().ok()?;
                Some(Doorbell {
                    bar: 0,
                    offset: DOORBELLS + queue * DOORBELL_STRIDE,
                    event,
                })
            })
            .collect()
    }

    fn before_config_read(&self, config: &mut ConfigSpace, offset: u16, size: usize) {
        if overlaps(offset, size, self.window_capability + 16, 4)
            && let Some((at, width)) = self.window(config)
        {
            let mut data = [0; 4];
            self.bar_read(0, at, &mut data[..width]);
            config.put(usize::from(self.window_capability) + 16, &data);
        }
    }

    fn after_config_write(&self, config: &mut ConfigSpace, offset: u16, size: usize) {
        if overlaps(offset, size, self.msix_capability + 2, 2) {
            let control = config.get(usize::from(self.msix_capability) + 2);
            self.msix.set_control(u16::from_le_bytes(control));
        }
        if overlaps(offset, size, self.window_capability + 16, 4)
            && let Some((at, width)) = self.window(config)
        {
            let data: [u8; 4] = config.get(usize::from(self.window_capability) + 16);
            self.bar_write(0, at, &data[..width]);
        }
    }
}

fn overlaps(offset: u16, size: usize, start: u16, length: u16) -> bool {
    let end = usize::from(offset) + size;
    usize::from(offset) < usize::from(start + length) && end > usize::from(start)
}

/// Replaces 4 or 8 aligned bytes of a 64-bit register.
fn set_part(register: &mut u64, offset: u64, data: &[u8]) {
    let mut bytes = register.to_le_bytes();
    match (offset, data) {
        (0, data @ &[_, _, _, _]) => bytes[..4].copy_from_slice(data),
        (4, data @ &[_, _, _, _]) => bytes[4..].copy_from_slice(data),
        (0, data) if data.len() == 8 => bytes.copy_from_slice(data),
        _ => {}
    }
    *register = u64::from_le_bytes(bytes);
}

/// Configuration space of a virtio function, and where its MSI-X and window capabilities are.
fn config_space(device_id: u16, queue_count: usize, vector_count: u16) -> (ConfigSpace, u16, u16) {
    let mut config = ConfigSpace::new(Identity {
        vendor: VENDOR,
        device: DEVICE_BASE + device_id,
        subsystem_vendor: VENDOR,
        subsystem: DEVICE_BASE + device_id,
        class: class(device_id),
        revision: 1, // Modern devices: 1 or more, §4.1.2.1.
    });
    config.add_bar(Bar {
        index: 0,
        size: BAR_BYTES,
    });
    let low = |value: u64| u32::try_from(value).expect("offsets in our BAR are small");
    let table = low(MSIX_TABLE).to_le_bytes();
    let pending = low(MSIX_PENDING).to_le_bytes();
    let mut body = (vector_count - 1).to_le_bytes().to_vec();
    body.extend(table.into_iter().chain(pending));
    let msix = config.add_capability(&Capability {
        id: CAPABILITY_MSIX,
        body,
        writable: vec![0x00, 0xc0],
    });
    debug_assert!(u64::from(vector_count) * TABLE_ENTRY_BYTES <= MSIX_PENDING - MSIX_TABLE);
    let doorbell_bytes = queue_count as u64 * DOORBELL_STRIDE;
    let stride = low(DOORBELL_STRIDE).to_le_bytes();
    // Structure types of §4.1.4: 1 common, 2 notify, 3 ISR, 4 device.
    for (kind, offset, size, extra) in [
        (1, COMMON, COMMON_BYTES as u64, &[][..]),
        (2, DOORBELLS, doorbell_bytes, &stride[..]),
        (3, ISR, 1, &[][..]),
        (4, DEVICE, DOORBELLS - DEVICE, &[][..]),
    ] {
        config.add_capability(&Capability {
            id: CAPABILITY_VENDOR,
            body: structure(kind, low(offset), low(size), extra),
            writable: Vec::new(),
        });
    }
    // Type 5: access to the BAR through configuration space. BAR, offset, length and data are the driver's.
    let mut writable = vec![0; 18];
    writable[2] = 0xff;
    writable[6..].fill(0xff);
    let window = config.add_capability(&Capability {
        id: CAPABILITY_VENDOR,
        body: structure(5, 0, 0, &[0; 4]),
        writable,
    });
    (config, msix, window)
}

/// `struct virtio_pci_cap` without its first two bytes, and what follows it.
fn structure(kind: u8, offset: u32, size: u32, extra: &[u8]) -> Vec<u8> {
    let length = u8::try_from(16 + extra.len()).expect("at most 20");
    let mut body = vec![length, kind, 0, 0, 0, 0];
    body.extend(offset.to_le_bytes());
    body.extend(size.to_le_bytes());
    body.extend(extra);
    body
}

/// PCI class of a device, so that tools name it well.
fn class(device_id: u16) -> u32 {
    match device_id {
        super::device_id::NET => 0x02_00_00,
        super::device_id::BLOCK => 0x01_80_00,
        super::device_id::CONSOLE => 0x07_80_00,
        _ => 0x00_ff_00,
    }
}

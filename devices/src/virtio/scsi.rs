// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! SCSI host, VIRTIO 1.2 §5.6: one device, many units (`crate::scsi`), which may come and go while it runs.
//!
//! ```text
//! queue 0    control   abort and reset of tasks
//! queue 1    events    a unit came, went, or changed
//! queue 2…   requests  one thread each, with its own queue of every unit's backend
//! ```
//!
//! Every unit is logical unit 0 of a target of its own: target 3 is what PVE calls `scsi3`.

mod control;
mod events;
mod request;
mod requests;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use atoll_disk::BlockBackend;
use atoll_thread::Kind;
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use self::control::Control;
use self::events::{Event, Events, Reporter};
use self::requests::Requests;
use super::worker;
use super::{DeviceQueue, QueueStart, StartError, StartedQueue, VirtioDevice, device_id};
use crate::counters::CounterList;
use crate::scsi::{EjectError, Target, TargetState};
use crate::state::{DeviceState, Saved, SavedState, StateError, same};

/// Entries of each request queue.
const QUEUE_SIZE: u16 = 256;
/// Entries of the control and of the event queue.
const SIDE_QUEUE_SIZE: u16 = 16;
/// Data segments of one request that we tell the driver: request and response need a descriptor each.
const SEGMENTS_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// Sectors of 512 bytes in one request: 32 MiB less one sector.
const SECTORS_MAX: u32 = 0xffff;
/// Requests that a driver may queue for one unit.
const COMMANDS_MAX: u32 = 128;
/// Highest target number, told as `max_target`; a target is one byte of a request's `lun` (VIRTIO 1.2 §5.6.4,
/// §5.6.6.1).
pub const TARGET_MAX: u8 = 254;
/// A unit may come and go (§5.6.3).
const F_HOTPLUG: u64 = 1 << 1;
/// A unit may tell that it has changed.
const F_CHANGE: u64 = 1 << 2;
const CONTROL_QUEUE: u16 = 0;
const EVENT_QUEUE: u16 = 1;
/// First request queue.
const REQUEST_QUEUES: u16 = 2;

/// The units by target number, shared with the queues.
type Targets = Arc<Mutex<BTreeMap<u8, Arc<Target>>>>;

/// What a controller is made of, by the VMM; units may come and go afterwards.
pub struct ScsiOptions {
    /// Name of the controller in logs and thread names: `scsi`.
    pub name: String,
    /// Request queues, at least 1 (0 counts as 1), beside the control and the event queue, §5.6.2.
    pub queue_count: u16,
    /// The units that it starts with, by target number, up to [`TARGET_MAX`]; each is LUN 0 of its target.
    pub targets: BTreeMap<u8, Arc<Target>>,
}

/// The SCSI host, VIRTIO 1.2 §5.6: one channel, a unit a target, a thread a request queue.
pub struct Scsi {
    name: String,
    queue_count: u16,
    // Leaf lock, held to look one up.
    targets: Targets,
    events: Events,
    /// An edge of it lets every request queue close what has gone.
    look: Arc<EventFd>,
}

impl Scsi {
    /// A controller with its units. Fails where the host gives no eventfd.
    pub fn new(options: ScsiOptions) -> std::io::Result<Self> {
        Ok(Self {
            name: options.name,
            queue_count: options.queue_count.max(1),
            targets: Arc::new(Mutex::new(options.targets)),
            events: Events::new()?,
            look: Arc::new(EventFd::new(EFD_NONBLOCK)?),
        })
    }

    /// Adds a unit to the running machine, and tells the driver. The target must be free.
    pub fn plug(&self, number: u8, target: Arc<Target>) {
        let before = locked(&self.targets).insert(number, target);
        assert!(
            before.is_none(),
            "the caller has looked whether the target is free"
        );
        self.events.report(Event::added(number));
    }

    /// Takes a unit away, and tells the driver. Requests in flight end first, on their own threads.
    pub fn unplug(&self, number: u8) -> Option<Arc<Target>> {
        let target = locked(&self.targets).remove(&number)?;
        self.events.report(Event::removed(number));
        self.let_go();
        Some(target)
    }

    /// A disk has another size: tells the driver, beside the unit's own attention.
    pub fn resized(&self, number: u8, target: &Target) {
        target.resized();
        self.events.report(Event::capacity_changed(number));
    }

    /// Takes the medium out of a drive; `force` also when the guest has locked it in.
    pub fn eject(&self, target: &Target, force: bool) -> Result<(), EjectError> {
        target.eject(force)?;
        self.let_go();
        Ok(())
    }

    /// Puts a medium into a drive; the one that is there is taken out.
    pub fn insert(
        &self,
        target: &Target,
        medium: Arc<dyn BlockBackend>,
        force: bool,
    ) -> Result<(), EjectError> {
        target.insert(medium, force)?;
        self.let_go();
        Ok(())
    }

    fn let_go(&self) {
        // Fails only when its counter is full; the edge is there all the same.
        let _ = self.look.write(1);
    }

    pub(crate) fn requests(&self, queue: &DeviceQueue) -> std::io::Result<Requests> {
        Requests::new(self.targets.clone(), self.look.clone(), queue.size())
    }

    /// `struct virtio_scsi_config`, §5.6.4.
    fn config(&self) -> [u8; 36] {
        let mut config = [0; 36];
        let words = [
            u32::from(self.queue_count),
            SEGMENTS_MAX,
            SECTORS_MAX,
            COMMANDS_MAX,
            u32::try_from(events::EVENT_BYTES).expect("16"),
            u32::try_from(request::SENSE_BYTES).expect("96"),
            u32::try_from(crate::scsi::CDB_BYTES).expect("32"),
        ];
        for (at, word) in words.iter().enumerate() {
            config[at * 4..at * 4 + 4].copy_from_slice(&word.to_le_bytes());
        }
        // Channel 0; targets; units are numbered 0.
        config[30..32].copy_from_slice(&u16::from(TARGET_MAX).to_le_bytes());
        config
    }
}

fn locked(targets: &Targets) -> std::sync::MutexGuard<'_, BTreeMap<u8, Arc<Target>>> {
    targets.lock().unwrap_or_else(PoisonError::into_inner)
}

impl VirtioDevice for Scsi {
    fn device_id(&self) -> u16 {
        device_id::SCSI
    }

    fn features(&self) -> u64 {
        F_HOTPLUG | F_CHANGE
    }

    fn queue_sizes(&self) -> Vec<u16> {
        let mut sizes = vec![SIDE_QUEUE_SIZE; REQUEST_QUEUES.into()];
        sizes.extend(vec![QUEUE_SIZE; self.queue_count.into()]);
        sizes
    }

    /// The sizes of command and sense data are fixed: what a driver writes there it does not read back.
    fn config_read(&self, offset: u64, data: &mut [u8]) {
        super::read_config(&self.config(), offset, data);
    }

    fn start_queue(&self, start: QueueStart) -> Result<Box<dyn StartedQueue>, StartError> {
        let index = start.index;
        let name = format!("{}-q{index}", self.name);
        match index {
            CONTROL_QUEUE => {
                let handler = Control::new(self.targets.clone());
                worker::spawn(Kind::Queue, &name, start, Box::new(handler))
            }
            EVENT_QUEUE => {
                let reporter: Reporter = self.events.reporter();
                worker::spawn(Kind::Queue, &name, start, Box::new(reporter))
            }
            _ => {
                let handler = self
                    .requests(&start.queue)
                    .map_err(|source| StartError { index, source })?;
                worker::spawn(Kind::Disk, &name, start, Box::new(handler))
            }
        }
    }

    /// No tray is locked then: who locked it cannot unlock it any more.
    fn reset(&self) {
        self.events.forget();
        let targets = locked(&self.targets);
        targets.values().for_each(|target| target.unlock());
    }

    fn counters(&self) -> CounterList {
        Vec::new() // Each unit has its own.
    }
}

/// What the guest has seen of the controller and its units, beside the transport.
#[derive(Serialize, Deserialize)]
struct ScsiState {
    targets: BTreeMap<u8, TargetState>,
    events: Vec<Event>,
    events_missed: bool,
}

impl SavedState for ScsiState {
    const KIND: &'static str = "virtio-scsi";
    const VERSION: u32 = 1;
}

impl DeviceState for Scsi {
    fn save(&self) -> Saved {
        let targets = locked(&self.targets);
        let (events, events_missed) = self.events.save();
        Saved::of(&ScsiState {
            targets: targets
                .iter()
                .map(|(number, target)| (*number, target.save()))
                .collect(),
            events,
            events_missed,
        })
    }

    fn restore(&self, saved: &Saved) -> Result<(), StateError> {
        let state: ScsiState = saved.open()?;
        let targets = locked(&self.targets);
        let numbers = |keys: Vec<&u8>| format!("{keys:?}");
        let (there, here) = (
            numbers(state.targets.keys().collect()),
            numbers(targets.keys().collect()),
        );
        same::<ScsiState, _>("the list of SCSI targets", there, here)?;
        for (target, state) in targets.values().zip(state.targets.values()) {
            target.restore(state);
            let size = |size: Option<u64>| size.unwrap_or(0);
            let (there, here) = (size(state.size_bytes), size(target.save().size_bytes));
            same::<ScsiState, _>("the size in bytes of a SCSI unit", there, here)?;
        }
        self.events.restore(state.events, state.events_missed);
        Ok(())
    }
}

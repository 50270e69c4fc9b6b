// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! One logical unit: what is in it, and what a command to it amounts to.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use atoll_disk::{BlockBackend, Operation, Space};
use serde::{Deserialize, Serialize};

use super::command::{Command, WriteSame};
use super::pages::{Medium, Unit, event_status};
use super::{Sense, pages};
use crate::counters::DiskCounters;

/// Block of a CD-ROM.
const CDROM_BLOCK_BYTES: u32 = 2048;
/// Attentions that wait to be told; the oldest of more is forgotten.
const ATTENTIONS_MAX: usize = 4;
/// Most that WRITE SAME of other data than zeroes writes: it is memory of ours, of each command that waits.
const PATTERN_BYTES_MAX: u64 = 64 << 10;
/// Bytes of an UNMAP parameter list with its one descriptor. SBC-3 §5.28.
const UNMAP_LIST_BYTES: usize = 24;

/// What a unit is to its driver: its peripheral device type and its commands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TargetKind {
    /// A disk.
    Disk,
    /// A drive for read-only discs that come and go.
    Cdrom,
}

/// What a unit is made of: its medium, what it says that it is, and what it may be asked for.
pub struct TargetOptions {
    /// What the unit is; for good.
    pub kind: TargetKind,
    /// What the guest reads as its serial number, at most 64 bytes of it.
    pub serial: String,
    /// What is in it; only a drive can be empty.
    pub medium: Option<Arc<dyn BlockBackend>>,
}

/// A logical unit, shared by the queues of its controller.
pub struct Target {
    kind: TargetKind,
    serial: String,
    counters: Arc<DiskCounters>,
    /// What the driver is told: each write is durable when it completes. For good, since drivers ask once.
    writes_through: AtomicBool,
    /// Requests that the backend has, of all queues.
    in_flight: AtomicUsize,
    // Leaf lock, held for one command's decision, and by whoever changes the medium.
    state: Mutex<State>,
}

struct State {
    medium: Option<Arc<dyn BlockBackend>>,
    /// Changes with the medium: queues opened before are of another one.
    generation: u64,
    attentions: VecDeque<Sense>,
    /// The guest has locked the tray.
    locked: bool,
    tray_open: bool,
    /// Of GET EVENT STATUS: what happened last and was not asked for; 0 is nothing.
    event: u8,
}

/// The saved form of a unit: what the guest has done to it and not yet been told, not its medium's content.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TargetState {
    /// Size of the medium; absent when there is none.
    pub size_bytes: Option<u64>,
    attentions: Vec<Sense>,
    locked: bool,
    tray_open: bool,
    event: u8,
    /// Not so in a state that was saved before drivers were told.
    #[serde(default)]
    writes_through: bool,
}

/// The guest does not let the medium out.
#[derive(Debug, thiserror::Error)]
pub enum EjectError {
    /// The tray is locked.
    #[error(
        "the guest has locked the tray and is asked to open it: try again once it has, or force it"
    )]
    Locked,
    /// Only a drive ejects.
    #[error("a disk cannot be ejected, only the medium of a cdrom")]
    NotADrive,
}

/// What a command amounts to: an answer that is complete, or work for the unit's backend. Decided without touching the
/// medium.
#[derive(Debug)]
pub enum Act {
    /// It is done; this goes to the guest, as much as fits.
    Answer(Vec<u8>),
    /// It failed.
    Fail(Sense),
    /// The backend has to do it.
    Disk {
        /// What.
        operation: Operation,
        /// From this byte on.
        offset_bytes: u64,
        /// Bytes of a read or write.
        length_bytes: u64,
        /// The write must be durable before it completes.
        durable: bool,
    },
    /// The backend has to write this.
    Pattern {
        /// From this byte on.
        offset_bytes: u64,
        /// The data.
        data: Vec<u8>,
    },
}

fn answer(data: Vec<u8>, allocation: usize) -> Act {
    let mut data = data;
    data.truncate(allocation);
    Act::Answer(data)
}

const DONE: Act = Act::Answer(Vec::new());

impl Target {
    /// A unit as after power-on: its medium in, the tray closed and not locked, nothing to tell.
    pub fn new(options: TargetOptions) -> Self {
        let medium = options.medium.as_ref();
        let writes_through = medium.is_some_and(|medium| medium.is_synchronous());
        Self {
            kind: options.kind,
            writes_through: AtomicBool::new(writes_through),
            serial: options.serial,
            counters: Arc::default(),
            in_flight: AtomicUsize::new(0),
            state: Mutex::new(State {
                medium: options.medium,
                generation: 0,
                attentions: VecDeque::new(),
                locked: false,
                tray_open: false,
                event: 0,
            }),
        }
    }

    /// What the unit is, as in [`TargetOptions::kind`].
    pub fn kind(&self) -> TargetKind {
        self.kind
    }

    /// What it has done since it was made, for metrics.
    pub fn counters(&self) -> &Arc<DiskCounters> {
        &self.counters
    }

    /// A request goes to the backend.
    pub(crate) fn enter(&self) {
        self.in_flight.fetch_add(1, Ordering::AcqRel);
    }

    /// A request has come back.
    pub(crate) fn leave(&self) {
        self.in_flight.fetch_sub(1, Ordering::AcqRel);
    }

    /// Requests that the backend has.
    pub(crate) fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::Acquire)
    }

    /// What is in it, and the number of that: another number is another medium.
    pub fn medium(&self) -> (u64, Option<Arc<dyn BlockBackend>>) {
        let state = self.lock();
        (state.generation, state.medium.clone())
    }

    /// The disk has another size: to be told with the next command.
    pub fn resized(&self) {
        self.lock().attend(Sense::CAPACITY_CHANGED);
    }

    /// The unit was reset by its driver.
    pub fn reset(&self) {
        let mut state = self.lock();
        state.locked = false;
        state.attentions.clear();
        state.attend(Sense::RESET);
    }

    /// The medium may be taken out again.
    pub(crate) fn unlock(&self) {
        self.lock().locked = false;
    }

    /// Takes the medium out of a drive; `force` also when the guest has locked it in. Else a guest that has is asked
    /// for it, as by the drive's button: it hears so when it next asks what happened.
    pub fn eject(&self, force: bool) -> Result<(), EjectError> {
        let mut state = self.lock();
        match self.kind {
            TargetKind::Disk => Err(EjectError::NotADrive),
            TargetKind::Cdrom if state.locked && !force => {
                state.event = pages::EJECT_REQUEST;
                Err(EjectError::Locked)
            }
            TargetKind::Cdrom => {
                state.take_out();
                Ok(())
            }
        }
    }

    /// Puts a medium into a drive; the one that is there is taken out.
    pub fn insert(&self, medium: Arc<dyn BlockBackend>, force: bool) -> Result<(), EjectError> {
        self.eject(force)?;
        let mut state = self.lock();
        state.medium = Some(medium);
        state.generation += 1;
        state.tray_open = false;
        state.event = pages::NEW_MEDIUM;
        state.attend(Sense::MEDIUM_CHANGED);
        Ok(())
    }

    /// Takes the unit's state out. The machine is paused: no request is with the backend.
    pub fn save(&self) -> TargetState {
        let state = self.lock();
        let size = state.medium.as_ref().map(|medium| medium.geometry());
        TargetState {
            size_bytes: size.map(|geometry| geometry.size_bytes),
            attentions: state.attentions.iter().copied().collect(),
            locked: state.locked,
            tray_open: state.tray_open,
            event: state.event,
            writes_through: self.writes_through(),
        }
    }

    /// Puts a state back. A drive that was empty is: whoever built this one may not know yet that the guest has taken the
    /// disc out. Otherwise the caller compares the sizes.
    pub fn restore(&self, saved: &TargetState) {
        let mut state = self.lock();
        if self.kind == TargetKind::Cdrom && saved.size_bytes.is_none() {
            state.medium = None;
        }
        state.attentions = saved.attentions.iter().copied().collect();
        state.locked = saved.locked;
        state.tray_open = saved.tray_open;
        state.event = saved.event;
        let writes_through = saved.writes_through;
        self.writes_through.store(writes_through, Ordering::Release);
    }

    /// Whether the driver relies on each write to be durable when it completes.
    pub(crate) fn writes_through(&self) -> bool {
        self.writes_through.load(Ordering::Acquire)
    }

    /// Decides what a command amounts to. `parameters` gives the data that comes with it, as much as there is.
    pub fn decide(
        &self,
        cdb: &[u8; super::command::CDB_BYTES],
        parameters: impl FnOnce(&mut [u8]) -> usize,
    ) -> Act {
        let mut state = self.lock();
        let command = match Command::parse(cdb) {
            Ok(command) => command,
            Err(sense) => return Act::Fail(sense),
        };
        let unit = Unit {
            kind: self.kind,
            serial: &self.serial,
            write_cache: !self.writes_through(),
            medium: state.shape(self.kind),
        };
        // These tell of the unit itself, whatever is in it, and leave attentions waiting. SPC-4 §5.14.
        match command {
            Command::Inquiry { page, allocation } => {
                let data = match page {
                    None => Some(unit.identity()),
                    Some(page) => unit.vital(page),
                };
                return data.map_or(Act::Fail(Sense::INVALID_FIELD), |data| {
                    answer(data, allocation)
                });
            }
            Command::ReportLuns { allocation } => return answer(one_lun(), allocation),
            Command::RequestSense { allocation } => {
                let sense = state.attentions.pop_front().unwrap_or(Sense::NONE);
                return answer(sense.bytes().to_vec(), allocation);
            }
            _ => {}
        }
        if let Some(attention) = state.attentions.pop_front() {
            return Act::Fail(attention);
        }
        match self.kind {
            TargetKind::Cdrom => drive(&mut state, &unit, command),
            TargetKind::Disk => None,
        }
        .unwrap_or_else(|| medium(&unit, command, parameters))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn attend(&mut self, sense: Sense) {
        if self.attentions.len() == ATTENTIONS_MAX {
            self.attentions.pop_front();
        }
        self.attentions.push_back(sense);
    }

    fn take_out(&mut self) {
        self.medium = None;
        self.generation += 1;
        self.locked = false;
        self.tray_open = true;
        self.event = pages::MEDIUM_REMOVED;
    }

    fn shape(&self, kind: TargetKind) -> Option<Medium> {
        let backend = self.medium.as_ref()?;
        let (geometry, abilities) = (backend.geometry(), backend.abilities());
        let block_bytes = match kind {
            TargetKind::Disk => abilities.block_bytes,
            TargetKind::Cdrom => CDROM_BLOCK_BYTES,
        };
        let read_only = geometry.read_only || kind == TargetKind::Cdrom;
        let block_count = geometry.size_bytes / u64::from(block_bytes);
        // A disc smaller than one of its blocks is none.
        (block_count > 0).then_some(Medium {
            block_bytes,
            block_count,
            read_only,
            unmap_blocks: abilities
                .discard_bytes
                .filter(|_| !read_only)
                .map(|bytes| (bytes / block_bytes).max(1)),
            range_blocks_max: abilities.range_bytes_max / block_bytes,
        })
    }
}

/// Target 0's only unit is number 0. SPC-4 §6.33.
fn one_lun() -> Vec<u8> {
    let mut data = vec![0; 16];
    data[3] = 8;
    data
}

/// Commands that only drives have.
fn drive(state: &mut State, unit: &Unit<'_>, command: Command) -> Option<Act> {
    Some(match command {
        Command::StartStop {
            start: false,
            load_eject: true,
        } => {
            if state.locked {
                return Some(Act::Fail(Sense::REMOVAL_PREVENTED));
            }
            state.take_out();
            DONE
        }
        Command::StartStop { load_eject, .. } => {
            state.tray_open &= !load_eject;
            DONE
        }
        Command::PreventRemoval { prevent } => {
            state.locked = prevent;
            DONE
        }
        Command::GetConfiguration { allocation } => answer(unit.configuration(), allocation),
        Command::GetEventStatus {
            classes,
            allocation,
        } => {
            let event = std::mem::take(&mut state.event);
            let has_medium = unit.medium.is_some();
            let data = event_status(classes, event, has_medium, state.tray_open);
            answer(data, allocation)
        }
        Command::ReadToc { toc, allocation } => match unit.medium {
            None => Act::Fail(Sense::NO_MEDIUM),
            Some(medium) => unit
                .toc(toc, medium)
                .map_or(Act::Fail(Sense::INVALID_FIELD), |data| {
                    answer(data, allocation)
                }),
        },
        _ => return None,
    })
}

/// Commands that need a medium.
fn medium(unit: &Unit<'_>, command: Command, parameters: impl FnOnce(&mut [u8]) -> usize) -> Act {
    if let Command::ModeSense { mode, allocation } = command {
        return unit
            .mode(mode)
            .map_or(Act::Fail(Sense::INVALID_FIELD), |data| {
                answer(data, allocation)
            });
    }
    let Some(medium) = unit.medium else {
        return Act::Fail(Sense::NO_MEDIUM);
    };
    match command {
        Command::TestUnitReady | Command::StartStop { .. } => DONE,
        Command::PreventRemoval { .. } => DONE,
        Command::ReadCapacity10 => Act::Answer(unit.capacity10(medium)),
        Command::ReadCapacity16 { allocation } => answer(unit.capacity16(medium), allocation),
        Command::Read { block, count } => medium.transfer(Operation::Read, block, count, false),
        Command::Verify { block, count } => match medium.range(block, count) {
            Ok(_) => DONE,
            Err(sense) => Act::Fail(sense),
        },
        Command::Synchronize => Act::Disk {
            operation: Operation::Flush,
            offset_bytes: 0,
            length_bytes: 0,
            durable: false,
        },
        Command::Write { .. } | Command::WriteSame(_) | Command::Unmap { .. }
            if unit.kind == TargetKind::Cdrom =>
        {
            Act::Fail(Sense::INVALID_OPCODE)
        }
        Command::Write { .. } | Command::WriteSame(_) | Command::Unmap { .. }
            if medium.read_only =>
        {
            Act::Fail(Sense::WRITE_PROTECTED)
        }
        Command::Write {
            block,
            count,
            durable,
        } => medium.transfer(Operation::Write, block, count, durable),
        Command::WriteSame(fields) => medium.write_same(fields, parameters),
        Command::Unmap { list_bytes } => medium.unmap(list_bytes, parameters),
        _ => Act::Fail(Sense::INVALID_OPCODE),
    }
}

impl pages::Medium {
    /// Offset and length in bytes of blocks that exist.
    fn range(&self, block: u64, count: u32) -> Result<(u64, u64), Sense> {
        let end = block.checked_add(count.into());
        if end.is_none_or(|end| end > self.block_count) {
            return Err(Sense::OUT_OF_RANGE);
        }
        let bytes = u64::from(self.block_bytes);
        Ok((block * bytes, u64::from(count) * bytes))
    }

    fn transfer(&self, operation: Operation, block: u64, count: u32, durable: bool) -> Act {
        match self.range(block, count) {
            Err(sense) => Act::Fail(sense),
            Ok((_, 0)) => DONE,
            Ok((offset_bytes, length_bytes)) => Act::Disk {
                operation,
                offset_bytes,
                length_bytes,
                durable,
            },
        }
    }

    /// A range to be zeroed or discarded.
    fn ranged(&self, offset_bytes: u64, operation: Operation) -> Act {
        Act::Disk {
            operation,
            offset_bytes,
            length_bytes: 0,
            durable: false,
        }
    }

    fn write_same(&self, fields: WriteSame, data: impl FnOnce(&mut [u8]) -> usize) -> Act {
        // 0 would mean "to the end", which the limits that we tell forbid.
        if fields.count == 0 || fields.count > self.range_blocks_max {
            return Act::Fail(Sense::INVALID_FIELD);
        }
        let (offset_bytes, length_bytes) = match self.range(fields.block, fields.count) {
            Ok(range) => range,
            Err(sense) => return Act::Fail(sense),
        };
        let size = usize::try_from(self.block_bytes).expect("64-bit host");
        let mut block = vec![0; size];
        if !fields.no_data && data(&mut block) != size {
            return Act::Fail(Sense::PARAMETER_LIST_LENGTH);
        }
        if block.iter().all(|byte| *byte == 0) {
            let space = match fields.unmap {
                true => Space::Free,
                false => Space::Keep,
            };
            let operation = Operation::WriteZeroes {
                length_bytes,
                space,
            };
            return self.ranged(offset_bytes, operation);
        }
        if length_bytes > PATTERN_BYTES_MAX {
            return Act::Fail(Sense::INVALID_FIELD);
        }
        Act::Pattern {
            offset_bytes,
            data: block.repeat(usize::try_from(fields.count).expect("64-bit host")),
        }
    }

    fn unmap(&self, list_bytes: usize, data: impl FnOnce(&mut [u8]) -> usize) -> Act {
        if list_bytes == 0 {
            return DONE;
        }
        let mut list = [0; UNMAP_LIST_BYTES];
        if self.unmap_blocks.is_none() {
            return Act::Fail(Sense::INVALID_OPCODE);
        }
        if list_bytes < 8 || data(&mut list) < list_bytes.min(UNMAP_LIST_BYTES) {
            return Act::Fail(Sense::PARAMETER_LIST_LENGTH);
        }
        let descriptors = u16::from_be_bytes([list[2], list[3]]);
        let part = |at: usize| u32::from_be_bytes(list[at..at + 4].try_into().expect("4 bytes"));
        let (block, count) = (u64::from(part(8)) << 32 | u64::from(part(12)), part(16));
        match descriptors {
            0 => return DONE,
            16 if list_bytes >= UNMAP_LIST_BYTES && count <= self.range_blocks_max => {}
            _ => return Act::Fail(Sense::INVALID_PARAMETER),
        }
        match self.range(block, count) {
            Err(sense) => Act::Fail(sense),
            Ok((_, 0)) => DONE,
            Ok((offset_bytes, length_bytes)) => {
                self.ranged(offset_bytes, Operation::Discard { length_bytes })
            }
        }
    }
}

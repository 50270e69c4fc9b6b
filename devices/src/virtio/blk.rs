// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Block device, VIRTIO 1.2 §5.2: several queues, each with its own thread and its own queue of the backend.
//!
//! A chain is parsed once into a [`request::Request`]; its data goes between guest pages and the backend without
//! a copy. A request in flight has a slot of its own: the driver's head index, which it may use twice, selects
//! nothing.

pub mod request;

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use atoll_disk::{
    Abilities, BlockBackend, BlockQueue, Completion, Operation, SECTOR_BYTES, Segments,
};
use atoll_thread::Kind;
use rustix::event::{PollFd, PollFlags, poll};
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_WRITE_ZEROES,
};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::epoll::EventSet;

use self::request::{Action, Request, Status};
use super::worker::{self, Progress, QueueHandler};
use super::{
    Chain, DeviceInterrupts, DeviceQueue, GuestBuffers, QueueError, QueueStart, Segment,
    StartError, StartedQueue, VirtioDevice, device_id,
};
use crate::counters::{CounterList, DiskCounters};
use crate::memory::{self, Ram};
use crate::state::{DeviceState, Saved, SavedState, StateError, same};

/// Entries of each queue.
const QUEUE_SIZE: u16 = 256;
/// A thread that has nothing to do looks out for the next chain so long before it sleeps, if the last lull was short.
/// A driver need not ring then, and nobody has to be woken: on either side that takes longer than a cached request.
/// Of the order of QEMU's `poll-max-ns`, and a quarter of KVM's `halt_poll_ns`.
const LINGER: Duration = Duration::from_micros(50);
/// Data segments of one request that we tell the driver: a queue without indirect tables also needs a descriptor
/// for header and status each.
const SEGMENTS_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// [`SECTOR_BYTES`] for 32-bit fields.
const SECTOR_BYTES_U32: u32 = 512;
/// Offset of `writeback` in the configuration, §5.2.4: 1 where a write may be lost until a flush.
const WRITEBACK: usize = 32;
/// Bytes of the identification that VIRTIO_BLK_T_GET_ID returns, padded with zeroes, VIRTIO 1.2 §5.2.6.
pub const SERIAL_BYTES: usize = 20;

/// What a disk is made of, by the VMM: a backend that is open already, and how the guest sees it.
pub struct BlkOptions {
    /// Name of the disk in logs, and of its threads with the queue's number behind it: `disk0`, `disk0-q0`.
    pub name: String,
    /// The opened disk, which every queue opens a queue of its own of when the driver starts it.
    pub backend: Arc<dyn BlockBackend>,
    /// Identification that the guest reads, cut to [`SERIAL_BYTES`].
    pub serial: String,
    /// Virtqueues, at least 1 (0 counts as 1). More than one is offered to the driver as VIRTIO_BLK_F_MQ.
    pub queue_count: u16,
}

/// The virtio disk, VIRTIO 1.2 §5.2: one thread a queue, which parses requests and gives them to its own [`BlockQueue`]
/// of the backend.
pub struct Blk {
    name: String,
    backend: Arc<dyn BlockBackend>,
    serial: [u8; SERIAL_BYTES],
    queue_count: u16,
    /// `writeback` of the configuration: what the host does, until a driver says what it wants.
    writeback: Arc<AtomicBool>,
    counters: Arc<DiskCounters>,
    interrupts: OnceLock<DeviceInterrupts>,
}

impl Blk {
    /// A disk on `options.backend`. Opens nothing: each queue opens its own when the driver starts it.
    pub fn new(options: BlkOptions) -> Self {
        let mut serial = [0; SERIAL_BYTES];
        for (to, from) in serial.iter_mut().zip(options.serial.bytes()) {
            *to = from;
        }
        let writeback = !options.backend.is_synchronous();
        Self {
            name: options.name,
            backend: options.backend,
            writeback: Arc::new(AtomicBool::new(writeback)),
            serial,
            queue_count: options.queue_count.max(1),
            counters: Arc::default(),
            interrupts: OnceLock::new(),
        }
    }

    /// What serves `queue`; opens the backend's queue.
    pub(crate) fn handler(&self, queue: &DeviceQueue, features: u64) -> io::Result<Handler> {
        let size = queue.size();
        Ok(Handler {
            disk: self.backend.open_queue(size)?,
            slots: (0..size).map(|_| None).collect(),
            free: (0..usize::from(size)).rev().collect(),
            spare: Vec::with_capacity(size.into()),
            done: Vec::with_capacity(size.into()),
            lull: Lull::default(),
            chain: Chain::new(),
            serial: self.serial,
            is_synchronous: self.backend.is_synchronous(),
            writeback: self.writeback.clone(),
            features,
            abilities: self.backend.abilities(),
            counters: self.counters.clone(),
        })
    }

    /// The backend has another size now: tells the driver.
    pub fn resized(&self) {
        if let Some(interrupts) = self.interrupts.get() {
            interrupts.config_changed();
        }
    }

    /// `struct virtio_blk_config` up to `write_zeroes_may_unmap`, §5.2.4.
    fn config(&self) -> [u8; 57] {
        let mut config = [0; 57];
        let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        let abilities = self.backend.abilities();
        let sectors = |bytes: u32| (bytes / SECTOR_BYTES_U32).to_le_bytes();
        put(
            0,
            &(self.backend.geometry().size_bytes / SECTOR_BYTES).to_le_bytes(),
        );
        put(12, &SEGMENTS_MAX.to_le_bytes());
        put(20, &abilities.block_bytes.to_le_bytes());
        put(
            WRITEBACK,
            &[u8::from(self.writeback.load(Ordering::Acquire))],
        );
        put(34, &self.queue_count.to_le_bytes());
        if let Some(unit) = abilities.discard_bytes {
            put(36, &sectors(abilities.range_bytes_max));
            put(40, &1_u32.to_le_bytes());
            put(44, &sectors(unit));
        }
        if abilities.write_zeroes {
            put(48, &sectors(abilities.range_bytes_max));
            put(52, &1_u32.to_le_bytes());
            put(56, &[u8::from(abilities.discard_bytes.is_some())]);
        }
        config
    }

    /// Whether a driver that accepted `features` may ask for this range.
    fn takes(abilities: Abilities, features: u64, operation: Operation) -> Result<(), Status> {
        let (feature, length_bytes) = match operation {
            Operation::Discard { length_bytes } => (VIRTIO_BLK_F_DISCARD, length_bytes),
            Operation::WriteZeroes { length_bytes, .. } => {
                (VIRTIO_BLK_F_WRITE_ZEROES, length_bytes)
            }
            _ => return Ok(()),
        };
        match () {
            () if features & 1 << feature == 0 => Err(Status::Unsupported),
            () if length_bytes > abilities.range_bytes_max.into() => Err(Status::IoError),
            () => Ok(()),
        }
    }
}

impl VirtioDevice for Blk {
    fn device_id(&self) -> u16 {
        device_id::BLOCK
    }

    fn features(&self) -> u64 {
        let read_only = u64::from(self.backend.geometry().read_only);
        let abilities = self.backend.abilities();
        let discard = u64::from(abilities.discard_bytes.is_some() && read_only == 0);
        let write_zeroes = u64::from(abilities.write_zeroes && read_only == 0);
        1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_BLK_SIZE
            | 1 << VIRTIO_BLK_F_FLUSH
            | 1 << VIRTIO_BLK_F_CONFIG_WCE
            | 1 << VIRTIO_BLK_F_MQ
            | read_only << VIRTIO_BLK_F_RO
            | discard << VIRTIO_BLK_F_DISCARD
            | write_zeroes << VIRTIO_BLK_F_WRITE_ZEROES
    }

    fn connect(&self, interrupts: DeviceInterrupts) {
        // The transport has one set of them for as long as it lives.
        let _ = self.interrupts.set(interrupts);
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; usize::from(self.queue_count)]
    }

    fn config_read(&self, offset: u64, data: &mut [u8]) {
        super::read_config(&self.config(), offset, data);
    }

    /// Only `writeback` can be written.
    fn config_write(&self, offset: u64, data: &[u8]) {
        let offset = usize::try_from(offset).ok();
        let at = offset.and_then(|offset| WRITEBACK.checked_sub(offset));
        if let Some(value) = at.and_then(|at| data.get(at)) {
            self.writeback.store(*value != 0, Ordering::Release);
        }
    }

    fn reset(&self) {
        let writeback = !self.backend.is_synchronous();
        self.writeback.store(writeback, Ordering::Release);
    }

    fn start_queue(&self, start: QueueStart) -> Result<Box<dyn StartedQueue>, StartError> {
        let index = start.index;
        let handler = self
            .handler(&start.queue, start.features)
            .map_err(|source| StartError { index, source })?;
        let name = format!("{}-q{index}", self.name);
        worker::spawn(Kind::Disk, &name, start, Box::new(handler))
    }

    fn counters(&self) -> CounterList {
        self.counters.list()
    }
}

/// What the guest has seen of the disk, beside the transport.
#[derive(Serialize, Deserialize)]
struct BlkState {
    size_bytes: u64,
    /// Absent in a state that was saved before drivers were told.
    #[serde(default)]
    writeback: Option<bool>,
}

impl SavedState for BlkState {
    const KIND: &'static str = "virtio-blk";
    const VERSION: u32 = 1;
}

impl DeviceState for Blk {
    fn save(&self) -> Saved {
        let size_bytes = self.backend.geometry().size_bytes;
        let writeback = Some(self.writeback.load(Ordering::Acquire));
        Saved::of(&BlkState {
            size_bytes,
            writeback,
        })
    }

    fn restore(&self, saved: &Saved) -> Result<(), StateError> {
        let state: BlkState = saved.open()?;
        let now = self.backend.geometry().size_bytes;
        same::<BlkState, _>("the disk's size in bytes", state.size_bytes, now)?;
        if let Some(writeback) = state.writeback {
            self.writeback.store(writeback, Ordering::Release);
        }
        Ok(())
    }
}

/// A request that the backend has.
struct Slot {
    head: u16,
    status: u64,
    /// Bytes that go into the used ring when it succeeds, without the status byte.
    written: u32,
    operation: Operation,
    /// Keeps the data's pages mapped.
    ram: Arc<Ram>,
    /// What a read fills, for the log of written pages.
    filled: Vec<Segment>,
}

/// A time without any request.
#[derive(Default)]
struct Lull {
    since: Option<Instant>,
    /// The last one was not much longer than [`LINGER`], with what a wake-up takes: the next one may be as short.
    was_short: bool,
}

impl Lull {
    fn begin(&mut self) -> Instant {
        *self.since.insert(Instant::now())
    }

    fn end(&mut self) {
        if let Some(since) = self.since.take() {
            self.was_short = since.elapsed() < 2 * LINGER;
        }
    }
}

pub(crate) struct Handler {
    disk: Box<dyn BlockQueue>,
    /// A slot's index is the request's token.
    slots: Vec<Option<Slot>>,
    free: Vec<usize>,
    /// Lists of segments to use again.
    spare: Vec<Segments>,
    done: Vec<Completion>,
    lull: Lull,
    chain: Chain,
    serial: [u8; SERIAL_BYTES],
    is_synchronous: bool,
    writeback: Arc<AtomicBool>,
    features: u64,
    abilities: Abilities,
    counters: Arc<DiskCounters>,
}

impl QueueHandler for Handler {
    fn sources(&self) -> Vec<(RawFd, EventSet)> {
        let fds = [Some(self.disk.completion_fd()), self.disk.timer_fd()];
        let fds = fds.into_iter().flatten();
        fds.map(|fd| (fd.as_raw_fd(), EventSet::IN)).collect()
    }

    fn process(&mut self, queue: &mut DeviceQueue) -> Result<Progress, QueueError> {
        self.lull.end();
        queue.disable_doorbell()?;
        if !self.disk.is_ready() {
            self.finish(queue)?; // For the room; of those that are ready, one batch a turn, below.
        }
        let mut emptied = false;
        for _ in 0..queue.size() {
            if self.free.is_empty() {
                break;
            }
            if !queue.pop(&mut self.chain)? {
                emptied = true;
                break;
            }
            self.begin(queue)?;
        }
        self.disk.kick().map_err(host("submit disk requests"))?;
        // What the page cache had is done already: no need to sleep for it.
        self.finish(queue)?;
        queue.signal()?;
        if self.disk.is_ready() {
            return Ok(Progress::Again);
        }
        if self.free.is_empty() {
            return Ok(Progress::Sleep); // Until a completion makes room.
        }
        let more = !emptied || self.linger(queue)? || queue.enable_doorbell()?;
        Ok(Progress::again_if(more))
    }

    fn drain(&mut self, queue: &mut DeviceQueue) -> Result<(), QueueError> {
        // A limit must not keep a pause waiting.
        self.disk.hurry();
        // A malformed chain ends a batch before it was handed over.
        self.disk.kick().map_err(host("submit disk requests"))?;
        loop {
            self.finish(queue)?;
            if self.disk.in_flight() == 0 {
                return queue.signal();
            }
            let event = PollFd::from_borrowed_fd(self.disk.completion_fd(), PollFlags::IN);
            match poll(&mut [event], None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(host("wait for the disk")(error.into())),
            }
        }
    }
}

fn host(what: &'static str) -> impl FnOnce(io::Error) -> QueueError {
    move |source| QueueError::Host { what, source }
}

impl Handler {
    /// Whether this must be made durable before it completes, §5.2.6.2: the driver knows no flush, or wants none.
    fn is_flushed(&self, operation: Operation) -> bool {
        let has = |feature: u32| self.features & 1 << feature != 0;
        let cached = has(VIRTIO_BLK_F_FLUSH)
            && (!has(VIRTIO_BLK_F_CONFIG_WCE) || self.writeback.load(Ordering::Acquire));
        match operation {
            Operation::Write => !cached && !self.is_synchronous,
            Operation::WriteZeroes { .. } => !cached,
            Operation::Read | Operation::Flush | Operation::Discard { .. } => false,
        }
    }

    /// Looks out for the next chain instead of sleeping, while nothing else can come and it is likely to come soon.
    fn linger(&mut self, queue: &DeviceQueue) -> Result<bool, QueueError> {
        if self.disk.in_flight() > 0 {
            return Ok(false);
        }
        let start = self.lull.begin();
        while self.lull.was_short && start.elapsed() < LINGER {
            if queue.has_chains()? {
                return Ok(true);
            }
            std::hint::spin_loop();
        }
        Ok(false)
    }

    /// Starts the request in `self.chain`, or answers it at once.
    fn begin(&mut self, queue: &mut DeviceQueue) -> Result<(), QueueError> {
        let request = Request::parse(&self.chain)?;
        let (operation, offset, data) = match request.action {
            Action::Read { offset, data } => (Operation::Read, offset, Some(data)),
            Action::Write { offset, data } => (Operation::Write, offset, Some(data)),
            Action::Flush => (Operation::Flush, 0, None),
            Action::Range { offset, operation } => {
                if let Err(status) = Blk::takes(self.abilities, self.features, operation) {
                    self.counters.error();
                    return self.answer(queue, request.status, status, 0);
                }
                (operation, offset, None)
            }
            Action::Identify { data } => {
                let count = data.write(&self.serial);
                let written = u32::try_from(count).expect("at most 20");
                return self.answer(queue, request.status, Status::Ok, written);
            }
            Action::Refuse(status) => {
                self.counters.error();
                return self.answer(queue, request.status, status, 0);
            }
        };
        let bytes = data.map_or(0, |data| data.size());
        self.counters.request(operation, bytes);
        let ram = self.chain.writable().ram().clone();
        let written = match operation {
            Operation::Read => bytes,
            _ => 0,
        };
        let slot = Slot {
            head: self.chain.head(),
            status: request.status,
            written: u32::try_from(written).expect("a chain is shorter than 4 GiB"),
            operation,
            ram,
            filled: match (operation, data) {
                (Operation::Read, Some(data)) => data.segments().collect(),
                _ => Vec::new(),
            },
        };
        let mut segments = self.spare.pop().unwrap_or_default();
        if let Some(data) = data {
            fill(&mut segments, data);
        }
        self.submit(slot, offset, segments);
        Ok(())
    }

    fn submit(&mut self, slot: Slot, offset_bytes: u64, segments: Segments) {
        let index = self.free.pop().expect("checked before the chain was taken");
        let request = atoll_disk::Request {
            token: index as u64,
            operation: slot.operation,
            offset_bytes,
            segments,
        };
        self.slots[index] = Some(slot);
        self.disk
            .submit(request)
            .expect("the backend's queue is as deep as there are slots");
    }

    /// Answers the chain that was just parsed.
    fn answer(
        &mut self,
        queue: &mut DeviceQueue,
        at: u64,
        status: Status,
        written: u32,
    ) -> Result<(), QueueError> {
        let ram = self.chain.writable().ram().clone();
        complete(queue, &ram, self.chain.head(), at, status, written)
    }

    /// Answers what the backend has completed.
    fn finish(&mut self, queue: &mut DeviceQueue) -> Result<(), QueueError> {
        if self.disk.in_flight() == 0 {
            return Ok(());
        }
        self.disk
            .complete(&mut self.done)
            .map_err(host("take disk completions"))?;
        while let Some(completion) = self.done.pop() {
            let index = usize::try_from(completion.token).expect("a slot's index");
            let slot = self.slots[index].take().expect("completes once");
            self.free.push(index);
            if completion.result.is_ok() && self.is_flushed(slot.operation) {
                let operation = Operation::Flush;
                self.submit(Slot { operation, ..slot }, 0, completion.segments);
                self.disk.kick().map_err(host("submit disk requests"))?;
                continue;
            }
            self.spare.push(completion.segments);
            // Also after an error: some of it may have been written.
            for segment in &slot.filled {
                memory::mark(&slot.ram, segment.address, segment.size.into());
            }
            let status = match completion.result {
                Ok(()) => Status::Ok,
                Err(error) => {
                    self.counters.error();
                    let operation = slot.operation;
                    queue.note(&format_args!("{operation:?} failed: {error}"));
                    Status::IoError
                }
            };
            let written = if status == Status::Ok {
                slot.written
            } else {
                0
            };
            complete(queue, &slot.ram, slot.head, slot.status, status, written)?;
        }
        Ok(())
    }
}

/// Writes the status byte, then gives the chain back.
fn complete(
    queue: &mut DeviceQueue,
    ram: &Ram,
    head: u16,
    at: u64,
    status: Status,
    written: u32,
) -> Result<(), QueueError> {
    ram.write_obj(status as u8, GuestAddress(at))
        .map_err(virtio_queue::Error::GuestMemory)?;
    queue.push(head, written + 1)
}

/// Names the data's host memory to the backend: for disks of both buses, whose slots hold the `Ram` that `data` is
/// of until the request has completed.
pub(super) fn fill(segments: &mut Segments, data: GuestBuffers<'_>) {
    data.each_host_range(|start, size| {
        #[expect(
            unsafe_code,
            reason = "the backend works on guest pages, not on a copy"
        )]
        // SAFETY: the range is guest RAM, which the slot's `ram` keeps mapped until the request has completed
        // (`drain` runs before the handler is dropped, and a dropped backend queue waits); guest RAM is accessed
        // by volatile copies only, never through references.
        unsafe {
            segments.push(start, size);
        }
    });
}

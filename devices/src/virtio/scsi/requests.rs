// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A request queue: parses commands, lets the unit decide, has its backend work, answers.
//!
//! A backend's queue is opened with the first command to its unit, and closed when the unit or its medium has
//! gone. A request in flight has a slot of its own: neither the driver's head index nor its tag selects anything.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;

use atoll_disk::{BlockQueue, Completion, Operation, Segments};
use rustix::event::{PollFd, PollFlags, poll};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::request::{Address, Outcome, RESPONSE_BYTES, Request, response};
use super::{Targets, locked};
use crate::memory::Ram;
use crate::scsi::{Act, Sense, Target, TargetKind};
use crate::virtio::blk::fill;
use crate::virtio::worker::{Progress, QueueHandler};
use crate::virtio::{Chain, DeviceQueue, GuestBuffers, QueueError, Segment};

/// A unit in use by this queue.
struct Opened {
    target: Arc<Target>,
    generation: u64,
    is_synchronous: bool,
    disk: Box<dyn BlockQueue>,
}

/// A request that a backend has.
struct Slot {
    head: u16,
    /// Where the response goes.
    response: Vec<Segment>,
    /// What a read fills.
    filled: Vec<Segment>,
    filled_bytes: u32,
    residual: u32,
    operation: Operation,
    /// A flush follows.
    durable: bool,
    target: Arc<Target>,
    /// Data of our own that is being written.
    data: Vec<u8>,
    /// Keeps the pages of data and response mapped.
    ram: Arc<Ram>,
}

/// See the module.
pub(crate) struct Requests {
    targets: Targets,
    depth: u16,
    /// By target number.
    opened: BTreeMap<u8, Opened>,
    /// Of units and media that have gone, while something of theirs is in flight.
    gone: Vec<Opened>,
    /// The descriptors of all of them; the worker waits for this one.
    epoll: Epoll,
    look: Arc<EventFd>,
    /// A slot's index is the request's token.
    slots: Vec<Option<Slot>>,
    free: Vec<usize>,
    spare: Vec<Segments>,
    done: Vec<Completion>,
    chain: Chain,
}

impl Requests {
    pub(super) fn new(targets: Targets, look: Arc<EventFd>, depth: u16) -> io::Result<Self> {
        Ok(Self {
            targets,
            depth,
            opened: BTreeMap::new(),
            gone: Vec::new(),
            epoll: Epoll::new()?,
            look,
            slots: (0..depth).map(|_| None).collect(),
            free: (0..usize::from(depth)).rev().collect(),
            spare: Vec::new(),
            done: Vec::new(),
            chain: Chain::new(),
        })
    }

    fn in_flight(&self) -> bool {
        self.free.len() < self.slots.len()
    }

    fn kick(&mut self) -> Result<(), QueueError> {
        for opened in self.all() {
            opened.disk.kick().map_err(host("submit disk requests"))?;
        }
        Ok(())
    }

    /// The backend's queue of a unit, of the medium that is in it now.
    fn open(&mut self, number: u8, target: &Arc<Target>) -> io::Result<Option<&mut Opened>> {
        let (generation, medium) = target.medium();
        let current = self.opened.get(&number);
        let same = current.is_some_and(|opened| {
            Arc::ptr_eq(&opened.target, target) && opened.generation == generation
        });
        if !same {
            let Some(backend) = medium else {
                return Ok(None);
            };
            let is_synchronous = backend.is_synchronous();
            let depth = self.depth;
            // A confined thread opens nothing itself.
            let disk = atoll_thread::in_starter(move || backend.open_queue(depth))?;
            for fd in descriptors(&*disk) {
                let event = EpollEvent::new(EventSet::IN, 0);
                let fd = fd.as_raw_fd();
                self.epoll.ctl(ControlOperation::Add, fd, event)?;
            }
            let opened = Opened {
                target: target.clone(),
                generation,
                is_synchronous,
                disk,
            };
            self.gone.extend(self.opened.insert(number, opened));
        }
        Ok(self.opened.get_mut(&number))
    }

    fn all(&mut self) -> impl Iterator<Item = &mut Opened> {
        self.opened.values_mut().chain(&mut self.gone)
    }

    /// Closes queues of units and media that have gone, once nothing of theirs is in flight: an ejected image is
    /// free for others then.
    fn close_gone(&mut self) {
        self.gone.retain(|opened| opened.disk.in_flight() > 0);
        let targets = locked(&self.targets);
        self.opened.retain(|number, opened| {
            let here = targets.get(number).is_some_and(|target| {
                Arc::ptr_eq(target, &opened.target) && target.medium().0 == opened.generation
            });
            here || opened.disk.in_flight() > 0
        });
    }

    /// Starts the request in `self.chain`, or answers it at once.
    fn begin(&mut self, queue: &mut DeviceQueue) -> Result<(), QueueError> {
        let chain = std::mem::take(&mut self.chain);
        let result = self.begin_chain(queue, &chain);
        self.chain = chain;
        result
    }

    fn target(&self, address: Address) -> Option<(u8, Arc<Target>)> {
        let (Address::Unit(number) | Address::Other(number)) = address else {
            return None;
        };
        let target = locked(&self.targets).get(&number)?.clone();
        Some((number, target))
    }

    fn begin_chain(&mut self, queue: &mut DeviceQueue, chain: &Chain) -> Result<(), QueueError> {
        let request = Request::parse(chain)?;
        let Some((number, target)) = self.target(request.address) else {
            return answer(queue, chain, &request, Err(Outcome::BadTarget));
        };
        let act = match request.address {
            Address::Unit(_) => target.decide(&request.cdb, |data| request.data_out.read(data)),
            _ => other_unit(&request.cdb),
        };
        let (operation, offset, length, durable, data) = match act {
            Act::Answer(data) => {
                if target.kind() == TargetKind::Cdrom {
                    // It may have ejected its medium, which the other queues have open.
                    let _ = self.look.write(1);
                }
                return answer(queue, chain, &request, Ok(Ok(&data)));
            }
            Act::Fail(sense) => return answer(queue, chain, &request, Ok(Err(sense))),
            Act::Disk {
                operation,
                offset_bytes,
                length_bytes,
                durable,
            } => (operation, offset_bytes, length_bytes, durable, Vec::new()),
            Act::Pattern { offset_bytes, data } => {
                let length = data.len() as u64;
                (Operation::Write, offset_bytes, length, false, data)
            }
        };
        let durable = durable || target.writes_through();
        let buffers = match (operation, data.is_empty()) {
            (Operation::Read, _) => Some(request.data_in),
            (Operation::Write, true) => Some(request.data_out),
            _ => None,
        };
        let part = buffers.map(|buffers| (buffers.size(), buffers.take(length)));
        let (residual, guest) = match part {
            None => (0, None),
            Some((size, Some(part))) => (size - length, Some(part)),
            Some((_, None)) => return answer(queue, chain, &request, Err(Outcome::Overrun)),
        };
        let reads = operation == Operation::Read;
        let slot = Slot {
            head: chain.head(),
            response: request.response.segments().collect(),
            filled: guest
                .filter(|_| reads)
                .map_or(Vec::new(), |part| part.segments().collect()),
            filled_bytes: u32::try_from(if reads { length } else { 0 }).unwrap_or(u32::MAX),
            residual: u32::try_from(residual).unwrap_or(u32::MAX),
            operation,
            durable,
            target: target.clone(),
            data,
            ram: chain.writable().ram().clone(),
        };
        target.counters().request(operation, length);
        match self.open(number, &target) {
            Ok(Some(_)) => {}
            // It was taken out since the unit decided.
            Ok(None) => return answer(queue, chain, &request, Ok(Err(Sense::NO_MEDIUM))),
            Err(source) => {
                let what = "open the disk's queue";
                return Err(QueueError::Host { what, source });
            }
        }
        self.submit(number, slot, offset, guest);
        Ok(())
    }

    fn submit(
        &mut self,
        number: u8,
        mut slot: Slot,
        offset_bytes: u64,
        guest: Option<GuestBuffers<'_>>,
    ) {
        let mut segments = self.spare.pop().unwrap_or_default();
        if let Some(guest) = guest {
            fill(&mut segments, guest);
        } else if !slot.data.is_empty() {
            own(&mut segments, &mut slot.data);
        }
        let index = self.free.pop().expect("checked before the chain was taken");
        let request = atoll_disk::Request {
            token: index as u64,
            operation: slot.operation,
            offset_bytes,
            segments,
        };
        slot.target.enter();
        self.slots[index] = Some(slot);
        let opened = self.opened.get_mut(&number).expect("opened just now");
        opened
            .disk
            .submit(request)
            .expect("a backend's queue is as deep as there are slots");
    }

    /// Answers what the backends have completed.
    fn finish(&mut self, queue: &mut DeviceQueue) -> Result<(), QueueError> {
        let mut done = std::mem::take(&mut self.done);
        let mut kicked = Ok(());
        for opened in self.opened.values_mut().chain(&mut self.gone) {
            if opened.disk.in_flight() == 0 {
                continue;
            }
            let taken = opened.disk.complete(&mut done);
            taken.map_err(host("take disk completions"))?;
            for completion in done.drain(..) {
                let index = usize::try_from(completion.token).expect("a slot's index");
                let mut slot = self.slots[index].take().expect("completes once");
                let flushed = match slot.operation {
                    Operation::Write => slot.durable && !opened.is_synchronous,
                    Operation::WriteZeroes { .. } => slot.durable,
                    Operation::Read | Operation::Flush | Operation::Discard { .. } => false,
                };
                if flushed && completion.result.is_ok() {
                    slot.durable = false;
                    slot.operation = Operation::Flush;
                    let flush = atoll_disk::Request {
                        token: completion.token,
                        operation: Operation::Flush,
                        offset_bytes: 0,
                        segments: completion.segments,
                    };
                    self.slots[index] = Some(slot);
                    let submitted = opened.disk.submit(flush);
                    submitted.expect("the write has made room for it");
                    // The others that are done are answered first, whatever becomes of this one.
                    kicked = kicked.and(opened.disk.kick());
                    continue;
                }
                self.free.push(index);
                self.spare.push(completion.segments);
                slot.complete(queue, completion.result)?;
            }
        }
        self.done = done;
        kicked.map_err(host("submit disk requests"))
    }
}

impl Slot {
    /// Writes the response, then gives the chain back.
    fn complete(self, queue: &mut DeviceQueue, result: io::Result<()>) -> Result<(), QueueError> {
        self.target.leave();
        let (sense, written) = match result {
            Ok(()) => (None, self.filled_bytes),
            Err(error) => {
                self.target.counters().error();
                let operation = self.operation;
                queue.note(&format_args!("{operation:?} failed: {error}"));
                let sense = match operation {
                    Operation::Read => Sense::READ_ERROR,
                    _ => Sense::WRITE_ERROR,
                };
                (Some(sense), 0)
            }
        };
        for segment in &self.filled {
            crate::memory::mark(&self.ram, segment.address, segment.size.into());
        }
        let bytes = response(Outcome::Ok, sense, self.residual);
        put(&self.ram, &self.response, &bytes)?;
        let total = u32::try_from(RESPONSE_BYTES).expect("108");
        queue.push(self.head, total.saturating_add(written))
    }
}

impl QueueHandler for Requests {
    fn sources(&self) -> Vec<(RawFd, EventSet)> {
        vec![
            (self.epoll.as_raw_fd(), EventSet::IN),
            (self.look.as_raw_fd(), EventSet::IN),
        ]
    }

    fn process(&mut self, queue: &mut DeviceQueue) -> Result<Progress, QueueError> {
        queue.disable_doorbell()?;
        self.finish(queue)?;
        self.close_gone();
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
        self.kick()?;
        // What the page cache had is done already: no need to sleep for it.
        self.finish(queue)?;
        queue.signal()?;
        if self.free.is_empty() {
            return Ok(Progress::Sleep); // Until a completion makes room.
        }
        let more = queue.enable_doorbell()? || !emptied;
        Ok(Progress::again_if(more))
    }

    fn drain(&mut self, queue: &mut DeviceQueue) -> Result<(), QueueError> {
        // A limit must not keep a pause waiting.
        self.all().for_each(|opened| opened.disk.hurry());
        self.kick()?;
        loop {
            self.finish(queue)?;
            if !self.in_flight() {
                return queue.signal();
            }
            let all = self.opened.values().chain(&self.gone);
            let fds = all.flat_map(|opened| descriptors(&*opened.disk));
            let mut fds: Vec<_> = fds
                .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN))
                .collect();
            match poll(&mut fds, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(host("wait for the disk")(error.into())),
            }
        }
    }
}

fn host(what: &'static str) -> impl FnOnce(io::Error) -> QueueError {
    move |source| QueueError::Host { what, source }
}

fn descriptors(disk: &dyn BlockQueue) -> impl Iterator<Item = BorrowedFd<'_>> {
    [Some(disk.completion_fd()), disk.timer_fd()]
        .into_iter()
        .flatten()
}

/// A unit that is not there, of a target that is: it has INQUIRY. SPC-4 §5. REPORT LUNS is unit 0's,
/// which every target has.
fn other_unit(cdb: &[u8; crate::scsi::CDB_BYTES]) -> Act {
    const INQUIRY: u8 = 0x12;
    /// Qualifier "not capable of supporting a device here", type "unknown".
    const NOBODY: u8 = 0x7f;
    match cdb[0] {
        INQUIRY => {
            let mut data = vec![0; 36];
            data[0] = NOBODY;
            data[4] = 31;
            data.truncate(usize::from(cdb[3]) << 8 | usize::from(cdb[4]));
            Act::Answer(data)
        }
        _ => Act::Fail(Sense::NO_UNIT),
    }
}

/// Answers a chain that no backend has: with data or sense of the unit, or with an outcome of the controller's own.
fn answer(
    queue: &mut DeviceQueue,
    chain: &Chain,
    request: &Request<'_>,
    result: Result<Result<&[u8], Sense>, Outcome>,
) -> Result<(), QueueError> {
    let mut written = 0;
    let bytes = match result {
        Ok(Ok(data)) => {
            written = request.data_in.write(data);
            let room = request.data_in.size() - written as u64;
            let residual = u32::try_from(room).unwrap_or(u32::MAX);
            response(Outcome::Ok, None, residual)
        }
        Ok(Err(sense)) => response(Outcome::Ok, Some(sense), 0),
        Err(outcome) => response(outcome, None, 0),
    };
    request.response.write(&bytes);
    let total = u32::try_from(RESPONSE_BYTES + written).expect("a small answer");
    queue.push(chain.head(), total)
}

/// Writes to guest memory, over the pieces' borders.
fn put(ram: &Ram, pieces: &[Segment], mut bytes: &[u8]) -> Result<(), QueueError> {
    use vm_memory::{Bytes, GuestAddress};
    for piece in pieces {
        let count = bytes.len().min(usize::try_from(piece.size).unwrap_or(0));
        let (part, rest) = bytes.split_at(count);
        ram.write_slice(part, GuestAddress(piece.address))
            .map_err(virtio_queue::Error::GuestMemory)?;
        bytes = rest;
    }
    Ok(())
}

/// Names data of our own to the backend.
fn own(segments: &mut Segments, data: &mut [u8]) {
    #[expect(unsafe_code, reason = "the backend takes ranges of memory")]
    // SAFETY: the slot keeps the vector, unmoved on the heap and untouched, until the request has completed.
    unsafe {
        segments.push(data.as_mut_ptr(), data.len());
    }
}

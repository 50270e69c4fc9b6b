// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Virtio devices, VIRTIO 1.2 (the clause numbers in this crate are of that version).
//!
//! [`VirtioPci`] is the transport: registers, status machine, MSI-X. A device implements [`VirtioDevice`]. An
//! enabled queue runs on a named thread ([`worker`]), its own or its device's, woken by its doorbell; handlers see a
//! [`DeviceQueue`] and checked [`Chain`]s.
//!
//! Pause, reset, snapshot and migration are all the same act: stop every queue, keep or drop what `stop`
//! returns.

pub mod balloon;
pub mod blk;
pub mod console;
pub mod net;
pub mod rng;
pub mod scsi;
pub mod vhost_user;
pub mod vsock;
pub mod worker;

mod notify;
mod pci;
mod queue;
mod status;
mod unix;
mod vhost_kernel;

pub use notify::{DeviceInterrupts, QueueInterrupt};
pub use pci::{PauseError, VirtioPci, VirtioPciOptions};
pub use queue::{Chain, DeviceQueue, GuestBuffers, QueueError, Segment};
pub use virtio_queue::QueueState;

use std::io;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use crate::counters::{CounterList, QueueCounters};
use crate::state::DeviceState;

/// Device ID numbers, VIRTIO 1.2 §5; on PCI a function's device ID is 0x1040 more (§4.1.2).
pub mod device_id {
    /// Network card, §5.1.
    pub const NET: u16 = 1;
    /// Block device, §5.2.
    pub const BLOCK: u16 = 2;
    /// Console and its ports, §5.3.
    pub const CONSOLE: u16 = 3;
    /// Entropy source, §5.4.
    pub const RNG: u16 = 4;
    /// Memory balloon, §5.5.
    pub const BALLOON: u16 = 5;
    /// SCSI host, §5.6.
    pub const SCSI: u16 = 8;
    /// Socket device, §5.10.
    pub const VSOCK: u16 = 19;
    /// File system, §5.11.
    pub const FS: u16 = 26;
}

/// Everything that a queue's thread is given when the driver is ready (DRIVER_OK) or the machine resumes.
pub struct QueueStart {
    /// Position in the device's list of queues.
    pub index: u16,
    /// The rings, checked to lie in guest RAM, with the interrupt that belongs to them.
    pub queue: DeviceQueue,
    /// Feature bits that the driver accepted, of those that the device and its transport offered; fixed until a
    /// reset.
    pub features: u64,
    /// Signalled by the driver (ioeventfd). Never read: only its edges count.
    pub doorbell: EventFd,
    /// Numbers of this queue that whoever serves it adds to; they outlive the queue's stop.
    pub counters: Arc<QueueCounters>,
}

/// Why a queue did not start. The device goes to NEEDS_RESET; the host is to blame.
#[derive(Debug, thiserror::Error)]
#[error("start queue {index}")]
pub struct StartError {
    /// Position of the queue in the device's list.
    pub index: u16,
    /// What the host refused: a thread, an eventfd, a ring, or the backend's own queue.
    #[source]
    pub source: std::io::Error,
}

/// A queue that is being served, by a thread of this process, the kernel or another process. Dropping it without
/// [`StartedQueue::stop`] may lose where its rings stood.
pub trait StartedQueue: Send {
    /// Stops serving, completes what is in flight, and returns where the rings stand. Blocks until done; after
    /// it, no host pointer into guest memory is left.
    fn stop(self: Box<Self>) -> QueueState;
}

/// What can be done with a paused machine, but not with every device in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Act {
    /// Its state and its memory are written down, and it goes on.
    Snapshot,
    /// The same, and while its memory is written down it runs, but for what writes to a page that is still to come: that waits.
    LiveSnapshot,
    /// Its memory is copied while it runs.
    Migration,
}

/// A virtio device without its transport.
///
/// The transport calls these on vCPU threads and on the VMM's control thread, never two at once; `start_queue` on
/// the process's `starter` (crate `atoll-thread`), since the others may neither open anything nor make threads.
/// Its state ([`DeviceState`]) is what the transport does not know of: registers, interrupts and rings are saved
/// for it.
pub trait VirtioDevice: DeviceState {
    /// One of [`device_id`].
    fn device_id(&self) -> u16;

    /// Feature bits 0..24 and 41.. that belong to this kind of device; the transport adds its own.
    fn features(&self) -> u64;

    /// The largest size of each queue, powers of two; its length is the number of queues.
    fn queue_sizes(&self) -> Vec<u16>;

    /// The guest reads device configuration; past the end it reads zeroes.
    fn config_read(&self, offset: u64, data: &mut [u8]);

    /// The guest writes device configuration.
    fn config_write(&self, _offset: u64, _data: &[u8]) {}

    /// Called before the first `start_queue` after a reset: how to tell the driver that configuration changed.
    fn connect(&self, _interrupts: DeviceInterrupts) {}

    /// Serves one queue from now on.
    fn start_queue(&self, start: QueueStart) -> Result<Box<dyn StartedQueue>, StartError>;

    /// The driver reset the device; all queues are stopped.
    fn reset(&self) {}

    /// Whether from now on every write to guest memory has to be in its log ([`crate::memory::log`]) at the latest when
    /// [`VirtioDevice::note_writes`] returns, or the queues have stopped. Of concern to a device whose queues the kernel
    /// or another process serves. While its queues run.
    fn log_writes(&self, _on: bool) -> io::Result<()> {
        Ok(())
    }

    /// Puts what was written past this process since the last call into the log of guest memory. From any thread.
    fn note_writes(&self) {}

    /// Why this cannot be done with a machine that has the device, if it cannot: one sentence.
    fn obstacle(&self, _act: Act) -> Option<String> {
        None
    }

    /// The device's own numbers, beside those of its queues.
    fn counters(&self) -> CounterList {
        Vec::new()
    }
}

/// A mask of feature bits.
const fn bits(features: &[u32]) -> u64 {
    let mut all = 0;
    let mut at = 0;
    while at < features.len() {
        all |= 1 << features[at];
        at += 1;
    }
    all
}

/// For [`VirtioDevice::config_read`]: the part of `config` at `offset`, zeroes past its end.
fn read_config(config: &[u8], offset: u64, data: &mut [u8]) {
    let from = usize::try_from(offset).unwrap_or(config.len());
    for (index, byte) in data.iter_mut().enumerate() {
        let at = from.saturating_add(index);
        *byte = config.get(at).copied().unwrap_or(0);
    }
}

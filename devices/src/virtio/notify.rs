// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! How a device tells its driver something: used buffers, changed configuration, need of a reset.
//!
//! Shared by the transport and the queue threads; atomics only.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, Ordering};

use vmm_sys_util::eventfd::EventFd;

use crate::pci::Msix;
use crate::rate_limited::{RateLimit, warn_limited};

/// ISR bit: a queue has used buffers. VIRTIO 1.2 §4.1.4.5.
const ISR_QUEUE: u8 = 1;
/// ISR bit: configuration changed.
const ISR_CONFIG: u8 = 2;
/// "No vector", §4.1.5.1.2.
pub(super) const NO_VECTOR: u16 = 0xffff;

struct Shared {
    name: String,
    msix: Arc<Msix>,
    config_vector: AtomicU16,
    generation: AtomicU8,
    isr: AtomicU8,
    needs_reset: AtomicBool,
    limit: RateLimit,
}

/// The interrupts of one device that belong to no queue.
#[derive(Clone)]
pub struct DeviceInterrupts(Arc<Shared>);

impl DeviceInterrupts {
    /// For a device called `name` in logs.
    pub fn new(name: &str, msix: Arc<Msix>) -> Self {
        Self(Arc::new(Shared {
            name: name.to_owned(),
            msix,
            config_vector: AtomicU16::new(NO_VECTOR),
            generation: AtomicU8::new(0),
            isr: AtomicU8::new(0),
            needs_reset: AtomicBool::new(false),
            limit: RateLimit::new(),
        }))
    }

    /// Device configuration changed: new generation, then the configuration interrupt.
    pub fn config_changed(&self) {
        self.0.generation.fetch_add(1, Ordering::AcqRel);
        self.signal_config();
    }

    /// The device gives up until it is reset, because of `reason`.
    pub fn needs_reset(&self, reason: &dyn std::fmt::Display) {
        warn_limited!(self.0.limit, device = %self.0.name, %reason, "device needs reset");
        if !self.0.needs_reset.swap(true, Ordering::AcqRel) {
            self.signal_config();
        }
    }

    /// A mistake of the guest that has no further consequence than this line.
    pub(super) fn note(&self, what: &dyn std::fmt::Display) {
        warn_limited!(self.0.limit, device = %self.0.name, "driver: {what}");
    }

    fn signal_config(&self) {
        self.0.isr.fetch_or(ISR_CONFIG, Ordering::AcqRel);
        self.0
            .msix
            .signal(self.0.config_vector.load(Ordering::Acquire));
    }

    /// An interrupt for one queue, initially without a vector.
    pub fn queue(&self) -> QueueInterrupt {
        QueueInterrupt {
            device: self.clone(),
            vector: Arc::new(AtomicU16::new(NO_VECTOR)),
        }
    }

    /// Whether [`DeviceInterrupts::needs_reset`] was called since the last reset.
    pub fn is_broken(&self) -> bool {
        self.0.needs_reset.load(Ordering::Acquire)
    }

    /// Reads the ISR byte and clears it.
    pub(super) fn take_isr(&self) -> u8 {
        self.0.isr.swap(0, Ordering::AcqRel)
    }

    pub(super) fn generation(&self) -> u8 {
        self.0.generation.load(Ordering::Acquire)
    }

    pub(super) fn config_vector(&self) -> u16 {
        self.0.config_vector.load(Ordering::Acquire)
    }

    /// A vector that does not exist is not taken; the driver reads [`NO_VECTOR`] back and knows.
    pub(super) fn set_config_vector(&self, vector: u16) {
        self.0
            .config_vector
            .store(self.existing(vector), Ordering::Release);
    }

    pub(super) fn reset(&self) {
        self.0.config_vector.store(NO_VECTOR, Ordering::Release);
        self.0.isr.store(0, Ordering::Release);
        self.0.needs_reset.store(false, Ordering::Release);
    }

    /// Configuration vector, generation, ISR byte and whether the device is broken: for its saved state.
    pub(super) fn save(&self) -> (u16, u8, u8, bool) {
        let isr = self.0.isr.load(Ordering::Acquire);
        (
            self.config_vector(),
            self.generation(),
            isr,
            self.is_broken(),
        )
    }

    /// Puts [`DeviceInterrupts::save`] back.
    pub(super) fn restore(&self, (vector, generation, isr, broken): (u16, u8, u8, bool)) {
        self.set_config_vector(vector);
        self.0.generation.store(generation, Ordering::Release);
        self.0.isr.store(isr, Ordering::Release);
        self.0.needs_reset.store(broken, Ordering::Release);
    }

    /// In a copy of a machine: interrupts again for a change that was told and that no driver has read off the ISR byte
    /// since, as none does that has vectors. The interrupt may have been on its way; one too many only makes the driver
    /// look (VIRTIO 1.2 §4.1.5.4).
    pub(super) fn tell_again(&self) {
        if self.0.isr.load(Ordering::Acquire) & ISR_CONFIG != 0 {
            self.signal_config();
        }
    }

    fn existing(&self, vector: u16) -> u16 {
        if vector < self.0.msix.vector_count() {
            vector
        } else {
            NO_VECTOR
        }
    }
}

/// The interrupt of one queue: the vector that the driver chose, or the function's own cause. Clones are the same; signalling
/// takes no lock and does not block.
#[derive(Clone)]
pub struct QueueInterrupt {
    device: DeviceInterrupts,
    vector: Arc<AtomicU16>,
}

impl QueueInterrupt {
    /// The queue has used buffers. No lock, at most one write(2).
    pub fn signal(&self) {
        self.device.0.isr.fetch_or(ISR_QUEUE, Ordering::AcqRel);
        self.device
            .0
            .msix
            .signal(self.vector.load(Ordering::Acquire));
    }

    /// What to signal instead of [`QueueInterrupt::signal`], for a queue that another process or the kernel
    /// serves; `None` when the driver wants no interrupts. While the vector is masked, signals are kept.
    pub fn event(&self) -> io::Result<Option<EventFd>> {
        self.device.0.msix.event(self.vector())
    }

    /// The device that the queue belongs to: for its configuration interrupt, its log lines, and NEEDS_RESET.
    pub fn device(&self) -> &DeviceInterrupts {
        &self.device
    }

    pub(super) fn vector(&self) -> u16 {
        self.vector.load(Ordering::Acquire)
    }

    pub(super) fn set_vector(&self, vector: u16) {
        self.vector
            .store(self.device.existing(vector), Ordering::Release);
    }
}

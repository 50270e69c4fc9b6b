// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! What the VMM would give to devices: interrupt lines, vectors, doorbells and machine control that remember
//! what happened to them.

use std::io;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::interrupt::{IrqLine, MsiMessage, MsixSink, RouteChange};
use crate::pci::DoorbellSink;
use crate::platform::MachineControl;

/// Vectors that count their interrupts.
pub struct CountingSink {
    events: Vec<EventFd>,
    routes: Mutex<Vec<Option<MsiMessage>>>,
}

impl CountingSink {
    /// `count` vectors.
    pub fn new(count: u16) -> Self {
        let event = |_| EventFd::new(EFD_NONBLOCK).expect("an eventfd");
        Self {
            events: (0..count).map(event).collect(),
            routes: Mutex::new(vec![None; usize::from(count)]),
        }
    }

    /// Interrupts of `vector` since the last call.
    pub fn take(&self, vector: u16) -> u64 {
        self.events[usize::from(vector)].read().unwrap_or(0)
    }

    /// Waits for an interrupt of `vector`; false after `timeout`.
    pub fn wait(&self, vector: u16, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        while Instant::now() < deadline {
            if self.take(vector) > 0 {
                return true;
            }
            std::thread::yield_now();
        }
        false
    }

    /// Where `vector` goes.
    pub fn route(&self, vector: u16) -> Option<MsiMessage> {
        self.routes.lock().expect("no test panics inside")[usize::from(vector)]
    }
}

impl MsixSink for CountingSink {
    fn vector_count(&self) -> u16 {
        u16::try_from(self.events.len()).expect("made from a u16")
    }

    fn event(&self, vector: u16) -> &EventFd {
        &self.events[usize::from(vector)]
    }

    fn set_routes(&self, changes: &[RouteChange]) -> io::Result<()> {
        let mut routes = self.routes.lock().expect("no test panics inside");
        for (vector, message) in changes {
            routes[usize::from(*vector)] = *message;
        }
        Ok(())
    }
}

/// A wire that remembers its level and its rising edges.
#[derive(Debug, Default)]
pub struct Line {
    level: AtomicBool,
    edges: AtomicU32,
}

impl Line {
    /// Whether it is asserted.
    pub fn level(&self) -> bool {
        self.level.load(Ordering::SeqCst)
    }

    /// How often it became asserted.
    pub fn edges(&self) -> u32 {
        self.edges.load(Ordering::SeqCst)
    }
}

impl IrqLine for Line {
    fn set_level(&self, asserted: bool) {
        if asserted && !self.level.swap(true, Ordering::SeqCst) {
            self.edges.fetch_add(1, Ordering::SeqCst);
        }
        self.level.store(asserted, Ordering::SeqCst);
    }
}

/// Remembers what a guest asked of the machine.
#[derive(Debug, Default)]
pub struct ControlLog {
    power_offs: AtomicU32,
    resets: AtomicU32,
}

impl ControlLog {
    /// Times it was turned off.
    pub fn power_offs(&self) -> u32 {
        self.power_offs.load(Ordering::SeqCst)
    }

    /// Times it was reset.
    pub fn resets(&self) -> u32 {
        self.resets.load(Ordering::SeqCst)
    }
}

impl MachineControl for ControlLog {
    fn power_off(&self) {
        self.power_offs.fetch_add(1, Ordering::SeqCst);
    }

    fn reset(&self) {
        self.resets.fetch_add(1, Ordering::SeqCst);
    }
}

/// Doorbells that stay unconnected: every kick reaches the device's BAR.
#[derive(Debug, Default)]
pub struct NoDoorbells {
    connected: Mutex<Vec<u64>>,
}

impl NoDoorbells {
    /// Addresses that should be connected now, sorted.
    pub fn connected(&self) -> Vec<u64> {
        let mut addresses = self
            .connected
            .lock()
            .expect("no test panics inside")
            .clone();
        addresses.sort_unstable();
        addresses
    }
}

impl DoorbellSink for NoDoorbells {
    fn connect(&self, address: u64, _event: &EventFd) -> io::Result<()> {
        self.connected
            .lock()
            .expect("no test panics inside")
            .push(address);
        Ok(())
    }

    fn disconnect(&self, address: u64, _event: &EventFd) -> io::Result<()> {
        self.connected
            .lock()
            .expect("no test panics inside")
            .retain(|connected| *connected != address);
        Ok(())
    }
}

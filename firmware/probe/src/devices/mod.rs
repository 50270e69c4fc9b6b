// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The virtio devices of the machine, each with its check. A kind is a file and a row in `Devices::find`.

mod blk;
mod console;
mod net;
mod rng;

use alloc::vec::Vec;
use core::fmt::Write;

use virtio_drivers::transport::{DeviceType, Transport};

use crate::acpi::Platform;
use crate::clock::Clock;
use crate::options::Options;
use crate::pci::Bus;
use crate::report::Report;
use crate::serial::Serial;
use crate::transport::{MsixTransport, Taps};

/// What every kind of device can do.
pub trait Device {
    /// Section name in the report.
    fn name(&self) -> &'static str;

    /// Uses the device and tells the values and failures.
    fn check(&mut self, report: &mut Report, clock: &Clock, options: &Options);

    /// Does what came in since the last call; called after each interrupt.
    fn serve(&mut self) {}

    /// One round of work whose result is checked.
    fn load(&mut self, _round: u64) -> Result<(), &'static str> {
        Ok(())
    }

    /// The address that this device has on its network.
    fn address(&self) -> Option<[u8; 4]> {
        None
    }
}

/// Starts the driver of a kind.
type Open = fn(MsixTransport) -> virtio_drivers::Result<alloc::boxed::Box<dyn Device>>;

const KINDS: &[(DeviceType, Open)] = &[
    (DeviceType::Block, blk::open),
    (DeviceType::Network, net::open),
    (DeviceType::Console, console::open),
    (DeviceType::EntropySource, rng::open),
];

/// Queues that the drivers use.
const QUEUE_COUNT: usize = 2;

struct Found {
    slot: u8,
    taps: Taps,
    device: virtio_drivers::Result<alloc::boxed::Box<dyn Device>>,
}

/// Starts the driver of a function that is a virtio device.
fn start(function: crate::pci::Device) -> Option<Found> {
    let transport = MsixTransport::new(function, QUEUE_COUNT)?;
    let kind = transport.device_type();
    let (_, open) = KINDS.iter().find(|(known, _)| *known == kind)?;
    let taps = transport.taps();
    Some(Found {
        slot: function.slot,
        taps,
        device: open(transport),
    })
}

/// All that were found, in the order of their slots; those that came later behind them.
pub struct Devices(Vec<Found>);

impl Devices {
    /// Looks at every slot of bus 0 and starts the driver of each virtio device.
    pub fn find(platform: &Platform) -> Devices {
        Devices(Bus::find(platform).devices().filter_map(start).collect())
    }

    /// Does what the machine wants about functions that come and go, and tells it.
    pub fn follow(&mut self, platform: &Platform, keep: bool) {
        let Some(hotplug) = platform.hotplug else {
            return;
        };
        let (look, leave) = hotplug.take();
        for slot in (0..32).filter(|slot| look & 1 << slot != 0) {
            self.0.retain(|found| found.slot != slot);
            let found = Bus::find(platform).device(slot).and_then(start);
            let name = match &found {
                None => "empty",
                Some(found) => found.device.as_ref().map_or("broken", |one| one.name()),
            };
            self.0.extend(found);
            let _ = writeln!(Serial, "\nslot {slot}: now {name}");
        }
        for slot in (0..32).filter(|slot| leave & 1 << slot != 0) {
            if keep {
                let _ = writeln!(Serial, "\nslot {slot}: wanted back, and kept");
                continue;
            }
            // The driver's end resets the device.
            self.0.retain(|found| found.slot != slot);
            hotplug.eject(slot);
            let is_there = Bus::find(platform).device(slot).is_some();
            let _ = writeln!(Serial, "\nslot {slot}: let go, there: {is_there}");
        }
    }

    /// The first device's registers, for measuring.
    pub fn taps(&self) -> Option<Taps> {
        self.0.first().map(|found| found.taps)
    }

    /// One section a device.
    pub fn check(&mut self, report: &mut Report, clock: &Clock, options: &Options) {
        for Found { slot, taps, device } in &mut self.0 {
            let count = || {
                taps.vectors
                    .iter()
                    .flatten()
                    .map(|(_, vector)| u64::from(vector.count()))
                    .sum::<u64>()
            };
            match device {
                Ok(device) => {
                    let before = count();
                    report.begin(device.name());
                    report.number("slot", u64::from(*slot));
                    device.check(report, clock, options);
                    report.number("interrupts", count() - before);
                }
                Err(error) => {
                    report.begin("broken");
                    report.number("slot", u64::from(*slot));
                    report.fail(error);
                }
            }
            report.end();
        }
    }

    /// Lets each device do what came in.
    pub fn serve(&mut self) {
        for found in &mut self.0 {
            if let Ok(device) = &mut found.device {
                device.serve();
            }
        }
    }

    /// One round of work of each device.
    pub fn load(&mut self, round: u64) -> Result<(), &'static str> {
        self.0
            .iter_mut()
            .filter_map(|found| found.device.as_mut().ok())
            .try_for_each(|device| device.load(round))
    }

    /// Addresses of the network cards.
    pub fn addresses(&self) -> impl Iterator<Item = [u8; 4]> {
        self.0
            .iter()
            .filter_map(|found| found.device.as_ref().ok()?.address())
    }
}

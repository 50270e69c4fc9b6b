// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Mode `bench`: keeps many requests in flight and tells how long a fixed number of them took. The same on every
//! VMM that has virtio-pci, with the feature bits that all of them have.
//!
//! Each work of the command line runs on the first device of its kind, which is set up anew for it, and ends in one
//! line `bench WORK ns=N bells=N interrupts=N`, or `bench WORK FAILED: why`. [`WARM_UP`] of the requests come
//! before the clock starts. With the word `poll` no interrupts are asked for, and the CPU never halts.
//!
//! `exits:COUNT` needs no device: so many reads of a port of COM1 that every VMM answers itself and does nothing for.

mod blk;
mod net;

use alloc::vec::Vec;
use core::fmt::Write;

use virtio_drivers::transport::{DeviceType, Transport};

use crate::acpi::Platform;
use crate::clock::Clock;
use crate::cpu;
use crate::options::Options;
use crate::pci::Bus;
use crate::ring::{Arena, Ring};
use crate::serial::{self, Serial};
use crate::transport::{MsixTransport, QUEUE_COUNT_MAX};

/// One in so many requests comes before the clock starts.
const WARM_UP: u64 = 8;

/// VIRTIO 1.2 §6.
const FEATURE_EVENT_INDEX: u64 = 1 << 29;
const FEATURE_VERSION_1: u64 = 1 << 32;

/// What a work runs on.
struct Scene<'a> {
    transport: &'a mut MsixTransport,
    clock: &'a Clock,
    options: &'a Options,
    arena: Arena,
}

/// What it took.
struct Cost {
    ns: u64,
    bells: u64,
}

type Run = fn(&mut Scene<'_>, &str) -> Result<Cost, &'static str>;

/// First part of a work's name, device, and what does it.
const KINDS: &[(&str, DeviceType, Run)] = &[
    ("blk", DeviceType::Block, blk::run),
    ("net", DeviceType::Network, net::run),
];

/// Every work of the command line.
pub fn run(platform: &Platform, clock: &Clock, options: &Options) {
    let mut transports: Vec<MsixTransport> = Bus::find(platform)
        .devices()
        .filter_map(|function| MsixTransport::new(function, QUEUE_COUNT_MAX))
        .collect();
    for work in options.cmdline.split_ascii_whitespace() {
        let (kind, rest) = work.split_once(':').unwrap_or((work, ""));
        if kind == "exits" {
            let count = rest.parse().unwrap_or(1);
            tell(work, Ok(exits(clock, count)), 0);
            continue;
        }
        let Some((_, device, run)) = KINDS.iter().find(|(name, ..)| *name == kind) else {
            continue;
        };
        let mut each = transports.iter_mut();
        let Some(transport) = each.find(|found| found.device_type() == *device) else {
            tell(work, Err("no such device"), 0);
            continue;
        };
        let mut vectors: Vec<_> = transport.taps().vectors.into_iter().flatten().collect();
        vectors.dedup_by_key(|(entry, _)| *entry); // Queues share the last one of a small table.
        let mut scene = Scene {
            transport,
            clock,
            options,
            arena: Arena::new(),
        };
        let result = run(&mut scene, rest);
        let interrupts = vectors.iter().map(|(_, v)| v.count()).sum();
        tell(work, result, interrupts);
    }
    let _ = writeln!(Serial, "bench done");
}

fn tell(work: &str, result: Result<Cost, &'static str>, interrupts: u32) {
    let _ = match result {
        Err(why) => writeln!(Serial, "bench {work} FAILED: {why}"),
        Ok(Cost { ns, bells }) => {
            writeln!(
                Serial,
                "bench {work} ns={ns} bells={bells} interrupts={interrupts}"
            )
        }
    };
}

/// From ring 0, as an operating system does it.
fn exits(clock: &Clock, count: u64) -> Cost {
    cpu::read_port_ring0(serial::SCRATCH, count / WARM_UP);
    let ns = clock.measure(|| cpu::read_port_ring0(serial::SCRATCH, count));
    Cost { ns, bells: 0 }
}

impl Scene<'_> {
    /// Resets the device and agrees on `features` and those that every work wants; true with event indices.
    fn begin(&mut self, features: u64) -> bool {
        let supported = features | FEATURE_EVENT_INDEX | FEATURE_VERSION_1;
        let agreed = self
            .transport
            .begin_init(Features::from_bits_retain(supported));
        agreed.contains(Features::EVENT_INDEX)
    }

    /// Sleeps until one of the rings has something, or does not, as the command line says.
    fn rest(&self, rings: &[Ring]) {
        if self.options.poll {
            rings.iter().for_each(|ring| {
                ring.ignore();
            });
        } else if rings.iter().fold(true, |quiet, ring| ring.listen() & quiet) {
            cpu::halt();
        }
    }
}

bitflags::bitflags! {
    /// All bits, as they are.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct Features: u64 {
        const EVENT_INDEX = FEATURE_EVENT_INDEX;
        const _ = !0;
    }
}

/// Counts what is done, and keeps the time from the end of the warm-up on.
struct Progress<'a> {
    clock: &'a Clock,
    count: u64,
    issued: u64,
    done: u64,
    start_ns: u64,
}

impl<'a> Progress<'a> {
    fn new(clock: &'a Clock, count: u64) -> Progress<'a> {
        Progress {
            clock,
            count: count.max(1) + count / WARM_UP,
            issued: 0,
            done: 0,
            start_ns: clock.now_ns(),
        }
    }

    /// Whether one more is to be issued; counts it.
    fn issue(&mut self) -> bool {
        let more = self.issued < self.count;
        self.issued += u64::from(more);
        more
    }

    /// One is done.
    fn finish(&mut self) {
        self.done += 1;
        if self.done == self.count / (WARM_UP + 1) {
            self.start_ns = self.clock.now_ns();
        }
    }

    fn is_over(&self) -> bool {
        self.done == self.count
    }

    fn cost(&self, rings: &[Ring]) -> Cost {
        Cost {
            ns: self.clock.now_ns() - self.start_ns,
            bells: rings.iter().map(|ring| ring.bells).sum(),
        }
    }
}

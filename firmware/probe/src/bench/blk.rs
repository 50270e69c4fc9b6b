// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Works of a disk: `blk:OPERATION:BYTES:DEPTH:QUEUES:COUNT`. OPERATION is `read`, `write`, `randread` or
//! `randwrite`; each of QUEUES queues has DEPTH requests of BYTES in flight until COUNT are done in all. What is
//! written is whatever the buffers hold: the disk's content is lost.

use alloc::vec::Vec;

use virtio_drivers::transport::Transport;

use super::{Cost, Progress, Scene};
use crate::memory::Mmio;
use crate::ring::{Buffer, Ring};

/// VIRTIO 1.2 §5.2.3. Without FLUSH a device must make each write durable before it completes.
const FEATURE_FLUSH: u64 = 1 << 9;
const FEATURE_MULTI_QUEUE: u64 = 1 << 12;
/// `num_queues` in the configuration, §5.2.4.
const CONFIG_QUEUES: usize = 34;
const SECTOR_BYTES: u64 = 512;
const TYPE_READ: u32 = 0;
const TYPE_WRITE: u32 = 1;
/// Header, data and status of a request; a chain begins at every third descriptor.
const HEADER_BYTES: u32 = 16;
const CHAIN: u16 = 3;

struct Work {
    write: bool,
    random: bool,
    bytes: u32,
    depth: u16,
    queues: u16,
    count: u64,
}

fn parse(text: &str) -> Option<Work> {
    let mut parts = text.split(':');
    let operation = parts.next()?;
    let mut number = || parts.next()?.parse::<u32>().ok();
    Some(Work {
        write: operation.ends_with("write"),
        random: operation.starts_with("rand"),
        bytes: number()?,
        depth: number()?.clamp(1, 80) as u16,
        queues: number()?.clamp(1, 4) as u16,
        count: u64::from(number()?),
    })
}

/// Which part of the disk is next.
struct Places {
    count: u64,
    random: bool,
    state: u64,
}

impl Places {
    fn next(&mut self) -> u64 {
        if self.random {
            self.state ^= self.state << 13;
            self.state ^= self.state >> 7;
            self.state ^= self.state << 17;
        } else {
            self.state += 1;
        }
        self.state % self.count
    }
}

pub fn run(scene: &mut Scene<'_>, text: &str) -> Result<Cost, &'static str> {
    let work = parse(text).ok_or("not a work")?;
    let event_index = scene.begin(FEATURE_FLUSH | FEATURE_MULTI_QUEUE);
    let sectors: [u32; 2] = scene
        .transport
        .read_config_space(0)
        .map_err(|_| "no size")?;
    let bytes = (u64::from(sectors[1]) << 32 | u64::from(sectors[0])) * SECTOR_BYTES;
    if work.queues > 1 {
        let queues: Result<u16, _> = scene.transport.read_config_space(CONFIG_QUEUES);
        if queues.unwrap_or(1) < work.queues {
            return Err("the device has fewer queues");
        }
    }
    let mut places = Places {
        count: bytes / u64::from(work.bytes.max(1)),
        random: work.random,
        state: 0x9e37_79b9_7f4a_7c15,
    };
    if places.count == 0 {
        return Err("the disk is too small");
    }
    let mut rings = rings(scene, &work, event_index)?;
    let headers: Vec<Mmio> = rings
        .iter()
        .map(|ring| describe(scene, ring, &work))
        .collect();
    scene.transport.finish_init();
    let mut progress = Progress::new(scene.clock, work.count);
    let mut issue = |ring: &mut Ring, header: Mmio, slot: u16| {
        let sector = places.next() * (u64::from(work.bytes) / SECTOR_BYTES);
        Mmio(header.0 + u64::from(slot) * SLOT_BYTES).write64(8, sector);
        ring.offer(slot * CHAIN);
    };
    for slot in 0..work.depth {
        for (ring, header) in rings.iter_mut().zip(&headers) {
            if progress.issue() {
                issue(ring, *header, slot);
            }
        }
    }
    rings.iter_mut().for_each(Ring::show);
    while !progress.is_over() {
        let mut idle = true;
        for (ring, header) in rings.iter_mut().zip(&headers) {
            while let Some((head, _)) = ring.take() {
                let slot = head / CHAIN;
                if Mmio(header.0 + u64::from(slot) * SLOT_BYTES).read8(STATUS) != 0 {
                    return Err("a request failed");
                }
                idle = false;
                progress.finish();
                if progress.issue() {
                    issue(ring, *header, slot);
                }
            }
            ring.show();
        }
        if idle {
            scene.rest(&rings);
        }
    }
    Ok(progress.cost(&rings))
}

fn rings(scene: &mut Scene<'_>, work: &Work, event_index: bool) -> Result<Vec<Ring>, &'static str> {
    let size = (work.depth * CHAIN).next_power_of_two();
    (0..work.queues)
        .map(|queue| {
            Ring::new(
                scene.transport,
                &mut scene.arena,
                (queue, size),
                event_index,
            )
        })
        .collect()
}

/// Room for header and status of one slot, and where in it the status is.
const SLOT_BYTES: u64 = 32;
const STATUS: u64 = 16;

/// Describes the chains of a queue; their headers are from the returned place on.
fn describe(scene: &mut Scene<'_>, ring: &Ring, work: &Work) -> Mmio {
    let headers = scene.arena.take(SLOT_BYTES * u64::from(work.depth));
    for slot in 0..work.depth {
        let header = Mmio(headers.0 + SLOT_BYTES * u64::from(slot));
        let kind = if work.write { TYPE_WRITE } else { TYPE_READ };
        header.write32(0, kind);
        header.write32(4, 0);
        let data = scene.arena.take(u64::from(work.bytes));
        let buffer = |at, bytes, writable| Buffer {
            at,
            bytes,
            writable,
        };
        ring.describe(
            slot * CHAIN,
            &[
                buffer(header, HEADER_BYTES, false),
                buffer(data, work.bytes, !work.write),
                buffer(Mmio(header.0 + STATUS), 1, true),
            ],
        );
    }
    headers
}

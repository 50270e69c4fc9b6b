// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Works of a network card, between `ip=` and `peer=` of the command line; the peer's network card is
//! [`PEER_MAC`] and knows ours, so that no ARP is needed.
//! - `net:echo:BYTES:WINDOW:COUNT`: COUNT pings with BYTES of data, WINDOW of them on their way at any time; window
//!   1 measures the round trip, larger ones packets a second in both directions at once.
//! - `net:send:BYTES:WINDOW:COUNT`: frames of a type that nobody knows, for the way out alone.

use alloc::vec;
use alloc::vec::Vec;

use virtio_drivers::transport::Transport;

use super::{Cost, Progress, Scene};
use crate::interrupts;
use crate::memory::Mmio;
use crate::net_packet::{self, Kind, Mac};
use crate::ring::{Buffer, Ring};

/// The host's end.
const PEER_MAC: Mac = [2, 0, 0, 0, 0, 1];
/// VIRTIO 1.2 §5.1.3.
const FEATURE_MAC: u64 = 1 << 5;
/// `struct virtio_net_hdr`, §5.1.6.
const HEADER_BYTES: usize = 12;
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const RING_SIZE: u16 = 128;
const BUFFER_BYTES: u32 = 2048;
/// A second each.
const GREETINGS_MAX: usize = 10;
/// For local experiments, IEEE 802 §9.2.4.
const ETHERTYPE_EXPERIMENT: [u8; 2] = [0x88, 0xb5];

struct Work {
    echo: bool,
    bytes: usize,
    window: u16,
    count: u64,
}

fn parse(text: &str) -> Option<Work> {
    let mut parts = text.split(':');
    let operation = parts.next()?;
    let mut number = || parts.next()?.parse::<u32>().ok();
    Some(Work {
        echo: operation == "echo",
        bytes: number()?.clamp(4, 1472) as usize,
        window: number()?.clamp(1, RING_SIZE.into()) as u16,
        count: u64::from(number()?),
    })
}

pub fn run(scene: &mut Scene<'_>, text: &str) -> Result<Cost, &'static str> {
    let work = parse(text).ok_or("not a work")?;
    let event_index = scene.begin(FEATURE_MAC);
    let mac: Mac = scene.transport.read_config_space(0).map_err(|_| "no MAC")?;
    let frame = frame(scene, &work, mac)?;
    let mut ring = |queue| {
        let at = (queue as u16, RING_SIZE);
        Ring::new(scene.transport, &mut scene.arena, at, event_index)
    };
    let mut rings = [ring(RECEIVE)?, ring(TRANSMIT)?];
    describe(scene, &mut rings, &frame);
    scene.transport.finish_init();
    rings[RECEIVE].show();
    if work.echo {
        greet(&mut rings, frame.len())?;
    }
    let mut progress = Progress::new(scene.clock, work.count);
    rings[TRANSMIT].ignore();
    let mut free: Vec<u16> = (0..RING_SIZE).collect();
    let mut on_their_way = 0;
    while !progress.is_over() {
        while on_their_way < work.window
            && let Some(head) = free.pop()
        {
            if !progress.issue() {
                break;
            }
            on_their_way += 1;
            rings[TRANSMIT].offer(head);
        }
        rings[TRANSMIT].show();
        let mut back = 0;
        let free_before = free.len();
        while let Some((head, _)) = rings[TRANSMIT].take() {
            free.push(head);
            back += u16::from(!work.echo);
        }
        while let Some((head, written)) = rings[RECEIVE].take() {
            // Anything else is not for us: its length gives it away.
            back += u16::from(work.echo && written as usize == frame.len());
            rings[RECEIVE].offer(head);
        }
        rings[RECEIVE].show();
        (0..back).for_each(|_| progress.finish());
        on_their_way -= back;
        // A chain that came back may be all that the next ping waited for.
        if back == 0 && free.len() == free_before {
            let awaited = match (work.echo, free.is_empty()) {
                (true, false) => RECEIVE..=RECEIVE,
                // Every ping may have been answered, and yet no more can be sent before chains come back: a device
                // may show a batch of them late.
                (true, true) => RECEIVE..=TRANSMIT,
                (false, _) => TRANSMIT..=TRANSMIT,
            };
            scene.rest(&rings[awaited]);
            if work.echo {
                rings[TRANSMIT].ignore();
            }
        }
    }
    Ok(progress.cost(&rings))
}

/// Pings, with chain 0, until there is an answer: an interface that has just got its carrier loses packets until the
/// host's kernel has noticed. A ping that is lost later is one answer too few, and the guest falls silent.
fn greet(rings: &mut [Ring; 2], frame_bytes: usize) -> Result<(), &'static str> {
    for _ in 0..GREETINGS_MAX {
        rings[TRANSMIT].offer(0);
        rings[TRANSMIT].show();
        let (mut sent, mut answered) = (false, false);
        let done = interrupts::wait(|| {
            loop {
                sent |= rings[TRANSMIT].take().is_some();
                while let Some((head, written)) = rings[RECEIVE].take() {
                    answered |= written as usize == frame_bytes;
                    rings[RECEIVE].offer(head);
                }
                rings[RECEIVE].show();
                if rings.iter().fold(true, |quiet, ring| ring.listen() & quiet) {
                    return sent && answered;
                }
            }
        });
        match (done, sent) {
            (true, _) => return Ok(()),
            (false, true) => {}
            (false, false) => return Err("a packet is not sent"),
        }
    }
    Err("no answer to a ping")
}

/// What is sent, with the device's header.
fn frame(scene: &Scene<'_>, work: &Work, mac: Mac) -> Result<Vec<u8>, &'static str> {
    let mut frame = vec![0; HEADER_BYTES];
    let body = vec![0; work.bytes];
    if work.echo {
        let (Some(ip), Some(peer)) = (scene.options.ip, scene.options.peer) else {
            return Err("no ip= and peer=");
        };
        let ping = net_packet::echo(Kind::Request, (mac, ip), (PEER_MAC, peer), &body);
        frame.extend(ping);
    } else {
        frame.extend(PEER_MAC);
        frame.extend(mac);
        frame.extend(ETHERTYPE_EXPERIMENT);
        frame.extend(body);
    }
    Ok(frame)
}

/// Every chain is one buffer; the transmit queue's all hold the frame.
fn describe(scene: &mut Scene<'_>, rings: &mut [Ring; 2], frame: &[u8]) {
    for head in 0..RING_SIZE {
        let buffer = |at, bytes, writable| Buffer {
            at,
            bytes,
            writable,
        };
        let at = scene.arena.take(BUFFER_BYTES.into());
        rings[RECEIVE].describe(head, &[buffer(at, BUFFER_BYTES, true)]);
        rings[RECEIVE].offer(head);
        let at: Mmio = scene.arena.take(BUFFER_BYTES.into());
        for (offset, byte) in (0..).zip(frame) {
            at.write8(offset, *byte);
        }
        rings[TRANSMIT].describe(head, &[buffer(at, frame.len() as u32, false)]);
    }
}

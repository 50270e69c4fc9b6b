// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Drivers that mean harm: every broken ring or chain ends in NEEDS_RESET, for every kind of device, and a reset
//! makes the device whole again.

use std::cell::RefCell;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use atoll_devices::console::{Console, ConsoleBackend};
use atoll_devices::state::DeviceState;
use atoll_devices::testing::{Driver, RAM_BYTES, Segment};
use atoll_devices::virtio::console::{PortOptions, VirtioConsole};
use atoll_devices::virtio::rng::Rng;
use atoll_disk::{Engine, Format, OpenOptions, Source};

use crate::balloon;
use crate::blk::{DISK_BYTES, device, memory_disk};
use crate::console;
use crate::net::{self, Rig};
use crate::vsock;

const DATA: u64 = 0x10_0000;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// What it does to a queue: (name, act).
type Attack = (&'static str, fn(&mut Driver, usize));

const ATTACKS: &[Attack] = &[
    ("a chain that is a loop", |driver, queue| {
        raw(driver, queue, &[(DATA, 16, NEXT, 1), (DATA, 16, NEXT, 0)]);
    }),
    ("a descriptor that is its own next", |driver, queue| {
        raw(driver, queue, &[(DATA, 16, NEXT | WRITE, 0)]);
    }),
    ("a next outside the table", |driver, queue| {
        raw(driver, queue, &[(DATA, 16, NEXT, 0x7fff)]);
    }),
    ("a buffer outside RAM", |driver, queue| {
        raw(driver, queue, &[(RAM_BYTES, 16, WRITE, 0)]);
    }),
    ("a buffer over the end of RAM", |driver, queue| {
        raw(driver, queue, &[(RAM_BYTES - 8, 16, WRITE, 0)]);
    }),
    ("an address that wraps", |driver, queue| {
        raw(driver, queue, &[(u64::MAX - 7, 16, 0, 0)]);
    }),
    ("4 GiB in one descriptor", |driver, queue| {
        raw(driver, queue, &[(0, u32::MAX, WRITE, 0)]);
    }),
    ("readable after writable", |driver, queue| {
        raw(
            driver,
            queue,
            &[(DATA, 16, NEXT | WRITE, 1), (DATA, 16, 0, 0)],
        );
    }),
    ("an indirect table in an indirect table", |driver, queue| {
        driver.put_descriptor(DATA, 0, (DATA, 16, INDIRECT, 0));
        raw(driver, queue, &[(DATA, 16, INDIRECT, 0)]);
    }),
    ("an indirect table of 17 bytes", |driver, queue| {
        raw(driver, queue, &[(DATA, 17, INDIRECT, 0)]);
    }),
    ("an indirect table of no bytes", |driver, queue| {
        raw(driver, queue, &[(DATA, 0, INDIRECT, 0)]);
    }),
    ("an indirect table outside RAM", |driver, queue| {
        raw(driver, queue, &[(RAM_BYTES, 32, INDIRECT, 0)]);
    }),
    ("an indirect table of 65536", |driver, queue| {
        driver.put_descriptor(DATA, 0, (DATA, 16, 0, 0));
        raw(driver, queue, &[(DATA, 16 * 0x1_0000, INDIRECT, 0)]);
    }),
    (
        "an indirect table that is a loop, and a next",
        |driver, queue| {
            driver.put_descriptor(DATA, 0, (DATA, 16, NEXT, 0));
            raw(
                driver,
                queue,
                &[(DATA, 16, INDIRECT | NEXT, 1), (DATA, 16, 0, 0)],
            );
        },
    ),
    ("an indirect loop of 65535", |driver, queue| {
        driver.put_descriptor(DATA, 0, (DATA, 16, NEXT, 0));
        raw(driver, queue, &[(DATA, 16 * 0xffff, INDIRECT, 0)]);
    }),
    ("a head outside the table", |driver, queue| {
        driver.offer(queue, 0x4000);
    }),
    ("an available index that runs ahead", |driver, queue| {
        let ring = driver.rings[queue];
        driver.put(ring.available + 2, &0x9000_u16.to_le_bytes());
    }),
    ("an empty buffer", |driver, queue| {
        raw(driver, queue, &[(DATA, 0, 0, 0)]);
    }),
];

fn raw(driver: &mut Driver, queue: usize, descriptors: &[(u64, u32, u16, u16)]) {
    for (index, fields) in (0..).zip(descriptors) {
        driver.put_descriptor(driver.rings[queue].descriptors, index, *fields);
    }
    driver.offer(queue, 0);
}

/// Runs every attack on `queue`; `works` shows that the device is whole.
fn withstands(driver: &mut Driver, queue: usize, works: impl Fn(&mut Driver)) {
    withstands_when(driver, queue, |_| {}, works);
}

/// The same for a device that looks at its buffers only when something from outside `happens`.
fn withstands_when(
    driver: &mut Driver,
    queue: usize,
    happens: impl Fn(&mut Driver),
    works: impl Fn(&mut Driver),
) {
    for (name, attack) in ATTACKS {
        println!("{name}");
        driver.start(u64::MAX);
        attack(driver, queue);
        driver.kick(queue);
        happens(driver);
        driver.wait_broken();
        assert!(driver.interrupts.wait(0, Duration::from_secs(20)), "told");
        driver.kick(queue);
        driver.reset();
        assert_eq!(driver.status(), 0);
        driver.start(u64::MAX);
        works(driver);
        driver.reset();
    }
}

#[test]
fn rng_withstands() {
    let mut driver = Driver::new(Arc::new(Rng::new()));
    withstands(&mut driver, 0, |driver| {
        driver.add(0, &[Segment::writable(DATA, 32)]);
        driver.kick(0);
        assert_eq!(driver.wait_used(0).1, 32);
    });
}

#[test]
fn balloon_withstands() {
    for queue in 0..4 {
        let (mut driver, _balloon) = balloon::device();
        // An empty array of page numbers is no mistake.
        for (name, attack) in &ATTACKS[..ATTACKS.len() - 1] {
            println!("{name} on queue {queue}");
            driver.start(u64::MAX);
            attack(&mut driver, queue);
            driver.kick(queue);
            let served = |driver: &mut Driver| driver.used(queue).is_some() || queue == 2;
            driver.wait_until("an end", |driver| {
                driver.status() & 0x40 != 0 || served(driver)
            });
            driver.reset();
            assert_eq!(driver.status(), 0);
        }
    }
}

#[test]
fn blk_withstands() {
    let mut driver = device(memory_disk(), 2);
    withstands(&mut driver, 1, |driver| {
        driver.put(DATA, &[0; 16]);
        let chain = [
            Segment::readable(DATA, 16),
            Segment::writable(DATA + 4096, 512),
            Segment::writable(DATA + 8192, 1),
        ];
        driver.add(1, &chain);
        driver.kick(1);
        assert_eq!(driver.wait_used(1).1, 513);
    });
}

/// Packets that show that a card is whole: 1000 bytes out of one buffer, and any into one that is large enough.
fn sends(driver: &mut Driver) {
    let mut packet = vec![0; 12];
    packet.extend(net::frame(1000));
    driver.put(DATA, &packet);
    driver.add(1, &[Segment::readable(DATA, 1012)]);
    driver.kick(1);
    driver.wait_used(1);
    assert_eq!(driver.status(), 15);
}

fn receives(driver: &mut Driver, mut wire: &std::fs::File) {
    driver.add(0, &[Segment::writable(DATA, 2048)]);
    driver.kick(0);
    wire.write_all(&net::frame(1000)).unwrap();
    assert!(driver.wait_used(0).1 >= 12 + 14);
    assert_eq!(driver.status(), 15);
}

#[test]
fn net_transmit_withstands() {
    let Some(Rig { mut driver, .. }) = net::rig(u64::MAX) else {
        return;
    };
    driver.reset();
    withstands(&mut driver, 1, sends);
}

#[test]
fn net_control_withstands() {
    let Some(Rig { mut driver, .. }) = net::rig_with(u64::MAX, 2) else {
        return;
    };
    driver.reset();
    withstands(&mut driver, 4, sends);
}

#[test]
fn net_receive_withstands() {
    let Some(Rig {
        mut driver, wire, ..
    }) = net::rig(u64::MAX)
    else {
        return;
    };
    driver.reset();
    let packet = |_: &mut Driver| (&wire).write_all(&net::frame(60)).unwrap();
    withstands_when(&mut driver, 0, packet, |driver| receives(driver, &wire));
}

/// Each attack again behind good buffers that are too few for the packet.
#[test]
fn net_withstands_in_the_middle_of_a_packet() {
    let Some(Rig {
        mut driver, wire, ..
    }) = net::rig(u64::MAX)
    else {
        return;
    };
    for (name, attack) in ATTACKS {
        println!("{name}");
        driver.reset();
        driver.start(u64::MAX);
        for i in 0..2 {
            // Out of the way of what the attacks write to descriptors 0 and 1.
            let ring = driver.rings[0];
            driver.put_descriptor(ring.descriptors, 8 + i, (DATA + 0x1000, 256, WRITE, 0));
            driver.offer(0, 8 + i);
        }
        attack(&mut driver, 0);
        driver.kick(0);
        (&wire).write_all(&net::frame(1000)).unwrap();
        driver.wait_broken();
        assert!(driver.used(0).is_none(), "part of a packet was delivered");
        driver.reset();
        driver.start(u64::MAX);
        sends(&mut driver);
        receives(&mut driver, &wire);
    }
}

/// Packets that land in the rings that describe them: whatever comes of it, a reset makes the card whole.
#[test]
fn net_buffers_over_the_rings() {
    let Some(Rig {
        mut driver, wire, ..
    }) = net::rig(u64::MAX)
    else {
        return;
    };
    for offset in [0, 0x2000, 0x2004, 0x3000, 0x3004] {
        driver.reset();
        driver.start(u64::MAX);
        let target = driver.rings[0].descriptors + offset;
        for _ in 0..8 {
            driver.add(0, &[Segment::writable(target, 2048)]);
        }
        driver.kick(0);
        for _ in 0..8 {
            (&wire).write_all(&net::frame(1000)).unwrap();
        }
        driver.wait_until("packets, or the end", |driver| {
            let (counters, _) = driver.device.counters();
            let received = counters.iter().find(|(name, _)| *name == "received");
            driver.status() & 0x40 != 0 || received.is_some_and(|(_, count)| *count > 0)
        });
        driver.reset();
        assert_eq!(driver.status(), 0);
        driver.start(u64::MAX);
        sends(&mut driver);
        receives(&mut driver, &wire);
    }
}

/// Headers that promise offloads of every kind, on frames of every small size: the kernel's to refuse, not ours
/// to die of.
#[test]
fn net_headers_of_every_kind() {
    let Some(Rig { mut driver, .. }) = net::rig(u64::MAX) else {
        return;
    };
    for flags in 0..8u8 {
        for gso in [0, 1, 3, 4, 5, 0x80, 0x81, 0xff] {
            for (length, start) in [(0, 0), (14, 14), (0xffff, 0xfff0), (0, 0xffff)] {
                let mut packet = vec![flags, gso];
                for field in [length, length, start, start, 1u16] {
                    packet.extend(field.to_le_bytes());
                }
                packet.extend(net::frame(40));
                driver.put(DATA, &packet);
                driver.add(1, &[Segment::readable(DATA, 12 + 14 + u32::from(flags))]);
                driver.kick(1);
                driver.wait_used(1);
            }
        }
    }
    assert_eq!(driver.status(), 15);
    sends(&mut driver);
}

#[test]
fn console_withstands() {
    let console = Console::open(&ConsoleBackend::Pty).unwrap();
    let mut driver = Driver::new(Arc::new(VirtioConsole::new(console.port()).unwrap()));
    withstands_output(&mut driver);
}

#[test]
fn console_receive_withstands() {
    let (_directory, path, console) = console::socket();
    let mut driver = Driver::new(Arc::new(VirtioConsole::new(console.port()).unwrap()));
    let client = console::connect(&path);
    let typed = |_: &mut Driver| (&client).write_all(b"x").unwrap();
    withstands_when(&mut driver, 0, typed, |driver| {
        driver.add(0, &[Segment::writable(DATA, 8)]);
        driver.kick(0);
        assert!(driver.wait_used(0).1 >= 1);
    });
}

/// A console with a named port, which has control queues.
fn console_with_an_agent() -> Driver {
    let console = Console::open(&ConsoleBackend::Pty).unwrap();
    let port = PortOptions {
        port: console.port(),
        name: Some("agent".to_owned()),
    };
    let device = VirtioConsole::with_ports(vec![port]).unwrap();
    Driver::new(Arc::new(device))
}

#[test]
fn console_control_withstands() {
    withstands_output_of(&mut console_with_an_agent(), 3);
}

#[test]
fn console_messages_withstand() {
    // The driver is ready, and is told which ports there are.
    let ready = |driver: &mut Driver| {
        let message = DATA + 0x2000;
        driver.put(message, &[0, 0, 0, 0, 0, 0, 1, 0]);
        driver.add(3, &[Segment::readable(message, 8)]);
        driver.kick(3);
    };
    withstands_when(&mut console_with_an_agent(), 2, ready, |driver| {
        driver.add(2, &[Segment::writable(DATA, 64)]);
        driver.kick(2);
        ready(driver);
        assert_eq!(driver.wait_used(2).1, 8);
    });
}

#[test]
fn vsock_transmit_withstands() {
    let mut rig = vsock::rig();
    withstands(&mut rig.driver, 1, |driver| {
        driver.put(DATA, &[0; 44]);
        driver.add(1, &[Segment::readable(DATA, 44)]);
        driver.kick(1);
        driver.wait_used(1);
    });
}

#[test]
fn vsock_receive_withstands() {
    let mut rig = vsock::rig();
    let path = rig.path.clone();
    let programs = RefCell::new(Vec::new());
    // A program of the host that asks for a port of the guest.
    let asks = |_: &mut Driver| {
        let mut program = UnixStream::connect(&path).unwrap();
        program.write_all(b"CONNECT 80\n").unwrap();
        programs.borrow_mut().push(program);
    };
    withstands_when(&mut rig.driver, 0, asks, |driver| {
        driver.add(0, &[Segment::writable(DATA, 4096)]);
        driver.kick(0);
        asks(driver);
        assert_eq!(driver.wait_used(0).1, 44);
    });
}

#[test]
fn vsock_events_withstand() {
    let mut rig = vsock::rig();
    let device = rig.device.clone();
    let saved = device.save();
    // Only a restored device has an event to tell.
    let restored = |driver: &mut Driver| {
        device.restore(&saved).unwrap();
        driver.kick(2);
    };
    withstands_when(&mut rig.driver, 2, restored, |driver| {
        driver.add(2, &[Segment::writable(DATA, 8)]);
        restored(driver);
        assert_eq!(driver.wait_used(2).1, 4);
    });
}

/// For a console an empty buffer is an empty line, no mistake; everything else is.
fn withstands_output(driver: &mut Driver) {
    withstands_output_of(driver, 1);
}

fn withstands_output_of(driver: &mut Driver, queue: usize) {
    for (name, attack) in &ATTACKS[..ATTACKS.len() - 1] {
        println!("{name}");
        driver.start(u64::MAX);
        attack(driver, queue);
        driver.kick(queue);
        // Buffers that only the device may write are ignored by an output queue.
        driver.wait_until("an end", |driver| {
            driver.status() & 0x40 != 0 || driver.used(queue).is_some()
        });
        driver.reset();
        driver.start(u64::MAX);
        driver.add(queue, &[Segment::readable(DATA, 32)]);
        driver.kick(queue);
        driver.wait_used(queue);
        driver.reset();
    }
}

#[test]
fn blk_requests_without_header_or_status() {
    let chains: [&[Segment]; 5] = [
        &[Segment::readable(DATA, 16)],
        &[Segment::readable(DATA, 15), Segment::writable(DATA, 1)],
        &[Segment::writable(DATA, 512)],
        &[Segment::readable(DATA, 600)],
        &[Segment::readable(DATA, 0), Segment::writable(DATA, 0)],
    ];
    for chain in chains {
        let mut driver = device(memory_disk(), 1);
        driver.start(u64::MAX);
        driver.add(0, chain);
        driver.kick(0);
        driver.wait_broken();
    }
}

/// The same head again while it is in flight: each offer is served in a slot of its own, whoever has the requests.
#[test]
fn the_same_head_many_times() {
    offer_one_head_many_times(device(memory_disk(), 1));
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(DISK_BYTES).unwrap();
    let source = Source {
        path: image.path().to_owned(),
        format: Format::Raw,
        backing: Vec::new(),
    };
    for engine in [Engine::best(), Engine::Threads, Engine::InPlace] {
        let options = OpenOptions {
            engine: Some(engine),
            ..OpenOptions::default()
        };
        offer_one_head_many_times(device(atoll_disk::open(&source, options).unwrap(), 1));
    }
}

fn offer_one_head_many_times(mut driver: Driver) {
    for _ in 0..10 {
        driver.start(u64::MAX);
        driver.put(DATA, &[0; 16]);
        let chain = [
            Segment::readable(DATA, 16),
            Segment::writable(DATA + 4096, 4096),
            Segment::writable(DATA + 8192, 1),
        ];
        let head = driver.add(0, &chain);
        for _ in 1..driver.rings[0].size {
            driver.offer(0, head);
        }
        driver.kick(0);
        for _ in 0..driver.rings[0].size {
            assert_eq!(driver.wait_used(0), (head, 4097));
        }
        driver.reset();
    }
}

/// Rings that lie over each other, and buffers that lie over the rings.
#[test]
fn overlapping_rings_do_not_hang() {
    let mut driver = device(memory_disk(), 1);
    for shift in [0, 2, 4, 16, 64] {
        assert!(driver.negotiate(1 << 32 | 1 << 28));
        driver.rings.clear();
        driver.enable_queue(0, 16);
        driver.reset();
        assert!(driver.negotiate(1 << 32 | 1 << 28));
        let mut ring = driver.rings[0];
        ring.available = ring.descriptors + shift;
        ring.used = ring.descriptors + 2 * (shift & !3);
        driver.describe_queue(0, ring);
        driver.write(0x1c, &1u16.to_le_bytes());
        driver.set_status(15);
        driver.put(ring.descriptors, &[0x11; 512]);
        driver.kick(0);
        driver.put(ring.descriptors, &[0; 512]);
        driver.kick(0);
        driver.reset();
        assert_eq!(driver.status(), 0);
    }
}

/// A batch that ends with a malformed chain: the good request before it must not be waited for for ever.
/// Found by the fuzz target `blk_device`.
#[test]
fn a_good_request_then_a_malformed_chain() {
    let mut driver = device(memory_disk(), 1);
    for _ in 0..20 {
        driver.start(u64::MAX);
        driver.put(DATA, &[0; 16]);
        let good = [
            Segment::readable(DATA, 16),
            Segment::writable(DATA + 4096, 512),
            Segment::writable(DATA + 8192, 1),
        ];
        driver.add(0, &good);
        driver.add(0, &[Segment::readable(DATA, 3)]);
        driver.kick(0);
        driver.wait_broken();
        driver.reset();
    }
}

#[test]
fn scsi_withstands() {
    let unit = crate::scsi::disk(crate::scsi::memory(false));
    let (scsi, mut driver) = crate::scsi::device(&[(0, unit.clone())]);
    let works = |driver: &mut Driver| {
        let mut request = [0; 51];
        (request[0], request[2]) = (1, 0x40);
        driver.put(DATA, &request);
        let chain = [
            Segment::readable(DATA, 51),
            Segment::writable(DATA + 256, 108),
        ];
        driver.add(3, &chain);
        driver.kick(3);
        assert_eq!(driver.wait_used(3).1, 108);
    };
    withstands(&mut driver, 0, works);
    let happens = |_: &mut Driver| scsi.resized(0, &unit);
    withstands_when(&mut driver, 1, happens, |_| {});
    // What the unit wanted to tell.
    let _ = unit.decide(&[0; 32], |_| 0);
    withstands(&mut driver, 3, works);
    // Well-formed chains that are no requests.
    for queue in [0, 2] {
        for chain in [
            &[Segment::readable(DATA, 50), Segment::writable(DATA, 108)][..],
            &[Segment::readable(DATA, 51), Segment::writable(DATA, 107)],
            &[Segment::writable(DATA, 4096)],
        ] {
            if queue == 0 && chain.len() == 2 && chain[0].size == 51 {
                continue; // That is a control request.
            }
            driver.start(u64::MAX);
            driver.put(DATA, &[0xff; 64]);
            driver.add(queue, chain);
            driver.kick(queue);
            driver.wait_broken();
            driver.reset();
        }
    }
}

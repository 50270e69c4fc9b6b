// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A network card whose packets come faster than they go: full taps, missing buffers, pauses. Nothing is lost that
//! need not be, nobody is woken too seldom, and nobody spins.

use std::fs;
use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;
use std::time::Duration;

use atoll_devices::memory::{PAGE_BYTES, log};
use atoll_devices::testing::{Driver, RAM_BYTES, Segment};
use atoll_devices::virtio::VirtioDevice as _;
use atoll_devices::virtio::net::{HEADER_BYTES, HostEnd, Net, NetOptions, Tap};
use rustix::net::sockopt::set_socket_send_buffer_size;
use vm_memory::GuestMemoryBackend;

use crate::net::{Rig, buffer, dropped, frame, rig};

const DATA: u64 = 0x10_0000;
/// Nothing here takes longer, on the slowest machine.
const PATIENCE: Duration = Duration::from_secs(20);

/// A card whose tap is a socket, which is full after a few packets, and the other end of it.
fn narrow() -> (Driver, Arc<Net>, UnixDatagram) {
    let (end, wire) = UnixDatagram::pair().unwrap();
    end.set_nonblocking(true).unwrap();
    set_socket_send_buffer_size(&end, 1).unwrap(); // The kernel makes it the smallest that it allows.
    wire.set_read_timeout(Some(PATIENCE)).unwrap();
    wire.set_write_timeout(Some(PATIENCE)).unwrap();
    let net = Net::new(NetOptions {
        name: "narrow".to_owned(),
        host: HostEnd::Tap {
            taps: vec![Tap::stand_in(end)],
            kernel: None,
        },
        mac: [2, 0, 0, 0, 0, 1],
        mtu: None,
    });
    let net = Arc::new(net.unwrap());
    let mut driver = Driver::new(net.clone());
    driver.start(u64::MAX);
    (driver, net, wire)
}

/// Packet `number`, with its header.
fn packet(number: u16) -> Vec<u8> {
    let mut packet = vec![0; HEADER_BYTES];
    packet.extend(frame(600));
    packet[100..102].copy_from_slice(&number.to_le_bytes());
    packet
}

fn number(packet: &[u8]) -> u16 {
    u16::from_le_bytes([packet[100], packet[101]])
}

/// Offers packet `number` to the card, in a place of its own.
fn send(driver: &mut Driver, number: u16) {
    let packet = packet(number);
    let at = DATA + 1024 * u64::from(number % 256);
    driver.put(at, &packet);
    let size = u32::try_from(packet.len()).unwrap();
    driver.add(1, &[Segment::readable(at, size)]);
}

fn counter(net: &Net, name: &str) -> u64 {
    let counters = net.counters();
    counters.iter().find(|row| row.0 == name).unwrap().1
}

/// Waits until the thread `name` of this process sleeps, which one that spins never does.
fn wait_asleep(driver: &mut Driver, name: &str) {
    let tasks = || fs::read_dir("/proc/self/task").unwrap().flatten();
    let is_called = |folder: &std::path::Path| {
        let comm = fs::read_to_string(folder.join("comm")).unwrap_or_default();
        comm.trim_end() == name
    };
    let thread = tasks()
        .map(|task| task.path())
        .find(|folder| is_called(folder));
    let stat = thread.expect("the card's thread").join("stat");
    driver.wait_until("sleep", |_| {
        let stat = fs::read_to_string(&stat).unwrap();
        stat.split(") ").nth(1).unwrap().starts_with('S')
    });
}

#[test]
fn a_full_tap_holds_the_guest_back_and_loses_nothing() {
    let (mut driver, net, wire) = narrow();
    (0..200).for_each(|number| send(&mut driver, number));
    driver.kick(1);
    driver.wait_until("a packet", |_| counter(&net, "sent") > 0);
    wait_asleep(&mut driver, "narrow-pair0");
    let sent = counter(&net, "sent");
    assert!(
        sent < 100,
        "{sent} packets in a socket that is full after a few"
    );
    for expected in 0..200 {
        let mut seen = [0; 2000];
        let size = wire.recv(&mut seen).expect("the next packet");
        assert_eq!(seen[..size], packet(expected));
    }
    for _ in 0..200 {
        driver.wait_used(1);
    }
    wait_asleep(&mut driver, "narrow-pair0");
    assert_eq!(dropped(&net), 0);
}

#[test]
fn the_other_direction_goes_on_while_one_is_blocked() {
    let (mut driver, net, wire) = narrow();
    // The tap is full, and takes nothing more until the end.
    (0..100).for_each(|number| send(&mut driver, number));
    driver.kick(1);
    driver.wait_until("a packet", |_| counter(&net, "sent") > 0);
    wait_asleep(&mut driver, "narrow-pair0");
    for round in 0..50 {
        driver.add(0, &[buffer(8, 2048)]);
        driver.kick(0);
        wire.send(&packet(round)).unwrap();
        let (_, size) = driver.wait_used(0);
        let seen = driver.get(DATA + 8 * 0x1_0000, usize::try_from(size).unwrap());
        assert_eq!(number(&seen), round);
    }
    // And the other way round: no buffers, and a packet that waits for them.
    wire.send(&packet(50)).unwrap();
    for expected in 0..100 {
        let mut seen = [0; 2000];
        wire.recv(&mut seen).expect("the next packet");
        assert_eq!(number(&seen), expected);
    }
    for _ in 0..100 {
        driver.wait_used(1);
    }
    driver.add(0, &[buffer(8, 2048)]);
    driver.kick(0);
    driver.wait_used(0);
}

#[test]
fn packets_wait_in_the_tap_for_buffers() {
    let Some(mut rig) = rig(u64::MAX) else { return };
    // Fewer than a tap holds.
    for number in 0..200 {
        rig.wire.write_all(&packet(number)[HEADER_BYTES..]).unwrap();
    }
    wait_asleep(&mut rig.driver, "net0-pair0");
    for expected in 0..200 {
        rig.driver.add(0, &[buffer(0, 2048)]);
        rig.driver.kick(0);
        let (head, size) = rig.driver.wait_used(0);
        let seen = rig.buffer(head, 2048, size);
        assert_eq!(number(&seen), expected);
    }
    wait_asleep(&mut rig.driver, "net0-pair0");
    assert_eq!(dropped(&rig.net), 0);
}

#[test]
fn without_a_plug_packets_do_not_wait_for_buffers() {
    let Some(mut rig) = rig(u64::MAX) else { return };
    rig.net.set_link(false);
    for number in 0..20 {
        rig.wire.write_all(&packet(number)[HEADER_BYTES..]).unwrap();
    }
    let Rig { driver, net, .. } = &mut rig;
    driver.wait_until("twenty lost packets", |_| dropped(net) == 20);
    rig.net.set_link(true);
    rig.wire.write_all(&packet(20)[HEADER_BYTES..]).unwrap();
    rig.driver.add(0, &[buffer(0, 2048)]);
    rig.driver.kick(0);
    let (head, size) = rig.driver.wait_used(0);
    assert_eq!(number(&rig.buffer(head, 2048, size)), 20);
}

/// Packets that are larger than those before, smaller, and in buffers of every size: what the kernel places and what
/// is copied behind it is one packet.
#[test]
fn packets_of_every_size_in_buffers_of_every_size() {
    const CHAINS_MAX: usize = 120;
    for sizes in [
        [1, 2, 3],
        [5, 30, 11],
        [27, 26, 300],
        [100, 4096, 7],
        [2000; 3],
    ] {
        let Some(mut rig) = rig(u64::MAX) else { return };
        for sent in [60, 8900, 61, 300, 8000, 1500, 100, 100, 9000].map(frame) {
            let wanted = u32::try_from(HEADER_BYTES + sent.len()).unwrap();
            // Exactly what it takes, in two pieces each, over the middle of RAM.
            let (mut room, mut at, mut places) = (0, RAM_BYTES / 2 - 700, Vec::new());
            while room < wanted {
                let first = sizes[places.len() % 3];
                let is_last = places.len() + 1 == CHAINS_MAX;
                let second = if is_last { wanted } else { first };
                let middle = at + u64::from(first);
                let pieces = [
                    Segment::writable(at, first),
                    Segment::writable(middle, second),
                ];
                rig.driver.add(0, &pieces);
                places.push(at);
                room += first + second;
                at = middle + u64::from(second);
            }
            rig.driver.kick(0);
            rig.wire.write_all(&sent).unwrap();
            let mut seen = Vec::new();
            for place in places {
                let (_, written) = rig.driver.wait_used(0);
                seen.extend(rig.driver.get(place, usize::try_from(written).unwrap()));
            }
            assert_eq!(seen[HEADER_BYTES..], sent, "in {sizes:?}");
        }
    }
}

#[test]
fn what_the_kernel_places_is_in_the_log_of_written_pages() {
    let Some(mut rig) = rig(u64::MAX) else { return };
    (0..8).for_each(|i| {
        rig.driver.add(0, &[buffer(i, 8192)]);
    });
    rig.driver.kick(0);
    let memory = rig.driver.memory.clone();
    let ram = vm_memory::GuestAddressSpace::memory(&memory);
    let region = ram.iter().next().unwrap();
    log(region).switch(true);
    rig.wire.write_all(&frame(6000)).unwrap();
    rig.wire.write_all(&frame(6000)).unwrap();
    let mut words = vec![0; 512];
    for _ in 0..2 {
        rig.driver.wait_used(0);
    }
    log(region).take(&mut words);
    for place in [DATA, DATA + 0x1_0000] {
        for address in [place, place + 4096] {
            let page = usize::try_from(address).unwrap() / PAGE_BYTES;
            assert!(words[page / 64] & 1 << (page % 64) != 0, "{address:#x}");
        }
    }
}

#[test]
fn pauses_in_a_flood_of_both_directions_lose_no_wake_up() {
    const WINDOW: u16 = 32;
    const COUNT: u16 = 4000;
    let (mut driver, net, wire) = narrow();
    let echo = wire.try_clone().unwrap();
    let echo = move || {
        let mut packet = [0; 2000];
        loop {
            match echo.recv(&mut packet).expect("the next packet") {
                0 => return,
                size => echo.send(&packet[..size]).expect("room for it"),
            };
        }
    };
    let thread = std::thread::Builder::new().name("host".to_owned());
    let host = thread.spawn(echo).unwrap();
    for _ in 0..WINDOW {
        driver.add(0, &[buffer(8, 2048)]);
    }
    driver.kick(0);
    let mut sent = 0;
    for back in 0..COUNT {
        while sent < COUNT.min(back + WINDOW) {
            send(&mut driver, sent);
            sent += 1;
        }
        driver.kick(1);
        if back % 20 == 0 {
            // A guest's rings and doorbells go on while its device is paused.
            driver.device.pause();
            driver.kick(1);
            driver.device.resume().unwrap();
        }
        driver.wait_used(0);
        driver.add(0, &[buffer(8, 2048)]);
        driver.kick(0);
        while driver.used(1).is_some() {}
    }
    assert_eq!(dropped(&net), 0);
    wire.shutdown(Shutdown::Both).unwrap();
    host.join().unwrap();
}

/// What a batch of `count` packets from the host, then one of `count` from the guest, tells the guest by interrupts.
fn interrupts(rig: &mut Rig, count: u16) -> [u64; 2] {
    // What waits when the card's thread starts is one batch.
    rig.driver.device.pause();
    for number in 0..count {
        rig.driver.add(0, &[buffer(u64::from(number % 8), 2048)]);
        rig.wire.write_all(&packet(number)[HEADER_BYTES..]).unwrap();
    }
    rig.driver.device.resume().unwrap();
    for _ in 0..count {
        rig.driver.wait_used(0);
    }
    rig.driver.device.pause();
    (0..count).for_each(|number| send(&mut rig.driver, number));
    rig.driver.device.resume().unwrap();
    for _ in 0..count {
        rig.driver.wait_used(1);
    }
    rig.driver.device.pause();
    let interrupts = [1, 2].map(|vector| rig.driver.interrupts.take(vector));
    rig.driver.device.resume().unwrap();
    interrupts
}

#[test]
fn a_guest_is_told_every_sixteen_packets_of_a_batch() {
    const EVENT_IDX: u64 = 1 << 29;
    let Some(mut rig) = rig(!EVENT_IDX) else {
        return;
    };
    for (packets, expected) in [(15, 1), (16, 1), (17, 2), (32, 2), (33, 3), (40, 3)] {
        let seen = interrupts(&mut rig, packets);
        assert_eq!(seen, [expected; 2], "{packets} packets");
    }
    // VRING_AVAIL_F_NO_INTERRUPT, §2.7.7.
    for queue in [0, 1] {
        let flags = rig.driver.rings[queue].available;
        rig.driver.put(flags, &1_u16.to_le_bytes());
    }
    assert_eq!(interrupts(&mut rig, 40), [0; 2]);
}

/// §2.7.10: the driver names the used element of which it wants to hear.
#[test]
fn a_guest_that_names_a_packet_is_told_once_of_it() {
    const COUNT: u16 = 40;
    let Some(mut rig) = rig(u64::MAX) else { return };
    let mut shown = 0_u16;
    for (wanted, expected) in [(0, 1), (15, 1), (16, 1), (39, 1), (40, 0), (100, 0)] {
        for queue in [0, 1] {
            let ring = rig.driver.rings[queue];
            let event = ring.available + 4 + 2 * u64::from(ring.size);
            rig.driver.put(event, &(shown + wanted).to_le_bytes());
        }
        let seen = interrupts(&mut rig, COUNT);
        assert_eq!(seen, [expected; 2], "element {wanted} of {COUNT}");
        shown += COUNT;
    }
}

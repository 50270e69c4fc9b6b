// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Network card on a real tap in a network namespace of the test's own. A packet socket is the other end.
#![expect(
    unsafe_code,
    reason = "unshare(2) and packet sockets have no safe wrapper here"
)]

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::process::Command;
use std::sync::Arc;

use atoll_devices::state::DeviceState;
use atoll_devices::testing::{Driver, Segment};
use atoll_devices::virtio::VirtioDevice as _;
use atoll_devices::virtio::net::{HostEnd, Net, NetOptions, Rate, Tap, TapError};

use crate::pitfalls::while_it_changes;

const DATA: u64 = 0x10_0000;
/// Where a command to the card is.
const COMMAND: u64 = 0x1f_0000;
/// Ethertype for local experiments.
const ETHERTYPE: u16 = 0x88b5;
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

pub struct Rig {
    pub driver: Driver,
    pub net: Arc<Net>,
    pub wire: File,
}

/// A device on tap `t0`, and a packet socket on the same interface. `None` without the privileges.
pub fn rig(features: u64) -> Option<Rig> {
    rig_with(features, 1)
}

/// The same with `pairs` pairs of queues.
pub fn rig_with(features: u64, pairs: u16) -> Option<Rig> {
    // SAFETY: plain numbers; moves only this thread, which ends with its test, to another namespace.
    if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
        println!("ATOLL-SKIP: a network namespace needs root");
        return None;
    }
    let taps = match Tap::open_queues("t0", pairs) {
        Ok(taps) => taps,
        Err(TapError::Device(error)) => {
            println!("ATOLL-SKIP: /dev/net/tun: {error}");
            return None;
        }
        Err(error) => panic!("{error}"),
    };
    // In two steps: with the kernel's own address not yet forbidden when it comes up, it would talk.
    for settings in ["addrgenmode none mtu 9000", "up"] {
        let mut ip = Command::new("ip");
        ip.args(["link", "set", "t0"]).args(settings.split(' '));
        assert!(ip.status().unwrap().success());
    }
    let net = Net::new(NetOptions {
        name: "net0".to_owned(),
        host: HostEnd::Tap { taps, kernel: None },
        mac: MAC,
        mtu: Some(9000),
    });
    let net = Arc::new(net.unwrap());
    let mut driver = Driver::new(net.clone());
    driver.start(features);
    Some(Rig {
        driver,
        net,
        wire: packet_socket(ETHERTYPE),
    })
}

/// One that sees and sends frames of one ethertype.
fn packet_socket(ethertype: u16) -> File {
    let protocol = ethertype.to_be();
    // SAFETY: plain numbers.
    let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW, i32::from(protocol)) };
    assert!(fd >= 0);
    // SAFETY: just made, and owned by nobody else.
    let socket = unsafe { File::from_raw_fd(fd) };
    // SAFETY: a C string.
    let index = unsafe { libc::if_nametoindex(c"t0".as_ptr()) };
    // SAFETY: all zeroes is a valid sockaddr_ll.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = u16::try_from(libc::AF_PACKET).unwrap();
    address.sll_protocol = protocol;
    address.sll_ifindex = i32::try_from(index).unwrap();
    let size = u32::try_from(size_of_val(&address)).unwrap();
    // SAFETY: an open socket, and an address of the size that is given.
    let bound = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), size) };
    assert_eq!(bound, 0);
    socket
}

/// An Ethernet frame of `size` bytes, of no protocol that anybody speaks.
pub fn frame(size: usize) -> Vec<u8> {
    let mut frame = [MAC, [2, 0, 0, 0, 0, 2]].concat();
    frame.extend(ETHERTYPE.to_be_bytes());
    frame.extend((0..=255).cycle().take(size - 14));
    frame
}

impl Rig {
    /// Waits for a packet of ours in `count` buffers of `size` bytes each; what the kernel says by itself is
    /// skipped, its buffers offered again.
    fn receive(&mut self, size: u32) -> (u16, Vec<u8>) {
        loop {
            let (head, written) = self.driver.wait_used(0);
            let mut data = self.buffer(head, size, written);
            let count = u16::from_le_bytes([data[10], data[11]]);
            for _ in 1..count {
                let (head, written) = self.driver.used(0).expect("all buffers at once");
                data.extend(self.buffer(head, size, written));
            }
            if data[24..26] == ETHERTYPE.to_be_bytes() {
                return (count, data.split_off(12));
            }
            (0..count).for_each(|i| {
                self.driver.add(0, &[buffer(u64::from(i), size)]);
            });
            self.driver.kick(0);
        }
    }

    pub fn buffer(&self, head: u16, size: u32, written: u32) -> Vec<u8> {
        let at = self.driver.rings[0].descriptors + u64::from(head) * 16;
        let address = u64::from_le_bytes(self.driver.get(at, 8).try_into().unwrap());
        assert!(written <= size);
        self.driver.get(address, usize::try_from(written).unwrap())
    }
}

/// Packets that the card has lost, or was told not to want.
pub fn dropped(net: &Net) -> u64 {
    let counters = net.counters();
    counters.iter().find(|row| row.0 == "dropped").unwrap().1
}

pub fn buffer(index: u64, size: u32) -> Segment {
    Segment::writable(DATA + index * 0x1_0000, size)
}

#[test]
fn sends_in_one_piece_and_in_fifty() {
    let Some(mut rig) = rig(u64::MAX) else { return };
    for pieces in [1u32, 2, 50] {
        let frame = frame(1200);
        let mut packet = vec![0; 12];
        packet.extend(&frame);
        rig.driver.put(DATA, &packet);
        let size = u32::try_from(packet.len()).unwrap();
        let step = size / pieces;
        let chain: Vec<Segment> = (0..pieces)
            .map(|i| {
                let end = if i + 1 == pieces {
                    size
                } else {
                    (i + 1) * step
                };
                Segment::readable(DATA + u64::from(i * step), end - i * step)
            })
            .collect();
        rig.driver.add(1, &chain);
        rig.driver.kick(1);
        let mut seen = vec![0; 2000];
        let count = rig.wire.read(&mut seen).unwrap();
        assert_eq!(seen[..count], frame);
        rig.driver.wait_used(1);
    }
    let (counters, _) = rig.driver.device.counters();
    assert!(counters.contains(&("sent", 3)), "{counters:?}");
}

/// Another vCPU makes the header of a packet one of no kind, and back: the packet is on the wire as it was, or it is lost.
#[test]
fn a_packet_that_changes_while_it_is_sent() {
    let Some(mut rig) = rig(u64::MAX) else { return };
    let frame = frame(90);
    rig.driver.put(DATA, &[vec![0; 12], frame.clone()].concat());
    let count = |rig: &Rig, what| {
        let (counters, _) = rig.driver.device.counters();
        counters.iter().find(|row| row.0 == what).unwrap().1
    };
    let memory = rig.driver.memory.clone();
    let kind_of_segments = DATA + 1;
    let mut seen = vec![0; 2000];
    while_it_changes(&memory, kind_of_segments, [[0], [0x7f]], || {
        let (sent, lost) = (count(&rig, "sent"), dropped(&rig.net));
        rig.driver.add(1, &[Segment::readable(DATA, 102)]);
        rig.driver.kick(1);
        rig.driver.wait_used(1);
        let is_sent = count(&rig, "sent") > sent;
        assert_eq!(dropped(&rig.net), lost + u64::from(!is_sent));
        if is_sent {
            let size = rig.wire.read(&mut seen).unwrap();
            assert_eq!(seen[..size], frame);
        }
        is_sent
    });
    assert_eq!(rig.driver.status(), 15);
}

#[test]
fn receives_into_merged_buffers() {
    let Some(mut rig) = rig(u64::MAX) else { return };
    (0..32).for_each(|i| {
        rig.driver.add(0, &[buffer(i, 256)]);
    });
    rig.driver.kick(0);
    for size in [60, 244, 245, 1500] {
        rig.wire.write_all(&frame(size)).unwrap();
        let (count, seen) = rig.receive(256);
        assert_eq!(seen, frame(size));
        assert_eq!(usize::from(count), (size + 12).div_ceil(256));
    }
}

#[test]
fn a_packet_waits_for_buffers_and_is_lost_in_too_small_ones() {
    let Some(mut rig) = rig(u64::MAX) else { return };
    rig.wire.write_all(&frame(1000)).unwrap();
    for i in 0..5 {
        rig.driver.add(0, &[buffer(i, 256)]);
        rig.driver.kick(0);
    }
    (5..16).for_each(|i| {
        rig.driver.add(0, &[buffer(i, 256)]);
    });
    rig.driver.kick(0);
    assert_eq!(rig.receive(256).1, frame(1000));
    // Without merging, one buffer must hold it; the next packet finds it again.
    rig.driver.reset();
    rig.driver.start(!(1 << 15));
    rig.driver.add(0, &[buffer(0, 256)]);
    rig.driver.kick(0);
    rig.wire.write_all(&frame(1000)).unwrap();
    rig.wire.write_all(&frame(100)).unwrap();
    let (head, written) = rig.driver.wait_used(0);
    assert_eq!(rig.buffer(head, 256, written)[12..], frame(100));
}

#[test]
fn a_pulled_plug_is_told_and_loses_packets_both_ways() {
    let Some(mut rig) = rig(u64::MAX) else { return };
    (0..4).for_each(|i| {
        rig.driver.add(0, &[buffer(i, 2048)]);
    });
    rig.net.set_link(false);
    assert_eq!(rig.driver.device_config::<2>(6), [0, 0]);
    assert_eq!(rig.driver.interrupts.take(0), 1);
    rig.net.set_link(false);
    assert_eq!(rig.driver.interrupts.take(0), 0);
    rig.wire.write_all(&frame(100)).unwrap();
    rig.driver.kick(0);
    rig.driver
        .put(DATA + 0x8_0000, &[vec![0; 12], frame(90)].concat());
    let packet = Segment::readable(DATA + 0x8_0000, 102);
    rig.driver.add(1, &[packet]);
    rig.driver.kick(1);
    rig.driver.wait_used(1);
    // One each way: only then has the receiving thread seen its packet, and may the plug be put in again.
    let Rig { driver, net, .. } = &mut rig;
    driver.wait_until("two lost packets", |_| dropped(net) == 2);
    rig.net.set_link(true);
    assert_eq!(rig.driver.device_config::<2>(6), [1, 0]);
    rig.wire.write_all(&frame(80)).unwrap();
    assert_eq!(rig.receive(2048).1, frame(80));
    rig.driver.add(1, &[packet]);
    rig.driver.kick(1);
    let mut seen = vec![0; 2000];
    let count = rig.wire.read(&mut seen).unwrap();
    assert_eq!(seen[..count], frame(90));
}

/// What the driver asks by its control queue `queue`, and the answer.
fn command(rig: &mut Rig, queue: usize, class: u8, number: u8, data: &[u8]) -> u8 {
    let at = COMMAND;
    rig.driver.put(at, &[&[class, number], data].concat());
    rig.driver.put(at + 0x2000, &[0xee]);
    let size = u32::try_from(data.len()).unwrap();
    let chain = [
        Segment::readable(at, 2),
        Segment::readable(at + 2, size),
        Segment::writable(at + 0x2000, 1),
    ];
    let data_is_empty = data.is_empty();
    let chain: Vec<_> = chain
        .into_iter()
        .filter(|segment| segment.size > 0 || !data_is_empty)
        .collect();
    rig.driver.add(queue, &chain);
    rig.driver.kick(queue);
    assert_eq!(rig.driver.wait_used(queue).1, 1);
    rig.driver.get(at + 0x2000, 1)[0]
}

#[test]
fn commands_and_nonsense_on_the_control_queue() {
    let Some(mut rig) = rig(u64::MAX) else { return };
    // Class, number, data, answer.
    let cases: [(u8, u8, &[u8], u8); 16] = [
        (0, 0, &[0], 0),
        (0, 5, &[1], 0),
        (0, 6, &[1], 1),
        (0, 0, &[2], 1),
        (0, 0, &[], 1),
        (1, 1, &[2, 0, 0, 0, 0, 7], 0),
        (1, 1, &[3, 0, 0, 0, 0, 7], 1),
        (1, 1, &[2, 0, 0], 1),
        (1, 0, &[0; 8], 0),
        (1, 0, &[0xff; 8], 1),
        (2, 0, &[1, 0], 1),
        (4, 0, &[1, 0], 0),
        (4, 0, &[2, 0], 1),
        (4, 0, &[0, 0], 1),
        (5, 0, &[0; 8], 0),
        (5, 0, &[0xff; 8], 1),
    ];
    for (class, number, data, answer) in cases {
        let said = command(&mut rig, 2, class, number, data);
        assert_eq!(said, answer, "{class} {number} {data:?}");
    }
    assert_eq!(rig.driver.device_config::<6>(0), [2, 0, 0, 0, 0, 7]);
    assert_eq!(command(&mut rig, 2, 1, 0, &[0; 5000]), 1);
    // A reset takes everything back.
    rig.driver.reset();
    rig.driver.start(u64::MAX);
    assert_eq!(rig.driver.device_config::<6>(0), MAC);
    rig.driver.add(2, &[Segment::readable(DATA, 3)]);
    rig.driver.kick(2);
    rig.driver.wait_broken();
}

/// Another vCPU makes an address one of many cards, and a number of pairs an impossible one, and back: what the card
/// has agreed to, it has.
#[test]
fn a_command_that_changes_while_it_is_read() {
    let Some(mut rig) = rig_with(u64::MAX, 2) else {
        return;
    };
    let memory = rig.driver.memory.clone();
    while_it_changes(&memory, COMMAND + 2, [[2], [3]], || {
        let answer = command(&mut rig, 4, 1, 1, &[2, 0, 0, 0, 0, 7]);
        assert!(answer <= 1, "{answer}");
        assert_eq!(rig.driver.device_config::<1>(0), [2]);
        answer == 0
    });
    while_it_changes(&memory, COMMAND + 3, [[0], [0x7f]], || {
        let answer = command(&mut rig, 4, 4, 0, &[2, 0]);
        assert!(answer <= 1, "{answer}");
        let saved = rig.net.save();
        assert!(saved.state["asked"]["active_pairs"].as_u64().unwrap() <= 2);
        answer == 0
    });
    assert_eq!(rig.driver.status(), 15);
}

#[test]
fn a_driver_gets_only_what_it_wants() {
    let Some(mut rig) = rig(u64::MAX) else { return };
    (0..8).for_each(|i| {
        rig.driver.add(0, &[buffer(i, 2048)]);
    });
    assert_eq!(command(&mut rig, 2, 0, 0, &[0]), 0);
    let to = |to: [u8; 6], size| [&to[..], &frame(size)[6..]].concat();
    rig.wire.write_all(&to([2, 9, 9, 9, 9, 9], 100)).unwrap();
    rig.wire
        .write_all(&to([0x33, 0x33, 0, 0, 0, 1], 110))
        .unwrap();
    rig.wire.write_all(&to([0xff; 6], 120)).unwrap();
    rig.driver.kick(0);
    assert_eq!(rig.receive(2048).1.len(), 120);
    assert!(dropped(&rig.net) >= 2);
    let address = [2, 9, 9, 9, 9, 9];
    let tables = [&1u32.to_le_bytes()[..], &address, &0u32.to_le_bytes()].concat();
    assert_eq!(command(&mut rig, 2, 1, 0, &tables), 0);
    rig.wire.write_all(&to(address, 130)).unwrap();
    assert_eq!(rig.receive(2048).1.len(), 130);
}

#[test]
fn several_pairs_carry_packets() {
    let Some(mut rig) = rig_with(u64::MAX, 4) else {
        return;
    };
    assert_eq!(rig.driver.device_config::<2>(8), [4, 0]);
    assert_eq!(rig.driver.rings.len(), 9);
    assert_eq!(command(&mut rig, 8, 4, 0, &[4, 0]), 0);
    for pair in 0..4 {
        rig.driver.put(DATA, &[vec![0; 12], frame(200)].concat());
        rig.driver
            .add(2 * pair + 1, &[Segment::readable(DATA, 212)]);
        rig.driver.kick(2 * pair + 1);
        let mut seen = vec![0; 2000];
        let count = rig.wire.read(&mut seen).unwrap();
        assert_eq!(seen[..count], frame(200));
    }
    // Back to one: whatever flow a packet is of, it comes to the first.
    assert_eq!(command(&mut rig, 8, 4, 0, &[1, 0]), 0);
    (0..4).for_each(|i| {
        rig.driver.add(0, &[buffer(i, 2048)]);
    });
    rig.driver.kick(0);
    rig.wire.write_all(&frame(300)).unwrap();
    assert_eq!(rig.receive(2048).1, frame(300));
    // A driver that knows of one pair finds the control queue behind it.
    rig.driver.reset();
    assert!(rig.driver.negotiate(1 << 32 | 1 << 17));
    rig.driver.rings.clear();
    for queue in 0..3 {
        rig.driver.enable_queue(queue, 64);
    }
    rig.driver.set_status(15);
    assert_eq!(command(&mut rig, 2, 4, 0, &[1, 0]), 0);
}

/// An Ethernet frame with IPv4 and `protocol` (6: TCP, 17: UDP), from the guest's port `port` to the host's 7, or the
/// way back.
fn ip_frame(protocol: u8, port: u16, back: bool, payload: usize) -> Vec<u8> {
    let other = [2, 0, 0, 0, 0, 2];
    let header = if protocol == 6 { 20 } else { 8 };
    let mut ends = [(MAC, [10, 0, 0, 1], port), (other, [10, 0, 0, 2], 7)];
    if back {
        ends.swap(0, 1);
    }
    let [(from_mac, from, from_port), (to_mac, to, to_port)] = ends;
    let mut frame = [to_mac, from_mac].concat();
    frame.extend([8, 0, 0x45, 0]);
    let total = u16::try_from(20 + header + payload).unwrap();
    frame.extend(total.to_be_bytes());
    frame.extend([0, 0, 0, 0, 64, protocol, 0, 0]);
    frame.extend(from);
    frame.extend(to);
    frame.extend([from_port, to_port].map(u16::to_be_bytes).as_flattened());
    match protocol {
        6 => frame.extend([0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 1, 0, 0, 0, 0, 0]),
        _ => {
            frame.extend(u16::try_from(8 + payload).unwrap().to_be_bytes());
            frame.extend([0, 0]);
        }
    }
    frame.resize(14 + 20 + header + payload, 0x5a);
    frame
}

#[test]
fn a_packet_comes_on_the_pair_on_which_its_flow_was_sent() {
    const PAIRS: u16 = 4;
    let Some(mut rig) = rig_with(u64::MAX, PAIRS) else {
        return;
    };
    assert_eq!(command(&mut rig, 8, 4, 0, &[4, 0]), 0);
    rig.wire = packet_socket(0x0800);
    let place = |pair: u16| DATA + u64::from(pair) * 0x1_0000;
    // Every flow moves from pair to pair, as a program does from vCPU to vCPU.
    for round in 0..PAIRS {
        for flow in 0..PAIRS {
            let pair = (flow + round) % PAIRS;
            let (receive, transmit) = (usize::from(2 * pair), usize::from(2 * pair + 1));
            let sent = ip_frame(17, 1000 + flow, false, 50);
            let size = u32::try_from(12 + sent.len()).unwrap();
            rig.driver.put(place(pair), &[vec![0; 12], sent].concat());
            let packet = Segment::readable(place(pair), size);
            rig.driver.add(transmit, &[packet]);
            rig.driver.kick(transmit);
            rig.driver.wait_used(transmit);
            let buffer = Segment::writable(place(pair) + 0x8000, 2048);
            rig.driver.add(receive, &[buffer]);
            rig.driver.kick(receive);
            let back = ip_frame(17, 1000 + flow, true, 60);
            rig.wire.write_all(&back).unwrap();
            let (_, written) = rig.driver.wait_used(receive);
            let size = usize::try_from(written).unwrap();
            let seen = rig.driver.get(place(pair) + 0x8000, size);
            assert_eq!(seen[12..], back, "flow {flow} on pair {pair}");
        }
    }
}

/// `struct virtio_net_hdr` of a frame whose segments and checksums are left to others.
fn large(kind: u8, protocol: u8, segment: u16) -> Vec<u8> {
    let (header, checksum): (u16, u16) = if protocol == 6 { (20, 16) } else { (8, 6) };
    let mut bytes = vec![1, kind]; // VIRTIO_NET_HDR_F_NEEDS_CSUM.
    for word in [34 + header, segment, 34, checksum] {
        bytes.extend(word.to_le_bytes());
    }
    bytes
}

/// Whether packets of the socket have a `struct virtio_net_hdr` before them, both ways.
fn with_headers(socket: &File, on: bool) {
    let on = i32::from(on);
    // SAFETY: an open socket, an int and its size.
    let set = unsafe {
        let (value, size) = ((&raw const on).cast(), 4);
        let name = libc::PACKET_VNET_HDR;
        libc::setsockopt(socket.as_raw_fd(), libc::SOL_PACKET, name, value, size)
    };
    assert_eq!(set, 0);
}

/// Waits for `count` packets of at most 1000 bytes behind their headers, with their checksums, and those flags.
fn small_packets(rig: &mut Rig, count: usize, flags: u8, name: &str) {
    for _ in 0..count {
        let (head, written) = rig.driver.wait_used(0);
        let seen = rig.buffer(head, 4096, written);
        assert_eq!((seen[0], seen[1]), (flags, 0), "{name}");
        assert!(seen.len() < 1100, "{name}: {} bytes", seen.len());
    }
}

const FRAGMENTS: &str = "UDP in fragments";

/// What the driver accepts, the tap leaves to it; what it does not, the kernel has done before.
#[test]
fn large_segments_go_whole_to_whom_they_were_offered() {
    // Features to receive and to send them, their kind in the header, protocol, packets of a wire that carry the same.
    // A datagram is cut with its header, so that it takes one more; and Linux takes one for its fragments from a tap, but
    // gives it fragments since 4.14.
    let kinds: [(&str, u64, u8, u8, usize); 3] = [
        ("TCP", 1 << 1 | 1 << 7 | 1 << 11, 1, 6, 3),
        ("UDP", 1 << 1 | 1 << 54 | 1 << 55 | 1 << 56, 5, 17, 3),
        (FRAGMENTS, 1 << 1 | 1 << 10 | 1 << 14, 3, 17, 4),
    ];
    for (name, features, kind, protocol, small) in kinds {
        // Version 1, checksums, merged buffers; and what the kind needs.
        let Some(mut rig) = rig(1 << 32 | 1 | 1 << 15 | features) else {
            return;
        };
        if rig.driver.offered() & features != features {
            println!("ATOLL-SKIP: this kernel's tap has no large segments of {name}");
            continue;
        }
        rig.wire = packet_socket(0x0800);
        with_headers(&rig.wire, true);
        let frame = ip_frame(protocol, 1000, true, 3000);
        let packet = [large(kind, protocol, 1000), frame.clone()].concat();
        (0..8).for_each(|i| {
            rig.driver.add(0, &[buffer(i, 4096)]);
        });
        rig.driver.kick(0);
        rig.wire.write_all(&packet).unwrap();
        if name != FRAGMENTS {
            let (head, written) = rig.driver.wait_used(0);
            let seen = rig.buffer(head, 4096, written);
            assert_eq!(seen.len(), 12 + frame.len(), "{name}: whole");
            assert_eq!(seen[1] & 0x7f, kind, "{name}");
        } else {
            const DATA_VALID: u8 = 2; // VIRTIO_NET_HDR_F_DATA_VALID.
            small_packets(&mut rig, small, DATA_VALID, name);
        }
        // The other way.
        let sent = ip_frame(protocol, 1000, false, 3000);
        let mut packet = large(kind, protocol, 1000);
        packet.extend([0, 0]);
        packet.extend(&sent);
        rig.driver.put(DATA + 0x8_0000, &packet);
        let size = u32::try_from(packet.len()).unwrap();
        rig.driver
            .add(1, &[Segment::readable(DATA + 0x8_0000, size)]);
        // The kernel has no name for fragments in a header that it writes.
        let has_header = name != FRAGMENTS;
        with_headers(&rig.wire, has_header);
        rig.driver.kick(1);
        let mut seen = vec![0; 8000];
        let count = rig.wire.read(&mut seen).unwrap();
        let header = if has_header { 10 } else { 0 };
        assert_eq!(count, header + sent.len(), "{name}: whole");
        assert!(!has_header || seen[1] & 0x7f == kind, "{name}");
        rig.driver.wait_used(1);
        with_headers(&rig.wire, true);
        // A driver that did not ask for it gets what fits on a wire, with its checksums.
        rig.driver.reset();
        rig.driver.start(1 << 32 | 1 << 15);
        (0..8).for_each(|i| {
            rig.driver.add(0, &[buffer(i, 4096)]);
        });
        rig.driver.kick(0);
        let packet = [large(kind, protocol, 1000), frame.clone()].concat();
        rig.wire.write_all(&packet).unwrap();
        small_packets(&mut rig, small, 0, name);
    }
}

#[test]
fn a_rate_limit_delays_and_loses_nothing() {
    let Some(mut rig) = rig(u64::MAX) else { return };
    let rate = Rate {
        bytes_per_second: 20_000,
        burst_bytes: 1,
    };
    rig.net.set_limits(None, Some(rate));
    let start = std::time::Instant::now();
    rig.driver.put(DATA, &[vec![0; 12], frame(1000)].concat());
    for _ in 0..4 {
        rig.driver.add(1, &[Segment::readable(DATA, 1012)]);
    }
    rig.driver.kick(1);
    for _ in 0..4 {
        rig.driver.wait_used(1);
    }
    // The first goes at once, each of the others after the debt of the one before it: 50 ms.
    let took = start.elapsed();
    assert!(took.as_millis() >= 145, "{took:?}");
    // The second would wait for a quarter of an hour; it goes once the limit is lifted.
    let rate = Rate {
        bytes_per_second: 1,
        burst_bytes: 1,
    };
    rig.net.set_limits(None, Some(rate));
    for _ in 0..2 {
        rig.driver.add(1, &[Segment::readable(DATA, 1012)]);
    }
    rig.driver.kick(1);
    rig.driver.wait_used(1);
    rig.net.set_limits(None, None);
    rig.driver.wait_used(1);
}

#[test]
fn an_announcement_is_a_frame_and_a_question_to_the_guest() {
    let Some(mut rig) = rig(u64::MAX) else { return };
    rig.net.announce();
    assert_eq!(rig.driver.device_config::<2>(6), [3, 0]);
    assert_eq!(rig.driver.interrupts.take(0), 1);
    assert_eq!(command(&mut rig, 2, 3, 0, &[]), 0);
    assert_eq!(rig.driver.device_config::<2>(6), [1, 0]);
    let (sent, _) = rig.driver.device.counters();
    assert!(sent.contains(&("sent", 0)), "the frame is not the guest's");
}

#[test]
fn a_tap_of_one_queue_is_refused_for_several() {
    let Some(rig) = rig(u64::MAX) else { return };
    drop(rig);
    let mut ip = Command::new("ip");
    ip.args("tuntap add dev t1 mode tap vnet_hdr".split(' '));
    assert!(ip.status().unwrap().success());
    let error = Tap::open_queues("t1", 2).unwrap_err().to_string();
    assert!(error.contains("make it with `multi_queue`"), "{error}");
}

#[test]
fn what_the_driver_asked_for_is_state() {
    let Some(mut rig) = rig_with(u64::MAX, 2) else {
        return;
    };
    assert_eq!(command(&mut rig, 4, 4, 0, &[2, 0]), 0);
    assert_eq!(command(&mut rig, 4, 0, 0, &[0]), 0);
    assert_eq!(command(&mut rig, 4, 1, 1, &[2, 0, 0, 0, 0, 7]), 0);
    rig.driver.device.pause();
    let saved = rig.net.save();
    assert_eq!(saved.state["asked"]["active_pairs"], 2);
    assert_eq!(saved.state["asked"]["filter"]["promiscuous"], false);
    rig.driver.reset();
    assert_eq!(rig.net.save().state["asked"], serde_json::Value::Null);
    rig.net.restore(&saved).unwrap();
    assert_eq!(rig.net.save(), saved);
    let mut other = saved;
    other.state["pair_count"] = 4.into();
    let refused = rig.net.restore(&other).unwrap_err().to_string();
    let expected = "virtio-net: the number of queue pairs was 4 and is now 2";
    assert_eq!(refused, expected);
}

#[test]
fn impossible_packets() {
    let Some(mut rig) = rig(u64::MAX) else { return };
    // A header that the kernel refuses: the packet is dropped, the device goes on.
    rig.driver.put(DATA, &[0xff; 2048]);
    rig.driver.add(1, &[Segment::readable(DATA, 200)]);
    rig.driver.kick(1);
    rig.driver.wait_used(1);
    assert_eq!(rig.driver.status(), 15);
    // No frame at all: the driver is broken.
    rig.driver.add(1, &[Segment::readable(DATA, 12)]);
    rig.driver.kick(1);
    rig.driver.wait_broken();
}

#[test]
fn configuration_and_names() {
    let Some(rig) = rig(u64::MAX) else { return };
    assert_eq!(rig.driver.device_config::<6>(0), MAC);
    assert_eq!(rig.driver.device_config::<6>(6), [1, 0, 1, 0, 0x28, 0x23]);
    let second = Tap::open("t0").unwrap_err();
    let said = "tap t0 is in use by another process: ";
    assert!(second.to_string().starts_with(said), "{second}");
    let loopback = [
        Tap::open("lo").map(drop),
        Tap::open_queues("lo", 2).map(drop),
    ];
    for refused in loopback {
        let error = refused.unwrap_err();
        assert!(matches!(error, TapError::NoTap { .. }), "{error}");
    }
    for name in ["", "a/b", "a-name-that-is-too-long"] {
        assert!(matches!(Tap::open(name), Err(TapError::Name { .. })));
    }
    let file = File::open("/dev/null").unwrap();
    assert!(matches!(
        Tap::from_file(file, "fd 3"),
        Err(TapError::Kind { .. })
    ));
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The socket device: connections from either side, credit, ends, and drivers that ignore all of it.

use std::fs::File;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use atoll_devices::state::DeviceState;
use atoll_devices::testing::{Driver, Segment};
use atoll_devices::virtio::vsock::Vsock;

use crate::pitfalls::while_it_changes;

const DATA: u64 = 0x10_0000;
/// Where a packet of the guest is.
const PACKET: u64 = 0x20_0000;
const CID: u64 = 7;
const REQUEST: u16 = 1;
const RESPONSE: u16 = 2;
const RESET: u16 = 3;
const SHUTDOWN: u16 = 4;
const RW: u16 = 5;
const CREDIT_UPDATE: u16 = 6;
const CREDIT_REQUEST: u16 = 7;

pub struct Rig {
    pub driver: Driver,
    pub device: Arc<Vsock>,
    pub path: PathBuf,
    /// What the guest says of its buffer with every packet.
    credit: (u32, u32),
    _directory: tempfile::TempDir,
}

/// A packet that the guest got.
#[derive(Debug, PartialEq, Eq)]
struct Packet {
    host: u32,
    guest: u32,
    operation: u16,
    flags: u32,
    forwarded: u32,
    data: Vec<u8>,
}

pub fn rig() -> Rig {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("v");
    let listener = UnixListener::bind(&path).unwrap();
    let cid = u32::try_from(CID).unwrap();
    let device = Arc::new(Vsock::new(cid, path.clone(), listener).unwrap());
    let driver = Driver::new(device.clone());
    Rig {
        driver,
        device,
        path,
        credit: (1 << 20, 0),
        _directory: directory,
    }
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

impl Rig {
    fn start(&mut self) {
        self.driver.start(u64::MAX);
        for _ in 0..32 {
            self.offer();
        }
    }

    fn offer(&mut self) {
        let at = DATA + 0x2000 * u64::from(self.driver.rings[0].size);
        let slot = self.driver.rings[0].descriptors;
        // Each buffer at a place of its own: by the number of the descriptor that will hold it.
        let head = self.driver.add(0, &[Segment::writable(at, 4096)]);
        let address = DATA + 0x1000 * u64::from(head % 128);
        self.driver
            .put(slot + u64::from(head) * 16, &address.to_le_bytes());
        self.driver.kick(0);
    }

    fn say(&mut self, (host, guest): (u32, u32), operation: u16, flags: u32, data: &[u8]) {
        let mut packet = Vec::new();
        packet.extend(CID.to_le_bytes());
        packet.extend(2u64.to_le_bytes());
        packet.extend(guest.to_le_bytes());
        packet.extend(host.to_le_bytes());
        packet.extend(u32::try_from(data.len()).unwrap().to_le_bytes());
        packet.extend(1u16.to_le_bytes());
        packet.extend(operation.to_le_bytes());
        packet.extend(flags.to_le_bytes());
        packet.extend(self.credit.0.to_le_bytes());
        packet.extend(self.credit.1.to_le_bytes());
        packet.extend(data);
        self.send(&packet);
    }

    fn send(&mut self, packet: &[u8]) {
        self.driver.put(PACKET, packet);
        let size = u32::try_from(packet.len()).unwrap();
        self.driver.add(1, &[Segment::readable(PACKET, size)]);
        self.driver.kick(1);
        self.driver.wait_used(1);
    }

    fn hear(&mut self) -> Packet {
        let (head, size) = self.driver.wait_used(0);
        let slot = self.driver.rings[0].descriptors + u64::from(head) * 16;
        let address = u64::from_le_bytes(self.driver.get(slot, 8).try_into().unwrap());
        let bytes = self.driver.get(address, usize::try_from(size).unwrap());
        self.offer();
        assert_eq!(word(&bytes, 24), size - 44);
        assert_eq!((bytes[0], u64::from(bytes[8])), (2, CID));
        Packet {
            guest: word(&bytes, 20),
            host: word(&bytes, 16),
            operation: u16::from_le_bytes([bytes[30], bytes[31]]),
            flags: word(&bytes, 32),
            forwarded: word(&bytes, 40),
            data: bytes[44..].to_vec(),
        }
    }

    /// The host's program listens on a port; the guest connects to it.
    fn connected(&mut self, port: u32) -> (UnixStream, (u32, u32)) {
        let path = format!("{}_{port}", self.path.display());
        let listener = UnixListener::bind(path).unwrap();
        let ports = (port, 1234);
        self.say(ports, REQUEST, 0, b"");
        let stream = accept(&listener);
        let answer = self.hear();
        assert_eq!(
            (answer.operation, answer.host, answer.guest),
            (RESPONSE, port, 1234)
        );
        (stream, ports)
    }
}

fn accept(listener: &UnixListener) -> UnixStream {
    let (stream, _) = listener.accept().unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    stream
}

#[test]
fn a_guest_connects_and_bytes_flow_both_ways() {
    let mut rig = rig();
    rig.start();
    assert_eq!(rig.driver.device_config::<8>(0), CID.to_le_bytes());
    let (mut stream, ports) = rig.connected(5000);
    rig.say(ports, RW, 0, b"from the guest");
    let mut seen = [0; 14];
    stream.read_exact(&mut seen).unwrap();
    assert_eq!(&seen, b"from the guest");
    stream.write_all(b"from the host").unwrap();
    let packet = rig.hear();
    assert_eq!(
        (packet.operation, &packet.data[..]),
        (RW, &b"from the host"[..])
    );
    assert_eq!(packet.forwarded, 14);
    // Half-closed by the host's program: the guest may still send.
    stream.shutdown(Shutdown::Write).unwrap();
    let packet = rig.hear();
    assert_eq!((packet.operation, packet.flags), (SHUTDOWN, 2));
    rig.say(ports, RW, 0, b"last");
    rig.say(ports, SHUTDOWN, 3, b"");
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).unwrap();
    assert_eq!(rest, b"last");
    assert_eq!(rig.hear().operation, RESET);
    let (counters, _) = rig.driver.device.counters();
    assert_eq!(counters[2], ("connections", 0));
}

/// Opens files until this process may have no more; `drop` gives them back.
fn all_files() -> Vec<File> {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limits = getrlimit(Resource::Nofile);
    limits.current = Some(256);
    setrlimit(Resource::Nofile, limits).unwrap();
    std::iter::from_fn(|| File::open("/dev/null").ok()).collect()
}

#[test]
fn a_program_that_comes_when_no_file_is_left_is_heard_later() {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketType, connect, socket};
    let mut rig = rig();
    rig.start();
    let (_stream, ports) = rig.connected(5000);
    let program = socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
    let files = all_files();
    connect(&program, &SocketAddrUnix::new(&rig.path).unwrap()).unwrap();
    // So that the device has most likely tried.
    rig.say(ports, CREDIT_REQUEST, 0, b"");
    assert_eq!(rig.hear().operation, CREDIT_UPDATE);
    rig.say(ports, RESET, 0, b"");
    let mut program = UnixStream::from(program);
    program.write_all(b"CONNECT 80\n").unwrap();
    let request = rig.hear();
    assert_eq!((request.operation, request.guest), (REQUEST, 80));
    drop(files);
}

#[test]
fn a_program_of_the_host_connects() {
    let mut rig = rig();
    rig.start();
    let mut program = UnixStream::connect(&rig.path).unwrap();
    program.write_all(b"CONNECT 80\nGET").unwrap();
    let request = rig.hear();
    assert_eq!((request.operation, request.guest), (REQUEST, 80));
    let ports = (request.host, 80);
    rig.say(ports, RESPONSE, 0, b"");
    let data = rig.hear();
    assert_eq!((data.operation, &data.data[..]), (RW, &b"GET"[..]));
    let expected = format!("OK {}\n", ports.0);
    let mut line = vec![0; expected.len()];
    program.read_exact(&mut line).unwrap();
    assert_eq!(line, expected.as_bytes());
    // Nobody at that port of the guest: the program's connection ends.
    let mut second = UnixStream::connect(&rig.path).unwrap();
    second.write_all(b"CONNECT 81\n").unwrap();
    let request = rig.hear();
    rig.say((request.host, 81), RESET, 0, b"");
    assert_eq!(second.read(&mut [0; 8]).unwrap(), 0);
    for nonsense in [&b"CONNECT x\n"[..], b"GET / HTTP/1.1\r\n", &[b'a'; 64]] {
        let mut third = UnixStream::connect(&rig.path).unwrap();
        third.write_all(nonsense).unwrap();
        let end = third.read(&mut [0; 8]);
        assert!(matches!(end, Ok(0) | Err(_)), "{end:?}");
    }
}

#[test]
fn nobody_sends_more_than_there_is_room_for() {
    let mut rig = rig();
    rig.credit = (10, 0);
    rig.start();
    let (mut stream, ports) = rig.connected(5000);
    stream.write_all(&[7; 25]).unwrap();
    assert_eq!(rig.hear().data.len(), 10);
    rig.credit = (10, 4);
    rig.say(ports, CREDIT_UPDATE, 0, b"");
    assert_eq!(rig.hear().data.len(), 4);
    rig.credit = (1000, 14);
    rig.say(ports, CREDIT_UPDATE, 0, b"");
    assert_eq!(rig.hear().data.len(), 11);
    rig.say(ports, CREDIT_REQUEST, 0, b"");
    assert_eq!(rig.hear().operation, CREDIT_UPDATE);
    // A guest that is not read and goes on sending is reset once it is beyond our buffer and the socket's.
    let mut sent = 0;
    let (counters, _) = loop {
        rig.say(ports, RW, 0, &[1; 16 << 10]);
        sent += 16 << 10;
        let counters = rig.driver.device.counters();
        if counters.0[2].1 == 0 {
            break counters;
        }
        assert!(sent < 16 << 20, "no end");
    };
    assert!(counters.contains(&("connections", 0)));
    while rig.hear().operation != RESET {}
    drop(stream);
}

#[test]
fn reads_of_the_host_earn_credit() {
    let mut rig = rig();
    rig.start();
    let (mut stream, ports) = rig.connected(5000);
    let reader = std::thread::Builder::new().spawn(move || {
        let mut seen = vec![0; 1 << 20];
        stream.read_exact(&mut seen).unwrap();
        (stream, seen)
    });
    let (mut sent, mut forwarded) = (0u32, 0u32);
    while sent < 1 << 20 {
        while sent - forwarded > (256 << 10) - 4096 {
            forwarded = rig.hear().forwarded;
        }
        rig.say(ports, RW, 0, &[sent.to_le_bytes()[1]; 4096]);
        sent += 4096;
    }
    let (stream, seen) = reader.unwrap().join().unwrap();
    assert!(
        seen.iter()
            .enumerate()
            .all(|(i, byte)| *byte == (i >> 12 << 4).to_le_bytes()[0])
    );
    drop(stream);
    let packet = loop {
        let packet = rig.hear();
        if packet.operation != CREDIT_UPDATE {
            break packet;
        }
    };
    assert!(matches!(packet.operation, SHUTDOWN | RESET), "{packet:?}");
}

#[test]
fn what_does_not_belong_to_a_connection_is_reset() {
    let mut rig = rig();
    rig.start();
    for operation in [RESPONSE, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST, 0, 99] {
        rig.say((1, 2), operation, 0, b"");
        assert_eq!(rig.hear().operation, RESET, "{operation}");
    }
    // Nobody listens; a second request on the same ports.
    rig.say((4000, 2), REQUEST, 0, b"");
    assert_eq!(rig.hear().operation, RESET);
    let (_stream, ports) = rig.connected(5000);
    rig.say(ports, REQUEST, 0, b"");
    assert_eq!(rig.hear().operation, RESET);
    // Others' addresses are nobody's: no answer.
    let mut packet = vec![0; 44];
    packet[0] = 99;
    rig.send(&packet);
    // A driver that provokes answers and takes none costs a bounded amount.
    rig.driver.reset();
    rig.driver.start(u64::MAX);
    for _ in 0..3000 {
        rig.say((1, 2), RW, 0, b"");
    }
    assert_eq!(rig.driver.status(), 15);
}

/// A program of the host that listens and takes nobody: the guest is refused, and nothing waits for the program.
#[test]
fn a_program_that_accepts_nobody_holds_nothing_up() {
    let mut rig = rig();
    rig.start();
    let path = format!("{}_5000", rig.path.display());
    let listener = UnixListener::bind(path).unwrap();
    // Of its queue there is room for one that waits.
    rustix::net::listen(&listener, 0).unwrap();
    rig.say((5000, 1), REQUEST, 0, b"");
    assert_eq!(rig.hear().operation, RESPONSE);
    rig.say((5000, 2), REQUEST, 0, b"");
    assert_eq!(rig.hear().operation, RESET);
    let (_stream, _) = rig.connected(5001);
}

#[test]
fn after_a_restore_the_guest_is_told_that_connections_are_gone() {
    let mut rig = rig();
    rig.start();
    let saved = rig.device.save();
    rig.driver.reset();
    rig.device.restore(&saved).unwrap();
    rig.driver.start(u64::MAX);
    rig.driver.put(DATA, &[0xff; 8]);
    rig.driver.add(2, &[Segment::writable(DATA, 8)]);
    rig.driver.kick(2);
    assert_eq!(rig.driver.wait_used(2).1, 4);
    assert_eq!(rig.driver.get(DATA, 4), [0; 4]);
    let mut other = saved;
    other.state["cid"] = 8.into();
    let refused = rig.device.restore(&other).unwrap_err().to_string();
    assert_eq!(
        refused,
        "virtio-vsock: the guest's address was 8 and is now 7"
    );
}

/// Another vCPU makes a packet longer and shorter again: as many bytes come out as are counted.
#[test]
fn a_packet_that_changes_while_it_is_read() {
    let mut rig = rig();
    rig.start();
    let (mut stream, ports) = rig.connected(5000);
    let mut data = [7; 200];
    data[0] = 1;
    let sent = |driver: &Driver| driver.device.counters().0[1].1;
    let (mut before, memory) = (sent(&rig.driver), rig.driver.memory.clone());
    while_it_changes(&memory, PACKET + 24, [[10], [200]], || {
        rig.say(ports, RW, 0, &data);
        let count = sent(&rig.driver) - std::mem::replace(&mut before, sent(&rig.driver));
        assert!([10, 200].contains(&count), "{count}");
        let mut seen = vec![0; usize::try_from(count).unwrap()];
        stream.read_exact(&mut seen).unwrap();
        assert!(data.starts_with(&seen), "{seen:?}");
        count == 10
    });
    assert_eq!(rig.driver.status(), 15);
}

#[test]
fn packets_of_impossible_size() {
    for (size, claimed) in [(43, 0u32), (44, 1), (44, u32::MAX), (100, 57)] {
        let mut rig = rig();
        rig.start();
        let mut packet = vec![0; size];
        packet[0] = 7;
        packet[8] = 2;
        packet[24..28].copy_from_slice(&claimed.to_le_bytes());
        rig.driver.put(DATA, &packet);
        let size = u32::try_from(size).unwrap();
        rig.driver.add(1, &[Segment::readable(DATA, size)]);
        rig.driver.kick(1);
        rig.driver.wait_broken();
    }
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Console device and serial port on the shared backends.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use atoll_devices::bus::BusDevice;
use atoll_devices::console::{BACKLOG_BYTES, Console, ConsoleBackend};
use atoll_devices::platform::Serial;
use atoll_devices::state::DeviceState;
use atoll_devices::testing::{Driver, Line, Segment};
use atoll_devices::virtio::console::{PortOptions, VirtioConsole};

use crate::pitfalls::while_it_changes;

const DATA: u64 = 0x10_0000;
const PATIENCE: Duration = Duration::from_secs(20);

pub fn socket() -> (tempfile::TempDir, PathBuf, Console) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let console = Console::open(&ConsoleBackend::Socket(path.clone())).unwrap();
    (directory, path, console)
}

pub fn connect(path: &PathBuf) -> UnixStream {
    let stream = UnixStream::connect(path).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

fn read(stream: &mut impl Read, size: usize) -> Vec<u8> {
    let mut data = vec![0; size];
    stream.read_exact(&mut data).unwrap();
    data
}

/// A terminal and an agent's channel, as the driver gets to know them.
#[test]
fn named_ports_are_announced_and_carry_bytes() {
    let (_directory, _, console) = socket();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("agent");
    let channel = Console::open(&ConsoleBackend::Channel(path.clone())).unwrap();
    let port = |port, name: Option<&str>| PortOptions {
        port,
        name: name.map(str::to_owned),
    };
    let ports = vec![
        port(console.port(), None),
        port(channel.port(), Some("a.0")),
    ];
    let device = Arc::new(VirtioConsole::with_ports(ports).unwrap());
    let mut driver = Driver::new(device.clone());
    driver.start(u64::MAX);
    assert_eq!(driver.rings.len(), 6);
    assert_eq!(driver.device_config::<4>(4), [2, 0, 0, 0]);
    let say = |driver: &mut Driver, port: u8, event: u8, value: u8| {
        driver.put(DATA, &[port, 0, 0, 0, event, 0, value, 0]);
        driver.add(3, &[Segment::readable(DATA, 8)]);
        driver.kick(3);
        driver.wait_used(3);
    };
    let hear = |driver: &mut Driver| {
        driver.add(2, &[Segment::writable(DATA + 4096, 64)]);
        driver.kick(2);
        let (_, count) = driver.wait_used(2);
        driver.get(DATA + 4096, usize::try_from(count).unwrap())
    };
    say(&mut driver, 0, 0, 1);
    assert_eq!(hear(&mut driver), [0, 0, 0, 0, 1, 0, 1, 0]);
    assert_eq!(hear(&mut driver), [1, 0, 0, 0, 1, 0, 1, 0]);
    say(&mut driver, 0, 3, 1);
    say(&mut driver, 1, 3, 1);
    assert_eq!(device.save().state["waiting"].as_array().unwrap().len(), 4);
    assert_eq!(hear(&mut driver), [0, 0, 0, 0, 4, 0, 1, 0]);
    assert_eq!(hear(&mut driver), [0, 0, 0, 0, 6, 0, 1, 0]);
    assert_eq!(hear(&mut driver), b"\x01\0\0\0\x07\0\x01\0a.0");
    assert_eq!(hear(&mut driver), [1, 0, 0, 0, 6, 0, 1, 0]);
    // What nobody heard does not reach the next client.
    driver.put(DATA, b"lost");
    driver.add(5, &[Segment::readable(DATA, 4)]);
    driver.kick(5);
    driver.wait_used(5);
    let mut client = connect(&path);
    client.write_all(b"ping").unwrap();
    driver.add(4, &[Segment::writable(DATA, 64)]);
    driver.kick(4);
    assert_eq!(driver.wait_used(4).1, 4);
    assert_eq!(driver.get(DATA, 4), b"ping");
    driver.put(DATA, b"pong");
    driver.add(5, &[Segment::readable(DATA, 4)]);
    driver.kick(5);
    driver.wait_used(5);
    assert_eq!(read(&mut client, 4), b"pong");
    // Nonsense is noted and forgotten; a thousand questions without room for an answer are bounded.
    for _ in 0..1000 {
        say(&mut driver, 0, 3, 1);
    }
    say(&mut driver, 9, 3, 1);
    say(&mut driver, 0, 99, 1);
    assert_eq!(
        device.save().state["waiting"].as_array().unwrap().len(),
        256
    );
    assert_eq!(driver.status(), 15);
    driver.add(2, &[Segment::writable(DATA, 3)]);
    driver.kick(2);
    driver.wait_broken();
}

/// Another vCPU makes a message of the driver's one about another port, and back: it is answered for the one or the other,
/// and not for half of each.
#[test]
fn a_message_that_changes_while_it_is_read() {
    let console = Console::open(&ConsoleBackend::Null).unwrap();
    let port = |name: Option<&str>| PortOptions {
        port: console.port(),
        name: name.map(str::to_owned),
    };
    let ports = vec![port(None), port(Some("a.0"))];
    let device = Arc::new(VirtioConsole::with_ports(ports).unwrap());
    let mut driver = Driver::new(device);
    driver.start(u64::MAX);
    driver.put(DATA, &[0, 0, 0, 0, 3, 0, 1, 0]);
    let hear = |driver: &mut Driver| {
        driver.add(2, &[Segment::writable(DATA + 4096, 64)]);
        driver.kick(2);
        let (_, count) = driver.wait_used(2);
        driver.get(DATA + 4096, usize::try_from(count).unwrap())
    };
    let of_console = [&[0, 0, 0, 0, 4, 0, 1, 0][..], &[0, 0, 0, 0, 6, 0, 1, 0]];
    let of_channel = [b"\x01\0\0\0\x07\0\x01\0a.0", &[1, 0, 0, 0, 6, 0, 1, 0][..]];
    while_it_changes(&driver.memory.clone(), DATA, [[0], [1]], || {
        driver.add(3, &[Segment::readable(DATA, 8)]);
        driver.kick(3);
        driver.wait_used(3);
        let heard = [hear(&mut driver), hear(&mut driver)];
        assert!(heard == of_console || heard == of_channel, "{heard:?}");
        heard == of_console
    });
    assert_eq!(driver.status(), 15);
}

#[test]
fn virtio_console_both_ways() {
    let (_directory, path, console) = socket();
    let mut driver = Driver::new(Arc::new(VirtioConsole::new(console.port()).unwrap()));
    driver.start(u64::MAX);
    let mut client = connect(&path);
    driver.put(DATA, b"hello");
    let chain = [Segment::readable(DATA, 2), Segment::readable(DATA + 2, 3)];
    driver.add(1, &chain);
    driver.kick(1);
    driver.wait_used(1);
    assert_eq!(read(&mut client, 5), b"hello");
    client.write_all(b"typed").unwrap();
    for (size, expected) in [(3, &b"typ"[..]), (8, b"ed")] {
        driver.add(0, &[Segment::writable(DATA, size)]);
        driver.kick(0);
        let (_, count) = driver.wait_used(0);
        let count = usize::try_from(count).unwrap();
        assert_eq!(driver.get(DATA, count), expected);
    }
    assert!(driver.interrupts.wait(1, PATIENCE));
}

#[test]
fn every_client_gets_the_backlog_first() {
    let (_directory, path, console) = socket();
    let port = console.port();
    let output: Vec<u8> = (0..=255).cycle().take(BACKLOG_BYTES + 1000).collect();
    output.chunks(777).for_each(|part| port.write(part));
    let mut clients = [connect(&path), connect(&path), connect(&path)];
    for client in &mut clients {
        assert_eq!(read(client, BACKLOG_BYTES), output[1000..]);
    }
    port.write(b"live");
    for client in &mut clients {
        assert_eq!(read(client, 4), b"live");
    }
    // A client that leaves, and one that never reads, disturb nobody.
    let [gone, idle, mut last] = clients;
    drop(gone);
    (0..40).for_each(|_| {
        port.write(&output[..16384]);
        assert_eq!(read(&mut last, 16384), output[..16384]);
    });
    drop(idle);
    drop(console);
    assert!(!path.exists());
}

#[test]
fn refuses_a_path_that_exists() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    std::fs::write(&path, "").unwrap();
    let error = Console::open(&ConsoleBackend::Socket(path)).err().unwrap();
    assert!(error.to_string().starts_with("console socket "), "{error}");
}

#[test]
fn serial_port_with_more_input_than_its_fifo() {
    let (_directory, path, console) = socket();
    let irq = Arc::new(Line::default());
    let serial = Serial::new(console.port(), irq.clone());
    let register = |offset| {
        let mut value = [0];
        serial.read(offset, &mut value);
        value[0]
    };
    serial.write(1, &[1]); // Interrupts for received data.
    let mut client = connect(&path);
    b"boot".iter().for_each(|byte| serial.write(0, &[*byte]));
    assert_eq!(read(&mut client, 4), b"boot");
    let typed: Vec<u8> = (0..=255).cycle().take(10_000).collect();
    let writer = std::thread::Builder::new();
    let copy = typed.clone();
    let writer = writer
        .spawn(move || client.write_all(&copy).unwrap())
        .unwrap();
    let (mut seen, deadline) = (Vec::new(), Instant::now() + PATIENCE);
    while seen.len() < typed.len() {
        assert!(Instant::now() < deadline);
        if register(5) & 1 != 0 {
            seen.push(register(0));
        }
    }
    writer.join().unwrap();
    assert_eq!(seen, typed);
    assert!(irq.edges() > 0);
    // Odd accesses do nothing.
    let mut wide = [0; 4];
    serial.read(0, &mut wide);
    serial.read(9, &mut wide);
    serial.write(0, &[1, 2]);
    assert_eq!(wide, [0xff; 4]);
    serial.reset();
    assert_eq!(register(1), 0);
}

/// What the guest had not read, and had not been told, when its machine was saved.
#[test]
fn a_serial_port_in_a_copy_has_its_input_and_its_interrupts() {
    let register = |serial: &Serial, offset| {
        let mut value = [0];
        serial.read(offset, &mut value);
        value[0]
    };
    // Interrupts for received data, and for room in the transmitter; the interrupt that is told (16550, table II).
    for (enabled, told) in [(1, 0xc4), (2, 0xc2)] {
        let (_directory, path, console) = socket();
        let serial = Serial::new(console.port(), Arc::new(Line::default()));
        serial.write(1, &[enabled]);
        connect(&path).write_all(b"ab").unwrap();
        let deadline = Instant::now() + PATIENCE;
        while serial.counters()[1] != ("bytes_read", 2) {
            assert!(Instant::now() < deadline);
            std::thread::yield_now();
        }
        serial.write(0, b"o");
        let saved = serial.save();
        let console = Console::open(&ConsoleBackend::Null).unwrap();
        let irq = Arc::new(Line::default());
        let copy = Serial::new(console.port(), irq.clone());
        copy.restore(&saved).unwrap();
        assert!(irq.edges() > 0, "told again");
        assert_eq!(register(&copy, 2), told);
        assert_eq!(register(&copy, 5) & 1, 1);
        assert_eq!([register(&copy, 0), register(&copy, 0)], *b"ab");
        assert_eq!(register(&copy, 5) & 1, 0);
        assert_eq!(register(&copy, 2), 0xc1, "nothing more to tell");
    }
}

#[test]
fn a_pseudo_terminal() {
    let console = Console::open(&ConsoleBackend::Pty).unwrap();
    let path = console.pty_path().unwrap();
    let mut terminal = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    let port = console.port();
    port.write(b"a\nb");
    assert_eq!(read(&mut terminal, 3), b"a\nb");
    terminal.write_all(b"x\r").unwrap();
    let deadline = Instant::now() + PATIENCE;
    while port.input_size() < 2 {
        assert!(Instant::now() < deadline);
        std::thread::yield_now();
    }
    let mut typed = [0; 8];
    assert_eq!(port.read(&mut typed), 2);
    assert_eq!(&typed[..2], b"x\r");
}

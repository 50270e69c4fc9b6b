// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Other people's clients, and a client that means harm.

use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::{CONNECTIONS_MAX, Content, Export, NbdBackend, NbdServer, converse};
use crate::backend::{BlockBackend, Geometry, Operation, Space};
use crate::changes::{BlockSet, Tracked};
use crate::conformance::{act, read, write};
use crate::{Freezable, MemoryBackend, Mirror, MirrorOptions};

const SIZE_BYTES: u64 = (9 << 20) + 512;
const BLOCK_BYTES: u32 = 64 << 10;

/// A disk with data here and there, what it holds, and which blocks are said to have changed.
fn disk() -> (Freezable, Vec<u8>, BlockSet) {
    let disk = Freezable::new(Arc::new(MemoryBackend::new(Geometry {
        size_bytes: SIZE_BYTES,
        read_only: false,
    })));
    let mut content = vec![0; usize::try_from(SIZE_BYTES).unwrap()];
    for (place, byte) in [
        (0, 1),
        (3 << 20, 2),
        ((3 << 20) + 65536, 3),
        (SIZE_BYTES - 512, 4),
    ] {
        write(&disk, place, &[byte; 512]).unwrap();
        let place = usize::try_from(place).unwrap();
        content[place..place + 512].fill(byte);
    }
    let mut changed = BlockSet::new(SIZE_BYTES, BLOCK_BYTES);
    changed.insert(&(0..1));
    changed.insert(&((3 << 20)..(3 << 20) + 65537));
    changed.insert(&(SIZE_BYTES - 1..SIZE_BYTES));
    (disk, content, changed)
}

fn exports(disk: &Freezable, changed: &BlockSet) -> Vec<Export> {
    let frozen = disk.freeze(tempfile::tempfile().unwrap()).unwrap();
    vec![Export {
        name: "disk0".to_owned(),
        content: Content::Frozen(frozen),
        changed: Some(("backup".to_owned(), changed.clone())),
    }]
}

/// Output of a tool that must succeed.
fn tool(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output();
    let output = output.unwrap_or_else(|error| panic!("{program}: {error}"));
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {error}");
    String::from_utf8(output.stdout).unwrap()
}

fn uri(socket: &Path) -> String {
    format!("nbd+unix:///disk0?socket={}", socket.display())
}

#[test]
fn qemu_img_and_libnbd_copy_the_moment_while_the_guest_writes() {
    let (disk, content, changed) = disk();
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("nbd");
    let listener = UnixListener::bind(&socket).unwrap();
    let server = NbdServer::start(listener, exports(&disk, &changed)).unwrap();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for round in 0_u64.. {
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                let sector = round * 7919 % (SIZE_BYTES / 512);
                write(&disk, sector * 512, &[99; 512]).unwrap();
            }
        });
        for (name, program, format) in [
            (
                "by-qemu-img",
                "qemu-img",
                &["convert", "-f", "raw", "-O", "raw"][..],
            ),
            ("by-nbdcopy", "nbdcopy", &[]),
        ] {
            let copy = directory.path().join(name);
            let mut arguments = format.to_vec();
            let (from, to) = (uri(&socket), copy.display().to_string());
            arguments.extend([from.as_str(), to.as_str()]);
            tool(program, &arguments);
            assert!(
                std::fs::read(&copy).unwrap() == content,
                "{program} copied something else"
            );
        }
        stop.store(true, Ordering::Relaxed);
    });
    drop(server);
    assert!(
        UnixStream::connect(&socket).is_err(),
        "nobody listens any more"
    );
}

#[test]
fn libnbd_is_told_what_changed() {
    let (disk, _, changed) = disk();
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("nbd");
    let listener = UnixListener::bind(&socket).unwrap();
    let _server = NbdServer::start(listener, exports(&disk, &changed)).unwrap();
    let map = tool(
        "nbdinfo",
        &["--map=qemu:dirty-bitmap:backup", &uri(&socket)],
    );
    let map: Vec<Vec<&str>> = map
        .lines()
        .map(|line| line.split_whitespace().collect())
        .collect();
    let block = u64::from(BLOCK_BYTES).to_string();
    let last = (SIZE_BYTES - 512).to_string();
    let expected: Vec<(&str, &str, &str)> = vec![
        ("0", &block, "1"),
        ("65536", "3080192", "0"),
        ("3145728", "131072", "1"),
        ("3276800", "6160384", "0"),
        (&last, "512", "1"),
    ];
    let found: Vec<_> = map.iter().map(|line| (line[0], line[1], line[2])).collect();
    assert_eq!(found, expected);
    let about = tool("nbdinfo", &[&uri(&socket)]);
    for said in [
        "is_read_only: true",
        "can_multi_conn: true",
        "qemu:dirty-bitmap:backup",
    ] {
        assert!(about.contains(said), "{about}");
    }
    let listed = tool(
        "nbdinfo",
        &[
            "--list",
            &format!("nbd+unix://?socket={}", socket.display()),
        ],
    );
    assert!(listed.contains("export=\"disk0\""), "{listed}");
}

#[test]
fn the_end_of_an_export_ends_its_clients() {
    let (disk, _, changed) = disk();
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("nbd");
    let listener = UnixListener::bind(&socket).unwrap();
    let server = NbdServer::start(listener, exports(&disk, &changed)).unwrap();
    // One more than there is room for.
    let mut clients: Vec<_> = (0..=CONNECTIONS_MAX)
        .map(|_| UnixStream::connect(&socket).unwrap())
        .collect();
    let mut hello = [0; 18];
    let greeted = clients
        .iter_mut()
        .filter_map(|client| client.read_exact(&mut hello).ok());
    assert_eq!(greeted.count(), CONNECTIONS_MAX);
    assert_eq!(server.connection_count(), CONNECTIONS_MAX);
    drop(server);
    for mut client in clients {
        assert_eq!(client.read(&mut hello).unwrap(), 0);
    }
}

/// What a client sends, and room for what it is told.
struct Script {
    sent: io::Cursor<Vec<u8>>,
    told: Vec<u8>,
}

impl Read for Script {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.sent.read(buffer)
    }
}

impl Write for Script {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.told.write(data)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

pub(super) fn option(number: u32, data: &[u8]) -> Vec<u8> {
    let length = u32::try_from(data.len()).unwrap();
    [
        &0x4948_4156_454f_5054_u64.to_be_bytes()[..],
        &number.to_be_bytes(),
        &length.to_be_bytes(),
        data,
    ]
    .concat()
}

pub(super) fn request(command: u16, flags: u16, offset: u64, length: u32) -> Vec<u8> {
    [
        &0x2560_9513_u32.to_be_bytes()[..],
        &flags.to_be_bytes(),
        &command.to_be_bytes(),
        b"cookie!!",
        &offset.to_be_bytes(),
        &length.to_be_bytes(),
    ]
    .concat()
}

/// Says all of it, then leaves; what was answered, and how the conversation ended.
fn say(exports: &[Export], parts: &[Vec<u8>]) -> (Vec<u8>, String) {
    let mut script = Script {
        sent: io::Cursor::new([&[0, 0, 0, 3][..], &parts.concat()].concat()),
        told: Vec::new(),
    };
    let end = converse(&mut script, exports, |export| export.content.open());
    let end = end.map_or_else(|error| error.to_string(), |()| "left".to_owned());
    (script.told, end)
}

#[test]
fn a_client_that_breaks_the_rules_is_refused_or_sent_away() {
    let (disk, _, changed) = disk();
    let exports = exports(&disk, &changed);
    let go = || option(7, b"\0\0\0\x05disk0\0\0");
    let end = |parts: &[Vec<u8>]| say(&exports, parts).1;
    assert_eq!(end(&[option(2, b"")]), "left");
    assert_eq!(end(&[go(), request(2, 0, 0, 0)]), "left");
    // Lengths that lie, names that are none, contexts without structured replies.
    let odd = [
        option(7, b"\xff\xff\xff\xffdisk0\0\0"),
        option(7, b"\0\0\0\x05disk0\0\x09"),
        option(7, b"\0\0\0\x02\xff\xff\0\0"),
        option(10, b"\0\0\0\x05disk0\xff\xff\xff\xff"),
        option(10, b"\0\0\0\x05disk0\0\0\0\0"),
        option(8, b"?"),
        option(3, b"?"),
        option(99, b"?"),
        option(2, b""),
    ];
    assert_eq!(end(&odd), "left");
    let connection = "nbd connection";
    assert_eq!(
        end(&[go(), vec![0; 28]]),
        "nbd client: it sends something that is no request"
    );
    assert_eq!(
        end(&[vec![0; 16]]),
        "nbd client: it sends something that is no option"
    );
    assert_eq!(
        end(&[option(1, b"other")]),
        "nbd client: it wants an export that does not exist"
    );
    assert_eq!(
        end(&[option(7, &[0; 70_000])]),
        "nbd client: it sends an option of more than 64 KiB"
    );
    let lists = vec![option(3, b""); 1001];
    assert_eq!(
        end(&lists),
        "nbd client: it asks and asks and chooses nothing"
    );
    assert_eq!(end(&[go(), request(1, 0, 0, 512)]), connection);
    assert_eq!(
        end(&[go(), request(1, 0, 0, u32::MAX)]),
        "nbd client: it sends a write of more than 64 MiB"
    );
}

#[test]
fn a_request_that_cannot_be_is_answered_and_the_next_is_heard() {
    let (disk, _, changed) = disk();
    let exports = exports(&disk, &changed);
    let go = || option(7, b"\0\0\0\x05disk0\0\0");
    let refused = [
        request(0, 0, u64::MAX, 512),
        request(0, 0, SIZE_BYTES, 1),
        request(0, 0, 0, u32::MAX),
        request(0, 0, 0, 0),
        request(4, 0, 0, 512),
        request(6, 0, 0, 512),
        request(7, 0, 0, 512),
        request(7, 0, SIZE_BYTES, 512),
        request(77, 0, 0, 512),
    ];
    for structured in [false, true] {
        let mut parts = vec![go()];
        if structured {
            parts.insert(0, option(8, b""));
        }
        let before = say(&exports, &parts).0.len();
        for one in &refused {
            let (told, end) = say(
                &exports,
                &[parts.concat(), one.clone(), request(2, 0, 0, 0)],
            );
            assert_eq!(end, "left");
            let answer = &told[before..];
            let (kind, code) = match structured {
                false => (&answer[..4], &answer[4..8]),
                true => (&answer[6..8], &answer[20..24]),
            };
            let expected: &[u8] = if structured {
                &[0x80, 1]
            } else {
                &[0x67, 0x44, 0x66, 0x98]
            };
            assert_eq!(kind, expected);
            assert_ne!(code, [0; 4], "{one:?}");
        }
    }
}

#[test]
fn any_bytes_end_a_conversation_in_order() {
    let (disk, _, changed) = disk();
    let exports = exports(&disk, &changed);
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    for _ in 0..3000 {
        // Well-formed parts, of which some bytes are flipped.
        let mut bytes = Vec::new();
        for _ in 0..random() % 6 {
            bytes.extend(match random() % 7 {
                0 => option(8, b""),
                1 => option(7, b"\0\0\0\x05disk0\0\x01\0\x03"),
                2 => option(10, b"\0\0\0\x05disk0\0\0\0\x01\0\0\0\x0fbase:allocation"),
                3 => option(9, b"\0\0\0\x05disk0\0\0\0\x01\0\0\0\x05qemu:"),
                4 => request(0, 0, random() % SIZE_BYTES, 4096),
                5 => request(
                    7,
                    u16::try_from(random() % 16).unwrap(),
                    random() % SIZE_BYTES,
                    1 << 20,
                ),
                _ => request(1, 0, 0, 16),
            });
        }
        for _ in 0..random() % 4 {
            if !bytes.is_empty() {
                let at = usize::try_from(random()).unwrap() % bytes.len();
                bytes[at] ^= u8::try_from(random() % 256).unwrap();
            }
        }
        say(&exports, &[bytes]);
    }
}

fn memory() -> MemoryBackend {
    MemoryBackend::new(Geometry {
        size_bytes: SIZE_BYTES,
        read_only: false,
    })
}

/// A server of a disk that may be written, and its socket.
fn serve(disk: Arc<dyn BlockBackend>, socket: &Path) -> NbdServer {
    let export = Export {
        name: "disk0".to_owned(),
        content: Content::Disk(disk),
        changed: None,
    };
    NbdServer::start(UnixListener::bind(socket).unwrap(), vec![export]).unwrap()
}

fn connect(socket: &Path) -> NbdBackend {
    let streams = (0..4).map(|_| UnixStream::connect(socket).unwrap().into());
    NbdBackend::open(streams.collect(), "", false).unwrap()
}

/// Everything that a guest does, with what is there afterwards.
fn uses(disk: &dyn BlockBackend) -> Vec<u8> {
    let size = usize::try_from(disk.geometry().size_bytes).unwrap();
    let mut model = vec![0; size];
    let long: Vec<u8> = (0..=250).cycle().take((3 << 20) + 1024).collect();
    for (at, data) in [
        (0, &long[..]),
        (SIZE_BYTES - 512, &[7; 512]),
        (4096, &[8; 512]),
    ] {
        write(disk, at, data).unwrap();
        let at = usize::try_from(at).unwrap();
        model[at..at + data.len()].copy_from_slice(data);
    }
    for (at, space) in [(8192, Space::Keep), (1 << 20, Space::Free)] {
        let length_bytes = 65536;
        let zeroes = Operation::WriteZeroes {
            length_bytes,
            space,
        };
        act(disk, at, zeroes).unwrap();
        let at = usize::try_from(at).unwrap();
        model[at..at + 65536].fill(0);
    }
    act(disk, 0, Operation::Flush).unwrap();
    read(disk, SIZE_BYTES, &mut [0; 512]).unwrap_err();
    write(disk, SIZE_BYTES, &[0; 512]).unwrap_err();
    std::thread::scope(|scope| {
        for number in 1..=6_u8 {
            scope.spawn(move || {
                let at = (5 << 20) + u64::from(number) * 512;
                write(disk, at, &[number; 512]).unwrap();
            });
            let at = (5 << 20) + usize::from(number) * 512;
            model[at..at + 512].fill(number);
        }
    });
    let mut found = vec![0; size];
    read(disk, 0, &mut found).unwrap();
    assert!(found == model);
    model
}

#[test]
fn a_disk_is_used_over_our_own_server() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("nbd");
    let disk = memory();
    let server = serve(Arc::new(disk.clone()), &socket);
    let client = connect(&socket);
    assert_eq!(client.geometry(), disk.geometry());
    let model = uses(&client);
    let mut found = vec![0; model.len()];
    read(&disk, 0, &mut found).unwrap();
    assert!(found == model);
    let length_bytes = 65536;
    act(&client, 0, Operation::Discard { length_bytes }).unwrap();
    // A server that ends leaves errors, and nobody waits.
    drop(server);
    write(&client, 0, &[1; 512]).unwrap_err();
    assert!(connect_fails(&socket));
}

fn connect_fails(socket: &Path) -> bool {
    UnixStream::connect(socket).is_err()
}

#[test]
fn other_peoples_clients_write_to_a_disk() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).display().to_string();
    let content: Vec<u8> = (0..=250)
        .cycle()
        .take(usize::try_from(SIZE_BYTES).unwrap())
        .collect();
    std::fs::write(path("source"), &content).unwrap();
    for (number, program, arguments) in [
        (
            1,
            "qemu-img",
            &["convert", "-n", "-f", "raw", "-O", "raw"][..],
        ),
        (2, "nbdcopy", &["--flush"]),
    ] {
        let socket = directory.path().join(format!("nbd{number}"));
        let disk = memory();
        let _server = serve(Arc::new(disk.clone()), &socket);
        let mut arguments = arguments.to_vec();
        let (from, to) = (path("source"), uri(&socket));
        arguments.extend([from.as_str(), to.as_str()]);
        tool(program, &arguments);
        let mut found = vec![0; content.len()];
        read(&disk, 0, &mut found).unwrap();
        assert!(found == content, "{program} wrote something else");
    }
}

#[test]
fn a_disk_is_used_over_qemu_nbd_and_mirrored_to_it() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).display().to_string();
    let bytes = SIZE_BYTES.to_string();
    tool(
        "qemu-img",
        &["create", "-q", "-f", "qcow2", &path("image"), &bytes],
    );
    let socket = directory.path().join("nbd");
    let mut server = Command::new("qemu-nbd");
    server
        .args(["-f", "qcow2", "--persistent", "--shared=8", "-k"])
        .arg(&socket)
        .arg(path("image"));
    let mut server = server.spawn().unwrap();
    while connect_fails(&socket) {
        assert!(server.try_wait().unwrap().is_none(), "qemu-nbd has ended");
        std::thread::yield_now();
    }
    let model = uses(&connect(&socket));

    // A mirror writes over what is there, holes included.
    let disk = Arc::new(Tracked::new(Arc::new(memory())));
    write(&*disk, 6 << 20, &[3; 4096]).unwrap();
    let target = connect(&socket);
    let options = || MirrorOptions {
        bytes_per_second: None,
        slow_down: Box::new(|_| {}),
    };
    let mirror = Mirror::begin(disk.clone(), &target, options()).unwrap();
    write(&*disk, 7 << 20, &[4; 4096]).unwrap();
    mirror.settle(std::time::Duration::from_secs(60)).unwrap();
    let (mut source, mut copy) = (vec![0; model.len()], vec![0; model.len()]);
    read(&*disk, 0, &mut source).unwrap();
    read(&target, 0, &mut copy).unwrap();
    assert!(source == copy && source != model);
    drop(mirror);
    // One whose server is killed fails, and the disk goes on.
    let mirror = Mirror::begin(disk.clone(), &target, options()).unwrap();
    server.kill().unwrap();
    server.wait().unwrap();
    write(&*disk, 0, &[5; 512]).unwrap();
    mirror
        .settle(std::time::Duration::from_secs(60))
        .unwrap_err();
    drop((mirror, target));
    tool("qemu-img", &["check", "-q", &path("image")]);
}

/// What a server says, as bytes.
fn hello(flags: u16) -> Vec<u8> {
    [&b"NBDMAGICIHAVEOPT"[..], &flags.to_be_bytes()].concat()
}

fn answer(kind: u32, data: &[u8]) -> Vec<u8> {
    let length = u32::try_from(data.len()).unwrap();
    [
        &0x0003_e889_0455_65a9_u64.to_be_bytes()[..],
        &7_u32.to_be_bytes(),
        &kind.to_be_bytes(),
        &length.to_be_bytes(),
        data,
    ]
    .concat()
}

fn size(size: u64, flags: u16) -> Vec<u8> {
    let data = [&[0, 0][..], &size.to_be_bytes(), &flags.to_be_bytes()].concat();
    [answer(3, &data), answer(1, b"")].concat()
}

/// What a server that says this, and no more, is to its client.
fn said(says: &[&[u8]]) -> String {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    theirs.write_all(&says.concat()).unwrap();
    theirs.shutdown(std::net::Shutdown::Write).unwrap();
    let opened = NbdBackend::open(vec![ours.into()], "x", false);
    opened.map_or_else(|error| error.to_string(), |_| "a disk".to_owned())
}

#[test]
fn a_server_that_breaks_the_rules_is_no_disk() {
    let good = hello(3);
    for (says, expected) in [
        (&[&good[..], &size(4096, 5)][..], "a disk"),
        (&[&good, &size(4096, 3)], "a disk"),
        (
            &[b"NBDMAGIC\0\0\x42\x02\x81\x86\x12\x53\0\0"],
            "nbd server: it knows only the old negotiation",
        ),
        (
            &[&hello(0)],
            "nbd server: it does not know the fixed newstyle negotiation",
        ),
        (
            &[&good, &size(4096, 1)],
            "nbd export \"x\": the server does not flush",
        ),
        (
            &[&good, &size(4097, 5)],
            "nbd export \"x\" has 4097 bytes, expected a multiple of 512 above 0",
        ),
        (
            &[&good, &size(0, 5)],
            "nbd export \"x\" has 0 bytes, expected a multiple of 512 above 0",
        ),
        (
            &[&good, &answer(1, b"")],
            "nbd server: it does not tell the export's size",
        ),
        (
            &[&good, &answer(1 << 31 | 6, b"")],
            "nbd export \"x\": there is no such export",
        ),
        (
            &[&good, &answer(1 << 31 | 2, b"not you")],
            "nbd export \"x\": not you",
        ),
        (
            &[&good, &answer(3, b"\0\x03\0\0\0\x03\0\0\0\0\0\0\0\0")],
            "nbd connection",
        ),
        (&[&good], "nbd connection"),
        (&[b""], "nbd connection"),
    ] {
        assert_eq!(said(says), expected);
    }
}

#[test]
fn a_server_of_strange_blocks_or_answers_is_no_disk() {
    let good = hello(3);
    let block = |least: u32, most: u32| {
        let sizes = [least, 4096, most].map(u32::to_be_bytes).concat();
        answer(3, &[&[0, 3][..], &sizes].concat())
    };
    let wrong = "nbd server: its block sizes are none";
    assert_eq!(said(&[&good, &block(513, 1 << 20), &size(4096, 5)]), wrong);
    assert_eq!(said(&[&good, &block(4096, 512), &size(4096, 5)]), wrong);
    assert_eq!(said(&[&good, &block(u32::MAX, 1), &size(4096, 5)]), wrong);

    // And one that answers something else than it was asked.
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    theirs
        .write_all(&[good, size(4096, 5), vec![0x55; 64]].concat())
        .unwrap();
    let disk = NbdBackend::open(vec![ours.into()], "x", false).unwrap();
    let error = read(&disk, 0, &mut [0; 512]).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    let error = read(&disk, 0, &mut [0; 512]).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::NotConnected);
}

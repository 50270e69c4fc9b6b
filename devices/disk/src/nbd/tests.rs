// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Other people's clients, and a client that means harm.

use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::{CONNECTIONS_MAX, Export, NbdServer, converse};
use crate::backend::Geometry;
use crate::changes::BlockSet;
use crate::conformance::write;
use crate::{Freezable, MemoryBackend};

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
        disk: frozen,
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

fn option(number: u32, data: &[u8]) -> Vec<u8> {
    let length = u32::try_from(data.len()).unwrap();
    [
        &0x4948_4156_454f_5054_u64.to_be_bytes()[..],
        &number.to_be_bytes(),
        &length.to_be_bytes(),
        data,
    ]
    .concat()
}

fn request(command: u16, flags: u16, offset: u64, length: u32) -> Vec<u8> {
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
    let end = converse(&mut script, exports, |export| export.disk.open_reader());
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

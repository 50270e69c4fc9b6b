// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Raw disks: the conformance suite over cache modes and engines, locks, what is refused.

use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::*;
use crate::conformance;
use crate::open::{Format, OpenedDisk, Source, open};

const CACHES: [Cache; 5] = [
    Cache::Writeback,
    Cache::None,
    Cache::Writethrough,
    Cache::Directsync,
    Cache::Unsafe,
];

fn image(size_bytes: u64) -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.raw");
    File::create(&path).unwrap().set_len(size_bytes).unwrap();
    (directory, path)
}

fn raw(path: &Path) -> Source {
    Source {
        path: path.to_owned(),
        format: Format::Raw,
        backing: Vec::new(),
    }
}

fn conform(engine: Engine) {
    for (cache, discard) in CACHES.into_iter().zip([true, true, false, true, false]) {
        let (_directory, path) = image(512);
        let options = OpenOptions {
            cache,
            engine: Some(engine),
            discard,
            ..OpenOptions::default()
        };
        if let Err(OpenError::NoDirect { .. }) = open(&raw(&path), options) {
            println!("ATOLL-SKIP: the file system of temporary files has no O_DIRECT");
            continue;
        }
        println!("cache {cache:?}");
        conformance::check(|geometry| {
            let (directory, path) = image(geometry.size_bytes);
            let read_only = geometry.read_only;
            let options = OpenOptions {
                read_only,
                ..options
            };
            let backend = open(&raw(&path), options).unwrap();
            // The open file outlives its name.
            drop(directory);
            Box::new(backend)
        });
    }
}

#[test]
fn conforms_with_uring() {
    if Engine::best() != Engine::Uring {
        println!("ATOLL-SKIP: io_uring is not available to this process");
        return;
    }
    conform(Engine::Uring);
}

#[test]
fn conforms_with_threads() {
    conform(Engine::Threads);
}

#[test]
fn conforms_in_place() {
    conform(Engine::InPlace);
}

#[test]
fn memory_is_served_in_place_and_nothing_else() {
    // memfd_create(2): such a file is on a tmpfs of the kernel's own.
    let file = rustix::fs::memfd_create("disk", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    assert_eq!(Engine::best_for(&file.into()).unwrap(), Engine::InPlace);
    let other = File::open("/proc/self/exe").unwrap();
    if rustix::fs::fstatfs(&other).unwrap().f_type == libc::TMPFS_MAGIC {
        println!("ATOLL-SKIP: this program is on a tmpfs");
        return;
    }
    assert_eq!(Engine::best_for(&other).unwrap(), Engine::best());
}

#[test]
fn conforms_with_detected_zeroes() {
    conformance::check(|geometry| {
        let (_directory, path) = image(geometry.size_bytes);
        let options = OpenOptions {
            read_only: geometry.read_only,
            detect_zeroes: true,
            discard: true,
            ..OpenOptions::default()
        };
        Box::new(open(&raw(&path), options).unwrap())
    });
}

#[test]
fn space_is_given_back() {
    use std::os::unix::fs::MetadataExt;
    let (_directory, path) = image(1 << 20);
    let options = OpenOptions {
        discard: true,
        ..OpenOptions::default()
    };
    let disk = open(&raw(&path), options).unwrap();
    conformance::write(&disk, 0, &[7; 1 << 20]).unwrap();
    let full = std::fs::metadata(&path).unwrap().blocks();
    let length_bytes = 1 << 19;
    conformance::act(&disk, 0, Operation::Discard { length_bytes }).unwrap();
    let left = std::fs::metadata(&path).unwrap().blocks();
    assert!(left * 3 < full * 2, "{left} of {full} blocks");
}

#[track_caller]
fn check_error(path: &Path, options: OpenOptions, expected: &str) {
    let Err(error) = open(&raw(path), options) else {
        panic!("{} opened", path.display());
    };
    assert!(error.to_string().contains(expected), "{error}");
}

#[test]
fn what_is_no_disk_is_refused_by_name() {
    let (directory, path) = image(1000);
    let options = OpenOptions::default();
    check_error(directory.path(), options, "is a directory");
    check_error(Path::new("/dev/null"), options, "is a character device");
    check_error(&directory.path().join("absent"), options, "absent");
    check_error(&path, options, "has 1000 bytes");
    let file = File::options().write(true).open(&path).unwrap();
    file.set_len(0).unwrap();
    check_error(&path, options, "has 0 bytes");
    let socket = directory.path().join("socket");
    let _listener = UnixListener::bind(&socket).unwrap();
    check_error(&socket, options, "is a socket");
}

const READ: OpenOptions = OpenOptions {
    read_only: true,
    engine: None,
    cache: Cache::Writeback,
    discard: false,
    detect_zeroes: false,
};

#[test]
fn an_image_has_one_writer_or_many_readers() {
    let (_directory, path) = image(4096);
    let write = OpenOptions::default();
    let writer = open(&raw(&path), write).unwrap();
    check_error(&path, write, "in use");
    check_error(&path, READ, "in use");
    drop(writer);
    let _first = open(&raw(&path), READ).unwrap();
    let _second = open(&raw(&path), READ).unwrap();
    check_error(&path, write, "in use");
}

/// Holds the image open in QEMU's way while `check` runs; `mode` is an option of qemu-io.
fn beside_qemu(path: &Path, mode: &[&str], check: impl FnOnce()) {
    use std::io::{BufRead, BufReader, Write};
    let spawned = Command::new("qemu-io")
        .args(mode)
        .args(["-f", "raw"])
        .arg(path)
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn();
    let Ok(mut qemu) = spawned else {
        println!("ATOLL-SKIP: qemu-io is not installed (apt-get install qemu-utils)");
        return;
    };
    let mut stdin = qemu.stdin.take().unwrap();
    // An answer means that it has opened and locked.
    stdin.write_all(b"length\n").unwrap();
    let mut line = String::new();
    let mut stdout = BufReader::new(qemu.stdout.take().unwrap());
    stdout.read_line(&mut line).unwrap();
    assert!(line.contains("KiB") || line.contains("MiB"), "{line}");
    check();
    drop(stdin);
    qemu.wait().unwrap();
}

#[test]
fn a_holder_that_is_ending_is_waited_for() {
    let (_directory, path) = image(4096);
    let held = open(&raw(&path), OpenOptions::default()).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            std::thread::sleep(Duration::from_millis(50));
            drop(held);
        });
        open(&raw(&path), OpenOptions::default()).unwrap();
    });
}

#[test]
fn locks_are_understood_by_qemu_and_the_other_way_round() {
    let (_directory, path) = image(1 << 20);
    beside_qemu(&path, &[], || {
        check_error(&path, OpenOptions::default(), "in use");
        check_error(&path, READ, "in use");
    });
    beside_qemu(&path, &["-r"], || {
        check_error(&path, OpenOptions::default(), "in use");
        drop(open(&raw(&path), READ).unwrap());
    });
    let qemu_opens = |arguments: &[&str]| {
        let mut command = Command::new("qemu-io");
        let output = command
            .args(arguments)
            .args(["-f", "raw", "-c", "length"])
            .arg(&path);
        output.output().ok().map(|output| output.status.success())
    };
    if qemu_opens(&[]).is_none() {
        return;
    }
    let writer = open(&raw(&path), OpenOptions::default()).unwrap();
    assert_eq!(
        (qemu_opens(&[]), qemu_opens(&["-r"])),
        (Some(false), Some(false))
    );
    drop(writer);
    let _reader = open(&raw(&path), READ).unwrap();
    assert_eq!(
        (qemu_opens(&[]), qemu_opens(&["-r"])),
        (Some(false), Some(true))
    );
}

#[test]
fn a_file_that_shrank_gives_an_error_and_no_stale_data() {
    let (_directory, path) = image(8192);
    for engine in [Engine::Uring, Engine::Threads, Engine::InPlace] {
        let file = File::options().read(true).write(true).open(&path).unwrap();
        file.set_len(8192).unwrap();
        let options = OpenOptions {
            engine: Some(engine),
            ..OpenOptions::default()
        };
        let opened = OpenedDisk::from_file(file.try_clone().unwrap(), &path, Format::Raw, options);
        let backend = opened.unwrap().backend().unwrap();
        file.set_len(4096).unwrap();
        let mut buffer = vec![0; 4096];
        let Err(error) = conformance::read(&backend, 2048, &mut buffer) else {
            panic!("read what is not there");
        };
        if engine == Engine::Uring && Engine::best() != engine {
            continue; // There, opening a queue is the error.
        }
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}

/// Direct I/O wants aligned memory, a guest gives any.
#[test]
fn unaligned_memory_goes_through_a_copy() {
    let (_directory, path) = image(65536);
    for engine in [Engine::best(), Engine::Threads, Engine::InPlace] {
        let options = OpenOptions {
            cache: Cache::None,
            engine: Some(engine),
            ..OpenOptions::default()
        };
        let disk = match open(&raw(&path), options) {
            Err(OpenError::NoDirect { .. }) => return,
            disk => disk.unwrap(),
        };
        let data: Vec<u8> = (0..=250).cycle().take(8192 + 1).collect();
        let mut back = vec![0; 8192 + 1];
        conformance::write(&disk, 4096, &data[1..]).unwrap();
        conformance::read(&disk, 4096, &mut back[1..]).unwrap();
        assert_eq!(back[1..], data[1..]);
    }
}

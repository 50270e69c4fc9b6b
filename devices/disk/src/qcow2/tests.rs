// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! qcow2 against QEMU's own tools: what they make is read, what is written here they find right.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

mod crash;
mod foreign;
pub(super) mod journal;
mod random;

use super::*;
use crate::backend::{Operation, Space};
use crate::conformance::{self, act, read, write};
use crate::open::{Source, open};
use random::{DISK_BYTES, Random, workload};

fn source(path: &Path, backing: &[(&Path, Format)]) -> Source {
    let backing = backing
        .iter()
        .map(|(path, format)| (path.to_path_buf(), *format));
    Source {
        path: path.to_owned(),
        format: Format::Qcow2,
        backing: backing.collect(),
    }
}

fn new_image(size_bytes: u64) -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.qcow2");
    create(&path, size_bytes, &Qcow2Options::default()).unwrap();
    (directory, path)
}

/// Runs qemu-img; `None` after a line that says it is not there.
fn qemu_img(arguments: &[&str]) -> Option<Output> {
    match Command::new("qemu-img").args(arguments).output() {
        Ok(output) => Some(output),
        Err(_) => {
            println!("ATOLL-SKIP: qemu-img is not installed (apt-get install qemu-utils)");
            None
        }
    }
}

#[track_caller]
fn done(output: Option<Output>) -> bool {
    let Some(output) = output else { return false };
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}");
    true
}

/// `qemu-img check` finds nothing at all.
#[track_caller]
fn check_image(path: &Path) {
    check_but_leaks(path, false);
}

/// It finds nothing but leaks, if even these.
#[track_caller]
fn check_but_leaks(path: &Path, leaks: bool) {
    let Some(output) = qemu_img(&["check", "-f", "qcow2", path.to_str().unwrap()]) else {
        return;
    };
    let text = String::from_utf8_lossy(&output.stdout);
    let found = String::from_utf8_lossy(&output.stderr);
    let code = output.status.code();
    let sound = code == Some(0) || leaks && code == Some(3);
    assert!(sound, "{}: {text}{found}", output.status);
}

#[test]
fn conforms() {
    for (cache, detect_zeroes) in [
        (Cache::Writeback, false),
        (Cache::Writethrough, false),
        (Cache::None, true),
        (Cache::Unsafe, false),
    ] {
        conformance::check(|geometry| {
            let (_directory, path) = new_image(geometry.size_bytes);
            let options = OpenOptions {
                read_only: geometry.read_only,
                cache,
                discard: true,
                detect_zeroes,
                ..OpenOptions::default()
            };
            Box::new(open(&source(&path, &[]), options).unwrap())
        });
    }
}

#[test]
fn many_cluster_sizes_conform() {
    for cluster_bytes in [512, 4096, 2 << 20] {
        conformance::check(|geometry| {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("disk.qcow2");
            let options = Qcow2Options {
                cluster_bytes,
                ..Qcow2Options::default()
            };
            create(&path, geometry.size_bytes, &options).unwrap();
            let read_only = geometry.read_only;
            let options = OpenOptions {
                read_only,
                ..OpenOptions::default()
            };
            Box::new(open(&source(&path, &[]), options).unwrap())
        });
    }
}

/// Not a test by itself: the process that the next one kills. Writes until it dies.
#[test]
fn victim() {
    let Some(path) = std::env::var_os("ATOLL_DISK_VICTIM") else {
        return;
    };
    let disk = open(&source(Path::new(&path), &[]), OpenOptions::default()).unwrap();
    println!("ready");
    let mut seed = u64::from(std::process::id());
    loop {
        workload(&*disk, seed, 100);
        seed += 1;
    }
}

#[test]
fn a_killed_writer_leaves_a_usable_image() {
    use std::io::{BufRead, BufReader};
    let (_directory, path) = new_image(DISK_BYTES);
    let mut random = Random(7);
    for round in 0..5 {
        let mut victim = Command::new(std::env::current_exe().unwrap())
            .args(["qcow2::tests::victim", "--exact", "--nocapture"])
            .env("ATOLL_DISK_VICTIM", &path)
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(victim.stdout.take().unwrap()).lines();
        assert!(lines.any(|line| line.unwrap().contains("ready")));
        // How far it gets is the point of the test; nothing waits for this time.
        std::thread::sleep(std::time::Duration::from_millis(20 + random.below(150)));
        victim.kill().unwrap();
        victim.wait().unwrap();
        println!("round {round}");
        open(&source(&path, &[]), OpenOptions::default()).unwrap();
        check_image(&path);
    }
}

#[test]
fn a_flushed_write_survives_a_kill() {
    // The backend is forgotten, not dropped: nothing of it is written after the flush.
    let (_directory, path) = new_image(DISK_BYTES);
    let file = File::options().read(true).write(true).open(&path).unwrap();
    let options = OpenOptions::default();
    let opened = crate::OpenedDisk::from_file(file, &path, Format::Qcow2, options).unwrap();
    let disk = opened.backend().unwrap();
    write(&*disk, 65536, &[9; 4096]).unwrap();
    act(&*disk, 0, Operation::Flush).unwrap();
    let copy = path.with_extension("copy");
    std::fs::copy(&path, &copy).unwrap();
    let disk = open(&source(&copy, &[]), options).unwrap();
    let mut buffer = [0; 4096];
    read(&*disk, 65536, &mut buffer).unwrap();
    assert_eq!(buffer, [9; 4096]);
}

#[track_caller]
fn check_refused(path: &str, backing: &[(&Path, Format)], expected: &str) {
    let Err(error) = open(&source(Path::new(path), backing), OpenOptions::default()) else {
        panic!("{path} opened");
    };
    let text = format!("{error}: {}", std::error::Error::source(&error).unwrap());
    assert!(text.contains(expected) && !text.contains('\n'), "{text}");
    assert!(text.contains(path), "{text}");
}

#[test]
fn backing_files_are_those_that_are_named() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    let (base, middle, top) = (at("base.raw"), at("middle.qcow2"), at("top.qcow2"));
    std::fs::write(&base, vec![5; 1 << 20]).unwrap();
    let over = |name: &str, format| Qcow2Options {
        backing: Some((name.to_owned(), format)),
        ..Qcow2Options::default()
    };
    create(&middle, 1 << 20, &over("base.raw", Format::Raw)).unwrap();
    create(&top, 2 << 20, &over("middle.qcow2", Format::Qcow2)).unwrap();
    let chain = [(&*middle, Format::Qcow2), (&*base, Format::Raw)];
    {
        let disk = open(&source(&middle, &chain[1..]), OpenOptions::default()).unwrap();
        write(&*disk, 0, &[6; 4096]).unwrap();
    }
    let disk = open(&source(&top, &chain), OpenOptions::default()).unwrap();
    let mut buffer = vec![0; 4096];
    for (offset, byte) in [(0, 6), (4096, 5), (1 << 20, 0)] {
        read(&*disk, offset, &mut buffer).unwrap();
        assert_eq!(buffer, [byte; 4096], "at {offset}");
    }
    // A part of a cluster: the rest of it comes from below.
    write(&*disk, 8192, &[7; 512]).unwrap();
    let space = Space::Free;
    let length_bytes = 65536;
    let zero = Operation::WriteZeroes {
        length_bytes,
        space,
    };
    act(&*disk, 1 << 17, zero).unwrap();
    for (offset, byte) in [(8192, 7), (8704, 5), (1 << 17, 0)] {
        read(&*disk, offset, &mut buffer[..512]).unwrap();
        assert_eq!(buffer[..512], [byte; 512], "at {offset}");
    }
    drop(disk);
    check_image(&top);
    assert_eq!(std::fs::read(&base).unwrap(), vec![5; 1 << 20]);
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    check_refused(&text(&top), &[], "names the backing file \"middle.qcow2\"");
    let raw_only = [(&*base, Format::Raw)];
    check_refused(&text(&top), &raw_only, "its backing file is qcow2");
    let alone = at("alone.qcow2");
    create(&alone, 1 << 20, &Qcow2Options::default()).unwrap();
    check_refused(&text(&alone), &raw_only, "header names none");
    let half = [(&*middle, Format::Qcow2)];
    let Err(error) = open(&source(&top, &half), OpenOptions::default()) else {
        panic!("half a chain opened");
    };
    assert!(error.to_string().contains("middle.qcow2"), "{error}");
}

/// What is discarded, or zeroed and freed, takes no space in the file; its neighbours keep theirs.
#[test]
fn freed_clusters_leave_the_file() {
    use std::os::unix::fs::MetadataExt;
    const CLUSTER: u64 = 64 << 10;
    let (_directory, path) = new_image(4 << 20);
    let clusters = || {
        let file = File::open(&path).unwrap();
        file.sync_all().unwrap(); // Space is counted when it is.
        file.metadata().unwrap().blocks() * 512 / CLUSTER
    };
    let options = OpenOptions {
        discard: true,
        ..OpenOptions::default()
    };
    let disk = open(&source(&path, &[]), options).unwrap();
    write(&*disk, 0, &[7; 1 << 20]).unwrap();
    act(&*disk, 0, Operation::Flush).unwrap();
    let full = clusters();
    // A half, four whole, a half.
    let length_bytes = 5 * CLUSTER;
    act(&*disk, CLUSTER / 2, Operation::Discard { length_bytes }).unwrap();
    let discarded = clusters();
    assert!(discarded + 4 <= full, "{discarded} clusters of {full}");
    let zero = Operation::WriteZeroes {
        length_bytes: 4 * CLUSTER,
        space: Space::Free,
    };
    act(&*disk, 8 * CLUSTER, zero).unwrap();
    let zeroed = clusters();
    assert!(zeroed + 4 <= discarded, "{zeroed} clusters of {discarded}");
    // What was freed is used again.
    write(&*disk, 2 << 20, &[9; 512 << 10]).unwrap();
    drop(disk);
    check_image(&path);
    let disk = open(&source(&path, &[]), options).unwrap();
    let mut buffer = vec![0; 512];
    for (cluster, byte) in [
        (6, 7),
        (7, 7),
        (8, 0),
        (11, 0),
        (12, 7),
        (15, 7),
        (32, 9),
        (39, 9),
    ] {
        for offset in [cluster * CLUSTER, (cluster + 1) * CLUSTER - 512] {
            read(&*disk, offset, &mut buffer).unwrap();
            assert_eq!(buffer, [byte; 512], "cluster {cluster}");
        }
    }
    read(&*disk, CLUSTER / 2 - 512, &mut buffer).unwrap();
    assert_eq!(buffer, [7; 512]);
}

#[test]
fn images_grow_and_stay_sound() {
    let (_directory, path) = new_image(1 << 20);
    resize(&source(&path, &[]), 3 << 30).unwrap();
    let disk = open(&source(&path, &[]), OpenOptions::default()).unwrap();
    assert_eq!(disk.geometry().size_bytes, 3 << 30);
    write(&*disk, (3 << 30) - 4096, &[1; 4096]).unwrap();
    // Beyond what the first-level table was made for: it moves.
    disk.resize(1 << 40).unwrap();
    write(&*disk, (1 << 40) - 4096, &[2; 4096]).unwrap();
    drop(disk);
    check_image(&path);
    let error = create(&path, 1 << 20, &Qcow2Options::default()).unwrap_err();
    assert!(error.to_string().contains("disk.qcow2"), "{error}");
}

/// An image of QEMU's, with one field changed.
#[test]
fn malformed_images_are_refused_in_one_line() {
    let (_directory, path) = new_image(1 << 20);
    let good = std::fs::read(&path).unwrap();
    let text = path.to_str().unwrap();
    let cases: &[(usize, &[u8], &str)] = &[
        (0, &[0; 4], "is not a qcow2 image"),
        (4, &[0, 0, 0, 1], "version 1"),
        (8, &[0, 0, 0, 0, 0, 0, 0xff, 0xff], "backing_file_offset"),
        (20, &[0, 0, 0, 8], "cluster_bits is 8"),
        (20, &[0, 0, 0, 40], "cluster_bits is 40"),
        (24, &[0xff; 8], "size is"),
        (24, &[0, 0xff, 0, 0, 0, 0, 0, 0], "l1_size"),
        (32, &[0, 0, 0, 1], "is encrypted"),
        (36, &[0x7f, 0xff, 0xff, 0xff], "l1_table_offset"),
        (40, &[0xff; 8], "l1_table_offset"),
        (40, &[0, 0, 0, 0, 0, 0, 0, 1], "l1_table_offset"),
        (48, &[0xff; 8], "refcount_table_offset"),
        (56, &[0xff; 4], "refcount_table_offset"),
        (60, &[0, 0, 0, 1], "internal snapshots"),
        (72, &[0, 0, 0, 0, 0, 0, 0, 4], "another file"),
        (72, &[0, 0, 0, 0, 0, 0, 0, 16], "extended L2"),
        (72, &[1, 0, 0, 0, 0, 0, 0, 0], "incompatible_features"),
        (72, &[0, 0, 0, 0, 0, 0, 0, 8], "compression_type is 0"),
        (96, &[0, 0, 0, 7], "refcount_order"),
        (100, &[0, 0, 0, 64], "header_length"),
    ];
    for (at, bytes, expected) in cases {
        let mut bad = good.clone();
        bad[*at..*at + bytes.len()].copy_from_slice(bytes);
        std::fs::write(&path, bad).unwrap();
        check_refused(text, &[], expected);
    }
    // Found by the fuzz target `qcow2`: a write went round for ever.
    let table = usize::try_from(u64::from_be_bytes(*good[48..].first_chunk().unwrap())).unwrap();
    let mut bad = good.clone();
    bad[table..table + 8].fill(0);
    std::fs::write(&path, bad).unwrap();
    check_refused(text, &[], "first refcount block is 0");
    for length in [0, 3, 50, 103, 512] {
        std::fs::write(&path, &good[..length]).unwrap();
        let disk = open(&source(&path, &[]), OpenOptions::default());
        assert!(disk.is_err(), "{length} bytes");
    }
}

/// What a killed writer leaves is read as it is, and not repaired by who only reads.
#[test]
fn a_marked_image_is_repaired_by_its_next_writer() {
    let (_directory, path) = new_image(4 << 20);
    {
        let disk = open(&source(&path, &[]), OpenOptions::default()).unwrap();
        write(&*disk, 0, &[5; 1 << 20]).unwrap();
    }
    let mut image = std::fs::read(&path).unwrap();
    // No count is right any more, nor is there a table of them.
    let table = usize::try_from(u64::from_be_bytes(*image[48..].first_chunk().unwrap())).unwrap();
    image[table..table + 65536].fill(0);
    image[79] |= 1;
    std::fs::write(&path, &image).unwrap();
    let read_only = OpenOptions {
        read_only: true,
        ..OpenOptions::default()
    };
    let mut buffer = vec![0; 1 << 20];
    for (options, marked) in [(read_only, true), (OpenOptions::default(), false)] {
        let disk = open(&source(&path, &[]), options).unwrap();
        read(&*disk, 0, &mut buffer).unwrap();
        assert_eq!(buffer, vec![5; 1 << 20]);
        drop(disk);
        assert_eq!(std::fs::read(&path).unwrap()[79] & 1 != 0, marked);
    }
    check_image(&path);
    // The second entry of the second-level table leads to where the first one does.
    let entry = |image: &[u8], at: usize| {
        let entry = u64::from_be_bytes(*image[at..].first_chunk().unwrap());
        usize::try_from(entry & tables::OFFSET_MASK).unwrap()
    };
    let second = entry(&image, entry(&image, 40));
    image.copy_within(second..second + 8, second + 8);
    std::fs::write(&path, &image).unwrap();
    check_refused(
        path.to_str().unwrap(),
        &[],
        "a cluster with two owners at byte",
    );
}

/// What the next writer finds wrong with the reference counts of an image.
fn mended(path: &Path) -> Option<Mended> {
    let options = OpenOptions::default();
    let file = std::fs::File::options().read(true).write(true).open(path);
    let file = file.unwrap();
    let header = header_of(&file, file.metadata().unwrap().len()).unwrap();
    let storage = storage(file, options, &watch(&header, options)).unwrap();
    repair::repair(&storage, &header).unwrap()
}

#[test]
fn what_a_repair_found_is_told() {
    let (_directory, path) = new_image(4 << 20);
    {
        let disk = open(&source(&path, &[]), OpenOptions::default()).unwrap();
        write(&*disk, 0, &[5; 1 << 20]).unwrap();
    }
    assert_eq!(mended(&path), None);
    let change = |at: usize, to: &[u8]| {
        let mut image = std::fs::read(&path).unwrap();
        image[at..at + to.len()].copy_from_slice(to);
        std::fs::write(&path, image).unwrap();
    };
    let found = |too_low, too_high| Some(Difference { too_low, too_high });
    let check = |why, found| {
        assert_eq!(mended(&path), Some(Mended { why, found }));
        assert_eq!(mended(&path), None);
        check_image(&path);
    };
    let count_of = |cluster: usize| {
        let image = std::fs::read(&path).unwrap();
        let offset = |at: usize| {
            let entry = u64::from_be_bytes(*image[at..].first_chunk().unwrap());
            usize::try_from(entry & tables::OFFSET_MASK).unwrap()
        };
        offset(offset(48)) + 2 * cluster
    };
    // Killed with all counts in the file; with one that is lower than it should be; with three that are for nobody.
    let nobody = "nobody closed it";
    change(79, &[1]);
    check(nobody, found(0, 0));
    change(79, &[1]);
    change(count_of(0), &[0; 2]);
    check(nobody, found(1, 0));
    change(79, &[1]);
    change(count_of(100), &[0, 1, 0, 1, 0, 1]);
    check(nobody, found(0, 3));
    change(95, &[1]);
    check("it had what is not kept, as QEMU's bitmaps", found(0, 0));
}

/// Tables full of anything: errors, never a panic, and nothing read from outside the image.
#[test]
fn images_with_random_tables_end_in_errors() {
    let (_directory, path) = new_image(1 << 22);
    {
        let disk = open(&source(&path, &[]), OpenOptions::default()).unwrap();
        write(&*disk, 0, &[1; 1 << 18]).unwrap();
    }
    let good = std::fs::read(&path).unwrap();
    for seed in 0..60 {
        println!("seed {seed}");
        let mut random = Random(seed);
        let mut bad = good.clone();
        for _ in 0..=random.below(12) {
            // Behind the header: refcounts, first- and second-level tables, data.
            let at =
                usize::try_from(65536 + random.below(good.len() as u64 - 65536 - 8)).unwrap() & !7;
            let value = match random.below(4) {
                0 => u64::MAX,
                1 => 1 << 63 | random.below(1 << 24) << 9,
                2 => 1 << 62 | random.below(1 << 62),
                _ => random.below(u64::MAX),
            };
            bad[at..at + 8].copy_from_slice(&value.to_be_bytes());
        }
        // Every other one as if its writer had been killed.
        bad[79] |= u8::from(seed % 2 == 1);
        std::fs::write(&path, bad).unwrap();
        let Ok(disk) = open(&source(&path, &[]), OpenOptions::default()) else {
            continue;
        };
        let mut buffer = vec![0; 1 << 16];
        for cluster in 0..8 {
            let _ = read(&*disk, cluster << 16, &mut buffer);
            let _ = write(&*disk, (cluster << 16) + 4096, &buffer[..4096]);
        }
        let _ = act(&*disk, 0, Operation::Flush);
    }
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Images that QEMU's tools made, in every variety: used, or refused in one line that says what to do.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::random::{DISK_BYTES, workload};
use super::{check_image, check_refused, done, qemu_img, source};
use crate::backend::{BlockBackend, Operation, Space};
use crate::conformance::{self, act, read, write};
use crate::open::{Cache, Format, OpenError, OpenOptions, open};

/// A directory with images of one test.
struct Images(tempfile::TempDir);

impl Images {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    /// Makes a raw image that compresses, but not to nothing; gives its bytes.
    fn raw(&self, size_bytes: usize) -> Vec<u8> {
        let words = (0..size_bytes.div_ceil(8) as u64).flat_map(|n| (n / 64).to_le_bytes());
        let mut data: Vec<u8> = words.collect();
        data.truncate(size_bytes);
        std::fs::write(self.path("raw"), &data).unwrap();
        data
    }

    /// `qemu-img convert -c` of the raw image. `false` without qemu-img.
    fn compress(&self, name: &str, options: &str) -> bool {
        let (from, to) = (self.text("raw"), self.text(name));
        done(qemu_img(&[
            "convert", "-c", "-O", "qcow2", "-o", options, &from, &to,
        ]))
    }

    /// `qemu-img create`.
    fn create(&self, name: &str, arguments: &[&str]) -> bool {
        let path = self.text(name);
        let all = [&["create", "-q", "-f", "qcow2"], arguments, &[&path, "4M"]].concat();
        done(qemu_img(&all))
    }

    /// What QEMU reads from an image.
    fn by_qemu(&self, name: &str) -> Vec<u8> {
        let (from, to) = (self.text(name), self.text("by-qemu"));
        assert!(done(qemu_img(&[
            "convert", "-f", "qcow2", "-O", "raw", &from, &to
        ])));
        std::fs::read(to).unwrap()
    }
}

fn whole(disk: &dyn BlockBackend) -> Vec<u8> {
    let mut all = vec![0; usize::try_from(disk.geometry().size_bytes).unwrap()];
    for (part, offset) in all.chunks_mut(1 << 20).zip((0..).step_by(1 << 20)) {
        read(disk, offset, part).unwrap();
    }
    all
}

fn writable() -> OpenOptions {
    OpenOptions {
        discard: true,
        ..OpenOptions::default()
    }
}

/// Changes a disk and the bytes that it should have in the same way: parts and edges of clusters, whole ones, zeroes.
fn change(disk: &dyn BlockBackend, data: &mut [u8], cluster: usize) {
    let end = data.len();
    let writes = [
        (4096, 512),
        (cluster - 512, 1024),
        (2 * cluster, cluster),
        (3 * cluster + 512, 2 * cluster),
        (end - 512, 512),
    ];
    for ((at, count), byte) in writes.into_iter().zip(1..) {
        write(disk, at as u64, &vec![byte; count]).unwrap();
        data[at..at + count].fill(byte);
    }
    let zeroes = [
        (6 * cluster, cluster, Space::Free),
        (7 * cluster + 512, 512, Space::Keep),
        (8 * cluster + 512, cluster, Space::Free),
        (10 * cluster, 2 * cluster, Space::Keep),
    ];
    for (at, count, space) in zeroes {
        let length_bytes = count as u64;
        let zero = Operation::WriteZeroes {
            length_bytes,
            space,
        };
        act(disk, at as u64, zero).unwrap();
        data[at..at + count].fill(0);
    }
}

/// Compressed images are read as QEMU reads them, written, and read by QEMU again.
#[test]
fn compressed_clusters_are_read_and_overwritten() {
    let images = Images::new();
    for kind in ["zlib", "zstd"] {
        for (cluster, odd_bytes, cache) in [
            (4096, 0, Cache::Writeback),
            (65536, 512 * 5, Cache::Writeback),
            (65536, 0, Cache::None),
            (1 << 18, 0, Cache::Writeback),
        ] {
            println!("{kind}, clusters of {cluster}, {odd_bytes} odd bytes, {cache:?}");
            let mut data = images.raw((4 << 20) + odd_bytes);
            let options = format!("compression_type={kind},cluster_size={cluster}");
            if !images.compress("image", &options) {
                return;
            }
            let source = source(&images.path("image"), &[]);
            let read_only = OpenOptions {
                read_only: true,
                ..OpenOptions::default()
            };
            assert!(whole(&*open(&source, read_only).unwrap()) == data);
            let options = OpenOptions {
                cache,
                ..writable()
            };
            let disk = open(&source, options).unwrap();
            change(&*disk, &mut data, cluster);
            assert!(whole(&*disk) == data);
            drop(disk);
            check_image(&images.path("image"));
            assert!(images.by_qemu("image") == data);
            assert!(whole(&*open(&source, read_only).unwrap()) == data);
        }
    }
}

/// Discards, zeroes, parts of clusters at random, on top of clusters that are compressed.
#[test]
fn a_workload_on_a_compressed_image() {
    let images = Images::new();
    std::fs::write(
        images.path("raw"),
        vec![0; usize::try_from(DISK_BYTES).unwrap()],
    )
    .unwrap();
    for kind in ["zlib", "zstd"] {
        if !images.compress("image", &format!("compression_type={kind}")) {
            return;
        }
        let source = source(&images.path("image"), &[]);
        let disk = open(&source, writable()).unwrap();
        let model = workload(&*disk, 5, 200);
        super::random::compare(&*disk, &model);
        // A header that imago writes keeps what it does not know.
        disk.resize(DISK_BYTES + (1 << 40)).unwrap();
        drop(disk);
        check_image(&images.path("image"));
        let disk = open(&source, OpenOptions::default()).unwrap();
        super::random::compare(&*disk, &model);
    }
}

/// An image that is a difference to compressed ones, of both versions and both kinds.
#[test]
fn chains_of_any_kind_of_image() {
    let images = Images::new();
    let mut data = images.raw(4 << 20);
    for (base, middle) in [
        ("compat=0.10", "compat=1.1"),
        ("compression_type=zstd", "compat=0.10"),
        ("compression_type=zstd", "lazy_refcounts=on"),
        ("compression_type=zlib,cluster_size=4k", "cluster_size=2M"),
    ] {
        println!("{base} below {middle}");
        data.fill(0);
        data.copy_from_slice(&images.raw(4 << 20));
        if !images.compress("base", base) {
            return;
        }
        images.create("middle", &["-o", middle, "-b", "base", "-F", "qcow2"]);
        images.create("top", &["-b", "middle", "-F", "qcow2"]);
        let (base, middle, top) = (
            images.path("base"),
            images.path("middle"),
            images.path("top"),
        );
        let chain = [(&*middle, Format::Qcow2), (&*base, Format::Qcow2)];
        {
            let disk = open(&source(&middle, &chain[1..]), writable()).unwrap();
            write(&*disk, 512, &[9; 4096]).unwrap();
            data[512..512 + 4096].fill(9);
        }
        let disk = open(&source(&top, &chain), writable()).unwrap();
        assert!(whole(&*disk) == data);
        change(&*disk, &mut data, 65536);
        assert!(whole(&*disk) == data);
        drop(disk);
        for image in [&middle, &top] {
            check_image(image);
        }
        assert!(images.by_qemu("top") == data);
        for image in ["base", "middle", "top"] {
            std::fs::remove_file(images.path(image)).unwrap();
        }
    }
}

/// Version 2 has no zero clusters: the device does not offer what would be slow.
#[test]
fn old_images_conform() {
    let images = Images::new();
    if !images.create("probe", &["-o", "compat=0.10"]) {
        return;
    }
    let disk = open(&source(&images.path("probe"), &[]), writable()).unwrap();
    assert!(!disk.abilities().write_zeroes);
    let count = std::cell::Cell::new(0);
    conformance::check(|geometry| {
        count.set(count.get() + 1);
        let (path, size) = (
            images.text(&count.get().to_string()),
            geometry.size_bytes.to_string(),
        );
        let made = qemu_img(&[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            "compat=0.10",
            &path,
            &size,
        ]);
        assert!(done(made));
        let options = OpenOptions {
            read_only: geometry.read_only,
            ..writable()
        };
        let path = Path::new(&path).to_owned();
        Box::new(open(&source(&path, &[]), options).unwrap())
    });
}

/// What is not supported is told, with a remedy.
#[test]
fn other_features_are_refused_with_a_remedy() {
    let images = Images::new();
    if !images.create("plain", &["-o", "lazy_refcounts=on"]) {
        return;
    }
    // Lazy reference counts are an offer that a writer may decline.
    {
        let disk = open(&source(&images.path("plain"), &[]), writable()).unwrap();
        write(&*disk, 0, &[1; 4096]).unwrap();
    }
    check_image(&images.path("plain"));
    assert!(done(qemu_img(&[
        "snapshot",
        "-c",
        "s",
        &images.text("plain")
    ])));
    check_refused(
        &images.text("plain"),
        &[],
        "delete them (qemu-img snapshot -d)",
    );
    images.create("extended", &["-o", "extended_l2=on"]);
    check_refused(
        &images.text("extended"),
        &[],
        "extended L2 entries, which is not supported: convert it",
    );
    let data = format!("data_file={}", images.text("data"));
    images.create("external", &["-o", &data]);
    check_refused(&images.text("external"), &[], "its data in another file");
    // The old kind of encryption: LUKS measures the processor first, and fails on a busy machine.
    let secret = [
        "--object",
        "secret,id=s,data=x",
        "-o",
        "encrypt.format=aes,encrypt.key-secret=s",
    ];
    images.create("secret", &secret);
    check_refused(
        &images.text("secret"),
        &[],
        "is encrypted, which is not supported: convert it",
    );
}

/// Bitmaps of QEMU's are dropped by a writer that does not keep them, as the format asks for.
#[test]
fn an_image_with_a_bitmap_stays_sound() {
    let images = Images::new();
    if !images.create("image", &[]) {
        return;
    }
    let path = images.text("image");
    assert!(done(qemu_img(&["bitmap", "--add", &path, "b"])));
    let disk = open(&source(&images.path("image"), &[]), writable()).unwrap();
    write(&*disk, 0, &[1; 4096]).unwrap();
    drop(disk);
    // The clusters of the bitmap are free.
    check_image(&images.path("image"));
}

/// Cut at any cluster, an image is refused, with what it lacks; within the last cluster, and only there, it may be sound.
#[test]
fn an_image_that_is_cut_off_is_refused() {
    const CLUSTER: u64 = 64 << 10;
    let images = Images::new();
    for (options, cluster) in [
        ("cluster_size=65536", CLUSTER),
        ("cluster_size=65536,refcount_bits=1", CLUSTER),
        ("cluster_size=4096,refcount_bits=64", 4 << 10),
        ("cluster_size=65536,compat=0.10", CLUSTER),
        ("cluster_size=65536,preallocation=metadata", CLUSTER),
    ] {
        if !images.create("whole", &["-o", options]) {
            return;
        }
        let path = images.text("whole");
        let at = |offset: u64| format!("write -q -P 7 {offset} 64k");
        let (first, last) = (at(1 << 20), at(3 << 20));
        let writes = ["-f", "qcow2", "-c", &first, "-c", &last, &path];
        let written = Command::new("qemu-io").args(writes).status();
        if !written.is_ok_and(|status| status.success()) {
            println!("ATOLL-SKIP: qemu-io is not installed (apt-get install qemu-utils)");
            return;
        }
        let bytes = std::fs::read(&path).unwrap();
        open(&source(Path::new(&path), &[]), OpenOptions::default()).unwrap();
        let ends = (0..bytes.len() as u64 / cluster).map(|count| count * cluster);
        let ends = ends.chain([4, 71, 103, cluster - 1]);
        let mut lacking = std::collections::BTreeSet::new();
        for end in ends.filter(|end| *end > 0) {
            let cut = images.text("cut");
            std::fs::write(&cut, &bytes[..usize::try_from(end).unwrap()]).unwrap();
            let error = open(&source(Path::new(&cut), &[]), OpenOptions::default());
            let Err(OpenError::Qcow2 { path, source }) = error else {
                panic!("{options}: opened when it was cut at {end}");
            };
            assert_eq!(path, Path::new(&cut));
            let text = source.to_string();
            let told = text.contains("is cut off: ") && text.contains("qemu-img check");
            assert!(
                told && text.contains(&format!("the file at {end}:")),
                "{text}"
            );
            lacking.extend(text.split(" ends at").next().map(str::to_owned));
        }
        println!("{options}: {lacking:?}");
    }
}

/// What is counted behind the end of the file, and used by nobody, is no loss.
#[test]
fn a_leak_behind_the_end_is_no_cut() {
    let images = Images::new();
    if !images.create("image", &["-o", "cluster_size=65536"]) {
        return;
    }
    let path = images.path("image");
    let mut bytes = std::fs::read(&path).unwrap();
    // The only block of counts, of 16 bits, by the table of them.
    let number = |at: usize| u64::from_be_bytes(*bytes[at..].first_chunk().unwrap());
    let table = usize::try_from(number(48)).unwrap();
    let block = usize::try_from(number(table)).unwrap();
    bytes[block + 2 * 1000 + 1] = 1;
    std::fs::write(&path, &bytes).unwrap();
    let disk = open(&source(&path, &[]), writable()).unwrap();
    write(&*disk, 0, &[1; 4096]).unwrap();
}

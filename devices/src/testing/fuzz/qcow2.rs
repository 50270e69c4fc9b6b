// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Any bytes as a qcow2 image: it is refused in one line, or every request on it ends.
//!
//! Byte 0: bit 0 opens it read-only; bits 1 and up seed the requests. The rest is the image. Clusters of 512 bytes keep
//! images small enough for a fuzzer.

use std::io::Write as _;
use std::path::Path;

use atoll_disk::conformance::{act, read, write};
use atoll_disk::qcow2::{Qcow2Options, create};
use atoll_disk::{BlockBackend, Format, OpenOptions, OpenedDisk, Operation, Space};

use super::platform::scratch;
use super::saved::assert_one_line;
use crate::testing::replay::Random;

/// Longest image.
const IMAGE_BYTES_MAX: usize = 1 << 20;
/// Requests on an image that was opened.
const REQUESTS: usize = 24;
const CLUSTER_BYTES: u64 = 512;
/// What a request moves at most.
const REQUEST_BYTES_MAX: usize = 8192;

/// Opens the input, and works with it.
pub fn qcow2(input: &[u8]) {
    let Some((&first, image)) = input.split_first() else {
        return;
    };
    let mut file = scratch("image", 0);
    let image = &image[..image.len().min(IMAGE_BYTES_MAX)];
    file.write_all(image).expect("memory for the image");
    let options = OpenOptions {
        read_only: first & 1 != 0,
        discard: true,
        ..OpenOptions::default()
    };
    let opened = OpenedDisk::from_file(file, Path::new("image"), Format::Qcow2, options);
    match opened.and_then(OpenedDisk::backend) {
        Ok(disk) => requests(&*disk, u64::from(first >> 1)),
        Err(error) => assert_one_line(&error),
    }
}

/// Whatever the tables say: an answer, and one that is the same when it is asked for again.
fn requests(disk: &dyn BlockBackend, seed: u64) {
    let mut random = Random(seed);
    let size_bytes = disk.geometry().size_bytes;
    let mut buffer = vec![0; REQUEST_BYTES_MAX];
    for _ in 0..REQUESTS {
        // Near the beginning or near the end, where tables may differ.
        let near = random.bits() % size_bytes.min(1 << 16);
        let at = if random.below(4) == 0 {
            size_bytes - 1 - near
        } else {
            near
        } & !511;
        let left = usize::try_from(size_bytes - at).unwrap_or(usize::MAX);
        let count = (512 * (1 + random.below(16))).min(left & !511);
        let length_bytes = count as u64;
        let part = &mut buffer[..count];
        let space = [Space::Free, Space::Keep][random.below(2)];
        let _ = match random.below(8) {
            0..4 => read(disk, at, part),
            4 => act(disk, at, Operation::Discard { length_bytes }),
            5 => {
                let zero = Operation::WriteZeroes {
                    length_bytes,
                    space,
                };
                act(disk, at, zero)
            }
            6 => act(disk, 0, Operation::Flush),
            _ => {
                part.fill(random.byte());
                let written = write(disk, at, part);
                if written.is_ok() {
                    let expected = part.to_vec();
                    // A table that shares clusters may have changed under it; an answer there is all the same.
                    let _ = read(disk, at, part).map(|()| *part == expected);
                }
                written
            }
        };
    }
    if let Err(error) = disk.resize(size_bytes.saturating_add(CLUSTER_BYTES)) {
        assert_one_line(&error);
    }
}

/// A new image, one with data, one with something behind it.
pub fn qcow2_corpus() -> Vec<Vec<u8>> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image");
    let options = Qcow2Options {
        cluster_bytes: usize::try_from(CLUSTER_BYTES).unwrap(),
        ..Qcow2Options::default()
    };
    create(&path, 1 << 16, &options).unwrap();
    let bytes = |path: &Path| [vec![2], std::fs::read(path).unwrap()].concat();
    let new = bytes(&path);
    {
        let file = std::fs::File::options()
            .read(true)
            .write(true)
            .open(&path)
            .unwrap();
        let disk = OpenedDisk::from_file(file, &path, Format::Qcow2, OpenOptions::default());
        let disk = disk.unwrap().backend().unwrap();
        write(&*disk, 1024, &[7; 4096]).unwrap();
        let length_bytes = 1024;
        let space = Space::Keep;
        let zero = Operation::WriteZeroes {
            length_bytes,
            space,
        };
        act(&*disk, 2048, zero).unwrap();
        write(&*disk, (1 << 16) - 512, &[8; 512]).unwrap();
    }
    let used = bytes(&path);
    let mut compressed = used.clone();
    // The first entry of the first second-level table becomes a compressed cluster within the file.
    let word = |at: usize| u64::from_be_bytes(used[1 + at..][..8].try_into().unwrap());
    let first_level = usize::try_from(word(40)).unwrap();
    let second_level = usize::try_from(word(first_level) & 0x00ff_ffff_ffff_fe00).unwrap();
    let entry = 1 << 62 | word(second_level + 16) & 0x00ff_ffff_ffff_fe00;
    compressed[1 + second_level..][..8].copy_from_slice(&u64::to_be_bytes(entry));
    // Found by the fuzzer: a table of feature names that ends within an entry.
    let mut names = used.clone();
    let length = u32::from_be_bytes(used[1 + 100..][..4].try_into().unwrap());
    let at = 1 + usize::try_from(length).unwrap();
    names[at..][..8].copy_from_slice(&[0x68, 3, 0xf8, 0x57, 0, 0, 0, 49]);
    let mut read_only = used.clone();
    read_only[0] = 1;
    vec![new, used, compressed, names, read_only]
}

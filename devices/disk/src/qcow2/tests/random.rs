// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Random requests against a model of the disk, by one queue and by several at once.

use std::collections::BTreeMap;
use std::path::Path;

use super::{check_image, done, new_image, qemu_img, source};
use crate::backend::{BlockBackend, Operation, Space};
use crate::conformance::{act, read, write};
use crate::open::{OpenOptions, open};

/// SplitMix64: small, and the same everywhere.
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ z >> 31) % end
    }
}

pub(super) const DISK_BYTES: u64 = 16 << 20;
const BLOCK: u64 = 4096;

/// Random writes, zeroes, discards and flushes; keeps what each block must read as (absent: unknown).
pub(super) fn workload(disk: &dyn BlockBackend, seed: u64, rounds: u32) -> BTreeMap<u64, u8> {
    let mut random = Random(seed);
    let mut model: BTreeMap<u64, u8> = (0..DISK_BYTES / BLOCK).map(|block| (block, 0)).collect();
    for _ in 0..rounds {
        let count = 1 + random.below(40);
        let block = random.below(DISK_BYTES / BLOCK - count);
        let (offset, length_bytes) = (block * BLOCK, count * BLOCK);
        let blocks = block..block + count;
        match random.below(8) {
            0 => {
                act(disk, offset, Operation::Discard { length_bytes }).unwrap();
                model.retain(|block, _| !blocks.contains(block));
            }
            1 | 2 => {
                let space = [Space::Free, Space::Keep][usize::from(random.below(2) == 0)];
                let operation = Operation::WriteZeroes {
                    length_bytes,
                    space,
                };
                act(disk, offset, operation).unwrap();
                model.extend(blocks.map(|block| (block, 0)));
            }
            3 => act(disk, 0, Operation::Flush).unwrap(),
            _ => {
                let byte = 1 + u8::try_from(random.below(255)).unwrap();
                let data = vec![byte; usize::try_from(length_bytes).unwrap()];
                write(disk, offset, &data).unwrap();
                model.extend(blocks.map(|block| (block, byte)));
            }
        }
    }
    model
}

pub(super) fn compare(disk: &dyn BlockBackend, model: &BTreeMap<u64, u8>) {
    let mut buffer = vec![0; usize::try_from(BLOCK).unwrap()];
    for (block, byte) in model {
        read(disk, block * BLOCK, &mut buffer).unwrap();
        assert!(
            buffer.iter().all(|one| one == byte),
            "block {block} is {byte}"
        );
    }
}

#[test]
fn what_is_written_at_random_is_there_and_the_image_is_sound() {
    for seed in 0..2 {
        println!("seed {seed}");
        let (_directory, path) = new_image(DISK_BYTES);
        let options = OpenOptions {
            discard: true,
            ..OpenOptions::default()
        };
        let disk = open(&source(&path, &[]), options).unwrap();
        let model = workload(&*disk, seed, 300);
        compare(&*disk, &model);
        drop(disk);
        check_image(&path);
        let disk = open(&source(&path, &[]), OpenOptions::default()).unwrap();
        compare(&*disk, &model);
    }
}

/// Queues of the test below, each with a thread of its own.
const QUEUES: u64 = 4;

/// Every queue has the blocks whose number leaves it a rest of its own, so that all of them work in the same clusters
/// all the time: reads see what this queue wrote last, whatever the others do beside it.
fn interleaved(disk: &dyn BlockBackend, seed: u64, queue: u64) -> BTreeMap<u64, u8> {
    let mut random = Random(seed << 8 | queue);
    let mut model = BTreeMap::new();
    let mut data = vec![0; usize::try_from(BLOCK).unwrap()];
    for _ in 0..400 {
        // Few clusters: most of them are written by all.
        let block = random.below(DISK_BYTES / BLOCK / QUEUES / 8) * QUEUES + queue;
        let offset = block * BLOCK;
        match random.below(8) {
            0 | 1 => {
                let length_bytes = BLOCK;
                let space = [Space::Free, Space::Keep][usize::from(random.below(2) == 0)];
                let operation = Operation::WriteZeroes {
                    length_bytes,
                    space,
                };
                act(disk, offset, operation).unwrap();
                model.insert(block, 0);
            }
            2 => act(disk, 0, Operation::Flush).unwrap(),
            3 | 4 => {
                read(disk, offset, &mut data).unwrap();
                let expected = model.get(&block).copied().unwrap_or(0);
                assert!(data.iter().all(|byte| *byte == expected), "block {block}");
            }
            _ => {
                let byte = 1 + u8::try_from(random.below(255)).unwrap();
                data.fill(byte);
                write(disk, offset, &data).unwrap();
                model.insert(block, byte);
            }
        }
    }
    model
}

/// `qemu-img compare` of an image with a raw one that is made from the model.
pub(super) fn compare_by_qemu(path: &Path, size_bytes: u64, model: &BTreeMap<u64, u8>) {
    use std::os::unix::fs::FileExt;
    let raw = path.with_extension("model");
    let file = std::fs::File::create(&raw).unwrap();
    file.set_len(size_bytes).unwrap();
    for (block, byte) in model.iter().filter(|(_, byte)| **byte != 0) {
        let data = vec![*byte; usize::try_from(BLOCK).unwrap()];
        file.write_all_at(&data, block * BLOCK).unwrap();
    }
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    done(qemu_img(&[
        "compare",
        "-f",
        "qcow2",
        "-F",
        "raw",
        &text(path),
        &text(&raw),
    ]));
}

#[test]
fn queues_that_work_in_the_same_clusters_do_not_mix() {
    for seed in 0..3 {
        println!("seed {seed}");
        let (_directory, path) = new_image(DISK_BYTES);
        let options = OpenOptions {
            discard: true,
            ..OpenOptions::default()
        };
        let disk = open(&source(&path, &[]), options).unwrap();
        let models: Vec<_> = std::thread::scope(|scope| {
            let disk = &*disk;
            let threads: Vec<_> = (0..QUEUES)
                .map(|queue| scope.spawn(move || interleaved(disk, seed, queue)))
                .collect();
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap())
                .collect()
        });
        let model: BTreeMap<u64, u8> = models.into_iter().flatten().collect();
        compare(&*disk, &model);
        drop(disk);
        check_image(&path);
        compare_by_qemu(&path, DISK_BYTES, &model);
    }
}

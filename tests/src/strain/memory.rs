// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Blocks of 4 KiB with a content that tells which block they are and how often they were written: one that is lost, old
//! or somebody else's is found when it is written next, and at the end.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};

use anyhow::{Context, Result, bail};
use nix::libc::O_DIRECT;

use super::{Numbers, Shared, rest};

const BLOCK_BYTES: usize = 4096;
/// Blocks in memory, and how many of them are written between two rests.
const RAM_BLOCKS: usize = 2048;
const RAM_BLOCKS_AT_ONCE: usize = 4;
/// Blocks on the disk.
const DISK_BLOCKS: usize = 1024;
/// Writes to the disk between two flushes.
const FLUSH_PERIOD: u64 = 16;

/// Aligned as a page, and as direct input and output want it.
#[derive(Clone)]
#[repr(align(4096))]
struct Block([u8; BLOCK_BYTES]);

impl Block {
    /// The `generation`th content of block `index`. One in four is zero, which travels in another way.
    fn of(index: usize, generation: u64) -> Self {
        let mut block = Self([0; BLOCK_BYTES]);
        if generation.is_multiple_of(4) {
            return block;
        }
        let mut numbers = Numbers::new((index as u64) << 32 | generation);
        for word in block.0.as_chunks_mut::<8>().0 {
            *word = numbers.draw().to_le_bytes();
        }
        block
    }

    fn check(&self, index: usize, generation: u64) -> Result<()> {
        let expected = Self::of(index, generation);
        let unlike = self.0.iter().zip(&expected.0).position(|(a, b)| a != b);
        let Some(byte) = unlike else { return Ok(()) };
        let older = (0..generation)
            .rev()
            .find(|older| Self::of(index, *older).0 == self.0);
        bail!("block {index} at {byte}: not generation {generation}, but {older:?}")
    }
}

/// In memory.
pub(super) fn in_ram(shared: &Shared) -> Result<()> {
    let mut blocks = vec![Block([0; BLOCK_BYTES]); RAM_BLOCKS];
    let mut generations = vec![0; RAM_BLOCKS];
    let mut numbers = Numbers::new(2);
    loop {
        for _ in 0..RAM_BLOCKS_AT_ONCE {
            let index = pick(&mut numbers, RAM_BLOCKS);
            blocks[index].check(index, generations[index])?;
            generations[index] += 1;
            blocks[index] = Block::of(index, generations[index]);
        }
        shared.count("memory");
        if !rest(shared, 20) {
            break;
        }
    }
    for (index, (block, generation)) in blocks.iter().zip(&generations).enumerate() {
        block.check(index, *generation)?;
    }
    Ok(())
}

/// In a file, past the page cache.
pub(super) fn on_disk(shared: &Shared) -> Result<()> {
    let file = fresh(&shared.file).with_context(|| shared.file.display().to_string())?;
    let mut generations = vec![0; DISK_BLOCKS];
    let mut numbers = Numbers::new(3);
    let mut written = 0_u64;
    loop {
        let index = pick(&mut numbers, DISK_BLOCKS);
        read(&file, index)?.check(index, generations[index])?;
        generations[index] += 1;
        let block = Block::of(index, generations[index]);
        let wrote = file.write_all_at(&block.0, offset(index));
        wrote.context("write a block")?;
        written += 1;
        if written.is_multiple_of(FLUSH_PERIOD) {
            file.sync_data().context("flush")?;
        }
        shared.count("disk");
        if !rest(shared, 20) {
            break;
        }
    }
    for (index, generation) in generations.into_iter().enumerate() {
        read(&file, index)?.check(index, generation)?;
    }
    Ok(())
}

/// A file that is all zeroes, and has its space.
fn fresh(path: &std::path::Path) -> Result<File> {
    std::fs::write(path, vec![0; DISK_BLOCKS * BLOCK_BYTES])?;
    let mut options = OpenOptions::new();
    let options = options.read(true).write(true);
    // A temporary file system may not know direct access.
    let direct = options.clone().custom_flags(O_DIRECT).open(path);
    let file = direct.or_else(|_| options.open(path))?;
    file.sync_all()?;
    Ok(file)
}

fn read(file: &File, index: usize) -> Result<Block> {
    let mut block = Block([0; BLOCK_BYTES]);
    let read = file.read_exact_at(&mut block.0, offset(index));
    read.context("read a block")?;
    Ok(block)
}

fn offset(index: usize) -> u64 {
    (index * BLOCK_BYTES) as u64
}

fn pick(numbers: &mut Numbers, count: usize) -> usize {
    usize::try_from(numbers.below(count as u64)).expect("below a usize")
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Blocks of 4 KiB with a content that tells which block they are and how often they were written: one that is lost, old
//! or somebody else's is found when it is written next, and at the end.

use anyhow::{Result, bail};

use super::{Numbers, Shared, rest};

const BLOCK_BYTES: usize = 4096;
/// Blocks, and how many of them are written between two rests.
const BLOCKS: usize = 2048;
const BLOCKS_AT_ONCE: usize = 4;

/// Aligned as a page.
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

/// Writes, and looks.
pub(super) fn write(shared: &Shared) -> Result<()> {
    let mut blocks = vec![Block([0; BLOCK_BYTES]); BLOCKS];
    let mut generations = vec![0; BLOCKS];
    let mut numbers = Numbers::new(2);
    loop {
        for _ in 0..BLOCKS_AT_ONCE {
            let index = pick(&mut numbers, BLOCKS);
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

fn pick(numbers: &mut Numbers, count: usize) -> usize {
    usize::try_from(numbers.below(count as u64)).expect("below a usize")
}

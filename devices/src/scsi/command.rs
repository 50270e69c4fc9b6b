// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A command descriptor block as a checked command. Reads nothing but the block's own bytes.

use super::Sense;

/// Bytes of a command block that virtio-scsi carries.
pub const CDB_BYTES: usize = 32;

/// A parsed command. Addresses and counts are in the unit's blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Is there a medium?
    TestUnitReady,
    /// Sense of nothing: errors come with their commands.
    RequestSense { allocation: usize },
    /// Identification; one page of it, or the standard data.
    Inquiry { page: Option<u8>, allocation: usize },
    /// Which units the target has.
    ReportLuns { allocation: usize },
    /// Parameters of a page.
    ModeSense { mode: ModeSense, allocation: usize },
    /// Size, short form.
    ReadCapacity10,
    /// Size, long form.
    ReadCapacity16 { allocation: usize },
    /// Medium to memory.
    Read { block: u64, count: u32 },
    /// Memory to medium; `durable` before it completes.
    Write {
        block: u64,
        count: u32,
        durable: bool,
    },
    /// Checks that blocks exist.
    Verify { block: u64, count: u32 },
    /// Makes completed writes durable.
    Synchronize,
    /// One block's data over many.
    WriteSame(WriteSame),
    /// Blocks that are needed no more, in a parameter list.
    Unmap { list_bytes: usize },
    /// Load or eject.
    StartStop { start: bool, load_eject: bool },
    /// Whether the medium may be taken out.
    PreventRemoval { prevent: bool },
    /// A disc's tracks, or its sessions.
    ReadToc { toc: ReadToc, allocation: usize },
    /// What the drive can do.
    GetConfiguration { allocation: usize },
    /// What happened to the drive.
    GetEventStatus { classes: u8, allocation: usize },
}

/// Fields of MODE SENSE(6) and (10), SPC-4.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ModeSense {
    /// Page code; 0x3f asks for all pages.
    pub page: u8,
    /// The 10-byte form, with an 8-byte header.
    pub long: bool,
    /// Asks which bits may be changed: none.
    pub changeable: bool,
}

/// Fields of WRITE SAME(10) and (16), SBC-3: one block's data, written to each of a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WriteSame {
    /// First logical block of the range.
    pub block: u64,
    /// Logical blocks in the range.
    pub count: u32,
    /// The unit may free the blocks, if they read as zeroes then.
    pub unmap: bool,
    /// NDOB, of the 16-byte command: no data comes with it, and zeroes are written.
    pub no_data: bool,
}

/// Fields of READ TOC/PMA/ATIP, MMC-5: which form of a disc's table of contents.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReadToc {
    /// Form of the answer: 0 for tracks, 1 for sessions.
    pub format: u8,
    /// First track or session to be told of.
    pub first: u8,
    /// Addresses are told as minutes, seconds and frames, not as logical blocks.
    pub msf: bool,
}

/// Bytes of the block, big-endian.
struct Block<'a>(&'a [u8; CDB_BYTES]);

impl Block<'_> {
    fn u8(&self, at: usize) -> u8 {
        self.0[at]
    }

    fn u16(&self, at: usize) -> u16 {
        u16::from_be_bytes([self.0[at], self.0[at + 1]])
    }

    fn u32(&self, at: usize) -> u32 {
        u32::from(self.u16(at)) << 16 | u32::from(self.u16(at + 2))
    }

    fn u64(&self, at: usize) -> u64 {
        u64::from(self.u32(at)) << 32 | u64::from(self.u32(at + 4))
    }

    fn length16(&self, at: usize) -> usize {
        self.u16(at).into()
    }

    fn length32(&self, at: usize) -> usize {
        usize::try_from(self.u32(at)).expect("64-bit host")
    }

    fn bit(&self, at: usize, bit: u8) -> bool {
        self.0[at] & 1 << bit != 0
    }
}

impl Command {
    /// Parses a block. What is no command here is told by its sense.
    pub fn parse(cdb: &[u8; CDB_BYTES]) -> Result<Self, Sense> {
        let cdb = Block(cdb);
        let opcode = cdb.u8(0);
        match opcode {
            0x08 | 0x0a | 0x28 | 0x2a | 0x88 | 0x8a | 0xa8 | 0xaa => transfer(opcode, &cdb),
            0x2f => verify(&cdb, u64::from(cdb.u32(2)), u32::from(cdb.u16(7))),
            0x8f => verify(&cdb, cdb.u64(2), cdb.u32(10)),
            0x41 => write_same(&cdb, u64::from(cdb.u32(2)), u32::from(cdb.u16(7))),
            0x93 => write_same(&cdb, cdb.u64(2), cdb.u32(10)),
            _ => control(opcode, &cdb),
        }
    }
}

fn control(opcode: u8, cdb: &Block<'_>) -> Result<Command, Sense> {
    Ok(match opcode {
        0x00 => Command::TestUnitReady,
        0x03 => Command::RequestSense {
            allocation: cdb.u8(4).into(),
        },
        0x12 => inquiry(cdb)?,
        0x1a | 0x5a => mode_sense(opcode, cdb)?,
        0x1b => Command::StartStop {
            start: cdb.bit(4, 0),
            load_eject: cdb.bit(4, 1),
        },
        0x1e => Command::PreventRemoval {
            prevent: cdb.bit(4, 0),
        },
        0x25 => Command::ReadCapacity10,
        0x35 | 0x91 => Command::Synchronize,
        0x42 => Command::Unmap {
            list_bytes: cdb.length16(7),
        },
        0x43 => Command::ReadToc {
            toc: ReadToc {
                format: cdb.u8(2) & 15,
                first: cdb.u8(6),
                msf: cdb.bit(1, 1),
            },
            allocation: cdb.length16(7),
        },
        0x46 => Command::GetConfiguration {
            allocation: cdb.length16(7),
        },
        // Only the polled form: nothing is told later.
        0x4a if cdb.bit(1, 0) => Command::GetEventStatus {
            classes: cdb.u8(4),
            allocation: cdb.length16(7),
        },
        0x4a => return Err(Sense::INVALID_FIELD),
        0x9e if cdb.u8(1) & 31 == 0x10 => Command::ReadCapacity16 {
            allocation: cdb.length32(10),
        },
        0x9e => return Err(Sense::INVALID_FIELD),
        0xa0 => Command::ReportLuns {
            allocation: cdb.length32(6),
        },
        _ => return Err(Sense::INVALID_OPCODE),
    })
}

fn inquiry(cdb: &Block<'_>) -> Result<Command, Sense> {
    let page = match (cdb.bit(1, 0), cdb.u8(2)) {
        (true, page) => Some(page),
        (false, 0) => None,
        (false, _) => return Err(Sense::INVALID_FIELD),
    };
    let allocation = cdb.length16(3);
    Ok(Command::Inquiry { page, allocation })
}

fn mode_sense(opcode: u8, cdb: &Block<'_>) -> Result<Command, Sense> {
    let long = opcode == 0x5a;
    let control = cdb.u8(2) >> 6;
    // Saved values (3) do not exist; sub-pages neither, but "all of them" of all pages means the pages.
    if control == 3 || !matches!(cdb.u8(3), 0 | 0xff) {
        return Err(Sense::INVALID_FIELD);
    }
    let mode = ModeSense {
        page: cdb.u8(2) & 63,
        long,
        changeable: control == 1,
    };
    let allocation = match long {
        true => cdb.length16(7),
        false => cdb.u8(4).into(),
    };
    Ok(Command::ModeSense { mode, allocation })
}

/// READ and WRITE of 6, 10, 12 and 16 bytes. SBC-3 §5.
fn transfer(opcode: u8, cdb: &Block<'_>) -> Result<Command, Sense> {
    let (block, count, flags) = match opcode {
        0x08 | 0x0a => {
            let count = u32::from(cdb.u8(4));
            // 0 means 256 here.
            let count = if count == 0 { 256 } else { count };
            (u64::from(cdb.u32(0) & 0x1f_ffff), count, 0)
        }
        0x28 | 0x2a => (u64::from(cdb.u32(2)), u32::from(cdb.u16(7)), cdb.u8(1)),
        0xa8 | 0xaa => (u64::from(cdb.u32(2)), cdb.u32(6), cdb.u8(1)),
        _ => (cdb.u64(2), cdb.u32(10), cdb.u8(1)),
    };
    // Protection information (bits 5 to 7) is not kept.
    if flags & 0xe0 != 0 {
        return Err(Sense::INVALID_FIELD);
    }
    let durable = flags & 8 != 0;
    Ok(match opcode {
        0x08 | 0x28 | 0x88 | 0xa8 => Command::Read { block, count },
        _ => Command::Write {
            block,
            count,
            durable,
        },
    })
}

fn verify(cdb: &Block<'_>, block: u64, count: u32) -> Result<Command, Sense> {
    // BYTCHK: comparing with data is not done.
    match cdb.u8(1) & 6 {
        0 => Ok(Command::Verify { block, count }),
        _ => Err(Sense::INVALID_FIELD),
    }
}

fn write_same(cdb: &Block<'_>, block: u64, count: u32) -> Result<Command, Sense> {
    // Protection information, ANCHOR.
    if cdb.u8(1) & 0xf0 != 0 {
        return Err(Sense::INVALID_FIELD);
    }
    Ok(Command::WriteSame(WriteSame {
        block,
        count,
        unmap: cdb.bit(1, 3),
        no_data: cdb.u8(0) == 0x93 && cdb.bit(1, 0),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(bytes: &[u8]) -> Result<Command, Sense> {
        let mut cdb = [0; CDB_BYTES];
        cdb[..bytes.len()].copy_from_slice(bytes);
        Command::parse(&cdb)
    }

    #[test]
    fn every_length_of_read_and_write() {
        let read = |block, count| Ok(Command::Read { block, count });
        assert_eq!(parse(&[0x08, 0xe1, 2, 3, 4]), read(0x1_0203, 4));
        assert_eq!(parse(&[0x08, 0, 0, 9, 0]), read(9, 256));
        assert_eq!(
            parse(&[0x28, 0, 1, 2, 3, 4, 0, 5, 6]),
            read(0x102_0304, 0x506)
        );
        assert_eq!(
            parse(&[0xa8, 0, 0, 0, 0, 1, 1, 0, 0, 2]),
            read(1, 0x100_0002)
        );
        let long = [0x88, 0, 1, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 3];
        assert_eq!(parse(&long), read(0x100_0000_0000_0002, 3));
        let write = Command::Write {
            block: 1,
            count: 2,
            durable: true,
        };
        assert_eq!(parse(&[0x2a, 8, 0, 0, 0, 1, 0, 0, 2]), Ok(write));
        assert_eq!(parse(&[0x2a, 0x20, 0, 0]), Err(Sense::INVALID_FIELD));
    }

    #[test]
    fn no_block_panics() {
        for opcode in 0..=255 {
            for fill in [0, 1, 0x55, 0xff] {
                let mut cdb = [fill; CDB_BYTES];
                cdb[0] = opcode;
                let _ = Command::parse(&cdb);
            }
        }
        assert_eq!(parse(&[0xff]), Err(Sense::INVALID_OPCODE));
        assert_eq!(parse(&[0x12, 0, 1]), Err(Sense::INVALID_FIELD));
    }
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! What a kernel's headers promise, compared with its file and the guest's memory before anything is loaded: the crate
//! that loads says only that it could not.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use atoll_devices::memory::Ram;
use vm_memory::{GuestAddress, GuestMemoryBackend};

use crate::layout;

/// Bytes of an ELF file's header, and of one of its program headers. System V ABI, "ELF Header" (64-bit).
const ELF_BYTES: usize = 64;
const PROGRAM_BYTES: usize = 56;
/// Identification: 64 bits, least significant byte first; and the machine, x86-64.
const CLASS_64: u8 = 2;
const LITTLE_ENDIAN: u8 = 1;
const X86_64: u16 = 62;
/// A program header of something to load.
const LOAD: u32 = 1;
/// Fields of a bzImage: sectors of set-up code (0 is 4), size of the rest in units of 16 bytes. Kernel
/// `Documentation/arch/x86/boot.rst`, "Details of Header Fields".
const SETUP_SECTORS: usize = 0x1f1;
const SYSTEM_SIZE: usize = 0x1f4;
const SECTOR_BYTES: u64 = 512;
const HEADER_BYTES: usize = 0x1f8;

/// What is wrong with a kernel's image, by its first bytes: told before anything of it is loaded.
#[derive(Debug, thiserror::Error)]
pub enum HeaderError {
    /// The file cannot be read.
    #[error("read its headers")]
    Read(#[source] io::Error),
    /// An ELF file for something else.
    #[error("an ELF file, but not for 64-bit x86")]
    Machine,
    /// The file ends before what its headers speak of.
    #[error("cut off or damaged: its headers speak of {end} bytes, it has {bytes}")]
    Cut {
        /// Where the last part would end.
        end: u64,
        /// The file's size.
        bytes: u64,
    },
    /// A part lies where the boot parameters go.
    #[error(
        "loads {bytes} bytes at {address:#x}: the first MiB is for boot parameters, link it above"
    )]
    Low {
        /// Where, guest-physical.
        address: u64,
        /// How much.
        bytes: u64,
    },
    /// A part does not fit.
    #[error(
        "loads {bytes} bytes at {address:#x}, which do not fit into the guest's memory: give the machine more, or \
         link it elsewhere"
    )]
    Memory {
        /// Where, guest-physical.
        address: u64,
        /// How much.
        bytes: u64,
    },
}

fn number<const N: usize>(bytes: &[u8], at: usize) -> u64 {
    let mut value = [0; 8];
    value[..N].copy_from_slice(&bytes[at..at + N]);
    u64::from_le_bytes(value)
}

fn size(file: &File) -> Result<u64, HeaderError> {
    let metadata = file.metadata().map_err(HeaderError::Read)?;
    Ok(metadata.len())
}

/// Bytes of the file, which must be there.
fn read<const N: usize>(file: &File, at: u64) -> Result<[u8; N], HeaderError> {
    let (end, bytes) = (at.saturating_add(N as u64), size(file)?);
    if end > bytes {
        return Err(HeaderError::Cut { end, bytes });
    }
    let mut data = [0; N];
    file.read_exact_at(&mut data, at)
        .map_err(HeaderError::Read)?;
    Ok(data)
}

/// An ELF file: every part that is loaded is in the file and fits into memory.
pub(super) fn check_elf(file: &File, memory: &Ram) -> Result<(), HeaderError> {
    let header: [u8; ELF_BYTES] = read(file, 0)?;
    let machine = number::<2>(&header, 18);
    if header[4] != CLASS_64 || header[5] != LITTLE_ENDIAN || machine != u64::from(X86_64) {
        return Err(HeaderError::Machine);
    }
    let bytes = size(file)?;
    let (table, count) = (number::<8>(&header, 32), number::<2>(&header, 56));
    for index in 0..count {
        let at = table.saturating_add(index * PROGRAM_BYTES as u64);
        let program: [u8; PROGRAM_BYTES] = read(file, at)?;
        if number::<4>(&program, 0) != u64::from(LOAD) {
            continue;
        }
        let [offset, address, in_file, in_memory] =
            [8, 24, 32, 40].map(|at| number::<8>(&program, at));
        let end = offset.saturating_add(in_file);
        if end > bytes {
            return Err(HeaderError::Cut { end, bytes });
        }
        let bytes = in_file.max(in_memory);
        if address < layout::KERNEL && bytes > 0 {
            return Err(HeaderError::Low { address, bytes });
        }
        check_fits(memory, address, bytes)?;
    }
    Ok(())
}

/// A bzImage: the file has as much as its header says. `false`: it is none.
pub(super) fn check_bzimage(file: &File) -> Result<bool, HeaderError> {
    let bytes = size(file)?;
    if bytes < HEADER_BYTES as u64 + 0x10 {
        return Ok(false);
    }
    let header: [u8; HEADER_BYTES + 0x10] = read(file, 0)?;
    if header[0x202..0x206] != *b"HdrS" {
        return Ok(false);
    }
    let sectors = match header[SETUP_SECTORS] {
        0 => 4,
        sectors => u64::from(sectors),
    };
    let end = (sectors + 1) * SECTOR_BYTES + 16 * number::<4>(&header, SYSTEM_SIZE);
    match end <= bytes {
        true => Ok(true),
        false => Err(HeaderError::Cut { end, bytes }),
    }
}

/// Whether a range is in memory, whole.
pub(super) fn check_fits(memory: &Ram, address: u64, bytes: u64) -> Result<(), HeaderError> {
    let fits = match usize::try_from(bytes) {
        Ok(0) => true,
        Ok(length) => memory.check_range(GuestAddress(address), length),
        Err(_) => false,
    };
    match fits {
        true => Ok(()),
        false => Err(HeaderError::Memory { address, bytes }),
    }
}

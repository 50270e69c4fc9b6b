// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Guest RAM: where its bytes come from, and that there can be enough of them.
//!
//! Not here: which addresses are RAM (`layout.rs`), telling KVM (`kvm`). RAM whose content comes later: `filling`;
//! that is written down while the guest runs: `saving`.

pub mod filling;
#[cfg(test)]
mod paged;
pub mod saving;
mod userfault;

use std::fs::File;
use std::io;

use atoll_devices::memory::Ram;
use atoll_vmm_protocol::services::MemoryBacking;
use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags, fallocate, memfd_create};
use rustix::io::retry_on_intr;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::board::Board;

pub use userfault::{
    Told, USERFAULTFD, UserFault, UserFaultError, Writes, WritesError, open_device,
};

/// The smaller huge page of x86-64, which the host may put where it likes (transparent huge pages).
pub(crate) const HUGE_PAGE_BYTES: usize = 2 << 20;

/// What holds the guest's RAM on the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Backing {
    /// Private anonymous pages: the cheapest page faults.
    #[default]
    Anonymous,
    /// A memfd, so that another process can map the same pages (a vhost-user backend, the next version of
    /// this program). First touch of a page costs about twice as much.
    Shared,
    /// Huge pages of the host, all of them taken at once, so that none is missing later.
    Huge(HugePage),
}

/// Sizes of huge pages that x86-64 has and a spec may ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HugePage {
    /// 2 MiB.
    Mib2,
    /// 1 GiB.
    Gib1,
}

impl From<MemoryBacking> for Backing {
    fn from(spec: MemoryBacking) -> Self {
        match spec {
            MemoryBacking::Anonymous => Self::Anonymous,
            MemoryBacking::Shared => Self::Shared,
            MemoryBacking::Hugepages2M => Self::Huge(HugePage::Mib2),
            MemoryBacking::Hugepages1G => Self::Huge(HugePage::Gib1),
        }
    }
}

/// Why there is no RAM for the guest.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// More than all of the host's.
    #[error("{asked_mib} MiB of memory asked for, the host has {host_mib} MiB, swap included")]
    MoreThanHost {
        /// From the spec.
        asked_mib: u64,
        /// RAM and swap.
        host_mib: u64,
    },
    /// Not even one page table's worth of addresses.
    #[error("{asked_mib} MiB of memory asked for, this CPU addresses {address_bits} bits")]
    MoreThanAddresses {
        /// From the spec.
        asked_mib: u64,
        /// Width of a physical address.
        address_bits: u8,
    },
    /// Too few huge pages are free.
    #[error(
        "take {asked_mib} MiB in {page} huge pages: raise vm.nr_hugepages (sysctl), or hugepages= at boot"
    )]
    HugePages {
        /// From the spec.
        asked_mib: u64,
        /// `2 MiB`.
        page: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// Another process's memory is no memfd of that size that stays so.
    #[error("the memory that came along is not a sealed file of {memory_mib} MiB")]
    Passed {
        /// From the spec.
        memory_mib: u64,
    },
    /// The host would not map it.
    #[error("map {asked_mib} MiB of guest memory")]
    Map {
        /// From the spec.
        asked_mib: u64,
        /// What the kernel said.
        source: io::Error,
    },
}

/// Maps `memory_mib` of zeroed RAM, in the ranges of the address map. `address_bits` is the width of a
/// guest-physical address.
pub fn allocate(
    board: &Board,
    memory_mib: u64,
    address_bits: u8,
    backing: Backing,
) -> Result<Ram, MemoryError> {
    check_size(board, memory_mib, address_bits)?;
    let bytes = memory_mib << 20;
    let failed = |source| MemoryError::Map {
        asked_mib: memory_mib,
        source,
    };
    let file = match backing {
        Backing::Anonymous => None,
        Backing::Shared => Some(memfd(bytes).map_err(failed)?),
        Backing::Huge(page) => Some(huge_pages(bytes, page)?),
    };
    map(board, memory_mib, file)
}

/// Maps RAM that another process has in `file`, with what is in it. The file must be sealed: nobody can make it shorter,
/// which would take pages away from under the guest and from this process.
pub fn map_passed(
    board: &Board,
    memory_mib: u64,
    address_bits: u8,
    file: File,
) -> Result<Ram, MemoryError> {
    check_size(board, memory_mib, address_bits)?;
    let seals = rustix::fs::fcntl_get_seals(&file);
    let is_sealed = seals.is_ok_and(|seals| seals.contains(SealFlags::SHRINK));
    let size = file.metadata().map_or(0, |about| about.len());
    if !is_sealed || size != memory_mib << 20 {
        return Err(MemoryError::Passed { memory_mib });
    }
    map(board, memory_mib, Some(file))
}

/// The memfd that all of RAM is in, if it is in one.
pub fn file_of(ram: &Ram) -> Option<&File> {
    let region = ram.iter().next()?;
    region.file_offset().map(FileOffset::file)
}

fn map(board: &Board, memory_mib: u64, file: Option<File>) -> Result<Ram, MemoryError> {
    let failed = |source| MemoryError::Map {
        asked_mib: memory_mib,
        source,
    };
    let bytes = memory_mib << 20;
    let mut offset = 0;
    let mut ranges = Vec::new();
    for (base, size) in board.ram(bytes) {
        let part = match &file {
            None => None,
            Some(file) => Some(FileOffset::new(file.try_clone().map_err(failed)?, offset)),
        };
        let length = usize::try_from(size).expect("this program is for 64-bit hosts");
        ranges.push((GuestAddress(base), length, part));
        offset += size;
    }
    let ram = aligned(|| Ram::from_ranges_with_files(&ranges));
    ram.map_err(|error| failed(io::Error::other(error)))
}

fn check_size(board: &Board, memory_mib: u64, address_bits: u8) -> Result<(), MemoryError> {
    let host_mib = host_bytes() >> 20;
    if memory_mib > host_mib {
        return Err(MemoryError::MoreThanHost {
            asked_mib: memory_mib,
            host_mib,
        });
    }
    if board.ram_end(memory_mib << 20) > 1 << address_bits {
        return Err(MemoryError::MoreThanAddresses {
            asked_mib: memory_mib,
            address_bits,
        });
    }
    Ok(())
}

/// RAM whose huge pages on the host are huge pages of the guest, so that KVM maps one at once: the first page's two
/// addresses are equally far from one. The kernel sees to that itself from 6.7 on, for anonymous memory. Before, it maps
/// right below what was mapped last; with as much as the distance in between, the second attempt is in place.
fn aligned<E>(map: impl Fn() -> Result<Ram, E>) -> Result<Ram, E> {
    let ram = map()?;
    let region = ram.iter().next().expect("every board has RAM");
    let guest = usize::try_from(region.start_addr().0).expect("64-bit host");
    let distance = region.as_ptr().addr().wrapping_sub(guest) % HUGE_PAGE_BYTES;
    if distance == 0 {
        return Ok(ram);
    }
    drop(ram);
    let _between = MmapRegionBuilder::<()>::new(distance).build();
    map()
}

/// RAM and swap of the host.
fn host_bytes() -> u64 {
    let info = rustix::system::sysinfo();
    (info.totalram + info.totalswap) * u64::from(info.mem_unit)
}

fn memfd(bytes: u64) -> io::Result<File> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = File::from(memfd_create("guest-memory", flags)?);
    file.set_len(bytes)?;
    seal(&file)?;
    Ok(file)
}

/// Its size is what it is from now on.
fn seal(file: &File) -> io::Result<()> {
    let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
    Ok(rustix::fs::fcntl_add_seals(file, seals)?)
}

/// A file of huge pages that has all of them already: the mapping reserves nothing, and a page that is missing
/// when it is touched would end the process.
fn huge_pages(bytes: u64, page: HugePage) -> Result<File, MemoryError> {
    let (size, name) = match page {
        HugePage::Mib2 => (MemfdFlags::HUGE_2MB, "2 MiB"),
        HugePage::Gib1 => (MemfdFlags::HUGE_1GB, "1 GiB"),
    };
    let take = || {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | MemfdFlags::HUGETLB | size;
        let file = File::from(memfd_create("guest-memory", flags)?);
        file.set_len(bytes)?;
        // A signal ends it early; what it has taken it keeps.
        retry_on_intr(|| fallocate(&file, FallocateFlags::empty(), 0, bytes))?;
        seal(&file)?;
        Ok(file)
    };
    take().map_err(|source| MemoryError::HugePages {
        asked_mib: bytes >> 20,
        page: name,
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::board::MICRO;
    use vm_memory::Bytes;

    #[test]
    fn every_backing_gives_zeroed_ram() {
        for backing in [Backing::Anonymous, Backing::Shared] {
            let memory = allocate(&MICRO, 4, 40, backing).unwrap();
            assert_eq!(memory.num_regions(), 1);
            let mut word = [1; 8];
            memory
                .read_slice(&mut word, GuestAddress(0x3f_fff8))
                .unwrap();
            assert_eq!(word, [0; 8]);
            memory
                .write_slice(&word, GuestAddress(0x3f_fff9))
                .unwrap_err();
        }
    }

    /// Whatever this host has free, the answer is RAM or one clear line.
    #[test]
    fn huge_pages_are_there_at_once_or_not_at_all() {
        match allocate(&MICRO, 4, 40, Backing::Huge(HugePage::Mib2)) {
            Ok(memory) => {
                let mut word = [1; 8];
                memory
                    .read_slice(&mut word, GuestAddress(0x3f_fff8))
                    .unwrap();
                assert_eq!(word, [0; 8]);
            }
            Err(error) => {
                println!("ATOLL-SKIP: no huge pages are free: {error}");
                assert!(
                    error
                        .to_string()
                        .starts_with("take 4 MiB in 2 MiB huge pages: raise")
                );
            }
        }
    }

    #[test]
    fn impossible_sizes_are_refused_with_the_reason() {
        let refused = allocate(&MICRO, u64::MAX >> 24, 40, Backing::Anonymous).unwrap_err();
        assert!(refused.to_string().contains("the host has"), "{refused}");
        let refused = allocate(&MICRO, 64, 25, Backing::Anonymous).unwrap_err();
        assert_eq!(
            refused.to_string(),
            "64 MiB of memory asked for, this CPU addresses 25 bits"
        );
    }
}

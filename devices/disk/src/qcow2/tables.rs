// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Entries of an image's tables, for what is read beside imago (QEMU's `docs/interop/qcow2.rst`, "Cluster mapping").

use std::io;
use std::ops::Range;

use imago::StorageExt as _;

use super::storage::ImageStorage;

/// Where an entry of a first- or second-level table points to.
pub(super) const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// An entry of a second-level table stands for a compressed cluster.
pub(super) const COMPRESSED: u64 = 1 << 62;
/// Unit of a compressed cluster's size.
const SECTOR_BYTES: u64 = 512;

/// Where a compressed cluster is in the file.
pub(super) fn compressed_place(entry: u64, cluster_bits: u32) -> Range<u64> {
    // The size in sectors lies above the offset, in as many bits as clusters need.
    let size_shift = 62 - (cluster_bits - 8);
    let at = entry & ((1 << size_shift) - 1);
    let sectors = (entry & (COMPRESSED - 1)) >> size_shift;
    at..at - at % SECTOR_BYTES + (sectors + 1) * SECTOR_BYTES
}

/// Reads big-endian numbers.
pub(super) fn read_entries(
    file: &ImageStorage,
    offset: u64,
    entries: &mut [u64],
) -> io::Result<()> {
    let mut bytes = vec![0; entries.len() * 8];
    file.read(&mut bytes, offset)?;
    for (entry, bytes) in entries.iter_mut().zip(bytes.as_chunks::<8>().0) {
        *entry = u64::from_be_bytes(*bytes);
    }
    Ok(())
}

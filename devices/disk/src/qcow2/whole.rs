// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Whether an image's file goes as far as its tables: one that was cut off, as by a copy that failed, is refused when it
//! is opened. (What the header names is compared with the file's end where the header is read.)
//!
//! What lies behind the end of a file reads as zeroes, and a sound image may end within its last cluster. So what is
//! missing is not an error of any read; and of a cut within the last cluster nobody can tell.
//!
//! The guest's clusters are named by second-level tables, of which a large disk has many. Their reference counts are
//! shorter: only when the last one that is counted is not in the file, those tables are read.

use imago::{Storage as _, StorageExt as _};

use super::header::{Header, Qcow2Error};
use super::storage::ImageStorage;
use super::tables::{COMPRESSED, OFFSET_MASK, compressed_place, read_entries};

/// Entries that are read at a time.
const ENTRIES_MAX: usize = 64 << 10;

/// Refuses an image whose tables lead behind the end of its file. Reads the first-level table, the table of reference
/// counts and one block of counts; blocks on the file system.
pub(super) fn check(storage: &ImageStorage, header: &Header) -> Result<(), Qcow2Error> {
    let file_bytes = storage.size().map_err(Qcow2Error::Tables)?;
    let cluster_bytes = u64::from(header.cluster_bytes);
    let whole = |what, at: u64| match at.checked_add(cluster_bytes) {
        Some(end) if end <= file_bytes => Ok(()),
        end => Err(Qcow2Error::CutOff {
            what,
            end: end.unwrap_or(u64::MAX),
            file_bytes,
        }),
    };
    let mut second = Vec::new();
    each_entry(
        storage,
        header.l1.offset,
        header.l1.entries.into(),
        |entry| {
            let at = entry & OFFSET_MASK;
            if at != 0 {
                whole("an L2 table", at)?;
                second.push(at);
            }
            Ok(())
        },
    )?;
    if header.dirty {
        // Its counts are not to be relied on.
        return Ok(());
    }
    let (mut index, mut last) = (0, None);
    let entries = u64::from(header.refcount_clusters) * cluster_bytes / 8;
    each_entry(storage, header.refcount_offset, entries, |entry| {
        let at = entry & !0x1ff;
        if at != 0 {
            whole("a block of reference counts", at)?;
            last = Some((index, at));
        }
        index += 1;
        Ok(())
    })?;
    let counted = last.map(|(index, at)| last_counted(storage, header, index, at));
    let last = counted.transpose()?.flatten();
    if last.is_none_or(|cluster| cluster.saturating_mul(cluster_bytes) < file_bytes) {
        return Ok(());
    }
    // Only leaked, perhaps.
    second.sort_unstable();
    second.dedup();
    for at in second {
        if storage.is_hole(at, cluster_bytes) {
            continue;
        }
        each_entry(storage, at, cluster_bytes / 8, |entry| {
            let start = match entry & COMPRESSED {
                0 => entry & OFFSET_MASK,
                _ => compressed_place(entry, cluster_bytes.trailing_zeros()).start,
            };
            match start < file_bytes {
                true => Ok(()),
                false => whole("a cluster of the disk", start),
            }
        })?;
    }
    Ok(())
}

/// Number of the last cluster that the block of counts at `at`, the one of number `index`, counts as in use.
fn last_counted(
    storage: &ImageStorage,
    header: &Header,
    index: u64,
    at: u64,
) -> Result<Option<u64>, Qcow2Error> {
    let mut counts = vec![0; usize::try_from(header.cluster_bytes).expect("at most 2 MiB")];
    storage.read(&mut counts, at).map_err(Qcow2Error::Tables)?;
    let last = counts.iter().rposition(|byte| *byte != 0);
    // Counts of less than a byte begin with its lowest bit.
    let bit = last.map(|byte| byte as u64 * 8 + u64::from(counts[byte].ilog2()));
    let in_block = (u64::from(header.cluster_bytes) * 8) >> header.refcount_order;
    Ok(bit.map(|bit| index.saturating_mul(in_block) + (bit >> header.refcount_order)))
}

/// Gives each entry of a table to `take`, in order.
fn each_entry(
    storage: &ImageStorage,
    offset: u64,
    count: u64,
    mut take: impl FnMut(u64) -> Result<(), Qcow2Error>,
) -> Result<(), Qcow2Error> {
    let mut entries = Vec::new();
    let (mut at, mut left) = (offset, count);
    while left > 0 {
        let part = usize::try_from(left).map_or(ENTRIES_MAX, |left| left.min(ENTRIES_MAX));
        entries.resize(part, 0);
        read_entries(storage, at, &mut entries).map_err(Qcow2Error::Tables)?;
        entries.iter().try_for_each(|entry| take(*entry))?;
        at += part as u64 * 8;
        left -= part as u64;
    }
    Ok(())
}

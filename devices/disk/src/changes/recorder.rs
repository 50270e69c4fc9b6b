// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! What incremental backups ask: which blocks changed since the last backup that succeeded, over any number of runs.
//!
//! ```text
//! open ──► recording since checkpoint A ──begin──► copying; changes go into a new map
//!              ▲   ▲                                  │        │
//!              │   └── abort: what was taken is put back ◄──────┘
//!              └────── commit(B): recording since checkpoint B
//! ```
//!
//! A checkpoint is the moment of a backup, named by who made it. Without one (a new disk, a crash) everything counts
//! as changed. A copy that is neither committed nor aborted when the machine ends counts as aborted.

use std::fs::File;
use std::io;
use std::sync::Arc;

use super::Tracked;
use super::file::{ChangeFile, Content, ImageStamp, Medium};
use super::map::ChangeMap;
use super::set::BlockSet;

/// Name of a checkpoint, 16 bytes of its maker's choice, such as a UUID's. All zeroes is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CheckpointId(pub [u8; 16]);

impl CheckpointId {
    fn known(self) -> Option<Self> {
        (self != Self::default()).then_some(self)
    }
}

/// What a copy has to take, to be complete as of now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Changes {
    /// The checkpoint whose copy this one completes; `None`: it takes all blocks, and needs no other.
    pub since: Option<CheckpointId>,
    /// The blocks that were written since, or all; their size is the set's own.
    pub blocks: BlockSet,
}

/// What an opened file was good for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// Recording goes on.
    Since(CheckpointId),
    /// All blocks count as changed.
    Nothing {
        /// Why.
        reason: &'static str,
    },
}

/// A request that does not fit the recorder's state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RecorderError {
    /// One copy at a time.
    #[error("a copy of this disk's changes is under way: commit or abort it first")]
    Copying,
    /// Nothing to end.
    #[error("no copy of this disk's changes is under way")]
    NotCopying,
}

/// Records one disk's changes in a file. Belongs to the thread that owns the machine.
#[derive(Debug)]
pub struct Recorder<M: Medium = File> {
    file: ChangeFile<M>,
    map: Arc<ChangeMap>,
    since: CheckpointId,
    /// What a copy has taken that is not complete yet.
    taken: Option<BlockSet>,
}

impl<M: Medium> Recorder<M> {
    /// Starts to record in blocks of `block_bytes`, a power of two. Before the disk's first queue is opened.
    ///
    /// `stamp` is the image's, now. Blocks; the file says afterwards, durably, that it is in use.
    pub fn open(
        mut file: ChangeFile<M>,
        disk: &Tracked,
        stamp: ImageStamp,
        block_bytes: u32,
    ) -> io::Result<(Self, Found)> {
        let size_bytes = crate::BlockBackend::geometry(disk).size_bytes;
        let content = file.read(size_bytes, stamp)?;
        file.use_disk()?;
        let map = disk.watch(block_bytes);
        let (since, found) = match content {
            Content::Changes(since, blocks) => {
                map.put_back(&blocks);
                let found = since.known().map_or(
                    Found::Nothing {
                        reason: "no backup was complete yet",
                    },
                    Found::Since,
                );
                (since, found)
            }
            Content::Useless(reason) => (CheckpointId::default(), Found::Nothing { reason }),
        };
        let recorder = Self {
            file,
            map,
            since,
            taken: None,
        };
        Ok((recorder, found))
    }

    /// The checkpoint since which changes are recorded.
    pub fn since(&self) -> Option<CheckpointId> {
        self.since.known()
    }

    /// Takes the changes up to now, and begins to record anew. The caller holds the disk's queues: requests in
    /// flight would belong to both sides.
    pub fn begin(&mut self) -> Result<Changes, RecorderError> {
        if self.taken.is_some() {
            return Err(RecorderError::Copying);
        }
        let taken = self.map.take();
        let since = self.since();
        let blocks = match since {
            Some(_) => taken.clone(),
            None => BlockSet::all(taken.size_bytes(), taken.block_bytes()),
        };
        self.taken = Some(taken);
        Ok(Changes { since, blocks })
    }

    /// The copy is complete and safe: from now on changes are those since [`Recorder::begin`], which has that name.
    pub fn commit(&mut self, checkpoint: CheckpointId) -> Result<(), RecorderError> {
        self.taken.take().ok_or(RecorderError::NotCopying)?;
        self.since = checkpoint;
        Ok(())
    }

    /// The copy is of no use: what it took is still to be copied.
    pub fn abort(&mut self) -> Result<(), RecorderError> {
        let taken = self.taken.take().ok_or(RecorderError::NotCopying)?;
        self.map.put_back(&taken);
        Ok(())
    }

    /// Keeps the changes for the next run. After all queues of the disk are closed and the image is durable; `stamp`
    /// is the image's, then. Without this call, all blocks count as changed. Blocks.
    pub fn close(mut self, stamp: ImageStamp) -> io::Result<()> {
        if let Some(taken) = self.taken.take() {
            self.map.put_back(&taken);
        }
        self.file.close(self.since, &self.map.look(), stamp)
    }
}

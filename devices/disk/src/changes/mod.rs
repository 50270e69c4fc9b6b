// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Changed-block tracking: which blocks of a disk may have changed since some moment.
//!
//! ```text
//! guest's request ─► Tracked ─────────────► the disk
//!                       │ marks before the request starts and after it ended
//!                       ▼
//!                    ChangeMap  one for each who asked: a backup's (kept in a file by Recorder),
//!                       │       a mirror's, a migration's (kept in RAM)
//!                       ▼ take
//!                    BlockSet   what to copy
//! ```
//!
//! One promise rules all of it: **a block that changed is never called unchanged**. The other way round is allowed,
//! and happens: a write of the same bytes, a failed write, a crash.
//!
//! A request marks twice. Before it starts, since from then on the disk may have either content: who takes a map
//! while queues are held needs no more. After it ended, since who copies a *running* disk may have taken the map and
//! read the block while the request was under way: the second mark makes it read the block again.

mod file;
mod map;
mod recorder;
mod set;

#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::sync::{Arc, PoisonError, RwLock};

use crate::backend::{BlockBackend, BlockQueue, Completion, Full, Request, ResizeError};
use crate::layer::{Layer, QueueLayer};

pub use file::{ChangeFile, ImageStamp, Medium};
pub use map::ChangeMap;
pub use recorder::{Changes, CheckpointId, Found, Recorder, RecorderError};
pub use set::BlockSet;

/// A disk whose changes are recorded for whoever watches.
pub struct Tracked {
    inner: Arc<dyn BlockBackend>,
    watchers: Arc<Watchers>,
}

/// The maps of everyone who watches.
#[derive(Default)]
struct Watchers {
    /// Read by every request, written when somebody comes or goes. A leaf lock.
    maps: RwLock<Vec<Arc<ChangeMap>>>,
}

impl Watchers {
    /// Marks a range; `false` when nobody watches.
    fn mark(&self, range: &Range<u64>) -> bool {
        let maps = self.maps.read().unwrap_or_else(PoisonError::into_inner);
        for map in &*maps {
            map.mark(range);
        }
        !maps.is_empty()
    }

    fn change<T>(&self, change: impl FnOnce(&mut Vec<Arc<ChangeMap>>) -> T) -> T {
        change(&mut self.maps.write().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Tracked {
    /// Decorates a disk; nobody watches yet.
    pub fn new(inner: Arc<dyn BlockBackend>) -> Self {
        Self {
            inner,
            watchers: Arc::default(),
        }
    }

    /// An empty map that is marked from now on, in blocks of `block_bytes`, a power of two.
    ///
    /// The caller holds the disk's queues: a request that is in flight now is not recorded when it ends.
    pub fn watch(&self, block_bytes: u32) -> Arc<ChangeMap> {
        let size_bytes = self.inner.geometry().size_bytes;
        let map = Arc::new(ChangeMap::new(size_bytes, block_bytes));
        self.watchers.change(|maps| maps.push(map.clone()));
        map
    }

    /// Marks it no more. Requests in flight may mark it until they end; the caller drops it afterwards. An unknown map is
    /// no error.
    pub fn unwatch(&self, map: &Arc<ChangeMap>) {
        self.watchers
            .change(|maps| maps.retain(|watching| !Arc::ptr_eq(watching, map)));
    }
}

impl Layer for Tracked {
    fn below(&self) -> &dyn BlockBackend {
        &*self.inner
    }

    /// What a disk grows by has changed: whoever has a copy has nothing there.
    fn resize(&self, size_bytes: u64) -> Result<(), ResizeError> {
        self.inner.resize(size_bytes)?;
        // All of it is marked now, also what a guest wrote there before it was told.
        self.watchers.change(|maps| {
            for map in maps {
                map.grow(size_bytes);
            }
        });
        Ok(())
    }

    fn over(&self, inner: Box<dyn BlockQueue>, depth: u16) -> io::Result<Box<dyn BlockQueue>> {
        Ok(Box::new(TrackedQueue {
            inner,
            changing: Changing {
                watchers: self.watchers.clone(),
                ranges: HashMap::with_capacity(depth.into()),
            },
        }))
    }
}

/// Fields are dropped in their order: the queue waits for what is in flight, then that is marked.
struct TrackedQueue {
    inner: Box<dyn BlockQueue>,
    changing: Changing,
}

/// The requests in flight that change something.
struct Changing {
    watchers: Arc<Watchers>,
    /// Their ranges, by token. As many as the queue is deep.
    ranges: HashMap<u64, Range<u64>>,
}

impl Drop for Changing {
    fn drop(&mut self) {
        // Requests whose completion nobody has taken, as when an engine fails, have ended too.
        for range in self.ranges.values() {
            self.watchers.mark(range);
        }
    }
}

impl QueueLayer for TrackedQueue {
    fn below(&self) -> &dyn BlockQueue {
        &*self.inner
    }

    fn below_mut(&mut self) -> &mut dyn BlockQueue {
        &mut *self.inner
    }

    fn submit(&mut self, request: Request) -> Result<(), Full> {
        let Some(range) = request.changed_range() else {
            return self.inner.submit(request);
        };
        let watched = self.changing.watchers.mark(&range);
        let token = request.token;
        self.inner.submit(request)?;
        if watched {
            self.changing.ranges.insert(token, range);
        }
        Ok(())
    }

    fn complete(&mut self, done: &mut Vec<Completion>) -> io::Result<()> {
        let first_new = done.len();
        self.inner.complete(done)?;
        for completion in &done[first_new..] {
            // Also after an error: some of it may have been written.
            if let Some(range) = self.changing.ranges.remove(&completion.token) {
                self.changing.watchers.mark(&range);
            }
        }
        Ok(())
    }
}

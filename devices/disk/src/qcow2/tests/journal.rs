// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! What reaches the file of an image, in order: to be cut off anywhere, as a kill does.

use std::cell::RefCell;
use std::sync::{Arc, Mutex};

use imago::io_buffers::IoVector;

/// Something that reached the file.
#[derive(Debug, Clone)]
pub(in super::super) enum Event {
    Write { offset: u64, bytes: Vec<u8> },
    Zeroes { offset: u64, length: u64 },
    Sync,
}

/// Records, if somebody asked for it ([`record`]).
#[derive(Debug, Clone, Default)]
pub(in super::super) struct Journal(Option<Arc<Mutex<Vec<Event>>>>);

thread_local! {
    static CURRENT: RefCell<Journal> = RefCell::default();
}

impl Journal {
    /// That of the thread that opens an image.
    pub(in super::super) fn current() -> Self {
        CURRENT.with_borrow(Clone::clone)
    }

    pub(in super::super) fn write(&self, vector: &IoVector<'_>, offset: u64) {
        if self.0.is_some() {
            let mut bytes = vec![0; usize::try_from(vector.len()).unwrap()];
            vector.copy_into_slice(&mut bytes);
            self.push(Event::Write { offset, bytes });
        }
    }

    pub(in super::super) fn zeroes(&self, offset: u64, length: u64) {
        self.push(Event::Zeroes { offset, length });
    }

    pub(in super::super) fn sync(&self) {
        self.push(Event::Sync);
    }

    fn push(&self, event: Event) {
        if let Some(events) = &self.0 {
            events.lock().unwrap().push(event);
        }
    }

    /// How much has reached the file.
    pub(super) fn len(&self) -> usize {
        self.0
            .as_ref()
            .map_or(0, |events| events.lock().unwrap().len())
    }

    pub(super) fn take(&self) -> Vec<Event> {
        self.0.as_ref().map_or_else(Vec::new, |events| {
            std::mem::take(&mut events.lock().unwrap())
        })
    }
}

/// Everything that images opened by `open` write is recorded.
pub(super) fn record<T>(open: impl FnOnce() -> T) -> (Journal, T) {
    let journal = Journal(Some(Arc::default()));
    CURRENT.set(journal.clone());
    let opened = open();
    CURRENT.set(Journal::default());
    (journal, opened)
}

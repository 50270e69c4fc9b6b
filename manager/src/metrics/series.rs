// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! What is recorded of what, and the part of it that is still in memory.

use std::io;
use std::path::Path;

use super::ring::{self, RINGS, Slot};
use crate::id::GuestId;

/// How many finished rows of a series wait in memory at most; more are dropped, oldest first. Our choice: twelve hours
/// of minutes, for a disk that is full.
const WAITING_MAX: usize = 720;

/// Something that values are recorded of.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Series {
    /// A node, by name.
    Node(String),
    /// A guest.
    Guest(GuestId),
    /// A storage on a node: (node, storage).
    Storage(String, String),
}

/// A value of a series: its name as in PVE's `rrddata`, and how it is given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Column {
    /// Name.
    pub name: &'static str,
    /// It is given as an ever growing count, and kept as the rate a second.
    pub counter: bool,
}

const fn gauge(name: &'static str) -> Column {
    Column {
        name,
        counter: false,
    }
}

const fn counter(name: &'static str) -> Column {
    Column {
        name,
        counter: true,
    }
}

/// Of a node: CPU as a fraction of all, sizes in bytes.
pub const NODE_COLUMNS: &[Column] = &[
    gauge("cpu"),
    gauge("iowait"),
    gauge("loadavg"),
    gauge("maxcpu"),
    gauge("memtotal"),
    gauge("memused"),
    counter("netin"),
    counter("netout"),
    gauge("roottotal"),
    gauge("rootused"),
    gauge("swaptotal"),
    gauge("swapused"),
];

/// Of a guest: CPU as a fraction of what it may use, sizes in bytes.
pub const GUEST_COLUMNS: &[Column] = &[
    gauge("cpu"),
    gauge("disk"),
    counter("diskread"),
    counter("diskwrite"),
    gauge("maxcpu"),
    gauge("maxdisk"),
    gauge("maxmem"),
    gauge("mem"),
    counter("netin"),
    counter("netout"),
];

/// Of a storage: bytes.
pub const STORAGE_COLUMNS: &[Column] = &[gauge("total"), gauge("used")];

impl Series {
    /// The values that are recorded of it, in their order.
    pub fn columns(&self) -> &'static [Column] {
        match self {
            Self::Node(_) => NODE_COLUMNS,
            Self::Guest(_) => GUEST_COLUMNS,
            Self::Storage(..) => STORAGE_COLUMNS,
        }
    }

    /// Nodes are named by host labels, storages by words: neither can leave the directory.
    pub(super) fn file_name(&self) -> String {
        match self {
            Self::Node(name) => format!("node-{name}"),
            Self::Guest(id) => format!("guest-{id}"),
            Self::Storage(node, name) => format!("storage-{node}-{name}"),
        }
    }
}

/// What is in memory of a series.
#[derive(Debug, Clone, Default)]
pub(super) struct Live {
    /// The last reading of each column, for rates: (time, count).
    last: Vec<Option<(u64, f64)>>,
    /// The slot of each ring that is being filled.
    pub(super) filling: Vec<Option<Slot>>,
    /// Full slots that are not in the file yet: (ring, slot).
    pub(super) waiting: Vec<(usize, Slot)>,
}

impl Live {
    /// Takes up the slots that a former daemon was filling. A file that cannot be read is as good as none: it is
    /// written anew by the next flush.
    pub(super) fn resume(series: &Series, path: &Path, time: u64) -> Self {
        let columns = series.columns().len();
        let filling = ring::read_filling(path, columns, time);
        Self {
            last: vec![None; columns],
            filling: filling.unwrap_or_else(|_| vec![None; RINGS.len()]),
            waiting: Vec::new(),
        }
    }

    pub(super) fn record(&mut self, columns: &[Column], time: u64, values: &[Option<f64>]) {
        let mut sample = Vec::with_capacity(columns.len());
        for (index, column) in columns.iter().enumerate() {
            let value = values.get(index).copied().flatten();
            sample.push(match value {
                Some(count) if column.counter => self.rate(index, time, count),
                other => other,
            });
        }
        for (index, ring) in RINGS.iter().enumerate() {
            let start = time - time % ring.step_s;
            match &mut self.filling[index] {
                Some(slot) if slot.time == start => slot.add(&sample),
                filling => {
                    let full = filling.replace(Slot::new(start, &sample));
                    self.waiting.extend(full.map(|slot| (index, slot)));
                }
            }
        }
        let excess = self.waiting.len().saturating_sub(WAITING_MAX);
        drop(self.waiting.drain(..excess));
    }

    pub(super) fn flush(&mut self, path: &Path, columns: usize) -> io::Result<()> {
        let filling = self.filling.iter().enumerate();
        let filling = filling.filter_map(|(index, slot)| Some((index, slot.clone()?)));
        let slots: Vec<(usize, Slot)> = self.waiting.iter().cloned().chain(filling).collect();
        ring::write(path, columns, &slots)?;
        self.waiting.clear();
        Ok(())
    }

    /// A count that went down was set back, as at a guest's restart: no rate until the next reading.
    fn rate(&mut self, index: usize, time: u64, count: f64) -> Option<f64> {
        let (before, former) = self.last[index].replace((time, count))?;
        if time <= before || count < former {
            return None;
        }
        let seconds = u32::try_from(time - before).ok()?;
        Some((count - former) / f64::from(seconds))
    }
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The files: four rings of rows, from fine and short to coarse and long, each row at a place that its time gives.
//!
//! ```text
//! "ATOLLRR1", number of columns (u64)                     16 bytes
//! ring 0: 1440 rows   time u64, samples u64, averages f32 × columns, maxima f32 × columns
//! ring 1: 1440 rows   ...                                 little-endian; no value is NaN
//! ```
//!
//! A row whose time is not the one that belongs at its place is old or was never written. Files are sparse: a guest
//! takes some 400 KiB after a year, and never more.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::series::Live;

const MAGIC: &[u8; 8] = b"ATOLLRR1";
const HEADER_BYTES: usize = 16;

/// One ring of a file.
pub(super) struct Ring {
    pub(super) step_s: u64,
    pub(super) rows: u64,
}

/// A day of minutes, 30 days of half hours, a year of quarter days, ten years of weeks: PVE's steps.
pub(super) const RINGS: [Ring; 4] = [
    Ring {
        step_s: 60,
        rows: 1440,
    },
    Ring {
        step_s: 1800,
        rows: 1440,
    },
    Ring {
        step_s: 21_600,
        rows: 1464,
    },
    Ring {
        step_s: 604_800,
        rows: 522,
    },
];

/// How far back a query looks, PVE's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Timeframe {
    /// 60 minutes.
    Hour,
    /// A day of minutes.
    Day,
    /// 7 days of half hours.
    Week,
    /// 30 days of half hours.
    Month,
    /// A year of quarter days.
    Year,
    /// Ten years of weeks.
    Decade,
}

impl Timeframe {
    /// PVE's words, for schemas.
    pub const WORDS: &[&str] = &["hour", "day", "week", "month", "year", "decade"];

    /// The timeframe of a word.
    pub fn from_word(word: &str) -> Option<Self> {
        const ALL: [Timeframe; 6] = [
            Timeframe::Hour,
            Timeframe::Day,
            Timeframe::Week,
            Timeframe::Month,
            Timeframe::Year,
            Timeframe::Decade,
        ];
        let index = Self::WORDS.iter().position(|known| *known == word)?;
        ALL.get(index).copied()
    }

    /// Its ring and how many rows of it.
    fn rows(self) -> (usize, u64) {
        match self {
            Self::Hour => (0, 60),
            Self::Day => (0, 1440),
            Self::Week => (1, 336),
            Self::Month => (1, 1440),
            Self::Year => (2, 1464),
            Self::Decade => (3, 522),
        }
    }
}

/// What a row says of the samples in its step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Consolidation {
    /// Their average.
    #[default]
    Average,
    /// Their maximum.
    Max,
}

/// A row of a query.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// When its step began, seconds since 1970.
    pub time: u64,
    /// A value for each column.
    pub values: Vec<Option<f64>>,
}

/// A row while it is filled, or on its way to the file.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Slot {
    pub(super) time: u64,
    samples: u64,
    average: Vec<Option<f64>>,
    max: Vec<Option<f64>>,
}

impl Slot {
    pub(super) fn new(time: u64, sample: &[Option<f64>]) -> Self {
        Self {
            time,
            samples: 1,
            average: sample.to_vec(),
            max: sample.to_vec(),
        }
    }

    pub(super) fn add(&mut self, sample: &[Option<f64>]) {
        self.samples += 1;
        // A step has at most some 600,000 samples (a week, one a second), far below 2^32.
        let samples = f64::from(u32::try_from(self.samples).unwrap_or(u32::MAX));
        for (average, value) in self.average.iter_mut().zip(sample) {
            *average = match (*average, value) {
                (Some(average), Some(value)) => Some(average + (value - average) / samples),
                (former, value) => former.or(*value),
            };
        }
        for (max, value) in self.max.iter_mut().zip(sample) {
            *max = match (*max, value) {
                (Some(max), Some(value)) => Some(max.max(*value)),
                (former, value) => former.or(*value),
            };
        }
    }

    fn row(&self, consolidation: Consolidation) -> Row {
        let values = match consolidation {
            Consolidation::Average => &self.average,
            Consolidation::Max => &self.max,
        };
        Row {
            time: self.time,
            values: values.clone(),
        }
    }

    fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(self.time.to_le_bytes());
        bytes.extend(self.samples.to_le_bytes());
        for value in self.average.iter().chain(&self.max) {
            bytes.extend(narrow(value.unwrap_or(f64::NAN)).to_le_bytes());
        }
        bytes
    }

    fn decode(bytes: &[u8], columns: usize) -> Self {
        let word = |at: usize| {
            let word = bytes[at..at + 8].try_into();
            u64::from_le_bytes(word.expect("the slice has 8 bytes"))
        };
        let value = |chunk: &[u8]| {
            let word = chunk.try_into().expect("the chunk has 4 bytes");
            let value = f64::from(f32::from_le_bytes(word));
            (!value.is_nan()).then_some(value)
        };
        let mut values = bytes[16..].chunks_exact(4).map(value);
        Self {
            time: word(0),
            samples: word(8),
            average: values.by_ref().take(columns).collect(),
            max: values.collect(),
        }
    }
}

/// Seven digits are enough for a chart, and halve the files.
#[expect(clippy::cast_possible_truncation, reason = "rounding is meant")]
fn narrow(value: f64) -> f32 {
    value as f32
}

/// Reads the rows of a timeframe, from the file and from memory.
pub(super) fn query(
    path: &Path,
    columns: usize,
    live: Option<&Live>,
    timeframe: Timeframe,
    consolidation: Consolidation,
    now: u64,
) -> io::Result<Vec<Row>> {
    let (index, count) = timeframe.rows();
    let step = RINGS[index].step_s;
    let last = now - now % step;
    let first = last.saturating_sub((count - 1) * step);
    let mut rows: Vec<Row> = (0..count)
        .map(|number| Row {
            time: first + number * step,
            values: vec![None; columns],
        })
        .collect();
    let mut place = |slot: &Slot| {
        if let Some(offset) = slot.time.checked_sub(first)
            && let Some(row) = usize::try_from(offset / step)
                .ok()
                .and_then(|at| rows.get_mut(at))
            && row.time == slot.time
        {
            *row = slot.row(consolidation);
        }
    };
    for slot in read_ring(path, columns, index)? {
        place(&slot);
    }
    if let Some(live) = live {
        let waiting = live.waiting.iter().filter(|(ring, _)| *ring == index);
        waiting.for_each(|(_, slot)| place(slot));
        live.filling[index].iter().for_each(place);
    }
    Ok(rows)
}

/// The slots that a former daemon was filling at `time`.
pub(super) fn read_filling(
    path: &Path,
    columns: usize,
    time: u64,
) -> io::Result<Vec<Option<Slot>>> {
    let Some(file) = open(path, columns)? else {
        return Ok(vec![None; RINGS.len()]);
    };
    let mut filling = Vec::new();
    for (index, ring) in RINGS.iter().enumerate() {
        let start = time - time % ring.step_s;
        let mut bytes = vec![0; row_bytes(columns)];
        let found = read_at(&file, &mut bytes, place(index, start, columns))?;
        let slot = Slot::decode(&bytes, columns);
        filling.push((found && slot.time == start && slot.samples > 0).then_some(slot));
    }
    Ok(filling)
}

/// Writes slots to their places; makes the file if there is none or it is not one of ours.
pub(super) fn write(path: &Path, columns: usize, slots: &[(usize, Slot)]) -> io::Result<()> {
    let file = match open(path, columns) {
        Ok(Some(_)) => File::options().write(true).open(path)?,
        Ok(None) | Err(_) => {
            let file = File::create(path)?;
            let mut header = MAGIC.to_vec();
            header.extend(u64::try_from(columns).unwrap_or(0).to_le_bytes());
            file.write_all_at(&header, 0)?;
            file
        }
    };
    for (index, slot) in slots {
        file.write_all_at(&slot.encode(), place(*index, slot.time, columns))?;
    }
    Ok(())
}

fn read_ring(path: &Path, columns: usize, index: usize) -> io::Result<Vec<Slot>> {
    let Some(file) = open(path, columns)? else {
        return Ok(Vec::new());
    };
    let rows = usize::try_from(RINGS[index].rows).unwrap_or(0);
    let mut bytes = vec![0; rows * row_bytes(columns)];
    let mut filled = 0;
    let start = place(index, 0, columns);
    while filled < bytes.len() {
        let offset = start + u64::try_from(filled).unwrap_or(0);
        match file.read_at(&mut bytes[filled..], offset)? {
            0 => break,
            count => filled += count,
        }
    }
    let rows = bytes.chunks_exact(row_bytes(columns));
    let slots = rows.map(|row| Slot::decode(row, columns));
    Ok(slots.filter(|slot| slot.samples > 0).collect())
}

/// Opens a file and checks that it is one of these, with as many columns.
fn open(path: &Path, columns: usize) -> io::Result<Option<File>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut header = [0; HEADER_BYTES];
    let complete = read_at(&file, &mut header, 0)?;
    let count = u64::try_from(columns).unwrap_or(0);
    if !complete || header[..8] != *MAGIC || header[8..] != count.to_le_bytes() {
        return Err(io::Error::new(
            ErrorKind::InvalidData,
            "not a time series of these columns",
        ));
    }
    Ok(Some(file))
}

/// Whether all bytes were there.
fn read_at(file: &File, bytes: &mut [u8], offset: u64) -> io::Result<bool> {
    match file.read_exact_at(bytes, offset) {
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => Ok(false),
        other => other.map(|()| true),
    }
}

fn row_bytes(columns: usize) -> usize {
    16 + 8 * columns
}

/// Where the row of a time is.
fn place(index: usize, time: u64, columns: usize) -> u64 {
    let before: u64 = RINGS[..index].iter().map(|ring| ring.rows).sum();
    let ring = &RINGS[index];
    let row = before + (time / ring.step_s) % ring.rows;
    let bytes = u64::try_from(row_bytes(columns)).unwrap_or(0);
    u64::try_from(HEADER_BYTES).unwrap_or(0) + row * bytes
}

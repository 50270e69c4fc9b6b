// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Time series of nodes, guests and storages: some numbers a minute, kept for a decade in files of fixed size.
//!
//! ```text
//! record ──► accumulators (RAM) ──flush──► rings (a file a series)
//!                    └───────── query ◄─────────┘
//! ```
//!
//! Nothing is written when a value is recorded: rows wait in memory until [`Metrics::flush`], so that an idle node does
//! not wear its disk. A daemon that is killed loses what came after the last flush. Who samples, and when, is not
//! decided here.

mod ring;
mod series;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

pub use ring::{Consolidation, Row, Timeframe};
pub use series::{Column, GUEST_COLUMNS, NODE_COLUMNS, STORAGE_COLUMNS, Series};

use crate::error::Error;
use crate::id::GuestId;
use series::Live;

/// The time series of a node; cheap to clone.
#[derive(Debug, Clone)]
pub struct Metrics {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    directory: PathBuf,
    /// What is in memory of each series. Innermost lock; files are read and written under it by threads that may
    /// block, one series at a time.
    live: Mutex<HashMap<Series, Live>>,
}

impl Metrics {
    /// The series below `directory`, which is made if missing.
    pub fn open(directory: &Path) -> Result<Self, Error> {
        std::fs::create_dir_all(directory)
            .map_err(|e| Error::failed(format!("create {}", directory.display()), e))?;
        Ok(Self {
            shared: Arc::new(Shared {
                directory: directory.to_owned(),
                live: Mutex::new(HashMap::new()),
            }),
        })
    }

    /// Adds a sample taken at `time` (seconds since 1970): a value for each of the series' columns, `None` where
    /// there is none. Counters are given as they are read, ever growing; the series holds their rates. The first sample
    /// of a series reads the end of its file.
    pub fn record(&self, series: &Series, time: u64, values: &[Option<f64>]) {
        let mut live = self.live();
        let entry = live.entry(series.clone());
        let known = entry.or_insert_with(|| Live::resume(series, &self.file(series), time));
        known.record(series.columns(), time, values);
    }

    /// The rows of a timeframe that ends at `now`, one each step; values that nobody recorded are `None`.
    pub async fn query(
        &self,
        series: &Series,
        timeframe: Timeframe,
        consolidation: Consolidation,
        now: u64,
    ) -> Result<Vec<Row>, Error> {
        let (metrics, series) = (self.clone(), series.clone());
        blocking(move || {
            let live = metrics.live();
            let unwritten = live.get(&series);
            let path = metrics.file(&series);
            let columns = series.columns().len();
            ring::query(&path, columns, unwritten, timeframe, consolidation, now)
                .map_err(|e| Error::failed(format!("read {}", path.display()), e))
        })
        .await
    }

    /// Writes what is in memory to the files. Call it every ten minutes or so, and before the daemon ends.
    pub async fn flush(&self) -> Result<(), Error> {
        let metrics = self.clone();
        blocking(move || {
            let series: Vec<Series> = metrics.live().keys().cloned().collect();
            for series in series {
                let path = metrics.file(&series);
                // The lock is taken for each series, so that samples are not held up for long.
                let mut live = metrics.live();
                let Some(known) = live.get_mut(&series) else {
                    continue;
                };
                known
                    .flush(&path, series.columns().len())
                    .map_err(|e| Error::failed(format!("write {}", path.display()), e))?;
            }
            Ok(())
        })
        .await
    }

    /// Forgets a series: its guest is gone.
    pub fn remove(&self, series: &Series) {
        self.live().remove(series);
        // A series that was never flushed has no file.
        drop(std::fs::remove_file(self.file(series)));
    }

    /// Forgets the series of guests that are gone.
    pub fn retain_guests(&self, keep: impl Fn(GuestId) -> bool) {
        let Ok(entries) = std::fs::read_dir(&self.shared.directory) else {
            return;
        };
        for entry in entries.flatten() {
            let name = entry.file_name();
            let number = name.to_str().and_then(|name| name.strip_prefix("guest-"));
            if let Some(Ok(id)) = number.map(str::parse)
                && !keep(id)
            {
                self.remove(&Series::Guest(id));
            }
        }
        let is_kept = |series: &Series| !matches!(series, Series::Guest(id) if !keep(*id));
        self.live().retain(|series, _| is_kept(series));
    }

    fn file(&self, series: &Series) -> PathBuf {
        self.shared.directory.join(series.file_name())
    }

    fn live(&self) -> MutexGuard<'_, HashMap<Series, Live>> {
        self.shared.live.lock().unwrap_or_else(|e| e.into_inner())
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|e| Error::failed("metrics", e))?
}

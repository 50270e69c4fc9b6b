// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The sampler: looks at the host, its running guests and its storages, and records what it sees as time series.
//!
//! It also keeps what listings know about running guests fresh. Guests that do not run are not recorded: their lines
//! have gaps, and thousands of stopped guests cost nothing.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use crate::cluster::Cluster;
use crate::guest::{Guests, Status};
use crate::host::{HostMeter, HostStatus};
use crate::metrics::{Metrics, Series};
use crate::storage::Storages;

/// Between two looks at guests. Shorter than what listings take for fresh.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// Between two samples of guests and the host. PVE's time.
const SAMPLE_EVERY: Duration = Duration::from_secs(10);
/// Between two samples of storages, which may have to ask a server.
const STORAGE_EVERY: Duration = Duration::from_secs(60);
/// Between two writes of the series: what a killed daemon loses at most.
const FLUSH_EVERY: Duration = Duration::from_secs(600);

/// What is sampled, and where it goes.
#[derive(Debug)]
pub struct Sampler {
    node: String,
    guests: Guests,
    storage: Storages,
    cluster: Cluster,
    metrics: Metrics,
    host: HostMeter,
}

impl Sampler {
    /// A sampler of a node's guests and storages.
    pub fn new(
        node: &str,
        guests: Guests,
        storage: Storages,
        cluster: Cluster,
        metrics: Metrics,
    ) -> Self {
        Self {
            node: node.to_owned(),
            guests,
            storage,
            cluster,
            metrics,
            host: HostMeter::default(),
        }
    }

    /// Samples until it is told to stop; writes what is in memory then.
    pub async fn run(self, stop: CancellationToken) {
        let mut tick = interval(LOOK_EVERY);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut due = Due::default();
        loop {
            tokio::select! {
                _ = tick.tick() => {}
                () = stop.cancelled() => break,
            }
            self.tick(&mut due).await;
        }
        self.flush().await;
    }

    async fn tick(&self, due: &mut Due) {
        let guests = match self.guests.list().await {
            Ok(guests) => guests,
            Err(error) => {
                return tracing::warn!(error = error.chain(), "cannot look at the guests");
            }
        };
        let time = unix_time();
        if is_due(&mut due.sample, SAMPLE_EVERY) {
            for guest in guests.iter().filter(|guest| guest.running) {
                self.metrics
                    .record(&Series::Guest(guest.id), time, &of_guest(guest));
            }
            match self.host.read() {
                Ok(host) => {
                    let series = Series::Node(self.node.clone());
                    self.metrics.record(&series, time, &of_host(&host));
                }
                Err(error) => tracing::warn!(error = error.chain(), "cannot look at the host"),
            }
        }
        if is_due(&mut due.storage, STORAGE_EVERY) {
            self.sample_storages(time).await;
        }
        if is_due(&mut due.flush, FLUSH_EVERY) {
            self.flush().await;
        }
    }

    async fn sample_storages(&self, time: u64) {
        let Ok(storages) = self.storage.status().await else {
            return;
        };
        for status in storages {
            let Some(space) = status.space else { continue };
            let series = Series::Storage(self.node.clone(), status.section.name.to_string());
            let values = [float(space.total_bytes), float(space.used_bytes)];
            self.metrics.record(&series, time, &values);
        }
    }

    /// Writes the series, and forgets those of guests that are gone.
    async fn flush(&self) {
        if let Ok(inventory) = self.cluster.guests() {
            self.metrics
                .retain_guests(|id| inventory.find(id).is_some());
        }
        if let Err(error) = self.metrics.flush().await {
            tracing::warn!(error = error.chain(), "cannot write the time series");
        }
    }
}

/// When what was done last.
#[derive(Debug, Default)]
struct Due {
    sample: Option<Instant>,
    storage: Option<Instant>,
    flush: Option<Instant>,
}

/// Whether it is time again; notes that it is done now.
fn is_due(last: &mut Option<Instant>, every: Duration) -> bool {
    let due = last.is_none_or(|at| at.elapsed() >= every);
    if due {
        *last = Some(Instant::now());
    }
    due
}

/// In the order of [`GUEST_COLUMNS`](crate::metrics::GUEST_COLUMNS).
fn of_guest(guest: &Status) -> [Option<f64>; 10] {
    let load = &guest.load;
    [
        Some(guest.cpu),
        float(load.disk_bytes),
        float(load.read_bytes),
        float(load.written_bytes),
        Some(guest.cpus),
        float(guest.disk_bytes_max),
        float(guest.memory_bytes_max),
        float(load.memory_bytes),
        float(load.received_bytes),
        float(load.sent_bytes),
    ]
}

/// In the order of [`NODE_COLUMNS`](crate::metrics::NODE_COLUMNS).
fn of_host(host: &HostStatus) -> [Option<f64>; 12] {
    let (received, sent) = host.network_bytes;
    [
        Some(host.cpu),
        Some(host.iowait),
        host.load[0].parse().ok(),
        u64::try_from(host.cpus).ok().and_then(float),
        float(host.memory.total),
        float(host.memory.used()),
        float(received),
        float(sent),
        float(host.root.total),
        float(host.root.used()),
        float(host.swap.total),
        float(host.swap.used()),
    ]
}

#[expect(clippy::cast_precision_loss, reason = "a chart shows three digits")]
#[expect(clippy::unnecessary_wraps, reason = "the samples are optional values")]
fn float(number: u64) -> Option<f64> {
    Some(number as f64)
}

fn unix_time() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

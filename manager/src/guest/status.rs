// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! What listings say about a guest: its config's main figures, and its load now.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::cluster::GuestSummary;
use crate::error::Error;
use crate::guest::site::{Seat, Site};
use crate::guest::{Load, Phase, guest};
use crate::id::{GuestId, GuestKind};

/// Shortest time over which CPU load is measured; asked sooner again, the last figure stands.
const CPU_WINDOW: Duration = Duration::from_secs(1);

/// How long what was found about running guests stands. The sampler looks more often than that, so that listings
/// hardly ever have to.
pub const FRESH: Duration = Duration::from_secs(3);

/// One guest of a listing. Units are bytes and seconds; CPU is a fraction of all its CPUs.
#[derive(Debug, Clone, PartialEq)]
pub struct Status {
    /// VM or container.
    pub kind: GuestKind,
    /// Its number.
    pub id: GuestId,
    /// Name or host name.
    pub name: String,
    /// It runs, or is paused.
    pub running: bool,
    /// Why it is locked, if it is.
    pub lock: Option<String>,
    /// It is a template.
    pub template: bool,
    /// Its tags, joined as in the config.
    pub tags: Option<String>,
    /// Process of the machine, or of the container's init.
    pub pid: Option<u32>,
    /// Time since its start.
    pub uptime_s: u64,
    /// CPU load, 0 to 1.
    pub cpu: f64,
    /// CPUs that it may use.
    pub cpus: f64,
    /// Memory that it may use.
    pub memory_bytes_max: u64,
    /// Swap that it may use.
    pub swap_bytes_max: u64,
    /// Size of its first disk.
    pub disk_bytes_max: u64,
    /// Its load.
    pub load: Load,
}

/// Remembers CPU times, since a load is a difference.
#[derive(Debug, Default)]
pub struct CpuMeter {
    /// Innermost lock, held for a look-up.
    samples: Mutex<HashMap<u32, Sample>>,
}

#[derive(Debug, Clone, Copy)]
struct Sample {
    at: Instant,
    cpu_ns: u64,
    cpus: f64,
}

impl CpuMeter {
    /// CPUs that process `pid`'s guest has used on average since the last measurement.
    #[expect(
        clippy::cast_precision_loss,
        reason = "a load has two digits that matter"
    )]
    pub fn measure(&self, pid: u32, cpu_ns: u64, now: Instant) -> f64 {
        let mut samples = self.samples.lock().unwrap_or_else(|e| e.into_inner());
        let last = samples.get(&pid).copied();
        let cpus = match last {
            Some(last) if now.duration_since(last.at) < CPU_WINDOW => return last.cpus,
            Some(last) => {
                let elapsed = now.duration_since(last.at).as_nanos() as f64;
                cpu_ns.saturating_sub(last.cpu_ns) as f64 / elapsed
            }
            None => 0.0,
        };
        // A process that nobody asked about for long has ended, or is not worth the memory.
        samples.retain(|_, sample| now.duration_since(sample.at) < CPU_WINDOW * 120);
        samples.insert(
            pid,
            Sample {
                at: now,
                cpu_ns,
                cpus,
            },
        );
        cpus
    }
}

/// A guest that runs.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Running {
    pid: u32,
    uptime_s: u64,
    cpus_used: f64,
    load: Load,
}

/// The guests that run.
pub type RunningGuests = HashMap<(GuestKind, GuestId), Running>;

/// The guests that run, as they were found a moment ago: so that many listings cost one look.
#[derive(Debug, Default)]
pub struct RunningCache {
    /// Held while somebody looks, so that the others wait for what he finds.
    last: tokio::sync::Mutex<Option<Found>>,
}

#[derive(Debug)]
struct Found {
    at: Instant,
    tasks_ended: u64,
    guests: Arc<RunningGuests>,
}

impl RunningCache {
    /// The guests that run, as found less than [`FRESH`] ago and after the last task that ended.
    pub async fn get(
        &self,
        site: &Arc<Site>,
        meter: &CpuMeter,
        tasks_ended: u64,
    ) -> Arc<RunningGuests> {
        let mut last = self.last.lock().await;
        if let Some(found) = last.as_ref()
            && found.at.elapsed() < FRESH
            && found.tasks_ended == tasks_ended
        {
            return Arc::clone(&found.guests);
        }
        let mut guests = RunningGuests::new();
        for (kind, id) in site.run_folders() {
            if let Some(running) = look(&site.seat(kind, id), meter).await {
                guests.insert((kind, id), running);
            }
        }
        let guests = Arc::new(guests);
        *last = Some(Found {
            at: Instant::now(),
            tasks_ended,
            guests: Arc::clone(&guests),
        });
        guests
    }
}

/// The guest on a seat, with its load.
pub async fn read(seat: &Seat, meter: &CpuMeter) -> Result<Status, Error> {
    let stored = seat.stored()?;
    let summary = GuestSummary::new(&stored.config, &stored.node, seat.id, stored.revision);
    let running = look(seat, meter).await;
    Ok(Status::new(&summary, running.as_ref()))
}

async fn look(seat: &Seat, meter: &CpuMeter) -> Option<Running> {
    let guest = guest(seat);
    let Phase::Running { pid } = guest.phase() else {
        return None;
    };
    let load = guest.load().await;
    Some(Running {
        pid,
        uptime_s: crate::process::age_seconds(pid),
        cpus_used: meter.measure(pid, load.cpu_ns, Instant::now()),
        load,
    })
}

impl Status {
    /// What a config says, and what was found running.
    pub fn new(summary: &GuestSummary, running: Option<&Running>) -> Self {
        let mut load = running.map_or_else(Load::default, |running| running.load);
        load.memory_bytes = load.memory_bytes.min(summary.memory_bytes);
        let cpus_used = running.map_or(0.0, |running| running.cpus_used);
        Self {
            kind: summary.kind,
            id: summary.id,
            name: summary.name.clone(),
            running: running.is_some(),
            lock: summary.lock.clone(),
            template: summary.template,
            tags: summary.tags.clone(),
            pid: running.map(|running| running.pid),
            uptime_s: running.map_or(0, |running| running.uptime_s),
            cpu: (cpus_used / summary.cpus).clamp(0.0, 1.0),
            cpus: summary.cpus,
            memory_bytes_max: summary.memory_bytes,
            swap_bytes_max: summary.swap_bytes,
            disk_bytes_max: summary.disk_bytes,
            load,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn load_is_a_difference() {
        let (meter, start) = (CpuMeter::default(), Instant::now());
        let after = |ms: u64| start + Duration::from_millis(ms);
        assert_eq!(meter.measure(1, 5_000, start), 0.0);
        assert_eq!(meter.measure(1, 9_000, after(500)), 0.0, "too soon");
        assert_eq!(meter.measure(1, 1_000_005_000, after(2000)), 0.5);
        assert_eq!(meter.measure(1, 0, after(2500)), 0.5);
        assert_eq!(meter.measure(2, 7, after(500_000)), 0.0);
        assert_eq!(
            meter.samples.lock().unwrap().len(),
            1,
            "old ones are forgotten"
        );
    }
}

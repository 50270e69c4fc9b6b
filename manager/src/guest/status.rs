// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! What listings say about a guest: its config's main figures, and its load now.

use std::collections::HashMap;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::error::Error;
use crate::guest::config::GuestConfig;
use crate::guest::container::bundle;
use crate::guest::site::Seat;
use crate::guest::vm::resolve;
use crate::guest::{Load, Phase, disks, guest};
use crate::id::{GuestId, GuestKind};

/// Shortest time over which CPU load is measured; asked sooner again, the last figure stands.
const CPU_WINDOW: Duration = Duration::from_secs(1);

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

/// The guest on a seat, with its load.
pub async fn read(seat: &Seat, meter: &CpuMeter) -> Result<Status, Error> {
    let config = seat.config()?;
    let guest = guest(seat);
    let mut status = of_config(seat, &config);
    if let Phase::Running { pid } = guest.phase() {
        status.running = true;
        status.pid = Some(pid);
        status.uptime_s = crate::process::age_seconds(pid);
        status.load = guest.load().await;
        status.load.memory_bytes = status.load.memory_bytes.min(status.memory_bytes_max);
        let used = meter.measure(pid, status.load.cpu_ns, Instant::now());
        status.cpu = (used / status.cpus).clamp(0.0, 1.0);
    }
    Ok(status)
}

#[expect(clippy::cast_precision_loss, reason = "at most some thousand CPUs")]
fn of_config(seat: &Seat, config: &GuestConfig) -> Status {
    let text = |key: &str| config.get(key).map(str::to_owned);
    let (name, cpus, memory_mib, swap_mib, disk) = match seat.kind {
        GuestKind::Vm => (
            text("name").unwrap_or_else(|| format!("VM {}", seat.id)),
            resolve::cpu_count(config) as f64,
            resolve::memory_mib(config),
            0,
            resolve::disks(config)
                .ok()
                .and_then(|disks| Some(disks.first()?.key.clone())),
        ),
        GuestKind::Container => (
            text("hostname").unwrap_or_else(|| format!("CT{}", seat.id)),
            bundle::cpu_limit(config).unwrap_or_else(host_cpus),
            bundle::memory_mib(config),
            bundle::swap_mib(config),
            Some("rootfs".to_owned()),
        ),
    };
    let disk = disk.and_then(|key| text(&key));
    let size = disk
        .as_deref()
        .and_then(|value| value.split(',').find_map(|item| item.strip_prefix("size=")));
    Status {
        kind: seat.kind,
        id: seat.id,
        name,
        running: false,
        lock: text("lock"),
        template: config.is_set("template"),
        tags: text("tags"),
        pid: None,
        uptime_s: 0,
        cpu: 0.0,
        cpus,
        memory_bytes_max: memory_mib << 20,
        swap_bytes_max: swap_mib << 20,
        disk_bytes_max: size
            .and_then(|size| disks::resized(size, 0).ok())
            .unwrap_or(0),
        load: Load::default(),
    }
}

#[expect(clippy::cast_precision_loss, reason = "at most some thousand CPUs")]
fn host_cpus() -> f64 {
    std::thread::available_parallelism().map_or(1.0, |count| count.get() as f64)
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

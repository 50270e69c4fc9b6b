// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The host as it is now, from /proc: processors, memory, load, root file system. Nothing here is kept or changed.
//!
//! Called by the API for a node's status and by the sampler for its series. Reads files that the kernel makes in
//! memory and never waits for a device.

use std::fs;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::error::Error;

/// Shortest time over which processor load is measured; asked sooner again, the last figure stands.
const CPU_WINDOW: Duration = Duration::from_secs(1);

/// Size of /proc's memory figures: `kB` there means 1024 bytes. proc(5).
const KIB: u64 = 1024;

/// What can be said about a host.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct HostStatus {
    /// Fraction of all processors' time that was used, 0 to 1.
    pub cpu: f64,
    /// Fraction that waited for disks, 0 to 1.
    pub iowait: f64,
    /// Online processors.
    pub cpus: usize,
    /// Sockets that they are in.
    pub sockets: usize,
    /// Model of the first.
    pub cpu_model: String,
    /// Its clock in MHz.
    pub cpu_mhz: String,
    /// Its flags, such as `svm`.
    pub cpu_flags: String,
    /// Runnable tasks on average over 1, 5 and 15 minutes, as the kernel prints them.
    pub load: [String; 3],
    /// Memory, in bytes: all, available without swapping, free.
    pub memory: Memory,
    /// Swap, in bytes.
    pub swap: Memory,
    /// Root file system, in bytes.
    pub root: Memory,
    /// Seconds since boot.
    pub uptime_s: u64,
    /// The kernel, as uname(2) tells: name, release, version, machine.
    pub kernel: [String; 4],
    /// Received and sent by the host's own network cards since boot, in bytes.
    pub network_bytes: (u64, u64),
}

/// Space of some kind, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Memory {
    /// All of it.
    pub total: u64,
    /// What can be had.
    pub available: u64,
}

impl Memory {
    /// What is taken.
    pub fn used(&self) -> u64 {
        self.total.saturating_sub(self.available)
    }
}

/// Measures processor load, which is a difference. One a node.
#[derive(Debug, Default)]
pub struct HostMeter {
    /// The last measurement. Innermost lock, held for a read of /proc.
    last: Mutex<Option<Sample>>,
}

#[derive(Debug, Clone)]
struct Sample {
    at: Instant,
    ticks: Ticks,
    status: Arc<HostStatus>,
}

/// Processor time in clock ticks since boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Ticks {
    total: u64,
    idle: u64,
    iowait: u64,
}

impl HostMeter {
    /// The host now. Asked again within [`CPU_WINDOW`], the last figures stand.
    pub fn read(&self) -> Result<Arc<HostStatus>, Error> {
        let mut last = self.last.lock().unwrap_or_else(|e| e.into_inner());
        let now = Instant::now();
        // Before the first difference there is the average since boot.
        let before = match last.as_ref() {
            Some(sample) if now.duration_since(sample.at) < CPU_WINDOW => {
                return Ok(Arc::clone(&sample.status));
            }
            Some(sample) => sample.ticks,
            None => Ticks::default(),
        };
        let ticks = parse_ticks(&read("/proc/stat")?);
        let status = Arc::new(HostStatus::read(fractions(before, ticks))?);
        *last = Some(Sample {
            at: now,
            ticks,
            status: Arc::clone(&status),
        });
        Ok(status)
    }
}

fn read(path: &str) -> Result<String, Error> {
    fs::read_to_string(path).map_err(|e| Error::failed(format!("read {path}"), e))
}

impl HostStatus {
    /// What /proc says; the fractions of processor time are differences that the caller has made.
    fn read((cpu, iowait): (f64, f64)) -> Result<Self, Error> {
        let info = read("/proc/cpuinfo")?;
        let memory = read("/proc/meminfo")?;
        let figure = |name: &str| meminfo(&memory, name);
        let loads = read("/proc/loadavg")?;
        let mut loads = loads.split_whitespace().map(str::to_owned);
        let uptime = read("/proc/uptime")?;
        let (cpus, sockets) = count_cpus(&info);
        let field = |name: &str| cpuinfo(&info, name).unwrap_or_default().to_owned();
        Ok(Self {
            cpu,
            iowait,
            cpus,
            sockets,
            cpu_model: field("model name"),
            cpu_mhz: field("cpu MHz"),
            cpu_flags: field("flags"),
            load: std::array::from_fn(|_| loads.next().unwrap_or_default()),
            memory: Memory {
                total: figure("MemTotal"),
                available: figure("MemAvailable"),
            },
            swap: Memory {
                total: figure("SwapTotal"),
                available: figure("SwapFree"),
            },
            root: root_space()?,
            uptime_s: uptime
                .split('.')
                .next()
                .and_then(|s| s.parse().ok())
                .unwrap_or(0),
            kernel: kernel(),
            network_bytes: network(&read("/proc/net/dev")?),
        })
    }
}

#[expect(
    clippy::cast_precision_loss,
    reason = "a load has two digits that matter"
)]
fn fractions(before: Ticks, now: Ticks) -> (f64, f64) {
    let total = now.total.saturating_sub(before.total);
    if total == 0 {
        return (0.0, 0.0);
    }
    let part = |now: u64, before: u64| now.saturating_sub(before) as f64 / total as f64;
    let idle = part(now.idle, before.idle);
    let iowait = part(now.iowait, before.iowait);
    ((1.0 - idle - iowait).clamp(0.0, 1.0), iowait)
}

/// The first line of /proc/stat: user, nice, system, idle, iowait, irq, softirq, steal; guest time is in user's.
fn parse_ticks(stat: &str) -> Ticks {
    let line = stat.lines().next().unwrap_or_default();
    let fields = line.split_whitespace().skip(1).take(8);
    let numbers: Vec<u64> = fields.map(|field| field.parse().unwrap_or(0)).collect();
    Ticks {
        total: numbers.iter().sum(),
        idle: numbers.get(3).copied().unwrap_or(0),
        iowait: numbers.get(4).copied().unwrap_or(0),
    }
}

fn meminfo(text: &str, name: &str) -> u64 {
    let value = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    let value = value.and_then(|value| value.split_whitespace().next());
    value.and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0) * KIB
}

fn cpuinfo<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == name).then_some(value.trim())
    })
}

/// Online processors and the sockets they are in.
fn count_cpus(info: &str) -> (usize, usize) {
    let has = |name: &'static str| move |line: &&str| line.starts_with(name);
    let cpus = info.lines().filter(has("processor")).count();
    let mut sockets: Vec<&str> = info.lines().filter(has("physical id")).collect();
    sockets.sort_unstable();
    sockets.dedup();
    (cpus.max(1), sockets.len().max(1))
}

/// Bytes through the host's own cards: loopback, bridges, VLANs and guests' interfaces would count them again.
fn network(text: &str) -> (u64, u64) {
    let virtual_ones = ["lo", "tap", "veth", "vmbr", "fw", "docker", "br-"];
    let card = |line: &str| {
        let (name, counters) = line.split_once(':')?;
        let name = name.trim();
        let is_vlan = name.contains('.');
        if is_vlan || virtual_ones.iter().any(|stem| name.starts_with(stem)) {
            return None;
        }
        let counters: Vec<u64> = counters
            .split_whitespace()
            .filter_map(|n| n.parse().ok())
            .collect();
        // Receive bytes is the first column, transmit bytes the ninth.
        Some((*counters.first()?, *counters.get(8)?))
    };
    text.lines()
        .filter_map(card)
        .fold((0, 0), |sum, (received, sent)| {
            (sum.0 + received, sum.1 + sent)
        })
}

fn root_space() -> Result<Memory, Error> {
    let space = rustix::fs::statvfs("/").map_err(|e| Error::failed("measure /", e))?;
    Ok(Memory {
        total: space.f_blocks * space.f_frsize,
        available: space.f_bavail * space.f_frsize,
    })
}

fn kernel() -> [String; 4] {
    let name = rustix::system::uname();
    let parts = [
        name.sysname(),
        name.release(),
        name.version(),
        name.machine(),
    ];
    parts.map(|part| part.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn load_is_what_was_not_idle() {
        let before = parse_ticks("cpu  100 0 100 800 0 0 0 0 0 0\n");
        let now = parse_ticks("cpu  150 0 150 850 50 0 0 0 0 0\n");
        assert_eq!(fractions(before, now), (0.5, 0.25));
        assert_eq!(fractions(now, now), (0.0, 0.0));
    }

    #[test]
    fn figures_are_found_by_their_name() {
        let text = "MemTotal:       2048 kB\nMemAvailable:   1024 kB\n";
        assert_eq!(meminfo(text, "MemTotal"), 2 << 20);
        assert_eq!(meminfo(text, "Mem"), 0);
        let info = "processor\t: 0\nmodel name\t: X: Y\nphysical id\t: 0\n\nprocessor\t: 1\nphysical id\t: 0\n";
        assert_eq!(count_cpus(info), (2, 1));
        assert_eq!(cpuinfo(info, "model name"), Some("X: Y"));
        let net = "head\n  eth0: 5 0 0 0 0 0 0 0 7 0\n    lo: 9 0 0 0 0 0 0 0 9 0\neth0.5: 3 0 0 0 0 0 0 0 3 0\n";
        assert_eq!(network(net), (5, 7));
    }

    #[test]
    fn this_host_can_be_read() {
        let status = HostMeter::default().read().unwrap();
        assert!(status.memory.total >= status.memory.used());
        assert!(status.cpus > 0 && (0.0..=1.0).contains(&status.cpu));
    }
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! `events`: statistics of a container's cgroups at intervals, and a line whenever the kernel has killed for want
//! of memory, in runc's JSON form (one object a line, `type` and `id` first). libcgroups reads the statistics of v1, and
//! [`cgroup::statistics`] those of v2; libcontainer prints them to standard output by itself and knows no out-of-memory
//! events.

use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use libcgroups::common::{CgroupConfig, CgroupManager, create_cgroup_manager};
use libcgroups::stats::{BlkioDeviceStat, MemoryData, Stats};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::Serialize;
use serde_json::{Value, json};

use crate::cgroup;
use crate::error::{Context, Error, Result};
use crate::lifecycle::Container;
use crate::state::Status;
use crate::sys;

/// One line of `events`.
#[derive(Debug, Serialize)]
pub struct Event<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    id: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    data: Option<Value>,
}

/// The container's statistics now.
pub fn statistics(container: &Container) -> Result<Event<'_>> {
    let there = [Status::Created, Status::Running, Status::Paused];
    container.require(&there, "only a container with processes has statistics")?;
    let saved = &container.saved;
    container.cgroups()?;
    let failed = |reason: String| Error::Argument(format!("statistics of {}: {reason}", saved.id));
    let unified = cgroup::is_unified_host()?;
    let data = match saved.cgroups.first().filter(|_| unified) {
        Some(directory) => unified_document(directory)?,
        None => {
            let config = CgroupConfig {
                cgroup_path: saved.cgroup_path.clone(),
                systemd_cgroup: false,
                container_name: saved.id.clone(),
            };
            let manager = create_cgroup_manager(config).map_err(|e| failed(e.to_string()))?;
            document(&manager.stats().map_err(|e| failed(e.to_string()))?)
        }
    };
    Ok(Event {
        kind: "stats",
        id: &saved.id,
        data: Some(data),
    })
}

/// Gives an event to `print` at each interval and each out-of-memory kill, until the container's end.
pub fn follow(
    container: &Container,
    interval: Duration,
    mut print: impl FnMut(&Event<'_>) -> Result<()>,
) -> Result<()> {
    let init = container
        .saved
        .init
        .and_then(crate::process::ProcessId::open);
    let Some(init) = init else {
        return container.require(&[Status::Running], "it has ended");
    };
    let memory = OutOfMemory::watch(container.cgroups()?)?;
    let mut killed = memory.as_ref().map_or(0, OutOfMemory::count);
    let mut next = Instant::now() + interval;
    loop {
        let left = next.saturating_duration_since(Instant::now());
        let mut polled = vec![PollFd::new(init.as_fd(), PollFlags::POLLIN)];
        polled.extend(memory.iter().map(OutOfMemory::poll_fd));
        match poll(
            &mut polled,
            PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX),
        ) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(source) => return Err(source).context(|| "poll".to_owned()),
        }
        let ended = polled[0].any().unwrap_or(false);
        if let Some(memory) = &memory {
            memory.acknowledge();
            let now = memory.count();
            if now > killed {
                killed = now;
                print(&Event {
                    kind: "oom",
                    id: &container.saved.id,
                    data: None,
                })?;
            }
        }
        if ended {
            return Ok(());
        }
        if Instant::now() >= next {
            next += interval;
            match statistics(container) {
                Ok(event) => print(&event)?,
                // It is about to end, which the next turn sees.
                Err(_) if !container.directory.path.exists() => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }
}

/// The kernel's notice of out-of-memory kills in a container: an eventfd registered with a v1 hierarchy, or the
/// v2 file itself, which polls as exceptional when its content changes.
struct OutOfMemory {
    counts: PathBuf,
    notice: OwnedFd,
    flags: PollFlags,
}

impl OutOfMemory {
    /// Nothing on a host without the memory controller.
    fn watch(directories: &[PathBuf]) -> Result<Option<Self>> {
        let find = |name: &str| {
            directories
                .iter()
                .map(|d| d.join(name))
                .find(|f| f.exists())
        };
        if let Some(counts) = find("memory.oom_control") {
            let notice = sys::eventfd().context(|| "create an eventfd".to_owned())?;
            let control = File::open(&counts).at("open", &counts)?;
            let register = counts.with_file_name("cgroup.event_control");
            let line = format!("{} {}", notice.as_raw_fd(), control.as_raw_fd());
            fs::write(&register, line).at("write", &register)?;
            let flags = PollFlags::POLLIN;
            return Ok(Some(Self {
                counts,
                notice,
                flags,
            }));
        }
        let Some(counts) = find("memory.events") else {
            return Ok(None);
        };
        let notice = File::open(&counts).at("open", &counts)?.into();
        let flags = PollFlags::POLLPRI;
        Ok(Some(Self {
            counts,
            notice,
            flags,
        }))
    }

    fn poll_fd(&self) -> PollFd<'_> {
        PollFd::new(self.notice.as_fd(), self.flags)
    }

    /// Takes the notice back, so that the next one is seen.
    fn acknowledge(&self) {
        let mut counter = [0_u8; 8];
        if self.flags == PollFlags::POLLIN {
            nix::unistd::read(&self.notice, &mut counter).ok();
        }
    }

    fn count(&self) -> u64 {
        let text = fs::read_to_string(&self.counts).unwrap_or_default();
        let count = |line: &str| line.strip_prefix("oom_kill ")?.trim().parse().ok();
        text.lines().find_map(count).unwrap_or(0)
    }
}

/// Statistics of a v2 cgroup, with pressure stall information where the kernel has it.
fn unified_document(directory: &Path) -> Result<Value> {
    let mut document = document(&cgroup::statistics::read(directory)?);
    for (member, resource) in [("cpu", "cpu"), ("memory", "memory"), ("blkio", "io")] {
        if let Some(pressure) = cgroup::statistics::pressure(directory, resource)? {
            document[member]["psi"] = json!(pressure);
        }
    }
    Ok(document)
}

/// Statistics under runc's names.
fn document(stats: &Stats) -> Value {
    let (cpu, throttling) = (&stats.cpu.usage, &stats.cpu.throttling);
    let memory = &stats.memory;
    let blkio = &stats.blkio;
    let huge: serde_json::Map<String, Value> = stats
        .hugetlb
        .iter()
        .map(|(size, s)| {
            let entry = json!({ "usage": s.usage, "max": s.max_usage, "failcnt": s.fail_count });
            (size.clone(), entry)
        })
        .collect();
    json!({
        "cpu": {
            "usage": {
                "total": cpu.usage_total,
                "percpu": cpu.per_core_usage_total,
                "percpu_kernel": cpu.per_core_usage_kernel,
                "percpu_user": cpu.per_core_usage_user,
                "kernel": cpu.usage_kernel,
                "user": cpu.usage_user,
            },
            "throttling": {
                "periods": throttling.periods,
                "throttledPeriods": throttling.throttled_periods,
                "throttledTime": throttling.throttled_time,
            },
        },
        "memory": {
            "cache": memory.cache,
            "usage": entry(&memory.memory),
            "swap": entry(&memory.memswap),
            "kernel": entry(&memory.kernel),
            "kernelTCP": entry(&memory.kernel_tcp),
            "raw": memory.stats,
        },
        "pids": { "current": stats.pids.current, "limit": stats.pids.limit },
        "blkio": {
            "ioServiceBytesRecursive": devices(&blkio.service_bytes),
            "ioServicedRecursive": devices(&blkio.serviced),
            "ioQueueRecursive": devices(&blkio.queued),
            "ioServiceTimeRecursive": devices(&blkio.service_time),
            "ioWaitTimeRecursive": devices(&blkio.wait_time),
            "ioMergedRecursive": devices(&blkio.merged),
            "ioTimeRecursive": devices(&blkio.time),
            "sectorsRecursive": devices(&blkio.sectors),
        },
        "hugetlb": huge,
        "intel_rdt": {},
        "network_interfaces": null,
    })
}

fn entry(data: &MemoryData) -> Value {
    json!({
        "limit": data.limit, "usage": data.usage, "max": data.max_usage, "failcnt": data.fail_count,
    })
}

fn devices(stats: &[BlkioDeviceStat]) -> Value {
    let one = |s: &BlkioDeviceStat| {
        json!({
            "major": s.major, "minor": s.minor, "op": s.op_type.clone().unwrap_or_default(),
            "value": s.value,
        })
    };
    stats.iter().map(one).collect()
}

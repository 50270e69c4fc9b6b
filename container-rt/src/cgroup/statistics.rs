// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Statistics of a v2 cgroup, under the names and in the units that v1 has, as runc gives them. libcgroups reads them as
//! well, but
//!
//! - gives an error where the host lacks any one controller (without `cpu`, `cpu.stat` has no `nr_periods`; a hybrid
//!   host has no `memory.current` or `pids.current` for v2), or was built without pressure stall information;
//! - leaves CPU time in microseconds, where v1 and runc have nanoseconds;
//! - leaves out how long processes waited in all (`total` of pressure stall information);
//! - counts swap alone, where v1's `memsw` and runc count memory and swap;
//! - names reads `read`, where v1 and runc have `Read`.
//!
//! What a file or a line would tell that is not there is 0. Files: kernel, `Documentation/admin-guide/cgroup-v2.rst`,
//! "Controllers".

use std::collections::HashMap;
use std::io::{Error, ErrorKind};
use std::path::Path;

use libcgroups::stats::{
    BlkioDeviceStat, BlkioStats, CpuStats, HugeTlbStats, MemoryData, MemoryStats, PidStats, Stats,
    supported_page_sizes,
};
use serde::Serialize;

use crate::error::{Context, Result};

/// No limit, as v1 and runc say it.
const UNLIMITED: u64 = u64::MAX;

/// Reads them all. An error is one of a file that is there, or that this is no cgroup (any more).
pub fn read(directory: &Path) -> Result<Stats> {
    let group = Group(directory);
    Ok(Stats {
        cpu: group.cpu()?,
        pids: group.processes()?,
        hugetlb: group.huge_pages()?,
        blkio: group.block_io()?,
        memory: group.memory()?,
    })
}

/// How long processes of a cgroup waited for a resource: some of them, and all of them at the same time. Kernel,
/// `Documentation/accounting/psi.rst`.
#[derive(Debug, Default, PartialEq, Serialize)]
pub struct Pressure {
    some: Stall,
    full: Stall,
}

/// Per cent of the last 10, 60 and 300 seconds, and microseconds in all.
#[derive(Debug, Default, PartialEq, Serialize)]
struct Stall {
    avg10: f64,
    avg60: f64,
    avg300: f64,
    total: u64,
}

/// Reads it for `cpu`, `memory` or `io`. `None`: the kernel was built or booted without it.
pub fn pressure(directory: &Path, resource: &str) -> Result<Option<Pressure>> {
    let Some(text) = Group(directory).text(&format!("{resource}.pressure"))? else {
        return Ok(None);
    };
    let mut pressure = Pressure::default();
    for line in text.lines() {
        let mut words = line.split_ascii_whitespace();
        let stall = match words.next() {
            Some("some") => &mut pressure.some,
            Some("full") => &mut pressure.full,
            _ => continue,
        };
        for (key, value) in words.filter_map(|word| word.split_once('=')) {
            match key {
                "avg10" => stall.avg10 = value.parse().unwrap_or(0.0),
                "avg60" => stall.avg60 = value.parse().unwrap_or(0.0),
                "avg300" => stall.avg300 = value.parse().unwrap_or(0.0),
                "total" => stall.total = value.parse().unwrap_or(0),
                _ => {}
            }
        }
    }
    Ok(Some(pressure))
}

/// A v2 directory.
struct Group<'a>(&'a Path);

impl Group<'_> {
    /// `None` where it does not exist, or is of what the kernel was booted without (`psi=0`).
    fn text(&self, name: &str) -> Result<Option<String>> {
        let path = self.0.join(name);
        let is_without = |error: &Error| {
            error.kind() == ErrorKind::NotFound || error.raw_os_error() == Some(libc::EOPNOTSUPP)
        };
        match std::fs::read_to_string(&path) {
            Err(error) if is_without(&error) => Ok(None),
            read => read.map(Some).at("read", &path),
        }
    }

    /// The number that is all of a file, or `max`.
    fn number(&self, name: &str) -> Result<Option<u64>> {
        let text = self.text(name)?;
        Ok(text.and_then(|text| match text.trim() {
            "max" => Some(UNLIMITED),
            number => number.parse().ok(),
        }))
    }

    /// Lines of a key and a number.
    fn table(&self, name: &str) -> Result<HashMap<String, u64>> {
        let text = self.text(name)?.unwrap_or_default();
        let pair = |line: &str| {
            let (key, value) = line.split_once(' ')?;
            Some((key.to_owned(), value.trim().parse().ok()?))
        };
        Ok(text.lines().filter_map(pair).collect())
    }

    fn cpu(&self) -> Result<CpuStats> {
        let table = self.table("cpu.stat")?;
        let count = |key: &str| table.get(key).copied().unwrap_or(0);
        let nanoseconds = |key: &str| count(key).saturating_mul(1000);
        let mut stats = CpuStats::default();
        stats.usage.usage_total = nanoseconds("usage_usec");
        stats.usage.usage_user = nanoseconds("user_usec");
        stats.usage.usage_kernel = nanoseconds("system_usec");
        stats.throttling.periods = count("nr_periods");
        stats.throttling.throttled_periods = count("nr_throttled");
        stats.throttling.throttled_time = nanoseconds("throttled_usec");
        Ok(stats)
    }

    fn processes(&self) -> Result<PidStats> {
        let current = match self.number("pids.current")? {
            Some(current) => current,
            None => {
                let path = self.0.join("cgroup.procs");
                let text = std::fs::read_to_string(&path).at("read", &path)?;
                text.lines().count() as u64
            }
        };
        // 0 is no limit.
        let limit = self.number("pids.max")?.filter(|limit| *limit != UNLIMITED);
        Ok(PidStats {
            current,
            limit: limit.unwrap_or(0),
        })
    }

    fn memory(&self) -> Result<MemoryStats> {
        let stats = self.table("memory.stat")?;
        let memory = self.memory_of("memory")?;
        let swap = self.memory_of("memory.swap")?;
        let memswap = MemoryData {
            usage: memory.usage.saturating_add(swap.usage),
            limit: memory.limit.saturating_add(swap.limit),
            ..swap
        };
        Ok(MemoryStats {
            cache: stats.get("file").copied().unwrap_or(0),
            hierarchy: true,
            memory,
            memswap,
            stats,
            ..Default::default()
        })
    }

    fn memory_of(&self, kind: &str) -> Result<MemoryData> {
        let number = |name: &str| self.number(&format!("{kind}.{name}"));
        let events = self.table(&format!("{kind}.events"))?;
        Ok(MemoryData {
            usage: number("current")?.unwrap_or(0),
            max_usage: number("peak")?.unwrap_or(0),
            fail_count: events.get("max").copied().unwrap_or(0),
            limit: number("max")?.unwrap_or(0),
        })
    }

    fn huge_pages(&self) -> Result<HashMap<String, HugeTlbStats>> {
        let mut found = HashMap::new();
        // A kernel without huge pages has none of their sizes.
        for size in supported_page_sizes().unwrap_or_default() {
            let Some(usage) = self.number(&format!("hugetlb.{size}.current"))? else {
                continue;
            };
            let events = self.table(&format!("hugetlb.{size}.events"))?;
            let stats = HugeTlbStats {
                usage,
                max_usage: 0,
                fail_count: events.get("max").copied().unwrap_or(0),
            };
            found.insert(size, stats);
        }
        Ok(found)
    }

    /// From lines such as `8:0 rbytes=4096 wbytes=0 rios=1 wios=0 dbytes=0 dios=0`.
    fn block_io(&self) -> Result<BlkioStats> {
        let mut stats = BlkioStats::default();
        for line in self.text("io.stat")?.unwrap_or_default().lines() {
            let mut words = line.split_ascii_whitespace();
            let device = words.next().and_then(|word| word.split_once(':'));
            let parse =
                |(major, minor): (&str, &str)| Some((major.parse().ok()?, minor.parse().ok()?));
            let Some((major, minor)) = device.and_then(parse) else {
                continue;
            };
            for (key, value) in words.filter_map(|word| word.split_once('=')) {
                let (table, kind) = match key {
                    "rbytes" => (&mut stats.service_bytes, "Read"),
                    "wbytes" => (&mut stats.service_bytes, "Write"),
                    "rios" => (&mut stats.serviced, "Read"),
                    "wios" => (&mut stats.serviced, "Write"),
                    _ => continue,
                };
                table.push(BlkioDeviceStat {
                    major,
                    minor,
                    op_type: Some(kind.to_owned()),
                    value: value.parse().unwrap_or(0),
                });
            }
        }
        Ok(stats)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(files: &[(&str, &str)]) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        for (name, text) in files {
            std::fs::write(directory.path().join(name), text).unwrap();
        }
        directory
    }

    #[test]
    fn what_no_controller_tells_is_zero() {
        let cpu = "usage_usec 21422\nuser_usec 1000\nsystem_usec 20422\nnice_usec 0\n";
        let group = group(&[("cgroup.procs", "7\n8\n"), ("cpu.stat", cpu)]);
        let stats = read(group.path()).unwrap();
        assert_eq!(stats.cpu.usage.usage_total, 21_422_000);
        assert_eq!(stats.cpu.usage.usage_user, 1_000_000);
        assert_eq!(stats.cpu.throttling.periods, 0);
        assert_eq!((stats.pids.current, stats.pids.limit), (2, 0));
        assert_eq!(stats.memory.memory, MemoryData::default());
        assert!(stats.hugetlb.is_empty() && stats.blkio.serviced.is_empty());
    }

    #[test]
    fn every_controller_is_read() {
        let cpu = "usage_usec 9\nuser_usec 5\nsystem_usec 4\nnr_periods 3\nnr_throttled 2\nthrottled_usec 1\n";
        let group = group(&[
            ("cgroup.procs", "7\n"),
            ("cpu.stat", cpu),
            ("pids.current", "4\n"),
            ("pids.max", "max\n"),
            ("memory.current", "4096\n"),
            ("memory.max", "8192\n"),
            ("memory.peak", "6000\n"),
            ("memory.events", "low 0\nhigh 0\nmax 12\noom 0\n"),
            ("memory.swap.current", "100\n"),
            ("memory.swap.max", "max\n"),
            ("memory.stat", "anon 1000\nfile 3000\n"),
            (
                "io.stat",
                "8:0 rbytes=10 wbytes=20 rios=1 wios=2 dbytes=0 dios=0\n253:1 \n",
            ),
        ]);
        let stats = read(group.path()).unwrap();
        let throttling = &stats.cpu.throttling;
        let throttled = (
            throttling.periods,
            throttling.throttled_periods,
            throttling.throttled_time,
        );
        assert_eq!(throttled, (3, 2, 1000));
        assert_eq!((stats.pids.current, stats.pids.limit), (4, 0));
        let (memory, swap) = (&stats.memory.memory, &stats.memory.memswap);
        assert_eq!((memory.usage, memory.limit), (4096, 8192));
        assert_eq!((memory.max_usage, memory.fail_count), (6000, 12));
        assert_eq!((swap.usage, swap.limit), (4196, UNLIMITED));
        assert_eq!(
            (stats.memory.cache, stats.memory.stats["anon"]),
            (3000, 1000)
        );
        let lines = |stats: &[BlkioDeviceStat]| -> Vec<String> {
            stats.iter().map(ToString::to_string).collect()
        };
        assert_eq!(
            lines(&stats.blkio.service_bytes),
            ["8:0 Read 10", "8:0 Write 20"]
        );
        assert_eq!(lines(&stats.blkio.serviced), ["8:0 Read 1", "8:0 Write 2"]);
    }

    #[test]
    fn pressure_is_read_where_the_kernel_has_it() {
        let text = "some avg10=1.50 avg60=0.25 avg300=0.00 total=42\nfull avg10=0.00 avg60=0.00 avg300=0.10 total=7\n";
        let group = group(&[("io.pressure", text)]);
        let read = pressure(group.path(), "io").unwrap().unwrap();
        let some = (read.some.avg10, read.some.avg60, read.some.total);
        assert_eq!(some, (1.5, 0.25, 42));
        assert_eq!((read.full.avg300, read.full.total), (0.1, 7));
        assert_eq!(pressure(group.path(), "cpu").unwrap(), None);
    }

    #[test]
    fn what_is_no_cgroup_is_an_error() {
        let group = group(&[]);
        assert!(read(&group.path().join("gone")).is_err());
    }
}

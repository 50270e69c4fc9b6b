// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The systemd cgroup driver: the container's cgroup belongs to a transient scope, so that systemd knows the
//! container, and leaves alone what is below the scope's directory (`Delegate=`). `linux.cgroupsPath` is
//! `slice:prefix:name`, as other runtimes have it; the scope is `prefix-name.scope`.
//!
//! ```text
//!  StartTransientUnit(scope, a placeholder process) ─► its directory ─► as with any other cgroup: device filter,
//!  libcontainer, limits ─► SetUnitProperties: what the files say now ─► the placeholder ends
//!  delete: processes killed, directory removed ─► StopUnit
//! ```
//!
//! A scope is never without a process: systemd would remove it. The placeholder holds it until the init is there,
//! and ends after its creator, so that a creator that is killed leaves no scope behind.
//!
//! Limits are written into the directory, as ever, and then told to systemd as the files have them: systemd writes
//! its own idea of them again at `daemon-reload` and whenever a neighbor changes. What it has no property for, it does
//! not touch. Devices stay ours on v2, where several filters of one cgroup must all agree.
//!
//! libcgroups has such a driver, for v2 only, too; it waits for no job, looks for the process by polling, sets
//! limits that were not asked for, and leaves the unit to systemd at the end. A host with v1 is refused here: there
//! systemd writes the device list as well.

use std::fs;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use zbus::Variant;

use super::bus::{Bus, CallError};
use super::{Kind, MOUNT_ROOT, is_unified_host, own_path};
use crate::error::{Context, Error, Result};
use crate::sys::{self, Fork, Pid};

/// The slice of a container that names none, as under other runtimes.
const DEFAULT_SLICE: &str = "system.slice";

/// Longest name of a unit, bytes: systemd.unit(5).
const UNIT_BYTES_MAX: usize = 255;

/// How long an orphaned placeholder waits to be put into its scope. As long as the creator would have waited.
const ORPHAN_LIMIT: Duration = Duration::from_secs(30);

/// "No limit", for every property that is a limit: systemd's `infinity`.
const UNLIMITED: u64 = u64::MAX;

/// Most CPUs or memory nodes that a list may name: far above any kernel's `NR_CPUS`.
const LIST_MAX: usize = 1 << 16;

/// Properties of a unit, as D-Bus has them.
type Properties = Vec<(&'static str, Variant<'static>)>;

/// Where a scope is to be, from `linux.cgroupsPath`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The unit that the scope is below.
    pub slice: String,
    /// The scope's own name.
    pub unit: String,
}

impl Place {
    /// Reads `slice:prefix:name`. Parts but the name may be empty.
    pub fn parse(path: &Path) -> Result<Self> {
        let wrong = |reason: &str| Error::Config {
            field: "linux.cgroupsPath".to_owned(),
            reason: format!("{}: {reason}", path.display()),
        };
        let text = path.to_str().unwrap_or_default();
        let parts: Vec<&str> = text.split(':').collect();
        let [slice, prefix, name] = parts[..] else {
            return Err(wrong("the systemd driver needs slice:prefix:name"));
        };
        let slice = if slice.is_empty() {
            DEFAULT_SLICE
        } else {
            slice
        };
        let unit = match (prefix, name) {
            (_, "") => return Err(wrong("the name is empty")),
            ("", name) => format!("{name}.scope"),
            (prefix, name) => format!("{prefix}-{name}.scope"),
        };
        // systemd.unit(5). A name with an @ would be of a template.
        let known = |byte: u8| byte.is_ascii_alphanumeric() || b":-_.\\".contains(&byte);
        if !slice.ends_with(".slice") || name.ends_with(".slice") {
            return Err(wrong(
                "the first part, and only it, is a name ending in .slice",
            ));
        }
        if !format!("{slice}{unit}").bytes().all(known) || unit.len() > UNIT_BYTES_MAX {
            return Err(wrong(
                "a unit's name has letters, digits and -_.\\, at most 255",
            ));
        }
        Ok(Self {
            slice: slice.to_owned(),
            unit,
        })
    }
}

/// A scope that was just started, and the process that holds it.
#[derive(Debug)]
pub struct Scope {
    /// Its cgroup, relative to the hierarchy.
    pub path: PathBuf,
    _placeholder: Placeholder,
}

/// Starts a scope. Blocks until systemd has made it, at most half a minute.
pub fn start(place: &Place, id: &str) -> Result<Scope> {
    let unit = place.unit.as_str();
    // Before the cgroups are looked at: where systemd does not run, they are not the reason.
    let mut bus = Bus::systemd(unit)?;
    if !is_unified_host()? {
        return Err(Error::Argument(
            "the systemd cgroup driver needs a host with cgroup v2 only: leave out --systemd-cgroup".to_owned(),
        ));
    }
    let placeholder = Placeholder::start(unit)?;
    let properties: Properties = vec![
        ("Description", format!("container {id}").into()),
        ("Slice", place.slice.clone().into()),
        ("PIDs", vec![placeholder.0.cast_unsigned()].into()),
        ("Delegate", true.into()),
        ("DefaultDependencies", false.into()),
        // One that fails is forgotten, too.
        ("CollectMode", "inactive-or-failed".into()),
        ("MemoryAccounting", true.into()),
        ("CPUAccounting", true.into()),
        ("IOAccounting", true.into()),
        ("TasksAccounting", true.into()),
        // systemd's default would be a limit that nobody asked for.
        ("TasksMax", UNLIMITED.into()),
    ];
    let auxiliary: Vec<(&str, Properties)> = Vec::new();
    let arguments = (unit, "fail", properties, auxiliary);
    if let Err(error) = bus.run_job("StartTransientUnit", &arguments) {
        return Err(match error {
            CallError::Refused { name, .. } if name.ends_with(".UnitExists") => Error::Config {
                field: "linux.cgroupsPath".to_owned(),
                reason: format!("{unit}: systemd has such a unit: stop it, or choose another name"),
            },
            CallError::Refused { .. } => failed("start", unit, &error),
            error => {
                // Perhaps systemd still comes to it.
                std::mem::forget(placeholder);
                failed("start", unit, &error)
            }
        });
    }
    let path = cgroup_of(&placeholder.0.to_string())?;
    if !path.ends_with(unit) {
        let path = path.display();
        return Err(Error::Argument(format!(
            "systemd started {unit}, and its process is in {path}"
        )));
    }
    Ok(Scope {
        path,
        _placeholder: placeholder,
    })
}

/// Tells systemd the limits that a scope's directory has now.
pub fn tell_limits(unit: &str, path: &Path) -> Result<()> {
    let relative = path.strip_prefix("/").unwrap_or(path);
    let properties = limits(&Path::new(MOUNT_ROOT).join(relative))?;
    let runtime_only = true;
    Bus::systemd(unit)?
        .ask("SetUnitProperties", &(unit, runtime_only, properties))
        .map_err(|error| failed("set the limits of", unit, &error))
}

/// Stops a scope whose processes have ended, and has systemd forget it. One that systemd does not know is no error.
pub fn stop(unit: &str) -> Result<()> {
    let mut bus = Bus::systemd(unit)?;
    let unknown = |error: &CallError| matches!(error, CallError::Refused { name, .. } if name.ends_with(".NoSuchUnit"));
    let result = bus.run_job("StopUnit", &(unit, "replace"));
    if let Err(error) = result
        && !unknown(&error)
    {
        return Err(failed("stop", unit, &error));
    }
    match bus.ask("ResetFailedUnit", &unit) {
        Err(error) if !unknown(&error) => Err(failed("reset", unit, &error)),
        _ => Ok(()),
    }
}

fn failed(verb: &str, unit: &str, error: &CallError) -> Error {
    let reason = crate::error::one_line(error);
    Error::Argument(format!("systemd: {verb} {unit}: {reason}"))
}

/// The v2 cgroup of a process.
fn cgroup_of(process: &str) -> Result<PathBuf> {
    let file = PathBuf::from(format!("/proc/{process}/cgroup"));
    let text = fs::read_to_string(&file).at("read", &file)?;
    Ok(own_path(&text, &Kind::Unified).unwrap_or("/").into())
}

/// A child that does nothing. It is killed when this is dropped. When its creator ends before that, it ends, too; but
/// not before it is in the scope: one whose process was gone when systemd put it there would never be empty, and stay.
#[derive(Debug)]
struct Placeholder(Pid);

impl Placeholder {
    fn start(unit: &str) -> Result<Self> {
        let creator = nix::unistd::getpid();
        match sys::fork().context(|| "fork".to_owned())? {
            Fork::Parent(pid) => Ok(Self(pid)),
            Fork::Child => {
                // What ends its creator's group is not for it.
                nix::unistd::setsid().ok();
                // The descriptor is of whoever is the parent now; a creator that has ended is not.
                let watched = sys::pidfd_open(creator.as_raw());
                if let Ok(watched) = watched
                    && nix::unistd::getppid() == creator
                {
                    let mut polled = [PollFd::new(watched.as_fd(), PollFlags::POLLIN)];
                    while poll(&mut polled, PollTimeout::NONE) == Err(nix::errno::Errno::EINTR) {}
                }
                let deadline = Instant::now() + ORPHAN_LIMIT;
                while Instant::now() < deadline
                    && !cgroup_of("self").is_ok_and(|path| path.ends_with(unit))
                {
                    std::thread::sleep(Duration::from_millis(10));
                }
                sys::exit_now(1)
            }
        }
    }
}

impl Drop for Placeholder {
    fn drop(&mut self) {
        // Its end is certain, and nobody else waits for it.
        sys::kill(self.0, libc::SIGKILL).ok();
        nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(self.0), None).ok();
    }
}

/// The limits in a v2 directory under systemd's names. A file that is not there is of a controller that the host
/// has not.
fn limits(directory: &Path) -> Result<Properties> {
    let mut found = Properties::new();
    for (file, property) in [
        ("memory.low", "MemoryLow"),
        ("memory.high", "MemoryHigh"),
        ("memory.max", "MemoryMax"),
        ("memory.swap.max", "MemorySwapMax"),
        ("pids.max", "TasksMax"),
        ("cpu.weight", "CPUWeight"),
        ("io.weight", "IOWeight"),
    ] {
        let Some(text) = read(directory, file)? else {
            continue;
        };
        // That of io is "default 100", then lines for single devices.
        let first = text.lines().next().unwrap_or_default();
        match number(first.trim_start_matches("default ")) {
            // How an idle group reads; not all versions of systemd know that weight.
            Some(0) if property == "CPUWeight" => {}
            Some(value) => found.push((property, value.into())),
            None => return Err(unexpected(directory, file, &text)),
        }
    }
    if let Some(text) = read(directory, "cpu.max")? {
        let quota = quota(&text).ok_or_else(|| unexpected(directory, "cpu.max", &text))?;
        found.push(("CPUQuotaPerSecUSec", quota.per_second_us.into()));
        found.push(("CPUQuotaPeriodUSec", quota.period_us.into()));
    }
    for (file, property) in [
        ("cpuset.cpus", "AllowedCPUs"),
        ("cpuset.mems", "AllowedMemoryNodes"),
    ] {
        if let Some(text) = read(directory, file)? {
            let bits = bits(&text).ok_or_else(|| unexpected(directory, file, &text))?;
            found.push((property, bits.into()));
        }
    }
    Ok(found)
}

fn read(directory: &Path, file: &str) -> Result<Option<String>> {
    let path = directory.join(file);
    match fs::read_to_string(&path) {
        Ok(text) => Ok(Some(text.trim().to_owned())),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e).at("read", &path),
    }
}

fn unexpected(directory: &Path, file: &str, text: &str) -> Error {
    let path = directory.join(file);
    Error::Argument(format!("{} says {text:?}", path.display()))
}

fn number(text: &str) -> Option<u64> {
    match text {
        "max" => Some(UNLIMITED),
        text => text.parse().ok(),
    }
}

/// A share of CPU time as systemd counts it.
#[derive(Debug, PartialEq, Eq)]
struct Quota {
    per_second_us: u64,
    period_us: u64,
}

/// From the text of cpu.max. systemd keeps whole percents of a CPU: rounded up, like runc, so that the container gets
/// what it was promised.
fn quota(text: &str) -> Option<Quota> {
    const SECOND_US: u64 = 1_000_000;
    const PERCENT_US: u64 = SECOND_US / 100;
    let (quota, period) = text.split_once(' ')?;
    let period_us: u64 = period.parse().ok().filter(|period| *period > 0)?;
    let per_second_us = match number(quota)? {
        UNLIMITED => UNLIMITED,
        quota => quota
            .checked_mul(SECOND_US)?
            .div_ceil(period_us)
            .checked_next_multiple_of(PERCENT_US)?,
    };
    Some(Quota {
        per_second_us,
        period_us,
    })
}

/// A list such as `0-3,7` as the bytes of a bit mask, lowest first. Empty is what it was: all.
fn bits(list: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    for range in list.split(',').filter(|range| !range.is_empty()) {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        if last >= LIST_MAX {
            return None;
        }
        for bit in first..=last {
            if bytes.len() <= bit / 8 {
                bytes.resize(bit / 8 + 1, 0);
            }
            bytes[bit / 8] |= 1 << (bit % 8);
        }
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places() {
        let place = |text: &str| Place::parse(Path::new(text)).map(|p| (p.slice, p.unit));
        let of = |slice: &str, unit: &str| (slice.to_owned(), unit.to_owned());
        assert_eq!(
            place("machine.slice:libpod:0af3").unwrap(),
            of("machine.slice", "libpod-0af3.scope")
        );
        assert_eq!(place("::a").unwrap(), of("system.slice", "a.scope"));
        for (wrong, why) in [
            ("/a/b", "slice:prefix:name"),
            ("a.slice:b", "slice:prefix:name"),
            ("a.slice:b:c:d", "slice:prefix:name"),
            ("a.slice:b:", "empty"),
            ("a:b:c", ".slice"),
            ("a.slice:b:c.slice", ".slice"),
            ("a.slice:b:c d", "letters"),
            ("a.slice:b:c/d", "letters"),
            ("a.slice:b:c'", "letters"),
        ] {
            let error = place(wrong).unwrap_err().to_string();
            assert!(
                error.contains("linux.cgroupsPath") && error.contains(why),
                "{error}"
            );
        }
        assert!(place(&format!("::{}", "a".repeat(260))).is_err());
    }

    #[test]
    fn limits_are_what_the_files_say() {
        let directory = tempfile::tempdir().unwrap();
        for (file, text) in [
            ("memory.max", "67108864"),
            ("memory.high", "max"),
            ("pids.max", "33"),
            ("cpu.weight", "0"),
            ("io.weight", "default 100\n8:0 50"),
            ("cpu.max", "max 100000"),
            ("cpuset.cpus", ""),
        ] {
            fs::write(directory.path().join(file), format!("{text}\n")).unwrap();
        }
        let expected: Properties = vec![
            ("MemoryHigh", u64::MAX.into()),
            ("MemoryMax", 67_108_864_u64.into()),
            ("TasksMax", 33_u64.into()),
            ("IOWeight", 100_u64.into()),
            ("CPUQuotaPerSecUSec", u64::MAX.into()),
            ("CPUQuotaPeriodUSec", 100_000_u64.into()),
            ("AllowedCPUs", Vec::<u8>::new().into()),
        ];
        assert_eq!(limits(directory.path()).unwrap(), expected);
        fs::write(directory.path().join("memory.max"), "much").unwrap();
        let error = limits(directory.path()).unwrap_err().to_string();
        assert!(error.ends_with("memory.max says \"much\""), "{error}");
    }

    #[test]
    fn quotas_and_lists() {
        let of = |per_second_us, period_us| {
            Some(Quota {
                per_second_us,
                period_us,
            })
        };
        assert_eq!(quota("50000 100000"), of(500_000, 100_000));
        assert_eq!(quota("33333 100000"), of(340_000, 100_000));
        assert_eq!(quota("50000 0"), None);
        assert_eq!(quota("50000"), None);
        assert_eq!(bits("0-3,9"), Some(vec![0b1111, 0b10]));
        assert_eq!(bits(""), Some(Vec::new()));
        assert_eq!(bits("0-99999999"), None);
        assert_eq!(bits("x"), None);
    }
}

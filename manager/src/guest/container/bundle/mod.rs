// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Config to Spec for containers: the OCI `config.json` of the bundle, by pure functions.
//!
//! ```text
//! config keys ─► bundle ─► lxc: the raw lines, which have the last word ─► Bundle
//! Facts (what the host has of what the config names) ─┘
//! ```

mod devices;
mod mounts;
mod network;
pub mod owners;
mod seccomp;
#[cfg(test)]
mod tests;
mod views;

use std::path::Path;

use serde_json::{Value, json};

use crate::error::Error;
use crate::guest::cgroup::Group;
use crate::guest::config::GuestConfig;
use crate::guest::container::{idmap, image, lxc, terminal};
use crate::id::GuestId;

pub use devices::{Facts, HostDevice, device};
pub use mounts::{Mount, Source, volumes};
pub use network::{Link, cards, identity};
use owners::{Maps, Span};

/// Memory and swap when the config's values cannot be read, in MiB; its table has the same defaults.
const MEMORY_MIB: u64 = 512;
const SWAP_MIB: u64 = 512;
/// Weight of CPU time: the config counts as cgroup v2 does, where 100 is usual; OCI as v1, where 1024 is.
const WEIGHT_USUAL: u64 = 100;
const SHARES_USUAL: u64 = 1024;
/// Fewest shares that the kernel takes.
const SHARES_MIN: u64 = 2;
/// Period of the CPU quota, in microseconds: the kernel's default.
const CPU_PERIOD_US: u64 = 100_000;
/// Processes and threads of one container: enough for any distribution, and no fork bomb takes the host down.
const PIDS_MAX: u64 = 32_768;

/// What init and everything below it may do. Those that act on the host whatever the namespace (modules, raw I/O,
/// the clock) are left out for privileged containers, too.
const CAPABILITIES: &[&str] = &[
    "CAP_AUDIT_WRITE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_KILL",
    "CAP_LEASE",
    "CAP_LINUX_IMMUTABLE",
    "CAP_MKNOD",
    "CAP_NET_ADMIN",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_RAW",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_CHROOT",
    "CAP_SYS_NICE",
    "CAP_SYS_PTRACE",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TTY_CONFIG",
];
/// Program that a container runs when its config names none.
const INIT: &str = "/sbin/init";
/// Its environment.
const ENVIRONMENT: &[&str] = &[
    "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "TERM=linux",
    // systemd's container interface: the word makes it leave the host's hardware alone.
    "container=lxc",
];
/// Files of proc and sys that tell about or act on the host.
const MASKED: &[&str] = &[
    "/proc/acpi",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/sys/firmware",
];
const READONLY: &[&str] = &["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sysrq-trigger"];

/// What the runtime is given, and what goes beside it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bundle {
    /// config.json.
    pub config: Value,
    /// Raw lines that mean nothing here, for the task's log.
    pub notes: Vec<String>,
    /// The signal that asks init to power off, when the config names one.
    pub halt_signal: Option<String>,
}

/// The bundle of a container whose volumes are mounted below `folder`.
pub fn bundle(
    id: GuestId,
    config: &GuestConfig,
    folder: &Path,
    facts: &Facts,
) -> Result<Bundle, Error> {
    let features = config.properties("features")?.unwrap_or_default();
    let mut namespaces = vec!["pid", "network", "ipc", "uts", "mount", "cgroup"];
    let (devices, rules) = devices::all(config, facts)?;
    let mut resources = resources(config);
    resources["devices"] = json!(rules);
    let mut linux = json!({
        "cgroupsPath": Group::new(format!("ct-{id}")).path(),
        "devices": devices,
        "resources": resources,
    });
    let mut annotations = json!({});
    let maps = maps(id, config)?;
    if let Some(maps) = &maps {
        namespaces.insert(0, "user");
        linux["uidMappings"] = maps.uids();
        linux["gidMappings"] = maps.gids();
        annotations["dev.atoll.rootfs.idmap"] = json!("container");
    }
    let ttys = terminal::ttys(config);
    if ttys > 0 {
        annotations["dev.atoll.terminals"] = json!(ttys.to_string());
    }
    let is_image = !facts.layers.is_empty();
    let rootfs = match is_image {
        true => image::MERGED,
        false => "rootfs",
    };
    if is_image {
        let layers = facts.layers.iter().map(|path| path.to_string_lossy());
        let layers = layers.collect::<Vec<_>>().join(":");
        annotations["dev.atoll.rootfs.lower"] = json!(layers);
        annotations["dev.atoll.rootfs.upper"] = json!(folder.join("rootfs").to_string_lossy());
    }
    linux["namespaces"] = namespaces
        .iter()
        .map(|kind| json!({ "type": kind }))
        .collect();
    // A container in the container needs an unmasked proc to mount its own.
    if !features.is_set("nesting") {
        linux["maskedPaths"] = json!(MASKED);
        linux["readonlyPaths"] = json!(READONLY);
    }
    // PVE's rule: a privileged one may always.
    let listener = folder.join("mknod");
    let asks = mounts::makes_nodes(config)?;
    if asks {
        annotations["dev.atoll.mknod"] = json!("1");
    }
    linux["seccomp"] = seccomp::filter(&seccomp::Allowed {
        keyctl: features.is_set("keyctl") || !is_unprivileged(config),
        mknod: asks.then_some(listener.as_path()),
    });
    let root = config.properties("rootfs")?.unwrap_or_default();
    let bundle = json!({
        "ociVersion": "1.2.0",
        "hostname": short_hostname(id, config),
        "root": { "path": rootfs, "readonly": root.is_set("ro") },
        "annotations": annotations,
        "process": process(config),
        "mounts": mounts::all(config, folder, facts, maps.as_ref())?,
        "linux": linux,
    });
    let mut bundle = lxc::apply(&config.current.raw, id, bundle, facts)?;
    if maps.is_none() {
        bundle.notes.extend(idle_maps(config)?);
    }
    Ok(bundle)
}

/// Says that a privileged container's mount points have no maps: its ids are the host's.
fn idle_maps(config: &GuestConfig) -> Result<Vec<String>, Error> {
    let points = mounts::volumes(config)?.into_iter();
    let mapped = points.filter(|point| point.idmap.is_some());
    let note = |point: Mount| format!("{}: idmap: no effect in a privileged container", point.key);
    Ok(mapped.map(note).collect())
}

/// The maps of an unprivileged container's ids: its own range, or what its `lxc.idmap` lines say.
pub fn maps(id: GuestId, config: &GuestConfig) -> Result<Option<Maps>, Error> {
    if let Some(maps) = lxc::id_maps(&config.current.raw)? {
        return Ok(Some(maps));
    }
    if !is_unprivileged(config) {
        return Ok(None);
    }
    let range = vec![Span {
        from: 0,
        to: idmap::base(id)?,
        count: idmap::SIZE,
    }];
    Ok(Some(Maps {
        users: range.clone(),
        groups: range,
    }))
}

/// Whether root in the container is nobody on the host.
pub fn is_unprivileged(config: &GuestConfig) -> bool {
    config.is_set("unprivileged") || lxc::maps_ids(&config.current.raw)
}

/// CPUs that the container may use, and of which its load is a fraction; none when unlimited.
pub fn cpu_limit(config: &GuestConfig) -> Option<f64> {
    let number = |key: &str| config.number::<f64>(key).filter(|n| *n > 0.0);
    match (number("cores"), number("cpulimit")) {
        (Some(cores), Some(limit)) => Some(cores.min(limit)),
        (cores, limit) => cores.or(limit),
    }
}

/// Memory limit in MiB.
pub fn memory_mib(config: &GuestConfig) -> u64 {
    config.number("memory").unwrap_or(MEMORY_MIB)
}

/// Swap limit in MiB.
pub fn swap_mib(config: &GuestConfig) -> u64 {
    config.number("swap").unwrap_or(SWAP_MIB)
}

/// Name of the container: its config's, or one made from its number.
pub fn hostname(id: GuestId, config: &GuestConfig) -> String {
    config
        .get("hostname")
        .map_or_else(|| format!("CT{id}"), str::to_owned)
}

fn short_hostname(id: GuestId, config: &GuestConfig) -> String {
    let name = hostname(id, config);
    name.split('.').next().unwrap_or_default().to_owned()
}

fn process(config: &GuestConfig) -> Value {
    let own = config.get("env").unwrap_or_default().split('\0');
    let own: Vec<&str> = own.filter(|text| !text.is_empty()).collect();
    let name = |text: &str| text.split('=').next().unwrap_or_default().to_owned();
    // The first of a name is what programs see.
    let is_usual = |text: &&&str| !own.iter().any(|other| name(other) == name(text));
    let terminals = terminal::announced(config);
    let usual: Vec<&str> = ENVIRONMENT
        .iter()
        .copied()
        .chain(terminals.as_deref())
        .collect();
    let env: Vec<&str> = usual.iter().filter(is_usual).chain(&own).copied().collect();
    let init = config.get("entrypoint").unwrap_or(INIT);
    json!({
        "terminal": terminal::has_console(config),
        "consoleSize": { "width": 80, "height": 24 },
        "user": { "uid": 0, "gid": 0 },
        "args": lxc::words(init),
        "env": env,
        "cwd": "/",
        "noNewPrivileges": false,
        "capabilities": { "bounding": CAPABILITIES, "effective": CAPABILITIES, "permitted": CAPABILITIES },
    })
}

/// Limits: those that can change while it runs.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "a quota of at most some thousand CPUs, rounded to microseconds"
)]
pub fn resources(config: &GuestConfig) -> Value {
    let memory = memory_mib(config) << 20;
    let swap = swap_mib(config) << 20;
    let weight: u64 = config.number("cpuunits").unwrap_or(WEIGHT_USUAL);
    let shares = (weight * SHARES_USUAL / WEIGHT_USUAL).max(SHARES_MIN);
    let mut cpu = json!({ "shares": shares, "period": CPU_PERIOD_US });
    if let Some(limit) = cpu_limit(config) {
        cpu["quota"] = json!((limit * CPU_PERIOD_US as f64) as u64);
    }
    json!({
        // OCI counts memory and swap together in "swap".
        "memory": { "limit": memory, "swap": memory + swap },
        "cpu": cpu,
        "pids": { "limit": PIDS_MAX },
    })
}

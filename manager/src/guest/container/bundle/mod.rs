// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Config to Spec for containers: the OCI `config.json` of the bundle, by pure functions.

use std::path::Path;

use serde_json::{Value, json};

use crate::error::Error;
use crate::guest::cgroup::Group;
use crate::guest::config::GuestConfig;
use crate::guest::container::idmap;
use crate::guest::container::setup::{Addressing, Card, Identity};
use crate::id::GuestId;
use crate::network::link::{Attachment, Inside};
use crate::schema::Properties;

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

/// One volume of a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// Key of the config, which is also the name of the folder where the volume is mounted on the host.
    pub key: String,
    /// The volume.
    pub volume: String,
    /// Where it is in the container.
    pub destination: String,
    /// The container may not write.
    pub readonly: bool,
}

/// Every volume of a container: its root first, then the mount points by number.
pub fn volumes(config: &GuestConfig) -> Result<Vec<Mount>, Error> {
    let mut mounts = Vec::new();
    let points = config.family("mp[n]").into_iter().map(|(key, _)| key);
    for key in std::iter::once("rootfs").chain(points) {
        let point = config.properties(key)?.unwrap_or_default();
        mounts.push(Mount {
            key: key.to_owned(),
            volume: point.get("volume").unwrap_or_default().to_owned(),
            destination: point.get("mp").unwrap_or("/").to_owned(),
            readonly: point.is_set("ro"),
        });
    }
    Ok(mounts)
}

/// The whole config.json of a container whose volumes are mounted below `folder`.
pub fn bundle(id: GuestId, config: &GuestConfig, folder: &Path) -> Result<Value, Error> {
    let unprivileged = is_unprivileged(config);
    let features = config.properties("features")?.unwrap_or_default();
    let mut namespaces = vec!["pid", "network", "ipc", "uts", "mount", "cgroup"];
    let mut linux = json!({
        "cgroupsPath": Group::new(format!("ct-{id}")).path(),
        "devices": [],
        "resources": all_resources(config),
    });
    let mut annotations = json!({});
    if unprivileged {
        namespaces.insert(0, "user");
        let range = json!([{ "containerID": 0, "hostID": idmap::base(id)?, "size": idmap::SIZE }]);
        linux["uidMappings"] = range.clone();
        linux["gidMappings"] = range;
        annotations["dev.atoll.rootfs.idmap"] = json!("container");
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
    Ok(json!({
        "ociVersion": "1.2.0",
        "hostname": short_hostname(id, config),
        "root": { "path": "rootfs", "readonly": false },
        "annotations": annotations,
        "process": process(),
        "mounts": mounts(config, folder)?,
        "linux": linux,
    }))
}

/// Whether root in the container is nobody on the host.
pub fn is_unprivileged(config: &GuestConfig) -> bool {
    config.is_set("unprivileged")
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

/// Network cards: number, what the host's end is connected to, and the container's end.
pub fn cards(config: &GuestConfig) -> Result<Vec<(u16, Attachment, Inside)>, Error> {
    let mut cards = Vec::new();
    for (key, _) in config.family("net[n]") {
        let card = config.properties(key)?.unwrap_or_default();
        let index = index_of(key);
        let mac = card
            .get("hwaddr")
            .ok_or_else(|| Error::refused(format!("{key}: no 'hwaddr'")))?;
        let (addresses, gateways) = [("ip", "gw"), ("ip6", "gw6")]
            .into_iter()
            .filter_map(|(ip, gateway)| match addressing(&card, ip, gateway) {
                Addressing::Static { address, gateway } => Some((address, gateway)),
                _ => None,
            })
            .unzip::<_, _, Vec<_>, Vec<_>>();
        let attachment = Attachment {
            bridge: card.get("bridge").map(str::to_owned),
            mtu: card.number("mtu"),
            link_down: card.is_set("link_down"),
            multi_queue: false,
        };
        let inside = Inside {
            name: name_of(&card, key),
            mac: mac.to_owned(),
            addresses,
            gateways: gateways.into_iter().flatten().collect(),
        };
        cards.push((index, attachment, inside));
    }
    Ok(cards)
}

/// What the container's files say about it. `resolver` is the node's own name server, used when the config has none.
pub fn identity(
    id: GuestId,
    config: &GuestConfig,
    resolver: Option<&str>,
) -> Result<Identity, Error> {
    let words = |key: &str| -> Vec<String> {
        let text = config.get(key).unwrap_or_default();
        text.split_whitespace().map(str::to_owned).collect()
    };
    let mut cards = Vec::new();
    for (key, _) in config.family("net[n]") {
        let card = config.properties(key)?.unwrap_or_default();
        cards.push(Card {
            name: name_of(&card, key),
            ipv4: addressing(&card, "ip", "gw"),
            ipv6: addressing(&card, "ip6", "gw6"),
        });
    }
    let mut nameservers = words("nameserver");
    // A card with DHCP learns its name server there.
    if nameservers.is_empty()
        && cards
            .iter()
            .any(|c| matches!(c.ipv4, Addressing::Static { .. }))
    {
        nameservers.extend(resolver.map(str::to_owned));
    }
    Ok(Identity {
        hostname: hostname(id, config),
        cards,
        nameservers,
        search_domains: words("searchdomain"),
    })
}

/// Name of a card in the container.
fn name_of(card: &Properties, key: &str) -> String {
    let name = card.get("name").map(str::to_owned);
    name.unwrap_or_else(|| format!("eth{}", index_of(key)))
}

/// Number of a card, from a key that the family's table has checked.
fn index_of(key: &str) -> u16 {
    key.trim_start_matches("net").parse().unwrap_or_default()
}

fn addressing(card: &Properties, ip: &str, gateway: &str) -> Addressing {
    match card.get(ip) {
        None | Some("manual") => Addressing::Manual,
        Some("dhcp") => Addressing::Dhcp,
        Some("auto") => Addressing::Auto,
        Some(address) => Addressing::Static {
            address: address.to_owned(),
            gateway: card.get(gateway).map(str::to_owned),
        },
    }
}

fn hostname(id: GuestId, config: &GuestConfig) -> String {
    config
        .get("hostname")
        .map_or_else(|| format!("CT{id}"), str::to_owned)
}

fn short_hostname(id: GuestId, config: &GuestConfig) -> String {
    let name = hostname(id, config);
    name.split('.').next().unwrap_or_default().to_owned()
}

fn process() -> Value {
    let env = [
        "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "TERM=linux",
        // systemd's container interface: the word makes it leave the host's hardware alone.
        "container=lxc",
    ];
    json!({
        "terminal": true,
        "consoleSize": { "width": 80, "height": 24 },
        "user": { "uid": 0, "gid": 0 },
        "args": ["/sbin/init"],
        "env": env,
        "cwd": "/",
        "noNewPrivileges": false,
        "capabilities": { "bounding": CAPABILITIES, "effective": CAPABILITIES, "permitted": CAPABILITIES },
    })
}

fn mounts(config: &GuestConfig, folder: &Path) -> Result<Value, Error> {
    let mount = |destination: &str, kind: &str, source: &str, options: &str| {
        let options: Vec<&str> = options.split(',').collect();
        json!({ "destination": destination, "type": kind, "source": source, "options": options })
    };
    let mut mounts = vec![
        mount("/proc", "proc", "proc", "nosuid,noexec,nodev"),
        mount(
            "/dev",
            "tmpfs",
            "tmpfs",
            "nosuid,strictatime,mode=755,size=65536k",
        ),
        mount(
            "/dev/pts",
            "devpts",
            "devpts",
            "nosuid,noexec,newinstance,ptmxmode=0666,mode=0620,gid=5",
        ),
        mount("/dev/shm", "tmpfs", "shm", "nosuid,nodev,mode=1777"),
        mount("/dev/mqueue", "mqueue", "mqueue", "nosuid,noexec,nodev"),
        mount("/sys", "sysfs", "sysfs", "nosuid,noexec,nodev,ro"),
        mount(
            "/sys/fs/cgroup",
            "cgroup",
            "cgroup",
            "nosuid,noexec,nodev,relatime,rw",
        ),
        mount("/run", "tmpfs", "tmpfs", "nosuid,nodev,mode=755"),
    ];
    for volume in volumes(config)?.iter().skip(1) {
        let access = if volume.readonly { "ro" } else { "rw" };
        let map = if is_unprivileged(config) {
            ",idmap"
        } else {
            ""
        };
        let source = folder.join(&volume.key);
        let options = format!("rbind,{access}{map}");
        mounts.push(mount(
            &volume.destination,
            "bind",
            &source.to_string_lossy(),
            &options,
        ));
    }
    Ok(Value::Array(mounts))
}

fn all_resources(config: &GuestConfig) -> Value {
    let mut all = resources(config);
    // The runtime adds the devices that every container has (null, zero, random, tty, ptmx).
    all["devices"] = json!([{ "allow": false, "access": "rwm" }]);
    all
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::GuestKind;

    fn config(text: &str) -> GuestConfig {
        GuestConfig::parse(GuestKind::Container, text)
    }

    fn built(text: &str) -> Value {
        let id = "101".parse().unwrap();
        bundle(id, &config(text), Path::new("/run/ct-101")).unwrap()
    }

    #[test]
    fn an_unprivileged_container_has_its_own_range() {
        let bundle = built(
            "unprivileged: 1\nhostname: web.example.org\nmemory: 256\nswap: 0\ncores: 2\ncpulimit: 1.5\n",
        );
        assert_eq!(bundle["linux"]["uidMappings"][0]["hostID"], 1_065_536);
        assert_eq!(bundle["annotations"]["dev.atoll.rootfs.idmap"], "container");
        assert_eq!(bundle["linux"]["namespaces"][0]["type"], "user");
        assert_eq!(bundle["hostname"], "web");
        let resources = &bundle["linux"]["resources"];
        assert_eq!(
            resources["memory"],
            json!({ "limit": 256 << 20, "swap": 256 << 20 })
        );
        assert_eq!(resources["cpu"]["quota"], 150_000);
        assert_eq!(resources["cpu"]["shares"], 1024);
        assert_eq!(resources["devices"][0]["allow"], false);
        assert_eq!(bundle["linux"]["maskedPaths"], json!(MASKED));
    }

    #[test]
    fn a_privileged_one_says_so() {
        let bundle = built("unprivileged: 0\nfeatures: nesting=1\n");
        assert_eq!(bundle["linux"]["uidMappings"], Value::Null);
        assert_eq!(bundle["annotations"], json!({}));
        assert_eq!(bundle["hostname"], "CT101");
        assert_eq!(bundle["linux"]["maskedPaths"], Value::Null);
        assert_eq!(bundle["linux"]["resources"]["cpu"]["quota"], Value::Null);
    }

    #[test]
    fn mount_points_are_mapped_too() {
        let mounts = built(
            "unprivileged: 1\nrootfs: local:101/vm-101-disk-0.raw\nmp0: local:101/vm-101-disk-1.raw,mp=/srv,ro=1\n",
        );
        let last = mounts["mounts"].as_array().unwrap().last().unwrap().clone();
        assert_eq!(
            last,
            json!({ "destination": "/srv", "type": "bind", "source": "/run/ct-101/mp0", "options": ["rbind", "ro", "idmap"] })
        );
    }

    #[test]
    fn cards_have_two_ends() {
        let config = config(
            "net0: name=eth0,bridge=vmbr0,hwaddr=BC:24:11:00:00:01,ip=10.0.0.2/24,gw=10.0.0.1\n\
             net1: name=lan,bridge=vmbr1,hwaddr=BC:24:11:00:00:02,ip=dhcp\n",
        );
        let cards = cards(&config).unwrap();
        assert_eq!(cards[0].1.bridge.as_deref(), Some("vmbr0"));
        assert_eq!(cards[0].2.addresses, ["10.0.0.2/24"]);
        assert_eq!(cards[0].2.gateways, ["10.0.0.1"]);
        assert_eq!(
            (cards[1].2.name.as_str(), cards[1].2.addresses.len()),
            ("lan", 0)
        );
        let identity = identity("101".parse().unwrap(), &config, Some("10.0.0.1")).unwrap();
        assert_eq!(identity.nameservers, ["10.0.0.1"]);
        assert_eq!(identity.cards[1].ipv4, Addressing::Dhcp);
    }
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Config to Spec for virtual machines: one pure function. Names became paths before (`volumes` says which).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use atoll_vmm_protocol::cpu::{self, CpuSpec};
use atoll_vmm_protocol::services::{
    BalloonSpec, FaultAction, GuestServices, MemoryBacking, PortSpec, WatchdogSpec,
};
use atoll_vmm_protocol::spec::{ConsoleSpec, MachineSpec, NetLimits, NetSpec, Profile};

use super::{boot, drives};
use crate::error::Error;
use crate::guest::config::GuestConfig;
use crate::id::GuestId;
use crate::network::link::{Attachment, tap_name};
use crate::network::vlan::Vlans;
use crate::schema::Properties;

/// Memory when the config's value cannot be read, in MiB; its table has the same default.
const MEMORY_MIB: u64 = 512;

/// The guest agent's channel, by the name that QEMU gave it.
const AGENT_PORT: &str = "org.qemu.guest_agent.0";

/// Where things of one VM are, found before the spec is made.
#[derive(Debug, Clone, Default)]
pub struct Places {
    /// Path of every volume that the config names.
    pub volumes: BTreeMap<String, PathBuf>,
    /// The VM's run folder.
    pub run_folder: PathBuf,
    /// Folder of the firmware's files.
    pub firmware: PathBuf,
}

impl Places {
    /// Where a volume is.
    pub fn find(&self, volume: &str) -> Result<PathBuf, Error> {
        let path = self.volumes.get(volume).cloned();
        path.ok_or_else(|| Error::refused(format!("volume '{volume}' does not exist")))
    }
}

/// Volumes that must be found on this node before the VM can start.
pub fn volumes(config: &GuestConfig) -> Result<Vec<String>, Error> {
    let boot = ["kernel", "initrd"];
    let boot = boot.into_iter().filter_map(|key| config.get(key));
    let mut volumes: Vec<String> = boot.map(str::to_owned).collect();
    volumes.extend(boot::variables(config));
    let drives = drives::drives(config)?.into_iter();
    volumes.extend(drives.filter_map(|drive| drive.volume));
    Ok(volumes)
}

/// One network card of a config.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Card {
    /// Its key.
    pub key: String,
    /// Name of its tap.
    pub tap: String,
    /// What the tap is connected to.
    pub attachment: Attachment,
    /// MAC address of the guest's end.
    pub mac: Option<String>,
    /// Pairs of queues.
    pub queue_pairs: Option<u16>,
    /// Most that it may carry.
    pub limits: NetLimits,
}

impl Card {
    /// The card that a key's value describes.
    pub fn new(id: GuestId, key: &str, card: &Properties) -> Result<Self, Error> {
        let index = key.trim_start_matches("net").parse().unwrap_or_default();
        Ok(Self {
            key: key.to_owned(),
            tap: tap_name(id, index),
            attachment: Attachment {
                card: key.to_owned(),
                bridge: card.get("bridge").map(str::to_owned),
                vlans: Vlans::new(key, card.get("tag"), card.get("trunks"))?,
                // 1 stands for the bridge's own.
                mtu: card.number("mtu").filter(|mtu| *mtu > 1),
                link_down: card.is_set("link_down"),
                multi_queue: card.number("queues").is_some_and(|pairs: u16| pairs > 1),
                // The machine does it.
                rate: None,
            },
            mac: card.get("macaddr").map(str::to_owned),
            queue_pairs: card.number("queues").filter(|pairs| *pairs > 1),
            limits: net_limits(card),
        })
    }
}

/// Network cards by number.
pub fn cards(id: GuestId, config: &GuestConfig) -> Result<Vec<Card>, Error> {
    let keys = config.family("net[n]").into_iter();
    let cards = keys.map(|(key, _)| {
        let card = config.properties(key)?.unwrap_or_default();
        Card::new(id, key, &card)
    });
    cards.collect()
}

/// Most that a card may carry: its `rate`, each way.
pub fn net_limits(card: &Properties) -> NetLimits {
    let rate = card.number("rate").map_or(0, drives::bytes_of_mib);
    NetLimits {
        receive_bytes_per_second: rate,
        send_bytes_per_second: rate,
        ..NetLimits::default()
    }
}

/// Channels and the balloon.
fn services(config: &GuestConfig, run_folder: &Path) -> Result<GuestServices, Error> {
    let agent = config.properties("agent")?.unwrap_or_default();
    let port = PortSpec {
        name: AGENT_PORT.to_owned(),
        path: agent_socket(run_folder),
    };
    let has_balloon = config.number("balloon") != Some(0_u64);
    Ok(GuestServices {
        ports: agent
            .is_set("enabled")
            .then_some(port)
            .into_iter()
            .collect(),
        balloon: has_balloon.then(BalloonSpec::default),
        watchdog: watchdog(config)?,
        memory_backing: match config.get("hugepages") {
            None => MemoryBacking::Anonymous,
            Some("1024") => MemoryBacking::Hugepages1G,
            Some(_) => MemoryBacking::Hugepages2M,
        },
        ..GuestServices::default()
    })
}

fn watchdog(config: &GuestConfig) -> Result<Option<WatchdogSpec>, Error> {
    let Some(watchdog) = config.properties("watchdog")? else {
        return Ok(None);
    };
    let action = match watchdog.get("action") {
        Some("shutdown") => FaultAction::Shutdown,
        Some("poweroff") => FaultAction::Poweroff,
        Some("pause") => FaultAction::Pause,
        Some("none") => FaultAction::None,
        _ => FaultAction::Reset,
    };
    Ok(Some(WatchdogSpec { action }))
}

/// Socket of the guest agent's channel.
pub fn agent_socket(run_folder: &Path) -> PathBuf {
    run_folder.join("agent.sock")
}

/// CPUs that the guest sees.
pub fn cpu_count(config: &GuestConfig) -> u64 {
    let number = |key: &str| config.number(key).unwrap_or(1_u64);
    number("sockets").saturating_mul(number("cores"))
}

/// RAM in MiB.
pub fn memory_mib(config: &GuestConfig) -> u64 {
    let memory = config.properties("memory").ok().flatten();
    let current = memory.and_then(|memory| memory.number("current"));
    current
        .or_else(|| config.number("memory"))
        .unwrap_or(MEMORY_MIB)
}

/// Socket of the serial console.
pub fn serial_socket(run_folder: &Path) -> PathBuf {
    run_folder.join("serial.sock")
}

/// The whole machine.
pub fn resolve(id: GuestId, config: &GuestConfig, places: &Places) -> Result<MachineSpec, Error> {
    let way = boot::way(id, config)?;
    let machine = MachineSpec::new(boot::spec(id, config, places)?);
    let name = config.get("name").map(str::to_owned);
    Ok(MachineSpec {
        name: name.unwrap_or_else(|| format!("VM{id}")),
        cpu_count: u8::try_from(cpu_count(config))
            .map_err(|_| Error::refused(format!("VM {id}: at most 255 CPUs are possible")))?,
        cpu: cpu(config)?,
        memory_mib: memory_mib(config),
        identity: boot::identity(config)?,
        generation_id: config
            .get("vmgenid")
            .filter(|id| *id != "0")
            .map(str::to_owned),
        disks: drives::specs(config, places, way)?,
        nets: nets(id, config, way)?,
        serial: ConsoleSpec::Socket(serial_socket(&places.run_folder)),
        services: services(config, &places.run_folder)?,
        profile: match is_hidden(config)? {
            // The other board has no clock but KVM's.
            true => Profile::Pc,
            false => machine.profile,
        },
        ..machine
    })
}

/// What the guest sees of the CPU.
fn cpu(config: &GuestConfig) -> Result<CpuSpec, Error> {
    let cpu = config.properties("cpu")?.unwrap_or_default();
    let flags = cpu.get("flags").unwrap_or_default().split(';');
    Ok(CpuSpec {
        model: match cpu.get("cputype") {
            None | Some("max") => cpu::HOST.to_owned(),
            Some(model) => model.to_owned(),
        },
        flags: flags
            .filter(|flag| !flag.is_empty())
            .map(str::to_owned)
            .collect(),
        hidden: is_hidden(config)?,
        phys_bits: cpu.number("phys-bits"),
        models: Vec::new(),
    })
}

fn is_hidden(config: &GuestConfig) -> Result<bool, Error> {
    let cpu = config.properties("cpu")?.unwrap_or_default();
    Ok(cpu.is_set("hidden"))
}

fn nets(id: GuestId, config: &GuestConfig, way: boot::Way) -> Result<Vec<NetSpec>, Error> {
    let order = match way {
        boot::Way::Firmware => boot::order(config)?,
        boot::Way::Kernel => Vec::new(),
    };
    let place = |key: &str| order.iter().position(|name| name == key);
    let cards = cards(id, config)?;
    let nets = cards.iter().map(|card| NetSpec {
        boot_index: place(&card.key).and_then(|place| u16::try_from(place).ok()),
        ..net(&card.key, card)
    });
    Ok(nets.collect())
}

/// A card of the spec; not in the boot order.
pub fn net(key: &str, card: &Card) -> NetSpec {
    NetSpec {
        id: Some(key.to_owned()),
        mac: card.mac.clone(),
        mtu: card.attachment.mtu,
        queue_pairs: card.queue_pairs,
        link_down: card.attachment.link_down,
        limits: card.limits,
        ..NetSpec::tap(card.tap.clone())
    }
}

#[cfg(test)]
mod tests {
    use atoll_vmm_protocol::spec::{BootSpec, CacheMode, DiskBus, DiskSpec};

    use super::*;
    use crate::id::GuestKind;

    fn config(text: &str) -> GuestConfig {
        GuestConfig::parse(GuestKind::Vm, text)
    }

    fn id() -> GuestId {
        "100".parse().unwrap()
    }

    fn places(config: &GuestConfig) -> Places {
        let path = |volume: &String| Path::new("/s").join(volume.replace(':', "/"));
        Places {
            volumes: volumes(config)
                .unwrap()
                .iter()
                .map(|v| (v.clone(), path(v)))
                .collect(),
            run_folder: PathBuf::from("/r/vm-100"),
            firmware: PathBuf::from("/f"),
        }
    }

    #[test]
    fn a_whole_machine() {
        let config = config(
            "name: web\ncores: 2\nsockets: 2\nmemory: 2048\nkernel: local:snippets/k\ncmdline: console=ttyS0\n\
             scsi0: local:100/vm-100-disk-0.raw,size=1G\nvirtio1: local:100/vm-100-disk-1.raw,size=1G\n\
             ide2: none,media=cdrom\nboot: order=scsi0\n\
             net0: virtio=BC:24:11:00:00:01,bridge=vmbr0,firewall=1\n",
        );
        let spec = resolve(id(), &config, &places(&config)).unwrap();
        assert_eq!(
            (spec.name.as_str(), spec.cpu_count, spec.memory_mib),
            ("web", 4, 2048)
        );
        let disks: Vec<_> = spec
            .disks
            .iter()
            .map(|disk| disk.path.to_str().unwrap())
            .collect();
        assert_eq!(
            disks,
            [
                "/s/local/100/vm-100-disk-0.raw",
                "/s/local/100/vm-100-disk-1.raw",
                ""
            ],
            "the boot order comes first"
        );
        assert_eq!(spec.nets[0].tap, "tap100i0");
        assert_eq!(spec.nets[0].mac.as_deref(), Some("BC:24:11:00:00:01"));
        let kernel = spec.boot.kernel().unwrap();
        assert_eq!(kernel.image, Path::new("/s/local/snippets/k"));
        assert!(!kernel.shared);
        assert_eq!(
            spec.serial,
            ConsoleSpec::Socket(PathBuf::from("/r/vm-100/serial.sock"))
        );
    }

    #[test]
    fn options_reach_the_machine() {
        let config = config(
            "kernel: local:snippets/k\nsharekernel: 1\nagent: 1\nballoon: 0\n\
             scsi0: local:100/vm-100-disk-0.raw,cache=unsafe,discard=on,iops_wr=100,mbps=1.5,mbps_rd=0,mbps_rd_max=9\n\
             virtio0: local:100/vm-100-disk-1.raw,ro=1\n\
             net0: virtio,queues=4,rate=2,link_down=1,mtu=1400\n",
        );
        let spec = resolve(id(), &config, &places(&config)).unwrap();
        let [plain, fast] = &spec.disks[..] else {
            panic!("two disks")
        };
        assert_eq!((plain.cache, plain.readonly), (CacheMode::Writeback, true));
        assert_eq!((fast.cache, fast.discard), (CacheMode::Unsafe, true));
        assert_eq!(fast.limits.bytes_per_second, Some(1_572_864));
        assert_eq!(fast.limits.write_operations_per_second, Some(100));
        let read = (
            fast.limits.read_bytes_per_second,
            fast.limits.read_bytes_burst,
        );
        assert_eq!(read, (None, None));
        let net = &spec.nets[0];
        assert_eq!((net.queue_pairs, net.link_down), (Some(4), true));
        assert_eq!(
            (net.mtu, net.limits.send_bytes_per_second),
            (Some(1400), 2 << 20)
        );
        assert_eq!(spec.services.ports[0].name, AGENT_PORT);
        assert_eq!(spec.services.balloon, None);
        assert!(spec.boot.kernel().unwrap().shared);
    }

    #[test]
    fn a_cards_vlans_are_its_taps() {
        let config = config(
            "net0: virtio,bridge=vmbr0\nnet7: virtio,bridge=vmbr1,tag=5,trunks=9;7-8,rate=2\n",
        );
        let cards = cards(id(), &config).unwrap();
        assert!(cards[0].attachment.vlans.is_default());
        let tagged = &cards[1].attachment;
        assert_eq!((tagged.card.as_str(), tagged.vlans.tag), ("net7", Some(5)));
        assert_eq!(tagged.vlans.trunks, [7..=9]);
        assert_eq!(tagged.rate, None, "the machine limits it");
    }

    #[test]
    fn firmware_boots_what_the_order_says() {
        let config = config(
            "bios: ovmf\nmachine: q35\nefidisk0: local:100/vm-100-disk-9.raw,efitype=4m,size=528K\n\
             vmgenid: 87654321-1234-1234-1234-123456789abc\n\
             smbios1: uuid=12345678-1234-1234-1234-123456789abc\nboot: order=scsi0;ide2;net0\n\
             scsi0: local:100/vm-100-disk-0.raw,cache=none,iothread=1,size=8G\n\
             scsi5: local:100/vm-100-disk-1.raw,ro=1,size=8G\n\
             ide2: local:iso/x.iso,media=cdrom,size=1M\nsata0: none,media=cdrom\n\
             net0: virtio=BC:24:11:00:00:01,bridge=vmbr0\n",
        );
        let spec = resolve(id(), &config, &places(&config)).unwrap();
        assert_eq!(spec.profile, Profile::Pc);
        let BootSpec::Firmware(firmware) = &spec.boot else {
            panic!("firmware boots")
        };
        assert_eq!(firmware.code, Path::new("/f/OVMF_CODE_4M.fd"));
        assert_eq!(firmware.vars, Path::new("/s/local/100/vm-100-disk-9.raw"));
        let disk = |disk: &DiskSpec| (disk.bus, disk.target, disk.boot_index, disk.readonly);
        let disks: Vec<_> = spec.disks.iter().map(disk).collect();
        assert_eq!(
            disks,
            [
                (DiskBus::Scsi, Some(0), Some(0), false),
                (DiskBus::Cdrom, Some(66), Some(1), true),
                (DiskBus::Scsi, Some(5), None, true),
                (DiskBus::Cdrom, Some(72), None, true),
            ]
        );
        assert_eq!(spec.disks[0].cache, CacheMode::None);
        assert_eq!(spec.disks[3].path, Path::new(""), "a drive without a disc");
        assert_eq!(spec.nets[0].boot_index, Some(2));
        assert!(spec.identity.uuid.is_some() && spec.generation_id.is_some());
    }

    #[test]
    fn the_cpu_and_what_else_is_on_the_board() {
        let config = config(
            "kernel: local:snippets/k\ncpu: x86-64-v2-AES,flags=+pcid;-aes,phys-bits=39\nhugepages: 2\n\
             watchdog: i6300esb,action=poweroff\n",
        );
        let spec = resolve(id(), &config, &places(&config)).unwrap();
        let cpu = spec.cpu.to_string();
        assert_eq!(cpu, "x86-64-v2-AES,+pcid,-aes,phys-bits=39");
        assert_eq!(spec.services.memory_backing, MemoryBacking::Hugepages2M);
        let action = spec.services.watchdog.map(|watchdog| watchdog.action);
        assert_eq!(action, Some(FaultAction::Poweroff));
        assert_eq!(spec.profile, Profile::Micro);
        let plain = self::config("kernel: local:snippets/k\ncpu: max,hidden=1\n");
        let spec = resolve(id(), &plain, &places(&plain)).unwrap();
        assert_eq!(
            (spec.cpu.to_string().as_str(), spec.profile),
            ("host,hidden", Profile::Pc)
        );
        assert_eq!(spec.services.watchdog, None);
    }

    #[test]
    fn variables_that_nobody_keeps_last_for_one_run() {
        let config = config("bios: ovmf\n");
        let spec = resolve(id(), &config, &places(&config)).unwrap();
        let BootSpec::Firmware(firmware) = spec.boot else {
            panic!("firmware boots")
        };
        assert_eq!(firmware.vars, Path::new("/r/vm-100/efivars.fd"));
    }

    #[test]
    fn what_cannot_be_started_says_why() {
        let check = |text: &str, expected: &str| {
            let config = config(text);
            let error = resolve(id(), &config, &places(&config))
                .unwrap_err()
                .to_string();
            assert!(error.contains(expected), "{error}");
        };
        let legacy = "VM 100: legacy BIOS boot (bios: seabios, the default) is not offered: set 'bios: ovmf'";
        check("memory: 128\n", legacy);
        check("bios: seabios\n", legacy);
        check(
            "bios: ovmf\nsata0: local:100/vm-100-disk-0.raw\n",
            "sata0: IDE and SATA disks are not offered: give the volume to a key such as scsi0",
        );
        check(
            "kernel: local:snippets/k\ncores: 200\nsockets: 2\n",
            "at most 255",
        );
        check(
            "bios: ovmf\nsharekernel: 1\n",
            "VM 100: 'sharekernel' is for a guest with a 'kernel'",
        );
        check(
            "kernel: local:snippets/k\nsharekernel: 1\nhugepages: 2\n",
            "'sharekernel' and 'hugepages' exclude each other",
        );
    }
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Config keys of virtual machines.

use super::shared::{self, LINK_BRIDGE, NO_VLAN, absent};
use super::{Key, Right};
use crate::access::Privilege::{
    VmConfigCdrom, VmConfigCloudinit, VmConfigCpu, VmConfigHwType, VmConfigMemory, VmConfigNetwork,
    VmConfigOptions,
};
use crate::schema::format::{
    ADDRESS_LIST, DISK_SIZE, DNS_NAME, IPV4, IPV4_CONFIG, IPV6, IPV6_CONFIG, MAC, SEARCH_DOMAINS,
    VOLUME_ID,
};
use crate::schema::{Format, Kind, Param};

use Right::{Drive, Guest};

const LINUX_SOLE: &str =
    "atoll-vmm boots Linux kernels directly, without firmware or a choice of boards.";
const NO_DISPLAY: &str = "There is no display yet; the console is serial.";
const ONE_KIND: &str = "Every disk is a virtio block device here.";
const NO_FIRMWARE: &str = "firmware boot is not available yet: give `kernel`";
const CLOUD_INIT: Right = Right::Either(VmConfigCloudinit, VmConfigCdrom);

/// The keys, in the order of a form: what it is, what it boots, what it has, how it behaves, the rest by name.
pub const VM: &[Key] = &[
    Key::new(
        Param::new("name", Kind::Format(DNS_NAME), "Name, for people."),
        Guest(VmConfigOptions),
    )
    .now(),
    shared::DESCRIPTION,
    shared::TAGS,
    Key::new(
        Param::new(
            "kernel",
            Kind::Format(VOLUME_ID),
            "Linux kernel to boot (bzImage or ELF with PVH entry), a volume of content type snippets such as \
             local:snippets/vmlinuz.",
        ),
        Guest(VmConfigOptions),
    )
    .own(),
    Key::new(
        Param::new(
            "initrd",
            Kind::Format(VOLUME_ID),
            "Initial RAM disk of the kernel, a volume of content type snippets.",
        ),
        Guest(VmConfigOptions),
    )
    .own(),
    Key::new(
        Param::new(
            "cmdline",
            Kind::Text { length_max: 2047 },
            "Command line of the kernel, such as `console=ttyS0 root=/dev/vda`.",
        ),
        Guest(VmConfigOptions),
    )
    .own(),
    Key::new(
        Param::new("memory", MEMORY, "Memory in MiB.").default("512"),
        Guest(VmConfigMemory),
    ),
    Key::new(
        Param::new("cores", Kind::Integer { min: 1, max: 255 }, "vCPUs of each socket.").default("1"),
        Guest(VmConfigCpu),
    ),
    Key::new(
        Param::new(
            "sockets",
            Kind::Integer { min: 1, max: 4 },
            "Sockets; the guest has cores times sockets vCPUs.",
        )
        .default("1"),
        Guest(VmConfigCpu),
    ),
    Key::new(
        Param::new("scsi[n]", DRIVE, "Disk. Every disk is a virtio block device here.").family(31),
        Drive,
    )
    .live(DRIVE_LIVE),
    Key::new(Param::new("virtio[n]", DRIVE, "Disk, a virtio block device.").family(16), Drive)
    .live(DRIVE_LIVE),
    Key::new(
        Param::new("sata[n]", DRIVE, "Disk. Every disk is a virtio block device here.").family(6),
        Drive,
    )
    .live(DRIVE_LIVE),
    Key::new(
        Param::new("ide[n]", DRIVE, "Disk. Every disk is a virtio block device here.").family(4),
        Drive,
    )
    .live(DRIVE_LIVE),
    Key::new(Param::new("net[n]", NET, "Network card.").family(32), Guest(VmConfigNetwork)).live(NET_LIVE),
    Key::new(
        Param::new(
            "serial[n]",
            Kind::Format(SERIAL),
            "Serial port, the console: `socket`. A guest without the key has serial0, too.",
        )
        .family(4),
        Guest(VmConfigHwType),
    ),
    shared::ON_BOOT,
    shared::STARTUP,
    shared::PROTECTION,
    Key::new(
        Param::new("agent", AGENT, "QEMU guest agent in the guest."),
        Guest(VmConfigOptions),
    ),
    Key::new(Param::new("boot", BOOT, "Boot order."), Guest(VmConfigOptions)).no_effect(LINUX_SOLE),
    Key::new(
        Param::new("bootdisk", Kind::Text { length_max: 16 }, "Disk to boot from."),
        Guest(VmConfigOptions),
    )
    .no_effect(LINUX_SOLE),
    Key::new(Param::new("ostype", OS_TYPE, "Guest's operating system."), Guest(VmConfigOptions))
        .no_effect(LINUX_SOLE),
    Key::new(
        Param::new("scsihw", SCSI_HARDWARE, "SCSI controller.").default("lsi"),
        Guest(VmConfigHwType),
    )
    .no_effect(ONE_KIND),
    Key::new(
        Param::new("bios", Kind::Format(BIOS), "Firmware.").default("seabios"),
        Guest(VmConfigOptions),
    )
    .no_effect(LINUX_SOLE),
    Key::new(
        Param::new("cpu", CPU, "CPU model."),
        Guest(VmConfigCpu),
    )
    .no_effect("The guest sees the host's CPU."),
    Key::new(
        Param::new("machine", Kind::Text { length_max: 128 }, "Board."),
        Guest(VmConfigHwType),
    )
    .no_effect(LINUX_SOLE),
    Key::new(
        Param::new("vga", Kind::Text { length_max: 128 }, "Display."),
        Guest(VmConfigHwType),
    )
    .no_effect(NO_DISPLAY),
    Key::new(
        Param::new("rng0", Kind::Text { length_max: 128 }, "Random number generator."),
        Guest(VmConfigHwType),
    )
    .no_effect("Every guest has a virtio random number generator."),
    Key::new(
        Param::new("numa", Kind::Boolean, "Several memory nodes.").default("0"),
        Guest(VmConfigCpu),
    )
    .no_effect("The guest has one memory node."),
    Key::new(
        Param::new(
            "balloon",
            Kind::Integer { min: 0, max: 1 << 30 },
            "0: no memory balloon. Otherwise the guest tells the host of its free pages; nothing takes more yet.",
        ),
        Guest(VmConfigMemory),
    ),
    Key::new(
        Param::new("shares", Kind::Integer { min: 0, max: 50_000 }, "Share in ballooning.").default("1000"),
        Guest(VmConfigMemory),
    )
    .no_effect("Nothing takes memory from guests yet, so there are no shares."),
    Key::new(
        Param::new("acpi", Kind::Boolean, "ACPI.").default("1"),
        Guest(VmConfigHwType),
    )
    .no_effect("ACPI is always there."),
    Key::new(
        Param::new("kvm", Kind::Boolean, "Hardware virtualization.").default("1"),
        Guest(VmConfigHwType),
    )
    .no_effect("Guests always run on KVM."),
    Key::new(
        Param::new("tablet", Kind::Boolean, "Pointing device.").default("1"),
        Guest(VmConfigHwType),
    )
    .no_effect(NO_DISPLAY),
    Key::new(
        Param::new("keyboard", Kind::Text { length_max: 8 }, "Keyboard layout."),
        Guest(VmConfigOptions),
    )
    .no_effect(NO_DISPLAY),
    Key::new(
        Param::new("hotplug", Kind::Text { length_max: 128 }, "What may be changed while it runs."),
        Guest(VmConfigOptions),
    )
    .no_effect("Devices change at the next start."),
    Key::new(
        Param::new("localtime", Kind::Boolean, "Clock in local time."),
        Guest(VmConfigOptions),
    )
    .no_effect("The guest takes the time from the kernel's clock."),
    Key::new(
        Param::new("reboot", Kind::Boolean, "Allow reboots.").default("1"),
        Guest(VmConfigOptions),
    )
    .no_effect("The guest may reboot."),
    Key::new(
        Param::new("autostart", Kind::Boolean, "Start it again after a crash.").default("0"),
        Guest(VmConfigOptions),
    )
    .no_effect("PVE ignores it, too."),
    Key::new(
        Param::new("smbios1", Kind::Text { length_max: 512 }, "SMBIOS fields."),
        Guest(VmConfigHwType),
    )
    .no_effect("There are no SMBIOS tables without firmware."),
    Key::new(
        Param::new("vmgenid", Kind::Text { length_max: 36 }, "Generation id; 1 makes a new one."),
        Guest(VmConfigOptions),
    )
    .no_effect("The device is not there yet."),
    Key::new(
        Param::new(
            "cpulimit",
            Kind::Number { min: 0.0, max: 255.0 },
            "Host CPUs it may use in all; 0 is no limit.",
        )
        .default("0"),
        Guest(VmConfigCpu),
    )
    .now(),
    Key::new(
        Param::new("cpuunits", Kind::Integer { min: 1, max: 262_144 }, "Weight against other guests.").default("100"),
        Guest(VmConfigCpu),
    )
    .now(),
    Key::new(
        Param::new("unused[n]", Kind::Format(VOLUME_ID), "Volume that belongs to the guest and is not attached.")
            .family(256),
        Drive,
    )
    .server(),
    shared::LOCK,
    Key::new(
        Param::new("meta", Kind::Text { length_max: 512 }, "When and by what it was made."),
        Guest(VmConfigOptions),
    )
    .server(),
    shared::TEMPLATE,
    shared::PARENT,
    Key::new(
        Param::new("nameserver", Kind::Format(ADDRESS_LIST), "Name servers, for cloud-init."),
        Right::Either(VmConfigCloudinit, VmConfigNetwork),
    ),
    Key::new(
        Param::new("searchdomain", Kind::Format(SEARCH_DOMAINS), "Search domain, for cloud-init."),
        Right::Either(VmConfigCloudinit, VmConfigNetwork),
    ),
    Key::new(
        Param::new("ciuser", Kind::Text { length_max: 64 }, "User, for cloud-init; the image's own when not given."),
        CLOUD_INIT,
    ),
    Key::new(
        Param::new("cipassword", Kind::Text { length_max: 1024 }, "Password of that user; only its hash is kept."),
        CLOUD_INIT,
    ),
    Key::new(
        Param::new("sshkeys", Kind::Text { length_max: 65_536 }, "SSH keys of that user, one a line, percent-encoded."),
        CLOUD_INIT,
    ),
    Key::new(
        Param::new("ciupgrade", Kind::Boolean, "Upgrade packages at the first start.").default("1"),
        CLOUD_INIT,
    ),
    Key::new(
        Param::new("citype", Kind::Choice(&["nocloud"]), "Form of the cloud-init drive.").default("nocloud"),
        CLOUD_INIT,
    ),
    Key::new(
        Param::new("ipconfig[n]", IP_CONFIG, "Addresses of the card of that number, for cloud-init.").family(32),
        Right::Either(VmConfigCloudinit, VmConfigNetwork),
    ),
    Key::unavailable("cicustom", 0, "custom cloud-init files are not available yet: use the other keys"),
    Key::unavailable("efidisk0", 0, NO_FIRMWARE),
    Key::unavailable("tpmstate0", 0, "TPMs are not available yet"),
    Key::unavailable("args", 0, "QEMU arguments mean nothing to atoll-vmm"),
    Key::unavailable("hookscript", 0, "hook scripts are not available yet"),
    Key::unavailable("affinity", 0, "CPU pinning is not available yet"),
    Key::unavailable("vcpus", 0, "CPU hot-plug is not available yet: set `cores`"),
    Key::unavailable("hugepages", 0, "huge pages are not available yet"),
    Key::unavailable("keephugepages", 0, "huge pages are not available yet"),
    Key::unavailable("numa[n]", 8, "memory nodes are not available yet"),
    Key::unavailable("hostpci[n]", 16, "PCI passthrough is not available yet"),
    Key::unavailable("usb[n]", 14, "USB is not available yet"),
    Key::unavailable("virtiofs[n]", 10, "shared directories are not available yet"),
    Key::unavailable("parallel[n]", 3, "parallel ports are not available"),
    Key::unavailable("ivshmem", 0, "shared memory between guests is not available yet"),
    Key::unavailable("audio0", 0, "sound is not available yet"),
    Key::unavailable("watchdog", 0, "the watchdog device is not available yet"),
    Key::unavailable("amd-sev", 0, "encrypted memory is not available yet"),
    Key::unavailable("intel-tdx", 0, "encrypted memory is not available yet"),
    Key::unavailable("spice_enhancements", 0, "there is no display yet; the console is serial"),
    Key::unavailable("freeze", 0, "starting a guest paused is not available yet"),
    Key::unavailable("arch", 0, "guests have the host's architecture"),
];

const MEMORY: Kind = Kind::PropertyString {
    keys: &[Param::new(
        "current",
        Kind::Integer {
            min: 16,
            max: 1 << 24,
        },
        "Memory in MiB.",
    )
    .required()],
    default_key: Some("current"),
    value_key: None,
};

const NET: Kind = Kind::PropertyString {
    keys: &[
        Param::new(
            "model",
            Kind::Choice(&["virtio"]),
            "Kind of card; a bare `virtio=ADDRESS` gives both.",
        )
        .required(),
        Param::new(
            "macaddr",
            Kind::Format(MAC),
            "Its address; made up when it is not given.",
        ),
        LINK_BRIDGE,
        Param::new(
            "firewall",
            Kind::Boolean,
            "Filter its traffic. Without effect: there is no firewall yet.",
        ),
        Param::new("link_down", Kind::Boolean, "Pull the plug."),
        Param::new(
            "mtu",
            Kind::Integer {
                min: 1,
                max: 65_520,
            },
            "Largest packet; 1 is the bridge's.",
        ),
        Param::new(
            "queues",
            Kind::Integer { min: 0, max: 64 },
            "Queue pairs, one a vCPU at best; 1 when it is not given.",
        ),
        absent("tag", NO_VLAN),
        absent("trunks", NO_VLAN),
        rate("rate", "Most MiB a second, each way; 0 is no limit."),
    ],
    default_key: Some("model"),
    value_key: Some("macaddr"),
};

const DRIVE: Kind = Kind::PropertyString {
    keys: &[
        Param::new(
            "file",
            Kind::Format(DRIVE_FILE),
            "The volume; STORAGE:SIZE (in GiB) makes a new one, STORAGE:cloudinit a cloud-init drive; `none` is an empty drive.",
        )
        .required(),
        Param::new("size", Kind::Format(DISK_SIZE), "Size; the server sets it."),
        Param::new("format", Kind::Choice(&["raw"]), "Format of the image."),
        Param::new(
            "media",
            Kind::Choice(&["cdrom", "disk"]),
            "Kind of medium; `cdrom` is read-only.",
        ),
        Param::new("ro", Kind::Boolean, "Read-only."),
        Param::new(
            "cache",
            Kind::Choice(&["none", "writethrough", "writeback", "unsafe", "directsync"]),
            "Cache of the host, `writeback` when it is not given; with `unsafe` a crash of the host loses the disk.",
        ),
        Param::new(
            "aio",
            Kind::Choice(&["native", "threads", "io_uring"]),
            "Without effect: always io_uring.",
        ),
        Param::new(
            "discard",
            Kind::Choice(&["ignore", "on"]),
            "Give back space that the guest frees.",
        ),
        Param::new(
            "iothread",
            Kind::Boolean,
            "Without effect: every queue has its thread.",
        ),
        Param::new(
            "ssd",
            Kind::Boolean,
            "Without effect: virtio block devices do not rotate.",
        ),
        Param::new("backup", Kind::Boolean, "Include it in backups."),
        Param::new("replicate", Kind::Boolean, "Include it in replication."),
        Param::new(
            "serial",
            Kind::Text { length_max: 20 },
            "Serial number that the guest sees.",
        ),
        Param::new(
            "detect_zeroes",
            Kind::Boolean,
            "Writes of zeroes take no space.",
        ),
        Param::new(
            "shared",
            Kind::Boolean,
            "The volume is the same on all nodes.",
        ),
        Param::new("snapshot", Kind::Boolean, "Without effect."),
        absent("import-from", NO_IMPORT),
        rate("mbps", "Most MiB a second, both directions together."),
        rate("mbps_rd", "Most MiB read a second."),
        rate("mbps_wr", "Most MiB written a second."),
        rate("mbps_max", "MiB that may come at once after idleness."),
        rate(
            "mbps_rd_max",
            "MiB that may be read at once after idleness.",
        ),
        rate(
            "mbps_wr_max",
            "MiB that may be written at once after idleness.",
        ),
        count("iops", "Most requests a second, both directions together."),
        count("iops_rd", "Most requests to read a second."),
        count("iops_wr", "Most requests to write a second."),
        count("iops_max", "Requests that may come at once after idleness."),
        count("iops_rd_max", "Requests to read that may come at once."),
        count("iops_wr_max", "Requests to write that may come at once."),
    ],
    default_key: Some("file"),
    value_key: None,
};

const IP_CONFIG: Kind = Kind::PropertyString {
    keys: &[
        Param::new(
            "ip",
            Kind::Format(IPV4_CONFIG),
            "IPv4 address with prefix length, or `dhcp`.",
        ),
        Param::new("gw", Kind::Format(IPV4), "IPv4 gateway."),
        Param::new(
            "ip6",
            Kind::Format(IPV6_CONFIG),
            "IPv6 address with prefix length, `auto` or `dhcp`.",
        ),
        Param::new("gw6", Kind::Format(IPV6), "IPv6 gateway."),
    ],
    default_key: None,
    value_key: None,
};

const NO_IMPORT: Format = Format {
    name: super::UNAVAILABLE,
    check: |_| {
        Err("importing a volume is not available yet: make the disk and write to it".to_owned())
    },
};

/// Properties of a drive that reach a running machine at once.
const DRIVE_LIVE: &[&str] = &[
    "backup",
    "iops",
    "iops_max",
    "iops_rd",
    "iops_rd_max",
    "iops_wr",
    "iops_wr_max",
    "mbps",
    "mbps_max",
    "mbps_rd",
    "mbps_rd_max",
    "mbps_wr",
    "mbps_wr_max",
    "replicate",
];
/// Properties of a card that reach a running machine at once.
const NET_LIVE: &[&str] = &["firewall", "link_down", "rate"];

const fn rate(name: &'static str, what: &'static str) -> Param {
    let kind = Kind::Number {
        min: 0.0,
        max: 1_048_576.0,
    };
    Param::new(name, kind, what)
}

const fn count(name: &'static str, what: &'static str) -> Param {
    let kind = Kind::Integer {
        min: 0,
        max: 1 << 30,
    };
    Param::new(name, kind, what)
}

/// A volume, `none`, or `STORAGE:SIZE`. Paths of the host are not: they would reach around the storage's rights.
const DRIVE_FILE: Format = Format {
    name: "pve-volume-id-or-qm-path",
    check: |text| {
        if text == "none" || (VOLUME_ID.check)(text).is_ok() {
            return Ok(());
        }
        match text {
            "cdrom" => Err("the host's own drive is not available: use an ISO image".to_owned()),
            _ => Err(format!("unable to parse volume ID '{text}'")),
        }
    },
};

const SERIAL: Format = Format {
    name: "pve-qm-serial",
    check: |text| match text {
        "socket" => Ok(()),
        _ => Err("ports of the host are not available: use `socket`".to_owned()),
    },
};

const BIOS: Format = Format {
    name: "pve-qm-bios",
    check: |text| match text {
        "seabios" => Ok(()),
        _ => Err(NO_FIRMWARE.to_owned()),
    },
};

const AGENT: Kind = Kind::PropertyString {
    keys: &[
        Param::new("enabled", Kind::Boolean, "The guest runs it.").required(),
        Param::new("fstrim_cloned_disks", Kind::Boolean, "Trim after a clone."),
        Param::new(
            "freeze-fs-on-backup",
            Kind::Boolean,
            "Freeze file systems in a backup.",
        ),
        Param::new("freeze-fs", Kind::Boolean, "Freeze file systems."),
        Param::new("guest-fsfreeze", Kind::Boolean, "Freeze file systems."),
        Param::new("type", Kind::Choice(&["virtio", "isa"]), "Channel."),
    ],
    default_key: Some("enabled"),
    value_key: None,
};

const BOOT: Kind = Kind::PropertyString {
    keys: &[
        Param::new("legacy", Kind::Text { length_max: 4 }, "PVE's old form."),
        Param::new(
            "order",
            Kind::Text { length_max: 512 },
            "Devices, divided by semicolons.",
        ),
    ],
    default_key: Some("legacy"),
    value_key: None,
};

const OS_TYPE: Kind = Kind::Choice(&[
    "other", "wxp", "w2k", "w2k3", "w2k8", "wvista", "win7", "win8", "win10", "win11", "l24",
    "l26", "solaris",
]);

const SCSI_HARDWARE: Kind = Kind::Choice(&[
    "lsi",
    "lsi53c810",
    "virtio-scsi-pci",
    "virtio-scsi-single",
    "megasas",
    "pvscsi",
]);

const CPU: Kind = Kind::PropertyString {
    keys: &[
        Param::new("cputype", Kind::Text { length_max: 64 }, "Model."),
        Param::new(
            "flags",
            Kind::Text { length_max: 512 },
            "Flags to add and take away.",
        ),
        Param::new("hidden", Kind::Boolean, "Hide KVM."),
        Param::new(
            "hv-vendor-id",
            Kind::Text { length_max: 12 },
            "Hyper-V vendor.",
        ),
        Param::new(
            "level",
            Kind::Integer {
                min: 0,
                max: 1 << 31,
            },
            "CPUID level.",
        ),
        Param::new(
            "phys-bits",
            Kind::Text { length_max: 4 },
            "Physical address bits.",
        ),
        Param::new(
            "guest-phys-bits",
            Kind::Integer { min: 32, max: 64 },
            "Physical address bits of the guest.",
        ),
        Param::new(
            "reported-model",
            Kind::Text { length_max: 64 },
            "Model that the guest sees.",
        ),
    ],
    default_key: Some("cputype"),
    value_key: None,
};

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Config keys of virtual machines.

use super::drive::{DRIVE, DRIVE_LIVE, EFI_DISK, cdrom_only, disk_only, rate};
use super::shared::{self, LINK_BRIDGE, LINK_TAG, LINK_TRUNKS, absent};
use super::{Key, Plug, Right};
use crate::access::Privilege::{
    VmConfigCdrom, VmConfigCloudinit, VmConfigCpu, VmConfigHwType, VmConfigMemory, VmConfigNetwork,
    VmConfigOptions,
};
use crate::schema::format::{
    ADDRESS_LIST, DNS_NAME, IPV4, IPV4_CONFIG, IPV6, IPV6_CONFIG, MAC, SEARCH_DOMAINS, STORAGE_ID,
    VOLUME_ID,
};
use crate::schema::{Format, Kind, Param, split_list};

use Right::{Drive, Guest};

const NO_DISPLAY: &str = "There is no display yet; the console is serial.";
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
            "Linux kernel to boot without firmware (bzImage or ELF with PVH entry), a volume of content type snippets \
             such as local:snippets/vmlinuz.",
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
        Param::new(
            "sharekernel",
            Kind::Boolean,
            "All guests of the same kernel have its pages together until they write to them. The kernel must be an ELF \
             file and memory no huge pages. To replace the file, rename a new one over it.",
        )
        .default("0"),
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
        Param::new("scsi[n]", DRIVE, "Disk or CD-ROM drive, a target of the virtio SCSI host.").family(31),
        Drive,
    )
    .live(DRIVE_LIVE)
    .plug(Plug::Disk),
    Key::new(Param::new("virtio[n]", DRIVE, "Disk, a virtio block device.").family(16), Drive)
    .live(DRIVE_LIVE)
    .plug(Plug::Disk)
    .rule(disk_only),
    Key::new(
        Param::new("ide[n]", DRIVE, "CD-ROM drive. The guest finds it on the virtio SCSI host.").family(4),
        Drive,
    )
    .live(DRIVE_LIVE)
    .plug(Plug::Disk)
    .rule(cdrom_only),
    Key::new(
        Param::new("sata[n]", DRIVE, "CD-ROM drive. The guest finds it on the virtio SCSI host.").family(6),
        Drive,
    )
    .live(DRIVE_LIVE)
    .plug(Plug::Disk)
    .rule(cdrom_only),
    Key::new(
        Param::new("efidisk0", EFI_DISK, "The firmware's variables: boot entries, Secure Boot's keys."),
        Drive,
    ),
    Key::new(Param::new("net[n]", NET, "Network card.").family(32), Guest(VmConfigNetwork))
        .live(NET_LIVE)
        .plug(Plug::Network),
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
    Key::new(
        Param::new(
            "boot",
            BOOT,
            "Boot order of the firmware, `order=scsi0;ide2;net0`; disks, CD-ROM drives, then network cards when it is \
             not given.",
        ),
        Guest(VmConfigOptions),
    ),
    Key::new(
        Param::new("bootdisk", Kind::Text { length_max: 16 }, "Disk to boot from, PVE's old form of `boot`."),
        Guest(VmConfigOptions),
    )
    .no_effect("Say `boot: order=...`."),
    Key::new(Param::new("ostype", OS_TYPE, "Guest's operating system."), Guest(VmConfigOptions))
        .no_effect("Nothing depends on it."),
    Key::new(
        Param::new("scsihw", SCSI_HARDWARE, "SCSI controller.").default("virtio-scsi-pci"),
        Guest(VmConfigHwType),
    )
    .no_effect("There is one virtio SCSI host with a queue for each vCPU, whichever is asked for."),
    Key::new(
        Param::new(
            "bios",
            Kind::Choice(&["seabios", "ovmf"]),
            "Firmware: `ovmf` boots disks and discs by UEFI. Legacy BIOS boot is not offered, so a guest with \
             `seabios` starts only with a `kernel`. A new guest without a kernel gets `ovmf` unless it is given.",
        )
        .default("seabios"),
        Guest(VmConfigOptions),
    ),
    Key::new(
        Param::new("cpu", CPU, "What the guest sees of the CPU; all that the host has when it is not given."),
        Guest(VmConfigCpu),
    ),
    Key::new(
        Param::new("machine", MACHINE, "Board: `q35` or `pc`, with or without a version."),
        Guest(VmConfigHwType),
    )
    .no_effect("A guest with firmware has a board with a Q35's identity, one with a kernel the smallest."),
    Key::new(
        Param::new("vga", VGA, "Display: `serial0` and `none` say what is here."),
        Guest(VmConfigHwType),
    )
    .no_effect(NO_DISPLAY),
    Key::new(
        Param::new("rng0", RNG, "Random number generator."),
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
        Param::new(
            "hugepages",
            Kind::Choice(&["any", "2", "1024"]),
            "Memory is huge pages of so many MiB, all taken at the start; `any` is 2.",
        ),
        Guest(VmConfigMemory),
    ),
    Key::new(
        Param::new("keephugepages", Kind::Boolean, "Keep the huge pages for the next start.").default("0"),
        Guest(VmConfigMemory),
    )
    .no_effect("The host's huge pages are nobody's in particular (vm.nr_hugepages)."),
    Key::new(
        Param::new("watchdog", WATCHDOG, "A timer that the guest has to feed."),
        Guest(VmConfigHwType),
    ),
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
        Param::new(
            "vmstatestorage",
            Kind::Format(STORAGE_ID),
            "Storage of the memory that snapshots and suspensions keep; the first disk's when it is not given.",
        ),
        Guest(VmConfigOptions),
    )
    .now(),
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
        Param::new(
            "hotplug",
            Kind::Format(HOTPLUG),
            "Devices that come and go while the guest runs: `disk`, `network`, or 0 for none. The others change at the \
             next start.",
        )
        .default("network,disk,usb"),
        Guest(VmConfigOptions),
    )
    .now(),
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
        Param::new(
            "smbios1",
            SMBIOS,
            "What the guest reads about its board. Told by firmware, so a guest with a kernel does not see it.",
        ),
        Guest(VmConfigHwType),
    ),
    Key::new(
        Param::new(
            "vmgenid",
            Kind::Format(GENERATION),
            "By this the guest learns that it became another machine, by a rollback or as a clone: a UUID, 1 makes a \
             new one, 0 is no such device.",
        ),
        Guest(VmConfigOptions),
    ),
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
    Key::unavailable("tpmstate0", 0, "TPMs are not available yet"),
    Key::unavailable("args", 0, "QEMU arguments mean nothing to atoll-vmm"),
    Key::unavailable("hookscript", 0, "hook scripts are not available yet"),
    Key::unavailable("affinity", 0, "CPU pinning is not available yet"),
    Key::unavailable("vcpus", 0, "CPU hot-plug is not available yet: set `cores`"),
    Key::unavailable("numa[n]", 8, "memory nodes are not available yet"),
    Key::unavailable("hostpci[n]", 16, "PCI passthrough is not available yet"),
    Key::unavailable("usb[n]", 14, "USB is not available yet"),
    Key::unavailable("virtiofs[n]", 10, "shared directories are not available yet"),
    Key::unavailable("parallel[n]", 3, "parallel ports are not available"),
    Key::unavailable("ivshmem", 0, "shared memory between guests is not available yet"),
    Key::unavailable("audio0", 0, "sound is not available yet"),
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
        LINK_TAG,
        LINK_TRUNKS,
        rate("rate", "Most MiB a second, each way; 0 is no limit."),
    ],
    default_key: Some("model"),
    value_key: Some("macaddr"),
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

/// Properties of a card that reach a running machine at once.
const NET_LIVE: &[&str] = &["firewall", "link_down", "rate", "tag", "trunks"];

const SERIAL: Format = Format {
    name: "pve-qm-serial",
    check: |text| match text {
        "socket" => Ok(()),
        _ => Err("ports of the host are not available: use `socket`".to_owned()),
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

const SCSI_HARDWARE: Kind = Kind::Choice(&["virtio-scsi-pci", "virtio-scsi-single"]);

const MACHINE: Kind = Kind::PropertyString {
    keys: &[
        Param::new("type", Kind::Format(BOARD), "Board."),
        absent("viommu", NO_IOMMU),
        Param::new(
            "enable-s3",
            Kind::Boolean,
            "Without effect: there is no sleep.",
        ),
        Param::new(
            "enable-s4",
            Kind::Boolean,
            "Without effect: there is no sleep.",
        ),
    ],
    default_key: Some("type"),
    value_key: None,
};

const BOARD: Format = Format {
    name: "pve-qemu-machine",
    check: |text| {
        let is_board = |name: &str| {
            let rest = text.strip_prefix(name);
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
        };
        match is_board("pc") || is_board("q35") {
            true => Ok(()),
            false => Err(format!("'{text}' is no board: use q35")),
        }
    },
};

const NO_IOMMU: Format = Format {
    name: super::UNAVAILABLE,
    check: |_| Err("an IOMMU for the guest is not available yet".to_owned()),
};

const VGA: Kind = Kind::PropertyString {
    keys: &[
        Param::new(
            "type",
            Kind::Choice(&[
                "cirrus",
                "none",
                "qxl",
                "qxl2",
                "qxl3",
                "qxl4",
                "serial0",
                "serial1",
                "serial2",
                "serial3",
                "std",
                "virtio",
                "virtio-gl",
                "vmware",
            ]),
            "Kind of display.",
        ),
        Param::new(
            "memory",
            Kind::Integer { min: 4, max: 512 },
            "Its memory in MiB.",
        ),
        Param::new("clipboard", Kind::Choice(&["vnc"]), "Clipboard."),
    ],
    default_key: Some("type"),
    value_key: None,
};

const SMBIOS: Kind = Kind::PropertyString {
    keys: &[
        Param::new("uuid", Kind::Format(BOARD_UUID), "UUID of the machine."),
        smbios_text("manufacturer", "Manufacturer."),
        smbios_text("product", "Product."),
        smbios_text("version", "Version."),
        smbios_text("serial", "Serial number."),
        smbios_text("sku", "Stock keeping unit."),
        smbios_text("family", "Family."),
        Param::new("base64", Kind::Boolean, "All but the UUID is in Base64."),
    ],
    default_key: None,
    value_key: None,
};

const fn smbios_text(name: &'static str, what: &'static str) -> Param {
    Param::new(name, Kind::Text { length_max: 256 }, what)
}

const GENERATION: Format = Format {
    name: "pve-vm-generation-id",
    check: |text| match text {
        "0" | "1" => Ok(()),
        _ => (BOARD_UUID.check)(text),
    },
};

const BOARD_UUID: Format = Format {
    name: "pve-smbios-uuid",
    check: |text| match uuid::Uuid::try_parse(text) {
        Ok(_) => Ok(()),
        Err(_) => Err(format!("'{text}' is no UUID")),
    },
};

const CPU: Kind = Kind::PropertyString {
    keys: &[
        Param::new(
            "cputype",
            Kind::Format(CPU_MODEL),
            "Model: `host`, or one that `atoll-vmm cpu-models` lists.",
        ),
        Param::new(
            "flags",
            Kind::Format(CPU_FLAGS),
            "Features to add and to take away, divided by semicolons: `+pcid;-aes`.",
        ),
        Param::new(
            "hidden",
            Kind::Boolean,
            "Do not tell the guest that it runs on KVM.",
        ),
        Param::new(
            "hv-vendor-id",
            Kind::Text { length_max: 12 },
            "Without effect: there are no Hyper-V features.",
        ),
        Param::new(
            "phys-bits",
            Kind::Format(PHYS_BITS),
            "Width of physical addresses in bits, or `host`.",
        ),
        Param::new(
            "guest-phys-bits",
            Kind::Integer { min: 32, max: 64 },
            "Without effect: as wide as the CPU's.",
        ),
        Param::new(
            "reported-model",
            Kind::Text { length_max: 64 },
            "Without effect: a model is reported as itself.",
        ),
    ],
    default_key: Some("cputype"),
    value_key: None,
};

const CPU_MODEL: Format = Format {
    name: "pve-vm-cpu-conf",
    check: |text| {
        let is_word = |b: u8| b.is_ascii_alphanumeric() || b"_.-".contains(&b);
        if text.starts_with("custom-") {
            return Err("custom CPU models are not available yet: use `flags`".to_owned());
        }
        match !text.is_empty() && text.len() <= 64 && text.bytes().all(is_word) {
            true => Ok(()),
            false => Err(format!("'{text}' is no name of a CPU model")),
        }
    },
};

const CPU_FLAGS: Format = Format {
    name: "pve-cpu-flags",
    check: |text| {
        let is_word = |b: u8| b.is_ascii_alphanumeric() || b"_.-".contains(&b);
        let is_flag = |flag: &str| {
            let name = flag.strip_prefix(['+', '-']);
            name.is_some_and(|name| !name.is_empty() && name.bytes().all(is_word))
        };
        match text.split(';').all(is_flag) {
            true => Ok(()),
            false => Err(format!("'{text}' is not a list such as +pcid;-aes")),
        }
    },
};

const PHYS_BITS: Format = Format {
    name: "pve-phys-bits",
    check: |text| match (text, text.parse::<u8>()) {
        ("host", _) | (_, Ok(8..=64)) => Ok(()),
        _ => Err("value must be an integer between 8 and 64 or 'host'".to_owned()),
    },
};

const RNG: Kind = Kind::PropertyString {
    keys: &[
        Param::new(
            "source",
            Kind::Choice(&["/dev/urandom", "/dev/random", "/dev/hwrng"]),
            "Where it comes from; always getrandom(2) of the host.",
        )
        .required(),
        Param::new(
            "max_bytes",
            Kind::Integer {
                min: 0,
                max: 1 << 30,
            },
            "Most bytes in a period.",
        ),
        Param::new(
            "period",
            Kind::Integer {
                min: 0,
                max: 1 << 30,
            },
            "Period in milliseconds.",
        ),
    ],
    default_key: Some("source"),
    value_key: None,
};

const WATCHDOG: Kind = Kind::PropertyString {
    keys: &[
        Param::new("model", Kind::Choice(&["i6300esb"]), "Kind of timer."),
        Param::new(
            "action",
            Kind::Choice(&["reset", "shutdown", "poweroff", "pause", "none"]),
            "What happens when it was not fed in time, `reset` when it is not given.",
        ),
    ],
    default_key: Some("model"),
    value_key: None,
};

const HOTPLUG: Format = Format {
    name: "pve-hotplug-features",
    check: |text| {
        let known = ["network", "disk", "usb", "memory", "cpu", "cloudinit"];
        match matches!(text, "0" | "1") || split_list(text).all(|word| known.contains(&word)) {
            true => Ok(()),
            false => Err(format!("'{text}' is not a list of {}", known.join(", "))),
        }
    },
};

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Config keys of virtual machines.

use super::shared::{self, LINK_BRIDGE, NO_RATE, NO_VLAN, absent};
use super::{Key, Right};
use crate::access::Privilege::{
    VmConfigCdrom, VmConfigCloudinit, VmConfigCpu, VmConfigHwType, VmConfigMemory, VmConfigNetwork,
    VmConfigOptions,
};
use crate::schema::format::{ADDRESS_LIST, DISK_SIZE, DNS_NAME, MAC, SEARCH_DOMAINS, VOLUME_ID};
use crate::schema::{Format, Kind, Param};

use Right::{Drive, Guest};

const LINUX_SOLE: &str =
    "atoll-vmm boots Linux kernels directly, without firmware or a choice of boards.";
const NO_DISPLAY: &str = "There is no display yet; the console is serial.";
const ONE_KIND: &str = "Every disk is a virtio block device here.";
const NO_FIRMWARE: &str = "firmware boot is not available yet: give `kernel`";
const NO_CLOUDINIT: &str = "cloud-init drives are not available yet";

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
    ),
    Key::new(Param::new("virtio[n]", DRIVE, "Disk, a virtio block device.").family(16), Drive),
    Key::new(
        Param::new("sata[n]", DRIVE, "Disk. Every disk is a virtio block device here.").family(6),
        Drive,
    ),
    Key::new(
        Param::new("ide[n]", DRIVE, "Disk. Every disk is a virtio block device here.").family(4),
        Drive,
    ),
    Key::new(Param::new("net[n]", NET, "Network card.").family(32), Guest(VmConfigNetwork)),
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
    )
    .no_effect("There is no agent channel yet; the agent is reported as not running."),
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
        Param::new("balloon", Kind::Integer { min: 0, max: 1 << 30 }, "Least memory in MiB when the host needs some."),
        Guest(VmConfigMemory),
    )
    .no_effect("There is no balloon yet: the guest keeps all its memory."),
    Key::new(
        Param::new("shares", Kind::Integer { min: 0, max: 50_000 }, "Share in ballooning.").default("1000"),
        Guest(VmConfigMemory),
    )
    .no_effect("There is no balloon yet: the guest keeps all its memory."),
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
    )
    .no_effect(NO_CLOUDINIT),
    Key::new(
        Param::new("searchdomain", Kind::Format(SEARCH_DOMAINS), "Search domain, for cloud-init."),
        Right::Either(VmConfigCloudinit, VmConfigNetwork),
    )
    .no_effect(NO_CLOUDINIT),
    Key::new(
        Param::new("ciuser", Kind::Text { length_max: 64 }, "User, for cloud-init."),
        Right::Either(VmConfigCloudinit, VmConfigCdrom),
    )
    .no_effect(NO_CLOUDINIT),
    Key::unavailable("cipassword", 0, NO_CLOUDINIT),
    Key::unavailable("cicustom", 0, NO_CLOUDINIT),
    Key::unavailable("citype", 0, NO_CLOUDINIT),
    Key::unavailable("ciupgrade", 0, NO_CLOUDINIT),
    Key::unavailable("sshkeys", 0, NO_CLOUDINIT),
    Key::unavailable("ipconfig[n]", 32, NO_CLOUDINIT),
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
            "Queue pairs. Without effect: there is one.",
        ),
        absent("tag", NO_VLAN),
        absent("trunks", NO_VLAN),
        absent("rate", NO_RATE),
    ],
    default_key: Some("model"),
    value_key: Some("macaddr"),
};

const DRIVE: Kind = Kind::PropertyString {
    keys: &[
        Param::new(
            "file",
            Kind::Format(DRIVE_FILE),
            "The volume; STORAGE:SIZE (in GiB) makes a new one; `none` is an empty drive.",
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
            "Host cache. Without effect: a flush reaches the disk, always.",
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
        Param::new("detect_zeroes", Kind::Boolean, "Without effect."),
        Param::new(
            "shared",
            Kind::Boolean,
            "The volume is the same on all nodes.",
        ),
        Param::new("snapshot", Kind::Boolean, "Without effect."),
        absent("import-from", NO_IMPORT),
        absent("mbps", NO_DISK_LIMIT),
        absent("mbps_rd", NO_DISK_LIMIT),
        absent("mbps_wr", NO_DISK_LIMIT),
        absent("iops", NO_DISK_LIMIT),
        absent("iops_rd", NO_DISK_LIMIT),
        absent("iops_wr", NO_DISK_LIMIT),
    ],
    default_key: Some("file"),
    value_key: None,
};

const NO_IMPORT: Format = Format {
    name: super::UNAVAILABLE,
    check: |_| {
        Err("importing a volume is not available yet: make the disk and write to it".to_owned())
    },
};

const NO_DISK_LIMIT: Format = Format {
    name: super::UNAVAILABLE,
    check: |_| Err("rate limits of disks are not available yet".to_owned()),
};

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

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Config keys of containers.

use super::shared::{self, LINK_BRIDGE, NO_RATE, NO_VLAN, absent};
use super::{Key, Right};
use crate::access::Privilege::{
    VmAllocate, VmConfigCpu, VmConfigDisk, VmConfigMemory, VmConfigNetwork, VmConfigOptions,
};
use crate::schema::format::{
    ADDRESS_LIST, DISK_SIZE, DNS_NAME, IPV4, IPV4_CONFIG, IPV6, IPV6_CONFIG, MAC, SEARCH_DOMAINS,
    VOLUME_ID,
};
use crate::schema::{Format, Kind, Param};

use Right::{Guest, System};

/// The keys, in the order of a form: what it is, what it has, how it behaves, the rest by name.
pub const CONTAINER: &[Key] = &[
    Key::new(
        Param::new("hostname", Kind::Format(DNS_NAME), "Host name in the container."),
        Guest(VmConfigNetwork),
    ),
    shared::DESCRIPTION,
    shared::TAGS,
    Key::new(
        Param::new("rootfs", ROOTFS, "Volume of the root file system."),
        Guest(VmConfigDisk),
    ),
    Key::new(
        Param::new("mp[n]", MOUNT_POINT, "Further volume, mounted in the container.").family(256),
        Guest(VmConfigDisk),
    ),
    Key::new(
        Param::new("memory", Kind::Integer { min: 16, max: 1 << 30 }, "Memory in MiB.").default("512"),
        Guest(VmConfigMemory),
    )
    .now(),
    Key::new(
        Param::new("swap", Kind::Integer { min: 0, max: 1 << 30 }, "Swap in MiB.").default("512"),
        Guest(VmConfigMemory),
    )
    .now(),
    Key::new(
        Param::new(
            "cores",
            Kind::Integer { min: 1, max: 8192 },
            "Host CPUs it may use; without it, all.",
        ),
        Guest(VmConfigCpu),
    )
    .now(),
    Key::new(
        Param::new(
            "cpulimit",
            Kind::Number { min: 0.0, max: 8192.0 },
            "Host CPU time it may use, in CPUs; 0 is no limit.",
        )
        .default("0"),
        Guest(VmConfigCpu),
    )
    .now(),
    Key::new(
        Param::new("cpuunits", Kind::Integer { min: 0, max: 500_000 }, "Weight against other guests.").default("100"),
        Guest(VmConfigCpu),
    )
    .now(),
    Key::new(Param::new("net[n]", NET, "Network card.").family(32), Guest(VmConfigNetwork)),
    Key::new(
        Param::new("nameserver", Kind::Format(ADDRESS_LIST), "Name servers; without it, the host's."),
        Guest(VmConfigNetwork),
    ),
    Key::new(
        Param::new("searchdomain", Kind::Format(SEARCH_DOMAINS), "Domains that short names are looked up in."),
        Guest(VmConfigNetwork),
    ),
    Key::new(
        Param::new(
            "unprivileged",
            Kind::Boolean,
            "Its root is an ordinary user of the host, with a range of user ids of its own. Creation writes it into the \
             config, and it stays.",
        )
        .default("1"),
        Guest(VmAllocate),
    ),
    Key::new(
        Param::new("features", FEATURES, "What it may do beyond the usual."),
        Right::Features,
    ),
    shared::ON_BOOT,
    shared::STARTUP,
    shared::PROTECTION,
    Key::new(
        Param::new("ostype", OS_TYPE, "Distribution in the container."),
        Guest(VmConfigOptions),
    )
    .no_effect("Files in the container are set up the same way for all."),
    Key::new(
        Param::new("arch", Kind::Choice(&["amd64"]), "Architecture.").default("amd64"),
        Guest(VmConfigOptions),
    )
    .no_effect("Containers have the host's architecture."),
    Key::new(
        Param::new("cmode", Kind::Choice(&["tty", "console", "shell"]), "What the console shows.").default("tty"),
        Guest(VmConfigOptions),
    )
    .no_effect("The console is the one of its init."),
    Key::new(
        Param::new("console", Kind::Boolean, "It has a console.").default("1"),
        Guest(VmConfigOptions),
    )
    .no_effect("It always has one."),
    Key::new(
        Param::new("tty", Kind::Integer { min: 0, max: 6 }, "Terminals.").default("2"),
        Guest(VmConfigOptions),
    )
    .no_effect("There is one console."),
    Key::new(
        Param::new("timezone", Kind::Text { length_max: 64 }, "Time zone; `host` is the host's."),
        Guest(VmConfigOptions),
    )
    .no_effect("The template's stays: set it inside."),
    Key::new(
        Param::new("debug", Kind::Boolean, "More messages.").default("0"),
        System(VmConfigOptions),
    )
    .no_effect("The runtime's log is always kept."),
    Key::new(
        Param::new("unused[n]", Kind::Format(VOLUME_ID), "Volume that belongs to the guest and is not mounted.")
            .family(256),
        Guest(VmConfigDisk),
    )
    .server(),
    shared::LOCK,
    shared::TEMPLATE,
    shared::PARENT,
    Key::unavailable("hookscript", 0, "hook scripts are not available yet"),
    Key::unavailable("dev[n]", 256, "devices of the host are not available yet"),
    Key::unavailable("env", 0, "an environment of its own is not available yet"),
    Key::unavailable("entrypoint", 0, "another init is not available yet"),
];

const NET: Kind = Kind::PropertyString {
    keys: &[
        Param::new(
            "name",
            Kind::Format(crate::schema::format::INTERFACE),
            "Name in the container.",
        )
        .required(),
        LINK_BRIDGE,
        Param::new(
            "hwaddr",
            Kind::Format(MAC),
            "Its address; made up when it is not given.",
        ),
        Param::new(
            "ip",
            Kind::Format(IPV4_CONFIG),
            "IPv4 address with prefix length, `dhcp` or `manual`.",
        ),
        Param::new("gw", Kind::Format(IPV4), "IPv4 gateway."),
        Param::new(
            "ip6",
            Kind::Format(IPV6_CONFIG),
            "IPv6 address with prefix length, `auto`, `dhcp` or `manual`.",
        ),
        Param::new("gw6", Kind::Format(IPV6), "IPv6 gateway."),
        Param::new(
            "firewall",
            Kind::Boolean,
            "Filter its traffic. Without effect: there is no firewall yet.",
        ),
        Param::new("link_down", Kind::Boolean, "Pull the plug."),
        Param::new(
            "mtu",
            Kind::Integer {
                min: 64,
                max: 65_535,
            },
            "Largest packet.",
        ),
        Param::new("type", Kind::Choice(&["veth"]), "Kind of card."),
        absent("tag", NO_VLAN),
        absent("trunks", NO_VLAN),
        absent("rate", NO_RATE),
        absent("host-managed", NO_HOST_MANAGED),
    ],
    default_key: None,
    value_key: None,
};

const NO_HOST_MANAGED: Format = Format {
    name: super::UNAVAILABLE,
    check: |_| Err("DHCP by the host is not available yet: use ip=dhcp or an address".to_owned()),
};

macro_rules! volume_keys {
    ($($more:expr,)*) => {
        Kind::PropertyString {
            keys: &[
                Param::new(
                    "volume",
                    Kind::Format(MOUNT_VOLUME),
                    "The volume; STORAGE:SIZE (in GiB) makes a new one.",
                )
                .required(),
                Param::new("size", Kind::Format(DISK_SIZE), "Size; the server sets it."),
                Param::new("acl", Kind::Boolean, "Access lists. Without effect: they are always on."),
                Param::new("mountoptions", Kind::Text { length_max: 256 }, "Mount options, divided by semicolons."),
                Param::new("quota", Kind::Boolean, "Quotas. Without effect."),
                Param::new("replicate", Kind::Boolean, "Include it in replication."),
                Param::new("ro", Kind::Boolean, "Read-only."),
                Param::new("shared", Kind::Boolean, "The volume is the same on all nodes."),
                $($more,)*
            ],
            default_key: Some("volume"),
            value_key: None,
        }
    };
}

const ROOTFS: Kind = volume_keys!();

const MOUNT_POINT: Kind = volume_keys!(
    Param::new(
        "mp",
        Kind::Format(MOUNT_PATH),
        "Where it is mounted in the container."
    )
    .required(),
    Param::new("backup", Kind::Boolean, "Include it in backups."),
    Param::new("keepattrs", Kind::Boolean, "Without effect."),
);

const MOUNT_PATH: Format = Format {
    name: "pve-lxc-mp-string",
    check: |text| {
        let parts_fit = text.split('/').all(|part| part != ".." && part != ".");
        if text.starts_with('/') && text.len() > 1 && parts_fit {
            return Ok(());
        }
        Err("value does not look like a valid mount point".to_owned())
    },
};

/// A volume or `STORAGE:SIZE`. Directories of the host are not: see [`super::Effect::Unavailable`].
const MOUNT_VOLUME: Format = Format {
    name: "pve-lxc-mp-string",
    check: |text| {
        if text.starts_with('/') {
            return Err(
                "directories and devices of the host are not available yet: use a volume"
                    .to_owned(),
            );
        }
        (VOLUME_ID.check)(text).map_err(|_| format!("unable to parse volume ID '{text}'"))
    },
};

const NO_FEATURE: Format = Format {
    name: super::UNAVAILABLE,
    check: |value| match value {
        "0" => Ok(()),
        _ => Err("this feature is not available yet".to_owned()),
    },
};

const FEATURES: Kind = Kind::PropertyString {
    keys: &[
        Param::new("nesting", Kind::Boolean, "Run containers inside."),
        Param::new(
            "keyctl",
            Kind::Boolean,
            "The keyctl system call, which is always allowed.",
        ),
        absent("fuse", NO_FEATURE),
        absent("mknod", NO_FEATURE),
        absent("mount", NO_FEATURE),
        absent("force_rw_sys", NO_FEATURE),
    ],
    default_key: None,
    value_key: None,
};

const OS_TYPE: Kind = Kind::Choice(&[
    "debian",
    "devuan",
    "ubuntu",
    "centos",
    "fedora",
    "opensuse",
    "archlinux",
    "alpine",
    "gentoo",
    "nixos",
    "unmanaged",
]);

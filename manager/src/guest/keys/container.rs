// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Config keys of containers.

use super::drive::rate;
use super::shared::{self, LINK_BRIDGE, LINK_TAG, LINK_TRUNKS};
use super::{Key, Plug, Right};
use crate::access::Privilege::{
    VmConfigCpu, VmConfigDisk, VmConfigMemory, VmConfigNetwork, VmConfigOptions,
};
use crate::guest::container::bundle::owners;
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
        Param::new(
            "mp[n]",
            MOUNT_POINT,
            "Further volume, or a directory or block device of the host, mounted in the container.",
        )
        .family(256),
        Right::MountPoint,
    )
    .plug(Plug::Disk)
    .live(&["backup", "replicate", "shared", "size"]),
    Key::new(
        Param::new("dev[n]", DEVICE, "Device of the host that the container may use.").family(256),
        System(VmConfigDisk),
    )
    .now(),
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
    Key::new(Param::new("net[n]", NET, "Network card.").family(32), Guest(VmConfigNetwork)).now(),
    Key::new(
        Param::new("nameserver", Kind::Format(ADDRESS_LIST), "Name servers; without it, the host's."),
        Guest(VmConfigNetwork),
    )
    .now(),
    Key::new(
        Param::new("searchdomain", Kind::Format(SEARCH_DOMAINS), "Domains that short names are looked up in."),
        Guest(VmConfigNetwork),
    )
    .now(),
    Key::new(
        Param::new(
            "unprivileged",
            Kind::Boolean,
            "Its root is an ordinary user of the host, with a range of user ids of its own. Creation writes it into the \
             config, and it stays.",
        )
        .default("1"),
        Right::Unprivileged,
    ),
    Key::new(
        Param::new("features", FEATURES, "What it may do beyond the usual."),
        Right::Features,
    ),
    shared::ON_BOOT,
    shared::STARTUP,
    shared::PROTECTION,
    Key::new(
        Param::new(
            "ostype",
            OS_TYPE,
            "Distribution in the container, which says how its network is configured; creation finds it out. In an \
             `unmanaged` one nothing is written.",
        ),
        Guest(VmConfigOptions),
    ),
    Key::new(
        Param::new(
            "entrypoint",
            Kind::Text { length_max: 1024 },
            "Program that the container runs, with its arguments.",
        )
        .default("/sbin/init"),
        Guest(VmConfigOptions),
    ),
    Key::new(
        Param::new("env", Kind::List { length_max: 32_768 }, "Its environment: NAME=VALUE each."),
        Guest(VmConfigOptions),
    ),
    Key::new(
        Param::new("image", IMAGE, "OCI image that its root file system lies over; a creation from one sets it."),
        Guest(VmConfigDisk),
    )
    .server()
    .own(),
    Key::new(
        Param::new("restart", RESTART, "Whether it is started again when its program ends by itself, or is ended because it does not work."),
        Guest(VmConfigOptions),
    )
    .now()
    .own(),
    Key::new(
        Param::new(
            "health-command",
            Kind::List { length_max: 4096 },
            "Program with its arguments that is run inside, again and again, to find out whether the container works.",
        ),
        Guest(VmConfigOptions),
    )
    .now()
    .own(),
    Key::new(
        Param::new("health", HEALTH, "When the health command is run."),
        Guest(VmConfigOptions),
    )
    .now()
    .own(),
    Key::new(
        Param::new(
            "hookscript",
            Kind::Format(VOLUME_ID),
            "Snippet that is run on the host before and after a start and a stop, with the container's number and \
             `pre-start`, `post-start`, `pre-stop` or `post-stop`.",
        ),
        System(VmConfigOptions),
    )
    .now(),
    Key::new(
        Param::new("arch", Kind::Choice(&["amd64"]), "Architecture.").default("amd64"),
        Guest(VmConfigOptions),
    )
    .no_effect("Containers have the host's architecture."),
    Key::new(
        Param::new(
            "cmode",
            Kind::Choice(&["tty", "console", "shell"]),
            "What its console shows: the login on `/dev/tty1` (`tty`), what its init has on `/dev/console` (`console`), \
             or a shell of its root, without a login (`shell`). A container with an entrypoint or an image shows its \
             console unless this is set.",
        )
        .default("tty"),
        Guest(VmConfigOptions),
    )
    .now(),
    Key::new(
        Param::new("console", Kind::Boolean, "Its init has a console, `/dev/console`.").default("1"),
        Guest(VmConfigOptions),
    ),
    Key::new(
        Param::new(
            "tty",
            Kind::Integer { min: 0, max: 6 },
            "How many terminals it has: `/dev/tty1` and so on. A container with an entrypoint or an image has none \
             unless this is set.",
        )
        .default("2"),
        Guest(VmConfigOptions),
    ),
    Key::new(
        Param::new("timezone", Kind::Format(TIME_ZONE), "Time zone; `host` is the host's."),
        Guest(VmConfigOptions),
    ),
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
            "IPv6 address with prefix length, `auto`, `dhcp` or `manual`. `auto` is what routers announce, and needs no \
             program in the container.",
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
        LINK_TAG,
        LINK_TRUNKS,
        rate("rate", "Most MiB a second, each way; 0 is no limit."),
        Param::new(
            "host-managed",
            Kind::Boolean,
            "The host asks for the IPv4 address of `ip=dhcp`, for a container without a DHCP client, such as one from an \
             image. A fixed address is always set by the host.",
        ),
    ],
    default_key: None,
    value_key: None,
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
                Param::new("acl", Kind::Boolean, "Access lists; on unless it is 0."),
                Param::new("mountoptions", Kind::Format(MOUNT_OPTION_LIST), "Mount options, divided by semicolons."),
                Param::new(
                    "quota",
                    Kind::Boolean,
                    "Quotas of users and groups, which a privileged container sets by itself: quotacheck -cmug and quotaon \
                     of the package quota, once.",
                ),
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

const ROOTFS: Kind = volume_keys!(Param::new(
    "idmap",
    Kind::Format(ROOT_ID_MAP),
    "Ids on the disk: those of the container, `passthrough`, which they are anyway.",
),);

const MOUNT_POINT: Kind = volume_keys!(
    Param::new(
        "mp",
        Kind::Format(MOUNT_PATH),
        "Where it is mounted in the container."
    )
    .required(),
    Param::new(
        "idmap",
        Kind::Format(ID_MAP),
        "Ids of an unprivileged container and on the disk: `passthrough` for the same, as in a volume without it, or \
         entries u:INSIDE:DISK:COUNT and g:INSIDE:DISK:COUNT, divided by semicolons. An id without an entry is where it \
         would be without the map.",
    ),
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

const ID_MAP: Format = Format {
    name: "pve-lxc-mp-idmap",
    check: |text| match text {
        owners::PASSTHROUGH => Ok(()),
        text => owners::entries(text).map(drop),
    },
};

const ROOT_ID_MAP: Format = Format {
    name: "pve-lxc-root-idmap",
    check: |text| match text {
        owners::PASSTHROUGH => Ok(()),
        _ => Err(
            "the root has no entries of its own, only `passthrough`: give the folder a mount point"
                .to_owned(),
        ),
    },
};

/// A volume or `STORAGE:SIZE`; what begins with a slash is the host's.
const MOUNT_VOLUME: Format = Format {
    name: "pve-lxc-mp-string",
    check: |text| match text.starts_with('/') {
        true => (MOUNT_PATH.check)(text),
        false => (VOLUME_ID.check)(text).map_err(|_| format!("unable to parse volume ID '{text}'")),
    },
};

/// Options of mount(8) that a user may choose; PVE's list.
const MOUNT_OPTIONS: &[&str] = &[
    "discard", "lazytime", "noatime", "nodev", "noexec", "nosuid",
];

const MOUNT_OPTION_LIST: Format = Format {
    name: "pve-lxc-mount-options",
    check: |text| {
        let unknown = text
            .split(';')
            .find(|option| !MOUNT_OPTIONS.contains(option));
        unknown.map_or(Ok(()), |option| {
            Err(format!("invalid mount option '{option}'"))
        })
    },
};

const DEVICE: Kind = Kind::PropertyString {
    keys: &[
        Param::new(
            "path",
            Kind::Format(DEVICE_PATH),
            "Path of the device on the host, and in the container.",
        )
        .required(),
        Param::new(
            "mode",
            Kind::Format(MODE),
            "Access mode in the container, octal.",
        ),
        Param::new("uid", ID, "Owner in the container."),
        Param::new("gid", ID, "Group in the container."),
        Param::new("deny-write", Kind::Boolean, "Forbid writing."),
    ],
    default_key: Some("path"),
    value_key: None,
};

const ID: Kind = Kind::Integer {
    min: 0,
    max: 4_294_967_294,
};

const DEVICE_PATH: Format = Format {
    name: "pve-lxc-dev-string",
    check: |text| match text.starts_with("/dev/") {
        true => (MOUNT_PATH.check)(text),
        false => Err(format!("{text} is not a path below /dev")),
    },
};

const MODE: Format = Format {
    name: "pve-lxc-dev-mode",
    check: |text| {
        let is_octal = text.bytes().all(|byte| (b'0'..=b'7').contains(&byte));
        match is_octal && (text.len() == 3 || text.len() == 4 && text.starts_with('0')) {
            true => Ok(()),
            false => Err(format!("{text} is not an access mode such as 0660")),
        }
    },
};

/// A name of the time zone data base, which is a path below its folder.
const TIME_ZONE: Format = Format {
    name: "pve-ct-timezone",
    check: |text| {
        let fits = |c: char| c.is_ascii_alphanumeric() || "/_+-".contains(c);
        let parts_fit = text.split('/').all(|part| !part.is_empty());
        match parts_fit && text.chars().all(fits) && text.len() <= 64 {
            true => Ok(()),
            false => Err(format!("{text} is no time zone")),
        }
    },
};

const IMAGE: Kind = Kind::PropertyString {
    keys: &[
        Param::new("digest", Kind::Format(DIGEST), "Digest of its manifest.").required(),
        Param::new(
            "name",
            Kind::Text { length_max: 512 },
            "What it is called in its registry.",
        ),
        Param::new(
            "ports",
            Kind::Text { length_max: 512 },
            "What it listens on, at the container's own address: `80/tcp`, divided by semicolons.",
        ),
    ],
    default_key: Some("digest"),
    value_key: None,
};

const DIGEST: Format = Format {
    name: "oci-digest",
    check: |text| {
        let digest = text.parse::<crate::oci::digest::Digest>();
        digest.map(drop).map_err(|error| error.to_string())
    },
};

const RESTART: Kind = Kind::PropertyString {
    keys: &[
        Param::new(
            "policy",
            Kind::Choice(&["no", "on-failure", "always"]),
            "When.",
        )
        .required(),
        Param::new(
            "retries",
            Kind::Integer {
                min: 1,
                max: 1_000_000,
            },
            "How often in a row at most.",
        ),
    ],
    default_key: Some("policy"),
    value_key: None,
};

const HEALTH: Kind = Kind::PropertyString {
    keys: &[
        Param::new("interval", SECONDS, "Seconds between two runs.").default("30"),
        Param::new("timeout", SECONDS, "Longest run in seconds.").default("30"),
        Param::new(
            "retries",
            Kind::Integer { min: 1, max: 1000 },
            "Failures in a row that count.",
        )
        .default("3"),
        Param::new(
            "start",
            Kind::Integer {
                min: 0,
                max: 86_400,
            },
            "Seconds after a start in which failures do not count.",
        )
        .default("0"),
    ],
    default_key: None,
    value_key: None,
};

const SECONDS: Kind = Kind::Integer {
    min: 1,
    max: 86_400,
};

const FEATURES: Kind = Kind::PropertyString {
    keys: &[
        Param::new("nesting", Kind::Boolean, "Run containers inside."),
        Param::new(
            "keyctl",
            Kind::Boolean,
            "Allow keyrings in an unprivileged container; a privileged one always may use them.",
        ),
        Param::new("fuse", Kind::Boolean, "Give it /dev/fuse."),
        Param::new(
            "mount",
            Kind::Text { length_max: 256 },
            "Types of file systems that it may mount. Without effect: the kernel decides, and lets a privileged \
             container mount all.",
        ),
        Param::new("force_rw_sys", Kind::Boolean, "Mount /sys for writing."),
        Param::new(
            "mknod",
            Kind::Boolean,
            "Let an unprivileged container make device nodes that harm nobody: null, zero, full, random, urandom, tty \
             and ptmx. A privileged one makes all that its device list allows.",
        ),
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
    "openeuler",
    "archlinux",
    "alpine",
    "gentoo",
    "nixos",
    "unmanaged",
]);

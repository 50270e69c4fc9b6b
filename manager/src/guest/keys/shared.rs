// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Config keys, and parts of their values, that machines and containers have alike.

use super::{Key, Right};
use crate::access::Privilege::VmConfigOptions;
use crate::schema::format::{BRIDGE, TAGS as TAG_LIST, VLANS};
use crate::schema::{Format, Kind, Param};

use Right::{Guest, System};

pub const DESCRIPTION: Key = Key::new(
    Param::new("description", NOTES, "Notes, in Markdown."),
    Guest(VmConfigOptions),
)
.now();

pub const TAGS: Key = Key::new(
    Param::new(
        "tags",
        Kind::Format(TAG_LIST),
        "Tags, divided by semicolons.",
    ),
    Guest(VmConfigOptions),
)
.now();

pub const ON_BOOT: Key = Key::new(
    Param::new("onboot", Kind::Boolean, "Start it when the node starts.").default("0"),
    Guest(VmConfigOptions),
)
.now();

pub const STARTUP: Key = Key::new(
    Param::new("startup", ORDER, "Order of starts and stops with the node."),
    System(VmConfigOptions),
)
.now();

pub const PROTECTION: Key = Key::new(
    Param::new(
        "protection",
        Kind::Boolean,
        "Refuse to remove the guest and its disks.",
    )
    .default("0"),
    Guest(VmConfigOptions),
)
.now();

pub const LOCK: Key = Key::new(
    Param::new("lock", Kind::Choice(LOCKS), "What holds the guest."),
    System(VmConfigOptions),
)
.server();

pub const TEMPLATE: Key = Key::new(
    Param::new("template", Kind::Boolean, "It is a template.").default("0"),
    Guest(VmConfigOptions),
)
.server();

pub const PARENT: Key = Key::new(
    Param::new(
        "parent",
        Kind::Text { length_max: 40 },
        "Snapshot that it descends from.",
    ),
    Guest(VmConfigOptions),
)
.server();

/// How guests start and stop with the node.
const ORDER: Kind = Kind::PropertyString {
    keys: &[
        Param::new(
            "order",
            SMALL,
            "Place in the order of starts; stops go backwards.",
        ),
        Param::new("up", SMALL, "Seconds to wait after its start."),
        Param::new("down", SMALL, "Seconds to wait for its stop."),
    ],
    default_key: Some("order"),
    value_key: None,
};

const SMALL: Kind = Kind::Integer {
    min: 0,
    max: 86_400,
};

const NOTES: Kind = Kind::Text { length_max: 8192 };

/// Locks that PVE knows; a guest that has one is left alone.
const LOCKS: &[&str] = &[
    "backup",
    "clone",
    "create",
    "destroyed",
    "disk",
    "fstrim",
    "migrate",
    "mounted",
    "rollback",
    "snapshot",
    "snapshot-delete",
    "suspended",
    "suspending",
];

/// A bridge and a card's address, the same for both kinds.
pub const LINK_BRIDGE: Param = Param::new(
    "bridge",
    Kind::Format(BRIDGE),
    "Bridge that the card is on.",
);

/// A member of a property string that cannot be set yet: to ignore it would mislead.
pub const fn absent(name: &'static str, format: Format) -> Param {
    Param::new(name, Kind::Format(format), "Not available yet.")
}

/// VLANs of a card, the same for both kinds.
pub const LINK_TAG: Param = Param::new(
    "tag",
    Kind::Integer { min: 1, max: 4094 },
    "VLAN that the card is in, without knowing it: of the bridge if that is VLAN-aware, else of its physical interfaces.",
);

pub const LINK_TRUNKS: Param = Param::new(
    "trunks",
    Kind::Format(VLANS),
    "VLANs whose frames the card gets and sends with their tags, `2;5;10-20`; the bridge must be VLAN-aware.",
);

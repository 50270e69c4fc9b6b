// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Parameters that more than one route has, and those that stand in paths.

use atoll_manager::schema::{Kind, Param, format};

use crate::route::Call;

/// Longest free text such as a description. PVE's limit for notes.
pub const TEXT_MAX: usize = 8192;

/// What the parts in braces of the routes' paths mean.
pub const IN_PATH: &[Param] = &[
    Param::new("node", Kind::Format(format::NODE), "Name of the node.").required(),
    VMID,
    Param::new(
        "storage",
        Kind::Format(format::STORAGE_ID),
        "Name of the storage.",
    )
    .required(),
    Param::new(
        "volume",
        text(512),
        "The volume: STORAGE:NAME, or NAME alone.",
    )
    .required(),
    Param::new("upid", text(256), "The task.").required(),
    Param::new(
        "userid",
        Kind::Format(format::USER_ID),
        "The user, name@realm.",
    )
    .required(),
    Param::new(
        "tokenid",
        Kind::Format(format::TOKEN_ID),
        "Name of the token.",
    )
    .required(),
    Param::new(
        "groupid",
        Kind::Format(format::GROUP_ID),
        "Name of the group.",
    )
    .required(),
    SNAPSHOT,
    Param::new("roleid", Kind::Format(format::ROLE_ID), "Name of the role.").required(),
];

/// Number of a guest.
pub const VMID: Param = Param::new(
    "vmid",
    Kind::NumberFormat(format::VMID),
    "Number of the guest.",
)
.required();

/// Most that a copy of disks takes of the host.
pub const BANDWIDTH: Param = Param::new(
    "bwlimit",
    Kind::Integer {
        min: 0,
        max: i64::MAX,
    },
    "Most that is copied in a second, in KiB; without limit when 0.",
);

/// What [`BANDWIDTH`] asks for, if it is a limit.
pub fn bytes_per_second(call: &Call) -> Option<u64> {
    let kib = call.values.number::<u64>(BANDWIDTH.name)?;
    (kib > 0).then(|| kib.saturating_mul(1024))
}

/// Name of a snapshot.
pub const SNAPSHOT: Param = Param::new(
    "snapname",
    Kind::Format(format::SNAPSHOT_NAME),
    "Name of the snapshot.",
)
.required();

/// Free text up to a length.
pub const fn text(length_max: usize) -> Kind {
    Kind::Text { length_max }
}

/// Formats of disk images.
pub const FORMATS: Kind = Kind::Choice(&["raw", "qcow2"]);

/// A whole number from 0.
pub const COUNT: Kind = Kind::Integer {
    min: 0,
    max: i64::MAX,
};

/// A time as seconds since 1970.
pub const TIME: Kind = Kind::Integer {
    min: 0,
    max: u32::MAX as i64,
};

/// SHA-1 of the config as it was read.
pub const DIGEST: Param = Param::new(
    "digest",
    text(64),
    "Digest of the config as it was read: the change is refused when it has changed since.",
);

/// Keys to take out of a config.
pub const DELETE: Param = Param::new(
    "delete",
    Kind::Format(format::CONFIG_ID_LIST),
    "Keys to take out of the config.",
);

/// Time span of a series.
pub const TIMEFRAME: Param = Param::new(
    "timeframe",
    Kind::Choice(&["hour", "day", "week", "month", "year", "decade"]),
    "Time span to show.",
)
.required();

/// How values of a series are taken together.
pub const CF: Param = Param::new(
    "cf",
    Kind::Choice(&["AVERAGE", "MAX"]),
    "How values that fall together are taken together.",
);

/// A comment.
pub const COMMENT: Param = Param::new("comment", text(1024), "A comment.");

/// When something ends.
pub const EXPIRE: Param = Param::new(
    "expire",
    TIME,
    "When it stops being good, in seconds since 1970; 0 is never.",
);

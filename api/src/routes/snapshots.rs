// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Snapshots, clones and templates of guests; both kinds have the same rows.

use atoll_manager::access::{Check, Privilege};
use atoll_manager::error::Error;
use atoll_manager::guest::clone::Wish;
use atoll_manager::guest::{snapshot, view};
use atoll_manager::id::{GuestId, GuestKind};
use atoll_manager::schema::{Kind, Param, format};
use atoll_manager::storage::name::parse_format;
use serde_json::{Value, json};

use super::guests::{id, kind, stored};
use super::parameters::{BANDWIDTH, FORMATS, SNAPSHOT, TEXT_MAX, bytes_per_second, text};
use super::{object, serve};
use crate::answer::{Answer, Refusal};
use crate::route::{Call, Returns, Route};

const SEES: Check = Check::All {
    path: "/vms/{vmid}",
    privileges: &[Privilege::VmAudit],
};
const SNAPSHOTS: Check = Check::All {
    path: "/vms/{vmid}",
    privileges: &[Privilege::VmSnapshot],
};
const ROLLS_BACK: Check = Check::Any {
    path: "/vms/{vmid}",
    privileges: &[Privilege::VmSnapshot, Privilege::VmSnapshotRollback],
};
/// What the new guest takes is looked at when its number is known.
const CLONES: Check = Check::All {
    path: "/vms/{vmid}",
    privileges: &[Privilege::VmClone],
};
const ALLOCATES: Check = Check::All {
    path: "/vms/{vmid}",
    privileges: &[Privilege::VmAllocate],
};

const DESCRIPTION: Param = Param::new("description", text(TEXT_MAX), "Notes.");
const FORCE: Param = Param::new("force", Kind::Boolean, "Accepted for PVE's clients.");
const START: Param = Param::new("start", Kind::Boolean, "Start the guest afterwards.");
const NEW_ID: Param = Param::new(
    "newid",
    Kind::NumberFormat(format::VMID),
    "Number of the new guest.",
)
.required();
const FULL: Param = Param::new(
    "full",
    Kind::Boolean,
    "Copy all disks. Always so: linked clones are not available yet.",
);
const STORAGE: Param = Param::new(
    "storage",
    Kind::Format(format::STORAGE_ID),
    "Storage of the new disks; each beside its source's, when it is not given.",
);
const TARGET: Param = Param::new(
    "target",
    Kind::Format(format::NODE),
    "Node of the new guest: this one.",
);
const FROM: Param = Param::new(
    "snapname",
    Kind::Format(format::CONFIG_ID),
    "The snapshot to clone instead of the present state.",
);

/// The rows of both kinds.
macro_rules! rows {
    ($guest:literal, take: $take:expr, clone: $name:literal, disk: $disk:literal) => {
        &[
            Route::get(
                concat!($guest, "/snapshot"),
                "List the snapshots of a guest.",
                serve!(list),
            )
            .returns(Returns::List(&[
                "name",
                "description",
                "snaptime",
                "parent",
                "running",
                "vmstate",
            ]))
            .check(SEES),
            Route::post(
                concat!($guest, "/snapshot"),
                "Take a snapshot of a guest; one that runs is held while its disks are copied.",
                serve!(take),
            )
            .params($take)
            .returns(Returns::Upid)
            .check(SNAPSHOTS),
            Route::delete(
                concat!($guest, "/snapshot/{snapname}"),
                "Remove a snapshot.",
                serve!(delete),
            )
            .params(&[FORCE])
            .returns(Returns::Upid)
            .check(SNAPSHOTS),
            Route::get(
                concat!($guest, "/snapshot/{snapname}/config"),
                "Show what the config said at a snapshot.",
                serve!(config),
            )
            .returns(Returns::Object(&["snaptime", "description"]))
            .check(ROLLS_BACK),
            Route::put(
                concat!($guest, "/snapshot/{snapname}/config"),
                "Change the notes of a snapshot.",
                serve!(describe),
            )
            .params(&[DESCRIPTION])
            .check(SNAPSHOTS),
            Route::post(
                concat!($guest, "/snapshot/{snapname}/rollback"),
                "Take a guest back to a snapshot. What it has done since is lost.",
                serve!(roll_back),
            )
            .params(&[START])
            .returns(Returns::Upid)
            .check(ROLLS_BACK),
            Route::post(
                concat!($guest, "/clone"),
                "Make a guest of its own with copies of another one's disks.",
                serve!(clone),
            )
            .params(&[
                NEW_ID,
                Param::new(
                    $name,
                    Kind::Format(format::DNS_NAME),
                    "Name of the new guest.",
                ),
                DESCRIPTION,
                FROM,
                FULL,
                STORAGE,
                TARGET,
                Param::new(
                    "format",
                    FORMATS,
                    "Format of the new disks; each its source's, when it is not given. Containers' are always raw.",
                ),
                BANDWIDTH,
            ])
            .returns(Returns::Upid)
            .check(CLONES),
            Route::post(
                concat!($guest, "/template"),
                "Make a guest a template, which is only there to be cloned.",
                serve!(template),
            )
            .params(&[Param::new(
                $disk,
                text(32),
                "Accepted for PVE's clients: always the whole guest.",
            )])
            .returns(Returns::Upid)
            .check(ALLOCATES),
        ]
    };
}

const STATE: Param = Param::new(
    "vmstate",
    Kind::Boolean,
    "Keep the memory, too, if the machine runs, which it does while that is written, if it can; it goes on from there after a rollback.",
);

pub const VMS: &[Route] = rows!("/nodes/{node}/qemu/{vmid}", take: &[SNAPSHOT, DESCRIPTION, STATE], clone: "name", disk: "disk");
pub const CONTAINERS: &[Route] = rows!("/nodes/{node}/lxc/{vmid}", take: &[SNAPSHOT, DESCRIPTION], clone: "hostname", disk: "experimental");

async fn list(call: Call) -> Result<Answer, Refusal> {
    let (kind, id) = (kind(&call), id(&call));
    let stored = stored(&call)?;
    let running = call.daemon.node.guests().status(kind, id).await?.running;
    let rows = snapshot::list(&stored.config).into_iter().map(|row| {
        object([
            ("name", Some(json!(row.name))),
            ("description", Some(json!(row.description))),
            ("snaptime", row.time.map(|time| json!(time))),
            ("parent", row.parent.map(|parent| json!(parent))),
            ("snapstate", row.state.map(|state| json!(state))),
            ("vmstate", Some(json!(u8::from(row.has_memory)))),
        ])
    });
    // PVE's last row: where the guest is now.
    let current = object([
        ("name", Some(json!("current"))),
        ("description", Some(json!("You are here!"))),
        ("digest", Some(json!(stored.config.digest))),
        ("running", Some(json!(u8::from(running)))),
        (
            "parent",
            stored.config.get("parent").map(|parent| json!(parent)),
        ),
    ]);
    Ok(Answer::Data(
        rows.chain([current]).collect::<Vec<Value>>().into(),
    ))
}

async fn take(call: Call) -> Result<Answer, Refusal> {
    let guests = call.daemon.node.guests();
    let upid = guests.snapshot(
        kind(&call),
        id(&call),
        call.values.required("snapname"),
        call.values.text("description").unwrap_or_default(),
        call.values.flag("vmstate"),
        call.caller().identity(),
    )?;
    Ok(Answer::Data(json!(upid.to_string())))
}

async fn delete(call: Call) -> Result<Answer, Refusal> {
    let (name, user) = (call.values.required("snapname"), call.caller().identity());
    let guests = call.daemon.node.guests();
    let upid = guests.delete_snapshot(kind(&call), id(&call), name, user)?;
    Ok(Answer::Data(json!(upid.to_string())))
}

async fn config(call: Call) -> Result<Answer, Refusal> {
    let (stored, name) = (stored(&call)?, call.values.required("snapname"));
    snapshot::find(&stored.config, name)?;
    let view = view::snapshot(&stored.config, name).unwrap_or_default();
    Ok(Answer::Data(view.into()))
}

async fn describe(call: Call) -> Result<Answer, Refusal> {
    let (kind, id) = (kind(&call), id(&call));
    let name = call.values.required("snapname").to_owned();
    let description = call
        .values
        .text("description")
        .unwrap_or_default()
        .to_owned();
    let node = call.daemon.node.clone();
    node.guests()
        .describe_snapshot(kind, id, &name, &description)
        .await?;
    Ok(Answer::NULL)
}

async fn roll_back(call: Call) -> Result<Answer, Refusal> {
    let (name, user) = (call.values.required("snapname"), call.caller().identity());
    let starts = call.values.flag("start");
    let guests = call.daemon.node.guests();
    let upid = guests.roll_back(kind(&call), id(&call), name, starts, user)?;
    Ok(Answer::Data(json!(upid.to_string())))
}

async fn clone(call: Call) -> Result<Answer, Refusal> {
    let new_id: GuestId = call
        .values
        .number("newid")
        .expect("newid is required and its format is a guest's number");
    let text = |name: &str| call.values.text(name).map(str::to_owned);
    if let Some(target) = text("target").filter(|target| target != call.daemon.node.name()) {
        return Err(Error::refused(format!("no such cluster node '{target}'")).into());
    }
    let path = format!("/vms/{new_id}");
    if !call.caller().has(&path, Privilege::VmAllocate) {
        let text = format!("Permission check failed ({path}, VM.Allocate)");
        return Err(Error::Denied(text).into());
    }
    let source = stored(&call)?;
    super::guests::authorize_clone(call.caller(), &source, text("storage").as_deref())?;
    let storage = text("storage").map(|name| name.parse()).transpose();
    let wish = Wish {
        name: text("name").or_else(|| text("hostname")),
        description: text("description"),
        snapshot: text("snapname"),
        storage: storage.map_err(|error| Error::invalid("storage", format!("{error}")))?,
        format: match kind(&call) {
            GuestKind::Vm => call.values.text("format").and_then(parse_format),
            GuestKind::Container => None,
        },
        bytes_per_second: bytes_per_second(&call),
    };
    let (guests, user) = (call.daemon.node.guests(), call.caller().identity());
    let upid = guests.clone_guest(kind(&call), id(&call), new_id, wish, user)?;
    Ok(Answer::Data(json!(upid.to_string())))
}

async fn template(call: Call) -> Result<Answer, Refusal> {
    let user = call.caller().identity();
    let guests = call.daemon.node.guests();
    let upid = guests.make_template(kind(&call), id(&call), user)?;
    Ok(Answer::Data(json!(upid.to_string())))
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A guest's disks beside their keys in its config: moved to another storage or format, taken out.

use std::collections::BTreeSet;

use atoll_manager::access::{Check, Privilege};
use atoll_manager::error::Error;
use atoll_manager::guest::ConfigUpdate;
use atoll_manager::guest::move_disk::Wish;
use atoll_manager::schema::{Kind, Param, format};
use atoll_manager::storage::name::parse_format;
use serde_json::json;

use super::guests::{id, kind, stored};
use super::parameters::{BANDWIDTH, DIGEST, FORMATS, bytes_per_second, text};
use super::serve;
use crate::answer::{Answer, Refusal};
use crate::route::{Call, Returns, Route};

const CONFIGURES: Check = Check::All {
    path: "/vms/{vmid}",
    privileges: &[Privilege::VmConfigDisk],
};

const STORAGE: Param = Param::new(
    "storage",
    Kind::Format(format::STORAGE_ID),
    "Where it goes; the storage where it is, when it is not given.",
);
const DELETE: Param = Param::new(
    "delete",
    Kind::Boolean,
    "Remove the former volume; otherwise it becomes an unused one.",
);
pub const ROUTES: &[Route] = &[
    Route::post(
        "/nodes/{node}/qemu/{vmid}/move_disk",
        "Move a disk to another storage or format, also while its guest runs.",
        serve!(move_disk),
    )
    .params(&[
        Param::new("disk", text(32), "Key of the disk, such as scsi0.").required(),
        STORAGE,
        Param::new(
            "format",
            FORMATS,
            "Format of the new image; the present one, when it is not given.",
        ),
        DELETE,
        DIGEST,
        BANDWIDTH,
    ])
    .returns(Returns::Upid)
    .check(CONFIGURES),
    Route::post(
        "/nodes/{node}/lxc/{vmid}/move_volume",
        "Move a volume to another storage, while its guest does not run.",
        serve!(move_disk),
    )
    .params(&[
        Param::new("volume", text(32), "Key of the volume, such as rootfs.").required(),
        STORAGE,
        DELETE,
        DIGEST,
        BANDWIDTH,
    ])
    .returns(Returns::Upid)
    .check(CONFIGURES),
    Route::put(
        "/nodes/{node}/qemu/{vmid}/unlink",
        "Take disks out of a guest.",
        serve!(unlink),
    )
    .params(&[
        Param::new(
            "idlist",
            Kind::Format(format::CONFIG_ID_LIST),
            "Keys of the disks.",
        )
        .required(),
        Param::new(
            "force",
            Kind::Boolean,
            "Remove the volumes, too; otherwise they become unused ones.",
        ),
    ])
    .check(CONFIGURES),
];

async fn move_disk(call: Call) -> Result<Answer, Refusal> {
    let (kind, id) = (kind(&call), id(&call));
    let present = stored(&call)?;
    present.config.check_digest(call.values.text("digest"))?;
    let given = |name: &str| call.values.text(name);
    let disk = given("disk").or_else(|| given("volume"));
    let disk = disk.unwrap_or_default().to_owned();
    let beside = || {
        let value = present.config.get(&disk)?;
        Some(value.split_once(':')?.0.to_owned())
    };
    if let Some(storage) = given("storage").map(str::to_owned).or_else(beside) {
        let path = format!("/storage/{storage}");
        if !call.caller().has(&path, Privilege::DatastoreAllocateSpace) {
            let text = format!("Permission check failed ({path}, Datastore.AllocateSpace)");
            return Err(Error::Denied(text).into());
        }
    }
    let storage = given("storage").map(str::parse).transpose();
    let wish = Wish {
        disk,
        storage: storage.map_err(|error| Error::invalid("storage", format!("{error}")))?,
        format: given("format").and_then(parse_format),
        deletes: call.values.flag("delete"),
        bytes_per_second: bytes_per_second(&call),
    };
    let (guests, user) = (call.daemon.node.guests(), call.caller().identity());
    let upid = guests.move_disk(kind, id, wish, user)?;
    Ok(Answer::Data(json!(upid.to_string())))
}

async fn unlink(call: Call) -> Result<Answer, Refusal> {
    let (kind, id) = (kind(&call), id(&call));
    let keys: BTreeSet<String> = call.values.list("idlist").into_iter().collect();
    let none = BTreeSet::new();
    let mut change = ConfigUpdate::new(kind, Default::default(), keys, none, None)?;
    change.frees = call.values.flag("force");
    let node = call.daemon.node.clone();
    node.guests().update(kind, id, change).await?;
    Ok(Answer::NULL)
}

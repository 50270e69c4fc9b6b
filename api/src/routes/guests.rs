// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Guests of a node: what there is, how each is configured, making and removing them.
//!
//! Virtual machines (`qemu`) and containers (`lxc`) have the same rows; the kind is in the path. What is done to
//! a guest that exists is in `guest_actions`.

use std::collections::{BTreeMap, BTreeSet};

use atoll_manager::access::{Caller, Check, Privilege};
use atoll_manager::error::Error;
use atoll_manager::guest::view::{self, View};
use atoll_manager::guest::{ConfigUpdate, Status, Stored, disks, keys, stored};
use atoll_manager::id::{GuestId, GuestKind};
use atoll_manager::schema::{Kind, Param, format};
use atoll_manager::storage::name::VolumeId;
use atoll_manager::task;
use serde_json::{Value, json};

use super::parameters::{DELETE, DIGEST, VMID, text};
use super::{object, serve};
use crate::answer::{Answer, Refusal};
use crate::route::{Call, Returns, Route};

const SEES: Check = Check::All {
    path: "/vms/{vmid}",
    privileges: &[Privilege::VmAudit],
};
const ALLOCATES: Check = Check::All {
    path: "/vms/{vmid}",
    privileges: &[Privilege::VmAllocate],
};
/// The rights for each key are looked at one by one; who has none of them is stopped here.
const CONFIGURES: Check = Check::Any {
    path: "/vms/{vmid}",
    privileges: &[
        Privilege::VmConfigDisk,
        Privilege::VmConfigCdrom,
        Privilege::VmConfigCpu,
        Privilege::VmConfigMemory,
        Privilege::VmConfigNetwork,
        Privilege::VmConfigHwType,
        Privilege::VmConfigOptions,
        Privilege::VmConfigCloudinit,
    ],
};

const STATUS: &[&str] = &[
    "vmid",
    "name",
    "status",
    "cpu",
    "cpus",
    "mem",
    "maxmem",
    "disk",
    "maxdisk",
    "netin",
    "netout",
    "diskread",
    "diskwrite",
    "uptime",
    "pid",
    "lock",
    "tags",
    "template",
];

const REVERT: Param = Param::new(
    "revert",
    Kind::Format(format::CONFIG_ID_LIST),
    "Keys whose pending change is dropped.",
);
const FORCE: Param = Param::new("force", Kind::Boolean, "Stop the guest first when it runs.");
const PURGE: Param = Param::new(
    "purge",
    Kind::Boolean,
    "Accepted for PVE's clients: nothing else refers to guests yet.",
);
const UNREFERENCED: Param = Param::new(
    "destroy-unreferenced-disks",
    Kind::Boolean,
    "Accepted for PVE's clients: all disks of the guest go.",
);
const FREES: Param = Param::new(
    "force",
    Kind::Boolean,
    "Remove the volumes of disks that are deleted, too; otherwise they become unused ones.",
);
const SKIPLOCK: Param = Param::new(
    "skiplock",
    Kind::Boolean,
    "Accepted for PVE's clients; locks are not skipped.",
);
const START: Param = Param::new("start", Kind::Boolean, "Start it when it is made.");
const STORAGE: Param = Param::new(
    "storage",
    Kind::Format(format::STORAGE_ID),
    "Storage for disks that name none.",
);
const POOL: Param = Param::new("pool", text(64), "There are no pools yet.");

/// The rows of both kinds.
macro_rules! rows {
    ($word:literal, $kind:expr, create: $create:expr, update: $update:expr) => {
        &[
            Route::get(
                concat!("/nodes/{node}/", $word),
                "List the guests of a node.",
                serve!(list),
            )
            .params(&[Param::new(
                "full",
                Kind::Boolean,
                "Accepted for PVE's clients; the list is always full.",
            )])
            .returns(Returns::List(STATUS))
            .check(Check::AnyUser),
            Route::post(
                concat!("/nodes/{node}/", $word),
                "Create a guest.",
                serve!(create),
            )
            .params($create)
            .keys($kind)
            .returns(Returns::Upid)
            .check(ALLOCATES),
            Route::delete(
                concat!("/nodes/{node}/", $word, "/{vmid}"),
                "Remove a guest with its disks.",
                serve!(destroy),
            )
            .params(&[FORCE, PURGE, UNREFERENCED, SKIPLOCK])
            .returns(Returns::Upid)
            .check(ALLOCATES),
            Route::get(
                concat!("/nodes/{node}/", $word, "/{vmid}/config"),
                "Show a guest's config.",
                serve!(config),
            )
            .params(&[
                Param::new(
                    "current",
                    Kind::Boolean,
                    "What the guest has now, without pending changes.",
                ),
                Param::new(
                    "snapshot",
                    text(40),
                    "The config that this snapshot has kept.",
                ),
            ])
            .returns(Returns::Object(&["digest"]))
            .check(SEES),
            Route::put(
                concat!("/nodes/{node}/", $word, "/{vmid}/config"),
                "Change a guest's config.",
                serve!(update),
            )
            .params($update)
            .keys($kind)
            .check(CONFIGURES),
            Route::get(
                concat!("/nodes/{node}/", $word, "/{vmid}/pending"),
                "List changes that wait for a start.",
                serve!(pending),
            )
            .returns(Returns::List(&["key", "value", "pending", "delete"]))
            .check(SEES),
            Route::get(
                concat!("/nodes/{node}/", $word, "/{vmid}/status/current"),
                "Show how a guest is.",
                serve!(status),
            )
            .returns(Returns::Object(STATUS))
            .check(SEES),
        ]
    };
}

const UPDATE: &[Param] = &[DELETE, REVERT, DIGEST, SKIPLOCK];

pub const VMS: &[Route] = rows!("qemu", GuestKind::Vm,
    create: &[VMID, START, STORAGE, POOL, FORCE,
        Param::new("archive", text(512), "Restoring a backup is not there yet."),
    ],
    update: &[DELETE, REVERT, DIGEST, SKIPLOCK, FREES]
);

pub const CONTAINERS: &[Route] = rows!("lxc", GuestKind::Container,
    create: &[VMID, START, STORAGE, POOL, FORCE,
        Param::new("ostemplate", text(512), "Template to make the root file system from: STORAGE:vztmpl/NAME.").required(),
        Param::new("password", text(1024), "Password of root in the container."),
        Param::new("ssh-public-keys", text(65536), "Keys that may sign in as root, one a line."),
        Param::new("restore", Kind::Boolean, "Restoring a backup is not there yet."),
        Param::new(
            "pve-config",
            text(131_072),
            "Text of a container's config file from PVE, /etc/pve/lxc/N.conf, whose keys and raw lines are taken over; \
             keys that are given beside it win. Its volumes are made anew. Atoll's own: PVE does not have it.",
        ),
    ],
    update: UPDATE
);

pub const INTERFACES: &[Route] = &[Route::get(
    "/nodes/{node}/lxc/{vmid}/interfaces",
    "List a running container's network interfaces with their addresses.",
    serve!(interfaces),
)
.returns(Returns::List(&[
    "name",
    "hwaddr",
    "inet",
    "inet6",
    "hardware-address",
    "ip-addresses",
]))
.check(SEES)];

pub const ASYNC_UPDATE: &[Route] = &[Route::post(
    "/nodes/{node}/qemu/{vmid}/config",
    "Change a guest's config in a task.",
    serve!(update_in_task),
)
.params(&[
    DELETE,
    REVERT,
    DIGEST,
    SKIPLOCK,
    FREES,
    Param::new(
        "background_delay",
        Kind::Integer { min: 1, max: 30 },
        "Seconds to wait for the end before answering.",
    ),
])
.keys(GuestKind::Vm)
.returns(Returns::Upid)
.check(CONFIGURES)];

/// Which kind of guest the path is about.
pub fn kind(call: &Call) -> GuestKind {
    match call.route.path.starts_with("/nodes/{node}/lxc") {
        true => GuestKind::Container,
        false => GuestKind::Vm,
    }
}

/// The guest of the path, or of the parameters.
pub fn id(call: &Call) -> GuestId {
    let checked = call.values.number("vmid");
    checked.expect("vmid is required and its format is a guest's number")
}

/// The config of the guest of the path.
pub fn stored(call: &Call) -> Result<Stored, Error> {
    let node = &call.daemon.node;
    stored::load(node.store().as_ref(), node.name(), kind(call), id(call))
}

/// How a guest is, in PVE's names; `cpu` is a fraction of its CPUs, sizes are bytes, counts since its start.
pub fn status_row(status: &Status) -> Value {
    let is_container = status.kind == GuestKind::Container;
    object([
        ("vmid", Some(json!(u32::from(status.id)))),
        ("name", Some(json!(status.name))),
        (
            "status",
            Some(json!(if status.running { "running" } else { "stopped" })),
        ),
        ("cpu", Some(json!(status.cpu))),
        ("cpus", Some(whole(status.cpus))),
        ("mem", Some(json!(status.load.memory_bytes))),
        ("maxmem", Some(json!(status.memory_bytes_max))),
        (
            "maxswap",
            is_container.then(|| json!(status.swap_bytes_max)),
        ),
        ("disk", Some(json!(status.load.disk_bytes))),
        ("maxdisk", Some(json!(status.disk_bytes_max))),
        ("netin", Some(json!(status.load.received_bytes))),
        ("netout", Some(json!(status.load.sent_bytes))),
        ("diskread", Some(json!(status.load.read_bytes))),
        ("diskwrite", Some(json!(status.load.written_bytes))),
        ("uptime", Some(json!(status.uptime_s))),
        ("pid", status.pid.map(|pid| json!(pid))),
        ("lock", status.lock.as_ref().map(|lock| json!(lock))),
        ("tags", status.tags.as_ref().map(|tags| json!(tags))),
        ("template", status.template.then(|| json!(1))),
        ("type", is_container.then(|| json!("lxc"))),
    ])
}

/// A number of CPUs: whole where it is, since strict clients expect an integer.
#[expect(
    clippy::cast_possible_truncation,
    reason = "compared with what it came from"
)]
pub fn whole(number: f64) -> Value {
    #[expect(clippy::cast_precision_loss, reason = "a number of CPUs is small")]
    let is_whole = (number as i64) as f64 == number;
    match is_whole {
        true => json!(number as i64),
        false => json!(number),
    }
}

async fn list(call: Call) -> Result<Answer, Refusal> {
    let kind = kind(&call);
    let caller = call.caller().clone();
    let all = call.daemon.node.guests().list().await?;
    let seen = all.iter().filter(|status| {
        status.kind == kind && caller.has(&format!("/vms/{}", status.id), Privilege::VmAudit)
    });
    Ok(Answer::Data(seen.map(status_row).collect()))
}

async fn status(call: Call) -> Result<Answer, Refusal> {
    let (kind, id) = (kind(&call), id(&call));
    let node = call.daemon.node.clone();
    let status = node.guests().status(kind, id).await?;
    let mut row = status_row(&status);
    row["ha"] = json!({ "managed": 0 });
    // Atoll's own, in Docker's words.
    if let Some(health) = node.guests().health(id).filter(|_| kind != GuestKind::Vm) {
        row["health"] = json!(health.state.as_str());
        row["health-failures"] = json!(health.failures);
        if let Some(message) = health.message {
            row["health-message"] = json!(message);
        }
    }
    if kind == GuestKind::Vm {
        let paused = status.running && node.guests().is_paused(kind, id).await;
        row["qmpstatus"] = json!(match (status.running, paused) {
            (_, true) => "paused",
            (true, false) => "running",
            (false, false) => "stopped",
        });
    }
    Ok(Answer::Data(row))
}

async fn config(call: Call) -> Result<Answer, Refusal> {
    let stored = stored(&call)?;
    if let Some(name) = call.values.text("snapshot") {
        let missing = || Error::refused(format!("snapshot '{name}' does not exist"));
        let snapshot = view::snapshot(&stored.config, name).ok_or_else(missing)?;
        return Ok(Answer::Data(snapshot.into()));
    }
    let view = match call.values.flag("current") {
        true => View::Current,
        false => View::Next,
    };
    Ok(Answer::Data(view::config(&stored.config, view).into()))
}

async fn interfaces(call: Call) -> Result<Answer, Refusal> {
    let id = id(&call);
    let node = call.daemon.node.clone();
    let all = node.guests().interfaces(id).await?;
    let rows = all.iter().map(|inner| {
        let addresses = [("inet", &inner.ipv4), ("inet6", &inner.ipv6)].into_iter();
        let addresses =
            addresses.flat_map(|(kind, list)| list.iter().map(move |cidr| (kind, cidr)));
        let addresses = addresses.filter_map(|(kind, cidr)| {
            let (address, prefix) = cidr.split_once('/')?;
            Some(json!({ "ip-address": address, "ip-address-type": kind, "prefix": prefix }))
        });
        object([
            ("name", Some(json!(inner.name))),
            ("hwaddr", Some(json!(inner.mac))),
            ("hardware-address", Some(json!(inner.mac))),
            ("inet", inner.ipv4.first().map(|cidr| json!(cidr))),
            ("inet6", inner.ipv6.first().map(|cidr| json!(cidr))),
            ("ip-addresses", Some(addresses.collect())),
        ])
    });
    Ok(Answer::Data(rows.collect()))
}

async fn pending(call: Call) -> Result<Answer, Refusal> {
    let stored = stored(&call)?;
    Ok(Answer::Data(view::pending(&stored.config).into()))
}

/// Whether the caller may set each of these keys of a guest.
fn authorize_keys(
    caller: &Caller,
    kind: GuestKind,
    id: GuestId,
    values: &BTreeMap<String, String>,
) -> Result<(), Error> {
    for (name, value) in values {
        let Some(key) = keys::find(kind, name) else {
            continue;
        };
        for (path, any) in key.rights(id.into(), value) {
            let held = caller.privileges(&path);
            if !any.iter().any(|privilege| held.contains(*privilege)) {
                let names: Vec<&str> = any.iter().map(|privilege| privilege.name()).collect();
                let text = format!("Permission check failed ({path}, {})", names.join("|"));
                return Err(Error::Denied(text));
            }
        }
    }
    Ok(())
}

/// Whether the caller may put disks on the storages that these values name (`STORAGE:SIZE`), use the volumes that they
/// name (`STORAGE:NAME`), and copy those that they import. Another guest's disk is for who has the storage.
fn authorize_storages(
    caller: &Caller,
    id: GuestId,
    values: &BTreeMap<String, String>,
) -> Result<(), Error> {
    for (name, value) in values {
        let is_drive = [
            "scsi", "virtio", "sata", "ide", "mp", "rootfs", "efidisk", "tpmstate", "unused",
        ]
        .iter()
        .any(|stem| name.starts_with(stem));
        if !is_drive {
            continue;
        }
        let imported = value
            .split(',')
            .find_map(|item| item.strip_prefix("import-from="));
        for volume in [Some(disks::volume_of(value)), imported]
            .into_iter()
            .flatten()
        {
            authorize_volume(caller, id, volume)?;
        }
    }
    Ok(())
}

fn authorize_volume(caller: &Caller, id: GuestId, volume: &str) -> Result<(), Error> {
    let Some((storage, _)) = volume.split_once(':') else {
        return Ok(());
    };
    let path = format!("/storage/{storage}");
    let needed: &[Privilege] = match volume.parse::<VolumeId>() {
        Ok(volume) if volume.name.owner().is_none() => {
            &[Privilege::DatastoreAllocateSpace, Privilege::DatastoreAudit]
        }
        Ok(volume) if volume.name.owner() != Some(id) => &[Privilege::DatastoreAllocate],
        _ => &[Privilege::DatastoreAllocateSpace],
    };
    if needed.iter().any(|privilege| caller.has(&path, *privilege)) {
        return Ok(());
    }
    let names: Vec<&str> = needed.iter().map(|privilege| privilege.name()).collect();
    let text = format!("Permission check failed ({path}, {})", names.join("|"));
    Err(Error::Denied(text))
}

/// Whether the caller may put copies of a guest's disks on `storage`, or beside the disks.
pub fn authorize_clone(
    caller: &Caller,
    source: &Stored,
    storage: Option<&str>,
) -> Result<(), Error> {
    let Some(storage) = storage else {
        return authorize_storages(caller, source.id, &source.config.current.values);
    };
    let disk = ("rootfs".to_owned(), format!("{storage}:1"));
    authorize_storages(caller, source.id, &BTreeMap::from([disk]))
}

async fn create(call: Call) -> Result<Answer, Refusal> {
    let (kind, id) = (kind(&call), id(&call));
    let values = call
        .values
        .filtered(|name| !matches!(name, "node" | "vmid" | "force"));
    authorize_keys(call.caller(), kind, id, &values)?;
    authorize_storages(call.caller(), id, &values)?;
    // Its raw lines reach the host in every way.
    if values.contains_key("pve-config") && !call.caller().has("/", Privilege::SysModify) {
        return Err(Error::Denied("Permission check failed (/, Sys.Modify)".to_owned()).into());
    }
    let user = call.caller().identity();
    let upid = call.daemon.node.guests().create(kind, id, values, user)?;
    Ok(Answer::Data(json!(upid.to_string())))
}

async fn destroy(call: Call) -> Result<Answer, Refusal> {
    let user = call.caller().identity();
    let force = call.values.flag("force");
    let guests = call.daemon.node.guests();
    let upid = guests.destroy(kind(&call), id(&call), force, user)?;
    Ok(Answer::Data(json!(upid.to_string())))
}

/// The change that is asked for, if the caller may make it.
fn wanted(call: &Call) -> Result<ConfigUpdate, Error> {
    let (kind, id) = (kind(call), id(call));
    let caller = call.caller();
    let set = call
        .values
        .filtered(|name| keys::find(kind, name).is_some());
    authorize_keys(caller, kind, id, &set)?;
    authorize_storages(caller, id, &set)?;
    let delete: BTreeSet<String> = call.values.list("delete").into_iter().collect();
    let revert: BTreeSet<String> = call.values.list("revert").into_iter().collect();
    let present = stored(call)?;
    let others = delete.iter().chain(&revert);
    let touched = others.map(|name| {
        (
            name.clone(),
            present.config.get(name).unwrap_or_default().to_owned(),
        )
    });
    authorize_keys(caller, kind, id, &touched.collect())?;
    let digest = call.values.text("digest").map(str::to_owned);
    let mut change = ConfigUpdate::new(kind, set, delete, revert, digest)?;
    change.frees = call.values.flag("force");
    Ok(change)
}

async fn update(call: Call) -> Result<Answer, Refusal> {
    let change = wanted(&call)?;
    let (kind, id) = (kind(&call), id(&call));
    let node = call.daemon.node.clone();
    let imports = |value: &String| value.contains("import-from=");
    if change.set.values().any(imports) {
        // That takes a while, and is on record.
        let user = call.caller().identity();
        let upid = node.guests().update_as_task(kind, id, change, user)?;
        return match node.tasks().wait(&upid).await? {
            status if status == task::OK => Ok(Answer::NULL),
            status => Err(Error::refused(status).into()),
        };
    }
    node.guests().update(kind, id, change).await?;
    Ok(Answer::NULL)
}

async fn update_in_task(call: Call) -> Result<Answer, Refusal> {
    let change = wanted(&call)?;
    let (kind, id) = (kind(&call), id(&call));
    let user = call.caller().identity();
    let upid = call
        .daemon
        .node
        .guests()
        .update_as_task(kind, id, change, user)?;
    Ok(Answer::Data(json!(upid.to_string())))
}

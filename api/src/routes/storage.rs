// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Storages: their configuration, which is the cluster's, and how a node sees them.

use std::collections::BTreeMap;

use atoll_manager::access::{Caller, Check, Privilege};
use atoll_manager::error::Error;
use atoll_manager::schema::{Kind, Param, format};
use atoll_manager::storage::name::StorageName;
use atoll_manager::storage::section::Section;
use atoll_manager::storage::{Status, Storages, configure};
use serde_json::{Value, json};

use super::parameters::{DELETE, DIGEST};
use super::volumes::SEES_STORAGE;
use super::{bit, object, serve, texts};
use crate::answer::{Answer, Refusal};
use crate::route::{Call, Returns, Route};

const CONFIGURES: Check = Check::All {
    path: "/storage",
    privileges: &[Privilege::DatastoreAllocate],
};

const STATUS: &[&str] = &[
    "storage",
    "type",
    "content",
    "active",
    "enabled",
    "shared",
    "total",
    "used",
    "avail",
    "used_fraction",
];

const CONTENT: Param = configure::CONTENT;
const NODES: Param = configure::NODES;
const DISABLE: Param = configure::DISABLE;
const SHARED: Param = configure::SHARED;
const PATH: Param = configure::PATH;

pub const ROUTES: &[Route] = &[
    Route::get(
        "/storage",
        "List the storages of the cluster.",
        serve!(list),
    )
    .params(&[Param::new(
        "type",
        Kind::Choice(configure::TYPES),
        "Only storages of this type.",
    )])
    .returns(Returns::List(&["storage", "type", "content", "digest"]))
    .check(Check::AnyUser),
    Route::post("/storage", "Add a storage.", serve!(create))
        .params(&[
            Param::new(
                "storage",
                Kind::Format(format::STORAGE_ID),
                "Name of the storage.",
            )
            .required(),
            Param::new(
                "type",
                Kind::Choice(configure::TYPES),
                "Type of the storage.",
            )
            .required(),
            PATH,
            CONTENT,
            NODES,
            DISABLE,
            SHARED,
        ])
        .returns(Returns::Object(&["storage", "type"]))
        .check(CONFIGURES),
    Route::get(
        "/storage/{storage}",
        "Show the configuration of a storage.",
        serve!(show),
    )
    .returns(Returns::Object(&["storage", "type", "content", "digest"]))
    .check(Check::All {
        path: "/storage/{storage}",
        privileges: &[Privilege::DatastoreAllocate],
    }),
    Route::put(
        "/storage/{storage}",
        "Change the configuration of a storage.",
        serve!(update),
    )
    .params(&[CONTENT, NODES, DISABLE, SHARED, DELETE, DIGEST])
    .returns(Returns::Object(&["storage", "type"]))
    .check(CONFIGURES),
    Route::delete(
        "/storage/{storage}",
        "Take a storage out of the configuration; its volumes stay.",
        serve!(remove),
    )
    .check(CONFIGURES),
    Route::get(
        "/nodes/{node}/storage",
        "List the storages of a node with their space.",
        serve!(statuses),
    )
    .params(&[
        Param::new(
            "content",
            Kind::Format(CONTENT_LIST),
            "Only storages for one of these contents.",
        ),
        Param::new(
            "enabled",
            Kind::Boolean,
            "Only storages that are not switched off.",
        ),
        Param::new(
            "storage",
            Kind::Format(format::STORAGE_ID),
            "Only this storage.",
        ),
    ])
    .returns(Returns::List(STATUS))
    .check(Check::AnyUser),
    Route::get(
        "/nodes/{node}/storage/{storage}/status",
        "Show the space of a storage.",
        serve!(status),
    )
    .returns(Returns::Object(STATUS))
    .check(SEES_STORAGE),
];

const CONTENT_LIST: atoll_manager::schema::Format = atoll_manager::schema::Format {
    name: "pve-storage-content-list",
    check: configure::check_contents,
};

/// Whether somebody may know of a storage.
pub fn is_visible(caller: &Caller, storage: &str) -> bool {
    let has = caller.privileges(&format!("/storage/{storage}"));
    has.contains(Privilege::DatastoreAudit) || has.contains(Privilege::DatastoreAllocateSpace)
}

/// The storage of the path or of a parameter.
pub fn storage_name(call: &Call) -> Result<StorageName, Error> {
    let name = call.values.required("storage");
    name.parse()
        .map_err(|_| Error::refused(format!("storage '{name}' does not exist")))
}

/// The keys of a section that came as parameters.
fn keys(call: &Call) -> BTreeMap<String, String> {
    let names = [PATH, CONTENT, NODES, DISABLE, SHARED].map(|param| param.name);
    let given = names
        .iter()
        .filter_map(|name| Some((*name, call.values.text(name)?)));
    given.map(|(k, v)| (k.to_owned(), v.to_owned())).collect()
}

fn config(storages: &Storages, section: &Section) -> Result<Value, Error> {
    let mut config = texts(&section.keys);
    for flag in ["disable", "shared"] {
        if let Some(value) = section.keys.get(flag) {
            config[flag] = bit(value != "0");
        }
    }
    config["storage"] = json!(section.name.as_str());
    config["type"] = json!(section.kind);
    config["digest"] = json!(storages.digest()?);
    Ok(config)
}

async fn list(call: Call) -> Result<Answer, Refusal> {
    let node = &call.daemon.node;
    let kind = call.values.text("type");
    let mut rows = Vec::new();
    for section in node.storage().sections()? {
        let wanted = kind.is_none_or(|kind| section.kind == kind);
        if wanted && is_visible(call.caller(), section.name.as_str()) {
            rows.push(config(node.storage(), &section)?);
        }
    }
    Ok(Answer::Data(rows.into()))
}

async fn show(call: Call) -> Result<Answer, Refusal> {
    let storages = call.daemon.node.storage();
    let section = storages.section(&storage_name(&call)?)?;
    Ok(Answer::Data(config(storages, &section)?))
}

async fn create(call: Call) -> Result<Answer, Refusal> {
    let kind = call.values.required("type");
    let section = Section {
        kind: kind.to_owned(),
        name: storage_name(&call)?,
        keys: keys(&call),
    };
    call.daemon.node.storage().create(section).await?;
    Ok(Answer::Data(
        json!({ "storage": call.values.required("storage"), "type": kind }),
    ))
}

async fn update(call: Call) -> Result<Answer, Refusal> {
    let storages = call.daemon.node.storage();
    let name = storage_name(&call)?;
    let change = configure::Change {
        set: keys(&call),
        delete: call.values.list("delete"),
        digest: call.values.text("digest").map(str::to_owned),
    };
    storages.update(&name, change).await?;
    let kind = storages.section(&name)?.kind;
    Ok(Answer::Data(
        json!({ "storage": name.as_str(), "type": kind }),
    ))
}

async fn remove(call: Call) -> Result<Answer, Refusal> {
    call.daemon
        .node
        .storage()
        .remove(&storage_name(&call)?)
        .await?;
    Ok(Answer::NULL)
}

/// Whether every node sees the same volumes.
pub fn is_shared(section: &Section) -> bool {
    section.keys.get("shared").is_some_and(|value| value != "0")
}

/// How a node sees a storage. PVE's names; sizes in bytes.
pub fn status_row(status: &Status) -> Value {
    let space = status.space.unwrap_or_default();
    let contents: Vec<&str> = status
        .contents
        .iter()
        .map(|content| content.as_str())
        .collect();
    #[expect(clippy::cast_precision_loss, reason = "a fraction for display")]
    let fraction =
        (space.total_bytes > 0).then(|| json!(space.used_bytes as f64 / space.total_bytes as f64));
    object([
        ("storage", Some(json!(status.section.name.as_str()))),
        ("type", Some(json!(status.section.kind))),
        ("content", Some(json!(contents.join(",")))),
        ("active", Some(bit(status.space.is_some()))),
        ("enabled", Some(bit(status.enabled))),
        ("shared", Some(bit(is_shared(&status.section)))),
        ("total", Some(json!(space.total_bytes))),
        ("used", Some(json!(space.used_bytes))),
        ("avail", Some(json!(space.available_bytes))),
        ("used_fraction", fraction),
    ])
}

async fn statuses(call: Call) -> Result<Answer, Refusal> {
    let node = &call.daemon.node;
    let contents = call.values.list("content");
    let only = call.values.text("storage");
    let enabled = call.values.flag("enabled");
    let all = node.storage().status().await?;
    let rows = all.iter().filter(|status| {
        let name = status.section.name.as_str();
        let holds = |word: &String| {
            status
                .contents
                .iter()
                .any(|content| content.as_str() == word)
        };
        (contents.is_empty() || contents.iter().any(holds))
            && only.is_none_or(|only| only == name)
            && (!enabled || status.enabled)
            && is_visible(call.caller(), name)
    });
    Ok(Answer::Data(rows.map(status_row).collect()))
}

async fn status(call: Call) -> Result<Answer, Refusal> {
    let storages = call.daemon.node.storage();
    let section = storages.section(&storage_name(&call)?)?;
    let mut row = status_row(&storages.status_of(section).await);
    if let Some(members) = row.as_object_mut() {
        members.retain(|name, _| name != "storage" && name != "used_fraction");
    }
    Ok(Answer::Data(row))
}

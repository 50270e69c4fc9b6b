// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The cluster: everything that it has in one list, its members, its options, its pools.

use atoll_manager::access::{Caller, Check, Privilege};
use atoll_manager::cluster::OPTIONS;
use atoll_manager::error::Error;
use atoll_manager::id::GuestId;
use atoll_manager::schema::{Kind, Param, format};
use bytes::Bytes;
use serde::Serialize;
use serde_json::json;

use super::parameters::{DELETE, DIGEST};
use super::storage::is_visible;
use super::{serve, storage};
use crate::answer::{Answer, Refusal};
use crate::daemon::Daemon;
use crate::route::{Call, Returns, Route};

pub const ROUTES: &[Route] = &[
    Route::get(
        "/cluster/resources",
        "List guests, storages and nodes with their figures.",
        serve!(resources),
    )
    .params(&[Param::new(
        "type",
        Kind::Choice(&["vm", "storage", "node", "sdn"]),
        "Only resources of this type.",
    )])
    .returns(Returns::List(&[
        "id",
        "type",
        "node",
        "status",
        "vmid",
        "name",
        "storage",
        "cpu",
        "maxcpu",
        "mem",
        "maxmem",
        "disk",
        "maxdisk",
        "netin",
        "netout",
        "diskread",
        "diskwrite",
        "uptime",
        "template",
        "tags",
        "lock",
        "content",
        "plugintype",
        "shared",
    ]))
    .check(Check::AnyUser),
    Route::get(
        "/cluster/status",
        "List the members of the cluster.",
        serve!(members),
    )
    .returns(Returns::List(&[
        "type", "id", "name", "nodeid", "ip", "local", "online", "level",
    ]))
    .check(Check::All {
        path: "/",
        privileges: &[Privilege::SysAudit],
    }),
    Route::get(
        "/cluster/nextid",
        "The smallest free guest number, or whether one is free.",
        serve!(next_id),
    )
    .params(&[Param::new(
        "vmid",
        Kind::Format(format::VMID),
        "The number to look at.",
    )])
    .returns(Returns::Text)
    .check(Check::AnyUser),
    Route::get(
        "/cluster/options",
        "Show the options of the cluster.",
        serve!(options),
    )
    .returns(Returns::Object(&[
        "keyboard",
        "console",
        "mac_prefix",
        "next-id",
        "description",
    ]))
    .check(Check::AnyUser),
    Route::put(
        "/cluster/options",
        "Change the options of the cluster.",
        serve!(set_options),
    )
    .params(&OPTION_PARAMS)
    .check(Check::All {
        path: "/",
        privileges: &[Privilege::SysModify],
    }),
    Route::get(
        "/pools",
        "List the pools: there are none yet.",
        serve!(pools),
    )
    .returns(Returns::List(&["poolid"]))
    .check(Check::AnyUser),
];

/// The options, and what a change of them has besides.
const OPTION_PARAMS: [Param; OPTIONS.len() + 2] = {
    let mut all = [DELETE; OPTIONS.len() + 2];
    let mut index = 0;
    while index < OPTIONS.len() {
        all[index] = OPTIONS[index];
        index += 1;
    }
    all[index] = DIGEST;
    all
};

/// One resource. Kept as a struct so that a thousand of them are written without a map each.
#[derive(Debug, Default, Serialize)]
struct Resource<'a> {
    id: String,
    #[serde(rename = "type")]
    kind: &'a str,
    node: &'a str,
    status: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    vmid: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    storage: Option<&'a str>,
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    figures: Option<Figures>,
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    traffic: Option<Traffic>,
    #[serde(skip_serializing_if = "Option::is_none")]
    disk: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    maxdisk: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    template: Option<u8>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tags: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    lock: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    plugintype: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    shared: Option<u8>,
    #[serde(skip_serializing_if = "Option::is_none")]
    level: Option<&'a str>,
}

/// What nodes and guests use.
#[derive(Debug, Serialize)]
struct Figures {
    cpu: f64,
    maxcpu: f64,
    mem: u64,
    maxmem: u64,
    uptime: u64,
}

/// What guests move.
#[derive(Debug, Serialize)]
struct Traffic {
    netin: u64,
    netout: u64,
    diskread: u64,
    diskwrite: u64,
}

async fn resources(call: Call) -> Result<Answer, Refusal> {
    let daemon = std::sync::Arc::clone(&call.daemon);
    let caller = call.caller().clone();
    let kind = call.values.text("type").map(str::to_owned);
    let wanted = |this: &str| kind.as_deref().is_none_or(|kind| kind == this);
    let mut parts = Vec::new();
    if wanted("node") {
        parts.push(node(&daemon, &caller)?);
    }
    if wanted("storage") {
        parts.push(storages(&daemon, &caller).await?);
    }
    if wanted("vm") {
        parts.push(guests(&daemon, &caller).await?);
    }
    // Each part is a list; they are joined between their brackets.
    let inner = parts
        .iter()
        .map(|part| &part[1..part.len() - 1])
        .filter(|part| !part.is_empty());
    let mut text = vec![b'['];
    for (index, part) in inner.enumerate() {
        if index > 0 {
            text.push(b',');
        }
        text.extend_from_slice(part);
    }
    text.push(b']');
    Ok(Answer::Text(Bytes::from(text)))
}

fn text(rows: &[Resource<'_>]) -> Result<Vec<u8>, Error> {
    serde_json::to_vec(rows).map_err(|error| Error::failed("write the list of resources", error))
}

fn node(daemon: &Daemon, caller: &Caller) -> Result<Vec<u8>, Error> {
    let name = daemon.node.name();
    let mut row = Resource {
        id: format!("node/{name}"),
        kind: "node",
        node: name,
        status: "online",
        level: Some(""),
        ..Resource::default()
    };
    if caller.has(&format!("/nodes/{name}"), Privilege::SysAudit) {
        let host = daemon.host.read()?;
        #[expect(
            clippy::cast_precision_loss,
            reason = "a number of processors is small"
        )]
        let maxcpu = host.cpus as f64;
        row.figures = Some(Figures {
            cpu: host.cpu,
            maxcpu,
            mem: host.memory.used(),
            maxmem: host.memory.total,
            uptime: host.uptime_s,
        });
        row.disk = Some(host.root.used());
        row.maxdisk = Some(host.root.total);
    }
    text(&[row])
}

async fn storages(daemon: &Daemon, caller: &Caller) -> Result<Vec<u8>, Error> {
    let all = daemon.node.storage().status().await?;
    let seen = all
        .iter()
        .filter(|status| is_visible(caller, status.section.name.as_str()));
    let rows: Vec<Resource<'_>> = seen
        .map(|status| {
            let name = status.section.name.as_str();
            let node = daemon.node.name();
            let contents: Vec<&str> = status
                .contents
                .iter()
                .map(|content| content.as_str())
                .collect();
            Resource {
                id: format!("storage/{node}/{name}"),
                kind: "storage",
                node,
                status: if status.space.is_some() {
                    "available"
                } else {
                    "unknown"
                },
                storage: Some(name),
                disk: status.space.map(|space| space.used_bytes),
                maxdisk: status.space.map(|space| space.total_bytes),
                content: Some(contents.join(",")),
                plugintype: Some(&status.section.kind),
                shared: Some(u8::from(storage::is_shared(&status.section))),
                ..Resource::default()
            }
        })
        .collect();
    text(&rows)
}

async fn guests(daemon: &Daemon, caller: &Caller) -> Result<Vec<u8>, Error> {
    let all = daemon.node.guests().list().await?;
    let seen = all
        .iter()
        .filter(|status| caller.has(&format!("/vms/{}", status.id), Privilege::VmAudit));
    let rows: Vec<Resource<'_>> = seen
        .map(|status| {
            let kind = status.kind.word();
            Resource {
                id: format!("{kind}/{}", status.id),
                kind,
                node: daemon.node.name(),
                status: if status.running { "running" } else { "stopped" },
                vmid: Some(status.id.into()),
                name: Some(&status.name),
                figures: Some(Figures {
                    cpu: status.cpu,
                    maxcpu: status.cpus,
                    mem: status.load.memory_bytes,
                    maxmem: status.memory_bytes_max,
                    uptime: status.uptime_s,
                }),
                traffic: Some(Traffic {
                    netin: status.load.received_bytes,
                    netout: status.load.sent_bytes,
                    diskread: status.load.read_bytes,
                    diskwrite: status.load.written_bytes,
                }),
                disk: Some(status.load.disk_bytes),
                maxdisk: Some(status.disk_bytes_max),
                template: Some(u8::from(status.template)),
                tags: status.tags.as_deref(),
                lock: status.lock.as_deref(),
                ..Resource::default()
            }
        })
        .collect();
    text(&rows)
}

async fn members(call: Call) -> Result<Answer, Refusal> {
    let name = call.daemon.node.name();
    // A node alone has no row of type cluster, as in PVE.
    Ok(Answer::Data(json!([{
        "type": "node", "id": format!("node/{name}"), "name": name, "nodeid": 0, "ip": call.daemon.address.to_string(),
        "local": 1, "online": 1, "level": "",
    }])))
}

async fn next_id(call: Call) -> Result<Answer, Refusal> {
    let cluster = call.daemon.node.cluster();
    let id = match call.values.number::<GuestId>("vmid") {
        Some(id) => {
            cluster.check_free(id)?;
            id
        }
        None => cluster.next_id()?,
    };
    // A text, as PVE's nodes send it, whatever their schema says.
    Ok(Answer::Data(json!(id.to_string())))
}

async fn options(call: Call) -> Result<Answer, Refusal> {
    Ok(Answer::Data(call.daemon.node.cluster().options()?.into()))
}

async fn set_options(call: Call) -> Result<Answer, Refusal> {
    let known = |name: &str| OPTIONS.iter().any(|option| option.name == name);
    let set = call.values.filtered(known);
    let delete = call.values.list("delete");
    let digest = call.values.text("digest").map(str::to_owned);
    let node = call.daemon.node.clone();
    node.cluster()
        .set_options(set, &delete, digest.as_deref())
        .await?;
    Ok(Answer::NULL)
}

async fn pools(_: Call) -> Result<Answer, Refusal> {
    Ok(Answer::Data(json!([])))
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! GET /cluster/resources: everything that there is in one list, which every client asks for first, and again every few
//! seconds.
//!
//! The guests' rows are written once for each listing of the manager (`Guests::list` answers with the same one until
//! something changes) and sent as they are to whoever sees all guests; others get theirs row by row.

use std::sync::{Arc, Mutex};

use atoll_manager::access::{Caller, Check, Privilege};
use atoll_manager::error::Error;
use atoll_manager::guest::Status;
use atoll_manager::schema::{Kind, Param};
use bytes::Bytes;
use serde::Serialize;

use super::storage::is_visible;
use super::{serve, storage};
use crate::answer::{Answer, Refusal};
use crate::daemon::Daemon;
use crate::route::{Call, Returns, Route};

pub const ROUTES: &[Route] = &[Route::get(
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
.check(Check::AnyUser)];

/// The guests' rows as they were written last.
#[derive(Default)]
pub struct GuestRows {
    /// Held for a comparison, or while one thread writes the rows that others wait for.
    last: Mutex<Option<Arc<Written>>>,
}

/// Rows in the order of their guests, divided by commas.
struct Written {
    guests: Arc<[Status]>,
    text: Vec<u8>,
    /// Where each row ends in the text, the comma behind it left out.
    ends: Vec<usize>,
}

impl GuestRows {
    fn of(&self, guests: Arc<[Status]>, node: &str) -> Result<Arc<Written>, Error> {
        let mut last = self.last.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(written) = last.as_ref()
            && Arc::ptr_eq(&written.guests, &guests)
        {
            return Ok(Arc::clone(written));
        }
        let (mut text, mut ends) = (Vec::new(), Vec::with_capacity(guests.len()));
        for status in guests.iter() {
            if !text.is_empty() {
                text.push(b',');
            }
            write(&mut text, &guest(status, node))?;
            ends.push(text.len());
        }
        let written = Arc::new(Written { guests, text, ends });
        *last = Some(Arc::clone(&written));
        Ok(written)
    }
}

impl Written {
    /// Adds the rows that the caller may see to a list.
    fn add_visible(&self, list: &mut List, caller: &Caller) {
        if caller.has_all_below("/vms", Privilege::VmAudit) {
            return list.add(&self.text);
        }
        let mut start = 0;
        for (status, end) in self.guests.iter().zip(&self.ends) {
            if caller.has(&format!("/vms/{}", status.id), Privilege::VmAudit) {
                list.add(&self.text[start..*end]);
            }
            start = end + 1;
        }
    }
}

/// A JSON list that is being written.
struct List(Vec<u8>);

impl List {
    /// Adds one row or several.
    fn add(&mut self, rows: &[u8]) {
        if rows.is_empty() {
            return;
        }
        if self.0.len() > 1 {
            self.0.push(b',');
        }
        self.0.extend_from_slice(rows);
    }

    fn add_row(&mut self, row: &Resource<'_>) -> Result<(), Error> {
        let mut text = Vec::new();
        write(&mut text, row)?;
        self.add(&text);
        Ok(())
    }
}

fn write(text: &mut Vec<u8>, row: &Resource<'_>) -> Result<(), Error> {
    serde_json::to_writer(text, row)
        .map_err(|error| Error::failed("write the list of resources", error))
}

/// One resource. A struct, so that a thousand of them are written without a map each.
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
    let (daemon, caller) = (Arc::clone(&call.daemon), call.caller().clone());
    let kind = call.values.text("type").map(str::to_owned);
    let wanted = |this: &str| kind.as_deref().is_none_or(|kind| kind == this);
    let mut list = List(vec![b'[']);
    if wanted("node") {
        list.add_row(&node(&daemon, &caller)?)?;
    }
    if wanted("storage") {
        add_storages(&mut list, &daemon, &caller).await?;
    }
    if wanted("vm") {
        let guests = daemon.node.guests().list().await?;
        let rows = daemon.guest_rows.of(guests, daemon.node.name())?;
        rows.add_visible(&mut list, &caller);
    }
    list.0.push(b']');
    Ok(Answer::Text(Bytes::from(list.0)))
}

fn node<'a>(daemon: &'a Daemon, caller: &Caller) -> Result<Resource<'a>, Error> {
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
    Ok(row)
}

async fn add_storages(list: &mut List, daemon: &Daemon, caller: &Caller) -> Result<(), Error> {
    let all = daemon.node.storage().status().await?;
    for status in &all {
        let (name, node) = (status.section.name.as_str(), daemon.node.name());
        if !is_visible(caller, name) {
            continue;
        }
        let contents: Vec<&str> = status.contents.iter().map(|c| c.as_str()).collect();
        list.add_row(&Resource {
            id: format!("storage/{node}/{name}"),
            kind: "storage",
            node,
            status: match status.space {
                Some(_) => "available",
                None => "unknown",
            },
            storage: Some(name),
            disk: status.space.map(|space| space.used_bytes),
            maxdisk: status.space.map(|space| space.total_bytes),
            content: Some(contents.join(",")),
            plugintype: Some(&status.section.kind),
            shared: Some(u8::from(storage::is_shared(&status.section))),
            ..Resource::default()
        })?;
    }
    Ok(())
}

fn guest<'a>(status: &'a Status, node: &'a str) -> Resource<'a> {
    let kind = status.kind.word();
    Resource {
        id: format!("{kind}/{}", status.id),
        kind,
        node,
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
}

// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The routes: one table a file. A row names its parameters, its answer and the privilege that it takes; `route`
//! checks all of it before the handler below the table runs.

mod access;
mod agent;
mod atoll;
mod capabilities;
mod cluster;
mod disks;
mod guest_actions;
mod guests;
mod images;
mod nodes;
pub mod parameters;
mod resources;
mod series;
mod snapshots;
mod storage;
mod tasks;
mod templates;
mod terminals;
mod ticket;
mod volumes;

pub use resources::GuestRows;

use std::collections::BTreeMap;

use serde_json::Value;

use crate::route::Route;

/// Every table.
pub const TABLES: &[&[Route]] = &[
    access::ROUTES,
    agent::PLAIN,
    agent::ROUTES,
    atoll::ROUTES,
    capabilities::ROUTES,
    cluster::ROUTES,
    disks::ROUTES,
    guest_actions::CONTAINERS,
    guest_actions::RESET,
    guest_actions::VMS,
    guests::ASYNC_UPDATE,
    guests::CONTAINERS,
    guests::INTERFACES,
    guests::VMS,
    images::ROUTES,
    nodes::ROUTES,
    resources::ROUTES,
    series::ROUTES,
    snapshots::CONTAINERS,
    snapshots::VMS,
    storage::ROUTES,
    tasks::ROUTES,
    templates::ROUTES,
    terminals::CONTAINERS,
    terminals::NODES,
    terminals::VMS,
    ticket::ROUTES,
    volumes::ROUTES,
];

/// An async function as a row's handler.
macro_rules! serve {
    ($handler:path) => {
        |call| Box::pin($handler(call))
    };
}
use serve;

/// A boolean as PVE sends it.
fn bit(flag: bool) -> Value {
    u8::from(flag).into()
}

/// An object of those members that there are.
fn object<const N: usize>(members: [(&str, Option<Value>); N]) -> Value {
    let present = members
        .into_iter()
        .filter_map(|(name, value)| Some((name.to_owned(), value?)));
    present.collect::<serde_json::Map<_, _>>().into()
}

/// Texts by name as an object.
fn texts(members: &BTreeMap<String, String>) -> Value {
    let texts = members.iter().map(|(k, v)| (k.clone(), v.as_str().into()));
    texts.collect::<serde_json::Map<_, _>>().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What clients of the first release were promised, in the order of the promise: methods and paths, with Q for
    /// `/nodes/{node}/qemu/{vmid}`, X for `/nodes/{node}/lxc/{vmid}` and N for `/nodes/{node}`.
    const PROMISED: &str = "
        GET /version
        GET POST /access/ticket
        GET POST /access/users
        GET PUT DELETE /access/users/{userid}
        GET /access/users/{userid}/token
        GET POST PUT DELETE /access/users/{userid}/token/{tokenid}
        GET /access/permissions
        GET PUT /access/acl
        PUT /access/password
        GET /access/domains
        GET POST /access/groups
        GET POST /access/roles
        GET /cluster/resources
        GET /cluster/status
        GET /cluster/nextid
        GET /cluster/tasks
        GET PUT /cluster/options
        GET /nodes
        GET N/status
        GET N/tasks
        GET N/tasks/{upid}/log
        GET N/tasks/{upid}/status
        DELETE N/tasks/{upid}
        GET N/storage
        GET N/storage/{storage}/status
        GET POST N/storage/{storage}/content
        GET DELETE N/storage/{storage}/content/{volume}
        POST N/storage/{storage}/upload
        POST N/storage/{storage}/download-url
        GET N/network
        GET N/rrddata
        GET N/capabilities/qemu/cpu
        GET N/capabilities/qemu/machines
        POST N/termproxy
        GET N/vncwebsocket
        GET POST N/qemu
        GET POST N/lxc
        GET PUT POST Q/config
        GET PUT X/config
        GET QX/pending
        GET QX/status/current
        POST QX/status/start
        POST QX/status/stop
        POST QX/status/shutdown
        POST QX/status/reboot
        POST QX/status/suspend
        POST QX/status/resume
        PUT QX/resize
        PUT Q/unlink
        POST Q/move_disk
        POST X/move_volume
        DELETE QX
        GET QX/rrddata
        POST QX/termproxy
        GET QX/vncwebsocket
    ";

    #[test]
    fn every_promised_route_is_served() {
        let (q, x) = ("/nodes/{node}/qemu/{vmid}", "/nodes/{node}/lxc/{vmid}");
        let served = |method: &str, path: &str| {
            let mut rows = TABLES.iter().copied().flatten();
            rows.any(|row| row.method.name() == method && row.path == path)
        };
        for line in PROMISED
            .lines()
            .map(str::trim)
            .filter(|line| !line.is_empty())
        {
            let (methods, path) = line.rsplit_once(' ').unwrap();
            let paths = match path.split_once('/').unwrap_or((path, "")) {
                ("QX", _) => vec![path.replacen("QX", q, 1), path.replacen("QX", x, 1)],
                ("Q", _) => vec![path.replacen('Q', q, 1)],
                ("X", _) => vec![path.replacen('X', x, 1)],
                ("N", _) => vec![path.replacen('N', "/nodes/{node}", 1)],
                _ => vec![path.to_owned()],
            };
            for (method, path) in methods
                .split(' ')
                .flat_map(|m| paths.iter().map(move |p| (m, p)))
            {
                assert!(served(method, path), "{method} {path}");
            }
        }
    }
}

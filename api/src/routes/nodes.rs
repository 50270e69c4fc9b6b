// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Nodes: which there are, how each is, its network interfaces.

use std::time::Duration;

use atoll_manager::access::{Check, Privilege};
use atoll_manager::error::Error;
use atoll_manager::guest::Ask;
use atoll_manager::guest::bulk::{StartAll, StopAll};
use atoll_manager::host::{HostStatus, Memory};
use atoll_manager::id::GuestId;
use atoll_manager::network::interfaces;
use atoll_manager::schema::{Kind, Param, format};
use serde_json::{Value, json};

use super::{bit, object, serve};
use crate::answer::{Answer, Refusal};
use crate::route::{Call, Returns, Route};

/// Who may see a node's figures.
pub const AUDITS: Check = Check::All {
    path: "/nodes/{node}",
    privileges: &[Privilege::SysAudit],
};

const VMS: Param = Param::new(
    "vms",
    Kind::Format(format::VMID_LIST),
    "Only these guests, divided by commas. Needs VM.PowerMgmt on each, or on / for all.",
);
const WORKERS: Param = Param::new(
    "max-workers",
    Kind::Integer { min: 1, max: 64 },
    "Accepted for PVE's clients: the node's own bound on tasks holds.",
);

pub const ROUTES: &[Route] = &[
    Route::get("/nodes", "List the nodes of the cluster.", serve!(list))
        .returns(Returns::List(&[
            "node", "status", "cpu", "maxcpu", "mem", "maxmem", "disk", "maxdisk", "uptime",
            "level",
        ]))
        .check(Check::AnyUser),
    Route::get(
        "/nodes/{node}/status",
        "Show how a node is.",
        serve!(status),
    )
    .returns(Returns::Object(&[
        "cpu",
        "wait",
        "cpuinfo",
        "loadavg",
        "memory",
        "swap",
        "rootfs",
        "uptime",
        "kversion",
        "current-kernel",
        "pveversion",
    ]))
    .check(AUDITS),
    Route::get(
        "/nodes/{node}/version",
        "Version of a node.",
        serve!(version),
    )
    .returns(Returns::Object(&["version", "release", "repoid"]))
    .check(Check::AnyUser),
    Route::post(
        "/nodes/{node}/startall",
        "Start the guests of a node that have onboot, in their order.",
        serve!(start_all),
    )
    .params(&[
        VMS,
        WORKERS,
        Param::new("force", Kind::Boolean, "Also those without onboot.").default("0"),
    ])
    .returns(Returns::Upid)
    .check(Check::AnyUser),
    Route::post(
        "/nodes/{node}/stopall",
        "Shut down the guests of a node, the last to start first.",
        serve!(stop_all),
    )
    .params(&[
        VMS,
        WORKERS,
        Param::new(
            "force-stop",
            Kind::Boolean,
            "Stop who has not shut down in time.",
        )
        .default("1"),
        Param::new(
            "timeout",
            Kind::Integer { min: 0, max: 7200 },
            "Seconds that each guest has, unless its key `startup` says otherwise.",
        )
        .default("180"),
    ])
    .returns(Returns::Upid)
    .check(Check::AnyUser),
    Route::get(
        "/nodes/{node}/network",
        "List the network interfaces of a node.",
        serve!(network),
    )
    .params(&[Param::new(
        "type",
        Kind::Choice(&[
            "bridge",
            "bond",
            "eth",
            "alias",
            "vlan",
            "any_bridge",
            "any_local_bridge",
        ]),
        "Only interfaces of this type.",
    )])
    .returns(Returns::List(&[
        "iface",
        "type",
        "active",
        "address",
        "netmask",
        "cidr",
        "gateway",
        "bridge_ports",
        "bridge_vlan_aware",
        "method",
    ]))
    .check(Check::AnyUser),
];

async fn version(call: Call) -> Result<Answer, Refusal> {
    super::atoll::version(call).await
}

/// The guests that the call names, or none for all of them. Refused when the caller may not switch each.
fn named(call: &Call) -> Result<Option<Vec<GuestId>>, Refusal> {
    const ALL: Check = switches("/");
    const ONE: Check = switches("/vms/{vmid}");
    if call.values.text("vms").is_none() {
        call.caller().check(&ALL, &|_| None)?;
        return Ok(None);
    }
    let mut ids = Vec::new();
    for number in call.values.list("vms") {
        call.caller().check(&ONE, &|_| Some(&number))?;
        let id = number.parse::<GuestId>();
        ids.push(id.map_err(|e| Error::invalid("vms", e.to_string()))?);
    }
    Ok(Some(ids))
}

const fn switches(path: &'static str) -> Check {
    Check::All {
        path,
        privileges: &[Privilege::VmPowerMgmt],
    }
}

async fn start_all(call: Call) -> Result<Answer, Refusal> {
    let wish = StartAll {
        only: named(&call)?,
        force: call.values.flag("force"),
    };
    let user = call.caller().identity();
    let upid = call.daemon.node.guests().start_all(wish, user)?;
    Ok(Answer::Data(json!(upid.to_string())))
}

async fn stop_all(call: Call) -> Result<Answer, Refusal> {
    let timeout = call.values.number("timeout");
    let wish = StopAll {
        only: named(&call)?,
        ask: Ask {
            timeout: timeout.map_or(Ask::default().timeout, Duration::from_secs),
            force: call.values.flag_if_given("force-stop").unwrap_or(true),
        },
    };
    let user = call.caller().identity();
    let upid = call.daemon.node.guests().stop_all(wish, user)?;
    Ok(Answer::Data(json!(upid.to_string())))
}

/// A node as listings show it; figures only for those who may see them.
async fn list(call: Call) -> Result<Answer, Refusal> {
    let name = call.daemon.node.name();
    let mut row = json!({
        "node": name, "type": "node", "id": format!("node/{name}"), "status": "online", "level": "",
    });
    if call
        .caller()
        .has(&format!("/nodes/{name}"), Privilege::SysAudit)
    {
        let host = call.daemon.host.read()?;
        row["cpu"] = json!(host.cpu);
        row["maxcpu"] = json!(host.cpus);
        row["mem"] = json!(host.memory.used());
        row["maxmem"] = json!(host.memory.total);
        row["disk"] = json!(host.root.used());
        row["maxdisk"] = json!(host.root.total);
        row["uptime"] = json!(host.uptime_s);
    }
    Ok(Answer::Data(json!([row])))
}

fn space(memory: Memory) -> Value {
    json!({ "total": memory.total, "used": memory.used(), "free": memory.available })
}

async fn status(call: Call) -> Result<Answer, Refusal> {
    let host = call.daemon.host.read()?;
    let [system, release, version, machine] = &host.kernel;
    let mut root = space(host.root);
    root["avail"] = json!(host.root.available);
    Ok(Answer::Data(json!({
        "cpu": host.cpu,
        "wait": host.iowait,
        "cpuinfo": cpuinfo(&host),
        "loadavg": host.load,
        "memory": space(host.memory),
        "swap": space(host.swap),
        "rootfs": root,
        "uptime": host.uptime_s,
        "idle": 0,
        "kversion": format!("{system} {release} {version}"),
        "current-kernel": { "sysname": system, "release": release, "version": version, "machine": machine },
        "pveversion": format!("atoll/{}", env!("CARGO_PKG_VERSION")),
    })))
}

fn cpuinfo(host: &HostStatus) -> Value {
    let flags = &host.cpu_flags;
    let has = |flag: &str| flags.split(' ').any(|word| word == flag);
    json!({
        "model": host.cpu_model, "mhz": host.cpu_mhz, "flags": flags, "hvm": bit(has("svm") || has("vmx")).to_string(),
        "cpus": host.cpus, "sockets": host.sockets, "cores": (host.cpus / host.sockets).max(1), "user_hz": 100,
    })
}

async fn network(call: Call) -> Result<Answer, Refusal> {
    let kind = call.values.text("type");
    let wanted = |interface: &&interfaces::Interface| match kind {
        None => true,
        Some("any_bridge" | "any_local_bridge") => interface.kind == "bridge",
        Some(kind) => interface.kind == kind,
    };
    let all = interfaces::list().await?;
    let rows = all.iter().filter(wanted).map(|interface| {
        let of = |v6: bool| {
            interface
                .addresses
                .iter()
                .find(move |cidr| cidr.contains(':') == v6)
        };
        let parts = of(false).and_then(|cidr| cidr.split_once('/'));
        let is_bridge = interface.kind == "bridge";
        object([
            ("iface", Some(json!(interface.name))),
            ("type", Some(json!(interface.kind))),
            ("active", Some(bit(interface.active))),
            ("exists", Some(json!(1))),
            (
                "method",
                Some(json!(if parts.is_some() { "static" } else { "manual" })),
            ),
            ("address", parts.map(|(address, _)| json!(address))),
            ("netmask", parts.map(|(_, length)| json!(length))),
            ("cidr", of(false).map(|cidr| json!(cidr))),
            ("cidr6", of(true).map(|cidr| json!(cidr))),
            (
                "gateway",
                interface.gateway.as_ref().map(|gateway| json!(gateway)),
            ),
            (
                "bridge_ports",
                is_bridge.then(|| json!(interface.ports.join(" "))),
            ),
            ("bridge_vlan_aware", interface.vlan_aware.then(|| bit(true))),
            ("mtu", Some(json!(interface.mtu.to_string()))),
        ])
    });
    Ok(Answer::Data(rows.collect()))
}

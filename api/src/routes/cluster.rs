// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The cluster: its members, its options, its pools. The list of everything in it is in `resources`.

use atoll_manager::access::{Check, Privilege};
use atoll_manager::cluster::OPTIONS;
use atoll_manager::id::GuestId;
use atoll_manager::schema::{Kind, Param, format};
use serde_json::json;

use super::parameters::{DELETE, DIGEST};
use super::serve;
use crate::answer::{Answer, Refusal};
use crate::route::{Call, Returns, Route};

pub const ROUTES: &[Route] = &[
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
        Kind::NumberFormat(format::VMID),
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

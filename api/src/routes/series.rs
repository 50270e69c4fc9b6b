// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Figures over time: of nodes, storages and guests, for charts.

use atoll_manager::access::{Check, Privilege};
use atoll_manager::error::Error;
use atoll_manager::metrics::{Consolidation, Series, Timeframe};
use jiff::Timestamp;
use serde_json::{Map, Value, json};

use super::guests::{id, stored};
use super::nodes::AUDITS;
use super::parameters::{CF, TIMEFRAME};
use super::serve;
use super::volumes::SEES_STORAGE;
use crate::answer::{Answer, Refusal};
use crate::daemon::Daemon;
use crate::route::{Call, Returns, Route, Values};

const SEES_GUEST: Check = Check::All {
    path: "/vms/{vmid}",
    privileges: &[Privilege::VmAudit],
};

pub const ROUTES: &[Route] = &[
    Route::get(
        "/nodes/{node}/rrddata",
        "Figures of a node over time.",
        serve!(node),
    )
    .params(&[TIMEFRAME, CF])
    .returns(Returns::List(&["time"]))
    .check(AUDITS),
    Route::get(
        "/nodes/{node}/storage/{storage}/rrddata",
        "Figures of a storage over time.",
        serve!(storage),
    )
    .params(&[TIMEFRAME, CF])
    .returns(Returns::List(&["time"]))
    .check(SEES_STORAGE),
    Route::get(
        "/nodes/{node}/qemu/{vmid}/rrddata",
        "Figures of a virtual machine over time.",
        serve!(guest),
    )
    .params(&[TIMEFRAME, CF])
    .returns(Returns::List(&["time"]))
    .check(SEES_GUEST),
    Route::get(
        "/nodes/{node}/lxc/{vmid}/rrddata",
        "Figures of a container over time.",
        serve!(guest),
    )
    .params(&[TIMEFRAME, CF])
    .returns(Returns::List(&["time"]))
    .check(SEES_GUEST),
];

async fn node(call: Call) -> Result<Answer, Refusal> {
    let series = Series::Node(call.values.required("node").to_owned());
    query(&call.daemon, &series, &call.values).await
}

async fn storage(call: Call) -> Result<Answer, Refusal> {
    let text = |name: &str| call.values.required(name).to_owned();
    let series = Series::Storage(text("node"), text("storage"));
    query(&call.daemon, &series, &call.values).await
}

async fn guest(call: Call) -> Result<Answer, Refusal> {
    // A guest that is not there has no figures, and one of the other kind is not at this path.
    drop(stored(&call)?);
    let series = Series::Guest(id(&call));
    query(&call.daemon, &series, &call.values).await
}

async fn query(daemon: &Daemon, series: &Series, values: &Values) -> Result<Answer, Refusal> {
    let timeframe = Timeframe::from_word(values.required("timeframe"));
    let timeframe = timeframe.ok_or_else(|| Error::invalid("timeframe", "unknown time span"))?;
    let how = match values.text("cf") {
        Some("MAX") => Consolidation::Max,
        _ => Consolidation::Average,
    };
    let now = Timestamp::now().as_second().unsigned_abs();
    let rows = daemon
        .node
        .metrics()
        .query(series, timeframe, how, now)
        .await?;
    let rows = rows.iter().map(|row| {
        let known = series.columns().iter().zip(&row.values);
        let known =
            known.filter_map(|(column, value)| Some((column.name.to_owned(), json!((*value)?))));
        let mut members: Map<String, Value> = known.collect();
        members.insert("time".to_owned(), json!(row.time));
        Value::Object(members)
    });
    Ok(Answer::Data(rows.collect()))
}

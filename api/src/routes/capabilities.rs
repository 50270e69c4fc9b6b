// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! What machines can be like on a node.

use atoll_manager::access::Check;
use serde_json::{Value, json};

use super::{object, serve};
use crate::answer::{Answer, Refusal};
use crate::route::{Call, Returns, Route};

pub const ROUTES: &[Route] = &[
    Route::get(
        "/nodes/{node}/capabilities/qemu/cpu",
        "List the CPU models that machines can have.",
        serve!(cpu_models),
    )
    .returns(Returns::List(&["name", "vendor", "custom"]))
    .check(Check::AnyUser),
    Route::get(
        "/nodes/{node}/capabilities/qemu/machines",
        "List the boards that machines can have.",
        serve!(boards),
    )
    .returns(Returns::List(&["id", "type", "version"]))
    .check(Check::AnyUser),
];

/// Only those that this host can give. PVE's form; a model here is of the host's vendor.
async fn cpu_models(call: Call) -> Result<Answer, Refusal> {
    let models = call.daemon.node.guests().cpu_models().await?;
    let here = models.iter().filter(|model| model.fits != Some(false));
    let rows = here.map(|model| {
        object([
            ("name", Some(json!(model.name))),
            ("vendor", Some(json!("default"))),
            ("custom", Some(json!(0))),
            ("description", Some(json!(model.description))),
        ])
    });
    Ok(Answer::Data(rows.collect()))
}

/// There is one, which has no versions that a config could ask for.
async fn boards(_: Call) -> Result<Answer, Refusal> {
    let board: Value = json!({ "id": "q35", "type": "q35", "version": "1" });
    Ok(Answer::Data(json!([board])))
}

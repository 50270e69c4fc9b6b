// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! What PVE does not have: the API's own description, for the page's forms and for other programs.

use atoll_manager::access::Check;
use atoll_manager::error::Error;
use atoll_manager::schema::{Kind, Param};

use super::parameters::text;
use super::{TABLES, serve};
use crate::answer::{Answer, Refusal};
use crate::openapi;
use crate::route::{Call, Returns, Route};

pub const ROUTES: &[Route] = &[
    Route::get("/version", "Version of this node.", serve!(version))
        .returns(Returns::Object(&["version", "release", "repoid"]))
        .check(Check::AnyUser),
    Route::get(
        "/atoll/schema",
        "Describe one method of one path, with all its parameters.",
        serve!(schema),
    )
    .params(&[
        Param::new(
            "method",
            Kind::Choice(&["GET", "POST", "PUT", "DELETE"]),
            "The method.",
        )
        .default("GET"),
        Param::new(
            "path",
            text(256),
            "The path, with braces: /nodes/{node}/qemu.",
        )
        .required(),
    ])
    .returns(Returns::Object(&[
        "method",
        "path",
        "description",
        "parameters",
        "permissions",
    ]))
    .check(Check::AnyUser)
    .own(),
    Route::get(
        "/atoll/openapi",
        "The OpenAPI document of this API.",
        serve!(document),
    )
    .returns(Returns::Object(&["openapi", "paths"]))
    .check(Check::AnyUser)
    .own(),
];

/// The version of PVE's API that is followed, for clients that look at it.
const PVE_RELEASE: &str = "9.2";

/// The version of this node, and of PVE's API.
pub async fn version(_: Call) -> Result<Answer, Refusal> {
    Ok(Answer::Data(serde_json::json!({
        "release": PVE_RELEASE,
        "version": format!("{PVE_RELEASE}.0"),
        "repoid": "atoll",
        "atoll": env!("CARGO_PKG_VERSION"),
    })))
}

async fn schema(call: Call) -> Result<Answer, Refusal> {
    let method = call.values.text("method").unwrap_or("GET");
    let path = call.values.required("path");
    let mut routes = TABLES.iter().copied().flatten();
    let route = routes.find(|route| route.path == path && route.method.name() == method);
    let route =
        route.ok_or_else(|| Error::invalid("path", format!("there is no {method} {path}")))?;
    Ok(Answer::Data(openapi::form(route)))
}

async fn document(_: Call) -> Result<Answer, Refusal> {
    Ok(Answer::Data(openapi::document()))
}
